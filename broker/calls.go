package broker

import (
	"crypto/sha256"
	"encoding/binary"
	"slices"

	"google.golang.org/protobuf/proto"

	"tidemark/schema"
)

// The tool calls that a session remembers, so that each has one result, and that one which was cancelled has none. It is part of the lifecycle, and as pure (docs/adr/0009).

// Bounds of what is remembered of calls, at 40 bytes each (I8).
const (
	// maxOpenCalls is how many calls without a result are remembered; the oldest is forgotten, and then is one that the session never saw.
	maxOpenCalls = 512
	// maxSettledCalls is how many are that have their result or were cancelled.
	maxSettledCalls = 512
)

// call is a tool call that was stored. Its names are hashes, 0 for none: see nameHash.
type call struct {
	id, request uint64
	// run is the one that was under way, asked the request of its start_run; only of an open call.
	run, asked uint64
	fate       schema.CallFate
}

func (c call) open() bool { return c.fate == schema.CallFate_CALL_FATE_OPEN }

// hit reports whether a cancel is about the call. It is about the same calls as those whose workers are told: see seenCancel.hits.
func (c call) hit(m *schema.Cancel) bool {
	switch t := m.GetTarget().(type) {
	case *schema.Cancel_Session:
		return t.Session
	case *schema.Cancel_RunId:
		h := nameHash(t.RunId)
		return h != 0 && (h == c.run || h == c.request)
	case *schema.Cancel_RequestId:
		h := nameHash(t.RequestId)
		return h != 0 && (h == c.request || h == c.asked)
	default:
		return false
	}
}

// nameHash stands for a call_id, a request_id or a run_id. Whoever chooses names cannot make two of them meet. 0 is the empty one.
func nameHash[T string | []byte](name T) uint64 {
	if len(name) == 0 {
		return 0
	}
	sum := sha256.Sum256([]byte(name))
	return max(1, binary.BigEndian.Uint64(sum[:]))
}

// callNamed finds the call of these very names; -1 for none.
func (l *lifecycle) callNamed(request, id uint64) int {
	return slices.IndexFunc(l.calls, func(c call) bool { return c.id == id && c.request == request })
}

// callOf finds the call that a result is of; -1 where the session remembers none, and the result may be of one that it never saw.
//
// A result that names a request is of the call of that request, or of one without a request. One that names none is of the call without, or of the oldest that is open of those with its call_id: so there are as many
// results as there are calls. A result of no open call is a second one of the call that had one last, whatever request it names, unless there is another call with this id that still waits: then that call's request may be all that is wrong.
func (l *lifecycle) callOf(request, id uint64) int {
	exact := l.callNamed(request, id)
	if exact >= 0 && (l.calls[exact].open() || request != 0) {
		return exact
	}
	last, waits := -1, false
	for i, c := range l.calls {
		if c.id != id {
			continue
		}
		if c.open() && (request == 0 || c.request == 0) {
			return i
		}
		last, waits = i, waits || c.open()
	}
	switch {
	case exact >= 0:
		return exact
	case waits:
		return -1
	default:
		return last
	}
}

// decideResult says why a call takes no result.
func (l *lifecycle) decideResult(id schema.SessionID, e *schema.Accepted) *schema.Refusal {
	var m schema.ToolResult
	if proto.Unmarshal(e.Payload, &m) != nil {
		return nil
	}
	s := saidIn(e).scan()
	answered := false
	if i := l.callOf(nameHash(s.RequestID), nameHash(m.GetCallId())); i < 0 {
		answered = l.wasAnswered(s.RequestID, m.GetCallId())
	} else {
		if l.calls[i].fate == schema.CallFate_CALL_FATE_CANCELLED && attends(s.Role(), e.Kind, e.Payload) {
			return refuseCancelledCall(id, m.GetCallId())
		}
		answered = l.calls[i].fate == schema.CallFate_CALL_FATE_ANSWERED
	}
	if answered {
		return schema.Refuse(schema.Code_CODE_ALREADY_ANSWERED, "The tool call %q in session %s has its result already; a call has one, and the first counts.", m.GetCallId(), id)
	}
	return nil
}

