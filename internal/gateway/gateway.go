package gateway

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"tidemark/broker"
	"tidemark/internal/auth"
	"tidemark/schema"
)

// Defaults of [Config].
const (
	// DefaultHelloTimeout is long enough for a phone on a bad link to send its first frame.
	DefaultHelloTimeout = 10 * time.Second
	// DefaultWriteTimeout is how long a peer may take nothing before it counts as stuck: a tunnel, or a laptop that sleeps, comes back sooner or has to connect anew anyhow.
	DefaultWriteTimeout = 30 * time.Second
	// DefaultCloseTimeout is how long a connection that ends waits for the appends in flight.
	DefaultCloseTimeout = 5 * time.Second
	// DefaultDrainGrace gives clients the time to attach elsewhere before their connections are closed.
	DefaultDrainGrace = time.Second
	// DefaultMaxConnections is below what a process may usually have open.
	DefaultMaxConnections = 50_000
	// DefaultMaxInFlight bounds the publishes of one connection that are not answered yet. One appender takes about 4,096 envelopes in one frame: this is a few frames' worth.
	DefaultMaxInFlight = 16 << 10
	// DefaultMaxInFlightBytes bounds their bytes.
	DefaultMaxInFlightBytes = 4 << 20
	// LargestInFlightBytes is the most that this can be set to.
	LargestInFlightBytes = 1 << 30
)

// Config says how a gateway serves.
type Config struct {
	// Log is where envelopes go and come from. Required.
	Log broker.Log
	// Work is where work comes from, and Runs is told which runs have an agent. Default: Log, where it is such; otherwise there is no work, and runs are not kept.
	Work broker.Queue
	Runs broker.RunKeeper
	// Verify says who the bearer of a token is, for hello and refresh. Required. The error is a [*schema.Refusal]. It may wait, while ctx lasts.
	Verify func(ctx context.Context, token string) (*auth.Principal, error)
	// KeysReady is nil while tokens can be verified, otherwise a refusal that says why not; [Gateway.Ready] asks it. Optional: without it, tokens always can.
	KeysReady func() error
	// Version of the server, for the welcome. Optional.
	Version string

	// HelloTimeout is how long a connection without a token may take to send hello. Default [DefaultHelloTimeout].
	HelloTimeout time.Duration
	// WriteTimeout is how long one write may take before the peer counts as dead (peer_dead). Default [DefaultWriteTimeout].
	WriteTimeout time.Duration
	// CloseTimeout is how long a connection that ends waits for its appends in flight to be answered. Default [DefaultCloseTimeout].
	CloseTimeout time.Duration
	// DrainGrace is how long a draining gateway goes on serving after going_away. Default [DefaultDrainGrace]; negative for none.
	DrainGrace time.Duration

	// MaxConnections at once, at most [Largest]. Default [DefaultMaxConnections].
	MaxConnections int
	// MaxInFlight and MaxInFlightBytes bound the publishes of one connection that are not answered yet; beyond that nothing more is read from it. At most
	// [Largest] and [LargestInFlightBytes]; defaults [DefaultMaxInFlight] and [DefaultMaxInFlightBytes].
	MaxInFlight      int
	MaxInFlightBytes int
	// Limits bound what one client may do. The zero value is none but [Limits].Sessions and those above.
	Limits Limits

	// Logger gets what happens to connections, never what they carry. Default: discarded.
	Logger *slog.Logger
	// Metrics is where the gateway's metrics are registered; nil for nowhere.
	Metrics prometheus.Registerer
}

func (c *Config) validate() error {
	if c.Log == nil || c.Verify == nil {
		return errors.New("gateway: Config needs Log and Verify")
	}
	if c.Work == nil {
		c.Work, _ = c.Log.(broker.Queue)
	}
	if c.Runs == nil {
		c.Runs, _ = c.Log.(broker.RunKeeper)
	}
	defaultTo(&c.HelloTimeout, DefaultHelloTimeout)
	defaultTo(&c.WriteTimeout, DefaultWriteTimeout)
	defaultTo(&c.CloseTimeout, DefaultCloseTimeout)
	defaultTo(&c.DrainGrace, DefaultDrainGrace)
	defaultTo(&c.MaxConnections, DefaultMaxConnections)
	defaultTo(&c.MaxInFlight, DefaultMaxInFlight)
	defaultTo(&c.MaxInFlightBytes, DefaultMaxInFlightBytes)
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	switch {
	case c.MaxConnections < 0 || c.MaxConnections > Largest:
		return errTooFar("MaxConnections", Largest)
	case c.MaxInFlight < 0 || c.MaxInFlight > Largest:
		return errTooFar("MaxInFlight", Largest)
	case c.MaxInFlightBytes < 0 || c.MaxInFlightBytes > LargestInFlightBytes:
		return errTooFar("MaxInFlightBytes", LargestInFlightBytes)
	}
	return c.Limits.validate()
}

