package logtest

import (
	"time"

	"tidemark/schema"
)

// ID is the session of this name in the default tenant.
func ID(name string) schema.SessionID { return schema.SessionID{Tenant: "default", Name: name} }

// Accept validates and stamps an envelope as an edge does. It panics where a test made one that is refused.
func Accept(e *schema.Envelope) schema.Accepted {
	return acceptOf("logtest", schema.Role_ROLE_AGENT, e)
}

// acceptOf is Accept for a sender of the caller's choice.
func acceptOf(subject string, role schema.Role, e *schema.Envelope) schema.Accepted {
	stamp := schema.NewStamp(&schema.Source{Subject: subject, Role: role})
	a, err := stamp.AcceptEnvelope(e, time.Now())
	if err != nil {
		panic("logtest: " + err.Error())
	}
	return a
}

// Token is a piece of a message's text.
func Token(message, text string) schema.Accepted { return Accept(tokenOf(message, text)) }

func tokenOf(message, text string) *schema.Envelope {
	return &schema.Envelope{Payload: &schema.Envelope_Token{Token: &schema.Token{MessageId: message, Text: text}}}
}

// Tokens are n tokens of one message; their texts tell them apart.
func Tokens(message string, n int) []schema.Accepted {
	out := make([]schema.Accepted, n)
	for i := range out {
		out[i] = Token(message, string(rune('a'+i%26))+" ")
	}
	return out
}

// Produced is a token at a place of a producer's sequence.
func Produced(producer string, epoch, seq uint64) schema.Accepted {
	return Accept(producedOf(producer, epoch, seq))
}

// ProducedBy is Produced by a sender of another subject, whose producer of that id is another one.
func ProducedBy(subject, producer string, epoch, seq uint64) schema.Accepted {
	return acceptOf(subject, schema.Role_ROLE_AGENT, producedOf(producer, epoch, seq))
}

func producedOf(producer string, epoch, seq uint64) *schema.Envelope {
	e := tokenOf("of "+producer, ".")
	e.Producer = &schema.Producer{Id: producer, Epoch: epoch, Seq: seq}
	return e
}

// UserMessage is what a person says.
func UserMessage(text string) schema.Accepted {
	return Accept(&schema.Envelope{Payload: &schema.Envelope_UserMessage{UserMessage: &schema.UserMessage{Message: text}}})
}

// Created opens a session of this kind.
func Created(kind schema.SessionKind, metadata string) schema.Accepted {
	return Accept(&schema.Envelope{Payload: &schema.Envelope_SessionCreated{SessionCreated: &schema.SessionCreated{Kind: kind, MetadataJson: metadata}}})
}

// StartRun begins a run.
func StartRun(run string) schema.Accepted {
	return Accept(&schema.Envelope{Payload: &schema.Envelope_StartRun{StartRun: &schema.StartRun{RunId: run}}})
}

// RunStatus says where the session's run stands.
func RunStatus(status schema.Status) schema.Accepted { return RunStatusOf("", status) }

// RunStatusOf says where a run stands.
func RunStatusOf(run string, status schema.Status) schema.Accepted {
	return Accept(&schema.Envelope{Payload: &schema.Envelope_RunStatus{RunStatus: &schema.RunStatus{RunId: run, Status: status}}})
}

// Progress says how far a run is.
func Progress(message string) schema.Accepted { return Accept(progressOf(message)) }

func progressOf(message string) *schema.Envelope {
	return &schema.Envelope{Payload: &schema.Envelope_WorkflowProgress{WorkflowProgress: &schema.WorkflowProgress{Step: "s", Message: message}}}
}

// ProducedProgress is progress at a place of a producer's sequence.
func ProducedProgress(producer string, epoch, seq uint64) schema.Accepted {
	e := progressOf("of " + producer)
	e.Producer = &schema.Producer{Id: producer, Epoch: epoch, Seq: seq}
	return Accept(e)
}

// System is a notice.
func System(message string) schema.Accepted {
	return Accept(&schema.Envelope{Payload: &schema.Envelope_System{System: &schema.System{Message: message}}})
}

// Cancel asks that all work in the session stops.
func Cancel() schema.Accepted {
	return Accept(&schema.Envelope{Payload: &schema.Envelope_Cancel{Cancel: &schema.Cancel{Target: &schema.Cancel_Session{Session: true}}}})
}

// Waiting asks a person; the answer is one of the options, where there are any.
func Waiting(prompt string, options ...string) schema.Accepted {
	return Accept(&schema.Envelope{Payload: &schema.Envelope_WaitingForInput{WaitingForInput: &schema.WaitingForInput{Prompt: prompt, Options: options}}})
}

// Input answers the question.
func Input(response string) schema.Accepted {
	return Accept(&schema.Envelope{Payload: &schema.Envelope_UserInput{UserInput: &schema.UserInput{ResponseJson: response}}})
}

// InputTo answers the question with this seq.
func InputTo(question uint64, response string) schema.Accepted {
	return Accept(&schema.Envelope{ReplyTo: &question, Payload: &schema.Envelope_UserInput{UserInput: &schema.UserInput{ResponseJson: response}}})
}

// Failure says that a run met an error.
func Failure(text string, recoverable bool) schema.Accepted {
	return Accept(&schema.Envelope{Payload: &schema.Envelope_Error{Error: &schema.Error{Error: text, Recoverable: &recoverable}}})
}
