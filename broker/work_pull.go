package broker

import (
	"context"
	"errors"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"tidemark/schema"
)

const (
	// askFor is how long one request for items stands at the server; one that is not answered is taken for lost askGrace later.
	askFor   = 10 * time.Second
	askGrace = 2 * time.Second
	// groupTick is how often a group looks after requests that failed, and after items that wait for others.
	groupTick = 500 * time.Millisecond
	// settingsFor is how long an edge goes by the settings that it read.
	settingsFor = 10 * time.Second
	// maxSpare bounds the items that are here though no worker has room for them.
	maxSpare = schema.MaxWorkCredit
	// maxParked bounds the items, of a group that takes them in order, that wait on one edge for those before them.
	maxParked = 1000
)

// workGroup is a group on this edge: it asks for as many items as its workers here have room for, and hands them out. It is there while it has workers.
//
// What a worker holds is counted against its credit from the moment that it is assigned; no more is asked for than there is room for all told. An item that comes though there is no room, because a worker left
// or a request that was thought lost was not, goes back at once.
type workGroup struct {
	// Static after construction.
	log      *JetStreamLog
	key      groupKey
	consumer string
	inbox    string
	over     chan struct{} // closed when the last worker has left
	sub      *nats.Subscription

	mu       sync.Mutex // guards all below; never held while Wake is called, or NATS
	settings groupSettings
	settled  time.Time // when the settings were read
	workers  []*Worker
	turn     int   // the worker that is served next
	asks     []ask // the oldest first
	held     map[uint64]*heldItem
	// spare are items that no worker has room for just now.
	spare  []*heldItem
	order  *workOrder // nil where the group takes items in any order
	closed bool
}

// ask is a request for items that stands at the server, and how many it is still to bring. What comes does not say which request brought it; the server serves the oldest first.
type ask struct {
	left int
	at   time.Time
}

// heldItem is a delivery of an item to this edge.
type heldItem struct {
	item    *workItem
	work    Item
	ack     string // where its answers go
	worker  *Worker
	attempt int
	timer   *time.Timer // ends it with its deadline
	// predecessor is the item that must be settled before, in WORK; 0 for none.
	predecessor uint64
	// came is when the server was last told, by asking for the item or since, that it is here. For items that no worker holds.
	came time.Time

	// watch begins to look after cancels; request is the envelope's, set by it. unwatched is guarded by the watches' mu: it is over. told is guarded by the group's: the worker knows of a cancel.
	watch     *time.Timer
	request   string
	unwatched bool
	told      bool
}

var _ Queue = (*JetStreamLog)(nil)

// Join implements [Queue].
func (l *JetStreamLog) Join(ctx context.Context, tenant string, o WorkOptions) (Taker, error) {
	if err := o.check(); err != nil {
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
	settings, err := l.settleGroup(ctx, k, o)
	if err != nil {
		return nil, err
	}
	for {
		g, err := l.groupHere(k, settings)
		if err != nil {
			return nil, err
		}
		w := &Worker{group: g, credit: o.Credit, wake: o.Wake}
		if g.enter(w, settings) {
			g.ask()
			return w, nil
		}
		// It was about to go.
	}
}

// groupHere finds the group on this edge, or makes it.
func (l *JetStreamLog) groupHere(k groupKey, s groupSettings) (*workGroup, error) {
	l.workMu.Lock()
	defer l.workMu.Unlock()
	if l.workClosed {
		return nil, schema.Refuse(schema.Code_CODE_GOING_AWAY, "This edge is stopping; join group %q through another.", k.name)
	}
	if g := l.groups[k]; g != nil {
		return g, nil
	}
	g := &workGroup{log: l, key: k, consumer: k.consumer(), inbox: l.conn.NewInbox(), over: make(chan struct{}), settings: s, settled: time.Now(), held: map[uint64]*heldItem{}}
	sub, err := l.conn.Subscribe(g.inbox, g.deliver)
	if err != nil {
		return nil, unreadable(err)
	}
	// What comes is bounded by what is asked for.
	if err := sub.SetPendingLimits(-1, -1); err != nil {
		return nil, unreadable(err)
	}
	g.sub = sub
	if s.ordered {
		if g.order, err = newWorkOrder(g); err != nil {
			return nil, unreadable(err)
		}
	}
	l.groups[k] = g
	l.appending.Go(g.run)
	return g, nil
}

// enter takes a worker in; false where the group is about to go.
func (g *workGroup) enter(w *Worker, s groupSettings) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return false
	}
	g.settings, g.settled = s, time.Now()
	w.settings = s
	g.workers = append(g.workers, w)
	return true
}

