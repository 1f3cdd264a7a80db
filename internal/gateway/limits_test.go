package gateway

import (
	"encoding/json"
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"tidemark/internal/auth"
	"tidemark/internal/doctable"
	"tidemark/schema"
)

// limited is a configuration with the limits that the command line has.
func limited(c *Config) { c.Limits = DefaultLimits() }

// messageOf is a user's message, which a user may send.
func messageOf(text string) *schema.Envelope {
	return &schema.Envelope{Payload: &schema.Envelope_UserMessage{UserMessage: &schema.UserMessage{Message: text}}}
}

// say publishes messages to a session, all in one publish.
func (p *peer) say(id uint64, session string, n int) {
	p.Helper()
	m := &schema.Publish{PublishId: id, Session: session}
	for i := range n {
		m.Envelopes = append(m.Envelopes, messageOf(fmt.Sprint(id, ".", i)))
	}
	switch p.proto {
	case ProtoPublish:
		p.send(m)
	case ProtoJSON:
		b, err := protojson.Marshal(&schema.ClientFrame{Frame: &schema.ClientFrame_Publish{Publish: m}})
		if err != nil {
			p.Fatal(err)
		}
		p.sendRaw(b)
	case SessionJSON:
		for _, e := range m.GetEnvelopes() {
			p.sendRaw(schema.AppendJSON(nil, e))
		}
	default:
		p.publish(m)
	}
}

// frame is the next frame, in either form.
func (p *peer) frame() *schema.ServerFrame {
	p.Helper()
	if p.proto != ProtoJSON {
		return p.next()
	}
	f := new(schema.ServerFrame)
	if err := protojson.Unmarshal(p.nextRaw(), f); err != nil {
		p.Fatal(err)
	}
	return f
}

// wantFate wants the answer to one publish: unspecified for an acknowledgement.
func (p *peer) wantFate(id uint64, code schema.Code) {
	p.Helper()
	f := p.frame()
	if r := f.GetRejected(); r != nil && code == r.GetCode() && r.GetPublishId() == id && r.GetRetryable() == code.Rule().Retryable {
		return
	}
	if a := f.GetPublished().GetAcks(); code == schema.Code_CODE_UNSPECIFIED && len(a) == 1 && a[0].GetPublishId() == id {
		return
	}
	p.Fatalf("publish %d: got %v, want %s", id, f, code.Word())
}

// wantExceeded compares what the metric has counted since the gateway began.
func (w *world) wantExceeded(want map[Limit]float64) {
	w.Helper()
	synctest.Wait()
	for l := range Limit(len(limits)) {
		if got := counter(w.T, w.g.metrics.exceeded.WithLabelValues(l.String())); got != want[l] {
			w.Errorf("the limit %s was exceeded %v times, want %v", l, got, want[l])
		}
	}
}

// TestRate: who publishes faster than it may is told so, loses nothing else, and its neighbours notice nothing.
func TestRate(t *testing.T) {
	for _, as := range []Protocol{Proto, ProtoJSON, ProtoPublish} {
		t.Run(as.String(), func(t *testing.T) {
			bubble(t, limited, func(w *world) {
				connect := func(subject string) *peer {
					p := principal("user", "*")
					p.Subject = subject
					return w.dial(Peer{Protocol: as, Principal: p})
				}
				p, neighbour := connect("somebody"), connect("a neighbour")
				ok, over := schema.Code_CODE_UNSPECIFIED, schema.Code_CODE_RATE_EXCEEDED
				id := uint64(0)
				try := func(n int, fate schema.Code) {
					t.Helper()
					id++
					p.say(id, "s", n)
					p.wantFate(id, fate)
				}
				for range 20 {
					try(1, ok)
				}
				try(1, over)
				began := time.Now()
				for i := range uint64(20) {
					neighbour.say(i, "s", 1)
					neighbour.wantFate(i, ok)
				}
				if took := time.Since(began); took != 0 {
					t.Errorf("the neighbour waited %s", took)
				}
				// One comes back in a tenth of a second. The penalty is a part of that.
				time.Sleep(99 * time.Millisecond)
				try(1, over)
				time.Sleep(time.Millisecond)
				try(1, ok)
				try(1, over)
				// Envelopes are counted, not publishes.
				time.Sleep(500 * time.Millisecond)
				try(6, over)
				try(5, ok)
				// The whole burst is there after a pause, for a publish of more too.
				time.Sleep(2 * time.Second)
				try(100, ok)
				try(1, over)
				time.Sleep(1900 * time.Millisecond)
				try(100, over)
				// What is wrong counts like what is right.
				time.Sleep(time.Hour)
				for range 20 {
					try(0, schema.Code_CODE_INVALID_MESSAGE)
				}
				try(0, over)
				w.wantExceeded(map[Limit]float64{LimitRate: 7})
				p.leave()
				neighbour.leave()
			})
		})
	}
}

