package edgegrpc

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"tidemark/schema"
)

func TestDrain(t *testing.T) {
	eachDialect(t, func(w *world, d dialect) {
		k := w.dial(d, w.token(schema.Role_ROLE_AGENT, "*"))
		c := k.follow(&schema.Attach{Session: "s"})
		c.next()
		c.next() // caught_up
		var up *conversation
		if !d.http1 {
			up = k.open("AppendStream", true)
			up.say(publishOf(1, "s", "a"))
			up.next()
		}
		synctest.Wait()
		drained := make(chan error, 1)
		began := time.Now()
		go func() { drained <- w.edge.Drain(w.ctx, "The edge is updated.") }()
		synctest.Wait()
		if up != nil {
			// Within the grace, the streams go on.
			if f := up.next(); f.GetGoingAway() == nil {
				w.Errorf("wanted going_away, got %v", f)
			}
			up.say(publishOf(2, "s", "b"))
			if f := up.next(); f.GetPublished() == nil {
				w.Errorf("wanted published, got %v", f)
			}
			up.wantStatus(schema.Code_CODE_GOING_AWAY)
		}
		if !sawGoingAway(c) {
			w.Errorf("the follower was not told")
		}
		c.wantStatus(schema.Code_CODE_GOING_AWAY)
		k.close()
		w.must(<-drained)
		if took := time.Since(began); took > 5*time.Second {
			w.Errorf("draining took %s", took)
		}
		w.must(<-w.served)
		close(w.served)
		if _, err := w.l.dial(w.ctx); err == nil {
			w.Errorf("a drained edge accepts connections")
		}
	})
}

func sawGoingAway(c *conversation) bool {
	for {
		f, err := c.recv()
		if err != nil {
			return false
		}
		if f.GetGoingAway().GetReason() == "The edge is updated." {
			return true
		}
	}
}

// While it drains, an edge refuses new calls on the connections that it has.
func TestDrainRefusesCalls(t *testing.T) {
	eachDialect(t, func(w *world, d dialect) {
		k := w.dial(d, w.token(schema.Role_ROLE_AGENT, "*"))
		w.must(k.call("Append", &schema.AppendRequest{Session: "s", Envelopes: []*schema.Envelope{tokenOf("x")}}, new(schema.AppendResponse)))
		hold := w.dial(dialects[0], k.token).follow(&schema.Attach{Session: "s"})
		hold.next()
		synctest.Wait()
		go func() { _ = w.edge.Drain(w.ctx, "The edge is updated.") }()
		synctest.Wait()
		w.wantProblem(k.call("Append", &schema.AppendRequest{Session: "s", Envelopes: []*schema.Envelope{tokenOf("x")}}, new(schema.AppendResponse)), schema.Code_CODE_GOING_AWAY)
		hold.cancel()
		k.close()
		w.must(<-w.served)
		close(w.served)
	})
}

// A drain that is not given the time cuts what is left.
func TestDrainInNoTime(t *testing.T) {
	inWorld(t, func(w *world) {
		k := w.dial(dialects[0], w.token(schema.Role_ROLE_AGENT, "*"))
		c := k.follow(&schema.Attach{Session: "s"})
		c.next()
		ctx, cancel := context.WithTimeout(w.ctx, 10*time.Millisecond)
		defer cancel()
		began := time.Now()
		if err := w.edge.Drain(ctx, "The edge stops at once."); err == nil {
			w.Errorf("no error from a drain that had no time")
		}
		if took := time.Since(began); took > time.Second {
			w.Errorf("it took %s", took)
		}
		w.must(<-w.served)
		close(w.served)
		c.cancel()
	})
}
