package broker

import (
	"context"
	"slices"
	"strconv"
	"sync/atomic"
	"time"

	"tidemark/schema"
)

const (
	// maxSpare bounds the items that are here though no worker has room for them.
	maxSpare = schema.MaxWorkCredit
	// spareFor is how long they wait for one: a worker of another edge may have room. They come if one has left whose request brings one more, or if NATS knows a request that was taken for lost.
	spareFor = 2 * time.Second
)

// heldItem is a delivery of an item to this edge. Fields are guarded by the group's mu, but for those that are said to be others'.
type heldItem struct {
	// Static after construction.
	item *workItem
	ack  string // where its answers go

	// bytes is what it counts for in the edge's bound; 0 once it is somebody else's.
	bytes atomic.Int64
	// attempt is how often the item was handed out with this, once that is known.
	attempt int
	// came is when the server was last told, by the delivery or since, that it is here.
	came time.Time
	// spareSince is when it began to wait for a worker with room.
	spareSince time.Time
	// predecessor is the item that must be settled before, in WORK; 0 for none.
	predecessor uint64

	// What follows is set when a worker gets it.
	work   Item
	worker *Worker
	taken  bool        // the worker has seen it
	timer  *time.Timer // ends it with its deadline
	told   bool        // the worker knows of a cancel

	// watch begins to look after cancels; request is the envelope's, set by it. unwatched is guarded by the watches' mu: it is over.
	watch     *time.Timer
	request   string
	unwatched bool
}

// placeAgain places an item that was delivered before. Deliveries that came into nobody's hands do not count; and what somebody began to give up, and died over, is given up.
func (g *workGroup) placeAgain(h *heldItem) {
	ctx, cancel := context.WithTimeout(g.log.storing, getTimeout)
	defer cancel()
	n, _, err := g.readUnhanded(ctx, h)
	settled := false
	if err == nil && g.order != nil && h.item.GetRedrivenFrom() == 0 {
		// It may be settled, and NATS not have heard it.
		var at uint64
		at, _, err = g.order.register(ctx, h.item.GetSession())
		settled = at >= h.item.seq
	}
	var letter *schema.DeadRecord
	if err == nil {
		letter, _, err = g.log.letter(ctx, letterSubject("dead", g.key.name, h.item.id(), h.item.GetEpoch(), h.item.GetSeq()))
	}
	g.mu.Lock()
	g.busy--
	h.attempt -= n
	s := g.settings
	g.mu.Unlock()
	switch {
	case err != nil:
		// How often it was handed out is not known just now, and it must not be given up for that.
		g.handBack(time.Second, h)
	case settled:
		g.answer(h, ackDone)
	case stands(letter, g.began, h.item.seq):
		g.giveUp(h, s, int(letter.GetAttempts()), letter.GetReason())
	default:
		g.place(h)
	}
}

// place gives an item that came to a worker, or lets it wait for one, or for the item before it; or gives it up, where it was handed out often enough.
func (g *workGroup) place(h *heldItem) {
	g.mu.Lock()
	if g.order != nil && h.item.GetRedrivenFrom() == 0 {
		h.predecessor = g.settings.predecessor(h.item)
		if h.predecessor > 0 && !g.order.passed(h) {
			out := h
			if !g.closed {
				out = g.order.park(h)
			}
			g.mu.Unlock()
			if out != nil {
				g.handBack(parkAgain, out)
			}
			g.ask()
			return
		}
	}
	s := g.settings
	if h.attempt > s.maxDeliver {
		g.mu.Unlock()
		g.exhausted(h, s)
		return
	}
	wake := g.assign(h)
	kept := wake == nil && !g.closed && g.keep(h)
	g.mu.Unlock()
	switch {
	case wake != nil:
		wake()
	case !kept:
		g.handBack(0, h)
	}
}

