package main

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"tidemark/broker"
	"tidemark/internal/auth"
	"tidemark/internal/natsd"
	"tidemark/schema"
)

// natsUser is the user of the embedded NATS server.
const natsUser = "tidemark"

// What a data directory holds beside the server's own files.
func secretFile(dir string) string   { return filepath.Join(dir, "secret") }
func passwordFile(dir string) string { return filepath.Join(dir, "nats-password") }

// nodeFlags are of the commands that embed a NATS server.
type nodeFlags struct {
	NatsListen string `default:"127.0.0.1:4222" help:"Address of the embedded NATS server for other processes; port 0 for a free one, or off."`
	Durability string `default:"fsync" enum:"fsync,os,memory" help:"What an acknowledgement of the embedded server promises: fsync survives a power cut, os a killed process, memory nothing."`
	MaxStoreMB int    `name:"max-store-mb" default:"0" help:"Most that the embedded server may store, in MiB; 0 for three quarters of what is free."`
}

// node is the embedded server with its data directory.
type node struct {
	dir    string
	server *natsd.Server
	secret []byte
	nats   broker.Server
}

// startNode starts the embedded server. Secret and password are made at the first start and stay, so that edges and tokens outlive a restart. The lock is released when the server stops, or when
// the start fails.
func (p *process) startNode(lock *natsd.DirLock, f *nodeFlags) (*node, error) {
	dir := lock.Dir()
	secret, err := auth.LoadOrCreateSecret(secretFile(dir))
	if err != nil {
		return nil, errors.Join(err, lock.Release())
	}
	password, err := loadOrCreatePassword(passwordFile(dir))
	if err != nil {
		return nil, errors.Join(err, lock.Release())
	}
	s, err := natsd.Start(natsd.Config{
		Lock: lock, Listen: f.NatsListen, User: natsUser, Password: password, Durability: schema.ParseDurability(f.Durability),
		MaxStore: int64(f.MaxStoreMB) << 20, Logger: p.env.log,
	})
	if err != nil {
		return nil, err
	}
	p.onStop("NATS server", 30*time.Second, s.Shutdown)
	return &node{dir: dir, server: s, secret: secret, nats: broker.Server{InProcess: s, User: natsUser, Password: password, Name: "tidemark"}}, nil
}

// loadOrCreatePassword is called under the directory's lock.
func loadOrCreatePassword(path string) (string, error) {
	b, err := os.ReadFile(path)
	if err == nil && len(strings.TrimSpace(string(b))) > 0 {
		return strings.TrimSpace(string(b)), nil
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return "", fmt.Errorf("the password of the NATS server cannot be read: %w", err)
	}
	password := newPassword()
	if err := os.WriteFile(path, []byte(password+"\n"), 0o600); err != nil {
		return "", fmt.Errorf("the password of the NATS server cannot be written: %w", err)
	}
	return password, nil
}

func newPassword() string {
	var random [16]byte
	rand.Read(random[:]) // never fails: crypto/rand ends the process instead
	return hex.EncodeToString(random[:])
}

// announce says where the process listens: in the data directory for the other commands of this machine, then on standard output for scripts.
func (p *process) announce(dir string, a addresses) error {
	if err := a.publish(dir); err != nil {
		return fmt.Errorf("the addresses cannot be written to the data directory: %w", err)
	}
	p.onStop("address file", time.Second, func(context.Context) error { return os.Remove(addressFile(dir)) })
	fmt.Fprintln(p.env.stdout, a.line())
	return nil
}

// layoutFlags say how a deployment is laid out when it is created, and what it keeps.
type layoutFlags struct {
	Streams  int           `default:"4" help:"Log streams, 1 to 32: fixed when the deployment is created."`
	Replicas int           `default:"1" enum:"1,3,5" help:"Replicas of every stream: 1,3,5."`
	MaxAge   time.Duration `default:"720h" help:"How long envelopes are kept."`
	MaxMB    int           `name:"max-mb" default:"0" help:"Most that each log stream keeps, in MiB; 0 for no bound. The oldest envelopes go first."`
}

func (f *layoutFlags) layout(d schema.Durability) broker.Layout {
	return broker.Layout{Streams: f.Streams, Replicas: f.Replicas, MaxAge: f.MaxAge, MaxBytes: int64(f.MaxMB) << 20, Durability: d}
}

// runFlags say when runs end that nobody else ends.
type runFlags struct {
	OrphanAfter time.Duration `default:"60s" help:"How long a run may be without its agent before it is failed as orphaned, where its start_run does not say: 1s or more."`
}

func (f *runFlags) checkRuns() error {
	if f.OrphanAfter < time.Second {
		return errors.New("--orphan-after must be at least 1s")
	}
	return nil
}

