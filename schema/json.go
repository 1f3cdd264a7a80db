package schema

import (
	"bytes"
	"encoding/base64"
	"math"
	"math/bits"
	"unicode/utf8"
)

// The JSON form of an envelope:
//
//	{"type":"token","timestamp":"2025-11-04T10:00:15.25Z","seq":7,"id":"01JBV…","data":{"message_id":"m1","text":"Hi"}}
//
// It is lossless in both directions, for every type and every field; form.go is the list. Beside the five keys an envelope may have first_seq, request_id,
// reply_to, producer {id, epoch, seq} and source {subject, role}. What is absent or empty is left out. These rules are not obvious:
//
//   - Free-form fields (…_json in protobuf) stand as the JSON they are, under the name without _json, byte for byte: order of keys, large integers, white
//     space and line breaks inside. White space around such a value is not part of it, unless the envelope says "exact":true, which the writer does where
//     it is.
//   - A custom envelope's data has type, content_type, and the bytes: under "json" as they are where the content type says JSON and they are JSON, else
//     under "data" in base64.
//   - Fields that this version does not know stand under "unknown", at the level they belong to, as the base64 of their protobuf encoding. Where that is
//     the payload, the type is "unknown" and data is empty. A number of an enum without a word stands as the number.
//   - Where the reader does not know a key, or meets one twice, it refuses; inside free-form values all keys are the application's. null is as if the key
//     were absent, except where any JSON may stand (response, input, arguments, result, json). Numbers of 64 bits are JSON numbers, whole, and not limited
//     to 2⁵³.
//   - Half of a surrogate pair ("\ud83d" alone) is refused in a string: it has no UTF-8 form.

// maxJSONKeys is more keys than any object of the form has: of that many distinct ones at least one is unknown.
const maxJSONKeys = 16

// keyList is the keys of an object that is being read. It holds its members itself and not in a slice: a slice in a [pass] would be on the heap.
type keyList struct {
	list [maxJSONKeys]member
	n    int
	// A bit for each: a field asked for it; it has escapes in it.
	taken, escaped uint32
}

// AppendJSON appends the JSON form of e, without a line break behind it. e must satisfy [Envelope.Validate]; of another one the free-form fields may spoil
// the JSON. It does not change e and may be called concurrently.
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

// ParseJSON reads the JSON form of an envelope. What [AppendJSON] wrote comes back equal. The error is a [*Refusal] with a sentence that names the key or
// the byte: with [Code_CODE_UNKNOWN_TYPE] where the type is not known, with [Code_CODE_INVALID_MESSAGE] otherwise. The envelope is of the right shape;
// [Envelope.Validate] checks its content. It keeps nothing of b and may be called concurrently.
func ParseJSON(b []byte) (*Envelope, error) {
	if len(b) > math.MaxInt32 {
		return nil, Refuse(Code_CODE_TOO_LARGE, "The message has %d bytes.", len(b))
	}
	if !utf8.Valid(b) {
		return nil, Refuse(Code_CODE_INVALID_MESSAGE, "The message is not valid UTF-8 at byte %d.", firstInvalid(b))
	}
	from := skipSpace(b, 0)
	if from == len(b) || b[from] != '{' {
		return nil, Refuse(Code_CODE_INVALID_MESSAGE, "The message is not a JSON object.")
	}
	p := pass{op: opRead, in: b}
	end, wrong := p.collect(from, MaxJSONDepth+envelopeDepth)
	if end = skipSpace(b, end); wrong == "" && end < len(b) {
		wrong = "something follows the end of the object"
	}
	if wrong != "" {
		return nil, Refuse(Code_CODE_INVALID_MESSAGE, "The message is not valid JSON: at byte %d, %s.", end, wrong)
	}
	kind, err := p.takeType()
	if err != nil {
		return nil, err
	}
	p.exact, _ = p.takeBool("exact")
	e := &Envelope{Payload: newPayload(kind)}
	p.envelope(e)
	p.unknown(&e.unknownFields, e)
	if p.enter(inData) {
		p.payload(e)
		p.leave()
	} else if kind != 0 {
		p.missing("data")
	}
	p.nothingLeft()
	if p.err != nil {
		return nil, p.err
	}
	return e, nil
}

// takeType reads the type. 0 is the type "unknown".
func (p *pass) takeType() (Kind, error) {
	name, ok := p.takeText("type")
	switch {
	case p.err != nil:
		return 0, p.err
	case !ok:
		p.missing("type")
		return 0, p.err
	case string(name) == unknownType:
		return 0, nil
	}
	if k := parseType(string(name)); k != 0 {
		return k, nil
	}
	return ParseType(string(name))
}

