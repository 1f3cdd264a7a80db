package replay

import (
	"bufio"
	"fmt"
	"io"
	"strings"
	"unicode"
	"unicode/utf8"

	"tidemark/schema"
)

// Printer shows envelopes as the transcript of a conversation: the texts of messages as they stream, one line for everything else. It may be given any envelopes, for they are shown without the control
// characters that a terminal would obey. It belongs to one goroutine.
type Printer struct {
	w     *bufio.Writer
	color bool
	err   error // of the first write that failed

	// open is the message whose text is being printed, in which channel; message is empty where the cursor is at the beginning of a line.
	message string
	channel schema.Channel
	// begun are the messages that have had a text.
	begun map[string]bool
	// calls are the tool calls whose arguments are not complete, and the names of all, by call_id.
	calls map[string]*call
}

type call struct {
	name      string
	arguments strings.Builder
	shown     bool
}

// maxInline is the most characters of a value that are shown in a line.
const maxInline = 200

// NewPrinter makes a printer; with color it sets things apart by the escape sequences that terminals know.
func NewPrinter(w io.Writer, color bool) *Printer {
	return &Printer{w: bufio.NewWriter(w), color: color, begun: make(map[string]bool), calls: make(map[string]*call)}
}

// Print shows the next envelope.
func (p *Printer) Print(e *schema.Envelope) {
	switch m := e.GetPayload().(type) {
	case *schema.Envelope_Token:
		p.token(e, m.Token)
	case *schema.Envelope_MessageCompleted:
		p.completed(e, m.MessageCompleted)
	case *schema.Envelope_UserMessage:
		p.said(e, m.UserMessage.GetMessage())
	case *schema.Envelope_AgentMessage:
		p.said(e, m.AgentMessage.GetMessage())
	case *schema.Envelope_ToolCall:
		p.toolCall(m.ToolCall)
	case *schema.Envelope_ToolResult:
		p.toolResult(m.ToolResult)
	default:
		p.line(styleNote, "%s", event(e))
	}
}

// Note shows a line that is no envelope.
func (p *Printer) Note(format string, args ...any) { p.line(styleNote, "· "+format, args...) }

// Close ends the last line and writes what is buffered. The error is of the first write that failed.
func (p *Printer) Close() error {
	p.endText()
	for id, c := range p.calls {
		if !c.shown {
			p.call(id, c, "… (not complete)")
		}
	}
	return p.flush()
}

func (p *Printer) flush() error {
	if err := p.w.Flush(); p.err == nil {
		p.err = err
	}
	return p.err
}

// Styles, as SGR parameters of ECMA-48.
const (
	styleWho   = "1"  // bold
	styleNote  = "2"  // faint
	styleThink = "2"  // faint
	styleTool  = "36" // cyan
	styleFault = "31" // red
)

func (p *Printer) write(style, text string) {
	if p.color && style != "" {
		text = "\x1b[" + style + "m" + text + "\x1b[0m"
	}
	if _, err := p.w.WriteString(text); p.err == nil {
		p.err = err
	}
}

// line writes a line of its own.
func (p *Printer) line(style, format string, args ...any) {
	p.endText()
	p.write(style, visible(fmt.Sprintf(format, args...), false))
	p.write("", "\n")
}

// endText ends the line of a text that was being printed.
func (p *Printer) endText() {
	if p.message != "" {
		p.write("", "\n")
		p.message = ""
	}
}

// who is the sender as a transcript names it.
func who(e *schema.Envelope) string {
	s := e.GetSource()
	role := strings.ToLower(strings.TrimPrefix(s.GetRole().String(), "ROLE_"))
	if s.GetSubject() == "" || s.GetSubject() == role {
		return role
	}
	return s.GetSubject() + " (" + role + ")"
}

func (p *Printer) token(e *schema.Envelope, t *schema.Token) {
	channel := t.GetChannel()
	if channel != schema.Channel_CHANNEL_REASONING {
		channel = schema.Channel_CHANNEL_TEXT
	}
	if t.GetText() == "" {
		return
	}
	if p.message != t.GetMessageId() || p.channel != channel {
		p.endText()
		label := who(e)
		if channel == schema.Channel_CHANNEL_REASONING {
			label += " thinks"
		}
		p.write(styleWho, visible(label, false)+": ")
		if p.begun[t.GetMessageId()] && channel == schema.Channel_CHANNEL_TEXT {
			// Something came in between, or the thinking before it.
			p.write(styleNote, "… ")
		}
		p.message, p.channel = t.GetMessageId(), channel
	}
	if channel == schema.Channel_CHANNEL_REASONING {
		p.write(styleThink, visible(t.GetText(), true))
		return
	}
	p.begun[t.GetMessageId()] = true
	p.write("", visible(t.GetText(), true))
}

func (p *Printer) completed(e *schema.Envelope, m *schema.MessageCompleted) {
	if !p.begun[m.GetMessageId()] && m.GetText() != "" {
		p.said(e, m.GetText())
	}
	p.endText()
	delete(p.begun, m.GetMessageId())
	switch m.GetFinishReason() {
	case "", "stop", "end_turn", "completed":
		// The usual end needs no words.
	default:
		p.line(styleNote, "· the message ended: %s", m.GetFinishReason())
	}
}

// said shows a text that came whole.
func (p *Printer) said(e *schema.Envelope, text string) {
	p.endText()
	p.write(styleWho, visible(who(e), false)+": ")
	p.write("", visible(text, true)+"\n")
}

