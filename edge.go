package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"tidemark/broker"
	edgegrpc "tidemark/edge-grpc"
	edgews "tidemark/edge-ws"
	"tidemark/internal/auth"
	"tidemark/internal/gateway"
)

// How long the steps of an orderly end may take. An edge that drains gives its clients a second to go, then waits for appends in flight.
const (
	drainWithin = 30 * time.Second
	closeWithin = 15 * time.Second
)

// natsFlags say which NATS server to use.
type natsFlags struct {
	Nats    serverURL `name:"nats" placeholder:"URL" help:"NATS server or servers, nats://USER:PASSWORD@HOST:PORT, comma-separated. Default: the node of --data-dir, or nats://127.0.0.1:4222."`
	Creds   string    `placeholder:"FILE" help:"Credentials file of a NATS user."`
	DataDir string    `default:"${data_dir}" help:"Data directory of this machine's node: its NATS password, its secret for tokens and its addresses are found there."`
}

// server is the NATS server that the flags name.
func (f *natsFlags) server(env *environment, name string) broker.Server {
	s := broker.Server{URL: string(f.Nats), Creds: f.Creds, Name: name}
	if s.URL == "" {
		s.URL = "nats://127.0.0.1:4222"
		if a := readAddresses(f.DataDir); a.NATS != "" && a.NATS != off {
			s.URL = "nats://" + a.NATS
		}
	}
	// The password of this machine's node is for this machine's node.
	if s.Creds == "" && !strings.Contains(s.URL, "@") && loopback(s.URL) {
		if password, err := os.ReadFile(passwordFile(f.DataDir)); err == nil {
			s.User, s.Password = natsUser, strings.TrimSpace(string(password))
		} else if !errors.Is(err, os.ErrNotExist) {
			env.log.Warn("the password of this machine's NATS server cannot be read", "error", err)
		}
	}
	return s
}

// loopback says whether all servers of the list are on this machine.
func loopback(urls string) bool {
	for u := range strings.SplitSeq(urls, ",") {
		_, host, ok := strings.Cut(strings.TrimSpace(u), "://")
		if !ok {
			host = strings.TrimSpace(u)
		}
		if h, _, err := net.SplitHostPort(host); err == nil {
			host = h
		}
		if ip := net.ParseIP(strings.Trim(host, "[]")); host != "localhost" && (ip == nil || !ip.IsLoopback()) {
			return false
		}
	}
	return true
}

// secretFlags say which secret tokens are signed with.
type secretFlags struct {
	Secret     secretText `placeholder:"TEXT" help:"Secret for tokens (HS256), at least 32 bytes. Set it in the environment or in the file; on the command line others can see it."`
	SecretFile string     `placeholder:"FILE" help:"File with the secret for tokens. Default: the one of --data-dir; none beside --jwks."`
}

func (f *secretFlags) secret(dataDir string) ([]byte, error) {
	switch {
	case f.Secret != "":
		if len(f.Secret) < auth.MinSecretBytes {
			return nil, usage("the secret for tokens has %d bytes; HS256 needs at least %d", len(f.Secret), auth.MinSecretBytes)
		}
		return []byte(f.Secret), nil
	case f.SecretFile != "":
		return auth.ReadSecret(f.SecretFile)
	}
	secret, err := auth.ReadSecret(secretFile(dataDir))
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("there is no secret for tokens: set TIDEMARK_SECRET, or name a --secret-file, or the --data-dir of a node that `tidemark dev` or `tidemark broker --embedded` has started (looked in %s)", dataDir)
	}
	return secret, err
}

// jwksFlags say whose tokens are believed beside those signed with the secret.
type jwksFlags struct {
	JWKS     auth.Source `name:"jwks" placeholder:"FILE|URL" help:"JWKS with the public keys of tokens signed with RS256, ES256 or EdDSA; read again when it changes."`
	Issuer   string      `placeholder:"TEXT" help:"What 'iss' must be in tokens signed with a key of the JWKS. Default: anything."`
	Audience string      `placeholder:"TEXT" help:"What 'aud' must hold in tokens signed with a key of the JWKS. Default: anything."`
}

