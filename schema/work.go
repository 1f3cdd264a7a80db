package schema

import (
	"encoding/json"
	"slices"
	"strings"
)

// workKinds are the kinds whose envelopes are work: somebody must handle them (DESIGN section 6).
var workKinds = [...]Kind{KindToolCall, KindStartRun, KindUserMessage, KindUserInput, KindCancel} //nolint:gochecknoglobals // a table that nothing writes

// WorkKinds are the kinds whose envelopes make work items, in the order of their numbers. The slice is the caller's.
func WorkKinds() []Kind { return slices.Clone(workKinds[:]) }

// IsWork says whether an envelope of this kind makes a work item. It is asked for every envelope.
func IsWork(k Kind) bool {
	switch k {
	case KindToolCall, KindStartRun, KindUserMessage, KindUserInput, KindCancel:
		return true
	default:
		return false
	}
}

// Allows says whether a question with these options takes an answer, which is valid JSON. An answer that is no string is beyond the options: a form's object, a number.
func Allows(options []string, response string) bool {
	response = strings.TrimLeft(response, " \t\r\n")
	if len(options) == 0 || !strings.HasPrefix(response, `"`) {
		return true
	}
	var text string
	return json.Unmarshal([]byte(response), &text) != nil || slices.Contains(options, text)
}
