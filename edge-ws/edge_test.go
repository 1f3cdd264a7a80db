package edgews

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coder/websocket"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/proto"

	"tidemark/internal/gateway"
	"tidemark/schema"
)

// TestConnect: both subprotocols carry a whole conversation.
func TestConnect(t *testing.T) {
	for _, subprotocol := range []string{SubprotocolProto, SubprotocolJSON} {
		t.Run(subprotocol, func(t *testing.T) {
			bubble(t, nil, func(w *world) {
				p, f := w.connect(subprotocol), w.connect(subprotocol)
				if got := p.c.Subprotocol(); got != subprotocol {
					t.Fatalf("the edge selected %q", got)
				}
				f.attach(&schema.Attach{Channel: 3, Session: "s"})
				if a := want[*schema.ServerFrame_Attached](f).Attached; a.GetChannel() != 3 || a.GetSession() != "s" {
					t.Errorf("got %v", a)
				}
				want[*schema.ServerFrame_CaughtUp](f)
				p.publish(1, "s", "one")
				p.publish(2, "s", "two", "three")
				acks := map[uint64]uint64{}
				for len(acks) < 2 {
					for _, a := range want[*schema.ServerFrame_Published](p).Published.GetAcks() {
						acks[a.GetPublishId()] = a.GetLastSeq()
					}
				}
				if acks[1] != 1 || acks[2] != 3 {
					t.Errorf("acks %v", acks)
				}
				f.wantTexts(1, "one", "two", "three")
				_ = p.c.Close(websocket.StatusNormalClosure, "")
				_ = f.c.Close(websocket.StatusNormalClosure, "")
			})
		})
	}
}

func TestHelloOverTheSocket(t *testing.T) {
	bubble(t, nil, func(w *world) {
		c := w.mustDial("/v1/connect", &websocket.DialOptions{Subprotocols: []string{SubprotocolProto}})
		c.send(&schema.ClientFrame{Frame: &schema.ClientFrame_Hello{Hello: &schema.Hello{Token: w.agentToken()}}})
		if m := want[*schema.ServerFrame_Welcome](c).Welcome; m.GetPrincipal().GetSubject() != "somebody" {
			t.Errorf("got %v", m)
		}
		c = w.mustDial("/v1/connect", &websocket.DialOptions{Subprotocols: []string{SubprotocolJSON}})
		if e := want[*schema.ServerFrame_Error](c).Error; e.GetCode() != schema.Code_CODE_UNAUTHENTICATED {
			t.Errorf("got %v", e)
		}
		c.wantClosed(1008, "unauthenticated: ", "within 10s")
	})
}

