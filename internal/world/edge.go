package world

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"

	"github.com/prometheus/client_golang/prometheus"

	"tidemark/broker"
	"tidemark/edge-grpc"
	"tidemark/edge-ws"
	"tidemark/internal/gateway"
)

// Edge is an edge process with both faces on one log, at an address. A process that takes the place of another has its address and another name in the log.
type Edge struct {
	// Name is the address; the fields below are those of the process that is there now.
	Name    string
	Log     *broker.JetStreamLog
	Gateway *gateway.Gateway
	// Metrics are those of all of its parts.
	Metrics *prometheus.Registry

	w          *World
	cable      *cable
	http, grpc *host
	server     *http.Server
	calls      *edgegrpc.Edge
	sockets    *edgews.Edge
	stop       context.CancelFunc // of connections, which cuts them
	stopLog    context.CancelFunc
	logOver    chan error
	served     chan error
	gone       bool
	lives      int
}

// StartEdge starts another edge and waits until it is ready.
func (w *World) StartEdge() *Edge {
	w.t.Helper()
	e := &Edge{Name: fmt.Sprintf("edge%d", len(w.edges)), w: w}
	w.edges = append(w.edges, e)
	e.boot()
	return e
}

// boot starts the process, at the edge's address.
func (e *Edge) boot() {
	w := e.w
	w.t.Helper()
	e.lives++
	e.gone = false
	e.cable, e.Metrics, e.logOver, e.served = w.newCable(), prometheus.NewRegistry(), make(chan error, 1), make(chan error, 2)
	name := fmt.Sprintf("%s.%d", e.Name, e.lives)
	logger := w.logger.With("edge", name)

	lc := broker.Config{Server: broker.Server{InProcess: e.cable, Name: name}, Edge: name, Logger: logger, Metrics: e.Metrics}
	if w.cfg.Log != nil {
		w.cfg.Log(&lc)
	}
	log, err := broker.Open(lc)
	w.must(err)
	e.Log = log
	running, stopLog := context.WithCancel(context.Background())
	e.stopLog = stopLog
	go func() { e.logOver <- log.Run(running) }()

	gc := gateway.Config{Log: log, Verify: w.verifier.Verify, Version: "test", Logger: logger, Metrics: e.Metrics}
	if w.cfg.Gateway != nil {
		w.cfg.Gateway(&gc)
	}
	e.Gateway, err = gateway.New(gc)
	w.must(err)
	sc := edgews.Config{Gateway: e.Gateway, Verify: w.verifier.Verify, Metrics: e.Metrics, Logger: logger}
	if w.cfg.Socket != nil {
		w.cfg.Socket(&sc)
	}
	e.sockets, err = edgews.New(sc)
	w.must(err)
	cc := edgegrpc.Config{Gateway: e.Gateway, Log: log, Tails: log, Verify: w.verifier.Verify, Metrics: e.Metrics, Logger: logger}
	if w.cfg.GRPC != nil {
		w.cfg.GRPC(&cc)
	}
	e.calls, err = edgegrpc.New(cc)
	w.must(err)

	ctx, stop := context.WithCancel(context.Background())
	e.stop = stop
	e.http, e.grpc = w.net.listen(e.Name+".http"), w.net.listen(e.Name+".grpc")
	e.server = &http.Server{Handler: e.sockets.Handler(), BaseContext: func(net.Listener) context.Context { return ctx }}
	server, http1, calls, grpc, served := e.server, e.http, e.calls, e.grpc, e.served
	go func() {
		err := server.Serve(http1)
		if errors.Is(err, http.ErrServerClosed) || errors.Is(err, net.ErrClosed) {
			err = nil
		}
		served <- err
	}()
	go func() { served <- calls.Serve(ctx, grpc) }()
	e.WaitReady()
}

// Edge is the i-th edge that was started, from 0.
func (w *World) Edge(i int) *Edge { return w.edges[i] }

// DrainEdge stops an edge as a deployment does: clients are told to go, what is in flight is stored and answered.
func (w *World) DrainEdge(e *Edge, reason string) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	// It drains the gateway, which is the sockets', too.
	_ = e.http.Close()
	if err := e.calls.Drain(ctx, reason); err != nil {
		w.t.Errorf("drain of %s: %v", e.Name, err)
	}
	w.stopEdge(e)
}

// KillEdge ends an edge at once: its connections break where they are, and nothing that it still had to say reaches NATS or its clients.
func (w *World) KillEdge(e *Edge) {
	w.t.Helper()
	e.cable.pull()
	e.http.cut()
	e.grpc.cut()
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	_ = e.Log.Close(ended) // what it had in flight dies with it
	w.stopEdge(e)
}

// RestartEdge kills an edge and starts another in its place, which clients find at the same address.
func (w *World) RestartEdge(e *Edge) {
	w.t.Helper()
	w.KillEdge(e)
	e.boot()
}

// stopEdge ends what is left of an edge.
func (w *World) stopEdge(e *Edge) {
	w.t.Helper()
	if e.gone {
		return
	}
	e.gone = true
	e.stop()
	_ = e.http.Close()
	_ = e.server.Close()
	for range 2 {
		if err := <-e.served; err != nil {
			w.t.Errorf("%s: %v", e.Name, err)
		}
	}
	// Handlers of hijacked connections are not the server's any more.
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := e.Gateway.Drain(ctx, "The test is over."); err != nil {
		w.t.Errorf("%s: %v", e.Name, err)
	}
	e.sockets.Close()
	pulled := e.cable.isPulled()
	if err := e.Log.Close(ctx); err != nil && !pulled {
		w.t.Errorf("%s: %v", e.Name, err)
	}
	e.stopLog()
	if err := <-e.logOver; err != nil && !pulled {
		w.t.Errorf("%s: %v", e.Name, err)
	}
	e.cable.pull()
	e.cable.bridges.Wait()
}

// Freeze holds everything between the edge and NATS, both ways, as if its process were stopped in the middle of what it does; its clients find it there.
func (e *Edge) Freeze() { e.cable.freeze(true) }

// Thaw ends Freeze: what was held arrives.
func (e *Edge) Thaw() { e.cable.freeze(false) }

// Deafen lets nothing more come from NATS to the edge, while what it says is heard.
func (e *Edge) Deafen() { e.cable.deafen() }

// CutNATS breaks the edge's connections to NATS; what was on its way is lost. It connects again.
func (e *Edge) CutNATS() { e.cable.cut() }

// Counted is the sum of a metric of the edge over its labels; of a histogram, how often it was observed. 0 where there is none of that name.
func (e *Edge) Counted(name string, labels ...string) float64 {
	e.w.t.Helper()
	families, err := e.Metrics.Gather()
	if err != nil {
		e.w.t.Error(err)
	}
	sum := 0.0
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			var have strings.Builder
			for _, l := range m.GetLabel() {
				have.WriteString(l.GetName() + "=" + l.GetValue() + ";")
			}
			matches := true
			for _, want := range labels {
				matches = matches && strings.Contains(have.String(), want+";")
			}
			if matches {
				sum += m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
			}
		}
	}
	return sum
}

// WaitReady waits until the edge says that it is ready.
func (e *Edge) WaitReady() {
	e.w.t.Helper()
	e.w.Until(e.Name+" is ready", func() bool { return e.Log.Status().Ready })
}
