package edgegrpc

import (
	"bufio"
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"

	"google.golang.org/protobuf/proto"

	"tidemark/schema"
)

// browser makes a request over HTTP/1.1, as a page or curl does.
func (w *world) browser(method, path string, header http.Header, body []byte) *http.Response {
	w.Helper()
	c, err := w.l.dial(w.ctx)
	w.must(err)
	w.closers = append(w.closers, func() { _ = c.Close() })
	r, err := http.NewRequestWithContext(w.ctx, method, "http://edge"+path, bytes.NewReader(body))
	w.must(err)
	for k, v := range header {
		r.Header[http.CanonicalHeaderKey(k)] = v
	}
	w.must(r.Write(c))
	res, err := http.ReadResponse(bufio.NewReader(c), r)
	w.must(err)
	w.closers = append(w.closers, func() { _ = res.Body.Close() })
	return res
}

// One line of curl does.
func TestPlainJSON(t *testing.T) {
	inWorld(t, func(w *world) {
		header := http.Header{"Authorization": {"Bearer " + w.token(schema.Role_ROLE_AGENT, "*")}, "Content-Type": {"application/json"}}
		res := w.browser("POST", procedure("Append"), header, []byte(`{"session":"s","envelopes":[{"token":{"messageId":"m","text":"hi"}}]}`))
		var answer map[string]any
		w.must(json.NewDecoder(res.Body).Decode(&answer))
		if res.StatusCode != 200 || answer["firstSeq"] != "1" || answer["durability"] != "DURABILITY_MEMORY" {
			w.Errorf("%s: %v", res.Status, answer)
		}
		res = w.browser("POST", procedure("GetSession"), header, []byte(`{"session":"none"}`))
		answer = nil
		w.must(json.NewDecoder(res.Body).Decode(&answer))
		if res.StatusCode != 404 || answer["code"] != "not_found" || res.Header.Get(codeTrailer) != "session_not_found" {
			w.Errorf("%s %s: %v", res.Status, res.Header, answer)
		}
		res = w.browser("POST", procedure("GetSession"), header, []byte(`{"session":`))
		if res.StatusCode != 400 {
			w.Errorf("bad JSON: %s", res.Status)
		}
		res = w.browser("POST", "/tidemark.v1.SessionService/NoSuchMethod", header, []byte(`{}`))
		if res.StatusCode != 404 {
			w.Errorf("no such method: %s", res.Status)
		}
		// A token in the URL would stand in every proxy's log.
		header.Del("Authorization")
		res = w.browser("POST", procedure("GetSession")+"?token="+w.token(schema.Role_ROLE_AGENT, "*"), header, []byte(`{"session":"s"}`))
		if res.StatusCode != 401 {
			w.Errorf("a token in the URL: %s", res.Status)
		}
	})
}

func TestOrigins(t *testing.T) {
	inWorldWith(t, func(c *Config, _ *gatewayConfig) { c.AllowedOrigins = []string{"https://app.example.com"} }, func(w *world) {
		preflight := func(origin string) *http.Response {
			return w.browser("OPTIONS", procedure("Append"), http.Header{"Origin": {origin}, "Access-Control-Request-Method": {"POST"}, "Access-Control-Request-Headers": {"authorization,content-type"}}, nil)
		}
		res := preflight("https://app.example.com")
		h := res.Header
		if res.StatusCode != 204 || h.Get("Access-Control-Allow-Origin") != "https://app.example.com" || !strings.Contains(h.Get("Access-Control-Allow-Methods"), "POST") ||
			!strings.Contains(h.Get("Access-Control-Allow-Headers"), "Authorization") || h.Get("Access-Control-Allow-Credentials") != "" || h.Get("Vary") != "Origin" {
			w.Errorf("the allowed page: %s %v", res.Status, h)
		}
		for _, origin := range []string{"https://evil.example.com", "https://app.example.com.evil.com", "http://app.example.com", "null"} {
			if h := preflight(origin).Header; h.Get("Access-Control-Allow-Origin") != "" || h.Get("Access-Control-Allow-Methods") != "" {
				w.Errorf("%s: %v", origin, h)
			}
		}
		res = w.browser("POST", procedure("GetSession"), http.Header{"Origin": {"https://app.example.com"}, "Content-Type": {"application/json"}}, []byte(`{"session":"s"}`))
		if res.StatusCode != 401 || res.Header.Get("Access-Control-Allow-Origin") == "" || !strings.Contains(res.Header.Get("Access-Control-Expose-Headers"), "Tidemark-Code") {
			w.Errorf("the call: %s %v", res.Status, res.Header)
		}
	})
	inWorld(t, func(w *world) {
		if h := w.browser("POST", procedure("GetSession"), http.Header{"Origin": {"https://app.example.com"}, "Content-Type": {"application/json"}}, []byte(`{}`)).Header; h.Get("Access-Control-Allow-Origin") != "" {
			w.Errorf("no page is allowed, and yet: %v", h)
		}
	})
	inWorldWith(t, func(c *Config, _ *gatewayConfig) { c.AllowedOrigins = []string{"*"} }, func(w *world) {
		if h := w.browser("POST", procedure("GetSession"), http.Header{"Origin": {"https://any.example.com"}, "Content-Type": {"application/json"}}, []byte(`{}`)).Header; h.Get("Access-Control-Allow-Origin") != "https://any.example.com" {
			w.Errorf("every page is allowed, and yet: %v", h)
		}
	})
}

