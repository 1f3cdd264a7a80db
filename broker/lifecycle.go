package broker

import (
	"cmp"
	"time"

	"google.golang.org/protobuf/proto"

	"tidemark/schema"
)

// lifecycle is where a session stands in its life, as its envelopes say (DESIGN section 7; docs/adr/0006). It is pure: no clock, socket or goroutine. decide says whether an envelope may come next, fold what
// it changes. It is a value: a copy is folded on without touching the original.
//
//	open -> running -> waiting_for_input -> running -> completed | failed | cancelled
//
// A workflow is one run and ends with it. A chat is open between runs until somebody closes it. A run is under way while the status is running or waiting_for_input.
//
// These hold after every fold, and TestLifecycleIsNeverImpossible checks them:
//
//  1. kind and status are unspecified before the first envelope, and never again.
//  2. A question is open if, and only if, the status is waiting_for_input. Only an open question has options.
//  3. An open chat has no run.
//  4. What has ended does not change.
//  5. Only an open question has a deadline, and then a default answer.
//  6. Nothing is known about a run where none is under way.
//  7. A run under way has not ended. Only an open chat had its last run ended by Tidemark.
type lifecycle struct {
	kind   schema.SessionKind
	status schema.Status
	// run is the name of the run under way, or of the one that a workflow ended with; empty where it has no name, and where there is none, as in a chat between its runs and after them.
	run string
	// prompt is the seq of the open question; 0 for none.
	prompt uint64
	// options are the answers that the open question allows; empty where any is. Never changed in place.
	options []string
	// deadline is when the open question is answered with fallback, which is JSON; zero where never.
	deadline time.Time
	fallback string
	// about is what else is known of the run under way.
	about runFacts
	// cancelled is what was cancelled last, oldest first. Never changed in place.
	cancelled []target
	// calls are the tool calls, in the order in which something became of them, and answered those that were answered though the session does not know them, by their hashes. Never changed in place.
	calls    []call
	answered []uint64
	// ended are the runs of a chat that ended last, oldest first. Never changed in place.
	ended []endedRun
	// overruled is the last run of a chat where Tidemark ended it and its agent did not, until another begins.
	overruled endedRun
	// metadata is a JSON object, as given when the session was created; empty for none.
	metadata string
}

// runFacts is what is known of a run under way beside its name.
type runFacts struct {
	// request is the request_id of the start_run; empty where it had none, or there was none.
	request string
	// orphanAfter is how long the run may be without its agent; 0: as the deployment has it.
	orphanAfter time.Duration
	// attended: an agent or a worker has said something since it began; see [attends].
	attended bool
}

// said is an envelope as the lifecycle sees it: its kind, what it says, and, for the few that are looked at closer, all its bytes.
type said struct {
	kind    schema.Kind
	payload []byte
	bytes   []byte
}

func saidIn(e *schema.Accepted) said { return said{e.Kind, e.Payload, e.Bytes} }

// scan reads what is beside the payload. What is stored, and what was accepted, can be scanned.
func (e said) scan() schema.Scanned {
	s, _ := schema.Scan(e.bytes)
	return s
}

// attends reports whether an envelope is a word of who does a run's work: an agent's or a worker's always; an admin's where it is none that a person, or an operator, sends as well. The backend of a desktop application has an
// admin's token, and so has its UI.
func attends(r schema.Role, kind schema.Kind, payload []byte) bool {
	if r != schema.Role_ROLE_ADMIN {
		return r == schema.Role_ROLE_AGENT || r == schema.Role_ROLE_WORKER
	}
	switch kind {
	case schema.KindUserMessage, schema.KindUserInput, schema.KindCancel, schema.KindCustom, schema.KindSystem:
		return false
	case schema.KindRunStatus:
		var m schema.RunStatus
		return proto.Unmarshal(payload, &m) == nil && !schema.Ended(m.GetStatus())
	default:
		return true
	}
}

