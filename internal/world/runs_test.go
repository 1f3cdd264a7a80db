package world

import (
	"context"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/oklog/ulid/v2"
	"google.golang.org/protobuf/types/known/timestamppb"

	"tidemark/broker"
	"tidemark/schema"
)

// says has an agent say something past the gateway, which would keep a run for as long as its connection lasts.
func (e *Edge) says(session string, envelopes ...*schema.Envelope) {
	e.w.t.Helper()
	stamp := schema.NewStamp(&schema.Source{Subject: "agent", Role: schema.Role_ROLE_AGENT})
	var s broker.Submission
	for _, m := range envelopes {
		a, err := stamp.AcceptEnvelope(m, time.Now())
		e.w.must(err)
		s.Envelopes = append(s.Envelopes, a)
	}
	_, err := broker.Append(context.Background(), e.Log, Session(session), s)
	e.w.must(err)
}

// begin has an agent begin a run on an edge and keep it.
func (e *Edge) begin(session, run string) (release func()) {
	e.w.t.Helper()
	e.says(session, startRun(run), Token("so "))
	return e.Log.KeepRun(Session(session), run)
}

// ends are the verdicts in a session: how often it was told that its agent disappeared, and the runs that were failed for it.
func (e *Edge) ends(session string) (orphans int, failed []string) {
	e.w.t.Helper()
	all := e.Stored(session)
	for i, m := range all {
		if m.GetSource().GetRole() != schema.Role_ROLE_SYSTEM {
			continue
		}
		switch {
		case m.GetError() != nil:
			orphans++
			if x := m.GetError(); x.GetCode() != "orphaned" || !x.GetRecoverable() || x.GetError() == "" {
				e.w.t.Errorf("session %q: %v", session, m)
			}
		case m.GetRunStatus().GetStatus() == schema.Status_STATUS_FAILED:
			failed = append(failed, m.GetRunStatus().GetRunId())
			if i == 0 || all[i-1].GetError().GetCode() != "orphaned" || m.GetSource().GetSubject() != "tidemark" {
				e.w.t.Errorf("session %q: the verdict %v stands behind %v", session, m, all[max(i, 1)-1])
			}
		}
	}
	return orphans, failed
}

// wantAlive wants no verdict in the session.
func (e *Edge) wantAlive(session, when string) {
	e.w.t.Helper()
	if orphans, failed := e.ends(session); orphans != 0 || len(failed) != 0 {
		e.w.t.Errorf("session %q, %s: %d times an orphan, and failed are %q", session, when, orphans, failed)
	}
}

// wantFailed wants the verdict in the session, once.
func (e *Edge) wantFailed(session, run, when string) {
	e.w.t.Helper()
	if orphans, failed := e.ends(session); orphans != 1 || len(failed) != 1 || failed[0] != run {
		e.w.t.Errorf("session %q, %s: %d times an orphan, and failed are %q; want run %q once", session, when, orphans, failed, run)
	}
}

// failedAfter waits for the verdict and says how long that took.
func (e *Edge) failedAfter(session string) time.Duration {
	e.w.t.Helper()
	began := time.Now()
	for time.Since(began) < 10*time.Minute {
		if n, _ := e.ends(session); n > 0 {
			return time.Since(began)
		}
		time.Sleep(100 * time.Millisecond)
	}
	e.w.t.Fatalf("session %q has no verdict within %s", session, time.Since(began))
	return 0
}

func wantAbout(t *testing.T, what string, took, want time.Duration) {
	t.Helper()
	if took < want || took > want+2*time.Second {
		t.Errorf("%s took %s, want %s", what, took, want)
	}
}

// settled lets the watchdog come to know the leases for certain, so that what follows is not put off.
func (w *World) settled() { w.Sleep(11 * time.Second) }

