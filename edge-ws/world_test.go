package edgews

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coder/websocket"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"tidemark/broker"
	"tidemark/internal/auth"
	"tidemark/internal/gateway"
	"tidemark/schema"
)

const secret = "0123456789abcdef0123456789abcdef"

// world is an edge on a log in memory behind a server on pipes, inside a bubble.
type world struct {
	*testing.T
	g    *gateway.Gateway
	log  *broker.MemoryLog
	edge *Edge
	http *http.Client
	l    *pipes
	logs *strings.Builder
}

// pipes is a listener whose connections are pipes: no socket, so time can be fake.
type pipes struct {
	ch   chan net.Conn
	done chan struct{}
}

func (l *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-l.ch:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *pipes) Close() error   { close(l.done); return nil }
func (l *pipes) Addr() net.Addr { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1} }

func (l *pipes) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	a, b := net.Pipe()
	select {
	case l.ch <- b:
		return a, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// bubble runs a test with a world of its own under fake time.
func bubble(t *testing.T, change func(*Config, *gateway.Config), test func(w *world)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := &world{T: t, log: broker.NewMemoryLog(), l: &pipes{ch: make(chan net.Conn), done: make(chan struct{})}, logs: new(strings.Builder)}
		v, err := auth.NewVerifier(auth.Config{Secret: []byte(secret)})
		if err != nil {
			t.Fatal(err)
		}
		logger := slog.New(slog.NewTextHandler(w.logs, &slog.HandlerOptions{Level: slog.LevelDebug}))
		gc := gateway.Config{Log: w.log, Verify: v.Verify, Version: "test", Logger: logger}
		ec := Config{Verify: v.Verify, Logger: logger}
		if change != nil {
			change(&ec, &gc)
		}
		if w.g, err = gateway.New(gc); err != nil {
			t.Fatal(err)
		}
		ec.Gateway = w.g
		if w.edge, err = New(ec); err != nil {
			t.Fatal(err)
		}
		srv := &http.Server{Handler: w.edge.Handler(), ErrorLog: slog.NewLogLogger(logger.Handler(), slog.LevelError)}
		served := make(chan error, 1)
		go func() { served <- srv.Serve(w.l) }()
		tr := &http.Transport{DialContext: w.l.dial}
		w.http = &http.Client{Transport: tr}
		defer func() {
			w.edge.Close()
			tr.CloseIdleConnections()
			_ = srv.Close()
			if err := <-served; !errors.Is(err, http.ErrServerClosed) {
				t.Error(err)
			}
		}()
		test(w)
	})
}

