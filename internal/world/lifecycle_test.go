package world

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/oklog/ulid/v2"

	"tidemark/schema"
)

// What agents and people say about a run.

func startRun(run string) *schema.Envelope {
	return &schema.Envelope{Id: ulid.Make().String(), Payload: &schema.Envelope_StartRun{StartRun: &schema.StartRun{RunId: run}}}
}

func runStatus(run string, status schema.Status) *schema.Envelope {
	return &schema.Envelope{Id: ulid.Make().String(), Payload: &schema.Envelope_RunStatus{RunStatus: &schema.RunStatus{RunId: run, Status: status}}}
}

func question(prompt string, options ...string) *schema.Envelope {
	return &schema.Envelope{Id: ulid.Make().String(), Payload: &schema.Envelope_WaitingForInput{WaitingForInput: &schema.WaitingForInput{Prompt: prompt, Options: options}}}
}

func answer(text string) *schema.Envelope {
	return &schema.Envelope{Id: ulid.Make().String(), Payload: &schema.Envelope_UserInput{UserInput: &schema.UserInput{ResponseJson: fmt.Sprintf("%q", text)}}}
}

func progress(step string) *schema.Envelope {
	return &schema.Envelope{Id: ulid.Make().String(), Payload: &schema.Envelope_WorkflowProgress{WorkflowProgress: &schema.WorkflowProgress{Step: step, Message: "so far"}}}
}

func system(text string) *schema.Envelope {
	return &schema.Envelope{Id: ulid.Make().String(), Payload: &schema.Envelope_System{System: &schema.System{Message: text}}}
}

// joinAs is Join with a user's token.
func (w *World) joinAs(e *Edge, way Way, session, subject string) *Peer {
	w.t.Helper()
	var first *schema.Attach
	if way == SessionSocket {
		first = &schema.Attach{Channel: 1, Session: session, Start: &schema.Attach_Head{Head: true}}
	}
	return w.DialAs(e, way, Dial{Token: w.tokenOf("", subject, schema.Role_ROLE_USER, "*")}, first)
}

// answered waits for what became of a publish: the place, or the refusal.
func (p *Peer) answered(id uint64) (Ack, *schema.Rejected) {
	p.w.t.Helper()
	var a Ack
	f := p.want(fmt.Sprintf("publish %d answered", id), func(f *schema.ServerFrame) bool {
		if f.GetRejected() != nil {
			return f.GetRejected().GetPublishId() == id
		}
		for _, k := range f.GetPublished().GetAcks() {
			if k.GetPublishId() == id {
				a = Ack{k.GetFirstSeq(), k.GetLastSeq(), k.GetDuplicate(), f.GetPublished().GetDurability()}
				return true
			}
		}
		return false
	})
	return a, f.GetRejected()
}

// TestTwoUsersAnswerAtOnce: two people on two edges answer the same question in the same moment, by every pair of ways. Exactly one wins, the other is told that nobody waits any more; both read the same.
// Who sends the same answer again hears the same.
func TestTwoUsersAnswerAtOnce(t *testing.T) {
	Run(t, Config{Latency: time.Millisecond}, func(w *World) {
		won := [2]int{}
		for _, a := range Ways() {
			for _, b := range Ways() {
				session := fmt.Sprint(a, " and ", b)
				agent := w.Join(w.Edge(0), ProtoSocket, session)
				readers := [2]*Reader{w.Read(session, ReaderOptions{Ways: []Way{a}, Edges: []*Edge{w.Edge(0)}}), w.Read(session, ReaderOptions{Ways: []Way{b}, Edges: []*Edge{w.Edge(1)}})}
				agent.Put(session, startRun("r1"))
				users := [2]*Peer{w.joinAs(w.Edge(0), a, session, "ana"), w.joinAs(w.Edge(1), b, session, "bo")}
				for range 4 {
					head := agent.Put(session, question("Which?", "this", "that")).Last
					for _, r := range readers {
						r.Wait(head)
					}
					said := [2]*schema.Envelope{answer("this"), answer("that")}
					var ids [2]uint64
					for i, p := range users {
						ids[i] = p.Publish(session, said[i])
					}
					winner := -1
					for i, p := range users {
						ack, refused := p.answered(ids[i])
						switch {
						case refused == nil && winner >= 0:
							t.Fatalf("%s: both won", session)
						case refused == nil:
							winner = i
							if ack.First != head+1 {
								t.Errorf("%s: the answer to the question at %d is at %d", session, head, ack.First)
							}
						case refused.GetCode() != schema.Code_CODE_NOT_WAITING || refused.GetRetryable():
							t.Errorf("%s: who lost is told %v", session, refused)
						}
					}
					if winner < 0 {
						t.Fatalf("%s: nobody won", session)
					}
					won[winner]++
					head++
					if ack, refused := users[winner].answered(users[winner].Publish(session, said[winner])); refused != nil || !ack.Duplicate || ack.First != head {
						t.Errorf("%s: who won asked again and is told %+v, %v", session, ack, refused)
					}
					if _, refused := users[1-winner].answered(users[1-winner].Publish(session, said[1-winner])); refused.GetCode() != schema.Code_CODE_NOT_WAITING {
						t.Errorf("%s: who lost asked again and is told %v", session, refused)
					}
				}
				all := w.Edge(1).Stored(session)
				if len(all) != 9 {
					t.Errorf("%s: %d envelopes are stored; 4 questions with an answer each are 9", session, len(all))
				}
				for _, r := range readers {
					r.WantSame(all)
				}
			}
		}
		t.Logf("the users won %v times", won)
		if won[0] == 0 || won[1] == 0 {
			t.Errorf("one edge always wins; it is not shown that the other can")
		}
	})
}

