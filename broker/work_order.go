package broker

import (
	"context"
	"errors"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"

	"tidemark/schema"
)

// workOrder hands out the items of each session in their order, one at a time, for a group that asks for it. An item names the one before it of its session; it waits here until that is settled, wherever that
// was. How far the group has come in a session is a register in the stream ORDER, which only grows: written before an item's settling is said to NATS, and heard by every edge.
//
// Its fields are guarded by the group's mu.
type workOrder struct {
	g   *workGroup
	sub *nats.Subscription

	// at is how far the group has come, by session, as far as is known here; forgotten when there are many.
	at map[string]uint64
	// floor is how far it has come in all sessions: everything up to there is settled, or was never to be.
	floor uint64
	// parked are the items that wait, by session.
	parked map[string][]*heldItem
	count  int
	// since is when the first of those came that wait now.
	since time.Time
	// looking: somebody asks NATS how far the group has come.
	looking bool
}

const (
	// rememberedOrders bounds the sessions whose register is remembered.
	rememberedOrders = 10_000
	// orderLook is how long an item waits to hear of the one before it; then it is asked for.
	orderLook = time.Second
	// maxParked bounds the items that wait on one edge for those before them. One that has no room comes again after parkAgain.
	maxParked = 1000
	parkAgain = 5 * time.Second
)

func newWorkOrder(g *workGroup) (*workOrder, error) {
	o := &workOrder{g: g, at: map[string]uint64{}, parked: map[string][]*heldItem{}}
	var err error
	o.sub, err = g.log.conn.Subscribe(orderSubject(g.key, "*"), o.heard)
	return o, err
}

func orderSubject(k groupKey, session string) string {
	return "order." + schema.EscapeToken(k.tenant) + "." + groupHash(k.name) + "." + session
}

func (o *workOrder) close() {
	if err := o.sub.Unsubscribe(); err != nil && !errors.Is(err, nats.ErrConnectionClosed) {
		o.g.log.logger.Debug("the order of a group is still heard", "group", o.g.key.name, "error", err)
	}
}

// heard takes in what an edge, maybe this one, wrote into a register. It comes before it is stored, which does no harm: the item that follows needs no more than that the one before it was settled.
func (o *workOrder) heard(m *nats.Msg) {
	session, err := schema.UnescapeToken(m.Subject[strings.LastIndexByte(m.Subject, '.')+1:])
	seq, wrong := strconv.ParseUint(string(m.Data), 10, 64)
	if err != nil || wrong != nil {
		return
	}
	o.reached(session, seq)
}

// reached notes how far the group has come in a session, and lets go what waited for it.
func (o *workOrder) reached(session string, seq uint64) {
	o.g.mu.Lock()
	if len(o.at) >= rememberedOrders {
		clear(o.at)
	}
	if seq > o.at[session] {
		o.at[session] = seq
	}
	spent, settings := o.release(session), o.g.settings
	o.g.mu.Unlock()
	for _, h := range spent {
		o.g.exhausted(h, settings)
	}
	o.g.ask()
}

// passed reports whether the item before this one is known to be settled. Called with mu held.
func (o *workOrder) passed(h *heldItem) bool {
	return h.predecessor <= o.floor || h.predecessor <= o.at[h.item.GetSession()]
}

// park lets an item wait. It returns the one that has to go for it, as its turn is the furthest away; nil for none. Called with mu held.
func (o *workOrder) park(h *heldItem) (out *heldItem) {
	session := h.item.GetSession()
	for i, x := range o.parked[session] {
		if x.item.seq == h.item.seq {
			// The server has lost patience with the one that is here.
			o.g.forget(x)
			o.parked[session][i] = h
			return nil
		}
	}
	if o.count >= maxParked {
		if out = o.furthest(); out.item.seq < h.item.seq {
			return h
		}
		o.unpark(out)
	}
	if o.count == 0 {
		o.since = time.Now()
	}
	o.count++
	o.parked[session] = append(o.parked[session], h)
	if len(o.parked[session]) == 1 {
		// Whether it has to wait is not known here yet, as after a restart.
		o.g.log.appending.Go(func() { o.read(session) })
	}
	return out
}

// furthest is the item that has come last into WORK. Called with mu held, while there are many.
func (o *workOrder) furthest() (last *heldItem) {
	for _, items := range o.parked {
		for _, h := range items {
			if last == nil || h.item.seq > last.item.seq {
				last = h
			}
		}
	}
	return last
}

// unpark takes out an item. Called with mu held.
func (o *workOrder) unpark(h *heldItem) {
	session := h.item.GetSession()
	left := slices.DeleteFunc(o.parked[session], func(x *heldItem) bool { return x == h })
	if o.parked[session] = left; len(left) == 0 {
		delete(o.parked, session)
	}
	o.count--
}