// keep lets an item wait for a worker that has room; false where too many do. Called with mu held.
func (g *workGroup) keep(h *heldItem) bool {
	if i := slices.IndexFunc(g.spare, func(x *heldItem) bool { return x.item.seq == h.item.seq }); i >= 0 {
		// The server has lost patience with the one that is here.
		h.spareSince = g.spare[i].spareSince
		g.forget(g.spare[i])
		g.spare[i] = h
		return true
	}
	if len(g.spare) >= maxSpare {
		return false
	}
	h.spareSince = time.Now()
	g.spare = append(g.spare, h)
	return true
}

// passOn gives back what has waited for room for long.
func (g *workGroup) passOn(now time.Time) {
	g.mu.Lock()
	var late []*heldItem
	g.spare = slices.DeleteFunc(g.spare, func(h *heldItem) bool {
		if now.Sub(h.spareSince) < spareFor {
			return false
		}
		late = append(late, h)
		return true
	})
	g.mu.Unlock()
	g.handBack(0, late...)
}

// handSpare hands out what waits, as far as there is room, and returns what wakes the workers. Called with mu held.
func (g *workGroup) handSpare() (wakes []func()) {
	now := time.Now()
	for len(g.spare) > 0 {
		h := g.spare[0]
		if now.Sub(h.came) > g.settings.ackWait {
			// The server has given it to others.
			g.forget(h)
			g.spare = g.spare[1:]
			continue
		}
		wake := g.assign(h)
		if wake == nil {
			break
		}
		g.spare = g.spare[1:]
		wakes = append(wakes, wake)
	}
	return wakes
}

// exhausted gives up an item that was handed out as often as the group allows, and not settled.
func (g *workGroup) exhausted(h *heldItem, s groupSettings) {
	g.giveUp(h, s, s.maxDeliver, "It was handed out "+times(s.maxDeliver)+", and nobody settled it in time.")
}

// assign puts an item into the hands of a worker that has room, in turn; nil where none has. It returns what wakes the worker. Called with mu held.
func (g *workGroup) assign(h *heldItem) (wake func()) {
	for range g.workers {
		g.turn = (g.turn + 1) % len(g.workers)
		w := g.workers[g.turn]
		if w.hand >= w.credit {
			continue
		}
		h.worker = w
		h.work = Item{
			ID: g.log.workIDs.Add(1), Session: h.item.id(), Epoch: h.item.GetEpoch(), Attempt: h.attempt, Deadline: time.Now().Add(w.ackWait()), Kind: h.item.kind,
			Envelope: h.item.envelope, Cancelled: h.item.GetCancelled(),
		}
		h.timer = time.AfterFunc(w.ackWait(), func() { g.expire(h) })
		late := time.Since(h.came) > time.Millisecond
		g.held[h.work.ID] = h
		w.hand++
		w.queue = append(w.queue, h)
		g.log.metrics.workHanded.Inc()
		g.log.watchCancel(g, h)
		return func() {
			if late {
				// It was here before, and its time begins now.
				g.said(h.ack, ackProgress)
			}
			w.wake()
		}
	}
	return nil
}

// drop takes an item out of its worker's hands. Called with mu held.
func (g *workGroup) drop(h *heldItem) {
	h.timer.Stop()
	delete(g.held, h.work.ID)
	h.worker.hand--
	if i := slices.Index(h.worker.queue, h); i >= 0 {
		h.worker.queue = slices.Delete(h.worker.queue, i, i+1)
	}
	g.log.unwatchCancel(h)
}

// take takes an item out of the hands of a worker that answers; nil where it is not in them.
func (g *workGroup) take(w *Worker, id uint64) *heldItem {
	g.mu.Lock()
	defer g.mu.Unlock()
	h := g.held[id]
	if h == nil || h.worker != w {
		return nil
	}
	g.drop(h)
	return h
}

// expire is the end of an item's time: it goes to others.
func (g *workGroup) expire(h *heldItem) {
	g.mu.Lock()
	if g.held[h.work.ID] != h || time.Now().Before(h.work.Deadline) {
		g.mu.Unlock()
		return
	}
	g.drop(h)
	g.mu.Unlock()
	g.log.metrics.workExpired.Inc()
	g.giveBack(0, h)
	g.ask()
}

