package broker

import (
	"slices"
	"time"

	"tidemark/schema"
)

// Worker is a member of a group, on this edge. Its methods may be called concurrently, and do not wait for NATS.
type Worker struct {
	// Static after construction.
	group *workGroup
	wake  func()
	may   func(pattern string) error

	// Guarded by group.mu.
	settings  groupSettings // as they were when it joined
	credit    int           // how many items it may have in hand; 0 once it shall get no more
	hand      int           // items that are its own, those in queue included
	queue     []*heldItem   // assigned and not taken
	cancelled []Cancellation
	gone      bool
	why       error // why it is gone, where it did not leave by itself
}

// Group is the group's settings as they were when the worker joined.
func (w *Worker) Group() *schema.WorkGroup {
	w.group.mu.Lock()
	defer w.group.mu.Unlock()
	return w.settings.proto(w.group.key)
}

// Take returns items that the worker has in its hands now, at most so many; none where there is nothing, and then Wake is called when there is. The error is going_away once the worker is closed.
func (w *Worker) Take(most int) ([]*Item, error) {
	w.group.mu.Lock()
	defer w.group.mu.Unlock()
	if w.why != nil {
		return nil, w.why
	}
	if w.gone {
		return nil, schema.Refuse(schema.Code_CODE_GOING_AWAY, "This edge hands out no more work; join group %q through another.", w.group.key.name)
	}
	n := min(most, len(w.queue))
	if n == 0 {
		return nil, nil
	}
	items := make([]*Item, n)
	for i, h := range w.queue[:n] {
		h.taken = true
		item := h.work
		items[i] = &item
	}
	w.queue = slices.Delete(w.queue, 0, n)
	return items, nil
}

// Cancellations returns what was cancelled of what is in hand, each once. Wake is called when there is something.
func (w *Worker) Cancellations() []Cancellation {
	w.group.mu.Lock()
	defer w.group.mu.Unlock()
	all := w.cancelled
	w.cancelled = nil
	return all
}

// Ack settles an item: it is done. False where the worker does not hold it.
func (w *Worker) Ack(id uint64) bool {
	h := w.group.take(w, id)
	if h == nil {
		return false
	}
	w.group.done(h)
	w.group.ask()
	return true
}

// Nack gives an item back: it is handed out again after delay, or, where that is nil, as the group's backoff says. The group gives it up where it was handed out as often as it allows. False as with Ack.
func (w *Worker) Nack(id uint64, delay *time.Duration, reason string) bool {
	g := w.group
	h := g.take(w, id)
	if h == nil {
		return false
	}
	g.mu.Lock()
	s := g.settings
	g.mu.Unlock()
	switch {
	case h.attempt >= s.maxDeliver:
		if reason == "" {
			reason = "It was handed out " + times(h.attempt) + ", and given back each time."
		}
		g.giveUp(h, s, h.attempt, reason)
	case delay != nil:
		g.answer(h, nak(*delay))
	default:
		g.answer(h, nak(s.rest(h.attempt)))
	}
	g.ask()
	return true
}

// ackWait is how long the worker has for an item: what the group gives by now, and no less than it gave when the worker joined, who goes by that. The server's patience covers both: it never becomes less. Called with group.mu held.
func (w *Worker) ackWait() time.Duration { return max(w.settings.ackWait, w.group.settings.ackWait) }

// InProgress begins an item's deadline anew, with the worker's whole time, and returns it. False as with Ack.
func (w *Worker) InProgress(id uint64) (deadline time.Time, held bool) {
	g := w.group
	g.mu.Lock()
	h := g.held[id]
	if h == nil || h.worker != w {
		g.mu.Unlock()
		return time.Time{}, false
	}
	wait := w.ackWait()
	deadline = time.Now().Add(wait)
	h.work.Deadline = deadline
	h.timer.Reset(wait)
	g.mu.Unlock()
	g.said(h.ack, ackProgress)
	return deadline, true
}

// Term settles an item for good: the group gives it up. False as with Ack.
func (w *Worker) Term(id uint64, reason string) bool {
	g := w.group
	h := g.take(w, id)
	if h == nil {
		return false
	}
	g.mu.Lock()
	s := g.settings
	g.mu.Unlock()
	if reason == "" {
		reason = "The worker said that nobody can do it."
	}
	g.giveUp(h, s, h.attempt, reason)
	g.ask()
	return true
}

// Retire ends the handing out: what the worker has not taken goes back to the group, and it gets no more. What it has taken it may still settle.
func (w *Worker) Retire() { w.group.leave(w, true) }

// Close ends the worker; what it has in hand goes back to the group at once. It may be called more than once.
func (w *Worker) Close() { w.group.leave(w, false) }
