package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"tidemark/internal/auth"
	"tidemark/internal/client"
	"tidemark/schema"
)

// connectFlags say through which edge a command speaks to a running system, and as whom.
type connectFlags struct {
	Edge []string `placeholder:"URL" help:"Edge to speak to: ${edge_url}; when one is gone the next is tried. Default: the node of --data-dir, or grpc://127.0.0.1:8081."`
	natsFlags
	Token  secretText `placeholder:"TEXT" help:"Token to show. Set it in the environment; on the command line others can see it. Default: one of our own, minted with the secret."`
	Tenant string     `default:"default" help:"Tenant of a token of our own."`
	secretFlags
}

// link is a client and what runs behind it.
type link struct {
	*client.Client
	close func() error
}

// connect makes a client for the edges that the flags name. Where a NATS server is named and no edge, an edge of this process's own serves it: the command then needs no other process but the server.
func (f *connectFlags) connect(ctx context.Context, env *environment) (*link, error) {
	if len(f.Edge) == 0 && f.Nats != "" {
		return f.connectDirectly(ctx, env)
	}
	cfg := client.Config{Edges: f.Edge, Token: string(f.Token), Name: "tidemark/" + version(), Logger: env.log}
	if len(cfg.Edges) == 0 {
		cfg.Edges = []string{"grpc://127.0.0.1:8081"}
		if a := readAddresses(f.DataDir); a.GRPC != "" && a.GRPC != off {
			cfg.Edges = []string{"grpc://" + a.GRPC}
		}
	}
	if cfg.Token == "" {
		secret, err := f.secret(f.DataDir)
		if err != nil {
			return nil, fmt.Errorf("there is no token to show: set TIDEMARK_TOKEN, or let one be minted; for that, %w", err)
		}
		if cfg.Token, err = f.mint(secret); err != nil {
			return nil, err
		}
	}
	c, err := client.New(cfg)
	if err != nil {
		return nil, usageError{err}
	}
	return &link{c, func() error { return nil }}, nil
}

// mint makes the token of a command: whoever has the secret may do everything anyhow.
func (f *connectFlags) mint(secret []byte) (string, error) {
	return auth.Mint(secret, auth.Principal{Subject: "tidemark-cli", Tenant: f.Tenant, Role: schema.Role_ROLE_ADMIN, Sessions: []string{"*"}}, devTokenTTL)
}

// connectDirectly runs a gRPC edge in this process, on a listener in memory.
func (f *connectFlags) connectDirectly(ctx context.Context, env *environment) (*link, error) {
	secret := []byte(newPassword() + newPassword())
	token, err := f.mint(secret)
	if err != nil {
		return nil, err
	}
	// The edge outlives the command's context, so that what is under way at a signal comes to its end.
	quiet := *env
	if !env.log.Enabled(ctx, slog.LevelDebug) {
		quiet.log = newLogger(env.stderr, "warn", "text") // how an edge comes and goes is not what the command was asked
	}
	p := &process{env: &quiet}
	p.ctx, p.fail = context.WithCancelCause(context.WithoutCancel(ctx))
	l := newPipeListener()
	flags := &edgeFlags{HoldFor: 10 * time.Second, QueueMB: 64, TailMB: 32, Warm: time.Second, MaxSocket: 16}
	core, err := p.startCore(f.server(env, "cli"), flags, auth.Config{Secret: secret}, newRegistry())
	if err == nil {
		err = p.startEdges(core, flags, nil, l)
	}
	if err == nil {
		err = waitForLog(ctx, core)
	}
	if err != nil {
		return nil, errors.Join(err, p.stop())
	}
	c, err := client.New(client.Config{Edges: []string{"grpc://in-process"}, Token: token, Name: "tidemark/" + version(), Dial: l.dial, Logger: env.log})
	if err != nil {
		return nil, errors.Join(err, p.stop())
	}
	return &link{c, p.stop}, nil
}

// waitForLog waits as long for the deployment as a client waits for an edge.
func waitForLog(ctx context.Context, c *core) error {
	ctx, cancel := context.WithTimeout(ctx, client.DefaultConnectFor)
	defer cancel()
	look := time.NewTicker(5 * time.Millisecond)
	defer look.Stop()
	for {
		err := c.gateway.Ready()
		if err == nil {
			return nil
		}
		select {
		case <-look.C:
		case <-ctx.Done():
			return err
		}
	}
}

// pipeListener is a listener in memory.
type pipeListener struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func newPipeListener() *pipeListener {
	return &pipeListener{conns: make(chan net.Conn), done: make(chan struct{})}
}

// Accept implements [net.Listener].
func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

// Close implements [net.Listener].
func (l *pipeListener) Close() error {
	l.once.Do(func() { close(l.done) })
	return nil
}

// Addr implements [net.Listener].
func (l *pipeListener) Addr() net.Addr { return &net.UnixAddr{Name: "in-process", Net: "pipe"} }

func (l *pipeListener) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	ours, theirs := net.Pipe()
	select {
	case l.conns <- theirs:
		return ours, nil
	case <-l.done:
		return nil, net.ErrClosed
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}