// leave takes a worker out and gives back what it holds. only: no more than what it has not seen, and it goes on with the rest.
func (g *workGroup) leave(w *Worker, only bool) {
	g.mu.Lock()
	if w.gone {
		g.mu.Unlock()
		return
	}
	var back []*heldItem
	for _, h := range g.held {
		if h.worker == w && !(only && h.taken) {
			back = append(back, h)
			g.drop(h)
		}
	}
	w.credit = 0
	last := false
	if !only {
		w.gone = true
		g.workers = slices.DeleteFunc(g.workers, func(x *Worker) bool { return x == w })
		last = len(g.workers) == 0
	}
	if last {
		g.closed = true
		back = append(append(back, g.spare...), g.doubtful...)
		g.spare, g.doubtful = nil, nil
		if g.order != nil {
			back = append(back, g.order.takeAll()...)
		}
	}
	g.mu.Unlock()
	g.giveBack(0, back...)
	if last {
		g.log.retire(g)
		close(g.over)
	}
}

// giveBack gives items back to the group; those that no worker has seen, without a trace.
func (g *workGroup) giveBack(delay time.Duration, items ...*heldItem) {
	var unseen []*heldItem
	for _, h := range items {
		if h.taken {
			g.answer(h, nak(delay))
		} else {
			unseen = append(unseen, h)
		}
	}
	g.handBack(delay, unseen...)
}

// done settles an item: it is not handed out again.
func (g *workGroup) done(h *heldItem) {
	if g.order == nil || h.item.GetRedrivenFrom() > 0 {
		g.answer(h, ackDone)
		return
	}
	g.order.pass(h, func() { g.answer(h, ackDone) })
}

// Answers to the server about an item (ADR-15 of NATS).
const (
	ackDone     = "+ACK"
	ackProgress = "+WPI"
)

// nak gives an item back, to be handed out again after a delay.
func nak(delay time.Duration) string {
	if delay <= 0 {
		return "-NAK"
	}
	return `-NAK {"delay":` + strconv.FormatInt(int64(delay), 10) + `}`
}

// answer tells the server what became of an item, and lets go of it.
//
// That it is done is said again where it was not heard, when NATS is back or the item comes. That it goes back is not said too late: an edge that was frozen would take it out of the hands of whoever has it since.
func (g *workGroup) answer(h *heldItem, what string) {
	g.forget(h)
	if what == ackDone {
		if !g.said(h.ack, what) {
			g.mu.Lock()
			if len(g.unsaid) < maxUnsaid {
				g.unsaid[h.item.seq] = h.ack
			}
			g.mu.Unlock()
		}
		return
	}
	g.mu.Lock()
	until := h.came.Add(g.settings.ackWait)
	if h.worker != nil {
		until = h.work.Deadline
	}
	late := time.Now().After(until.Add(patienceFor(g.settings.ackWait) / 2))
	g.mu.Unlock()
	if !late {
		// Where this is not heard, the item comes again when its time is over.
		g.said(h.ack, what)
	}
}

// maxUnsaid bounds the answers that are said again.
const maxUnsaid = 10_000

// forget takes an item out of the edge's bound.
func (g *workGroup) forget(h *heldItem) { g.log.workBytes.Add(-h.bytes.Swap(0)) }

// keepIdle tells the server of items that are here and in nobody's hands, before their time is over.
func (g *workGroup) keepIdle(now time.Time) {
	g.mu.Lock()
	idle := slices.Clone(g.spare)
	if g.order != nil {
		idle = append(idle, g.order.all()...)
	}
	wait := g.settings.ackWait
	g.mu.Unlock()
	for _, h := range idle {
		g.mu.Lock()
		age := now.Sub(h.came)
		g.mu.Unlock()
		// What is older than that was given to others; ask and the order drop it.
		if age < wait/3 || age > wait || !g.said(h.ack, ackProgress) {
			continue
		}
		g.mu.Lock()
		h.came = now
		g.mu.Unlock()
	}
}

func times(n int) string {
	if n == 1 {
		return "once"
	}
	return strconv.Itoa(n) + " times"
}
