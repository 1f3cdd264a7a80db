package edgegrpc

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"tidemark/internal/auth"
	"tidemark/internal/gateway"
	"tidemark/schema"
)

func messageOf(text string) *schema.Envelope {
	return &schema.Envelope{Payload: &schema.Envelope_UserMessage{UserMessage: &schema.UserMessage{Message: text}}}
}

// limited runs a test once for each way to speak to the edge, with limits.
func limited(t *testing.T, l gateway.Limits, test func(w *world, d dialect)) {
	for _, d := range dialects {
		t.Run(d.name, func(t *testing.T) {
			inWorldWith(t, func(c *Config, gc *gateway.Config) { gc.Limits, gc.Metrics = l, c.Metrics }, func(w *world) { test(w, d) })
		})
	}
}

func (w *world) bearer(subject string, role schema.Role, life time.Duration) string {
	w.Helper()
	t, err := auth.Mint(testSecret, auth.Principal{Subject: subject, Tenant: "default", Role: role, Sessions: []string{"*"}}, life)
	w.must(err)
	return t
}

// TestTypesOfCalls: Append takes what the role may publish, all or none, and a session is created by CreateSession alone.
func TestTypesOfCalls(t *testing.T) {
	eachDialect(t, func(w *world, d dialect) {
		try := func(role schema.Role, code schema.Code, envelopes ...*schema.Envelope) {
			w.Helper()
			k := w.dial(d, w.token(role, "*"))
			defer k.close()
			err := k.call("Append", &schema.AppendRequest{Session: "s", Envelopes: envelopes}, new(schema.AppendResponse))
			if code == schema.Code_CODE_UNSPECIFIED {
				w.must(err)
				return
			}
			w.wantProblem(err, code)
		}
		ok, no := schema.Code_CODE_UNSPECIFIED, schema.Code_CODE_FORBIDDEN
		created := &schema.Envelope{Payload: &schema.Envelope_SessionCreated{SessionCreated: &schema.SessionCreated{Kind: schema.SessionKind_SESSION_KIND_CHAT}}}
		input := &schema.Envelope{Payload: &schema.Envelope_UserInput{UserInput: &schema.UserInput{ResponseJson: `"yes"`}}}
		for role, may := range map[schema.Role][2]schema.Code{ // of a message, of a token
			schema.Role_ROLE_USER: {ok, no}, schema.Role_ROLE_AGENT: {ok, ok}, schema.Role_ROLE_WORKER: {ok, ok}, schema.Role_ROLE_ADMIN: {ok, ok}, schema.Role_ROLE_ANALYST: {no, no},
		} {
			try(role, may[0], messageOf("m"))
			try(role, may[1], tokenOf("t"))
			if may[1] == no {
				try(role, no, messageOf("m"), tokenOf("t"))
			}
			try(role, no, created)
		}
		try(schema.Role_ROLE_AGENT, no, input)
		try(schema.Role_ROLE_WORKER, no, input)
		s, err := w.log.Session(w.ctx, schema.SessionID{Tenant: "default", Name: "s"})
		w.must(err)
		if s.GetHeadSeq() != 7 {
			w.Errorf("%d envelopes are stored, want 7", s.GetHeadSeq())
		}
	})
}

// TestRateOfCalls: calls are counted by who calls, over all connections; the others notice nothing.
func TestRateOfCalls(t *testing.T) {
	limited(t, gateway.DefaultLimits(), func(w *world, d dialect) {
		user := w.bearer("ada", schema.Role_ROLE_USER, time.Hour)
		a, b := w.dial(d, user), w.dial(d, w.bearer("ada", schema.Role_ROLE_USER, 2*time.Hour))
		neighbour, agent := w.dial(d, w.bearer("bob", schema.Role_ROLE_USER, time.Hour)), w.dial(d, w.bearer("ada", schema.Role_ROLE_AGENT, time.Hour))
		say := func(k *client, n int) error {
			return k.call("Append", &schema.AppendRequest{Session: "s", Envelopes: slices.Repeat([]*schema.Envelope{messageOf("m")}, n)}, new(schema.AppendResponse))
		}
		for range 5 {
			w.must(say(a, 1))
			w.must(say(b, 2))
		}
		for i := range 5 {
			w.must(a.call("CreateSession", &schema.CreateSessionRequest{Session: fmt.Sprint("new", i)}, new(schema.CreateSessionResponse)))
		}
		for _, k := range []*client{a, b} {
			p := w.wantProblem(say(k, 1), schema.Code_CODE_RATE_EXCEEDED)
			if r, ok := p.detail.(*schema.Rejected); !ok || !r.GetRetryable() {
				w.Errorf("the detail is %v", p.detail)
			}
			w.wantProblem(k.call("CreateSession", &schema.CreateSessionRequest{Session: "more"}, new(schema.CreateSessionResponse)), schema.Code_CODE_RATE_EXCEEDED)
		}
		w.must(say(neighbour, 20))
		w.must(say(agent, 1000))
		// What only reads goes on.
		w.must(a.call("GetSession", &schema.GetSessionRequest{Session: "s"}, new(schema.GetSessionResponse)))
		w.must(a.call("ListSessions", &schema.ListSessionsRequest{}, new(schema.ListSessionsResponse)))
		if n := w.counter("tidemark_gateway_limits_exceeded_total", "limit", "rate"); n != 4 {
			w.Errorf("the limit was exceeded %v times", n)
		}
		time.Sleep(time.Second)
		w.must(say(b, 10))
		w.wantProblem(say(a, 1), schema.Code_CODE_RATE_EXCEEDED)
	})
}

