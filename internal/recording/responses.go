package recording

import (
	"encoding/json"
	"fmt"
	"strings"

	"tidemark/schema"
)

// responsesLine is an event of the Responses API.
type responsesLine struct {
	timing
	Type         string          `json:"type"`
	OutputIndex  int             `json:"output_index"`
	ContentIndex int             `json:"content_index"`
	SummaryIndex int             `json:"summary_index"`
	CommandIndex int             `json:"command_index"`
	Delta        json.RawMessage `json:"delta"`
	// The whole of what the deltas before it brought, in the events that end in .done.
	Text      string          `json:"text"`
	Refusal   string          `json:"refusal"`
	Arguments string          `json:"arguments"`
	Input     string          `json:"input"`
	Code      json.RawMessage `json:"code"`
	Command   string          `json:"command"`

	Annotation json.RawMessage `json:"annotation"`
	Item       json.RawMessage `json:"item"`
	Response   struct {
		ID         string          `json:"id"`
		Model      string          `json:"model"`
		Status     string          `json:"status"`
		Usage      json.RawMessage `json:"usage"`
		Error      json.RawMessage `json:"error"`
		Incomplete struct {
			Reason string `json:"reason"`
		} `json:"incomplete_details"`
	} `json:"response"`
	Error   json.RawMessage `json:"error"`
	Message string          `json:"message"`
}

// outputItem is a part of a response: a message, a reasoning, a call, a request for approval.
type outputItem struct {
	ID          string          `json:"id"`
	Type        string          `json:"type"`
	Status      string          `json:"status"`
	CallID      string          `json:"call_id"`
	Name        string          `json:"name"`
	ServerLabel string          `json:"server_label"`
	ContainerID string          `json:"container_id"`
	Arguments   json.RawMessage `json:"arguments"`
	Input       string          `json:"input"`
	Code        string          `json:"code"`
	Action      json.RawMessage `json:"action"`
	Operation   json.RawMessage `json:"operation"`
	Queries     json.RawMessage `json:"queries"`
	Outputs     json.RawMessage `json:"outputs"`
	Output      json.RawMessage `json:"output"`
	Results     json.RawMessage `json:"results"`
	Result      json.RawMessage `json:"result"`
	Error       json.RawMessage `json:"error"`
}

// responsesReader reads the Responses API. A response is one message; its items are known by their place in it, since some gateways change their ids at every event. Items of
// text, and the parts of a summary, are whole texts, so an empty line goes between them.
type responsesReader struct {
	*script
	messageID string
	calls     map[int]*itemCall
	// streamed has the parts of text that came in deltas and are not done.
	streamed map[part]bool
	// written is the last part of each channel that has text.
	written map[schema.Channel]part
}

// part is a place in a response that has a text of its own.
type part struct{ item, content, summary int }

// itemCall is a call among the items.
type itemCall struct {
	*call
	// commands counts the shell commands that were begun.
	commands int
}

func (r *responsesReader) line(b []byte) error {
	var l responsesLine
	if err := r.parse(b, &l, &l.timing); err != nil {
		return err
	}
	name, ok := strings.CutPrefix(l.Type, "response.")
	switch {
	case l.Type == "error":
		raw := l.Error
		if !present(raw) {
			// The older form has the fields on the top level, with the same names.
			raw = append(json.RawMessage(nil), b...)
		}
		r.failOpen(raw)
		return nil
	case l.Type == "":
		return r.refuse("is no event of the Responses API: it has no type")
	case !ok && (strings.HasPrefix(l.Type, "message_") || strings.HasPrefix(l.Type, "content_block_")):
		return r.refuse("is an event of another format (%q) in a recording of the format responses", l.Type)
	case !ok:
		return nil
	}
	switch name {
	case "created":
		r.end()
		r.begin(l.Response.ID, l.Response.Model)
		return nil
	case "failed":
		if r.messageID != "" || r.failure == "" {
			r.failOpen(l.Response.Error)
		}
		return nil
	}
	if r.messageID == "" {
		if r.failure != "" {
			// What trails behind an error.
			return nil
		}
		r.begin(l.Response.ID, l.Response.Model)
	}
	switch name {
	case "completed", "incomplete", "cancelled":
		finish := name
		if l.Response.Incomplete.Reason != "" {
			finish = l.Response.Incomplete.Reason
		}
		for _, place := range sortedKeys(r.calls) {
			r.endCall(r.calls[place].call, "")
		}
		r.complete(r.messageID, finish, l.Response.Usage)
		r.forget()
	case "output_item.added", "output_item.done":
		return r.item(&l, name == "output_item.done")
	case "output_text.annotation.added":
		r.cite(r.messageID, l.Annotation)
	default:
		return r.piece(&l, name)
	}
	return nil
}

