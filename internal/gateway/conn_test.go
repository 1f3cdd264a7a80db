package gateway

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/proto"

	"tidemark/broker"
	"tidemark/schema"
)

func TestHello(t *testing.T) {
	bubble(t, nil, func(w *world) {
		p := w.connect(nil)
		p.hello("agent:a*")
		m := want[*schema.ServerFrame_Welcome](p).Welcome
		if m.GetEdge() != "memory" || m.GetVersion() != "test" || m.GetDurability() != schema.Durability_DURABILITY_MEMORY || m.GetTenant() != "default" ||
			m.GetPrincipal().GetSubject() != "somebody" || m.GetPrincipal().GetRole() != schema.Role_ROLE_AGENT {
			t.Errorf("the welcome says %v", m)
		}
		limits := &schema.Limits{MaxEnvelopeBytes: 1 << 20, MaxPublishEnvelopes: 1000, MaxAttachedSessions: 1000, MaxFrameBytes: 1<<20 + 4<<10, MaxInFlightBytes: 4 << 20}
		if !proto.Equal(m.GetLimits(), limits) {
			t.Errorf("the welcome's limits are %v, want %v", m.GetLimits(), limits)
		}
		p.token(1, "abc", "hi")
		p.wantAck(1, 1, 1)
		p.leave()
	})
}

func TestHelloIsOptionalWithToken(t *testing.T) {
	bubble(t, nil, func(w *world) {
		p := w.agent()
		p.token(1, "s", "hi")
		p.wantAck(1, 1, 1)
		p.hello("")
		p.wantFailed(schema.Code_CODE_INVALID_MESSAGE, "Hello must be the first frame")

		// As the first frame it is welcome, and cannot change who the peer is.
		p = w.connect(principal("user", "s"))
		p.hello("agent:*")
		if m := want[*schema.ServerFrame_Welcome](p).Welcome; m.GetPrincipal().GetRole() != schema.Role_ROLE_USER {
			t.Errorf("hello made the user %v", m.GetPrincipal())
		}
		p.leave()
	})
}

func TestHelloRefused(t *testing.T) {
	bubble(t, nil, func(w *world) {
		p := w.connect(nil)
		p.hello("nonsense")
		p.wantFailed(schema.Code_CODE_UNAUTHENTICATED, "not one of the test's")

		p = w.connect(nil)
		p.token(1, "s", "hi")
		p.wantFailed(schema.Code_CODE_UNAUTHENTICATED, "first frame must be hello")

		p = w.connect(nil)
		p.attach(&schema.Attach{Channel: 1, Session: "s"})
		p.wantFailed(schema.Code_CODE_UNAUTHENTICATED, "first frame must be hello")
		if _, err := w.log.Session(w.Context(), schema.SessionID{Tenant: "default", Name: "s"}); schema.CodeOf(err) != schema.Code_CODE_SESSION_NOT_FOUND {
			t.Errorf("a peer without a token published: %v", err)
		}
	})
}

func TestHelloComesInTime(t *testing.T) {
	bubble(t, nil, func(w *world) {
		began := time.Now()
		p := w.connect(nil)
		p.wantFailed(schema.Code_CODE_UNAUTHENTICATED, "within 10s")
		if took := time.Since(began); took != 10*time.Second {
			t.Errorf("it was closed after %s", took)
		}
		p = w.connect(nil)
		time.Sleep(10*time.Second - 1)
		p.hello("agent:*")
		want[*schema.ServerFrame_Welcome](p)
		time.Sleep(time.Hour)
		p.wantNothing()
		p.leave()
	})
}

func TestPing(t *testing.T) {
	bubble(t, nil, func(w *world) {
		p := w.agent()
		ping := func(data string) {
			p.send(&schema.ClientFrame{Frame: &schema.ClientFrame_Ping{Ping: &schema.Ping{Data: []byte(data)}}})
		}
		ping("are you there?")
		if got := want[*schema.ServerFrame_Pong](p).Pong.GetData(); string(got) != "are you there?" {
			t.Errorf("the pong says %q", got)
		}
		ping(strings.Repeat("x", 126))
		p.wantFailed(schema.Code_CODE_INVALID_MESSAGE, "126 bytes")
	})
}

