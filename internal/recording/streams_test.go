package recording

import (
	"bytes"
	"encoding/json"
	"errors"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"tidemark/schema"
)

// streams is the folder of the recorded streams, beside the checkout.
const streams = "../../../shared/data/llm-streams"

// streamFiles returns the recorded streams by name.
func streamFiles(t testing.TB) map[string][]byte {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(streams, "*.chunks.txt"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(streams); errors.Is(err, fs.ErrNotExist) {
		t.Skip("The recorded streams (shared/data/llm-streams, beside the checkout) are not here.")
	}
	if len(names) == 0 {
		t.Fatalf("%s has no *.chunks.txt", streams)
	}
	files := make(map[string][]byte)
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		files[filepath.Base(name)] = b
	}
	return files
}

// TestStreams_TextForText: what the envelopes of every recorded stream say is what a reader of the bare JSON finds there, text for text and byte for byte.
func TestStreams_TextForText(t *testing.T) {
	for name, data := range streamFiles(t) {
		t.Run(name, func(t *testing.T) {
			rec := read(t, string(data), Config{})
			got := Gather(rec.Envelopes())
			compare(t, got, reference(t, data))
			for _, e := range slices.Collect(rec.Envelopes()) {
				if err := e.Validate(); err != nil {
					t.Errorf("an envelope that is refused: %v\n%v", err, e)
				}
			}
			if len(got.Runs) != 1 || !got.Runs[0].Started || !slices.Equal(got.Runs[0].Statuses, []schema.Status{schema.Status_STATUS_COMPLETED}) {
				t.Errorf("the runs are %+v; want one that started and completed", got.Runs)
			}
			if first, last := rec.Steps[0].Envelope.Kind(), rec.Steps[len(rec.Steps)-1].Envelope.Kind(); first != schema.KindStartRun || last != schema.KindRunStatus {
				t.Errorf("the recording begins with %v and ends with %v", first, last)
			}
			if again := read(t, string(data), Config{}); !reflect.DeepEqual(paces(rec), paces(again)) {
				t.Error("the pace of a second reading differs")
			}
		})
	}
}

// TestStreams_Formats: each stream is recognised for what it is.
func TestStreams_Formats(t *testing.T) {
	for name, data := range streamFiles(t) {
		want := ChatCompletions
		switch {
		case strings.HasPrefix(name, "anthropic-"):
			want = Messages
		case strings.HasPrefix(name, "openai-") && name != "openai-text.chunks.txt":
			want = Responses
		}
		if got := read(t, string(data), Config{}).Format; got != want {
			t.Errorf("%s was read as %v; it is %v", name, got, want)
		}
	}
}

// TestStreams_Pace: streams of one token a chunk play as fast as a hosted model writes.
func TestStreams_Pace(t *testing.T) {
	files := streamFiles(t)
	for _, name := range []string{"groq-reasoning.chunks.txt", "groq-text.chunks.txt", "deepseek-text.chunks.txt", "openai-text.chunks.txt", "xai-text.chunks.txt"} {
		rec := read(t, string(files[name]), Config{})
		perSecond := float64(len(rec.Steps)) / rec.Duration().Seconds()
		if perSecond < 50 || perSecond > 100 {
			t.Errorf("%s plays at %.0f tokens a second (%v in all); 50 to 100 are natural", name, perSecond, rec.Duration())
		}
	}
}

// TestOwn: the recording of the house has all that the demo wants to show, and keeps its own times.
func TestOwn(t *testing.T) {
	rec, err := Own(Config{})
	if err != nil {
		t.Fatal(err)
	}
	got := Gather(rec.Envelopes())
	compare(t, got, reference(t, []byte(tide)))
	if n := len(rec.Steps); n < 350 || n > 460 {
		t.Errorf("it has %d steps", n)
	}
	if d := rec.Duration(); d < 5*time.Second || d > 12*time.Second {
		t.Errorf("it plays for %v", d)
	}
	var recorded time.Duration
	for line := range strings.Lines(tide) {
		var l struct {
			AfterMS int64 `json:"after_ms"`
		}
		if err := json.Unmarshal([]byte(line), &l); err != nil {
			t.Fatal(err)
		}
		recorded += time.Duration(l.AfterMS) * time.Millisecond
	}
	// Nothing follows the last line but the end of the run, which comes with it.
	if recorded != rec.Duration() {
		t.Errorf("it plays for %v; its lines say %v", rec.Duration(), recorded)
	}
	if len(got.Messages) != 2 || got.Messages[0].Reasoning == "" || got.Messages[0].FinishReason != "tool_calls" || got.Messages[1].FinishReason != "stop" {
		t.Fatalf("its messages are %+v", got.Messages)
	}
	for _, want := range []string{"🌊", "São", "大潮", "≈", "```go\n", "\treturn low"} {
		if !strings.Contains(got.Messages[1].Text, want) {
			t.Errorf("its answer lacks %q", want)
		}
	}
	c := got.Call("call_tide_1")
	if c == nil || c.Name != "tide_table" || !c.Done || !c.Answered || !json.Valid([]byte(c.Arguments)) || !strings.Contains(c.Result, "9007199254740993") {
		t.Errorf("its call is %+v", c)
	}
}

