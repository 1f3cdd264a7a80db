// Command tidemark is all of Tidemark in one binary: `tidemark dev` runs everything on this machine, the other commands are its parts and its tools.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"
	"unicode/utf8"

	"github.com/alecthomas/kong"
)

// Exit codes, which scripts rely on.
const (
	exitDone   = 0
	exitFailed = 1
	exitUsage  = 2
)

// commands is the command line: every command of the binary is registered here and nowhere else.
type commands struct {
	Config    string `placeholder:"FILE" help:"YAML file with settings: the names of flags without their dashes. Flags go before the environment, the environment before the file."`
	LogLevel  string `default:"info" enum:"debug,info,warn,error" help:"Least level to log: ${enum}."`
	LogFormat string `default:"text" enum:"text,json" help:"Form of the log on standard error: ${enum}."`

	Dev      devCommand      `cmd:"" help:"Run everything in this process, on loopback: an embedded NATS server, the broker and both edges."`
	Broker   brokerCommand   `cmd:"" help:"Run the broker against a NATS server, or with one embedded."`
	EdgeWS   edgeWSCommand   `cmd:"" name:"edge-ws" help:"Run a WebSocket and HTTP edge."`
	EdgeGRPC edgeGRPCCommand `cmd:"" name:"edge-grpc" help:"Run a gRPC edge."`
	Rebuild  rebuildCommand  `cmd:"" help:"Derive pages and registry from the log again, and store what is missing or different."`

	Publish  publishCommand  `cmd:"" help:"Publish lines or a recorded stream into a session."`
	Follow   followCommand   `cmd:"" help:"Show a session as it goes on, over lost connections and edges."`
	Tail     tailCommand     `cmd:"" set:"edge_url=grpc://HOST:PORT (grpcs:// with TLS)" help:"Print the envelopes of all sessions, as a member of a durable group that shares the load."`
	Sessions sessionsCommand `cmd:"" set:"edge_url=grpc://HOST:PORT (grpcs:// with TLS)" help:"List, show and remove sessions."`
	Work     workCommand     `cmd:"" help:"See what work sessions hold, take it, and look after what was given up."`
	Replay   replayCommand   `cmd:"" help:"Read a session's log: as a transcript, as JSON lines, or to verify it."`

	Demo demoCommand `cmd:"" help:"Play a recorded answer to two clients while connections are cut and an edge is killed, and count what arrived."`

	Bench   benchCommand   `cmd:"" help:"Measure throughput and latency from outside, beside raw JetStream."`
	Token   tokenCommand   `cmd:"" help:"Mint a token and print it."`
	Show    configCommand  `cmd:"" name:"config" passthrough:"" help:"Print the effective settings of a command and where each comes from: config [COMMAND] [FLAGS]."`
	Version versionCommand `cmd:"" help:"Print the version."`
}

// environment is what a command sees of the world around the process.
type environment struct {
	stdin          io.Reader
	stdout, stderr io.Writer
	// lookup finds an environment variable.
	lookup func(string) (string, bool)
	// program is how people call this program in lines to paste.
	program string
	// args is the command line.
	args []string
	log  *slog.Logger
	// logFormat is the log's form: text or json.
	logFormat string
}

// usageError is a wrong use of the command line, found after it was parsed.
type usageError struct{ error }

// Unwrap lets a refusal be told as everywhere.
func (u usageError) Unwrap() error { return u.error }

