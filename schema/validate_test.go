package schema

import (
	"errors"
	"math"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// wantRefusal checks code and sentence; an empty sentence wants no error.
func wantRefusal(t *testing.T, err error, code Code, sentence string) {
	t.Helper()
	if sentence == "" {
		if err != nil {
			t.Fatalf("refused: %v", err)
		}
		return
	}
	var r *Refusal
	if !errors.As(err, &r) {
		t.Fatalf("got %v, want a refusal", err)
	}
	if r.Code != code || r.Message != sentence {
		t.Fatalf("got  %v %s\nwant %v %s", r.Code, r.Message, code, sentence)
	}
}

// sample is a valid envelope of a kind with every field of the payload set.
func sample(t *testing.T, kind Kind) *Envelope {
	t.Helper()
	e := &Envelope{Payload: newPayload(kind)}
	f := e.ProtoReflect().Descriptor().Fields().ByNumber(protowire.Number(kind))
	e.ProtoReflect().Set(f, fullValue(f.ContainingMessage(), f, 1))
	if c := e.GetToolCall(); c != nil {
		c.ArgumentsDelta = ""
	}
	if r := e.GetStartRun(); r != nil {
		r.OrphanAfterMs = MinOrphanAfterMs
	}
	if err := e.Validate(); err != nil {
		t.Fatal(err)
	}
	return e
}

const deadlineAlone = "The fields 'deadline' and 'default' stand together or not at all: at the deadline the question is answered with the default."

// Of every payload, each field in turn is taken away: the required ones are missed by their name in the JSON form, the others are not.
func TestRequiredFields(t *testing.T) {
	t.Parallel()
	for _, kind := range Kinds() {
		fields := sample(t, kind).ProtoReflect().Descriptor().Fields().ByNumber(protowire.Number(kind)).Message().Fields()
		for i := range fields.Len() {
			f := fields.Get(i)
			if oneof := f.ContainingOneof(); oneof != nil && !oneof.IsSynthetic() {
				continue
			}
			t.Run(kind.String()+"."+string(f.Name()), func(t *testing.T) {
				t.Parallel()
				e := sample(t, kind)
				payload := e.ProtoReflect().WhichOneof(e.ProtoReflect().Descriptor().Oneofs().ByName("payload"))
				e.ProtoReflect().Mutable(payload).Message().Clear(f)
				sentence := ""
				if slices.Contains(requiredFields[kind], formName(f)) {
					sentence = "Missing required field '" + formName(f) + "'"
				}
				if kind == KindWaitingForInput && (f.Name() == "deadline" || f.Name() == "default_json") {
					sentence = deadlineAlone
				}
				wantRefusal(t, e.Validate(), Code_CODE_INVALID_MESSAGE, sentence)
			})
		}
	}
}

// Every text and every free-form field of every payload has the bound that its name promises: ids have 200 bytes, free-form fields are objects unless they
// are called otherwise.
func TestFieldBounds(t *testing.T) {
	t.Parallel()
	anyJSON := []string{"response_json", "input_json", "arguments_json", "result_json", "default_json"}
	for _, kind := range Kinds() {
		fields := sample(t, kind).ProtoReflect().Descriptor().Fields().ByNumber(protowire.Number(kind)).Message().Fields()
		for i := range fields.Len() {
			f := fields.Get(i)
			if f.Kind() != protoreflect.StringKind || f.IsList() {
				continue
			}
			name := string(f.Name())
			t.Run(kind.String()+"."+name, func(t *testing.T) {
				t.Parallel()
				value, sentence := strings.Repeat("x", MaxIDBytes+1), ""
				switch {
				case slices.Contains(anyJSON, name):
					value = "[]"
				case strings.HasSuffix(name, "_json"):
					value, sentence = "[]", "Field '"+formName(f)+"' must be a JSON object."
				case strings.HasSuffix(name, "_id") || name == "type" || name == "content_type" || name == "group":
					sentence = "Field '" + name + "' has 201 bytes; at most 200 are allowed."
				}
				e := sample(t, kind)
				payload := e.ProtoReflect().WhichOneof(e.ProtoReflect().Descriptor().Oneofs().ByName("payload"))
				e.ProtoReflect().Mutable(payload).Message().Set(f, protoreflect.ValueOfString(value))
				if c := e.GetToolCall(); name == "arguments_delta" {
					c.ArgumentsJson = ""
				}
				wantRefusal(t, e.Validate(), Code_CODE_INVALID_MESSAGE, sentence)
			})
		}
	}
}

func TestValidate(t *testing.T) {
	t.Parallel()
	const invalid = Code_CODE_INVALID_MESSAGE
	system := func(change func(*Envelope)) *Envelope {
		e := &Envelope{Payload: &Envelope_System{System: &System{Message: "m"}}}
		change(e)
		return e
	}
	payload := func(p isEnvelope_Payload) *Envelope { return &Envelope{Payload: p} }
	input := func(response, metadata string) *Envelope {
		return payload(&Envelope_UserInput{UserInput: &UserInput{ResponseJson: response, MetadataJson: metadata}})
	}
	progress := func(p float64) *Envelope {
		return payload(&Envelope_WorkflowProgress{WorkflowProgress: &WorkflowProgress{Step: "s", Message: "m", Progress: &p}})
	}
	custom := func(typ string) *Envelope { return payload(&Envelope_Custom{Custom: &Custom{Type: typ}}) }
	const badProgress = "Field 'progress' must be a number from 0 to 1."
	const badULID = "Field 'id' is not a ULID in its canonical form: 26 characters of Crockford's base32 in upper case, the first from 0 to 7."

	for _, row := range []struct {
		name     string
		e        *Envelope
		code     Code
		sentence string
	}{
		{"the least", system(func(*Envelope) {}), 0, ""},
		{"what the server assigns", system(func(e *Envelope) { e.Seq, e.Source, e.FirstSeq = 7, &Source{Subject: "s", Role: 99}, new(uint64(3)) }), 0, ""},
		{"no payload", new(Envelope), Code_CODE_UNKNOWN_TYPE, "The envelope has no payload that this version of the server knows."},
		{"nil", nil, Code_CODE_UNKNOWN_TYPE, "The envelope has no payload that this version of the server knows."},
		{
			"a later payload", unknownFields(new(Envelope), 28, "x"), Code_CODE_UNKNOWN_TYPE,
			"The payload with field number 28 is not known to this version of the server.",
		},
		{
			"a later payload behind a known one", unknownFields(system(func(*Envelope) {}), 99, "x"), Code_CODE_UNKNOWN_TYPE,
			"The payload with field number 99 is not known to this version of the server.",
		},
		{"a later field", unknownFields(system(func(*Envelope) {}), 100, "x"), 0, ""},
		{
			"a known field of another type", unknownFields(system(func(*Envelope) {}), 2, "x"), invalid,
			"Field number 2 of Envelope is not of the type it should be.",
		},
		{
			"a known field of another type, inside", payload(&Envelope_System{System: unknownFields(&System{Message: "m"}, 1, "x")}), invalid,
			"Field number 1 of System is not of the type it should be.",
		},
		{"unknown bytes that are no fields", system(func(e *Envelope) { e.unknownFields = []byte{0xff} }), invalid, "Field 'unknown' is not the encoded form of protobuf fields."},
		{"a payload without its message", payload(&Envelope_Token{}), invalid, "Missing required field 'message_id'"},

		{"the least ULID", system(func(e *Envelope) { e.Id = strings.Repeat("0", 26) }), 0, ""},
		{"the largest ULID", system(func(e *Envelope) { e.Id = "7" + strings.Repeat("Z", 25) }), 0, ""},
		{"a ULID too large", system(func(e *Envelope) { e.Id = "8" + strings.Repeat("0", 25) }), invalid, badULID},
		{"a ULID in lower case", system(func(e *Envelope) { e.Id = "01jbvabcdefghjkmnpqrstvwxy" }), invalid, badULID},
		{"a ULID too short", system(func(e *Envelope) { e.Id = "01JBV" }), invalid, badULID},
		{"a ULID with an I", system(func(e *Envelope) { e.Id = "01JBVABCDEFGHJKMNPQRSTVWXI" }), invalid, badULID},

		{"a time", system(func(e *Envelope) { e.Time = &timestamppb.Timestamp{Seconds: 1} }), 0, ""},
		{"a time after time", system(func(e *Envelope) { e.Time = &timestamppb.Timestamp{Seconds: math.MaxInt64} }), invalid, "Field 'timestamp' is not a time of the years 1 to 9999."},
		{"nanoseconds of more than a second", system(func(e *Envelope) { e.Time = &timestamppb.Timestamp{Nanos: 1e9} }), invalid, "Field 'timestamp' is not a time of the years 1 to 9999."},
		{
			"a time with something in it", system(func(e *Envelope) { e.Time = unknownFields(&timestamppb.Timestamp{}, 9, "x") }), invalid,
			"Field 'timestamp' holds more than a time.",
		},

		{"the longest request id", system(func(e *Envelope) { e.RequestId = strings.Repeat("x", MaxIDBytes) }), 0, ""},
		{"a longer one", system(func(e *Envelope) { e.RequestId = strings.Repeat("x", MaxIDBytes+1) }), invalid, "Field 'request_id' has 201 bytes; at most 200 are allowed."},
		{"text that is not UTF-8", system(func(e *Envelope) { e.GetSystem().Message = "\xff" }), invalid, "Field 'message' is not valid UTF-8."},
		{"an answer to nothing", system(func(e *Envelope) { e.ReplyTo = new(uint64(0)) }), invalid, "Field 'reply_to' is 0; the first envelope of a session has seq 1."},

		{"a producer", system(func(e *Envelope) { e.Producer = &Producer{Id: strings.Repeat("p", MaxProducerIDBytes), Seq: 1} }), 0, ""},
		{"a producer without an id", system(func(e *Envelope) { e.Producer = &Producer{Seq: 1} }), invalid, "Missing required field 'producer.id'"},
		{"a producer without a seq", system(func(e *Envelope) { e.Producer = &Producer{Id: "p"} }), invalid, "Missing required field 'producer.seq'"},
		{
			"a producer's id too long", system(func(e *Envelope) { e.Producer = &Producer{Id: strings.Repeat("p", MaxProducerIDBytes+1), Seq: 1} }), invalid,
			"Field 'producer.id' has 65 bytes; at most 64 are allowed.",
		},

		{"progress 0", progress(0), 0, ""},
		{"progress 1", progress(1), 0, ""},
		{"progress below 0", progress(-0.01), invalid, badProgress},
		{"progress above 1", progress(1.01), invalid, badProgress},
		{"progress that is no number", progress(math.NaN()), invalid, badProgress},

		{"any JSON", input(" null\n", ""), 0, ""},
		{"no JSON", input("{", ""), invalid, "Field 'response' is not valid JSON: at byte 1, a key in quotes should stand here."},
		{"only white space", input(" ", ""), invalid, "Field 'response' is not valid JSON: at byte 1, the text ends where a value should begin."},
		{"two values", input("1 2", ""), invalid, "Field 'response' is not valid JSON: at byte 2, something follows the end of the value."},
		{"JSON that is not UTF-8", input("\"\xff\"", ""), invalid, "Field 'response' is not valid UTF-8."},
		{"JSON too deep", input(nested(MaxJSONDepth+1), ""), invalid, "Field 'response' is not valid JSON: at byte 128, arrays and objects are nested deeper than 128 levels."},
		{"an object", input("1", "\n{}"), 0, ""},
		{"no object", input("1", "[]"), invalid, "Field 'metadata' must be a JSON object."},

		{
			"a channel that is not known", payload(&Envelope_Token{Token: &Token{MessageId: "m", Channel: 9}}), invalid,
			"Field 'channel' is 9, which is not known here; it must be one of: text, reasoning.",
		},
		{
			"a status below 0", payload(&Envelope_RunStatus{RunStatus: &RunStatus{Status: -1}}), invalid,
			"Field 'status' is -1, which is not known here; it must be one of: open, running, waiting_for_input, completed, failed, cancelled.",
		},
		{
			"arguments at once and streamed", payload(&Envelope_ToolCall{ToolCall: &ToolCall{CallId: "c", ArgumentsJson: "{}", ArgumentsDelta: "{"}}), invalid,
			"A tool call has either 'arguments' or 'arguments_delta', not both.",
		},
		{"cancel of nothing", payload(&Envelope_Cancel{Cancel: &Cancel{}}), invalid, "Missing required field: one of 'request_id', 'run_id', 'session'"},
		{"cancel of an unnamed run", payload(&Envelope_Cancel{Cancel: &Cancel{Target: &Cancel_RunId{}}}), invalid, "Missing required field 'run_id'"},
		{"cancel of not the session", payload(&Envelope_Cancel{Cancel: &Cancel{Target: &Cancel_Session{}}}), invalid, "Field 'session' of a cancel is true where it is set."},
		{"a custom type", custom("tokens"), 0, ""},
		{
			"custom JSON that is not UTF-8",
			payload(&Envelope_Custom{Custom: &Custom{Type: "t", ContentType: "application/json", Data: []byte("\"\xff\"")}}), 0, "",
		},
		{"a custom type of ours", custom("token"), invalid, `Field 'type' of a custom envelope is "token", a name that Tidemark itself uses; choose another.`},
		{"another name of ours", custom("waiting_for_input"), invalid, `Field 'type' of a custom envelope is "waiting_for_input", a name that Tidemark itself uses; choose another.`},
		{"the type of what is unknown", custom("unknown"), invalid, `Field 'type' of a custom envelope is "unknown", a name that Tidemark itself uses; choose another.`},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			wantRefusal(t, row.e.Validate(), row.code, row.sentence)
			if row.sentence == "" {
				checkBackFromJSON(t, row.e)
			}
		})
	}
}

