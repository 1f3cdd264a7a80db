package broker

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"tidemark/schema"
)

// Whatever the projection has come to, cold replay from any cut is the log.
func TestI4_ColdReplayIsTheLogWhateverIsProjected(t *testing.T) {
	for seed := range uint64(6) {
		synctest.Test(t, func(t *testing.T) {
			s := newShelf(t, 1, seed)
			ctx := t.Context()
			sessions := []*scribe{s.scribe("default", "a"), s.scribe("default", "b"), s.scribe("other", "a")}
			p, at := s.projection(1<<20), uint64(1)
			for range 30 {
				w := sessions[s.rng.IntN(3)]
				switch s.rng.IntN(8) {
				case 0:
					for range 1 + s.rng.IntN(3) {
						w.append(w.random(), w.large(1+s.rng.IntN(150<<10)), w.random())
					}
				case 1:
					if w.st.head > 0 {
						w.delete()
					}
				default:
					w.some(1 + s.rng.IntN(200))
				}
				time.Sleep(time.Duration(s.rng.IntN(3000)) * time.Millisecond)
				switch s.rng.IntN(6) {
				case 0, 1:
					at = s.feed(p, 0, at, min(s.lastSeq("LOG_00"), at+uint64(s.rng.IntN(100))))
				case 2:
					if err := p.tick(ctx, time.Now()); err != nil {
						t.Fatal(err)
					}
				case 3:
					if err := p.flush(ctx); err != nil {
						t.Fatal(err)
					}
				case 4:
					// Another projector, which knows nothing, from where the last one's checkpoint is.
					at = p.stored(at-1) + 1
					p = s.projection(1 << 20)
				}
			}
			for _, w := range sessions {
				if w.st.head == 0 {
					continue
				}
				for range 6 {
					after := s.rng.Uint64N(w.st.head + 1)
					var before *frame
					if s.rng.IntN(2) == 0 {
						before = w.frames[s.rng.IntN(len(w.frames))]
					}
					w.readAll(after, before, 4<<10<<s.rng.IntN(8))
				}
				w.readAll(w.st.head-min(w.st.head, 20), nil, 1)
				w.readAll(0, nil, 64<<10)
				if first, err := s.r.first(ctx, w.ln, w.st.epoch, nil); first != 1 || err != nil {
					t.Errorf("the first seq is said to be %d, %v", first, err)
				}
				w.checkState()
				w.checkSince()
				w.checkProducer()
			}
			if t.Failed() {
				t.Fatalf("seed %d", seed)
			}
		})
	}
}

// checkState compares the state that is taken over with the one that was folded all along.
func (w *scribe) checkState() {
	w.Helper()
	head, err := w.r.headFrame(context.Background(), w.ln)
	if err != nil {
		w.Fatal(err)
	}
	st, err := w.r.state(context.Background(), w.ln, head)
	if err != nil {
		w.Fatal(err)
	}
	if got, want := st.proto().String(), w.st.proto().String(); got != want {
		w.Fatalf("taken over:\n%s\nwritten:\n%s", got, want)
	}
	if st.recent.from != w.st.recent.from || len(st.recent.ids) != len(w.st.recent.ids) {
		w.Fatalf("ids are known from %d on, %d of them; want from %d, %d", st.recent.from, len(st.recent.ids), w.st.recent.from, len(w.st.recent.ids))
	}
	for _, id := range w.st.recent.ids {
		seq, _ := w.st.recent.find(id)
		if at, _ := st.recent.find(id); at != seq {
			w.Fatalf("id %s is known at %d, not at %d", id, at, seq)
		}
	}
}

// checkSince compares the place of a time with what the frames say.
func (w *scribe) checkSince() {
	w.Helper()
	for range 20 {
		f := w.frames[w.rng.IntN(len(w.frames))]
		at := f.Time.Add(time.Duration(w.rng.IntN(3)-1) * time.Microsecond)
		want := w.st.head
		for _, f := range w.frames {
			if !f.Time.Before(at) {
				want = f.First - 1
				break
			}
		}
		if got, err := w.r.since(context.Background(), w.ln, at, nil); got != want || err != nil {
			w.Fatalf("since %v is said to be behind %d, %v; want %d", at, got, err, want)
		}
	}
}

// checkProducer looks for envelopes of the producer, however old.
func (w *scribe) checkProducer() {
	w.Helper()
	places := make(map[schema.ProducerPlace]uint64)
	for _, f := range w.frames {
		for seq, raw := range f.All().Each() {
			e, err := schema.Scan(raw)
			if err != nil {
				w.Fatal(err)
			}
			if e.Producer.ID != "" {
				places[e.Producer] = seq
			}
		}
	}
	for p, want := range places {
		if got, err := w.r.producerPlace(context.Background(), w.ln, w.st.epoch, p); got != want || err != nil {
			w.Fatalf("%+v is said to be at %d, %v; want %d", p, got, err, want)
		}
	}
	if got, err := w.r.producerPlace(context.Background(), w.ln, w.st.epoch, schema.ProducerPlace{ID: "nobody", Epoch: 1, Seq: 1}); got != 0 || err != nil {
		w.Fatalf("a producer that never was is said to be at %d, %v", got, err)
	}
}