// TestOneWorkflowByEveryWay: its agent, its users and those who look on come by different ways and edges, and find it in the same state at every step; once it has ended, it takes a notice and nothing else.
func TestOneWorkflowByEveryWay(t *testing.T) {
	Run(t, Config{}, func(w *World) {
		for i, way := range Ways() {
			session := "a workflow by " + way.String()
			w.must(w.Call(w.Edge(0), "CreateSession", &schema.CreateSessionRequest{Session: session, Kind: schema.SessionKind_SESSION_KIND_WORKFLOW}, new(schema.CreateSessionResponse)))
			agent, user := w.Join(w.Edge(i%2), way, session), w.joinAs(w.Edge((i+1)%2), Ways()[(i+2)%5], session, "ana")
			var readers []*Reader
			for k, out := range Ways() {
				readers = append(readers, w.Read(session, ReaderOptions{Ways: []Way{out}, Edges: []*Edge{w.Edge(k % 2)}}))
			}
			// stands wants everybody to find the session so, whatever way they come.
			stands := func(head uint64, status schema.Status) {
				t.Helper()
				for _, r := range readers {
					r.Wait(head)
				}
				for k, e := range []*Edge{w.Edge(0), w.Edge(1)} {
					var res schema.GetSessionResponse
					w.must(w.Call(e, "GetSession", &schema.GetSessionRequest{Session: session}, &res))
					if s := res.GetSession(); s.GetStatus() != status || s.GetHeadSeq() != head || s.GetKind() != schema.SessionKind_SESSION_KIND_WORKFLOW {
						t.Errorf("%s: at %d on edge %d it is %v", session, head, k, s)
					}
					for _, out := range Ways() {
						p := w.Follow(e, out, &schema.Attach{Session: session, Start: &schema.Attach_Head{Head: true}})
						if a := p.WantAttached(); a.GetStatus() != status || a.GetHeadSeq() != head {
							t.Errorf("%s: at %d on edge %d by %s it is %v", session, head, k, out, a)
						}
						p.Close()
					}
				}
				w.Settle()
				var listed schema.ListSessionsResponse
				w.must(w.Call(w.Edge(1), "ListSessions", &schema.ListSessionsRequest{Status: status, Prefix: session}, &listed))
				if len(listed.GetSessions()) != 1 {
					t.Errorf("%s: at %d, of those that are %s: %v", session, head, status, listed.GetSessions())
				}
			}
			stands(1, schema.Status_STATUS_OPEN)
			agent.Put(session, startRun("r1"))
			stands(2, schema.Status_STATUS_RUNNING)
			user.WantRejected(user.Publish(session, answer("yes")), schema.Code_CODE_NOT_WAITING)
			agent.WantRejected(agent.Publish(session, startRun("r2")), schema.Code_CODE_INVALID_TRANSITION)
			agent.Put(session, Token("low "))
			agent.Put(session, question("Go on?", "yes", "no"))
			stands(4, schema.Status_STATUS_WAITING_FOR_INPUT)
			user.WantRejected(user.Publish(session, answer("maybe")), schema.Code_CODE_INVALID_RESPONSE)
			user.Put(session, answer("yes"))
			stands(5, schema.Status_STATUS_RUNNING)
			agent.Put(session, Token("tide"))
			agent.Put(session, runStatus("r1", schema.Status_STATUS_COMPLETED))
			stands(7, schema.Status_STATUS_COMPLETED)
			agent.WantRejected(agent.Publish(session, Token("more")), schema.Code_CODE_SESSION_ENDED)
			user.WantRejected(user.Publish(session, UserMessage("wait")), schema.Code_CODE_SESSION_ENDED)
			agent.Put(session, system("it is over"))
			all := w.Edge(0).Stored(session)
			if got := Texts(all); got != "low tide" || len(all) != 8 {
				t.Errorf("%s: %d envelopes are stored, and read %q", session, len(all), got)
			}
		}
	})
}

// wantDone wants the session socket to end because the session has, in this status.
func (p *Peer) wantDone(status string) {
	p.w.t.Helper()
	end := p.WantEnd(schema.Code_CODE_UNSPECIFIED)
	closed, _ := errors.AsType[websocket.CloseError](end.Err)
	if closed.Code != websocket.StatusNormalClosure || closed.Reason != status {
		p.w.t.Errorf("it should be closed with 1000 %s; it ended with %s", status, end)
	}
}

