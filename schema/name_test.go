package schema

import (
	"regexp"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

// What NATS takes for one token of a subject (no space, '.', '*', '>') and its key-value store for a key (ADR-8), less '/', which we keep out.
var natsToken = regexp.MustCompile(`^[-_=a-zA-Z0-9]+$`)

func randomName() *rapid.Generator[string] {
	return rapid.OneOf(rapid.StringN(1, -1, MaxNameBytes), rapid.StringMatching(`[-_=a-zA-Z0-9.*> ]{1,20}`))
}

func TestEscapeToken(t *testing.T) {
	t.Parallel()
	for name, want := range map[string]string{
		"plain-Name_7": "plain-Name_7", "a.b": "a=2Eb", "*": "=2A", ">": "=3E", "a b": "a=20b", "=2E": "=3D2E", "ü": "=C3=BC", "\x00": "=00", "a/b": "a=2Fb",
	} {
		if got := EscapeToken(name); got != want {
			t.Errorf("EscapeToken(%q) = %s, want %s", name, got, want)
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		a, b := randomName().Draw(t, "a"), randomName().Draw(t, "b")
		token := EscapeToken(a)
		if !natsToken.MatchString(token) || len(token) > 3*len(a) {
			t.Fatalf("%q is no token", token)
		}
		if back, err := UnescapeToken(token); err != nil || back != a {
			t.Fatalf("came back as %q, %v", back, err)
		}
		if (a == b) != (token == EscapeToken(b)) {
			t.Fatalf("%q and %q share the token %s", a, b, token)
		}
	})
}

// A token that EscapeToken did not make names no session: two subjects for one session would be two histories.
func TestUnescapeTokenRefuses(t *testing.T) {
	t.Parallel()
	for _, token := range []string{"=", "a=", "=2", "=2e", "=41", "=2D", "=zz", "a.b", " ", "ü", "=+1"} {
		if name, err := UnescapeToken(token); CodeOf(err) != Code_CODE_INVALID_MESSAGE || err == nil {
			t.Errorf("UnescapeToken(%q) = %q, %v", token, name, err)
		}
	}
}

func FuzzUnescapeToken(f *testing.F) {
	for _, token := range []string{"plain", "a=2Eb", "=3D2E", "=C3=BC", "=2e", "=", "=41"} {
		f.Add(token)
	}
	f.Fuzz(func(t *testing.T, token string) {
		name, err := UnescapeToken(token)
		if err == nil && EscapeToken(name) != token {
			t.Fatalf("%q is the token of %q, which has the token %q", token, name, EscapeToken(name))
		}
	})
}

func TestParseSessionID(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("ü", MaxNameBytes/2)
	for _, row := range []struct{ tenant, name, sentence string }{
		{"default", "chat 1", ""},
		{long, long, ""},
		{"", "s", "The tenant's name is empty; give it 1 to 200 bytes."},
		{"t", "", "The session's name is empty; give it 1 to 200 bytes."},
		{"t", long + "x", "The session's name has 201 bytes; at most 200 are allowed."},
		{"t", "\xff", "The session's name is not valid UTF-8."},
	} {
		id, err := ParseSessionID(row.tenant, row.name)
		wantRefusal(t, err, Code_CODE_INVALID_MESSAGE, row.sentence)
		if err == nil && id != (SessionID{Tenant: row.tenant, Name: row.name}) {
			t.Errorf("got %v", id)
		}
	}
}
