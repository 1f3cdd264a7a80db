package world

import (
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"testing"

	"google.golang.org/grpc/health/grpc_health_v1"

	"tidemark/internal/gateway"
	"tidemark/schema"
)

// crossings are attempts that need more than a name: several messages on one connection, what a victim knows, what stands beside the token. theirs is a token of another tenant that reaches all of it, narrow
// one of the victim's that reaches the sessions mine*.
func (v *wall) crossings() []attempt {
	w := v.w
	theirs, narrow := w.tokenOf(rival, "agent", schema.Role_ROLE_ADMIN, "*"), w.tokenOf("", "agent", schema.Role_ROLE_ADMIN, "mine*")
	victims := w.Token(schema.Role_ROLE_AGENT, "*")
	ws := func(session, more string) string { return "/ws?sessionName=" + url.QueryEscape(session) + more }
	attach := func(channel uint32, session string) *schema.ClientFrame {
		return attachFrame(&schema.Attach{Channel: channel, Session: session})
	}
	publish := func(p *schema.Publish) *schema.ClientFrame {
		if p.Envelopes == nil {
			p.Envelopes = []*schema.Envelope{Token("forged")}
		}
		return publishFrame(p)
	}
	refresh := func(token string) *schema.ClientFrame {
		return &schema.ClientFrame{Frame: &schema.ClientFrame_Refresh{Refresh: &schema.Refresh{Token: token}}}
	}
	hello := func(token string) *schema.ClientFrame {
		return &schema.ClientFrame{Frame: &schema.ClientFrame_Hello{Hello: &schema.Hello{Token: token}}}
	}
	binary, json := []string{"tidemark.v1.proto"}, []string{"tidemark.v1.json"}
	get := func(x *intruder, h http.Header, target string) {
		h.Set("Content-Type", "application/json")
		x.HTTP(".grpc", http.MethodPost, "/tidemark.v1.SessionService/GetSession", h, []byte(`{"session":"`+target+`"}`))
	}
	known := v.history[stored-1]
	all := []attempt{
		// What a connection may reach does not grow while it lasts.
		{"a refresh with another tenant's token", "forbidden", func(x *intruder, target string) {
			x.Socket("/v1/connect", bearer(theirs), binary, refresh(victims), attach(1, target))
		}},
		{"a refresh with another tenant's token, in JSON", "forbidden", func(x *intruder, target string) {
			x.Socket("/v1/connect", bearer(theirs), json, jsonFrame(attach(1, target)), jsonFrame(refresh(victims)))
		}},
		{"a refresh with another tenant's token over gRPC", "forbidden", func(x *intruder, target string) {
			x.Stream(theirs, "Connect", false, refresh(victims), attach(1, target))
		}},
		{"a refresh with another tenant's token on the session socket", "forbidden", func(x *intruder, target string) {
			x.Socket(ws(target, ""), bearer(theirs), nil, `{"type":"refresh","data":{"token":"`+victims+`"}}`)
		}},
		{"a refresh with a forged token", "unauthenticated", func(x *intruder, target string) {
			x.Socket("/v1/connect", bearer(theirs), binary, refresh(forgeries()["claims changed behind the signing"]), attach(1, target))
		}},
		{"a refresh with a forged token on the session socket", "unauthenticated", func(x *intruder, target string) {
			x.Socket(ws(target, ""), bearer(theirs), nil, `{"type":"refresh","data":{"token":"`+forgeries()[`the algorithm "none"`]+`"}}`)
		}},
		{"a second hello with another tenant's token", "invalid_message", func(x *intruder, target string) {
			x.Socket("/v1/connect", nil, binary, hello(theirs), hello(victims), attach(1, target))
		}},
		{"a hello with a forged token beside a good one", "", func(x *intruder, target string) {
			x.Socket("/v1/connect", bearer(theirs), binary, hello(forgeries()["a wrong secret"]), attach(1, target))
		}},
		{"a forged token beside a good one", "unauthenticated", func(x *intruder, target string) {
			x.Socket(ws(target, "&token="+url.QueryEscape(theirs)), bearer(forgeries()["a wrong secret"]), nil)
		}},
		{"a good token beside a forged one", "seq_beyond_head", func(x *intruder, target string) {
			x.Socket(ws(target, "&lastSeq=1&token="+url.QueryEscape(forgeries()["a wrong secret"])), bearer(theirs), []string{"bearer." + forgeries()["no algorithm"]})
		}},
		// Channels, cached rights.
		{"a channel that is another's", "invalid_message", func(x *intruder, target string) {
			x.Socket("/v1/connect", bearer(theirs), binary, publish(&schema.Publish{Channel: 1}))
		}},
		{"a channel and a name", "invalid_message", func(x *intruder, target string) {
			x.Socket("/v1/connect", bearer(narrow), binary, attach(1, "mine"), publish(&schema.Publish{Channel: 1, Session: target}))
		}},
		{"the same channel for another session", "invalid_message", func(x *intruder, target string) {
			x.Socket("/v1/connect", bearer(narrow), binary, attach(1, "mine"), attach(1, target))
		}},
		{"an attachment beside one that is allowed", "forbidden", func(x *intruder, target string) {
			x.Socket("/v1/connect", bearer(narrow), json, jsonFrame(attach(1, "mine")), jsonFrame(attach(2, target)))
		}},
		{"a publish on an attachment that was refused", "invalid_message", func(x *intruder, target string) {
			x.Socket("/v1/connect", bearer(narrow), binary, attach(7, target), publish(&schema.Publish{Channel: 7}))
		}},
		{"two names on the session socket", "invalid_message", func(x *intruder, target string) {
			x.Socket(ws("mine2", "&sessionName="+target), bearer(narrow), nil)
		}},
		{"two names on the session socket, the other way", "invalid_message", func(x *intruder, target string) {
			x.Socket(ws(target, "&sessionName=mine2"), bearer(narrow), nil)
		}},
		// What the victim knows helps nobody else.
		{"the victim's epoch", "epoch_mismatch", func(x *intruder, target string) {
			x.Knows(v.session.GetEpoch())
			x.Socket("/v1/connect", bearer(theirs), binary, attachFrame(&schema.Attach{Channel: 1, Session: target, Epoch: v.session.GetEpoch(), Start: &schema.Attach_AfterSeq{AfterSeq: stored}}))
		}},
		{"the victim's epoch on the session socket", "epoch_mismatch", func(x *intruder, target string) {
			x.Knows(v.session.GetEpoch())
			x.Socket(ws(target, "&epoch="+v.session.GetEpoch()), bearer(theirs), nil)
		}},
		{"the victim's producer", "producer_gap", func(x *intruder, target string) {
			e := Token("forged")
			e.Producer = &schema.Producer{Id: known.GetProducer().GetId(), Epoch: 1, Seq: stored + 1}
			x.Socket("/v1/connect", bearer(theirs), binary, publish(&schema.Publish{Session: target, Envelopes: []*schema.Envelope{e}}))
		}},
		{"the victim's producer again", "producer_gap", func(x *intruder, target string) {
			e := clone(known)
			x.Call(theirs, "Append", &schema.AppendRequest{Session: target, Envelopes: []*schema.Envelope{e}}, new(schema.AppendResponse))
		}},
		{"the last envelopes", "", func(x *intruder, target string) {
			x.Socket("/v1/connect", bearer(theirs), binary, attachFrame(&schema.Attach{Channel: 1, Session: target, Start: &schema.Attach_Last{Last: 5}}))
		}},
		// What stands beside the token.
		{"a tenant in the query", "invalid_message", func(x *intruder, target string) {
			x.Socket(ws(target, "&lastSeq=4&tenant=default&tenantName=default"), bearer(theirs), nil)
		}},
		{"a tenant in the headers", "session_not_found", func(x *intruder, target string) {
			h := bearer(theirs)
			for _, name := range []string{"Tenant", "X-Tenant", "Tidemark-Tenant", "X-Forwarded-User", "X-Original-Url", "X-Http-Method-Override"} {
				h.Set(name, "default")
			}
			get(x, h, target)
		}},
		{"two tokens in the headers", "session_not_found", func(x *intruder, target string) {
			h := bearer(theirs)
			h.Add("Authorization", "Bearer "+forgeries()["a wrong secret"])
			get(x, h, target)
		}},
		{"a tenant in the message", "session_not_found", func(x *intruder, target string) {
			get(x, bearer(theirs), target+`","tenant":"default`)
		}},
		{"a key of another spelling", "session_not_found", func(x *intruder, target string) {
			get(x, bearer(narrow), `mine","Session":"`+target)
		}},
		{"the same key twice", "invalid_argument", func(x *intruder, target string) {
			get(x, bearer(narrow), `mine","session":"`+target)
		}},
		{"a source that says somebody else", "conflict", func(x *intruder, target string) {
			p := atHead(target)
			p.Envelopes[0].Source = &schema.Source{Subject: "agent", Role: schema.Role_ROLE_SYSTEM}
			p.Envelopes[0].Seq = 1
			x.Socket("/v1/connect", bearer(theirs), binary, publish(p))
		}},
	}
	// Paths that there are not, or that are somebody's own.
	for _, path := range []string{
		"/healthz?session={}", "/readyz?session={}", "/v1/sessions/{}", "/v1/connect/../../{}", "/ws/../default/{}", "//ws?sessionName={}", "/%77s?sessionName={}", "/debug/vars?{}", "/tidemark.v1.SessionService/Log.{}",
	} {
		for _, port := range []string{".http", ".grpc"} {
			all = append(all, attempt{"the path " + path + " at " + port, "", func(x *intruder, target string) {
				x.HTTP(port, http.MethodGet, strings.ReplaceAll(path, "{}", target), bearer(theirs), nil)
			}})
		}
	}
	return append(all,
		attempt{"the health of a session", "no service of this name", func(x *intruder, target string) {
			c := newCalls(path{net: w.net, addr: x.e.Name + ".grpc"}, theirs)
			defer c.drop()
			err := c.cc.Invoke(c.ctx, "/grpc.health.v1.Health/Check", &grpc_health_v1.HealthCheckRequest{Service: target}, new(grpc_health_v1.HealthCheckResponse))
			x.status(err)
		}},
		// From here on there are sessions of these names in the intruder's tenant, too.
		attempt{"a session of the same name", "", func(x *intruder, target string) {
			x.Call(theirs, "CreateSession", &schema.CreateSessionRequest{Session: target}, new(schema.CreateSessionResponse))
			x.Call(theirs, "GetSession", &schema.GetSessionRequest{Session: target}, new(schema.GetSessionResponse))
		}},
		attempt{"the victim's ids in a session of the same name", "", func(x *intruder, target string) {
			x.Knows(known.GetId())
			e := Token("forged")
			e.Id = known.GetId()
			x.Socket("/v1/connect", bearer(theirs), binary, attach(1, target), publish(&schema.Publish{Channel: 1, Envelopes: []*schema.Envelope{e}}))
		}},
		attempt{"the session socket of a session of the same name", "", func(x *intruder, target string) {
			x.Socket(ws(target, "&lastSeq=latest"), bearer(theirs), nil, `{"type":"token","data":{"message_id":"m1","text":"forged"}}`, `{"type":"run_status","data":{"run_id":"r1","status":"running"}}`)
		}},
		attempt{"the deletion of a session of the same name", "", func(x *intruder, target string) {
			x.Call(theirs, "DeleteSession", &schema.DeleteSessionRequest{Session: target}, new(schema.DeleteSessionResponse))
			x.Call(theirs, "GetSession", &schema.GetSessionRequest{Session: target}, new(schema.GetSessionResponse))
		}},
		attempt{"a cursor of a session of the same name that is gone", "seq_beyond_head", func(x *intruder, target string) {
			v.w.Settle() // the deletion came through the other edge
			x.Socket(ws(target, "&lastSeq=3"), bearer(theirs), nil)
		}},
	)
}

