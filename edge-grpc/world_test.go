package edgegrpc

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"unicode"

	"connectrpc.com/connect"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"tidemark/broker"
	"tidemark/broker/worktest"
	"tidemark/internal/auth"
	"tidemark/internal/gateway"
	"tidemark/schema"
)

// world is an edge over the model of the log, with clients that reach it in memory, in a bubble of fake time.
type world struct {
	*testing.T
	ctx     context.Context
	log     *testLog
	queue   *worktest.Queue
	gateway *gateway.Gateway
	edge    *Edge
	metrics *prometheus.Registry
	l       *pipeListener
	served  chan error

	closers []func()
}

// testLog is the model of the log, whose status a test may change.
type testLog struct {
	*broker.MemoryLog
	away atomic.Bool
}

func (l *testLog) Status() broker.Status {
	s := l.MemoryLog.Status()
	if l.away.Load() {
		s.Ready, s.Reason = false, "The log is away."
	}
	return s
}

var testSecret = []byte("a secret that only tests know, long enough")

// inWorld runs a test in a world of its own.
func inWorld(t *testing.T, test func(w *world)) {
	t.Helper()
	inWorldWith(t, func(*Config, *gateway.Config) {}, test)
}

func inWorldWith(t *testing.T, change func(*Config, *gateway.Config), test func(w *world)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := &world{T: t, log: &testLog{MemoryLog: broker.NewMemoryLog()}, queue: new(worktest.Queue), metrics: prometheus.NewRegistry(), l: newPipeListener(), served: make(chan error, 1)}
		v, err := auth.NewVerifier(auth.Config{Secret: testSecret})
		w.must(err)
		gc := gateway.Config{Log: w.log, Verify: v.Verify, Version: "test", Work: w.queue, Runs: w.queue}
		ec := Config{Log: w.log, Verify: v.Verify, Metrics: w.metrics, Work: w.queue, Runs: w.queue}
		change(&ec, &gc)
		w.gateway, err = gateway.New(gc)
		w.must(err)
		ec.Gateway = w.gateway
		w.edge, err = New(ec)
		w.must(err)
		ctx, stop := context.WithCancel(t.Context())
		w.ctx = ctx
		go func() { w.served <- w.edge.Serve(ctx, w.l) }()
		test(w)
		for _, c := range w.closers {
			c()
		}
		stop()
		if err, ok := <-w.served; ok && err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
}

func (w *world) must(err error) {
	w.Helper()
	if err != nil {
		w.Fatal(err)
	}
}

// token mints a token for these sessions.
func (w *world) token(role schema.Role, sessions ...string) string {
	w.Helper()
	t, err := auth.Mint(testSecret, auth.Principal{Subject: "ada", Tenant: "default", Role: role, Sessions: sessions}, time.Hour)
	w.must(err)
	return t
}

// publish appends tokens of these texts past the edge.
func (w *world) publish(session string, texts ...string) {
	w.Helper()
	for _, text := range texts {
		a, err := schema.NewStamp(&schema.Source{Subject: "agent", Role: schema.Role_ROLE_AGENT}).AcceptEnvelope(tokenOf(text), time.Now())
		w.must(err)
		_, err = broker.Append(w.ctx, w.log, schema.SessionID{Tenant: "default", Name: session}, broker.Submission{Envelopes: []schema.Accepted{a}})
		w.must(err)
	}
}

func tokenOf(text string) *schema.Envelope {
	return &schema.Envelope{Payload: &schema.Envelope_Token{Token: &schema.Token{MessageId: "m1", Text: text}}}
}

// dialect is one way to speak to the edge.
type dialect struct {
	name string
	// http1: not HTTP/2, so no bidirectional streams.
	http1 bool
	// native: grpc-go serves it.
	native bool
	json   bool
	// grpcGo: the client is grpc-go's; otherwise connect-go's with these options.
	grpcGo  bool
	options []connect.ClientOption
}

