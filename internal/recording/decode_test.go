package recording

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"tidemark/schema"
)

const (
	chunk    = `{"id":"a","choices":[{"delta":{"content":"x"}}]}`
	finished = `{"id":"a","choices":[{"delta":{},"finish_reason":"stop"}]}`
)

// TestRefusals: what cannot be read is refused by a sentence with the number of its line, once what stood before it was returned, and for ever after.
func TestRefusals(t *testing.T) {
	for _, test := range []struct {
		name, lines string
		config      Config
		before      int
		code        schema.Code
		want        string
	}{
		{"broken JSON", chunk + "\n" + chunk[:20] + "\n" + chunk, Config{}, 2, schema.Code_CODE_INVALID_MESSAGE, "Line 2 of the recording is not a JSON object: unexpected end of JSON input."},
		{"no JSON", chunk + "\n\nhello\n", Config{}, 2, schema.Code_CODE_INVALID_MESSAGE, "Line 3 of the recording is not a JSON object"},
		{"a list", chunk + "\n[1]\n", Config{}, 2, schema.Code_CODE_INVALID_MESSAGE, "Line 2 of the recording is a JSON array where the format chat_completions has objects."},
		{"null", chunk + "\nnull\n", Config{}, 2, schema.Code_CODE_INVALID_MESSAGE, "Line 2 of the recording is no chunk of a chat completion"},
		{"a wrong type", chunk + "\n" + `{"choices":[{"delta":{"content":7}}]}`, Config{}, 2, schema.Code_CODE_INVALID_MESSAGE, `Line 2 of the recording does not fit the format chat_completions: "choices.delta.content" cannot be a number.`},
		{"no chunk", chunk + "\n{}", Config{}, 2, schema.Code_CODE_INVALID_MESSAGE, "Line 2 of the recording is no chunk of a chat completion"},
		{"another format", `{"type":"message_start","message":{"id":"m"}}` + "\n" + `{"type":"response.created"}`, Config{}, 1, schema.Code_CODE_INVALID_MESSAGE, "Line 2 of the recording is an event of another format"},
		{"begins broken", "{\n", Config{}, 0, schema.Code_CODE_INVALID_MESSAGE, "Line 1 of the recording begins like JSON"},
		{"unknown JSON", "\n" + `{"level":"info","msg":"hi"}`, Config{}, 0, schema.Code_CODE_INVALID_MESSAGE, "Line 2 of the recording is a JSON object of no stream known here"},
		{"unknown type", `{"type":"foo"}`, Config{}, 0, schema.Code_CODE_INVALID_MESSAGE, "of no stream known here"},
		{"not UTF-8", "ok\n\xff\n", Config{}, 1, schema.Code_CODE_INVALID_MESSAGE, "Line 2 of the recording is not valid UTF-8"},
		{"half a surrogate pair", chunk + "\n" + `{"id":"a","choices":[{"delta":{"content":"\\\ud83d"}}]}`, Config{}, 2, schema.Code_CODE_INVALID_MESSAGE, "Line 2 of the recording has half of a surrogate pair"},
		{"too long", chunk + "\n" + strings.Repeat(" ", MaxLineBytes+3), Config{}, 2, schema.Code_CODE_TOO_LARGE, "Line 2 of the recording has more than 1048576 bytes"},
		{"no room for what the publisher adds", "ok\n" + strings.Repeat("x", MaxLineBytes-publisherBytes), Config{}, 1, schema.Code_CODE_TOO_LARGE, "Line 2 of the recording makes an envelope of"},
		{"an id that is too long", `{"id":"` + strings.Repeat("i", 201) + `","choices":[{"delta":{"content":"x"}}]}`, Config{}, 0, schema.Code_CODE_INVALID_MESSAGE, "Line 1 of the recording makes an envelope of type start_run that is refused: Field 'run_id' has 205 bytes"},
		{"usage that is no object", chunk + "\n" + `{"id":"a","choices":[{"delta":{},"finish_reason":"stop"}],"usage":[]}`, Config{}, 2, schema.Code_CODE_INVALID_MESSAGE, "Line 2 of the recording makes an envelope of type message_completed that is refused: Field 'usage'"},
		{"a time below zero", `{"choices":[{"delta":{"content":"x"}}],"after_ms":-1}`, Config{}, 0, schema.Code_CODE_INVALID_MESSAGE, "Line 1 of the recording has an after_ms of -1; it may be 0 to 60000."},
		{"a result of no call", chunk + "\n" + `{"role":"tool","content":"x"}`, Config{}, 2, schema.Code_CODE_INVALID_MESSAGE, "Line 2 of the recording is a tool's message without a tool_call_id."},
		{"arguments of no call", `{"type":"response.mcp_call_arguments.delta","output_index":4,"delta":"x"}`, Config{}, 0, schema.Code_CODE_INVALID_MESSAGE, "Line 1 of the recording continues a call at place 4 of the response, where no call was opened."},
		{"commands out of order", `{"type":"response.output_item.added","item":{"type":"shell_call","id":"s"}}` + "\n" + `{"type":"response.shell_call_command.delta","command_index":1,"delta":"x"}`, Config{}, 2, schema.Code_CODE_INVALID_MESSAGE, "Line 2 of the recording continues command 1 of a shell call out of its order."},
		{"input of no block", `{"type":"content_block_delta","index":4,"delta":{"partial_json":"x"}}`, Config{}, 0, schema.Code_CODE_INVALID_MESSAGE, "Line 1 of the recording continues the input of block 4"},
		{"choice without end", `{"id":"a","choices":[{"index":1024,"delta":{"content":"x"}}]}`, Config{}, 0, schema.Code_CODE_INVALID_MESSAGE, "has choice 1024; the choices are 0 to 1023."},
		{"JSON as said, but text", "hello", Config{Format: Messages}, 0, schema.Code_CODE_INVALID_MESSAGE, "Line 1 of the recording is not a JSON object"},
		{"a prefix that is too long", "hello", Config{IDPrefix: strings.Repeat("p", 101)}, 0, schema.Code_CODE_INVALID_MESSAGE, "The prefix for ids has 101 bytes; at most 100 are allowed."},
	} {
		t.Run(test.name, func(t *testing.T) {
			d := NewDecoder(strings.NewReader(test.lines), test.config)
			var n int
			var err error
			for ; err == nil; n++ {
				_, err = d.Next()
			}
			if n--; n != test.before {
				t.Errorf("%d envelopes came before the error; want %d", n, test.before)
			}
			refusal, ok := errors.AsType[*schema.Refusal](err)
			if !ok || refusal.Code != test.code || !strings.Contains(refusal.Error(), test.want) {
				t.Errorf("the error is %v; want a refusal with %v that says %q", err, test.code, test.want)
			}
			if _, again := d.Next(); !errors.Is(again, err) {
				t.Errorf("asked again, it says %v", again)
			}
		})
	}
}

