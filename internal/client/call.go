package client

import (
	"context"
	"fmt"
	"strings"

	"github.com/oklog/ulid/v2"
	"google.golang.org/protobuf/proto"

	"tidemark/schema"
)

// Unanswered is why a call that was stored is not waited for any more: its run is over, or a group has given it up.
type Unanswered struct {
	// By is the envelope that says so: the end of a run, or a work_failed.
	By      *schema.Envelope
	message string
}

func (u *Unanswered) Error() string { return u.message }

// Call asks for a tool through a session, and waits for its result until ctx ends: it publishes the call with a request_id of its own and follows the session from there, over lost connections and edges.
// However often it has to send again, there is one call. A call without a call_id gets one; call stays the caller's. The result is the tool_result with the call's request_id and call_id, or with its call_id and
// no request_id. It may say that the tool failed, which is no error of Call's.
//
// The waiting ends before ctx where nobody is to answer any more: a [*schema.Refusal] that says cancelled where a cancel of the request, of the session or of the run hits the call, and session_ended where the session
// has ended; [*Unanswered] where the run that was under way when the call was stored is over, or a group has made a dead letter of the call. Where several groups take a session's tool calls, the first that gives
// one up ends the waiting: which of them there are, and which was to answer, a caller cannot know. Another group's result, or that of the letter redriven, may still come, to whoever reads the session; so may one
// that comes late in a chat whose run is over. What ends another run, or another request, ends no call.
//
// Other errors say why the call was not stored or the session cannot be followed; or are the context's, and then the result may still come.
func (c *Client) Call(ctx context.Context, session string, call *schema.ToolCall) (*schema.ToolResult, error) {
	request := ulid.Make().String()
	call, _ = proto.Clone(call).(*schema.ToolCall)
	if call.GetCallId() == "" {
		call.CallId = request
	}
	at, err := c.ask(ctx, session, &schema.Envelope{RequestId: request, Payload: &schema.Envelope_ToolCall{ToolCall: call}})
	if err != nil {
		return nil, err
	}
	w := &wait{session: session, request: request, call: call.GetCallId(), seq: at.First, begun: make(map[string]bool)}
	from := at.First
	for {
		r, err := w.follow(ctx, c.Follow(FollowOptions{Session: session, After: from, Epoch: at.Epoch, Types: callTypes()}))
		if r != nil || err != nil {
			return r, err
		}
		from = w.end.GetSeq()
	}
}

// callTypes is what a call's end may come as, and what tells whether a run is its own.
func callTypes() []string {
	var types []string
	for _, k := range []schema.Kind{schema.KindToolResult, schema.KindCancel, schema.KindStartRun, schema.KindRunStatus, schema.KindError, schema.KindWorkFailed} {
		types = append(types, k.String())
	}
	return types
}

// wait is a call that is waited for.
//
// Which run is under way no envelope but the run's own says, and what an agent says of a run may be about one that is over for long. So what looks like a run's end makes the wait attach anew behind it: how the session
// stands then, once all that was stored is read, tells whether a run is still under way. The server itself ends none but the run under way, and those that had been cancelled before they began.
type wait struct {
	// Static after construction.
	session, request, call string
	seq                    uint64 // of the call

	// status is the session's when the follower attached last.
	status schema.Status
	// end is what looked like the end of a run, last; nil before.
	end *schema.Envelope
	// placed: it is known whether the call was stored while a run was under way; inRun, whether it was. Where runs come and go before that can be seen, it counts as stored outside.
	placed, inRun bool
	// begun are the runs whose start_run came behind the call.
	begun map[string]bool
}

// follow reads until the call's result or why there is none; neither where it is to attach anew, behind end.
func (w *wait) follow(ctx context.Context, f *Follower) (*schema.ToolResult, error) {
	defer f.Close()
	for {
		ev, err := f.Next(ctx)
		if err != nil {
			return nil, err
		}
		switch {
		case ev.Attached != nil:
			w.status = ev.Attached.GetStatus()
		case ev.CaughtUp != nil:
			if err := w.caughtUp(); err != nil {
				return nil, err
			}
		case ev.Envelope != nil:
			if r := ev.Envelope.GetToolResult(); r != nil && w.isAnswer(ev.Envelope) {
				return r, nil
			}
			if err := w.stops(ev.Envelope); err != nil {
				return nil, err
			}
			if w.ends(ev.Envelope) {
				return nil, nil
			}
		}
	}
}

