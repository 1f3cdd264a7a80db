package edgegrpc

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	// Registers the compression that clients of gRPC ask for most.
	_ "google.golang.org/grpc/encoding/gzip"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/reflection"

	"tidemark/broker"
	"tidemark/internal/auth"
	"tidemark/internal/gateway"
)

// Defaults of [Config], and the bounds that are not configurable.
const (
	// DefaultMaxConnections bounds the sockets; each costs some 70 KiB.
	DefaultMaxConnections = 10_000
	// DefaultMaxConcurrentStreams leaves room for a proxy that carries many clients over one connection.
	DefaultMaxConcurrentStreams = 1_000
	// DefaultKeepAlive is how long a connection may be silent before it is pinged.
	DefaultKeepAlive = 30 * time.Second
	// DefaultMaxTails bounds the members of analytics groups: each reads the whole log stream of its partitions, and may hold some 4 MiB that were not acknowledged and as much again of each partition that is not looked at yet.
	DefaultMaxTails = 32
	// keepAliveTimeout is how long the answer may take before the peer counts as dead.
	keepAliveTimeout = 15 * time.Second
	// keepAliveMin is how often a client may ping us; grpc-go's clients ping every 10 s at the most.
	keepAliveMin = 5 * time.Second

	// maxHeaderBytes bounds a request's metadata: a token of the largest size and as much again.
	maxHeaderBytes = 2 * auth.MaxTokenBytes
	// streamWindow and connectionWindow bound what a client may have on the way to us before it is read. They are fixed: grpc-go otherwise lets them grow to 16 MiB a connection.
	streamWindow     = 256 << 10
	connectionWindow = 1 << 20
	// leaveTimeout is how long calls that are under way may take once the gateway is drained.
	leaveTimeout = 5 * time.Second
)

// Config says how the edge serves.
type Config struct {
	// Gateway serves the streams. Required.
	Gateway *gateway.Gateway
	// Log answers the calls that are no streams. Required; the gateway's.
	Log broker.Log
	// Work and Runs are the gateway's. Default: Log, where it is such.
	Work broker.Queue
	Runs broker.RunKeeper
	// Tails answers the method Tail, which is refused as unsupported where there is none.
	Tails broker.Tails
	// Verify says who the bearer of a token is. Required; the gateway's. The error is a [*schema.Refusal].
	Verify func(ctx context.Context, token string) (*auth.Principal, error)

	// AllowedOrigins are the web pages that may call from a browser, as the browser names them (https://app.example.com); "*" is all. Default none: only pages that a proxy shows under the
	// edge's own origin.
	AllowedOrigins []string
	// MaxConnections at once; more wait to be accepted. Default [DefaultMaxConnections].
	MaxConnections int
	// MaxConcurrentStreams bounds the calls and streams of one connection at once. Default [DefaultMaxConcurrentStreams].
	MaxConcurrentStreams int
	// MaxTails bounds the streams of the method Tail at once. Default [DefaultMaxTails].
	MaxTails int
	// KeepAlive is how long an HTTP/2 connection may be silent before it is pinged; it is closed where no answer comes within 15 s. Default [DefaultKeepAlive].
	KeepAlive time.Duration

	// Logger gets what happens, never tokens or what envelopes carry. Default: discarded.
	Logger *slog.Logger
	// Metrics is where the edge's metrics are registered; nil for nowhere.
	Metrics prometheus.Registerer
}

