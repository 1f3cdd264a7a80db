package schema

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"
)

// Every valid envelope comes back equal from its JSON form and from its encoded one, unknown fields included.
func TestEnvelopeIsLossless(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		e := randomEnvelope().Draw(t, "envelope")
		if err := e.Validate(); err != nil {
			t.Fatalf("the generator made an invalid envelope: %v", err)
		}
		form := checkBackFromJSON(t, e)
		raw, err := proto.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		var back Envelope
		if err := proto.Unmarshal(raw, &back); err != nil {
			t.Fatal(err)
		}
		if !proto.Equal(e, &back) {
			t.Fatalf("the encoded form lost something:\n%v\n%v", e, &back)
		}
		if again := AppendJSON(nil, &back); !bytes.Equal(form, again) {
			t.Fatalf("the JSON form is another after encoding:\n%s\n%s", form, again)
		}
	})
}

type fatal interface {
	Helper()
	Fatalf(format string, args ...any)
}

// checkBackFromJSON writes e's JSON form and reads it back.
func checkBackFromJSON(t fatal, e *Envelope) []byte {
	t.Helper()
	before := proto.CloneOf(e)
	form := AppendJSON([]byte("before"), e)
	if !proto.Equal(before, e) {
		t.Fatalf("AppendJSON changed the envelope")
	}
	form, ok := bytes.CutPrefix(form, []byte("before"))
	if !ok || !json.Valid(form) {
		t.Fatalf("not appended, or not JSON: %s", form)
	}
	back, err := ParseJSON(form)
	if err != nil {
		t.Fatalf("%v\n%s", err, form)
	}
	if !proto.Equal(e, back) {
		t.Fatalf("the JSON form lost something:\n%s\n%v\n%v", form, e, back)
	}
	return form
}

// Whatever bytes arrive: no panic, and what is accepted is the same envelope once it was written and read again.
func FuzzParseJSON(f *testing.F) {
	for _, form := range goldenForms(f) {
		f.Add(form)
	}
	for _, row := range parseRows {
		f.Add([]byte(row.in))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := ParseJSON(b)
		if err != nil {
			if CodeOf(err) != Code_CODE_INVALID_MESSAGE && CodeOf(err) != Code_CODE_UNKNOWN_TYPE {
				t.Fatalf("refused with %v", err)
			}
			return
		}
		if !json.Valid(b) {
			t.Fatalf("accepted what is not JSON: %q", b)
		}
		checkBackFromJSON(t, e)
	})
}