// unknownFields gives m a field of bytes that it does not know.
func unknownFields[M proto.Message](m M, num protowire.Number, value string) M {
	b := protowire.AppendTag(nil, num, protowire.BytesType)
	m.ProtoReflect().SetUnknown(protowire.AppendString(b, value))
	return m
}

// The bound on an envelope is exact, however its bytes are spread.
func TestValidateSize(t *testing.T) {
	t.Parallel()
	text := func(n int) *Envelope {
		return &Envelope{Payload: &Envelope_System{System: &System{Message: strings.Repeat("x", n)}}}
	}
	unknown := func(n int) *Envelope { return unknownFields(text(1), 100, strings.Repeat("x", n)) }
	for name, make := range map[string]func(int) *Envelope{"text": text, "unknown": unknown} {
		// The largest that is allowed.
		n := 1
		for step := MaxEnvelopeBytes; step > 0; step /= 2 {
			if proto.Size(make(n+step)) <= MaxEnvelopeBytes {
				n += step
			}
		}
		if err := make(n).Validate(); err != nil {
			t.Errorf("%s: %d bytes: %v", name, proto.Size(make(n)), err)
		}
		if err := make(n + 1).Validate(); CodeOf(err) != Code_CODE_TOO_LARGE {
			t.Errorf("%s: %d bytes: %v", name, proto.Size(make(n+1)), err)
		}
	}
}