func (c *Config) validate() error {
	if c.Gateway == nil || c.Log == nil || c.Verify == nil {
		return errors.New("edgegrpc: Config needs Gateway, Log and Verify")
	}
	if c.Work == nil {
		c.Work, _ = c.Log.(broker.Queue)
	}
	if c.Runs == nil {
		c.Runs, _ = c.Log.(broker.RunKeeper)
	}
	if c.MaxConnections <= 0 {
		c.MaxConnections = DefaultMaxConnections
	}
	if c.MaxConcurrentStreams <= 0 {
		c.MaxConcurrentStreams = DefaultMaxConcurrentStreams
	}
	if c.MaxTails <= 0 {
		c.MaxTails = DefaultMaxTails
	}
	if c.KeepAlive <= 0 {
		c.KeepAlive = DefaultKeepAlive
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return nil
}

// Edge is the gRPC edge. Its methods may be called concurrently.
type Edge struct {
	// Static after construction.
	cfg     Config
	metrics *metrics
	health  *health
	native  *grpc.Server
	web     *http.Server
	over    chan struct{} // closed when both servers have ended
	tails   chan struct{} // a token for each stream of the method Tail

	// streams are what runs for native streams; see [stream.serveNative].
	streams sync.WaitGroup
	// runs are those kept by calls.
	runs leases

	mu       sync.Mutex
	listener net.Listener // nil before Serve
	leaving  bool
	ended    sync.Once
}

// New checks the configuration and makes an edge of it. It starts nothing.
func New(cfg Config) (*Edge, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	m, err := newMetrics(cfg.Metrics)
	if err != nil {
		return nil, fmt.Errorf("edgegrpc: %w", err)
	}
	e := &Edge{cfg: cfg, metrics: m, over: make(chan struct{}), tails: make(chan struct{}, cfg.MaxTails)}
	e.health = &health{gateway: cfg.Gateway, leaving: make(chan struct{})}
	e.native = grpc.NewServer(
		grpc.ForceServerCodecV2(newNativeCodec()),
		// Above the largest frame, so that what is a little too large is refused by us, with our code and sentence.
		grpc.MaxRecvMsgSize(maxWebMessage),
		grpc.MaxConcurrentStreams(uint32(cfg.MaxConcurrentStreams)),
		grpc.MaxHeaderListSize(maxHeaderBytes),
		grpc.StaticStreamWindowSize(streamWindow),
		grpc.StaticConnWindowSize(connectionWindow),
		grpc.ConnectionTimeout(routeTimeout),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: cfg.KeepAlive, Timeout: keepAliveTimeout}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: keepAliveMin, PermitWithoutStream: true}),
		grpc.WaitForHandlers(true),
	)
	e.native.RegisterService(e.description(), nil)
	healthpb.RegisterHealthServer(e.native, e.health)
	reflection.Register(e.native)

	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	e.web = &http.Server{
		Handler:           e.webHandler(),
		Protocols:         protocols,
		ReadHeaderTimeout: routeTimeout,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    maxHeaderBytes,
		ErrorLog:          slog.NewLogLogger(cfg.Logger.Handler(), slog.LevelDebug),
		HTTP2: &http.HTTP2Config{
			MaxConcurrentStreams:          cfg.MaxConcurrentStreams,
			MaxReceiveBufferPerConnection: connectionWindow,
			MaxReceiveBufferPerStream:     streamWindow,
			SendPingTimeout:               cfg.KeepAlive,
			PingTimeout:                   keepAliveTimeout,
			WriteByteTimeout:              gateway.DefaultWriteTimeout,
		},
	}
	return e, nil
}

// Serve accepts connections from l until ctx ends, [Edge.Drain] was called or l fails, and returns when everything it started has ended. It may be called once, and closes l. Nil is a clean end.
//
// When ctx ends, all connections are cut.
func (e *Edge) Serve(ctx context.Context, l net.Listener) error {
	e.mu.Lock()
	used, leaving := e.listener != nil, e.leaving
	e.listener = l
	e.mu.Unlock()
	if used {
		return errors.New("edgegrpc: Serve was called before")
	}
	uncut := context.AfterFunc(ctx, e.cut)
	defer uncut()
	native, web := newHanded(l.Addr()), newHanded(l.Addr())
	var servers sync.WaitGroup
	if leaving {
		e.cut()
	}
	// They return an error only for what this function did itself.
	servers.Go(func() { _ = e.native.Serve(native) })
	servers.Go(func() { _ = e.web.Serve(web) })
	err := e.accept(ctx, l, native, web)
	if err != nil {
		e.cut()
	}
	<-e.over
	_ = native.Close()
	_ = web.Close()
	servers.Wait()
	e.streams.Wait()
	e.runs.end()
	return err
}