// TestComingBackToWhatHasEnded: who is connected when a session ends hears its end and stays; who comes later by the session socket is sent what is missing and goes, also when NATS and the edges have been
// started anew; other ways stay for as long as they like.
func TestComingBackToWhatHasEnded(t *testing.T) {
	ends := []struct {
		status schema.Status
		word   string
		end    func() *schema.Envelope
	}{
		{schema.Status_STATUS_COMPLETED, "completed", func() *schema.Envelope { return runStatus("r1", schema.Status_STATUS_COMPLETED) }},
		{schema.Status_STATUS_FAILED, "failed", func() *schema.Envelope { return runStatus("r1", schema.Status_STATUS_FAILED) }},
		{schema.Status_STATUS_CANCELLED, "cancelled", func() *schema.Envelope { return runStatus("r1", schema.Status_STATUS_CANCELLED) }},
		{schema.Status_STATUS_FAILED, "failed", func() *schema.Envelope {
			return &schema.Envelope{Id: ulid.Make().String(), Payload: &schema.Envelope_Error{Error: &schema.Error{Error: "it broke", Recoverable: new(bool)}}}
		}},
	}
	Run(t, Config{}, func(w *World) {
		for i, c := range ends {
			session := fmt.Sprint("ends ", i)
			agent := w.Join(w.Edge(0), SessionSocket, session)
			var live []*Peer
			for _, way := range Ways() {
				p := w.Follow(w.Edge(1), way, &schema.Attach{Session: session})
				p.WantAttached()
				live = append(live, p)
			}
			agent.Put(session, startRun("r1"))
			agent.Put(session, Token("all of it"))
			agent.Put(session, c.end())
			for _, p := range live {
				p.WantEvents(3)
				p.inbox = nil // acknowledgements, and where it stood
				p.WantNothing(5 * time.Second)
			}
			if got := agent.Put(session, system("a notice")); got.First != 4 {
				t.Errorf("%s: the notice is at %d", c.word, got.First)
			}
			for _, p := range live {
				if got := p.WantEvents(4); len(got) != 1 {
					t.Errorf("%s: by %s came %v", c.word, p.way, got)
				}
			}
		}
		back := func(when string) {
			for i, c := range ends {
				session := fmt.Sprint("ends ", i)
				for k := range 2 {
					for after := range uint64(5) {
						p := w.Follow(w.Edge(k), SessionSocket, &schema.Attach{Session: session, Start: &schema.Attach_AfterSeq{AfterSeq: after}})
						if a := p.WantAttached(); a.GetStatus() != c.status || a.GetHeadSeq() != 4 {
							t.Errorf("%s, %s: %v", when, c.word, a)
						}
						if after < 4 {
							if got := p.WantEvents(4); len(got) != int(4-after) {
								t.Errorf("%s, %s: behind %d came %v", when, c.word, after, got)
							}
						}
						p.wantDone(c.word)
					}
					for _, way := range []Way{ProtoSocket, JSONSocket, GRPC} {
						p := w.Follow(w.Edge(k), way, &schema.Attach{Session: session})
						p.WantAttached()
						p.WantEvents(4)
						p.WantCaughtUp()
						p.WantNothing(5 * time.Second)
						p.Close()
					}
				}
			}
		}
		back("at once")
		w.RestartNATS()
		w.RestartBroker()
		for i := range 2 {
			w.RestartEdge(w.Edge(i))
		}
		back("after everything was started anew")
	})
}

// TestProgressIsStoredOnceASecond: agents on two edges say how far they are ten times a second, by every way. What is stored is about one a second, in order, and the last; each is acknowledged.
func TestProgressIsStoredOnceASecond(t *testing.T) {
	Run(t, Config{Latency: time.Millisecond}, func(w *World) {
		for _, way := range Ways() {
			session := "progress by " + way.String()
			agents := [2]*Peer{w.Join(w.Edge(0), way, session), w.Join(w.Edge(1), way, session)}
			reader := w.Read(session, ReaderOptions{Edges: []*Edge{w.Edge(1)}})
			ids := [2][]uint64{}
			const n = 50
			for i := range n {
				k := i / 25 // one edge for half of the time, then the other
				ids[k] = append(ids[k], agents[k].Publish(session, progress(fmt.Sprint(i))))
				w.Sleep(100 * time.Millisecond)
			}
			w.Sleep(2 * time.Second)
			for k, p := range agents {
				for _, id := range ids[k] {
					p.WantAck(id)
				}
			}
			all := w.Edge(0).Stored(session)
			if len(all) < 5 || len(all) > 8 {
				t.Errorf("%s: of 50 in 5 s %d are stored", way, len(all))
			}
			if last := all[len(all)-1].GetWorkflowProgress().GetStep(); last != fmt.Sprint(n-1) {
				t.Errorf("%s: the last that is stored is %s", way, last)
			}
			reader.WantSame(all)
			// Whatever comes behind one, the one is before it.
			agents[0].Publish(session, progress("waits"))
			agents[0].Publish(session, progress("the last before"))
			head := agents[0].Put(session, Token("something else")).Last
			got := reader.Wait(head)
			if got[head-2].GetWorkflowProgress().GetStep() != "the last before" {
				t.Errorf("%s: before the token stands %v", way, got[head-2])
			}
		}
	})
}
