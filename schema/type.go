package schema

import "strings"

// Kind is the number of a payload's field in [Envelope]: what kind of event an envelope is. 0 is none, or one that this version does not know.
//
// The numbers 8–13 and 16–99 of Envelope are payloads and nothing else, so that a payload of a later version is recognised as one: see [IsPayload].
type Kind int32

// The kinds, in the order of their numbers.
const (
	KindToken            Kind = 8
	KindMessageCompleted Kind = 9
	KindToolCall         Kind = 10
	KindToolResult       Kind = 11
	KindWorkflowProgress Kind = 12
	KindCustom           Kind = 13
	KindSessionCreated   Kind = 16
	KindStartRun         Kind = 17
	KindRunStatus        Kind = 18
	KindSystem           Kind = 19
	KindUserMessage      Kind = 20
	KindAgentMessage     Kind = 21
	KindChatError        Kind = 22
	KindWaitingForInput  Kind = 23
	KindUserInput        Kind = 24
	KindCancel           Kind = 25
	KindError            Kind = 26
	KindWorkFailed       Kind = 27
)

// unknownType is the type, in the JSON form, of an envelope whose payload this version does not know.
const unknownType = "unknown"

// kindNames has the type of every kind as the JSON form says it, at the kind's number.
var kindNames = [...]string{ //nolint:gochecknoglobals // a table that nothing writes
	KindToken:            "token",
	KindMessageCompleted: "message_completed",
	KindToolCall:         "tool_call",
	KindToolResult:       "tool_result",
	KindWorkflowProgress: "workflow_progress",
	KindCustom:           "custom",
	KindSessionCreated:   "session_created",
	KindStartRun:         "start_run",
	KindRunStatus:        "run_status",
	KindSystem:           "system",
	KindUserMessage:      "user_message",
	KindAgentMessage:     "agent_message",
	KindChatError:        "chat_error",
	KindWaitingForInput:  "workflow_waiting_for_input",
	KindUserInput:        "user_input",
	KindCancel:           "cancel",
	KindError:            "error",
	KindWorkFailed:       "work_failed",
}

// waitingForInputField is the one field name in Envelope that differs from the type in the JSON form.
const waitingForInputField = "waiting_for_input"

// Known says whether k is a kind of this version.
func (k Kind) Known() bool {
	return k > 0 && int(k) < len(kindNames) && kindNames[k] != ""
}

// String is the type as the JSON form says it. A kind that is not known is "unknown", so that the words are a closed set that can label a metric.
func (k Kind) String() string {
	if !k.Known() {
		return unknownType
	}
	return kindNames[k]
}

// IsPayload says whether a field number of [Envelope] is a payload's, of this version or of a later one.
func IsPayload(field int32) bool {
	return field >= 8 && field <= 13 || field >= 16 && field <= 99
}

// Kinds returns every known kind in the order of the numbers. The slice is the caller's.
func Kinds() []Kind {
	var kinds []Kind
	for k := range Kind(len(kindNames)) {
		if k.Known() {
			kinds = append(kinds, k)
		}
	}
	return kinds
}

// ParseType finds the kind with this name: the type in the JSON form, or the name of the field in [Envelope], which differ for one kind only
// (workflow_waiting_for_input, waiting_for_input). A name that is not known is refused with [Code_CODE_UNKNOWN_TYPE].
func ParseType(name string) (Kind, error) {
	if k := parseType(name); k != 0 {
		return k, nil
	}
	return 0, Refuse(Code_CODE_UNKNOWN_TYPE, "The type %q is not known here. What an application defines itself is sent as type 'custom'.", clip(name))
}

// ParseTypes finds the kinds that a filter names, as [ParseType] does for one. of is what filters, as a sentence has it: `The tail`.
func ParseTypes(of string, names []string) ([]Kind, error) {
	var kinds []Kind
	for _, name := range names {
		k := parseType(name)
		if k == 0 {
			return nil, Refuse(Code_CODE_UNKNOWN_TYPE, "%s asks for the type %q, which is no payload's; the payload types, which PROTOCOL.md lists, are %s.", of, clip(name), Words(Kinds()))
		}
		kinds = append(kinds, k)
	}
	return kinds, nil
}

// Words are kinds as a sentence names them.
func Words(kinds []Kind) string {
	var words []string
	for _, k := range kinds {
		words = append(words, k.String())
	}
	return strings.Join(words, ", ")
}

func parseType(name string) Kind {
	if name == "" {
		return 0
	}
	for k, known := range kindNames {
		if known == name {
			return Kind(k)
		}
	}
	if name == waitingForInputField {
		return KindWaitingForInput
	}
	return 0
}

// clip shortens what a client sent to what a sentence bears. It may cut a character in two; the sentence quotes it.
func clip(s string) string {
	const most = 64
	if len(s) <= most {
		return s
	}
	return s[:most] + "…"
}

// Type is the envelope's type as the JSON form says it; "unknown" where the payload is missing or of a later version.
func (e *Envelope) Type() string { return e.Kind().String() }

// Kind is the number of the payload's field, 0 where the payload is missing or of a later version.
func (e *Envelope) Kind() Kind {
	switch e.GetPayload().(type) {
	case *Envelope_Token:
		return KindToken
	case *Envelope_MessageCompleted:
		return KindMessageCompleted
	case *Envelope_ToolCall:
		return KindToolCall
	case *Envelope_ToolResult:
		return KindToolResult
	case *Envelope_WorkflowProgress:
		return KindWorkflowProgress
	case *Envelope_Custom:
		return KindCustom
	case *Envelope_SessionCreated:
		return KindSessionCreated
	case *Envelope_StartRun:
		return KindStartRun
	case *Envelope_RunStatus:
		return KindRunStatus
	case *Envelope_System:
		return KindSystem
	case *Envelope_UserMessage:
		return KindUserMessage
	case *Envelope_AgentMessage:
		return KindAgentMessage
	case *Envelope_ChatError:
		return KindChatError
	case *Envelope_WaitingForInput:
		return KindWaitingForInput
	case *Envelope_UserInput:
		return KindUserInput
	case *Envelope_Cancel:
		return KindCancel
	case *Envelope_Error:
		return KindError
	case *Envelope_WorkFailed:
		return KindWorkFailed
	}
	return 0
}
