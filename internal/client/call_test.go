package client_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"tidemark/broker"
	"tidemark/internal/client"
	"tidemark/schema"
)

// put stores envelopes past the edges, in one publish, as somebody with this role.
func (w *world) put(role schema.Role, envelopes ...*schema.Envelope) {
	w.Helper()
	stamp := schema.NewStamp(&schema.Source{Subject: "somebody", Role: role})
	var s broker.Submission
	for _, e := range envelopes {
		a, err := stamp.AcceptEnvelope(e, time.Now())
		w.must(err)
		s.Envelopes = append(s.Envelopes, a)
	}
	_, err := broker.Append(w.Context(), w.log.MemoryLog, schema.SessionID{Tenant: "default", Name: "s"}, s)
	w.must(err)
}

func startRun(run, request string) *schema.Envelope {
	return &schema.Envelope{RequestId: request, Payload: &schema.Envelope_StartRun{StartRun: &schema.StartRun{RunId: run}}}
}

func runStatus(run string, to schema.Status, reason string) *schema.Envelope {
	return &schema.Envelope{Payload: &schema.Envelope_RunStatus{RunStatus: &schema.RunStatus{RunId: run, Status: to, Reason: reason}}}
}

func cancels(m *schema.Cancel) *schema.Envelope {
	return &schema.Envelope{Payload: &schema.Envelope_Cancel{Cancel: m}}
}

func workFailed(seq uint64) *schema.Envelope {
	return &schema.Envelope{ReplyTo: &seq, Payload: &schema.Envelope_WorkFailed{WorkFailed: &schema.WorkFailed{Group: "tools", Attempts: 5, Reason: "The disk is full."}}}
}

func toolResult(request, call string) *schema.Envelope {
	return &schema.Envelope{RequestId: request, Payload: &schema.Envelope_ToolResult{ToolResult: &schema.ToolResult{CallId: call, ResultJson: `"done"`}}}
}

