package broker

import (
	"context"
	"errors"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"tidemark/schema"
)

const (
	// askFor is how long one request for items stands at the server; one that is not answered is taken for lost askGrace later. So a group whose consumer has moved to another server of a cluster goes on within 5 s.
	askFor   = 4 * time.Second
	askGrace = time.Second
	// groupTick is how often a group looks after requests that failed, and after items that wait for others.
	groupTick = 500 * time.Millisecond
	// settingsFor is how long an edge goes by the settings that it read; refreshGap is the least between two reads.
	settingsFor = 10 * time.Second
	refreshGap  = 20 * time.Millisecond
	// maxWorkBytes bounds the items of all groups on an edge, in bytes; then no more are asked for, but one for a group that has none. askBytes is the least that is asked for at once: an item of the largest size fits.
	maxWorkBytes = 128 << 20
	askBytes     = 2 << 20
	// drainWithin is how long a group that ends waits for what is on its way to it.
	drainWithin = time.Second
)

// workGroup is a group on this edge: it asks for as many items as its workers here have room for, and hands them out. It is there while it has workers.
//
// What a worker holds is counted against its credit from the moment that it is assigned; no more is asked for than there is room for all told. An item that comes though there is no room, because a worker left
// or a request that was thought lost was not, waits here or goes back.
type workGroup struct {
	// Static after construction.
	log      *JetStreamLog
	key      groupKey
	began    time.Time // another that has begun since is another group
	consumer string
	inbox    string
	over     chan struct{} // closed when the last worker has left
	drained  chan struct{} // closed when nothing more comes from the subscription
	sub      *nats.Subscription

	mu       sync.Mutex // guards all below; never held while Wake is called, or NATS is asked
	settings groupSettings
	settled  time.Time // when the reading of the settings began
	reading  bool      // somebody reads them
	read     time.Time // when somebody last began to
	workers  []*Worker
	turn     int   // the worker that is served next
	asks     []ask // the oldest first
	askedOne time.Time
	held     map[uint64]*heldItem // in workers' hands, by delivery
	// spare are items that no worker has room for just now, doubtful those that the settings, as they were read last, do not want.
	spare, doubtful []*heldItem
	// busy counts the items that are looked up, or given up.
	busy int
	// unsaid has, by place in WORK, the items that are done and of which the server could not be told.
	unsaid map[uint64]string
	order  *workOrder // nil where the group takes items in any order
	closed bool
}

// ask is a request for items that stands at the server, and how many it is still to bring. What comes does not say which request brought it; the server serves the oldest first.
type ask struct {
	left int
	at   time.Time
}

var _ Queue = (*JetStreamLog)(nil)

// Join implements [Queue].
func (l *JetStreamLog) Join(ctx context.Context, tenant string, o WorkOptions) (Taker, error) {
	if err := o.Check(); err != nil {
		return nil, err
	}
	if o.Credit == 0 {
		o.Credit = 1
	}
	ctx, cancel := context.WithTimeout(ctx, joinWithin)
	defer cancel()
	if _, err := l.ready(ctx); err != nil {
		return nil, err
	}
	k := groupKey{tenant, o.Group}
	settings, at, err := l.settleGroup(ctx, k, o)
	for {
		if err != nil {
			return nil, err
		}
		var g *workGroup
		if g, err = l.groupHere(k, settings, at); err != nil {
			return nil, err
		}
		if g.began.Equal(settings.began) {
			w := &Worker{group: g, credit: o.Credit, wake: o.Wake, may: o.May}
			if g.enter(w, settings, at) {
				g.dismiss()
				g.ask()
				return w, nil
			}
			// It was about to go.
			continue
		}
		if g.readBefore(at) {
			// It was deleted and begun anew, and nobody here has heard of it.
			g.end(g.deleted())
			continue
		}
		settings, at, err = l.settleGroup(ctx, k, o)
	}
}

