package schema

import (
	"encoding/binary"
	"math"
	"math/rand/v2"
	"time"
	"unicode/utf8"

	"github.com/oklog/ulid/v2"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// Field numbers of [Envelope] that the log reads and writes without decoding the rest. TestFieldNumbers compares them with the descriptor.
const (
	fieldID       protowire.Number = 1
	fieldSeq      protowire.Number = 2
	fieldTime     protowire.Number = 3
	fieldSource   protowire.Number = 4
	fieldProducer protowire.Number = 5
	fieldRequest  protowire.Number = 6
	fieldReplyTo  protowire.Number = 7
	fieldFirstSeq protowire.Number = 14
)

// Scanned is what the log needs to know of an encoded envelope. Its slices point into the bytes that were scanned.
type Scanned struct {
	// ID is the zero ULID where the envelope has none.
	ID  ulid.ULID
	Seq uint64
	// Kind is 0 where there is no payload that this version knows.
	Kind Kind
	// Payload is the encoded payload message.
	Payload []byte
	// Producer is the zero value where the envelope has none.
	Producer ProducerPlace
	// RequestID is nil where the envelope has none.
	RequestID []byte
	// ReplyTo is 0 where the envelope is no reply.
	ReplyTo uint64

	// Where the payload stands in the scanned bytes.
	payloadFrom, payloadTo int
	// source is the encoded Source, nil where the envelope has none.
	source []byte

	hasID, hasTime, hasProducer bool
	// again: a field that may stand once stands twice, or is not of its type, so that only a full decode tells what the bytes mean.
	again bool
	// owned: a field that only the server sets is set.
	owned bool
}

// ProducerPlace is an envelope's place in its producer's own sequence.
type ProducerPlace struct {
	// Owner is whose producer it is: the sender's [Source] as it is encoded, to be compared and no more. A producer's id can be read by everybody who follows the session; under the same id another sender
	// has another producer, so that nobody counts on in a sequence that is not his, or fences it (I6).
	Owner      string
	ID         string
	Epoch, Seq uint64
}

// Scan reads what the log needs to know of an encoded envelope, and checks that the bytes are well-formed protobuf at the top level.
func Scan(raw []byte) (Scanned, error) {
	var s Scanned
	var seen uint32
	for b := raw; len(b) > 0; {
		num, typ, n, m := consumeField(b)
		if m < 0 {
			return s, malformed(protowire.ParseError(m))
		}
		value := b[n : n+m]
		b = b[n+m:]
		end := len(raw) - len(b)
		if num < 32 {
			if seen&(1<<num) != 0 {
				s.again = true
			}
			seen |= 1 << num
		}
		if err := s.field(num, typ, value, end); err != nil {
			return s, err
		}
	}
	if s.hasProducer && s.source != nil {
		s.Producer.Owner = string(s.source)
	}
	return s, nil
}

// field takes in one field whose value ends at end.
func (s *Scanned) field(num protowire.Number, typ protowire.Type, value []byte, end int) error {
	switch num {
	case fieldSeq, fieldReplyTo, fieldFirstSeq:
		if typ != protowire.VarintType {
			s.again = true
			return nil
		}
		if num != fieldReplyTo {
			s.owned = true
		}
		switch v, _ := protowire.ConsumeVarint(value); num {
		case fieldSeq:
			s.Seq = v
		case fieldReplyTo:
			s.ReplyTo = v
			s.again = s.again || v == 0
		}
		return nil
	}
	if typ != protowire.BytesType {
		s.again = s.again || num < 32 || IsPayload(int32(num))
		return nil
	}
	body, _ := protowire.ConsumeBytes(value)
	switch num {
	case fieldID:
		if len(body) == 0 {
			return nil
		}
		s.hasID = true
		return parseULID(&s.ID, body)
	case fieldTime:
		s.hasTime = true
	case fieldSource:
		s.owned, s.source = true, body
	case fieldProducer:
		s.hasProducer = true
		return s.scanProducer(body)
	case fieldRequest:
		s.RequestID = body
	default:
		if Kind(num).Known() {
			if s.Kind != 0 {
				s.again = true
			}
			s.Kind, s.Payload = Kind(num), body
			s.payloadFrom, s.payloadTo = end-len(body), end
		} else if IsPayload(int32(num)) {
			// A later version would take it for the payload: Validate refuses it.
			s.again = true
		}
	}
	return nil
}

// Role is the sender's, as the edge stamped it; unspecified where the envelope has no source.
func (s *Scanned) Role() Role {
	for b := s.source; len(b) > 0; {
		num, typ, n, m := consumeField(b)
		if m < 0 {
			break
		}
		if num == 2 && typ == protowire.VarintType {
			v, _ := protowire.ConsumeVarint(b[n:])
			return Role(v) //nolint:gosec // an enum, as protobuf reads it
		}
		b = b[n+m:]
	}
	return Role_ROLE_UNSPECIFIED
}

func (s *Scanned) scanProducer(b []byte) error {
	p := &s.Producer
	var last protowire.Number
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return malformed(protowire.ParseError(n))
		}
		m := protowire.ConsumeFieldValue(num, typ, b[n:])
		if m < 0 {
			return malformed(protowire.ParseError(m))
		}
		switch {
		case num <= last:
			s.again = true
		case num == 1 && typ == protowire.BytesType:
			id, _ := protowire.ConsumeBytes(b[n:])
			p.ID = string(id)
		case num == 2 && typ == protowire.VarintType:
			p.Epoch, _ = protowire.ConsumeVarint(b[n:])
		case num == 3 && typ == protowire.VarintType:
			p.Seq, _ = protowire.ConsumeVarint(b[n:])
		default:
			s.again = true
		}
		last = num
		b = b[n+m:]
	}
	return nil
}

