package world

import (
	"fmt"
	"testing"
	"time"

	"tidemark/schema"
)

// TestI2_OneSequenceOverEdgesTransportsAndDirections: agents and users write one session at once, by every way and on three edges; followers by every way on every edge read one and the same sequence.
func TestI2_OneSequenceOverEdgesTransportsAndDirections(t *testing.T) {
	Run(t, Config{Edges: 3, Latency: time.Millisecond}, func(w *World) {
		var readers []*Reader
		for _, way := range Ways() {
			for i := range 3 {
				readers = append(readers, w.Read("s", ReaderOptions{Ways: []Way{way}, Edges: []*Edge{w.Edge(i)}}))
			}
		}
		const each = 90
		var writers []*Writer
		for i, way := range Ways() {
			agent := w.Write("s", WriterOptions{Ways: []Way{way}, Edges: []*Edge{w.Edge(i % 3)}, Producer: way.String()})
			user := w.Write("s", WriterOptions{Ways: []Way{way}, Edges: []*Edge{w.Edge((i + 1) % 3)}, Window: 1})
			for k := range each {
				size := 1 + k%4
				if way == SessionSocket {
					size = 1
				}
				agent.Send(Tokens(fmt.Sprint(way, k, "."), size)...)
				if k%9 == 0 {
					user.Send(UserMessage(fmt.Sprint("user by ", way, k)))
				}
			}
			writers = append(writers, agent, user)
		}
		for _, x := range writers {
			x.Flush()
		}
		all := w.Edge(0).WantStored("s", writers...)
		if all[0].GetSeq() != 1 {
			t.Errorf("the session begins at %d", all[0].GetSeq())
		}
		for _, r := range readers {
			r.WantSame(all)
		}
		for i, x := range writers {
			sent := x.Sent()
			n := 0
			for _, s := range sent {
				n += len(s.Envelopes)
			}
			if span := sent[len(sent)-1].Ack.Last - sent[0].Ack.First + 1; span == uint64(n) {
				t.Errorf("writer %d wrote alone; the test shows nothing", i)
			}
		}
	})
}

// TestI2_AFloodOnOneEdgeStarvesNobodyOnAnother: one edge floods a session, somebody on another writes now and then. The hand-over is taken, nothing is twice, and nobody waits long.
func TestI2_AFloodOnOneEdgeStarvesNobodyOnAnother(t *testing.T) {
	Run(t, Config{Latency: time.Millisecond}, func(w *World) {
		r := w.Read("s", ReaderOptions{Edges: []*Edge{w.Edge(1)}})
		flood := w.Write("s", WriterOptions{Edges: []*Edge{w.Edge(0)}, Producer: "flood", Window: 128})
		slow := w.Write("s", WriterOptions{Ways: []Way{GRPC}, Edges: []*Edge{w.Edge(1)}, Window: 1})
		flood.SendEach(Tokens("f", 1000))
		flood.WaitAcked(500)
		worst := time.Duration(0)
		for i := range 20 {
			// It floods as long as the other writes.
			flood.SendEach(Tokens(fmt.Sprint("f", i, "."), 2000))
			began := time.Now()
			slow.Send(UserMessage(fmt.Sprint("slow ", i)))
			slow.WaitAcked(i + 1)
			worst = max(worst, time.Since(began))
			if flood.Unacked() == 0 {
				t.Error("the flood was over before the others had their turn")
			}
			w.Sleep(5 * time.Millisecond)
		}
		t.Logf("the slow writer waited %s at most; %v batches were handed over, %v races lost", worst, w.Edge(1).Counted("tidemark_log_hand_overs_total"), w.Edge(1).Counted("tidemark_log_races_lost_total"))
		if worst > 100*time.Millisecond {
			t.Errorf("the slow writer waited %s, where a round trip to NATS takes 2 ms", worst)
		}
		if w.Edge(1).Counted("tidemark_log_hand_overs_total") == 0 {
			t.Error("nothing was handed over")
		}
		slow.Flush()
		flood.Flush()
		r.WantSame(w.Edge(0).WantStored("s", flood, slow))
	})
}

