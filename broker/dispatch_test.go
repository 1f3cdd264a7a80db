package broker

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/reflect/protoreflect"

	"tidemark/schema"
)

func TestWorkItemFieldNumber(t *testing.T) {
	f := (&schema.WorkItem{}).ProtoReflect().Descriptor().Fields().ByName(protoreflect.Name("envelope"))
	if f.Number() != workItemEnvelope {
		t.Errorf("WorkItem.envelope has the number %d, the code says %d", f.Number(), workItemEnvelope)
	}
}

// dispatches counts what a projector stores for groups, and what says that it did.
func dispatches(subject string) bool {
	return strings.HasPrefix(subject, "work.") || derives(subject)
}

// worked is the stream WORK, message by message.
func (s *shelf) worked() []*workItem {
	s.Helper()
	var items []*workItem
	for from := uint64(1); ; {
		batch, more, err := s.r.scan(context.Background(), workStream, from)
		if err != nil {
			s.Fatal(err)
		}
		for _, m := range batch {
			w, err := parseWorkItem(m.data)
			if err != nil {
				s.Fatal(err)
			}
			w.seq = m.seq
			items = append(items, w)
			from = m.seq + 1
		}
		if !more {
			return items
		}
	}
}

// wantWork wants WORK to hold what the sessions as they are now have that makes work: all of it, once, each session's in its order, and of each item the ones before it.
func (s *shelf) wantWork(scribes ...*scribe) {
	s.Helper()
	want := map[schema.SessionID][]string{}
	for _, w := range scribes {
		for _, f := range w.frames {
			for seq, raw := range f.All().Each() {
				if e, err := schema.Scan(raw); err == nil && schema.IsWork(e.Kind) {
					want[w.id] = append(want[w.id], fmt.Sprint(f.Epoch, " ", seq, " ", e.Kind, " ", f.StreamSeq))
				}
			}
		}
	}
	got := map[schema.SessionID][]string{}
	last := map[schema.SessionID]map[schema.Kind]uint64{}
	for _, w := range s.worked() {
		id := w.id()
		got[id] = append(got[id], fmt.Sprint(w.GetEpoch(), " ", w.GetSeq(), " ", w.kind, " ", w.GetThrough()))
		if last[id] == nil {
			last[id] = map[schema.Kind]uint64{}
		}
		before := map[schema.Kind]uint64{}
		for _, b := range w.GetBefore() {
			before[schema.Kind(b.GetKind())] = b.GetWorkSeq()
		}
		if fmt.Sprint(before) != fmt.Sprint(last[id]) {
			s.Errorf("session %s: before seq %d stand %v, it says %v", id, w.GetSeq(), last[id], before)
		}
		last[id][w.kind] = w.seq
	}
	for id, items := range want {
		if fmt.Sprint(items) != fmt.Sprint(got[id]) {
			s.Errorf("session %s has the work\n%v\nand WORK holds\n%v", id, items, got[id])
		}
		delete(got, id)
	}
	for id, items := range got {
		s.Errorf("WORK holds, of session %s, which has none: %v", id, items)
	}
}

// TestI7_ProjectorKilledAnywhere: a projector that is killed before or after any message that it stores is continued by the next, and every envelope that makes work is dispatched once, in its order.
func TestI7_ProjectorKilledAnywhere(t *testing.T) {
	step := 3
	if testing.Short() {
		step = 12
	}
	for _, after := range []bool{false, true} {
		for at, killed := 1, true; killed; at += step {
			synctest.Test(t, func(t *testing.T) {
				s := newShelf(t, 1, 41)
				a, b := s.scribe("default", "a"), s.scribe("default", "b")
				all := []*scribe{a, b}
				a.some(100)
				w := newWire(s.node)
				w.counts, w.cutAt, w.after = dispatches, at+1, after
				first := s.run(w, "one")
				for i := range 5 {
					a.some(60)
					b.some(30)
					x := s.scribe("other", fmt.Sprint("once", i))
					x.some(20)
					all = append(all, x)
					if i == 2 {
						b.delete()
					}
					time.Sleep(700 * time.Millisecond)
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
				second := s.run(nil, "one")
				time.Sleep(5 * time.Second)
				second.end(t)
				s.wantWork(all...)
				if t.Failed() {
					t.Fatalf("killed at message %d, after it: %v", at, after)
				}
			})
		}
	}
}

// TestI7_AFrozenProjectorDispatchesNothingTwice: another takes the stream over within 5 s; the one that was frozen in the middle of its work thaws, and what it still had to say changes nothing.
func TestI7_AFrozenProjectorDispatchesNothingTwice(t *testing.T) {
	for seed := range uint64(6) {
		synctest.Test(t, func(t *testing.T) {
			s := newShelf(t, 1, 43+seed)
			a, b := s.scribe("default", "a"), s.scribe("default", "b")
			w := newWire(s.node)
			zombie := s.run(w, "zombie")
			heir := s.run(nil, "heir")
			time.Sleep(2 * time.Second)
			a.some(200)
			time.Sleep(time.Duration(seed) * 300 * time.Microsecond)
			w.frozen.Store(true)
			a.some(100)
			b.some(300)
			began := time.Now()
			for n := 0; n == 0; time.Sleep(10 * time.Millisecond) {
				for _, x := range s.worked() {
					if x.GetSession() == "b" {
						n++
					}
				}
				if time.Since(began) > time.Minute {
					t.Fatal("nobody takes the stream over")
				}
			}
			if took := time.Since(began); took > 5*time.Second {
				t.Errorf("the work of a stream whose projector is frozen is dispatched after %s", took)
			}
			time.Sleep(5 * time.Second)
			s.wantWork(a, b)
			w.frozen.Store(false)
			a.some(50)
			time.Sleep(20 * time.Second)
			s.wantWork(a, b)
			zombie.end(t)
			heir.end(t)
		})
	}
}

// TestI7_WorkIsForgottenWithItsSession: a deletion takes the items of the history, and the next begins with its own.
func TestI7_WorkIsForgottenWithItsSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newShelf(t, 1, 47)
		a, b := s.scribe("default", "a"), s.scribe("default", "b")
		p := s.run(nil, "one")
		a.some(300)
		b.some(100)
		time.Sleep(time.Second)
		s.wantWork(a, b)
		a.delete()
		time.Sleep(time.Second)
		s.wantWork(b)
		a.some(200)
		time.Sleep(time.Second)
		s.wantWork(a, b)
		p.end(t)
	})
}

