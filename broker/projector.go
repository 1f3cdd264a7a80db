package broker

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// projector projects one log stream while it holds the stream's lease, and stands by while another does.
type projector struct {
	// Static after construction.
	stream  string
	nc      *connection
	js      jetstream.JetStream
	r       *reader
	lease   *lease
	dog     *watchdog // nil where nothing is watched
	budget  int
	maxAge  time.Duration // of what the log keeps
	logger  *slog.Logger
	metrics *projectionMetrics

	// post is the watch over the stream while it is held; nil where nothing is watched. Owned by hold.
	post *post
}

const (
	// tickEvery is how often the projector looks for what is due: the delay of a transition in the registry.
	tickEvery = 250 * time.Millisecond
	// pullMessages and pullBytes bound what the client holds of the log before it is projected. A message of the largest size must fit.
	pullMessages = 2000
	pullBytes    = 8 << 20
	// leaveWithin bounds the flush at the end.
	leaveWithin = 5 * time.Second
)

// run projects until ctx ends; then it stores what it has and gives the lease back.
func (p *projector) run(ctx context.Context) {
	var retry backoff
	for {
		if p.lease.acquire(ctx) != nil {
			return
		}
		p.logger.Debug("projecting", "stream", p.stream, "from", p.lease.position()+1)
		p.metrics.leading.WithLabelValues(p.stream).Set(1)
		err := p.hold(ctx)
		p.metrics.leading.WithLabelValues(p.stream).Set(0)
		if ctx.Err() != nil {
			return
		}
		// Whatever was in memory is forgotten; it is derived anew from the checkpoint on.
		p.logger.Warn("the projector begins anew from its checkpoint", "stream", p.stream, "error", err)
		if !retry.wait(ctx, errNotStored) {
			return
		}
	}
}

// hold projects until ctx ends or something breaks.
func (p *projector) hold(ctx context.Context) error {
	s, err := p.js.Stream(ctx, p.stream)
	if err != nil {
		return err
	}
	read := p.lease.position()
	if last := s.CachedInfo().State.LastSeq; last < read {
		p.logger.Error("the log stream is shorter than the projector's checkpoint; it is projected from the beginning. Where it was made anew, derive the pages again with `tidemark rebuild`",
			"stream", p.stream, "checkpoint", read, "last", last)
		read = 0
	}
	o, err := p.nc.readOrdered(ctx, s, read, nil, jetstream.PullMaxMessagesWithBytesLimit(pullMessages, max(pullBytes, 2*int(p.nc.MaxPayload()))))
	if err != nil {
		return err
	}
	defer o.close()
	proj := newProjection(p.nc, p.r, p.lease, p.budget, p.metrics, p.logger)
	proj.work = &dispatch{from: read}
	p.post = p.dog.post(p.stream, p.lease)
	defer p.post.leave()
	proj.post = p.post
	beside, stop := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() { p.sweepRegistry(beside) })
	wg.Go(func() { p.post.learn(beside) })
	defer wg.Wait()
	defer stop()
	read, err = p.project(ctx, o, proj, read)
	if ctx.Err() == nil {
		return err
	}
	return p.leave(ctx, proj, read)
}

// project takes in messages and stores what is due, until something breaks. It returns the stream sequence that it came to.
func (p *projector) project(ctx context.Context, o *ordered, proj *projection, read uint64) (uint64, error) {
	nextTick, nextBeat := time.Now().Add(tickEvery), time.Now().Add(beatEvery)
	for {
		idle := false
		msg, meta, err := o.next(ctx, max(time.Until(nextTick), time.Millisecond))
		if ctx.Err() != nil {
			return read, ctx.Err()
		}
		now := time.Now()
		switch {
		case err == nil:
			if err := proj.add(ctx, msg.Subject(), meta.Sequence.Stream, msg.Data(), now); err != nil {
				return read, err
			}
			read, idle = meta.Sequence.Stream, meta.NumPending == 0
			if now.After(nextTick) {
				p.metrics.behind(p.stream, meta.NumPending, now.Sub(meta.Timestamp))
			}
		case errors.Is(err, nats.ErrTimeout):
			idle = true
			p.metrics.behind(p.stream, 0, 0)
		default:
			return read, err
		}
		if proj.workDue(idle) {
			if err := proj.storeWork(ctx); err != nil {
				return read, err
			}
		}
		if proj.full() {
			if err := proj.store(ctx, nil); err != nil {
				return read, err
			}
		}
		if now.Before(nextTick) {
			continue
		}
		if err := proj.tick(ctx, now); err != nil {
			return read, err
		}
		p.metrics.memory.WithLabelValues(p.stream).Set(float64(proj.size))
		if now = time.Now(); !now.Before(nextBeat) {
			if err := p.beat(ctx, proj.stored(read)); err != nil {
				return read, err
			}
			nextBeat = now.Add(beatEvery)
		}
		nextTick = now.Add(tickEvery)
	}
}

// beat renews the lease with the checkpoint. Only the loss of the lease is an error: the rest passes, and until it does nothing more is stored.
func (p *projector) beat(ctx context.Context, through uint64) error {
	err := p.lease.renew(ctx, through)
	if _, stop := errors.AsType[stopError](err); stop {
		return err
	}
	if err != nil {
		p.logger.Warn("the projector's checkpoint could not be stored yet", "stream", p.stream, "error", err)
	}
	return nil
}

// leave stores everything and gives the lease back.
func (p *projector) leave(ctx context.Context, proj *projection, read uint64) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), leaveWithin)
	defer cancel()
	if err := proj.flush(ctx); err != nil {
		p.logger.Warn("the projector leaves without having stored everything; it is derived again at the next start", "stream", p.stream, "error", err)
		return err
	}
	if err := p.lease.release(ctx, proj.stored(read)); err != nil {
		p.logger.Warn("the projector leaves without giving its lease back", "stream", p.stream, "error", err)
		return err
	}
	p.logger.Info("the projector has stored everything and leaves", "stream", p.stream, "through", read)
	return nil
}
