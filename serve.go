package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"tidemark/schema"
)

// off is the address of something that does not listen.
const off = "off"

// process is what a serving command starts, and ends in the reverse order (DESIGN section 8): every step with a deadline and a line in the log.
type process struct {
	env *environment
	// ctx ends when the process shall: its cause is the signal, or the part that failed.
	ctx   context.Context //nolint:containedctx // the process's own lifetime
	fail  context.CancelCauseFunc
	parts sync.WaitGroup
	steps []step
	// listeners are closed where the start fails before somebody serves them.
	listeners []net.Listener
}

// step ends something that was started.
type step struct {
	name   string
	within time.Duration
	end    func(context.Context) error
}

// errStopped is why a process ends that has done its work.
var errStopped = errors.New("done")

// serve starts what start starts, waits until the process shall end, and ends everything again. The error is that of the part that failed first.
func serve(ctx context.Context, env *environment, start func(*process) error) error {
	p := &process{env: env}
	p.ctx, p.fail = context.WithCancelCause(ctx)
	defer p.fail(errStopped)
	err := start(p)
	if err == nil {
		<-p.ctx.Done()
		cause := context.Cause(p.ctx)
		if ctx.Err() == nil {
			err = cause
		}
		env.log.Info("stopping", "why", cause)
	} else {
		for _, l := range p.listeners {
			_ = l.Close()
		}
	}
	return errors.Join(err, p.stop())
}

// stop ends what was started, the last first. A step that fails or takes too long does not keep the others from their turn.
func (p *process) stop() error {
	var failed []error
	for i := len(p.steps) - 1; i >= 0; i-- {
		s := p.steps[i]
		began := time.Now()
		ctx, cancel := context.WithTimeout(context.WithoutCancel(p.ctx), s.within)
		err := s.end(ctx)
		cancel()
		if err != nil {
			failed = append(failed, fmt.Errorf("stopping the %s: %w", s.name, err))
			p.env.log.Error("not stopped in good order", "part", s.name, "took", time.Since(began), "error", err)
			continue
		}
		p.env.log.Info("stopped", "part", s.name, "took", time.Since(began))
	}
	p.parts.Wait()
	return errors.Join(failed...)
}

// onStop adds a step.
func (p *process) onStop(name string, within time.Duration, end func(context.Context) error) {
	p.steps = append(p.steps, step{name, within, end})
}

// run runs a part beside the others. When it fails, the process ends.
func (p *process) run(name string, part func() error) {
	p.parts.Go(func() {
		if err := part(); err != nil {
			p.fail(fmt.Errorf("the %s failed: %w", name, err))
		}
	})
}

// listen opens the listener of a flag; nil where it is off. The error names the port and the flag.
func (p *process) listen(flag, addr string) (net.Listener, error) {
	if addr == off {
		return nil, nil
	}
	l, err := net.Listen("tcp", addr)
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return nil, fmt.Errorf("the port of --%s, %s, is in use by another process; choose another, or port 0 for any free one", flag, addr)
	case err != nil:
		return nil, fmt.Errorf("the address of --%s, %s, cannot be listened on: %w", flag, addr, err)
	}
	p.listeners = append(p.listeners, l)
	return l, nil
}

// addressOf is where a listener really listens; off for none.
func addressOf(l net.Listener) string {
	if l == nil {
		return off
	}
	return l.Addr().String()
}

// checkAddress refuses as wrong usage what can be no address to listen on.
func checkAddress(flag, addr string) error {
	_, port, err := net.SplitHostPort(addr)
	if err != nil {
		return usage("--%s %s is not HOST:PORT", flag, addr)
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		return usage("the port of --%s, %s, is not a number up to 65535", flag, addr)
	}
	return nil
}

func checkUnlessOff(flag, addr string) error {
	if addr == off {
		return nil
	}
	return checkAddress(flag, addr)
}

// checkLoopback refuses addresses that other machines can reach.
func checkLoopback(flag, addr string) error {
	if err := checkAddress(flag, addr); err != nil {
		return err
	}
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return err
	}
	if ip := net.ParseIP(host); host != "localhost" && (ip == nil || !ip.IsLoopback()) {
		return usage("dev listens on loopback only, and --%s %s is not there; run the broker and the edges as processes of their own to serve others", flag, addr)
	}
	return nil
}

