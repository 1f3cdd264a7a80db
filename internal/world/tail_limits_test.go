package world

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/proto"

	"tidemark/edge-grpc"
	"tidemark/internal/client"
	"tidemark/schema"
)

// TestI8_TailInFlight: a member that acknowledges nothing is sent 16 batches, or 4 MiB, and the rest when it does; another group is not held up.
func TestI8_TailInFlight(t *testing.T) {
	Run(t, Config{Edges: 1, Streams: 1}, func(w *World) {
		const n = 900
		x := w.Write("s", WriterOptions{Producer: "p"})
		for i := range n {
			e := Token(fmt.Sprintf("%d ", i))
			e.GetToken().Text += strings.Repeat("x", 20<<10)
			x.Send(e)
		}
		x.Flush()
		silent := w.Tail(w.Edge(0), "", &schema.TailOpen{Group: "silent"}, nil)
		prompt := w.Tail(w.Edge(0), "", &schema.TailOpen{Group: "prompt"}, acking)
		count := func(x *Tailer) (envelopes int) {
			for _, b := range x.Batches() {
				for _, f := range b.GetSessions() {
					envelopes += len(f.GetEnvelopes())
				}
			}
			return envelopes
		}
		w.Until("another group has all", func() bool { return count(prompt) == n })
		w.Sleep(10 * time.Second)
		batches, size := silent.Batches(), 0
		for _, b := range batches {
			size += proto.Size(b)
		}
		if len(batches) == 0 || len(batches) > 16 || size > 4<<20 {
			t.Errorf("%d batches of %d bytes were sent, and nothing was acknowledged", len(batches), size)
		}
		for acked := 0; count(silent) < n; acked++ {
			w.Until("there is another batch", func() bool { return len(silent.Batches()) > acked })
			b := silent.Batches()[acked]
			w.must(silent.Ack(b.GetPartition(), b.GetThrough()))
			if open := len(silent.Batches()) - acked; open > 17 {
				t.Fatalf("%d batches are not acknowledged", open)
			}
			synctest.Wait()
		}
	})
}

// TestTail_DeadAndFrozenMembers: the partitions of a member whose edge was killed are another's within some six seconds; one whose edge was frozen for longer than that finds them gone, and does no harm.
func TestTail_DeadAndFrozenMembers(t *testing.T) {
	Run(t, Config{Edges: 3}, func(w *World) {
		a := newAnalysts(w, 1)
		x := w.Write("s", WriterOptions{Edges: []*Edge{w.Edge(2)}, Producer: "p"})
		first, second := a.join(w.Edge(0), 0), a.join(w.Edge(1), 0)
		shared := func() bool { return len(first.Partitions()) == 1 && len(second.Partitions()) == 1 }
		w.Until("they share", shared)
		began := time.Now()
		w.KillEdge(w.Edge(0))
		w.Until("the other has all", func() bool { return len(second.Partitions()) == 2 })
		if took := time.Since(began); took > 7*time.Second {
			t.Errorf("the partitions of a dead member were taken over after %s", took)
		}
		a.watch()
		third := a.join(w.Edge(2), 0)
		w.Until("they share again", func() bool { return len(third.Partitions()) == 1 && len(second.Partitions()) == 1 })
		w.Edge(1).Freeze()
		w.Until("it has all", func() bool { return len(third.Partitions()) == 2 })
		x.SendEach(Tokens("t", 500))
		x.Flush()
		w.Until("all of it is there", func() bool { return len(third.Texts()["s"]) == len(Texts(Tokens("t", 500))) })
		w.Edge(1).Thaw()
		w.Sleep(5 * time.Second)
		a.watch()
		if len(third.Partitions()) != 1 || len(second.Partitions()) != 1 {
			t.Errorf("afterwards they have %v and %v", second.Partitions(), third.Partitions())
		}
		x.SendEach(Tokens("u", 100))
		x.Flush()
		w.Sleep(5 * time.Second)
		a.watch()
		a.mu.Lock()
		defer a.mu.Unlock()
		for seq := uint64(1); seq <= 600; seq++ {
			if !a.done[place{"s", seq}] {
				t.Fatalf("seq %d was not delivered", seq)
			}
		}
	})
}

