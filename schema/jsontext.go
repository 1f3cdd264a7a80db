package schema

import (
	"strconv"
	"unicode/utf16"
	"unicode/utf8"
)

// The text level of JSON (RFC 8259). encoding/json answers whether a text is valid but not where a value ends, and its decoder loses what we promise to
// keep: white space, large integers, the order of keys. FuzzSkipValue compares this scanner with json.Valid.

// MaxJSONDepth bounds how deep arrays and objects may be nested in a free-form field. Readers in other languages recurse, and some give up at a few hundred.
const MaxJSONDepth = 128

// envelopeDepth is how deep a free-form value may stand in the JSON form: in the envelope, in its data.
const envelopeDepth = 2

// noDepth, for [skipValue], refuses arrays and objects.
const noDepth = 0

// skipSpace returns the first place from i on where no white space stands.
func skipSpace[T string | []byte](b T, i int) int {
	for i < len(b) && isSpace(b[i]) {
		i++
	}
	return i
}

func isSpace(c byte) bool { return c == ' ' || c == '\t' || c == '\n' || c == '\r' }

// skipValue returns the place behind the value that begins at i. Where there is no valid value, or one nested deeper than depth, wrong says what is wrong
// at the place returned. It does not check UTF-8.
func skipValue[T string | []byte](b T, i, depth int) (end int, wrong string) {
	if i >= len(b) {
		return i, "the text ends where a value should begin"
	}
	switch c := b[i]; {
	case c == '"':
		return skipString(b, i)
	case c == '{':
		return skipObject(b, i, depth)
	case c == '[':
		return skipArray(b, i, depth)
	case c == 't':
		return skipWord(b, i, "true")
	case c == 'f':
		return skipWord(b, i, "false")
	case c == 'n':
		return skipWord(b, i, "null")
	case c == '-' || isDigit(c):
		return skipNumber(b, i)
	}
	return i, "a value should begin here"
}

func skipObject[T string | []byte](b T, i, depth int) (end int, wrong string) {
	if depth == noDepth {
		return i, tooDeep
	}
	i = skipSpace(b, i+1)
	if i < len(b) && b[i] == '}' {
		return i + 1, ""
	}
	for {
		_, i, wrong = skipMember(b, i, depth)
		switch {
		case wrong != "":
			return i, wrong
		case b[i] == '}':
			return i + 1, ""
		}
		i = skipSpace(b, i+1)
	}
}

// member is where a key and its value stand in a text: the key without its quotes, the value without and with the white space around it.
type member struct {
	keyFrom, keyTo     int32
	from, to           int32
	outerFrom, outerTo int32
}

// skipMember reads one key and value of an object, up to the ',' or '}' behind it, which stands at end. Where something is wrong, it is wrong there. The
// members' places are right in texts of up to 2 GiB.
func skipMember[T string | []byte](b T, i, depth int) (m member, end int, wrong string) {
	if i >= len(b) || b[i] != '"' {
		return m, i, "a key in quotes should stand here"
	}
	m.keyFrom = int32(i + 1)
	if i, wrong = skipString(b, i); wrong != "" {
		return m, i, wrong
	}
	m.keyTo = int32(i - 1)
	i = skipSpace(b, i)
	if i >= len(b) || b[i] != ':' {
		return m, i, "a ':' should stand here"
	}
	m.outerFrom = int32(i + 1)
	i = skipSpace(b, i+1)
	m.from = int32(i)
	if i, wrong = skipValue(b, i, depth-1); wrong != "" {
		return m, i, wrong
	}
	m.to = int32(i)
	i = skipSpace(b, i)
	m.outerTo = int32(i)
	if i >= len(b) || b[i] != ',' && b[i] != '}' {
		return m, i, "a ',' or '}' should stand here"
	}
	return m, i, ""
}

func skipArray[T string | []byte](b T, i, depth int) (end int, wrong string) {
	if depth == noDepth {
		return i, tooDeep
	}
	i = skipSpace(b, i+1)
	if i < len(b) && b[i] == ']' {
		return i + 1, ""
	}
	for {
		if i, wrong = skipValue(b, i, depth-1); wrong != "" {
			return i, wrong
		}
		i = skipSpace(b, i)
		switch {
		case i < len(b) && b[i] == ']':
			return i + 1, ""
		case i < len(b) && b[i] == ',':
			i = skipSpace(b, i+1)
		default:
			return i, "a ',' or ']' should stand here"
		}
	}
}

// tooDeep says the bound itself, whatever the depth that was left.
var tooDeep = "arrays and objects are nested deeper than " + strconv.Itoa(MaxJSONDepth) + " levels" //nolint:gochecknoglobals // a constant sentence

func skipString[T string | []byte](b T, i int) (end int, wrong string) {
	for i++; i < len(b); i++ {
		switch c := b[i]; {
		case c >= ' ' && c != '"' && c != '\\':
		case c == '"':
			return i + 1, ""
		case c < ' ':
			return i, "a control character must be escaped in a string"
		default:
			i++
			if i >= len(b) {
				return i, endInString
			}
			switch b[i] {
			case '"', '\\', '/', 'b', 'f', 'n', 'r', 't':
			case 'u':
				for range 4 {
					i++
					if i >= len(b) {
						return i, endInString
					}
					if unhex(b[i]) < 0 {
						return i, `four hexadecimal digits should follow '\u'`
					}
				}
			default:
				return i, `a character that cannot stand after '\'`
			}
		}
	}
	return i, endInString
}

