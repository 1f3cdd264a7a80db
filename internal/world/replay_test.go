package world

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"tidemark/broker"
	"tidemark/schema"
)

// tinyTail lets nearly everything be read from the log.
func tinyTail(c *broker.Config) { c.TailBytes = 4 << 10 }

// mixed is an envelope of a random kind and size.
func mixed(r *rand.Rand, name string) *schema.Envelope {
	size := r.IntN(60)
	if r.IntN(20) == 0 {
		size = r.IntN(6000)
	}
	text := name + strings.Repeat("·", size/2)
	switch r.IntN(6) {
	case 0:
		return UserMessage(text)
	case 1:
		e := Token("")
		e.Payload = &schema.Envelope_System{System: &schema.System{Message: text}}
		return e
	default:
		return Token(text)
	}
}

// behind is what a follower of these types gets after seq.
func behind(all []*schema.Envelope, after uint64, types []string) []*schema.Envelope {
	return slices.DeleteFunc(slices.Clone(all), func(e *schema.Envelope) bool {
		return e.GetSeq() <= after || len(types) > 0 && !slices.Contains(types, e.Kind().String())
	})
}

// TestI4_AnyCutOfAnyStream is the property: for any cut of any stream, what a follower had and what it gets when it comes back is the log. Streams are random, connections are cut after random numbers of bytes,
// inside frames or between them; followers come back by another way to another edge, with a filter or without, while the session grows; they read from memory, from pages, or from frames that no
// page has, because the projector is slow, restarted, killed or not there.
func TestI4_AnyCutOfAnyStream(t *testing.T) {
	for _, seed := range seeds(4, 60) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 4))
			cfg := Config{Latency: 200 * time.Microsecond}
			if seed%2 == 0 {
				cfg.Log = tinyTail
			}
			Run(t, cfg, func(w *World) {
				if seed%4 == 3 {
					w.StopBroker()
				}
				x := w.Write("s", WriterOptions{Ways: []Way{ProtoSocket, GRPC}, Producer: "p", Window: 64})
				var readers []*Reader
				follow := func() {
					o := ReaderOptions{Ways: []Way{Ways()[r.IntN(5)], Ways()[r.IntN(5)]}, Edges: []*Edge{w.Edge(r.IntN(2)), w.Edge(0), w.Edge(1)}}
					if acked := x.Acked(); len(acked) > 0 {
						o.After = r.Uint64N(acked[len(acked)-1].Ack.Last + 1)
					}
					if r.IntN(3) == 0 && o.Ways[0] != SessionSocket && o.Ways[1] != SessionSocket {
						o.Types = [][]string{{"user_message"}, {"token"}, {"system", "user_message"}, {"tool_call"}}[r.IntN(4)]
					}
					cuts, mean := rand.New(rand.NewPCG(seed, r.Uint64())), []int{600, 3000, 20_000}[r.IntN(3)]
					left := 12
					o.CutAfter = func() int {
						if left--; left < 0 {
							return 0
						}
						return 200 + cuts.IntN(2*mean)
					}
					readers = append(readers, w.Read("s", o))
				}
				follow()
				for step := range 12 {
					for range 1 + r.IntN(60) {
						n := 1 + r.IntN(3)*r.IntN(3)
						all := make([]*schema.Envelope, n)
						for i := range all {
							all[i] = mixed(r, fmt.Sprint(step, " "))
						}
						x.Send(all...)
					}
					w.Sleep(time.Duration(r.IntN(4000)) * time.Millisecond)
					follow()
					if w.broker == nil {
						continue
					}
					switch r.IntN(5) {
					case 0:
						w.RestartBroker()
					case 1:
						w.KillBroker()
						w.StartBroker()
					}
				}
				x.Flush()
				all := w.Edge(0).WantStored("s", x)
				head := all[len(all)-1].GetSeq()
				comebacks := 0
				for _, f := range readers {
					// A filtered one is told its cursor now and then only.
					want := behind(all, f.o.After, f.o.Types)
					if len(f.o.Types) == 0 {
						f.Wait(head)
					} else if len(want) > 0 {
						f.Wait(want[len(want)-1].GetSeq())
					}
					f.WantSame(want)
					comebacks += f.Attached() - 1
				}
				t.Logf("%d envelopes; %d followers came back %d times; %v and %v reads of the log", head, len(readers), comebacks,
					w.Edge(0).Counted("tidemark_log_fetches_total"), w.Edge(1).Counted("tidemark_log_fetches_total"))
			})
		})
	}
}

