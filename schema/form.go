package schema

// This file is the one description of an envelope's fields: their names in the JSON form, their order and their rules. A [pass] goes over it in three ways,
// to write the JSON form, to read it, and to validate, so that the three cannot disagree. PROTOCOL.md says the same for people.

// envelope goes over the fields that every envelope has. Type, payload and unknown fields are the callers'.
func (p *pass) envelope(e *Envelope) {
	p.moment("timestamp", &e.Time)
	p.whole("seq", &e.Seq)
	p.ulid("id", &e.Id)
	p.maybeWhole("first_seq", &e.FirstSeq)
	p.text("request_id", &e.RequestId, ident)
	p.replyTo(&e.ReplyTo)
	p.producer(&e.Producer)
	p.source(&e.Source)
}

// payload goes over the fields of the payload, whichever it is. A payload whose message is nil is an empty one, as it is for protobuf.
func (p *pass) payload(e *Envelope) {
	switch x := e.Payload.(type) {
	case *Envelope_Token:
		m := orEmpty(x.Token)
		p.text("message_id", &m.MessageId, required|ident)
		enum(p, "channel", &m.Channel, channelWords[:], 0)
		p.text("text", &m.Text, always)
		p.unknown(&m.unknownFields, m)
	case *Envelope_MessageCompleted:
		m := orEmpty(x.MessageCompleted)
		p.text("message_id", &m.MessageId, required|ident)
		p.text("finish_reason", &m.FinishReason, 0)
		p.free("usage", &m.UsageJson, object)
		p.text("text", &m.Text, 0)
		p.unknown(&m.unknownFields, m)
	case *Envelope_ToolCall:
		m := orEmpty(x.ToolCall)
		p.text("call_id", &m.CallId, required|ident)
		p.text("name", &m.Name, 0)
		p.free("arguments", &m.ArgumentsJson, 0)
		p.text("arguments_delta", &m.ArgumentsDelta, 0)
		p.flag("done", &m.Done)
		p.text("message_id", &m.MessageId, ident)
		p.unknown(&m.unknownFields, m)
		if p.op == opCheck && m.ArgumentsJson != "" && m.ArgumentsDelta != "" {
			p.refuse("A tool call has either 'arguments' or 'arguments_delta', not both.")
		}
	case *Envelope_ToolResult:
		m := orEmpty(x.ToolResult)
		p.text("call_id", &m.CallId, required|ident)
		p.free("result", &m.ResultJson, 0)
		p.text("error", &m.Error, 0)
		p.unknown(&m.unknownFields, m)
	case *Envelope_WorkflowProgress:
		m := orEmpty(x.WorkflowProgress)
		p.text("step", &m.Step, required)
		p.text("message", &m.Message, required)
		p.fraction("progress", &m.Progress)
		p.free("metadata", &m.MetadataJson, object)
		p.unknown(&m.unknownFields, m)
	case *Envelope_Custom:
		m := orEmpty(x.Custom)
		p.text("type", &m.Type, required|ident)
		p.text("content_type", &m.ContentType, ident)
		p.customData(m)
		p.unknown(&m.unknownFields, m)
	case *Envelope_SessionCreated:
		m := orEmpty(x.SessionCreated)
		enum(p, "kind", &m.Kind, sessionKindWords[:], 0)
		p.free("metadata", &m.MetadataJson, object)
		p.unknown(&m.unknownFields, m)
		if p.op == opCheck && len(m.MetadataJson) > MaxSessionMetadataBytes {
			p.refuse("The field 'metadata' has %d bytes; at most %d are allowed.", len(m.MetadataJson), MaxSessionMetadataBytes)
		}
	case *Envelope_StartRun:
		m := orEmpty(x.StartRun)
		p.text("run_id", &m.RunId, required|ident)
		p.free("input", &m.InputJson, 0)
		p.free("metadata", &m.MetadataJson, object)
		p.whole("orphan_after_ms", &m.OrphanAfterMs)
		p.unknown(&m.unknownFields, m)
		if v := m.OrphanAfterMs; p.op == opCheck && v != 0 && (v < MinOrphanAfterMs || v > MaxOrphanAfterMs) {
			p.refuse("The field 'orphan_after_ms' is %d; %d to %d milliseconds are allowed.", v, MinOrphanAfterMs, MaxOrphanAfterMs)
		}
	case *Envelope_RunStatus:
		m := orEmpty(x.RunStatus)
		p.text("run_id", &m.RunId, ident)
		enum(p, "status", &m.Status, statusWords[:], required)
		p.text("reason", &m.Reason, 0)
		p.unknown(&m.unknownFields, m)
	case *Envelope_System:
		m := orEmpty(x.System)
		p.text("message", &m.Message, required)
		p.unknown(&m.unknownFields, m)
	case *Envelope_UserMessage:
		m := orEmpty(x.UserMessage)
		p.text("message", &m.Message, required)
		p.free("context", &m.ContextJson, object)
		p.unknown(&m.unknownFields, m)
	case *Envelope_AgentMessage:
		m := orEmpty(x.AgentMessage)
		p.text("message", &m.Message, required)
		p.free("metadata", &m.MetadataJson, object)
		p.unknown(&m.unknownFields, m)
	case *Envelope_ChatError:
		m := orEmpty(x.ChatError)
		p.text("message_id", &m.MessageId, ident)
		p.text("error", &m.Error, required)
		p.text("code", &m.Code, 0)
		p.unknown(&m.unknownFields, m)
	case *Envelope_WaitingForInput:
		m := orEmpty(x.WaitingForInput)
		p.text("prompt", &m.Prompt, required)
		p.texts("options", &m.Options)
		p.free("context", &m.ContextJson, object)
		p.moment("deadline", &m.Deadline)
		p.free("default", &m.DefaultJson, 0)
		p.unknown(&m.unknownFields, m)
		if p.op == opCheck {
			p.promptOptions(m.Options)
			p.promptDefault(m)
		}
	case *Envelope_UserInput:
		m := orEmpty(x.UserInput)
		p.free("response", &m.ResponseJson, required)
		p.free("metadata", &m.MetadataJson, object)
		p.unknown(&m.unknownFields, m)
	case *Envelope_Cancel:
		m := orEmpty(x.Cancel)
		p.target(m)
		p.text("reason", &m.Reason, 0)
		p.unknown(&m.unknownFields, m)
	case *Envelope_Error:
		m := orEmpty(x.Error)
		p.text("error", &m.Error, required)
		p.text("details", &m.Details, 0)
		p.maybeFlag("recoverable", &m.Recoverable, required)
		p.text("code", &m.Code, 0)
		p.unknown(&m.unknownFields, m)
	case *Envelope_WorkFailed:
		m := orEmpty(x.WorkFailed)
		p.text("group", &m.Group, required|ident)
		p.whole("attempts", &m.Attempts)
		p.text("reason", &m.Reason, required)
		p.unknown(&m.unknownFields, m)
	}
}