// take lets a publish's envelopes come one behind the other, the first behind head, and returns where the session stands then; or why one of them may not come, and nothing has. kind is what the session becomes
// where they are its first. own are the envelopes that Tidemark itself puts right behind them, in the same frame: the ends of runs that they cancel, or that had been cancelled and are started by them.
func (l *lifecycle) take(id schema.SessionID, kind schema.SessionKind, head uint64, envelopes []schema.Accepted) (next lifecycle, own []schema.Accepted, refusal *schema.Refusal) {
	next = *l
	if next.status == schema.Status_STATUS_UNSPECIFIED {
		next.begin(kind)
	}
	var due []ending
	for i := range envelopes {
		e := &envelopes[i]
		if refusal := next.decide(id, e); refusal != nil {
			return *l, nil, refusal
		}
		head++
		if e.Kind == schema.KindCancel {
			due = next.cancels(head, e, due)
		}
		next.fold(head, saidIn(e))
		if e.Kind == schema.KindStartRun && len(next.cancelled) > 0 {
			due = next.startsCancelled(head, e, due)
		}
	}
	if len(due) == 0 {
		return next, nil, nil
	}
	if len(due) > maxEndings {
		return *l, nil, schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "The publish to session %s would end %d runs as cancelled; at most %d are possible in one.", id, len(due), maxEndings)
	}
	for i := range due {
		if !next.owes(&due[i]) {
			continue
		}
		e, err := due[i].envelope()
		if err != nil {
			return *l, nil, schema.AsRefusal(err)
		}
		head++
		next.fold(head, saidIn(&e))
		own = append(own, e)
	}
	return next, own, nil
}

// moves reports whether an envelope of this kind may move a session that has begun and not ended, or is remembered. The others need no decision, and no decoding.
func moves(kind schema.Kind) bool {
	switch kind {
	case schema.KindSessionCreated, schema.KindStartRun, schema.KindRunStatus, schema.KindWaitingForInput, schema.KindUserInput, schema.KindError, schema.KindToolCall, schema.KindToolResult, schema.KindCancel:
		return true
	default:
		return false
	}
}

// begin says what the session becomes with its first envelope, unless that is a SessionCreated.
func (l *lifecycle) begin(kind schema.SessionKind) { l.kind = kindOf(kind) }

// kindOf is the kind that is meant: unspecified means chat.
func kindOf(k schema.SessionKind) schema.SessionKind {
	if k == schema.SessionKind_SESSION_KIND_WORKFLOW {
		return k
	}
	return schema.SessionKind_SESSION_KIND_CHAT
}

// under reports whether a run is under way.
func (l *lifecycle) under() bool {
	return l.status == schema.Status_STATUS_RUNNING || l.status == schema.Status_STATUS_WAITING_FOR_INPUT
}

// decide says why the envelope may not come next; nil where it may. The payload was validated.
func (l *lifecycle) decide(id schema.SessionID, e *schema.Accepted) *schema.Refusal {
	kind, payload := e.Kind, e.Payload
	if schema.Ended(l.status) {
		if kind == schema.KindSystem || kind == schema.KindWorkFailed {
			return nil
		}
		return schema.Refuse(schema.Code_CODE_SESSION_ENDED, "Session %s has ended (%s) and takes nothing more but system; go on in another session.", id, schema.StatusWord(l.status))
	}
	if len(l.cancelled) > 0 {
		if refusal := l.decideLate(id, e); refusal != nil {
			return refusal
		}
	}
	switch kind {
	case schema.KindSessionCreated:
		if l.status != schema.Status_STATUS_UNSPECIFIED {
			return schema.Refuse(schema.Code_CODE_INVALID_TRANSITION, "Session %s has begun already; session_created can only be the first envelope of a session.", id)
		}
	case schema.KindStartRun:
		if l.kind == schema.SessionKind_SESSION_KIND_WORKFLOW && l.run != "" {
			var m schema.StartRun
			if proto.Unmarshal(payload, &m) == nil && m.GetRunId() != l.run {
				return schema.Refuse(schema.Code_CODE_INVALID_TRANSITION, "Session %s is the workflow of run %q and has no second one; start run %q in another session.", id, l.run, m.GetRunId())
			}
		}
	case schema.KindRunStatus:
		return l.decideStatus(id, e)
	case schema.KindToolResult:
		return l.decideResult(id, e)
	case schema.KindToolCall:
		return l.decideCall(id, e)
	case schema.KindUserInput:
		return l.decideInput(id, e)
	default:
		// The others may always come.
	}
	return nil
}

