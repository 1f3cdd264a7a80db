package broker

import (
	"fmt"
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	"tidemark/schema"
)

// frame is one message of the log, its envelopes still encoded. The wire form is schema.Frame; it is read and written here without decoding the envelopes, because the
// bytes of field 15 go from the sender to disk and from disk to the socket as they are.
type frame struct {
	Block
	// StreamSeq is the frame's place in its log stream; 0 until it is stored.
	StreamSeq uint64
	// Prev is the stream sequence of the session's frame before; 0 for the first of a history.
	Prev uint64
	Edge string
	// ID is a ULID by which the writer knows its own frame.
	ID string
	// Deleted: this frame ends the history.
	Deleted bool
	// Kind is what the session is, in the first frame of a history only; unspecified means chat, and a SessionCreated in the frame goes before it.
	Kind schema.SessionKind

	// subject and cost are the tail's: where the frame belongs, and what it takes in the ring, in bytes; 0 once it has left it.
	subject string
	cost    int
}

// Field numbers of schema.Frame. TestFrameFieldNumbers compares them with the descriptor.
const (
	frameEpoch     protowire.Number = 1
	frameFirst     protowire.Number = 2
	frameTime      protowire.Number = 3
	frameEdge      protowire.Number = 4
	frameID        protowire.Number = 5
	framePrev      protowire.Number = 6
	frameCount     protowire.Number = 7
	frameDeleted   protowire.Number = 8
	frameKind      protowire.Number = 9
	frameEnvelopes protowire.Number = 15
)

// Bounds of a frame (DESIGN section 4). A submission that is larger by itself makes a frame of its own.
const (
	maxFrameEnvelopes = 4096
	maxFrameBytes     = 256 << 10
	// frameOverhead is more than a frame's header, its NATS header and subject take, in bytes.
	frameOverhead = 8 << 10
)

// appendHeader appends all of the frame but its envelopes.
func (f *frame) appendHeader(b []byte) []byte {
	b = appendString(b, frameEpoch, f.Epoch)
	b = appendUint(b, frameFirst, f.First)
	sec, nano := uint64(f.Time.Unix()), uint64(f.Time.Nanosecond())
	b = protowire.AppendTag(b, frameTime, protowire.BytesType)
	b = protowire.AppendVarint(b, uint64(1+protowire.SizeVarint(sec)+1+protowire.SizeVarint(nano)))
	b = appendVarint(b, 1, sec)
	b = appendVarint(b, 2, nano)
	b = appendString(b, frameEdge, f.Edge)
	b = appendString(b, frameID, f.ID)
	b = appendUint(b, framePrev, f.Prev)
	b = appendUint(b, frameCount, uint64(f.Count))
	if f.Deleted {
		b = appendUint(b, frameDeleted, 1)
	}
	b = appendUint(b, frameKind, uint64(f.Kind))
	return b
}

func appendString(b []byte, n protowire.Number, s string) []byte {
	if s == "" {
		return b
	}
	return protowire.AppendString(protowire.AppendTag(b, n, protowire.BytesType), s)
}

func appendUint(b []byte, n protowire.Number, v uint64) []byte {
	if v == 0 {
		return b
	}
	return appendVarint(b, n, v)
}

func appendVarint(b []byte, n protowire.Number, v uint64) []byte {
	return protowire.AppendVarint(protowire.AppendTag(b, n, protowire.VarintType), v)
}

// parseFrame reads a stored frame. Its region points into data, and is checked to hold Count well-formed records. Fields of later versions are passed over; the envelopes
// must be adjacent, as every writer writes them.
func parseFrame(data []byte) (*frame, error) {
	f := new(frame)
	var from, to, records int
	for b := data; len(b) > 0; {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return nil, badFrame(protowire.ParseError(n))
		}
		m := protowire.ConsumeFieldValue(num, typ, b[n:])
		if m < 0 {
			return nil, badFrame(protowire.ParseError(m))
		}
		at := len(data) - len(b)
		value := b[n : n+m]
		b = b[n+m:]
		if num == frameEnvelopes && typ == protowire.BytesType {
			if records == 0 {
				from = at
			} else if at != to {
				return nil, badFrame(fmt.Errorf("its envelopes are not adjacent"))
			}
			to = at + n + m
			records++
			continue
		}
		f.field(num, typ, value)
	}
	f.Region = data[from:to:to]
	switch {
	case records != f.Count:
		return nil, badFrame(fmt.Errorf("it says %d envelopes and holds %d", f.Count, records))
	case f.Epoch == "" || !f.Deleted && f.Count == 0:
		return nil, badFrame(fmt.Errorf("it has no epoch or no envelopes"))
	case f.First == 0 || f.First+uint64(f.Count) < f.First:
		return nil, badFrame(fmt.Errorf("its seqs cannot be: %d envelopes from %d on", f.Count, f.First))
	}
	return f, nil
}

func (f *frame) field(num protowire.Number, typ protowire.Type, value []byte) {
	switch typ {
	case protowire.VarintType:
		v, _ := protowire.ConsumeVarint(value)
		switch num {
		case frameFirst:
			f.First = v
		case framePrev:
			f.Prev = v
		case frameCount:
			f.Count = int(v)
		case frameDeleted:
			f.Deleted = v != 0
		case frameKind:
			f.Kind = schema.SessionKind(v)
		}
	case protowire.BytesType:
		body, _ := protowire.ConsumeBytes(value)
		switch num {
		case frameEpoch:
			f.Epoch = string(body)
		case frameTime:
			f.Time = parseTime(body)
		case frameEdge:
			f.Edge = string(body)
		case frameID:
			f.ID = string(body)
		}
	default:
		// Of a later version.
	}
}

func parseTime(b []byte) time.Time {
	var sec, nano uint64
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			break
		}
		m := protowire.ConsumeFieldValue(num, typ, b[n:])
		if m < 0 {
			break
		}
		if typ == protowire.VarintType {
			v, _ := protowire.ConsumeVarint(b[n:])
			switch num {
			case 1:
				sec = v
			case 2:
				nano = v
			}
		}
		b = b[n+m:]
	}
	return time.Unix(int64(sec), int64(nano)).UTC()
}

func badFrame(err error) error {
	return &schema.Refusal{Code: schema.Code_CODE_INTERNAL, Message: "A stored frame cannot be read.", Err: err}
}