// parseRows are messages and what is said about them; an empty sentence means that the message is written as want, or as it came where want is empty.
var parseRows = []struct{ name, in, want, sentence string }{
	{
		name: "token",
		in:   `{"type":"token","timestamp":"2025-11-04T10:00:15Z","seq":7,"id":"01JBVABCDEFGHJKMNPQRSTVWXY","data":{"message_id":"m","channel":"reasoning","text":"Hi"}}`,
	},
	{
		name: "every envelope field",
		in: `{"type":"system","timestamp":"0001-01-01T00:00:00.000000001Z","seq":18446744073709551615,"id":"01JBVABCDEFGHJKMNPQRSTVWXY","first_seq":9007199254740993,` +
			`"request_id":"r","reply_to":3,"producer":{"id":"p","epoch":18446744073709551615,"seq":1},"source":{"subject":"s","role":"agent"},"data":{"message":"m"}}`,
	},
	{
		name: "any order, white space, escaped keys, nulls, an offset",
		in: " {\n\"data\" : {\"text\":null,\"message_id\":\"\\u006d\"} , \"reply_to\":null, \"t\\u0079pe\":\"token\",\"producer\":null," +
			"\"timestamp\":\"2025-11-04T10:00:15.250+01:30\"} ",
		want: `{"type":"token","timestamp":"2025-11-04T08:30:15.25Z","data":{"message_id":"m","text":""}}`,
	},
	{
		name: "the other name of waiting_for_input",
		in:   `{"type":"waiting_for_input","data":{"prompt":"p","options":[ "a" , "b\n" ]}}`,
		want: `{"type":"workflow_waiting_for_input","data":{"prompt":"p","options":["a","b\n"]}}`,
	},
	{
		name: "free-form JSON is kept, the white space around it is not",
		in:   "{\"type\":\"user_input\",\"data\":{\"response\": [1.0,\n 123456789012345678901234567890, \"\\ud800\"]\n, \"metadata\": {\"b\":1, \"a\":2, \"b\":3} }}",
		want: "{\"type\":\"user_input\",\"data\":{\"response\":[1.0,\n 123456789012345678901234567890, \"\\ud800\"],\"metadata\":{\"b\":1, \"a\":2, \"b\":3}}}",
	},
	{
		name: "with exact the white space around it is kept too",
		in:   "{\"type\":\"user_input\",\"data\":{\"response\": 1\n,\"metadata\":{}},\"exact\":true}",
	},
	{
		name: "every key",
		in: `{"type":"user_input","timestamp":"2025-11-04T10:00:15Z","seq":7,"id":"01JBVABCDEFGHJKMNPQRSTVWXY","first_seq":6,"request_id":"r","reply_to":3,` +
			`"producer":{"id":"p","seq":1},"source":{},"data":{"response": 1},"unknown":"oAYB","exact":true}`,
	},
	{name: "null is an answer", in: `{"type":"user_input","data":{"response":null}}`},
	{name: "null is no object", in: `{"type":"user_input","data":{"response":1,"metadata":null}}`, want: `{"type":"user_input","data":{"response":1}}`},
	{name: "unknown payload", in: `{"type":"unknown","data":{},"unknown":"4gEBeA=="}`},
	{name: "unknown payload without data", in: `{"type":"unknown","unknown":"4gEBeA=="}`, want: `{"type":"unknown","data":{},"unknown":"4gEBeA=="}`},
	{name: "unknown fields", in: `{"type":"system","producer":{"id":"p","seq":1,"unknown":"oAYC"},"data":{"message":"m","unknown":"oAYD"},"unknown":"oAYB"}`},
	{name: "unknown word", in: `{"type":"system","source":{"role":77},"data":{"message":"m"}}`},
	{name: "custom JSON", in: `{"type":"custom","data":{"type":"t","content_type":"application/x+json; v=1","json":{"b":1.0, "a":[]}}}`},
	{
		name: "custom JSON without a content type", in: `{"type":"custom","data":{"type":"t","json":null}}`,
		want: `{"type":"custom","data":{"type":"t","content_type":"application/json","json":null}}`,
	},
	{name: "custom bytes", in: `{"type":"custom","data":{"type":"t","content_type":"text/plain","data":"AAEC/w=="}}`},
	{name: "custom bytes that claim to be JSON", in: `{"type":"custom","data":{"type":"t","content_type":"application/json","data":"e30s"}}`},
	{name: "cancel of a request", in: `{"type":"cancel","data":{"request_id":"r","reason":"x"}}`},
	{name: "cancel of the session", in: `{"type":"cancel","data":{"session":true}}`},
	{name: "flags", in: `{"type":"error","data":{"error":"e","recoverable":false}}`},
	{name: "progress", in: `{"type":"workflow_progress","data":{"step":"s","message":"m","progress":1E-1}}`, want: `{"type":"workflow_progress","data":{"step":"s","message":"m","progress":0.1}}`},

	{name: "nothing", in: ``, sentence: "invalid_message: The message is not a JSON object."},
	{name: "no object", in: `[]`, sentence: "invalid_message: The message is not a JSON object."},
	{name: "not UTF-8", in: "{\"type\":\"\xff\"}", sentence: "invalid_message: The message is not valid UTF-8 at byte 9."},
	{name: "no JSON", in: `{"type":"token",}`, sentence: "invalid_message: The message is not valid JSON: at byte 16, a key in quotes should stand here."},
	{name: "cut", in: `{"type":"tok`, sentence: "invalid_message: The message is not valid JSON: at byte 12, the text ends inside a string."},
	{name: "two messages", in: `{"type":"system","data":{"message":"m"}} {}`, sentence: "invalid_message: The message is not valid JSON: at byte 41, something follows the end of the object."},
	{name: "no type", in: `{"data":{}}`, sentence: "invalid_message: Missing required field 'type'"},
	{name: "type of the wrong type", in: `{"type":7,"data":{}}`, sentence: "invalid_message: Field 'type' must be a string."},
	{name: "unknown type", in: `{"type":"nope","data":{}}`, sentence: `unknown_type: The type "nope" is not known here. What an application defines itself is sent as type 'custom'.`},
	{name: "no data", in: `{"type":"system"}`, sentence: "invalid_message: Missing required field 'data'"},
	{name: "data of the wrong type", in: `{"type":"system","data":[]}`, sentence: "invalid_message: Field 'data' must be an object."},
	{name: "unknown key", in: `{"type":"system","data":{"message":"m"},"extra":1}`, sentence: "invalid_message: Unknown field 'extra'."},
	{name: "unknown key in data", in: `{"type":"system","data":{"message":"m","extra":1}}`, sentence: "invalid_message: Unknown field 'extra' in 'data'."},
	{name: "unknown key in the producer", in: `{"type":"system","producer":{"x":1},"data":{"message":"m"}}`, sentence: "invalid_message: Unknown field 'x' in 'producer'."},
	{name: "unknown payload with data", in: `{"type":"unknown","data":{"x":1}}`, sentence: "invalid_message: Unknown field 'x' in 'data'."},
	{
		name: "many keys", in: `{"type":"system","data":{"message":"m"},"a":1,"b":1,"c":1,"d":1,"e":1,"f":1,"g":1,"h":1,"i":1,"j":1,"k":1,"l":1,"m":1,"n":1,"o":1,"p":1}`,
		sentence: "invalid_message: Unknown field 'a'.",
	},
	{name: "a key twice", in: `{"type":"system","data":{"message":"m","mess\u0061ge":"n"}}`, sentence: "invalid_message: The key 'message' stands twice in one object."},
	{name: "half a character", in: `{"type":"system","data":{"message":"\ud83d"}}`, sentence: "invalid_message: Field 'message' holds half of a surrogate pair, which is no character."},
	{name: "the other half", in: `{"type":"system","data":{"message":"\ude00\ud83d"}}`, sentence: "invalid_message: Field 'message' holds half of a surrogate pair, which is no character."},
	{name: "string of the wrong type", in: `{"type":"system","data":{"message":{}}}`, sentence: "invalid_message: Field 'message' must be a string."},
	{name: "flag of the wrong type", in: `{"type":"error","data":{"error":"e","recoverable":"yes"}}`, sentence: "invalid_message: Field 'recoverable' must be true or false."},
	{name: "object of the wrong type", in: `{"type":"user_input","data":{"response":1,"metadata":[]}}`, sentence: "invalid_message: Field 'metadata' must be a JSON object."},
	{name: "list of the wrong type", in: `{"type":"waiting_for_input","data":{"prompt":"p","options":{}}}`, sentence: "invalid_message: Field 'options' must be a list of strings."},
	{name: "list of wrong things", in: `{"type":"waiting_for_input","data":{"prompt":"p","options":["a",1]}}`, sentence: "invalid_message: Field 'options' must be a list of strings."},
	{name: "number of the wrong type", in: `{"type":"workflow_progress","data":{"progress":"1"}}`, sentence: "invalid_message: Field 'progress' must be a number from 0 to 1."},
	{name: "number out of range", in: `{"type":"workflow_progress","data":{"progress":1e999}}`, sentence: "invalid_message: Field 'progress' must be a number from 0 to 1."},
	{name: "word of the wrong type", in: `{"type":"run_status","data":{"status":true}}`, sentence: "invalid_message: Field 'status' must be one of: open, running, waiting_for_input, completed, failed, cancelled."},
	{name: "unknown word", in: `{"type":"token","data":{"channel":"voice"}}`, sentence: "invalid_message: Field 'channel' must be one of: text, reasoning."},
	{name: "no word", in: `{"type":"token","data":{"channel":""}}`, sentence: "invalid_message: Field 'channel' must be one of: text, reasoning."},
	{name: "time without an offset", in: `{"type":"system","timestamp":"2025-11-04T10:00:15","data":{}}`, sentence: badTime},
	{name: "time too exact", in: `{"type":"system","timestamp":"2025-11-04T10:00:15.1234567890Z","data":{}}`, sentence: badTime},
	{name: "time before time", in: `{"type":"system","timestamp":"0001-01-01T00:00:00+01:00","data":{}}`, sentence: badTime},
	{name: "seq with a point", in: `{"type":"system","seq":1.0,"data":{}}`, sentence: badWhole},
	{name: "seq below 0", in: `{"type":"system","seq":-1,"data":{}}`, sentence: badWhole},
	{name: "seq too large", in: `{"type":"system","seq":18446744073709551616,"data":{}}`, sentence: badWhole},
	{name: "seq much too large", in: `{"type":"system","seq":184467440737095516150,"data":{}}`, sentence: badWhole},
	{name: "seq in quotes", in: `{"type":"system","seq":"1","data":{}}`, sentence: badWhole},
	{name: "base64 without padding", in: `{"type":"custom","data":{"type":"t","data":"AA"}}`, sentence: "invalid_message: Field 'data' must be bytes in base64, with padding."},
	{name: "custom twice", in: `{"type":"custom","data":{"type":"t","data":"","json":1}}`, sentence: "invalid_message: A custom envelope has either 'json' or 'data', not both."},
	{name: "two targets", in: `{"type":"cancel","data":{"run_id":"r","session":true}}`, sentence: "invalid_message: A cancel stops one thing: give one of 'request_id', 'run_id', 'session'."},
	{name: "unknown that is no field", in: `{"type":"system","data":{},"unknown":"/w=="}`, sentence: "invalid_message: Field 'unknown' is not the encoded form of protobuf fields."},
	// Field 4 is the source: behind the checks it would say who sent the envelope.
	{name: "unknown that is known", in: `{"type":"system","data":{"message":"m"},"unknown":"IgMKAXg="}`, sentence: "invalid_message: Field number 4 of Envelope is not of the type it should be."},
	{name: "too deep", in: `{"type":"user_input","data":{"response":` + nested(MaxJSONDepth+1) + `}}`, sentence: "invalid_message: The message is not valid JSON: at byte 168, arrays and objects are nested deeper than 128 levels."},
}