// decideInput says why the open question does not take an answer. An answer that names what it replies to is for that question alone: whoever gave it may not have seen the one that is open now.
func (l *lifecycle) decideInput(id schema.SessionID, e *schema.Accepted) *schema.Refusal {
	if l.prompt == 0 {
		return schema.Refuse(schema.Code_CODE_NOT_WAITING, "Session %s waits for no answer: no question is open, or somebody else has answered it.", id)
	}
	if s, err := schema.Scan(e.Bytes); err == nil && s.ReplyTo != 0 && s.ReplyTo != l.prompt {
		return schema.Refuse(schema.Code_CODE_NOT_WAITING, "The answer is to seq %d, and the open question of session %s is seq %d; answer that one, or without reply_to.", s.ReplyTo, id, l.prompt)
	}
	if len(l.options) == 0 {
		return nil
	}
	var m schema.UserInput
	if proto.Unmarshal(e.Payload, &m) != nil {
		return nil
	}
	if schema.Allows(l.options, m.GetResponseJson()) {
		return nil
	}
	return schema.Refuse(schema.Code_CODE_INVALID_RESPONSE, "The answer is none of the %d that the question of session %s, seq %d, allows; send one of its options.", len(l.options), id, l.prompt)
}

// fold takes in the envelope with this seq, which came next.
func (l *lifecycle) fold(seq uint64, e said) {
	first := l.status == schema.Status_STATUS_UNSPECIFIED
	if first {
		l.kind, l.status = kindOf(l.kind), schema.Status_STATUS_OPEN
	}
	if schema.Ended(l.status) {
		return
	}
	if moves(e.kind) {
		l.move(seq, first, e)
	}
	if l.under() && !l.about.attended {
		s := e.scan()
		l.about.attended = attends(s.Role(), e.kind, e.payload)
	}
}

// move takes in an envelope of a kind that moves.
func (l *lifecycle) move(seq uint64, first bool, e said) {
	switch e.kind {
	case schema.KindSessionCreated:
		var m schema.SessionCreated
		if first && proto.Unmarshal(e.payload, &m) == nil {
			l.kind, l.metadata = kindOf(m.GetKind()), m.GetMetadataJson()
		}
	case schema.KindStartRun:
		var m schema.StartRun
		if proto.Unmarshal(e.payload, &m) == nil {
			s := e.scan()
			l.start(m.GetRunId(), string(s.RequestID), time.Duration(min(m.GetOrphanAfterMs(), schema.MaxOrphanAfterMs))*time.Millisecond)
		}
	case schema.KindRunStatus:
		var m schema.RunStatus
		if proto.Unmarshal(e.payload, &m) == nil {
			s := e.scan()
			l.foldStatus(seq, m.GetRunId(), m.GetStatus(), s.Role())
		}
	case schema.KindWaitingForInput:
		var m schema.WaitingForInput
		if proto.Unmarshal(e.payload, &m) == nil {
			l.ask(seq, m.GetOptions())
			if m.Deadline != nil {
				l.deadline, l.fallback = m.GetDeadline().AsTime(), m.GetDefaultJson()
			}
		}
	case schema.KindUserInput:
		if l.prompt != 0 {
			l.stand(schema.Status_STATUS_RUNNING)
		}
	case schema.KindError:
		var m schema.Error
		if proto.Unmarshal(e.payload, &m) == nil && m.Recoverable != nil && !m.GetRecoverable() && (l.under() || l.kind == schema.SessionKind_SESSION_KIND_WORKFLOW) {
			l.rememberEnd(endedRun{run: l.run, status: schema.Status_STATUS_FAILED, byError: true})
			l.end(schema.Status_STATUS_FAILED)
		}
	case schema.KindToolResult:
		var m schema.ToolResult
		if proto.Unmarshal(e.payload, &m) == nil {
			l.foldResult(e, &m)
		}
	case schema.KindToolCall:
		var m schema.ToolCall
		if proto.Unmarshal(e.payload, &m) == nil {
			l.foldCall(e, &m)
		}
	case schema.KindCancel:
		var m schema.Cancel
		if proto.Unmarshal(e.payload, &m) == nil {
			l.foldCancel(&m)
		}
	default:
		// moves says no.
	}
}