// TestTokenExpiresOnStreams: every stream ends with its token, in every dialect.
func TestTokenExpiresOnStreams(t *testing.T) {
	eachDialect(t, func(w *world, d dialect) {
		k := w.dial(d, w.token(schema.Role_ROLE_USER, "*"))
		streams := map[string]*conversation{"Follow": k.follow(&schema.Attach{Session: "s"})}
		if !d.http1 {
			streams["AppendStream"], streams["Connect"] = k.open("AppendStream", true), k.open("Connect", true)
		}
		synctest.Wait()
		began := time.Now()
		ends := make(chan time.Duration, len(streams))
		for _, c := range streams {
			go func() {
				for {
					if _, err := c.recv(); err != nil {
						w.wantExpired(err)
						ends <- time.Since(began)
						return
					}
				}
			}()
		}
		for range streams {
			// The token's times are whole seconds.
			if took := <-ends; took < time.Hour+4*time.Second || took > time.Hour+6*time.Second {
				w.Errorf("a stream ended after %s", took)
			}
		}
		w.wantProblem(k.call("GetSession", &schema.GetSessionRequest{Session: "s"}, new(schema.GetSessionResponse)), schema.Code_CODE_UNAUTHENTICATED)
	})
}

// wantExpired is wantProblem for goroutines of a test.
func (w *world) wantExpired(err error) {
	p, ok := err.(*problem) //nolint:errorlint // it is returned as it is
	if !ok || p.word != "token_expired" || p.grpc != 16 {
		w.Errorf("got %v, want token_expired", err)
		return
	}
	if f, ok := p.detail.(*schema.ErrorFrame); !ok || f.GetCode() != schema.Code_CODE_TOKEN_EXPIRED || f.GetReconnect() != schema.Reconnect_RECONNECT_SAME_CURSOR {
		w.Errorf("the detail is %v", p.detail)
	}
}

// TestRefreshOnConnect: a multiplexed connection over gRPC is renewed like any other.
func TestRefreshOnConnect(t *testing.T) {
	eachBidi(t, func(w *world, d dialect) {
		c := w.dial(d, w.token(schema.Role_ROLE_USER, "*")).open("Connect", true)
		c.say(clientFrame(&schema.Attach{Channel: 1, Session: "s"}))
		refresh := func(token string) {
			c.say(&schema.ClientFrame{Frame: &schema.ClientFrame_Refresh{Refresh: &schema.Refresh{Token: token}}})
		}
		for _, f := range []func(*schema.ServerFrame) bool{
			func(f *schema.ServerFrame) bool { return f.GetAttached() != nil },
			func(f *schema.ServerFrame) bool { return f.GetCaughtUp() != nil },
		} {
			if got := c.next(); !f(got) {
				w.Fatalf("got %v", got)
			}
		}
		for range 3 {
			time.Sleep(50 * time.Minute)
			refresh(w.token(schema.Role_ROLE_USER, "*"))
			if f := c.next(); f.GetRefreshed() == nil {
				w.Fatalf("got %v", f)
			}
		}
		w.publish("s", "after two hours and a half")
		c.wantTexts(0, "after two hours and a half")
		refresh(w.token(schema.Role_ROLE_AGENT, "*"))
		c.wantStatus(schema.Code_CODE_FORBIDDEN)
	})
}

// TestUserConnectionsOfFollow: following over gRPC takes a place like any other connection.
func TestUserConnectionsOfFollow(t *testing.T) {
	limited(t, gateway.Limits{UserConnections: 2}, func(w *world, d dialect) {
		k := w.dial(d, w.token(schema.Role_ROLE_USER, "*"))
		var open []*conversation
		for range 2 {
			c := k.follow(&schema.Attach{Session: "s"})
			c.next()
			open = append(open, c)
		}
		w.dial(d, k.token).follow(&schema.Attach{Session: "s"}).wantStatus(schema.Code_CODE_TOO_MANY_CONNECTIONS)
		open[0].cancel()
		synctest.Wait()
		c := k.follow(&schema.Attach{Session: "s"})
		c.next()
		c.cancel()
		open[1].cancel()
		if n := w.counter("tidemark_gateway_limits_exceeded_total", "limit", "user_connections"); n != 1 {
			w.Errorf("the limit was exceeded %v times", n)
		}
	})
}

// TestOriginRefused: a browser whose page may not call is told so when it asks, and it is counted.
func TestOriginRefused(t *testing.T) {
	limits := func(c *Config, gc *gateway.Config) { gc.Metrics = c.Metrics }
	inWorldWith(t, limits, func(w *world) {
		res := w.browser("OPTIONS", procedure("Append"), http.Header{"Origin": {"https://evil.example.com"}, "Access-Control-Request-Method": {"POST"}}, nil)
		var body struct{ Error, Details, Code string }
		text, err := io.ReadAll(res.Body)
		w.must(err)
		w.must(json.Unmarshal(text, &body))
		if res.StatusCode != http.StatusForbidden || body.Code != "origin_not_allowed" || body.Error != "Unauthorized" || body.Details == "" || res.Header.Get("Access-Control-Allow-Origin") != "" {
			w.Errorf("got %s %v %s", res.Status, res.Header, text)
		}
		if n := w.counter("tidemark_gateway_limits_exceeded_total", "limit", "origin"); n != 1 {
			w.Errorf("the limit was exceeded %v times", n)
		}
	})
}