// piece takes in an event of something that is streamed: a delta, or the whole at its end.
func (r *responsesReader) piece(l *responsesLine, name string) error {
	what, isDelta := strings.CutSuffix(name, ".delta")
	if !isDelta {
		var isDone bool
		if what, isDone = strings.CutSuffix(name, ".done"); !isDone {
			return nil
		}
	}
	var delta string
	switch what {
	case "output_text", "refusal", "reasoning_text", "reasoning_summary_text", "function_call_arguments", "mcp_call_arguments", "custom_tool_call_input",
		"code_interpreter_call_code", "shell_call_command":
		var err error
		if delta, err = r.text(l.Delta, "a delta"); err != nil {
			return err
		}
	}
	switch what {
	case "output_text":
		r.write(l, schema.Channel_CHANNEL_TEXT, delta, l.Text, isDelta)
	case "refusal":
		// What the person reads in place of an answer.
		r.write(l, schema.Channel_CHANNEL_TEXT, delta, l.Refusal, isDelta)
	case "reasoning_text", "reasoning_summary_text":
		r.write(l, schema.Channel_CHANNEL_REASONING, delta, l.Text, isDelta)
	case "function_call_arguments", "mcp_call_arguments":
		return r.input(l, delta, l.Arguments, isDelta)
	case "custom_tool_call_input":
		return r.input(l, delta, l.Input, isDelta)
	case "code_interpreter_call_code":
		code, err := r.text(l.Code, "code")
		if err != nil {
			return err
		}
		return r.input(l, delta, code, isDelta)
	case "shell_call_command":
		return r.command(l, delta, isDelta)
	}
	return r.err
}

// write adds to a text. Where no delta came before the end, the end brings it all.
func (r *responsesReader) write(l *responsesLine, channel schema.Channel, delta, whole string, isDelta bool) {
	p := part{l.OutputIndex, l.ContentIndex, l.SummaryIndex}
	text := delta
	if isDelta {
		r.streamed[p] = true
		if len(r.streamed) > maxOpen {
			r.failed(r.refuse("opens more than %d parts of text at once", maxOpen))
			return
		}
	} else {
		if !r.streamed[p] {
			text = whole
		}
		delete(r.streamed, p)
	}
	if text == "" {
		return
	}
	if last, ok := r.written[channel]; ok && (last.item != p.item || last.summary != p.summary) {
		r.token(r.messageID, channel, "\n\n")
	}
	r.written[channel] = p
	r.token(r.messageID, channel, text)
}

// input adds to the arguments of the call at the event's place.
func (r *responsesReader) input(l *responsesLine, delta, whole string, isDelta bool) error {
	c := r.calls[l.OutputIndex]
	if c == nil {
		return r.refuse("continues a call at place %d of the response, where no call was opened", l.OutputIndex)
	}
	if isDelta {
		r.arguments(c.call, delta)
		return nil
	}
	if len(c.gathered) == 0 {
		r.arguments(c.call, whole)
	}
	if len(c.gathered) > 0 {
		r.endCall(c.call, "")
	}
	return nil
}

// command adds to a shell call's commands, which are streamed one after the other: {"commands":["…","…"]…
func (r *responsesReader) command(l *responsesLine, delta string, isDelta bool) error {
	c := r.calls[l.OutputIndex]
	if c == nil {
		return r.refuse("continues a call at place %d of the response, where no call was opened", l.OutputIndex)
	}
	text := delta
	if !isDelta {
		if l.CommandIndex < c.commands {
			return nil
		}
		text = l.Command
	}
	if text == "" {
		return nil
	}
	switch l.CommandIndex {
	case c.commands - 1:
		r.rawArguments(c.call, escape(text))
	case c.commands:
		before := `","`
		if c.commands == 0 {
			before = `{"commands":["`
		}
		c.commands++
		r.rawArguments(c.call, before+escape(text))
	default:
		return r.refuse("continues command %d of a shell call out of its order", l.CommandIndex)
	}
	return nil
}

// item takes in an item's beginning or end.
func (r *responsesReader) item(l *responsesLine, done bool) error {
	var it outputItem
	if err := json.Unmarshal(l.Item, &it); err != nil {
		return r.refuse("has an item that cannot be read: %s", err)
	}
	switch {
	case it.Type == "mcp_approval_request":
		if done {
			r.ask(it.question(), l.Item)
		}
	case strings.HasSuffix(it.Type, "_call"):
		return r.callItem(l, &it, done)
	case strings.HasSuffix(it.Type, "_call_output"):
		if done {
			if it.CallID == "" {
				return r.refuse("is a tool's result without a call_id")
			}
			r.result(r.prefix+it.CallID, it.Output, "")
		}
	}
	return nil
}

