package schema

import (
	"bytes"
	"encoding/base64"
	"strconv"
	"unicode/utf8"
)

// The JSON form of an envelope:
//
//	{"type":"token","timestamp":"2025-11-04T10:00:15.25Z","seq":7,"id":"01JBV…","data":{"message_id":"m1","text":"Hi"}}
//
// It is lossless in both directions, for every type and every field; form.go is the list. Beside the five keys an envelope may have first_seq, request_id, reply_to,
// producer {id, epoch, seq} and source {subject, role}. What is absent or empty is left out. These rules are not obvious:
//
//   - Free-form fields (…_json in protobuf) stand as the JSON they are, under the name without _json, byte for byte: order of keys, large integers, white space and line breaks
//     inside. White space around such a value is not part of it, unless the envelope says "exact":true, which the writer does where it is.
//   - A custom envelope's data has type, content_type, and the bytes: under "json" as they are where the content type says JSON and they are JSON, else under "data" in base64.
//   - Fields that this version does not know stand under "unknown", at the level they belong to, as the base64 of their protobuf encoding. Where that is the payload, the type
//     is "unknown" and data is empty. A number of an enum without a word stands as the number.
//   - Where the reader does not know a key, or meets one twice, it refuses; inside free-form values all keys are the application's. null is as if the key were absent, except where
//     any JSON may stand (response, input, arguments, result, json). Numbers of 64 bits are JSON numbers, whole, and not limited to 2⁵³.
//   - Half of a surrogate pair ("\ud83d" alone) is refused in a string: it has no UTF-8 form.

// jsonKey is one key of an object being read, and where its value stands: outer with the white space around it.
type jsonKey struct {
	name               []byte
	from, to           int
	outerFrom, outerTo int
	taken              bool
}

// maxJSONKeys is more keys than any object of the form has: of that many distinct ones at least one is unknown.
const maxJSONKeys = 16

// AppendJSON appends the JSON form of e, without a line break behind it. e must satisfy [Envelope.Validate]; of another one the free-form fields may spoil the JSON. It does
// not change e and may be called concurrently.
func AppendJSON(dst []byte, e *Envelope) []byte {
	p := pass{op: opWrite, out: dst, more: true}
	p.out = append(p.out, `{"type":"`...)
	p.out = append(p.out, e.Kind().String()...)
	p.out = append(p.out, '"')
	p.envelope(e)
	p.open("data")
	p.payload(e)
	p.close()
	p.unknown(&e.unknownFields, e)
	if p.exact {
		p.out = append(p.out, `,"exact":true`...)
	}
	return append(p.out, '}')
}

// ParseJSON reads the JSON form of an envelope. What [AppendJSON] wrote comes back equal. The error is a [*Refusal] with a sentence that names the key or the byte: with
// [Code_CODE_UNKNOWN_TYPE] where the type is not known, with [Code_CODE_INVALID_MESSAGE] otherwise. The envelope is of the right shape; [Envelope.Validate] checks its content.
// It keeps nothing of b and may be called concurrently.
func ParseJSON(b []byte) (*Envelope, error) {
	if !utf8.Valid(b) {
		return nil, Refuse(Code_CODE_INVALID_MESSAGE, "The message is not valid UTF-8 at byte %d.", firstInvalid(b))
	}
	if at, wrong := checkJSON(b, MaxJSONDepth+envelopeDepth); wrong != "" {
		return nil, Refuse(Code_CODE_INVALID_MESSAGE, "The message is not valid JSON: at byte %d, %s.", at, wrong)
	}
	from := skipSpace(b, 0)
	if b[from] != '{' {
		return nil, Refuse(Code_CODE_INVALID_MESSAGE, "The message is not a JSON object.")
	}

	var topRoom, innerRoom [maxJSONKeys]jsonKey
	p := pass{op: opRead, in: b}
	p.keys, p.room = p.collect(topRoom[:0], from), innerRoom[:0]
	kind, err := p.takeType()
	if err != nil {
		return nil, err
	}
	p.exact, _ = p.takeBool("exact")
	e := &Envelope{Payload: newPayload(kind)}
	p.envelope(e)
	p.unknown(&e.unknownFields, e)
	data, ok := p.take("data")
	switch {
	case !ok && kind == 0:
	case !ok:
		p.missing("data")
	case b[data.from] != '{':
		p.wrongType("data", "an object")
	default:
		p.enter(data)
		p.payload(e)
		p.leave("data")
	}
	p.nothingLeft("")
	if p.err != nil {
		return nil, p.err
	}
	return e, nil
}

