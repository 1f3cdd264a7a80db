package gateway

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/encoding/protojson"

	"tidemark/broker"
	"tidemark/internal/auth"
	"tidemark/schema"
)

// leeway of the tests' tokens.
const leeway = 5 * time.Second

// ticket is a token of these tests: who, and for how long from when it is verified. Fake time stands still meanwhile.
type ticket struct {
	Subject, Tenant, Role string
	Sessions              []string
	For                   time.Duration
}

func (k ticket) token() string {
	b, err := json.Marshal(k)
	if err != nil {
		panic(err)
	}
	return string(b)
}

func (k ticket) principal() *auth.Principal {
	expires := time.Now().Add(k.For)
	return &auth.Principal{Subject: k.Subject, Tenant: k.Tenant, Role: auth.ParseRole(k.Role), Sessions: k.Sessions, Expires: expires, Until: expires.Add(leeway)}
}

// tickets is a configuration that believes in them.
func tickets(c *Config) {
	c.Verify = func(_ context.Context, token string) (*auth.Principal, error) {
		var k ticket
		if json.Unmarshal([]byte(token), &k) != nil || auth.ParseRole(k.Role) == schema.Role_ROLE_UNSPECIFIED {
			return nil, schema.Refuse(schema.Code_CODE_UNAUTHENTICATED, "The token is not one of the test's.")
		}
		if k.For <= -leeway {
			return nil, schema.Refuse(schema.Code_CODE_UNAUTHENTICATED, "The token has expired; get a new one.")
		}
		return k.principal(), nil
	}
}

var adas = ticket{Subject: "ada", Tenant: "default", Role: "user", Sessions: []string{"s*"}, For: time.Hour}

// renew sends a new token.
func (p *peer) renew(token string) {
	p.Helper()
	f := &schema.ClientFrame{Frame: &schema.ClientFrame_Refresh{Refresh: &schema.Refresh{Token: token}}}
	switch p.proto {
	case ProtoJSON:
		b, err := protojson.Marshal(f)
		if err != nil {
			p.Fatal(err)
		}
		p.sendRaw(b)
	case SessionJSON:
		b, err := json.Marshal(map[string]any{"type": "refresh", "data": map[string]any{"token": token}})
		if err != nil {
			p.Fatal(err)
		}
		p.sendRaw(b)
	default:
		p.send(f)
	}
}

// listen takes the frames of a session socket until it is closed, and returns them as their types with the codes and times in them.
func (p *peer) listen() <-chan []string {
	all := make(chan []string, 1)
	go func() {
		var said []string
		for {
			select {
			case m := <-p.out:
				var f struct {
					Type string
					Data struct{ Code, Expires string }
				}
				if json.Unmarshal(m, &f) != nil {
					f.Type = string(m)
				}
				said = append(said, strings.TrimSpace(f.Type+" "+f.Data.Code+f.Data.Expires))
			case <-p.closed:
				all <- said
				return
			}
		}
	}()
	return all
}