// A slot whose envelopes are large is stored in parts, and read back from any seq of it.
func TestSlotsInParts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newShelf(t, 1, 7)
		w := s.scribe("default", "large")
		p, at := s.projection(8<<20), uint64(1)
		for range 20 {
			w.append(w.large(1+s.rng.IntN(200<<10)), w.random())
			w.append(w.large(schema.MaxEnvelopeBytes - 1<<10))
			w.some(10)
			if s.rng.IntN(2) == 0 {
				at = s.feed(p, 0, at, s.lastSeq("LOG_00"))
				if err := p.flush(t.Context()); err != nil {
					t.Fatal(err)
				}
				if p.size > 4*maxPartBytes {
					t.Fatalf("the projection holds %d bytes of one session", p.size)
				}
			}
			if s.rng.IntN(5) == 0 {
				p = s.projection(8 << 20)
			}
		}
		s.feed(p, 0, at, s.lastSeq("LOG_00"))
		if err := p.flush(t.Context()); err != nil {
			t.Fatal(err)
		}
		log, err := s.js.Stream(t.Context(), "LOG_00")
		if err != nil {
			t.Fatal(err)
		}
		s.rebuilt()
		// From pages alone: all frames but the last are gone.
		if err := log.Purge(t.Context(), jetstream.WithPurgeSequence(w.st.frame)); err != nil {
			t.Fatal(err)
		}
		for after := uint64(0); after <= w.st.head; after += 1 + s.rng.Uint64N(90) {
			w.readAll(after, nil, 1+s.rng.IntN(3<<20))
		}
		p0, err := s.r.page(t.Context(), w.ln, 0)
		if err != nil || p0.parts < 10 {
			t.Fatalf("slot 0 is %+v, %v; want many parts", p0, err)
		}
	})
}

// What retention took is reported as a gap; what a page still has is not.
func TestI4_RetentionIsReported(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newShelf(t, 1, 3)
		w := s.scribe("default", "old")
		w.some(1000)
		log, err := s.js.Stream(t.Context(), "LOG_00")
		if err != nil {
			t.Fatal(err)
		}
		cut := func(seq uint64) *frame {
			for _, f := range w.frames {
				if f.Last() >= seq {
					if err := log.Purge(t.Context(), jetstream.WithPurgeSequence(f.StreamSeq)); err != nil {
						t.Fatal(err)
					}
					return f
				}
			}
			panic("no such frame")
		}
		begins := func(after, want uint64) {
			t.Helper()
			views, gap, err := s.r.cold(t.Context(), w.ln, Cursor{Epoch: w.st.epoch, Seq: after}, nil, 1<<20)
			if err != nil || len(views) == 0 || views[0].From != max(want, after+1) || (gap != 0) != (want > after+1) || gap != 0 && gap != want {
				t.Errorf("behind %d it goes on at %v with gap %d, %v; want %d", after, views, gap, err, want)
			}
			if first, err := s.r.first(t.Context(), w.ln, w.st.epoch, nil); first != want || err != nil {
				t.Errorf("the first seq is said to be %d, %v; want %d", first, err, want)
			}
		}
		// Without any page.
		f := cut(100)
		begins(0, f.First)
		begins(50, f.First)
		begins(f.First+3, f.First)
		// With pages of what was left, which then outlive the log.
		p := s.projection(1 << 20)
		s.feed(p, 0, 1, s.lastSeq("LOG_00"))
		if err := p.flush(t.Context()); err != nil {
			t.Fatal(err)
		}
		cut(900)
		begins(0, f.First)
		begins(99, f.First)
		begins(700, f.First)
		// Without the first pages.
		pages, err := s.js.Stream(t.Context(), "PAGE_00")
		if err != nil {
			t.Fatal(err)
		}
		for slot := range uint64(2) {
			if err := pages.Purge(t.Context(), jetstream.WithPurgeSubject(w.ln.pageSubject(slot, 0))); err != nil {
				t.Fatal(err)
			}
		}
		begins(0, 513)
		begins(300, 513)
		begins(600, 513)
		// The projection, begun anew, goes on behind what is missing.
		w.some(300)
		p = s.projection(1 << 20)
		s.feed(p, 0, 1, s.lastSeq("LOG_00"))
		if err := p.flush(t.Context()); err != nil {
			t.Fatal(err)
		}
		begins(0, 513)
		w.readAll(513, nil, 10<<10)
	})
}

// Pages of another history are as if they were not there.
func TestPagesOfAnotherHistoryAreIgnored(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newShelf(t, 1, 5)
		w := s.scribe("default", "twice")
		w.some(700)
		old := w.st.epoch
		p := s.projection(1 << 20)
		s.feed(p, 0, 1, s.lastSeq("LOG_00"))
		if err := p.flush(t.Context()); err != nil {
			t.Fatal(err)
		}
		w.delete()
		if _, _, err := s.r.cold(t.Context(), w.ln, Cursor{Epoch: old, Seq: 5}, nil, 1<<20); schema.CodeOf(err) != schema.Code_CODE_SESSION_DELETED {
			t.Fatalf("reading a deleted session: %v", err)
		}
		// The old pages are still there: nobody has projected the tombstone.
		w.some(400)
		if _, _, err := s.r.cold(t.Context(), w.ln, Cursor{Epoch: old, Seq: 5}, nil, 1<<20); schema.CodeOf(err) != schema.Code_CODE_SESSION_DELETED {
			t.Fatalf("reading the history before: %v", err)
		}
		w.readAll(0, nil, 20<<10)
		w.readAll(300, nil, 20<<10)
		w.checkState()
		if first, err := s.r.first(t.Context(), w.ln, w.st.epoch, nil); first != 1 || err != nil {
			t.Errorf("the first seq is said to be %d, %v", first, err)
		}
		// A projector that is behind, and was thought dead, does no harm.
		q := s.projection(1 << 20)
		s.feed(q, 0, 1, s.lastSeq("LOG_00"))
		if err := q.flush(t.Context()); err != nil {
			t.Fatal(err)
		}
		w.readAll(0, nil, 20<<10)
		s.rebuilt()
	})
}
