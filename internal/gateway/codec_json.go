package gateway

import (
	"regexp"
	"strconv"
	"strings"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"tidemark/broker"
	"tidemark/schema"
)

// protoJSONCodec speaks [schema.ClientFrame] and [schema.ServerFrame] in protobuf's JSON form.
type protoJSONCodec struct{}

func (protoJSONCodec) receive(c *conn, msg []byte) error {
	f := new(schema.ClientFrame)
	if err := protojson.Unmarshal(msg, f); err != nil {
		if c.rejectUnknown(msg, err) {
			return nil
		}
		return &schema.Refusal{
			Code: schema.Code_CODE_INVALID_MESSAGE, Message: "The message is not a frame of the protocol in protobuf's JSON form: " + jsonTrouble(err), Err: err,
		}
	}
	return c.receive(f, len(msg))
}

// protoNoise is what protojson puts before what it has to say; what it puts between differs from build to build.
var protoNoise = regexp.MustCompile(`^proto:[\s\x{a0}]*(?:syntax error )?(?:\(line (\d+):(\d+)\): )?`)

// jsonTrouble is what protojson says of a message, for who wrote it.
func jsonTrouble(err error) string {
	text := strings.ToValidUTF8(err.Error(), "?")
	at := protoNoise.FindStringSubmatch(text)
	if at == nil {
		return text
	}
	text = text[len(at[0]):]
	if at[1] != "" {
		text += ", at line " + at[1] + ", column " + at[2]
	}
	return text + "."
}

// rejectUnknown rejects a publish that is wrong only in that it has keys which this version does not know, a payload's type among them. The connection, and what else it carries, goes on.
func (c *conn) rejectUnknown(msg []byte, why error) bool {
	f := new(schema.ClientFrame)
	if (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(msg, f) != nil || f.GetPublish() == nil {
		return false
	}
	r := &schema.Refusal{
		Code: schema.Code_CODE_INVALID_MESSAGE, Message: "The publish has a key that the protocol does not know: " + jsonTrouble(why), Err: why,
	}
	for _, e := range f.GetPublish().GetEnvelopes() {
		if e.GetPayload() == nil {
			r.Code = schema.Code_CODE_UNKNOWN_TYPE
		}
	}
	if p := c.admit(f.GetPublish().GetPublishId(), len(msg)); p != nil {
		if err := c.spend(len(f.GetPublish().GetEnvelopes()), p.came); err != nil {
			r = schema.AsRefusal(err)
		}
		p.answer(broker.Receipt{}, r)
	}
	return true
}

func (protoJSONCodec) frame(w *writer, f *schema.ServerFrame) {
	b, err := protojson.MarshalOptions{}.MarshalAppend(w.out.buf, f)
	if err != nil {
		w.c.fail(err)
		return
	}
	w.out.buf = b
	w.out.end()
}

func (protoJSONCodec) events(w *writer, a *attachment, b *broker.Batch) {
	epoch := a.epochToTell(b)
	views := b.Views
	for {
		n, _ := fit(views)
		through := b.Through
		if n < len(views) {
			through = views[n-1].To
		}
		out := append(w.out.buf, `{"events":{"channel":`...)
		out = strconv.AppendUint(out, uint64(a.channel), 10)
		out = append(out, `,"throughSeq":"`...)
		out = strconv.AppendUint(out, through, 10)
		out = append(out, '"')
		if epoch != "" {
			// A ULID: nothing in it needs an escape.
			out = append(out, `,"epoch":"`...)
			out = append(out, epoch...)
			out = append(out, '"')
		}
		out = append(out, `,"envelopes":[`...)
		comma := false
		for _, v := range views[:n] {
			for _, text := range v.Encoded(broker.FormProtoJSON, protoJSONEnvelope) {
				if comma {
					out = append(out, ',')
				}
				comma = true
				out = append(out, text...)
			}
			w.envelopes += v.Len()
		}
		w.out.buf = append(out, "]}}"...)
		w.out.end()
		if views = views[n:]; len(views) == 0 {
			return
		}
		epoch = ""
	}
}

// protoJSONEnvelope makes protobuf's JSON form of stored bytes.
func protoJSONEnvelope(raw []byte) []byte {
	b, err := protojson.Marshal(decoded(raw))
	if err != nil {
		// Validated before it was stored; what is left is text that became invalid on disk. The place in the sequence is kept.
		return []byte("{}")
	}
	return b
}

// decoded is the envelope in stored bytes.
func decoded(raw []byte) *schema.Envelope {
	e := new(schema.Envelope)
	if err := proto.Unmarshal(raw, e); err != nil {
		// It was scanned and validated before it was stored, so this is damage; its place in the sequence is shown.
		s, _ := schema.Scan(raw) // what it found before the damage is used
		e = &schema.Envelope{Seq: s.Seq, Payload: &schema.Envelope_System{System: &schema.System{Message: "This envelope cannot be read: its stored bytes are damaged."}}}
	}
	return e
}

func (p protoJSONCodec) work(w *writer, s *subscription, items []*broker.Item) {
	m := &schema.Work{Channel: s.channel, Items: make([]*schema.WorkDelivery, 0, len(items))}
	for _, it := range items {
		m.Items = append(m.Items, &schema.WorkDelivery{
			WorkId: it.ID, Session: it.Session.Name, Epoch: it.Epoch, Attempt: uint32(it.Attempt), Deadline: timestamppb.New(it.Deadline), Envelope: decoded(it.Envelope), Cancelled: it.Cancelled,
		})
	}
	p.frame(w, &schema.ServerFrame{Frame: &schema.ServerFrame_Work{Work: m}})
}

func (p protoJSONCodec) published(w *writer, run []*pending) {
	m := &schema.Published{Durability: w.c.g.cfg.Log.Status().Durability, Acks: make([]*schema.Ack, 0, len(run))}
	for _, r := range run {
		m.Acks = append(m.Acks, &schema.Ack{
			PublishId: r.id, FirstSeq: r.receipt.First, LastSeq: r.receipt.Last, Duplicate: r.receipt.Duplicate, Epoch: r.epochToTell(),
			Replaced: r.receipt.Replaced,
		})
	}
	p.frame(w, &schema.ServerFrame{Frame: &schema.ServerFrame_Published{Published: m}})
}

func (p protoJSONCodec) rejected(w *writer, r *pending) { p.frame(w, rejectedFrame(r)) }
