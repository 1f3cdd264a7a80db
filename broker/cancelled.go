package broker

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"slices"
	"unicode/utf8"

	"google.golang.org/protobuf/proto"

	"tidemark/schema"
)

// What a session remembers so that late words do no harm: which runs and requests were cancelled, and which results came of tool calls that it does not know. It is part of the lifecycle, and as pure (docs/adr/0009).

// Bounds of what is remembered (I8).
const (
	// maxCancelled is how many cancelled runs and requests a session remembers; at most 400 bytes each.
	maxCancelled = 64
	// maxAnswered bounds what a session remembers of results of calls that it does not know, at 8 bytes; one that names its request takes two.
	maxAnswered = 1024
	// maxEndings bounds the runs that one publish ends as cancelled. Their envelopes come on top of the publish's own, within frameOverhead where it is as large as it may be.
	maxEndings = 8
	// endingBytes is what such an envelope takes in a frame at most.
	endingBytes = 640
	// maxEndingReason bounds what it repeats of the cancel's reason, in bytes; all of it stands in the cancel.
	maxEndingReason = 200
)

// target is a run or a request that was cancelled, or a run with the request of its start_run. Empty is what is not known.
type target struct{ request, run string }

// hits reports whether a cancel is about the run under way.
func (l *lifecycle) hits(m *schema.Cancel) bool {
	if !l.under() {
		return false
	}
	switch t := m.GetTarget().(type) {
	case *schema.Cancel_Session:
		return t.Session
	case *schema.Cancel_RunId:
		return t.RunId != "" && t.RunId == l.run
	case *schema.Cancel_RequestId:
		return t.RequestId != "" && t.RequestId == l.about.request
	default:
		return false
	}
}

// foldCancel remembers what was cancelled. It moves nothing: the end of the run is an envelope of its own.
func (l *lifecycle) foldCancel(m *schema.Cancel) {
	l.cancelCalls(m)
	if l.hits(m) {
		l.remember(target{request: l.about.request, run: l.run})
		return
	}
	l.remember(target{request: m.GetRequestId(), run: m.GetRunId()})
}

// remember keeps a target as the last that was cancelled.
func (l *lifecycle) remember(t target) {
	if t == (target{}) {
		return
	}
	kept := make([]target, 0, min(len(l.cancelled)+1, maxCancelled))
	for _, old := range l.cancelled {
		if old != t {
			kept = append(kept, old)
		}
	}
	if len(kept) == maxCancelled {
		kept = slices.Delete(kept, 0, 1)
	}
	l.cancelled = append(kept, t)
}

// isCancelled reports whether a run was cancelled, or the request that starts it.
func (l *lifecycle) isCancelled(run, request string) bool {
	for _, t := range l.cancelled {
		if t.run != "" && t.run == run || t.request != "" && t.request == request {
			return true
		}
	}
	return false
}

// cancelledWork reports whether what an envelope belongs to, which was folded just now, was cancelled before.
func (l *lifecycle) cancelledWork(e schema.Scanned) bool {
	if len(l.cancelled) == 0 || e.Kind == schema.KindCancel {
		return false
	}
	request := string(e.RequestID)
	return l.isCancelled(l.run, request) || l.isCancelled(request, "")
}

// decideLate says why an agent or a worker is too late with an envelope: what it belongs to was cancelled. A start_run may come, and is answered with the run's end. Called while something is cancelled.
func (l *lifecycle) decideLate(id schema.SessionID, e *schema.Accepted) *schema.Refusal {
	switch e.Kind {
	case schema.KindCancel, schema.KindSystem, schema.KindStartRun:
		return nil
	default:
	}
	s := saidIn(e).scan()
	if !attends(s.Role(), e.Kind, e.Payload) {
		return nil
	}
	if request := string(s.RequestID); request != "" && l.isCancelled(request, request) {
		return schema.Refuse(schema.Code_CODE_CANCELLED, "The request %q of session %s was cancelled; stop working on it.", request, id)
	}
	var m schema.RunStatus
	if e.Kind == schema.KindRunStatus && proto.Unmarshal(e.Payload, &m) == nil && l.isCancelled(m.GetRunId(), "") {
		return schema.Refuse(schema.Code_CODE_CANCELLED, "The run %q of session %s was cancelled; stop working on it.", m.GetRunId(), id)
	}
	return nil
}

// ending is the end of a cancelled run, still to be stored.
type ending struct {
	run, reason string
	// cause is the envelope that makes it come, with its seq.
	cause *schema.Accepted
	seq   uint64
}