// TestI2_TheWinnerOfTheRacesDies: who has handed over to an edge that is dead now appends by himself, though the session's last frame is still that edge's.
func TestI2_TheWinnerOfTheRacesDies(t *testing.T) {
	Run(t, Config{Latency: time.Millisecond}, func(w *World) {
		flood := w.Write("s", WriterOptions{Edges: []*Edge{w.Edge(0)}, Producer: "flood", Window: 128})
		slow := w.Write("s", WriterOptions{Ways: []Way{GRPC}, Edges: []*Edge{w.Edge(1)}, Window: 1})
		flood.SendEach(Tokens("f", 1000))
		flood.WaitAcked(500)
		n := 0
		put := func() {
			n++
			slow.Send(UserMessage(fmt.Sprint("slow ", n)))
			slow.WaitAcked(n)
		}
		for w.Edge(1).Counted("tidemark_log_hand_overs_total") < 3 {
			if n == 200 {
				t.Fatal("nothing is handed over")
			}
			// It floods as long as the other writes.
			flood.SendEach(Tokens(fmt.Sprint("f", n, "."), 2000))
			put()
			w.Sleep(5 * time.Millisecond)
		}
		w.KillEdge(w.Edge(0))
		began := time.Now()
		put()
		if took := time.Since(began); took > 5*time.Second {
			t.Errorf("a publish was acknowledged %s after the edge that wins the races died", took)
		}
		flood.Stop()
	})
}

// TestI2_AFloodStarvesNobodyInRealTime is the same by the real clock, as quick as the machine is.
func TestI2_AFloodStarvesNobodyInRealTime(t *testing.T) {
	if !slow() {
		t.Skip("TIDEMARK_SLOW runs it: it takes seconds, and all of the machine")
	}
	w := New(t, Config{Durability: schema.Durability_DURABILITY_OS})
	flood := w.Write("s", WriterOptions{Edges: []*Edge{w.Edge(0)}, Producer: "flood", Window: 512})
	turns := w.Write("s", WriterOptions{Ways: []Way{GRPC}, Edges: []*Edge{w.Edge(1)}, Window: 1})
	flood.SendEach(Tokens("f", 2000))
	flood.WaitAcked(500)
	worst := time.Duration(0)
	for i := range 50 {
		for flood.Unacked() < 20_000 {
			flood.SendEach(Tokens(fmt.Sprint("f", i, "."), 2000))
		}
		began := time.Now()
		turns.Send(UserMessage(fmt.Sprint("turn ", i)))
		turns.WaitAcked(i + 1)
		worst = max(worst, time.Since(began))
		w.Sleep(20 * time.Millisecond)
	}
	turns.Flush()
	flood.Flush()
	all := w.Edge(1).WantStored("s", flood, turns)
	t.Logf("%d envelopes; who writes now and then waited %s at most; %v batches were handed over", len(all), worst, w.Edge(1).Counted("tidemark_log_hand_overs_total"))
	if worst > 3*time.Second || w.Edge(1).Counted("tidemark_log_hand_overs_total") == 0 {
		t.Errorf("who writes now and then waited %s; %v batches were handed over", worst, w.Edge(1).Counted("tidemark_log_hand_overs_total"))
	}
}