// start begins a run. To start the run that is under way changes nothing, its open question least of all: a retry with another id means no more, and everybody who may start a run could take the question away.
// In a workflow, which has one run, a name is that of the run under way if it has none yet.
//
// To start a run that was cancelled takes the place of no other: its end comes right behind.
func (l *lifecycle) start(run, request string, orphanAfter time.Duration) {
	cancelled := l.isCancelled(run, request)
	if cancelled {
		l.remember(target{request: request, run: run})
	}
	under := l.under() && (run == l.run || l.run == "" && l.kind == schema.SessionKind_SESSION_KIND_WORKFLOW)
	if cancelled && !under && l.under() && l.run != "" {
		return
	}
	l.forgetEnd(run)
	if l.run = run; !under {
		l.stand(schema.Status_STATUS_RUNNING)
		l.about = runFacts{}
	}
	if l.about.request == "" {
		l.about.request = request
	}
	if l.about.orphanAfter == 0 {
		l.about.orphanAfter = orphanAfter
	}
}

// foldStatus takes in what is said of a run. What is said of another run than the one under way does not move the session. Where the run under way has no name yet, or none is under way, a name that comes with
// the word that it runs, or waits, is its own.
func (l *lifecycle) foldStatus(seq uint64, run string, to schema.Status, by schema.Role) {
	if schema.Ended(to) {
		l.rememberEnd(endedRun{run: cmp.Or(run, l.run), status: to})
	}
	if run != "" && l.run != "" && run != l.run {
		return
	}
	switch {
	case to == schema.Status_STATUS_RUNNING:
		l.stand(to)
	case to == schema.Status_STATUS_WAITING_FOR_INPUT:
		l.ask(seq, nil)
	case !schema.Ended(to):
		return
	case l.under(), l.kind == schema.SessionKind_SESSION_KIND_WORKFLOW:
		last := endedRun{run: cmp.Or(run, l.run), status: to}
		if l.end(to); by == schema.Role_ROLE_SYSTEM && l.status == schema.Status_STATUS_OPEN {
			l.overruled = last
		}
	case run == "":
		// A chat with no run under way: this closes it.
		l.stand(to)
	default:
		// A run of a chat that is over, or that never was.
		return
	}
	if run != "" && l.status != schema.Status_STATUS_OPEN {
		l.run = run
	}
}

// ask opens a question in the place of the one that is open, if any.
func (l *lifecycle) ask(seq uint64, options []string) {
	l.stand(schema.Status_STATUS_WAITING_FOR_INPUT)
	l.prompt, l.options = seq, options
}

// stand moves the session to a status; no question is open.
func (l *lifecycle) stand(status schema.Status) {
	l.status, l.prompt, l.options = status, 0, nil
	l.deadline, l.fallback = time.Time{}, ""
	l.overruled = endedRun{}
}

// end ends the run, and a workflow with it. A chat is open again.
func (l *lifecycle) end(with schema.Status) {
	if l.kind == schema.SessionKind_SESSION_KIND_CHAT {
		l.run, with = "", schema.Status_STATUS_OPEN
	}
	l.stand(with)
	l.about = runFacts{}
}