func refuseCancelledCall(id schema.SessionID, name string) *schema.Refusal {
	return schema.Refuse(schema.Code_CODE_CANCELLED, "The tool call %q of session %s was cancelled; stop working on it.", name, id)
}

// decideCall says why a call does not go on: it was cancelled while its arguments were streamed.
func (l *lifecycle) decideCall(id schema.SessionID, e *schema.Accepted) *schema.Refusal {
	if !slices.ContainsFunc(l.calls, func(c call) bool { return c.fate == schema.CallFate_CALL_FATE_CANCELLED }) {
		return nil
	}
	var m schema.ToolCall
	if proto.Unmarshal(e.Payload, &m) != nil || !goesOn(&m) {
		return nil
	}
	s := saidIn(e).scan()
	i := l.callNamed(nameHash(s.RequestID), nameHash(m.GetCallId()))
	if i < 0 || l.calls[i].fate != schema.CallFate_CALL_FATE_CANCELLED || !attends(s.Role(), e.Kind, e.Payload) {
		return nil
	}
	return refuseCancelledCall(id, m.GetCallId())
}

// goesOn reports whether an envelope only goes on with a call whose arguments are streamed: its first one names the tool.
func goesOn(m *schema.ToolCall) bool {
	return m.GetName() == "" && m.GetArgumentsJson() == "" && (m.GetArgumentsDelta() != "" || m.GetDone())
}

// foldCall takes in a call, which waits for its result from now on, though one of the same names had its own before: there are models that name their calls anew in each turn.
func (l *lifecycle) foldCall(e said, m *schema.ToolCall) {
	s := e.scan()
	c := call{
		id: nameHash(m.GetCallId()), request: nameHash(s.RequestID), run: nameHash(l.run), asked: nameHash(l.about.request),
		fate: schema.CallFate_CALL_FATE_OPEN,
	}
	i := l.callNamed(c.request, c.id)
	if i >= 0 && (l.calls[i] == c || goesOn(m)) {
		return
	}
	if l.cancelledWork(s) {
		c = c.settled(schema.CallFate_CALL_FATE_CANCELLED)
	}
	l.putCall(i, c)
}

// foldResult takes in the result of a call.
func (l *lifecycle) foldResult(e said, m *schema.ToolResult) {
	s := e.scan()
	i := l.callOf(nameHash(s.RequestID), nameHash(m.GetCallId()))
	if i < 0 {
		l.answer(s.RequestID, m.GetCallId())
		return
	}
	l.putCall(i, l.calls[i].settled(schema.CallFate_CALL_FATE_ANSWERED))
}

// cancelCalls takes in what a cancel does to the calls that wait.
func (l *lifecycle) cancelCalls(m *schema.Cancel) {
	if !slices.ContainsFunc(l.calls, func(c call) bool { return c.open() && c.hit(m) }) {
		return
	}
	kept, hit := make([]call, 0, len(l.calls)), []call(nil)
	for _, c := range l.calls {
		if c.open() && c.hit(m) {
			hit = append(hit, c.settled(schema.CallFate_CALL_FATE_CANCELLED))
		} else {
			kept = append(kept, c)
		}
	}
	l.calls = boundCalls(append(kept, hit...))
}

func (c call) settled(fate schema.CallFate) call {
	return call{id: c.id, request: c.request, fate: fate}
}

// putCall puts a call behind all others, in the place of the one at i; -1 for none.
func (l *lifecycle) putCall(i int, c call) {
	kept := make([]call, 0, len(l.calls)+1)
	for j, other := range l.calls {
		if j != i {
			kept = append(kept, other)
		}
	}
	l.calls = boundCalls(append(kept, c))
}

// boundCalls forgets the oldest calls beyond the bounds.
func boundCalls(calls []call) []call {
	open := 0
	for _, c := range calls {
		if c.open() {
			open++
		}
	}
	tooMany := map[bool]int{true: open - maxOpenCalls, false: len(calls) - open - maxSettledCalls}
	if tooMany[true] <= 0 && tooMany[false] <= 0 {
		return calls
	}
	return slices.DeleteFunc(calls, func(c call) bool {
		tooMany[c.open()]--
		return tooMany[c.open()] >= 0
	})
}
