package gateway

import (
	"container/list"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"tidemark/broker"
	"tidemark/schema"
)

// MaxKeptRuns bounds the runs that one connection keeps: beyond it the one that was kept first is let go. An agent with more at once opens more connections.
const MaxKeptRuns = 1_000

// runName is a run of a session of the connection's tenant; run is empty for the session's only one.
type runName struct{ session, run string }

// runChange is what an envelope says of a run, once it is stored.
type runChange struct {
	run string
	// over: it has ended.
	over bool
	// all: whatever run it is.
	all bool
}

// keptRuns are the runs that have their agent in this connection (I10): those it published for, those it sent a heartbeat for, and those whose start_run it has in hand as work. The zero value is none.
type keptRuns struct {
	mu sync.Mutex // guards all below; never held while the keeper is called
	of map[runName]*list.Element
	// order has the runs as *keptRun, those kept first at the front.
	order list.List
	// held are the items in hand that keep a run, by their ids.
	held map[uint64]*heldRun
	over bool
}

// keptRun is one of them.
type keptRun struct {
	name    runName
	release func()
	// said: by a publish or a heartbeat, so that it stays when no item keeps it.
	said bool
	// items in hand that keep it.
	items int
}

// heldRun is a start_run in the hands of the connection.
type heldRun struct {
	// run is the one that it keeps. It may have ended, and another of its name be kept since, which is none of this item's.
	run *keptRun
	by  *subscription
	// deadline is when others may get it, and keep the run: who hangs does not keep it for ever.
	deadline *time.Timer
}

// noteRun notes what an accepted envelope says of a run. It is called for every envelope. Called by the reader.
func (p *pending) noteRun(a *schema.Accepted) {
	switch a.Kind {
	case schema.KindStartRun, schema.KindRunStatus, schema.KindError:
	default:
		return
	}
	c := p.c
	if c.g.cfg.Runs == nil {
		return
	}
	switch c.principal.Role {
	case schema.Role_ROLE_AGENT, schema.Role_ROLE_WORKER, schema.Role_ROLE_ADMIN:
	default:
		return
	}
	change, ok := changeOf(a.Kind, a.Payload)
	if ok {
		p.runs = append(p.runs, change)
	}
}

// changeOf is what a payload says of a run; false where that is nothing.
func changeOf(kind schema.Kind, payload []byte) (runChange, bool) {
	switch kind {
	case schema.KindStartRun:
		m := new(schema.StartRun)
		err := proto.Unmarshal(payload, m)
		return runChange{run: m.GetRunId()}, err == nil
	case schema.KindRunStatus:
		m := new(schema.RunStatus)
		err := proto.Unmarshal(payload, m)
		under := m.GetStatus() == schema.Status_STATUS_RUNNING || m.GetStatus() == schema.Status_STATUS_WAITING_FOR_INPUT
		return runChange{run: m.GetRunId(), over: !under, all: !under && m.GetRunId() == ""}, err == nil
	default:
		// An error that is not recoverable fails the run under way, whatever its name.
		m := new(schema.Error)
		err := proto.Unmarshal(payload, m)
		return runChange{over: true, all: true}, err == nil && m.Recoverable != nil && !m.GetRecoverable()
	}
}

// keepRuns keeps, or lets go, the runs that a publish spoke of, which is stored. Called by the writer, before the peer hears that it is.
func (c *conn) keepRuns(p *pending) {
	for _, change := range p.runs {
		name := runName{p.target.id.Name, change.run}
		switch {
		case !change.over:
			c.keepRun(name)
		case change.all:
			c.kept.forget(func(n runName) bool { return n.session == name.session })
		default:
			c.kept.forget(func(n runName) bool { return n == name || n.session == name.session && n.run == "" })
		}
	}
}

// heartbeat handles a [schema.Heartbeat]. The error ends the connection. Called by the reader.
func (c *conn) heartbeat(m *schema.Heartbeat) error {
	if c.g.cfg.Runs == nil {
		return schema.Refuse(schema.Code_CODE_UNSUPPORTED_PROTOCOL, "This edge keeps no runs; send the heartbeat to another.")
	}
	if err := c.spend(1, time.Now()); err != nil {
		return err
	}
	session := m.GetSession()
	if own := c.peer.Session; own != "" {
		if session != "" && session != own {
			return schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "The session socket of session %q keeps runs of that session alone; leave 'session' out.", own)
		}
		session = own
	}
	id, err := schema.ParseSessionID(c.principal.Tenant, session)
	if err != nil {
		return err
	}
	if err := CheckRun(m.GetRunId()); err != nil {
		return err
	}
	if err := Authorize(c.principal, Work, id.Name); err != nil {
		return err
	}
	c.keepRun(runName{id.Name, m.GetRunId()})
	c.reply(&schema.ServerFrame{Frame: &schema.ServerFrame_Heard{Heard: &schema.Heard{Session: id.Name, RunId: m.GetRunId()}}})
	return nil
}

// CheckRun says what is wrong with a run's id, which may be empty: invalid_message.
func CheckRun(run string) error {
	if len(run) > schema.MaxIDBytes {
		return schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "The run_id has %d bytes; at most %d are allowed.", len(run), schema.MaxIDBytes)
	}
	return nil
}

