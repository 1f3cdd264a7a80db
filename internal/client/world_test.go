package client_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/proto"

	"tidemark/broker"
	"tidemark/broker/worktest"
	edgegrpc "tidemark/edge-grpc"
	edgews "tidemark/edge-ws"
	"tidemark/internal/auth"
	"tidemark/internal/client"
	"tidemark/internal/gateway"
	"tidemark/schema"
)

var secret = []byte("a secret that only tests know, long enough")

// world is edges over one model of the log, reached over a network of pipes, in a bubble of fake time.
type world struct {
	*testing.T
	scheme string // of the edges: grpc or ws
	log    *away
	queue  *worktest.Queue
	net    *network
	edges  map[string]*edge
	// Of the edges to be started.
	limits  gateway.Limits
	metrics prometheus.Registerer // nil for nowhere
}

// away is the model of the log, which can refuse publishes as if NATS were gone.
type away struct {
	*broker.MemoryLog
	mu     sync.Mutex
	refuse int // how many publishes
}

func (l *away) Publish(ctx context.Context, id schema.SessionID, s *broker.Submission) {
	l.mu.Lock()
	refused := l.refuse > 0
	if refused {
		l.refuse--
	}
	l.mu.Unlock()
	if refused {
		s.Done(broker.Receipt{}, schema.Refuse(schema.Code_CODE_UNAVAILABLE, "NATS is away."))
		return
	}
	l.MemoryLog.Publish(ctx, id, s)
}

type edge struct {
	stop  context.CancelFunc
	drain func(context.Context) error
	ended chan error
}

// inWorld runs a test over both transports.
func inWorld(t *testing.T, test func(w *world)) {
	for scheme := range starts {
		t.Run(scheme, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := &world{T: t, scheme: scheme, log: &away{MemoryLog: broker.NewMemoryLog()}, queue: new(worktest.Queue), net: &network{hosts: map[string]*pipeListener{}}, edges: map[string]*edge{}}
				w.start("a:1")
				test(w)
				for host := range w.edges {
					w.kill(host)
				}
			})
		})
	}
}

func (w *world) must(err error) {
	w.Helper()
	if err != nil {
		w.Fatal(err)
	}
}

func (w *world) verify(ctx context.Context, token string) (*auth.Principal, error) {
	v, err := auth.NewVerifier(auth.Config{Secret: secret})
	if err != nil {
		return nil, err
	}
	return v.Verify(ctx, token)
}

// starts has a way to run an edge for each transport: serve blocks until ctx ends or drain was called.
var starts = map[string]func(w *world, g *gateway.Gateway, l net.Listener) (serve func(context.Context) error, drain func(context.Context) error){
	"grpc": func(w *world, g *gateway.Gateway, l net.Listener) (func(context.Context) error, func(context.Context) error) {
		e, err := edgegrpc.New(edgegrpc.Config{Gateway: g, Log: w.log, Work: w.queue, Runs: w.queue, Verify: w.verify})
		w.must(err)
		return func(ctx context.Context) error { return e.Serve(ctx, l) }, func(ctx context.Context) error { return e.Drain(ctx, "test") }
	},
	"ws": func(w *world, g *gateway.Gateway, l net.Listener) (func(context.Context) error, func(context.Context) error) {
		e, err := edgews.New(edgews.Config{Gateway: g, Verify: w.verify})
		w.must(err)
		s := &http.Server{Handler: e.Handler()}
		return func(ctx context.Context) error {
			s.BaseContext = func(net.Listener) context.Context { return ctx }
			defer e.Close()
			defer context.AfterFunc(ctx, func() { s.Close() })()
			if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
				return err
			}
			return nil
		}, func(ctx context.Context) error { return errors.Join(g.Drain(ctx, "test"), s.Shutdown(ctx)) }
	},
}

// start runs an edge under this address.
func (w *world) start(host string) {
	w.Helper()
	g, err := gateway.New(gateway.Config{Log: w.log, Work: w.queue, Runs: w.queue, Verify: w.verify, Limits: w.limits, Metrics: w.metrics})
	w.must(err)
	l := w.net.listen(host)
	ctx, stop := context.WithCancel(w.Context())
	e := &edge{stop: stop, ended: make(chan error, 1)}
	serve, drain := starts[w.scheme](w, g, l)
	e.drain = drain
	w.edges[host] = e
	go func() { e.ended <- serve(ctx) }()
}

// kill ends the edge at once.
func (w *world) kill(host string) {
	w.Helper()
	e := w.edges[host]
	delete(w.edges, host)
	w.net.unplug(host)
	e.stop()
	w.must(<-e.ended)
}