// TestRefusedBeforeTheUpgrade: the status, and a body that says the code and a sentence.
func TestRefusedBeforeTheUpgrade(t *testing.T) {
	bubble(t, func(c *Config, _ *gateway.Config) { c.Origins = []string{"*.example.com", "https://app.test"} }, func(w *world) {
		expired := w.agentToken()
		time.Sleep(24 * 366 * time.Hour)
		good := w.agentToken()
		narrow := token(t, schema.Role_ROLE_USER, "mine", "my-*")
		proto := []string{SubprotocolProto}
		bearer := func(token string) http.Header { return http.Header{"Authorization": {"Bearer " + token}} }
		origin := func(origin string) http.Header {
			return http.Header{"Authorization": {"Bearer " + good}, "Origin": {origin}}
		}
		for _, c := range []struct {
			name   string
			path   string
			opts   websocket.DialOptions
			status int // 101: not refused
			code   string
			says   string
		}{
			{"no subprotocol", "/v1/connect", websocket.DialOptions{HTTPHeader: bearer(good)}, 400, "unsupported_protocol", "tidemark.v1.proto"},
			{"another subprotocol", "/v1/connect", websocket.DialOptions{HTTPHeader: bearer(good), Subprotocols: []string{"mqtt", "tidemark.v2.proto"}}, 400, "unsupported_protocol", "tidemark.v1.json"},
			{"one that is known", "/v1/connect", websocket.DialOptions{HTTPHeader: bearer(good), Subprotocols: []string{"mqtt", SubprotocolJSON}}, 101, "", ""},
			{"bad token", "/v1/connect", websocket.DialOptions{HTTPHeader: bearer("x.y.z"), Subprotocols: proto}, 401, "unauthenticated", "token"},
			{"expired token", "/v1/connect", websocket.DialOptions{HTTPHeader: bearer(expired), Subprotocols: proto}, 401, "unauthenticated", "expired"},
			{"token in the query", "/v1/connect?token=" + good, websocket.DialOptions{Subprotocols: proto}, 101, "", ""},
			{"bad token in the query", "/v1/connect?token=" + good + "x", websocket.DialOptions{Subprotocols: proto}, 401, "unauthenticated", ""},
			{"token beside the subprotocol", "/v1/connect", websocket.DialOptions{Subprotocols: []string{"bearer." + good, SubprotocolProto}}, 101, "", ""},
			{"bad token beside the subprotocol", "/v1/connect", websocket.DialOptions{Subprotocols: []string{SubprotocolProto, "bearer.x"}}, 401, "unauthenticated", ""},
			{"session socket without a token", "/ws?sessionName=s", websocket.DialOptions{}, 401, "unauthenticated", "token"},
			{"session socket with a bad one", "/ws?sessionName=s&token=x", websocket.DialOptions{}, 401, "unauthenticated", ""},
			{"session socket with an expired one", "/ws?sessionName=s&token=" + expired, websocket.DialOptions{}, 401, "unauthenticated", "expired"},
			{"another's session", "/ws?sessionName=s&token=" + narrow, websocket.DialOptions{}, 403, "forbidden", `"s"`},
			{"his own session", "/ws?sessionName=my-1&token=" + narrow, websocket.DialOptions{}, 101, "", ""},
			{"no session", "/ws?token=" + good, websocket.DialOptions{}, 400, "invalid_message", "empty"},
			{"long name", "/ws?token=" + good + "&sessionName=" + strings.Repeat("n", 201), websocket.DialOptions{}, 400, "invalid_message", "201"},
			{"bad lastSeq", "/ws?sessionName=s&lastSeq=-1&token=" + good, websocket.DialOptions{}, 400, "invalid_message", "lastSeq"},
			{"token as the subprotocol", "/ws?sessionName=s", websocket.DialOptions{Subprotocols: []string{"bearer." + good}}, 101, "", ""},
			{"token in the header", "/ws?sessionName=s", websocket.DialOptions{HTTPHeader: bearer(good)}, 101, "", ""},
			{"page of the same host", "/v1/connect", websocket.DialOptions{HTTPHeader: origin("http://edge"), Subprotocols: proto}, 101, "", ""},
			{"page that may", "/v1/connect", websocket.DialOptions{HTTPHeader: origin("http://a.example.com"), Subprotocols: proto}, 101, "", ""},
			{"page that may with its scheme", "/ws?sessionName=s", websocket.DialOptions{HTTPHeader: origin("HTTPS://App.test")}, 101, "", ""},
			{"page with another scheme", "/ws?sessionName=s", websocket.DialOptions{HTTPHeader: origin("http://app.test")}, 403, "origin_not_allowed", "origin"},
			{"page of another host", "/v1/connect", websocket.DialOptions{HTTPHeader: origin("http://evil.test"), Subprotocols: proto}, 403, "origin_not_allowed", "origin"},
			{"page of no host", "/v1/connect", websocket.DialOptions{HTTPHeader: origin("null"), Subprotocols: proto}, 403, "origin_not_allowed", "origin"},
			{"page that only looks like one", "/v1/connect", websocket.DialOptions{HTTPHeader: origin("http://example.com.evil.test"), Subprotocols: proto}, 403, "origin_not_allowed", "origin"},
		} {
			cl, resp, err := w.dial(c.path, &c.opts)
			if c.status == 101 {
				if err != nil {
					t.Errorf("%s: %v", c.name, err)
					continue
				}
				if strings.HasPrefix(c.path, "/v1") && strings.HasPrefix(cl.c.Subprotocol(), "bearer.") {
					t.Errorf("%s: the token was selected", c.name)
				}
				_ = cl.c.CloseNow()
				continue
			}
			if err == nil || resp == nil || resp.StatusCode != c.status {
				t.Errorf("%s: %v, %v, want status %d", c.name, resp, err, c.status)
				continue
			}
			body, _ := io.ReadAll(resp.Body)
			var p problem
			if err := json.Unmarshal(body, &p); err != nil || p.Error == "" || p.Code != c.code || !strings.Contains(p.Details, c.says) {
				t.Errorf("%s: the body is %s, %v, want code %q that says %q", c.name, body, err, c.code, c.says)
			}
			if (c.status == 401 || c.status == 403) && p.Error != "Unauthorized" || c.status == 401 && resp.Header.Get("WWW-Authenticate") != "Bearer" {
				t.Errorf("%s: the body is %s, the header %v", c.name, body, resp.Header)
			}
			if strings.Contains(string(body), good) || strings.Contains(string(body), expired) {
				t.Errorf("%s: the body has the token", c.name)
			}
		}
		synctest.Wait()
		for _, secret := range []string{good, expired, narrow} {
			if strings.Contains(w.logs.String(), secret) || strings.Contains(w.logs.String(), secret[:40]) {
				t.Error("the log has a token")
			}
		}
	})
}

