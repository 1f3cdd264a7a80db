package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/oklog/ulid/v2"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"tidemark/broker"
	"tidemark/internal/auth"
	"tidemark/internal/client"
	"tidemark/internal/natsd"
	"tidemark/internal/recording"
	"tidemark/schema"
)

// Config of a demo.
type Config struct {
	// Recording is what the agent streams.
	Recording *recording.Recording
	// Speed makes it stream faster than its natural pace: 2 is twice as fast. Default 1.
	Speed float64
	// Self is the tidemark program, to start the edges with.
	Self string
	// Out is the terminal.
	Out    io.Writer
	Logger *slog.Logger
}

const (
	session = "demo"
	// cuts is how often the first client's connection is cut.
	cuts = 3
	// finishTimeout is how long the clients may take, after the last publish, to have everything.
	finishTimeout = 30 * time.Second
	// columnWidth is that of one client's text: two of them fit into a terminal of 100 characters.
	columnWidth = 46
)

// stage is what a demo runs on.
type stage struct {
	cfg    Config
	screen *columns
	node   *natsd.Server
	secret string
	env    []string
	ws     *process

	mu   sync.Mutex
	grpc *process // replaced when it is killed
}

// Run plays the demo and reports how it went. The error is that it could not be played to its end.
func Run(ctx context.Context, cfg Config) (*Report, error) {
	if cfg.Speed <= 0 {
		cfg.Speed = 1
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	dir, err := os.MkdirTemp("", "tidemark-demo-")
	if err != nil {
		return nil, err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	node, err := natsd.Start(natsd.Config{DataDir: dir, Listen: "127.0.0.1:0", User: "demo", Password: ulid.Make().String(), Logger: cfg.Logger})
	if err != nil {
		return nil, err
	}
	s := &stage{cfg: cfg, node: node, secret: ulid.Make().String() + ulid.Make().String(), screen: newColumns(cfg.Out, 2, columnWidth)}
	// Not in the arguments, where other users of the machine could read them.
	s.env = []string{"TIDEMARK_NATS=" + node.URL(), "TIDEMARK_SECRET=" + s.secret}
	report, err := s.play(ctx)
	down, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	return report, errors.Join(err, node.Shutdown(down))
}

// play starts broker and edges, and runs the agent and the clients on them.
func (s *stage) play(ctx context.Context) (_ *Report, err error) {
	b, err := broker.NewBroker(broker.BrokerConfig{
		Server: broker.Server{InProcess: s.node, URL: s.node.URL(), Name: "demo"}, Layout: broker.Layout{Durability: schema.Durability_DURABILITY_FSYNC}, Logger: s.cfg.Logger,
	})
	if err != nil {
		return nil, err
	}
	running, stop := context.WithCancel(ctx)
	var projecting sync.WaitGroup
	projecting.Go(func() {
		if e := b.Run(running); e != nil {
			s.cfg.Logger.Error("the broker stopped", "error", e)
		}
	})
	defer projecting.Wait()
	defer stop()
	if s.ws, err = startEdge(ctx, s.cfg.Self, "http", s.env, "edge-ws", "--http", "127.0.0.1:0"); err != nil {
		return nil, err
	}
	defer s.ws.stop()
	if s.grpc, err = startEdge(ctx, s.cfg.Self, "grpc", s.env, "edge-grpc", "--grpc", "127.0.0.1:0", "--http", "off"); err != nil {
		return nil, err
	}
	defer func() {
		s.mu.Lock()
		p := s.grpc
		s.mu.Unlock()
		p.stop()
	}()
	return s.stream(ctx)
}

// token mints one for a part of the play.
func (s *stage) token(subject string, role schema.Role) (string, error) {
	return auth.Mint([]byte(s.secret), auth.Principal{Subject: subject, Role: role, Sessions: []string{session}}, time.Hour)
}

func (s *stage) client(edge, subject string, role schema.Role) (*client.Client, error) {
	token, err := s.token(subject, role)
	if err != nil {
		return nil, err
	}
	return client.New(client.Config{Edges: []string{edge}, Token: token, Name: "demo " + subject, Logger: s.cfg.Logger})
}

// stream plays the recording to both clients.
func (s *stage) stream(ctx context.Context) (*Report, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	began := time.Now()
	agent, err := s.client("grpc://"+s.grpc.addr, "agent", schema.Role_ROLE_AGENT)
	if err != nil {
		return nil, err
	}
	ada, err := s.watcher(0, "Ada on WebSocket", "http://"+s.ws.addr)
	if err != nil {
		return nil, err
	}
	ben, err := s.watcher(1, "Ben on gRPC", "grpc://"+s.grpc.addr)
	if err != nil {
		return nil, err
	}
	s.screen.text(0, ada.name+"\n\n")
	s.screen.text(1, ben.name+"\n\n")
	var watching sync.WaitGroup
	defer watching.Wait()
	for _, w := range []*watcher{ada, ben} {
		watching.Go(func() {
			if err := w.watch(ctx, len(s.cfg.Recording.Steps)); err != nil && ctx.Err() == nil {
				cancel(fmt.Errorf("demo: %s: %w", w.name, err))
			}
		})
	}
	published, err := s.publish(ctx, agent, ada, cancel)
	if err != nil {
		cancel(err)
		return nil, context.Cause(ctx)
	}
	finished := time.AfterFunc(finishTimeout, func() { cancel(errUnfinished) })
	watching.Wait()
	finished.Stop()
	if err := s.screen.end(); err != nil {
		return nil, err
	}
	if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, errUnfinished) {
		return nil, cause
	}
	// Where a client did not finish, the report says what it did not get.
	ask, done := context.WithTimeout(context.WithoutCancel(ctx), finishTimeout)
	defer done()
	now, err := agent.Session(ask, session)
	if err != nil {
		return nil, err
	}
	report := &Report{Published: len(published), Stored: now.GetHeadSeq(), Took: time.Since(began), Kills: 1, Cuts: cuts}
	for _, w := range []*watcher{ada, ben} {
		t := tally(w.name, published, w.got, w.live)
		t.Cuts = w.lost
		t.SameText = sameText(s.cfg.Recording.Envelopes(), w.envelopes)
		report.Tallies = append(report.Tallies, t)
	}
	return report, nil
}

var errUnfinished = errors.New("demo: not everything arrived in time")

// publish plays the recording at its pace, and on the way cuts Ada's connection and kills the gRPC edge.
func (s *stage) publish(ctx context.Context, agent *client.Client, ada *watcher, cancel context.CancelCauseFunc) ([]sent, error) {
	p := agent.Publisher(ctx, client.PublishOptions{Session: session, Producer: "agent"})
	steps := s.cfg.Recording.Steps
	acts := map[int][]func(){}
	for i := range cuts {
		at := len(steps) * (i + 1) / (cuts + 2)
		acts[at] = append(acts[at], func() { ada.cut(ctx) })
	}
	var restarting sync.WaitGroup
	defer restarting.Wait()
	kill := func() {
		s.screen.note("the gRPC edge is killed (kill -9), with the agent's and Ben's connections")
		s.grpc.kill()
		restarting.Go(func() {
			next, err := startEdge(ctx, s.cfg.Self, "grpc", s.env, "edge-grpc", "--grpc", s.grpc.addr, "--http", "off")
			if err != nil {
				cancel(err)
				return
			}
			s.mu.Lock()
			s.grpc = next
			s.mu.Unlock()
			s.screen.note("the gRPC edge is back")
		})
	}
	at := len(steps) * (cuts + 1) / (cuts + 2)
	acts[at] = append(acts[at], kill)
	published := make([]sent, 0, len(steps))
	next := time.Now()
	for i, step := range steps {
		for _, act := range acts[i] {
			act()
		}
		next = next.Add(time.Duration(float64(step.After) / s.cfg.Speed))
		timer := time.NewTimer(time.Until(next))
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return nil, context.Cause(ctx)
		}
		e := proto.CloneOf(step.Envelope)
		now := time.Now()
		e.Id, e.Time = ulid.Make().String(), timestamppb.New(now)
		published = append(published, sent{e.GetId(), now})
		if err := p.Publish(ctx, e); err != nil {
			return nil, err
		}
	}
	if err := p.Flush(ctx); err != nil {
		return nil, err
	}
	return published, p.Close(ctx)
}