// check refuses as wrong usage what says nothing. It is not named Validate: kong would then find two of that name in dev, and call neither.
func (f *jwksFlags) check() error {
	if f.JWKS == "" && (f.Issuer != "" || f.Audience != "") {
		return usage("--issuer and --audience are of tokens signed with keys of a JWKS; name it with --jwks")
	}
	if err := f.JWKS.Check(); err != nil {
		return usage("--jwks cannot be used: %w", err)
	}
	return nil
}

// beside says which tokens to believe: those that the flags name, and those signed with the secret, unless that is empty.
func (f *jwksFlags) beside(secret []byte) auth.Config {
	return auth.Config{Secret: secret, JWKS: f.JWKS, Issuer: f.Issuer, Audience: f.Audience}
}

// tokenFlags are those of a process that is an edge alone.
type tokenFlags struct {
	secretFlags
	jwksFlags
}

// believed says which tokens to believe. With a JWKS a secret counts only where it is named: one that lies in the data directory is that of a node which somebody once tried out here.
func (f *tokenFlags) believed(dataDir string) (auth.Config, error) {
	if err := f.check(); err != nil {
		return auth.Config{}, err
	}
	if f.JWKS != "" && f.Secret == "" && f.SecretFile == "" {
		return f.beside(nil), nil
	}
	secret, err := f.secret(dataDir)
	return f.beside(secret), err
}

// edgeFlags bound what an edge holds, and say whom it serves.
type edgeFlags struct {
	Edge      string        `name:"edge-name" placeholder:"NAME" help:"Name of this edge, unique among those that are alive. Default: a new one at each start."`
	HoldFor   time.Duration `default:"10s" help:"How long publishes are held while NATS is away, before they are refused as retryable."`
	QueueMB   int           `name:"queue-mb" default:"64" help:"Most that publishes wait with, in MiB."`
	TailMB    int           `name:"tail-mb" default:"128" help:"Most that the tails of the log may hold in memory, in MiB."`
	Warm      time.Duration `default:"2m" help:"How far back the tails begin when the process starts."`
	DrainFor  time.Duration `default:"1s" help:"How long a stopping edge goes on serving after it told its clients to go."`
	Origins   []string      `placeholder:"ORIGIN" help:"Web pages that browsers may connect from, as https://app.example.com; '*' for all. Default: only those under the edge's own host."`
	MaxSocket int           `name:"max-connections" default:"50000" help:"Most connections at once."`
	limitFlags
}

// limitFlags bound what one client may do.
type limitFlags struct {
	UserRate        float64 `default:"10" help:"Envelopes a second that a user may publish on a connection; 0 for no bound."`
	UserBurst       int     `default:"20" help:"Envelopes that a user may publish at once after a pause."`
	AgentRate       float64 `default:"5000" help:"Envelopes a second that an agent, worker or admin may publish on a connection; 0 for no bound."`
	AgentBurst      int     `default:"10000" help:"Envelopes that an agent, worker or admin may publish at once after a pause."`
	UserConnections int     `default:"5" help:"Most connections of one user that follow one session, over all edges; 0 for no bound."`
	MaxSessions     int     `default:"1000" help:"Most sessions that one connection follows."`
	MaxInFlightMB   int     `name:"max-in-flight-mb" default:"4" help:"Most that one connection publishes without an answer before it is read no further, in MiB."`
}

// limits are the gateway's.
func (f *limitFlags) limits() gateway.Limits {
	return gateway.Limits{
		User:            gateway.Rate{PerSecond: f.UserRate, Burst: f.UserBurst},
		Agent:           gateway.Rate{PerSecond: f.AgentRate, Burst: f.AgentBurst},
		UserConnections: f.UserConnections,
		Sessions:        f.MaxSessions,
	}
}

// mostMB is the most memory that a flag can give, in MiB: more than machines have.
const mostMB = 1 << 20

