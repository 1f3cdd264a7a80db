package world

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"tidemark/schema"
)

// sameAgain is a publish that may be sent again as it was: recognised by its producer, or by its ids alone.
func sameAgain(byProducer bool, seq uint64, texts ...string) []*schema.Envelope {
	var all []*schema.Envelope
	for i, text := range texts {
		e := Token(text)
		if byProducer {
			e.Producer = &schema.Producer{Id: "p", Epoch: 1, Seq: seq + uint64(i)}
		}
		all = append(all, e)
	}
	return all
}

// TestI3_ALostAcknowledgement: a publish is stored, and its sender never hears of it, because its connection breaks, its edge dies, or NATS does. Sent again, on that edge or another and by another way, it is
// answered with the first seq, and stored once.
func TestI3_ALostAcknowledgement(t *testing.T) {
	for _, fault := range []struct {
		name string
		// strike loses the answers on their way to the peers; it returns the edge to come back to.
		strike func(w *World, peers []*Peer) *Edge
	}{
		{"the connection breaks", func(w *World, peers []*Peer) *Edge {
			for _, p := range peers {
				p.Cut()
			}
			return w.Edge(0)
		}},
		{"the edge dies", func(w *World, _ []*Peer) *Edge {
			w.RestartEdge(w.Edge(0))
			return w.Edge(0)
		}},
		{"NATS crashes", func(w *World, peers []*Peer) *Edge {
			w.CrashNATS()
			for _, p := range peers {
				p.Cut()
			}
			return w.Edge(0)
		}},
		{"the edge loses NATS, and the answer with it", func(w *World, peers []*Peer) *Edge {
			w.Edge(0).CutNATS()
			for _, p := range peers {
				p.Cut()
			}
			return w.Edge(0)
		}},
	} {
		t.Run(fault.name, func(t *testing.T) {
			Run(t, Config{}, func(w *World) {
				type try struct {
					session   string
					way       Way
					envelopes []*schema.Envelope
				}
				var tries []try
				var peers []*Peer
				for _, way := range Ways() {
					for _, byProducer := range []bool{false, true} {
						x := try{session: fmt.Sprint(way, byProducer), way: way, envelopes: sameAgain(byProducer, 2, "two ", "three ")}
						if way == SessionSocket {
							x.envelopes = x.envelopes[:1]
						}
						p := w.Join(w.Edge(0), way, x.session)
						p.Put(x.session, sameAgain(byProducer, 1, "one ")...)
						tries, peers = append(tries, x), append(peers, p)
					}
				}
				for i, p := range peers {
					p.Link().FreezeReader()
					p.Publish(tries[i].session, tries[i].envelopes...)
				}
				for _, x := range tries {
					w.Until("it is stored", func() bool { return len(w.Edge(1).Stored(x.session)) == 1+len(x.envelopes) })
				}
				back := fault.strike(w, peers)
				back.WaitReady()
				for i, x := range tries {
					last := uint64(1 + len(x.envelopes))
					// First elsewhere and by the next way, then where it came from.
					other := Ways()[(i/2+1)%len(Ways())]
					for k, p := range []*Peer{w.Join(w.Edge(1), other, x.session), w.Join(back, x.way, x.session)} {
						send := [][]*schema.Envelope{x.envelopes}
						if p.way == SessionSocket && len(x.envelopes) > 1 {
							// It cannot say two at once. One after the other they are the same to their producer.
							send = [][]*schema.Envelope{x.envelopes[:1], x.envelopes[1:]}
						}
						first := uint64(2)
						for _, envelopes := range send {
							if a := p.Put(x.session, envelopes...); a.First != first || a.Last != first+uint64(len(envelopes))-1 || !a.Duplicate {
								t.Errorf("%s, try %d by %s: %+v", x.session, k+2, p.way, a)
							}
							first += uint64(len(envelopes))
						}
						if k == 1 {
							if a := p.Put(x.session, Token("end")); a.First != last+1 || a.Duplicate {
								t.Errorf("%s: what is new is at %+v", x.session, a)
							}
						}
					}
					want := "one two three end"
					if len(x.envelopes) == 1 {
						want = "one two end"
					}
					if got := Texts(w.Edge(1).Stored(x.session)); got != want {
						t.Errorf("%s: %q is stored", x.session, got)
					}
				}
			})
		})
	}
}