// TestPingsUnread: a peer that asks without reading the answers is not read for ever.
func TestI8_PingsUnread(t *testing.T) {
	bubble(t, nil, func(w *world) {
		p := w.agent()
		ping, _ := proto.Marshal(&schema.ClientFrame{Frame: &schema.ClientFrame_Ping{Ping: &schema.Ping{Data: []byte("x")}}})
		sent := 0
		for {
			synctest.Wait()
			select {
			case p.in <- ping:
				sent++
				continue
			default:
			}
			break
		}
		if sent < maxReplies || sent > 3*maxReplies {
			t.Errorf("%d pings were taken while no pong was read, want about %d", sent, maxReplies)
		}
		for range sent {
			want[*schema.ServerFrame_Pong](p)
		}
		p.leave()
	})
}

func TestBadFrames(t *testing.T) {
	for _, c := range []struct {
		name string
		msg  string
		code schema.Code
		says string
	}{
		{"empty", "", schema.Code_CODE_INVALID_MESSAGE, "no frame"},
		{"text", "hello", schema.Code_CODE_INVALID_MESSAGE, "not a well-formed frame"},
		{"cut publish", "\x0a\x05ab", schema.Code_CODE_INVALID_MESSAGE, "not a well-formed frame"},
		{"publish with a cut field", "\x0a\x02\x12\x05", schema.Code_CODE_INVALID_MESSAGE, "not a well-formed frame"},
		{"publish with a cut envelope", "\x0a\x03\x7a\x09x", schema.Code_CODE_INVALID_MESSAGE, "not a well-formed frame"},
		{"publish with an endless number", "\x0a\x0b\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", schema.Code_CODE_INVALID_MESSAGE, "not a well-formed frame"},
		{"of a later version", "\xa2\x06\x00", schema.Code_CODE_INVALID_MESSAGE, "no frame that this version"},
		{"attach without a channel", "\x1a\x03\x12\x01s", schema.Code_CODE_INVALID_MESSAGE, "needs a channel"},
		{"detach without a channel", "\x22\x00", schema.Code_CODE_INVALID_MESSAGE, "needs the channel"},
		{"too large", strings.Repeat("x", schema.MaxFrameBytes+1), schema.Code_CODE_TOO_LARGE, "1052673 bytes"},
	} {
		t.Run(c.name, func(t *testing.T) {
			bubble(t, nil, func(w *world) {
				other := w.agent()
				p := w.agent()
				p.sendRaw([]byte(c.msg))
				p.wantFailed(c.code, c.says)
				other.token(1, "s", "untouched")
				other.wantAck(1, 1, 1)
				other.leave()
			})
		})
	}
}

// TestBadFrameAnswersWhatCameBefore: what was published before the fault is acknowledged before the end.
func TestBadFrameAnswersWhatCameBefore(t *testing.T) {
	bubble(t, nil, func(w *world) {
		held := make(chan struct{})
		w.g.cfg.Log = &heldLog{Log: w.log, held: held}
		p := w.agent()
		p.token(1, "s", "hi")
		p.sendRaw([]byte("hello"))
		time.Sleep(time.Second)
		p.wantNothing()
		close(held)
		p.wantAck(1, 1, 1)
		p.wantFailed(schema.Code_CODE_INVALID_MESSAGE, "not a well-formed")
	})
}

// TestCloseDoesNotWaitForEver: an append that is never answered holds a connection that ends for CloseTimeout.
func TestCloseDoesNotWaitForEver(t *testing.T) {
	bubble(t, nil, func(w *world) {
		held := make(chan struct{})
		w.g.cfg.Log = &heldLog{Log: w.log, held: held}
		p := w.agent()
		p.token(1, "s", "hi")
		p.sendRaw([]byte("hello"))
		began := time.Now()
		p.wantFailed(schema.Code_CODE_INVALID_MESSAGE, "not a well-formed")
		if took := time.Since(began); took != DefaultCloseTimeout {
			t.Errorf("it took %s", took)
		}
		close(held)
	})
}

// heldLog answers no publish until held is closed.
type heldLog struct {
	broker.Log
	held chan struct{}
}

func (l *heldLog) Publish(ctx context.Context, id schema.SessionID, s *broker.Submission) {
	go func() {
		<-l.held
		l.Log.Publish(ctx, id, s)
	}()
}

