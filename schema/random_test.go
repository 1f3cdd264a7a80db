package schema

import (
	"encoding/json"
	"slices"
	"strings"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/timestamppb"
	"pgregory.net/rapid"
)

// requiredFields is what the comments of envelope.proto call required, by kind, as the JSON form names it. It is written down a second time on purpose.
var requiredFields = map[Kind][]string{
	KindToken:            {"message_id"},
	KindMessageCompleted: {"message_id"},
	KindToolCall:         {"call_id"},
	KindToolResult:       {"call_id"},
	KindWorkflowProgress: {"step", "message"},
	KindCustom:           {"type"},
	KindSessionCreated:   {},
	KindStartRun:         {"run_id"},
	KindRunStatus:        {"status"},
	KindSystem:           {"message"},
	KindUserMessage:      {"message"},
	KindAgentMessage:     {"message"},
	KindChatError:        {"error"},
	KindWaitingForInput:  {"prompt"},
	KindUserInput:        {"response"},
	KindCancel:           {},
	KindError:            {"error", "recoverable"},
	KindWorkFailed:       {"group", "reason"},
}

// randomEnvelope makes valid envelopes of every kind, with and without what may be absent, unknown fields among it.
func randomEnvelope() *rapid.Generator[*Envelope] {
	return rapid.Custom(func(t *rapid.T) *Envelope {
		kind := rapid.SampledFrom(Kinds()).Draw(t, "kind")
		e := &Envelope{Payload: newPayload(kind)}
		fields := e.ProtoReflect().Descriptor().Fields()
		for i := range fields.Len() {
			f := fields.Get(i)
			switch {
			case IsPayload(int32(f.Number())):
				if Kind(f.Number()) == kind {
					randomMessage(t, e.ProtoReflect().Mutable(f).Message(), requiredFields[kind])
				}
			case rapid.Bool().Draw(t, "has "+string(f.Name())):
				randomField(t, e.ProtoReflect(), f)
			}
		}
		if e.Producer != nil {
			e.Producer.Id, e.Producer.Seq = randomText(1, MaxProducerIDBytes).Draw(t, "producer"), rapid.Uint64Min(1).Draw(t, "producer seq")
		}
		if e.ReplyTo != nil {
			e.ReplyTo = new(max(*e.ReplyTo, 1))
		}
		if c := e.GetToolCall(); c.GetArgumentsJson() != "" {
			c.ArgumentsDelta = ""
		}
		if r := e.GetStartRun(); r.GetOrphanAfterMs() != 0 {
			r.OrphanAfterMs = rapid.Uint64Range(MinOrphanAfterMs, MaxOrphanAfterMs).Draw(t, "orphan after")
		}
		if w := e.GetWaitingForInput(); w != nil && (w.Deadline == nil || w.DefaultJson == "" || !Allows(w.Options, w.DefaultJson)) {
			// They stand together, and the answer is one of the options.
			w.Deadline, w.DefaultJson = nil, ""
		}
		if c := e.GetCancel(); c != nil {
			switch rapid.IntRange(0, 2).Draw(t, "target") {
			case 0:
				c.Target = &Cancel_RequestId{RequestId: randomText(1, MaxIDBytes).Draw(t, "request")}
			case 1:
				c.Target = &Cancel_RunId{RunId: randomText(1, MaxIDBytes).Draw(t, "run")}
			case 2:
				c.Target = &Cancel_Session{Session: true}
			}
		}
		if c := e.GetCustom(); c != nil && rapid.Bool().Draw(t, "json") {
			c.ContentType = rapid.SampledFrom([]string{"application/json", "Application/JSON; charset=utf-8", "application/ld+json", "text/plain"}).Draw(t, "media")
			c.Data = []byte(randomJSON(t, "data", 0))
		}
		randomUnknown(t, e.ProtoReflect())
		return e
	})
}

// randomMessage fills m: every required field, and others as it falls.
func randomMessage(t *rapid.T, m protoreflect.Message, required []string) {
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		if f.ContainingOneof() != nil && !f.ContainingOneof().IsSynthetic() {
			continue
		}
		if slices.Contains(required, formName(f)) || rapid.Bool().Draw(t, "has "+string(f.Name())) {
			randomField(t, m, f)
		}
	}
	randomUnknown(t, m)
}

// formName is a field's name in the JSON form.
func formName(f protoreflect.FieldDescriptor) string {
	return strings.TrimSuffix(string(f.Name()), "_json")
}