func TestValidateBoundsInside(t *testing.T) {
	t.Parallel()
	options := func(n, size int) *Envelope {
		all := slices.Repeat([]string{strings.Repeat("x", size)}, n)
		return &Envelope{Payload: &Envelope_WaitingForInput{WaitingForInput: &WaitingForInput{Prompt: "p", Options: all}}}
	}
	metadata := func(n int) *Envelope {
		return &Envelope{Payload: &Envelope_SessionCreated{SessionCreated: &SessionCreated{MetadataJson: "{" + strings.Repeat(" ", n-2) + "}"}}}
	}
	orphan := func(ms uint64) *Envelope {
		return &Envelope{Payload: &Envelope_StartRun{StartRun: &StartRun{RunId: "r", OrphanAfterMs: ms}}}
	}
	answered := func(deadline *timestamppb.Timestamp, answer string, options ...string) *Envelope {
		return &Envelope{Payload: &Envelope_WaitingForInput{WaitingForInput: &WaitingForInput{Prompt: "p", Options: options, Deadline: deadline, DefaultJson: answer}}}
	}
	at := &timestamppb.Timestamp{Seconds: 1762250415}
	text := func(n int) string { return `"` + strings.Repeat("x", n-2) + `"` }
	for name, row := range map[string]struct {
		e        *Envelope
		sentence string
	}{
		"the deployment's patience":    {orphan(0), ""},
		"least patience":               {orphan(1000), ""},
		"most patience":                {orphan(86_400_000), ""},
		"too little patience":          {orphan(999), "The field 'orphan_after_ms' is 999; 1000 to 86400000 milliseconds are allowed."},
		"too much patience":            {orphan(86_400_001), "The field 'orphan_after_ms' is 86400001; 1000 to 86400000 milliseconds are allowed."},
		"a default":                    {answered(at, `"no"`), ""},
		"a default of the options":     {answered(at, `"no"`, "yes", "no"), ""},
		"a default beyond the options": {answered(at, `"maybe"`, "yes", "no"), "The field 'default' is none of the answers in 'options'."},
		"a default that is no string":  {answered(at, `{"yes":1}`, "yes", "no"), ""},
		"a default that is null":       {answered(at, "null"), ""},
		"a default that is no JSON":    {answered(at, "no"), "Field 'default' is not valid JSON: at byte 0, a value should begin here."},
		"the longest default":          {answered(at, text(4096)), ""},
		"too long a default":           {answered(at, text(4097)), "The field 'default' has 4097 bytes; at most 4096 are allowed."},
		"a deadline without a default": {answered(at, ""), deadlineAlone},
		"a default without a deadline": {answered(nil, "1"), deadlineAlone},
		"a deadline that is no time":   {answered(&timestamppb.Timestamp{Nanos: -1}, "1"), "Field 'deadline' is not a time of the years 1 to 9999."},
		"most options":                 {options(100, 1000), ""},
		"too many options":             {options(101, 1), "The field 'options' has 101 answers; at most 100 are allowed."},
		"an option too long":           {options(1, 1001), "The field 'options' has an answer of 1001 bytes; each must have 1 to 1000."},
		"an empty option":              {options(1, 0), "The field 'options' has an answer of 0 bytes; each must have 1 to 1000."},
		"most metadata":                {metadata(64 << 10), ""},
		"too much metadata":            {metadata(64<<10 + 1), "The field 'metadata' has 65537 bytes; at most 65536 are allowed."},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			code := Code(0)
			if row.sentence != "" {
				code = Code_CODE_INVALID_MESSAGE
			}
			wantRefusal(t, row.e.Validate(), code, row.sentence)
		})
	}
}

