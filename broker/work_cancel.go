package broker

import (
	"context"
	"maps"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"tidemark/schema"
)

// cancelWatches follow the sessions of items in hand, so that a worker learns in a moment that what it works on was cancelled, through whichever edge. Only what is in hand for longer than cancelAfter is looked
// after: most items are settled before.
type cancelWatches struct {
	mu sync.Mutex // guards all below; never held while a group's mu is wanted
	of map[history]*cancelWatch
}

// history is one history of a session.
type history struct {
	id    schema.SessionID
	epoch string
}

func historyOf(h *heldItem) history { return history{h.item.id(), h.item.GetEpoch()} }

// cancelWatch follows the cancels of a session from behind a seq.
type cancelWatch struct {
	from  uint64
	seen  []seenCancel
	items map[*heldItem]*workGroup
	stop  context.CancelFunc
}

type seenCancel struct {
	seq uint64
	*schema.Cancel
}

const (
	// cancelAfter is well below the 50 ms in which a cancel has to come.
	cancelAfter = 10 * time.Millisecond
	// maxSeenCancels bounds the cancels of one session that are remembered while it has items in hand.
	maxSeenCancels = 256
)

// hits reports whether the cancel is about the item. Of a tool call the session then takes no result: see call.hit.
func (c *seenCancel) hits(h *heldItem) bool {
	if c.seq <= h.item.GetSeq() || h.item.kind == schema.KindCancel {
		return false
	}
	switch t := c.GetTarget().(type) {
	case *schema.Cancel_Session:
		return true
	case *schema.Cancel_RequestId:
		return t.RequestId != "" && (t.RequestId == h.request || t.RequestId == h.item.GetRunRequestId())
	case *schema.Cancel_RunId:
		return t.RunId == h.item.GetRunId() || t.RunId == h.request
	default:
		return false
	}
}

// watchCancel looks after an item from soon on. It does not block.
func (l *JetStreamLog) watchCancel(g *workGroup, h *heldItem) {
	h.watch = time.AfterFunc(cancelAfter, func() { l.startWatch(g, h) })
}

// unwatchCancel is the end of it. It does not block.
func (l *JetStreamLog) unwatchCancel(h *heldItem) {
	h.watch.Stop()
	c := &l.cancels
	c.mu.Lock()
	defer c.mu.Unlock()
	h.unwatched = true
	at := historyOf(h)
	if w := c.of[at]; w != nil {
		if delete(w.items, h); len(w.items) == 0 {
			w.stop()
			delete(c.of, at)
		}
	}
}

func (l *JetStreamLog) startWatch(g *workGroup, h *heldItem) {
	if s, err := schema.Scan(h.item.envelope); err == nil {
		h.request = string(s.RequestID)
	}
	c := &l.cancels
	c.mu.Lock()
	if h.unwatched {
		c.mu.Unlock()
		return
	}
	if c.of == nil {
		c.of = make(map[history]*cancelWatch)
	}
	at := historyOf(h)
	w := c.of[at]
	var hits []seenCancel
	if w != nil && w.from <= h.item.GetSeq() {
		w.items[h] = g
		for _, seen := range w.seen {
			if seen.hits(h) {
				hits = append(hits, seen)
			}
		}
	} else {
		next := &cancelWatch{from: h.item.GetSeq(), items: map[*heldItem]*workGroup{h: g}}
		if w != nil {
			w.stop()
			maps.Copy(next.items, w.items)
		}
		var ctx context.Context
		ctx, next.stop = context.WithCancel(l.storing)
		c.of[at] = next
		l.appending.Go(func() { l.watch(ctx, at, next) })
	}
	c.mu.Unlock()
	for _, seen := range hits {
		g.cancelled(h, seen)
	}
}

// watch follows the session while it has items in hand, which is until its history is over at the latest.
func (l *JetStreamLog) watch(ctx context.Context, of history, w *cancelWatch) {
	defer func() {
		w.stop()
		l.cancels.mu.Lock()
		defer l.cancels.mu.Unlock()
		if l.cancels.of[of] == w {
			delete(l.cancels.of, of)
		}
	}()
	var retry backoff
	for at := w.from; ; {
		f, err := l.Follow(ctx, of.id, FollowOptions{Start: Start{After: at}, Epoch: of.epoch, Kinds: []schema.Kind{schema.KindCancel}})
		if err == nil {
			retry = backoff{}
			at, err = l.readCancels(ctx, f, w)
			f.Close()
		}
		if ctx.Err() != nil || schema.CodeOf(err) != schema.Code_CODE_UNAVAILABLE || !retry.wait(ctx, err) {
			return
		}
	}
}

// readCancels tells workers of the cancels that come, until something breaks. It returns how far it came.
func (l *JetStreamLog) readCancels(ctx context.Context, f *Follower, w *cancelWatch) (uint64, error) {
	for {
		b, err := f.Next(ctx, 64<<10)
		if err != nil {
			return f.Cursor().Seq, err
		}
		for _, v := range b.Views {
			for seq, raw := range v.Each() {
				s, err := schema.Scan(raw)
				if err != nil || s.Kind != schema.KindCancel {
					continue
				}
				seen := seenCancel{seq, new(schema.Cancel)}
				if proto.Unmarshal(s.Payload, seen.Cancel) == nil {
					l.tellCancel(w, seen)
				}
			}
		}
	}
}

func (l *JetStreamLog) tellCancel(w *cancelWatch, seen seenCancel) {
	c := &l.cancels
	c.mu.Lock()
	if len(w.seen) == maxSeenCancels {
		w.seen = w.seen[1:]
	}
	w.seen = append(w.seen, seen)
	hit := make(map[*heldItem]*workGroup)
	for h, g := range w.items {
		if seen.hits(h) {
			hit[h] = g
		}
	}
	c.mu.Unlock()
	for h, g := range hit {
		g.cancelled(h, seen)
	}
}

// cancelled tells the worker that holds the item, once.
func (g *workGroup) cancelled(h *heldItem, seen seenCancel) {
	g.mu.Lock()
	if g.held[h.work.ID] != h || h.told {
		g.mu.Unlock()
		return
	}
	h.told = true
	w := h.worker
	w.cancelled = append(w.cancelled, Cancellation{ID: h.work.ID, Seq: seen.seq, Reason: seen.GetReason()})
	g.mu.Unlock()
	w.wake()
}
