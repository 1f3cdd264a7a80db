package bench

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"tidemark/schema"
)

const (
	// rawPending is how many messages the baseline has under way, published and not acknowledged: the library's default, beyond which more does not help. Where each message is synced, a few keep the disk
	// busy, and more would only wait.
	rawPending       = 4000
	rawPendingSynced = 64
	// rawAhead bounds how far the baseline's publisher may be ahead of its consumer, in messages. It is a rate from end to end that is compared, and a publisher that floods takes the processor from
	// the consumer.
	rawAhead = 4 * rawPending
	// rawAge is the age limit of the baseline's stream, the default of the log's.
	rawAge = 30 * 24 * time.Hour
)

// runRaw is the baseline of a load: raw JetStream, one message for each token, published with PublishAsync on one connection and consumed by one ordered consumer on another. The stream is made for it,
// with the settings of a log stream, and removed behind it. name must be a NATS token.
func (l Load) runRaw(ctx context.Context, server, name string, class schema.Durability) (out *Outcome, err error) {
	if l.TokenBytes < stampLen {
		return nil, fmt.Errorf("bench: a message of %d bytes cannot carry what it is checked by; choose %d or more", l.TokenBytes, stampLen)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, l.within(), errStuck)
	defer cancel()
	// Where the publisher has failed, no token will come that the measurement could wait for.
	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	m := newMeter()
	in, err := nats.Connect(server, nats.Name("bench consumer"))
	if err != nil {
		return nil, fmt.Errorf("bench: NATS cannot be reached for the baseline: %w", err)
	}
	defer in.Close()
	streams, err := jetstream.New(in)
	if err != nil {
		return nil, err
	}
	settings := jetstream.StreamConfig{
		Name: strings.ToUpper(name), Subjects: []string{name + ".>"}, Storage: jetstream.FileStorage, Replicas: 1, MaxAge: rawAge, AllowDirect: true, Duplicates: 100 * time.Millisecond,
	}
	switch class {
	case schema.Durability_DURABILITY_MEMORY:
		settings.Storage = jetstream.MemoryStorage
	case schema.Durability_DURABILITY_REPLICATED:
		settings.Replicas = 3
	default:
		// What distinguishes os and fsync is a setting of the server.
	}
	stream, err := streams.CreateStream(ctx, settings)
	if err != nil {
		return nil, fmt.Errorf("bench: the baseline's stream cannot be made: %w", err)
	}
	defer func() {
		err = errors.Join(err, streams.DeleteStream(context.WithoutCancel(ctx), strings.ToUpper(name)))
	}()
	cons, err := stream.OrderedConsumer(ctx, jetstream.OrderedConsumerConfig{})
	if err != nil {
		return nil, err
	}
	c := &rawConsumer{m: m, ended: make(chan struct{})}
	consuming, err := cons.Consume(c.receive)
	if err != nil {
		return nil, err
	}
	defer consuming.Stop()

	p := &rawPublisher{m: m, c: c, fail: fail, buf: make([]byte, l.TokenBytes)}
	nc, err := nats.Connect(server, nats.Name("bench publisher"))
	if err != nil {
		return nil, fmt.Errorf("bench: NATS cannot be reached for the baseline: %w", err)
	}
	defer nc.Close()
	pending := rawPending
	if class == schema.Durability_DURABILITY_FSYNC {
		pending = rawPendingSynced
	}
	p.js, err = jetstream.New(nc, jetstream.WithPublishAsyncMaxPending(pending), jetstream.WithPublishAsyncErrHandler(p.refused))
	if err != nil {
		return nil, err
	}
	for i := range l.Sessions {
		p.subjects = append(p.subjects, fmt.Sprintf("%s.%04d", name, i))
	}
	for i := range p.buf {
		p.buf[i] = 'x'
	}
	published := make(chan error, 1)
	go func() {
		err := p.run(ctx, l.Rate)
		if err != nil {
			fail(err)
		}
		published <- err
	}()
	elapsed, err := m.phases(ctx, l)
	if perr := <-published; err == nil {
		err = perr
	}
	if err != nil {
		return nil, err
	}
	select {
	case <-c.ended:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	return m.outcome(elapsed), nil
}

// rawConsumer is the baseline's follower.
type rawConsumer struct {
	m        *meter
	checker  checker
	sent     [1]uint64
	consumed atomic.Uint64
	ended    chan struct{}
	over     bool
}

// receive is called by the library's goroutine, for one message after the other.
func (c *rawConsumer) receive(msg jetstream.Msg) {
	if c.over {
		return
	}
	number, at, ok := stamp(msg.Data())
	if !ok {
		c.checker.Wrong++
		return
	}
	// The stream has one order over all subjects, and so have the numbers.
	c.checker.see(number, number)
	c.consumed.Store(number)
	if at == lastToken {
		c.over = true
		c.m.over(number, c.checker.Faults)
		close(c.ended)
		return
	}
	c.sent[0] = at
	c.m.received(c.sent[:])
}

// rawPublisher publishes for all sessions in turn.
type rawPublisher struct {
	m        *meter
	js       jetstream.JetStream
	c        *rawConsumer
	subjects []string
	buf      []byte
	fail     context.CancelCauseFunc // ends the load
}

// refused is called by the library where an acknowledgement is an error, or does not come.
func (p *rawPublisher) refused(_ jetstream.JetStream, _ *nats.Msg, err error) {
	p.fail(fmt.Errorf("bench: the baseline's publish was refused: %w", err))
}

func (p *rawPublisher) publish(ctx context.Context, number, sent uint64) error {
	putStamp(p.buf, number, sent)
	// Were the library to publish again what nobody took, it would find a later message in the buffer.
	once := jetstream.WithRetryAttempts(0)
	for {
		_, err := p.js.PublishAsync(p.subjects[number%uint64(len(p.subjects))], p.buf, once)
		if !errors.Is(err, jetstream.ErrTooManyStalledMsgs) {
			return err
		}
		// It has waited for 200 ms. The load's own deadline bounds how often.
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
}

func (p *rawPublisher) run(ctx context.Context, rate int) error {
	var err error
	if rate > 0 {
		err = p.m.pace(ctx, rate, func(from, to uint64, last bool) error { return p.some(ctx, from, to, last) })
	} else {
		err = p.flood(ctx)
	}
	if err != nil {
		return err
	}
	select {
	case <-p.js.PublishAsyncComplete():
	case <-ctx.Done():
	}
	return context.Cause(ctx)
}

// some publishes a few.
func (p *rawPublisher) some(ctx context.Context, from, to uint64, last bool) error {
	at := p.m.clock()
	if last {
		at = lastToken
	}
	for n := from; n <= to; n++ {
		if err := p.publish(ctx, n, at); err != nil {
			return err
		}
	}
	return nil
}

func (p *rawPublisher) flood(ctx context.Context) error {
	const atOnce = 64
	n := uint64(0)
	for !p.m.stopped.Load() {
		for n > p.c.consumed.Load()+rawAhead {
			if err := pause(ctx, time.Millisecond); err != nil {
				return err
			}
		}
		if err := p.some(ctx, n+1, n+atOnce, false); err != nil {
			return err
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		n += atOnce
	}
	return p.some(ctx, n+1, n+1, true)
}
