package broker

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const (
	// orderedTTL is how long the server keeps the consumer of a process that is gone.
	orderedTTL = time.Minute
	// orderedSilent is how long there may be no sign of the consumer before it is taken for gone.
	orderedSilent = 10 * time.Second
)

// errWentBack says that a stream is shorter than what was read of it: NATS lost it, and has another.
var errWentBack = errors.New("broker: the stream went back behind what was read of it")

// ordered reads a stream from a place on: every message, once and in order, over as many consumers and connections as it takes. It is what the client library calls an ordered consumer, but for what happens when things break: that one
// asks for its next consumer with a wait of 10 s that nothing ends, and where the connection breaks again meanwhile, all who follow wait as long; it does not miss a consumer that is gone where its caller looks in between; and it does
// not say that a stream went back. Its methods belong to one goroutine.
type ordered struct {
	// Static after construction.
	nc     *connection
	stream jetstream.Stream
	pull   []jetstream.PullMessagesOpt
	first  jetstream.ConsumerConfig // where reading begins

	cons   jetstream.Consumer
	it     jetstream.MessagesContext // nil while there is none
	unhook func() bool
	read   bool      // something was
	at     uint64    // stream sequence that was read to
	serial uint64    // of the consumer's last message
	heard  time.Time // when there was a sign of the consumer
	retry  backoff
}

// readOrdered begins behind the stream sequence at, or at a time where one is given. The pull options bound what is held of the stream before it is read.
func (c *connection) readOrdered(ctx context.Context, s jetstream.Stream, at uint64, from *time.Time, pull ...jetstream.PullMessagesOpt) (*ordered, error) {
	o := &ordered{nc: c, stream: s, at: at, first: startAt(at + 1)}
	o.pull = append(pull, jetstream.PullExpiry(3*orderedSilent), jetstream.PullHeartbeat(orderedSilent/2))
	if from != nil {
		o.at, o.first = 0, jetstream.ConsumerConfig{DeliverPolicy: jetstream.DeliverByStartTimePolicy, OptStartTime: from}
	}
	if err := o.open(ctx); err != nil {
		return nil, err
	}
	return o, nil
}

func startAt(seq uint64) jetstream.ConsumerConfig {
	return jetstream.ConsumerConfig{DeliverPolicy: jetstream.DeliverByStartSequencePolicy, OptStartSeq: seq}
}

// open makes a consumer behind what was read.
func (o *ordered) open(ctx context.Context) error {
	limited, cancel := context.WithTimeout(ctx, getTimeout)
	defer cancel()
	cfg := o.first
	if o.read {
		cfg = startAt(o.at + 1)
	}
	cfg.AckPolicy, cfg.MaxDeliver, cfg.MemoryStorage, cfg.Replicas, cfg.InactiveThreshold = jetstream.AckNonePolicy, 1, true, 1, orderedTTL
	var cons jetstream.Consumer
	err := o.nc.ask(limited, func(asking context.Context) (err error) {
		cons, err = o.stream.CreateConsumer(asking, cfg)
		return err
	})
	if err != nil {
		return err
	}
	it, err := cons.Messages(o.pull...)
	if err != nil {
		return err
	}
	o.cons, o.it, o.serial, o.heard = cons, it, 0, time.Now()
	// What comes behind a loss may come behind a gap.
	o.unhook = o.nc.onLoss(it.Stop)
	return nil
}

// close ends the reading, or the consumer that it goes on without.
func (o *ordered) close() {
	if o.it != nil {
		o.unhook()
		o.it.Stop()
		o.it = nil
	}
}

// next waits for the next message, until ctx ends, or, where most is not 0, so long: then the error is nats.ErrTimeout. Any other error but the context's says that it cannot be read on.
func (o *ordered) next(ctx context.Context, most time.Duration) (jetstream.Msg, *jetstream.MsgMetadata, error) {
	var by time.Time
	if most > 0 {
		by = time.Now().Add(most)
	}
	for wait := most; ; wait = max(time.Until(by), time.Millisecond) {
		if o.it == nil {
			if err := o.reopen(ctx, by); err != nil {
				return nil, nil, err
			}
		}
		until := jetstream.NextContext(ctx)
		if most > 0 {
			until = jetstream.NextMaxWait(wait)
		}
		msg, err := o.it.Next(until)
		switch {
		case err == nil:
			meta, err := msg.Metadata()
			if err != nil {
				return nil, nil, err
			}
			if meta.Sequence.Consumer == o.serial+1 {
				o.read, o.at, o.serial, o.retry = true, meta.Sequence.Stream, o.serial+1, backoff{}
				if most > 0 {
					o.heard = time.Now()
				}
				return msg, meta, nil
			}
		case ctx.Err() != nil:
			return nil, nil, ctx.Err()
		case errors.Is(err, nats.ErrTimeout):
			// A wait that is short misses no heartbeat.
			if time.Since(o.heard) > orderedSilent && !o.lives(ctx) {
				o.close()
			}
			return nil, nil, nats.ErrTimeout
		}
		// Messages were lost on their way, or the consumer.
		o.close()
	}
}

// reopen makes another consumer as soon as there is a connection; by bounds the wait for that, where it is set.
func (o *ordered) reopen(ctx context.Context, by time.Time) error {
	waiting := ctx
	if !by.IsZero() {
		var cancel context.CancelFunc
		waiting, cancel = context.WithDeadlineCause(ctx, by, nats.ErrTimeout)
		defer cancel()
	}
	for {
		if err := o.nc.awaitConnected(waiting); err != nil {
			return err
		}
		// Not for as long as the caller waits: what takes longer would be begun again for ever.
		err := o.sound(ctx)
		if err == nil {
			err = o.open(ctx)
		}
		if err == nil || ctx.Err() != nil || !passing(err) {
			return err
		}
		if !o.retry.wait(waiting, errNotStored) {
			return context.Cause(waiting)
		}
	}
}

// sound reports a stream that went back, or is not there. A consumer would wait for what is to come behind its place.
func (o *ordered) sound(ctx context.Context) error {
	limited, cancel := context.WithTimeout(ctx, getTimeout)
	defer cancel()
	var info *jetstream.StreamInfo
	err := o.nc.ask(limited, func(asking context.Context) (err error) {
		info, err = o.stream.Info(asking)
		return err
	})
	if err != nil {
		return err
	}
	if info.State.LastSeq < o.at {
		return fmt.Errorf("%w: it ends at %d, %d was read", errWentBack, info.State.LastSeq, o.at)
	}
	return nil
}

// lives asks whether the consumer is there, and our request for messages stands at it, as long as that may be answered. A request that was lost on its way between servers of a cluster is asked again by nobody.
func (o *ordered) lives(ctx context.Context) bool {
	info, err := o.info(ctx)
	o.heard = time.Now()
	if err != nil {
		return passing(err)
	}
	return info.NumWaiting > 0
}

// left is how many messages are still to come.
func (o *ordered) left(ctx context.Context) (uint64, error) {
	info, err := o.info(ctx)
	if err != nil {
		return 0, err
	}
	return info.NumPending, nil
}

// info is what the server says of the consumer.
func (o *ordered) info(ctx context.Context) (*jetstream.ConsumerInfo, error) {
	if o.it == nil {
		return nil, errLost
	}
	limited, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	var info *jetstream.ConsumerInfo
	err := o.nc.ask(limited, func(asking context.Context) (err error) {
		info, err = o.cons.Info(asking)
		return err
	})
	return info, err
}