// plain reports whether a producer's place satisfies Validate.
func (p *ProducerPlace) plain() bool {
	return p.ID != "" && len(p.ID) <= MaxProducerIDBytes && utf8.ValidString(p.ID) && p.Seq > 0
}

// consumeField measures the field at the beginning of b: n bytes of tag, and m of value with its length; m is negative where it is none. Nearly all fields of a token have a tag and a length of one byte.
func consumeField(b []byte) (num protowire.Number, typ protowire.Type, n, m int) {
	if len(b) >= 2 && b[0] >= 1<<3 && b[0] < 1<<7 && b[0]&7 == byte(protowire.BytesType) && int(b[1]) < min(1<<7, len(b)-1) {
		return protowire.Number(b[0] >> 3), protowire.BytesType, 1, 1 + int(b[1])
	}
	if num, typ, n = protowire.ConsumeTag(b); n < 0 {
		return 0, 0, 0, n
	}
	return num, typ, n, protowire.ConsumeFieldValue(num, typ, b[n:])
}

// parseULID accepts the canonical form only, so that equal ids are equal bytes.
func parseULID(id *ulid.ULID, text []byte) error {
	var canonical [ulid.EncodedSize]byte
	err := id.UnmarshalText(text)
	if err == nil {
		err = id.MarshalTextTo(canonical[:])
	}
	if err != nil || string(canonical[:]) != string(text) {
		return &Refusal{Code: Code_CODE_INVALID_MESSAGE, Message: "The envelope's id is not a ULID: 26 upper-case characters of Crockford's base32.", Err: err}
	}
	return nil
}

func malformed(err error) error {
	return &Refusal{Code: Code_CODE_INVALID_MESSAGE, Message: "The envelope is not well-formed protobuf.", Err: err}
}

// Stamp is what an edge adds to every envelope of a connection. It is made once and may be used concurrently.
type Stamp struct {
	// source is the field as it is appended, and owner the Source in it.
	source []byte
	owner  string
}

// NewStamp makes the stamp of a sender.
func NewStamp(source *Source) Stamp {
	// Deterministic, because the same sender must be the same owner of its producers.
	body, err := proto.MarshalOptions{Deterministic: true}.Marshal(source)
	if err != nil {
		// Source holds a checked string and a number: it cannot fail to encode unless the caller broke the contract that strings are UTF-8.
		panic("schema: a source that cannot be encoded: " + err.Error()) //nolint:forbidigo // the caller's contract
	}
	field := protowire.AppendTag(nil, fieldSource, protowire.BytesType)
	return Stamp{source: protowire.AppendBytes(field, body), owner: string(body)}
}

// Accepted is an envelope that was validated and stamped: the stored form without its seq, which the appender adds.
type Accepted struct {
	// Bytes are the envelope, encoded; shared and not to be changed.
	Bytes []byte
	ID    ulid.ULID
	Kind  Kind
	// Producer is the zero value where the envelope has none.
	Producer ProducerPlace
	Payload  []byte
}

// Accept validates an encoded envelope of a sender and stamps it: with who sent it, with the time now and a new ULID where the sender gave none. Fields that this version
// does not know are kept. The error is a [*Refusal] with a sentence about what is wrong.
func (t Stamp) Accept(raw []byte, now time.Time) (Accepted, error) {
	if len(raw) > MaxEnvelopeBytes {
		return Accepted{}, Refuse(Code_CODE_TOO_LARGE, "The envelope has %d bytes; at most %d are allowed.", len(raw), MaxEnvelopeBytes)
	}
	s, err := Scan(raw)
	if err != nil {
		return Accepted{}, err
	}
	if s.owned || s.again || s.Kind != KindToken || s.RequestID != nil || s.hasTime || s.hasProducer && !s.Producer.plain() || !plainToken(s.Payload) {
		if raw, s, err = acceptSlowly(raw, s); err != nil {
			return Accepted{}, err
		}
	}
	out := make([]byte, len(raw), len(raw)+len(t.source)+seqRoom+28+16)
	copy(out, raw)
	if !s.hasID {
		s.ID = mintID(now)
		out = append(out, byte(fieldID<<3|2), ulid.EncodedSize)
		at := len(out)
		out = out[:at+ulid.EncodedSize]
		if err := s.ID.MarshalTextTo(out[at:]); err != nil {
			return Accepted{}, AsRefusal(err)
		}
	}
	if !s.hasTime {
		out = appendTime(out, now)
	}
	out = append(out, t.source...)
	if s.hasProducer {
		// Whatever the sender said of it.
		s.Producer.Owner = t.owner
	}
	return Accepted{Bytes: out, ID: s.ID, Kind: s.Kind, Producer: s.Producer, Payload: out[s.payloadFrom:s.payloadTo]}, nil
}