// groupHere finds the group on this edge, or makes it.
func (l *JetStreamLog) groupHere(k groupKey, s groupSettings, at time.Time) (*workGroup, error) {
	l.workMu.Lock()
	defer l.workMu.Unlock()
	if l.workClosed {
		return nil, schema.Refuse(schema.Code_CODE_GOING_AWAY, "This edge is stopping; join group %q through another.", k.name)
	}
	if g := l.groups[k]; g != nil {
		return g, nil
	}
	g := &workGroup{
		log: l, key: k, began: s.began, consumer: k.consumer(), inbox: l.conn.NewInbox(), over: make(chan struct{}), drained: make(chan struct{}), settings: s, settled: at,
		held: map[uint64]*heldItem{}, unsaid: map[uint64]string{},
	}
	var err error
	if g.sub, err = l.conn.Subscribe(g.inbox, g.deliver); err != nil {
		return nil, unreadable(err)
	}
	g.sub.SetClosedHandler(func(string) { close(g.drained) })
	// What comes is bounded by what is asked for.
	err = g.sub.SetPendingLimits(-1, -1)
	if err == nil && s.ordered {
		g.order, err = newWorkOrder(g)
	}
	if err != nil {
		_ = g.sub.Unsubscribe() // the connection is closed, or is about to be
		return nil, unreadable(err)
	}
	l.groups[k] = g
	l.appending.Go(g.run)
	return g, nil
}

// enter takes a worker in, with the settings as they were read from `at` on; false where the group is about to go.
func (g *workGroup) enter(w *Worker, s groupSettings, at time.Time) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return false
	}
	g.learn(s, at)
	w.settings = s
	// It may have grown since it was settled for this worker.
	if err := g.settings.openTo(w.may); err != nil {
		w.why, w.credit = err, 0
	}
	g.workers = append(g.workers, w)
	return true
}

// learn takes over settings, unless others were read later. Workers that may not have all that the group takes by now are handed nothing from here on; dismiss lets them go. Called with mu held.
func (g *workGroup) learn(s groupSettings, at time.Time) {
	if at.Before(g.settled) {
		return
	}
	grown := !slices.Equal(s.sessions, g.settings.sessions)
	g.settings, g.settled = s, at
	for _, w := range g.workers {
		if !grown || w.why != nil {
			continue
		}
		if err := s.openTo(w.may); err != nil {
			w.why, w.credit = err, 0
		}
	}
}

// dismiss ends the workers that learn found to be here no longer.
func (g *workGroup) dismiss() {
	g.mu.Lock()
	var gone []*Worker
	for _, w := range g.workers {
		if w.why != nil {
			gone = append(gone, w)
		}
	}
	g.mu.Unlock()
	for _, w := range gone {
		w.Close()
		w.wake()
	}
}

// readBefore reports whether the settings here were read no later than at.
func (g *workGroup) readBefore(at time.Time) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return !at.Before(g.settled)
}

// retire forgets a group that has no workers here.
func (l *JetStreamLog) retire(g *workGroup) {
	l.workMu.Lock()
	defer l.workMu.Unlock()
	if l.groups[g.key] == g {
		delete(l.groups, g.key)
	}
}

// closeWork ends all groups, where the gateway has not done so by closing its workers, and lets nobody join any more.
func (l *JetStreamLog) closeWork() {
	l.workMu.Lock()
	l.workClosed = true
	var workers []*Worker
	for _, g := range l.groups {
		g.mu.Lock()
		workers = append(workers, g.workers...)
		g.mu.Unlock()
	}
	l.workMu.Unlock()
	for _, w := range workers {
		w.Close()
	}
}

// run looks after the group while it has workers.
func (g *workGroup) run() {
	connected := g.log.conn.StatusChanged(nats.CONNECTED)
	defer g.log.conn.RemoveStatusListener(connected)
	tick := time.NewTimer(g.pause())
	defer tick.Stop()
	for {
		select {
		case <-g.over:
			g.drain()
			return
		case <-connected:
			g.again()
		case now := <-tick.C:
			tick.Reset(g.pause())
			g.mu.Lock()
			g.asks = slices.DeleteFunc(g.asks, func(a ask) bool { return now.Sub(a.at) > askFor+askGrace })
			stale := now.Sub(g.settled) > settingsFor
			g.mu.Unlock()
			if stale {
				g.refresh()
			}
			g.passOn(now)
			g.keepIdle(now)
			if g.order != nil {
				g.order.look(now)
			}
		}
		g.ask()
	}
}