// startBroker runs the projections until the process ends.
func (p *process) startBroker(c broker.BrokerConfig) (*broker.Broker, error) {
	b, err := broker.NewBroker(c)
	if err != nil {
		return nil, err
	}
	running, stop := context.WithCancel(context.WithoutCancel(p.ctx))
	over := make(chan struct{})
	p.run("broker", func() error {
		defer close(over)
		return b.Run(running)
	})
	p.onStop("broker", closeWithin, func(ctx context.Context) error {
		stop()
		select {
		case <-over:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	})
	return b, nil
}

// settle waits until what was started is ready, for a while: what follows the ready line should find it so, and a server that reads back much may take long.
func (p *process) settle(ready func() error) {
	patience := time.NewTimer(30 * time.Second)
	defer patience.Stop()
	look := time.NewTicker(5 * time.Millisecond)
	defer look.Stop()
	for ready() != nil {
		select {
		case <-look.C:
		case <-patience.C:
			p.env.log.Warn("not ready yet", "why", ready())
			return
		case <-p.ctx.Done():
			return
		}
	}
}

// brokerCommand is `tidemark broker`.
type brokerCommand struct {
	Embedded bool `help:"Run the NATS server in this process, with its data in --data-dir."`
	nodeFlags
	natsFlags
	layoutFlags
	runFlags
	HTTP     string `name:"http" default:"127.0.0.1:8083" help:"Address for /healthz, /readyz and /metrics, or off."`
	Name     string `name:"broker-name" placeholder:"NAME" help:"Name of this broker, unique among those that are alive. Default: a new one at each start."`
	MemoryMB int    `name:"memory-mb" default:"64" help:"Most that the projectors hold in memory, in MiB."`
}

// Validate is called by kong.
func (c *brokerCommand) Validate() error {
	if c.Embedded && c.Nats != "" {
		return errors.New("--embedded runs the NATS server in this process; --nats names another one")
	}
	if c.Embedded && c.Replicas != 1 {
		return errors.New("--embedded is one server, so it can keep 1 replica; for more run a NATS cluster and name it with --nats")
	}
	if c.MemoryMB < 1 {
		return errors.New("--memory-mb must be at least 1")
	}
	return c.checkRuns()
}

// Run serves until the process is told to stop.
func (c *brokerCommand) Run(ctx context.Context, env *environment) error {
	if err := errors.Join(checkUnlessOff("http", c.HTTP), checkUnlessOff("nats-listen", c.NatsListen)); err != nil {
		return err
	}
	return serve(ctx, env, func(p *process) error {
		var lock *natsd.DirLock
		var err error
		if c.Embedded {
			if lock, err = natsd.LockDir(c.DataDir); err != nil {
				return err
			}
		}
		status, err := p.listen("http", c.HTTP)
		if err != nil {
			return releaseAfter(err, lock)
		}
		metrics := newRegistry()
		cfg := broker.BrokerConfig{Name: c.Name, Memory: c.MemoryMB << 20, OrphanAfter: c.OrphanAfter, Logger: env.log, Metrics: metrics}
		at := addresses{HTTP: addressOf(status), GRPC: off, NATS: off}
		if c.Embedded {
			n, err := p.startNode(lock, &c.nodeFlags)
			if err != nil {
				return err
			}
			at.NATS = n.server.Addr()
			cfg.Server, cfg.Layout = n.nats, c.layout(schema.ParseDurability(c.Durability))
			cfg.Name = embeddedName(c.Name)
			env.log.Info("embedded NATS server started", "data_dir", n.dir, "durability", c.Durability, "listen", at.NATS)
		} else {
			cfg.Server, cfg.Layout = c.server(env, "broker"), c.layout(schema.Durability_DURABILITY_UNSPECIFIED)
		}
		b, err := p.startBroker(cfg)
		if err != nil {
			return err
		}
		p.serveStatus(status, b.Ready, metrics)
		if c.Embedded {
			p.settle(b.Ready)
			return p.announce(lock.Dir(), at)
		}
		fmt.Fprintln(env.stdout, at.line())
		return nil
	})
}

// embeddedName is the name of the broker beside an embedded server. It stays the same over restarts, so that what the last one held is taken over at once; the data directory's lock keeps two from
// having it.
func embeddedName(name string) string {
	if name == "" {
		return "embedded"
	}
	return name
}

// releaseAfter gives up a data directory because of err.
func releaseAfter(err error, lock *natsd.DirLock) error {
	if lock == nil {
		return err
	}
	return errors.Join(err, lock.Release())
}

// rebuildCommand is `tidemark rebuild`.
type rebuildCommand struct {
	Session string `arg:"" optional:"" help:"The session to rebuild; all of the deployment where none is named."`
	Tenant  string `default:"default" help:"The session's tenant."`
	natsFlags
	MemoryMB int `name:"memory-mb" default:"64" help:"Most that is held in memory, in MiB."`
}

// Run rebuilds and says what it did.
func (c *rebuildCommand) Run(ctx context.Context, env *environment) error {
	cfg := broker.RebuildConfig{Server: c.server(env, "rebuild"), Memory: max(c.MemoryMB, 1) << 20, Logger: env.log}
	if c.Session != "" {
		id, err := schema.ParseSessionID(c.Tenant, c.Session)
		if err != nil {
			return usageError{err}
		}
		cfg.Session = &id
	}
	began := time.Now()
	done, err := broker.Rebuild(ctx, cfg)
	if err != nil {
		return err
	}
	fmt.Fprintf(env.stdout, "read %d frames in %s; stored %d pages and %d records that were missing or different\n",
		done.Frames, time.Since(began).Round(time.Millisecond), done.Pages, done.Records)
	return nil
}
