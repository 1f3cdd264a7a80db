package recording

import (
	"encoding/json"
	"strconv"

	"tidemark/schema"
)

// chatLine is a chunk of a chat completion, a message of role tool, or an error.
type chatLine struct {
	timing
	ID      string          `json:"id"`
	Model   string          `json:"model"`
	Choices *[]chatChoice   `json:"choices"`
	Usage   json.RawMessage `json:"usage"`
	// XGroq is where Groq's usage stood before it moved to the top.
	XGroq struct {
		Usage json.RawMessage `json:"usage"`
	} `json:"x_groq"`
	Error json.RawMessage `json:"error"`

	Role       string          `json:"role"`
	ToolCallID string          `json:"tool_call_id"`
	Content    json.RawMessage `json:"content"`
}

type chatChoice struct {
	Index int       `json:"index"`
	Delta chatDelta `json:"delta"`
	// Message stands in place of delta where the answer was not streamed.
	Message      chatDelta `json:"message"`
	FinishReason string    `json:"finish_reason"`
}

type chatDelta struct {
	Role    string `json:"role"`
	Content string `json:"content"`
	Refusal string `json:"refusal"`
	// Reasoning is Groq's and OpenRouter's word, reasoning_content DeepSeek's and xAI's; some servers send both with the same text.
	Reasoning        string         `json:"reasoning"`
	ReasoningContent string         `json:"reasoning_content"`
	ToolCalls        []chatToolCall `json:"tool_calls"`
}

type chatToolCall struct {
	Index    *int   `json:"index"`
	ID       string `json:"id"`
	Function struct {
		Name string `json:"name"`
		// A JSON string that holds JSON; some servers send the object itself.
		Arguments json.RawMessage `json:"arguments"`
	} `json:"function"`
}

// chatReader reads chat completions. A completion is open from its first chunk until it was finished and its usage came: in the last chunk, or in one of its own behind it.
type chatReader struct {
	*script
	open *completion
}

type completion struct {
	id, messageID string
	choices       []*chatMessage // at its index
	unfinished    int
	usage         json.RawMessage
}

// chatMessage is one choice's.
type chatMessage struct {
	messageID string
	calls     map[int]*call
	last      *call
	finished  bool
	reason    string
}

func (r *chatReader) line(b []byte) error {
	var l chatLine
	if err := r.parse(b, &l, &l.timing); err != nil {
		return err
	}
	switch {
	case present(l.Error):
		r.failOpen(l.Error)
		return nil
	case l.Role == "tool" && l.Choices == nil:
		return r.toolResult(&l)
	case l.Choices == nil:
		return r.refuse("is no chunk of a chat completion: it has neither choices nor an error")
	}
	usage := l.Usage
	if !present(usage) {
		usage = l.XGroq.Usage
	}
	if len(*l.Choices) > 0 {
		r.turn(&l)
	}
	if r.open == nil {
		// A chunk of usage after the completion was closed: repeated, or without one.
		return nil
	}
	if present(usage) {
		r.open.usage = usage
	}
	for i := range *l.Choices {
		if err := r.choice(&(*l.Choices)[i]); err != nil {
			return err
		}
	}
	if r.open.unfinished == 0 && r.open.usage != nil {
		r.end()
	}
	return nil
}

// turn opens a completion where this chunk begins one. A finished completion is over when a chunk says more. An unfinished one goes on even under another id (some gateways
// change it at every chunk) unless the chunk says anew who speaks: then the stream before it was cut, and this is the next attempt.
func (r *chatReader) turn(l *chatLine) {
	first := &(*l.Choices)[0]
	d := first.delta()
	if r.open != nil {
		finished := r.open.unfinished == 0 && len(r.open.choices) > 0
		switch {
		case finished && d.empty():
			// What trails: usage, perhaps.
		case finished && l.ID == r.open.id && r.open.message(first.Index) == nil:
			// Another choice of the same completion.
		case finished, l.ID != r.open.id && d.Role != "":
			r.end()
		}
	}
	if r.open != nil || r.turns > 0 && d.empty() && (first.FinishReason == "" || l.ID == r.lastID) {
		return
	}
	r.open = &completion{id: l.ID, messageID: r.beginTurn(l.ID, l.Model)}
}

func (c *chatChoice) delta() *chatDelta {
	if c.Delta.empty() && !c.Message.empty() {
		return &c.Message
	}
	return &c.Delta
}

func (d *chatDelta) empty() bool {
	return d.Content == "" && d.Refusal == "" && d.Reasoning == "" && d.ReasoningContent == "" && len(d.ToolCalls) == 0 && d.Role == ""
}

func (c *completion) message(index int) *chatMessage {
	if index < 0 || index >= len(c.choices) {
		return nil
	}
	return c.choices[index]
}

