package bench

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/url"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"tidemark/broker"
	edgews "tidemark/edge-ws"
	"tidemark/internal/auth"
	"tidemark/internal/gateway"
	"tidemark/internal/natsd"
	"tidemark/schema"
)

// serve serves HTTP on loopback until the test ends.
func serve(t *testing.T, h http.Handler) *url.URL {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: h}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	t.Cleanup(func() {
		_ = srv.Close()
		if err := <-served; !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
	})
	return &url.URL{Scheme: "http", Host: l.Addr().String()}
}

// edgeOn is a WebSocket edge on a log.
func edgeOn(t *testing.T, log broker.Log) *System {
	t.Helper()
	secret := []byte("a secret that only tests know, long enough")
	v, err := auth.NewVerifier(auth.Config{Secret: secret})
	if err != nil {
		t.Fatal(err)
	}
	metrics := prometheus.NewRegistry()
	metrics.MustRegister(collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	g, err := gateway.New(gateway.Config{Log: log, Verify: v.Verify, Version: "test"})
	if err != nil {
		t.Fatal(err)
	}
	e, err := edgews.New(edgews.Config{Gateway: g, Verify: v.Verify, Metrics: metrics})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(e.Close)
	token, err := auth.Mint(secret, auth.Principal{Subject: "bench", Role: schema.Role_ROLE_ADMIN, Sessions: []string{SessionPrefix + "*"}}, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	return &System{Edge: serve(t, e.Handler()), Token: token}
}

// node is a NATS server with the log on it.
func node(t *testing.T, class schema.Durability) (*natsd.Server, *broker.JetStreamLog) {
	t.Helper()
	ns, err := natsd.Start(natsd.Config{DataDir: t.TempDir(), Durability: class, Listen: "127.0.0.1:0"})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background()) //nolint:usetesting // it ends in Cleanup, in its turn
	var wg sync.WaitGroup
	t.Cleanup(func() {
		cancel()
		wg.Wait()
		if err := ns.Shutdown(context.WithoutCancel(ctx)); err != nil {
			t.Error(err)
		}
	})
	server := broker.Server{InProcess: ns, Name: "bench test"}
	b, err := broker.NewBroker(broker.BrokerConfig{Server: server, Layout: broker.Layout{Durability: class}})
	if err != nil {
		t.Fatal(err)
	}
	wg.Go(func() {
		if err := b.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	l, err := broker.Open(broker.Config{Server: server})
	if err != nil {
		t.Fatal(err)
	}
	wg.Go(func() {
		if err := l.Run(ctx); err != nil {
			t.Error(err)
		}
		if err := l.Close(context.WithoutCancel(ctx)); err != nil {
			t.Error(err)
		}
	})
	for !l.Status().Ready {
		if err := pause(t.Context(), 5*time.Millisecond); err != nil {
			t.Fatal(err)
		}
	}
	return ns, l
}
