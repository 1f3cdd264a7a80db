package schema

import (
	"bytes"
	"math"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// Each method of this file takes one type of field the three ways of a [pass]: written, read, checked. A reader takes null for absent, except where any
// JSON may stand.

// text is a string.
func (p *pass) text(name string, v *string, r rule) {
	switch p.op {
	case opWrite:
		if *v != "" || r&always != 0 {
			p.key(name)
			p.out = appendQuoted(p.out, *v)
		}
	case opRead:
		if s, ok := p.takeString(name); ok {
			*v = s
		}
	case opCheck:
		p.checkText(name, *v, r)
	}
}

func (p *pass) checkText(name, v string, r rule) {
	most := MaxEnvelopeBytes
	switch {
	case r&ident != 0:
		most = MaxIDBytes
	case r&producerIdent != 0:
		most = MaxProducerIDBytes
	}
	switch {
	case v == "" && r&required != 0:
		p.missing(name)
	case len(v) > most:
		p.refuse("Field '%s' has %d bytes; at most %d are allowed.", p.path(name), len(v), most)
	case !utf8.ValidString(v):
		p.refuse("Field '%s' is not valid UTF-8.", p.path(name))
	}
	p.grows(len(v))
}

// texts is a list of strings.
func (p *pass) texts(name string, v *[]string) {
	switch p.op {
	case opWrite:
		if len(*v) == 0 {
			return
		}
		p.key(name)
		p.out = append(p.out, '[')
		for i, s := range *v {
			if i > 0 {
				p.out = append(p.out, ',')
			}
			p.out = appendQuoted(p.out, s)
		}
		p.out = append(p.out, ']')
	case opRead:
		p.readTexts(name, v)
	case opCheck:
		for _, s := range *v {
			p.checkText(name, s, 0)
		}
	}
}

func (p *pass) readTexts(name string, v *[]string) {
	key, ok := p.take(name)
	if !ok {
		return
	}
	if p.in[key.from] != '[' {
		p.wrongType(name, "a list of strings")
		return
	}
	i := skipSpace(p.in, int(key.from)+1)
	for p.in[i] != ']' {
		end, _ := skipValue(p.in, i, MaxJSONDepth)
		if p.in[i] != '"' {
			p.wrongType(name, "a list of strings")
			return
		}
		s, ok := unquote(p.in[i:end])
		if !ok {
			p.loneSurrogate(name)
			return
		}
		*v = append(*v, string(s))
		i = skipSpace(p.in, end)
		if p.in[i] == ',' {
			i = skipSpace(p.in, i+1)
		}
	}
}

// free is free-form JSON, kept byte for byte. The protobuf field's name has the suffix _json, which the JSON form has no use for.
func (p *pass) free(name string, v *string, r rule) {
	switch p.op {
	case opWrite:
		if *v != "" {
			p.key(name)
			if isSpace((*v)[0]) || isSpace((*v)[len(*v)-1]) {
				p.exact = true
			}
			p.out = append(p.out, *v...)
		}
	case opRead:
		if r&object == 0 {
			if key, ok := p.takeAny(name); ok {
				*v = string(p.freeForm(key))
			}
		} else if key, ok := p.take(name); ok {
			*v = string(p.freeForm(key))
			if p.in[key.from] != '{' {
				p.wrongType(name, "a JSON object")
			}
		}
	case opCheck:
		p.checkFree(name, *v, r)
	}
}

func (p *pass) checkFree(name, v string, r rule) {
	if v == "" {
		if r&required != 0 {
			p.missing(name)
		}
		return
	}
	p.grows(len(v))
	if at, wrong := checkJSON(v, MaxJSONDepth); wrong != "" {
		p.refuse("Field '%s' is not valid JSON: at byte %d, %s.", p.path(name), at, wrong)
	} else if r&object != 0 && v[skipSpace(v, 0)] != '{' {
		p.wrongType(name, "a JSON object")
	} else if !utf8.ValidString(v) {
		p.refuse("Field '%s' is not valid UTF-8.", p.path(name))
	}
}

// freeForm is the bytes of a free-form value as they are kept.
func (p *pass) freeForm(key member) []byte {
	if p.exact {
		return p.in[key.outerFrom:key.outerTo]
	}
	return p.in[key.from:key.to]
}

// enum is a word out of a closed set. A number that has no word, because a later version wrote it, stands as a number; a sender may not use one.
func enum[E ~int32](p *pass, name string, v *E, words []string, r rule) {
	switch p.op {
	case opWrite:
		if *v == 0 {
			return
		}
		p.key(name)
		if word := wordOf(*v, words); word != "" {
			p.out = append(append(append(p.out, '"'), word...), '"')
		} else {
			p.out = strconv.AppendInt(p.out, int64(*v), 10)
		}
	case opRead:
		key, ok := p.take(name)
		if !ok {
			return
		}
		if p.in[key.from] == '"' {
			s, _ := unquote(p.in[key.from:key.to])
			for i, word := range words {
				if string(s) == word && word != "" {
					*v = E(i)
					return
				}
			}
		} else if n, err := strconv.ParseInt(string(p.in[key.from:key.to]), 10, 32); err == nil {
			*v = E(n)
			return
		}
		p.refuse("Field '%s' must be one of: %s.", p.path(name), listWords(words))
	case opCheck:
		switch {
		case *v == 0 && r&required != 0:
			p.missing(name)
		case *v != 0 && wordOf(*v, words) == "":
			p.refuse("Field '%s' is %d, which is not known here; it must be one of: %s.", p.path(name), *v, listWords(words))
		}
	}
}

func wordOf[E ~int32](v E, words []string) string {
	if v <= 0 || int(v) >= len(words) {
		return ""
	}
	return words[v]
}

func listWords(words []string) string { return strings.Join(words[1:], ", ") }

// flag is a bool that is false where it is absent.
func (p *pass) flag(name string, v *bool) {
	switch {
	case p.op == opWrite && *v:
		p.key(name)
		p.out = append(p.out, "true"...)
	case p.op == opRead:
		if b, ok := p.takeBool(name); ok {
			*v = b
		}
	}
}

// maybeFlag is a bool that may be absent.
func (p *pass) maybeFlag(name string, v **bool, r rule) {
	switch p.op {
	case opWrite:
		if *v != nil {
			p.key(name)
			p.out = strconv.AppendBool(p.out, **v)
		}
	case opRead:
		if b, ok := p.takeBool(name); ok {
			*v = &b
		}
	case opCheck:
		if *v == nil && r&required != 0 {
			p.missing(name)
		}
	}
}

// whole is a number that is 0 where it is absent. It is read without a float in between, so that 2⁵³ is no bound.
func (p *pass) whole(name string, v *uint64) {
	switch p.op {
	case opWrite:
		if *v != 0 {
			p.key(name)
			p.out = strconv.AppendUint(p.out, *v, 10)
		}
	case opRead:
		if n, ok := p.takeWhole(name); ok {
			*v = n
		}
	case opCheck: // any number will do
	}
}

// maybeWhole is a number that may be absent.
func (p *pass) maybeWhole(name string, v **uint64) {
	switch p.op {
	case opWrite:
		if *v != nil {
			p.key(name)
			p.out = strconv.AppendUint(p.out, **v, 10)
		}
	case opRead:
		if n, ok := p.takeWhole(name); ok {
			*v = &n
		}
	case opCheck: // any number will do
	}
}

// replyTo is the seq of another envelope.
func (p *pass) replyTo(v **uint64) {
	p.maybeWhole("reply_to", v)
	if p.op == opCheck && *v != nil && **v == 0 {
		p.refuse("Field 'reply_to' is 0; the first envelope of a session has seq 1.")
	}
}

// fraction is a number from 0 to 1 that may be absent. JSON has no word for what is not a number; it is left out.
func (p *pass) fraction(name string, v **float64) {
	switch p.op {
	case opWrite:
		if *v != nil && !math.IsNaN(**v) && !math.IsInf(**v, 0) {
			p.key(name)
			p.out = strconv.AppendFloat(p.out, **v, 'g', -1, 64)
		}
	case opRead:
		key, ok := p.take(name)
		if !ok {
			return
		}
		if c := p.in[key.from]; c == '-' || isDigit(c) {
			if f, err := strconv.ParseFloat(string(p.in[key.from:key.to]), 64); err == nil {
				*v = &f
				return
			}
		}
		p.wrongType(name, "a number from 0 to 1")
	case opCheck:
		// Written so that what is not a number fails too.
		if *v != nil && !(**v >= 0 && **v <= 1) {
			p.wrongType(name, "a number from 0 to 1")
		}
	}
}

// moment is a time: RFC 3339 with up to nine digits behind the second, written in UTC and read with any offset.
func (p *pass) moment(name string, v **timestamppb.Timestamp) {
	switch p.op {
	case opWrite:
		if (*v).IsValid() {
			p.key(name)
			p.out = append(p.out, '"')
			p.out = (*v).AsTime().AppendFormat(p.out, time.RFC3339Nano)
			p.out = append(p.out, '"')
		}
	case opRead:
		s, ok := p.takeText(name)
		if !ok {
			return
		}
		var t time.Time
		if err := t.UnmarshalText(s); err == nil && secondDigits(s) <= 9 {
			if *v = timestamppb.New(t); (*v).IsValid() {
				return
			}
		}
		p.refuse("Field '%s' is not a time in RFC 3339 form with an offset and at most nine digits behind the second, such as 2025-11-04T10:00:15Z.", p.path(name))
	case opCheck:
		if *v == nil {
			return
		}
		if err := (*v).CheckValid(); err != nil {
			p.refuse("Field '%s' is not a time of the years 1 to 9999.", p.path(name))
		} else if len((*v).ProtoReflect().GetUnknown()) > 0 {
			// A finished type of protobuf's own: it grows no fields, and the JSON form has no place for them.
			p.refuse("Field '%s' holds more than a time.", p.path(name))
		}
	}
}

// secondDigits counts the digits behind the second.
func secondDigits(s []byte) int {
	_, rest, _ := bytes.Cut(s, []byte{'.'})
	return skipDigits(rest, 0)
}

// ulid is an envelope's id.
func (p *pass) ulid(name string, v *string) {
	p.text(name, v, 0)
	if p.op == opCheck && *v != "" && !isULID(*v) {
		p.refuse("Field '%s' is not a ULID in its canonical form: 26 characters of Crockford's base32 in upper case, the first from 0 to 7.", p.path(name))
	}
}

// isULID accepts the canonical form only, so that equal ids are equal bytes.
func isULID(s string) bool {
	if len(s) != 26 || s[0] > '7' {
		return false
	}
	for i := range len(s) {
		c := s[i]
		if !isDigit(c) && (c < 'A' || c > 'Z' || c == 'I' || c == 'L' || c == 'O' || c == 'U') {
			return false
		}
	}
	return true
}

// customData is what an application defines itself: under "json" as it is where the content type says JSON and it is JSON, under "data" in base64
// otherwise. Either is read with any content type; "json" without one is application/json.
func (p *pass) customData(m *Custom) {
	switch p.op {
	case opWrite:
		if len(m.Data) == 0 {
			return
		}
		if isJSONMedia(m.ContentType) && isJSON(m.Data) {
			p.key("json")
			p.exact = p.exact || isSpace(m.Data[0]) || isSpace(m.Data[len(m.Data)-1])
			p.out = append(p.out, m.Data...)
		} else {
			p.key("data")
			p.base64(m.Data)
		}
	case opRead:
		b, both := p.takeBytes("data")
		m.Data = b
		if key, ok := p.takeAny("json"); ok {
			if both {
				p.refuse("A custom envelope has either 'json' or 'data', not both.")
			}
			m.Data = bytes.Clone(p.freeForm(key))
			if m.ContentType == "" {
				m.ContentType = "application/json"
			}
		}
	case opCheck:
		p.grows(len(m.Data))
		if parseType(m.Type) != 0 || m.Type == unknownType {
			p.refuse("Field 'type' of a custom envelope is %q, a name that Tidemark itself uses; choose another.", m.Type)
		}
	}
}

// isJSONMedia says whether a media type is JSON (RFC 8259, RFC 6839).
func isJSONMedia(contentType string) bool {
	media, _, _ := strings.Cut(contentType, ";")
	media = strings.ToLower(strings.TrimSpace(media))
	return media == "application/json" || strings.HasSuffix(media, "+json")
}

func isJSON(b []byte) bool {
	_, wrong := checkJSON(b, MaxJSONDepth)
	return wrong == "" && utf8.Valid(b)
}

// target is what a cancel stops: exactly one of three.
func (p *pass) target(m *Cancel) {
	const names = "'request_id', 'run_id', 'session'"
	switch p.op {
	case opWrite:
		switch t := m.Target.(type) {
		case *Cancel_RequestId:
			p.text("request_id", &t.RequestId, always)
		case *Cancel_RunId:
			p.text("run_id", &t.RunId, always)
		case *Cancel_Session:
			p.key("session")
			p.out = strconv.AppendBool(p.out, t.Session)
		}
	case opRead:
		given := 0
		if s, ok := p.takeString("request_id"); ok {
			m.Target = &Cancel_RequestId{RequestId: s}
			given++
		}
		if s, ok := p.takeString("run_id"); ok {
			m.Target = &Cancel_RunId{RunId: s}
			given++
		}
		if b, ok := p.takeBool("session"); ok {
			m.Target = &Cancel_Session{Session: b}
			given++
		}
		if given > 1 {
			p.refuse("A cancel stops one thing: give one of %s.", names)
		}
	case opCheck:
		switch t := m.Target.(type) {
		case *Cancel_RequestId:
			p.checkText("request_id", t.RequestId, required|ident)
		case *Cancel_RunId:
			p.checkText("run_id", t.RunId, required|ident)
		case *Cancel_Session:
			if !t.Session {
				p.refuse("Field 'session' of a cancel is true where it is set.")
			}
		default:
			p.refuse("Missing required field: one of %s", names)
		}
	}
}

// unknown is the fields of message m that this version does not know, as they were encoded. They survive in the JSON form as base64 under "unknown". A
// field number that is known cannot stand there: encoded and decoded again it would be another value of that field.
func (p *pass) unknown(v *[]byte, m proto.Message) {
	switch p.op {
	case opWrite:
		if len(*v) > 0 {
			p.key("unknown")
			p.base64(*v)
		}
	case opRead:
		if b, ok := p.takeBytes("unknown"); ok && len(b) > 0 {
			*v = b
			p.checkUnknown(b, m)
		}
	case opCheck:
		p.grows(len(*v))
		p.checkUnknown(*v, m)
	}
}

func (p *pass) checkUnknown(b []byte, m proto.Message) {
	for len(b) > 0 {
		num, _, n := protowire.ConsumeField(b)
		if n < 0 {
			p.refuse("Field '%s' is not the encoded form of protobuf fields.", p.path("unknown"))
			return
		}
		if m.ProtoReflect().Descriptor().Fields().ByNumber(num) != nil {
			p.refuse("Field number %d of %s is not of the type it should be.", num, m.ProtoReflect().Descriptor().Name())
			return
		}
		b = b[n:]
	}
}