// TestRateOfReconnecting: a user gains nothing by connecting again, nor by calls. Each connection of an agent has the rate for itself.
func TestRateOfReconnecting(t *testing.T) {
	bubble(t, limited, func(w *world) {
		taken := func(who *auth.Principal) (n int) {
			for range 3 {
				p := w.connect(who)
				for i := range uint64(15) {
					p.say(i, "s", 1)
					if p.frame().GetPublished() != nil {
						n++
					}
				}
				p.leave()
			}
			return n
		}
		user, agent := principal("user", "*"), principal("agent", "*")
		// While a connection is not read because it was too fast, a little comes back.
		if n := taken(user); n < 20 || n > 24 {
			t.Errorf("%d envelopes of a user were taken at once", n)
		}
		if err := w.g.Allow(user, 5); schema.CodeOf(err) != schema.Code_CODE_RATE_EXCEEDED {
			t.Errorf("a call in the same moment: %v", err)
		}
		if n := taken(agent); n != 45 {
			t.Errorf("%d envelopes of an agent were taken at once", n)
		}
	})
}

// TestRateOfRoles: each role has its rate, and a rate of 0 is none.
func TestRateOfRoles(t *testing.T) {
	burst := func(c Limits, role string) int {
		n := 0
		bubble(t, func(cfg *Config) { cfg.Limits = c }, func(w *world) {
			p := w.connect(principal(role, "*"))
			for i := range uint64(60) {
				p.say(i, "s", 1)
				if p.frame().GetPublished() != nil {
					n++
				}
			}
			p.leave()
		})
		return n
	}
	both := Limits{User: Rate{1e-3, 20}, Agent: Rate{1e-3, 40}}
	for role, want := range map[string]int{"user": 20, "agent": 40, "worker": 40, "admin": 40} {
		if n := burst(both, role); n != want {
			t.Errorf("%s: %d were taken at once, want %d", role, n, want)
		}
		if n := burst(Limits{}, role); n != 60 {
			t.Errorf("%s without a limit: %d were taken at once", role, n)
		}
	}
	if n := burst(Limits{Agent: Rate{1e-3, 40}}, "user"); n != 60 {
		t.Errorf("users have no limit, and yet %d were taken", n)
	}
}

// TestRateOfSessionSocket: there, who is too fast is told so and has to come again; all before it is answered.
func TestRateOfSessionSocket(t *testing.T) {
	bubble(t, limited, func(w *world) {
		p := w.dial(Peer{Protocol: SessionJSON, Principal: principal("user", "s"), Session: "s", Follow: &schema.Attach{Session: "s", Start: &schema.Attach_Head{Head: true}}})
		done := make(chan map[string]int)
		go func() {
			seen := map[string]int{}
			for {
				select {
				case m := <-p.out:
					var f struct {
						Type string
						Data struct{ Code string }
					}
					if err := json.Unmarshal(m, &f); err != nil {
						t.Error(err)
					}
					seen[f.Type]++
					if f.Type == "error" && f.Data.Code != "rate_exceeded" {
						t.Errorf("got %s", m)
					}
				case <-p.closed:
					done <- seen
					return
				}
			}
		}()
		p.say(1, "s", 21)
		if seen := <-done; seen["published"] != 20 || seen["error"] != 1 {
			t.Errorf("it saw %v", seen)
		}
		if err := p.wantClosed(schema.Code_CODE_RATE_EXCEEDED, "10 envelopes a second"); schema.CodeOf(err) != schema.Code_CODE_RATE_EXCEEDED {
			t.Errorf("Serve returned %v", err)
		}
		w.wantExceeded(map[Limit]float64{LimitRate: 1})
	})
}