// TestI9_Crossings: conversations that begin with what is allowed and go on to what is not.
func TestI9_Crossings(t *testing.T) {
	Run(t, Config{}, func(w *World) {
		v := w.inside()
		v.all(v.crossings())
	})
}

// TestI9_Listings: no prefix, status or page token of a listing shows another tenant's sessions.
func TestI9_Listings(t *testing.T) {
	Run(t, Config{}, func(w *World) {
		v := w.inside()
		theirs := w.tokenOf(rival, "agent", schema.Role_ROLE_ADMIN, "*")
		page := func(token string) string {
			var res schema.ListSessionsResponse
			w.must(w.CallAs(w.Edge(0), Dial{Token: token}, "ListSessions", &schema.ListSessionsRequest{PageSize: 1}, &res))
			if res.GetNextPageToken() == "" {
				t.Fatal("the listing has one page; the test shows nothing")
			}
			return res.GetNextPageToken()
		}
		w.must(w.CallAs(w.Edge(0), Dial{Token: theirs}, "CreateSession", &schema.CreateSessionRequest{Session: "own"}, new(schema.CreateSessionResponse)))
		w.must(w.CallAs(w.Edge(0), Dial{Token: theirs}, "CreateSession", &schema.CreateSessionRequest{Session: "own too"}, new(schema.CreateSessionResponse)))
		w.Settle()
		v.records = v.registry()
		victims, own := page(w.Token(schema.Role_ROLE_AGENT, "*")), page(theirs)
		var all []attempt
		add := func(name, refused string, req func(target string) *schema.ListSessionsRequest) {
			all = append(all, attempt{name, refused, func(x *intruder, target string) {
				x.Call(theirs, "ListSessions", req(target), new(schema.ListSessionsResponse))
			}})
		}
		for _, d := range disguises() {
			add("the prefix: "+d.name, "", func(target string) *schema.ListSessionsRequest {
				return &schema.ListSessionsRequest{Prefix: strings.ToValidUTF8(d.of(target), "?")}
			})
		}
		for status := range schema.Status_name {
			add(fmt.Sprint("the status ", status), "", func(string) *schema.ListSessionsRequest {
				return &schema.ListSessionsRequest{Status: schema.Status(status)}
			})
		}
		for _, size := range []uint32{1, 2, 3, 1000, 1 << 31} {
			add(fmt.Sprint("pages of ", size), "", func(string) *schema.ListSessionsRequest { return &schema.ListSessionsRequest{PageSize: size} })
			add(fmt.Sprint("behind the own page, pages of ", size), "", func(string) *schema.ListSessionsRequest {
				return &schema.ListSessionsRequest{PageSize: size, PageToken: own}
			})
		}
		for name, token := range map[string]string{
			"the victim's": victims, "the victim's in half": victims[:len(victims)/2], "the own one with the victim's end": own[:len(own)-4] + victims[len(victims)-4:],
			"a number": "1", "zero": "0", "nonsense": "AAAA", "no base64": "%%%", "the own one and more": own + "AA", "a name": existing, "a subject": "$KV.SESSIONS.default.>",
		} {
			add("the page token: "+name, "invalid_message", func(string) *schema.ListSessionsRequest { return &schema.ListSessionsRequest{PageToken: token} })
		}
		v.all(all)
	})
}

