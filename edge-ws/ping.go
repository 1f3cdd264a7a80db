package edgews

import (
	"context"
	"errors"
	"sync"
	"time"

	"tidemark/schema"
)

// maxMissed is how many pings in a row may go unanswered.
const maxMissed = 2

// pings asks the peer of a connection for a sign of life now and then. It holds a timer, and a goroutine only while a ping is unanswered: most connections are idle.
type pings struct {
	// Static after construction.
	t        *transport
	interval time.Duration
	ctx      context.Context
	cancel   context.CancelFunc
	running  sync.WaitGroup // the timer that is set, and the ping that is under way

	mu      sync.Mutex // guards all below
	timer   *time.Timer
	stopped bool

	// Owned by the ping that is under way.
	missed int
}

// startPings begins to ping. Whoever calls it calls stop.
func startPings(t *transport, interval time.Duration) *pings {
	p := &pings{t: t, interval: interval}
	p.ctx, p.cancel = context.WithCancel(t.ctx)
	p.after(interval)
	return p
}

// after sets the timer for the next ping.
func (p *pings) after(d time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stopped {
		return
	}
	p.running.Add(1)
	p.timer = time.AfterFunc(d, func() {
		defer p.running.Done()
		p.ping()
	})
}

// stop ends the pings and waits for the one that is under way.
func (p *pings) stop() {
	p.mu.Lock()
	p.stopped = true
	if p.timer.Stop() {
		p.running.Done()
	}
	p.mu.Unlock()
	p.cancel()
	p.running.Wait()
}

// ping asks, and waits for the answer until the next ping is due.
func (p *pings) ping() {
	reads, turns := p.t.wire.reads.Load(), p.t.turns.Load()
	ctx, cancel := context.WithTimeout(p.ctx, p.interval)
	defer cancel()
	began := time.Now()
	err := p.t.c.Ping(ctx)
	switch {
	case p.ctx.Err() != nil:
		return
	case err == nil:
		p.missed = 0
		p.after(p.interval - time.Since(began))
		return
	case !errors.Is(err, context.DeadlineExceeded):
		// The connection is closed, or about to be: whoever reads or writes will notice.
		return
	}
	// A byte is as good as a pong: it may be part of a message that takes long. And where nobody was reading, because the log takes its time, the pong may lie in the socket.
	if p.t.wire.reads.Load() != reads || p.t.turns.Load() != turns || turns%2 == 0 {
		p.missed = 0
	} else {
		p.missed++
	}
	if p.missed < maxMissed {
		p.after(0)
		return
	}
	p.t.dead.Store(schema.Refuse(schema.Code_CODE_PEER_DEAD, "The peer answered no ping for %s; come again from the last seq seen.", time.Duration(maxMissed)*p.interval))
	// Receive returns, and the gateway closes the connection.
	p.t.wire.interrupt()
}
