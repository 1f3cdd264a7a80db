package recording

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"tidemark/schema"
)

// say writes envelopes down in a line each, without what repeats.
func say(rec *Recording) string {
	var b strings.Builder
	for e := range rec.Envelopes() {
		switch p := e.GetPayload().(type) {
		case *schema.Envelope_StartRun:
			fmt.Fprintf(&b, "start %s %s\n", p.StartRun.GetRunId(), p.StartRun.GetMetadataJson())
		case *schema.Envelope_RunStatus:
			fmt.Fprintf(&b, "%s %s %s", strings.ToLower(strings.TrimPrefix(p.RunStatus.GetStatus().String(), "STATUS_")), p.RunStatus.GetRunId(), p.RunStatus.GetReason())
			b.WriteString("\n")
		case *schema.Envelope_Token:
			word := "text"
			if p.Token.GetChannel() == schema.Channel_CHANNEL_REASONING {
				word = "think"
			}
			fmt.Fprintf(&b, "%s %s %q\n", word, p.Token.GetMessageId(), p.Token.GetText())
		case *schema.Envelope_MessageCompleted:
			fmt.Fprintf(&b, "done %s %s %s\n", p.MessageCompleted.GetMessageId(), p.MessageCompleted.GetFinishReason(), p.MessageCompleted.GetUsageJson())
		case *schema.Envelope_ToolCall:
			c := p.ToolCall
			fmt.Fprintf(&b, "call %s %s of=%s delta=%q all=%q done=%v\n", c.GetCallId(), c.GetName(), c.GetMessageId(), c.GetArgumentsDelta(), c.GetArgumentsJson(), c.GetDone())
		case *schema.Envelope_ToolResult:
			fmt.Fprintf(&b, "result %s %s %s\n", p.ToolResult.GetCallId(), p.ToolResult.GetResultJson(), p.ToolResult.GetError())
		case *schema.Envelope_ChatError:
			fmt.Fprintf(&b, "error %q %q %s\n", p.ChatError.GetMessageId(), p.ChatError.GetError(), p.ChatError.GetCode())
		case *schema.Envelope_WaitingForInput:
			fmt.Fprintf(&b, "ask %q %q %s\n", p.WaitingForInput.GetPrompt(), p.WaitingForInput.GetOptions(), p.WaitingForInput.GetContextJson())
		case *schema.Envelope_Custom:
			fmt.Fprintf(&b, "custom %s %s %s\n", p.Custom.GetType(), p.Custom.GetContentType(), p.Custom.GetData())
		default:
			fmt.Fprintf(&b, "%v\n", e)
		}
	}
	return b.String()
}

