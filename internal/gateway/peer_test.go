package gateway

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/proto"

	"tidemark/broker"
	"tidemark/internal/auth"
	"tidemark/schema"
)

// world is a gateway on a log in memory, inside a bubble.
type world struct {
	*testing.T
	g   *Gateway
	log *broker.MemoryLog
	// cuts ends the connections that are left when the test ends, also where it failed.
	cuts []context.CancelFunc
}

// bubble runs a test with a world of its own under fake time. What change does to the configuration comes before New.
func bubble(t *testing.T, change func(*Config), test func(w *world)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := &world{T: t, log: broker.NewMemoryLog()}
		cfg := Config{Log: w.log, Verify: verify, Version: "test"}
		if change != nil {
			change(&cfg)
		}
		var err error
		if w.g, err = New(cfg); err != nil {
			t.Fatal(err)
		}
		defer func() {
			for _, cut := range w.cuts {
				cut()
			}
		}()
		test(w)
	})
}

// verify knows tokens of the form role:sessions, for tenant default.
func verify(_ context.Context, token string) (*auth.Principal, error) {
	role, sessions, ok := strings.Cut(token, ":")
	if !ok || auth.ParseRole(role) == schema.Role_ROLE_UNSPECIFIED {
		return nil, schema.Refuse(schema.Code_CODE_UNAUTHENTICATED, "The token is not one of the test's.")
	}
	return principal(role, strings.Split(sessions, ",")...), nil
}

func principal(role string, sessions ...string) *auth.Principal {
	return &auth.Principal{Subject: "somebody", Tenant: "default", Role: auth.ParseRole(role), Sessions: sessions}
}

// peer is the other end of a connection: a script of what a client sends and wants to see.
type peer struct {
	*testing.T
	in     chan []byte // to the gateway
	out    chan []byte // from it; nobody reads ahead
	eof    chan struct{}
	lost   chan error
	closed chan struct{}
	once   sync.Once
	served chan error
	cancel context.CancelFunc

	// Set before closed is.
	code    schema.Code
	message string
	// sends counts calls of Send.
	sends atomic.Int64
	// largest is the most bytes in one of them.
	largest atomic.Int64

	proto Protocol
}