func TestPeerLeaves(t *testing.T) {
	bubble(t, nil, func(w *world) {
		p := w.agent()
		p.attach(&schema.Attach{Channel: 1, Session: "s"})
		p.wantAttached(1, 0)
		p.wantCaughtUp(1, 0)
		p.leave()

		p = w.agent()
		p.attach(&schema.Attach{Channel: 1, Session: "s"})
		p.wantAttached(1, 0)
		lost := errors.New("connection reset")
		p.lost <- lost // while the writer has something to say
		synctest.Wait()
		if err := p.wantClosed(schema.Code_CODE_UNSPECIFIED, ""); !errors.Is(err, lost) {
			t.Errorf("Serve returned %v", err)
		}

		p = w.agent()
		p.lost <- schema.Refuse(schema.Code_CODE_PEER_DEAD, "no pong")
		if err := p.wantClosed(schema.Code_CODE_PEER_DEAD, "no pong"); schema.CodeOf(err) != schema.Code_CODE_PEER_DEAD {
			t.Errorf("Serve returned %v", err)
		}

		p = w.agent()
		p.lost <- schema.Refuse(schema.Code_CODE_TOO_LARGE, "much too large")
		p.wantFailed(schema.Code_CODE_TOO_LARGE, "much too large")
	})
}

// TestHalfClosed: who has no more to say gets the answers to what was said, and what it follows goes on.
func TestHalfClosed(t *testing.T) {
	bubble(t, nil, func(w *world) {
		held := make(chan struct{})
		w.g.cfg.Log = &heldLog{Log: w.log, held: held}
		p := w.agent()
		p.token(1, "s", "hi")
		close(p.eof)
		time.Sleep(time.Minute)
		p.wantNothing()
		close(held)
		p.wantAck(1, 1, 1)
		if err := p.wantClosed(schema.Code_CODE_UNSPECIFIED, ""); err != nil {
			t.Errorf("Serve returned %v", err)
		}

		p = w.agent()
		p.attach(&schema.Attach{Channel: 1, Session: "s"})
		close(p.eof)
		p.wantAttached(1, 1)
		p.wantTexts(1, 1, "hi")
		p.wantCaughtUp(1, 1)
		time.Sleep(time.Minute)
		p.wantNothing()
		w.fill("s", "you")
		p.wantTexts(1, 2, "you")
		if err := w.log.Delete(w.Context(), schema.SessionID{Tenant: "default", Name: "s"}); err != nil {
			t.Fatal(err)
		}
		p.wantError(1, schema.Code_CODE_SESSION_DELETED, "was deleted")
		if err := p.wantClosed(schema.Code_CODE_UNSPECIFIED, ""); err != nil {
			t.Errorf("Serve returned %v", err)
		}
	})
}

// TestPeerCloses: who closes and reads until it is answered gets the answers to what it said, and then its own; what it follows ends.
func TestPeerCloses(t *testing.T) {
	bubble(t, nil, func(w *world) {
		held := make(chan struct{})
		w.g.cfg.Log = &heldLog{Log: w.log, held: held}
		p := w.agent()
		p.attach(&schema.Attach{Channel: 1, Session: "other"})
		p.wantAttached(1, 0)
		p.wantCaughtUp(1, 0)
		p.token(1, "s", "hi")
		p.lost <- ErrPeerClosing
		synctest.Wait()
		w.fill("other", "not any more")
		p.wantNothing()
		close(held)
		p.wantAck(1, 1, 1)
		if err := p.wantClosed(schema.Code_CODE_UNSPECIFIED, ""); err != nil {
			t.Errorf("Serve returned %v", err)
		}
	})
	// Neither what is not answered nor what is not read holds it for longer than [Config.CloseTimeout].
	bubble(t, nil, func(w *world) {
		held := make(chan struct{})
		w.g.cfg.Log = &heldLog{Log: w.log, held: held}
		p := w.agent()
		p.token(1, "s", "hi")
		unread := w.agent()
		w.fill("s", "you")
		unread.attach(&schema.Attach{Channel: 1, Session: "s"})
		synctest.Wait()
		began := time.Now()
		for _, p := range []*peer{p, unread} {
			p.lost <- ErrPeerClosing
		}
		for _, p := range []*peer{p, unread} {
			<-p.closed
			if took := time.Since(began); took != DefaultCloseTimeout {
				t.Errorf("it was closed after %s", took)
			}
			if err := p.wantClosed(schema.Code_CODE_UNSPECIFIED, ""); err != nil {
				t.Errorf("Serve returned %v", err)
			}
		}
		close(held)
	})
}

// TestStuckPeer: a peer that takes nothing is closed with a reason, not waited for.
func TestI8_StuckPeer(t *testing.T) {
	bubble(t, nil, func(w *world) {
		p := w.agent()
		began := time.Now()
		p.token(1, "s", "hi")
		<-p.closed
		if took := time.Since(began); took != DefaultWriteTimeout {
			t.Errorf("it was closed after %s", took)
		}
		if err := p.wantClosed(schema.Code_CODE_PEER_DEAD, "taken nothing"); schema.CodeOf(err) != schema.Code_CODE_PEER_DEAD {
			t.Errorf("Serve returned %v", err)
		}
	})
}

