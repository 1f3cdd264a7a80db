package logtest

import (
	"context"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing/synctest"
	"time"

	"tidemark/schema"
)

// enter takes a seat that must be there, at once.
func (w *world) enter(subject string, limit int) (leave func()) {
	w.Helper()
	leave, err := w.tryEnter(subject, limit)
	if err != nil {
		w.Fatalf("a seat for %q: %v", subject, err)
	}
	return leave
}

// enterSoon takes a seat that must be there in a moment, because other edges learn of one who left by then.
func (w *world) enterSoon(subject string, limit int) (leave func()) {
	w.Helper()
	for range 100 {
		leave, err := w.tryEnter(subject, limit)
		if err == nil {
			return leave
		}
		w.refusal(schema.Code_CODE_TOO_MANY_CONNECTIONS, err)
		time.Sleep(10 * time.Millisecond)
	}
	w.Fatalf("there is no seat for %q a second after somebody left", subject)
	return nil
}

func (w *world) tryEnter(subject string, limit int) (leave func(), err error) {
	w.Helper()
	ctx, cancel := context.WithTimeout(w.Context(), patience)
	defer cancel()
	if leave, err = w.log.Enter(ctx, w.id, subject, limit); (leave == nil) == (err == nil) {
		w.Fatalf("a seat for %q was answered with leave %t and error %v", subject, leave != nil, err)
	}
	return leave, err
}

// full checks that there is no seat.
func (w *world) full(subject string, limit int) {
	w.Helper()
	_, err := w.tryEnter(subject, limit)
	w.refusal(schema.Code_CODE_TOO_MANY_CONNECTIONS, err)
}

func testSeatsAreLimited(w *world) {
	var leaves []func()
	for range 3 {
		leaves = append(leaves, w.enter("ada", 3))
	}
	for round := range 5 {
		w.full("ada", 3)
		w.full("ada", 2)
		// Another's limit is another's; this one finds a fourth.
		more := w.enter("ada", 4)
		w.full("ada", 4)
		more()
		leaves[round%3]()
		// Once more is not one more.
		leaves[round%3]()
		leaves[round%3] = w.enter("ada", 3)
	}
	// After all have left there is room for three, not more.
	for _, leave := range leaves {
		leave()
	}
	for range 3 {
		defer w.enter("ada", 3)()
	}
	w.full("ada", 3)
	// A session with people in it is not one with envelopes.
	if s := w.session(); s != nil {
		w.Errorf("people without envelopes made the session %v", s)
	}
}

func testSeatsAreApart(w *world) {
	// Each of these is another user of another session, however names are put together.
	names := []struct{ tenant, session, subject string }{
		{"default", "case", "ada"},
		{"default", "case", "Ada"},
		{"default", "case", "ada.0"},
		{"default", "case.ada", "0"},
		{"default", "case", "*"},
		{"default", "*", ">"},
		{"default", ">", "*"},
		{"other", "case", "ada"},
		{"default.case", "ada", "ada"},
		{"default", "case.ada", "ada"},
		{"a=2Eb", "c", "d"},
		{"a.b", "c", "d"},
		{"ü ", "\x00\t\r\n", "$KV.PRESENCE.x"},
		{"default", "case", "mailto:ada@example.org / 1"},
		{long("t"), long("s"), long("u")},
		{long("t"), long("s"), long("v")},
	}
	edges := []*world{w, w}
	if w.in.OpenEdge != nil {
		edges[1] = w.otherEdge()
	}
	for i, n := range names {
		v := edges[i%2].of(schema.SessionID{Tenant: n.tenant, Name: n.session})
		for range 2 {
			defer v.enter(n.subject, 2)()
		}
	}
	for _, n := range names {
		for _, v := range edges {
			v.of(schema.SessionID{Tenant: n.tenant, Name: n.session}).full(n.subject, 2)
		}
	}
}

// long is a name that is as long as names may be and takes three bytes for each of them where it is escaped.
func long(of string) string {
	name := of
	for len(name) < schema.MaxNameBytes {
		name += "."
	}
	return name
}

func testSeatsWithoutLimit(w *world) {
	for _, limit := range []int{0, -1} {
		var leaves []func()
		for range 50 {
			leaves = append(leaves, w.enter("ada", limit))
		}
		for _, leave := range leaves {
			leave()
			leave()
		}
	}
	// None of them counted.
	defer w.enter("ada", 1)()
	w.full("ada", 1)
	w.enter("ada", 0)()
	w.full("ada", 1)
}

func testSeatsStayWhenTheContextEnds(w *world) {
	ctx, cancel := context.WithCancel(w.Context())
	leave, err := w.log.Enter(ctx, w.id, "ada", 1)
	if err != nil {
		w.Fatal(err)
	}
	// The context is that of the asking. The seat stays until it is left.
	cancel()
	time.Sleep(time.Minute)
	w.full("ada", 1)
	leave()
	w.enter("ada", 1)()
}