func (w *world) client(change func(*client.Config), hosts ...string) *client.Client {
	w.Helper()
	token, err := auth.Mint(secret, auth.Principal{Subject: "ada", Role: schema.Role_ROLE_ADMIN, Sessions: []string{"*"}}, 24*time.Hour)
	w.must(err)
	cfg := client.Config{Token: token, Dial: w.net.dial, Name: "test"}
	for _, h := range hosts {
		cfg.Edges = append(cfg.Edges, w.scheme+"://"+h)
	}
	if change != nil {
		change(&cfg)
	}
	c, err := client.New(cfg)
	w.must(err)
	return c
}

// append stores tokens past the edges.
func (w *world) append(session string, texts ...string) {
	w.Helper()
	for _, text := range texts {
		a, err := schema.NewStamp(&schema.Source{Subject: "agent", Role: schema.Role_ROLE_AGENT}).AcceptEnvelope(token(text), time.Now())
		w.must(err)
		_, err = broker.Append(w.Context(), w.log.MemoryLog, schema.SessionID{Tenant: "default", Name: session}, broker.Submission{Envelopes: []schema.Accepted{a}})
		w.must(err)
	}
}

// stored reads a session's texts past the edges.
func (w *world) stored(session string) []string {
	w.Helper()
	f, err := w.log.Follow(w.Context(), schema.SessionID{Tenant: "default", Name: session}, broker.FollowOptions{})
	w.must(err)
	defer f.Close()
	var texts []string
	for f.Attachment().Head > uint64(len(texts)) {
		b, err := f.Next(w.Context(), 1<<20)
		w.must(err)
		for _, v := range b.Views {
			for _, raw := range v.Each() {
				e := new(schema.Envelope)
				w.must(proto.Unmarshal(raw, e))
				texts = append(texts, e.GetToken().GetText())
			}
		}
	}
	return texts
}

func token(text string) *schema.Envelope {
	return &schema.Envelope{Payload: &schema.Envelope_Token{Token: &schema.Token{MessageId: "m1", Text: text}}}
}

func numbers(from, to int) []string {
	var s []string
	for i := from; i <= to; i++ {
		s = append(s, fmt.Sprint(i))
	}
	return s
}

// network is hosts that clients reach through pipes.
type network struct {
	mu    sync.Mutex
	hosts map[string]*pipeListener
	dials int
}

func (n *network) listen(host string) net.Listener {
	n.mu.Lock()
	defer n.mu.Unlock()
	l := &pipeListener{conns: make(chan net.Conn), done: make(chan struct{})}
	n.hosts[host] = l
	return l
}

// unplug breaks all connections to the host, and takes it off the network.
func (n *network) unplug(host string) {
	n.mu.Lock()
	l := n.hosts[host]
	delete(n.hosts, host)
	n.mu.Unlock()
	if l == nil {
		return // frozen
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range l.open {
		_ = c.Close()
	}
}

func (n *network) dial(ctx context.Context, _, addr string) (net.Conn, error) {
	n.mu.Lock()
	n.dials++
	l := n.hosts[addr]
	n.mu.Unlock()
	if l == nil {
		return nil, fmt.Errorf("dial %s: connection refused", addr)
	}
	ours, theirs := net.Pipe()
	f := &freezer{Conn: ours, closed: make(chan struct{})}
	select {
	case l.conns <- theirs:
		l.mu.Lock()
		l.open = append(l.open, f, theirs)
		l.mu.Unlock()
		return f, nil
	case <-l.done:
		return nil, fmt.Errorf("dial %s: connection refused", addr)
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// freeze makes the host's connections silent, as when its machine has lost its power: nobody is told.
func (n *network) freeze(host string) {
	n.mu.Lock()
	l := n.hosts[host]
	delete(n.hosts, host)
	n.mu.Unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range l.open {
		if f, ok := c.(*freezer); ok {
			f.frozen.Store(true)
		}
	}
}

// freezer is a client's end of a connection that can fall silent.
type freezer struct {
	net.Conn
	frozen atomic.Bool
	once   sync.Once
	closed chan struct{}
}

func (f *freezer) Read(b []byte) (int, error) {
	n, err := f.Conn.Read(b)
	if f.frozen.Load() {
		<-f.closed
		return 0, net.ErrClosed
	}
	return n, err
}

func (f *freezer) Write(b []byte) (int, error) {
	if f.frozen.Load() {
		return len(b), nil // into the buffers of the network
	}
	return f.Conn.Write(b)
}

func (f *freezer) Close() error {
	f.once.Do(func() { close(f.closed) })
	return f.Conn.Close()
}

type pipeListener struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
	mu    sync.Mutex
	open  []net.Conn
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *pipeListener) Close() error {
	l.once.Do(func() { close(l.done) })
	return nil
}

func (l *pipeListener) Addr() net.Addr { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1} }