// TestTokenExpires: on every protocol, a connection ends when its token is no longer accepted, not before, after what is under way; the others go on.
func TestTokenExpires(t *testing.T) {
	for name, as := range map[string]Peer{
		"proto":          {Protocol: Proto},
		"json":           {Protocol: ProtoJSON},
		"append":         {Protocol: ProtoPublish},
		"follow":         {Protocol: Proto, Follow: &schema.Attach{Session: "s"}},
		"half-closed":    {Protocol: Proto, Follow: &schema.Attach{Session: "s"}},
		"session socket": {Protocol: SessionJSON, Session: "s", Follow: &schema.Attach{Session: "s"}},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, tickets, func(w *world) {
				as.Principal = adas.principal()
				began := time.Now()
				p, neighbour := w.dial(as), w.agent()
				if name == "half-closed" {
					// As a gRPC client does that has sent what it follows.
					close(p.eof)
				}
				frames := make(chan int, 1)
				last := ""
				go func() {
					n := 0
					for {
						select {
						case m := <-p.out:
							n++
							last = string(m)
						case <-p.closed:
							frames <- n
							return
						}
					}
				}()
				time.Sleep(time.Hour + leeway - 1)
				synctest.Wait()
				select {
				case <-p.closed:
					w.Fatalf("closed before: %s %s", p.code, p.message)
				default:
				}
				held := make(chan struct{})
				if as.Follow == nil {
					// What is in flight is answered before.
					w.g.cfg.Log = &heldLog{Log: w.log, held: held}
					p.say(1, "s", 1)
				}
				time.Sleep(time.Nanosecond)
				synctest.Wait()
				close(held)
				n := <-frames
				if err := p.wantClosed(schema.Code_CODE_TOKEN_EXPIRED, "A refresh before"); schema.CodeOf(err) != schema.Code_CODE_TOKEN_EXPIRED {
					t.Errorf("Serve returned %v", err)
				}
				if took := time.Since(began); took != time.Hour+leeway {
					t.Errorf("it was closed after %s", took)
				}
				if as.Follow == nil && n != 2 {
					t.Errorf("it was told %d frames, want its acknowledgement and the error", n)
				}
				if !strings.Contains(last, "The connection's token expired") {
					t.Errorf("the last frame is %q", last)
				}
				neighbour.token(1, "s", "x")
				want[*schema.ServerFrame_Published](neighbour)
				neighbour.leave()
			})
		})
	}
}

// TestTokenOfHelloExpires: a token that comes in hello ends its connection too, and the welcome says when.
func TestTokenOfHelloExpires(t *testing.T) {
	bubble(t, func(c *Config) {
		tickets(c)
		c.Limits = DefaultLimits()
	}, func(w *world) {
		p := w.connect(nil)
		time.Sleep(5 * time.Second)
		expires := time.Now().Add(time.Hour)
		p.hello(adas.token())
		m := want[*schema.ServerFrame_Welcome](p).Welcome
		if !m.GetExpires().AsTime().Equal(expires) {
			t.Errorf("the welcome says %v, want %v", m.GetExpires().AsTime(), expires)
		}
		l := m.GetLimits()
		if l.GetEnvelopesPerSecond() != 10 || l.GetBurstEnvelopes() != 20 || l.GetMaxUserConnectionsPerSession() != 5 || l.GetMaxAttachedSessions() != 1000 || l.GetMaxInFlightBytes() != DefaultMaxInFlightBytes {
			t.Errorf("the welcome's limits are %v", l)
		}
		time.Sleep(time.Hour)
		p.wantNothing()
		p.wantError(0, schema.Code_CODE_TOKEN_EXPIRED, "expired")
		if !time.Now().Equal(expires.Add(leeway)) {
			t.Errorf("it ended at %v, want %v", time.Now(), expires.Add(leeway))
		}
		if err := p.wantClosed(schema.Code_CODE_TOKEN_EXPIRED, ""); err == nil {
			t.Error("Serve returned nil")
		}
	})
}

// TestRefresh: a new token keeps the connection, again and again, and its own end is the one that counts.
func TestRefresh(t *testing.T) {
	for _, as := range []Protocol{Proto, ProtoJSON} {
		t.Run(as.String(), func(t *testing.T) {
			bubble(t, tickets, func(w *world) {
				p := w.dial(Peer{Protocol: as, Principal: adas.principal()})
				renew := func(life time.Duration) {
					t.Helper()
					k := adas
					k.For = life
					p.renew(k.token())
					if r := p.frame().GetRefreshed(); !r.GetExpires().AsTime().Equal(time.Now().Add(life)) {
						w.Fatalf("got %v", r)
					}
				}
				for range 5 {
					time.Sleep(time.Hour)
					renew(time.Hour)
				}
				// Within the leeway, too.
				time.Sleep(time.Hour + leeway - 1)
				renew(time.Hour)
				p.say(1, "s", 1)
				p.wantFate(1, schema.Code_CODE_UNSPECIFIED)
				// A shorter one ends it sooner.
				renew(time.Minute)
				last := time.Now()
				time.Sleep(time.Minute)
				p.wantNothing()
				if e := p.frame().GetError(); e.GetCode() != schema.Code_CODE_TOKEN_EXPIRED {
					t.Errorf("got %v", e)
				}
				if took := time.Since(last); took != time.Minute+leeway {
					t.Errorf("it ended after %s", took)
				}
				if err := p.wantClosed(schema.Code_CODE_TOKEN_EXPIRED, ""); err == nil {
					t.Error("Serve returned nil")
				}
			})
		})
	}
}

