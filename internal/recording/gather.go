package recording

import (
	"iter"
	"strings"

	"tidemark/schema"
)

// Transcript is what envelopes say when they are joined: whole texts, whole arguments. Two are compared with reflect.DeepEqual; seqs, times and ids of envelopes are not in it,
// nor how the text was cut into tokens.
type Transcript struct {
	// Messages, Calls and the others stand in the order in which they were first heard of.
	Messages  []Message
	Calls     []Call
	Questions []Question
	Runs      []Run
	Customs   []Custom
}

// Message is a message with all its text.
type Message struct {
	ID        string
	Text      string
	Reasoning string
	// Completed: message_completed came, with FinishReason and Usage as it stood there.
	Completed    bool
	FinishReason string
	Usage        string
	// Errors are the sentences of its chat errors.
	Errors []string
}

// Call is a tool's call with all its arguments, and its result.
type Call struct {
	ID, Name, MessageID string
	Arguments           string
	// Done: the arguments are complete.
	Done bool
	// Answered: tool_result came, with Result and Error as they stood there.
	Answered      bool
	Result, Error string
}

// Question is a waiting_for_input.
type Question struct {
	Prompt, Context string
	Options         []string
}

// Run is a run with the statuses it had.
type Run struct {
	ID       string
	Started  bool
	Statuses []schema.Status
	// Reason is the last status'.
	Reason string
}

// Custom is a custom envelope.
type Custom struct {
	Type, ContentType, Data string
}

// Message returns the message with this id, or nil.
func (t *Transcript) Message(id string) *Message {
	for i := range t.Messages {
		if t.Messages[i].ID == id {
			return &t.Messages[i]
		}
	}
	return nil
}

// Call returns the call with this id, or nil.
func (t *Transcript) Call(id string) *Call {
	for i := range t.Calls {
		if t.Calls[i].ID == id {
			return &t.Calls[i]
		}
	}
	return nil
}

// Gather joins what the envelopes say, in their order. It leaves out the kinds that recordings do not make. The envelopes are only read.
func Gather(envelopes iter.Seq[*schema.Envelope]) *Transcript {
	g := gatherer{messages: make(map[string]*messageText), calls: make(map[string]*callText), runs: make(map[string]int)}
	for e := range envelopes {
		g.add(e)
	}
	for _, m := range g.messageOrder {
		m.Text, m.Reasoning = m.text.String(), m.reasoning.String()
		g.t.Messages = append(g.t.Messages, m.Message)
	}
	for _, c := range g.callOrder {
		c.Arguments = c.arguments.String()
		g.t.Calls = append(g.t.Calls, c.Call)
	}
	return &g.t
}

type gatherer struct {
	t            Transcript
	messages     map[string]*messageText
	messageOrder []*messageText
	calls        map[string]*callText
	callOrder    []*callText
	runs         map[string]int
}

type messageText struct {
	Message
	text, reasoning strings.Builder
}

type callText struct {
	Call
	arguments strings.Builder
}

func (g *gatherer) add(e *schema.Envelope) {
	switch p := e.GetPayload().(type) {
	case *schema.Envelope_Token:
		m := g.message(p.Token.GetMessageId())
		if p.Token.GetChannel() == schema.Channel_CHANNEL_REASONING {
			m.reasoning.WriteString(p.Token.GetText())
		} else {
			m.text.WriteString(p.Token.GetText())
		}
	case *schema.Envelope_MessageCompleted:
		m := g.message(p.MessageCompleted.GetMessageId())
		m.Completed, m.FinishReason, m.Usage = true, p.MessageCompleted.GetFinishReason(), p.MessageCompleted.GetUsageJson()
	case *schema.Envelope_ChatError:
		m := g.message(p.ChatError.GetMessageId())
		m.Errors = append(m.Errors, p.ChatError.GetError())
	case *schema.Envelope_ToolCall:
		g.addCall(p.ToolCall)
	case *schema.Envelope_ToolResult:
		c := g.call(p.ToolResult.GetCallId())
		c.Answered, c.Result, c.Error = true, p.ToolResult.GetResultJson(), p.ToolResult.GetError()
	case *schema.Envelope_WaitingForInput:
		w := p.WaitingForInput
		g.t.Questions = append(g.t.Questions, Question{Prompt: w.GetPrompt(), Context: w.GetContextJson(), Options: append([]string(nil), w.GetOptions()...)})
	case *schema.Envelope_StartRun:
		g.run(p.StartRun.GetRunId()).Started = true
	case *schema.Envelope_RunStatus:
		r := g.run(p.RunStatus.GetRunId())
		r.Statuses, r.Reason = append(r.Statuses, p.RunStatus.GetStatus()), p.RunStatus.GetReason()
	case *schema.Envelope_Custom:
		g.t.Customs = append(g.t.Customs, Custom{Type: p.Custom.GetType(), ContentType: p.Custom.GetContentType(), Data: string(p.Custom.GetData())})
	}
}

func (g *gatherer) addCall(t *schema.ToolCall) {
	c := g.call(t.GetCallId())
	if t.GetName() != "" {
		c.Name = t.GetName()
	}
	if t.GetMessageId() != "" {
		c.MessageID = t.GetMessageId()
	}
	c.arguments.WriteString(t.GetArgumentsDelta())
	c.arguments.WriteString(t.GetArgumentsJson())
	c.Done = c.Done || t.GetDone()
}

func (g *gatherer) message(id string) *messageText {
	m := g.messages[id]
	if m == nil {
		m = &messageText{Message: Message{ID: id}}
		g.messages[id] = m
		g.messageOrder = append(g.messageOrder, m)
	}
	return m
}

func (g *gatherer) call(id string) *callText {
	c := g.calls[id]
	if c == nil {
		c = &callText{Call: Call{ID: id}}
		g.calls[id] = c
		g.callOrder = append(g.callOrder, c)
	}
	return c
}

func (g *gatherer) run(id string) *Run {
	i, ok := g.runs[id]
	if !ok {
		i = len(g.t.Runs)
		g.runs[id] = i
		g.t.Runs = append(g.t.Runs, Run{ID: id})
	}
	return &g.t.Runs[i]
}
