package main

import (
	"context"
	"fmt"
	"sync"

	"tidemark/schema"
)

// The last envelope of a session, and who writes it.
const (
	lastWriter = "the test"
	lastText   = "the end"
)

// maxWrong bounds what an audit lists.
const maxWrong = 10

// book is what is known of one session from outside: what people wrote, what was acknowledged to them, and what readers saw.
type book struct {
	session    string
	durability schema.Durability // that acknowledgements must name
	// leash is how many envelopes a writer may be ahead of the slowest, 0 for no bound.
	leash int

	mu      sync.Mutex // guards all below
	epoch   string
	stored  []entry // by seq-1: what the first who read it saw
	acks    map[string]uint64
	wrong   []string
	writers map[string]*progress
	moved   chan struct{} // closed and replaced when the slowest writer may have moved
}

// entry is an envelope as it was read.
type entry struct{ id, writer, text string }

// progress is what one writer has done: envelopes taken in hand, and acknowledged.
type progress struct{ taken, acked int }

func newBook(session string, d schema.Durability, leash int) *book {
	return &book{session: session, durability: d, leash: leash, acks: map[string]uint64{}, writers: map[string]*progress{}, moved: make(chan struct{})}
}

// complain notes what must not be. The caller holds mu.
func (b *book) complain(format string, args ...any) {
	if len(b.wrong) < maxWrong {
		b.wrong = append(b.wrong, fmt.Sprintf(format, args...))
	}
}

// tryTake returns the numbers of the next n envelopes of a writer, first to first+n-1, where it may write them now; otherwise moved is closed when that may have changed.
func (b *book) tryTake(writer string, n int) (first int, ok bool, moved <-chan struct{}) {
	b.mu.Lock()
	defer b.mu.Unlock()
	p := b.writers[writer]
	slowest := p.acked
	for _, other := range b.writers {
		slowest = min(slowest, other.acked)
	}
	if b.leash > 0 && p.taken+n > slowest+b.leash {
		return 0, false, b.moved
	}
	p.taken += n
	return p.taken - n + 1, true, nil
}

// take waits until the writer may; false where ctx has ended before.
func (b *book) take(ctx context.Context, writer string, n int) (first int, ok bool) {
	for ctx.Err() == nil {
		first, ok, moved := b.tryTake(writer, n)
		if ok {
			return first, true
		}
		select {
		case <-moved:
		case <-ctx.Done():
		}
	}
	return 0, false
}

// done notes that n envelopes of a writer were acknowledged.
func (b *book) done(writer string, n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.writers[writer].acked += n
	close(b.moved)
	b.moved = make(chan struct{})
}

// acked notes the place that an acknowledgement gives an envelope.
func (b *book) acked(id string, seq uint64, epoch string, d schema.Durability) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if before, ok := b.acks[id]; ok && before != seq {
		b.complain("envelope %s was acknowledged as seq %d, and then as %d", id, before, seq)
	}
	b.acks[id] = seq
	if d != b.durability {
		b.complain("envelope %s was acknowledged as %s, not %s", id, schema.DurabilityWord(d), schema.DurabilityWord(b.durability))
	}
	b.of(epoch)
}

// of checks the epoch. The caller holds mu.
func (b *book) of(epoch string) {
	switch {
	case epoch == "" || epoch == b.epoch:
	case b.epoch == "":
		b.epoch = epoch
	default:
		b.complain("the session is of epoch %s, and then of %s", b.epoch, epoch)
	}
}

// saw notes what a reader read; what others read under that seq must have been the same.
func (b *book) saw(reader string, seq uint64, epoch string, e entry) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.of(epoch)
	switch n := uint64(len(b.stored)); {
	case seq == n+1:
		b.stored = append(b.stored, e)
	case seq == 0 || seq > n+1:
		b.complain("the reader over %s got seq %d where nobody has more than %d", reader, seq, n)
	case b.stored[seq-1] != e:
		b.complain("the reader over %s got %v as seq %d, another one %v", reader, e, seq, b.stored[seq-1])
	}
}

// audit says what is wrong, once everything has been read.
func (b *book) audit() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	seqs := make(map[string]uint64, len(b.stored))
	next := map[string]int{}
	for i, e := range b.stored {
		seq := uint64(i + 1)
		if before, twice := seqs[e.id]; twice {
			b.complain("envelope %s is there twice, as seq %d and %d", e.id, before, seq)
		}
		seqs[e.id] = seq
		if e.writer == lastWriter {
			continue
		}
		next[e.writer]++
		if want := fmt.Sprint(next[e.writer]); e.text != want {
			b.complain("seq %d is %q of %s, whose next is %s", seq, e.text, e.writer, want)
		}
	}
	for id, seq := range b.acks {
		if seqs[id] != seq {
			b.complain("envelope %s was acknowledged as seq %d and is stored as %d (0: not at all)", id, seq, seqs[id])
		}
	}
	if len(seqs) != len(b.acks) {
		b.complain("%d envelopes are stored, %d were acknowledged in the end", len(seqs), len(b.acks))
	}
	for name, p := range b.writers {
		if p.taken != p.acked || next[name] != p.taken {
			b.complain("%s wrote %d envelopes, %d were acknowledged, %d are stored", name, p.taken, p.acked, next[name])
		}
		if p.taken == 0 {
			b.complain("%s wrote nothing", name)
		}
	}
	return b.wrong
}
