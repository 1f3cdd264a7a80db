package bench

import (
	"bytes"
	"context"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
)

// talk connects a socket to a handler that speaks the WebSocket.
func talk(t *testing.T, server func(ctx context.Context, c *websocket.Conn)) *socket {
	t.Helper()
	edge := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/v1/connect" || r.Header.Get("Authorization") != "Bearer the token" {
			t.Errorf("asked for %s with %q", r.URL, r.Header)
		}
		c, err := websocket.Accept(w, r, &websocket.AcceptOptions{Subprotocols: []string{"tidemark.v1.proto"}})
		if err != nil {
			t.Error(err)
			return
		}
		defer func() { _ = c.CloseNow() }()
		server(r.Context(), c)
	}))
	s, err := dial(t.Context(), edge, "the token")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.close)
	return s
}

func TestSocketReadsWhateverAServerSends(t *testing.T) {
	large := bytes.Repeat([]byte("0123456789"), 100_000)
	sizes := []int{0, 1, 125, 126, 127, 65_535, 65_536, 200_000}
	s := talk(t, func(ctx context.Context, c *websocket.Conn) {
		read := c.CloseRead(ctx)
		for _, n := range sizes {
			_ = c.Write(ctx, websocket.MessageBinary, large[:n])
		}
		// In three frames.
		w, err := c.Writer(ctx, websocket.MessageBinary)
		if err != nil {
			t.Error(err)
		}
		for _, part := range []string{"a message ", "in ", "parts"} {
			_, _ = w.Write([]byte(part))
		}
		_ = w.Close()
		// A ping is answered, or this waits until the test's end.
		if err := c.Ping(ctx); err != nil {
			t.Errorf("ping: %v", err)
		}
		_ = c.Write(ctx, websocket.MessageBinary, []byte("last"))
		_ = c.Close(websocket.StatusPolicyViolation, "forbidden: because")
		<-read.Done()
	})
	for _, n := range sizes {
		msg, err := s.next()
		if err != nil || !bytes.Equal(msg, large[:n]) {
			t.Fatalf("a message of %d bytes came as %d: %v", n, len(msg), err)
		}
	}
	for _, want := range []string{"a message in parts", "last"} {
		if msg, err := s.next(); err != nil || string(msg) != want {
			t.Fatalf("got %q %v, want %q", msg, err, want)
		}
	}
	if _, err := s.next(); err == nil || !strings.Contains(err.Error(), "1008 forbidden: because") {
		t.Errorf("at the end: %v", err)
	}
}

func TestSocketWritesWhatAServerReads(t *testing.T) {
	got := make(chan string, 10)
	s := talk(t, func(ctx context.Context, c *websocket.Conn) {
		c.SetReadLimit(1 << 20)
		for {
			_, msg, err := c.Read(ctx)
			if err != nil {
				return
			}
			got <- string(msg)
		}
	})
	var out []byte
	var want []string
	for _, n := range []int{0, 125, 126, 65_535, 65_536} {
		msg := strings.Repeat("m", n)
		out = append(appendHeader(out, opBinary, n), msg...)
		want = append(want, msg)
	}
	if err := s.write(out); err != nil {
		t.Fatal(err)
	}
	for _, w := range want {
		select {
		case msg := <-got:
			if msg != w {
				t.Fatalf("%d bytes came as %d", len(w), len(msg))
			}
		case <-time.After(time.Minute):
			t.Fatalf("a message of %d bytes did not come", len(w))
		}
	}
}

func TestSocketRefusesWhatIsNoEdge(t *testing.T) {
	for name, tt := range map[string]struct {
		h    http.HandlerFunc
		says string
	}{
		"a refusal": {func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "go away", http.StatusForbidden) }, "403 Forbidden go away"},
		"another protocol": {func(w http.ResponseWriter, r *http.Request) {
			if c, err := websocket.Accept(w, r, nil); err == nil {
				_ = c.CloseNow()
			}
		}, "does not speak"},
	} {
		if _, err := dial(t.Context(), serve(t, tt.h), "the token"); err == nil || !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