// TestTail_OutlivesNATS: NATS restarts, and loses who the members are; they find each other again, and go on.
func TestTail_OutlivesNATS(t *testing.T) {
	Run(t, Config{}, func(w *World) {
		a := newAnalysts(w, 1)
		x := w.Write("s", WriterOptions{Producer: "p"})
		first, second := a.join(w.Edge(0), 0), a.join(w.Edge(1), 0)
		shared := func() bool { return len(first.Partitions()) == 1 && len(second.Partitions()) == 1 }
		w.Until("they share", shared)
		for round := range 3 {
			x.SendEach(Tokens(fmt.Sprint(round), 50))
			x.Flush()
			w.StopNATS()
			w.Sleep(time.Duration(round*10) * time.Second)
			w.StartNATS()
			x.SendEach(Tokens(fmt.Sprint("later", round), 50))
			x.Flush()
			w.Sleep(25 * time.Second)
			if !shared() {
				t.Errorf("round %d: they have %v and %v", round, first.Partitions(), second.Partitions())
			}
		}
		w.Until("all of it is there", func() bool {
			a.mu.Lock()
			defer a.mu.Unlock()
			return len(a.done) == 300
		})
		t.Logf("%d came again", a.again)
	})
}

// TestTail_Limit: an edge takes so many tails, and another when one has ended.
func TestTail_Limit(t *testing.T) {
	Run(t, Config{Edges: 1, GRPC: func(c *edgegrpc.Config) { c.MaxTails = 2 }}, func(w *World) {
		open := &schema.TailOpen{Group: "g"}
		first := w.Tail(w.Edge(0), "", open, nil)
		w.Until("one is", func() bool { return first.Partitions() != nil })
		second := w.Tail(w.Edge(0), "", open, nil)
		w.Until("two are", func() bool { return second.Partitions() != nil })
		if end := w.Tail(w.Edge(0), "", open, nil).Ended(); end.Code != schema.Code_CODE_LIMIT_EXCEEDED {
			t.Errorf("a third was told %s", end)
		}
		first.Cut()
		w.Sleep(time.Second)
		third := w.Tail(w.Edge(0), "", open, nil)
		w.Until("there is room again", func() bool { return third.Partitions() != nil })
	})
}

// TestTail_ClientComesBack: the Go client goes on over edges that are killed and drained, and leaves with all that it acknowledged.
func TestTail_ClientComesBack(t *testing.T) {
	Run(t, Config{Edges: 3}, func(w *World) {
		c, err := client.New(client.Config{
			Edges: []string{"grpc://edge0.grpc:1", "grpc://edge1.grpc:1"}, Token: w.Token(schema.Role_ROLE_ANALYST, "*"),
			Dial: func(ctx context.Context, _, addr string) (net.Conn, error) {
				_, conn, err := w.net.dial(ctx, addr)
				return conn, err
			},
		})
		w.must(err)
		x := w.Write("s", WriterOptions{Edges: []*Edge{w.Edge(2)}, Producer: "p"})
		tail := c.Tail(client.TailOptions{Group: "g"})
		got, lost := map[uint64]bool{}, 0
		read := func(until int) {
			ctx, cancel := context.WithTimeout(w.t.Context(), patience)
			defer cancel()
			for len(got) < until {
				e, err := tail.Next(ctx)
				w.must(err)
				if e.Lost != nil {
					lost++
				}
				for _, f := range e.Batch.GetSessions() {
					for _, v := range f.GetEnvelopes() {
						got[v.GetSeq()] = true
					}
				}
				if e.Batch != nil {
					w.must(tail.Ack(ctx, e.Batch.GetPartition(), e.Batch.GetThrough()))
				}
			}
		}
		x.SendEach(Tokens("a", 100))
		read(100)
		w.RestartEdge(w.Edge(0))
		w.Sleep(15 * time.Second)
		x.SendEach(Tokens("b", 100))
		read(200)
		w.DrainEdge(w.Edge(1), "A deployment.")
		x.SendEach(Tokens("c", 100))
		read(300)
		if lost == 0 {
			t.Error("it has lost no connection; the test shows nothing")
		}
		if !tail.Leave() {
			t.Error("it had no connection to leave")
		}
		for {
			e, err := tail.Next(w.t.Context())
			if errors.Is(err, io.EOF) {
				break
			}
			w.must(err)
			if e.Batch != nil {
				t.Error("there was something left")
			}
		}
		tail.Close()
		again := w.Tail(w.Edge(2), "", &schema.TailOpen{Group: "g"}, nil)
		w.Until("the group is free", func() bool { return len(again.Partitions()) == 2 })
		w.Sleep(time.Second)
		if n := len(again.Batches()); n > 0 {
			t.Errorf("%d batches came again that were acknowledged", n)
		}
	})
}
