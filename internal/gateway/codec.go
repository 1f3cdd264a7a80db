package gateway

import (
	"time"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"tidemark/broker"
	"tidemark/schema"
)

// codec is how a protocol says things. receive belongs to the reader, the rest to the writer, to whose out they append whole messages.
type codec interface {
	// receive handles one message of the peer. The error ends the connection.
	receive(c *conn, msg []byte) error
	// frame says anything that has no method of its own. Frames that the protocol does not have are left out.
	frame(w *writer, f *schema.ServerFrame)
	// events says what a follower got.
	events(w *writer, a *attachment, b *broker.Batch)
	// work hands items out; there is one at least.
	work(w *writer, s *subscription, items []*broker.Item)
	// published acknowledges publishes; the run is not empty.
	published(w *writer, run []*pending)
	// rejected says that one was not stored.
	rejected(w *writer, p *pending)
}

var codecs = map[Protocol]codec{ //nolint:gochecknoglobals // a table that nothing writes
	Proto:        protoCodec{},
	ProtoPublish: protoPublishCodec{},
	ProtoJSON:    protoJSONCodec{},
	SessionJSON:  sessionCodec{},
}

// protoCodec speaks [schema.ClientFrame] and [schema.ServerFrame] in binary. What comes with every token, publish and events, is read and written without decoding envelopes.
type protoCodec struct{}

func (protoCodec) receive(c *conn, msg []byte) error {
	if body, ok := solePublish(msg); ok {
		if err := c.greet(); err != nil {
			return err
		}
		return c.publishEncoded(body)
	}
	f := new(schema.ClientFrame)
	if err := proto.Unmarshal(msg, f); err != nil {
		return malformed(err)
	}
	return c.receive(f, len(msg))
}

// solePublish returns the body of a frame that is a publish and nothing else, as every client writes it.
func solePublish(msg []byte) ([]byte, bool) {
	if len(msg) == 0 || msg[0] != byte(clientPublish)<<3|byte(protowire.BytesType) {
		return nil, false
	}
	body, n := protowire.ConsumeBytes(msg[1:])
	return body, n == len(msg)-1
}

func (protoCodec) frame(w *writer, f *schema.ServerFrame) {
	b, err := proto.MarshalOptions{}.MarshalAppend(w.out.buf, f)
	if err != nil {
		// Strings in it come from the client, checked to be UTF-8, or from us.
		w.c.fail(err)
		return
	}
	w.out.buf = b
	w.out.end()
}

// Field numbers of [schema.ServerFrame], [schema.Events], [schema.Published], [schema.Ack], [schema.Work], [schema.WorkDelivery] and of a Timestamp. TestWireFieldNumbers compares them with the descriptors.
const (
	serverEvents    protowire.Number = 1
	serverPublished protowire.Number = 2

	eventsChannel   protowire.Number = 1
	eventsThrough   protowire.Number = 2
	eventsEpoch     protowire.Number = 3
	eventsEnvelopes protowire.Number = 15

	publishedDurability protowire.Number = 1
	publishedAcks       protowire.Number = 2

	ackID        protowire.Number = 1
	ackFirst     protowire.Number = 2
	ackLast      protowire.Number = 3
	ackDuplicate protowire.Number = 4
	ackEpoch     protowire.Number = 5
	ackReplaced  protowire.Number = 6

	serverWork protowire.Number = 14

	workChannel protowire.Number = 1
	workItems   protowire.Number = 2

	deliveryID        protowire.Number = 1
	deliverySession   protowire.Number = 2
	deliveryEpoch     protowire.Number = 3
	deliveryAttempt   protowire.Number = 4
	deliveryDeadline  protowire.Number = 5
	deliveryEnvelope  protowire.Number = 6
	deliveryCancelled protowire.Number = 7

	timeSeconds protowire.Number = 1
	timeNanos   protowire.Number = 2
)

// events copies the stored envelopes as they are: they are records of field 15 in the log's frames and in Events alike.
func (protoCodec) events(w *writer, a *attachment, b *broker.Batch) {
	epoch := a.epochToTell(b)
	views := b.Views
	for {
		n, size := fit(views)
		through := b.Through
		if n < len(views) {
			through = views[n-1].To
		}
		head := sizeUint(eventsChannel, uint64(a.channel)) + sizeUint(eventsThrough, through) + sizeString(eventsEpoch, epoch)
		out := protowire.AppendTag(w.out.buf, serverEvents, protowire.BytesType)
		out = protowire.AppendVarint(out, uint64(head+size))
		out = appendUint(out, eventsChannel, uint64(a.channel))
		out = appendUint(out, eventsThrough, through)
		out = appendString(out, eventsEpoch, epoch)
		for _, v := range views[:n] {
			out = append(out, v.Records()...)
			w.envelopes += v.Len()
		}
		w.out.buf = out
		w.out.end()
		if views = views[n:]; len(views) == 0 {
			return
		}
		epoch = ""
	}
}

// fit says how many of the views make one message, and their bytes: what a fetch brought may be a few messages' worth. A view is at most about roundBytes, or one envelope.
func fit(views []broker.View) (n, size int) {
	for _, v := range views {
		s := len(v.Records())
		if n > 0 && size+s > 2*roundBytes {
			break
		}
		n, size = n+1, size+s
	}
	return n, size
}

// epochToTell is the session's history, where the follower's attached frame could not say it.
func (a *attachment) epochToTell(b *broker.Batch) string {
	if !a.tellEpoch || b.Epoch == "" {
		return ""
	}
	a.tellEpoch = false
	return b.Epoch
}

