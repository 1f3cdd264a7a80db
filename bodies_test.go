package main

import (
	"bufio"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
)

// TestBodiesAreNotWaitedFor: a request whose body never comes holds no connection, on any path, and neither does half a request; a WebSocket is not cut off by that.
func TestBodiesAreNotWaitedFor(t *testing.T) {
	t.Parallel() // it waits
	const within = 2 * time.Second
	upgraded := make(chan error, 1)
	mux := http.NewServeMux()
	mux.HandleFunc("GET /ws", func(w http.ResponseWriter, r *http.Request) {
		c, err := websocket.Accept(w, r, nil)
		if err == nil {
			// Nothing comes for longer than a request may take.
			_, _, err = c.Read(r.Context())
			_ = c.CloseNow()
		}
		upgraded <- err
	})
	mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "here") })
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := newHTTPServer(mux, within)
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	defer func() {
		_ = s.Close()
		if err := <-served; !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
	}()

	ws, _, err := websocket.Dial(t.Context(), "ws://"+l.Addr().String()+"/ws", nil)
	if err != nil {
		t.Fatal(err)
	}
	opened := time.Now()
	for name, request := range map[string]string{
		"POST with a length":   "POST /metrics HTTP/1.1\r\nHost: h\r\nContent-Length: 100\r\n\r\n",
		"GET with a length":    "GET /healthz HTTP/1.1\r\nHost: h\r\nContent-Length: 100\r\n\r\n",
		"chunks without one":   "POST /nowhere HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n",
		"a body that is there": "POST /metrics HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\n\r\nbody",
		"half a head":          "GET /metrics HTTP/1.1\r\nHost:",
	} {
		began := time.Now()
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(c, request); err != nil {
			t.Fatal(err)
		}
		said, err := io.ReadAll(bufio.NewReader(c))
		if took := time.Since(began); err != nil {
			t.Errorf("%s: held for %s, %v", name, took, err)
		}
		if half := name == "half a head"; half != (len(said) == 0) || !half && (!strings.HasPrefix(string(said), "HTTP/1.1 400 ") || !strings.Contains(string(said), `"code":"invalid_message"`)) {
			t.Errorf("%s: answered with %q", name, said)
		}
		_ = c.Close()
	}
	res, err := http.Get("http://" + l.Addr().String() + "/metrics")
	if err != nil || res.StatusCode != http.StatusOK {
		t.Fatalf("%v, %v", res, err)
	}
	_ = res.Body.Close()

	for time.Since(opened) < 2*within {
		if ctx := t.Context(); ctx.Err() != nil {
			t.Fatal(ctx.Err())
		}
		select {
		case err := <-upgraded:
			t.Fatalf("the WebSocket was cut off: %v", err)
		case <-time.After(within):
		}
	}
	if err := ws.Write(t.Context(), websocket.MessageText, []byte("still here")); err != nil {
		t.Fatal(err)
	}
	if err := <-upgraded; err != nil {
		t.Error(err)
	}
	_ = ws.CloseNow()
}