// Validate is called by kong.
func (f *edgeFlags) Validate() error {
	if f.QueueMB < 1 || f.TailMB < 1 || f.MaxSocket < 1 {
		return errors.New("--queue-mb, --tail-mb and --max-connections must be at least 1")
	}
	if f.QueueMB > mostMB || f.TailMB > mostMB || f.MaxInFlightMB > gateway.LargestInFlightBytes>>20 {
		return fmt.Errorf("--queue-mb and --tail-mb can be at most %d, and --max-in-flight-mb at most %d", mostMB, gateway.LargestInFlightBytes>>20)
	}
	if max(f.MaxSocket, f.UserBurst, f.AgentBurst, f.UserConnections, f.MaxSessions) > gateway.Largest {
		return fmt.Errorf("--max-connections, --user-burst, --agent-burst, --user-connections and --max-sessions can be at most %d", gateway.Largest)
	}
	if f.UserRate < 0 || f.AgentRate < 0 || f.UserConnections < 0 {
		return errors.New("--user-rate, --agent-rate and --user-connections must be 0, for no bound, or more")
	}
	if f.UserBurst < 1 || f.AgentBurst < 1 || f.MaxSessions < 1 || f.MaxInFlightMB < 1 {
		return errors.New("--user-burst, --agent-burst, --max-sessions and --max-in-flight-mb must be at least 1")
	}
	return nil
}

// core is what all edges of a process share: one log, one gateway.
type core struct {
	log     *broker.JetStreamLog
	gateway *gateway.Gateway
	verify  func(ctx context.Context, token string) (*auth.Principal, error)
	metrics *prometheus.Registry
	// page and loopback are the WebSocket edge's; see [edgews.Config].
	page, loopback bool
}