func (r *chatReader) choice(c *chatChoice) error {
	if c.Index < 0 || c.Index >= maxOpen {
		return r.refuse("has choice %d; the choices are 0 to %d", c.Index, maxOpen-1)
	}
	m := r.open.message(c.Index)
	if m == nil {
		for len(r.open.choices) <= c.Index {
			r.open.choices = append(r.open.choices, nil)
		}
		m = &chatMessage{messageID: r.open.messageID}
		if c.Index > 0 {
			m.messageID += "/" + strconv.Itoa(c.Index)
		}
		r.open.choices[c.Index] = m
		r.open.unfinished++
	}
	d := c.delta()
	reasoning := d.ReasoningContent
	if reasoning == "" {
		reasoning = d.Reasoning
	}
	r.token(m.messageID, schema.Channel_CHANNEL_REASONING, reasoning)
	r.token(m.messageID, schema.Channel_CHANNEL_TEXT, d.Content)
	// A refusal is what the person reads in place of an answer.
	r.token(m.messageID, schema.Channel_CHANNEL_TEXT, d.Refusal)
	for i := range d.ToolCalls {
		if err := r.toolCall(m, &d.ToolCalls[i]); err != nil {
			return err
		}
	}
	if c.FinishReason != "" && !m.finished {
		m.finished, m.reason = true, c.FinishReason
		r.open.unfinished--
		m.endCalls(r.script)
	}
	return nil
}

// toolCall takes in a piece of a call. It belongs to the call at its index, unless it brings the id of another: some servers number all calls 0, or not at all.
func (r *chatReader) toolCall(m *chatMessage, t *chatToolCall) error {
	c, place := m.last, len(m.calls)
	if t.Index != nil {
		c, place = m.calls[*t.Index], *t.Index
	}
	if c != nil && t.ID != "" && r.prefix+t.ID != c.id {
		r.endCall(c, "")
		c, place = nil, max(place, len(m.calls))
	}
	if c == nil {
		if len(m.calls) >= maxOpen {
			return r.refuse("is the call of more than %d tools in one message", maxOpen)
		}
		c = r.startCall(m.messageID, t.ID, t.Function.Name, place)
		if m.calls == nil {
			m.calls = make(map[int]*call)
		}
		if t.Index != nil {
			place = *t.Index
		}
		m.calls[place] = c
	}
	m.last = c
	piece, err := r.text(t.Function.Arguments, "arguments")
	if err != nil {
		return err
	}
	r.arguments(c, piece)
	return nil
}

// text is the text of a JSON string, or the JSON text of anything else.
func (s *script) text(raw json.RawMessage, what string) (string, error) {
	if !present(raw) {
		return "", nil
	}
	if raw[0] != '"' {
		return string(raw), nil
	}
	var text string
	if err := json.Unmarshal(raw, &text); err != nil {
		return "", s.refuse("has %s that cannot be read: %s", what, err)
	}
	return text, nil
}

// endCalls closes the calls that are still open, in the order of their places.
func (m *chatMessage) endCalls(s *script) {
	for _, place := range sortedKeys(m.calls) {
		s.endCall(m.calls[place], "")
	}
}

// toolResult takes in the message that the agent sent back to the model.
func (r *chatReader) toolResult(l *chatLine) error {
	if l.ToolCallID == "" {
		return r.refuse("is a tool's message without a tool_call_id")
	}
	r.end()
	raw := l.Content
	if text, err := r.text(raw, "content"); err != nil {
		return err
	} else if len(text) > 0 && (text[0] == '{' || text[0] == '[') && json.Valid([]byte(text)) {
		// Tools answer with JSON in a string; an object or an array is what was meant. Anything else stays the string that it is.
		raw = json.RawMessage(text)
	}
	r.beginRun("tool", "")
	r.result(r.prefix+l.ToolCallID, raw, "")
	return nil
}

func (r *chatReader) failOpen(raw json.RawMessage) {
	sentence, code := reported(raw)
	messageID := ""
	if r.open != nil {
		messageID = r.open.messageID
		r.open = nil
	}
	r.fail(messageID, sentence, code)
}

// end closes the open completion. The usage, which is all choices' together, goes to the last of them.
func (r *chatReader) end() {
	if r.open == nil {
		return
	}
	open := r.open
	r.open = nil
	var last *chatMessage
	for _, m := range open.choices {
		switch {
		case m == nil:
		case !m.finished:
			r.cut(m.messageID)
		default:
			if last != nil {
				r.complete(last.messageID, last.reason, nil)
			}
			last = m
		}
	}
	if last != nil {
		r.complete(last.messageID, last.reason, open.usage)
	}
}
