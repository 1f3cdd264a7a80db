package edgews

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"testing"

	"tidemark/broker"
	"tidemark/internal/auth"
	"tidemark/internal/gateway"
	"tidemark/schema"
)

// handler is an edge's, for requests whose answer comes before an upgrade.
func handler(t *testing.T, change func(*Config)) http.Handler {
	t.Helper()
	v, err := auth.NewVerifier(auth.Config{Secret: []byte(secret)})
	if err != nil {
		t.Fatal(err)
	}
	g, err := gateway.New(gateway.Config{Log: broker.NewMemoryLog(), Verify: v.Verify})
	if err != nil {
		t.Fatal(err)
	}
	cfg := Config{Gateway: g, Verify: v.Verify}
	change(&cfg)
	e, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(e.Close)
	return e.Handler()
}

// TestLoopbackHasNoPage: who asks for both is told.
func TestLoopbackHasNoPage(t *testing.T) {
	v, err := auth.NewVerifier(auth.Config{Secret: []byte(secret)})
	if err != nil {
		t.Fatal(err)
	}
	g, err := gateway.New(gateway.Config{Log: broker.NewMemoryLog(), Verify: v.Verify})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := New(Config{Gateway: g, Verify: v.Verify, Loopback: true, Page: true}); err == nil {
		t.Error("an edge was made of both")
	}
}