// readTimeout is how long a client of an HTTP port may take to send its request, and a handler to answer it. A WebSocket is free of it: net/http takes the deadline away where a connection is hijacked.
const readTimeout = 15 * time.Second

// withoutBodies answers what has a body before h sees it, and leaves the body unread: these ports take requests that have none.
func withoutBodies(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.ContentLength == 0 {
			h.ServeHTTP(w, r)
			return
		}
		// The server would wait for what is left of it.
		_ = http.NewResponseController(w).SetReadDeadline(time.Unix(1, 0)) // the timeout ends it otherwise
		w.Header().Set("Connection", "close")
		answerJSON(w, http.StatusBadRequest, map[string]string{
			"error": http.StatusText(http.StatusBadRequest), "details": "This port takes no request with a body.", "code": schema.Code_CODE_INVALID_MESSAGE.Word(),
		})
	})
}

// serveHTTP runs an HTTP server until it is shut down. The connections' contexts end with ctx.
func (p *process) serveHTTP(ctx context.Context, name string, l net.Listener, h http.Handler) *http.Server {
	s := newHTTPServer(h, readTimeout)
	s.BaseContext = func(net.Listener) context.Context { return ctx }
	s.ErrorLog = slog.NewLogLogger(p.env.log.Handler(), slog.LevelDebug)
	p.run(name, func() error {
		if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			return err
		}
		return nil
	})
	return s
}

// newHTTPServer is a server of requests without bodies, each of which may take so long to come.
func newHTTPServer(h http.Handler, within time.Duration) *http.Server {
	return &http.Server{
		Handler:           withoutBodies(h),
		ReadHeaderTimeout: min(within, 10*time.Second),
		ReadTimeout:       within,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    64 << 10,
	}
}

// newRegistry is where a process's metrics are registered.
func newRegistry() *prometheus.Registry {
	r := prometheus.NewRegistry()
	r.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return r
}

func answerJSON(w http.ResponseWriter, code int, body map[string]string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(body) // the peer is gone, or reads it
}

// statusHandler serves /healthz, /readyz and /metrics for processes that serve nothing else over HTTP.
func statusHandler(ready func() error, metrics prometheus.Gatherer) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		answerJSON(w, http.StatusOK, map[string]string{"state": "alive"})
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if err := ready(); err != nil {
			r := schema.AsRefusal(err)
			answerJSON(w, http.StatusServiceUnavailable, map[string]string{"error": "Unavailable", "details": r.Message, "code": r.Code.Word()})
			return
		}
		answerJSON(w, http.StatusOK, map[string]string{"state": "ready"})
	})
	mux.Handle("GET /metrics", promhttp.HandlerFor(metrics, promhttp.HandlerOpts{}))
	return mux
}

// serveStatus serves them on l, unless that is nil.
func (p *process) serveStatus(l net.Listener, ready func() error, metrics prometheus.Gatherer) {
	if l == nil {
		return
	}
	s := p.serveHTTP(context.WithoutCancel(p.ctx), "status server", l, statusHandler(ready, metrics))
	p.onStop("status server", 5*time.Second, s.Shutdown)
}

// addresses are where a process really listens; scripts read the line, other commands of this machine the file in the data directory.
type addresses struct {
	PID  int    `json:"pid,omitempty"`
	HTTP string `json:"http"`
	GRPC string `json:"grpc"`
	NATS string `json:"nats"`
}

func (a addresses) line() string {
	return fmt.Sprintf("ready http=%s grpc=%s nats=%s", a.HTTP, a.GRPC, a.NATS)
}

// addressFile is where a process with a data directory says where it listens.
func addressFile(dir string) string { return filepath.Join(dir, "addresses.json") }

// publish writes the file, whole or not at all. The caller holds the directory's lock.
func (a addresses) publish(dir string) error {
	a.PID = os.Getpid()
	b, err := json.Marshal(a)
	if err != nil {
		return err
	}
	beside := addressFile(dir) + ".new"
	if err := os.WriteFile(beside, append(b, '\n'), 0o600); err != nil {
		return err
	}
	return os.Rename(beside, addressFile(dir))
}

// readAddresses reads the file; nothing where there is none.
func readAddresses(dir string) (a addresses) {
	b, err := os.ReadFile(addressFile(dir))
	if err == nil && json.Unmarshal(b, &a) != nil {
		return addresses{}
	}
	return a
}