var dialects = []dialect{
	{name: "grpc by grpc-go", grpcGo: true, native: true},
	{name: "grpc by connect-go", native: true, options: []connect.ClientOption{connect.WithGRPC()}},
	{name: "grpc in json", json: true, options: []connect.ClientOption{connect.WithGRPC()}},
	{name: "grpc-web on http/1", http1: true, options: []connect.ClientOption{connect.WithGRPCWeb()}},
	{name: "grpc-web on http/2", options: []connect.ClientOption{connect.WithGRPCWeb()}},
	{name: "connect on http/1", http1: true},
	{name: "connect on http/2"},
	{name: "connect in json on http/1", http1: true, json: true},
	{name: "connect in json on http/2", json: true},
}

// eachDialect runs a test once for each way to speak to the edge.
func eachDialect(t *testing.T, test func(w *world, d dialect)) {
	for _, d := range dialects {
		t.Run(d.name, func(t *testing.T) { inWorld(t, func(w *world) { test(w, d) }) })
	}
}

// eachBidi runs it for those that carry streams in both directions.
func eachBidi(t *testing.T, test func(w *world, d dialect)) {
	for _, d := range dialects {
		if !d.http1 {
			t.Run(d.name, func(t *testing.T) { inWorld(t, func(w *world) { test(w, d) }) })
		}
	}
}

// client is a connection to the edge in one dialect.
type client struct {
	w     *world
	d     dialect
	token string
	grpc  *grpc.ClientConn
	http  *http.Client
	conns *[]*freezer
	close func()
}

// dial opens a client that carries the token.
func (w *world) dial(d dialect, token string) *client {
	w.Helper()
	k := &client{w: w, d: d, token: token, conns: new([]*freezer)}
	var mu sync.Mutex
	open := func(ctx context.Context) (net.Conn, error) {
		c, err := w.l.dial(ctx)
		if err != nil {
			return nil, err
		}
		mu.Lock()
		defer mu.Unlock()
		*k.conns = append(*k.conns, c)
		return c, nil
	}
	if d.grpcGo {
		cc, err := grpc.NewClient("passthrough:///edge", grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return open(ctx) }))
		w.must(err)
		k.grpc = cc
		k.close = sync.OnceFunc(func() { _ = cc.Close() })
	} else {
		p := new(http.Protocols)
		p.SetHTTP1(d.http1)
		p.SetUnencryptedHTTP2(!d.http1)
		tr := &http.Transport{Protocols: p, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return open(ctx) }}
		k.http = &http.Client{Transport: tr}
		k.close = sync.OnceFunc(func() {
			for _, c := range *k.conns {
				_ = c.Close()
			}
			tr.CloseIdleConnections()
		})
	}
	w.closers = append(w.closers, k.close)
	return k
}

// freeze makes the client fall silent.
func (k *client) freeze() {
	for _, c := range *k.conns {
		c.freeze()
	}
}

func (k *client) rpc(method string) *connect.Client[message, message] {
	name := "proto"
	if k.d.json {
		name = "json"
	}
	if !strings.HasPrefix(method, "/") {
		method = procedure(method)
	}
	options := append([]connect.ClientOption{connect.WithCodec(webCodec{name: name, json: k.d.json})}, k.d.options...)
	return connect.NewClient[message, message](k.http, "http://edge"+method, options...)
}

func (k *client) encode(m proto.Message) *message {
	k.w.Helper()
	if raw, ok := m.(rawMessage); ok {
		return &message{raw.bytes}
	}
	b, err := webCodec{json: k.d.json}.Marshal(m)
	k.w.must(err)
	return &message{b}
}

// rawMessage is sent as its bytes.
type rawMessage struct {
	proto.Message
	bytes []byte
}

func (k *client) decode(m *message, into proto.Message) {
	k.w.Helper()
	if k.d.json {
		k.w.must(protojson.Unmarshal(m.bytes, into))
		return
	}
	k.w.must(proto.Unmarshal(m.bytes, into))
}

