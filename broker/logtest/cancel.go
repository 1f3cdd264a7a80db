package logtest

import (
	"fmt"

	"tidemark/broker"
	"tidemark/schema"
)

// by accepts an envelope of somebody with a role, for a request.
func by(role schema.Role, request string, e *schema.Envelope) schema.Accepted {
	e.RequestId = request
	return acceptOf(role.String(), role, e)
}

const (
	asAgent = schema.Role_ROLE_AGENT
	asUser  = schema.Role_ROLE_USER
)

func resultOf(call string) *schema.Envelope {
	return &schema.Envelope{Payload: &schema.Envelope_ToolResult{ToolResult: &schema.ToolResult{CallId: call}}}
}

func startOf(run string) *schema.Envelope {
	return &schema.Envelope{Payload: &schema.Envelope_StartRun{StartRun: &schema.StartRun{RunId: run}}}
}

// CancelRun asks that a run ends.
func CancelRun(run string) schema.Accepted {
	return Accept(&schema.Envelope{Payload: &schema.Envelope_Cancel{Cancel: &schema.Cancel{Target: &schema.Cancel_RunId{RunId: run}, Reason: "enough of " + run}}})
}

// CancelRequest asks that the work of a request ends.
func CancelRequest(request string) schema.Accepted {
	return Accept(&schema.Envelope{Payload: &schema.Envelope_Cancel{Cancel: &schema.Cancel{Target: &schema.Cancel_RequestId{RequestId: request}}}})
}

// ended wants the envelope with this seq to be Tidemark's own word that the run was cancelled, on account of the envelope with seq because.
func (w *world) ended(seq, because uint64, run, reason string) {
	w.Helper()
	all := w.all()
	if seq > uint64(len(all)) {
		w.Fatalf("%s ends at seq %d; the end of run %q is wanted at %d", w.id, len(all), run, seq)
	}
	e := all[seq-1].env
	s := e.GetRunStatus()
	if e.GetSeq() != seq || s.GetStatus() != cancelled || s.GetRunId() != run || s.GetReason() != reason || e.GetSource().GetRole() != schema.Role_ROLE_SYSTEM || e.GetSource().GetSubject() != "tidemark" ||
		e.GetReplyTo() != because || e.GetId() == "" || e.GetTime() == nil {
		w.Errorf("at seq %d stands %v, want the end of run %q because of seq %d: %s", seq, e, run, because, reason)
	}
}

// testCancelEndsTheRun cancels the run under way: its end stands right behind the publish, which is answered with its own place alone, also when it is tried again.
func testCancelEndsTheRun(w *world) {
	for name, kind := range map[string]schema.SessionKind{"a workflow": workflow, "a chat": chat} {
		v := w.of(ID(name))
		v.publish(Created(kind, ""), by(asUser, "q", startOf("r")), Waiting("?"))
		stop := []schema.Accepted{CancelRun("r"), UserMessage("stop")}
		if r := v.publish(stop...); r.First != 4 || r.Last != 5 {
			w.Errorf("%s: the cancel went to %+v", name, r)
		}
		v.ended(6, 4, "r", "enough of r")
		if r := v.publish(stop...); !r.Duplicate || r.First != 4 || r.Last != 5 || v.head() != 6 {
			w.Errorf("%s: the cancel tried again went to %+v; the head is %d", name, r, v.head())
		}
		want := map[schema.SessionKind]schema.Status{workflow: cancelled, chat: open}[kind]
		if s := v.session(); s.GetStatus() != want {
			w.Errorf("%s is %s afterwards, want %s", name, s.GetStatus(), want)
		}
		late := map[schema.SessionKind]schema.Code{workflow: schema.Code_CODE_SESSION_ENDED, chat: schema.Code_CODE_CANCELLED}[kind]
		v.refused(late, one(by(asAgent, "q", tokenOf("m", "late"))))
		if kind == chat {
			if r := v.publish(Token("m", "the chat goes on")); r.First != 7 {
				w.Errorf("behind the end, an envelope went to %+v", r)
			}
		}
	}
}