// TestFormats walks through what the recorded streams do not show: lines in, envelopes out.
func TestFormats(t *testing.T) {
	for _, test := range []struct{ name, lines, want string }{
		{
			"chat: parallel calls, a result, the next turn, usage in a chunk of its own",
			`
{"id":"a","model":"m","choices":[{"index":0,"delta":{"role":"assistant","content":null,"reasoning_content":"Hm.","reasoning":"Hm."}}],"usage":null}
{"id":"a","choices":[{"index":0,"delta":{"tool_calls":[{"index":0,"id":"c1","function":{"name":"f","arguments":""}}]}}]}
{"id":"a","choices":[{"index":0,"delta":{"tool_calls":[{"index":0,"function":{"arguments":"{\"x\":"}},{"index":1,"id":"c2","function":{"name":"g","arguments":"{}"}}]}}]}
{"id":"a","choices":[{"index":0,"delta":{"tool_calls":[{"index":0,"function":{"arguments":"1}"}}]}}]}
{"id":"a","choices":[{"index":0,"delta":{},"finish_reason":"tool_calls"}]}
{"id":"a","choices":[],"usage":{"n": 1.50,  "big":9007199254740993}}
{"role":"tool","tool_call_id":"c1","content":"{\"y\": 9007199254740993}"}
{"role":"tool","tool_call_id":"c2","content":"sunny ☀"}
{"id":"b","choices":[{"index":0,"delta":{"role":"assistant","content":"Ok"}}]}
{"id":"b","choices":[{"index":0,"delta":{},"finish_reason":"stop"}],"usage":{"n":2}}
`,
			`start run-a {"format":"chat_completions","model":"m"}
think a "Hm."
call c1 f of=a delta="" all="" done=false
call c1  of=a delta="{\"x\":" all="" done=false
call c2 g of=a delta="" all="" done=false
call c2  of=a delta="{}" all="" done=false
call c1  of=a delta="1}" all="" done=false
call c1  of=a delta="" all="" done=true
call c2  of=a delta="" all="" done=true
done a tool_calls {"n": 1.50,  "big":9007199254740993}
result c1 {"y": 9007199254740993}` + " " + `
result c2 "sunny ☀"` + " " + `
text b "Ok"
done b stop {"n":2}
completed run-a` + " \n",
		},
		{
			"chat: a call without arguments, one that broke off, nobody answers",
			`
{"id":"a","choices":[{"index":0,"delta":{"tool_calls":[{"index":0,"id":"c1","function":{"name":"f"}},{"index":1,"id":"c2","function":{"name":"g","arguments":"{\"x"}}]}}]}
{"id":"a","choices":[{"index":0,"delta":{},"finish_reason":"length"}]}
`,
			`start run-a {"format":"chat_completions"}
call c1 f of=a delta="" all="" done=false
call c2 g of=a delta="" all="" done=false
call c2  of=a delta="{\"x" all="" done=false
call c1  of=a delta="" all="{}" done=true
error "a" "The arguments of call c2 (g) are not complete JSON." invalid_arguments
done a length` + " " + `
completed run-a The recording ends before 1 tool calls were answered; the first is c1.
`,
		},
		{
			"chat: all calls at place 0, arguments as an object, ids missing",
			`
{"id":"a","choices":[{"delta":{"tool_calls":[{"index":0,"id":"c1","function":{"name":"f","arguments":"{}"}}]}}]}
{"id":"a","choices":[{"delta":{"tool_calls":[{"index":0,"id":"c2","function":{"name":"g","arguments":{"x": 1}}}]}}]}
{"id":"a","choices":[{"delta":{"tool_calls":[{"index":3,"function":{"name":"h"}}]},"finish_reason":"tool_calls"}]}
`,
			`start run-a {"format":"chat_completions"}
call c1 f of=a delta="" all="" done=false
call c1  of=a delta="{}" all="" done=false
call c1  of=a delta="" all="" done=true
call c2 g of=a delta="" all="" done=false
call c2  of=a delta="{\"x\": 1}" all="" done=false
call a/call-4 h of=a delta="" all="" done=false
call c2  of=a delta="" all="" done=true
call a/call-4  of=a delta="" all="{}" done=true
done a tool_calls` + " " + `
completed run-a The recording ends before 3 tool calls were answered; the first is a/call-4.
`,
		},
		{
			"chat: two choices; the usage of both goes to the last",
			`
{"id":"a","choices":[{"index":0,"delta":{"role":"assistant","content":"x"}}]}
{"id":"a","choices":[{"index":1,"delta":{"role":"assistant","content":"y"}}]}
{"id":"a","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}
{"id":"a","choices":[{"index":1,"delta":{"refusal":"no"},"finish_reason":"stop"}]}
{"id":"a","choices":[],"usage":{"n":1}}
{"id":"a","choices":[],"usage":{"n":1}}
`,
			`start run-a {"format":"chat_completions"}
text a "x"
text a/1 "y"
text a/1 "no"
done a stop` + " " + `
done a/1 stop {"n":1}
completed run-a` + " \n",
		},
		{
			"chat: two choices one after the other, characters beyond the first plane as escapes",
			`
{"id":"a","choices":[{"index":0,"delta":{"role":"assistant","content":"\ud83d\ude00\ud83c\udf0a"},"finish_reason":"stop"}]}
{"id":"a","choices":[{"index":1,"delta":{"role":"assistant","content":"\\ud83d"},"finish_reason":"length"}]}
{"id":"a","choices":[],"usage":{"n":1}}
`,
			`start run-a {"format":"chat_completions"}
text a "😀🌊"
text a/1 "\\ud83d"
done a stop` + " " + `
done a/1 length {"n":1}
completed run-a` + " \n",
		},
		{
			"chat: cut, tried again under another id, the same id again, whole in one line",
			`
{"id":"a","choices":[{"index":0,"delta":{"role":"assistant","content":"x"}}]}
{"id":"a-2","choices":[{"index":0,"delta":{"content":"x2"}}]}
{"id":"b","choices":[{"index":0,"delta":{"role":"assistant","content":"y"},"finish_reason":"stop"}]}
{"id":"b","choices":[{"index":0,"delta":{}}],"usage":{"n":1}}
{"id":"b","choices":[{"index":0,"message":{"role":"assistant","content":"z"},"finish_reason":"stop"}],"usage":{}}
{"error":{"message":"Slow down.","type":"rate_limit","code":429}}
`,
			`start run-a {"format":"chat_completions"}
text a "x"
text a "x2"
error "a" "The stream ends before the message was complete." incomplete
text b "y"
done b stop {"n":1}
text b#2 "z"
done b#2 stop {}
error "" "Slow down." 429
failed run-a Slow down.
`,
		},
		{
			"responses: approval, the question with all that the provider said of it, then the answer's turn",
			`
{"type":"response.created","response":{"id":"r1","model":"m"}}
{"type":"response.output_item.added","output_index":0,"item":{"type":"mcp_list_tools","id":"l"}}
{"type":"response.output_item.added","output_index":1,"item":{"id":"q1","type":"mcp_approval_request","arguments":"{}","name":"pay","server_label":"bank"}}
{"type":"response.output_item.done","output_index":1,"item":{"id":"q1", "type":"mcp_approval_request","arguments":"{\"cents\":9007199254740993}","name":"pay","server_label":"bank"}}
{"type":"response.completed","response":{"id":"r1","usage":{"n": 1}}}
`,
			`start run-r1 {"format":"responses","model":"m"}
ask "The agent wants to call pay on bank. Do you approve?" ["approve" "deny"] {"id":"q1", "type":"mcp_approval_request","arguments":"{\"cents\":9007199254740993}","name":"pay","server_label":"bank"}
done r1 completed {"n": 1}
`,
		},
		{
			"responses: after the question the stream goes on; a tool that failed; a summary in two parts; a second message",
			`
{"type":"response.output_item.done","output_index":1,"item":{"id":"q1","type":"mcp_approval_request","name":"pay"}}
{"type":"response.completed","response":{"id":"r1"}}
{"type":"response.created","response":{"id":"r2"}}
{"type":"response.output_item.added","output_index":0,"item":{"id":"m1","type":"mcp_call","name":"pay","arguments":""}}
{"type":"response.mcp_call_arguments.done","output_index":0,"item_id":"m1","arguments":"{}"}
{"type":"response.output_item.done","output_index":0,"item":{"id":"m1","type":"mcp_call","name":"pay","arguments":"{}","output":null,"error":{"type":"http","code":500,"message":"No."},"status":"failed"}}
{"type":"response.reasoning_summary_text.delta","output_index":1,"summary_index":0,"delta":"One"}
{"type":"response.reasoning_summary_text.done","output_index":1,"summary_index":0,"text":"One"}
{"type":"response.reasoning_summary_text.done","output_index":1,"summary_index":1,"text":"Two"}
{"type":"response.output_text.delta","output_index":2,"content_index":0,"delta":"A"}
{"type":"response.output_text.delta","output_index":2,"content_index":0,"delta":"B"}
{"type":"response.output_text.done","output_index":2,"content_index":0,"text":"AB"}
{"type":"response.output_text.annotation.added","output_index":2,"annotation":{"url":"https://example.org/","n": 1}}
{"type":"response.refusal.delta","output_index":3,"content_index":0,"delta":"No."}
{"type":"response.made_up_next_year","output_index":3}
{"type":"response.incomplete","response":{"id":"r2","incomplete_details":{"reason":"max_output_tokens"},"usage":null}}
`,
			`start run-message-1 {"format":"responses"}
ask "The agent wants to call pay. Do you approve?" ["approve" "deny"] {"id":"q1","type":"mcp_approval_request","name":"pay"}
done message-1 completed` + " " + `
running run-message-1 The stream goes on after the question.
call m1 pay of=r2 delta="" all="" done=false
call m1  of=r2 delta="{}" all="" done=false
call m1  of=r2 delta="" all="" done=true
result m1  No.
think r2 "One"
think r2 "\n\n"
think r2 "Two"
text r2 "A"
text r2 "B"
custom citation application/json {"message_id":"r2","citation":{"url":"https://example.org/","n": 1}}
text r2 "\n\n"
text r2 "No."
done r2 max_output_tokens` + " " + `
completed run-message-1` + " \n",
		},
		{
			"responses: every sort of call",
			`
{"type":"response.created","response":{"id":"r"}}
{"type":"response.output_item.added","output_index":0,"item":{"id":"x","type":"function_call","call_id":"c0","name":"f","arguments":""}}
{"type":"response.function_call_arguments.delta","output_index":0,"delta":"{\"a\":"}
{"type":"response.function_call_arguments.delta","output_index":0,"delta":"1}"}
{"type":"response.function_call_arguments.done","output_index":0,"arguments":"{\"a\":1}"}
{"type":"response.output_item.done","output_index":0,"item":{"id":"x","type":"function_call","call_id":"c0","name":"f","arguments":"{\"a\":1}","status":"completed"}}
{"type":"response.output_item.added","output_index":1,"item":{"id":"x","type":"code_interpreter_call","container_id":"k","code":""}}
{"type":"response.code_interpreter_call_code.delta","output_index":1,"delta":"print(\"é\")\n"}
{"type":"response.code_interpreter_call_code.done","output_index":1,"code":"print(\"é\")\n"}
{"type":"response.output_item.done","output_index":1,"item":{"id":"x","type":"code_interpreter_call","container_id":"k","code":"print(\"é\")\n","outputs":[{"type":"logs", "logs":"é"}],"status":"completed"}}
{"type":"response.output_item.added","output_index":2,"item":{"id":"y","type":"shell_call","call_id":"c2","action":{"commands":[]}}}
{"type":"response.shell_call_command.added","output_index":2,"command_index":0,"command":""}
{"type":"response.shell_call_command.delta","output_index":2,"command_index":0,"delta":"echo \"a"}
{"type":"response.shell_call_command.delta","output_index":2,"command_index":0,"delta":"\""}
{"type":"response.shell_call_command.done","output_index":2,"command_index":0,"command":"echo \"a\""}
{"type":"response.shell_call_command.done","output_index":2,"command_index":1,"command":"ls"}
{"type":"response.output_item.done","output_index":2,"item":{"id":"y","type":"shell_call","call_id":"c2","action":{"timeout_ms":null,"commands":["echo \"a\"","ls"],"max_output_length":10}}}
{"type":"response.output_item.done","output_index":3,"item":{"id":"z","type":"shell_call_output","call_id":"c2","output":[{"stdout": "a"}]}}
{"type":"response.output_item.added","output_index":4,"item":{"id":"w","type":"web_search_call"}}
{"type":"response.output_item.done","output_index":4,"item":{"id":"w","type":"web_search_call","status":"completed","action":{"type":"search", "query":"q"}}}
{"type":"response.output_item.added","output_index":5,"item":{"id":"v","type":"custom_tool_call","call_id":"c5","name":"sql","input":""}}
{"type":"response.custom_tool_call_input.delta","output_index":5,"delta":"select \"x\""}
{"type":"response.output_item.done","output_index":5,"item":{"id":"v","type":"custom_tool_call","call_id":"c5","name":"sql","input":"select \"x\""}}
{"type":"response.output_item.done","output_index":6,"item":{"id":"u","type":"file_search_call","queries":["q"],"results":null,"status":"completed"}}
{"type":"response.completed","response":{"id":"r"}}
`,
			`start run-r {"format":"responses"}
call c0 f of=r delta="" all="" done=false
call c0  of=r delta="{\"a\":" all="" done=false
call c0  of=r delta="1}" all="" done=false
call c0  of=r delta="" all="" done=true
call x code_interpreter of=r delta="" all="" done=false
call x  of=r delta="{\"container_id\":\"k\",\"code\":\"print(\\\"é\\\")\\n" all="" done=false
call x  of=r delta="\"}" all="" done=true
result x [{"type":"logs", "logs":"é"}]` + " " + `
call c2 shell of=r delta="" all="" done=false
call c2  of=r delta="{\"commands\":[\"echo \\\"a" all="" done=false
call c2  of=r delta="\\\"" all="" done=false
call c2  of=r delta="\",\"ls" all="" done=false
call c2  of=r delta="\"],\"max_output_length\":10,\"timeout_ms\":null}" all="" done=false
call c2  of=r delta="" all="" done=true
result c2 [{"stdout": "a"}]` + " " + `
call w web_search of=r delta="" all="" done=false
call w  of=r delta="" all="{\"type\":\"search\", \"query\":\"q\"}" done=true
result w  ` + `
call c5 sql of=r delta="" all="" done=false
call c5  of=r delta="{\"input\":\"select \\\"x\\\"" all="" done=false
call c5  of=r delta="\"}" all="" done=true
call u file_search of=r delta="" all="" done=false
call u  of=r delta="" all="{\"queries\":[\"q\"]}" done=true
result u  ` + `
done r completed` + " " + `
completed run-r The recording ends before 2 tool calls were answered; the first is c0.
`,
		},
		{
			"responses: an error is said once, and the older form of it",
			`
{"type":"response.created","response":{"id":"r"}}
{"type":"error","sequence_number":2,"error":{"type":"quota","code":null,"message":"Pay first."}}
{"type":"response.failed","response":{"id":"r","error":{"message":"Pay first."}}}
{"type":"response.created","response":{"id":"r2"}}
{"type":"error","code":"server_error","message":"Oh.","param":null}
`,
			`start run-r {"format":"responses"}
error "r" "Pay first." quota
error "r2" "Oh." server_error
failed run-r Oh.
`,
		},
		{
			"messages: thinking, a tool of the application's, input at once, results that failed, citations",
			`
{"type":"message_start","message":{"id":"m","model":"c","usage":{"input_tokens":1}}}
{"type":"content_block_start","index":0,"content_block":{"type":"thinking","thinking":"H"}}
{"type":"content_block_delta","index":0,"delta":{"type":"thinking_delta","thinking":"m."}}
{"type":"content_block_delta","index":0,"delta":{"type":"signature_delta","signature":"abc"}}
{"type":"content_block_stop","index":0}
{"type":"content_block_start","index":1,"content_block":{"type":"redacted_thinking","data":"xyz"}}
{"type":"content_block_start","index":2,"content_block":{"type":"tool_use","id":"t1","name":"f","input":{}}}
{"type":"content_block_stop","index":2}
{"type":"content_block_start","index":3,"content_block":{"type":"server_tool_use","id":"t2","name":"web_fetch","input":{"url": "https://example.org/"}}}
{"type":"content_block_stop","index":3}
{"type":"content_block_start","index":4,"content_block":{"type":"web_fetch_tool_result","tool_use_id":"t2","content":{"type":"web_fetch_tool_result_error","error_code":"url_not_accessible"}}}
{"type":"content_block_start","index":5,"content_block":{"type":"mcp_tool_use","id":"t3","name":"g","server_name":"s","input":{}}}
{"type":"content_block_delta","index":5,"delta":{"type":"input_json_delta","partial_json":"{\"a\":1}"}}
{"type":"content_block_stop","index":5}
{"type":"content_block_start","index":6,"content_block":{"type":"mcp_tool_result","tool_use_id":"t3","is_error":true,"content":[{"type":"text","text":"x"}]}}
{"type":"content_block_start","index":7,"content_block":{"type":"text","text":"A","citations":[{"n":1}]}}
{"type":"content_block_delta","index":7,"delta":{"type":"citations_delta","citation":{"n": 2}}}
{"type":"message_delta","delta":{"stop_reason":"tool_use"},"usage":{"output_tokens": 2}}
{"type":"message_stop"}
`,
			`start run-m {"format":"messages","model":"c"}
think m "H"
think m "m."
call t1 f of=m delta="" all="" done=false
call t1  of=m delta="" all="{}" done=true
call t2 web_fetch of=m delta="" all="" done=false
call t2  of=m delta="" all="{\"url\": \"https://example.org/\"}" done=true
result t2 {"type":"web_fetch_tool_result_error","error_code":"url_not_accessible"} url_not_accessible
call t3 g of=m delta="" all="" done=false
call t3  of=m delta="{\"a\":1}" all="" done=false
call t3  of=m delta="" all="" done=true
result t3 [{"type":"text","text":"x"}] The tool reported an error; the result says more.
text m "A"
custom citation application/json {"message_id":"m","citation":{"n":1}}
custom citation application/json {"message_id":"m","citation":{"n": 2}}
done m tool_use {"output_tokens": 2}
completed run-m The recording ends before 1 tool calls were answered; the first is t1.
`,
		},
		{
			"messages: overloaded, then tried again, then cut",
			`
{"type":"message_start","message":{"id":"m","usage":{}}}
{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}
{"type":"message_start","message":{"id":"n","usage":{}}}
{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"x"}}
`,
			`start run-m {"format":"messages"}
error "m" "Overloaded" overloaded_error
text n "x"
error "n" "The stream ends before the message was complete." incomplete
failed run-m The stream ends before the message was complete.
`,
		},
		{
			"what curl prints: server-sent events",
			"event: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"id\":\"m\"}}\n\n: alive\n\nevent: content_block_delta\r\n" +
				"data: {\"type\":\"content_block_delta\",\"index\":0,\"delta\":{\"text\":\"x\"}}\r\n\r\ndata: {\"type\":\"message_delta\",\"delta\":{\"stop_reason\":\"end_turn\"}}\n",
			"start run-m {\"format\":\"messages\"}\ntext m \"x\"\ndone m end_turn \ncompleted run-m \n",
		},
		{
			"what curl prints: chat completions, and the mark at their end",
			"data: {\"id\":\"a\",\"choices\":[{\"delta\":{\"content\":\"x\"},\"finish_reason\":\"stop\"}]}\n\ndata: [DONE]\n\n",
			"start run-a {\"format\":\"chat_completions\"}\ntext a \"x\"\ndone a stop \ncompleted run-a \n",
		},
		{"text", "one\n\ntwo\r\nthree", "text message-1 \"one\\n\"\ntext message-1 \"\\n\"\ntext message-1 \"two\\r\\n\"\ntext message-1 \"three\"\ndone message-1 stop \n"},
		{"text: blank lines first", "\n \none", "text message-1 \"\\n \\n\"\ntext message-1 \"one\"\ndone message-1 stop \n"},
		{"text: nothing but blank lines", "\n\n", "text message-1 \"\\n\\n\"\ndone message-1 stop \n"},
		{"text: that looks a little like events", "data: none\nid: 5\n{", "text message-1 \"data: none\\n\"\ntext message-1 \"id: 5\\n\"\ntext message-1 \"{\"\ndone message-1 stop \n"},
	} {
		t.Run(test.name, func(t *testing.T) {
			rec := read(t, test.lines, Config{})
			if got := say(rec); got != test.want {
				t.Errorf("got\n%s\nwant\n%s", got, test.want)
			}
			for _, c := range Gather(rec.Envelopes()).Calls {
				if c.Done && !json.Valid([]byte(c.Arguments)) {
					t.Errorf("call %s is done with %s", c.ID, c.Arguments)
				}
			}
		})
	}
}