// TestRead_Bounds: an empty recording is refused, as is one that does not fit into memory.
func TestRead_Bounds(t *testing.T) {
	for _, lines := range []string{"", "data: [DONE]\n"} {
		if _, err := Read(strings.NewReader(lines), Config{Format: ChatCompletions}); schema.CodeOf(err) != schema.Code_CODE_INVALID_MESSAGE || !strings.Contains(err.Error(), "empty") {
			t.Errorf("%q: %v", lines, err)
		}
	}
	line := strings.Repeat("x", MaxLineBytes/2) + "\n"
	if _, err := Read(strings.NewReader(strings.Repeat(line, MaxRecordingBytes/len(line)+2)), Config{}); schema.CodeOf(err) != schema.Code_CODE_TOO_LARGE {
		t.Errorf("too many bytes: %v", err)
	}
	if _, err := Read(strings.NewReader(strings.Repeat("x\n", MaxRecordingSteps+2)), Config{}); schema.CodeOf(err) != schema.Code_CODE_TOO_LARGE {
		t.Errorf("too many lines: %v", err)
	}
}

// TestArguments_Bound: a call that never ends is refused before it fills the memory.
func TestArguments_Bound(t *testing.T) {
	piece := `{"type":"content_block_delta","index":0,"delta":{"partial_json":"` + strings.Repeat("x", MaxLineBytes/2) + `"}}` + "\n"
	lines := `{"type":"content_block_start","index":0,"content_block":{"type":"tool_use","id":"t","name":"f"}}` + "\n" + strings.Repeat(piece, 10)
	if _, err := Read(strings.NewReader(lines), Config{}); schema.CodeOf(err) != schema.Code_CODE_TOO_LARGE || !strings.Contains(err.Error(), "Line 10 ") {
		t.Errorf("the error is %v; want line 10 refused, with which the arguments pass 4 MiB", err)
	}
}

// TestParts_Many: a part of text is forgotten when it is done, so that a response may have more of them than may be open at once.
func TestParts_Many(t *testing.T) {
	var lines, done strings.Builder
	for i := range maxOpen + 1 {
		fmt.Fprintf(&lines, `{"type":"response.output_text.delta","content_index":%d,"delta":"x"}`+"\n", i)
		fmt.Fprintf(&done, `{"type":"response.output_text.delta","content_index":%d,"delta":"x"}`+"\n"+`{"type":"response.output_text.done","content_index":%d,"text":"x"}`+"\n", i, i)
	}
	if got := Gather(read(t, done.String(), Config{}).Envelopes()).Messages[0].Text; got != strings.Repeat("x", maxOpen+1) {
		t.Errorf("%d bytes of text came back", len(got))
	}
	if _, err := Read(strings.NewReader(lines.String()), Config{}); err == nil || !strings.Contains(err.Error(), "Line 1025 of the recording opens more than 1024 parts of text at once.") {
		t.Errorf("the error is %v", err)
	}
}