// pause is how long the group may look away: what lies here must not lose the server's patience.
func (g *workGroup) pause() time.Duration {
	g.mu.Lock()
	defer g.mu.Unlock()
	return min(groupTick, g.settings.ackWait/4)
}

// drain ends the subscription: what is on its way still comes, and goes back.
func (g *workGroup) drain() {
	if g.order != nil {
		g.order.close()
	}
	if g.sub.Drain() != nil {
		return // the connection is closed
	}
	t := time.NewTimer(drainWithin)
	defer t.Stop()
	select {
	case <-g.drained:
	case <-t.C:
		g.log.logger.Warn("items that are on their way to a group without workers come again when their time is over", "group", g.key.name)
	}
}

// again is for a connection that was lost and is back: the server knows nothing of what was asked before, and has not heard what could not be said.
func (g *workGroup) again() {
	g.mu.Lock()
	g.asks = nil
	unsaid := g.unsaid
	g.unsaid = map[uint64]string{}
	g.mu.Unlock()
	for seq, to := range unsaid {
		if !g.said(to, ackDone) {
			g.mu.Lock()
			g.unsaid[seq] = to
			g.mu.Unlock()
		}
	}
}

// refresh reads the settings again, beside all else, and sees to the items that were doubtful before: a worker on another edge may have changed what the group wants. Where the group's consumer is gone, its workers are told.
func (g *workGroup) refresh() {
	g.mu.Lock()
	if g.reading || g.closed {
		g.mu.Unlock()
		return
	}
	g.reading = true
	wait := refreshGap - time.Since(g.read)
	g.read = time.Now()
	g.mu.Unlock()
	g.log.appending.Go(func() {
		if wait > 0 {
			sleep(g.log.storing, wait)
		}
		ctx, cancel := context.WithTimeout(g.log.storing, getTimeout)
		defer cancel()
		g.mu.Lock()
		doubtful := g.doubtful
		g.doubtful = nil
		g.busy += len(doubtful)
		g.mu.Unlock()
		at := time.Now()
		cons, err := g.log.js.Consumer(ctx, workStream, g.consumer)
		var s groupSettings
		if err == nil {
			_, s, err = settingsOf(cons.CachedInfo().Config)
		}
		g.mu.Lock()
		g.reading = false
		g.busy -= len(doubtful)
		if err == nil && !s.began.Equal(g.began) {
			err = g.deleted()
		}
		if err == nil {
			g.learn(s, at)
		}
		more := len(g.doubtful) > 0
		g.mu.Unlock()
		switch {
		case errors.Is(err, jetstream.ErrConsumerNotFound):
			g.end(g.gone(ctx))
		case schema.CodeOf(err) == schema.Code_CODE_WORK_NOT_FOUND:
			g.end(err)
		default:
			g.dismiss()
		}
		for _, h := range doubtful {
			switch {
			case err != nil:
				g.handBack(time.Second, h)
			case !s.wants(h.item.GetSession()):
				g.answer(h, ackDone)
			default:
				g.place(h)
			}
		}
		if more {
			g.refresh()
		}
		if err == nil {
			g.ask()
		}
	})
}

// end ends all workers of the group.
func (g *workGroup) end(why error) {
	g.mu.Lock()
	for _, w := range g.workers {
		if w.why == nil {
			w.why = why
		}
	}
	g.mu.Unlock()
	g.dismiss()
}

// ask hands out what there is room for of the items that are here, and asks for as many more as there is room for.
func (g *workGroup) ask() {
	g.mu.Lock()
	wakes := g.handSpare()
	room := g.room()
	if room > 0 {
		g.asks = append(g.asks, ask{left: room, at: time.Now()})
	}
	bytes := max(maxWorkBytes-g.log.workBytes.Load(), askBytes)
	g.mu.Unlock()
	for _, wake := range wakes {
		wake()
	}
	if room <= 0 {
		return
	}
	body := `{"batch":` + strconv.Itoa(room) + `,"max_bytes":` + strconv.FormatInt(bytes, 10) + `,"expires":` + strconv.FormatInt(int64(askFor), 10) + `}`
	if err := g.log.conn.PublishRequest("$JS.API.CONSUMER.MSG.NEXT."+workStream+"."+g.consumer, g.inbox, []byte(body)); err != nil {
		// NATS is away; the tick asks again.
		g.mu.Lock()
		g.asks = nil
		g.mu.Unlock()
	}
}