// TestConfig: a prefix stands before all ids and their references, a part of a run has no run, plain text may look like JSON.
func TestConfig(t *testing.T) {
	const lines = `{"id":"a","choices":[{"delta":{"content":"x","tool_calls":[{"index":0,"id":"c","function":{"name":"f"}},{"index":1,"function":{"name":"g"}}]},"finish_reason":"stop"}]}
{"role":"tool","tool_call_id":"c","content":"1"}
`
	want := `start p-run-a {"format":"chat_completions"}
text p-a "x"
call p-c f of=p-a delta="" all="" done=false
call p-a/call-2 g of=p-a delta="" all="" done=false
call p-c  of=p-a delta="" all="{}" done=true
call p-a/call-2  of=p-a delta="" all="{}" done=true
done p-a stop` + " " + `
result p-c "1"` + " " + `
completed p-run-a The recording ends before 1 tool calls were answered; the first is p-a/call-2.
`
	if got := say(read(t, lines, Config{IDPrefix: "p-"})); got != want {
		t.Errorf("with a prefix: got\n%s\nwant\n%s", got, want)
	}
	got := say(read(t, lines, Config{WithoutRun: true}))
	if strings.Contains(got, "run-a") || !strings.Contains(got, "done a stop") {
		t.Errorf("without a run: got\n%s", got)
	}
	if got := Gather(read(t, lines, Config{Format: Text}).Envelopes()); got.Messages[0].Text != lines || len(got.Runs) != 0 {
		t.Errorf("as text: got %+v", got)
	}
	if got := say(read(t, "hi\n", Config{IDPrefix: "p-"})); got != "text p-message-1 \"hi\\n\"\ndone p-message-1 stop \n" {
		t.Errorf("text with a prefix: got\n%s", got)
	}
}
