package world

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coder/websocket"
	"google.golang.org/protobuf/proto"

	"tidemark/internal/gateway"
	"tidemark/schema"
)

// Limits of the edge that is violated. The small ones are hit by few messages, so that a violation costs the machine, which is the violators' too, about what it costs the edge.
const (
	limitSessions  = 5
	limitPlaces    = 2
	limitInFlight  = 64
	limitHello     = 300 * time.Millisecond
	limitWrite     = 500 * time.Millisecond
	longSession    = "a long history"
	violatorsWait  = time.Minute
	tokenEvery     = 2 * time.Millisecond
	historyInBytes = 6 << 20
	pieceInBytes   = 4 << 10
)

// violator is a client that does what it may not.
type violator struct {
	name string
	// limit is the word under which the metric counts it; empty where it is no limit that is violated. ends is the reason under which the end of its connection is counted; empty where it does not end.
	limit, ends string
	// violate does it, and returns an error where the violator is not told what it did.
	violate func(x *offender) error
}

// offender is one violator at work.
type offender struct {
	w       *World
	ctx     context.Context
	addr    string
	session string // its own
	user    string // a token of its own user
	agent   string
	// deaf says whether all have been cut who came so far and read nothing.
	deaf    func() bool
	sockets []*websocket.Conn
}

// dial upgrades over a real socket.
func (x *offender) dial(target, token string, h http.Header, subprotocols ...string) (*websocket.Conn, error) {
	if h == nil {
		h = make(http.Header)
	}
	if token != "" {
		h.Set("Authorization", "Bearer "+token)
	}
	c, res, err := websocket.Dial(x.ctx, "ws://"+x.addr+target, &websocket.DialOptions{HTTPHeader: h, Subprotocols: subprotocols, HTTPClient: http.DefaultClient})
	if err != nil {
		if res == nil {
			return nil, err
		}
		var said struct{ Code string }
		_ = json.NewDecoder(res.Body).Decode(&said)
		return nil, fmt.Errorf("%d %s", res.StatusCode, said.Code)
	}
	c.SetReadLimit(-1)
	x.sockets = append(x.sockets, c)
	return c, nil
}

// socket is the session socket of the offender's session.
func (x *offender) socket(token string) (*websocket.Conn, error) {
	return x.dial("/ws?sessionName="+url.QueryEscape(x.session), token, nil)
}

// mux is a multiplexed connection.
func (x *offender) mux(token string) (*websocket.Conn, error) {
	return x.dial("/v1/connect", token, nil, "tidemark.v1.proto")
}

func (x *offender) send(c *websocket.Conn, f *schema.ClientFrame) error {
	b, err := proto.Marshal(f)
	if err != nil {
		return err
	}
	return c.Write(x.ctx, websocket.MessageBinary, b)
}

// frames reads frames until one is what is waited for.
func (x *offender) frames(c *websocket.Conn, until func(*schema.ServerFrame) bool) error {
	for {
		_, b, err := c.Read(x.ctx)
		if err != nil {
			return err
		}
		f := new(schema.ServerFrame)
		if err := proto.Unmarshal(b, f); err != nil {
			return err
		}
		if until(f) {
			return nil
		}
	}
}

// closed reads to the end of the connection, which must say the code, after an error frame that says it too where the way has one.
func (x *offender) closed(c *websocket.Conn, code schema.Code, framed bool) error {
	said := false
	for {
		_, b, err := c.Read(x.ctx)
		if err == nil {
			said = said || strings.Contains(string(b), `"code":"`+code.Word()+`"`)
			continue
		}
		end, ok := errors.AsType[websocket.CloseError](err)
		if !ok || int(end.Code) != code.Rule().Close || !strings.HasPrefix(end.Reason, code.Word()) {
			return fmt.Errorf("it should be closed with %d %s: %w", code.Rule().Close, code.Word(), err)
		}
		if framed && !said {
			return fmt.Errorf("it was closed with %s and had no error frame before", code.Word())
		}
		return nil
	}
}