// lengthPrefixed is a message as gRPC frames it.
func lengthPrefixed(flags byte, b []byte) []byte {
	return append(binary.BigEndian.AppendUint32([]byte{flags}, uint32(len(b))), b...)
}

// textReader takes the text form apart: pieces of base64, each with its own padding.
type textReader struct {
	r   io.Reader
	buf []byte
}

func (t *textReader) Read(p []byte) (int, error) {
	for len(t.buf) == 0 {
		var quad [4]byte
		if _, err := io.ReadFull(t.r, quad[:]); err != nil {
			return 0, err
		}
		b, err := base64.StdEncoding.DecodeString(string(quad[:]))
		if err != nil {
			return 0, err
		}
		t.buf = b
	}
	n := copy(p, t.buf)
	t.buf = t.buf[n:]
	return n, nil
}

// The official JavaScript client of gRPC-Web streams in the text form.
func TestGRPCWebText(t *testing.T) {
	inWorld(t, func(w *world) {
		token := w.token(schema.Role_ROLE_USER, "*")
		header := http.Header{
			"Authorization": {"Bearer " + token}, "Content-Type": {"application/grpc-web-text"}, "Accept": {"application/grpc-web-text"},
			"X-Grpc-Web": {"1"},
		}
		for _, n := range []int{1, 2, 3} {
			w.publish("s", strings.Repeat("x", n))
		}
		body, err := proto.Marshal(&schema.Attach{Session: "s"})
		w.must(err)
		res := w.browser("POST", procedure("Follow"), header, []byte(base64.StdEncoding.EncodeToString(lengthPrefixed(0, body))))
		if res.StatusCode != 200 || res.Header.Get("Content-Type") != "application/grpc-web-text" {
			w.Fatalf("%s %v", res.Status, res.Header)
		}
		in := &textReader{r: res.Body}
		next := func() (byte, []byte) {
			w.Helper()
			var head [5]byte
			_, err := io.ReadFull(in, head[:])
			w.must(err)
			b := make([]byte, binary.BigEndian.Uint32(head[1:]))
			_, err = io.ReadFull(in, b)
			w.must(err)
			return head[0], b
		}
		seq := uint64(0)
		read := func(want uint64) {
			w.Helper()
			for seq < want {
				flags, b := next()
				f := new(schema.ServerFrame)
				w.must(proto.Unmarshal(b, f))
				if flags != 0 {
					w.Fatalf("flags %d", flags)
				}
				for _, e := range f.GetEvents().GetEnvelopes() {
					if seq++; e.GetSeq() != seq {
						w.Fatalf("seq %d, want %d", e.GetSeq(), seq)
					}
				}
			}
		}
		read(3)
		// Live: each piece comes at once, whatever its length.
		for n := range uint64(10) {
			w.publish("s", strings.Repeat("y", int(n+1)))
			synctest.Wait()
			read(4 + n)
		}
		w.must(w.log.Delete(w.ctx, schema.SessionID{Tenant: "default", Name: "s"}))
		for {
			flags, b := next()
			if flags&0x80 == 0 {
				continue
			}
			if trailer := strings.ToLower(string(b)); !strings.Contains(trailer, "grpc-status: 5") || !strings.Contains(trailer, "tidemark-code: session_deleted") {
				w.Errorf("the trailer is %q", b)
			}
			break
		}
		// What is no base64 is refused.
		res = w.browser("POST", procedure("GetSession"), header, []byte("!!!"))
		b, _ := io.ReadAll(&textReader{r: res.Body})
		if s := res.Header.Get("Grpc-Status"); s == "" || s == "0" {
			w.Errorf("no base64: %s %v %q", res.Status, res.Header, b)
		}
	})
}