// TestCallIsOver: what can be no more is not waited for, and what ends something else ends no call. Each call is the third envelope, where a run is under way, and is waited for until its result, which comes a minute later.
func TestCallIsOver(t *testing.T) {
	const (
		user, agent, system        = schema.Role_ROLE_USER, schema.Role_ROLE_AGENT, schema.Role_ROLE_SYSTEM
		running, completed, failed = schema.Status_STATUS_RUNNING, schema.Status_STATUS_COMPLETED, schema.Status_STATUS_FAILED
		answered, unanswered       = schema.Code_CODE_UNSPECIFIED, schema.Code_CODE_INTERNAL
	)
	inRun := func(w *world) { w.put(user, startRun("r1", "rq1")); w.put(agent, runStatus("r1", running, "")) }
	outside := func(w *world) { w.append("s", "1", "2") }
	inWorkflow := func(w *world) {
		w.put(system, &schema.Envelope{Payload: &schema.Envelope_SessionCreated{SessionCreated: &schema.SessionCreated{Kind: schema.SessionKind_SESSION_KIND_WORKFLOW}}})
		w.put(user, startRun("r1", "rq1"))
	}
	broken := &schema.Envelope{Payload: &schema.Envelope_Error{Error: &schema.Error{Error: "The model is gone.", Recoverable: new(false)}}}
	hiccup := &schema.Envelope{Payload: &schema.Envelope_Error{Error: &schema.Error{Error: "The model is slow.", Recoverable: new(true)}}}
	cancelRun := func(run string) *schema.Envelope {
		return cancels(&schema.Cancel{Target: &schema.Cancel_RunId{RunId: run}, Reason: "enough"})
	}
	cancelRequest := func(request string) *schema.Envelope {
		return cancels(&schema.Cancel{Target: &schema.Cancel_RequestId{RequestId: request}, Reason: "enough"})
	}
	cancelSession := cancels(&schema.Cancel{Target: &schema.Cancel_Session{Session: true}, Reason: "enough"})

	for name, tt := range map[string]struct {
		before func(*world)
		then   func(w *world)
		code   schema.Code
		says   string
	}{
		"a result without a request":           {outside, func(w *world) { w.put(agent, toolResult("", "c")) }, answered, ""},
		"its run is cancelled":                 {inRun, func(w *world) { w.put(user, cancelRun("r1")) }, schema.Code_CODE_CANCELLED, "enough"},
		"its run is cancelled for another":     {inRun, func(w *world) { w.put(user, cancelRun("r1"), startRun("r2", "")) }, schema.Code_CODE_CANCELLED, "seq 6"},
		"its run's request is cancelled":       {inRun, func(w *world) { w.put(user, cancelRequest("rq1")) }, schema.Code_CODE_CANCELLED, "enough"},
		"the session is cancelled":             {inRun, func(w *world) { w.put(user, cancelSession) }, schema.Code_CODE_CANCELLED, "seq 4: enough"},
		"the workflow is cancelled":            {inWorkflow, func(w *world) { w.put(user, cancelRun("r1")) }, schema.Code_CODE_CANCELLED, "enough"},
		"its run is completed":                 {inRun, func(w *world) { w.put(agent, runStatus("r1", completed, "")) }, unanswered, "(completed) with seq 4."},
		"its run fails":                        {inRun, func(w *world) { w.put(agent, runStatus("r1", failed, "no money")) }, unanswered, "(failed) with seq 4: no money."},
		"its run breaks":                       {inRun, func(w *world) { w.put(agent, broken) }, unanswered, "(failed) with seq 4: The model is gone."},
		"its run is an orphan":                 {inRun, func(w *world) { w.put(system, hiccup, runStatus("r1", failed, "orphaned")) }, unanswered, "(failed) with seq 5: orphaned."},
		"the workflow is completed":            {inWorkflow, func(w *world) { w.put(agent, runStatus("r1", completed, "")) }, schema.Code_CODE_SESSION_ENDED, "has ended (completed)"},
		"the chat is closed":                   {outside, func(w *world) { w.put(agent, runStatus("", completed, "bye")) }, schema.Code_CODE_SESSION_ENDED, "with seq 4: bye."},
		"it is a dead letter":                  {outside, func(w *world) { w.put(system, workFailed(3)) }, unanswered, "The disk is full. It is a dead letter"},
		"a result behind its run's end":        {inRun, func(w *world) { w.put(agent, runStatus("r1", completed, ""), toolResult("", "c")) }, answered, ""},
		"another run is cancelled":             {inRun, func(w *world) { w.put(user, cancelRun("r2")); w.put(user, startRun("r2", "")) }, answered, ""},
		"another request is cancelled":         {inRun, func(w *world) { w.put(user, cancelRequest("rq2")) }, answered, ""},
		"another run's end comes late":         {inRun, func(w *world) { w.put(agent, runStatus("r0", completed, "")) }, answered, ""},
		"another call is a dead letter":        {inRun, func(w *world) { w.put(system, workFailed(2)) }, answered, ""},
		"an error that the run survives":       {inRun, func(w *world) { w.put(agent, hiccup) }, answered, ""},
		"a run that began behind it completes": {outside, func(w *world) { w.put(user, startRun("r2", "")); w.put(agent, runStatus("r2", completed, "")) }, answered, ""},
		"a run that began behind it ends late": {outside, func(w *world) { w.put(user, startRun("r2", "")); time.Sleep(time.Second); w.put(user, cancelRun("r2")) }, answered, ""},
	} {
		t.Run(name, func(t *testing.T) {
			inWorld(t, func(w *world) {
				tt.before(w)
				c := w.client(nil, "a:1")
				over := make(chan error, 1)
				began := time.Now()
				go func() {
					r, err := c.Call(w.Context(), "s", &schema.ToolCall{CallId: "c", Name: "ls"})
					if err == nil && r.GetResultJson() != `"done"` {
						err = errors.New("the result is " + r.String())
					}
					over <- err
				}()
				synctest.Wait()
				tt.then(w)
				ctx, stop := context.WithTimeout(w.Context(), time.Minute)
				defer stop()
				var err error
				select {
				case err = <-over:
				case <-ctx.Done():
					if tt.code != answered {
						t.Fatal("it is still waited for")
					}
					w.put(agent, toolResult("", "c"))
					err = <-over
				}
				if tt.code == answered {
					w.must(err)
					return
				}
				u, is := errors.AsType[*client.Unanswered](err)
				switch {
				case err == nil || !strings.Contains(err.Error(), tt.says) || strings.Contains(err.Error(), ".."):
					t.Errorf("it ended with %v", err)
				case tt.code == unanswered && (!is || u.By.GetSeq() < 4), tt.code != unanswered && schema.CodeOf(err) != tt.code:
					t.Errorf("it ended with %v of type %T", err, err)
				case time.Since(began) > 5*time.Second:
					t.Errorf("it ended after %s", time.Since(began))
				}
			})
		})
	}
}
