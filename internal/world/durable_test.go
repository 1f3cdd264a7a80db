package world

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/proto"

	"tidemark/schema"
)

// TestI1_AcknowledgedOnlyAfterStored publishes by every way while NATS stops, starts and crashes in the middle of it. While it is away nothing is acknowledged, and in the end everything that was is there.
func TestI1_AcknowledgedOnlyAfterStored(t *testing.T) {
	Run(t, Config{Latency: time.Millisecond}, func(w *World) {
		var writers []*Writer
		for i, way := range Ways() {
			x := w.Write(way.String(), WriterOptions{Ways: []Way{way}, Edges: []*Edge{w.Edge(i % 2)}, Producer: "p"})
			x.SendEach(Tokens(way.String(), 1000))
			writers = append(writers, x)
		}
		acked := func() (n int) {
			for _, x := range writers {
				n += len(x.Acked())
			}
			return n
		}
		for round := range 3 {
			for _, x := range writers {
				x.WaitAcked(200*round + 20)
			}
			w.StopNATS()
			w.Sleep(10 * time.Millisecond) // what NATS had said arrives
			synctest.Wait()
			before := acked()
			if before == 1000*len(writers) {
				t.Error("everything was stored before NATS stopped; the test shows nothing")
			}
			w.Sleep(3 * time.Second)
			if now := acked(); now != before {
				t.Errorf("round %d: %d publishes were acknowledged while there was no NATS", round, now-before)
			}
			w.StartNATS()
		}
		for _, x := range writers {
			x.WaitAcked(700)
		}
		w.CrashNATS()
		for _, x := range writers {
			x.Flush()
		}
		fresh := w.StartEdge()
		for i, way := range Ways() {
			if stored := fresh.WantStored(way.String(), writers[i]); len(stored) != 1000 {
				t.Errorf("%s: %d of 1000 envelopes are stored", way, len(stored))
			}
		}
	})
}

// TestI1_AcknowledgementsNameTheirClass asks each durability class by every way.
func TestI1_AcknowledgementsNameTheirClass(t *testing.T) {
	for _, class := range []schema.Durability{schema.Durability_DURABILITY_FSYNC, schema.Durability_DURABILITY_OS, schema.Durability_DURABILITY_MEMORY} {
		t.Run(schema.DurabilityWord(class), func(t *testing.T) {
			Run(t, Config{Edges: 1, Durability: class}, func(w *World) {
				e := w.Edge(0)
				for _, way := range Ways() {
					p := w.Join(e, way, "s")
					if !way.Single() {
						p.Send(&schema.ClientFrame{Frame: &schema.ClientFrame_Hello{Hello: &schema.Hello{}}})
						welcome := p.want("welcome", func(f *schema.ServerFrame) bool { return f.GetWelcome() != nil }).GetWelcome()
						if welcome.GetDurability() != class {
							t.Errorf("%s: the welcome names %s", way, welcome.GetDurability())
						}
					}
					if a := p.Put("s", Token(way.String())); a.Durability != class {
						t.Errorf("%s: the acknowledgement names %s", way, a.Durability)
					}
				}
				res := new(schema.AppendResponse)
				w.must(w.Call(e, "Append", &schema.AppendRequest{Session: "s", Envelopes: []*schema.Envelope{Token("call")}}, res))
				if res.GetDurability() != class || res.GetFirstSeq() != uint64(len(Ways())+1) {
					t.Errorf("Append: %v", res)
				}
			})
		})
	}
}

// TestI1_HeldWhileNATSIsAway: what comes while NATS is away is stored when it is back within [broker.Config.HoldFor], and its sender notices nothing but the wait.
func TestI1_HeldWhileNATSIsAway(t *testing.T) {
	Run(t, Config{}, func(w *World) {
		for i, way := range Ways() {
			session := way.String()
			p := w.Join(w.Edge(i%2), way, session)
			p.Put(session, Token("before "))
			w.StopNATS()
			id := p.Publish(session, Token("meanwhile "))
			p.WantUnanswered(id, 7*time.Second)
			w.StartNATS()
			if a := p.WantAck(id); a.First != 2 || a.Duplicate {
				t.Errorf("%s: %+v", way, a)
			}
			if got := Texts(w.Edge((i + 1) % 2).Stored(session)); got != "before meanwhile " {
				t.Errorf("%s: %q is stored", way, got)
			}
		}
	})
}

// TestI5_SeenOnlyWhatACrashCannotTake has followers by every way on both edges while the server is killed again and again in the middle of writes. What any of them saw, before or after, is what the log
// has in the end.
func TestI5_SeenOnlyWhatACrashCannotTake(t *testing.T) {
	for _, class := range []schema.Durability{schema.Durability_DURABILITY_FSYNC, schema.Durability_DURABILITY_OS} {
		t.Run(schema.DurabilityWord(class), func(t *testing.T) {
			Run(t, Config{Durability: class, Latency: time.Millisecond}, func(w *World) {
				var readers []*Reader
				for _, way := range Ways() {
					for _, e := range []*Edge{w.Edge(0), w.Edge(1)} {
						readers = append(readers, w.Read("s", ReaderOptions{Ways: []Way{way}, Edges: []*Edge{e}}))
					}
				}
				a := w.Write("s", WriterOptions{Edges: []*Edge{w.Edge(0)}, Producer: "a"})
				b := w.Write("s", WriterOptions{Ways: []Way{GRPC}, Edges: []*Edge{w.Edge(1)}})
				for crash := range 4 {
					a.SendEach(Tokens(fmt.Sprint("a", crash, "."), 60))
					b.SendEach(Tokens(fmt.Sprint("b", crash, "."), 60))
					a.WaitAcked(60*crash + 10)
					b.WaitAcked(60*crash + 5)
					w.CrashNATS()
				}
				a.Flush()
				b.Flush()
				all := w.StartEdge().WantStored("s", a, b)
				if len(all) != 480 {
					t.Errorf("%d of 480 envelopes are stored", len(all))
				}
				for _, r := range readers {
					r.WantSame(all)
				}
			})
		})
	}
}

// TestI5_NothingIsSeenBeforeItIsStored: an edge that cannot reach NATS shows nobody what it has taken, not even those who are connected to it.
func TestI5_NothingIsSeenBeforeItIsStored(t *testing.T) {
	Run(t, Config{}, func(w *World) {
		e := w.Edge(0)
		for _, way := range Ways() {
			session := way.String()
			p := w.Join(e, way, session)
			p.Put(session, Token("one "))
			near, far := w.Read(session, ReaderOptions{Ways: []Way{way}, Edges: []*Edge{e}}), w.Read(session, ReaderOptions{Ways: []Way{way}, Edges: []*Edge{w.Edge(1)}})
			near.Wait(1)
			far.Wait(1)
			e.Freeze()
			id := p.Publish(session, Token("two "))
			w.Sleep(5 * time.Second)
			if near.Seq() != 1 || far.Seq() != 1 {
				t.Errorf("%s: followers are at %d and %d; the second envelope is not stored", way, near.Seq(), far.Seq())
			}
			e.Thaw()
			p.WantAck(id)
			if a, b := near.Wait(2), far.Wait(2); !proto.Equal(a[1], b[1]) {
				t.Errorf("%s: %v and %v", way, a[1], b[1])
			}
		}
	})
}