// call makes a unary call.
func (k *client) call(method string, req, res proto.Message) error {
	ctx := k.w.ctx
	if k.grpc != nil {
		if k.token != "" {
			ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+k.token)
		}
		var trailer metadata.MD
		err := k.grpc.Invoke(ctx, procedure(method), req, res, grpc.Trailer(&trailer))
		return nativeProblem(err, trailer)
	}
	r := connect.NewRequest(k.encode(req))
	if k.token != "" {
		r.Header().Set("Authorization", "Bearer "+k.token)
	}
	out, err := k.rpc(method).CallUnary(ctx, r)
	if err != nil {
		return webProblem(err)
	}
	k.decode(out.Msg, res)
	return nil
}

// problem is a failed call as a client sees it.
type problem struct {
	grpc    uint32
	word    string
	message string
	detail  proto.Message
}

func (p *problem) Error() string { return p.word + ": " + p.message }

func nativeProblem(err error, trailer metadata.MD) error {
	if err == nil || errors.Is(err, io.EOF) {
		return err
	}
	s := status.Convert(err)
	p := &problem{grpc: uint32(s.Code()), word: strings.Join(trailer.Get(codeTrailer), ","), message: s.Message()}
	for _, d := range s.Details() {
		p.detail, _ = d.(proto.Message)
	}
	return p
}

func webProblem(err error) error {
	e, ok := errors.AsType[*connect.Error](err)
	if !ok || errors.Is(err, io.EOF) {
		return err
	}
	p := &problem{grpc: uint32(e.Code()), word: e.Meta().Get(codeTrailer), message: e.Message()}
	for _, d := range e.Details() {
		p.detail, _ = d.Value()
	}
	return p
}

// conversation is a stream as a test uses it.
type conversation struct {
	w      *world
	send   func(proto.Message) error
	finish func() // sends no more
	recv   func() (*schema.ServerFrame, error)
	cancel context.CancelFunc
}

// follow opens a Follow.
func (k *client) follow(a *schema.Attach) *conversation {
	k.w.Helper()
	if k.grpc != nil {
		s := k.open("Follow", false)
		k.w.must(s.send(a))
		s.finish()
		return s
	}
	ctx, cancel := context.WithCancel(k.w.ctx)
	r := connect.NewRequest(k.encode(a))
	if k.token != "" {
		r.Header().Set("Authorization", "Bearer "+k.token)
	}
	s, err := k.rpc("Follow").CallServerStream(ctx, r)
	if err != nil {
		return &conversation{w: k.w, cancel: cancel, recv: func() (*schema.ServerFrame, error) { return nil, webProblem(err) }}
	}
	return &conversation{w: k.w, cancel: func() { cancel(); _ = s.Close() }, recv: func() (*schema.ServerFrame, error) {
		if !s.Receive() {
			if s.Err() == nil {
				return nil, io.EOF
			}
			return nil, webProblem(s.Err())
		}
		f := new(schema.ServerFrame)
		k.decode(s.Msg(), f)
		return f, nil
	}}
}

// open opens a stream in both directions.
func (k *client) open(method string, clientStreams bool) *conversation {
	k.w.Helper()
	ctx, cancel := context.WithCancel(k.w.ctx)
	if k.grpc != nil {
		if k.token != "" {
			ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+k.token)
		}
		s, err := k.grpc.NewStream(ctx, &grpc.StreamDesc{ClientStreams: clientStreams, ServerStreams: true}, procedure(method))
		k.w.must(err)
		send := func(m proto.Message) error {
			if raw, ok := m.(rawMessage); ok {
				return s.SendMsg(&raw)
			}
			return s.SendMsg(m)
		}
		return &conversation{w: k.w, cancel: cancel, finish: func() { _ = s.CloseSend() }, send: send, recv: func() (*schema.ServerFrame, error) {
			f := new(schema.ServerFrame)
			if err := s.RecvMsg(f); err != nil {
				return nil, nativeProblem(err, s.Trailer())
			}
			return f, nil
		}}
	}
	s := k.rpc(method).CallBidiStream(ctx)
	if k.token != "" {
		s.RequestHeader().Set("Authorization", "Bearer "+k.token)
	}
	// Nil sends the header alone.
	_ = s.Send(nil)
	return &conversation{
		w: k.w, cancel: func() { cancel(); _ = s.CloseRequest(); _ = s.CloseResponse() }, finish: func() { _ = s.CloseRequest() },
		send: func(m proto.Message) error { return s.Send(k.encode(m)) },
		recv: func() (*schema.ServerFrame, error) {
			m, err := s.Receive()
			if err != nil {
				return nil, webProblem(err)
			}
			f := new(schema.ServerFrame)
			k.decode(m, f)
			return f, nil
		},
	}
}