const (
	badTime  = "invalid_message: Field 'timestamp' is not a time in RFC 3339 form with an offset and at most nine digits behind the second, such as 2025-11-04T10:00:15Z."
	badWhole = "invalid_message: Field 'seq' must be a whole number from 0 to 18446744073709551615, written without a point or an exponent."
)

func nested(depth int) string { return strings.Repeat("[", depth) + strings.Repeat("]", depth) }

func TestParseJSON(t *testing.T) {
	t.Parallel()
	for _, row := range parseRows {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			e, err := ParseJSON([]byte(row.in))
			if row.sentence != "" {
				if err == nil || err.Error() != row.sentence {
					t.Fatalf("got  %v\nwant %s", err, row.sentence)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			want := row.want
			if want == "" {
				want = row.in
			}
			if got := string(AppendJSON(nil, e)); got != want {
				t.Fatalf("got  %s\nwant %s", got, want)
			}
			checkBackFromJSON(t, e)
		})
	}
}

// The deepest free-form value that is allowed passes both ways.
func TestDeepestJSON(t *testing.T) {
	t.Parallel()
	e := &Envelope{Payload: &Envelope_UserInput{UserInput: &UserInput{ResponseJson: nested(MaxJSONDepth)}}}
	if err := e.Validate(); err != nil {
		t.Fatal(err)
	}
	checkBackFromJSON(t, e)
}