// testCancelBeforeTheRun cancels a run, and a request, before they start: what starts them is stored, and their end behind it. What is remembered outlives pages, many envelopes and a restart.
func testCancelBeforeTheRun(w *world) {
	w.publish(CancelRun("r"), CancelRequest("q"), by(asAgent, "p", resultOf("c")))
	w.settle()
	w.fill(300, 60)
	if w.in.Restart != nil {
		w.log = w.in.Restart(w.T)
	}
	head := w.head()
	w.publish(by(asAgent, "o", startOf("r")))
	w.ended(head+2, head+1, "r", "It was cancelled before it started.")
	w.publish(by(asUser, "q", startOf("s")))
	w.ended(head+4, head+3, "s", "It was cancelled before it started.")
	w.refused(schema.Code_CODE_ALREADY_ANSWERED, one(by(asAgent, "p", resultOf("c"))))
	for _, request := range []string{"o", "q", "r", "s"} {
		w.refused(schema.Code_CODE_CANCELLED, one(by(asAgent, request, tokenOf("m", "late"))))
	}
	w.publish(by(asUser, "q", tokenOf("m", "a user's words are never too late")), by(asAgent, "n", tokenOf("m", "nor those of another request")))
}

// testCancelOverEdges cancels through another edge than the one on which the agent is at work, while it is: behind the cancel there is the end and nothing else of the run, and all of it is in one frame.
func testCancelOverEdges(w *world) {
	b := w.otherEdge()
	for i := range 10 {
		v, u := w.of(ID(fmt.Sprint("cancelled ", i))), b.of(ID(fmt.Sprint("cancelled ", i)))
		v.publish(by(asUser, "q", startOf("r")))
		var sent []<-chan answer
		for n := range 40 {
			sent = append(sent, v.submit(one(by(asAgent, "q", tokenOf("m", fmt.Sprint(n))))))
		}
		at := u.publish(CancelRun("r")).First
		for _, ch := range sent {
			switch got := <-ch; {
			case got.err != nil:
				v.refusal(schema.Code_CODE_CANCELLED, got.err)
			case got.r.First > at:
				w.Errorf("the agent's envelope at seq %d came behind the cancel at %d", got.r.First, at)
			}
		}
		u.ended(at+1, at, "r", "enough of r")
		if v.head() != at+1 || u.session().GetStatus() != open {
			w.Errorf("behind the cancel at %d it stands at %v", at, u.session())
		}
	}
}

func testAnsweredOnce(w *world) { answeredOnce(w, w, w) }

func testAnsweredOnceOverEdges(w *world) { answeredOnce(w, w, w.otherEdge()) }

// answeredOnce has several workers send the result of a call at once: one is stored, the others are told, and who won may ask again.
func answeredOnce(w, a, b *world) {
	for round := range 10 {
		request := fmt.Sprint("request ", round)
		var answers []<-chan answer
		var sent []schema.Accepted
		for i := range 4 {
			sent = append(sent, by(asAgent, request, resultOf("c")))
			answers = append(answers, []*world{a, b}[i%2].submit(one(sent[i])))
		}
		won, place := -1, uint64(0)
		for i, ch := range answers {
			got := <-ch
			switch {
			case got.err != nil:
				w.refusal(schema.Code_CODE_ALREADY_ANSWERED, got.err)
			case won >= 0:
				w.Fatalf("round %d: results %d and %d were both stored", round, won, i)
			default:
				won, place = i, got.r.First
			}
		}
		if won < 0 {
			w.Fatalf("round %d: no result was stored", round)
		}
		for _, v := range []*world{a, b} {
			if again := v.publish(sent[won]); !again.Duplicate || again.First != place {
				w.Errorf("round %d: the retry of the result that was stored was answered with %+v", round, again)
			}
			v.refused(schema.Code_CODE_ALREADY_ANSWERED, one(sent[(won+1)%4]))
		}
	}
	w.refused(schema.Code_CODE_ALREADY_ANSWERED, broker.Submission{Envelopes: []schema.Accepted{by(asAgent, "both", resultOf("c")), by(asAgent, "both", resultOf("c"))}})
}

func callOf(call string) *schema.Envelope {
	return &schema.Envelope{Payload: &schema.Envelope_ToolCall{ToolCall: &schema.ToolCall{CallId: call, Name: "ls"}}}
}

// again opens the log anew where that is possible, and has projections catch up before: what is remembered has to be in a page.
func (w *world) again() {
	w.settle()
	if w.in.Restart != nil {
		w.log = w.in.Restart(w.T)
	}
}

