package bench

import (
	"encoding/binary"
	"errors"
	"fmt"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"tidemark/schema"
)

// A token's text begins with what the receiver checks it by: its number in its session, 1, 2, 3 …, and when it was sent, in nanoseconds of the run, each as 16 hexadecimal digits.
const stampLen = 32

// minTokenBytes is what an envelope with such a text takes at least, in bytes, encoded.
const minTokenBytes = 64

// Tags as they stand on the wire: the field's number, and its type in the last three bits (0 varint, 2 bytes).
const (
	tagClientPublish   = 1<<3 | 2
	tagPublishID       = 1 << 3
	tagServerEvents    = 1<<3 | 2
	tagServerPublished = 2<<3 | 2
	tagEnvelope        = 15<<3 | 2
	tagSeq             = 2 << 3
	tagToken           = 8<<3 | 2
	tagText            = 3<<3 | 2
	tagAck             = 2<<3 | 2

	// Those of an Ack, without their type.
	ackID        = 1
	ackFirstSeq  = 2
	ackDuplicate = 4
)

// hexDigits are in lower case: 0-9, a-f.
const hexDigits = "0123456789abcdef"

// putStamp writes number and time over the first stampLen bytes of text.
func putStamp(text []byte, number, sent uint64) {
	putHex(text[:16], number)
	putHex(text[16:32], sent)
}

func putHex(b []byte, v uint64) {
	for i := 15; i >= 0; i-- {
		b[i] = hexDigits[v&15]
		v >>= 4
	}
}

// stamp reads what putStamp wrote.
func stamp(text []byte) (number, sent uint64, ok bool) {
	if len(text) < stampLen {
		return 0, 0, false
	}
	number, ok1 := parseHex(text[:16])
	sent, ok2 := parseHex(text[16:32])
	return number, sent, ok1 && ok2
}

func parseHex(b []byte) (v uint64, ok bool) {
	for _, c := range b {
		switch {
		case c >= '0' && c <= '9':
			v = v<<4 | uint64(c-'0')
		case c >= 'a' && c <= 'f':
			v = v<<4 | uint64(c-'a'+10)
		default:
			return 0, false
		}
	}
	return v, true
}

// template makes the WebSocket frames of one publisher: a ClientFrame with a Publish of one token. All but the publish's id and the stamp is made once.
type template struct {
	// tail is the publish behind its id: session and envelope. The text is its end.
	tail   []byte
	textAt int
}

// newTemplate makes the template for a session, with envelopes of size bytes, encoded, as an agent sends them.
func newTemplate(session string, size int) (*template, error) {
	if size < minTokenBytes {
		return nil, fmt.Errorf("bench: a token of %d bytes cannot carry what it is checked by; choose %d or more", size, minTokenBytes)
	}
	encode := func(text []byte) ([]byte, error) {
		return proto.Marshal(&schema.Envelope{Payload: &schema.Envelope_Token{Token: &schema.Token{MessageId: "m1", Text: string(text)}}})
	}
	text := make([]byte, size)
	for i := range text {
		text[i] = "a token of a stream "[i%20]
	}
	putStamp(text, 0, 0)
	// The lengths before the text take more bytes the longer it is: make it shorter until the whole is right, or as near as can be.
	envelope, err := encode(text)
	for err == nil && len(envelope) > size {
		text = text[:len(text)-(len(envelope)-size)]
		envelope, err = encode(text)
	}
	if err != nil {
		return nil, err
	}
	t := new(template)
	t.tail = protowire.AppendTag(t.tail, 2, protowire.BytesType)
	t.tail = protowire.AppendString(t.tail, session)
	t.tail = protowire.AppendTag(t.tail, 15, protowire.BytesType)
	t.tail = protowire.AppendBytes(t.tail, envelope)
	t.textAt = len(t.tail) - len(text)
	return t, nil
}

// append appends the frame of the token with this number, which is also the publish's id.
func (t *template) append(out []byte, number, sent uint64) []byte {
	body := 1 + protowire.SizeVarint(number) + len(t.tail)
	out = appendHeader(out, opBinary, 1+protowire.SizeVarint(uint64(body))+body)
	out = append(out, tagClientPublish)
	out = protowire.AppendVarint(out, uint64(body))
	out = append(out, tagPublishID)
	out = protowire.AppendVarint(out, number)
	from := len(out)
	out = append(out, t.tail...)
	putStamp(out[from+t.textAt:], number, sent)
	return out
}

