package broker

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"tidemark/internal/natsd"
	"tidemark/schema"
)

// running is a broker that runs, and how to end it.
type running struct {
	cancel context.CancelFunc
	over   chan error
}

func (s *shelf) run(w *wire, name string) *running {
	server := s.server()
	if w != nil {
		server.InProcess = w
	}
	b := mustBroker(s.TB, server, s.layout, name)
	ctx, cancel := context.WithCancel(context.Background())
	r := &running{cancel, make(chan error, 1)}
	go func() { r.over <- b.Run(ctx) }()
	return r
}

func (r *running) end(t testing.TB) {
	t.Helper()
	r.cancel()
	if err := <-r.over; err != nil {
		t.Error(err)
	}
}

// watch follows a session by cold reads alone until it is stopped, and checks that nothing is missing.
type watch struct {
	w    *scribe
	stop chan struct{}
	over chan error
	got  []byte
	at   Cursor
}

func (w *scribe) watch() *watch {
	f := &watch{w: w, stop: make(chan struct{}), over: make(chan error, 1)}
	go func() { f.over <- f.run() }()
	return f
}

func (f *watch) run() error {
	for stopping := false; ; {
		views, gap, err := f.w.r.cold(context.Background(), f.w.ln, f.at, nil, 8<<10)
		if err != nil || gap != 0 {
			return fmt.Errorf("behind %d: gap %d, %w", f.at.Seq, gap, err)
		}
		for _, v := range views {
			if v.From != f.at.Seq+1 {
				return fmt.Errorf("behind %d came %d", f.at.Seq, v.From)
			}
			f.got = append(f.got, v.Records()...)
			f.at = Cursor{v.Epoch, v.To}
		}
		if len(views) > 0 {
			continue
		}
		if stopping {
			return nil
		}
		select {
		case <-f.stop:
			stopping = true
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func (f *watch) end() {
	f.w.Helper()
	close(f.stop)
	if err := <-f.over; err != nil {
		f.w.Error(err)
		return
	}
	if f.at.Seq != f.w.st.head || !bytes.Equal(f.got, f.w.region(1, f.w.st.head)) {
		f.w.Errorf("the reader came to %d of %d, or read what was not written", f.at.Seq, f.w.st.head)
	}
}

// derives counts what a projector stores, and its checkpoints.
func derives(subject string) bool {
	return strings.HasPrefix(subject, "page.") || strings.HasPrefix(subject, "$KV.") || strings.HasPrefix(subject, "$JS.API.STREAM.PURGE")
}

// A projector that is killed at any point, before or after any of its stores and checkpoints, is continued by the next: what is derived is what the log says, and a reader sees no gap meanwhile.
func TestProjectorKilledAnywhere(t *testing.T) {
	for _, after := range []bool{false, true} {
		// Until a run ends before its turn has come.
		for at, killed := 1, true; killed; at += 2 {
			synctest.Test(t, func(t *testing.T) {
				s := newShelf(t, 1, 11)
				a, b, c := s.scribe("default", "a"), s.scribe("default", "b"), s.scribe("default", "c")
				a.some(300)
				b.some(20)
				w := newWire(s.node)
				// Not what lays the deployment out.
				w.counts, w.cutAt, w.after = derives, at+1, after
				first := s.run(w, "one")
				reading := a.watch()
				for i := range 6 {
					a.some(90)
					// A session that gets nothing more: only its own flush stores it.
					s.scribe("default", fmt.Sprint("once", i)).some(1 + 5*i)
					switch i {
					case 1:
						b.delete()
					case 2:
						b.some(10)
					case 3:
						c.append(c.large(200<<10), c.large(100<<10), c.random())
					case 4:
						b.delete()
					}
					time.Sleep(1500 * time.Millisecond)
				}
				killed = false
				select {
				case <-w.dead:
					killed = true
				default:
				}
				first.cancel()
				if err := <-first.over; err != nil && !killed {
					t.Error(err)
				}
				a.some(40)
				c.some(5)
				second := s.run(nil, "one")
				time.Sleep(5 * time.Second)
				reading.end()
				second.end(t)
				if through := s.checkpoint("LOG_00"); through != s.lastSeq("LOG_00") {
					t.Errorf("the checkpoint is at %d, the log at %d", through, s.lastSeq("LOG_00"))
				}
				s.rebuilt()
				a.readAll(0, nil, 32<<10)
				if t.Failed() {
					t.Fatalf("killed at message %d, after it: %v", at, after)
				}
			})
		}
	}
}

func (s *shelf) checkpoint(stream string) uint64 {
	s.Helper()
	kv, err := s.js.KeyValue(context.Background(), projectionBucket)
	if err != nil {
		s.Fatal(err)
	}
	_, record, err := newLease(kv, stream, "", testLogger(s.TB)).read(context.Background())
	if err != nil {
		s.Fatal(err)
	}
	return record.GetThrough()
}

// A projector that was frozen, and thaws after another took over, overwrites nothing that is newer and leaves.
func TestI6_FrozenProjectorIsFenced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newShelf(t, 1, 13)
		a, b := s.scribe("default", "a"), s.scribe("default", "b")
		w := newWire(s.node)
		zombie := s.run(w, "zombie")
		time.Sleep(2 * time.Second)
		a.some(300)
		b.some(400)
		time.Sleep(100 * time.Millisecond)
		// It has the frames, and not yet stored the last pages.
		w.frozen.Store(true)
		heir := s.run(nil, "heir")
		time.Sleep(5 * time.Second)
		if through := s.checkpoint("LOG_00"); through == s.lastSeq("LOG_00") {
			t.Error("the heir did not wait for the lease to run out")
		}
		a.some(500)
		b.delete()
		b.some(30)
		time.Sleep(10 * time.Second)
		if through := s.checkpoint("LOG_00"); through != s.lastSeq("LOG_00") {
			t.Fatalf("the heir is at %d of %d", through, s.lastSeq("LOG_00"))
		}
		before := s.derived()
		w.frozen.Store(false)
		time.Sleep(20 * time.Second)
		if after := s.derived(); !maps.EqualFunc(before, after, bytes.Equal) {
			t.Error("the zombie changed what was derived")
		}
		a.some(100)
		time.Sleep(5 * time.Second)
		zombie.end(t)
		heir.end(t)
		s.rebuilt()
		a.readAll(0, nil, 32<<10)
		b.readAll(0, nil, 32<<10)
	})
}

