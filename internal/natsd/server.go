package natsd

import (
	"context"
	"crypto/subtle"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats-server/v2/server/ats"
	"github.com/nats-io/nats.go"

	"tidemark/schema"
)

// Off is the Listen of a server that only this process can reach.
const Off = "off"

// DefaultMaxPayload is the largest message the server takes, in bytes. The largest that Tidemark sends is the frame of one client frame: schema.MaxFrameBytes of envelopes, each of up to
// schema.MaxPublishEnvelopes of them stamped with id, seq, time and source (at most some 300 bytes each), and the frame's own header: below 1.4 MiB. Pages that are larger go in
// parts. The server's default of 1 MiB is too small for the largest envelope, and more than 8 MiB it warns of.
const DefaultMaxPayload = 2 << 20

// Config says how to run the server.
type Config struct {
	// DataDir keeps everything; it is created where it is not there. Ignored where Lock is set.
	DataDir string
	// Lock is the data directory, where the caller took it before, as somebody does who wants to know early that it is free. Start and Shutdown take care of it.
	Lock *DirLock
	// Listen is the address for clients: host:port, port 0 for a free one, or [Off]. Default Off.
	Listen string
	// User and Password are what clients must say, in process too. Without a User no one need say anything, which is for tests.
	User, Password string
	// Durability is what the server's acknowledgements promise: fsync syncs each write before its acknowledgement, os leaves that to the operating system, memory is os for
	// a log whose streams are in memory. Default fsync.
	Durability schema.Durability
	// MaxPayload is the largest message, in bytes. Default [DefaultMaxPayload].
	MaxPayload int
	// MaxStore bounds what is stored, in bytes: on disk, or in memory for the class memory. Default: three quarters of what is free at start.
	MaxStore int64
	// StartTimeout bounds Start, which reads back what is stored. Default 2 minutes: a crash in the middle of millions of sessions costs seconds (NATS.md, section 5).
	StartTimeout time.Duration
	// Logger gets the server's log; its notices at level debug. Default: none.
	Logger *slog.Logger
}

// Server is a running nats-server with JetStream. Its methods may be called concurrently.
type Server struct {
	// Static after construction.
	lock *DirLock
	ns   *server.Server
	user *url.Userinfo
	log  *slog.Logger
	over chan struct{} // closed when the shutdown, once asked for, is done
	ask  chan struct{} // holds one token: who takes it does the shutdown
}

// Start starts the server and returns when it accepts connections. The error names what is in the way: the data directory with its holder, or the port. A Lock that was handed over is
// released where Start fails.
func Start(c Config) (*Server, error) {
	if c.Lock == nil {
		if c.DataDir == "" {
			return nil, errors.New("natsd: the data directory is not named")
		}
		lock, err := LockDir(c.DataDir)
		if err != nil {
			return nil, err
		}
		c.Lock = lock
	}
	s, err := start(c)
	if err != nil {
		return nil, errors.Join(err, c.Lock.Release())
	}
	return s, nil
}

func start(c Config) (*Server, error) {
	opts, err := options(c)
	if err != nil {
		return nil, err
	}
	if !opts.DontListen {
		if err := tryListen(c.Listen); err != nil {
			return nil, err
		}
	}
	ns, err := server.NewServer(opts)
	if err != nil {
		return nil, fmt.Errorf("natsd: the embedded NATS server refuses its settings: %w", err)
	}
	logger := c.Logger
	if logger == nil {
		logger = slog.New(slog.DiscardHandler)
	}
	log := &bridge{log: logger}
	debug := logger.Enabled(context.Background(), slog.LevelDebug) //nolint:forbidigo // the level is nobody's wait
	ns.SetLoggerV2(log, debug, false, false)
	timeout := c.StartTimeout
	if timeout <= 0 {
		timeout = 2 * time.Minute
	}
	ns.Start()
	began := time.Now()
	ready := log.failed() == "" && ns.ReadyForConnections(timeout)
	switch {
	case log.failed() != "":
		err = errors.New("did not start: " + log.failed())
	case !ready:
		err = fmt.Errorf("was not ready after %s", timeout)
	default:
		err = firstRequest(ns, c, timeout-time.Since(began))
	}
	if err != nil {
		ns.Shutdown()
		ns.WaitForShutdown()
		return nil, fmt.Errorf("natsd: the embedded NATS server %w", err)
	}
	s := &Server{lock: c.Lock, ns: ns, log: logger, over: make(chan struct{}), ask: make(chan struct{}, 1)}
	s.ask <- struct{}{}
	if c.User != "" {
		s.user = url.UserPassword(c.User, c.Password)
	}
	return s, nil
}