// TestI10_AgentDisappears: the run of an agent whose connection is gone is failed after a minute, once; that of one who comes back in time, anywhere, is not; nor one that says something though it has no lease; nor one that nobody has
// taken up; nor one that waits for an answer.
func TestI10_AgentDisappears(t *testing.T) {
	Run(t, Config{Durability: schema.Durability_DURABILITY_OS}, func(w *World) {
		w.settled()
		user := w.joinAs(w.Edge(1), ProtoSocket, "queued", "ana")
		user.Put("queued", startRun("r"))

		gone := w.Edge(0).begin("gone", "r")
		back := w.Edge(0).begin("back", "r")
		silent := w.Edge(0).begin("talker", "r")
		asked := w.Edge(0).begin("asker", "r")
		w.Edge(0).says("asker", question("Go on?"))
		of := startRun("r")
		of.GetStartRun().OrphanAfterMs = 5000
		w.Edge(0).says("quick", of)
		w.Edge(0).says("unnamed", runStatus("", schema.Status_STATUS_RUNNING))
		keepUnnamed := w.Edge(1).Log.KeepRun(Session("unnamed"), "")
		w.Sleep(4900 * time.Millisecond)
		w.Edge(1).wantAlive("quick", "after 4.9 s without a lease")
		w.Sleep(2 * time.Second)
		w.Edge(1).wantFailed("quick", "r", "which is to be failed after 5 s")

		w.Sleep(5 * time.Minute)
		for _, s := range []string{"gone", "back", "talker", "asker", "unnamed", "queued"} {
			w.Edge(1).wantAlive(s, "while it has its agent")
		}
		for _, release := range []func(){gone, back, silent, asked} {
			release()
			release()
		}
		released := time.Now()
		var spoke time.Time
		for range 5 {
			w.Sleep(10 * time.Second)
			w.Edge(0).says("talker", Token("more "))
			spoke = time.Now()
		}
		w.Edge(1).wantAlive("gone", "after 50 s")
		w.Edge(1).wantAlive("back", "after 50 s")
		keep := w.Edge(1).Log.KeepRun(Session("back"), "r")
		w.Edge(1).failedAfter("gone")
		wantAbout(t, "the verdict", time.Since(released), time.Minute)
		w.Sleep(30 * time.Second)
		w.Edge(1).wantAlive("talker", "half a minute after its last word")
		w.Edge(1).failedAfter("talker")
		wantAbout(t, "the verdict on who fell silent", time.Since(spoke), time.Minute)
		w.Sleep(time.Hour)
		for _, s := range []string{"back", "unnamed", "queued", "asker"} {
			w.Edge(1).wantAlive(s, "for an hour more")
		}
		for _, s := range []string{"gone", "talker", "quick"} {
			w.Edge(1).wantFailed(s, "r", "an hour later")
		}
		// The answer has come: now the agent is missed.
		w.joinAs(w.Edge(1), ProtoSocket, "asker", "ana").Put("asker", answer("yes"))
		wantAbout(t, "the verdict on who does not take the answer", w.Edge(0).failedAfter("asker"), time.Minute)
		keep()
		keepUnnamed()
		wantAbout(t, "the verdict on who came back and went", w.Edge(0).failedAfter("back"), time.Minute)
		w.Edge(0).wantFailed("unnamed", "", "a minute after its agent went")
		w.Edge(1).wantAlive("queued", "at the end")

		// A chat goes on, and the next run is another.
		w.Edge(0).begin("gone", "r")
		w.Edge(0).says("gone", runStatus("r", schema.Status_STATUS_COMPLETED))
		w.Sleep(5 * time.Minute)
		w.Edge(1).wantFailed("gone", "r", "of whose runs the first was failed and the second completed")
	})
}

