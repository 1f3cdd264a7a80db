package schema

import (
	"fmt"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// Validate checks all that an envelope must satisfy by itself: a payload that is known, required fields, sizes, the id, the time, words, JSON, and at most
// [MaxEnvelopeBytes] altogether. What it accepted needs no second look, encodes without an error, and comes back equal from its JSON form and from its
// encoded one. The fields that the server assigns (seq, source, first_seq) may be set or not; an edge sets them itself, whatever the sender wrote. The
// error is a [*Refusal] whose sentence names the field as the JSON form does. It does not change e and may be called concurrently.
func (e *Envelope) Validate() error {
	if err := e.checkKind(); err != nil {
		return err
	}
	p := pass{op: opCheck}
	p.envelope(e)
	p.payload(e)
	p.unknown(&e.unknownFields, e)
	if p.err != nil {
		return p.err
	}
	// Encoding an envelope only to know its size would cost more than all of the above.
	const fixed = 256 // numbers, times and what stands around the messages
	if p.size > MaxEnvelopeBytes-fixed {
		if size := proto.Size(e); size > MaxEnvelopeBytes {
			return Refuse(Code_CODE_TOO_LARGE, "The envelope has %d bytes; at most %d are allowed.", size, MaxEnvelopeBytes)
		}
	}
	return nil
}

// checkKind refuses an envelope without a payload that is known, and one that has another beside it: a later version would take that for the payload, and
// nobody would have checked it.
func (e *Envelope) checkKind() error {
	var unknown []byte
	if e != nil {
		unknown = e.unknownFields
	}
	for b := unknown; len(b) > 0; {
		num, _, n := protowire.ConsumeField(b)
		if n < 0 {
			break
		}
		if IsPayload(int32(num)) && !Kind(num).Known() {
			return Refuse(Code_CODE_UNKNOWN_TYPE, "The payload with field number %d is not known to this version of the server.", num)
		}
		b = b[n:]
	}
	if e.Kind() == 0 {
		return Refuse(Code_CODE_UNKNOWN_TYPE, "The envelope has no payload that this version of the server knows.")
	}
	return nil
}

// Validate checks a publish: the session's name or an attachment instead of it, 1 to [MaxPublishEnvelopes] envelopes, and each of them. The first envelope
// that is wrong refuses all, and the sentence says which it is.
func (p *Publish) Validate() error {
	switch {
	case p.Session != "" && p.Channel != 0:
		return Refuse(Code_CODE_INVALID_MESSAGE, "A publish names either its session or a channel, not both.")
	case p.Channel == 0:
		if err := checkName("session", p.Session); err != nil {
			return err
		}
	}
	if err := CheckPublishCount(len(p.Envelopes)); err != nil {
		return err
	}
	for i, e := range p.Envelopes {
		if err := e.Validate(); err != nil {
			return WhichEnvelope(err, i, len(p.Envelopes))
		}
	}
	return nil
}

// CheckPublishCount checks how many envelopes one publish has.
func CheckPublishCount(n int) error {
	switch {
	case n == 0:
		return Refuse(Code_CODE_INVALID_MESSAGE, "The publish has no envelopes; give it 1 to %d.", MaxPublishEnvelopes)
	case n > MaxPublishEnvelopes:
		return Refuse(Code_CODE_INVALID_MESSAGE, "The publish has %d envelopes; at most %d are allowed.", n, MaxPublishEnvelopes)
	}
	return nil
}

// WhichEnvelope says in err's sentence that it speaks of the envelope at index i, from 0, of n. Where there is only one, err is as it was.
func WhichEnvelope(err error, i, n int) error {
	if n == 1 {
		return err
	}
	r := *AsRefusal(err)
	r.Message = fmt.Sprintf("Envelope %d of %d: %s", i+1, n, r.Message)
	return &r
}