// collect lists the keys of the object that begins at i. Of too many it lists the first: one of those is unknown, and that is what is refused. It returns
// the place behind the object, or where it is wrong.
func (p *pass) collect(i, depth int) (end int, wrong string) {
	keys := &p.keys[p.level()]
	keys.n, keys.taken, keys.escaped = 0, 0, 0
	i = skipSpace(p.in, i+1)
	if i < len(p.in) && p.in[i] == '}' {
		return i + 1, ""
	}
	for {
		var m member
		m, i, wrong = skipMember(p.in, i, depth)
		if wrong != "" {
			return i, wrong
		}
		if keys.n < maxJSONKeys {
			key, escaped := p.in[m.keyFrom:m.keyTo], uint32(0)
			if bytes.IndexByte(key, '\\') >= 0 {
				key, escaped = p.unescapedKey(m), 1
			}
			if p.find(keys, string(key)) >= 0 {
				p.refuse("The key '%s' stands twice in one object.", clip(string(key)))
			}
			keys.list[keys.n] = m
			keys.escaped |= escaped << keys.n
			keys.n++
		}
		if p.in[i] == '}' {
			return i + 1, ""
		}
		i = skipSpace(p.in, i+1)
	}
}

// level is which of the two lists of keys is in use: the message's, or that of the inner object.
func (p *pass) level() int {
	if p.at == atTop {
		return 0
	}
	return 1
}

// unescapedKey is a member's key. Half of a surrogate pair in it makes a key that no field has.
func (p *pass) unescapedKey(m member) []byte {
	key, _ := unquote(p.in[m.keyFrom-1 : m.keyTo+1])
	return key
}

// find returns the index of a key, -1 where it is not there.
func (p *pass) find(keys *keyList, name string) int {
	for i := range keys.n {
		m := &keys.list[i]
		if int(m.keyTo-m.keyFrom) == len(name) && string(p.in[m.keyFrom:m.keyTo]) == name {
			return i
		}
	}
	for i := range bits.Len32(keys.escaped) {
		if keys.escaped&(1<<i) != 0 && string(p.unescapedKey(keys.list[i])) == name {
			return i
		}
	}
	return -1
}

// enter begins to read an inner object where it is there; leave goes back to the message. Inner objects do not nest.
func (p *pass) enter(at place) bool {
	key, ok := p.take(placeNames[at])
	if !ok {
		return false
	}
	if p.in[key.from] != '{' {
		p.wrongType(placeNames[at], "an object")
		return false
	}
	p.at = at
	p.collect(int(key.from), MaxJSONDepth+envelopeDepth)
	return true
}

func (p *pass) leave() {
	p.nothingLeft()
	p.at = atTop
}

// nothingLeft refuses a key that no field asked for.
func (p *pass) nothingLeft() {
	keys := &p.keys[p.level()]
	for i, m := range keys.list[:keys.n] {
		if keys.taken&(1<<i) != 0 {
			continue
		}
		name := clip(string(p.unescapedKey(m)))
		if p.at == atTop {
			p.refuse("Unknown field '%s'.", name)
		} else {
			p.refuse("Unknown field '%s' in '%s'.", name, placeNames[p.at])
		}
		return
	}
}

// takeAny returns where the value of a key stands.
func (p *pass) takeAny(name string) (member, bool) {
	keys := &p.keys[p.level()]
	i := p.find(keys, name)
	if i < 0 {
		return member{}, false
	}
	keys.taken |= 1 << i
	return keys.list[i], true
}

// take is takeAny for a field where null means absent.
func (p *pass) take(name string) (member, bool) {
	key, ok := p.takeAny(name)
	return key, ok && p.in[key.from] != 'n'
}

func (p *pass) takeString(name string) (string, bool) {
	b, ok := p.takeText(name)
	return string(b), ok
}

// takeText is takeString without a copy where there is nothing to unescape: the bytes are the message's.
func (p *pass) takeText(name string) ([]byte, bool) {
	key, ok := p.take(name)
	if !ok {
		return nil, false
	}
	if p.in[key.from] != '"' {
		p.wrongType(name, "a string")
		return nil, false
	}
	text, ok := unquote(p.in[key.from:key.to])
	if !ok {
		p.loneSurrogate(name)
	}
	return text, ok
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

func (p *pass) takeWhole(name string) (n uint64, ok bool) {
	key, ok := p.take(name)
	if !ok {
		return 0, false
	}
	for _, c := range p.in[key.from:key.to] {
		high, low := bits.Mul64(n, 10)
		sum, carry := bits.Add64(low, uint64(c-'0'), 0)
		if !isDigit(c) || high+carry != 0 {
			p.wrongType(name, "a whole number from 0 to 18446744073709551615, written without a point or an exponent")
			return 0, false
		}
		n = sum
	}
	return n, true
}

// takeBytes takes base64 with padding.
func (p *pass) takeBytes(name string) ([]byte, bool) {
	text, ok := p.takeText(name)
	if !ok {
		return nil, false
	}
	b, err := base64.StdEncoding.AppendDecode(nil, text)
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
