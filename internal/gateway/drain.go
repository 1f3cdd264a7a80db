package gateway

import (
	"context"
	"fmt"
	"time"

	"tidemark/schema"
)

// Drain ends all connections without losing anything, and refuses new ones (DESIGN section 8): it says going_away, goes on serving for [Config.DrainGrace], stops reading, waits until the
// appends in flight are answered ([Config.CloseTimeout]), closes. It returns early when no connection is left, and with an error that says how many were left when ctx ended: cancel their
// contexts to cut them. The reason is a sentence for clients.
//
// A gateway does not come back from it.
func (g *Gateway) Drain(ctx context.Context, reason string) error {
	log := g.cfg.Logger
	grace := max(g.cfg.DrainGrace, 0)

	g.mu.Lock()
	if g.draining == nil {
		g.draining = schema.Refuse(schema.Code_CODE_GOING_AWAY, "This edge is going away; connect to another. %s", reason)
	}
	refusal := g.draining
	conns := g.open()
	g.mu.Unlock()
	log.InfoContext(ctx, "draining: no new connections; telling clients to go", "connections", len(conns), "grace", grace, "why", reason)
	for _, c := range conns {
		c.goingAway(reason, grace)
	}
	if g.gone(ctx, grace) {
		log.InfoContext(ctx, "drained: all clients went by themselves")
		return nil
	}

	g.mu.Lock()
	conns = g.open()
	g.mu.Unlock()
	log.InfoContext(ctx, "draining: reading no more; waiting for appends in flight", "connections", len(conns), "at_most", g.cfg.CloseTimeout)
	for _, c := range conns {
		c.finish(&ending{refusal: refusal})
	}
	// The transport may take its time to close, and a peer that does not read its time to be noticed.
	if g.gone(ctx, g.cfg.CloseTimeout+g.cfg.WriteTimeout) {
		log.InfoContext(ctx, "drained: all connections closed")
		return nil
	}
	g.mu.Lock()
	left := len(g.conns)
	g.mu.Unlock()
	log.WarnContext(ctx, "not drained: connections are left", "connections", left)
	return fmt.Errorf("gateway: %d connections did not end in time", left)
}

// open lists the connections. The caller holds mu.
func (g *Gateway) open() []*conn {
	conns := make([]*conn, 0, len(g.conns))
	for c := range g.conns {
		conns = append(conns, c)
	}
	return conns
}

// gone waits until no connection is left, at most so long; false where some are.
func (g *Gateway) gone(ctx context.Context, most time.Duration) bool {
	g.mu.Lock()
	if len(g.conns) == 0 {
		g.mu.Unlock()
		return true
	}
	if g.empty == nil {
		g.empty = make(chan struct{})
	}
	empty := g.empty
	g.mu.Unlock()
	t := time.NewTimer(most)
	defer t.Stop()
	select {
	case <-empty:
		return true
	case <-t.C:
	case <-ctx.Done():
	}
	return false
}