// TestI10_AgentComesBackTooLate: the run of an agent that was gone for too long has its end. What the agent says of it when it is back, by whatever way and under the run's name or none, is refused, and the chat stays open; started again, the run may end again.
func TestI10_AgentComesBackTooLate(t *testing.T) {
	Run(t, Config{Durability: schema.Durability_DURABILITY_OS}, func(w *World) {
		w.settled()
		for i, way := range []Way{ProtoSocket, JSONSocket, GRPC} {
			session := "late by " + way.String()
			agent := w.Join(w.Edge(i%2), way, session)
			agent.Put(session, startRun("r"), Token("so "))
			agent.Cut()
			w.Sleep(65 * time.Second)
			w.Edge(0).wantFailed(session, "r", "whose agent was cut off")
			again := w.Join(w.Edge(1-i%2), way, session)
			for _, late := range []*schema.Envelope{
				runStatus("r", schema.Status_STATUS_COMPLETED), runStatus("r", schema.Status_STATUS_RUNNING), runStatus("", schema.Status_STATUS_COMPLETED),
			} {
				again.WantRejected(again.Publish(session, late), schema.Code_CODE_RUN_ENDED)
			}
			s, err := w.Edge(0).Log.Session(w.T().Context(), Session(session))
			w.must(err)
			if s.GetStatus() != schema.Status_STATUS_OPEN || s.GetHeadSeq() != 4 {
				t.Errorf("session %q is %v", session, s)
			}
			again.Put(session, startRun("r"), runStatus("r", schema.Status_STATUS_COMPLETED))
			again.Close()
		}
	})
}

// TestI10_EveryEdgeDies: the run is failed though no edge is left, and though those die without a word.
func TestI10_EveryEdgeDies(t *testing.T) {
	Run(t, Config{Durability: schema.Durability_DURABILITY_OS}, func(w *World) {
		w.settled()
		w.Edge(0).begin("a", "r")
		w.Edge(1).begin("a", "r")
		w.Edge(1).begin("b", "s")
		// One of a's agents is left on another edge, until that dies, too.
		w.KillEdge(w.Edge(0))
		w.Sleep(5 * time.Minute)
		w.KillEdge(w.Edge(1))
		w.Sleep(time.Minute + 5*time.Second)
		e := w.StartEdge()
		e.wantAlive("a", "before the leases of the dead edge have run out for a minute")
		w.Sleep(10 * time.Second)
		e.wantFailed("a", "r", "whose edges are all dead")
		e.wantFailed("b", "s", "whose edge is dead")
		// A drained edge lets go at its end, at once.
		e.begin("c", "t")
		other := w.StartEdge()
		w.DrainEdge(e, "the end")
		wantAbout(t, "the verdict behind a drained edge", other.failedAfter("c"), time.Minute)
	})
}

// TestI10_BrokerRestarts: a broker that comes back finds the runs again, those that it has to read from the registry too, and counts anew; meanwhile and afterwards there is one verdict.
func TestI10_BrokerRestarts(t *testing.T) {
	Run(t, Config{Durability: schema.Durability_DURABILITY_OS}, func(w *World) {
		w.settled()
		release := map[string]func(){}
		for i := range 20 {
			s := fmt.Sprint("long ago ", i)
			release[s] = w.Edge(i%2).begin(s, "r")
		}
		w.Edge(0).says("asked", promptFor(2*time.Minute))
		w.Settle()
		w.RestartBroker()
		w.settled()
		release["just now"] = w.Edge(0).begin("just now", "r")
		w.Sleep(time.Second)
		for _, r := range release {
			r()
		}
		w.Sleep(50 * time.Second)
		w.KillBroker()
		w.Sleep(5 * time.Minute)
		w.Edge(0).wantAlive("just now", "while there is no broker")
		w.StartBroker()
		w.Sleep(time.Minute)
		for s := range release {
			w.Edge(0).wantAlive(s, "a minute after the broker came back")
		}
		if n := w.Edge(0).defaults("asked"); n != 1 {
			t.Errorf("the question whose deadline passed while there was no broker has %d default answers", n)
		}
		w.Sleep(30 * time.Second)
		for s := range release {
			w.Edge(0).wantFailed(s, "r", "after the broker came back")
		}
		w.RestartBroker()
		w.Sleep(5 * time.Minute)
		for s := range release {
			w.Edge(0).wantFailed(s, "r", "after one more restart")
		}
		if n := w.Edge(0).defaults("asked"); n != 1 {
			t.Errorf("the question has %d default answers", n)
		}
	})
}