// TestI2_TwoFloodsShareASession: both edges flood it, and both come to their end, neither far ahead of the other.
func TestI2_TwoFloodsShareASession(t *testing.T) {
	Run(t, Config{Latency: time.Millisecond}, func(w *World) {
		const n = 4000
		var floods []*Writer
		for i, way := range []Way{ProtoSocket, GRPC} {
			x := w.Write("s", WriterOptions{Ways: []Way{way}, Edges: []*Edge{w.Edge(i)}, Producer: way.String(), Window: 128})
			x.SendEach(Tokens(way.String(), n))
			floods = append(floods, x)
		}
		w.Until("one of the floods is stored", func() bool { return floods[0].Unacked() == 0 || floods[1].Unacked() == 0 })
		for i, x := range floods {
			t.Logf("flood %d has %d of %d when one is done; its edge lost %v races and handed over %v batches", i, len(x.Acked()), n,
				w.Edge(i).Counted("tidemark_log_races_lost_total"), w.Edge(i).Counted("tidemark_log_hand_overs_total"))
			if len(x.Acked()) < n/10 {
				t.Errorf("flood %d has %d of %d when the other is done", i, len(x.Acked()), n)
			}
		}
		for _, x := range floods {
			x.Flush()
		}
		if all := w.Edge(0).WantStored("s", floods...); len(all) != 2*n {
			t.Errorf("%d of %d envelopes are stored", len(all), 2*n)
		}
	})
}

// TestI6_OneWinsEverySeq: two edges publish on the same head at once, each expecting it; one is stored, the other is told the head it lost to.
func TestI6_OneWinsEverySeq(t *testing.T) {
	Run(t, Config{}, func(w *World) {
		for _, ways := range [][2]Way{{ProtoSocket, GRPC}, {JSONSocket, Calls}, {GRPC, GRPC}, {ProtoSocket, ProtoSocket}} {
			session := fmt.Sprint(ways)
			peers := [2]*Peer{w.Join(w.Edge(0), ways[0], session), w.Join(w.Edge(1), ways[1], session)}
			won := [2]int{}
			for head := range uint64(40) {
				var ids [2]uint64
				for i, p := range peers {
					ids[i] = p.PublishAs(&schema.Publish{Session: session, ExpectedSeq: &head, Envelopes: []*schema.Envelope{Token(fmt.Sprint(i))}})
				}
				acked := 0
				for i, p := range peers {
					f := p.want("an answer", func(f *schema.ServerFrame) bool { return f.GetPublished() != nil || f.GetRejected() != nil })
					if a := f.GetPublished().GetAcks(); a != nil {
						acked++
						won[i]++
						if a[0].GetPublishId() != ids[i] || a[0].GetFirstSeq() != head+1 {
							t.Errorf("%s at %d: %v", session, head, a)
						}
					} else if r := f.GetRejected(); r.GetCode() != schema.Code_CODE_CONFLICT || r.GetHeadSeq() != head+1 {
						t.Errorf("%s at %d: %v", session, head, r)
					}
				}
				if acked != 1 {
					t.Fatalf("%s: %d won seq %d", session, acked, head+1)
				}
			}
			if all := w.Edge(0).Stored(session); len(all) != 40 {
				t.Errorf("%s: %d envelopes are stored", session, len(all))
			}
			t.Logf("%s: won %v", session, won)
		}
	})
}

// TestI6_ZombieProducerIsRefused: once a producer has begun a newer epoch on one edge, what its older self still sends on another is refused, with the reason; also where it was on its way already.
func TestI6_ZombieProducerIsRefused(t *testing.T) {
	produced := func(epoch, seq uint64, text string) *schema.Envelope {
		e := Token(text)
		e.Producer = &schema.Producer{Id: "p", Epoch: epoch, Seq: seq}
		return e
	}
	Run(t, Config{}, func(w *World) {
		for _, way := range Ways() {
			old, young := w.Join(w.Edge(0), way, way.String()), w.Join(w.Edge(1), way, way.String())
			old.Put(way.String(), produced(1, 1, "a "))
			old.Put(way.String(), produced(1, 2, "b "))
			if a := young.Put(way.String(), produced(2, 1, "c ")); a.First != 3 {
				t.Errorf("%s: %+v", way, a)
			}
			r := old.WantRejected(old.Publish(way.String(), produced(1, 3, "zombie ")), schema.Code_CODE_PRODUCER_FENCED)
			if r.GetRetryable() || r.GetExpected() != 2 {
				t.Errorf("%s: %v", way, r)
			}

			w.Edge(0).Freeze()
			// The edge that is frozen does not know of epoch 3, and has the envelope.
			id := old.Publish(way.String(), produced(2, 2, "late zombie "))
			w.Sleep(10 * time.Millisecond)
			young.Put(way.String(), produced(3, 1, "d "))
			w.Edge(0).Thaw()
			old.WantRejected(id, schema.Code_CODE_PRODUCER_FENCED)
			if got := Texts(w.Edge(0).Stored(way.String())); got != "a b c d " {
				t.Errorf("%s: %q is stored", way, got)
			}
		}
	})
}