func defaultTo[T comparable](v *T, d T) {
	var zero T
	if *v == zero {
		*v = d
	}
}

// Gateway serves connections. All methods may be called concurrently.
type Gateway struct {
	// Static after construction.
	cfg     Config
	metrics *metrics

	// callers are the rates of users, and of agents that call without a connection.
	callers buckets

	mu    sync.Mutex // guards all below
	conns map[*conn]struct{}
	// draining is why new connections are refused; nil while they are not.
	draining *schema.Refusal
	// empty is closed when the last connection has ended; nil while nobody waits for that.
	empty chan struct{}
}

// New checks the configuration and makes a gateway of it. It starts nothing.
func New(cfg Config) (*Gateway, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	m, err := newMetrics(cfg.Metrics)
	if err != nil {
		return nil, fmt.Errorf("gateway: metrics: %w", err)
	}
	return &Gateway{cfg: cfg, metrics: m, conns: make(map[*conn]struct{})}, nil
}

// Serve runs one connection until it is over, and returns when everything it started has ended and the transport is closed. Nil is a clean end: the peer closed in good order, or had no
// more to say. Otherwise the error says why it ended: a [*schema.Refusal], or the transport's.
//
// When ctx ends, the connection is cut with going_away.
func (g *Gateway) Serve(ctx context.Context, p Peer) error {
	began := time.Now()
	c := newConn(ctx, g, p)
	defer c.stop()
	if err := g.admit(c); err != nil {
		g.metrics.closes.WithLabelValues(schema.CodeOf(err).Word()).Inc()
		g.Refused(schema.CodeOf(err))
		r := schema.AsRefusal(err)
		p.Transport.Close(r.Code, r.Message)
		return err
	}
	protocol := p.Protocol.String()
	g.metrics.connections.WithLabelValues(protocol).Inc()
	end := c.run()
	g.metrics.connections.WithLabelValues(protocol).Dec()
	g.metrics.closes.WithLabelValues(end.word()).Inc()
	if end.refusal != nil {
		g.Refused(end.refusal.Code)
	}
	c.logged(end, began)
	g.forget(c)
	return end.err()
}

// admit takes the connection in, or says why not.
func (g *Gateway) admit(c *conn) error {
	switch p := c.peer; {
	case c.codec == nil:
		return schema.Refuse(schema.Code_CODE_UNSUPPORTED_PROTOCOL, "The connection's protocol is not one that the gateway speaks.")
	case p.Principal == nil && (p.Protocol == SessionJSON || p.Protocol == ProtoPublish || p.Follow != nil):
		return schema.Refuse(schema.Code_CODE_UNAUTHENTICATED, "This kind of connection needs its token from the beginning.")
	case p.Protocol == SessionJSON && (p.Follow == nil || p.Session == ""):
		return schema.Refuse(schema.Code_CODE_INTERNAL, "The session socket needs a session.")
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if err := g.admits(); err != nil {
		return err
	}
	g.conns[c] = struct{}{}
	return nil
}

// Admits is nil while the gateway takes connections, otherwise a refusal with going_away or limit_exceeded: for transports that can say so before the connection is made.
func (g *Gateway) Admits() error {
	g.mu.Lock()
	err := g.admits()
	g.mu.Unlock()
	if err != nil {
		g.Refused(schema.CodeOf(err))
	}
	return err
}

// admits is Admits, not counted. The caller holds mu.
func (g *Gateway) admits() error {
	if g.draining != nil {
		return g.draining
	}
	if len(g.conns) >= g.cfg.MaxConnections {
		return schema.Refuse(schema.Code_CODE_LIMIT_EXCEEDED, "This edge has %d connections, as many as it takes; come again later, or use another edge.", len(g.conns))
	}
	return nil
}

func (g *Gateway) forget(c *conn) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.conns, c)
	if len(g.conns) == 0 && g.empty != nil {
		close(g.empty)
		g.empty = nil
	}
}

// Ready is nil while the gateway takes connections, its log is ready and tokens can be verified, otherwise a refusal that says why not: for readiness checks.
func (g *Gateway) Ready() error {
	g.mu.Lock()
	err := g.admits()
	g.mu.Unlock()
	if err != nil {
		return err
	}
	if err := g.LogReady(); err != nil {
		return err
	}
	if g.cfg.KeysReady != nil {
		return g.cfg.KeysReady()
	}
	return nil
}

// LogReady is nil while the log is ready, otherwise a refusal that says why not.
func (g *Gateway) LogReady() error {
	if s := g.cfg.Log.Status(); !s.Ready {
		return schema.Refuse(schema.Code_CODE_UNAVAILABLE, "%s", s.Reason)
	}
	return nil
}
