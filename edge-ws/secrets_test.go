package edgews

import (
	"bufio"
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coder/websocket"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"tidemark/internal/auth"
	"tidemark/internal/gateway"
	"tidemark/schema"
)

// TestTokensAreNowhere: whatever token comes, wherever it stands in a request or a message, good or bad, it is in no log at any level, no metric, no answer, no error frame, no close reason.
func TestTokensAreNowhere(t *testing.T) {
	registry := prometheus.NewRegistry()
	bubble(t, func(e *Config, g *gateway.Config) { e.Metrics, g.Metrics = registry, registry }, func(w *world) {
		expired := lasting(t, "ada", schema.Role_ROLE_USER, time.Second, "*")
		time.Sleep(time.Hour)
		good := lasting(t, "ada", schema.Role_ROLE_USER, time.Minute, "*")
		parts := strings.Split(good, ".")
		forged, err := auth.Mint([]byte("another secret, which nobody here has"), auth.Principal{Subject: "ada", Role: schema.Role_ROLE_ADMIN, Sessions: []string{"*"}}, time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		tokens := map[string]string{
			"good": good, "expired": expired, "forged": forged, "narrow": lasting(t, "ada", schema.Role_ROLE_USER, time.Minute, "other"),
			"analyst": lasting(t, "ada", schema.Role_ROLE_ANALYST, time.Minute, "*"),
			"cut":     good[:len(good)-5], "no algorithm": base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"none","typ":"JWT"}`)) + "." + parts[1] + ".",
			"tampered": parts[0] + "." + base64.RawURLEncoding.EncodeToString([]byte(`{"sub":"root","role":"admin","sessions":["*"],"exp":99999999999}`)) + "." + parts[2],
			"no JWT":   "not-a-token-but-a-secret-all-the-same-0123456789",
			"huge":     strings.Repeat("hugehugehuge", 1500),
		}
		var said bytes.Buffer // all that clients read
		// heard sends messages and reads what a connection says to its end.
		heard := func(c *client, err error, messages ...[]byte) {
			if err != nil {
				return
			}
			go func() {
				typ := websocket.MessageBinary
				if c.text {
					typ = websocket.MessageText
				}
				for _, m := range messages {
					// The edge may have closed it by then.
					_ = c.c.Write(w.Context(), typ, m)
				}
			}()
			for {
				_, b, err := c.c.Read(w.Context())
				if err != nil {
					var ce websocket.CloseError
					if errors.As(err, &ce) {
						fmt.Fprintln(&said, ce.Reason)
					}
					return
				}
				said.Write(b)
			}
		}
		// request sends a request as it is and reads the answer; what is upgraded is left at once.
		request := func(text string) {
			conn, err := w.l.dial(w.Context(), "", "")
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			go func() { _, _ = io.WriteString(conn, text) }()
			resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil {
				t.Errorf("%.60q: %v", text, err)
				return
			}
			fmt.Fprintln(&said, resp.Status, resp.Header)
			if resp.StatusCode != http.StatusSwitchingProtocols {
				_, _ = io.Copy(&said, resp.Body)
			}
		}
		const upgrade = "Host: edge\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
		for name, token := range tokens {
			for _, path := range []string{
				"/ws?sessionName=s&token=" + token, "/v1/connect?token=" + token, "/ws?token=" + token, "/healthz?token=" + token, "/nothing/" + token, "/?token=" + token,
				"/ws?sessionName=s;token=" + token, "/ws?sessionName=s&lastSeq=-1&token=" + token, "/ws?sessionName=s&epoch=x&token=" + token, "/ws?sessionName=s&token=%zz" + token, "/ws?sessionName=s&Token=" + token,
			} {
				request("GET " + path + " HTTP/1.1\r\n" + upgrade + "\r\n")
				request("GET " + path + " HTTP/1.1\r\nHost: edge\r\n\r\n")
				request("POST " + path + " HTTP/1.1\r\nHost: edge\r\nContent-Length: 0\r\n\r\n")
				// What the library refuses, and the server.
				request("GET " + path + " HTTP/1.1\r\n" + strings.Replace(upgrade, "13", "12", 1) + "\r\n")
				request("GET " + path + " HTTP/1.1\r\n" + upgrade + "Origin: http://evil.test\r\n\r\n")
				request("GET " + path + " HTTP/1.1\r\n" + upgrade + "bad header line\r\n\r\n")
			}
			for _, header := range []string{
				"Authorization: Bearer " + token, "Authorization: " + token, "Authorization: Basic " + token, "Cookie: token=" + token, "X-Token: " + token, "Referer: http://edge/?token=" + token,
				"Sec-WebSocket-Protocol: bearer." + token, "Sec-WebSocket-Protocol: " + token, "Sec-WebSocket-Protocol: tidemark.v1.proto, bearer." + token, "Sec-WebSocket-Protocol: tidemark.v1.json, token." + token,
			} {
				for _, path := range []string{"/ws?sessionName=s", "/v1/connect", "/metrics"} {
					request("GET " + path + " HTTP/1.1\r\n" + upgrade + header + "\r\n\r\n")
				}
			}
			if strings.Contains(said.String(), token[len(token)/2:len(token)/2+16]) && name != "huge" {
				// The one subprotocol that the client offered must be selected, says RFC 6455: the peer's own token comes back to it.
				if !strings.Contains(said.String(), "Sec-Websocket-Protocol:[bearer."+token+"]") {
					t.Errorf("an answer has the %s token:\n%s", name, said.String())
				}
			}
			said.Reset()

			hello := &schema.ClientFrame{Frame: &schema.ClientFrame_Hello{Hello: &schema.Hello{Token: token}}}
			refresh := &schema.ClientFrame{Frame: &schema.ClientFrame_Refresh{Refresh: &schema.Refresh{Token: token}}}
			for _, f := range []*schema.ClientFrame{hello, refresh} {
				for _, subprotocol := range []string{SubprotocolProto, SubprotocolJSON} {
					path := "/v1/connect"
					if f == refresh {
						path += "?token=" + good
					}
					marshal := proto.Marshal
					if subprotocol == SubprotocolJSON {
						marshal = protojson.Marshal
					}
					one, _ := marshal(f)
					two, _ := marshal(hello)
					c, _, err := w.dial(path, &websocket.DialOptions{Subprotocols: []string{subprotocol}})
					// It ends with the second hello, if not before.
					heard(c, err, one, two)
				}
			}
			for _, msg := range []string{
				`{"type":"refresh","data":{"token":` + quoted(token) + `}}`, `{"type":"refresh","data":{"token":[` + quoted(token) + `]}}`, `{"type":"refresh","data":` + quoted(token) + `}`,
				`{"type":"refresh","token":` + quoted(token) + `}`, `{"type":"refresh","data":{"token":` + quoted(token) + `,"x":1}}`, `{"type":"refresh","data":{"token":` + quoted(token),
				`{"type":"refresh","data":{"token":` + quoted(token) + `},"type":"refresh"}`, quoted(token),
			} {
				c, _, err := w.dial("/ws?sessionName=s&token="+good, nil)
				heard(c, err, []byte(msg), []byte(`{"type":"token","data":{}}`))
			}
			if i := strings.Index(said.String(), token[len(token)/2:len(token)/2+16]); i >= 0 {
				t.Errorf("a frame has the %s token: %s", name, said.String())
			}
			said.Reset()
		}
		// And when it expires on a live connection.
		c := w.ui(good, "sessionName=s")
		heard(c, nil)
		synctest.Wait()

		resp, err := w.http.Get("http://edge/metrics")
		if err != nil {
			t.Fatal(err)
		}
		shown, _ := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		logs := w.logs.String()
		if n := strings.Count(logs, "connection ended"); n < 100 || !strings.Contains(logs, "level=ERROR") && !strings.Contains(logs, "level=DEBUG") {
			t.Errorf("the log has %d ends of connections; it would not show a token either", n)
		}
		for name, token := range tokens {
			for at := 0; at+12 <= len(token); at += 12 {
				// The header is the same in all tokens of the kind, and no secret.
				piece := token[at : at+12]
				if strings.HasPrefix(token, parts[0]) && at < len(parts[0]) {
					continue
				}
				for where, text := range map[string]string{"the log": logs, "a metric": string(shown), "the log, in another form": unescaped(logs)} {
					if strings.Contains(text, piece) {
						t.Errorf("%s has %q of the %s token:\n%.300s", where, piece, name, text[max(0, strings.Index(text, piece)-100):])
					}
				}
			}
		}
	})
}

func quoted(s string) string {
	b, err := protojson.Marshal(&schema.Hello{Token: s})
	if err != nil {
		panic(err)
	}
	text := string(b)
	return strings.TrimSuffix(strings.TrimSpace(text[strings.Index(text, ":")+1:]), "}")
}

func unescaped(s string) string {
	if u, err := url.QueryUnescape(s); err == nil {
		return u
	}
	return s
}

// TestRefusalsRevealNoSession: before the upgrade and after it, who may not use a session is told the same whether it exists or not.
func TestRefusalsRevealNoSession(t *testing.T) {
	bubble(t, nil, func(w *world) {
		w.fill("exists", texts(5)...)
		narrow := lasting(t, "ada", schema.Role_ROLE_USER, time.Hour, "mine")
		for _, token := range []string{"", "x.y.z", narrow} {
			for _, more := range []string{"", "&lastSeq=3", "&lastSeq=99", "&lastSeq=latest", "&epoch=another", "&lastSeq=nonsense"} {
				for _, headers := range []string{"", "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"} {
					var answers []string
					for _, name := range []string{"exists", "absent"} {
						conn, err := w.l.dial(w.Context(), "", "")
						if err != nil {
							t.Fatal(err)
						}
						go func() {
							_, _ = io.WriteString(conn, "GET /ws?sessionName="+name+"&token="+token+more+" HTTP/1.1\r\nHost: edge\r\n"+headers+"\r\n")
						}()
						resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
						if err != nil {
							t.Fatal(err)
						}
						body, _ := io.ReadAll(resp.Body)
						if resp.StatusCode != 401 && resp.StatusCode != 403 {
							t.Errorf("%s: status %d", name, resp.StatusCode)
						}
						answers = append(answers, strings.ReplaceAll(fmt.Sprint(resp.Status, resp.Header, string(body)), name, "NAME"))
						_ = conn.Close()
					}
					if answers[0] != answers[1] {
						t.Errorf("%q %q: one that exists is answered with\n%s\nanother with\n%s", more, headers, answers[0], answers[1])
					}
				}
			}
		}
		// The multiplexed connection says the same in its frames.
		c := w.mustDial("/v1/connect?token="+narrow, &websocket.DialOptions{Subprotocols: []string{SubprotocolProto}})
		var answers []string
		for i, name := range []string{"exists", "absent"} {
			c.attach(&schema.Attach{Channel: uint32(i + 1), Session: name})
			e := proto.CloneOf(want[*schema.ServerFrame_Error](c).Error)
			e.Channel = 0
			answers = append(answers, strings.ReplaceAll(e.String(), name, "NAME"))
		}
		if answers[0] != answers[1] {
			t.Errorf("answers %q", answers)
		}
	})
}