// mintID makes an id for an envelope whose sender gave none: the time, and 80 random bits. The library's own source of randomness has one lock for the process, and this is done for every token.
func mintID(now time.Time) (id ulid.ULID) {
	binary.BigEndian.PutUint64(id[:8], ulid.Timestamp(now)<<16|rand.Uint64()>>48)
	binary.BigEndian.PutUint64(id[8:], rand.Uint64())
	return id
}

// AcceptEnvelope is Accept for an envelope that is already decoded, as from JSON. It does not keep e.
func (t Stamp) AcceptEnvelope(e *Envelope, now time.Time) (Accepted, error) {
	raw, err := proto.Marshal(e)
	if err != nil {
		return Accepted{}, &Refusal{Code: Code_CODE_INVALID_MESSAGE, Message: "The envelope holds text that is not UTF-8.", Err: err}
	}
	return t.Accept(raw, now)
}

// Stored is the reverse of [Accepted.AppendRecord] without the seq, for an envelope that another edge accepted: it is trusted, not validated again.
func Stored(raw []byte) (Accepted, error) {
	s, err := Scan(raw)
	if err != nil {
		return Accepted{}, err
	}
	return Accepted{Bytes: raw, ID: s.ID, Kind: s.Kind, Producer: s.Producer, Payload: s.Payload}, nil
}

// seqRoom is the most bytes that the seq takes: its tag and a varint.
const seqRoom = 1 + 10

// AppendRecord appends the envelope with its seq to a frame's region: a record of field 15.
func (a Accepted) AppendRecord(region []byte, seq uint64) []byte {
	region = append(region, 15<<3|2)
	region = protowire.AppendVarint(region, uint64(len(a.Bytes)+1+protowire.SizeVarint(seq)))
	region = append(region, a.Bytes...)
	region = append(region, byte(fieldSeq<<3))
	return protowire.AppendVarint(region, seq)
}

// Size is the most bytes that [Accepted.AppendRecord] adds.
func (a Accepted) Size() int { return len(a.Bytes) + seqRoom + 6 }

// acceptSlowly decodes the envelope, validates all of it, and encodes it anew where its bytes cannot be kept as they are.
func acceptSlowly(raw []byte, s Scanned) ([]byte, Scanned, error) {
	e := new(Envelope)
	if err := proto.Unmarshal(raw, e); err != nil {
		return nil, s, malformed(err)
	}
	if s.Kind == 0 && e.Payload == nil {
		return nil, s, Refuse(Code_CODE_UNKNOWN_TYPE, "The envelope has no payload that this version of the server knows.")
	}
	if err := e.Validate(); err != nil {
		return nil, s, err
	}
	if !s.owned && !s.again {
		return raw, s, nil
	}
	// What only the server sets is dropped, so that an envelope that was read can be sent again as it is.
	e.Seq, e.Source, e.FirstSeq = 0, nil, nil
	raw, err := proto.Marshal(e)
	if err != nil {
		return nil, s, malformed(err)
	}
	s, err = Scan(raw)
	return raw, s, err
}

// plainToken reports whether a token's payload satisfies Validate, without decoding it. False means: look closer.
func plainToken(b []byte) bool {
	var hasMessage bool
	var last protowire.Number
	for len(b) > 0 {
		num, typ, n, m := consumeField(b)
		// Out of order or twice: leave it to the decoder.
		if m < 0 || num <= last || num > 3 {
			return false
		}
		last = num
		switch num {
		case 1:
			if typ != protowire.BytesType {
				return false
			}
			id, _ := protowire.ConsumeBytes(b[n:])
			if len(id) == 0 || len(id) > MaxIDBytes || !utf8.Valid(id) {
				return false
			}
			hasMessage = true
		case 2:
			v, _ := protowire.ConsumeVarint(b[n:])
			if typ != protowire.VarintType || v > uint64(Channel_CHANNEL_REASONING) {
				return false
			}
		case 3:
			if typ != protowire.BytesType {
				return false
			}
			if text, _ := protowire.ConsumeBytes(b[n:]); !utf8.Valid(text) {
				return false
			}
		}
		b = b[n+m:]
	}
	return hasMessage
}

// appendTime appends the time field: a google.protobuf.Timestamp.
func appendTime(b []byte, t time.Time) []byte {
	sec, nano := uint64(t.Unix()), uint64(t.Nanosecond())
	size := 1 + protowire.SizeVarint(sec)
	if nano != 0 {
		size += 1 + protowire.SizeVarint(nano)
	}
	b = append(b, byte(fieldTime<<3|2), byte(size), 1<<3)
	b = protowire.AppendVarint(b, sec)
	if nano != 0 {
		b = append(b, 2<<3)
		b = protowire.AppendVarint(b, nano&math.MaxUint32)
	}
	return b
}
