package world

import (
	"context"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"tidemark/schema"
)

// guest is a user who comes and goes on edges, in one session, with a limit.
type guest struct {
	w       *World
	session schema.SessionID
	limit   int
}

func newGuest(w *World, session string, limit int) *guest {
	return &guest{w, schema.SessionID{Tenant: "default", Name: session}, limit}
}

// try asks an edge for a seat. The answer must come within seconds.
func (g *guest) try(e *Edge) (func(), schema.Code) {
	g.w.t.Helper()
	began := time.Now()
	leave, err := e.Log.Enter(context.Background(), g.session, "ada", g.limit)
	if took := time.Since(began); took > 4*time.Second {
		g.w.t.Errorf("%s took %s to answer who wanted a seat", e.Name, took)
	}
	if err == nil {
		return leave, 0
	}
	return nil, schema.CodeOf(err)
}

// in is a seat that must be there.
func (g *guest) in(e *Edge) (leave func()) {
	g.w.t.Helper()
	leave, code := g.try(e)
	if code != 0 {
		g.w.t.Fatalf("%s refused a seat: %s", e.Name, code.Word())
	}
	return leave
}

// out checks that there is no seat.
func (g *guest) out(e *Edge, want schema.Code) {
	g.w.t.Helper()
	if _, code := g.try(e); code != want {
		g.w.t.Fatalf("%s answered who wanted a seat with %s, want %s", e.Name, code.Word(), want.Word())
	}
}

// soon waits for a seat and says how long that took.
func (g *guest) soon(e *Edge) (leave func(), took time.Duration) {
	g.w.t.Helper()
	for began := time.Now(); ; g.w.Sleep(10 * time.Millisecond) {
		leave, code := g.try(e)
		switch took = time.Since(began); {
		case code == 0:
			return leave, took
		case code != tooMany:
			g.w.t.Fatalf("%s answered who wanted a seat with %s", e.Name, code.Word())
		case took > patience:
			g.w.t.Fatalf("%s has no seat within %s", e.Name, took)
		}
	}
}

const tooMany = schema.Code_CODE_TOO_MANY_CONNECTIONS

// keys is how many keys the bucket of presence has, or marks as removed; -1 where there is no bucket.
func (w *World) keys(js jetstream.JetStream) int {
	w.t.Helper()
	s, err := js.Stream(w.t.Context(), "KV_PRESENCE")
	if err != nil {
		return -1
	}
	return int(s.CachedInfo().State.Msgs)
}

func (w *World) jetStream() jetstream.JetStream {
	w.t.Helper()
	js, err := jetstream.New(w.nats())
	w.must(err)
	return js
}

// TestPresenceEndsWithItsEdge: the seats that an edge held when it was killed are free within seconds, those of one that was drained at once. Nothing of either stays.
func TestPresenceEndsWithItsEdge(t *testing.T) {
	Run(t, Config{Durability: schema.Durability_DURABILITY_OS}, func(w *World) {
		js := w.jetStream()
		g, once := newGuest(w, "s", 2), newGuest(w, "never again", 2)
		g.in(w.Edge(0))
		g.in(w.Edge(0))
		once.in(w.Edge(0))
		g.out(w.Edge(1), tooMany)

		w.KillEdge(w.Edge(0))
		w.Sleep(time.Second)
		g.out(w.Edge(1), tooMany)
		leave, took := g.soon(w.Edge(1))
		t.Logf("free after %s", took)
		if took < time.Second || took > 10*time.Second {
			t.Errorf("the seats of an edge that was killed are free after %s more; its lease is of 10 s", took)
		}
		second := g.in(w.Edge(1))
		g.out(w.Edge(1), tooMany)

		// The next life of the edge is another: it begins without seats, and those of its life before do not come back with it.
		w.Edge(0).boot()
		g.out(w.Edge(0), tooMany)
		once.in(w.Edge(1))
		once.in(w.Edge(1))
		once.out(w.Edge(1), tooMany)
		leave()
		second()

		held, _ := g.soon(w.Edge(0))
		defer held()
		g.in(w.Edge(0))
		g.out(w.Edge(1), tooMany)
		w.DrainEdge(w.Edge(0), "The test stops it.")
		if _, took := g.soon(w.Edge(1)); took > 100*time.Millisecond {
			t.Errorf("the seats of an edge that was drained are free after %s", took)
		}

		// Records that nobody writes any more go by themselves.
		w.KillEdge(w.Edge(1))
		if n := w.keys(js); n < 3 {
			t.Errorf("the bucket has %d keys, want a lease and two records at least", n)
		}
		w.StopBroker()
		w.Sleep(12 * time.Minute)
		if n := w.keys(js); n != 0 {
			t.Errorf("%d keys of edges that are no more are still there", n)
		}
	})
}