// room is how many items are to be asked for now. Called with mu held.
func (g *workGroup) room() int {
	here := len(g.spare) + len(g.doubtful) + g.busy
	room, all, standing := -here, 0, 0
	for _, w := range g.workers {
		room += max(w.credit-w.hand, 0)
		all += w.credit
	}
	for _, a := range g.asks {
		standing += a.left
	}
	room -= standing
	switch {
	case room <= 0, standing > 0 && room < all/4:
		// A few at a time, while others are still to come.
		return 0
	case g.log.workBytes.Load() >= maxWorkBytes:
		if len(g.held)+here > 0 || standing > 0 {
			return 0
		}
		return 1
	case g.order != nil && g.order.full():
		// The one that all of them wait for may be among those that come again, which the server brings before others.
		if standing > 0 || time.Since(g.askedOne) < groupTick {
			return 0
		}
		g.askedOne = time.Now()
		return 1
	default:
		return room
	}
}

// brought notes that so many items of those asked for have come, or will not. Called with mu held.
func (g *workGroup) brought(n int) {
	for n > 0 && len(g.asks) > 0 {
		a := &g.asks[0]
		k := min(n, a.left)
		a.left -= k
		n -= k
		if a.left == 0 {
			g.asks = g.asks[1:]
		}
	}
}

// deliver takes what the server answers: items, or that there are none. It is called by the subscription, one message at a time.
func (g *workGroup) deliver(m *nats.Msg) {
	if m.Header.Get("Status") != "" {
		// Nothing more comes of a request: its time is over, or the consumer's leader has changed.
		left, err := strconv.Atoi(m.Header.Get("Nats-Pending-Messages"))
		g.mu.Lock()
		if err != nil {
			// It was not taken at all. The tick asks again, of all that there is room for, and whether there still is such a consumer.
			g.asks, g.settled = nil, time.Time{}
		} else {
			g.brought(left)
		}
		g.mu.Unlock()
		if err == nil {
			g.ask()
		}
		return
	}
	meta, err := m.Metadata()
	if err != nil {
		g.log.logger.Error("NATS sent what is no item", "group", g.key.name, "error", err)
		return
	}
	item, err := parseWorkItem(m.Data)
	if err != nil {
		g.log.logger.Error("a work item cannot be read; no group is handed it", "group", g.key.name, "sequence", meta.Sequence.Stream, "error", err)
		g.said(m.Reply, "+TERM")
		return
	}
	item.seq = meta.Sequence.Stream
	h := &heldItem{item: item, ack: m.Reply, attempt: int(min(meta.NumDelivered, 1<<31)), came: time.Now()}
	h.bytes.Store(int64(len(m.Data)))
	g.log.workBytes.Add(int64(len(m.Data)))
	g.mu.Lock()
	g.brought(1)
	_, done := g.unsaid[item.seq]
	delete(g.unsaid, item.seq)
	wanted := g.settings.wants(item.GetSession())
	if !done && !wanted {
		// The group may want it by now: only settings that were read since it came can tell.
		g.doubtful = append(g.doubtful, h)
	}
	if !done && wanted && h.attempt > 1 {
		g.busy++
	}
	g.mu.Unlock()
	switch {
	case done:
		g.answer(h, ackDone)
	case !wanted:
		g.refresh()
	case h.attempt == 1:
		g.place(h)
	default:
		g.log.appending.Go(func() { g.placeAgain(h) })
	}
}

// said tells the server something about an item; false where NATS is away.
func (g *workGroup) said(to, what string) bool {
	err := g.log.conn.Publish(to, []byte(what))
	if err != nil {
		g.log.logger.Debug("an answer about a work item was not heard", "group", g.key.name, "error", err)
	}
	return err == nil
}
