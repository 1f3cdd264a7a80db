package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"tidemark/bench"
	"tidemark/internal/auth"
	"tidemark/schema"
)

// benchCommand is `tidemark bench`.
type benchCommand struct {
	Class    []string      `default:"os,fsync" enum:"fsync,os,memory" help:"Durability classes to measure, each on a node of its own: fsync, os, memory."`
	Sessions []int         `default:"50,200" help:"How many sessions to flood at once; several numbers, several loads."`
	Rounds   int           `default:"3" help:"How often each load is put on; medians are reported."`
	For      time.Duration `default:"3s" help:"How long a load is measured."`
	Warmup   time.Duration `default:"1s" help:"How long it is put on before."`
	Window   int           `default:"256" help:"Tokens of a session that are sent and not yet acknowledged, at full speed."`
	Size     int           `default:"110" help:"Bytes of a token's envelope."`
	Dir      string        `placeholder:"DIR" help:"Where the nodes store, each in a directory that is removed behind it. Its disk is what is measured. Default: the system's directory for temporary files."`
	URL      string        `name:"url" placeholder:"URL" help:"Load the WebSocket edge that runs there instead of nodes of our own. What is stored stays. Start it with --agent-rate 0; give --token, and --nats for the baseline."`
	Token    secretText    `placeholder:"TEXT" help:"Token for --url. Set it in the environment; on the command line others can see it."`
	Nats     serverURL     `name:"nats" placeholder:"URL" help:"NATS server of the edge of --url, with user and password, for the baseline."`
	JSON     bool          `name:"json" help:"Print the report in JSON."`
}

// Validate is called by kong.
func (c *benchCommand) Validate() error {
	if c.Rounds < 1 || c.Window < 1 || c.For <= 0 || c.Warmup < 0 {
		return errors.New("--rounds, --window and --for must be above 0, and --warmup not below")
	}
	for _, n := range c.Sessions {
		if n < 1 {
			return errors.New("--sessions must be above 0")
		}
	}
	if (c.URL == "") != (c.Token == "") {
		return errors.New("--url and --token belong together")
	}
	return nil
}

// Run measures and prints the report. It fails where anything was lost, repeated or wrong, not where a target was missed: that is for people to weigh.
func (c *benchCommand) Run(ctx context.Context, env *environment) error {
	cfg := bench.Config{
		Start: c.startNode(env), Sessions: c.Sessions, Rounds: c.Rounds, Warmup: c.Warmup, Measure: c.For, Window: c.Window, TokenBytes: c.Size, Version: version(),
		Progress: func(line string) { fmt.Fprintln(env.stderr, line) },
	}
	for _, class := range c.Class {
		cfg.Classes = append(cfg.Classes, schema.ParseDurability(class))
	}
	if c.URL != "" {
		edge, err := url.Parse(c.URL)
		if err != nil || edge.Host == "" || edge.Scheme != "http" && edge.Scheme != "https" {
			return usage("--url %s is not http://HOST:PORT", c.URL)
		}
		running := &bench.System{Edge: edge, Token: string(c.Token), NATS: string(c.Nats)}
		class, err := running.Durability(ctx)
		if err != nil {
			return err
		}
		cfg.Classes = []schema.Durability{class}
		cfg.Start = func(context.Context, schema.Durability) (*bench.System, error) { return running, nil }
	}
	report, err := bench.Run(ctx, cfg)
	if err != nil {
		return err
	}
	if c.JSON {
		out := json.NewEncoder(env.stdout)
		out.SetIndent("", "  ")
		err = out.Encode(report)
	} else {
		fmt.Fprintln(env.stderr)
		err = report.WriteText(env.stdout)
	}
	if err == nil && !report.Sound() {
		err = fmt.Errorf("the system broke its promises: %d tokens lost, %d repeated, %d wrong", report.Faults.Lost, report.Faults.Repeated, report.Faults.Wrong)
	}
	return err
}