// leave takes a worker out and gives back what it holds.
func (g *workGroup) leave(w *Worker) {
	g.mu.Lock()
	if w.gone {
		g.mu.Unlock()
		return
	}
	w.gone = true
	for i, x := range g.workers {
		if x == w {
			g.workers = append(g.workers[:i:i], g.workers[i+1:]...)
			break
		}
	}
	var back, unhanded []*heldItem
	for _, h := range g.held {
		if h.worker == w {
			back = append(back, h)
			g.drop(h)
		}
	}
	w.queue = nil
	last := len(g.workers) == 0
	if last {
		g.closed = true
		unhanded, g.spare = g.spare, nil
		if g.order != nil {
			unhanded = append(unhanded, g.order.takeAll()...)
		}
	}
	g.mu.Unlock()
	for _, h := range back {
		g.answer(h, nak(0))
	}
	g.handBack(0, unhanded...)
	if last {
		g.log.retire(g)
		close(g.over)
	}
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
	g.mu.Lock()
	tick := time.NewTicker(min(groupTick, g.settings.ackWait/4))
	g.mu.Unlock()
	defer tick.Stop()
	for {
		select {
		case <-g.over:
			if g.order != nil {
				g.order.close()
			}
			// What is on its way still comes, and goes back.
			if err := g.sub.Drain(); err != nil && !errors.Is(err, nats.ErrConnectionClosed) {
				g.log.logger.Warn("items that are on their way to a group without workers come again when their time is over", "group", g.key.name, "error", err)
			}
			return
		case <-connected:
			// The server knows nothing of what was asked before.
			g.mu.Lock()
			g.asks = nil
			g.mu.Unlock()
		case now := <-tick.C:
			g.mu.Lock()
			g.asks = slices.DeleteFunc(g.asks, func(a ask) bool { return now.Sub(a.at) > askFor+askGrace })
			stale := now.Sub(g.settled) > settingsFor
			g.mu.Unlock()
			if stale {
				g.refresh()
			}
			g.keepIdle(now)
			if g.order != nil {
				g.order.look(now)
			}
		}
		g.ask()
	}
}