func TestPublishValidate(t *testing.T) {
	t.Parallel()
	good, bad := &Envelope{Payload: &Envelope_System{System: &System{Message: "m"}}}, &Envelope{Payload: &Envelope_System{System: &System{}}}
	many := func(n int) []*Envelope { return slices.Repeat([]*Envelope{good}, n) }
	for _, row := range []struct {
		name     string
		p        *Publish
		code     Code
		sentence string
	}{
		{"by name", &Publish{Session: "s", Envelopes: many(MaxPublishEnvelopes)}, 0, ""},
		{"by channel", &Publish{Channel: 1, Envelopes: many(1)}, 0, ""},
		{"by neither", &Publish{Envelopes: many(1)}, Code_CODE_INVALID_MESSAGE, "The session's name is empty; give it 1 to 200 bytes."},
		{"by both", &Publish{Session: "s", Channel: 1, Envelopes: many(1)}, Code_CODE_INVALID_MESSAGE, "A publish names either its session or a channel, not both."},
		{"of nothing", &Publish{Session: "s"}, Code_CODE_INVALID_MESSAGE, "The publish has no envelopes; give it 1 to 1000."},
		{"of too many", &Publish{Session: "s", Envelopes: many(1001)}, Code_CODE_INVALID_MESSAGE, "The publish has 1001 envelopes; at most 1000 are allowed."},
		{"of a bad one", &Publish{Session: "s", Envelopes: []*Envelope{bad}}, Code_CODE_INVALID_MESSAGE, "Missing required field 'message'"},
		{"with a bad one", &Publish{Session: "s", Envelopes: []*Envelope{good, bad}}, Code_CODE_INVALID_MESSAGE, "Envelope 2 of 2: Missing required field 'message'"},
		{"with none at its place", &Publish{Session: "s", Envelopes: []*Envelope{nil}}, Code_CODE_UNKNOWN_TYPE, "The envelope has no payload that this version of the server knows."},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			wantRefusal(t, row.p.Validate(), row.code, row.sentence)
		})
	}
}