func TestNotAnUpgrade(t *testing.T) {
	bubble(t, nil, func(w *world) {
		ws := "/ws?sessionName=s&token="
		for path, status := range map[string]int{
			"/v1/connect": 426, ws + w.agentToken(): 426, "/nothing": 404,
			// Whoever may not use a session hears that first.
			"/ws?sessionName=s": 401, ws + "x.y.z": 401, ws + token(t, schema.Role_ROLE_USER, "mine"): 403, "/ws?token=" + w.agentToken(): 400,
		} {
			resp, err := w.http.Get("http://edge" + path)
			if err != nil {
				t.Fatal(err)
			}
			body, _ := io.ReadAll(resp.Body)
			_ = resp.Body.Close()
			if resp.StatusCode != status || status == 426 && !strings.Contains(string(body), "send an upgrade request") {
				t.Errorf("%s: %d %s", path, resp.StatusCode, body)
			}
		}
		// What the library refuses is answered, too.
		req, _ := http.NewRequestWithContext(w.Context(), http.MethodGet, "http://edge/v1/connect?token="+w.agentToken(), nil)
		req.Header.Set("Upgrade", "websocket")
		req.Header.Set("Connection", "Upgrade")
		req.Header.Set("Sec-WebSocket-Protocol", SubprotocolProto)
		resp, err := w.http.Do(req)
		if err != nil || resp.StatusCode != 400 {
			t.Errorf("%v, %v", resp, err)
		}
		_ = resp.Body.Close()
	})
}

func TestHealth(t *testing.T) {
	registry := prometheus.NewRegistry()
	bubble(t, func(e *Config, g *gateway.Config) { e.Metrics, g.Metrics = registry, registry }, func(w *world) {
		get := func(path string) (int, string) {
			resp, err := w.http.Get("http://edge" + path)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			body, _ := io.ReadAll(resp.Body)
			return resp.StatusCode, string(body)
		}
		if status, body := get("/healthz"); status != 200 || body != "{\"state\":\"alive\"}\n" {
			t.Errorf("%d %s", status, body)
		}
		if status, body := get("/readyz"); status != 200 || body != "{\"state\":\"ready\"}\n" {
			t.Errorf("%d %s", status, body)
		}
		c := w.connect(SubprotocolProto)
		c.publish(1, "s", "hi")
		want[*schema.ServerFrame_Published](c)
		if status, body := get("/metrics"); status != 200 || !strings.Contains(body, `tidemark_gateway_connections{protocol="proto"} 1`) || !strings.Contains(body, "tidemark_gateway_received_envelopes_total 1") {
			t.Errorf("%d %s", status, body)
		}
		if err := w.g.Drain(w.Context(), "It is over."); err != nil {
			t.Error(err)
		}
		if status, body := get("/readyz"); status != 503 || !strings.Contains(body, `"code":"going_away"`) {
			t.Errorf("%d %s", status, body)
		}
		if status, _ := get("/healthz"); status != 200 {
			t.Errorf("it is not alive while it drains: %d", status)
		}
		_, resp, err := w.dial("/v1/connect", &websocket.DialOptions{Subprotocols: []string{SubprotocolProto}})
		if err == nil || resp.StatusCode != 503 || resp.Header.Get("Retry-After") == "" {
			t.Errorf("%v, %v", resp, err)
		}
	})
}