func (it *outputItem) question() string {
	prompt := "The agent wants to use a tool"
	if it.Name != "" {
		prompt = fmt.Sprintf("The agent wants to call %s", it.Name)
	}
	if it.ServerLabel != "" {
		prompt += " on " + it.ServerLabel
	}
	return prompt + ". Do you approve?"
}

func (r *responsesReader) callItem(l *responsesLine, it *outputItem, done bool) error {
	c := r.calls[l.OutputIndex]
	if c == nil {
		if len(r.calls) >= maxOpen {
			return r.refuse("opens more than %d calls at once", maxOpen)
		}
		id, name := it.CallID, it.Name
		if id == "" {
			id = it.ID
		}
		if name == "" {
			name = strings.TrimSuffix(it.Type, "_call")
		}
		c = &itemCall{call: r.startCall(r.messageID, id, name, l.OutputIndex)}
		switch it.Type {
		case "code_interpreter_call":
			c.head, c.tail = `{"container_id":"`+escape(it.ContainerID)+`","code":"`, `"}`
		case "custom_tool_call":
			c.head, c.tail = `{"input":"`, `"}`
		}
		r.calls[l.OutputIndex] = c
	}
	if !done {
		return nil
	}
	delete(r.calls, l.OutputIndex)
	whole, err := r.wholeArguments(c, it)
	if err != nil {
		return err
	}
	r.endCall(c.call, whole)
	r.hostedResult(c, it)
	return nil
}

// wholeArguments are the arguments of a call at its end, for calls that are not streamed. Those of a shell call that was are completed by what its commands do not say.
func (r *responsesReader) wholeArguments(c *itemCall, it *outputItem) (string, error) {
	switch it.Type {
	case "function_call", "mcp_call":
		return r.text(it.Arguments, "arguments")
	case "code_interpreter_call":
		return c.head + escape(it.Code) + c.tail, nil
	case "custom_tool_call":
		return c.head + escape(it.Input) + c.tail, nil
	case "file_search_call":
		if present(it.Queries) {
			return `{"queries":` + string(it.Queries) + `}`, nil
		}
		return "", nil
	case "shell_call":
		if c.commands > 0 {
			rest, err := r.besideCommands(it.Action)
			if err != nil {
				return "", err
			}
			r.rawArguments(c.call, `"]`+rest+`}`)
			return "", nil
		}
	}
	for _, raw := range []json.RawMessage{it.Action, it.Operation} {
		if present(raw) {
			return string(raw), nil
		}
	}
	return r.text(it.Arguments, "arguments")
}

// besideCommands returns the members of a shell call's action but for its commands, each with a comma before it.
func (r *responsesReader) besideCommands(action json.RawMessage) (string, error) {
	if !present(action) {
		return "", nil
	}
	var members map[string]json.RawMessage
	if err := json.Unmarshal(action, &members); err != nil {
		return "", r.refuse("has an action that cannot be read: %s", err)
	}
	var b strings.Builder
	for _, key := range sortedKeys(members) {
		if key != "commands" {
			b.WriteString(`,"` + escape(key) + `":` + string(members[key]))
		}
	}
	return b.String(), nil
}

// hostedResult answers the calls that the provider runs itself. The others are the application's to answer.
func (r *responsesReader) hostedResult(c *itemCall, it *outputItem) {
	var raw json.RawMessage
	switch it.Type {
	case "code_interpreter_call":
		raw = it.Outputs
	case "mcp_call":
		raw = it.Output
	case "file_search_call":
		raw = it.Results
	case "image_generation_call":
		raw = it.Result
	case "web_search_call":
		// What was found goes to the model alone.
	default:
		return
	}
	failure, _ := reported(it.Error)
	if failure == "" && (it.Status == "failed" || it.Status == "incomplete") {
		failure = "The tool ended with the status " + it.Status + "."
	}
	r.result(c.id, raw, failure)
}

func (r *responsesReader) begin(id, model string) {
	r.messageID = r.beginTurn(id, model)
	r.calls, r.streamed, r.written = make(map[int]*itemCall), make(map[part]bool), make(map[schema.Channel]part)
}

func (r *responsesReader) failOpen(raw json.RawMessage) {
	sentence, code := reported(raw)
	messageID := r.messageID
	r.forget()
	r.fail(messageID, sentence, code)
}

// end: a response that is still open was cut.
func (r *responsesReader) end() {
	if r.messageID != "" {
		r.cut(r.messageID)
		r.forget()
	}
}

func (r *responsesReader) forget() {
	r.messageID, r.calls, r.streamed, r.written = "", nil, nil, nil
}