// TestPresenceLeavesNothing: who left is forgotten.
func TestPresenceLeavesNothing(t *testing.T) {
	Run(t, Config{Durability: schema.Durability_DURABILITY_OS}, func(w *World) {
		js := w.jetStream()
		for i := range 30 {
			g := newGuest(w, string(rune('A'+i)), 3)
			for range 2 {
				defer g.in(w.Edge(i % 2))()
			}
			g.in(w.Edge((i + 1) % 2))()
		}
		if n := w.Edge(0).Counted("tidemark_presence_seats") + w.Edge(1).Counted("tidemark_presence_seats"); n != 60 {
			t.Errorf("%v seats are counted of 60", n)
		}
		w.Sleep(3 * time.Second)
		if n := w.keys(js); n != 32 {
			t.Errorf("the bucket has %d keys, want a lease of each edge and a record of each session", n)
		}
	})
	Run(t, Config{Durability: schema.Durability_DURABILITY_OS}, func(w *World) {
		js := w.jetStream()
		for i := range 30 {
			g := newGuest(w, string(rune('A'+i)), 3)
			var leaves []func()
			for j := range 3 {
				leaves = append(leaves, g.in(w.Edge((i+j)%2)))
			}
			g.out(w.Edge(i%2), tooMany)
			for _, leave := range leaves {
				leave()
			}
		}
		w.Sleep(5 * time.Second)
		if n := w.keys(js); n != 2 {
			t.Errorf("the bucket has %d keys after everybody left, want a lease of each edge", n)
		}
		for i := range 2 {
			if n := w.Edge(i).Counted("tidemark_presence_seats"); n != 0 {
				t.Errorf("%s counts %v seats after everybody left", w.Edge(i).Name, n)
			}
		}
	})
}

// TestPresenceOfAFrozenEdge: an edge that does not reach NATS for long lets nobody in and loses its seats. When it thaws it has those who are still there counted again, and nobody gets in before as many have left.
func TestPresenceOfAFrozenEdge(t *testing.T) {
	Run(t, Config{Durability: schema.Durability_DURABILITY_OS}, func(w *World) {
		g, other := newGuest(w, "s", 2), newGuest(w, "other", 2)
		first, second := g.in(w.Edge(0)), g.in(w.Edge(0))
		w.Edge(0).Freeze()
		// It knows of two by itself.
		g.out(w.Edge(0), tooMany)
		other.out(w.Edge(0), schema.Code_CODE_UNAVAILABLE)
		w.Sleep(15 * time.Second)
		third, fourth := g.in(w.Edge(1)), g.in(w.Edge(1))
		w.Edge(0).Thaw()
		w.Sleep(5 * time.Second)
		if n := w.Edge(0).Counted("tidemark_presence_leases_lost_total"); n != 1 {
			t.Errorf("the edge noticed %v times that it lost its lease", n)
		}
		// Four are there, and two may be.
		for _, leave := range []func(){third, first, fourth} {
			g.out(w.Edge(0), tooMany)
			g.out(w.Edge(1), tooMany)
			leave()
			w.Sleep(time.Second)
		}
		defer g.in(w.Edge(1))()
		g.out(w.Edge(0), tooMany)
		second()
		last, took := g.soon(w.Edge(1))
		defer last()
		if took > 100*time.Millisecond {
			t.Errorf("the seat of one who left is free after %s", took)
		}
	})
}

// TestPresenceOverARestartOfNATS: the bucket is lost with the server's memory. Nobody is refused a seat that is free, and what edges hold is counted again within seconds.
func TestPresenceOverARestartOfNATS(t *testing.T) {
	for _, c := range []struct {
		name    string
		restart func(w *World)
	}{
		{"restart", (*World).RestartNATS},
		{"crash", (*World).CrashNATS},
		{"away for long", func(w *World) { w.StopNATS(); w.Sleep(time.Minute); w.StartNATS() }},
	} {
		t.Run(c.name, func(t *testing.T) {
			Run(t, Config{Durability: schema.Durability_DURABILITY_OS}, func(w *World) {
				g, half := newGuest(w, "full", 2), newGuest(w, "half", 2)
				leave := g.in(w.Edge(0))
				defer g.in(w.Edge(1))()
				defer half.in(w.Edge(0))()
				for round := range 3 {
					c.restart(w)
					// Free for one, on either edge, as soon as an answer can be had.
					e := w.Edge(round % 2)
					var out func()
					w.Until("an answer", func() bool {
						l, code := half.try(e)
						out = l
						if code == tooMany {
							t.Fatalf("round %d: a seat that is free was refused right after NATS came back", round)
						}
						return code == 0
					})
					w.Sleep(5 * time.Second)
					g.out(w.Edge(0), tooMany)
					g.out(w.Edge(1), tooMany)
					half.out(w.Edge((round+1)%2), tooMany)
					out()
					leave()
					leave, _ = g.soon(w.Edge(round % 2))
				}
				leave()
			})
		})
	}
}

// TestPresenceWithoutABucket: a deployment of an older broker has no bucket. Edges count by themselves, say so once, and count together when there is one.
func TestPresenceWithoutABucket(t *testing.T) {
	Run(t, Config{Durability: schema.Durability_DURABILITY_OS}, func(w *World) {
		js := w.jetStream()
		g := newGuest(w, "s", 2)
		held := g.in(w.Edge(0))
		w.StopBroker()
		w.must(js.DeleteKeyValue(w.t.Context(), "PRESENCE"))
		for range 20 {
			// One more on the edge that has one, two on the other, and not more.
			leaves := []func(){g.in(w.Edge(0)), g.in(w.Edge(1)), g.in(w.Edge(1))}
			g.out(w.Edge(0), tooMany)
			g.out(w.Edge(1), tooMany)
			for _, leave := range leaves {
				leave()
			}
			w.Sleep(time.Second)
		}
		if n := w.keys(js); n != -1 {
			t.Fatalf("an edge made the bucket, which is the broker's to make; it has %d keys", n)
		}
		second := g.in(w.Edge(1))
		w.StartBroker()
		w.Until("the bucket", func() bool { return w.keys(js) >= 0 })
		w.Sleep(4 * time.Second)
		g.out(w.Edge(0), tooMany)
		g.out(w.Edge(1), tooMany)
		held()
		second()
		for i := range 2 {
			leave, _ := g.soon(w.Edge(i))
			defer leave()
		}
		g.out(w.Edge(0), tooMany)
	})
}
