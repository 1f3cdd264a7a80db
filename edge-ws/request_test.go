package edgews

import (
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/coder/websocket"
	"github.com/prometheus/client_golang/prometheus"

	"tidemark/internal/gateway"
)

// problemOf reads a refusal's body.
func problemOf(t *testing.T, resp *http.Response) (p problem) {
	t.Helper()
	body, _ := io.ReadAll(resp.Body)
	_ = resp.Body.Close()
	if err := json.Unmarshal(body, &p); err != nil || p.Error == "" || p.Details == "" || p.Code == "" || resp.Header.Get("Content-Type") != "application/json" {
		t.Errorf("status %d has the body %q, %v", resp.StatusCode, body, err)
	}
	return p
}

// TestQueries: what is misspelt, doubled or unreadable in a query is refused, not passed over, and not repeated.
func TestQueries(t *testing.T) {
	registry := prometheus.NewRegistry()
	bubble(t, func(c *Config, _ *gateway.Config) { c.Register, c.Metrics = registry, registry }, func(w *world) {
		proto := &websocket.DialOptions{Subprotocols: []string{SubprotocolProto}}
		session, connect := "/ws?sessionName=s&token="+w.agentToken(), "/v1/connect?token="+w.agentToken()
		for path, says := range map[string]string{
			session + "&lastseq=5":           "sessionName, token, lastSeq, epoch",
			session + "&since=secret":        "sessionName, token, lastSeq, epoch",
			session + "&lastSeq=1&lastSeq=2": "lastSeq more than once",
			session + "&sessionName=s":       "sessionName more than once",
			session + "&epoch=%zz":           "cannot be read",
			session + "&epoch=1;lastSeq=2":   "cannot be read",
			connect + "&sessionName=s":       "it knows token.",
			connect + "&token=x":             "token more than once",
			connect + "&a=%":                 "cannot be read",
		} {
			_, resp, err := w.dial(path, proto)
			if err == nil || resp == nil || resp.StatusCode != http.StatusBadRequest {
				t.Errorf("%s: %v, %v", path, resp, err)
				continue
			}
			if p := problemOf(t, resp); p.Code != "invalid_message" || !strings.Contains(p.Details, says) || strings.Contains(p.Details, "secret") {
				t.Errorf("%s: refused with %+v", path, p)
			}
		}
		for _, path := range []string{session + "&lastSeq=latest&epoch=", connect} {
			c := w.mustDial(path, proto)
			_ = c.c.CloseNow()
		}
		// Who may not come in is told so first.
		if _, resp, err := w.dial("/ws?sessionName=s&lastseq=5", nil); err == nil || resp.StatusCode != http.StatusUnauthorized {
			t.Errorf("%v, %v", resp, err)
		}
		resp, err := w.http.Get("http://edge/metrics")
		if err != nil {
			t.Fatal(err)
		}
		metrics, _ := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		for _, line := range []string{`tidemark_edge_ws_refused_total{code="invalid_message"} 9`, `tidemark_edge_ws_refused_total{code="unauthenticated"} 1`} {
			if !strings.Contains(string(metrics), line+"\n") {
				t.Errorf("the metrics do not have %s:\n%s", line, metrics)
			}
		}
	})
}

// TestOneFormOfRefusals: also what there is not, and what the library refuses, is answered in JSON.
func TestOneFormOfRefusals(t *testing.T) {
	bubble(t, nil, func(w *world) {
		upgrade := http.Header{"Connection": {"Upgrade"}, "Upgrade": {"websocket"}, "Sec-Websocket-Version": {"13"}, "Sec-Websocket-Key": {"dGhlIHNhbXBsZSBub25jZQ=="}, "Sec-Websocket-Protocol": {SubprotocolProto}}
		for _, c := range []struct {
			method, path, without string
			status                int
		}{
			{"GET", "/nothing", "", 404},
			{"POST", "/nothing", "", 404},
			{"GET", "/metrics/more", "", 404},
			{"POST", "/metrics", "", 405},
			{"DELETE", "/ws", "", 405},
			{"PUT", "/v1/connect", "", 405},
			{"GET", "/v1/connect", "Sec-Websocket-Version", 400},
			{"GET", "/v1/connect", "Sec-Websocket-Key", 400},
			{"GET", "/v1/connect", "Connection", 426},
		} {
			req, err := http.NewRequestWithContext(w.Context(), c.method, "http://edge"+c.path, nil)
			if err != nil {
				t.Fatal(err)
			}
			req.Header = upgrade.Clone()
			req.Header.Set("Authorization", "Bearer "+w.agentToken())
			req.Header.Del(c.without)
			resp, err := w.http.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			if p := problemOf(t, resp); resp.StatusCode != c.status || p.Error != http.StatusText(c.status) || p.Code != "invalid_message" || c.status == 405 && resp.Header.Get("Allow") != "GET, HEAD" {
				t.Errorf("%s %s without %q: %d %+v", c.method, c.path, c.without, resp.StatusCode, p)
			}
		}
	})
}

// TestOriginsThatCanBe: a pattern that no page has as its origin is refused at the start, not found out about by the first page.
func TestOriginsThatCanBe(t *testing.T) {
	for _, pattern := range []string{"*", "app.example.com", "*.example.com", "localhost:3000", "[[]::1]:3000", "https://app.example.com", "http://*.example.com:8080", "*://app.test", "app://-", "tauri://localhost", "file://"} {
		if err := checkOrigin(pattern); err != nil {
			t.Errorf("%q: %v", pattern, err)
		}
	}
	for _, pattern := range []string{"", ",", "https://", "http://", "*://", "app://", "://app.test", "https://app.test/", "https://app.test/page", "a.test,b.test", " a.test", "a[.test"} {
		if err := checkOrigin(pattern); err == nil {
			t.Errorf("%q is taken", pattern)
		}
	}
}