// TestI8_FloodWaits: who floods the edge is answered, and read no faster than refusals may cost.
func TestI8_FloodWaits(t *testing.T) {
	bubble(t, limited, func(w *world) {
		p := w.connect(principal("user", "*"))
		began := time.Now()
		const n = 500
		go func() {
			for i := range uint64(n) {
				p.say(i, "s", 1)
			}
		}()
		taken := 0
		for answered := 0; answered < n; {
			f := p.next()
			switch r := f.GetRejected(); {
			case r == nil:
				answered += len(f.GetPublished().GetAcks())
				taken += len(f.GetPublished().GetAcks())
			case r.GetCode() == schema.Code_CODE_RATE_EXCEEDED:
				answered++
			default:
				w.Fatalf("got %v", f)
			}
		}
		took := time.Since(began)
		if least := 400 * maxPenalty; took < least || took > 2*least {
			t.Errorf("%d publishes took %s, %d were taken; want more than %s", n, took, taken, least)
		}
		if most := 20 + int(10*took.Seconds()) + 1; taken > most {
			t.Errorf("%d were taken in %s", taken, took)
		}
		p.leave()
	})
}

// TestIdleFollowerHasNoLimiter: who only reads pays nothing for the rate.
func TestIdleFollowerHasNoLimiter(t *testing.T) {
	bubble(t, limited, func(w *world) {
		p := w.connect(principal("user", "*"))
		p.attach(&schema.Attach{Channel: 1, Session: "s"})
		p.wantAttached(1, 0)
		p.wantCaughtUp(1, 0)
		synctest.Wait()
		for c := range w.g.conns {
			if c.limiter != nil {
				t.Error("a follower has a limiter")
			}
		}
		p.leave()
	})
}

// TestAllow: calls without a connection are counted by who calls.
func TestAllow(t *testing.T) {
	bubble(t, limited, func(w *world) {
		ada := principal("user")
		other := func(change func(*auth.Principal)) *auth.Principal {
			p := *ada
			change(&p)
			return &p
		}
		spend := func(p *auth.Principal, n int) (taken int) {
			for w.g.Allow(p, n) == nil {
				if taken++; taken > 30 {
					break
				}
			}
			return taken
		}
		if n := spend(ada, 1); n != 20 {
			t.Errorf("a user may call %d times", n)
		}
		if err := w.g.Allow(ada, 1); schema.CodeOf(err) != schema.Code_CODE_RATE_EXCEEDED {
			t.Errorf("got %v", err)
		}
		for name, p := range map[string]*auth.Principal{
			"another subject": other(func(p *auth.Principal) { p.Subject = "bob" }),
			"another tenant":  other(func(p *auth.Principal) { p.Tenant = "acme" }),
		} {
			if n := spend(p, 10); n != 2 {
				t.Errorf("%s may call %d times with 10", name, n)
			}
		}
		if n := spend(other(func(p *auth.Principal) { p.Role = schema.Role_ROLE_AGENT }), 1000); n != 10 {
			t.Errorf("the same subject as an agent may call %d times with 1000", n)
		}
		time.Sleep(100 * time.Millisecond)
		if n := spend(ada, 1); n != 1 {
			t.Errorf("after a tenth of a second, a user may call %d times", n)
		}
		time.Sleep(time.Minute)
		if n := spend(ada, 1000); n != 1 {
			t.Errorf("a thousand at once pass %d times, want once", n)
		}
	})
}