// What the next history of a deleted session has stored stays, however late the pages of the one before are cleared.
func TestI6_ClearingTakesOnlyWhatWasThereBefore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newShelf(t, 1, 31)
		w := s.scribe("default", "a")
		w.some(600)
		slow := s.projection(1 << 20)
		at := s.feed(slow, 0, 1, s.lastSeq("LOG_00"))
		if err := slow.flush(t.Context()); err != nil {
			t.Fatal(err)
		}
		w.delete()
		slow.guard = overtaken{func() {
			// Between the question and the purge, another projector goes all the way.
			w.some(300)
			quick := s.projection(1 << 20)
			s.feed(quick, 0, at, s.lastSeq("LOG_00"))
			if err := quick.flush(t.Context()); err != nil {
				t.Fatal(err)
			}
		}}
		s.feed(slow, 0, at, s.lastSeq("LOG_00"))
		for subject, data := range s.derived() {
			if strings.HasPrefix(subject, "page.") && !strings.Contains(describe(subject, data), "epoch "+w.st.epoch) {
				t.Errorf("%s is left of the deleted history", subject)
			}
		}
		if n := len(s.derived()); n != 2+1 {
			t.Errorf("%d messages are derived, want two pages and a record", n)
		}
		s.rebuilt()
	})
}

// overtaken is a guard that lets something happen before it answers.
type overtaken struct{ meanwhile func() }

func (overtaken) fresh(context.Context) error                         { return nil }
func (overtaken) confirm(context.Context, lane, string) (bool, error) { return true, nil }
func (o overtaken) mayClear(context.Context, lane, uint64) (bool, error) {
	o.meanwhile()
	return true, nil
}