// TestRefreshOnSessionSocket is the same in the words of the session socket.
func TestRefreshOnSessionSocket(t *testing.T) {
	bubble(t, tickets, func(w *world) {
		p := w.dial(Peer{Protocol: SessionJSON, Principal: adas.principal(), Session: "s", Follow: &schema.Attach{Session: "s"}})
		began := time.Now()
		heard := p.listen()
		time.Sleep(59 * time.Minute)
		p.renew(adas.token())
		said := <-heard
		if took := time.Since(began); took != 119*time.Minute+leeway {
			t.Errorf("it ended after %s", took)
		}
		want := fmt.Sprint([]string{"attached", "refreshed " + began.Add(119*time.Minute).UTC().Format(time.RFC3339), "error token_expired"})
		if fmt.Sprint(said) != want {
			t.Errorf("it said %v, want %v", said, want)
		}
		if err := p.wantClosed(schema.Code_CODE_TOKEN_EXPIRED, ""); err == nil {
			t.Error("Serve returned nil")
		}
	})
}

// TestTokenThatNeverEnds: a principal without times is one whose connection does not end with them, and no frame says that it does.
func TestTokenThatNeverEnds(t *testing.T) {
	never := func(c *Config) {
		c.Verify = func(context.Context, string) (*auth.Principal, error) { return principal("user", "*"), nil }
	}
	for _, as := range []Protocol{Proto, ProtoJSON} {
		bubble(t, never, func(w *world) {
			p := w.dial(Peer{Protocol: as, Principal: principal("user", "*")})
			p.renew("x")
			if r := p.frame().GetRefreshed(); r == nil || r.GetExpires() != nil {
				t.Errorf("got %v", r)
			}
			time.Sleep(1000 * time.Hour)
			p.wantNothing()
			p.leave()
		})
	}
	bubble(t, never, func(w *world) {
		p := w.dial(Peer{Protocol: SessionJSON, Principal: principal("user", "*"), Session: "s", Follow: &schema.Attach{Session: "s"}})
		heard := p.listen()
		p.renew("x")
		time.Sleep(1000 * time.Hour)
		p.leave()
		if said := fmt.Sprint(<-heard); said != "[attached refreshed]" {
			t.Errorf("it said %s", said)
		}
	})
}

// TestRefreshRefused: a token that is not the connection's own ends it; nothing of the old is kept by trying.
func TestRefreshRefused(t *testing.T) {
	other := func(change func(*ticket)) string {
		k := adas
		change(&k)
		return k.token()
	}
	for name, c := range map[string]struct {
		token string
		code  schema.Code
	}{
		"another subject":  {other(func(k *ticket) { k.Subject = "bob" }), schema.Code_CODE_FORBIDDEN},
		"another tenant":   {other(func(k *ticket) { k.Tenant = "acme" }), schema.Code_CODE_FORBIDDEN},
		"a higher role":    {other(func(k *ticket) { k.Role = "admin" }), schema.Code_CODE_FORBIDDEN},
		"a lower role":     {other(func(k *ticket) { k.Role = "analyst" }), schema.Code_CODE_FORBIDDEN},
		"an expired one":   {other(func(k *ticket) { k.For = -time.Minute }), schema.Code_CODE_UNAUTHENTICATED},
		"garbage":          {"garbage", schema.Code_CODE_UNAUTHENTICATED},
		"nothing":          {"", schema.Code_CODE_UNAUTHENTICATED},
		"one of no role":   {other(func(k *ticket) { k.Role = "system" }), schema.Code_CODE_UNAUTHENTICATED},
		"subject in space": {other(func(k *ticket) { k.Subject = "ada " }), schema.Code_CODE_FORBIDDEN},
	} {
		t.Run(name, func(t *testing.T) {
			for _, as := range []Protocol{Proto, ProtoJSON, SessionJSON} {
				bubble(t, tickets, func(w *world) {
					peer := Peer{Protocol: as, Principal: adas.principal()}
					if as == SessionJSON {
						peer.Session, peer.Follow = "s", &schema.Attach{Session: "s"}
					}
					p := w.dial(peer)
					if as == SessionJSON {
						heard := p.listen()
						p.renew(c.token)
						if said := <-heard; fmt.Sprint(said) != fmt.Sprint([]string{"attached", "error " + c.code.Word()}) {
							t.Errorf("it said %v", said)
						}
					} else {
						p.renew(c.token)
						if e := p.frame().GetError(); e.GetCode() != c.code || e.GetChannel() != 0 {
							t.Errorf("got %v", e)
						}
					}
					if err := p.wantClosed(c.code, ""); schema.CodeOf(err) != c.code {
						t.Errorf("Serve returned %v", err)
					}
					if c.token != "" && strings.Contains(p.message, c.token) {
						t.Errorf("the reason shows the token: %q", p.message)
					}
				})
			}
		})
	}
}