// promptOptions checks the answers that a question allows.
func (p *pass) promptOptions(options []string) {
	if len(options) > MaxPromptOptions {
		p.refuse("The field 'options' has %d answers; at most %d are allowed.", len(options), MaxPromptOptions)
	}
	for _, o := range options {
		if o == "" || len(o) > MaxPromptOptionBytes {
			p.refuse("The field 'options' has an answer of %d bytes; each must have 1 to %d.", len(o), MaxPromptOptionBytes)
			return
		}
	}
}

// promptDefault checks the answer that a question gets by itself.
func (p *pass) promptDefault(m *WaitingForInput) {
	switch {
	case (m.Deadline == nil) != (m.DefaultJson == ""):
		p.refuse("The fields 'deadline' and 'default' stand together or not at all: at the deadline the question is answered with the default.")
	case len(m.DefaultJson) > MaxPromptDefaultBytes:
		p.refuse("The field 'default' has %d bytes; at most %d are allowed.", len(m.DefaultJson), MaxPromptDefaultBytes)
	case m.DefaultJson != "" && !Allows(m.Options, m.DefaultJson):
		p.refuse("The field 'default' is none of the answers in 'options'.")
	}
}

func (p *pass) producer(v **Producer) {
	if !begin(p, inProducer, v) {
		return
	}
	m := *v
	p.text("id", &m.Id, required|producerIdent)
	p.whole("epoch", &m.Epoch)
	p.whole("seq", &m.Seq)
	p.unknown(&m.unknownFields, m)
	if p.op == opCheck && m.Seq == 0 {
		p.missing("seq")
	}
	p.end()
}

