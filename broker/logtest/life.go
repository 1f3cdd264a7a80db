package logtest

import (
	"fmt"

	"tidemark/broker"
	"tidemark/schema"
)

const (
	chat     = schema.SessionKind_SESSION_KIND_CHAT
	workflow = schema.SessionKind_SESSION_KIND_WORKFLOW

	open      = schema.Status_STATUS_OPEN
	running   = schema.Status_STATUS_RUNNING
	waiting   = schema.Status_STATUS_WAITING_FOR_INPUT
	completed = schema.Status_STATUS_COMPLETED
	failed    = schema.Status_STATUS_FAILED
	cancelled = schema.Status_STATUS_CANCELLED
)

func one(a schema.Accepted) broker.Submission {
	return broker.Submission{Envelopes: []schema.Accepted{a}}
}

// step is one publish in a session's life: where the session stands afterwards, or why it was refused.
type step struct {
	envelope schema.Accepted
	want     schema.Status
	refused  schema.Code
}

// live takes the steps one after the other.
func (w *world) live(steps []step) {
	w.Helper()
	for i, s := range steps {
		if s.refused != 0 {
			w.refused(s.refused, one(s.envelope))
			continue
		}
		w.publish(s.envelope)
		if got := w.session().GetStatus(); got != s.want {
			w.Errorf("%s is %s after its step %d, want %s", w.id, got, i+1, s.want)
		}
	}
}

func testSessionStatus(w *world) {
	token := Token("m", "x")
	is := func(a schema.Accepted, want schema.Status) step { return step{envelope: a, want: want} }
	not := func(a schema.Accepted, code schema.Code) step { return step{envelope: a, refused: code} }
	// Each step has its own envelope: an id that comes again is a retry.
	start := func() step { return is(StartRun("r"), running) }
	for name, steps := range map[string][]step{
		"a workflow to its end": {
			is(Created(workflow, ""), open), start(), is(token, running), is(Waiting("?"), waiting), is(Token("m", "y"), waiting), is(Input("1"), running),
			is(RunStatus(completed), completed), not(Token("m", "z"), schema.Code_CODE_SESSION_ENDED), is(System("archived"), completed),
		},
		"a workflow that fails": {
			is(Created(workflow, ""), open), start(), is(Failure("no", true), running), is(Waiting("?"), waiting), is(Failure("no", false), failed),
			not(Input("1"), schema.Code_CODE_SESSION_ENDED),
		},
		"a workflow has one run": {
			is(Created(workflow, ""), open), start(), not(StartRun("s"), schema.Code_CODE_INVALID_TRANSITION), start(), is(RunStatusOf("s", completed), running),
			not(RunStatus(open), schema.Code_CODE_INVALID_TRANSITION), not(Created(workflow, ""), schema.Code_CODE_INVALID_TRANSITION), is(RunStatusOf("r", cancelled), cancelled),
		},
		"a chat of several runs": {
			is(Created(chat, ""), open), start(), is(RunStatusOf("r", completed), open), start(), is(Failure("no", false), open), is(Failure("no", false), open),
			is(StartRun("s"), running), not(RunStatusOf("r", completed), schema.Code_CODE_RUN_ENDED), is(RunStatus(cancelled), open), not(RunStatusOf("s", completed), schema.Code_CODE_RUN_ENDED), is(RunStatus(completed), completed),
			not(StartRun("t"), schema.Code_CODE_SESSION_ENDED),
		},
		"a chat that was not created": {
			not(Input("1"), schema.Code_CODE_NOT_WAITING), is(UserMessage("hello"), open), not(Created(chat, ""), schema.Code_CODE_INVALID_TRANSITION), not(Input("1"), schema.Code_CODE_NOT_WAITING),
			is(RunStatus(waiting), waiting), is(Input("1"), running), not(Input("2"), schema.Code_CODE_NOT_WAITING), is(RunStatus(completed), open),
		},
		"questions": {
			is(StartRun("r"), running), is(Waiting("?", "yes", "no"), waiting), not(Input(`"maybe"`), schema.Code_CODE_INVALID_RESPONSE), is(Input(`{"other":1}`), running),
			is(Waiting("?", "yes"), waiting), is(Waiting("?", "no"), waiting), not(Input(`"yes"`), schema.Code_CODE_INVALID_RESPONSE), is(Input(`"no"`), running),
			is(Waiting("?", "no"), waiting), is(RunStatus(waiting), waiting), is(Input(`"anything"`), running),
			is(Waiting("?"), waiting), is(Cancel(), open), not(Input("1"), schema.Code_CODE_NOT_WAITING),
		},
	} {
		v := w.of(ID(name))
		v.live(steps)
		f := v.follow(broker.FollowOptions{Start: broker.Start{Head: true}})
		if got, want := f.f.Attachment().Status, v.session().GetStatus(); got != want {
			w.Errorf("%s was attached at status %s, want %s", name, got, want)
		}
	}
}