// TestRefreshIsNoHello: it renews who is known.
func TestRefreshIsNoHello(t *testing.T) {
	bubble(t, tickets, func(w *world) {
		p := w.connect(nil)
		p.renew(adas.token())
		p.wantFailed(schema.Code_CODE_UNAUTHENTICATED, "first frame must be hello")
	})
}

// TestRefreshCosts: each checks a signature, so they are bounded like envelopes.
func TestRefreshCosts(t *testing.T) {
	bubble(t, func(c *Config) {
		tickets(c)
		c.Limits = DefaultLimits()
	}, func(w *world) {
		p := w.connect(adas.principal())
		for range 20 {
			p.renew(adas.token())
			want[*schema.ServerFrame_Refreshed](p)
		}
		p.renew(adas.token())
		p.wantFailed(schema.Code_CODE_RATE_EXCEEDED, "")
	})
}

// TestRefreshNarrows: what the new token gives no access to ends, in reading and in writing, and nothing else; what it gives access to anew begins.
func TestRefreshNarrows(t *testing.T) {
	bubble(t, tickets, func(w *world) {
		w.fill("s1", "one")
		k := adas
		k.Role, k.Sessions = "agent", []string{"s*"}
		p := w.connect(k.principal())
		for i := range uint32(3) {
			p.attach(&schema.Attach{Channel: i + 1, Session: fmt.Sprint("s", i+1), Start: &schema.Attach_Head{Head: true}})
			want[*schema.ServerFrame_Attached](p)
			want[*schema.ServerFrame_CaughtUp](p)
			p.token(uint64(i), fmt.Sprint("s", i+1), "x")
			for range 2 { // the acknowledgement and the event, in any order
				p.next()
			}
		}
		p.token(4, "t", "x")
		p.wantRejected(4, schema.Code_CODE_FORBIDDEN, "no access")

		k.Sessions = []string{"s2", "t"}
		p.renew(k.token())
		want[*schema.ServerFrame_Refreshed](p)
		ended := map[uint32]bool{}
		for range 2 {
			e := want[*schema.ServerFrame_Error](p).Error
			if e.GetCode() != schema.Code_CODE_FORBIDDEN || e.GetReconnect() != schema.Reconnect_RECONNECT_NO {
				t.Errorf("got %v", e)
			}
			ended[e.GetChannel()] = true
		}
		if !ended[1] || !ended[3] {
			t.Errorf("ended are %v, want channels 1 and 3", ended)
		}
		synctest.Wait()
		if n := gauge(t, w.g.metrics.attachments); n != 1 {
			t.Errorf("%v attachments are left", n)
		}
		w.fill("s1", "unseen")
		w.fill("s3", "unseen")
		p.wantNothing()
		w.fill("s2", "seen")
		if e := want[*schema.ServerFrame_Events](p).Events; e.GetChannel() != 2 {
			t.Errorf("got %v", e)
		}
		p.token(5, "s1", "x")
		p.wantRejected(5, schema.Code_CODE_FORBIDDEN, "no access")
		p.publish(&schema.Publish{PublishId: 6, Channel: 3, Envelopes: []*schema.Envelope{tokenOf("x")}})
		p.wantRejected(6, schema.Code_CODE_INVALID_MESSAGE, "Channel 3")
		p.attach(&schema.Attach{Channel: 1, Session: "s1"})
		p.wantError(1, schema.Code_CODE_FORBIDDEN, "no access")
		p.token(7, "t", "x")
		p.wantAck(7, 1, 1)
		p.leave()
	})
}

