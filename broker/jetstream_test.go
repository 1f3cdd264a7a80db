package broker_test

import (
	"context"
	"log/slog"
	"testing"
	"time"

	"tidemark/broker"
	"tidemark/broker/logtest"
	"tidemark/internal/natsd"
	"tidemark/schema"
)

// substrate is an embedded node with a deployment on it, and the logs that tests opened there. What it started ends with the test.
type substrate struct {
	t       *testing.T
	dir     string
	node    *natsd.Server
	layout  broker.Layout
	config  func(*broker.Config)
	closers []func()
}

func newSubstrate(t *testing.T) *substrate {
	s := &substrate{t: t, dir: t.TempDir(), layout: broker.Layout{Durability: schema.Durability_DURABILITY_FSYNC, Streams: 2, MaxAge: 100 * 365 * 24 * time.Hour}} // a file store ages by the real clock, the bubble begins in 2000
	s.start()
	t.Cleanup(s.stop)
	return s
}

func (s *substrate) server() broker.Server { return broker.Server{InProcess: s.node, Name: "test"} }

// logger says, where a test fails, what was in the way.
func (s *substrate) logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(s.t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn}))
}

func (s *substrate) start() {
	node, err := natsd.Start(natsd.Config{DataDir: s.dir, Durability: s.layout.Durability})
	if err != nil {
		s.t.Fatal(err)
	}
	s.node = node
	// The model has no watchdog: a run may be without its agent for longer than any comparison takes.
	b, err := broker.NewBroker(broker.BrokerConfig{Logger: s.logger(), Server: s.server(), Layout: s.layout, Name: "broker", OrphanAfter: 10_000 * time.Hour})
	if err != nil {
		s.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	over := make(chan error, 1)
	go func() { over <- b.Run(ctx) }()
	s.closers = append(s.closers, func() {
		cancel()
		if err := <-over; err != nil {
			s.t.Error(err)
		}
	})
}

// settle waits until the projectors have stored what they derive from idle sessions.
func (s *substrate) settle(*testing.T) { time.Sleep(5 * time.Second) } // of the bubble

// instance is the substrate as the suite wants it, with one edge open.
func (s *substrate) instance() logtest.Instance {
	return logtest.Instance{
		Log:      s.open(),
		OpenEdge: func(*testing.T) broker.Log { return s.open() },
		Settle:   s.settle,
		Restart: func(*testing.T) broker.Log {
			s.stop()
			s.start()
			return s.open()
		},
	}
}

// stop closes all logs and stops the node.
func (s *substrate) stop() {
	for i := len(s.closers) - 1; i >= 0; i-- {
		s.closers[i]()
	}
	s.closers = nil
	if err := s.node.Shutdown(context.Background()); err != nil {
		s.t.Error(err)
	}
}

// open opens an edge's log, ready.
func (s *substrate) open() *broker.JetStreamLog {
	s.t.Helper()
	cfg := broker.Config{Logger: s.logger(), Server: s.server()}
	if s.config != nil {
		s.config(&cfg)
	}
	l, err := broker.Open(cfg)
	if err != nil {
		s.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	over := make(chan error, 1)
	go func() { over <- l.Run(ctx) }()
	s.closers = append(s.closers, func() {
		closing, done := context.WithTimeout(context.Background(), time.Minute)
		defer done()
		if err := l.Close(closing); err != nil {
			s.t.Error(err)
		}
		cancel()
		if err := <-over; err != nil {
			s.t.Error(err)
		}
	})
	for range 1000 {
		if l.Status().Ready {
			return l
		}
		time.Sleep(10 * time.Millisecond) // of the bubble
	}
	s.t.Fatalf("the log is not ready: %s", l.Status().Reason)
	return nil
}

// jetStream opens a JetStreamLog for the suite.
func jetStream(t *testing.T) logtest.Instance { return newSubstrate(t).instance() }

func TestJetStreamLog(t *testing.T) { logtest.Run(t, jetStream) }