// wantUpgrade wants that an upgrade was refused so; nil where it was.
func wantUpgrade(err error, want string) error {
	if err == nil || err.Error() != want {
		return fmt.Errorf("the upgrade should be refused with %s: %w", want, err)
	}
	return nil
}

func violators() []violator {
	message := []byte(`{"type":"user_message","data":{"message":"again and again"}}`)
	return []violator{
		{"faster than it may", "rate", "rate_exceeded", func(x *offender) error {
			c, err := x.socket(x.user)
			if err != nil {
				return err
			}
			// Until it is closed; more than enough also where the machine is slow.
			for range 300 {
				if c.Write(x.ctx, websocket.MessageText, message) != nil {
					break
				}
			}
			return x.closed(c, schema.Code_CODE_RATE_EXCEEDED, true)
		}},
		{"faster than it may, multiplexed", "rate", "", func(x *offender) error {
			c, err := x.mux(x.user)
			sent, answered, refused := 0, 0, 0
			for err == nil && refused == 0 {
				for range 30 {
					sent++
					if err = x.send(c, &schema.ClientFrame{Frame: &schema.ClientFrame_Publish{Publish: &schema.Publish{
						PublishId: uint64(sent), Session: x.session, Envelopes: []*schema.Envelope{UserMessage("again and again")},
					}}}); err != nil {
						return err
					}
				}
				err = x.frames(c, func(f *schema.ServerFrame) bool {
					answered += len(f.GetPublished().GetAcks())
					if r := f.GetRejected(); r != nil {
						answered++
						if r.GetCode() == schema.Code_CODE_RATE_EXCEEDED && r.GetRetryable() {
							refused++
						}
					}
					return answered == sent
				})
			}
			return err
		}},
		{"a message that is too large", "message_bytes", "too_large", func(x *offender) error {
			c, err := x.socket(x.agent)
			if err != nil {
				return err
			}
			// It is told before it has said all of it.
			_ = c.Write(x.ctx, websocket.MessageText, []byte(`{"type":"token","data":{"message_id":"m1","text":"`+strings.Repeat("x", schema.MaxFrameBytes)+`"}}`))
			return x.closed(c, schema.Code_CODE_TOO_LARGE, false)
		}},
		{"more sessions than it may", "sessions", "", func(x *offender) error {
			c, err := x.mux(x.agent)
			for i := range uint32(limitSessions + 1) {
				if err == nil {
					err = x.send(c, attachFrame(&schema.Attach{Channel: i + 1, Session: fmt.Sprint(x.session, i)}))
				}
			}
			if err != nil {
				return err
			}
			return x.frames(c, func(f *schema.ServerFrame) bool {
				return f.GetError().GetCode() == schema.Code_CODE_TOO_MANY_SESSIONS && f.GetError().GetChannel() == limitSessions+1
			})
		}},
		{"more connections than it may", "user_connections", "too_many_connections", func(x *offender) error {
			for range limitPlaces {
				c, err := x.socket(x.user)
				if err != nil {
					return err
				}
				if _, _, err := c.Read(x.ctx); err != nil {
					return err
				}
			}
			c, err := x.socket(x.user)
			if err != nil {
				return err
			}
			return x.closed(c, schema.Code_CODE_TOO_MANY_CONNECTIONS, true)
		}},
		{"what is no JSON", "", "invalid_message", func(x *offender) error {
			c, err := x.socket(x.user)
			if err != nil {
				return err
			}
			if err := c.Write(x.ctx, websocket.MessageText, []byte(`{"type":"user_message","data":`)); err != nil {
				return err
			}
			return x.closed(c, schema.Code_CODE_INVALID_MESSAGE, true)
		}},
		{"a type that is not for its role", "", "forbidden", func(x *offender) error {
			c, err := x.socket(x.user)
			if err != nil {
				return err
			}
			if err := c.Write(x.ctx, websocket.MessageText, []byte(`{"type":"token","data":{"message_id":"m1","text":"I am the agent"}}`)); err != nil {
				return err
			}
			return x.closed(c, schema.Code_CODE_FORBIDDEN, true)
		}},
		{"no hello", "", "unauthenticated", func(x *offender) error {
			c, err := x.mux("")
			if err != nil {
				return err
			}
			return x.closed(c, schema.Code_CODE_UNAUTHENTICATED, false)
		}},
		{"a token that is none", "", "", func(x *offender) error {
			_, err := x.socket("e30.e30.e30")
			return wantUpgrade(err, "401 unauthenticated")
		}},
		{"a page that may not", "origin", "", func(x *offender) error {
			_, err := x.dial("/ws?sessionName=s", x.user, http.Header{"Origin": {"https://evil.example.com"}})
			return wantUpgrade(err, "403 origin_not_allowed")
		}},
		{"reads nothing", "", "peer_dead", func(x *offender) error {
			// A client with so small a buffer takes next to nothing by itself. Nobody can tell something to who does not listen: it is cut.
			d := net.Dialer{}
			t := &http.Transport{DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
				c, err := d.DialContext(ctx, network, addr)
				if tcp, ok := c.(*net.TCPConn); ok {
					_ = tcp.SetReadBuffer(4 << 10)
				}
				return c, err
			}}
			c, _, err := websocket.Dial(x.ctx, "ws://"+x.addr+"/ws?sessionName="+url.QueryEscape(longSession), &websocket.DialOptions{
				HTTPHeader: http.Header{"Authorization": {"Bearer " + x.agent}}, HTTPClient: &http.Client{Transport: t},
			})
			if err != nil {
				return err
			}
			defer t.CloseIdleConnections()
			c.SetReadLimit(-1)
			x.sockets = append(x.sockets, c)
			// That it was, its metric says, for all of them.
			look := time.NewTicker(limitWrite / 2)
			defer look.Stop()
			for !x.deaf() {
				select {
				case <-look.C:
				case <-x.ctx.Done():
					return errors.New("it reads nothing and is not cut")
				}
			}
			return nil
		}},
		{"a flood that reads no answers", "in_flight", "", func(x *offender) error {
			const flood = 10 * limitInFlight
			c, err := x.mux(x.agent)
			for i := range flood {
				if err == nil {
					err = x.send(c, &schema.ClientFrame{Frame: &schema.ClientFrame_Publish{Publish: &schema.Publish{PublishId: uint64(i + 1), Session: x.session, Envelopes: []*schema.Envelope{Token("flood ")}}}})
				}
			}
			if err != nil {
				return err
			}
			// It is held back, not refused: once it reads, all is answered.
			answered := 0
			return x.frames(c, func(f *schema.ServerFrame) bool {
				answered += len(f.GetPublished().GetAcks())
				return answered == flood
			})
		}},
	}
}