// The source is the server's word, and that server may be newer than this one: its role is not checked.
func (p *pass) source(v **Source) {
	if !begin(p, inSource, v) {
		return
	}
	m := *v
	p.text("subject", &m.Subject, 0)
	if p.op != opCheck {
		enum(p, "role", &m.Role, roleWords[:], 0)
	}
	p.unknown(&m.unknownFields, m)
	p.end()
}

// newPayload returns an empty payload of a known kind.
func newPayload(k Kind) isEnvelope_Payload {
	switch k {
	case KindToken:
		return &Envelope_Token{Token: new(Token)}
	case KindMessageCompleted:
		return &Envelope_MessageCompleted{MessageCompleted: new(MessageCompleted)}
	case KindToolCall:
		return &Envelope_ToolCall{ToolCall: new(ToolCall)}
	case KindToolResult:
		return &Envelope_ToolResult{ToolResult: new(ToolResult)}
	case KindWorkflowProgress:
		return &Envelope_WorkflowProgress{WorkflowProgress: new(WorkflowProgress)}
	case KindCustom:
		return &Envelope_Custom{Custom: new(Custom)}
	case KindSessionCreated:
		return &Envelope_SessionCreated{SessionCreated: new(SessionCreated)}
	case KindStartRun:
		return &Envelope_StartRun{StartRun: new(StartRun)}
	case KindRunStatus:
		return &Envelope_RunStatus{RunStatus: new(RunStatus)}
	case KindSystem:
		return &Envelope_System{System: new(System)}
	case KindUserMessage:
		return &Envelope_UserMessage{UserMessage: new(UserMessage)}
	case KindAgentMessage:
		return &Envelope_AgentMessage{AgentMessage: new(AgentMessage)}
	case KindChatError:
		return &Envelope_ChatError{ChatError: new(ChatError)}
	case KindWaitingForInput:
		return &Envelope_WaitingForInput{WaitingForInput: new(WaitingForInput)}
	case KindUserInput:
		return &Envelope_UserInput{UserInput: new(UserInput)}
	case KindCancel:
		return &Envelope_Cancel{Cancel: new(Cancel)}
	case KindError:
		return &Envelope_Error{Error: new(Error)}
	case KindWorkFailed:
		return &Envelope_WorkFailed{WorkFailed: new(WorkFailed)}
	}
	return nil
}

// orEmpty is for the payload that a Go program made without a message in it.
func orEmpty[M any](m *M) *M {
	if m == nil {
		return new(M)
	}
	return m
}

// The words of the enums in the JSON form, at their numbers. 0 is unspecified and has none.
//
//nolint:gochecknoglobals // tables that nothing writes
var (
	channelWords     = [...]string{Channel_CHANNEL_TEXT: "text", Channel_CHANNEL_REASONING: "reasoning"}
	sessionKindWords = [...]string{SessionKind_SESSION_KIND_CHAT: "chat", SessionKind_SESSION_KIND_WORKFLOW: "workflow"}
	statusWords      = [...]string{
		Status_STATUS_OPEN: "open", Status_STATUS_RUNNING: "running", Status_STATUS_WAITING_FOR_INPUT: "waiting_for_input",
		Status_STATUS_COMPLETED: "completed", Status_STATUS_FAILED: "failed", Status_STATUS_CANCELLED: "cancelled",
	}
	roleWords = [...]string{
		Role_ROLE_USER: "user", Role_ROLE_AGENT: "agent", Role_ROLE_WORKER: "worker", Role_ROLE_ANALYST: "analyst", Role_ROLE_ADMIN: "admin",
		Role_ROLE_SYSTEM: "system",
	}
)