// TestSessionSocket: publish, follow, resume with nothing but JSON.
func TestSessionSocket(t *testing.T) {
	bubble(t, nil, func(w *world) {
		c := w.session("sessionName=caf%C3%A9")
		if a := c.wantType("attached"); a["head_seq"] != 0.0 || a["status"] != "open" {
			t.Errorf("got %v", a)
		}
		c.write(websocket.MessageText, []byte(`{"type":"user_message","data":{"message":"hi"}}`))
		var id any
		var epoch string
		for range 3 {
			m := c.nextJSON()
			data := m["data"].(map[string]any)
			switch m["type"] {
			case "attached":
				if data["epoch"] == "" || data["head_seq"] != 1.0 || data["first_seq"] != 1.0 || data["after_seq"] != 0.0 {
					t.Errorf("got %v", m)
				}
			case "published":
				if data["seq"] != 1.0 || data["durability"] != "memory" {
					t.Errorf("got %v", m)
				}
				id, epoch = data["id"], data["epoch"].(string)
			case "user_message":
				if m["seq"] != 1.0 || data["message"] != "hi" {
					t.Errorf("got %v", m)
				}
			default:
				t.Errorf("got %v", m)
			}
		}
		if id == nil {
			t.Error("nothing was published")
		}
		w.fill("café", texts(4)...)
		for seq := 2.0; seq <= 5; seq++ {
			if m := c.wantType("token"); m["seq"] != seq {
				t.Errorf("got %v, want seq %v", m, seq)
			}
		}
		for query, from := range map[string]float64{"": 1, "&lastSeq=0": 1, "&lastSeq=3": 4, "&lastSeq=5": 6, "&lastSeq=latest": 6, "&lastSeq=3&epoch=" + epoch: 4} {
			f := w.session("sessionName=caf%C3%A9" + query)
			if a := f.wantType("attached"); a["head_seq"] != 5.0 || a["epoch"] != epoch {
				t.Errorf("%s: got %v", query, a)
			}
			for ; from <= 5; from++ {
				if m := f.nextJSON(); m["seq"] != from {
					t.Errorf("%s: got %v, want seq %v", query, m, from)
				}
			}
			_ = f.c.CloseNow()
		}
		for query, code := range map[string]string{"&lastSeq=6": "seq_beyond_head", "&epoch=another": "epoch_mismatch"} {
			f := w.session("sessionName=caf%C3%A9" + query)
			if e := f.wantType("error"); e["code"] != code {
				t.Errorf("%s: got %v", query, e)
			}
			f.wantClosed(1008, code+": ")
		}
		c.write(websocket.MessageText, []byte(`{"type":"user_input","data":{}}`))
		if e := c.wantType("error"); e["error"] != "Invalid message format" || !strings.Contains(e["details"].(string), "'response'") || e["code"] != "invalid_message" {
			t.Errorf("got %v", e)
		}
		c.wantClosed(1008, "invalid_message: ", "'response'")
	})
}