// listenTCP serves the edge's HTTP port on a TCP socket of this machine, too, until the world ends, and returns its address. It is for worlds outside a bubble.
func (e *Edge) listenTCP() string {
	e.w.t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	e.w.must(err)
	server := &http.Server{Handler: e.sockets.Handler()}
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	e.w.closers = append(e.w.closers, func() {
		_ = server.Close()
		if err := <-served; !errors.Is(err, http.ErrServerClosed) {
			e.w.t.Errorf("%s: %v", e.Name, err)
		}
	})
	return l.Addr().String()
}

// goodSession is one over the edge that is violated: somebody publishes a token every few milliseconds, and somebody else follows. What it measures is the time from before a token is sent to
// after it has come.
type goodSession struct {
	w    *World
	sent []atomic.Int64 // when, by the place in the session
	n    atomic.Int64

	mu      sync.Mutex
	samples []time.Duration
	failed  error
	stop    context.CancelFunc
	over    sync.WaitGroup
}

func (w *World) goodSession(addr string) *goodSession {
	ctx, stop := context.WithCancel(context.Background())
	s := &goodSession{w: w, sent: make([]atomic.Int64, 1<<20), stop: stop}
	agent := w.Token(schema.Role_ROLE_AGENT, "*")
	x := &offender{w: w, ctx: ctx, addr: addr}
	out, err := x.mux(agent)
	w.must(err)
	in, err := x.mux(agent)
	w.must(err)
	w.must(x.send(in, attachFrame(&schema.Attach{Channel: 1, Session: "the good one"})))
	fail := func(err error) {
		if ctx.Err() == nil {
			s.mu.Lock()
			s.failed = errors.Join(s.failed, err)
			s.mu.Unlock()
		}
	}
	s.over.Go(func() {
		tick := time.NewTicker(tokenEvery)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
			case <-ctx.Done():
				return
			}
			n := s.n.Add(1)
			s.sent[n].Store(time.Now().UnixNano())
			if err := x.send(out, publishFrame(&schema.Publish{Session: "the good one", Envelopes: []*schema.Envelope{Token("good ")}})); err != nil {
				fail(fmt.Errorf("publishing: %w", err))
				return
			}
		}
	})
	s.over.Go(func() {
		fail(x.frames(out, func(f *schema.ServerFrame) bool {
			if f.GetPublished() == nil {
				fail(fmt.Errorf("its publisher was told %v", f))
			}
			return false
		}))
	})
	s.over.Go(func() {
		at := uint64(0)
		fail(x.frames(in, func(f *schema.ServerFrame) bool {
			now := time.Now().UnixNano()
			s.mu.Lock()
			defer s.mu.Unlock()
			for _, e := range f.GetEvents().GetEnvelopes() {
				if at++; e.GetSeq() != at {
					s.failed = errors.Join(s.failed, fmt.Errorf("seq %d came where %d is next", e.GetSeq(), at))
				}
				s.samples = append(s.samples, time.Duration(now-s.sent[e.GetSeq()].Load()))
			}
			return false
		}))
	})
	w.closers = append(w.closers, func() {
		stop()
		s.over.Wait()
	})
	return s
}