// firstRequest asks JetStream something and waits for the answer. The first request of an account makes the way back for the answers of all, and one that comes while the server is about it is answered into the void
// (nats-server, accounts.go, newServiceReply: the way is announced before its subscription is there), so whoever uses the server should not be the first. Where a client that knew the port came before us, it is asked again.
func firstRequest(ns *server.Server, c Config, timeout time.Duration) error {
	opts := []nats.Option{nats.InProcessServer(ns), nats.NoReconnect(), nats.Timeout(timeout), nats.Name("tidemark start")}
	if c.User != "" {
		opts = append(opts, nats.UserInfo(c.User, c.Password))
	}
	nc, err := nats.Connect("", opts...)
	if err != nil {
		return fmt.Errorf("takes no connection: %w", err)
	}
	defer nc.Close()
	ctx, cancel := context.WithTimeout(context.Background(), timeout) //nolint:forbidigo // whoever starts a server says how long, not when to stop
	defer cancel()
	for {
		one, cancel := context.WithTimeout(ctx, time.Second)
		// Not Request, whose timers are pooled for the whole process, in bubbles and out of them.
		_, err := nc.RequestWithContext(one, "$JS.API.INFO", nil)
		cancel()
		if err == nil {
			return nil
		}
		if ctx.Err() != nil || !errors.Is(err, context.DeadlineExceeded) {
			return fmt.Errorf("does not answer for JetStream: %w", err)
		}
	}
}

func options(c Config) (*server.Options, error) {
	opts := &server.Options{
		ServerName: "tidemark",
		JetStream:  true,
		StoreDir:   filepath.Join(c.Lock.Dir(), "nats"),
		MaxPayload: DefaultMaxPayload,
		// The process has one owner of signals, and that is main.
		NoSigs: true,
		// Sessions are subjects, and there are more of them at once than the 1,024 that the cache holds (NATS.md, section 7).
		NoSublistCache:         true,
		DisableJetStreamBanner: true,
		JetStreamMaxStore:      c.MaxStore,
	}
	if c.User != "" {
		opts.CustomClientAuthentication = credentials{c.User, c.Password}
	}
	if c.MaxPayload > 0 {
		opts.MaxPayload = int32(min(c.MaxPayload, server.MAX_PAYLOAD_MAX_SIZE))
	}
	switch c.Durability {
	case schema.Durability_DURABILITY_UNSPECIFIED, schema.Durability_DURABILITY_FSYNC:
		opts.SyncAlways = true
	case schema.Durability_DURABILITY_OS:
	case schema.Durability_DURABILITY_MEMORY:
		opts.JetStreamMaxMemory = c.MaxStore
	default:
		return nil, fmt.Errorf("natsd: one embedded server cannot give the durability %q; choose fsync, os or memory", schema.DurabilityWord(c.Durability))
	}
	if c.Listen == "" || c.Listen == Off {
		opts.DontListen = true
		return opts, nil
	}
	host, port, err := net.SplitHostPort(c.Listen)
	if err != nil {
		return nil, fmt.Errorf("natsd: the address for NATS, %q, is not host:port", c.Listen)
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return nil, fmt.Errorf("natsd: the port for NATS, %q, is not a number up to 65535", port)
	}
	opts.Host, opts.Port = host, int(n)
	if n == 0 {
		opts.Port = server.RANDOM_PORT
	}
	return opts, nil
}

// credentials lets in who says them. The server's own comparison warns of passwords that are not hashed; this one never leaves the process.
type credentials struct{ user, password string }

// Check implements server.Authentication.
func (c credentials) Check(client server.ClientAuthentication) bool {
	said := client.GetOpts()
	user := subtle.ConstantTimeCompare([]byte(said.Username), []byte(c.user))
	return user&subtle.ConstantTimeCompare([]byte(said.Password), []byte(c.password)) == 1
}

// tryListen finds out early, and with a typed error, what the server would only log.
func tryListen(addr string) error {
	l, err := net.Listen("tcp", addr)
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return fmt.Errorf("the port for NATS, %s, is in use by another process; choose another --nats-listen, port 0 for any free one, or off", addr)
	case err != nil:
		return fmt.Errorf("the address for NATS, %s, cannot be listened on: %w", addr, err)
	}
	return l.Close()
}

// InProcessConn connects within the process. nats.InProcessServer takes a Server as it is.
func (s *Server) InProcessConn() (net.Conn, error) { return s.ns.InProcessConn() }

// Addr is the real address for clients, [Off] where the server does not listen.
func (s *Server) Addr() string {
	if a := s.ns.Addr(); a != nil {
		return a.String()
	}
	return Off
}

// URL is where clients connect, with user and password: it is a secret. Empty where the server does not listen.
func (s *Server) URL() string {
	a := s.ns.Addr()
	if a == nil {
		return ""
	}
	return (&url.URL{Scheme: "nats", Host: a.String(), User: s.user}).String()
}

// Shutdown closes all connections, writes out what is held and releases the data directory. Where ctx ends first, it returns the context's error; the rest goes on. It may be called more
// than once.
func (s *Server) Shutdown(ctx context.Context) error {
	select {
	case <-s.ask:
		go func() {
			defer close(s.over)
			s.ns.Shutdown()
			s.ns.WaitForShutdown()
			if err := s.lock.Release(); err != nil {
				s.log.Error("the data directory's lock was not released", "error", err)
			}
		}()
	case <-s.over:
		return nil
	default:
	}
	select {
	case <-s.over:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("natsd: the embedded NATS server has not stopped: %w", ctx.Err())
	}
}

// PrepareBubbles must be called once, in TestMain, by tests that start a server in a bubble of testing/synctest: a goroutine of the server's that serves the whole process must be born
// outside, because inside a bubble it would stop the bubble's time. File storage expires by that goroutine's clock, the real one, so age limits cannot be tested in a bubble with files.
func PrepareBubbles() { ats.Register() }
