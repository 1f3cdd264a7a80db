package recording

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"time"

	"google.golang.org/protobuf/proto"

	"tidemark/schema"
)

const (
	// maxOpen bounds what a reader keeps per message: open calls, unanswered calls, parts of text, choices.
	maxOpen = 1024
	// maxArguments bounds one call's arguments. They are kept until they are complete, to check that they are JSON.
	maxArguments = 4 << 20
	// publisherBytes is room for what is added to an envelope on its way: id, seq, time, source, producer, request id.
	publisherBytes = 1 << 10
)

// script writes the envelopes that the readers of all formats have in common: messages, calls, the run around them.
type script struct {
	prefix     string
	format     Format
	withoutRun bool

	// lineNo is the line that is being read, steps is what it made.
	lineNo int
	steps  []Step
	// recorded is the time that lines said and no envelope has used yet, if timed.
	recorded time.Duration
	timed    bool
	pace     pace
	// err is the first envelope's that could not be made; nothing is made after it.
	err error

	runID string
	// turns counts the model's turns, lastID and again make equal ids in a row different.
	turns  int
	lastID string
	again  int
	// failure says why the last message failed; empty if it did not.
	failure string
	// waiting: the run waits for a person.
	waiting bool
	// unanswered has the calls of the last turn that have no result.
	unanswered map[string]bool
}

// call is a tool's call whose arguments are being streamed.
type call struct {
	id, name  string
	messageID string
	// head and tail surround arguments that are streamed as bare text and quoted into a JSON string on the way; both empty where the provider streams JSON.
	head, tail string
	gathered   []byte
	done       bool
}

// beginTurn names the message that a turn of the model is going to write, and begins the run before the first. The provider's id may be empty.
func (s *script) beginTurn(id, model string) string {
	s.turns++
	if id == "" {
		id = "message-" + strconv.Itoa(s.turns)
	}
	if id == s.lastID {
		// Some servers give every message the same id.
		s.again++
		id += "#" + strconv.Itoa(s.again+1)
	} else {
		s.lastID, s.again = id, 0
	}
	s.failure, s.unanswered = "", nil
	s.beginRun(id, model)
	if s.waiting {
		s.waiting = false
		s.status(schema.Status_STATUS_RUNNING, "The stream goes on after the question.")
	}
	return s.prefix + id
}

func (s *script) beginRun(id, model string) {
	if s.runID != "" {
		return
	}
	s.runID = s.prefix + "run-" + id
	if s.withoutRun {
		return
	}
	metadata, err := json.Marshal(struct {
		Format string `json:"format"`
		Model  string `json:"model,omitempty"`
	}{s.format.String(), model})
	if err != nil {
		s.failed(err)
		return
	}
	s.emit(&schema.Envelope{Payload: &schema.Envelope_StartRun{StartRun: &schema.StartRun{RunId: s.runID, MetadataJson: string(metadata)}}})
}

// endRun closes the run at the end of the stream.
func (s *script) endRun() {
	switch {
	case s.runID == "" || s.waiting:
	case s.failure != "":
		s.status(schema.Status_STATUS_FAILED, s.failure)
	case len(s.unanswered) > 0:
		calls := sortedKeys(s.unanswered)
		s.status(schema.Status_STATUS_COMPLETED, fmt.Sprintf("The recording ends before %d tool calls were answered; the first is %s.", len(calls), calls[0]))
	default:
		s.status(schema.Status_STATUS_COMPLETED, "")
	}
}

func (s *script) status(status schema.Status, reason string) {
	if s.withoutRun {
		return
	}
	s.emit(&schema.Envelope{Payload: &schema.Envelope_RunStatus{RunStatus: &schema.RunStatus{RunId: s.runID, Status: status, Reason: reason}}})
}

// token adds text to a message. Empty text, as many providers send it at the beginning, makes nothing.
func (s *script) token(messageID string, channel schema.Channel, text string) {
	if text == "" {
		return
	}
	s.emit(&schema.Envelope{Payload: &schema.Envelope_Token{Token: &schema.Token{MessageId: messageID, Channel: channel, Text: text}}})
}