// startCore opens the log and runs it until the process ends.
func (p *process) startCore(s broker.Server, f *edgeFlags, believed auth.Config, metrics *prometheus.Registry) (*core, error) {
	believed.Logger, believed.Metrics = p.env.log, metrics
	v, err := auth.NewVerifier(believed)
	if err != nil {
		return nil, err
	}
	c, err := p.startCoreFor(s, f, bearers{verify: v.Verify, ready: v.Ready}, metrics)
	if err != nil || believed.JWKS == "" {
		return c, err
	}
	running, stop := context.WithCancel(context.WithoutCancel(p.ctx))
	over := make(chan struct{})
	p.run("reader of keys for tokens", func() error {
		defer close(over)
		return v.Run(running)
	})
	p.onStop("reader of keys for tokens", closeWithin, func(ctx context.Context) error {
		stop()
		select {
		case <-over:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	})
	return c, nil
}

// bearers are whom a core serves: those whose tokens verify accepts.
type bearers struct {
	verify func(ctx context.Context, token string) (*auth.Principal, error)
	// ready is nil while it can judge them; nil itself where it always can.
	ready func() error
	// hello is how long a connection without a token has for its hello; 0 is the gateway's default.
	hello time.Duration
}

// startCoreFor is startCore for other bearers.
func (p *process) startCoreFor(s broker.Server, f *edgeFlags, who bearers, metrics *prometheus.Registry) (*core, error) {
	l, err := broker.Open(broker.Config{
		Server: s, Edge: f.Edge, HoldFor: f.HoldFor, QueueBytes: int64(f.QueueMB) << 20, TailBytes: f.TailMB << 20, WarmFor: f.Warm, Logger: p.env.log, Metrics: metrics,
	})
	if err != nil {
		return nil, err
	}
	running, stop := context.WithCancel(context.WithoutCancel(p.ctx))
	over := make(chan struct{})
	p.run("log", func() error {
		defer close(over)
		return l.Run(running)
	})
	p.onStop("log", closeWithin, func(ctx context.Context) error {
		stop()
		err := l.Close(ctx)
		<-over
		return err
	})
	grace := f.DrainFor
	if grace == 0 {
		grace = -1 // the gateway's word for none
	}
	g, err := gateway.New(gateway.Config{
		Log: l, Verify: who.verify, KeysReady: who.ready, HelloTimeout: who.hello, Version: version(), DrainGrace: grace, MaxConnections: f.MaxSocket,
		MaxInFlightBytes: f.MaxInFlightMB << 20, Limits: f.limits(), Logger: p.env.log, Metrics: metrics,
	})
	if err != nil {
		return nil, err
	}
	return &core{log: l, gateway: g, verify: who.verify, metrics: metrics}, nil
}

// startEdges serves both edges, or the one whose listener is not nil, and drains them together when the process ends.
func (p *process) startEdges(c *core, f *edgeFlags, overHTTP, overGRPC net.Listener) error {
	cutting, cut := context.WithCancel(context.WithoutCancel(p.ctx))
	var web *edgews.Edge
	var native *edgegrpc.Edge
	var err error
	if overHTTP != nil {
		web, err = edgews.New(edgews.Config{
			Gateway: c.gateway, Verify: c.verify, Origins: f.Origins, Loopback: c.loopback, Page: c.page, Metrics: c.metrics, Register: c.metrics, Logger: p.env.log,
		})
	}
	if overGRPC != nil && err == nil {
		native, err = edgegrpc.New(edgegrpc.Config{
			Gateway: c.gateway, Log: c.log, Tails: c.log, Verify: c.verify, AllowedOrigins: f.Origins, MaxConnections: f.MaxSocket, Logger: p.env.log, Metrics: c.metrics,
		})
	}
	if err != nil {
		cut()
		return err
	}
	var server *http.Server
	if web != nil {
		server = p.serveHTTP(cutting, "WebSocket edge", overHTTP, web.Handler())
	}
	// Draining the gRPC edge drains the gateway, which is both edges'.
	drain := c.gateway.Drain
	if native != nil {
		p.run("gRPC edge", func() error { return native.Serve(cutting, overGRPC) })
		drain = native.Drain
	}
	p.onStop("edges", drainWithin, func(ctx context.Context) error {
		defer cut()
		shut := make(chan error, 1)
		if server != nil {
			// It closes the listener at once and then waits for requests; the sockets are the edge's.
			go func() { shut <- server.Shutdown(ctx) }()
		} else {
			shut <- nil
		}
		err := errors.Join(drain(ctx, "The edge is being stopped."), <-shut)
		if web != nil {
			// What the drain has left is cut.
			web.Close()
		}
		return err
	})
	return nil
}

// edgeWSCommand is `tidemark edge-ws`.
type edgeWSCommand struct {
	HTTP string `name:"http" default:"127.0.0.1:8080" help:"Address for WebSocket and HTTP; port 0 for a free one."`
	Page bool   `help:"Serve the page to look at sessions with at /."`
	natsFlags
	tokenFlags
	edgeFlags
}

// Run serves until the process is told to stop.
func (c *edgeWSCommand) Run(ctx context.Context, env *environment) error {
	if err := checkAddress("http", c.HTTP); err != nil {
		return err
	}
	return serve(ctx, env, func(p *process) error {
		l, err := p.listen("http", c.HTTP)
		if err != nil {
			return err
		}
		core, err := c.start(p, &c.natsFlags, &c.tokenFlags, "edge-ws")
		if err != nil {
			return err
		}
		core.page = c.Page
		if err := p.startEdges(core, &c.edgeFlags, l, nil); err != nil {
			return err
		}
		fmt.Fprintln(env.stdout, addresses{HTTP: addressOf(l), GRPC: off, NATS: off}.line())
		return nil
	})
}

// edgeGRPCCommand is `tidemark edge-grpc`.
type edgeGRPCCommand struct {
	GRPC string `name:"grpc" default:"127.0.0.1:8081" help:"Address for gRPC, gRPC-Web and Connect; port 0 for a free one."`
	HTTP string `name:"http" default:"127.0.0.1:8082" help:"Address for /healthz, /readyz and /metrics, or off."`
	natsFlags
	tokenFlags
	edgeFlags
}

// Run serves until the process is told to stop.
func (c *edgeGRPCCommand) Run(ctx context.Context, env *environment) error {
	if err := errors.Join(checkAddress("grpc", c.GRPC), checkUnlessOff("http", c.HTTP)); err != nil {
		return err
	}
	return serve(ctx, env, func(p *process) error {
		l, err := p.listen("grpc", c.GRPC)
		if err != nil {
			return err
		}
		status, err := p.listen("http", c.HTTP)
		if err != nil {
			return err
		}
		core, err := c.start(p, &c.natsFlags, &c.tokenFlags, "edge-grpc")
		if err != nil {
			return err
		}
		p.serveStatus(status, core.gateway.Ready, core.metrics)
		if err := p.startEdges(core, &c.edgeFlags, nil, l); err != nil {
			return err
		}
		fmt.Fprintln(env.stdout, addresses{HTTP: addressOf(status), GRPC: addressOf(l), NATS: off}.line())
		return nil
	})
}

// start starts the core of a process that is an edge alone.
func (f *edgeFlags) start(p *process, n *natsFlags, t *tokenFlags, name string) (*core, error) {
	believed, err := t.believed(n.DataDir)
	if err != nil {
		return nil, err
	}
	return p.startCore(n.server(p.env, name), f, believed, newRegistry())
}
