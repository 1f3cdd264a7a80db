package broker

import (
	"bytes"
	"context"
	"fmt"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"tidemark/schema"
)

// reporter publishes to one session of a log, as an edge does.
type reporter struct {
	*testing.T
	wire  *wire
	log   *JetStreamLog
	id    schema.SessionID
	stamp schema.Stamp
}

// told is the answer to a publish.
type told struct {
	r   Receipt
	err error
}

// pending is where the answer to a publish comes; nil until it came.
type pending struct{ atomic.Pointer[told] }

// now is the answer as far as it has come.
func (p *pending) now() told {
	synctest.Wait()
	if a := p.Load(); a != nil {
		return *a
	}
	return told{}
}

// report opens a log on a shelf, over a wire, for fn.
func report(t *testing.T, cfg Config, fn func(p *reporter)) {
	synctest.Test(t, func(t *testing.T) {
		s := newShelf(t, 1, 1)
		p := &reporter{T: t, wire: newWire(s.node), id: schema.SessionID{Tenant: "t", Name: "a"}, stamp: schema.NewStamp(&schema.Source{Subject: "a"})}
		cfg.Server = Server{InProcess: p.wire, Name: "test"}
		var err error
		if p.log, err = Open(cfg); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		over := make(chan error, 1)
		go func() { over <- p.log.Run(ctx) }()
		for !p.log.Status().Ready {
			time.Sleep(10 * time.Millisecond) // of the bubble
		}
		fn(p)
		if err := p.log.Close(t.Context()); err != nil {
			t.Error(err)
		}
		cancel()
		if err := <-over; err != nil {
			t.Error(err)
		}
	})
}

func (p *reporter) publish(e *schema.Envelope) *pending {
	p.Helper()
	a, err := p.stamp.AcceptEnvelope(e, time.Now())
	if err != nil {
		p.Fatal(err)
	}
	answer := new(pending)
	began := time.Now()
	p.log.Publish(p.Context(), p.id, &Submission{Envelopes: []schema.Accepted{a}, Done: func(r Receipt, err error) {
		if !answer.CompareAndSwap(nil, &told{r, err}) {
			p.Error("a publish was answered twice")
		}
	}})
	if took := time.Since(began); took > 500*time.Millisecond {
		p.Errorf("a publish found no room for %s", took)
	}
	return answer
}

func (p *reporter) progress(message string) *pending {
	p.Helper()
	return p.publish(&schema.Envelope{Payload: &schema.Envelope_WorkflowProgress{WorkflowProgress: &schema.WorkflowProgress{Step: "s", Message: message}}})
}

// stored checks the place that a publish was answered with.
func (p *reporter) stored(what string, answer *pending, seq uint64, replaced bool) {
	p.Helper()
	if a := answer.now(); a.err != nil || a.r.First != seq || a.r.Last != seq || a.r.Replaced != replaced {
		p.Errorf("%s was answered with %+v, %v; want seq %d, replaced %t", what, a.r, a.err, seq, replaced)
	}
}

func (p *reporter) open(what string, answer *pending) {
	p.Helper()
	if a := answer.now(); a != (told{}) {
		p.Errorf("%s was answered with %+v, %v; it should wait", what, a.r, a.err)
	}
}

// Progress whose place was taken holds nothing of the edge's bound any more, so that far more of it can wait than there is room for (I8).
func TestI8_ReplacedProgressTakesNoRoom(t *testing.T) {
	report(t, Config{QueueBytes: 64 << 10}, func(p *reporter) {
		p.progress("first")
		text := string(bytes.Repeat([]byte("x"), 8<<10))
		var all []*pending
		for range 100 {
			all = append(all, p.progress(text))
		}
		p.open("the last report", all[99])
		time.Sleep(time.Second)
		for i, a := range all {
			p.stored(fmt.Sprint("report ", i), a, 2, i < 99)
		}
		if !p.log.queued.TryAcquire(64 << 10) {
			t.Error("there are bytes held of what is stored")
		}
		p.log.queued.Release(64 << 10)
	})
}

// An appender in which progress waits is at work: it is not forgotten, however many others there are, or however long ago it last stored something.
func TestProgressKeepsItsAppender(t *testing.T) {
	report(t, Config{}, func(p *reporter) {
		p.progress("first")
		waiting := p.progress("waits")
		p.open("a report", waiting)
		a := p.log.appender(p.id)
		if a.leave(time.Now().Add(time.Hour)) {
			t.Fatal("the appender is gone while progress waits in it")
		}
		time.Sleep(time.Second)
		p.stored("the report", waiting, 2, false)
		if !a.leave(time.Now().Add(time.Hour)) {
			t.Error("the appender stays, with nothing to do")
		}
	})
}

// NATS goes away while progress waits, and is back in time: the newest is stored, once, and all are answered.
func TestProgressOutlastsNATS(t *testing.T) {
	report(t, Config{}, func(p *reporter) {
		first := p.progress("first")
		p.stored("the first report", first, 1, false)
		a, b := p.progress("a"), p.progress("b")
		p.open("a report", b)
		p.wire.frozen.Store(true)
		time.Sleep(3 * time.Second)
		c := p.progress("c")
		p.open("a report", b)
		p.wire.frozen.Store(false)
		time.Sleep(4 * time.Second)
		p.stored("a report that was replaced", a, 2, true)
		p.stored("the report that waited", b, 2, false)
		p.stored("the report during the outage", c, 3, false)
	})
}

// NATS stays away for longer than a publish is held: whoever waits is told, and may try again.
func TestProgressIsNotHeldForEver(t *testing.T) {
	report(t, Config{HoldFor: 900 * time.Millisecond}, func(p *reporter) {
		p.progress("first")
		// To wait for a second is not to be held by NATS.
		second := p.progress("second")
		time.Sleep(1100 * time.Millisecond)
		p.stored("a report that waited for longer than is held", second, 2, false)
		a, b := p.progress("a"), p.progress("b")
		p.open("a report", b)
		p.wire.frozen.Store(true)
		time.Sleep(10 * time.Second)
		for _, answer := range []told{a.now(), b.now()} {
			if schema.CodeOf(answer.err) != schema.Code_CODE_UNAVAILABLE {
				t.Errorf("a report was answered with %+v, %v after NATS had been away for long", answer.r, answer.err)
			}
		}
		p.wire.frozen.Store(false)
		time.Sleep(20 * time.Second)
		report := p.progress("again")
		time.Sleep(3 * time.Second)
		if again := report.now(); again.err != nil || again.r.First < 3 {
			t.Errorf("after the outage a report was answered with %+v, %v", again.r, again.err)
		}
	})
}

// The time of the last progress is the session's, not the edge's: an appender that takes the session over, from a page or from frames, holds what comes too early.
func TestProgressOfTheSessionBefore(t *testing.T) {
	report(t, Config{}, func(p *reporter) {
		p.progress("first")
		time.Sleep(50 * time.Millisecond)
		for round := range uint64(3) {
			time.Sleep(300 * time.Millisecond)
			if !p.log.appender(p.id).leave(time.Now().Add(time.Hour)) {
				t.Fatal("the appender is at work")
			}
			p.log.mu.Lock()
			delete(p.log.appenders, p.id)
			p.log.mu.Unlock()
			waiting := p.progress("waits")
			time.Sleep(500 * time.Millisecond)
			p.open("a report", waiting)
			time.Sleep(200 * time.Millisecond)
			p.stored("the report", waiting, round+2, false)
		}
	})
}