// A lease has one holder: another waits for as long as it is renewed, takes it when it is not, and who lost it learns so whatever it asks.
func TestI6_LeaseHasOneHolder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newShelf(t, 1, 37)
		kv, err := s.js.KeyValue(t.Context(), projectionBucket)
		if err != nil {
			t.Fatal(err)
		}
		open := func(name string) *lease { return newLease(kv, "LOG_00", name, testLogger(t)) }
		takes := func(l *lease) time.Duration {
			t.Helper()
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			began := time.Now()
			if err := l.acquire(ctx); err != nil {
				return -1
			}
			return time.Since(began)
		}
		a, b := open("a"), open("b")
		if d := takes(a); d != 0 {
			t.Fatalf("the first took it after %v", d)
		}
		stop := make(chan struct{})
		var beating sync.WaitGroup
		beating.Go(func() {
			for through := uint64(1); ; through++ {
				select {
				case <-stop:
					return
				case <-time.After(beatEvery):
					if err := a.renew(t.Context(), through); err != nil {
						t.Error(err)
					}
				}
			}
		})
		if d := takes(b); d >= 0 {
			t.Fatalf("another took it after %v while it was held", d)
		}
		close(stop)
		beating.Wait()
		if d := takes(b); d < leaseTTL || d > leaseTTL+2*time.Second {
			t.Fatalf("another took it after %v of silence", d)
		}
		if b.position() == 0 {
			t.Error("the checkpoint was lost on the way")
		}
		for what, err := range map[string]error{
			"renew": a.renew(t.Context(), 99), "fresh": a.fresh(t.Context()), "release": a.release(t.Context(), 99),
		} {
			if err == nil {
				t.Errorf("who lost the lease may still %s", what)
			}
		}
		if ok, err := a.mayClear(t.Context(), lane{}, 1); ok || !errors.Is(err, errLeaseLost) {
			t.Errorf("who lost the lease may clear: %v, %v", ok, err)
		}
		if ok, err := a.confirm(t.Context(), lane{}, ""); ok || !errors.Is(err, errLeaseLost) {
			t.Errorf("who lost the lease may write what was removed: %v, %v", ok, err)
		}
		// A process that comes back under its name does not wait; nor does anybody after a clean end.
		again := open("b")
		if d := takes(again); d != 0 {
			t.Errorf("the same process took it again after %v", d)
		}
		if err := again.release(t.Context(), 7); err != nil {
			t.Fatal(err)
		}
		c := open("c")
		if d := takes(c); d != 0 || c.position() != 7 {
			t.Errorf("after a clean end it was taken after %v, at %d", d, c.position())
		}
	})
}

// The same without any lease: two projections that take turns, each with pages in memory that the other has overwritten.
func TestI6_PagesOnlyGrow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newShelf(t, 1, 17)
		a, b := s.scribe("default", "a"), s.scribe("default", "b")
		var both [2]*projection
		at := [2]uint64{1, 1}
		for i := range both {
			both[i] = s.projection(1 << 20)
		}
		through := map[string]uint64{}
		for range 60 {
			a.some(1 + s.rng.IntN(100))
			if s.rng.IntN(4) == 0 {
				b.append(b.large(1+s.rng.IntN(100<<10)), b.random(), b.large(1+s.rng.IntN(200<<10)))
			}
			i := s.rng.IntN(2)
			at[i] = s.feed(both[i], 0, at[i], min(s.lastSeq("LOG_00"), at[i]+uint64(s.rng.IntN(60))))
			if err := both[i].flush(t.Context()); err != nil {
				t.Fatal(err)
			}
			for _, w := range []*scribe{a, b} {
				for slot := range slotOf(max(w.st.head, 1)) + 1 {
					p, err := s.r.page(t.Context(), w.ln, slot)
					if err != nil {
						t.Fatal(err)
					}
					if p == nil {
						continue
					}
					if subject := w.ln.pageSubject(slot, 0); p.through < through[subject] {
						t.Fatalf("page %s went back from %d to %d", subject, through[subject], p.through)
					} else {
						through[subject] = p.through
					}
				}
			}
		}
		for i := range both {
			s.feed(both[i], 0, at[i], s.lastSeq("LOG_00"))
			if err := both[i].flush(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		s.rebuilt()
	})
}