// testSessionKind begins sessions in every way there is: each has a kind, live and in the registry.
func testSessionKind(w *world) {
	unspecified := schema.SessionKind_SESSION_KIND_UNSPECIFIED
	for i, c := range []struct {
		kind  schema.SessionKind
		first schema.Accepted
		want  schema.SessionKind
	}{
		{unspecified, Token("m", "x"), chat},
		{chat, Token("m", "x"), chat},
		{workflow, Token("m", "x"), workflow},
		{workflow, Created(chat, ""), chat},
		{unspecified, Created(workflow, ""), workflow},
		{workflow, Created(unspecified, ""), chat},
	} {
		v := w.of(ID(fmt.Sprint("kind ", i)))
		if _, err := v.try(broker.Submission{Envelopes: []schema.Accepted{c.first, Token("m", "y")}, Kind: c.kind}); err != nil {
			w.Fatal(err)
		}
		// Later publishes say nothing about it.
		if _, err := v.try(broker.Submission{Envelopes: []schema.Accepted{StartRun("r")}, Kind: workflow}); err != nil {
			w.Fatal(err)
		}
		check := func(when string) {
			w.Helper()
			if got := v.session().GetKind(); got != c.want {
				w.Errorf("begun as %s with %s, it is a %s %s; want %s", c.kind, c.first.Kind, got, when, c.want)
			}
		}
		check("at once")
		w.settle()
		if all := w.list("default", broker.Query{Prefix: v.id.Name, Limit: 1}); len(all) != 1 || all[0].GetKind() != c.want {
			w.Errorf("begun as %s with %s, it is listed as %v; want %s", c.kind, c.first.Kind, all, c.want)
		}
		if i%3 == 2 && w.in.Restart != nil {
			w.log = w.in.Restart(w.T)
			v.log = w.log
			check("after a restart")
		}
		v.publish(RunStatus(completed))
		if got := v.session().GetStatus(); (got == completed) != (c.want == workflow) {
			w.Errorf("begun as %s with %s, it is %s after its run", c.kind, c.first.Kind, got)
		}
	}
}

// testSessionEnds has an ended session refuse everything but notices and retries.
func testSessionEnds(w *world) {
	before := Tokens("m", 2)
	if _, err := w.try(broker.Submission{Envelopes: before, Kind: workflow}); err != nil {
		w.Fatal(err)
	}
	end := RunStatus(failed)
	r := w.publish(end)
	for round := range 2 {
		for _, a := range []schema.Accepted{
			Token("m", "x"), UserMessage("hello"), Input("1"), StartRun("r"), RunStatus(running), Waiting("?"), Failure("no", false), Cancel(), Progress("x"), Created(workflow, ""), Produced("p", 1, 1),
		} {
			w.refused(schema.Code_CODE_SESSION_ENDED, one(a))
		}
		if again := w.publish(end); !again.Duplicate || again.First != r.First {
			w.Errorf("the retry of the envelope that ended the session was answered with %+v", again)
		}
		if again := w.publish(before...); !again.Duplicate || again.First != 1 {
			w.Errorf("a retry in an ended session was answered with %+v", again)
		}
		if s := w.publish(System("archived")); s.First != r.Last+1+uint64(round) {
			w.Errorf("a notice went to %+v", s)
		}
		w.settle()
		if w.in.Restart != nil {
			w.log = w.in.Restart(w.T)
		}
	}
	w.delete()
	w.publish(Token("m", "the next history is not ended"))
}