func testSeatsHeldForLong(w *world) {
	b := w.otherEdge()
	x, y := w.enter("ada", 2), b.enter("ada", 2)
	for range 3 {
		time.Sleep(5 * time.Minute)
		w.full("ada", 2)
		b.full("ada", 2)
	}
	x()
	y()
	for range 2 {
		defer w.enterSoon("ada", 2)()
	}
}

func testSeatsOverEdges(w *world) {
	b := w.otherEdge()
	edges := []*world{w, b}
	var leaves []func()
	for i := range 4 {
		leaves = append(leaves, edges[i%2].enter("ada", 4))
	}
	for i := range 8 {
		w.full("ada", 4)
		b.full("ada", 4)
		// One leaves here, and another comes there.
		leaves[i%4]()
		leaves[i%4] = edges[i/2%2].enterSoon("ada", 4)
	}
	w.full("ada", 4)
	b.full("ada", 4)
	// Without a bound on one edge, and nothing moves on the other.
	w.enter("ada", 0)()
	b.full("ada", 4)
	for _, leave := range leaves {
		leave()
	}
	for range 4 {
		defer b.enterSoon("ada", 4)()
	}
	w.full("ada", 4)
}

// testSeatsHaveOneTaker has many come at once on two edges: as many get in as there are seats.
func testSeatsHaveOneTaker(w *world) {
	edges := []*world{w, w.otherEdge()}
	for round := range 10 {
		var wg sync.WaitGroup
		var mu sync.Mutex
		var leaves []func()
		for i := range 16 {
			wg.Go(func() {
				leave, err := edges[i%2].tryEnter("ada", 5)
				if err != nil {
					if code := schema.CodeOf(err); code != schema.Code_CODE_TOO_MANY_CONNECTIONS {
						w.Errorf("round %d: %v", round, err)
					}
					return
				}
				mu.Lock()
				defer mu.Unlock()
				leaves = append(leaves, leave)
			})
		}
		wg.Wait()
		if len(leaves) != 5 {
			w.Fatalf("round %d: %d of 16 who came at once got one of 5 seats", round, len(leaves))
		}
		for _, leave := range leaves {
			wg.Go(leave)
		}
		wg.Wait()
		// All edges know by then.
		time.Sleep(time.Second)
	}
}

// testSeatsComeAndGo has people come and go on two edges as they like, and counts them from outside.
func testSeatsComeAndGo(w *world) {
	const limit, people = 4, 3
	edges := []*world{w, w.otherEdge()}
	subjects := []string{"ada", "ben", "eve"}
	var inside [people]atomic.Int32
	var wg sync.WaitGroup
	var entered, refused atomic.Int32
	for i := range 18 {
		rng := rand.New(rand.NewPCG(uint64(i), 7))
		wg.Go(func() {
			who := i % people
			for range 60 {
				leave, err := edges[rng.IntN(2)].tryEnter(subjects[who], limit)
				if err != nil {
					if schema.CodeOf(err) != schema.Code_CODE_TOO_MANY_CONNECTIONS {
						w.Errorf("%s: %v", subjects[who], err)
						return
					}
					refused.Add(1)
				} else {
					entered.Add(1)
					if n := inside[who].Add(1); n > limit {
						w.Errorf("%s is there %d times", subjects[who], n)
					}
					time.Sleep(time.Duration(rng.IntN(20)) * time.Millisecond)
					inside[who].Add(-1)
					leave()
				}
				time.Sleep(time.Duration(rng.IntN(10)) * time.Millisecond)
			}
		})
	}
	wg.Wait()
	w.Logf("%d came in, %d were refused", entered.Load(), refused.Load())
	if entered.Load() == 0 || refused.Load() == 0 {
		w.Error("nobody came in, or nobody was refused; the case shows nothing")
	}
	// Nothing is left of them.
	synctest.Wait()
	time.Sleep(time.Second)
	for _, s := range subjects {
		for i := range limit {
			defer edges[i%2].enter(s, limit)()
		}
		w.full(s, limit)
	}
}

func testSeatsEndWithARestart(w *world) {
	if w.in.Restart == nil {
		w.Skip("this log cannot be restarted")
	}
	var leaves []func()
	for range 3 {
		leaves = append(leaves, w.enter("ada", 3))
	}
	w.full("ada", 3)
	w.log = w.in.Restart(w.T)
	for range 3 {
		defer w.enter("ada", 3)()
	}
	w.full("ada", 3)
	// Those of the life before have nothing to give back.
	for _, leave := range leaves {
		leave()
	}
	time.Sleep(time.Second)
	w.full("ada", 3)
}