// testCallsNamedAnew has a model name its calls alike in every turn, with a request and without: each time there is one result, under whatever request a second one comes.
func testCallsNamedAnew(w *world) {
	for _, request := range []string{"r", ""} {
		for turn := range 3 {
			w.publish(by(asAgent, request, callOf("call_0")))
			if turn == 1 {
				w.again()
			}
			won := by(asAgent, request, resultOf("call_0"))
			place := w.publish(won)
			if r := w.publish(won); !r.Duplicate || r.First != place.First {
				w.Errorf("request %q, turn %d: the result sent again is answered with %+v", request, turn, r)
			}
			for _, late := range []string{"r", "made up", ""} {
				w.refused(schema.Code_CODE_ALREADY_ANSWERED, one(by(asAgent, late, resultOf("call_0"))))
			}
		}
	}
	w.publish(by(asAgent, "never seen", resultOf("call_9")))
}

// testCancelledCalls cancels a run in each way that there is. The calls that were open in it have no result, whatever their own request is and whether or not the result names it; a person may still give one.
func testCancelledCalls(w *world) {
	for name, cancel := range map[string]schema.Accepted{"the run": CancelRun("r"), "its request": CancelRequest("q"), "the session": Cancel()} {
		v := w.of(ID(name))
		v.publish(Created(chat, ""), by(asUser, "q", startOf("r")), by(asAgent, "q", callOf("c1")), by(asAgent, "own", callOf("c2")), by(asAgent, "", callOf("c3")), by(asAgent, "", callOf("done")))
		v.publish(by(asAgent, "", resultOf("done")))
		v.publish(cancel)
		v.again()
		w.log = v.log
		v.refused(schema.Code_CODE_ALREADY_ANSWERED, one(by(asAgent, "", resultOf("done"))))
		for _, call := range []string{"c1", "c2", "c3"} {
			for _, request := range []string{"", "q", "own", "made up"} {
				v.refused(schema.Code_CODE_CANCELLED, one(by(asAgent, request, resultOf(call))))
			}
		}
		v.publish(by(asUser, "own", resultOf("c2")))
		v.publish(by(asUser, "n", startOf("next")), by(asAgent, "", callOf("c3")), by(asAgent, "", resultOf("c3")))
	}
}

// testRunEndsOnce says of runs that have ended that they end, and that they go on: it is refused, also long after and after a restart, until they are started again. What ended them may be sent again.
func testRunEndsOnce(w *world) {
	end := RunStatusOf("r", completed)
	w.publish(Created(chat, ""), StartRun("r"))
	place := w.publish(end)
	w.publish(StartRun("s"), CancelRun("s"))
	w.ended(6, 5, "s", "enough of s")
	w.again()
	if r := w.publish(end); !r.Duplicate || r.First != place.First {
		w.Errorf("the end that is sent again is answered with %+v", r)
	}
	for run, code := range map[string]schema.Code{"r": schema.Code_CODE_RUN_ENDED, "s": schema.Code_CODE_CANCELLED} {
		for _, status := range []schema.Status{completed, failed, cancelled, running, waiting} {
			w.refused(code, one(RunStatusOf(run, status)))
		}
	}
	w.refused(schema.Code_CODE_RUN_ENDED, broker.Submission{Envelopes: []schema.Accepted{StartRun("t"), RunStatusOf("t", failed), RunStatusOf("t", completed)}})
	// The agent of the run that was cancelled would close the chat with its last word.
	w.refused(schema.Code_CODE_RUN_ENDED, one(by(asAgent, "", &schema.Envelope{Payload: &schema.Envelope_RunStatus{RunStatus: &schema.RunStatus{Status: failed}}})))
	w.publish(StartRun("r"), RunStatusOf("r", running), RunStatusOf("r", failed))
	for i := range 64 {
		run := fmt.Sprint("run ", i)
		w.publish(StartRun(run), RunStatusOf(run, completed))
	}
	w.again()
	for i := range 64 {
		w.refused(schema.Code_CODE_RUN_ENDED, one(RunStatusOf(fmt.Sprint("run ", i), failed)))
	}
	w.publish(RunStatusOf("r", failed)) // of so long ago that it is forgotten
	if s := w.session().GetStatus(); s != open {
		w.Errorf("behind it, the chat is %s", s)
	}
}