// TestI9_AListingIsTheSameWhoeverElseIsThere: what a tenant is told of its own sessions, page by page, does not change when another begins some.
func TestI9_AListingIsTheSameWhoeverElseIsThere(t *testing.T) {
	Run(t, Config{}, func(w *World) {
		theirs := w.tokenOf(rival, "agent", schema.Role_ROLE_ADMIN, "*")
		for i := range 3 {
			w.must(w.CallAs(w.Edge(0), Dial{Token: theirs}, "CreateSession", &schema.CreateSessionRequest{Session: fmt.Sprint("own ", i)}, new(schema.CreateSessionResponse)))
		}
		walk := func() string {
			w.Settle()
			x := w.newIntruder(w.Edge(0))
			for _, size := range []uint32{1, 2, 3, 4, 100} {
				for token, n := "", 0; ; n++ {
					var res schema.ListSessionsResponse
					x.Call(theirs, "ListSessions", &schema.ListSessionsRequest{PageSize: size, PageToken: token}, &res)
					if token = res.GetNextPageToken(); token == "" || n > 10 {
						break
					}
				}
			}
			return alike(x.Said(), existing)
		}
		alone := walk()
		w.inside()
		if beside := walk(); beside != alone {
			t.Errorf("alone in the deployment, it is told\n%s\nand beside another tenant\n%s", alone, beside)
		}
	})
}