// TestLoopbackRefuses tries what pages, other machines and programs that do not know better may send to a desktop application's socket.
func TestLoopbackRefuses(t *testing.T) {
	h := handler(t, func(c *Config) {
		c.Loopback, c.Origins = true, []string{"https://app.example.com", "app://bundle", "file://"}
	})
	// A recorder cannot be upgraded further than to this answer.
	const comesIn = http.StatusSwitchingProtocols
	good := http.Header{"Connection": {"Upgrade"}, "Upgrade": {"websocket"}, "Sec-Websocket-Version": {"13"}, "Sec-Websocket-Key": {"dGhlIHNhbXBsZSBub25jZQ=="}, "Sec-Websocket-Protocol": {SubprotocolProto}}
	type ask struct {
		path, remote, host string
		header             map[string]string
	}
	tests := map[string]struct {
		ask    ask
		status int
		code   schema.Code
	}{
		"as it should be":                {ask{}, comesIn, 0},
		"by name":                        {ask{host: "localhost:9"}, comesIn, 0},
		"by name in capitals":            {ask{host: "LocalHost"}, comesIn, 0},
		"over IPv6":                      {ask{remote: "[::1]:5", host: "[::1]:9"}, comesIn, 0},
		"over IPv6 without a port":       {ask{remote: "[::1]:5", host: "[::1]"}, comesIn, 0},
		"over IPv4 in IPv6":              {ask{remote: "[::ffff:127.0.0.1]:5"}, comesIn, 0},
		"health":                         {ask{path: "/healthz"}, http.StatusOK, 0},
		"another machine":                {ask{remote: "192.0.2.1:5"}, http.StatusForbidden, schema.Code_CODE_FORBIDDEN},
		"another machine over IPv6":      {ask{remote: "[2001:db8::1]:5"}, http.StatusForbidden, schema.Code_CODE_FORBIDDEN},
		"another machine's health check": {ask{path: "/healthz", remote: "192.0.2.1:5"}, http.StatusForbidden, schema.Code_CODE_FORBIDDEN},
		"a peer without an address":      {ask{remote: "pipe"}, http.StatusForbidden, schema.Code_CODE_FORBIDDEN},
		"a rebound name":                 {ask{host: "evil.example:9"}, http.StatusForbidden, schema.Code_CODE_FORBIDDEN},
		"a rebound name, health":         {ask{path: "/healthz", host: "evil.example:9"}, http.StatusForbidden, schema.Code_CODE_FORBIDDEN},
		"a name that looks local":        {ask{host: "127.0.0.1.evil.example"}, http.StatusForbidden, schema.Code_CODE_FORBIDDEN},
		"another that looks local":       {ask{host: "localhost.evil.example"}, http.StatusForbidden, schema.Code_CODE_FORBIDDEN},
		"a number":                       {ask{host: "2130706433"}, http.StatusForbidden, schema.Code_CODE_FORBIDDEN},
		"any address":                    {ask{host: "0.0.0.0:9"}, http.StatusForbidden, schema.Code_CODE_FORBIDDEN},
		"an origin that is listed":       {ask{header: map[string]string{"Origin": "https://app.example.com"}}, comesIn, 0},
		"an application's own scheme":    {ask{header: map[string]string{"Origin": "app://bundle"}}, comesIn, 0},
		"a page from a file":             {ask{header: map[string]string{"Origin": "file://"}}, comesIn, 0},
		"a foreign origin":               {ask{header: map[string]string{"Origin": "https://evil.example"}}, http.StatusForbidden, schema.Code_CODE_ORIGIN_NOT_ALLOWED},
		"the listed one without TLS":     {ask{header: map[string]string{"Origin": "http://app.example.com"}}, http.StatusForbidden, schema.Code_CODE_ORIGIN_NOT_ALLOWED},
		"the server's own origin":        {ask{header: map[string]string{"Origin": "http://127.0.0.1:9"}}, http.StatusForbidden, schema.Code_CODE_ORIGIN_NOT_ALLOWED},
		"another page of this machine":   {ask{header: map[string]string{"Origin": "http://localhost:3000"}}, http.StatusForbidden, schema.Code_CODE_ORIGIN_NOT_ALLOWED},
		"an opaque origin":               {ask{header: map[string]string{"Origin": "null"}}, http.StatusForbidden, schema.Code_CODE_ORIGIN_NOT_ALLOWED},
		"no origin at all":               {ask{header: map[string]string{"Origin": "%zz"}}, http.StatusForbidden, schema.Code_CODE_ORIGIN_NOT_ALLOWED},
		"a token in the query":           {ask{path: "/v1/connect?token=x"}, http.StatusUnauthorized, schema.Code_CODE_UNAUTHENTICATED},
		"a token in a header":            {ask{header: map[string]string{"Authorization": "Bearer x"}}, http.StatusUnauthorized, schema.Code_CODE_UNAUTHENTICATED},
		"other credentials":              {ask{header: map[string]string{"Authorization": "Basic eDp4"}}, http.StatusUnauthorized, schema.Code_CODE_UNAUTHENTICATED},
		"a token in a subprotocol":       {ask{header: map[string]string{"Sec-Websocket-Protocol": SubprotocolProto + ", bearer.x"}}, http.StatusUnauthorized, schema.Code_CODE_UNAUTHENTICATED},
		"text":                           {ask{header: map[string]string{"Sec-Websocket-Protocol": SubprotocolJSON}}, http.StatusBadRequest, schema.Code_CODE_UNSUPPORTED_PROTOCOL},
		"no protocol":                    {ask{header: map[string]string{"Sec-Websocket-Protocol": ""}}, http.StatusBadRequest, schema.Code_CODE_UNSUPPORTED_PROTOCOL},
		"text or binary":                 {ask{header: map[string]string{"Sec-Websocket-Protocol": SubprotocolJSON + ", " + SubprotocolProto}}, comesIn, 0},
		"no upgrade":                     {ask{header: map[string]string{"Upgrade": ""}}, http.StatusUpgradeRequired, schema.Code_CODE_UNSUPPORTED_PROTOCOL},
		"the session socket":             {ask{path: "/ws?sessionName=s"}, http.StatusNotFound, 0},
		"metrics":                        {ask{path: "/metrics"}, http.StatusNotFound, 0},
		"the page":                       {ask{path: "/"}, http.StatusNotFound, 0},
		"the page's files":               {ask{path: "/page/app.js"}, http.StatusNotFound, 0},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			path := tt.ask.path
			if path == "" {
				path = "/v1/connect"
			}
			r := httptest.NewRequest(http.MethodGet, path, http.NoBody)
			r.Header = good.Clone()
			r.RemoteAddr, r.Host = "127.0.0.1:5", "127.0.0.1:9"
			if tt.ask.remote != "" {
				r.RemoteAddr = tt.ask.remote
			}
			if tt.ask.host != "" {
				r.Host = tt.ask.host
			}
			for k, v := range tt.ask.header {
				r.Header.Set(k, v)
			}
			w := httptest.NewRecorder()
			h.ServeHTTP(w, r)
			if w.Code != tt.status {
				t.Fatalf("status %d, want %d: %s", w.Code, tt.status, w.Body)
			}
			var said problem
			if tt.code != 0 && (json.Unmarshal(w.Body.Bytes(), &said) != nil || said.Code != tt.code.Word()) {
				t.Errorf("it said %s, want %s", w.Body, tt.code.Word())
			}
		})
	}
}