// refresh reads the settings again: a worker on another edge may have changed them.
func (g *workGroup) refresh() {
	ctx, cancel := context.WithTimeout(g.log.storing, getTimeout)
	defer cancel()
	cons, err := g.log.js.Consumer(ctx, workStream, g.consumer)
	var s groupSettings
	if err == nil {
		_, s, err = settingsOf(cons.CachedInfo().Config)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.settled = time.Now()
	if err == nil {
		g.settings = s
	}
}

// keepIdle tells the server of items that are here and in nobody's hands, before their time is over.
func (g *workGroup) keepIdle(now time.Time) {
	g.mu.Lock()
	idle := slices.Clone(g.spare)
	if g.order != nil {
		idle = append(idle, g.order.all()...)
	}
	wait := g.settings.ackWait / 3
	var told []*heldItem
	for _, h := range idle {
		if now.Sub(h.came) >= wait {
			h.came = now
			told = append(told, h)
		}
	}
	g.mu.Unlock()
	for _, h := range told {
		g.answer(h, ackProgress)
	}
}

// ask hands out what there is room for of the items that are here, and asks for as many more as there is room for.
func (g *workGroup) ask() {
	g.mu.Lock()
	var wakes []func()
	for len(g.spare) > 0 {
		wake := g.assign(g.spare[0])
		if wake == nil {
			break
		}
		g.spare = g.spare[1:]
		wakes = append(wakes, wake)
	}
	defer func() {
		for _, wake := range wakes {
			wake()
		}
	}()
	room, all, standing := -len(g.spare), 0, 0
	for _, w := range g.workers {
		room += w.credit - w.hand
		all += w.credit
	}
	for _, a := range g.asks {
		standing += a.left
	}
	room -= standing
	// A few at a time, while others are still to come.
	if room <= 0 || standing > 0 && room < all/4 || g.order != nil && g.order.full() {
		g.mu.Unlock()
		return
	}
	g.asks = append(g.asks, ask{left: room, at: time.Now()})
	g.mu.Unlock()
	body := `{"batch":` + strconv.Itoa(room) + `,"expires":` + strconv.FormatInt(int64(askFor), 10) + `}`
	if err := g.log.conn.PublishRequest("$JS.API.CONSUMER.MSG.NEXT."+workStream+"."+g.consumer, g.inbox, []byte(body)); err != nil {
		// NATS is away; the tick asks again.
		g.mu.Lock()
		g.brought(room)
		g.mu.Unlock()
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
			// It was not taken at all; the tick asks again, of all that there is room for.
			g.asks = nil
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
	g.mu.Lock()
	g.brought(1)
	s := g.settings
	if !s.wants(item.GetSession()) {
		g.mu.Unlock()
		g.said(m.Reply, ackDone)
		g.ask()
		return
	}
	g.mu.Unlock()
	if h.attempt == 1 {
		g.place(h)
		return
	}
	g.log.appending.Go(func() {
		// Deliveries that never came into anybody's hands do not count.
		if n, err := g.unhanded(h); err == nil {
			h.attempt -= n
		}
		g.place(h)
	})
}

// place gives an item that came to a worker, or lets it wait for one, or for the item before it; or gives it up, where it was handed out often enough.
func (g *workGroup) place(h *heldItem) {
	g.mu.Lock()
	if g.order != nil && h.item.GetRedrivenFrom() == 0 {
		h.predecessor = g.settings.predecessor(h.item)
		if h.predecessor > 0 && !g.order.passed(h) {
			parked := !g.closed && g.order.park(h)
			g.mu.Unlock()
			if !parked {
				g.handBack(time.Second, h)
			}
			g.ask()
			return
		}
	}
	s := g.settings
	if h.attempt > s.maxDeliver {
		g.mu.Unlock()
		g.exhausted(h, s)
		g.ask()
		return
	}
	wake := g.assign(h)
	kept := wake == nil && !g.closed && len(g.spare) < maxSpare
	if kept {
		g.spare = append(g.spare, h)
	}
	g.mu.Unlock()
	switch {
	case wake != nil:
		wake()
	case !kept:
		g.handBack(0, h)
	}
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
			ID: g.log.workIDs.Add(1), Session: h.item.id(), Epoch: h.item.GetEpoch(), Attempt: h.attempt, Deadline: time.Now().Add(g.settings.ackWait), Kind: h.item.kind,
			Envelope: h.item.envelope, Cancelled: h.item.GetCancelled(),
		}
		h.timer = time.AfterFunc(g.settings.ackWait, func() { g.expire(h) })
		late := time.Since(h.came) > time.Millisecond
		g.held[h.work.ID] = h
		w.hand++
		w.queue = append(w.queue, h)
		g.log.metrics.workHanded.Inc()
		g.log.watchCancel(g, h)
		return func() {
			if late {
				// It was here before, and its time begins now.
				g.answer(h, ackProgress)
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
	for i, x := range h.worker.queue {
		if x == h {
			h.worker.queue = append(h.worker.queue[:i:i], h.worker.queue[i+1:]...)
			break
		}
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
	g.answer(h, nak(0))
	g.ask()
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

// answer tells the server about an item.
func (g *workGroup) answer(h *heldItem, what string) { g.said(h.ack, what) }

func (g *workGroup) said(to, what string) {
	if err := g.log.conn.Publish(to, []byte(what)); err != nil {
		// NATS is away. The item comes again when its time is over, as it does where the answer is lost on its way.
		g.log.logger.Debug("an answer about a work item was not heard", "group", g.key.name, "error", err)
	}
}

func times(n int) string {
	if n == 1 {
		return "once"
	}
	return strconv.Itoa(n) + " times"
}