// TestBadMessages: each is answered with its code, and closed with the status that the RFC has for it.
func TestBadMessages(t *testing.T) {
	large := strings.Repeat("x", schema.MaxFrameBytes+1)
	for _, c := range []struct {
		name   string
		open   string // a subprotocol, or empty for the session socket
		typ    websocket.MessageType
		msg    string
		status websocket.StatusCode
		reason string
	}{
		{"binary, nonsense", SubprotocolProto, websocket.MessageBinary, "nonsense", 1008, "invalid_message: "},
		{"binary, too large", SubprotocolProto, websocket.MessageBinary, large, 1009, "too_large: "},
		{"text on binary", SubprotocolProto, websocket.MessageText, "{}", 1003, "invalid_message: This connection speaks binary"},
		{"JSON, nonsense", SubprotocolJSON, websocket.MessageText, "nonsense", 1008, "invalid_message: "},
		{"JSON, no UTF-8", SubprotocolJSON, websocket.MessageText, "{\"\xff\":1}", 1007, "invalid_message: "},
		{"JSON, too large", SubprotocolJSON, websocket.MessageText, large, 1009, "too_large: "},
		{"binary on JSON", SubprotocolJSON, websocket.MessageBinary, "{}", 1003, "invalid_message: This connection speaks text"},
		{"session, nonsense", "", websocket.MessageText, "nonsense", 1008, "invalid_message: "},
		{"session, unknown type", "", websocket.MessageText, `{"type":"nonsense","data":{}}`, 1008, "unknown_type: "},
		{"session, no UTF-8", "", websocket.MessageText, "{\"type\":\"\xc3\x28\"}", 1007, "invalid_message: "},
		{"session, too large", "", websocket.MessageText, large, 1009, "too_large: "},
		{"session, binary", "", websocket.MessageBinary, "{}", 1003, "invalid_message: "},
	} {
		t.Run(c.name, func(t *testing.T) {
			bubble(t, nil, func(w *world) {
				other := w.connect(SubprotocolProto)
				var cl *client
				if c.open == "" {
					cl = w.session("sessionName=s")
					cl.wantType("attached")
				} else {
					cl = w.connect(c.open)
				}
				go func() { _ = cl.c.Write(w.Context(), c.typ, []byte(c.msg)) }()
				if c.open == "" {
					if e := cl.wantType("error"); !strings.HasPrefix(c.reason, e["code"].(string)) {
						t.Errorf("got %v", e)
					}
				} else if e := want[*schema.ServerFrame_Error](cl).Error; !strings.HasPrefix(c.reason, e.GetCode().Word()) {
					t.Errorf("got %v", e)
				}
				cl.wantClosed(c.status, c.reason)
				other.publish(1, "s", "untouched")
				want[*schema.ServerFrame_Published](other)
			})
		})
	}
}

// TestLargest: what is just allowed comes through, in one frame and in many.
func TestLargest(t *testing.T) {
	bubble(t, nil, func(w *world) {
		c := w.connect(SubprotocolProto)
		text := strings.Repeat("x", schema.MaxEnvelopeBytes-30)
		go c.publish(1, "s", text)
		if r := want[*schema.ServerFrame_Published](c).Published; r.GetAcks()[0].GetFirstSeq() != 1 {
			t.Errorf("got %v", r)
		}
		c.attach(&schema.Attach{Channel: 1, Session: "s"})
		want[*schema.ServerFrame_Attached](c)
		c.wantTexts(1, text)
	})
}

// TestTooLargeIsNotReadToTheEnd: what announces a gigabyte is refused when the bound is reached.
func TestTooLargeIsNotReadToTheEnd(t *testing.T) {
	bubble(t, nil, func(w *world) {
		r := w.upgrade("/v1/connect?token="+w.agentToken(), "Sec-WebSocket-Protocol: "+SubprotocolProto+"\r\n")
		go func() {
			_, _ = r.Write([]byte{0x82, 0x80 | 127, 0, 0, 0, 0, 1 << 6, 0, 0, 0, 0, 0, 0, 0})
			_, _ = r.Write(make([]byte, 2*schema.MaxFrameBytes))
		}()
		op, payload, err := r.next()
		f := new(schema.ServerFrame)
		if err != nil || op != 2 || proto.Unmarshal(payload, f) != nil || f.GetError().GetCode() != schema.Code_CODE_TOO_LARGE {
			t.Fatalf("got %d %v, %v", op, f, err)
		}
		// The rest, which never comes, is not waited for.
		began := time.Now()
		if op, payload, err := r.next(); err != nil || op != 8 || !strings.HasPrefix(string(payload), "\x03\xf1too_large") {
			t.Errorf("got %d %q, %v", op, payload, err)
		}
		if _, _, err := r.next(); err == nil || time.Since(began) != closeTimeout {
			t.Errorf("it ended with %v after %s", err, time.Since(began))
		}
	})
}