// watcher is a client that follows the session.
type watcher struct {
	stage  *stage
	column int
	name   string
	f      *client.Follower
	// following has a token for each time that the client has attached and was not cut since.
	following chan struct{}

	// Owned by watch until it has ended.
	got       []received
	live      []bool
	envelopes []*schema.Envelope
	lost      int
	// speaking is the message and channel whose text stands last in the column.
	speaking string
}

func (s *stage) watcher(column int, name, edge string) (*watcher, error) {
	c, err := s.client(edge, name, schema.Role_ROLE_USER)
	if err != nil {
		return nil, err
	}
	return &watcher{stage: s, column: column, name: name, following: make(chan struct{}, 1), f: c.Follow(client.FollowOptions{Session: session})}, nil
}

// cut cuts the client's connection, as a tunnel or a lid that is shut does. One that was cut just before is given the time to be back, or there would be nothing to cut.
func (w *watcher) cut(ctx context.Context) {
	select {
	case <-w.following:
	case <-ctx.Done():
		return
	}
	w.stage.screen.note("%s: the connection is cut", w.name)
	w.f.Cut()
}

// watch receives until it has n envelopes.
func (w *watcher) watch(ctx context.Context, n int) error {
	defer w.f.Close()
	caughtUp := false
	resumed := 0
	for len(w.got) < n {
		e, err := w.f.Next(ctx)
		if err != nil {
			return err
		}
		switch {
		case e.Envelope != nil:
			w.take(e.Envelope, caughtUp)
		case e.Lost != nil:
			w.lost++
			caughtUp = false
			w.stage.cfg.Logger.Debug("a client's connection is lost", "client", w.name, "behind", len(w.got), "error", e.Lost)
		case e.Attached != nil:
			resumed = len(w.got)
			select {
			case w.following <- struct{}{}:
			default:
			}
		case e.CaughtUp != nil:
			caughtUp = true
			if w.lost > 0 {
				w.stage.screen.note("%s: back, %d envelopes replayed behind seq %d", w.name, len(w.got)-resumed, resumed)
			}
		}
	}
	return nil
}

func (w *watcher) take(e *schema.Envelope, live bool) {
	w.got = append(w.got, received{e.GetId(), e.GetSeq(), time.Now()})
	w.live = append(w.live, live)
	w.envelopes = append(w.envelopes, e)
	switch p := e.GetPayload().(type) {
	case *schema.Envelope_Token:
		if now := p.Token.GetMessageId() + p.Token.GetChannel().String(); now != w.speaking {
			if w.speaking != "" {
				w.stage.screen.text(w.column, "\n\n")
			}
			w.speaking = now
		}
		w.stage.screen.text(w.column, p.Token.GetText())
	case *schema.Envelope_ToolCall:
		if p.ToolCall.GetName() != "" {
			w.stage.screen.text(w.column, "\n\n[calls "+p.ToolCall.GetName()+"]")
		}
	case *schema.Envelope_WaitingForInput:
		w.stage.screen.text(w.column, "\n\n[asks: "+p.WaitingForInput.GetPrompt()+"]")
	}
}