func usage(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// sameSignal is within what a second signal is the first: coreutils' timeout signals the process and then its group, and nobody presses a key so soon again.
const sameSignal = 100 * time.Millisecond

func main() {
	ctx, end := context.WithCancelCause(context.Background())
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	if !signal.Ignored(syscall.SIGHUP) {
		// The terminal was closed. Who started the process with nohup wants it to go on.
		signal.Notify(signals, syscall.SIGHUP)
	}
	go func() {
		// The first signal asks for an orderly end. Who sends a second does not want to wait for it.
		end(fmt.Errorf("%s signal received", <-signals))
		first := time.Now()
		again := <-signals
		for time.Since(first) < sameSignal {
			again = <-signals
		}
		fmt.Fprintf(os.Stderr, "tidemark: %s signal received again; ending at once\n", again)
		os.Exit(exitFailed)
	}()
	os.Exit(run(ctx, &environment{stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr, lookup: os.LookupEnv, program: programName()}, os.Args[1:]))
}

// run carries out one command line and returns the exit code.
func run(ctx context.Context, env *environment, args []string) int {
	env.args = args
	for _, a := range args {
		if !utf8.ValidString(a) {
			// Further on it would be made valid, and name another session than the one that was meant.
			return complain(env, fmt.Errorf("the argument %q is not UTF-8", a), exitUsage)
		}
	}
	exited := -1
	c := new(commands)
	parser, err := newParser(c, env, &exited)
	if err != nil {
		return complain(env, err, exitFailed)
	}
	sources, err := findSettings(parser.Model, env, args)
	if err != nil {
		return complain(env, err, exitUsage)
	}
	if err := kong.Resolvers(sources).Apply(parser); err != nil {
		return complain(env, err, exitFailed)
	}
	parsed, err := parser.Parse(args)
	if exited >= 0 {
		return exited // --help has been printed
	}
	if err != nil {
		return complain(env, fmt.Errorf("%w; see %s --help", err, env.program), exitUsage)
	}
	env.log, env.logFormat = newLogger(env.stderr, c.LogLevel, c.LogFormat), c.LogFormat
	parsed.BindTo(ctx, (*context.Context)(nil))
	err = parsed.Run(env)
	if _, wrong := errors.AsType[usageError](err); wrong {
		return complain(env, err, exitUsage)
	}
	if err != nil {
		return complain(env, err, exitFailed)
	}
	return exitDone
}

func newParser(c *commands, env *environment, exited *int) (*kong.Kong, error) {
	return kong.New(c,
		kong.Name("tidemark"),
		kong.Description("Durable, resumable sessions for AI agents, on NATS JetStream.\n\n"+
			"Every flag can be given in the environment too (--data-dir as TIDEMARK_DATA_DIR) and in the file of --config (data-dir: …)."),
		kong.ConfigureHelp(kong.HelpOptions{Compact: true, WrapUpperBound: 110}),
		kong.Writers(env.stdout, env.stderr),
		kong.Exit(func(code int) { *exited = code }),
		kong.Vars{"data_dir": defaultDataDir(env.lookup), "edge_url": "grpc://HOST:PORT (grpcs:// with TLS), or http://HOST:PORT for its WebSocket"},
	)
}

// complain tells what went wrong, in one sentence on standard error.
func complain(env *environment, err error, code int) int {
	fmt.Fprintf(env.stderr, "tidemark: %s\n", sentence(err))
	return code
}

func newLogger(w io.Writer, level, format string) *slog.Logger {
	var l slog.Level
	if err := l.UnmarshalText([]byte(level)); err != nil {
		l = slog.LevelInfo
	}
	opts := &slog.HandlerOptions{Level: l}
	if format == "json" {
		return slog.New(slog.NewJSONHandler(w, opts))
	}
	return slog.New(slog.NewTextHandler(w, opts))
}

// programName is what to type to start this program again: its own name, or `go run .` where the go command has built it into a directory of its own.
func programName() string {
	exe, err := os.Executable()
	if err != nil || strings.Contains(filepath.ToSlash(exe), "/go-build") {
		return "go run ."
	}
	return "tidemark"
}

// defaultDataDir is the same for all commands of a user, wherever they are started.
func defaultDataDir(lookup func(string) (string, bool)) string {
	if dir, ok := lookup("XDG_DATA_HOME"); ok && filepath.IsAbs(dir) {
		return filepath.Join(dir, "tidemark")
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return "tidemark-data"
	}
	return filepath.Join(home, ".local", "share", "tidemark")
}