// accept hands each connection to its server until the listener is closed. It returns when no connection is on its way any more.
func (e *Edge) accept(ctx context.Context, l net.Listener, native, web *handed) error {
	var routing sync.WaitGroup
	defer routing.Wait()
	room := make(chan struct{}, e.cfg.MaxConnections)
	pause := time.Duration(0)
	for {
		select {
		case room <- struct{}{}:
		case <-e.health.leaving:
			return nil
		}
		c, err := l.Accept()
		if err != nil {
			select {
			case <-e.health.leaving:
				return nil
			default:
			}
			if !passing(err) {
				return fmt.Errorf("the gRPC listener on %s failed: %w", l.Addr(), err)
			}
			<-room
			pause = min(max(2*pause, 5*time.Millisecond), time.Second)
			e.cfg.Logger.Warn("no connection can be accepted now", "err", err, "pause", pause)
			select {
			case <-time.After(pause):
			case <-e.health.leaving:
			}
			continue
		}
		pause = 0
		done := make(chan struct{})
		counted := &counted{Conn: c, release: func() { <-room }}
		routing.Go(func() {
			defer close(done)
			e.routeTo(ctx, counted, native, web)
		})
		routing.Go(func() {
			// The wait for the client's first words ends with the edge.
			select {
			case <-e.health.leaving:
				_ = counted.Close()
			case <-done:
			}
		})
	}
}

// routeTo finds the server for one connection.
func (e *Edge) routeTo(ctx context.Context, c *counted, native, web *handed) {
	rc, isNative, err := route(c, e.cfg.MaxConcurrentStreams)
	if err != nil {
		_ = c.Close()
		e.cfg.Logger.LogAttrs(ctx, slog.LevelDebug, "connection ended before its first request", slog.String("remote", c.RemoteAddr().String()), slog.Any("err", err))
		return
	}
	if isNative {
		c.count(e.metrics.connections.WithLabelValues("native"))
		native.hand(rc)
	} else {
		c.count(e.metrics.connections.WithLabelValues("web"))
		web.hand(rc)
	}
}

// passing says whether a listener that failed so may accept again later: there are too many open files, or the client was quicker to go than we to accept.
func passing(err error) bool {
	return errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) || errors.Is(err, syscall.ENOBUFS) || errors.Is(err, syscall.ENOMEM) ||
		errors.Is(err, syscall.ECONNABORTED)
}

// counted is an open connection among those that are counted.
type counted struct {
	net.Conn
	release func()

	mu     sync.Mutex
	closed bool
	gauge  prometheus.Gauge // nil until its server is known
}

// count adds the connection to its server's.
func (c *counted) count(g prometheus.Gauge) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.closed {
		c.gauge = g
		g.Inc()
	}
}

// Close closes the connection and makes room for another.
func (c *counted) Close() error {
	c.mu.Lock()
	closed, gauge := c.closed, c.gauge
	c.closed = true
	c.mu.Unlock()
	if closed {
		return net.ErrClosed
	}
	if gauge != nil {
		gauge.Dec()
	}
	c.release()
	return c.Conn.Close()
}

// leave stops accepting, and tells those who watch the edge's health.
func (e *Edge) leave() {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.leaving {
		e.leaving = true
		close(e.health.leaving)
	}
	if e.listener != nil {
		// It fails where it was closed before.
		_ = e.listener.Close()
	}
}

// cut ends everything at once.
func (e *Edge) cut() {
	e.leave()
	_ = e.web.Close()
	e.native.Stop()
	e.ended.Do(func() { close(e.over) })
}

// Drain ends the edge without losing anything: it stops accepting, drains the gateway (its streams are told going_away, and appends in flight are answered), lets the calls that are under way
// finish, for five seconds at the most, and closes. When ctx ends, what is left is cut. The error is the gateway's. [Edge.Serve] returns after it.
func (e *Edge) Drain(ctx context.Context, reason string) error {
	began := time.Now()
	e.leave()
	err := e.cfg.Gateway.Drain(ctx, reason)
	e.cfg.Logger.InfoContext(ctx, "gRPC streams drained", "reason", reason, "took", time.Since(began), "err", err)

	ctx, cancel := context.WithTimeout(ctx, leaveTimeout)
	defer cancel()
	var servers sync.WaitGroup
	servers.Go(func() {
		if e.web.Shutdown(ctx) != nil {
			_ = e.web.Close()
		}
	})
	servers.Go(func() {
		stop := context.AfterFunc(ctx, e.native.Stop)
		e.native.GracefulStop()
		stop()
	})
	servers.Wait()
	e.ended.Do(func() { close(e.over) })
	e.cfg.Logger.InfoContext(ctx, "gRPC edge stopped", "took", time.Since(began))
	return err
}