// TestI6_AFrozenEdgeOverwritesNobody: an edge stops in the middle of an append, for a moment or for so long that all has given it up; others write on; when it thaws, what it had sent finds the fence.
func TestI6_AFrozenEdgeOverwritesNobody(t *testing.T) {
	for _, c := range []struct {
		name   string
		frozen time.Duration
		others int
	}{
		{"for a moment", time.Second, 20},
		{"longer than an append is held", 15 * time.Second, 20},
		{"longer than its connections live", 2 * time.Minute, 20},
		{"longer than its connections live, and nobody wrote", 2 * time.Minute, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			Run(t, Config{Edges: 3, Latency: time.Millisecond}, func(w *World) {
				frozen := w.Edge(0)
				type session struct {
					name          string
					near, far     *Reader
					zombie, other *Writer
				}
				// What is on its way when the edge stops is stored, and the edge does not know. What comes afterwards waits on the edge's side.
				var sessions []session
				for _, name := range []string{"stored", "held"} {
					s := session{
						name: name, near: w.Read(name, ReaderOptions{Edges: []*Edge{frozen}}), far: w.Read(name, ReaderOptions{Ways: []Way{GRPC}, Edges: []*Edge{w.Edge(2)}}),
						zombie: w.Write(name, WriterOptions{Edges: []*Edge{frozen}, Producer: "zombie"}),
						other:  w.Write(name, WriterOptions{Edges: []*Edge{w.Edge(1)}, Producer: "other"}),
					}
					s.zombie.SendEach(Tokens("z", 10))
					s.zombie.Flush()
					sessions = append(sessions, s)
				}
				attempts := w.attempts()
				sessions[0].zombie.SendEach(Tokens("Z", 10))
				w.Sleep(500 * time.Microsecond)
				frozen.Freeze()
				sessions[1].zombie.SendEach(Tokens("Z", 10))
				w.Sleep(c.frozen / 2)
				for _, s := range sessions {
					s.other.SendEach(Tokens("o", c.others))
					s.other.Flush()
				}
				w.Sleep(c.frozen / 2)
				if n := len(w.Edge(1).Stored("stored")); n <= 10+c.others {
					t.Errorf("%d envelopes are stored while the edge is frozen: nothing of it was on its way", n)
				}
				if n := len(w.Edge(1).Stored("held")); n != 10+c.others {
					t.Errorf("%d envelopes are stored while the edge is frozen: something of it is there that cannot be", n)
				}
				frozen.Thaw()
				w.Sleep(time.Second)
				for _, s := range sessions {
					s.zombie.Flush()
					s.other.SendEach(Tokens("end", 1))
					s.other.Flush()
					all := w.Edge(1).WantStored(s.name, s.zombie, s.other)
					if len(all) != 21+c.others {
						t.Errorf("%s: %d envelopes are stored, %d were sent", s.name, len(all), 21+c.others)
					}
					s.near.WantSame(all)
					s.far.WantSame(all)
				}
				if n := attempts(frozen); c.others > 0 && n.refused == 0 {
					t.Error("the frozen edge met no fence; the test shows nothing")
				} else {
					t.Logf("the frozen edge's frames: %+v", n)
				}
			})
		})
	}
}