// complete closes a message. usage is the raw value: missing, null or an object.
func (s *script) complete(messageID, finish string, usage json.RawMessage) {
	if !present(usage) {
		usage = nil
	}
	s.emit(&schema.Envelope{Payload: &schema.Envelope_MessageCompleted{MessageCompleted: &schema.MessageCompleted{
		MessageId: messageID, FinishReason: finish, UsageJson: string(usage),
	}}})
}

// fail says that a message failed, or, with an empty messageID, that the provider did.
func (s *script) fail(messageID, sentence, code string) {
	if sentence == "" {
		sentence = "The provider reported an error without saying which."
	}
	s.beginRun("error", "")
	s.failure = sentence
	s.emit(&schema.Envelope{Payload: &schema.Envelope_ChatError{ChatError: &schema.ChatError{MessageId: messageID, Error: sentence, Code: code}}})
}

// cut says that the stream of a message stopped in the middle.
func (s *script) cut(messageID string) {
	s.fail(messageID, "The stream ends before the message was complete.", "incomplete")
}

// startCall announces a tool's call. An empty id is replaced by one made from the message and the place.
func (s *script) startCall(messageID, id, name string, place int) *call {
	if id == "" {
		id = messageID + "/call-" + strconv.Itoa(place+1)
	} else {
		id = s.prefix + id
	}
	if name == "" {
		// The name is required and some servers leave it out.
		name = "unnamed"
	}
	c := &call{id: id, name: name, messageID: messageID}
	s.emit(&schema.Envelope{Payload: &schema.Envelope_ToolCall{ToolCall: &schema.ToolCall{CallId: id, Name: name, MessageId: messageID}}})
	if s.unanswered == nil {
		s.unanswered = make(map[string]bool)
	}
	if s.unanswered[id] = true; len(s.unanswered) > maxOpen {
		s.failed(s.refuse("is the call of more than %d tools in one message", maxOpen))
	}
	return c
}

// arguments streams a piece of a call's arguments.
func (s *script) arguments(c *call, piece string) {
	if piece == "" || c.done {
		return
	}
	if c.tail != "" {
		piece = escape(piece)
	}
	if len(c.gathered) == 0 {
		piece = c.head + piece
	}
	s.rawArguments(c, piece)
}

// rawArguments streams a piece as it is.
func (s *script) rawArguments(c *call, piece string) {
	if len(c.gathered)+len(piece) > maxArguments {
		s.failed(schema.Refuse(schema.Code_CODE_TOO_LARGE, "Line %d of the recording: the arguments of call %s have more than %d bytes.", s.lineNo, c.id, maxArguments))
		return
	}
	c.gathered = append(c.gathered, piece...)
	s.emit(&schema.Envelope{Payload: &schema.Envelope_ToolCall{ToolCall: &schema.ToolCall{CallId: c.id, ArgumentsDelta: piece, MessageId: c.messageID}}})
}

// endCall says that a call's arguments are complete. whole has all of them as JSON, for providers that did not stream them; where there are none either, the call has none: {}.
func (s *script) endCall(c *call, whole string) {
	if c.done {
		return
	}
	c.done = true
	last := &schema.ToolCall{CallId: c.id, MessageId: c.messageID, Done: true}
	if len(c.gathered) > 0 {
		if c.tail != "" {
			last.ArgumentsDelta = c.tail
			c.gathered = append(c.gathered, c.tail...)
		}
		whole = string(c.gathered)
	} else {
		if whole = string(bytes.TrimSpace([]byte(whole))); whole == "" {
			whole = "{}"
		}
		last.ArgumentsJson = whole
	}
	c.gathered = nil
	if !json.Valid([]byte(whole)) {
		// A model that ran into its length limit, or that cannot count braces. The call was announced, so its followers must hear that it will never be complete.
		s.emit(&schema.Envelope{Payload: &schema.Envelope_ChatError{ChatError: &schema.ChatError{
			MessageId: c.messageID, Error: fmt.Sprintf("The arguments of call %s (%s) are not complete JSON.", c.id, c.name), Code: "invalid_arguments",
		}}})
		delete(s.unanswered, c.id)
		return
	}
	s.emit(&schema.Envelope{Payload: &schema.Envelope_ToolCall{ToolCall: last}})
}

