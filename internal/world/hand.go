package world

import (
	"context"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	"tidemark/broker"
	"tidemark/schema"
)

// Hand is a worker of a group at an edge's log, past the gateway. Its verbs belong to one goroutine.
type Hand struct {
	w      *World
	edge   *Edge
	worker broker.Taker
	wake   chan struct{}
}

// JoinGroup makes a worker of a group, at the edge's log.
func (w *World) JoinGroup(e *Edge, o broker.WorkOptions) *Hand {
	w.t.Helper()
	h := &Hand{w: w, edge: e, wake: make(chan struct{}, 1)}
	o.Wake = func() {
		select {
		case h.wake <- struct{}{}:
		default:
		}
	}
	if o.May == nil {
		o.May = func(string) error { return nil }
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	var err error
	h.worker, err = e.Log.Join(ctx, Session("").Tenant, o)
	w.must(err)
	w.closers = append(w.closers, h.worker.Close)
	return h
}

// Try waits for an item for so long; nil where none comes.
func (h *Hand) Try(most time.Duration) *broker.Item {
	h.w.t.Helper()
	t := time.NewTimer(most)
	defer t.Stop()
	for {
		items, err := h.worker.Take(1)
		h.w.must(err)
		if len(items) > 0 {
			return items[0]
		}
		select {
		case <-h.wake:
		case <-t.C:
			return nil
		}
	}
}

// Want wants an item.
func (h *Hand) Want() *broker.Item {
	h.w.t.Helper()
	i := h.Try(patience)
	if i == nil {
		h.w.t.Fatalf("a worker at %s is handed nothing", h.edge.Name)
	}
	return i
}

// WantNothing wants no item for so long.
func (h *Hand) WantNothing(d time.Duration) {
	h.w.t.Helper()
	if i := h.Try(d); i != nil {
		h.w.t.Fatalf("a worker at %s is handed %s, attempt %d", h.edge.Name, ItemText(i), i.Attempt)
	}
}

// Done settles an item.
func (h *Hand) Done(i *broker.Item) {
	h.w.t.Helper()
	if !h.worker.Ack(i.ID) {
		h.w.t.Errorf("a worker at %s lost %s before it settled it", h.edge.Name, ItemText(i))
	}
}

// WantCancelled wants to hear that an item was cancelled, and returns when.
func (h *Hand) WantCancelled(i *broker.Item) broker.Cancellation {
	h.w.t.Helper()
	t := time.NewTimer(patience)
	defer t.Stop()
	for {
		all := h.worker.Cancellations()
		if at := slices.IndexFunc(all, func(c broker.Cancellation) bool { return c.ID == i.ID }); at >= 0 {
			return all[at]
		}
		select {
		case <-h.wake:
		case <-t.C:
			h.w.t.Fatalf("a worker at %s does not hear that %s was cancelled", h.edge.Name, ItemText(i))
		}
	}
}

// Close ends the worker.
func (h *Hand) Close() { h.worker.Close() }

// ItemText is what an item's envelope says.
func ItemText(i *broker.Item) string { return Text(ItemEnvelope(i)) }

// ItemEnvelope is an item's envelope.
func ItemEnvelope(i *broker.Item) *schema.Envelope {
	e := new(schema.Envelope)
	if proto.Unmarshal(i.Envelope, e) != nil {
		return nil
	}
	return e
}