// epochToTell is the session's history, where this connection's last acknowledgement for it was of another, or there was none. Called by the writer.
func (p *pending) epochToTell() string {
	if p.receipt.Epoch == p.target.epoch {
		return ""
	}
	p.target.epoch = p.receipt.Epoch
	return p.receipt.Epoch
}

// work copies the stored envelopes as they are.
func (protoCodec) work(w *writer, s *subscription, items []*broker.Item) {
	// The body's size is needed before the body: it is written behind what is there, and the header put before it.
	from := len(w.out.buf)
	out := appendUint(w.out.buf, workChannel, uint64(s.channel))
	for _, it := range items {
		deadline := timeSize(it.Deadline)
		size := sizeUint(deliveryID, it.ID) + sizeString(deliverySession, it.Session.Name) + sizeString(deliveryEpoch, it.Epoch) + sizeUint(deliveryAttempt, uint64(it.Attempt)) +
			protowire.SizeTag(deliveryDeadline) + protowire.SizeBytes(deadline) + protowire.SizeTag(deliveryEnvelope) + protowire.SizeBytes(len(it.Envelope))
		if it.Cancelled {
			size += sizeUint(deliveryCancelled, 1)
		}
		out = protowire.AppendTag(out, workItems, protowire.BytesType)
		out = protowire.AppendVarint(out, uint64(size))
		out = appendUint(out, deliveryID, it.ID)
		out = appendString(out, deliverySession, it.Session.Name)
		out = appendString(out, deliveryEpoch, it.Epoch)
		out = appendUint(out, deliveryAttempt, uint64(it.Attempt))
		out = protowire.AppendTag(out, deliveryDeadline, protowire.BytesType)
		out = protowire.AppendVarint(out, uint64(deadline))
		out = appendTime(out, it.Deadline)
		out = protowire.AppendTag(out, deliveryEnvelope, protowire.BytesType)
		out = protowire.AppendBytes(out, it.Envelope)
		if it.Cancelled {
			out = appendUint(out, deliveryCancelled, 1)
		}
	}
	w.out.buf = withHeader(out, from, serverWork)
	w.out.end()
}

// timeSize is how many bytes appendTime appends.
func timeSize(t time.Time) int {
	return sizeUint(timeSeconds, uint64(t.Unix())) + sizeUint(timeNanos, uint64(t.Nanosecond()))
}

// appendTime appends the body of a Timestamp.
func appendTime(b []byte, t time.Time) []byte {
	return appendUint(appendUint(b, timeSeconds, uint64(t.Unix())), timeNanos, uint64(t.Nanosecond()))
}

// withHeader puts the header of a frame before its body, which begins at from.
func withHeader(out []byte, from int, frame protowire.Number) []byte {
	body := len(out) - from
	var room [2 + 10]byte
	header := protowire.AppendTag(room[:0], frame, protowire.BytesType)
	header = protowire.AppendVarint(header, uint64(body))
	out = append(out, header...)
	copy(out[from+len(header):], out[from:from+body])
	copy(out[from:], header)
	return out
}

func (protoCodec) published(w *writer, run []*pending) {
	// The body's size is needed before the body: it is written behind what is there, and the header put before it.
	from := len(w.out.buf)
	out := appendUint(w.out.buf, publishedDurability, uint64(w.c.g.cfg.Log.Status().Durability))
	for _, p := range run {
		r := &p.receipt
		epoch := p.epochToTell()
		size := sizeUint(ackID, p.id) + sizeUint(ackFirst, r.First) + sizeUint(ackLast, r.Last) + sizeString(ackEpoch, epoch)
		if r.Duplicate {
			size += sizeUint(ackDuplicate, 1)
		}
		if r.Replaced {
			size += sizeUint(ackReplaced, 1)
		}
		out = protowire.AppendTag(out, publishedAcks, protowire.BytesType)
		out = protowire.AppendVarint(out, uint64(size))
		out = appendUint(out, ackID, p.id)
		out = appendUint(out, ackFirst, r.First)
		out = appendUint(out, ackLast, r.Last)
		if r.Duplicate {
			out = appendUint(out, ackDuplicate, 1)
		}
		out = appendString(out, ackEpoch, epoch)
		if r.Replaced {
			out = appendUint(out, ackReplaced, 1)
		}
	}
	w.out.buf = withHeader(out, from, serverPublished)
	w.out.end()
}

func (p protoCodec) rejected(w *writer, r *pending) { p.frame(w, rejectedFrame(r)) }

func appendUint(b []byte, n protowire.Number, v uint64) []byte {
	if v == 0 {
		return b
	}
	return protowire.AppendVarint(protowire.AppendTag(b, n, protowire.VarintType), v)
}

func sizeUint(n protowire.Number, v uint64) int {
	if v == 0 {
		return 0
	}
	return protowire.SizeTag(n) + protowire.SizeVarint(v)
}

func appendString(b []byte, n protowire.Number, s string) []byte {
	if s == "" {
		return b
	}
	return protowire.AppendString(protowire.AppendTag(b, n, protowire.BytesType), s)
}

func sizeString(n protowire.Number, s string) int {
	if s == "" {
		return 0
	}
	return protowire.SizeTag(n) + protowire.SizeBytes(len(s))
}

// protoPublishCodec is for a stream that only publishes.
type protoPublishCodec struct{ protoCodec }

func (protoPublishCodec) receive(c *conn, msg []byte) error { return c.publishEncoded(msg) }
