package gateway

import (
	"sync"

	"tidemark/internal/auth"
)

// places are what a connection holds of those that its user has in sessions: one for each session, however many attachments follow it. They are given back with the last of these.
type places struct {
	mu sync.Mutex // guards all below
	of map[string]*place
}

// place is one session's.
type place struct {
	// attachments that hold it, or wait for it. Guarded by places.mu.
	attachments int
	// entered is closed when the log has answered. Set before: leave, which is nil where err is not.
	entered chan struct{}
	leave   func()
	err     error
}

// enter takes a place for the attachment's user, where the role's are counted; the error is the log's refusal. Called by the attachment's task: it may take as long as the log does.
func (a *attachment) enter(who *auth.Principal) error {
	c := a.c
	limit := c.g.cfg.Limits.connections(who.Role)
	if limit == 0 {
		return nil
	}
	ps, name := &c.placed, a.id.Name
	ps.mu.Lock()
	p := ps.of[name]
	first := p == nil
	if first {
		p = &place{entered: make(chan struct{})}
		if ps.of == nil {
			ps.of = make(map[string]*place, 1)
		}
		ps.of[name] = p
	}
	p.attachments++
	ps.mu.Unlock()
	if !first {
		// The other attachment's task is under way, and ends with the connection.
		<-p.entered
		if p.err == nil {
			a.placed = true
		}
		return p.err
	}
	p.leave, p.err = c.g.cfg.Log.Enter(c.ctx, a.id, who.Subject, limit)
	if p.err != nil {
		// Who comes later asks again; who waits hears what this one does.
		ps.mu.Lock()
		delete(ps.of, name)
		ps.mu.Unlock()
	}
	a.placed = p.err == nil
	close(p.entered)
	return p.err
}

// leave gives the attachment's part of the place back. Called like close.
func (a *attachment) leave() {
	if !a.placed {
		return
	}
	a.placed = false
	ps := &a.c.placed
	ps.mu.Lock()
	p := ps.of[a.id.Name]
	p.attachments--
	last := p.attachments == 0
	if last {
		delete(ps.of, a.id.Name)
	}
	ps.mu.Unlock()
	if last {
		p.leave()
	}
}