// Pages and records that were deleted or damaged by hand come back; what is right stays as it is.
func TestRebuildBringsBackWhatIsMissing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newShelf(t, 2, 19)
		var all []*scribe
		for i := range 6 {
			w := s.scribe("default", fmt.Sprint("s", i))
			w.some(500)
			all = append(all, w)
		}
		r := s.run(nil, "one")
		time.Sleep(5 * time.Second)
		r.end(t)
		want := s.derived()
		if got := len(want); got != 6*2+6 {
			t.Fatalf("%d messages are derived, want 18", got)
		}
		for i, w := range all {
			pages, err := s.js.Stream(t.Context(), s.r.pageOf(w.ln))
			if err != nil {
				t.Fatal(err)
			}
			switch i % 3 {
			case 0:
				err = pages.Purge(t.Context(), jetstream.WithPurgeSubject(w.ln.pagesSubject()))
			case 1:
				_, err = s.js.Publish(t.Context(), w.ln.pageSubject(0, 0), []byte("damaged"))
			case 2:
				_, err = s.js.Publish(t.Context(), registrySubject(w.ln), nil)
			}
			if err != nil {
				t.Fatal(err)
			}
			w.readAll(0, nil, 16<<10)
		}
		one, err := Rebuild(t.Context(), RebuildConfig{Server: s.server(), Session: &all[0].id})
		if err != nil || one.Pages != 2 {
			t.Fatalf("the rebuild of a session did %+v, %v", one, err)
		}
		rest, err := Rebuild(t.Context(), RebuildConfig{Server: s.server()})
		if err != nil || rest.Pages != 2+2 || rest.Records != 2 {
			t.Fatalf("the rebuild did %+v, %v; want 4 pages and 2 records", rest, err)
		}
		if got := s.derived(); !maps.EqualFunc(got, want, bytes.Equal) {
			t.Error("what was brought back is not what was there")
		}
		if _, err := Rebuild(t.Context(), RebuildConfig{Server: s.server(), Session: &schema.SessionID{Tenant: "default", Name: "none"}}); schema.CodeOf(err) != schema.Code_CODE_SESSION_NOT_FOUND {
			t.Errorf("rebuilding no session: %v", err)
		}
	})
}

// Memory is bounded: sessions go out of it and come back.
func TestI8_ProjectionIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newShelf(t, 1, 23)
		const budget = 256 << 10
		p, at := s.projection(budget), uint64(1)
		var all []*scribe
		for i := range 40 {
			all = append(all, s.scribe("default", fmt.Sprint("s", i)))
		}
		for range 300 {
			all[s.rng.IntN(len(all))].some(1 + s.rng.IntN(120))
			at = s.feed(p, 0, at, s.lastSeq("LOG_00"))
			if p.size > budget {
				t.Fatalf("%d bytes are held, %d allowed", p.size, budget)
			}
			if n := p.idle.Len(); n != len(p.sessions) {
				t.Fatalf("%d sessions are in the list, %d in memory", n, len(p.sessions))
			}
		}
		if len(p.sessions) == len(all) {
			t.Fatal("nothing was put out of memory; the test shows nothing")
		}
		if err := p.flush(t.Context()); err != nil {
			t.Fatal(err)
		}
		s.rebuilt()
		for _, w := range all {
			w.readAll(0, nil, 16<<10)
		}
	})
}

// A broker that is there before its server waits for it; one whose configuration does not fit the deployment says so.
func TestBrokerWaitsForNATS(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newShelf(t, 1, 29)
		away := &late{}
		b := mustBroker(t, Server{InProcess: away, Name: "late"}, s.layout, "late")
		ctx, cancel := context.WithCancel(t.Context())
		over := make(chan error, 1)
		go func() { over <- b.Run(ctx) }()
		time.Sleep(30 * time.Second)
		away.node.Store(s.node)
		w := s.scribe("default", "a")
		w.some(10)
		time.Sleep(30 * time.Second)
		if p, err := s.r.page(t.Context(), w.ln, 0); p == nil || err != nil {
			t.Errorf("the page is %v, %v", p, err)
		}
		cancel()
		if err := <-over; err != nil {
			t.Error(err)
		}
		other := s.layout
		other.Streams = 3
		if err := mustBroker(t, s.server(), other, "other").Run(t.Context()); err == nil || !strings.Contains(err.Error(), "1 log streams") {
			t.Errorf("a broker with another number of streams: %v", err)
		}
	})
}

type late struct {
	node atomic.Pointer[natsd.Server]
}

func (l *late) InProcessConn() (net.Conn, error) {
	n := l.node.Load()
	if n == nil {
		return nil, nats.ErrNoServers
	}
	return n.InProcessConn()
}