func (p *Printer) toolCall(t *schema.ToolCall) {
	c := p.calls[t.GetCallId()]
	if c == nil {
		c = new(call)
		p.calls[t.GetCallId()] = c
	}
	if t.GetName() != "" {
		c.name = t.GetName()
	}
	c.arguments.WriteString(t.GetArgumentsJson())
	c.arguments.WriteString(t.GetArgumentsDelta())
	if t.GetDone() || t.GetArgumentsJson() != "" {
		p.call(t.GetCallId(), c, "")
	}
}

// call shows a call with its arguments.
func (p *Printer) call(id string, c *call, behind string) {
	if c.shown {
		return
	}
	c.shown = true
	name := c.name
	if name == "" {
		name = id
	}
	p.line(styleTool, "→ %s(%s)%s", name, short(c.arguments.String()), behind)
	c.arguments.Reset()
}

func (p *Printer) toolResult(t *schema.ToolResult) {
	name := t.GetCallId()
	if c := p.calls[name]; c != nil {
		p.call(name, c, "")
		delete(p.calls, name)
		if c.name != "" {
			name = c.name
		}
	}
	if t.GetError() != "" {
		p.line(styleFault, "← %s failed: %s", name, short(t.GetError()))
		return
	}
	p.line(styleTool, "← %s: %s", name, short(t.GetResultJson()))
}

// event is the line for what is no part of a message or of a tool's call.
func event(e *schema.Envelope) string {
	switch m := e.GetPayload().(type) {
	case *schema.Envelope_WaitingForInput:
		s := "? " + m.WaitingForInput.GetPrompt()
		if o := m.WaitingForInput.GetOptions(); len(o) > 0 {
			s += " [" + strings.Join(o, " | ") + "]"
		}
		return s
	case *schema.Envelope_UserInput:
		return "! " + who(e) + ": " + short(m.UserInput.GetResponseJson())
	case *schema.Envelope_SessionCreated:
		return "· session created by " + who(e)
	case *schema.Envelope_StartRun:
		return "· run " + m.StartRun.GetRunId() + " starts"
	case *schema.Envelope_RunStatus:
		s := "· run " + m.RunStatus.GetRunId() + ": " + schema.StatusWord(m.RunStatus.GetStatus())
		return s + behind(", ", m.RunStatus.GetReason())
	case *schema.Envelope_System:
		return "· " + m.System.GetMessage()
	case *schema.Envelope_WorkflowProgress:
		s := "· " + m.WorkflowProgress.GetStep() + ": " + m.WorkflowProgress.GetMessage()
		if m.WorkflowProgress.Progress != nil {
			s += fmt.Sprintf(" (%.0f %%)", 100*m.WorkflowProgress.GetProgress())
		}
		return s
	case *schema.Envelope_Cancel:
		s := "everything"
		if m.Cancel.GetRunId() != "" {
			s = "run " + m.Cancel.GetRunId()
		} else if m.Cancel.GetRequestId() != "" {
			s = "request " + m.Cancel.GetRequestId()
		}
		return "· " + who(e) + " cancels " + s + behind(", ", m.Cancel.GetReason())
	case *schema.Envelope_ChatError:
		return "✗ " + m.ChatError.GetError()
	case *schema.Envelope_Error:
		s := "✗ " + m.Error.GetError() + behind(": ", m.Error.GetDetails())
		if m.Error.GetRecoverable() {
			s += " (the run goes on)"
		}
		return s
	case *schema.Envelope_WorkFailed:
		return fmt.Sprintf("✗ %s gave up seq %d after %d attempts", m.WorkFailed.GetGroup(), e.GetReplyTo(), m.WorkFailed.GetAttempts()) + behind(": ", m.WorkFailed.GetReason())
	case *schema.Envelope_Custom:
		s := "· " + m.Custom.GetType()
		if data := m.Custom.GetData(); utf8.Valid(data) && len(data) > 0 {
			return s + ": " + short(string(data))
		}
		return fmt.Sprintf("%s: %d bytes", s, len(m.Custom.GetData()))
	}
	return "· an event that this version does not know"
}

func behind(separator, text string) string {
	if text == "" {
		return ""
	}
	return separator + text
}

// short is a value that fits into a line.
func short(s string) string {
	n := 0
	for at := range s {
		if n++; n > maxInline {
			return fmt.Sprintf("%s… (%d bytes)", s[:at], len(s))
		}
	}
	return s
}

// visible is a text without what a terminal would obey: control characters are shown by their pictures (U+2400 and on), those without one and the marks that turn the direction of writing by U+FFFD. Line
// breaks and tabs stay in a text of many lines, and are shown as ⏎ and a space in one of one line.
func visible(s string, lines bool) string {
	if strings.IndexFunc(s, obeyed) < 0 {
		return s
	}
	return strings.Map(func(r rune) rune {
		switch {
		case (r == '\n' || r == '\t') && lines || !obeyed(r):
			return r
		case r == '\n':
			return '⏎'
		case r == '\t':
			return ' '
		case r < 0x20:
			return 0x2400 + r
		case r == 0x7f:
			return 0x2421
		}
		return unicode.ReplacementChar
	}, s)
}

// obeyed reports whether a terminal might do something else with r than show it.
func obeyed(r rune) bool {
	return unicode.IsControl(r) || r >= 0x202a && r <= 0x202e || r >= 0x2066 && r <= 0x2069 || r == utf8.RuneError
}