// TestI8_CallersAreBounded: however many call, they are remembered in bounded room, nobody is refused for that, and who has used up its rate is not forgotten for those who have not.
func TestI8_CallersAreBounded(t *testing.T) {
	bubble(t, limited, func(w *world) {
		spent := principal("user")
		for w.g.Allow(spent, 1) == nil {
			continue
		}
		for i := range 3 * maxBuckets {
			if err := w.g.Allow(&auth.Principal{Subject: fmt.Sprint(i), Tenant: "t", Role: schema.Role_ROLE_USER}, 1); err != nil {
				w.Fatal(err)
			}
			if i%1000 == 0 && w.g.Allow(spent, 1) == nil {
				w.Fatalf("after %d others, the one that had nothing left may call again", i)
			}
		}
		if n := len(w.g.callers.of); n > maxBuckets {
			t.Errorf("%d callers are remembered, want at most %d", n, maxBuckets)
		}
		// Those whose buckets are full again go first, many at a time.
		time.Sleep(time.Minute)
		if err := w.g.Allow(&auth.Principal{Subject: "new", Tenant: "t", Role: schema.Role_ROLE_USER}, 1); err != nil {
			t.Error(err)
		}
		if n := len(w.g.callers.of); n > maxBuckets-evictOf+1 {
			t.Errorf("%d callers are remembered after a minute", n)
		}
	})
}

// TestLimitsAreCounted: each limit is hit once in each way, refused with its code, and counted under its word. The edges' own are theirs.
func TestLimitsAreCounted(t *testing.T) {
	bubble(t, func(c *Config) {
		c.Limits = Limits{User: Rate{1, 5}, UserConnections: 1, Sessions: 2}
		c.MaxConnections, c.MaxInFlight = 3, 2
	}, func(w *world) {
		hits := map[Limit]float64{}
		p := w.connect(principal("user", "*"))

		large := &schema.Publish{PublishId: 1, Session: "s", Envelopes: []*schema.Envelope{messageOf(strings.Repeat("x", schema.MaxEnvelopeBytes))}}
		p.publish(large)
		p.wantFate(1, schema.Code_CODE_TOO_LARGE)
		hits[LimitMessageBytes]++
		w.wantExceeded(hits)

		for channel, code := range []schema.Code{0, 0, schema.Code_CODE_TOO_MANY_SESSIONS} {
			p.attach(&schema.Attach{Channel: uint32(channel + 1), Session: fmt.Sprint("s", channel)})
			if code != 0 {
				p.wantError(uint32(channel+1), code, "follows 2 sessions; at most 2")
				hits[LimitSessions]++
				continue
			}
			p.wantAttached(uint32(channel+1), 0)
			p.wantCaughtUp(uint32(channel+1), 0)
		}
		w.wantExceeded(hits)

		q := w.connect(principal("user", "*"))
		q.attach(&schema.Attach{Channel: 1, Session: "s0"})
		q.wantError(1, schema.Code_CODE_TOO_MANY_CONNECTIONS, "s0")
		hits[LimitUserConnections]++
		q.attach(&schema.Attach{Channel: 1, Session: "s1"})
		q.wantError(1, schema.Code_CODE_TOO_MANY_CONNECTIONS, "s1")
		hits[LimitUserConnections]++
		w.wantExceeded(hits)

		agent := w.agent()
		synctest.Wait()
		if err := w.connect(principal("user", "*")).wantClosed(schema.Code_CODE_LIMIT_EXCEEDED, "3 connections"); err == nil {
			t.Error("Serve returned nil")
		}
		hits[LimitConnections]++
		if err := w.g.Admits(); schema.CodeOf(err) != schema.Code_CODE_LIMIT_EXCEEDED {
			t.Errorf("Admits: %v", err)
		}
		hits[LimitConnections]++
		if err := w.g.Ready(); schema.CodeOf(err) != schema.Code_CODE_LIMIT_EXCEEDED {
			t.Errorf("Ready: %v", err)
		}
		w.wantExceeded(hits)

		// Four of the five are left: what was too large counts, whichever connection it came by.
		for i := range uint64(4) {
			q.say(i, "s", 1)
			q.wantFate(i, schema.Code_CODE_UNSPECIFIED)
		}
		q.say(10, "s", 1)
		q.wantFate(10, schema.Code_CODE_RATE_EXCEEDED)
		hits[LimitRate]++
		w.wantExceeded(hits)

		// Nobody takes the agent's answers: the third waits until the first two have been taken, and is told nothing.
		held := make(chan struct{})
		w.g.cfg.Log = &heldLog{Log: w.log, held: held}
		for i := range uint64(2) {
			agent.token(i+1, "s", "x")
		}
		w.wantExceeded(hits)
		agent.token(3, "s", "x")
		hits[LimitInFlight]++
		w.wantExceeded(hits)
		close(held)
		for n := 0; n < 3; {
			n += len(want[*schema.ServerFrame_Published](agent).Published.GetAcks())
		}
		w.wantExceeded(hits)

		agent.sendRaw(make([]byte, schema.MaxFrameBytes+1))
		agent.wantFailed(schema.Code_CODE_TOO_LARGE, "at most")
		hits[LimitMessageBytes]++
		w.wantExceeded(hits)

		if r := w.g.RefuseOrigin(); r.Code != schema.Code_CODE_ORIGIN_NOT_ALLOWED {
			t.Errorf("got %v", r)
		}
		hits[LimitOrigin]++
		w.wantExceeded(hits)

		// The refused have lost nothing else.
		w.fill("s1", "one")
		p.wantTexts(2, 1, "one")
		p.leave()
		q.leave()
	})
}