// found is what a naive reader finds in the JSON of a stream.
type found struct {
	text, reasoning map[string]string
	// usage is the last of each message, as it stands in the line.
	usage map[string]string
	// arguments is a call's, exact where the provider streamed JSON, to be compared as values otherwise.
	arguments map[string]string
	exact     map[string]bool
	results   map[string]string
	citations []string
}

func reference(t *testing.T, data []byte) *found {
	t.Helper()
	f := &found{
		text: map[string]string{}, reasoning: map[string]string{}, usage: map[string]string{}, arguments: map[string]string{}, exact: map[string]bool{}, results: map[string]string{},
	}
	calls := map[float64]string{}
	var message string
	for line := range bytes.Lines(data) {
		var o map[string]any
		var raw map[string]json.RawMessage
		if err := errors.Join(json.Unmarshal(line, &o), json.Unmarshal(line, &raw)); err != nil {
			t.Fatal(err)
		}
		switch kind, _ := o["type"].(string); {
		case o["role"] == "tool":
			f.results[o["tool_call_id"].(string)] = o["content"].(string)
		case kind == "":
			message = o["id"].(string)
			f.chat(message, o, raw, calls)
		case strings.HasPrefix(kind, "response."):
			if r, ok := o["response"].(map[string]any); ok {
				message = r["id"].(string)
			}
			f.response(t, message, kind, o, raw)
		default:
			if m, ok := o["message"].(map[string]any); ok {
				message = m["id"].(string)
			}
			f.message(message, kind, o, raw, calls)
		}
	}
	return f
}

func (f *found) chat(id string, o map[string]any, raw map[string]json.RawMessage, calls map[float64]string) {
	if u := raw["usage"]; len(u) > 0 && string(u) != "null" {
		f.usage[id] = string(u)
	}
	for _, c := range o["choices"].([]any) {
		delta := c.(map[string]any)["delta"].(map[string]any)
		for key, to := range map[string]map[string]string{"content": f.text, "reasoning": f.reasoning, "reasoning_content": f.reasoning} {
			if s, ok := delta[key].(string); ok {
				to[id] += s
			}
		}
		pieces, _ := delta["tool_calls"].([]any)
		for _, p := range pieces {
			piece := p.(map[string]any)
			index := piece["index"].(float64)
			if call, ok := piece["id"].(string); ok {
				calls[index] = call
			}
			f.arguments[calls[index]] += piece["function"].(map[string]any)["arguments"].(string)
			f.exact[calls[index]] = true
		}
	}
}

func (f *found) response(t *testing.T, id, kind string, o map[string]any, raw map[string]json.RawMessage) {
	t.Helper()
	switch kind {
	case "response.output_text.delta":
		f.text[id] += o["delta"].(string)
	case "response.output_text.annotation.added":
		f.citations = append(f.citations, string(raw["annotation"]))
	case "response.completed":
		var r map[string]json.RawMessage
		if err := json.Unmarshal(raw["response"], &r); err != nil {
			t.Fatal(err)
		}
		f.usage[id] = string(r["usage"])
		// The provider's own gathering of the whole response must agree with the deltas.
		var whole strings.Builder
		for _, item := range o["response"].(map[string]any)["output"].([]any) {
			parts, _ := item.(map[string]any)["content"].([]any)
			for _, p := range parts {
				whole.WriteString(p.(map[string]any)["text"].(string))
			}
		}
		if whole.String() != f.text[id] {
			t.Fatalf("the stream contradicts itself: %q, %q", whole.String(), f.text[id])
		}
	case "response.output_item.done":
		item := o["item"].(map[string]any)
		var rawItem map[string]json.RawMessage
		if err := json.Unmarshal(raw["item"], &rawItem); err != nil {
			t.Fatal(err)
		}
		call, _ := item["id"].(string)
		switch item["type"] {
		case "code_interpreter_call":
			b, err := json.Marshal(map[string]any{"container_id": item["container_id"], "code": item["code"]})
			if err != nil {
				t.Fatal(err)
			}
			f.arguments[call], f.results[call] = string(b), string(rawItem["outputs"])
		case "mcp_call":
			f.arguments[call], f.exact[call], f.results[call] = item["arguments"].(string), true, string(rawItem["output"])
		case "shell_call":
			f.arguments[item["call_id"].(string)] = string(rawItem["action"])
		}
	}
}