// testSessionRefusesAllOrNone publishes several envelopes at once, of which one may not come: none is stored, and none has moved the session.
func testSessionRefusesAllOrNone(w *world) {
	w.refused(schema.Code_CODE_NOT_WAITING, broker.Submission{Envelopes: []schema.Accepted{Token("m", "x"), Input("1")}})
	if s := w.session(); s != nil {
		w.Fatalf("a refused publish began a session: %v", s)
	}
	w.refused(schema.Code_CODE_INVALID_TRANSITION, broker.Submission{Envelopes: []schema.Accepted{StartRun("a"), StartRun("b")}, Kind: workflow})
	w.publish(StartRun("a"), StartRun("b"))
	w.refused(schema.Code_CODE_NOT_WAITING, broker.Submission{Envelopes: []schema.Accepted{Waiting("?"), Input("1"), Input("2")}})
	w.refused(schema.Code_CODE_NOT_WAITING, one(Input("3")))
	w.refused(schema.Code_CODE_SESSION_ENDED, broker.Submission{Envelopes: []schema.Accepted{RunStatus(completed), RunStatus(completed), Token("m", "x")}})
	if s := w.session(); s.GetStatus() != running || s.GetHeadSeq() != 2 {
		w.Errorf("after what was refused it stands at %v", s)
	}
	w.publish(Waiting("?", "a"), Input(`"a"`), Waiting("?", "b"))
	w.refused(schema.Code_CODE_INVALID_RESPONSE, one(Input(`"a"`)))
	w.publish(Input(`"b"`), RunStatus(completed), RunStatus(cancelled), System("over"))
	if s := w.session(); s.GetStatus() != cancelled {
		w.Errorf("it stands at %v", s)
	}
}

// testSessionRemembersItsQuestion asks, and loses sight of the question: over projected pages, many envelopes and a restart.
func testSessionRemembersItsQuestion(w *world) {
	w.publish(StartRun("r"), Waiting("?", "yes", "no"))
	w.settle()
	w.fill(300, 60)
	if w.in.Restart != nil {
		w.log = w.in.Restart(w.T)
	}
	w.refused(schema.Code_CODE_INVALID_RESPONSE, one(Input(`"maybe"`)))
	if w.in.Truncate != nil {
		w.in.Truncate(w.T, w.id, 200)
		if w.in.Restart != nil {
			w.log = w.in.Restart(w.T)
		}
	}
	w.refused(schema.Code_CODE_INVALID_RESPONSE, one(Input(` "YES"`)))
	w.publish(Input(` "\u0079es"`))
	w.refused(schema.Code_CODE_NOT_WAITING, one(Input(`"no"`)))
}

func testAnswerHasOneWinner(w *world) { oneAnswer(w, w, w) }

func testAnswerOverEdges(w *world) { oneAnswer(w, w, w.otherEdge()) }