// say sends a client's frame.
func (c *conversation) say(m proto.Message) {
	c.w.Helper()
	c.w.must(c.send(m))
}

// next is the next frame.
func (c *conversation) next() *schema.ServerFrame {
	c.w.Helper()
	f, err := c.recv()
	if err != nil {
		c.w.Fatalf("wanted a frame, got %v", err)
	}
	return f
}

// wantEnd wants the stream to end without a fault.
func (c *conversation) wantEnd() {
	c.w.Helper()
	if f, err := c.recv(); !errors.Is(err, io.EOF) {
		c.w.Fatalf("wanted the end, got %v and %v", f, err)
	}
}

// wantStatus wants the stream to end with the code, after the frames that skip allows.
func (c *conversation) wantStatus(code schema.Code) *problem {
	c.w.Helper()
	for {
		f, err := c.recv()
		if err == nil {
			if f.GetError() != nil || f.GetGoingAway() != nil || f.GetEvents() != nil || f.GetCaughtUp() != nil || f.GetAttached() != nil {
				continue
			}
			c.w.Fatalf("wanted the end with %s, got the frame %v", code.Word(), f)
		}
		return c.w.wantProblem(err, code)
	}
}

// wantTexts wants events with these texts, and no others, in order; it checks that seqs have no gap. It returns the last seq.
func (c *conversation) wantTexts(after uint64, texts ...string) uint64 {
	c.w.Helper()
	for len(texts) > 0 {
		f := c.next()
		if f.GetEvents() == nil {
			if f.GetCaughtUp() != nil {
				continue
			}
			c.w.Fatalf("wanted events with %q, got %v", texts[0], f)
		}
		for _, e := range f.GetEvents().GetEnvelopes() {
			if len(texts) == 0 || e.GetToken().GetText() != texts[0] || e.GetSeq() != after+1 {
				c.w.Fatalf("got seq %d, %q; want seq %d and the rest of %q", e.GetSeq(), e.GetToken().GetText(), after+1, texts)
			}
			after, texts = e.GetSeq(), texts[1:]
		}
	}
	return after
}

// wantProblem wants err to be this code's, in all the places where it stands.
func (w *world) wantProblem(err error, code schema.Code) *problem {
	w.Helper()
	p, ok := errors.AsType[*problem](err)
	if !ok {
		w.Fatalf("got %v, want %s", err, code.Word())
	}
	if p.word != code.Word() || p.grpc != code.Rule().GRPC {
		w.Fatalf("got the status %d with %q (%s), want %d with %q", p.grpc, p.word, p.message, code.Rule().GRPC, code.Word())
	}
	if len(p.message) < 20 || !unicode.IsUpper(rune(p.message[0])) {
		w.Errorf("%q is no sentence", p.message)
	}
	detail := schema.Code_CODE_UNSPECIFIED
	switch d := p.detail.(type) {
	case *schema.ErrorFrame:
		detail = d.GetCode()
	case *schema.Rejected:
		detail = d.GetCode()
	}
	if detail != code {
		w.Errorf("%s: the status's detail is %v", code.Word(), p.detail)
	}
	return p
}

// counter is the value of a metric, summed over the labels that are not given.
func (w *world) counter(name string, labels ...string) float64 {
	w.Helper()
	families, err := w.metrics.Gather()
	w.must(err)
	sum := 0.0
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
	metric:
		for _, m := range f.GetMetric() {
			for i := 0; i < len(labels); i += 2 {
				found := false
				for _, l := range m.GetLabel() {
					found = found || l.GetName() == labels[i] && l.GetValue() == labels[i+1]
				}
				if !found {
					continue metric
				}
			}
			sum += m.GetCounter().GetValue() + m.GetGauge().GetValue()
		}
	}
	return sum
}