// isAnswer reports whether a result is the call's (PROTOCOL.md, "Request and reply").
func (w *wait) isAnswer(e *schema.Envelope) bool {
	return e.GetToolResult().GetCallId() == w.call && (e.GetRequestId() == "" || e.GetRequestId() == w.request)
}

// stops is why an envelope by itself is the end of the waiting. The cancel of a run makes the run's end come right behind, where it hits it.
func (w *wait) stops(e *schema.Envelope) error {
	switch p := e.GetPayload().(type) {
	case *schema.Envelope_Cancel:
		if p.Cancel.GetSession() || p.Cancel.GetRequestId() == w.request || p.Cancel.GetRunId() == w.request {
			return w.cancelled(e.GetSeq(), p.Cancel.GetReason())
		}
	case *schema.Envelope_WorkFailed:
		if e.GetReplyTo() == w.seq {
			return &Unanswered{e, fmt.Sprintf("Group %q has given up the call %q in session %q (seq %d) after %d attempts%s. It is a dead letter; redrive it, or call again.",
				p.WorkFailed.GetGroup(), w.call, w.session, e.GetSeq(), p.WorkFailed.GetAttempts(), because(p.WorkFailed.GetReason()))}
		}
	case *schema.Envelope_StartRun:
		w.place(false)
		w.begun[p.StartRun.GetRunId()] = true
	case *schema.Envelope_RunStatus:
		if schema.Ended(p.RunStatus.GetStatus()) && e.GetSource().GetRole() == schema.Role_ROLE_SYSTEM && !w.begun[p.RunStatus.GetRunId()] {
			if w.place(true); w.inRun {
				return w.over(e, false)
			}
		}
	}
	return nil
}

// ends reports whether an envelope may be the end of the run under way.
func (w *wait) ends(e *schema.Envelope) bool {
	switch p := e.GetPayload().(type) {
	case *schema.Envelope_RunStatus:
		if !schema.Ended(p.RunStatus.GetStatus()) {
			w.place(false)
			return false
		}
		w.place(true)
		w.end = e
		return true
	case *schema.Envelope_Error:
		if p.Error.Recoverable != nil && !p.Error.GetRecoverable() {
			w.place(true)
			w.end = e
			return true
		}
	}
	return false
}

// place says whether the call was stored while a run was under way, unless that is known.
func (w *wait) place(inRun bool) {
	if !w.placed {
		w.placed, w.inRun = true, inRun
	}
}

// caughtUp is why there is nothing to wait for, by how the session stands and what was read up to there.
func (w *wait) caughtUp() error {
	under := w.status == schema.Status_STATUS_RUNNING || w.status == schema.Status_STATUS_WAITING_FOR_INPUT
	w.place(under)
	if over := schema.Ended(w.status) || w.inRun && !under; !over || w.end == nil {
		return nil
	}
	return w.over(w.end, schema.Ended(w.status))
}

// over is the end of the call's run, or of the session with it.
func (w *wait) over(end *schema.Envelope, session bool) error {
	status, reason := end.GetRunStatus().GetStatus(), end.GetRunStatus().GetReason()
	if m := end.GetError(); m != nil {
		status, reason = schema.Status_STATUS_FAILED, m.GetError()
	}
	switch {
	case status == schema.Status_STATUS_CANCELLED:
		return w.cancelled(end.GetSeq(), reason)
	case session:
		return schema.Refuse(schema.Code_CODE_SESSION_ENDED, "The call %q in session %q gets no result: the session has ended (%s) with seq %d%s.", w.call, w.session, schema.StatusWord(status), end.GetSeq(), because(reason))
	default:
		return &Unanswered{end, fmt.Sprintf("The call %q in session %q gets no result: the run that it was part of has ended (%s) with seq %d%s. Call again in another run.",
			w.call, w.session, schema.StatusWord(status), end.GetSeq(), because(reason))}
	}
}

func (w *wait) cancelled(seq uint64, reason string) error {
	return schema.Refuse(schema.Code_CODE_CANCELLED, "The call %q in session %q was cancelled by seq %d%s.", w.call, w.session, seq, because(reason))
}

func because(reason string) string {
	if reason == "" {
		return ""
	}
	return ": " + strings.TrimRight(reason, ".")
}

// ask publishes one envelope, once, and returns its place.
func (c *Client) ask(ctx context.Context, session string, e *schema.Envelope) (Ack, error) {
	var at Ack
	p := c.Publisher(ctx, PublishOptions{Session: session, Acked: func(a Ack) { at = a }})
	err := p.Publish(ctx, e)
	// It waits for the answer, and for the goroutine that notes it.
	if closed := p.Close(ctx); err == nil {
		err = closed
	}
	return at, err
}
