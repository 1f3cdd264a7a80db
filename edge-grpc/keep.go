package edgegrpc

import (
	"sync"
	"time"

	"tidemark/broker"
	"tidemark/schema"
)

const (
	// keepFor is how long one KeepRun lasts: as long as a run may be without an agent where nothing else is said.
	keepFor = time.Minute
	// maxKept bounds the runs that this edge keeps for agents without a connection, each some 300 bytes.
	maxKept = 100_000
)

// leases are the runs that KeepRun keeps, each until its time is over. The zero value has none.
type leases struct {
	mu sync.Mutex // guards all below
	of map[leasedRun]*lease
	// over: the edge has ended, and keeps nothing.
	over bool
}

type leasedRun struct {
	id  schema.SessionID
	run string
}

type lease struct {
	timer   *time.Timer
	release func()
}

// keep keeps a run for [keepFor] from now. The refusal is limit_exceeded where there are too many.
func (l *leases) keep(runs broker.RunKeeper, id schema.SessionID, run string) error {
	name := leasedRun{id, run}
	l.mu.Lock()
	defer l.mu.Unlock()
	switch of := l.of[name]; {
	case l.over:
		return schema.Refuse(schema.Code_CODE_GOING_AWAY, "This edge stops now; keep the run of session %q at another.", id.Name)
	case of != nil && of.timer.Stop():
		of.timer.Reset(keepFor)
		return nil
	case of != nil:
		// Its time is over, and whoever ends it waits for mu.
		of.release()
	case len(l.of) >= maxKept:
		return schema.Refuse(schema.Code_CODE_LIMIT_EXCEEDED, "This edge keeps %d runs for agents without a connection, as many as it can; keep the run of session %q at another, or by a connection.", len(l.of), id.Name)
	}
	if l.of == nil {
		l.of = make(map[leasedRun]*lease)
	}
	// It neither waits for NATS nor calls back.
	made := &lease{release: runs.KeepRun(id, run)}
	made.timer = time.AfterFunc(keepFor, func() { l.expire(name, made) })
	l.of[name] = made
	return nil
}

// expire ends a lease whose time is over.
func (l *leases) expire(name leasedRun, which *lease) {
	l.mu.Lock()
	if l.of[name] == which {
		delete(l.of, name)
	}
	l.mu.Unlock()
	which.release()
}

// end lets all runs go.
func (l *leases) end() {
	l.mu.Lock()
	all := l.of
	l.of, l.over = nil, true
	l.mu.Unlock()
	for _, of := range all {
		of.timer.Stop()
		of.release()
	}
}