func (p *peer) Receive(ctx context.Context) ([]byte, error) {
	select {
	case b := <-p.in:
		return b, nil
	case <-p.eof:
		return nil, io.EOF
	case err := <-p.lost:
		return nil, err
	case <-p.closed:
		return nil, errors.New("closed")
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (p *peer) Send(ctx context.Context, messages [][]byte) error {
	p.sends.Add(1)
	size := 0
	for _, m := range messages {
		size += len(m)
	}
	p.largest.Store(max(p.largest.Load(), int64(size)))
	for _, m := range messages {
		select {
		case p.out <- append([]byte(nil), m...):
		case <-p.closed:
			return errors.New("closed")
		}
	}
	return nil
}

func (p *peer) Close(code schema.Code, message string) {
	p.once.Do(func() {
		p.code, p.message = code, message
		close(p.closed)
	})
}

// connect opens a connection. With a nil principal it says hello later.
func (w *world) connect(who *auth.Principal) *peer {
	return w.dial(Peer{Protocol: Proto, Principal: who})
}

// agent is a connection that may do everything that agents may.
func (w *world) agent() *peer { return w.connect(principal("agent", "*")) }

func (w *world) dial(as Peer) *peer {
	p := &peer{
		T: w.T, in: make(chan []byte), out: make(chan []byte), eof: make(chan struct{}), lost: make(chan error, 1), closed: make(chan struct{}), served: make(chan error, 1), proto: as.Protocol,
	}
	as.Transport = p
	ctx, cancel := context.WithCancel(w.Context())
	p.cancel = cancel
	w.cuts = append(w.cuts, cancel)
	go func() { p.served <- w.g.Serve(ctx, as) }()
	return p
}

// sendRaw sends a message; the gateway must take it within a minute.
func (p *peer) sendRaw(msg []byte) {
	p.Helper()
	select {
	case p.in <- msg:
	case <-p.closed:
		p.Fatalf("the connection was closed: %s: %s", p.code, p.message)
	case <-time.After(time.Minute):
		p.Fatal("the gateway does not read")
	}
}

func (p *peer) send(m proto.Message) {
	p.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		p.Fatal(err)
	}
	p.sendRaw(b)
}

func (p *peer) hello(token string) {
	p.Helper()
	p.send(&schema.ClientFrame{Frame: &schema.ClientFrame_Hello{Hello: &schema.Hello{Token: token, Client: "test"}}})
}

func (p *peer) attach(a *schema.Attach) {
	p.Helper()
	p.send(&schema.ClientFrame{Frame: &schema.ClientFrame_Attach{Attach: a}})
}

func (p *peer) detach(channel uint32) {
	p.Helper()
	p.send(&schema.ClientFrame{Frame: &schema.ClientFrame_Detach{Detach: &schema.Detach{Channel: channel}}})
}

func (p *peer) publish(m *schema.Publish) {
	p.Helper()
	p.send(&schema.ClientFrame{Frame: &schema.ClientFrame_Publish{Publish: m}})
}

// token publishes one token to a session.
func (p *peer) token(id uint64, session, text string) {
	p.Helper()
	p.publish(&schema.Publish{PublishId: id, Session: session, Envelopes: []*schema.Envelope{tokenOf(text)}})
}

func tokenOf(text string) *schema.Envelope {
	return &schema.Envelope{Payload: &schema.Envelope_Token{Token: &schema.Token{MessageId: "m1", Text: text}}}
}

// nextRaw is the next message.
func (p *peer) nextRaw() []byte {
	p.Helper()
	select {
	case b := <-p.out:
		return b
	case <-p.closed:
		// What was sent before is taken first.
		select {
		case b := <-p.out:
			return b
		default:
			p.Fatalf("the connection was closed: %s: %s", p.code, p.message)
		}
	case <-time.After(time.Minute):
		p.Fatal("nothing came")
	}
	return nil
}

func (p *peer) next() *schema.ServerFrame {
	p.Helper()
	f := new(schema.ServerFrame)
	if err := proto.Unmarshal(p.nextRaw(), f); err != nil {
		p.Fatal(err)
	}
	return f
}

// wantNothing checks that the gateway has nothing to say.
func (p *peer) wantNothing() {
	p.Helper()
	synctest.Wait()
	select {
	case b := <-p.out:
		f := new(schema.ServerFrame)
		_ = proto.Unmarshal(b, f)
		p.Fatalf("want nothing, got %v", f)
	default:
	}
}

// want takes the next frame, which must be of type T.
func want[T any](p *peer) T {
	p.Helper()
	f := p.next()
	m, ok := f.GetFrame().(T)
	if !ok {
		p.Fatalf("want %T, got %v", m, f)
	}
	return m
}

func (p *peer) wantAttached(channel uint32, head uint64) *schema.Attached {
	p.Helper()
	a := want[*schema.ServerFrame_Attached](p).Attached
	if a.GetChannel() != channel || a.GetHeadSeq() != head {
		p.Fatalf("attached to channel %d at head %d, want %d at %d", a.GetChannel(), a.GetHeadSeq(), channel, head)
	}
	return a
}

func (p *peer) wantCaughtUp(channel uint32, through uint64) {
	p.Helper()
	c := want[*schema.ServerFrame_CaughtUp](p).CaughtUp
	if c.GetChannel() != channel || c.GetThroughSeq() != through {
		p.Fatalf("channel %d caught up at %d, want %d at %d", c.GetChannel(), c.GetThroughSeq(), channel, through)
	}
}

// wantTexts takes events of a channel until the texts of the tokens in them are these, and checks that their seqs have no gap.
func (p *peer) wantTexts(channel uint32, from uint64, texts ...string) {
	p.Helper()
	seq := from
	for len(texts) > 0 {
		e := want[*schema.ServerFrame_Events](p).Events
		if e.GetChannel() != channel {
			p.Fatalf("events of channel %d, want %d", e.GetChannel(), channel)
		}
		for _, env := range e.GetEnvelopes() {
			if len(texts) == 0 || env.GetSeq() != seq || env.GetToken().GetText() != texts[0] {
				p.Fatalf("got seq %d %q, want seq %d %q", env.GetSeq(), env.GetToken().GetText(), seq, texts)
			}
			seq++
			texts = texts[1:]
		}
		if e.GetThroughSeq() != seq-1 {
			p.Fatalf("through %d after seq %d", e.GetThroughSeq(), seq-1)
		}
	}
}

// wantAck takes acknowledgements until this publish has its place.
func (p *peer) wantAck(id, first, last uint64) *schema.Ack {
	p.Helper()
	pub := want[*schema.ServerFrame_Published](p).Published
	if pub.GetDurability() != schema.Durability_DURABILITY_MEMORY || len(pub.GetAcks()) != 1 {
		p.Fatalf("got %v, want one ack with the class of the log", pub)
	}
	a := pub.GetAcks()[0]
	if a.GetPublishId() != id || a.GetFirstSeq() != first || a.GetLastSeq() != last {
		p.Fatalf("got %v, want publish %d at %d–%d", a, id, first, last)
	}
	return a
}

func (p *peer) wantRejected(id uint64, code schema.Code, says string) *schema.Rejected {
	p.Helper()
	r := want[*schema.ServerFrame_Rejected](p).Rejected
	if r.GetPublishId() != id || r.GetCode() != code || !strings.Contains(r.GetMessage(), says) || r.GetRetryable() != code.Rule().Retryable {
		p.Fatalf("got %v, want %s for publish %d that says %q", r, code.Word(), id, says)
	}
	return r
}

func (p *peer) wantError(channel uint32, code schema.Code, says string) *schema.ErrorFrame {
	p.Helper()
	e := want[*schema.ServerFrame_Error](p).Error
	if e.GetChannel() != channel || e.GetCode() != code || !strings.Contains(e.GetMessage(), says) || e.GetReconnect() != code.Rule().Reconnect {
		p.Fatalf("got %v, want %s for channel %d that says %q", e, code.Word(), channel, says)
	}
	return e
}

// wantClosed waits for the end of the connection and of all that Serve started.
func (p *peer) wantClosed(code schema.Code, says string) error {
	p.Helper()
	select {
	case <-p.closed:
	case b := <-p.out:
		f := new(schema.ServerFrame)
		_ = proto.Unmarshal(b, f)
		p.Fatalf("want the end, got %v %q", f, b)
	case <-time.After(time.Hour):
		p.Fatal("the connection was not closed")
	}
	if p.code != code || !strings.Contains(p.message, says) {
		p.Fatalf("closed with %s %q, want %s that says %q", p.code.Word(), p.message, code.Word(), says)
	}
	select {
	case err := <-p.served:
		return err
	case <-time.After(time.Minute):
		p.Fatal("Serve has not returned")
	}
	return nil
}

// wantFailed is the end that a client's fault has: an error frame, then the close with the same code.
func (p *peer) wantFailed(code schema.Code, says string) {
	p.Helper()
	p.wantError(0, code, says)
	if err := p.wantClosed(code, says); schema.CodeOf(err) != code {
		p.Fatalf("Serve returned %v", err)
	}
}

// leave closes the connection as a client does.
func (p *peer) leave() {
	p.Helper()
	p.lost <- ErrPeerClosed
	if err := p.wantClosed(schema.Code_CODE_UNSPECIFIED, ""); err != nil {
		p.Fatal(err)
	}
}

func texts(n int) []string {
	all := make([]string, n)
	for i := range all {
		all[i] = fmt.Sprint("t", i+1)
	}
	return all
}

// fill appends tokens to a session, beside the gateway.
func (w *world) fill(session string, all ...string) {
	w.Helper()
	stamp := schema.NewStamp(&schema.Source{Subject: "writer", Role: schema.Role_ROLE_AGENT})
	for _, text := range all {
		a, err := stamp.AcceptEnvelope(tokenOf(text), time.Now())
		if err != nil {
			w.Fatal(err)
		}
		id := schema.SessionID{Tenant: "default", Name: session}
		if _, err := broker.Append(w.Context(), w.log, id, broker.Submission{Envelopes: []schema.Accepted{a}}); err != nil {
			w.Fatal(err)
		}
	}
}

func attachFrame(a *schema.Attach) []byte {
	b, err := proto.Marshal(&schema.ClientFrame{Frame: &schema.ClientFrame_Attach{Attach: a}})
	if err != nil {
		panic(err)
	}
	return b
}
