package recording

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"

	"google.golang.org/protobuf/proto"

	"tidemark/schema"
)

// FuzzDecoder: whatever comes in, the decoder ends, refuses with a sentence, makes only envelopes that pass, closes every run it began, and does not mind how the bytes arrive.
func FuzzDecoder(f *testing.F) {
	for _, line := range bytes.SplitAfterN([]byte(tide), []byte("\n"), 12) {
		f.Add(line, byte(0))
	}
	for _, seed := range []string{
		chunk + "\n" + finished, "one\n\ntwo", "\n\n", "data: [DONE]", "{", `{"error":"x"}`, `{"type":"error","error":{"message":""}}`, `{"type":"error","sequence_number":1}`,
		`{"type":"message_start","message":{"id":"m"}}` + "\n" + `{"type":"content_block_start","content_block":{"type":"tool_use","id":"t","name":"f","input":{"a":1}}}` + "\n" +
			`{"type":"content_block_delta","delta":{"partial_json":"{\"a"}}` + "\n" + `{"type":"content_block_stop"}` + "\n" + `{"type":"message_delta","delta":{"stop_reason":"end_turn"},"usage":{}}`,
		`{"type":"response.created","response":{"id":"r"}}` + "\n" + `{"type":"response.output_item.added","item":{"type":"shell_call","id":"s"}}` + "\n" +
			`{"type":"response.shell_call_command.delta","delta":"ls"}` + "\n" + `{"type":"response.output_item.done","item":{"type":"shell_call","id":"s","action":{"a":1}}}` + "\n" +
			`{"type":"response.completed","response":{"usage":{}}}`,
		`{"type":"response.output_item.done","item":{"type":"mcp_approval_request","name":"n"}}`,
		`{"type":"response.output_item.added","item":{"type":"code_interpreter_call","id":"s"}}` + "\n" + `{"type":"response.code_interpreter_call_code.delta","delta":"\"\\"}`,
		`{"choices":[{"delta":{"tool_calls":[{"id":"c","function":{"arguments":"{"}},{"index":7,"function":{"arguments":{}}}]},"finish_reason":"x"}],"usage":{}}`,
	} {
		for format := range byte(Messages) + 1 {
			f.Add([]byte(seed), format)
		}
	}
	f.Fuzz(func(t *testing.T, data []byte, format byte) {
		c := Config{Format: Format(format % byte(Messages+1))}
		steps, err := decodeAll(bytes.NewReader(data), c)
		if _, ok := errors.AsType[*schema.Refusal](err); !ok && !errors.Is(err, io.EOF) {
			t.Fatalf("the error is no refusal: %v", err)
		}
		again, errAgain := decodeAll(iotest.OneByteReader(bytes.NewReader(data)), c)
		if len(again) != len(steps) || errAgain.Error() != err.Error() {
			t.Fatalf("byte by byte: %d envelopes and %v; at once: %d and %v", len(again), errAgain, len(steps), err)
		}
		calls, twice := map[string]*strings.Builder{}, false
		var open, started bool
		for i, s := range steps {
			e := s.Envelope
			if err := e.Validate(); err != nil || s.After < 0 || s.After > 10*maxAfter || proto.Size(e) > schema.MaxEnvelopeBytes-publisherBytes {
				t.Fatalf("after %v, %v: %v", s.After, e, err)
			}
			if !proto.Equal(e, again[i].Envelope) || s.After != again[i].After {
				t.Fatalf("byte by byte: %v; at once: %v", again[i], s)
			}
			switch p := e.GetPayload().(type) {
			case *schema.Envelope_StartRun:
				if started {
					t.Fatal("a second run")
				}
				started, open = true, true
			case *schema.Envelope_RunStatus:
				open = p.RunStatus.GetStatus() == schema.Status_STATUS_RUNNING
			case *schema.Envelope_WaitingForInput:
				open = false
			case *schema.Envelope_ToolCall:
				id := p.ToolCall.GetCallId()
				if p.ToolCall.GetName() != "" {
					twice = twice || calls[id] != nil
					calls[id] = new(strings.Builder)
				}
				calls[id].WriteString(p.ToolCall.GetArgumentsDelta() + p.ToolCall.GetArgumentsJson())
				// Two calls of one id are the provider's mistake, and cannot be told apart.
				if all := calls[id].String(); p.ToolCall.GetDone() && !twice && !json.Valid([]byte(all)) {
					t.Fatalf("call %s is done with %q", id, all)
				}
			}
		}
		if errors.Is(err, io.EOF) && open {
			t.Fatal("the run was not closed")
		}
		if c.Format == Text && errors.Is(err, io.EOF) && len(data) > 0 {
			r := &Recording{Steps: steps}
			if got := Gather(r.Envelopes()).Messages[0].Text; got != string(data) {
				t.Fatalf("%q came back as %q", data, got)
			}
		}
	})
}

func decodeAll(r io.Reader, c Config) ([]Step, error) {
	d := NewDecoder(r, c)
	var steps []Step
	for {
		s, err := d.Next()
		if err != nil {
			return steps, err
		}
		steps = append(steps, s)
	}
}