// TestI8_RefusedIsReleased: whatever is refused is answered once, and holds nothing afterwards.
func TestI8_RefusedIsReleased(t *testing.T) {
	bad := map[string]*schema.Publish{
		"no session":     {Envelopes: []*schema.Envelope{messageOf("x")}},
		"two names":      {Session: "s", Channel: 1, Envelopes: []*schema.Envelope{messageOf("x")}},
		"forbidden name": {Session: "other", Envelopes: []*schema.Envelope{messageOf("x")}},
		"forbidden type": {Session: "s", Envelopes: []*schema.Envelope{messageOf("x"), tokenOf("y")}},
		"none":           {Session: "s"},
		"too many":       {Session: "s", Envelopes: slices.Repeat([]*schema.Envelope{messageOf("x")}, 1001)},
		"invalid":        {Session: "s", Envelopes: []*schema.Envelope{messageOf("")}},
		"no payload":     {Session: "s", Envelopes: []*schema.Envelope{{}}},
		"conflict":       {Session: "s", ExpectedSeq: new(uint64(9)), Envelopes: []*schema.Envelope{messageOf("x")}},
		"too large":      {Session: "s", Envelopes: []*schema.Envelope{messageOf(strings.Repeat("x", schema.MaxEnvelopeBytes))}},
		"too fast":       {Session: "s", Envelopes: slices.Repeat([]*schema.Envelope{messageOf("x")}, 1000)},
		"unknown key":    nil,
	}
	for _, as := range []Protocol{Proto, ProtoJSON, ProtoPublish} {
		t.Run(as.String(), func(t *testing.T) {
			bubble(t, func(c *Config) { c.Limits.User = Rate{100, 900} }, func(w *world) {
				p := w.dial(Peer{Protocol: as, Principal: principal("user", "s")})
				id := uint64(0)
				for name, m := range bad {
					id++
					if m == nil {
						if as != ProtoJSON {
							continue
						}
						p.sendRaw(fmt.Appendf(nil, `{"publish":{"publishId":%d,"session":"s","envelopes":[{"payload_of_tomorrow":{}}]}}`, id))
					} else {
						m = proto.CloneOf(m)
						m.PublishId = id
						if name == "too fast" {
							p.say(id, "s", 900)
							p.wantFate(id, schema.Code_CODE_UNSPECIFIED)
							id++
							m.PublishId = id
						}
						b, err := protojson.Marshal(&schema.ClientFrame{Frame: &schema.ClientFrame_Publish{Publish: m}})
						switch {
						case err != nil:
							w.Fatal(err)
						case as == ProtoJSON:
							p.sendRaw(b)
						case as == ProtoPublish:
							p.send(m)
						default:
							p.publish(m)
						}
					}
					if r := p.frame().GetRejected(); r.GetPublishId() != id {
						t.Errorf("%s: got %v", name, r)
					}
					p.wantNothing()
					for c := range w.g.conns {
						if n, b := c.inFlight.Load(), c.inFlightBytes.Load(); n != 0 || b != 0 {
							t.Errorf("%s: %d publishes of %d bytes are left in flight", name, n, b)
						}
					}
					time.Sleep(time.Minute) // the rate is there again
				}
				p.leave()
			})
		})
	}
}