func randomField(t *rapid.T, m protoreflect.Message, f protoreflect.FieldDescriptor) {
	name := string(f.Name())
	if f.IsList() {
		list := m.Mutable(f).List()
		for _, s := range rapid.SliceOfN(randomText(1, MaxPromptOptionBytes), 0, 5).Draw(t, name) {
			list.Append(protoreflect.ValueOfString(s))
		}
		return
	}
	switch f.Kind() {
	case protoreflect.StringKind:
		m.Set(f, protoreflect.ValueOfString(randomString(t, m, f)))
	case protoreflect.BytesKind:
		m.Set(f, protoreflect.ValueOfBytes(rapid.SliceOfN(rapid.Byte(), 0, 20).Draw(t, name)))
	case protoreflect.BoolKind:
		m.Set(f, protoreflect.ValueOfBool(rapid.Bool().Draw(t, name)))
	case protoreflect.Uint64Kind:
		m.Set(f, protoreflect.ValueOfUint64(rapid.Uint64().Draw(t, name)))
	case protoreflect.DoubleKind:
		m.Set(f, protoreflect.ValueOfFloat64(rapid.Float64Range(0, 1).Draw(t, name)))
	case protoreflect.EnumKind:
		numbers := f.Enum().Values()
		n := protoreflect.EnumNumber(rapid.IntRange(1, numbers.Len()-1).Draw(t, name))
		if m.Descriptor().Name() == "Source" {
			// A newer server's role has no word here.
			n = protoreflect.EnumNumber(rapid.Int32().Draw(t, name))
		}
		m.Set(f, protoreflect.ValueOfEnum(n))
	case protoreflect.MessageKind:
		if f.Message().FullName() == "google.protobuf.Timestamp" {
			m.Set(f, protoreflect.ValueOfMessage((&timestamppb.Timestamp{
				Seconds: rapid.Int64Range(-62135596800, 253402300799).Draw(t, name), // the years 1 to 9999
				Nanos:   rapid.Int32Range(0, 999_999_999).Draw(t, "nanos"),
			}).ProtoReflect()))
			return
		}
		randomMessage(t, m.Mutable(f).Message(), nil)
	default:
		t.Fatalf("no random value for a field of kind %v", f.Kind())
	}
}

func randomString(t *rapid.T, m protoreflect.Message, f protoreflect.FieldDescriptor) string {
	name := string(f.Name())
	switch {
	case name == "id" && m.Descriptor().Name() == "Envelope":
		return rapid.StringMatching(`[0-7][0-9A-HJKMNP-TV-Z]{25}`).Draw(t, name)
	case strings.HasSuffix(name, "_json"):
		object := !slices.Contains([]string{"response_json", "input_json", "arguments_json", "result_json", "default_json"}, name)
		return randomSpace(t) + randomJSONOf(t, name, object) + randomSpace(t)
	case name == "type":
		return "app." + randomText(0, MaxIDBytes-4).Draw(t, name)
	case strings.HasSuffix(name, "_id") || name == "id" || name == "content_type" || name == "subject" || name == "group":
		return randomText(1, MaxIDBytes).Draw(t, name)
	}
	return randomText(1, 1000).Draw(t, name)
}

// randomText is from least to most bytes long.
func randomText(least, most int) *rapid.Generator[string] { return rapid.StringN(least, -1, most) }

func randomSpace(t *rapid.T) string { return rapid.StringMatching("[ \t\n\r]{0,2}").Draw(t, "space") }

func randomJSONOf(t *rapid.T, name string, object bool) string {
	if object {
		return randomObject(t, name, 0)
	}
	return randomJSON(t, name, 0)
}

func randomJSON(t *rapid.T, name string, depth int) string {
	most := 5
	if depth > 3 {
		most = 3
	}
	switch rapid.IntRange(0, most).Draw(t, name) {
	case 0:
		return rapid.SampledFrom([]string{"null", "true", "false"}).Draw(t, name)
	case 1:
		return rapid.StringMatching(`-?(0|[1-9][0-9]{0,30})(\.[0-9]{1,5})?([eE][+-]?[0-9]{1,4})?`).Draw(t, name)
	case 2:
		return randomJSONString(t, name)
	case 3:
		return rapid.SampledFrom([]string{`"\ud800"`, `"\u0000\/\b"`, `""`, `[]`, `{}`, `{"a":1,"a":2}`}).Draw(t, name)
	case 4:
		var b strings.Builder
		b.WriteString("[" + randomSpace(t))
		for i := range rapid.IntRange(0, 3).Draw(t, name) {
			if i > 0 {
				b.WriteString("," + randomSpace(t))
			}
			b.WriteString(randomJSON(t, name, depth+1) + randomSpace(t))
		}
		return b.String() + "]"
	}
	return randomObject(t, name, depth)
}

func randomObject(t *rapid.T, name string, depth int) string {
	var b strings.Builder
	b.WriteString("{" + randomSpace(t))
	for i := range rapid.IntRange(0, 3).Draw(t, name) {
		if i > 0 {
			b.WriteString("," + randomSpace(t))
		}
		b.WriteString(randomJSONString(t, name) + randomSpace(t) + ":" + randomSpace(t) + randomJSON(t, name, depth+1) + randomSpace(t))
	}
	return b.String() + "}"
}

func randomJSONString(t *rapid.T, name string) string {
	quoted, err := json.Marshal(rapid.String().Draw(t, name))
	if err != nil {
		t.Fatalf("marshal a string: %v", err)
	}
	return string(quoted)
}

// randomUnknown gives m fields of a later version, sometimes.
func randomUnknown(t *rapid.T, m protoreflect.Message) {
	if m.Descriptor().FullName() == "google.protobuf.Timestamp" || rapid.IntRange(0, 3).Draw(t, "unknown") > 0 {
		return
	}
	var b []byte
	for range rapid.IntRange(1, 3).Draw(t, "unknown fields") {
		num := protowire.Number(rapid.Int32Range(100, 5000).Draw(t, "unknown number"))
		if rapid.Bool().Draw(t, "varint") {
			b = protowire.AppendTag(b, num, protowire.VarintType)
			b = protowire.AppendVarint(b, rapid.Uint64().Draw(t, "unknown value"))
		} else {
			b = protowire.AppendTag(b, num, protowire.BytesType)
			b = protowire.AppendBytes(b, rapid.SliceOfN(rapid.Byte(), 0, 9).Draw(t, "unknown bytes"))
		}
	}
	m.SetUnknown(b)
}