// The edges' way in, which decodes only what it must, accepts what Validate accepts and nothing else.
func FuzzAcceptAgreesWithValidate(f *testing.F) {
	for _, path := range goldenPaths(f) {
		if strings.Contains(path, "Envelope.") {
			f.Add(readFile(f, path))
		}
	}
	plain := mustMarshal(f, scanToken("x"))
	f.Add(mustMarshal(f, unknownFields(scanToken("x"), 28, "a later payload")))
	f.Add(slices.Concat(plain, []byte{28<<3&0x7f | 0x80, 28 << 3 >> 7, 1})) // the same as a number
	f.Add(slices.Concat(plain, []byte{7 << 3, 0}))                          // an answer to nothing
	f.Add(slices.Concat(plain, []byte{7 << 3, 0x80, 0}))                    // the same, padded
	f.Fuzz(func(t *testing.T, b []byte) {
		_, refused := testStamp().Accept(b, scanTime)
		e := new(Envelope)
		if err := proto.Unmarshal(b, e); err != nil {
			if refused == nil {
				t.Fatalf("accepted what cannot be decoded: %v", err)
			}
			return
		}
		// What the edge drops before it stores.
		e.Seq, e.Source, e.FirstSeq = 0, nil, nil
		if err := e.Validate(); (err == nil) != (refused == nil) {
			t.Fatalf("Validate says %v, Accept says %v", err, refused)
		}
	})
}

// Whatever bytes arrive: what Validate accepts keeps its promises.
func FuzzEnvelopeValidate(f *testing.F) {
	for _, path := range goldenPaths(f) {
		if strings.Contains(path, "Envelope.") {
			f.Add(readFile(f, path))
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		e := new(Envelope)
		if proto.Unmarshal(b, e) != nil || e.Validate() != nil {
			return
		}
		checkBackFromJSON(t, e)
		raw, err := proto.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		if len(raw) > MaxEnvelopeBytes {
			t.Fatalf("accepted %d bytes", len(raw))
		}
		back := new(Envelope)
		if err := proto.Unmarshal(raw, back); err != nil {
			t.Fatal(err)
		}
		if !proto.Equal(e, back) {
			t.Fatalf("the encoded form lost something:\n%v\n%v", e, back)
		}
	})
}