// TestI10_NATSRestarts: the leases are in memory and lost with the server; the edges write them again before anybody is failed for it.
func TestI10_NATSRestarts(t *testing.T) {
	Run(t, Config{Durability: schema.Durability_DURABILITY_OS}, func(w *World) {
		w.settled()
		of := startRun("r")
		of.GetStartRun().OrphanAfterMs = 1000
		release := w.Edge(1).Log.KeepRun(Session("a"), "r")
		w.Sleep(time.Second)
		w.Edge(0).says("a", of)
		for range 3 {
			w.Sleep(time.Minute)
			w.StopNATS()
			w.Sleep(20 * time.Second)
			w.StartNATS()
			w.Sleep(time.Minute)
			w.Edge(0).wantAlive("a", "after NATS came back")
		}
		for range 3 {
			// The bucket alone, as a server of a cluster may lose what it had in memory.
			w.must(w.jetStream().DeleteStream(w.T().Context(), "KV_PRESENCE"))
			w.Sleep(time.Minute)
			w.Edge(0).wantAlive("a", "after the leases were lost")
		}
		release()
		wantAbout(t, "the verdict", w.Edge(0).failedAfter("a"), time.Second)
		w.Edge(0).wantFailed("a", "r", "at the end")
	})
}

// promptFor is a question that is answered with yes after so long.
func promptFor(d time.Duration) *schema.Envelope {
	q := question("Go on?", "yes", "no")
	q.GetWaitingForInput().Deadline, q.GetWaitingForInput().DefaultJson = timestamppb.New(time.Now().Add(d)), `"yes"`
	return q
}

// defaults is how many answers of the session the watchdog gave.
func (e *Edge) defaults(session string) (n int) {
	e.w.t.Helper()
	all := e.Stored(session)
	for _, m := range all {
		if in := m.GetUserInput(); in != nil && m.GetSource().GetRole() == schema.Role_ROLE_SYSTEM {
			n++
			if to := m.GetReplyTo(); in.GetResponseJson() != `"yes"` || to == 0 || all[to-1].GetWaitingForInput() == nil {
				e.w.t.Errorf("session %q has the answer %v", session, m)
			}
		}
	}
	return n
}

// TestI10_QuestionHasADeadline: what nobody answers in time gets its default answer, once and not before; a person's answer counts as always; a question that took another's place has its own deadline.
func TestI10_QuestionHasADeadline(t *testing.T) {
	Run(t, Config{Durability: schema.Durability_DURABILITY_OS}, func(w *World) {
		ask := func(session string, questions ...*schema.Envelope) *Peer {
			agent := w.Join(w.Edge(0), ProtoSocket, session)
			agent.Put(session, startRun("r"))
			agent.Put(session, questions...)
			return agent
		}
		ask("missed", promptFor(time.Minute))
		ask("answered", promptFor(time.Minute))
		ask("replaced", promptFor(30*time.Second), promptFor(2*time.Minute))
		ask("without", promptFor(30*time.Second), question("Go on?"))
		w.Sleep(59 * time.Second)
		for _, s := range []string{"missed", "answered", "replaced", "without"} {
			if n := w.Edge(1).defaults(s); n != 0 {
				t.Errorf("%s: the default answer came before its time", s)
			}
		}
		ana := w.joinAs(w.Edge(1), ProtoSocket, "answered", "ana")
		ana.Put("answered", answer("no"))
		w.Sleep(3 * time.Second)
		bo := w.joinAs(w.Edge(1), ProtoSocket, "missed", "bo")
		bo.WantRejected(bo.Publish("missed", answer("no")), schema.Code_CODE_NOT_WAITING)
		for s, want := range map[string]int{"missed": 1, "answered": 0, "replaced": 0, "without": 0} {
			if n := w.Edge(1).defaults(s); n != want {
				t.Errorf("%s: after its minute there are %d default answers, want %d", s, n, want)
			}
		}
		w.Sleep(10 * time.Minute)
		for s, want := range map[string]int{"missed": 1, "answered": 0, "replaced": 1, "without": 0} {
			if n := w.Edge(1).defaults(s); n != want {
				t.Errorf("%s: at the end there are %d default answers, want %d", s, n, want)
			}
		}
	})
}