// keepRun keeps a run because the peer says so. Called by the reader and the writer.
func (c *conn) keepRun(name runName) { c.keep(name, func(k *keptRun) { k.said = true }) }

// holdRun keeps the run that an item in hand starts. Called by the writer.
func (c *conn) holdRun(s *subscription, it *broker.Item) {
	if c.g.cfg.Runs == nil {
		return
	}
	e := decoded(it.Envelope)
	if e.GetStartRun() == nil {
		return
	}
	h := &heldRun{by: s}
	c.keep(runName{it.Session.Name, e.GetStartRun().GetRunId()}, func(k *keptRun) {
		k.items++
		h.run = k
	})
	ks := &c.kept
	ks.mu.Lock()
	defer ks.mu.Unlock()
	if ks.held == nil {
		ks.held = make(map[uint64]*heldRun, 1)
	}
	ks.held[it.ID] = h
	h.deadline = time.AfterFunc(time.Until(it.Deadline), func() { c.letRun(it.ID) })
}

// keep keeps a run, for a reason that is noted of it. What is noted last is of the run that is kept.
func (c *conn) keep(name runName, why func(*keptRun)) {
	ks := &c.kept
	ks.mu.Lock()
	if e := ks.of[name]; e != nil {
		why(e.Value.(*keptRun)) //nolint:errcheck // the list holds nothing else
		ks.order.MoveToBack(e)
		ks.mu.Unlock()
		return
	}
	ks.mu.Unlock()
	k := &keptRun{name: name, release: c.g.cfg.Runs.KeepRun(schema.SessionID{Tenant: c.principal.Tenant, Name: name.session}, name.run)}
	why(k)
	ks.mu.Lock()
	if e := ks.of[name]; e != nil {
		// The reader and the writer kept it at once. The second lease is given back below.
		why(e.Value.(*keptRun)) //nolint:errcheck // the list holds nothing else
		ks.mu.Unlock()
		k.release()
		return
	}
	var oldest *keptRun
	if ks.over {
		oldest = k
	} else {
		if ks.of == nil {
			ks.of = make(map[runName]*list.Element, 1)
		}
		ks.of[name] = ks.order.PushBack(k)
		if ks.order.Len() > MaxKeptRuns {
			oldest = ks.drop(ks.order.Front())
		}
	}
	ks.mu.Unlock()
	if oldest != nil {
		oldest.release()
	}
}

// drop takes a run out. The caller holds mu, and releases what it returns when it does not.
func (ks *keptRuns) drop(e *list.Element) *keptRun {
	k := ks.order.Remove(e).(*keptRun) //nolint:errcheck // the list holds nothing else
	delete(ks.of, k.name)
	return k
}

// letRun lets go the run that an item kept which is not in hand any more, unless something else keeps it; nothing where the item kept none. Called from anywhere.
func (c *conn) letRun(id uint64) {
	ks := &c.kept
	ks.mu.Lock()
	k := ks.let(id)
	ks.mu.Unlock()
	if k != nil {
		k.release()
	}
}

// letRunsOf lets go the runs that items of a subscription kept: it is over.
func (c *conn) letRunsOf(s *subscription) {
	ks := &c.kept
	var released []*keptRun
	ks.mu.Lock()
	for id, h := range ks.held {
		if h.by != s {
			continue
		}
		if k := ks.let(id); k != nil {
			released = append(released, k)
		}
	}
	ks.mu.Unlock()
	for _, k := range released {
		k.release()
	}
}

// let forgets an item in hand. The caller holds mu, and releases what it returns when it does not; nil for nothing.
func (ks *keptRuns) let(id uint64) *keptRun {
	h := ks.held[id]
	if h == nil {
		return nil
	}
	delete(ks.held, id)
	h.deadline.Stop()
	k := h.run
	e := ks.of[k.name]
	if e == nil || e.Value != k {
		return nil
	}
	if k.items--; k.items > 0 || k.said {
		return nil
	}
	return ks.drop(e)
}

// goOnWithRun says that an item in hand has a new deadline.
func (c *conn) goOnWithRun(id uint64, deadline time.Time) {
	ks := &c.kept
	ks.mu.Lock()
	defer ks.mu.Unlock()
	if h := ks.held[id]; h != nil {
		h.deadline.Reset(time.Until(deadline))
	}
}

// forget lets go the runs that match: they have ended.
func (ks *keptRuns) forget(match func(runName) bool) {
	var released []*keptRun
	ks.mu.Lock()
	for e := ks.order.Front(); e != nil; {
		next := e.Next()
		if match(e.Value.(*keptRun).name) { //nolint:errcheck // the list holds nothing else
			released = append(released, ks.drop(e))
		}
		e = next
	}
	ks.mu.Unlock()
	for _, k := range released {
		k.release()
	}
}

// end lets everything go: the connection is over.
func (ks *keptRuns) end() {
	ks.mu.Lock()
	ks.over = true
	for _, h := range ks.held {
		h.deadline.Stop()
	}
	ks.held = nil
	ks.mu.Unlock()
	ks.forget(func(runName) bool { return true })
}