// takeType reads the type. 0 is the type "unknown".
func (p *pass) takeType() (Kind, error) {
	name, ok := p.takeString("type")
	switch {
	case p.err != nil:
		return 0, p.err
	case !ok:
		p.missing("type")
		return 0, p.err
	case name == unknownType:
		return 0, nil
	}
	return ParseType(name)
}

// collect lists the keys of the object that begins at i, which is valid JSON. Of too many it lists the first: one of those is unknown, and that is what is refused.
func (p *pass) collect(keys []jsonKey, i int) []jsonKey {
	b := p.in
	i = skipSpace(b, i+1)
	for b[i] != '}' && len(keys) < cap(keys) {
		end, _ := skipString(b, i)
		key := jsonKey{name: b[i+1 : end-1]}
		if bytes.IndexByte(key.name, '\\') >= 0 {
			// Half of a surrogate pair makes a name that no field has.
			name, _ := unquote(b[i:end])
			key.name = []byte(name)
		}
		key.outerFrom = skipSpace(b, end) + 1
		key.from = skipSpace(b, key.outerFrom)
		key.to, _ = skipValue(b, key.from, MaxJSONDepth+envelopeDepth)
		key.outerTo = skipSpace(b, key.to)
		for _, k := range keys {
			if bytes.Equal(k.name, key.name) {
				p.refuse("The key '%s' stands twice in one object.", clip(string(key.name)))
			}
		}
		keys = append(keys, key)
		i = key.outerTo
		if b[i] == ',' {
			i = skipSpace(b, i+1)
		}
	}
	return keys
}

// enter begins to read an inner object, leave goes back to the message. Inner objects do not nest.
func (p *pass) enter(object jsonKey) {
	p.top, p.keys = p.keys, p.collect(p.room, object.from)
}

func (p *pass) leave(name string) {
	p.nothingLeft(" in '" + name + "'")
	p.keys = p.top
}

// nothingLeft refuses a key that no field asked for.
func (p *pass) nothingLeft(where string) {
	for _, key := range p.keys {
		if !key.taken {
			p.refuse("Unknown field '%s'%s.", clip(string(key.name)), where)
			return
		}
	}
}

// takeAny returns where the value of a key stands.
func (p *pass) takeAny(name string) (jsonKey, bool) {
	for i := range p.keys {
		if key := &p.keys[i]; string(key.name) == name {
			key.taken = true
			return *key, true
		}
	}
	return jsonKey{}, false
}

// take is takeAny for a field where null means absent.
func (p *pass) take(name string) (jsonKey, bool) {
	key, ok := p.takeAny(name)
	return key, ok && p.in[key.from] != 'n'
}

func (p *pass) takeString(name string) (string, bool) {
	key, ok := p.take(name)
	if !ok {
		return "", false
	}
	if p.in[key.from] != '"' {
		p.wrongType(name, "a string")
		return "", false
	}
	s, ok := unquote(p.in[key.from:key.to])
	if !ok {
		p.loneSurrogate(name)
	}
	return s, ok
}

func (p *pass) takeBool(name string) (value, ok bool) {
	key, ok := p.take(name)
	if !ok {
		return false, false
	}
	c := p.in[key.from]
	if c != 't' && c != 'f' {
		p.wrongType(name, "true or false")
		return false, false
	}
	return c == 't', true
}

func (p *pass) takeWhole(name string) (uint64, bool) {
	key, ok := p.take(name)
	if !ok {
		return 0, false
	}
	n, err := strconv.ParseUint(string(p.in[key.from:key.to]), 10, 64)
	if err != nil {
		p.wrongType(name, "a whole number from 0 to 18446744073709551615, written without a point or an exponent")
	}
	return n, err == nil
}

// takeBytes takes base64 with padding.
func (p *pass) takeBytes(name string) ([]byte, bool) {
	s, ok := p.takeString(name)
	if !ok {
		return nil, false
	}
	b, err := base64.StdEncoding.DecodeString(s)
	if err != nil {
		p.wrongType(name, "bytes in base64, with padding")
	}
	return b, err == nil
}

func firstInvalid(b []byte) int {
	for i := 0; i < len(b); {
		r, size := utf8.DecodeRune(b[i:])
		if r == utf8.RuneError && size == 1 {
			return i
		}
		i += size
	}
	return len(b)
}
