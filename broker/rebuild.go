package broker

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"tidemark/schema"
)

// RebuildConfig says what [Rebuild] does.
type RebuildConfig struct {
	Server Server
	// Session is the one to rebuild; nil for all of the deployment.
	Session *schema.SessionID
	// Memory bounds the sessions held at once, in bytes. Default 64 MiB.
	Memory int
	Logger *slog.Logger
}

// Rebuilt is what [Rebuild] did.
type Rebuilt struct {
	// Frames were read, Pages and Records written because they were missing or not what the log says.
	Frames, Pages, Records uint64
}

// Rebuild derives pages and registry from the log and stores what is missing or different. It may run while brokers project and edges read: what it writes is fenced as theirs is, and what is right stays
// as it is. The error is a refusal, or the context's; what was done until then is done.
func Rebuild(ctx context.Context, cfg RebuildConfig) (Rebuilt, error) {
	if cfg.Memory == 0 {
		cfg.Memory = 64 << 20
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	nc, err := cfg.Server.connect(cfg.Logger, "rebuild")
	if err != nil {
		return Rebuilt{}, err
	}
	defer nc.Close()
	js, err := jetstream.New(nc.Conn)
	if err != nil {
		return Rebuilt{}, err
	}
	streams, err := discoverWithin(ctx, js, getTimeout)
	if err != nil {
		return Rebuilt{}, err
	}
	b := &rebuild{nc: nc, js: js, r: newReader(nc, streams), metrics: newProjectionMetrics(nil), cfg: cfg}
	if cfg.Session != nil {
		err = b.session(ctx, *cfg.Session)
	} else {
		for i := range streams {
			if err = b.stream(ctx, logStreamName(i)); err != nil {
				break
			}
		}
	}
	return b.done, err
}

// discoverWithin waits a while for the connection, which may still be coming up.
func discoverWithin(ctx context.Context, js jetstream.JetStream, d time.Duration) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	var retry backoff
	for {
		streams, _, err := discover(ctx, js)
		if err == nil || !retry.wait(ctx, err) {
			return streams, err
		}
	}
}

type rebuild struct {
	nc      *connection
	js      jetstream.JetStream
	r       *reader
	metrics *projectionMetrics
	cfg     RebuildConfig
	done    Rebuilt
}

func (b *rebuild) projection() *projection {
	return newProjection(b.nc, b.r, rebuildGuard{b.r}, b.cfg.Memory, b.metrics, b.cfg.Logger)
}

func (b *rebuild) count(p *projection) {
	b.done.Pages += p.pagesStored.Load()
	b.done.Records += p.recordsStored.Load()
}

// session rebuilds one session, from the frames that are there.
func (b *rebuild) session(ctx context.Context, id schema.SessionID) error {
	ln := laneOf(id)
	head, err := b.r.headFrameFromLeader(ctx, ln)
	if err != nil {
		return err
	}
	if head == nil || head.Deleted {
		return notFound(id)
	}
	p := b.projection()
	defer b.count(p)
	err = b.r.each(ctx, ln, head, 0, func(f *frame) error {
		b.done.Frames++
		if err := p.take(ctx, ln.logSubject(), f, time.Now()); err != nil || !p.full() {
			return err
		}
		return p.store(ctx, nil)
	})
	if err != nil {
		return err
	}
	return p.flush(ctx)
}

// stream rebuilds the sessions of a log stream, up to what is its end when it comes there.
func (b *rebuild) stream(ctx context.Context, name string) error {
	s, err := b.js.Stream(ctx, name)
	if err != nil {
		return unreadable(err)
	}
	if s.CachedInfo().State.Msgs == 0 {
		return nil
	}
	o, err := b.nc.readOrdered(ctx, s, 0, nil, jetstream.PullMaxMessagesWithBytesLimit(pullMessages, max(pullBytes, 2*int(b.nc.MaxPayload()))))
	if err != nil {
		return unreadable(err)
	}
	defer o.close()
	p := b.projection()
	defer b.count(p)
	for pending := uint64(1); pending > 0; {
		msg, meta, err := o.next(ctx, getTimeout)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if errors.Is(err, nats.ErrTimeout) {
			// What was still to come may have been deleted; otherwise NATS is away, and comes back.
			if left, err := o.left(ctx); err == nil {
				pending = left
			}
			continue
		}
		if err != nil {
			return unreadable(err)
		}
		b.done.Frames++
		pending = meta.NumPending
		if err := p.add(ctx, msg.Subject(), meta.Sequence.Stream, msg.Data(), time.Now()); err != nil {
			return err
		}
		if p.full() {
			if err := p.store(ctx, nil); err != nil {
				return err
			}
		}
	}
	return p.flush(ctx)
}

// rebuildGuard asks the log whether a session is still what it was: there is no lease to ask.
type rebuildGuard struct{ r *reader }

func (rebuildGuard) fresh(ctx context.Context) error { return context.Cause(ctx) }

func (g rebuildGuard) confirm(ctx context.Context, ln lane, epoch string) (bool, error) {
	head, err := g.r.headFrameFromLeader(ctx, ln)
	return head != nil && !head.Deleted && head.Epoch == epoch, err
}

// mayClear holds where the tombstone is the session's last frame: then no page of a next history was stored before this was asked.
func (g rebuildGuard) mayClear(ctx context.Context, ln lane, streamSeq uint64) (bool, error) {
	head, err := g.r.headFrameFromLeader(ctx, ln)
	return head != nil && head.Deleted && head.StreamSeq == streamSeq, err
}
