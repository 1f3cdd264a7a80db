package schema

import (
	"encoding/json"
	"strings"
	"testing"
	"unicode/utf8"
)

var jsonTexts = []string{
	"", " ", "null", "nul", "true ", "tru", "false", "\tfalse", "falsee", "0", "-0", "-", "01", "1.", "1.5", ".5", "1e", "1e+", "1E-7", "+1", "1 2", "NaN",
	`""`, `"`, `"\`, `"\"`, `"\u`, `"\u12"`, `"\u12g4"`, `"\ud800"`, `"\x"`, "\"\x1f\"", "\"\x1fn\"", "\"\x7f\"", "\"\n\"", `"\b\f\n\r\t\/\\\""`,
	"[]", "[", "[ ]", "[1,]", "[,]", "[1 2]", "[1,2", "[1, [2, []]]", "]", "{}", "{", "{ }", `{"a"}`, `{"a":}`, `{"a":1,}`, `{"a":1 "b":2}`, `{a:1}`,
	`{"a":1,"a":{"b":[]}}`, `{"a" : 1 , "b" : 2 }`, "}", "\uFEFF1", "\v1", "1\x00",
}

// The scanner accepts what encoding/json accepts, but for the depth.
func checkScanner(t *testing.T, text string) {
	t.Helper()
	want := json.Valid([]byte(text))
	at, wrong := checkJSON(text, len(text))
	if (wrong == "") != want {
		t.Fatalf("%q: valid is %v, the scanner says %q at %d", text, want, wrong, at)
	}
	if at < 0 || at > len(text) {
		t.Fatalf("%q: place %d", text, at)
	}
	if at2, wrong2 := checkJSON([]byte(text), len(text)); at2 != at || wrong2 != wrong {
		t.Fatalf("%q: bytes and string differ", text)
	}
	if want && text[skipSpace(text, 0)] == '"' && utf8.ValidString(text) {
		checkUnquote(t, strings.Trim(text, " \t\r\n"))
	}
}

// checkUnquote compares with encoding/json, which puts U+FFFD for half a surrogate pair.
func checkUnquote(t *testing.T, quoted string) {
	t.Helper()
	var want string
	if err := json.Unmarshal([]byte(quoted), &want); err != nil {
		t.Fatal(err)
	}
	got, ok := unquote([]byte(quoted))
	if !ok {
		if !strings.ContainsRune(want, utf8.RuneError) {
			t.Fatalf("%s refused", quoted)
		}
		return
	}
	if string(got) != want {
		t.Fatalf("%s is %q, want %q", quoted, got, want)
	}
	again, ok := unquote(appendQuoted(nil, want))
	if !ok || string(again) != want || !json.Valid(appendQuoted(nil, want)) {
		t.Fatalf("%q is written as %s", want, appendQuoted(nil, want))
	}
}

func TestScanner(t *testing.T) {
	t.Parallel()
	for _, text := range jsonTexts {
		checkScanner(t, text)
	}
}

func TestScannerDepth(t *testing.T) {
	t.Parallel()
	for depth := range 4 {
		for text, levels := range map[string]int{"1": 0, "[]": 1, "{}": 1, `{"a":[1]}`: 2, `[[],{"a":{}}]`: 3} {
			if _, wrong := checkJSON(text, depth); (wrong == "") != (levels <= depth) {
				t.Errorf("%s with %d levels: %q", text, depth, wrong)
			}
		}
	}
	// Deep enough to end a process that recursed without a bound.
	if _, wrong := checkJSON(strings.Repeat("[", 50<<20), MaxJSONDepth); wrong != tooDeep {
		t.Errorf("got %q", wrong)
	}
}

func FuzzSkipValue(f *testing.F) {
	for _, text := range jsonTexts {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		// encoding/json has a bound of its own, 10,000.
		if len(text) < 10_000 {
			checkScanner(t, text)
		}
	})
}