// TestDrain: clients are told, and closed with 1012.
func TestDrain(t *testing.T) {
	bubble(t, nil, func(w *world) {
		c, s := w.connect(SubprotocolProto), w.session("sessionName=s")
		s.wantType("attached")
		synctest.Wait()
		done := make(chan error, 1)
		go func() { done <- w.g.Drain(w.Context(), "It is replaced.") }()
		if m := want[*schema.ServerFrame_GoingAway](c).GoingAway; m.GetReason() != "It is replaced." {
			t.Errorf("got %v", m)
		}
		s.wantType("going_away")
		c.wantClosed(1012, "going_away: ")
		s.wantClosed(1012, "going_away: ")
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// TestCompression: offered by the client, selected by the edge, without context; and what is compressed is the same.
func TestCompression(t *testing.T) {
	for _, mode := range []websocket.CompressionMode{websocket.CompressionContextTakeover, websocket.CompressionNoContextTakeover} {
		bubble(t, nil, func(w *world) {
			c, resp, err := w.dial("/v1/connect", &websocket.DialOptions{
				Subprotocols: []string{SubprotocolProto}, CompressionMode: mode, HTTPHeader: http.Header{"Authorization": {"Bearer " + w.agentToken()}},
			})
			if err != nil {
				t.Fatal(err)
			}
			if ext := resp.Header.Get("Sec-WebSocket-Extensions"); !strings.Contains(ext, "permessage-deflate") || !strings.Contains(ext, "server_no_context_takeover") {
				t.Errorf("the extension is %q", ext)
			}
			c.attach(&schema.Attach{Channel: 1, Session: "s"})
			want[*schema.ServerFrame_Attached](c)
			want[*schema.ServerFrame_CaughtUp](c)
			for i := range 3 {
				text := fmt.Sprint(i, strings.Repeat(" lorem ipsum", 2000))
				c.publish(uint64(i)+1, "s", text)
				for range 2 {
					f := c.next()
					if e := f.GetEvents(); e != nil && e.GetEnvelopes()[0].GetToken().GetText() != text {
						t.Error("the text is another")
					}
				}
			}
			// A bomb is bounded by what it becomes.
			bomb := []byte(strings.Repeat("x", schema.MaxFrameBytes+1))
			go func() { _ = c.c.Write(w.Context(), websocket.MessageBinary, bomb) }()
			want[*schema.ServerFrame_Error](c)
			c.wantClosed(1009, "too_large")
		})
	}
	bubble(t, nil, func(w *world) {
		_, resp, err := w.dial("/v1/connect", &websocket.DialOptions{Subprotocols: []string{SubprotocolProto}})
		if err != nil || resp.Header.Get("Sec-WebSocket-Extensions") != "" {
			t.Errorf("compression that nobody asked for: %v, %v", resp, err)
		}
	})
}

// TestI4_ResumeFromAnyCut: the socket is cut after every number of messages, and the follower comes again after the last seq it saw.
func TestI4_ResumeFromAnyCut(t *testing.T) {
	bubble(t, nil, func(w *world) {
		const total = 60
		w.fill("s", texts(total)...)
		for cut := range total + 1 {
			c := w.session("sessionName=s")
			c.wantType("attached")
			last := 0
			for last < cut {
				if m := c.nextJSON(); m["seq"] != float64(last+1) {
					t.Fatalf("got %v, want seq %d", m, last+1)
				}
				last++
			}
			_ = c.c.CloseNow()
			c = w.session(fmt.Sprint("sessionName=s&lastSeq=", last))
			if a := c.wantType("attached"); a["after_seq"] != float64(last) {
				t.Errorf("got %v", a)
			}
			for last < total {
				if m := c.wantType("token"); m["seq"] != float64(last+1) || m["text"] != fmt.Sprint("t", last+1) {
					t.Fatalf("got %v, want seq %d", m, last+1)
				}
				last++
			}
			_ = c.c.CloseNow()
		}
	})
}

// TestManySessionsOnOneSocket: a hundred sessions, each published to and followed over one connection.
func TestManySessionsOnOneSocket(t *testing.T) {
	bubble(t, nil, func(w *world) {
		const sessions, each = 100, 5
		c := w.connect(SubprotocolProto)
		// A client reads while it writes.
		go func() {
			for i := range uint32(sessions) {
				c.attach(&schema.Attach{Channel: i + 1, Session: fmt.Sprint("s", i+1)})
			}
			for n := range sessions * each {
				c.publish(uint64(n)+1, fmt.Sprint("s", n%sessions+1), fmt.Sprint("t", n/sessions+1))
			}
		}()
		seqs, acked := map[uint32]uint64{}, 0
		for done := 0; done < sessions || acked < sessions*each; {
			f := c.next()
			acked += len(f.GetPublished().GetAcks())
			for _, e := range f.GetEvents().GetEnvelopes() {
				ch := f.GetEvents().GetChannel()
				if seqs[ch]++; e.GetSeq() != seqs[ch] || e.GetToken().GetText() != fmt.Sprint("t", seqs[ch]) {
					t.Fatalf("channel %d: %v after %d", ch, e, seqs[ch]-1)
				}
				if seqs[ch] == each {
					done++
				}
			}
		}
	})
}

// TestI8_SlowReaderCostsOnlyItself: a socket that nobody reads from delays neither the writer nor another follower; it is closed with a reason in the end.
func TestI8_SlowReaderCostsOnlyItself(t *testing.T) {
	bubble(t, nil, func(w *world) {
		slow := w.upgrade("/ws?sessionName=s&token="+w.agentToken(), "")
		quick, p := w.connect(SubprotocolProto), w.connect(SubprotocolProto)
		quick.attach(&schema.Attach{Channel: 1, Session: "s"})
		want[*schema.ServerFrame_Attached](quick)
		want[*schema.ServerFrame_CaughtUp](quick)
		began := time.Now()
		for i, text := range texts(200) {
			p.publish(uint64(i)+1, "s", text)
			want[*schema.ServerFrame_Published](p)
			quick.wantTexts(uint64(i)+1, text)
		}
		if took := time.Since(began); took != 0 {
			t.Errorf("the others waited for %s", took)
		}
		time.Sleep(gateway.DefaultWriteTimeout)
		synctest.Wait()
		if _, _, err := slow.next(); err == nil {
			t.Error("the slow one is still served")
		}
		if !strings.Contains(w.logs.String(), "reason=peer_dead") {
			t.Errorf("the log says\n%s", w.logs)
		}
		_ = p.c.CloseNow()
	})
}

// TestClose: what a drain has left is cut, and nothing new begins.
func TestClose(t *testing.T) {
	bubble(t, nil, func(w *world) {
		c := w.connect(SubprotocolProto)
		synctest.Wait()
		ctx, cancel := context.WithCancel(w.Context())
		cancel()
		if err := w.g.Drain(ctx, "Now."); err == nil {
			t.Error("it drained in no time")
		}
		want[*schema.ServerFrame_GoingAway](c)
		synctest.Wait()
		go w.edge.Close()
		c.wantClosed(1012, "going_away: ")
		synctest.Wait()
		if !strings.Contains(w.logs.String(), "reason=going_away") {
			t.Errorf("the log says\n%s", w.logs)
		}
	})
	bubble(t, nil, func(w *world) {
		w.edge.Close()
		c := w.connect(SubprotocolProto)
		c.wantClosed(1012, "going_away: ")
	})
}

// TestLost: a socket that ends without a close frame is gone, at once.
func TestLost(t *testing.T) {
	bubble(t, nil, func(w *world) {
		w.fill("s", "one")
		for _, sent := range []string{"", "\x82", "\x82\xfe\x01", "\x82\x85\x00\x00\x00\x00ab", "\x02\x85\x00\x00\x00\x00ab", "\x89\x85\x00\x00"} {
			w.logs.Reset()
			r := w.upgrade("/v1/connect?token="+w.agentToken(), "Sec-WebSocket-Protocol: "+SubprotocolProto+"\r\n")
			attach, err := proto.Marshal(&schema.ClientFrame{Frame: &schema.ClientFrame_Attach{Attach: &schema.Attach{Channel: 1, Session: "s"}}})
			if err != nil {
				t.Fatal(err)
			}
			if err := r.frame(0x82, attach); err != nil {
				t.Fatal(err)
			}
			for range 3 {
				if _, _, err := r.next(); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := io.WriteString(r, sent); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
			_ = r.Close()
			synctest.Wait()
			if !strings.Contains(w.logs.String(), "reason=peer_lost") || !strings.Contains(w.logs.String(), "lasted=0s") {
				t.Errorf("after %q the log says\n%s", sent, w.logs)
			}
		}
	})
}