// result answers a call. raw is kept byte for byte; null and nothing are the same.
func (s *script) result(callID string, raw json.RawMessage, failure string) {
	if !present(raw) {
		raw = nil
	}
	delete(s.unanswered, callID)
	s.emit(&schema.Envelope{Payload: &schema.Envelope_ToolResult{ToolResult: &schema.ToolResult{CallId: callID, ResultJson: string(raw), Error: failure}}})
}

// ask stops the run for a person's approval. context is a JSON object.
func (s *script) ask(prompt string, context json.RawMessage) {
	s.waiting = true
	s.emit(&schema.Envelope{Payload: &schema.Envelope_WaitingForInput{WaitingForInput: &schema.WaitingForInput{
		Prompt: prompt, Options: []string{"approve", "deny"}, ContextJson: string(context),
	}}})
}

// cite passes a citation on.
func (s *script) cite(messageID string, raw json.RawMessage) {
	if !present(raw) {
		return
	}
	data := append([]byte(`{"message_id":"`+escape(messageID)+`","citation":`), raw...)
	s.emit(&schema.Envelope{Payload: &schema.Envelope_Custom{Custom: &schema.Custom{Type: TypeCitation, ContentType: "application/json", Data: append(data, '}')}}})
}

func (s *script) emit(e *schema.Envelope) {
	if s.err != nil {
		return
	}
	if size := proto.Size(e); size > schema.MaxEnvelopeBytes-publisherBytes {
		s.err = schema.Refuse(schema.Code_CODE_TOO_LARGE, "Line %d of the recording makes an envelope of %d bytes; at most %d are allowed. Break it into shorter ones.",
			s.lineNo, size, schema.MaxEnvelopeBytes-publisherBytes)
		return
	}
	if err := e.Validate(); err != nil {
		wrong := schema.AsRefusal(err)
		s.err = schema.Refuse(wrong.Code, "Line %d of the recording makes an envelope of type %s that is refused: %s", s.lineNo, e.Type(), wrong.Message)
		return
	}
	// The natural pace is asked even where a time was recorded, so that its sequence does not depend on it.
	after := s.pace.after(e)
	if s.timed {
		after, s.recorded = s.recorded, 0
	}
	s.steps = append(s.steps, Step{After: after, Envelope: e})
}

func (s *script) failed(err error) {
	if s.err == nil {
		s.err = err
	}
}

func sortedKeys[K cmp.Ordered, V any](m map[K]V) []K { return slices.Sorted(maps.Keys(m)) }

// escape writes text as the inside of a JSON string.
func escape(text string) string {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(text); err != nil {
		panic("recording: " + err.Error()) //nolint:forbidigo // a string cannot fail to encode into memory
	}
	quoted := bytes.TrimSuffix(b.Bytes(), []byte("\n"))
	return string(quoted[1 : len(quoted)-1])
}

// reported is an error as providers report it: an object with message and code or type, or bare text.
func reported(raw json.RawMessage) (sentence, code string) {
	if !present(raw) {
		return "", ""
	}
	var fields struct {
		Message string          `json:"message"`
		Type    string          `json:"type"`
		Code    json.RawMessage `json:"code"`
	}
	if json.Unmarshal(raw, &sentence) == nil {
		return sentence, ""
	}
	if err := json.Unmarshal(raw, &fields); err != nil {
		return string(raw), ""
	}
	// The code is a word, a number or null.
	if code = fields.Type; present(fields.Code) {
		code = string(bytes.Trim(fields.Code, `"`))
	}
	if fields.Message == "" {
		return string(raw), code
	}
	return fields.Message, code
}