// TestI4_EveryCut attaches behind every seq of a session that is partly in pages, and reads to the head and live. One edge has it in memory, the other next to nothing.
func TestI4_EveryCut(t *testing.T) {
	first := true
	Run(t, Config{Log: func(c *broker.Config) {
		if !first {
			tinyTail(c)
		}
		first = false
	}}, func(w *World) {
		r := rand.New(rand.NewPCG(1, 2))
		pen := w.Join(w.Edge(0), ProtoSocket, "s")
		var all []*schema.Envelope
		put := func(n int) {
			var some []*schema.Envelope
			for range n {
				some = append(some, mixed(r, fmt.Sprint(len(all)+len(some)+1, " ")))
			}
			pen.Put("s", some...)
			all = append(all, some...)
		}
		for len(all) < 290 {
			put(1 + r.IntN(9))
		}
		w.Settle() // pages with a part of one
		for len(all) < 320 {
			put(1 + r.IntN(9)) // not in pages yet
		}
		stored := w.Edge(0).Stored("s")
		head := uint64(len(stored))
		for i, e := range []*Edge{w.Edge(0), w.Edge(1)} {
			for _, way := range [][]Way{{ProtoSocket, JSONSocket}, {ProtoSocket, GRPC}}[i] {
				p := w.Dial(e, way)
				got := make([][]*schema.Envelope, head+1)
				caught := 0
				for after := range head + 1 {
					p.Attach(&schema.Attach{Channel: uint32(after) + 1, Session: "s", Start: &schema.Attach_AfterSeq{AfterSeq: after}})
				}
				for caught <= int(head) {
					f := p.want("events or caught_up", func(f *schema.ServerFrame) bool { return f.GetEvents() != nil || f.GetCaughtUp() != nil })
					if f.GetCaughtUp() != nil {
						caught++
						continue
					}
					got[f.GetEvents().GetChannel()-1] = append(got[f.GetEvents().GetChannel()-1], f.GetEvents().GetEnvelopes()...)
				}
				for after, have := range got {
					if want := stored[after:]; !slices.EqualFunc(have, want, func(a, b *schema.Envelope) bool { return proto.Equal(a, b) }) {
						t.Errorf("%s at %s, after %d: %d envelopes came, %d are stored behind it, or they differ", way, e.Name, after, len(have), len(want))
					}
				}
				p.Close()
			}
			for after := uint64(0); after <= head; after += 41 {
				for _, way := range []Way{SessionSocket, Calls} {
					p := w.Follow(e, way, &schema.Attach{Session: "s", Start: &schema.Attach_AfterSeq{AfterSeq: after}})
					if after < head {
						have := p.WantEvents(head)
						if want := stored[after:]; !slices.EqualFunc(have, want, func(a, b *schema.Envelope) bool { return proto.Equal(a, b) }) {
							t.Errorf("%s at %s, after %d: %d envelopes came, %d are stored behind it, or they differ", way, e.Name, after, len(have), len(want))
						}
					}
					p.Close()
				}
			}
		}
		if w.Edge(0).Counted("tidemark_log_fetches_total") > 10 || w.Edge(1).Counted("tidemark_log_fetches_total") < 300 {
			t.Errorf("the log was read %v times by the edge with a tail, %v times by the one without", w.Edge(0).Counted("tidemark_log_fetches_total"), w.Edge(1).Counted("tidemark_log_fetches_total"))
		}
	})
}

