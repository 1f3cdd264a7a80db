package schema

import (
	"strings"
	"unicode/utf8"
)

// SessionID names a session: unique in its tenant.
type SessionID struct {
	Tenant string
	Name   string
}

// ParseSessionID checks both names: 1 to [MaxNameBytes] bytes of UTF-8, any character.
func ParseSessionID(tenant, name string) (SessionID, error) {
	if err := checkName("tenant", tenant); err != nil {
		return SessionID{}, err
	}
	if err := checkName("session", name); err != nil {
		return SessionID{}, err
	}
	return SessionID{Tenant: tenant, Name: name}, nil
}

// String is for people and logs; it cannot be parsed back.
func (id SessionID) String() string { return id.Tenant + "/" + id.Name }

func checkName(what, name string) error {
	switch {
	case name == "":
		return Refuse(Code_CODE_INVALID_MESSAGE, "The %s's name is empty; give it 1 to %d bytes.", what, MaxNameBytes)
	case len(name) > MaxNameBytes:
		return Refuse(Code_CODE_INVALID_MESSAGE, "The %s's name has %d bytes; at most %d are allowed.", what, len(name), MaxNameBytes)
	case !utf8.ValidString(name):
		return Refuse(Code_CODE_INVALID_MESSAGE, "The %s's name is not valid UTF-8.", what)
	}
	return nil
}

const hexDigits = "0123456789ABCDEF"

// EscapeToken turns a name into one NATS subject token that is also a valid NATS KV key part (ADR-8 of NATS allows [-/_=.a-zA-Z0-9]): ASCII letters, digits,
// '-' and '_' stand for themselves, every other byte is '=' and two upper-case hexadecimal digits. [UnescapeToken] reverses it.
func EscapeToken(name string) string {
	plain := true
	for i := range len(name) {
		if !plainByte(name[i]) {
			plain = false
			break
		}
	}
	if plain {
		return name
	}
	var b strings.Builder
	b.Grow(len(name) + 16)
	for i := range len(name) {
		if c := name[i]; plainByte(c) {
			b.WriteByte(c)
		} else {
			b.WriteByte('=')
			b.WriteByte(hexDigits[c>>4])
			b.WriteByte(hexDigits[c&15])
		}
	}
	return b.String()
}

// UnescapeToken is the reverse of [EscapeToken]. It accepts only what EscapeToken makes.
func UnescapeToken(token string) (string, error) {
	var b strings.Builder
	b.Grow(len(token))
	for i := 0; i < len(token); i++ {
		c := token[i]
		if plainByte(c) {
			b.WriteByte(c)
			continue
		}
		if c != '=' || i+2 >= len(token) {
			return "", Refuse(Code_CODE_INVALID_MESSAGE, "%q is not an escaped name.", token)
		}
		hi, lo := strings.IndexByte(hexDigits, token[i+1]), strings.IndexByte(hexDigits, token[i+2])
		if hi < 0 || lo < 0 || plainByte(byte(hi<<4|lo)) {
			return "", Refuse(Code_CODE_INVALID_MESSAGE, "%q is not an escaped name.", token)
		}
		b.WriteByte(byte(hi<<4 | lo))
		i += 2
	}
	return b.String(), nil
}

func plainByte(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '_'
}
