package worktest

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"tidemark/broker"
	"tidemark/schema"
)

// settle takes an item out of the worker's hands, as it says, and does something with it; false where it is not there.
func (w *worker) settle(id uint64, what string, do func(*item)) bool {
	return w.let(id, true, what, do)
}

// let is settle, also of items that the worker was given and has not taken yet.
func (w *worker) let(id uint64, taken bool, what string, do func(*item)) bool {
	q := w.q
	q.mu.Lock()
	i := slices.IndexFunc(w.in, func(it *item) bool { return it.ID == id && (it.taken || !taken) })
	if i < 0 {
		q.mu.Unlock()
		return false
	}
	it := w.in[i]
	q.said = append(q.said, strings.Replace(what, "%", fmt.Sprint(it.seq), 1))
	it.timer.Stop()
	it.holder = nil
	w.in = slices.Delete(w.in, i, i+1)
	do(it)
	wakes := w.g.deal()
	q.mu.Unlock()
	all(wakes)
	return true
}

// Group implements [broker.Taker].
func (w *worker) Group() *schema.WorkGroup {
	w.q.mu.Lock()
	defer w.q.mu.Unlock()
	return w.g.state()
}

// state is the group as it is told. The caller holds mu.
func (g *group) state() *schema.WorkGroup {
	m := &schema.WorkGroup{Group: g.o.Group, Sessions: g.o.Sessions, AckWaitMs: uint64(g.o.AckWait.Milliseconds()), MaxDeliver: uint32(g.o.MaxDeliver), Ordered: g.o.Ordered, Created: timestamppb.New(g.created)}
	for _, k := range g.o.Kinds {
		m.Kinds = append(m.Kinds, k.String())
	}
	for _, d := range g.o.Backoff {
		m.BackoffMs = append(m.BackoffMs, uint64(d.Milliseconds()))
	}
	for _, it := range g.waiting {
		switch {
		case it.holder == nil:
			m.Waiting++
		case it.Attempt > 1:
			m.Redelivered++
			fallthrough
		default:
			m.InHand++
		}
	}
	return m
}

// Take implements [broker.Taker].
func (w *worker) Take(most int) ([]*broker.Item, error) {
	w.q.mu.Lock()
	defer w.q.mu.Unlock()
	if w.over != nil {
		return nil, w.over
	}
	var got []*broker.Item
	for _, it := range w.in {
		if !it.taken && len(got) < most {
			it.taken = true
			handed := it.Item
			handed.Cancelled = it.before
			got = append(got, &handed)
		}
	}
	return got, nil
}

// Cancellations implements [broker.Taker].
func (w *worker) Cancellations() []broker.Cancellation {
	w.q.mu.Lock()
	defer w.q.mu.Unlock()
	gone := w.gone
	w.gone = nil
	return gone
}

// Ack implements [broker.Taker].
func (w *worker) Ack(id uint64) bool {
	return w.settle(id, "ack %", func(it *item) {
		w.g.waiting = slices.DeleteFunc(w.g.waiting, func(of *item) bool { return of == it })
	})
}

// Nack implements [broker.Taker].
func (w *worker) Nack(id uint64, delay *time.Duration, reason string) bool {
	said := "nack %"
	if delay != nil {
		said += " " + delay.String()
	}
	return w.settle(id, said+": "+reason, func(it *item) { w.q.back(w.g, it, delay, reason) })
}

// Term implements [broker.Taker].
func (w *worker) Term(id uint64, reason string) bool {
	return w.settle(id, "term %: "+reason, func(it *item) { w.q.giveUp(w.g, it, reason) })
}

// InProgress implements [broker.Taker].
func (w *worker) InProgress(id uint64) (deadline time.Time, held bool) {
	w.q.mu.Lock()
	defer w.q.mu.Unlock()
	i := slices.IndexFunc(w.in, func(it *item) bool { return it.ID == id && it.taken })
	if i < 0 {
		return time.Time{}, false
	}
	it := w.in[i]
	it.Deadline = time.Now().Add(w.g.o.AckWait)
	it.timer.Reset(w.g.o.AckWait)
	w.q.said = append(w.q.said, fmt.Sprint("in_progress ", it.seq))
	return it.Deadline, true
}

// Retire implements [broker.Taker].
func (w *worker) Retire() { w.leave(true) }

// Close implements [broker.Taker].
func (w *worker) Close() { w.leave(false) }

// leave gives back what the worker holds; only: no more than what it has not taken.
func (w *worker) leave(only bool) {
	q := w.q
	q.mu.Lock()
	var in, kept []*item
	for _, it := range w.in {
		if only && it.taken {
			kept = append(kept, it)
		} else {
			in = append(in, it)
		}
	}
	w.in = kept
	w.g.workers = slices.DeleteFunc(w.g.workers, func(of *worker) bool { return of == w })
	for _, it := range in {
		it.timer.Stop()
		it.holder = nil
		q.said = append(q.said, fmt.Sprint("back ", it.seq))
	}
	wakes := w.g.deal()
	q.mu.Unlock()
	all(wakes)
}