// TestI4_WhatRetentionTookIsTold lets envelopes grow old. Who follows after one of them is told where the data begins; who has seen them notices nothing.
func TestI4_WhatRetentionTookIsTold(t *testing.T) {
	for _, pages := range []bool{true, false} {
		t.Run(fmt.Sprint("pages ", pages), func(t *testing.T) {
			Run(t, Config{Durability: schema.Durability_DURABILITY_MEMORY, MaxAge: time.Hour, Log: tinyTail}, func(w *World) {
				if !pages {
					w.StopBroker()
				}
				pen := w.Write("s", WriterOptions{Producer: "p"})
				there := w.Read("s", ReaderOptions{Ways: []Way{GRPC}})
				away := w.Read("s", ReaderOptions{})
				pen.SendEach(Tokens("old", 600))
				pen.Flush()
				there.Wait(600)
				away.Wait(600)
				away.Stop()
				w.Sleep(30 * time.Minute)
				pen.SendEach(Tokens("middle", 100))
				pen.Flush()
				w.Sleep(45 * time.Minute)
				pen.SendEach(Tokens("young", 100))
				pen.Flush()
				w.Sleep(10 * time.Second)

				all := w.Edge(0).Stored("s")
				oldest, head := all[0].GetSeq(), all[len(all)-1].GetSeq()
				if head != 800 || oldest == 1 || oldest > 601 {
					t.Fatalf("%d to %d are stored; the first 600 are old, and something of them should be gone", oldest, head)
				}
				if got := there.Wait(800); len(got) != 800 || len(there.Truncated()) != 0 {
					t.Errorf("who was there all the time has %d envelopes and was told %v", len(got), there.Truncated())
				}
				for i, way := range Ways() {
					r := w.Read("s", ReaderOptions{Ways: []Way{way}, Edges: []*Edge{w.Edge(i % 2)}, After: uint64(3 * i)})
					r.WantSame(all)
					told := r.Truncated()
					if len(told) != 1 || told[0].GetWantedSeq() != uint64(3*i)+1 || told[0].GetFirstSeq() != oldest {
						t.Errorf("%s: the data begins at %d; it was told %v", way, oldest, told)
					}
					if late := w.Read("s", ReaderOptions{Ways: []Way{way}, After: 600, Epoch: away.Epoch()}); len(late.Wait(800)) != 200 || len(late.Truncated()) != 0 {
						t.Errorf("%s: after 600 it was told %v", way, late.Truncated())
					}
				}
			})
		})
	}
}

// TestI4_ADeletedSessionIsTold: followers learn that their history has ended, wherever they are; the old cursor is void, and the new history begins at 1.
func TestI4_ADeletedSessionIsTold(t *testing.T) {
	Run(t, Config{}, func(w *World) {
		for i, way := range Ways() {
			session := way.String()
			pen := w.Join(w.Edge(0), ProtoSocket, session)
			pen.Put(session, Tokens("old", 3)...)
			near, far := w.Read(session, ReaderOptions{Ways: []Way{way}, Edges: []*Edge{w.Edge(0)}}), w.Read(session, ReaderOptions{Ways: []Way{way}, Edges: []*Edge{w.Edge(1)}})
			near.Wait(3)
			far.Wait(3)
			w.must(w.Call(w.Edge(i%2), "DeleteSession", &schema.DeleteSessionRequest{Session: session}, new(schema.DeleteSessionResponse)))
			for _, r := range []*Reader{near, far} {
				if told := r.WaitRefused(); told.Code != schema.Code_CODE_SESSION_DELETED {
					t.Errorf("%s: a follower was told %v", way, told)
				}
			}
			if a := pen.Put(session, Token("new ")); a.First != 1 {
				t.Errorf("%s: the new history begins at %d", way, a.First)
			}
			if told := w.Read(session, ReaderOptions{Ways: []Way{way}, After: 3, Epoch: near.Epoch()}).WaitRefused(); told.Code != schema.Code_CODE_EPOCH_MISMATCH {
				t.Errorf("%s: with the old cursor it was told %v", way, told)
			}
			if got := w.Read(session, ReaderOptions{Ways: []Way{way}, Edges: []*Edge{w.Edge(1)}}); Texts(got.Wait(1)) != "new " || got.Epoch() == near.Epoch() {
				t.Errorf("%s: the new history reads %q, its epoch is %s", way, Texts(got.Got()), got.Epoch())
			}
		}
	})
}

// TestI4_ADrainedEdgeLosesNothing drains an edge in the middle of streams: everybody goes on at another.
func TestI4_ADrainedEdgeLosesNothing(t *testing.T) {
	Run(t, Config{Latency: time.Millisecond}, func(w *World) {
		var readers []*Reader
		var writers []*Writer
		for _, way := range Ways() {
			readers = append(readers, w.Read("s", ReaderOptions{Ways: []Way{way}}))
			x := w.Write("s", WriterOptions{Ways: []Way{way}, Producer: way.String()})
			x.SendEach(Tokens(way.String(), 200))
			writers = append(writers, x)
		}
		peer := w.Follow(w.Edge(0), GRPC, &schema.Attach{Session: "s"})
		writers[0].WaitAcked(30)
		w.DrainEdge(w.Edge(0), "A new version comes.")
		if g := peer.WantGoingAway(); g.GetReason() == "" {
			t.Errorf("it was told %v", g)
		}
		for _, x := range writers {
			x.Flush()
		}
		all := w.Edge(1).WantStored("s", writers...)
		if len(all) != 1000 {
			t.Errorf("%d of 1000 envelopes are stored", len(all))
		}
		for _, r := range readers {
			r.WantSame(all)
		}
	})
}