func token(t testing.TB, role schema.Role, sessions ...string) string {
	t.Helper()
	text, err := auth.Mint([]byte(secret), auth.Principal{Subject: "somebody", Tenant: "default", Role: role, Sessions: sessions}, 24*365*time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func (w *world) agentToken() string { return token(w, schema.Role_ROLE_AGENT, "*") }

// client is one end of a WebSocket.
type client struct {
	*testing.T
	c    *websocket.Conn
	text bool
	// reason is the close frame's, once wantClosed has seen it.
	reason string
}

// dial opens a WebSocket; what is refused before the upgrade is returned.
func (w *world) dial(path string, opts *websocket.DialOptions) (*client, *http.Response, error) {
	w.Helper()
	if opts == nil {
		opts = new(websocket.DialOptions)
	}
	opts.HTTPClient = w.http
	c, resp, err := websocket.Dial(w.Context(), "ws://edge"+path, opts)
	if err != nil {
		return nil, resp, err
	}
	c.SetReadLimit(2 << 20)
	w.Cleanup(func() { _ = c.CloseNow() })
	return &client{T: w.T, c: c, text: c.Subprotocol() != SubprotocolProto}, resp, nil
}

func (w *world) mustDial(path string, opts *websocket.DialOptions) *client {
	w.Helper()
	c, _, err := w.dial(path, opts)
	if err != nil {
		w.Fatal(err)
	}
	return c
}

// connect opens a multiplexed connection with an agent's token.
func (w *world) connect(subprotocol string) *client {
	w.Helper()
	return w.mustDial("/v1/connect", &websocket.DialOptions{
		Subprotocols: []string{subprotocol}, HTTPHeader: http.Header{"Authorization": {"Bearer " + w.agentToken()}},
	})
}

// session opens a session socket with an agent's token.
func (w *world) session(query string) *client {
	w.Helper()
	return w.mustDial("/ws?token="+w.agentToken()+"&"+query, nil)
}

func (c *client) write(typ websocket.MessageType, b []byte) {
	c.Helper()
	ctx, cancel := context.WithTimeout(c.Context(), time.Minute)
	defer cancel()
	if err := c.c.Write(ctx, typ, b); err != nil {
		c.Fatal(err)
	}
}

// send writes a frame in the connection's form.
func (c *client) send(f *schema.ClientFrame) {
	c.Helper()
	if c.text {
		b, err := protojson.Marshal(f)
		if err != nil {
			c.Fatal(err)
		}
		c.write(websocket.MessageText, b)
		return
	}
	b, err := proto.Marshal(f)
	if err != nil {
		c.Fatal(err)
	}
	c.write(websocket.MessageBinary, b)
}

func (c *client) attach(a *schema.Attach) {
	c.Helper()
	c.send(&schema.ClientFrame{Frame: &schema.ClientFrame_Attach{Attach: a}})
}

func (c *client) publish(id uint64, session string, texts ...string) {
	c.Helper()
	m := &schema.Publish{PublishId: id, Session: session}
	for _, text := range texts {
		m.Envelopes = append(m.Envelopes, &schema.Envelope{Payload: &schema.Envelope_Token{Token: &schema.Token{MessageId: "m", Text: text}}})
	}
	c.send(&schema.ClientFrame{Frame: &schema.ClientFrame_Publish{Publish: m}})
}

// read is the next message; fake time runs for at most a minute meanwhile.
func (c *client) read() ([]byte, error) {
	ctx, cancel := context.WithTimeout(c.Context(), time.Minute)
	defer cancel()
	typ, b, err := c.c.Read(ctx)
	if err == nil && (typ == websocket.MessageText) != c.text {
		c.Fatalf("got a message of type %v", typ)
	}
	return b, err
}

func (c *client) next() *schema.ServerFrame {
	c.Helper()
	b, err := c.read()
	if err != nil {
		c.Fatal(err)
	}
	f := new(schema.ServerFrame)
	if c.text {
		err = protojson.Unmarshal(b, f)
	} else {
		err = proto.Unmarshal(b, f)
	}
	if err != nil {
		c.Fatalf("%q: %v", b, err)
	}
	return f
}

// want takes frames until one of type T comes; of the others, events are refused.
func want[T any](c *client) T {
	c.Helper()
	f := c.next()
	m, ok := f.GetFrame().(T)
	if !ok {
		c.Fatalf("want %T, got %v", m, f)
	}
	return m
}

// wantTexts reads events until the texts of the tokens are these, with seqs from `from` on.
func (c *client) wantTexts(from uint64, texts ...string) {
	c.Helper()
	for len(texts) > 0 {
		for _, e := range want[*schema.ServerFrame_Events](c).Events.GetEnvelopes() {
			if len(texts) == 0 || e.GetSeq() != from || e.GetToken().GetText() != texts[0] {
				c.Fatalf("got seq %d %q, want seq %d %q", e.GetSeq(), e.GetToken().GetText(), from, texts)
			}
			from++
			texts = texts[1:]
		}
	}
}

// nextJSON is the next message of a session socket.
func (c *client) nextJSON() map[string]any {
	c.Helper()
	b, err := c.read()
	if err != nil {
		c.Fatal(err)
	}
	var m map[string]any
	if err := json.Unmarshal(b, &m); err != nil {
		c.Fatalf("%q: %v", b, err)
	}
	return m
}

// wantType is the next message, which must have this type; it returns its data, with the seq as "seq" where it has one.
func (c *client) wantType(typ string) map[string]any {
	c.Helper()
	m := c.nextJSON()
	if m["type"] != typ {
		c.Fatalf("got %v, want type %q", m, typ)
	}
	data, _ := m["data"].(map[string]any)
	if seq, ok := m["seq"]; ok {
		data["seq"] = seq
	}
	return data
}

// wantClosed reads until the close frame, and checks its code and reason.
func (c *client) wantClosed(status websocket.StatusCode, says ...string) {
	c.Helper()
	b, err := c.read()
	if err == nil {
		c.Fatalf("want the end, got %q", b)
	}
	var ce websocket.CloseError
	if !errors.As(err, &ce) || ce.Code != status {
		c.Fatalf("got %v, want status %d", err, status)
	}
	c.reason = ce.Reason
	for _, s := range says {
		if !strings.Contains(ce.Reason, s) {
			c.Fatalf("the reason is %q, want %q in it", ce.Reason, s)
		}
	}
}

// fill appends tokens to a session, beside the edge.
func (w *world) fill(session string, all ...string) {
	w.Helper()
	stamp := schema.NewStamp(&schema.Source{Subject: "writer", Role: schema.Role_ROLE_AGENT})
	for _, text := range all {
		a, err := stamp.AcceptEnvelope(&schema.Envelope{Payload: &schema.Envelope_Token{Token: &schema.Token{MessageId: "m", Text: text}}}, time.Now())
		if err != nil {
			w.Fatal(err)
		}
		if _, err := broker.Append(w.Context(), w.log, schema.SessionID{Tenant: "default", Name: session}, broker.Submission{Envelopes: []schema.Accepted{a}}); err != nil {
			w.Fatal(err)
		}
	}
}

func texts(n int) []string {
	all := make([]string, n)
	for i := range all {
		all[i] = fmt.Sprint("t", i+1)
	}
	return all
}

// raw is a peer that speaks frames by hand: it does what no library does.
type raw struct {
	*testing.T
	net.Conn
	br *bufio.Reader
}

// upgrade opens a WebSocket by hand.
func (w *world) upgrade(path, headers string) *raw {
	w.Helper()
	conn, err := w.l.dial(w.Context(), "", "")
	if err != nil {
		w.Fatal(err)
	}
	w.Cleanup(func() { _ = conn.Close() })
	request := "GET " + path + " HTTP/1.1\r\nHost: edge\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n" + headers + "\r\n"
	go func() { _, _ = io.WriteString(conn, request) }()
	br := bufio.NewReader(conn)
	resp, err := http.ReadResponse(br, nil)
	if err != nil || resp.StatusCode != http.StatusSwitchingProtocols {
		w.Fatalf("%v, %v", resp, err)
	}
	return &raw{T: w.T, Conn: conn, br: br}
}

// frame writes one frame, masked with zeros.
func (r *raw) frame(first byte, payload []byte) error {
	b := []byte{first}
	switch n := len(payload); {
	case n < 126:
		b = append(b, 0x80|byte(n))
	case n < 1<<16:
		b = binary.BigEndian.AppendUint16(append(b, 0x80|126), uint16(n))
	default:
		b = binary.BigEndian.AppendUint64(append(b, 0x80|127), uint64(n))
	}
	b = append(b, 0, 0, 0, 0)
	_, err := r.Write(append(b, payload...))
	return err
}

// next reads one frame.
func (r *raw) next() (opcode byte, payload []byte, err error) {
	var head [2]byte
	if _, err := io.ReadFull(r.br, head[:]); err != nil {
		return 0, nil, err
	}
	n := uint64(head[1] & 0x7f)
	if n >= 126 {
		ext := make([]byte, map[uint64]int{126: 2, 127: 8}[n])
		if _, err := io.ReadFull(r.br, ext); err != nil {
			return 0, nil, err
		}
		n = 0
		for _, b := range ext {
			n = n<<8 | uint64(b)
		}
	}
	payload = make([]byte, n)
	_, err = io.ReadFull(r.br, payload)
	return head[0] & 0x0f, payload, err
}