// TestI10_PersonAndDeadline: an answer that comes in the very moment of the deadline, through a busy edge, and the default answer: exactly one is stored.
func TestI10_PersonAndDeadline(t *testing.T) {
	Run(t, Config{Durability: schema.Durability_DURABILITY_OS, Latency: time.Millisecond}, func(w *World) {
		people := 0
		for i := range 30 {
			session := fmt.Sprint("at once ", i)
			agent := w.Join(w.Edge(0), ProtoSocket, session)
			agent.Put(session, promptFor(time.Second))
			ana := w.joinAs(w.Edge(1), ProtoSocket, session, "ana")
			w.Sleep(time.Second + time.Duration(i-15)*time.Millisecond/2)
			_, refused := ana.answered(ana.Publish(session, answer("no")))
			w.Sleep(5 * time.Second)
			n := w.Edge(0).defaults(session)
			if refused == nil {
				people++
			}
			if (n == 1) == (refused == nil) || n > 1 {
				t.Errorf("%s: there are %d default answers, and the person was told %v", session, n, refused)
			}
			agent.Close()
			ana.Close()
		}
		t.Logf("the person was first %d times of 30", people)
		if people == 0 || people == 30 {
			t.Errorf("it is not shown that either can win")
		}
	})
}

// TestI10_TwoBrokers: one of them is frozen around the moment of its verdict, the other takes the stream over and gives its own, the first thaws: there is one, on every run, and one default answer to every question.
func TestI10_TwoBrokers(t *testing.T) {
	for _, seed := range seeds(3, 20) {
		t.Run(fmt.Sprint("seed", seed), func(t *testing.T) {
			rng := rand.New(rand.NewPCG(seed, 10))
			brokers := 0
			Run(t, Config{Durability: schema.Durability_DURABILITY_OS, Latency: time.Millisecond, Broker: func(c *broker.BrokerConfig) {
				brokers++
				c.Name = fmt.Sprint("broker ", brokers)
			}}, func(w *World) {
				first := w.broker
				w.StartBroker()
				w.settled()
				var all []string
				for i := range 8 {
					s := fmt.Sprint("s", i)
					all = append(all, s)
					w.Edge(i%2).says(s, startRun("r"), Token("x"))
					w.Edge(i%2).says("q"+s, promptFor(time.Minute))
				}
				// The runs began a few milliseconds apart, and a verdict takes some.
				w.Sleep(time.Minute - 50*time.Millisecond + time.Duration(rng.IntN(60))*time.Millisecond)
				first.cable.freeze(true)
				w.Sleep(time.Duration(rng.IntN(200)) * time.Second)
				first.cable.freeze(false)
				w.Sleep(3 * time.Minute)
				for _, s := range all {
					w.Edge(0).wantFailed(s, "r", "of two brokers")
					if n := w.Edge(0).defaults("q" + s); n != 1 {
						t.Errorf("q%s has %d default answers", s, n)
					}
				}
				second := w.broker
				w.broker = first
				w.StopBroker()
				w.broker = second
			})
		})
	}
}

func cancelOf(c *schema.Cancel) *schema.Envelope {
	return &schema.Envelope{Id: ulid.Make().String(), Payload: &schema.Envelope_Cancel{Cancel: c}}
}