// oneAnswer has several people answer a question at once, through both worlds: exactly one answer is stored, and the others are told that the session waits no more.
func oneAnswer(w, a, b *world) {
	for round := range 10 {
		asked := a.publish(Waiting(fmt.Sprint("question ", round), "yes", "no")).Last
		var answers []<-chan answer
		var sent []schema.Accepted
		for i := range 4 {
			v := a
			if i%2 == 1 {
				v = b
			}
			sent = append(sent, Input([]string{`"yes"`, `"no"`}[i/2]))
			answers = append(answers, v.submit(one(sent[i])))
		}
		won := -1
		for i, ch := range answers {
			got := <-ch
			switch {
			case got.err != nil:
				w.refusal(schema.Code_CODE_NOT_WAITING, got.err)
			case won >= 0:
				w.Fatalf("round %d: answers %d and %d were both stored", round, won, i)
			case got.r.First != asked+1 || got.r.Duplicate:
				w.Fatalf("round %d: the answer to seq %d went to %+v", round, asked, got.r)
			default:
				won = i
			}
		}
		if won < 0 {
			w.Fatalf("round %d: nobody could answer", round)
		}
		// Who won and does not know tries again, on the other edge.
		for _, v := range []*world{a, b} {
			if again := v.publish(sent[won]); !again.Duplicate || again.First != asked+1 {
				w.Errorf("round %d: the retry of the answer that won was answered with %+v", round, again)
			}
			v.refused(schema.Code_CODE_NOT_WAITING, one(sent[(won+1)%4]))
		}
	}
}

// testAnswerRepeated retries an answer when other things have happened: it learns its place, whatever the session would say to a new one.
func testAnswerRepeated(w *world) {
	w.publish(StartRun("r"), Waiting("?", "yes"))
	a := Input(`"yes"`)
	first, twice := w.submit(one(a)), w.submit(one(a))
	x, y := <-first, <-twice
	if x.err != nil || y.err != nil || x.r.First != 3 || y.r.First != 3 || !y.r.Duplicate {
		w.Fatalf("an answer and its retry behind it were answered %+v, %v and %+v, %v", x.r, x.err, y.r, y.err)
	}
	for _, then := range []schema.Accepted{Waiting("?", "no"), RunStatus(completed), RunStatus(completed)} {
		w.publish(then)
		if r := w.publish(a); !r.Duplicate || r.First != 3 {
			w.Errorf("retried after %s, the answer went to %+v", then.Kind, r)
		}
	}
}

// testEndedOnAnotherEdge ends a session on one edge while the other knows it as it was before.
func testEndedOnAnotherEdge(w *world) {
	b := w.otherEdge()
	for i := range 10 {
		v := w.of(ID(fmt.Sprint("ended ", i)))
		u := b.of(v.id)
		if _, err := v.try(broker.Submission{Envelopes: Tokens("m", 1), Kind: workflow}); err != nil {
			w.Fatal(err)
		}
		// This edge begins nothing with it: what the first publish said holds.
		if _, err := u.try(broker.Submission{Envelopes: Tokens("m", 1), Kind: chat}); err != nil {
			w.Fatal(err)
		}
		v.publish(RunStatus(completed))
		u.refused(schema.Code_CODE_SESSION_ENDED, one(Token("m", "too late")))
		if s := u.session(); s.GetStatus() != completed || s.GetKind() != workflow {
			w.Errorf("on the other edge it stands at %v", s)
		}
	}
}

// testAnswerNamesItsQuestion has answers say what they reply to, also on another edge than the one that asked; and a run that is started again takes no question away.
func testAnswerNamesItsQuestion(w *world) {
	b := w
	if w.in.OpenEdge != nil {
		b = w.otherEdge()
	}
	w.publish(StartRun("r"))
	first := w.publish(Waiting("?", "a", "b")).First
	second := b.publish(Waiting("?", "a", "c")).First
	for _, v := range []*world{w, b} {
		v.refused(schema.Code_CODE_NOT_WAITING, one(InputTo(first, `"a"`)))
		v.refused(schema.Code_CODE_NOT_WAITING, one(InputTo(second+1, `"a"`)))
		v.refused(schema.Code_CODE_INVALID_RESPONSE, one(InputTo(second, `"b"`)))
		v.publish(StartRun("r"))
		if s := v.session(); s.GetStatus() != schema.Status_STATUS_WAITING_FOR_INPUT {
			w.Fatalf("the run was started again, and the session is %s", s.GetStatus())
		}
	}
	b.publish(InputTo(second, `"c"`))
	w.refused(schema.Code_CODE_NOT_WAITING, one(InputTo(second, `"c"`)))
	w.publish(Waiting("?"))
	w.publish(Input(`"without saying to what"`))
}