// startNode starts nodes of our own: this program's dev, in a process and a data directory of its own.
func (c *benchCommand) startNode(env *environment) func(context.Context, schema.Durability) (*bench.System, error) {
	return func(ctx context.Context, class schema.Durability) (*bench.System, error) {
		self, err := os.Executable()
		if err != nil {
			return nil, err
		}
		dir, err := os.MkdirTemp(c.Dir, "tidemark-bench-")
		if err != nil {
			return nil, err
		}
		node, err := startChild(ctx, self, "dev", "--data-dir", dir, "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--nats-listen", "127.0.0.1:0",
			"--durability", schema.DurabilityWord(class), "--log-level", "warn", "--agent-rate", "0")
		if err != nil {
			return nil, errors.Join(err, os.RemoveAll(dir))
		}
		stop := func() error { return errors.Join(node.stop(), os.RemoveAll(dir)) }
		s, err := systemOf(dir, node.ready, stop)
		if err != nil {
			return nil, errors.Join(err, stop())
		}
		return s, nil
	}
}

// systemOf is a running node as the bench sees it.
func systemOf(dir string, at addresses, stop func() error) (*bench.System, error) {
	secret, err := auth.ReadSecret(secretFile(dir))
	if err != nil {
		return nil, err
	}
	token, err := auth.Mint(secret, auth.Principal{Subject: "bench", Role: schema.Role_ROLE_ADMIN, Sessions: []string{bench.SessionPrefix + "*"}}, 24*time.Hour)
	if err != nil {
		return nil, err
	}
	password, err := os.ReadFile(passwordFile(dir))
	if err != nil {
		return nil, err
	}
	return &bench.System{
		Edge: &url.URL{Scheme: "http", Host: at.HTTP}, Token: token, Stop: stop,
		NATS: (&url.URL{Scheme: "nats", Host: at.NATS, User: url.UserPassword(natsUser, strings.TrimSpace(string(password)))}).String(),
	}, nil
}

// child is this program in a process of its own, serving.
type child struct {
	// Static after start.
	cmd   *exec.Cmd
	ready addresses
	over  chan struct{} // closed when the process has ended
	pipes sync.WaitGroup

	// Owned by the goroutine that reads it, until over.
	said []string // the last lines of its log
}

const (
	// childReady is how long a child may take to its ready line, and childStop to its end.
	childReady = 30 * time.Second
	childStop  = 60 * time.Second
	// childLines is how much of a child's log is kept, to tell why it failed.
	childLines = 20
)

// startChild starts a serving command and waits for its ready line.
func startChild(ctx context.Context, self string, args ...string) (*child, error) {
	c := &child{cmd: exec.Command(self, args...), over: make(chan struct{})}
	out, err := c.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	logs, err := c.cmd.StderrPipe()
	if err != nil {
		return nil, err
	}
	if err := c.cmd.Start(); err != nil {
		return nil, err
	}
	ready := make(chan addresses, 1)
	c.pipes.Go(func() {
		for lines := bufio.NewScanner(logs); lines.Scan(); {
			if c.said = append(c.said, lines.Text()); len(c.said) > childLines {
				c.said = c.said[1:]
			}
		}
		_, _ = io.Copy(io.Discard, logs)
	})
	c.pipes.Go(func() {
		for lines := bufio.NewScanner(out); lines.Scan(); {
			var at addresses
			if _, err := fmt.Sscanf(lines.Text(), "ready http=%s grpc=%s nats=%s", &at.HTTP, &at.GRPC, &at.NATS); err == nil {
				ready <- at
				break
			}
		}
		_, _ = io.Copy(io.Discard, out)
	})
	go func() {
		defer close(c.over)
		c.pipes.Wait()
		_ = c.cmd.Wait() // ProcessState has it
	}()
	late := time.NewTimer(childReady)
	defer late.Stop()
	select {
	case c.ready = <-ready:
		return c, nil
	case <-c.over:
		return nil, fmt.Errorf("`%s %s` ended before it was ready:\n%s", filepath.Base(self), strings.Join(args, " "), strings.Join(c.said, "\n"))
	case <-late.C:
		err = fmt.Errorf("`%s %s` was not ready after %s", filepath.Base(self), strings.Join(args, " "), childReady)
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	_ = c.cmd.Process.Kill()
	<-c.over
	return nil, err
}

// stop ends the child in good order, and by force where that takes too long.
func (c *child) stop() error {
	if err := c.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		_ = c.cmd.Process.Kill()
	}
	late := time.NewTimer(childStop)
	defer late.Stop()
	select {
	case <-c.over:
	case <-late.C:
		_ = c.cmd.Process.Kill()
		<-c.over
	}
	if code := c.cmd.ProcessState.ExitCode(); code != exitDone {
		return fmt.Errorf("the node ended with status %d:\n%s", code, strings.Join(c.said, "\n"))
	}
	return nil
}