var errMalformed = errors.New("bench: the edge sent what is no frame of the protocol")

// eachEnvelope calls see with the seq and the text of every envelope in a message, if it holds events, and reports whether it does. It decodes nothing else.
func eachEnvelope(msg []byte, see func(seq uint64, text []byte)) (events bool, err error) {
	if len(msg) == 0 || msg[0] != tagServerEvents {
		return false, nil
	}
	body, n := bytesAt(msg[1:])
	if n < 0 || 1+n != len(msg) {
		return false, errMalformed
	}
	for len(body) > 0 {
		switch body[0] {
		case tagEnvelope:
			envelope, n := bytesAt(body[1:])
			if n < 0 {
				return true, errMalformed
			}
			seq, text, ok := readEnvelope(envelope)
			if !ok {
				return true, errMalformed
			}
			see(seq, text)
			body = body[1+n:]
		default:
			n := skip(body)
			if n < 0 {
				return true, errMalformed
			}
			body = body[n:]
		}
	}
	return true, nil
}

// readEnvelope finds an envelope's seq and its token's text.
func readEnvelope(b []byte) (seq uint64, text []byte, ok bool) {
	for len(b) > 0 {
		switch b[0] {
		case tagSeq:
			v, n := binary.Uvarint(b[1:])
			if n <= 0 {
				return 0, nil, false
			}
			seq = v
			b = b[1+n:]
		case tagToken:
			token, n := bytesAt(b[1:])
			if n < 0 {
				return 0, nil, false
			}
			b = b[1+n:]
			for len(token) > 0 {
				if token[0] == tagText {
					if text, n = bytesAt(token[1:]); n < 0 {
						return 0, nil, false
					}
					token = token[1+n:]
					continue
				}
				if n = skip(token); n < 0 {
					return 0, nil, false
				}
				token = token[n:]
			}
		default:
			n := skip(b)
			if n < 0 {
				return 0, nil, false
			}
			b = b[n:]
		}
	}
	return seq, text, seq > 0
}

// skip is how long the field at the beginning of b is, negative where it is none.
func skip(b []byte) int {
	// Nearly all fields here have a tag and a length of one byte.
	if len(b) >= 2 && b[0]&7 == 2 && b[0] < 0x80 && b[1] < 0x80 && 2+int(b[1]) <= len(b) {
		return 2 + int(b[1])
	}
	_, _, n := protowire.ConsumeField(b)
	return n
}

// bytesAt reads a length and that many bytes; n is negative where they are not there.
func bytesAt(b []byte) (body []byte, n int) {
	if len(b) > 0 && b[0] < 0x80 && 1+int(b[0]) <= len(b) {
		n = 1 + int(b[0])
		return b[1:n], n
	}
	return protowire.ConsumeBytes(b)
}

// eachAck calls see with the publish id and the first seq of every acknowledgement in a message, if it holds any, and reports whether it does.
func eachAck(msg []byte, see func(id, seq uint64, duplicate bool)) (acks bool, err error) {
	if len(msg) == 0 || msg[0] != tagServerPublished {
		return false, nil
	}
	body, n := bytesAt(msg[1:])
	if n < 0 || 1+n != len(msg) {
		return false, errMalformed
	}
	for len(body) > 0 {
		if body[0] != tagAck {
			if n = skip(body); n < 0 {
				return true, errMalformed
			}
			body = body[n:]
			continue
		}
		ack, n := bytesAt(body[1:])
		if n < 0 {
			return true, errMalformed
		}
		body = body[1+n:]
		var id, seq uint64
		var duplicate bool
		for len(ack) > 0 {
			if ack[0]&7 != 0 {
				if n = skip(ack); n < 0 {
					return true, errMalformed
				}
				ack = ack[n:]
				continue
			}
			v, n := binary.Uvarint(ack[1:])
			if n <= 0 {
				return true, errMalformed
			}
			switch ack[0] >> 3 {
			case ackID:
				id = v
			case ackFirstSeq:
				seq = v
			case ackDuplicate:
				duplicate = v != 0
			}
			ack = ack[1+n:]
		}
		see(id, seq, duplicate)
	}
	return true, nil
}