// TestRefreshNarrowsWhatIsOpening: also what has not been answered yet.
func TestRefreshNarrowsWhatIsOpening(t *testing.T) {
	bubble(t, tickets, func(w *world) {
		slow := &slowFollows{Log: w.log, held: make(chan struct{})}
		w.g.cfg.Log = slow
		p := w.connect(adas.principal())
		p.attach(&schema.Attach{Channel: 1, Session: "s1"})
		k := adas
		k.Sessions = []string{"s2"}
		p.renew(k.token())
		want[*schema.ServerFrame_Refreshed](p)
		close(slow.held)
		p.wantError(1, schema.Code_CODE_FORBIDDEN, "no access")
		p.wantNothing()
		p.leave()
	})
}

// TestRefreshNarrowsASingleSession: a connection that was made for a session ends with its right to it.
func TestRefreshNarrowsASingleSession(t *testing.T) {
	bubble(t, tickets, func(w *world) {
		p := w.dial(Peer{Protocol: SessionJSON, Principal: adas.principal(), Session: "s", Follow: &schema.Attach{Session: "s"}})
		k := adas
		k.Sessions = []string{"t"}
		heard := p.listen()
		p.renew(k.token())
		if said := <-heard; len(said) != 3 || said[0] != "attached" || said[2] != "error forbidden" {
			t.Errorf("it said %v", said)
		}
		if err := p.wantClosed(schema.Code_CODE_FORBIDDEN, "no access"); err == nil {
			t.Error("Serve returned nil")
		}
	})
}

// slowAsks is a log that does not say where a session stands by now that was empty.
type slowAsks struct {
	broker.Log
	held chan struct{}
}

func (l *slowAsks) Follow(ctx context.Context, id schema.SessionID, o broker.FollowOptions) (*broker.Follower, error) {
	if o.Epoch != "" {
		<-l.held
	}
	return l.Log.Follow(ctx, id, o)
}

// TestRefreshNarrowsWhatBegins: neither where the session stands that has just begun, nor its first envelope, is told behind the answer to the refresh that took it away.
func TestRefreshNarrowsWhatBegins(t *testing.T) {
	bubble(t, tickets, func(w *world) {
		slow := &slowAsks{Log: w.log, held: make(chan struct{})}
		w.g.cfg.Log = slow
		p := w.dial(Peer{Protocol: SessionJSON, Principal: adas.principal(), Session: "s", Follow: &schema.Attach{Session: "s"}})
		heard := p.listen()
		synctest.Wait()
		w.fill("s", "secret")
		synctest.Wait()
		k := adas
		k.Sessions = []string{"t"}
		p.renew(k.token())
		synctest.Wait()
		close(slow.held)
		if said := <-heard; len(said) != 3 || said[0] != "attached" || !strings.HasPrefix(said[1], "refreshed") || said[2] != "error forbidden" {
			t.Errorf("it said %v", said)
		}
		if err := p.wantClosed(schema.Code_CODE_FORBIDDEN, "no access"); err == nil {
			t.Error("Serve returned nil")
		}
	})
}

// TestExpiryLeavesNothing: a connection that ends before its token has no timer left.
func TestExpiryLeavesNothing(t *testing.T) {
	bubble(t, tickets, func(w *world) {
		p := w.connect(adas.principal())
		synctest.Wait()
		var c *conn
		for c = range w.g.conns {
		}
		p.leave()
		if c.expiry == nil || c.expiry.Stop() {
			t.Error("the timer runs")
		}
		// A gateway that refuses the connection started none.
		ctx, cancel := context.WithCancel(w.Context())
		defer cancel()
		if err := w.g.Drain(ctx, "test"); err != nil {
			t.Error(err)
		}
		late := w.connect(adas.principal())
		_ = late.wantClosed(schema.Code_CODE_GOING_AWAY, "")
	})
}