// What no validated envelope holds still does not spoil the JSON.
func TestAppendJSONOfBadText(t *testing.T) {
	t.Parallel()
	e := &Envelope{Id: "\xff\"\\\x7f\u2028", Payload: &Envelope_System{}}
	if got, want := string(AppendJSON(nil, e)), "{\"type\":\"system\",\"id\":\"\uFFFD\\\"\\\\\x7f\u2028\",\"data\":{}}"; got != want {
		t.Fatalf("got  %s\nwant %s", got, want)
	}
}

func token() *Envelope {
	e, err := ParseJSON([]byte(`{"type":"token","timestamp":"2025-11-04T10:00:15.25Z","seq":1234,"id":"01JBVABCDEFGHJKMNPQRSTVWXY",` +
		`"source":{"subject":"agent-7","role":"agent"},"data":{"message_id":"msg-1","text":"Hello, "}}`))
	if err != nil {
		panic(err)
	}
	return e
}

// Per token and follower: writing and checking put nothing on the heap.
func TestTokenAllocations(t *testing.T) {
	e, buf := token(), make([]byte, 0, 1024)
	if n := testing.AllocsPerRun(100, func() { buf = AppendJSON(buf[:0], e) }); n != 0 {
		t.Errorf("AppendJSON made %v allocations", n)
	}
	if n := testing.AllocsPerRun(100, func() { _ = e.Validate() }); n != 0 {
		t.Errorf("Validate made %v allocations", n)
	}
}

func BenchmarkAppendJSON(b *testing.B) {
	e, buf := token(), make([]byte, 0, 1024)
	b.ReportAllocs()
	for b.Loop() {
		buf = AppendJSON(buf[:0], e)
	}
}

func BenchmarkParseJSON(b *testing.B) {
	form := AppendJSON(nil, token())
	b.ReportAllocs()
	for b.Loop() {
		if _, err := ParseJSON(form); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkValidate(b *testing.B) {
	e := token()
	b.ReportAllocs()
	for b.Loop() {
		if err := e.Validate(); err != nil {
			b.Fatal(err)
		}
	}
}