// cancels adds to the endings what the cancel makes come, before it is folded: the end of the run under way, or of a workflow that has not begun its run.
func (l *lifecycle) cancels(seq uint64, e *schema.Accepted, due []ending) []ending {
	var m schema.Cancel
	if proto.Unmarshal(e.Payload, &m) != nil {
		return due
	}
	unbegun := m.GetSession() && l.kind == schema.SessionKind_SESSION_KIND_WORKFLOW && !l.under()
	if !l.hits(&m) && !unbegun {
		return due
	}
	return addEnding(due, ending{run: l.run, reason: m.GetReason(), cause: e, seq: seq})
}

// startsCancelled adds to the endings that of a run which was cancelled before it started, once its start is folded.
func (l *lifecycle) startsCancelled(seq uint64, e *schema.Accepted, due []ending) []ending {
	var m schema.StartRun
	if proto.Unmarshal(e.Payload, &m) != nil {
		return due
	}
	if s := saidIn(e).scan(); !l.isCancelled(m.GetRunId(), string(s.RequestID)) {
		return due
	}
	return addEnding(due, ending{run: m.GetRunId(), reason: "It was cancelled before it started.", cause: e, seq: seq})
}

// addEnding adds an ending, unless there is one of the same run.
func addEnding(due []ending, e ending) []ending {
	if slices.ContainsFunc(due, func(other ending) bool { return other.run == e.run }) {
		return due
	}
	return append(due, e)
}

// owes reports whether the ending still has to come behind all of the publish. Not where something else in it ended what it was about; and what names a run must not end one that has no name.
func (l *lifecycle) owes(d *ending) bool {
	switch {
	case schema.Ended(l.status):
		return false
	case l.kind == schema.SessionKind_SESSION_KIND_WORKFLOW:
		// Its one run, which may have got its name meanwhile.
		d.run = l.run
		return true
	case d.run == "":
		return l.run == "" && l.under()
	case !l.under():
		return d.cause.Kind == schema.KindStartRun
	default:
		return l.run != ""
	}
}

// systemStamp is what Tidemark's own envelopes bear.
var systemStamp = schema.NewStamp(&schema.Source{Subject: "tidemark", Role: schema.Role_ROLE_SYSTEM}) //nolint:gochecknoglobals // a constant

// envelope makes the ending: the same for the same cause, wherever it is made.
func (d *ending) envelope() (schema.Accepted, error) {
	var cause schema.Envelope
	if err := proto.Unmarshal(d.cause.Bytes, &cause); err != nil {
		return schema.Accepted{}, err
	}
	sum := sha256.Sum256([]byte(string(d.cause.ID[:]) + d.run))
	id := d.cause.ID
	copy(id[6:], sum[:])
	reason := d.reason
	if len(reason) > maxEndingReason {
		end := maxEndingReason
		for !utf8.RuneStart(reason[end]) {
			end--
		}
		reason = reason[:end]
	}
	return systemStamp.AcceptEnvelope(&schema.Envelope{
		Id: id.String(), Time: cause.GetTime(), ReplyTo: &d.seq,
		Payload: &schema.Envelope_RunStatus{RunStatus: &schema.RunStatus{RunId: d.run, Status: schema.Status_STATUS_CANCELLED, Reason: reason}},
	}, cause.GetTime().AsTime())
}

// callHash names a tool call among those that a session only knows by their results. Whoever chooses ids cannot make two calls meet.
func callHash(request []byte, call string) uint64 {
	h := sha256.New()
	h.Write(request)
	h.Write([]byte{0})
	h.Write([]byte(call))
	return binary.BigEndian.Uint64(h.Sum(nil))
}

// anyRequest stands for the requests of a call's results that name one. No request_id is so long.
var anyRequest = bytes.Repeat([]byte{0}, schema.MaxIDBytes+1) //nolint:gochecknoglobals // a constant

// wasAnswered reports whether a call that the session does not know has its result. One that names no request is of whatever call has this id, and answers it for every request: calls of one id in several requests have results that name them.
func (l *lifecycle) wasAnswered(request []byte, call string) bool {
	if len(l.answered) == 0 {
		return false
	}
	other := anyRequest
	if len(request) > 0 {
		other = nil
	}
	return slices.Contains(l.answered, callHash(request, call)) || slices.Contains(l.answered, callHash(other, call))
}

// answer remembers a call that the session does not know as the last that was answered.
func (l *lifecycle) answer(request []byte, call string) {
	next := []uint64{callHash(request, call)}
	if len(request) > 0 {
		next = append(next, callHash(anyRequest, call))
	}
	kept := slices.DeleteFunc(slices.Clone(l.answered), func(h uint64) bool { return slices.Contains(next, h) })
	l.answered = append(kept[max(0, len(kept)-maxAnswered+len(next)):], next...)
}