func (f *found) message(id, kind string, o map[string]any, raw map[string]json.RawMessage, calls map[float64]string) {
	switch kind {
	case "message_delta":
		f.usage[id] = string(raw["usage"])
	case "content_block_start":
		block := o["content_block"].(map[string]any)
		switch kind := block["type"].(string); {
		case kind == "server_tool_use":
			calls[o["index"].(float64)] = block["id"].(string)
			f.exact[block["id"].(string)] = true
		case strings.HasSuffix(kind, "_tool_result"):
			var b map[string]json.RawMessage
			if json.Unmarshal(raw["content_block"], &b) == nil {
				f.results[block["tool_use_id"].(string)] = string(b["content"])
			}
		}
	case "content_block_delta":
		delta := o["delta"].(map[string]any)
		switch delta["type"] {
		case "text_delta":
			f.text[id] += delta["text"].(string)
		case "input_json_delta":
			f.arguments[calls[o["index"].(float64)]] += delta["partial_json"].(string)
		case "citations_delta":
			var d map[string]json.RawMessage
			if json.Unmarshal(raw["delta"], &d) == nil {
				f.citations = append(f.citations, string(d["citation"]))
			}
		}
	}
}

// compare holds what was gathered from envelopes against what stands in the JSON.
func compare(t *testing.T, got *Transcript, want *found) {
	t.Helper()
	for _, m := range got.Messages {
		if m.Text != want.text[m.ID] || m.Reasoning != want.reasoning[m.ID] {
			t.Errorf("message %s says\n%q, thinking\n%q; the stream has\n%q, thinking\n%q", m.ID, m.Text, m.Reasoning, want.text[m.ID], want.reasoning[m.ID])
		}
		if !m.Completed || m.Usage != want.usage[m.ID] || m.FinishReason == "" {
			t.Errorf("message %s: completed %v, because %q, at the cost of %s; the stream has %s", m.ID, m.Completed, m.FinishReason, m.Usage, want.usage[m.ID])
		}
	}
	if len(got.Messages) != len(want.usage) {
		t.Errorf("%d messages; the stream has %d", len(got.Messages), len(want.usage))
	}
	for id := range maps.Keys(want.arguments) {
		c := got.Call(id)
		if c == nil {
			t.Errorf("call %s is missing", id)
			continue
		}
		if !c.Done || c.Name == "" || !json.Valid([]byte(c.Arguments)) || got.Message(c.MessageID) == nil {
			t.Errorf("call %s is %+v", id, c)
		}
		if want.exact[id] && c.Arguments != want.arguments[id] || !sameJSON(t, c.Arguments, want.arguments[id]) {
			t.Errorf("call %s has the arguments\n%s; the stream has\n%s", id, c.Arguments, want.arguments[id])
		}
		if c.Result != want.results[id] {
			t.Errorf("call %s has the result\n%s; the stream has\n%s", id, c.Result, want.results[id])
		}
	}
	if len(got.Calls) != len(want.arguments) {
		t.Errorf("%d calls; the stream has %d", len(got.Calls), len(want.arguments))
	}
	var citations []string
	for _, c := range got.Customs {
		if c.Type != TypeCitation || !json.Valid([]byte(c.Data)) {
			t.Errorf("a custom envelope that is no citation: %+v", c)
		}
		_, citation, _ := strings.Cut(c.Data, `,"citation":`)
		citations = append(citations, strings.TrimSuffix(citation, "}"))
	}
	if !slices.Equal(citations, want.citations) {
		t.Errorf("the citations are\n%q; the stream has\n%q", citations, want.citations)
	}
}

func sameJSON(t *testing.T, a, b string) bool {
	t.Helper()
	var x, y any
	if err := errors.Join(json.Unmarshal([]byte(a), &x), json.Unmarshal([]byte(b), &y)); err != nil {
		t.Error(err)
	}
	return reflect.DeepEqual(x, y)
}

func read(t testing.TB, lines string, c Config) *Recording {
	t.Helper()
	rec, err := Read(strings.NewReader(lines), c)
	if err != nil {
		t.Fatal(err)
	}
	return rec
}

func paces(r *Recording) []time.Duration {
	var p []time.Duration
	for _, s := range r.Steps {
		p = append(p, s.After)
	}
	return p
}
