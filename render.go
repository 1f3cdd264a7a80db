package main

import (
	"bufio"
	"fmt"
	"strings"
	"unicode"

	"tidemark/schema"
)

// textRenderer shows a session as people read it: text as it streams, everything else as a line in brackets.
type textRenderer struct {
	out *bufio.Writer
	// terminal: what agents write must not command it.
	terminal bool

	// stream is what is being streamed on the current line; empty at the beginning of a line.
	stream string
}

// show writes one envelope.
func (r *textRenderer) show(e *schema.Envelope) {
	switch p := e.GetPayload().(type) {
	case *schema.Envelope_Token:
		label := ""
		if p.Token.GetChannel() == schema.Channel_CHANNEL_REASONING {
			label = "[reasoning] "
		}
		r.piece("token "+p.Token.GetMessageId()+label, label, p.Token.GetText())
	case *schema.Envelope_ToolCall:
		c := p.ToolCall
		stream := "call " + c.GetCallId()
		label := "[tool_call] "
		if c.GetName() != "" {
			label = "[tool_call " + c.GetName() + "] "
		}
		r.piece(stream, label, c.GetArgumentsDelta()+c.GetArgumentsJson())
		if c.GetDone() {
			r.pause()
		}
	case *schema.Envelope_MessageCompleted:
		r.pause()
	case *schema.Envelope_ToolResult:
		text := p.ToolResult.GetResultJson()
		if p.ToolResult.GetError() != "" {
			text = "failed: " + p.ToolResult.GetError()
		}
		r.line("tool_result", text)
	case *schema.Envelope_WorkflowProgress:
		text := p.WorkflowProgress.GetStep() + ": " + p.WorkflowProgress.GetMessage()
		if p.WorkflowProgress.Progress != nil {
			text += fmt.Sprintf(" (%.0f %%)", 100*p.WorkflowProgress.GetProgress())
		}
		r.line("progress", text)
	case *schema.Envelope_Custom:
		r.line("custom "+p.Custom.GetType(), fmt.Sprintf("%d bytes %s", len(p.Custom.GetData()), p.Custom.GetContentType()))
	case *schema.Envelope_SessionCreated:
		r.line("session_created", strings.ToLower(strings.TrimPrefix(p.SessionCreated.GetKind().String(), "SESSION_KIND_")))
	case *schema.Envelope_StartRun:
		r.line("start_run "+p.StartRun.GetRunId(), p.StartRun.GetInputJson())
	case *schema.Envelope_RunStatus:
		r.line("run "+schema.StatusWord(p.RunStatus.GetStatus()), p.RunStatus.GetReason())
	case *schema.Envelope_System:
		r.line("system", p.System.GetMessage())
	case *schema.Envelope_UserMessage:
		r.line("user", p.UserMessage.GetMessage())
	case *schema.Envelope_AgentMessage:
		r.line("agent", p.AgentMessage.GetMessage())
	case *schema.Envelope_ChatError:
		r.line("chat_error", p.ChatError.GetError())
	case *schema.Envelope_WaitingForInput:
		text := p.WaitingForInput.GetPrompt()
		if o := p.WaitingForInput.GetOptions(); len(o) > 0 {
			text += " (" + strings.Join(o, " / ") + ")"
		}
		r.line("question", text)
	case *schema.Envelope_UserInput:
		r.line("answer", p.UserInput.GetResponseJson())
	case *schema.Envelope_Cancel:
		r.line("cancel", p.Cancel.GetReason())
	case *schema.Envelope_Error:
		text := p.Error.GetError()
		if p.Error.GetDetails() != "" {
			text += ": " + p.Error.GetDetails()
		}
		r.line("error", text)
	case *schema.Envelope_WorkFailed:
		r.line("work_failed "+p.WorkFailed.GetGroup(), p.WorkFailed.GetReason())
	default:
		r.line("unknown", fmt.Sprintf("seq %d is of a type that this version does not know", e.GetSeq()))
	}
}

// piece goes on with a stream, or begins it on a line of its own.
func (r *textRenderer) piece(stream, label, text string) {
	if r.stream != stream {
		r.pause()
		if text == "" && label == "" {
			return
		}
		r.write(label)
		r.stream = stream
	}
	r.write(text)
	if strings.HasSuffix(text, "\n") && label == "" {
		r.stream = ""
	}
}

// line writes something that is there as a whole.
func (r *textRenderer) line(label, text string) {
	r.pause()
	r.write("[" + label + "]")
	if text != "" {
		r.write(" " + text)
	}
	r.write("\n")
}

func (r *textRenderer) pause() {
	if r.stream != "" {
		r.write("\n")
		r.stream = ""
	}
}

// write writes text. Control characters do not reach a terminal: they could move its cursor, or make it answer as if somebody had typed.
func (r *textRenderer) write(s string) {
	if r.terminal {
		s = strings.Map(func(c rune) rune {
			if unicode.IsControl(c) && c != '\n' && c != '\t' {
				return -1
			}
			return c
		}, s)
	}
	_, _ = r.out.WriteString(s) // a Writer remembers its error for Flush
}