// TestCut: when the context ends, so does the connection, wherever it blocks.
func TestCut(t *testing.T) {
	bubble(t, nil, func(w *world) {
		p := w.agent()
		synctest.Wait()
		p.cancel()
		if err := p.wantClosed(schema.Code_CODE_GOING_AWAY, "attach elsewhere"); schema.CodeOf(err) != schema.Code_CODE_GOING_AWAY {
			t.Errorf("Serve returned %v", err)
		}
		p = w.agent()
		p.token(1, "s", "blocks the writer")
		synctest.Wait()
		p.cancel()
		synctest.Wait()
		if err := p.wantClosed(schema.Code_CODE_GOING_AWAY, "attach elsewhere"); schema.CodeOf(err) != schema.Code_CODE_GOING_AWAY {
			t.Errorf("Serve returned %v", err)
		}
	})
}

func TestMaxConnections(t *testing.T) {
	bubble(t, func(c *Config) { c.MaxConnections = 2 }, func(w *world) {
		a, b := w.agent(), w.agent()
		synctest.Wait()
		c := w.agent()
		if err := c.wantClosed(schema.Code_CODE_LIMIT_EXCEEDED, "has 2 connections"); err == nil {
			t.Error("Serve returned nil")
		}
		a.leave()
		c = w.agent()
		c.token(1, "s", "hi")
		c.wantAck(1, 1, 1)
		b.leave()
		c.leave()
	})
}

func TestServeChecksThePeer(t *testing.T) {
	bubble(t, nil, func(w *world) {
		for _, c := range []struct {
			peer Peer
			code schema.Code
		}{
			{Peer{Principal: principal("agent", "*")}, schema.Code_CODE_UNSUPPORTED_PROTOCOL},
			{Peer{Protocol: SessionJSON, Session: "s", Follow: new(schema.Attach)}, schema.Code_CODE_UNAUTHENTICATED},
			{Peer{Protocol: ProtoPublish}, schema.Code_CODE_UNAUTHENTICATED},
			{Peer{Protocol: SessionJSON, Principal: principal("agent", "*")}, schema.Code_CODE_INTERNAL},
		} {
			p := w.dial(c.peer)
			if err := p.wantClosed(c.code, ""); schema.CodeOf(err) != c.code {
				t.Errorf("Serve returned %v", err)
			}
		}
	})
}

func TestNewChecksConfig(t *testing.T) {
	if _, err := New(Config{Log: broker.NewMemoryLog()}); err == nil {
		t.Error("a gateway without Verify was made")
	}
	if _, err := New(Config{Verify: verify}); err == nil {
		t.Error("a gateway without Log was made")
	}
	// What the welcome says in 32 bits, and what would not be a bound.
	for name, change := range map[string]func(*Config){
		"in flight, too many bytes": func(c *Config) { c.MaxInFlightBytes = 4096 << 20 },
		"in flight, overflown":      func(c *Config) { c.MaxInFlightBytes = -1 },
		"in flight":                 func(c *Config) { c.MaxInFlight = -1 },
		"connections":               func(c *Config) { c.MaxConnections = Largest + 1 },
		"a burst":                   func(c *Config) { c.Limits.Agent = Rate{1, Largest + 1} },
		"a negative burst":          func(c *Config) { c.Limits.User = Rate{0, -1} },
		"user connections":          func(c *Config) { c.Limits.UserConnections = Largest + 1 },
		"sessions":                  func(c *Config) { c.Limits.Sessions = Largest + 1 },
		"negative sessions":         func(c *Config) { c.Limits.Sessions = -1 },
	} {
		cfg := Config{Log: broker.NewMemoryLog(), Verify: verify, Limits: DefaultLimits()}
		change(&cfg)
		if _, err := New(cfg); err == nil {
			t.Errorf("%s: a gateway was made", name)
		}
	}
	most := Config{
		Log: broker.NewMemoryLog(), Verify: verify, MaxConnections: Largest, MaxInFlight: Largest, MaxInFlightBytes: LargestInFlightBytes,
		Limits: Limits{User: Rate{1, Largest}, Agent: Rate{1, Largest}, UserConnections: Largest, Sessions: Largest},
	}
	if _, err := New(most); err != nil {
		t.Error(err)
	}
}