// measure returns the p99 of the latency of what comes while something happens.
func (s *goodSession) measure(happens func()) time.Duration {
	s.mu.Lock()
	s.samples = nil
	s.mu.Unlock()
	happens()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.failed != nil {
		s.w.t.Fatalf("the good session: %v", s.failed)
	}
	if len(s.samples) == 0 {
		s.w.t.Fatal("the good session stood still")
	}
	slices.Sort(s.samples)
	return s.samples[len(s.samples)*99/100]
}

// TestViolatorsCostOnlyThemselves: clients that violate each limit in turn, on connections of their own, are told what they did and counted; a session that streams through the same edge keeps its latency,
// its order and its connections.
//
// What is measured is the p99 from sending to receiving over sockets of this machine, in rounds without violators and rounds with them, one after the other, and the medians of both are compared: so a noisy
// neighbour on the machine meets both. The violators come at a pace, as in a deployment, for they run on the same processors as the edge: all at once they would measure what a machine does that has
// nothing left, and not whether the edge lets one client's work wait for another's. The long form, whose bound is narrow, is measured anew where the machine had other things to do; an edge that lets
// them wait does so each time.
func TestViolatorsCostOnlyThemselves(t *testing.T) {
	connections, rounds, round, attempts := 60, 3, 500*time.Millisecond, 1
	if slow() {
		connections, rounds, round, attempts = 1000, 5, 5*time.Second, 3
	}
	w := New(t, Config{
		Edges: 1, Durability: schema.Durability_DURABILITY_OS,
		Gateway: func(c *gateway.Config) {
			c.Limits = gateway.DefaultLimits()
			c.Limits.Sessions, c.Limits.UserConnections = limitSessions, limitPlaces
			c.MaxInFlight, c.HelloTimeout, c.WriteTimeout = limitInFlight, limitHello, limitWrite
		},
	})
	e := w.Edge(0)
	addr := e.listenTCP()
	history := w.Join(e, ProtoSocket, longSession)
	for range historyInBytes / (100 * pieceInBytes) {
		var some []*schema.Envelope
		for range 100 {
			some = append(some, Token(strings.Repeat("x", pieceInBytes)))
		}
		history.Put(longSession, some...)
	}

	kinds := violators()
	counts := func() (of map[string]float64) {
		of = make(map[string]float64)
		for _, k := range kinds {
			if k.limit != "" {
				of["limit="+k.limit] = e.Counted("tidemark_gateway_limits_exceeded_total", "limit="+k.limit)
			}
			if k.ends != "" {
				of["reason="+k.ends] = e.Counted("tidemark_gateway_closed_connections_total", "reason="+k.ends)
			}
		}
		return of
	}
	before, want := counts(), make(map[string]float64)
	cut := e.Counted("tidemark_gateway_closed_connections_total", "reason=peer_dead")
	good := w.goodSession(addr)
	good.measure(func() { w.Sleep(round / 2) }) // it warms up

	var working sync.WaitGroup
	came := 0
	come := func() {
		x := &offender{
			w: w, addr: addr, session: fmt.Sprintf("violated %d", came),
			user: w.tokenOf("", fmt.Sprintf("user %d", came), schema.Role_ROLE_USER, "*"), agent: w.Token(schema.Role_ROLE_AGENT, "*"),
		}
		kind := kinds[came%len(kinds)]
		came++
		want["limit="+kind.limit]++
		want["reason="+kind.ends]++
		cutAll := cut + want["reason=peer_dead"]
		x.deaf = func() bool {
			return e.Counted("tidemark_gateway_closed_connections_total", "reason=peer_dead") >= cutAll
		}
		working.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), violatorsWait)
			defer cancel()
			x.ctx = ctx
			if err := kind.violate(x); err != nil {
				t.Errorf("%s: %v", kind.name, err)
			}
			for _, c := range x.sockets {
				_ = c.CloseNow()
			}
		})
	}
	var undisturbed, disturbed, bound time.Duration
	for attempt := 1; attempt == 1 || attempt <= attempts && disturbed > bound; attempt++ {
		var calm, violated []time.Duration
		for range rounds {
			calm = append(calm, good.measure(func() { w.Sleep(round) }))
			violated = append(violated, good.measure(func() {
				pace := time.NewTicker(round * time.Duration(rounds) / time.Duration(connections))
				defer pace.Stop()
				for range connections / rounds {
					come()
					<-pace.C
				}
			}))
			working.Wait()
		}
		slices.Sort(calm)
		slices.Sort(violated)
		undisturbed, disturbed = calm[rounds/2], violated[rounds/2]
		t.Logf("%d violators; p99 of the good session: %v undisturbed, %v beside them; medians %s and %s", came, calm, violated, undisturbed, disturbed)
		// Below some milliseconds a scheduler's time slice is what is measured. The short form, on whatever else a machine tests at the same time, says only that nobody waits for one who reads nothing.
		bound = max(2*undisturbed, 10*time.Millisecond)
		if !slow() {
			bound = max(10*undisturbed, limitWrite)
		}
	}
	// A connection is counted when the edge has let go of it, a moment after its peer was told.
	for what, n := range want {
		if _, word, _ := strings.Cut(what, "="); word != "" {
			w.Until(fmt.Sprintf("%v violators are counted with %s", n, what), func() bool { return counts()[what]-before[what] >= n })
		}
	}
	if disturbed > bound {
		t.Errorf("beside violators the p99 is %s, undisturbed %s", disturbed, undisturbed)
	}
}