// TestDecoder_Live: an envelope comes as soon as its line is there, while the stream goes on.
func TestDecoder_Live(t *testing.T) {
	for name, lines := range map[string][]string{
		"text":     {"one\n", "two\n", "three"},
		"chat":     {chunk + "\n", chunk + "\n", finished[:len(finished)-1] + `,"usage":{}}` + "\n"},
		"messages": {`{"type":"content_block_delta","delta":{"text":"x"}}` + "\n", `{"type":"content_block_delta","delta":{"text":"x"}}` + "\n"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r, w := io.Pipe()
				got := make(chan string, 100)
				go func() {
					defer close(got)
					d := NewDecoder(r, Config{WithoutRun: true})
					for {
						step, err := d.Next()
						if err != nil {
							return
						}
						got <- step.Envelope.Type()
					}
				}()
				for i, line := range lines {
					if _, err := io.WriteString(w, line); err != nil {
						t.Fatal(err)
					}
					synctest.Wait()
					if whole := strings.HasSuffix(line, "\n"); whole && len(got) != i+1 {
						t.Fatalf("after line %d there are %d envelopes", i+1, len(got))
					}
				}
				if err := w.Close(); err != nil {
					t.Fatal(err)
				}
				var all []string
				for kind := range got {
					all = append(all, kind)
				}
				want := "message_completed"
				if name == "messages" {
					want = "chat_error"
				}
				if last := all[len(all)-1]; last != want {
					t.Errorf("the last envelope is a %s; want %s", last, want)
				}
			})
		})
	}
}

// TestDecoder_AnyReader: how the bytes come does not matter, and an error of the reader is passed on after what came before it.
func TestDecoder_AnyReader(t *testing.T) {
	whole := say(read(t, tide, Config{}))
	for name, r := range map[string]io.Reader{
		"byte by byte":      iotest.OneByteReader(strings.NewReader(tide)),
		"with the last EOF": iotest.DataErrReader(strings.NewReader(tide)),
		"without the end":   strings.NewReader(strings.TrimSuffix(tide, "\n")),
		"lines of Windows":  strings.NewReader("\xef\xbb\xbf" + strings.ReplaceAll(tide, "\n", "\r\n")),
	} {
		rec, err := Read(r, Config{})
		if err != nil || say(rec) != whole {
			t.Errorf("%s: read differently, %v", name, err)
		}
	}
	torn := errors.New("torn")
	d := NewDecoder(io.MultiReader(strings.NewReader(chunk+"\n"+chunk), iotest.ErrReader(torn)), Config{})
	for range 2 {
		if _, err := d.Next(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := d.Next(); !errors.Is(err, torn) || !strings.Contains(err.Error(), "line 2") {
		t.Errorf("the error is %v", err)
	}
}

// TestDecoder_LongLines: lines beyond the buffer's size, up to the bound.
func TestDecoder_LongLines(t *testing.T) {
	for _, n := range []int{64<<10 - 1, 64 << 10, 64<<10 + 1, 200 << 10, MaxLineBytes - publisherBytes - 100} {
		text := strings.Repeat("é", n/2) + "\nlast"
		if got := Gather(read(t, text, Config{}).Envelopes()); got.Messages[0].Text != text {
			t.Errorf("a line of %d bytes did not come back", n)
		}
	}
}

// TestTimes: after_ms is the time before a line's first envelope, and adds up over lines that make none.
func TestTimes(t *testing.T) {
	rec := read(t, `{"id":"a","choices":[{"delta":{"role":"assistant"}}],"after_ms":100}
{"id":"a","choices":[{"delta":{"reasoning":"x","content":"y"}}],"after_ms":20}
{"id":"a","choices":[{"delta":{}}],"after_ms":3}
{"id":"a","choices":[{"delta":{"content":"z"}}],"after_ms":4}
`, Config{})
	want := []time.Duration{100, 20, 0, 7, 0, 0}
	got := paces(rec)
	if len(got) != len(want) {
		t.Fatalf("%d steps:\n%s", len(got), say(rec))
	}
	for i := range want {
		if got[i] != want[i]*time.Millisecond {
			t.Errorf("step %d comes after %v; want %d ms", i, got[i], want[i])
		}
	}
}

// TestFormatWords: every format has a word, and it is read back.
func TestFormatWords(t *testing.T) {
	for f := Auto; f <= Messages; f++ {
		if got, err := ParseFormat(f.String()); err != nil || got != f {
			t.Errorf("%v: %v, %v", f, got, err)
		}
	}
	if _, err := ParseFormat("csv"); schema.CodeOf(err) != schema.Code_CODE_INVALID_MESSAGE {
		t.Errorf("csv: %v", err)
	}
}