// TestI3_SentOnTwoEdgesAtOnce: the sender comes back to another edge while the first is still storing. Both answer with one place.
func TestI3_SentOnTwoEdgesAtOnce(t *testing.T) {
	Run(t, Config{Latency: time.Millisecond}, func(w *World) {
		for _, byProducer := range []bool{false, true} {
			session := fmt.Sprint("by producer ", byProducer)
			a, b := w.Join(w.Edge(0), ProtoSocket, session), w.Join(w.Edge(1), GRPC, session)
			first := uint64(1)
			for i := range uint64(60) {
				envelopes := sameAgain(byProducer, first, fmt.Sprint(i, "a "), fmt.Sprint(i, "b "))
				x := a.Publish(session, envelopes...)
				w.Sleep(time.Duration(i%5) * 700 * time.Microsecond)
				y := b.Publish(session, envelopes...)
				l, r := a.WantAck(x), b.WantAck(y)
				if l.First != r.First || l.Last != r.Last || l.First != first {
					t.Errorf("%s, publish %d: %+v and %+v", session, i, l, r)
				}
				if l.Duplicate && r.Duplicate {
					t.Errorf("%s, publish %d: both were told that it was stored before", session, i)
				}
				first += 2
			}
			if all := w.Edge(0).Stored(session); len(all) != 120 {
				t.Errorf("%s: %d of 120 envelopes are stored", session, len(all))
			}
		}
	})
}

// TestI3_AProducerRetriesAtAnyTime: long after the ids are forgotten, on edges that have never seen the session, after NATS was restarted, a producer's retry is answered with the first seq.
func TestI3_AProducerRetriesAtAnyTime(t *testing.T) {
	Run(t, Config{}, func(w *World) {
		first := sameAgain(true, 1, "one ", "two ")
		p := w.Join(w.Edge(0), ProtoSocket, "s")
		p.Put("s", first...)
		for range 3 {
			p.Put("s", Tokens("filler", 700)...)
		}
		p.Put("s", sameAgain(true, 3, "three ")...)
		w.Settle()
		w.RestartNATS()
		fresh := w.StartEdge()
		fresh.WaitReady()
		for _, e := range []*Edge{w.Edge(0), w.Edge(1), fresh} {
			e.WaitReady()
			for _, way := range []Way{JSONSocket, GRPC, Calls} {
				if a := w.Join(e, way, "s").Put("s", first...); a.First != 1 || a.Last != 2 || !a.Duplicate {
					t.Errorf("%s at %s: %+v", way, e.Name, a)
				}
			}
			if a := w.Join(e, SessionSocket, "s").Put("s", first[1]); a.First != 2 || !a.Duplicate {
				t.Errorf("session at %s: %+v", e.Name, a)
			}
		}
		if n := len(fresh.Stored("s")); n != 2103 {
			t.Errorf("%d envelopes are stored", n)
		}
	})
}

// TestI3_EverythingBreaks: writers by every way, some with producers and some with ids alone, whose connections are cut in the middle of frames in both directions, whose edges are killed and whose NATS
// crashes. In the end all of it is stored once, and what producers numbered in its order. A session remembers its last 1,024 ids: no more than these are sent to the one whose writers have nothing else.
func TestI3_EverythingBreaks(t *testing.T) {
	const byProducers, byIDs = "by producers", "by ids"
	publishes := map[string]int{byProducers: 240, byIDs: 1024 / (len(Ways()) * 3)}
	for _, seed := range seeds(2, 40) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			Run(t, Config{Latency: 300 * time.Microsecond}, func(w *World) {
				r := rand.New(rand.NewPCG(seed, 3))
				edges := w.edges
				var all []*Writer
				writers := make(map[string][]*Writer)
				for i := range 2 * len(Ways()) {
					way, session := Ways()[i/2], byIDs
					o := WriterOptions{Ways: []Way{way, Ways()[r.IntN(len(Ways()))]}, Edges: edges}
					if i%2 == 0 {
						session, o.Producer = byProducers, way.String()
					}
					up, down := rand.New(rand.NewPCG(seed, uint64(i))), rand.New(rand.NewPCG(seed, uint64(100+i)))
					o.CutAfter = func() int { return 2000 + up.IntN(12_000) }
					o.DeafAfter = func() int { return 1000 + down.IntN(8_000) }
					x := w.Write(session, o)
					for k := range publishes[session] {
						n := 1
						if o.Ways[0] != SessionSocket && o.Ways[1] != SessionSocket {
							n += r.IntN(3)
						}
						x.Send(Tokens(fmt.Sprint(way, ".", k, "."), n)...)
					}
					all, writers[session] = append(all, x), append(writers[session], x)
				}
				for range 6 {
					w.Sleep(time.Duration(5+r.IntN(60)) * time.Millisecond)
					switch r.IntN(4) {
					case 0:
						w.CrashNATS()
					case 1:
						w.RestartEdge(edges[r.IntN(len(edges))])
					case 2:
						edges[r.IntN(len(edges))].CutNATS()
					default:
						all[r.IntN(len(all))].Cut()
					}
					synctest.Wait()
				}
				for _, x := range all {
					x.Flush()
					t.Logf("%v lost %d connections", x.o.Ways, x.Lost())
				}
				fresh := w.StartEdge()
				for session, writers := range writers {
					want := 0
					for _, x := range writers {
						for _, s := range x.Sent() {
							want += len(s.Envelopes)
						}
					}
					if stored := fresh.WantStored(session, writers...); len(stored) != want {
						t.Errorf("session %q: %d envelopes are stored, %d were sent", session, len(stored), want)
					}
				}
			})
		})
	}
}