// TestI7_PagesComeBehindWork: what says that a frame was projected is not stored before the frame's work is, or whoever goes on from there would pass over it.
func TestI7_PagesComeBehindWork(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newShelf(t, 1, 53)
		a := s.scribe("default", "a")
		a.some(600)
		w := newWire(s.node)
		w.counts, w.cutAt = func(subject string) bool { return strings.HasPrefix(subject, "work.") }, 1
		nc, err := Server{InProcess: w, Name: "test"}.connect(testLogger(t), "test")
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close()
		p := newProjection(nc, s.r, free{}, 1<<20, newProjectionMetrics(nil), testLogger(t))
		p.work = &dispatch{}
		s.feed(p, 0, 1, s.lastSeq("LOG_00"))
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := p.flush(ctx); err == nil {
			t.Error("the flush of a process that is dead succeeded")
		}
		if n := len(s.derived()); n != 0 || len(s.worked()) != 0 {
			t.Errorf("%d pages and records are stored, and %d work items", n, len(s.worked()))
		}
	})
}

// forgetful is a guard under which a projection takes lanes for empty, for as many attempts as it has left.
type forgetful struct {
	free
	p    *projected
	left int
}

func (f *forgetful) fresh(context.Context) error {
	if f.left > 0 {
		f.left--
		f.p.work = map[schema.Kind]laneEnd{}
	}
	return nil
}

// TestI7_AConflictIsNoTrouble: that a lane has come further than it was known to, as after every takeover, nobody is warned of; of a conflict that stays, once.
func TestI7_AConflictIsNoTrouble(t *testing.T) {
	for attempts, want := range map[int]int{1: 0, 5: 1} {
		synctest.Test(t, func(t *testing.T) {
			s := newShelf(t, 1, 67)
			a := s.scribe("default", "a")
			a.append(&schema.Envelope{Payload: &schema.Envelope_UserMessage{UserMessage: &schema.UserMessage{Message: "hello"}}})
			p := s.run(nil, "one")
			time.Sleep(time.Second)
			p.end(t)
			var said strings.Builder
			again := newProjection(s.nc, s.r, nil, 1<<20, newProjectionMetrics(nil), slog.New(slog.NewTextHandler(&said, &slog.HandlerOptions{Level: slog.LevelWarn})))
			again.work = &dispatch{}
			s.feed(again, 0, 1, s.lastSeq("LOG_00"))
			again.guard = &forgetful{p: again.work.items[0].s, left: attempts}
			if err := again.storeWork(t.Context()); err != nil {
				t.Error(err)
			}
			if n := strings.Count(said.String(), "level=WARN"); n != want || len(s.worked()) != 1 {
				t.Errorf("%d conflicts made %d warnings and %d items:\n%s", attempts, n, len(s.worked()), said.String())
			}
		})
	}
}

// TestI7_AStreamedCallIsOneItem: of a tool call whose arguments come in pieces the last makes the item.
func TestI7_AStreamedCallIsOneItem(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newShelf(t, 1, 59)
		a := s.scribe("default", "a")
		p := s.run(nil, "one")
		for _, call := range []*schema.ToolCall{
			{CallId: "c", Name: "ls", ArgumentsDelta: `{"dir":`},
			{CallId: "c", ArgumentsDelta: `"/"`},
			{CallId: "c", ArgumentsDelta: `}`, Done: true},
			{CallId: "d", Name: "ls", ArgumentsJson: `{}`},
			{CallId: "e", Name: "now"},
			{CallId: "f", Name: "ls", ArgumentsDelta: `{}`},
			{CallId: "f", Done: true},
		} {
			a.append(&schema.Envelope{Payload: &schema.Envelope_ToolCall{ToolCall: call}})
		}
		time.Sleep(time.Second)
		var seqs []uint64
		for _, w := range s.worked() {
			seqs = append(seqs, w.GetSeq())
		}
		if fmt.Sprint(seqs) != "[3 4 5 7]" {
			t.Errorf("the items are of seqs %v", seqs)
		}
		p.end(t)
	})
}
