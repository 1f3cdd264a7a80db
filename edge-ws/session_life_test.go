package edgews

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coder/websocket"

	"tidemark/broker"
	"tidemark/internal/auth"
	"tidemark/internal/gateway"
	"tidemark/schema"
)

// slowLog takes its time to say where a session stands: until it is released, from the call with this number on.
type slowLog struct {
	broker.Log
	from, calls atomic.Int64
	held        chan struct{}
}

func (l *slowLog) Follow(ctx context.Context, id schema.SessionID, o broker.FollowOptions) (*broker.Follower, error) {
	if l.calls.Add(1) > l.from.Load() {
		select {
		case <-l.held:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	return l.Log.Follow(ctx, id, o)
}

// brokenLog fails.
type brokenLog struct{ broker.Log }

func (brokenLog) Follow(context.Context, schema.SessionID, broker.FollowOptions) (*broker.Follower, error) {
	return nil, errors.New("the disk is on fire")
}

// slowly runs a test on a slow log.
func slowly(t *testing.T, test func(w *world, slow *slowLog)) {
	t.Helper()
	slow := new(slowLog)
	bubble(t, func(_ *Config, g *gateway.Config) { slow.Log, g.Log = g.Log, slow }, func(w *world) {
		slow.held = make(chan struct{})
		test(w, slow)
	})
}

// TestAttachedComesFirst: whatever a client sends at once, it is told first where the session stands.
func TestAttachedComesFirst(t *testing.T) {
	slowly(t, func(w *world, slow *slowLog) {
		w.fill("s", "one")
		c := w.session("sessionName=s&lastSeq=latest")
		// The edge reads no further than the first.
		go func() {
			for i := range 3 {
				c.sendText(fmt.Sprintf(`{"type":"agent_message","data":{"message":"%d"}}`, i))
			}
			c.sendText(`{"type":"agent_message","data":{}}`)
		}()
		time.Sleep(5 * time.Second)
		synctest.Wait()
		if s, err := w.log.Session(w.Context(), schema.SessionID{Tenant: "default", Name: "s"}); err != nil || s.GetHeadSeq() != 1 {
			t.Errorf("the session is at %d, %v, before its client was told where it stands", s.GetHeadSeq(), err)
		}
		close(slow.held)
		if a := c.wantType("attached"); a["head_seq"] != 1.0 || a["after_seq"] != 1.0 {
			t.Errorf("got %v", a)
		}
		// All that was accepted is answered, then comes what was wrong.
		var answered []any
		for {
			m := c.nextJSON()
			data := m["data"].(map[string]any)
			if m["type"] == "published" {
				answered = append(answered, data["seq"])
			} else if m["type"] == "error" {
				if data["code"] != "invalid_message" || data["details"] != "Missing required field 'message'" {
					t.Errorf("got %v", m)
				}
				break
			}
		}
		if fmt.Sprint(answered) != "[2 3 4]" {
			t.Errorf("answered were %v", answered)
		}
		c.wantClosed(1008, "invalid_message: Missing required field 'message'")
	})
	// The same with what the transport itself does not take.
	slowly(t, func(w *world, slow *slowLog) {
		c := w.session("sessionName=s")
		c.write(websocket.MessageBinary, []byte("binary"))
		time.Sleep(time.Second)
		close(slow.held)
		c.wantType("attached")
		c.wantType("error")
		c.wantClosed(1003, "invalid_message: ")
	})
}

// TestAttachRefusedAtOnce: then the refusal is what comes, and what was sent meanwhile is not stored.
func TestAttachRefusedAtOnce(t *testing.T) {
	slowly(t, func(w *world, slow *slowLog) {
		w.fill("s", "one")
		c := w.session("sessionName=s&lastSeq=7")
		c.sendText(`{"type":"agent_message","data":{"message":"x"}}`)
		time.Sleep(time.Second)
		close(slow.held)
		if e := c.wantType("error"); e["code"] != "seq_beyond_head" || e["head_seq"] != 1.0 {
			t.Errorf("got %v", e)
		}
		c.wantClosed(1008, "seq_beyond_head: ")
		if s, err := w.log.Session(w.Context(), schema.SessionID{Tenant: "default", Name: "s"}); err != nil || s.GetHeadSeq() != 1 {
			t.Errorf("the session is at %d, %v", s.GetHeadSeq(), err)
		}
	})
}

// TestWhileAttaching: the log takes its time, and meanwhile the edge drains, the client leaves, or it is too long.
func TestWhileAttaching(t *testing.T) {
	slowly(t, func(w *world, slow *slowLog) {
		c := w.session("sessionName=s")
		synctest.Wait()
		drained := make(chan error, 1)
		go func() { drained <- w.g.Drain(w.Context(), "It is replaced.") }()
		time.Sleep(gateway.DefaultDrainGrace / 2)
		close(slow.held)
		c.wantType("attached")
		if m := c.wantType("going_away"); m["last_seq"] != 0.0 {
			t.Errorf("got %v", m)
		}
		c.wantClosed(1012, "going_away: ")
		if err := <-drained; err != nil {
			t.Error(err)
		}
	})
	slowly(t, func(w *world, _ *slowLog) {
		c := w.session("sessionName=s")
		c.sendText(`{"type":"agent_message","data":{"message":"x"}}`)
		synctest.Wait()
		drained := make(chan error, 1)
		go func() { drained <- w.g.Drain(w.Context(), "It is replaced.") }()
		c.wantClosed(1012, "going_away: ")
		if err := <-drained; err != nil {
			t.Error(err)
		}
	})
	slowly(t, func(w *world, _ *slowLog) {
		began := time.Now()
		c := w.session("sessionName=s")
		if e := c.wantType("error"); e["code"] != "unavailable" || e["retryable"] != true {
			t.Errorf("got %v", e)
		}
		c.wantClosed(1011, "unavailable: ")
		if took := time.Since(began); took != 10*time.Second {
			t.Errorf("it took %s", took)
		}
	})
	bubble(t, func(_ *Config, g *gateway.Config) { g.Log = brokenLog{g.Log} }, func(w *world) {
		c := w.session("sessionName=s")
		if e := c.wantType("error"); e["code"] != "internal" || strings.Contains(e["details"].(string), "disk") {
			t.Errorf("got %v", e)
		}
		c.wantClosed(1011, "internal: The server failed")
		synctest.Wait()
		if !strings.Contains(w.logs.String(), "the disk is on fire") {
			t.Errorf("the log says\n%s", w.logs)
		}
	})
	slowly(t, func(w *world, _ *slowLog) {
		c := w.session("sessionName=s")
		synctest.Wait()
		_ = c.c.CloseNow()
		synctest.Wait()
		if !strings.Contains(w.logs.String(), "reason=peer_lost lasted=0s") {
			t.Errorf("the log says\n%s", w.logs)
		}
	})
}

// TestSessionBegins: who attached to an empty session is told of its history right before the first envelope.
func TestSessionBegins(t *testing.T) {
	for _, query := range []string{"sessionName=s", "sessionName=s&lastSeq=0", "sessionName=s&lastSeq=latest"} {
		bubble(t, nil, func(w *world) {
			a, b := w.session(query), w.session(query)
			for _, c := range []*client{a, b} {
				if at := c.wantType("attached"); at["epoch"] != "" || at["head_seq"] != 0.0 || at["status"] != "open" {
					t.Errorf("got %v", at)
				}
			}
			a.sendText(`{"type":"start_run","data":{"run_id":"r"}}`)
			for {
				// The answer may be before or behind it.
				if m := a.nextJSON(); m["type"] == "start_run" {
					break
				}
			}
			at := b.wantType("attached")
			s, err := w.log.Session(w.Context(), schema.SessionID{Tenant: "default", Name: "s"})
			if err != nil || at["epoch"] != s.GetEpoch() || at["first_seq"] != 1.0 || at["head_seq"] != 1.0 || at["after_seq"] != 0.0 || at["status"] != "running" || at["seq"] != nil {
				t.Errorf("got %v, %v", at, err)
			}
			if m := b.wantType("start_run"); m["seq"] != 1.0 {
				t.Errorf("got %v", m)
			}
			// Once.
			w.fill("s", "two")
			if m := b.wantType("token"); m["seq"] != 2.0 {
				t.Errorf("got %v", m)
			}
			// The session is deleted: the connection ends, and says so.
			if err := w.log.Delete(w.Context(), schema.SessionID{Tenant: "default", Name: "s"}); err != nil {
				t.Fatal(err)
			}
			if e := b.wantType("error"); e["code"] != "session_deleted" {
				t.Errorf("got %v", e)
			}
			b.wantClosed(1008, "session_deleted: ")
		})
	}
	// The log does not say where the session stands just now: the first envelope does not wait for it for long.
	slowly(t, func(w *world, slow *slowLog) {
		slow.from.Store(1)
		c := w.session("sessionName=s")
		c.wantType("attached")
		began := time.Now()
		w.fill("s", "one", "two")
		if at := c.wantType("attached"); at["epoch"] == "" || at["first_seq"] != 1.0 {
			t.Errorf("got %v", at)
		}
		for seq := 1.0; seq <= 2; seq++ {
			if m := c.wantType("token"); m["seq"] != seq {
				t.Errorf("got %v", m)
			}
		}
		if took := time.Since(began); took > time.Second {
			t.Errorf("it took %s", took)
		}
	})
}

// TestEndedSession: whoever comes after the end gets what there is, and is closed in good order; whoever was there stays.
func TestEndedSession(t *testing.T) {
	for _, status := range []string{"completed", "failed", "cancelled"} {
		bubble(t, nil, func(w *world) {
			agent, live := w.session("sessionName=s"), w.session("sessionName=s")
			agent.wantType("attached")
			live.wantType("attached")
			const total = 600
			for n := range total - 1 {
				agent.sendText(fmt.Sprintf(`{"type":"token","data":{"message_id":"m","text":"%s%d"}}`, strings.Repeat("x", 1000), n))
				for agent.nextJSON()["type"] != "published" {
				}
			}
			agent.sendText(`{"type":"run_status","data":{"status":"` + status + `"}}`)
			live.wantType("attached")
			for seq := 1.0; seq <= total; seq++ {
				if m := live.nextJSON(); m["seq"] != seq {
					t.Fatalf("got %v, want seq %v", m, seq)
				}
			}
			for query, from := range map[string]float64{"": 1, "&lastSeq=300": 301, "&lastSeq=599": 600, "&lastSeq=600": 601, "&lastSeq=latest": 601} {
				c := w.session("sessionName=s" + query)
				if a := c.wantType("attached"); a["status"] != status || a["head_seq"] != float64(total) {
					t.Errorf("%q: got %v", query, a)
				}
				for seq := from; seq <= total; seq++ {
					if m := c.nextJSON(); m["seq"] != seq {
						t.Fatalf("%q: got %v, want seq %v", query, m, seq)
					}
				}
				c.wantClosed(websocket.StatusNormalClosure)
				if reason := c.reason; reason != status {
					t.Errorf("%q: the reason is %q", query, reason)
				}
			}
			agent.sendText(`{"type":"system","data":{"message":"it is archived"}}`)
			if m := live.wantType("system"); m["seq"] != float64(total+1) {
				t.Errorf("got %v", m)
			}
			synctest.Wait()
			if n := strings.Count(w.logs.String(), "reason=done"); n != 5 {
				t.Errorf("%d connections ended without a fault:\n%s", n, w.logs)
			}
		})
	}
}

// lasting is a token of a user that expires.
func lasting(t testing.TB, subject string, role schema.Role, ttl time.Duration, sessions ...string) string {
	t.Helper()
	text, err := auth.Mint([]byte(secret), auth.Principal{Subject: subject, Role: role, Sessions: sessions}, ttl)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// TestRefresh: a connection lives on with a new token, and ends with its own code without one.
func TestRefresh(t *testing.T) {
	refresh := func(c *client, token string) {
		b, err := json.Marshal(map[string]any{"type": "refresh", "data": map[string]any{"token": token}})
		if err != nil {
			c.Fatal(err)
		}
		c.sendText(string(b))
	}
	bubble(t, nil, func(w *world) {
		const ttl = 30 * time.Second
		c := w.ui(lasting(t, "ada", schema.Role_ROLE_USER, ttl, "s"), "sessionName=s")
		c.wantType("attached")
		for range 20 {
			// A client that reads nothing for longer answers no pings either.
			time.Sleep(20 * time.Second)
			refresh(c, lasting(t, "ada", schema.Role_ROLE_USER, ttl, "s"))
			m := c.nextJSON()
			data := m["data"].(map[string]any)
			expires, err := time.Parse(time.RFC3339, data["expires"].(string))
			if m["type"] != "refreshed" || m["seq"] != nil || err != nil || !expires.Equal(time.Now().Add(ttl)) {
				t.Fatalf("got %v at %s", m, time.Now())
			}
			c.sendText(`{"type":"user_message","data":{"message":"still here"}}`)
			// Both, in whichever order: what nobody reads counts against the client.
			for range 2 {
				if m := c.nextSkipping("attached"); m["type"] != "user_message" && m["type"] != "published" {
					t.Fatalf("got %v", m)
				}
			}
		}
		began := time.Now()
		for {
			m := c.nextJSON()
			if m["type"] == "error" {
				if data := m["data"].(map[string]any); data["code"] != "token_expired" {
					t.Errorf("got %v", m)
				}
				break
			}
		}
		c.wantClosed(4401, "token_expired: ")
		if took := time.Since(began); took < ttl || took > ttl+auth.DefaultLeeway+time.Second {
			t.Errorf("it expired after %s", took)
		}
	})
	bubble(t, nil, func(w *world) {
		good := lasting(t, "ada", schema.Role_ROLE_USER, time.Hour, "s")
		for _, c := range []struct{ name, msg, code, says string }{
			{"no data", `{"type":"refresh"}`, "invalid_message", "'data'"},
			{"no token", `{"type":"refresh","data":{}}`, "invalid_message", "Missing required field 'token'"},
			{"no object", `{"type":"refresh","data":"` + good + `"}`, "invalid_message", "'data' must be an object"},
			{"no string", `{"type":"refresh","data":{"token":["` + good + `"]}}`, "invalid_message", "'token' must be a string"},
			{"something else", `{"type":"refresh","data":{"token":"` + good + `","ttl":5}}`, "invalid_message", "nothing else"},
			{"something beside", `{"type":"refresh","token":"` + good + `","data":{"token":"` + good + `"}}`, "invalid_message", "nothing else"},
			// What else a token can be refused for is the gateway's; see its TestRefreshRefused.
			{"empty", `{"type":"refresh","data":{"token":""}}`, "unauthenticated", "token"},
			{"another's", `{"type":"refresh","data":{"token":"` + lasting(t, "bob", schema.Role_ROLE_USER, time.Hour, "s") + `"}}`, "forbidden", "another's"},
		} {
			s := w.ui(good, "sessionName=s")
			s.wantType("attached")
			s.sendText(c.msg)
			s.wantRefused(c.code, c.says)
		}
		// Narrowed: what it followed it may follow no longer.
		s := w.ui(good, "sessionName=s")
		s.wantType("attached")
		refresh(s, lasting(t, "ada", schema.Role_ROLE_USER, time.Hour, "t"))
		s.wantType("refreshed")
		s.wantRefused("forbidden", `no access to session "s"`)
		synctest.Wait()
		if strings.Contains(w.logs.String(), good[:20]) {
			t.Errorf("the log says\n%s", w.logs)
		}
	})
}

// TestLimitsOfTheSessionSocket: who is too fast, or comes too often, is told; what was accepted is answered, and nobody else notices.
func TestLimitsOfTheSessionSocket(t *testing.T) {
	bubble(t, func(_ *Config, g *gateway.Config) {
		g.Limits = gateway.DefaultLimits()
	}, func(w *world) {
		ada, bob := as(t, "ada", schema.Role_ROLE_USER), as(t, "bob", schema.Role_ROLE_USER)
		agent := w.session("sessionName=s&lastSeq=latest")
		agent.wantType("attached")
		hasty := w.ui(ada, "sessionName=s")
		hasty.wantType("attached")
		var writing sync.WaitGroup
		writing.Go(func() {
			for range 25 {
				if hasty.c.Write(w.Context(), websocket.MessageText, []byte(`{"type":"user_message","data":{"message":"m"}}`)) != nil {
					return
				}
			}
		})
		published := 0
		for {
			m := hasty.nextSkipping("attached")
			if m["type"] == "error" {
				if data := m["data"].(map[string]any); data["code"] != "rate_exceeded" || data["retryable"] != true {
					t.Errorf("got %v", m)
				}
				break
			}
			if m["type"] == "published" {
				published++
			}
		}
		hasty.wantClosed(1008, "rate_exceeded: ")
		writing.Wait()
		if published != 20 {
			t.Errorf("%d were accepted", published)
		}
		for n := 1.0; n <= 20; n++ {
			if m := agent.nextSkipping("attached"); m["seq"] != n {
				t.Errorf("the agent got %v", m)
			}
		}
		// Ten a second, for as long as one likes. Who comes again has no more than it had.
		time.Sleep(time.Second)
		c := w.ui(ada, "sessionName=s&lastSeq=latest")
		c.wantType("attached")
		for range 200 {
			c.sendText(`{"type":"user_message","data":{"message":"m"}}`)
			for range 2 {
				if m := c.nextJSON(); m["type"] == "error" {
					t.Fatalf("got %v", m)
				}
			}
			agent.nextJSON()
			time.Sleep(time.Second / 10)
		}
		for range 4 {
			w.ui(ada, "sessionName=s&lastSeq=latest").wantType("attached")
		}
		c = w.ui(ada, "sessionName=s&lastSeq=latest")
		if e := c.wantType("error"); e["code"] != "too_many_connections" {
			t.Errorf("got %v", e)
		}
		c.wantClosed(1008, "too_many_connections: ")
		w.ui(ada, "sessionName=t").wantType("attached")
		w.ui(bob, "sessionName=s").wantType("attached")
		w.session("sessionName=s").wantType("attached")
	})
}