func TestLimitsAreChecked(t *testing.T) {
	for name, l := range map[string]Limits{
		"negative rate":        {User: Rate{-1, 1}},
		"rate that is no rate": {Agent: Rate{math.NaN(), 1}},
		"endless rate":         {Agent: Rate{math.Inf(1), 1}},
		"no burst":             {User: Rate{1, 0}},
		"negative connections": {UserConnections: -1},
		"negative sessions":    {Sessions: -1},
	} {
		if err := l.validate(); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	l := DefaultLimits()
	if err := l.validate(); err != nil || l != DefaultLimits() {
		t.Errorf("the defaults: %v", err)
	}
	l = Limits{}
	if err := l.validate(); err != nil || l.Sessions != schema.MaxAttachedSessions {
		t.Errorf("none: %v, %+v", err, l)
	}
}

// TestLimitsInProtocol compares PROTOCOL.md's table of a client's limits with the defaults, the codes and the metric's words.
func TestLimitsInProtocol(t *testing.T) {
	tables, err := doctable.Tables("../../PROTOCOL.md", "A client's limits")
	if err != nil || len(tables) != 1 {
		t.Fatalf("PROTOCOL.md has %d tables of a client's limits: %v", len(tables), err)
	}
	rows := tables[0].Rows
	l := DefaultLimits()
	rate := func(r Rate) string { return fmt.Sprintf("%g a second, %d at once", r.PerSecond, r.Burst) }
	mib := func(n int) string { return fmt.Sprintf("%d MiB", n>>20) }
	want := [][]string{
		{rate(l.User), "rate_exceeded", LimitRate.String()},
		{rate(l.Agent), "rate_exceeded", LimitRate.String()},
		{mib(schema.MaxEnvelopeBytes), "too_large", LimitMessageBytes.String()},
		{fmt.Sprint(l.UserConnections), "too_many_connections", LimitUserConnections.String()},
		{fmt.Sprint(l.Sessions), "too_many_sessions", LimitSessions.String()},
		{mib(DefaultMaxInFlightBytes), "", LimitInFlight.String()},
		{fmt.Sprint(MaxSubscriptions), "limit_exceeded", LimitGroups.String()},
		{fmt.Sprint(DefaultMaxConnections), "limit_exceeded", LimitConnections.String()},
		{"the edge's own", "origin_not_allowed", LimitOrigin.String()},
	}
	if len(rows) != len(want) {
		t.Fatalf("PROTOCOL.md has %d limits of a client, want %d", len(rows), len(want))
	}
	for i, w := range want {
		r := rows[i]
		if len(r) != 5 || r[1] != w[0] || doctable.Plain(r[3]) != w[1] || doctable.Plain(r[4]) != w[2] {
			t.Errorf("the row %q says %q, want %q", r[0], r[1:], w)
		}
	}
}
