package broker

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"
)

// mortal is a guard that ends its projection after a number of questions: between any two steps of storing.
type mortal struct{ left int }

var errDead = stopError{errors.New("dead")}

func (m *mortal) fresh(context.Context) error {
	if m.left--; m.left < 0 {
		return errDead
	}
	return nil
}

func (m *mortal) confirm(ctx context.Context, _ lane, _ string) (bool, error) {
	err := m.fresh(ctx)
	return err == nil, err
}

func (m *mortal) mayClear(ctx context.Context, ln lane, _ uint64) (bool, error) {
	return m.confirm(ctx, ln, "")
}

// Projections that die between any two steps, each going on from the checkpoint of the one before, derive what one derives that never dies. Sessions that get nothing more are stored all the same.
func TestProjectionGoesOnFromItsCheckpoint(t *testing.T) {
	for seed := range uint64(8) {
		synctest.Test(t, func(t *testing.T) {
			s := newShelf(t, 1, 100+seed)
			ctx := t.Context()
			var open []*scribe
			checkpoint, deaths := uint64(0), 0
			var p *projection
			var at uint64
			begin := func() {
				p = s.projection(128 << 10)
				p.guard = &mortal{s.rng.IntN(12)}
				at = checkpoint + 1
			}
			begin()
			for step := range 120 {
				if len(open) < 4 || s.rng.IntN(8) == 0 {
					open = append(open, s.scribe("default", fmt.Sprint("s", step)))
				}
				w := open[s.rng.IntN(len(open))]
				switch s.rng.IntN(12) {
				case 0:
					if w.st.head > 0 {
						w.delete()
					}
				case 1:
					w.append(w.large(1+s.rng.IntN(300<<10)), w.random())
				default:
					w.some(1 + s.rng.IntN(150))
				}
				time.Sleep(time.Duration(s.rng.IntN(2000)) * time.Millisecond)
				to := min(s.lastSeq("LOG_00"), at+uint64(s.rng.IntN(20)))
				for err := error(nil); at <= to; at++ {
					m, getErr := s.r.at(ctx, "LOG_00", at)
					if getErr != nil {
						t.Fatal(getErr)
					}
					if m != nil {
						err = p.add(ctx, m.subject, m.seq, m.data, time.Now())
					}
					if err == nil && p.full() {
						err = p.store(ctx, nil)
					}
					if err == nil && s.rng.IntN(10) == 0 {
						err = p.tick(ctx, time.Now())
					}
					if errors.Is(err, errDead) {
						deaths++
						begin()
						break
					}
					if err != nil {
						t.Fatal(err)
					}
					if s.rng.IntN(5) == 0 {
						checkpoint = p.stored(at)
					}
				}
			}
			p = s.projection(128 << 10)
			s.feed(p, 0, checkpoint+1, s.lastSeq("LOG_00"))
			if err := p.flush(ctx); err != nil {
				t.Fatal(err)
			}
			if deaths < 5 {
				t.Errorf("only %d deaths; the test shows little", deaths)
			}
			s.rebuilt()
			if t.Failed() {
				t.Fatalf("seed %d", seed)
			}
		})
	}
}

// A frame that ends in the next slot is not behind the checkpoint before that slot's page is stored, and is stored when the session is idle.
func TestFrameAcrossTwoSlots(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newShelf(t, 1, 41)
		w := s.scribe("default", "a")
		w.some(250)
		last := w.append(w.random(), w.random(), w.random(), w.random(), w.random(), w.random(), w.random(), w.random())
		p := s.projection(1 << 20)
		s.feed(p, 0, 1, last.StreamSeq)
		if err := p.store(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
		if pg, err := s.r.page(t.Context(), w.ln, 0); err != nil || pg == nil || !pg.full() || pg.through != last.StreamSeq {
			t.Fatalf("the full page is %+v, %v", pg, err)
		}
		if got := p.stored(last.StreamSeq); got != last.StreamSeq-1 {
			t.Errorf("the checkpoint is %d, want %d", got, last.StreamSeq-1)
		}
		time.Sleep(flushIdle)
		if err := p.tick(t.Context(), time.Now()); err != nil {
			t.Fatal(err)
		}
		if pg, err := s.r.page(t.Context(), w.ln, 1); err != nil || pg == nil || pg.count != 2 || pg.first != 257 {
			t.Fatalf("the next page is %+v, %v", pg, err)
		}
		if got := p.stored(last.StreamSeq); got != last.StreamSeq {
			t.Errorf("the checkpoint is %d, want %d", got, last.StreamSeq)
		}
		s.rebuilt()
	})
}

// Between a page and the record there may be a death, and nothing more may come of the session: the record is written all the same.
func TestRecordFollowsItsPage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newShelf(t, 1, 43)
		w := s.scribe("default", "a")
		for range 4 {
			w.append(w.random(), w.random())
		}
		w.some(256 - 8)
		p := s.projection(1 << 20)
		s.feed(p, 0, 1, w.st.frame)
		if err := p.store(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
		if r, _, err := s.r.record(t.Context(), w.ln); r != nil || err != nil {
			t.Fatalf("the record is there already: %v, %v", r, err)
		}
		next := s.projection(1 << 20)
		s.feed(next, 0, p.stored(w.st.frame)+1, w.st.frame)
		if err := next.tick(t.Context(), time.Now()); err != nil {
			t.Fatal(err)
		}
		if r, _, err := s.r.record(t.Context(), w.ln); r.GetHeadSeq() != 256 || err != nil {
			t.Fatalf("the record is %v, %v", r, err)
		}
		s.rebuilt()
	})
}

// Pages that were deleted by hand come back as far as the log has them when the session gets a frame.
func TestPagesComeBackWithTheNextFrame(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newShelf(t, 1, 47)
		w := s.scribe("default", "a")
		w.some(900)
		p := s.projection(1 << 20)
		s.feed(p, 0, 1, w.st.frame)
		if err := p.flush(t.Context()); err != nil {
			t.Fatal(err)
		}
		s.forget()
		last := w.append(w.random())
		p = s.projection(1 << 20)
		s.feed(p, 0, last.StreamSeq, last.StreamSeq)
		if err := p.flush(t.Context()); err != nil {
			t.Fatal(err)
		}
		if n := len(s.derived()); n != 4+1 {
			t.Errorf("%d messages are derived, want 4 pages and a record", n)
		}
		s.rebuilt()
	})
}

// Of a deleted session nothing is left, not even what was in memory when it was deleted.
func TestDeletedSessionLeavesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newShelf(t, 1, 53)
		w := s.scribe("default", "a")
		w.some(600)
		p := s.projection(1 << 20)
		at := s.feed(p, 0, 1, w.st.frame)
		if err := p.tick(t.Context(), time.Now()); err != nil {
			t.Fatal(err)
		}
		w.delete()
		tombstone := w.st.frame
		at = s.feed(p, 0, at, tombstone)
		if err := p.flush(t.Context()); err != nil {
			t.Fatal(err)
		}
		if all := s.derived(); len(all) > 0 {
			t.Errorf("%d messages are left", len(all))
		}
		if p.size != 0 || len(p.dirty) != 0 || p.stored(tombstone) != tombstone {
			t.Errorf("%d bytes and %d sessions are left in memory", p.size, len(p.dirty))
		}
		w.some(10)
		s.feed(p, 0, at, w.st.frame)
		if err := p.flush(t.Context()); err != nil {
			t.Fatal(err)
		}
		s.rebuilt()
	})
}