// release lets go the items of a session that need not wait any more, and returns those that were handed out often enough before. Called with mu held.
func (o *workOrder) release(session string) (spent []*heldItem) {
	var left []*heldItem
	now := time.Now()
	for _, h := range o.parked[session] {
		switch {
		case now.Sub(h.came) > o.g.settings.ackWait:
			// The server has given it to others.
			o.g.forget(h)
		case !o.passed(h):
			left = append(left, h)
			continue
		case h.attempt > o.g.settings.maxDeliver:
			spent = append(spent, h)
		default:
			h.spareSince = now
			o.g.spare = append(o.g.spare, h)
		}
		o.count--
	}
	if o.parked[session] = left; len(left) == 0 {
		delete(o.parked, session)
	}
	return spent
}

// full reports whether no more items are to be asked for. Called with mu held.
func (o *workOrder) full() bool { return o.count >= maxParked }

// all are the items that wait. Called with mu held.
func (o *workOrder) all() []*heldItem {
	var all []*heldItem
	for _, items := range o.parked {
		all = append(all, items...)
	}
	return all
}

// takeAll takes out the items that wait. Called with mu held.
func (o *workOrder) takeAll() []*heldItem {
	all := o.all()
	clear(o.parked)
	o.count = 0
	return all
}

// read asks NATS how far the group has come in a session.
func (o *workOrder) read(session string) {
	ctx, cancel := context.WithTimeout(o.g.log.storing, getTimeout)
	defer cancel()
	if seq, _, err := o.register(ctx, session); err == nil {
		o.reached(session, seq)
	}
	// Otherwise look asks again.
}

// register is what a session's register says, and its revision.
func (o *workOrder) register(ctx context.Context, session string) (seq, rev uint64, err error) {
	m, err := o.g.log.reader.lastFromLeader(ctx, orderStream, orderSubject(o.g.key, schema.EscapeToken(session)))
	if m == nil || err != nil {
		return 0, 0, err
	}
	seq, err = strconv.ParseUint(string(m.data), 10, 64)
	return seq, m.seq, err
}

// look asks again after items that have waited for a while: what was said may not have been heard. An item may also wait for one that is no more, because retention or a deletion took it, or that never was the group's, because
// its kinds were others then: everything up to the consumer's floor is settled, whatever the registers say.
func (o *workOrder) look(now time.Time) {
	o.g.mu.Lock()
	if o.count == 0 || o.looking || now.Sub(o.since) < orderLook {
		o.g.mu.Unlock()
		return
	}
	o.looking, o.since = true, now
	var sessions []string
	for session := range o.parked {
		sessions = append(sessions, session)
	}
	o.g.mu.Unlock()
	o.g.log.appending.Go(func() {
		ctx, cancel := context.WithTimeout(o.g.log.storing, getTimeout)
		defer cancel()
		var floor uint64
		if cons, err := o.g.log.js.Consumer(ctx, workStream, o.g.consumer); err == nil {
			floor = cons.CachedInfo().AckFloor.Stream
		}
		o.g.mu.Lock()
		o.floor = max(o.floor, floor)
		o.g.mu.Unlock()
		for _, session := range sessions {
			o.read(session)
		}
		o.g.mu.Lock()
		o.looking = false
		o.g.mu.Unlock()
	})
}

// pass writes that an item is settled into its session's register, then calls then, which tells NATS. Where it cannot be written before the item's time is over, the item is handed out again.
func (o *workOrder) pass(h *heldItem, then func()) {
	l := o.g.log
	l.appending.Go(func() {
		o.g.mu.Lock()
		wait := o.g.settings.ackWait
		o.g.mu.Unlock()
		ctx, cancel := context.WithTimeout(l.storing, wait)
		defer cancel()
		session := h.item.GetSession()
		var retry backoff
		for {
			seq, rev, err := o.register(ctx, session)
			if err == nil && seq < h.item.seq {
				_, err = publishFenced(ctx, l.conn, orderSubject(o.g.key, schema.EscapeToken(session)), strconv.AppendUint(nil, h.item.seq, 10), rev)
				if isConflict(err) {
					continue
				}
			}
			if err == nil {
				break
			}
			if !retry.wait(ctx, errNotStored) {
				o.g.forget(h)
				l.logger.Warn("a work item was settled, but its place in the order of its session could not be stored; it is handed out again", "group", o.g.key.name, "session", h.item.id().String(), "seq", h.item.GetSeq(), "error", err)
				return
			}
		}
		then()
		o.reached(session, h.item.seq)
	})
}