// TestI9_MetricsNameNobody: what anybody may scrape counts all tenants together.
func TestI9_MetricsNameNobody(t *testing.T) {
	Run(t, Config{}, func(w *World) {
		v := w.inside()
		v.all([]attempt{{"something that is refused", "", func(x *intruder, target string) {
			x.Socket("/v1/connect", bearer(w.tokenOf(rival, "agent", schema.Role_ROLE_USER, "mine")), []string{"tidemark.v1.proto"}, attachFrame(&schema.Attach{Channel: 1, Session: target}))
		}}})
		for i := range 2 {
			x := w.newIntruder(w.Edge(i))
			x.HTTP(".http", http.MethodGet, "/metrics", http.Header{}, nil)
			said := x.Said()
			if !strings.Contains(said, "tidemark_gateway_connections") {
				t.Errorf("these are no metrics:\n%s", said)
			}
			for _, secret := range []string{treasure, existing, absent, v.session.GetEpoch(), "mine", `\"rival\"`, `\"agent\"`, `\"default\"`} {
				if strings.Contains(said, secret) {
					t.Errorf("the metrics name %q", secret)
				}
			}
		}
	})
}

// TestI9_PlacesAreATenantsOwn: users of one tenant take no places from those of the same name in sessions of the same name of another, on whatever edge, and are told nothing of them.
func TestI9_PlacesAreATenantsOwn(t *testing.T) {
	Run(t, Config{Gateway: func(c *gateway.Config) { c.Limits.UserConnections = 2 }}, func(w *World) {
		try := func(tenant string, i int) schema.Code {
			p, end := w.TryDial(w.Edge(i%2), SessionSocket, Dial{Token: w.tokenOf(tenant, "ana", schema.Role_ROLE_USER, "*")}, &schema.Attach{Channel: 1, Session: existing})
			if p == nil {
				return end.Code
			}
			w.closers = append(w.closers, p.Close)
			f, over := p.next(patience)
			switch {
			case over:
				return p.ending.Code
			case f.GetError() != nil:
				return f.GetError().GetCode()
			default:
				return schema.Code_CODE_UNSPECIFIED
			}
		}
		want := func(tenant string, i int, code schema.Code) {
			t.Helper()
			if got := try(tenant, i); got != code {
				t.Errorf("connection %d of tenant %s: %s instead of %s", i, tenant, got.Word(), code.Word())
			}
		}
		want("default", 1, schema.Code_CODE_UNSPECIFIED)
		want(rival, 1, schema.Code_CODE_UNSPECIFIED)
		want(rival, 2, schema.Code_CODE_UNSPECIFIED)
		want(rival, 3, schema.Code_CODE_TOO_MANY_CONNECTIONS)
		want("default", 2, schema.Code_CODE_UNSPECIFIED)
		want("default", 3, schema.Code_CODE_TOO_MANY_CONNECTIONS)
	})
}