// TestI10_Cancel: by every way, a person cancels the run of an agent on another edge. Everybody reads the end right behind, the session is cancelled, and what the agent still says is refused.
func TestI10_Cancel(t *testing.T) {
	Run(t, Config{Durability: schema.Durability_DURABILITY_OS}, func(w *World) {
		for i, way := range Ways() {
			for kind, status := range map[schema.SessionKind]schema.Status{schema.SessionKind_SESSION_KIND_WORKFLOW: schema.Status_STATUS_CANCELLED, schema.SessionKind_SESSION_KIND_CHAT: schema.Status_STATUS_OPEN} {
				for what, cancel := range map[string]*schema.Cancel{
					"run":     {Target: &schema.Cancel_RunId{RunId: "r"}, Reason: "enough"},
					"request": {Target: &schema.Cancel_RequestId{RequestId: "q"}, Reason: "enough"},
					"session": {Target: &schema.Cancel_Session{Session: true}, Reason: "enough"},
				} {
					session := fmt.Sprint(way, " ", kind, " ", what)
					w.must(w.Call(w.Edge(0), "CreateSession", &schema.CreateSessionRequest{Session: session, Kind: kind}, new(schema.CreateSessionResponse)))
					agent, user := w.Join(w.Edge(i%2), ProtoSocket, session), w.joinAs(w.Edge((i+1)%2), way, session, "ana")
					start := startRun("r")
					start.RequestId = "q"
					agent.Put(session, start, Token("so "))
					before := w.Read(session, ReaderOptions{Ways: []Way{way}, Edges: []*Edge{w.Edge(i % 2)}})
					before.Wait(3)
					if at := user.Put(session, cancelOf(cancel)); at.First != 4 || at.Last != 4 {
						t.Errorf("%s: the cancel is at %+v", session, at)
					}
					late := Token("more ")
					late.RequestId = "q"
					want := schema.Code_CODE_CANCELLED
					if status == schema.Status_STATUS_CANCELLED {
						want = schema.Code_CODE_SESSION_ENDED
					}
					agent.WantRejected(agent.Publish(session, late), want)
					agent.WantRejected(agent.Publish(session, runStatus("r", schema.Status_STATUS_COMPLETED)), want)
					all := w.Edge(i % 2).Stored(session)
					if len(all) != 5 {
						t.Fatalf("%s: stored are %v", session, all)
					}
					end := all[4].GetRunStatus()
					if end.GetRunId() != "r" || end.GetStatus() != schema.Status_STATUS_CANCELLED || end.GetReason() != "enough" || all[4].GetSource().GetRole() != schema.Role_ROLE_SYSTEM {
						t.Errorf("%s: behind the cancel stands %v", session, all[4])
					}
					before.WantSame(all)
					s, err := w.Edge(0).Log.Session(w.T().Context(), Session(session))
					w.must(err)
					if s.GetStatus() != status {
						t.Errorf("%s is %s", session, s.GetStatus())
					}
					agent.Close()
					user.Close()
				}
			}
		}
	})
}

// TestI10_CancelBeforeTheRun: what was cancelled before it started is over when it does, also when the edges and the broker were all restarted in between; the watchdog has nothing to say of it.
func TestI10_CancelBeforeTheRun(t *testing.T) {
	Run(t, Config{Durability: schema.Durability_DURABILITY_OS}, func(w *World) {
		user := w.joinAs(w.Edge(0), ProtoSocket, "s", "ana")
		user.Put("s", cancelOf(&schema.Cancel{Target: &schema.Cancel_RunId{RunId: "r"}}))
		user.Put("s", cancelOf(&schema.Cancel{Target: &schema.Cancel_RequestId{RequestId: "q"}}))
		w.Settle()
		w.RestartEdge(w.Edge(0))
		w.RestartEdge(w.Edge(1))
		w.RestartBroker()
		agent := w.Join(w.Edge(1), ProtoSocket, "s")
		agent.Put("s", startRun("r"))
		other := startRun("other")
		other.RequestId = "q"
		agent.Put("s", other)
		late := Token("more ")
		late.RequestId = "q"
		agent.WantRejected(agent.Publish("s", late), schema.Code_CODE_CANCELLED)
		w.Sleep(5 * time.Minute)
		all := w.Edge(0).Stored("s")
		if len(all) != 6 || all[3].GetRunStatus().GetRunId() != "r" || all[5].GetRunStatus().GetRunId() != "other" || all[5].GetRunStatus().GetStatus() != schema.Status_STATUS_CANCELLED {
			t.Errorf("stored are %v", all)
		}
	})
}
