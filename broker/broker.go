package broker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/oklog/ulid/v2"
	"github.com/prometheus/client_golang/prometheus"

	"tidemark/schema"
)

// BrokerConfig of a [Broker].
type BrokerConfig struct {
	Server Server
	Layout Layout
	// Name of this process. A broker that comes back under the name of the one that holds a stream's lease takes it at once instead of waiting for it to run out, so a name that stays the
	// same over restarts must not be used twice at once. Default: a new ULID.
	Name string
	// Memory bounds the sessions that the projectors hold, in bytes. Default 64 MiB.
	Memory int
	// OrphanAfter is how long a run may be without its agent before it is failed, where its start_run does not say. Default 60 s: longer than a deployment of agents takes, shorter than people wait.
	OrphanAfter time.Duration
	Logger      *slog.Logger
	// Metrics registers the metrics of projectors and watchdog; none where nil.
	Metrics prometheus.Registerer
}

func (c *BrokerConfig) setDefaults() {
	if c.Name == "" {
		c.Name = ulid.Make().String()
	}
	// A holder is a name and more behind a slash.
	c.Name = schema.EscapeToken(c.Name)
	if c.Memory == 0 {
		c.Memory = 64 << 20
	}
	if c.OrphanAfter == 0 {
		c.OrphanAfter = time.Minute
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
}

// Broker is the process with the projections: it lays the deployment out, keeps what is derived from the log, and sees to it that runs end. Several may run at once; for each log stream one of them does the work and the others
// stand by.
type Broker struct {
	// Static after construction.
	cfg     BrokerConfig
	metrics *projectionMetrics
	watched *watchdogMetrics

	// working is the connection, once the deployment is laid out.
	working atomic.Pointer[connection]
}

// NewBroker makes a broker. The error is one in its configuration.
func NewBroker(cfg BrokerConfig) (*Broker, error) {
	cfg.setDefaults()
	if err := cfg.Layout.setDefaults(); err != nil {
		return nil, err
	}
	if cfg.OrphanAfter < schema.MinOrphanAfterMs*time.Millisecond {
		return nil, fmt.Errorf("broker: a run cannot be failed after %s without its agent; the least is a second", cfg.OrphanAfter)
	}
	return &Broker{cfg: cfg, metrics: newProjectionMetrics(cfg.Metrics), watched: newWatchdogMetrics(cfg.Metrics)}, nil
}

// Run waits for the server, lays the deployment out, and projects until ctx ends. Then it stores what it has, within seconds, and returns nil. The error is one that waiting does not mend: a deployment
// that is laid out otherwise. Call it once.
func (b *Broker) Run(ctx context.Context) error {
	nc, err := b.cfg.Server.connect(b.cfg.Logger, "projector")
	if err != nil {
		return err
	}
	defer nc.Close()
	js, err := jetstream.New(nc.Conn)
	if err != nil {
		return err
	}
	kv, err := b.prepare(ctx, nc, js)
	if err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	b.working.Store(nc)
	r := newReader(nc, b.cfg.Layout.Streams)
	var wg sync.WaitGroup
	wg.Go(func() { b.keepPresence(ctx, nc, js) })
	dog := newWatchdog(r, js, &notary{nc: nc, r: r, name: b.cfg.Name + "-watchdog"}, b.cfg.OrphanAfter, b.watched, b.cfg.Logger)
	wg.Go(func() { dog.run(ctx) })
	wg.Go(func() { dog.followLeases(ctx) })
	for i := range b.cfg.Layout.Streams {
		p := &projector{
			stream: logStreamName(i), nc: nc, js: js, r: r, dog: dog, budget: b.cfg.Memory / b.cfg.Layout.Streams, maxAge: b.cfg.Layout.MaxAge, logger: b.cfg.Logger, metrics: b.metrics,
			lease: newLease(kv, logStreamName(i), b.cfg.Name, b.cfg.Logger),
		}
		wg.Go(func() { p.run(ctx) })
	}
	wg.Wait()
	return nil
}

// Ready is nil while the deployment is laid out and its server reachable, otherwise a refusal that says what is missing: for readiness checks.
func (b *Broker) Ready() error {
	switch nc := b.working.Load(); {
	case nc == nil:
		return schema.Refuse(schema.Code_CODE_UNAVAILABLE, "The deployment is not laid out yet.")
	case !nc.IsConnected():
		return schema.Refuse(schema.Code_CODE_UNAVAILABLE, "NATS is not reachable.")
	}
	return nil
}

// prepare lays the deployment out, waiting for the server as long as it takes.
func (b *Broker) prepare(ctx context.Context, nc *connection, js jetstream.JetStream) (jetstream.KeyValue, error) {
	var retry backoff
	for said := false; ; said = true {
		var kv jetstream.KeyValue
		err := nc.ask(ctx, func(asking context.Context) (err error) {
			kv, err = b.layOut(asking, js)
			return err
		})
		if err == nil {
			return kv, nil
		}
		if nc.IsConnected() && !passing(err) {
			return nil, err
		}
		if !said {
			b.cfg.Logger.Warn("waiting for NATS", "error", err)
		}
		if !retry.wait(ctx, errNotStored) {
			return nil, context.Cause(ctx)
		}
	}
}

// passing reports whether an answer of NATS, or the lack of one, may be another in a moment.
func passing(err error) bool {
	if api, ok := errors.AsType[*jetstream.APIError](err); ok {
		return api.Code == 503
	}
	for _, e := range []error{
		context.DeadlineExceeded, nats.ErrTimeout, nats.ErrNoResponders, nats.ErrDisconnected, nats.ErrConnectionReconnecting, nats.ErrReconnectBufExceeded,
		jetstream.ErrNoStreamResponse, errLost,
	} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// layOut creates what is missing, and may be called again after any error. ctx is without a deadline, so that the client library gives each request its own 5 s: how long they take together depends on the disk, but an answer
// that got lost on the way should be missed soon.
func (b *Broker) layOut(ctx context.Context, js jetstream.JetStream) (jetstream.KeyValue, error) {
	if err := b.cfg.Layout.fits(ctx, js); err != nil {
		return nil, err
	}
	kv, err := js.CreateOrUpdateKeyValue(ctx, jetstream.KeyValueConfig{
		Bucket: projectionBucket, History: 1, Replicas: b.cfg.Layout.Replicas, Storage: b.cfg.Layout.storage(), Description: "Tidemark's projectors: leases and checkpoints",
	})
	if err != nil {
		return nil, err
	}
	if _, err := kv.Create(ctx, listingKey, newListingSecret()); err != nil && !errors.Is(err, jetstream.ErrKeyExists) {
		return nil, err
	}
	// Last, because edges begin when they see the log's first stream.
	return kv, provision(ctx, js, b.cfg.Layout)
}