const endInString = "the text ends inside a string"

func skipWord[T string | []byte](b T, i int, word string) (end int, wrong string) {
	if len(b)-i < len(word) || string(b[i:i+len(word)]) != word {
		return i, "a value should begin here"
	}
	return i + len(word), ""
}

func skipNumber[T string | []byte](b T, i int) (end int, wrong string) {
	const digitMissing = "a digit should stand here"
	if b[i] == '-' {
		i++
	}
	switch {
	case i < len(b) && b[i] == '0':
		i++
	case i < len(b) && isDigit(b[i]):
		i = skipDigits(b, i)
	default:
		return i, digitMissing
	}
	if i < len(b) && b[i] == '.' {
		from := i + 1
		if i = skipDigits(b, from); i == from {
			return i, digitMissing
		}
	}
	if i < len(b) && (b[i] == 'e' || b[i] == 'E') {
		i++
		if i < len(b) && (b[i] == '+' || b[i] == '-') {
			i++
		}
		from := i
		if i = skipDigits(b, from); i == from {
			return i, digitMissing
		}
	}
	return i, ""
}

func skipDigits[T string | []byte](b T, i int) int {
	for i < len(b) && isDigit(b[i]) {
		i++
	}
	return i
}

func isDigit(c byte) bool { return c >= '0' && c <= '9' }

func unhex(c byte) int {
	switch {
	case isDigit(c):
		return int(c - '0')
	case c >= 'a' && c <= 'f':
		return int(c-'a') + 10
	case c >= 'A' && c <= 'F':
		return int(c-'A') + 10
	}
	return -1
}

// checkJSON says what is wrong with text as one JSON value with white space around it, and where.
func checkJSON[T string | []byte](text T, depth int) (at int, wrong string) {
	at, wrong = skipValue(text, skipSpace(text, 0), depth)
	if wrong != "" {
		return at, wrong
	}
	if at = skipSpace(text, at); at < len(text) {
		return at, "something follows the end of the value"
	}
	return at, ""
}

// unquote decodes a string that [skipString] accepted, quotes included; where there is nothing to unescape the text is a part of quoted. A lone surrogate
// has no UTF-8 form; replacing it would change the text in silence, so ok is false.
func unquote(quoted []byte) (text []byte, ok bool) {
	body := quoted[1 : len(quoted)-1]
	plain := 0
	for plain < len(body) && body[plain] != '\\' {
		plain++
	}
	if plain == len(body) {
		return body, true
	}
	out := append(make([]byte, 0, len(body)), body[:plain]...)
	for i := plain; i < len(body); {
		c := body[i]
		if c != '\\' {
			out = append(out, c)
			i++
			continue
		}
		switch c = body[i+1]; c {
		case 'b':
			out = append(out, '\b')
		case 'f':
			out = append(out, '\f')
		case 'n':
			out = append(out, '\n')
		case 'r':
			out = append(out, '\r')
		case 't':
			out = append(out, '\t')
		case 'u':
			r := unescapeUnit(body[i:])
			if utf16.IsSurrogate(r) {
				r = utf16.DecodeRune(r, unescapeUnit(body[i+6:]))
				if r == utf8.RuneError {
					return nil, false
				}
				i += 6
			}
			out = utf8.AppendRune(out, r)
			i += 6
			continue
		default:
			out = append(out, c)
		}
		i += 2
	}
	return out, true
}

// unescapeUnit reads the UTF-16 code unit that an escape at the beginning of b stands for; -1 where there is no such escape.
func unescapeUnit(b []byte) rune {
	if len(b) < 6 || b[0] != '\\' || b[1] != 'u' {
		return -1
	}
	return rune(unhex(b[2])<<12 | unhex(b[3])<<8 | unhex(b[4])<<4 | unhex(b[5]))
}

// appendQuoted appends text as a JSON string. Only what must be escaped is. Bytes that are not UTF-8, which no validated envelope has, become U+FFFD, so
// that what comes out is JSON whatever went in.
func appendQuoted(dst []byte, text string) []byte {
	dst = append(dst, '"')
	from := 0
	for i := 0; i < len(text); {
		c := text[i]
		if c >= ' ' && c != '"' && c != '\\' && c < utf8.RuneSelf {
			i++
			continue
		}
		if c >= utf8.RuneSelf {
			r, size := utf8.DecodeRuneInString(text[i:])
			if r != utf8.RuneError || size != 1 {
				i += size
				continue
			}
		}
		dst = append(dst, text[from:i]...)
		switch c {
		case '"', '\\':
			dst = append(dst, '\\', c)
		case '\n':
			dst = append(dst, '\\', 'n')
		case '\r':
			dst = append(dst, '\\', 'r')
		case '\t':
			dst = append(dst, '\\', 't')
		default:
			if c >= utf8.RuneSelf {
				dst = append(dst, "\uFFFD"...)
			} else {
				dst = append(dst, '\\', 'u', '0', '0', lowerHex[c>>4], lowerHex[c&15])
			}
		}
		i++
		from = i
	}
	dst = append(dst, text[from:]...)
	return append(dst, '"')
}

const lowerHex = "0123456789abcdef"
