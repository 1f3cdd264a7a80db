package edgews

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coder/websocket"

	"tidemark/broker"
	"tidemark/internal/auth"
	"tidemark/internal/gateway"
	"tidemark/schema"
)

// sockets is an edge on a loopback socket: what closing does to bytes on their way shows there alone.
type sockets struct {
	*testing.T
	g    *gateway.Gateway
	addr string
}

func onSockets(t *testing.T) *sockets {
	t.Helper()
	v, err := auth.NewVerifier(auth.Config{Secret: []byte(secret)})
	if err != nil {
		t.Fatal(err)
	}
	g, err := gateway.New(gateway.Config{Log: broker.NewMemoryLog(), Verify: v.Verify, DrainGrace: -1})
	if err != nil {
		t.Fatal(err)
	}
	e, err := New(Config{Gateway: g, Verify: v.Verify})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: e.Handler()}
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = srv.Serve(l)
	}()
	t.Cleanup(func() {
		_ = srv.Close()
		<-served
		e.Close()
	})
	return &sockets{T: t, g: g, addr: l.Addr().String()}
}

// open opens a session socket, or a multiplexed connection where there is a subprotocol, and reads what comes first.
func (s *sockets) open(subprotocol string, deflate bool) *raw {
	s.Helper()
	conn, err := net.Dial("tcp", s.addr)
	if err != nil {
		s.Fatal(err)
	}
	s.Cleanup(func() { _ = conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		s.Fatal(err)
	}
	path, headers := "/ws?sessionName=s&lastSeq=latest&token=", ""
	if subprotocol != "" {
		path, headers = "/v1/connect?token=", "Sec-WebSocket-Protocol: "+subprotocol+"\r\n"
	}
	if deflate {
		headers += "Sec-WebSocket-Extensions: permessage-deflate\r\n"
	}
	if _, err := fmt.Fprintf(conn, "GET %s%s HTTP/1.1\r\nHost: edge\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n%s\r\n",
		path, token(s, schema.Role_ROLE_AGENT, "*"), headers); err != nil {
		s.Fatal(err)
	}
	br := bufio.NewReader(conn)
	resp, err := http.ReadResponse(br, nil)
	if err != nil || resp.StatusCode != http.StatusSwitchingProtocols {
		s.Fatalf("%v, %v", resp, err)
	}
	r := &raw{T: s.T, Conn: conn, br: br}
	if subprotocol == "" {
		if _, b, err := r.next(); err != nil || !strings.Contains(string(b), `"type":"attached"`) {
			s.Fatalf("got %q, %v", b, err)
		}
	}
	return r
}

// last reads until the close frame, and demands that nothing follows it but the end, in good order. It returns what came before.
func (r *raw) last() (messages []string, closed []byte) {
	r.Helper()
	for {
		op, payload, err := r.next()
		if err != nil {
			r.Errorf("there is no close frame but %v, behind %q", err, messages)
			return messages, nil
		}
		if op != opClose {
			messages = append(messages, string(payload))
			continue
		}
		if _, _, err := r.next(); !errors.Is(err, io.EOF) {
			r.Errorf("the close frame is followed by %v", err)
		}
		return messages, payload
	}
}

func closing(code int, reason string) []byte {
	return append(binary.BigEndian.AppendUint16(nil, uint16(code)), reason...)
}

// TestPeersCloseIsAnswered: whoever closes gets what it said back, and the end in good order (RFC 6455, section 5.5.1).
func TestPeersCloseIsAnswered(t *testing.T) {
	s := onSockets(t)
	for _, as := range []struct {
		subprotocol string
		deflate     bool
	}{{"", false}, {"", true}, {SubprotocolProto, false}, {SubprotocolJSON, true}} {
		for _, said := range [][]byte{closing(1000, ""), closing(1000, "bye"), closing(1001, "the tab is closed"), closing(3000, ""), closing(4000, "mine"), nil} {
			r := s.open(as.subprotocol, as.deflate)
			if err := r.frame(0x88, said); err != nil {
				t.Fatal(err)
			}
			if before, answer := r.last(); !bytes.Equal(answer, said) || len(before) > 0 {
				t.Errorf("%+v: %q was answered with %q, and %q before", as, said, answer, before)
			}
		}
	}
	c, _, err := websocket.Dial(t.Context(), "ws://"+s.addr+"/ws?sessionName=s&token="+token(t, schema.Role_ROLE_AGENT, "*"), nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Close(websocket.StatusNormalClosure, "done"); err != nil {
		t.Error(err)
	}
}

// TestViolations: what RFC 6455 forbids is said with the code that it has for that, whatever follows it.
func TestViolations(t *testing.T) {
	s := onSockets(t)
	more := append(bytes.Repeat(clientFrame(0x81, 7, []byte(`{"type":"system","data":{"message":"more"}}`)), 2_000), clientFrame(0x88, 7, nil)...)
	for name, v := range map[string]struct {
		bytes []byte
		code  int
	}{
		"close of one byte":               {clientFrame(0x88, 7, []byte{3}), 1002},
		"close with a code for nobody":    {clientFrame(0x88, 7, closing(1005, "")), 1002},
		"close with a code below all":     {clientFrame(0x88, 7, closing(999, "")), 1002},
		"close with a reason that is not": {clientFrame(0x88, 7, closing(1000, "\xff\xfe")), 1007},
		"close that is too long":          {clientFrame(0x88, 7, closing(1000, strings.Repeat("x", 124))), 1002},
		"unmasked":                        {appendFrame(nil, 1, []byte("{}")), 1002},
		"unmasked fragment":               {append(clientFrame(0x01, 7, []byte("{")), 0x80, 1, '}'), 1002},
		"unmasked close":                  {closeFrame(1000, ""), 1002},
		"reserved bit 2":                  {clientFrame(0xa1, 7, []byte("{}")), 1002},
		"reserved bit 1, uncompressed":    {clientFrame(0xc1, 7, []byte("{}")), 1002},
		"reserved opcode 3":               {clientFrame(0x83, 7, []byte("{}")), 1002},
		"reserved opcode 11":              {clientFrame(0x8b, 7, nil), 1002},
		"stray continuation":              {clientFrame(0x80, 7, []byte("{}")), 1002},
		"message within a message":        {append(clientFrame(0x01, 7, []byte("{")), clientFrame(0x81, 7, []byte("}"))...), 1002},
		"long ping":                       {clientFrame(0x89, 7, make([]byte, 126)), 1002},
		"fragmented ping":                 {clientFrame(0x09, 7, []byte("p")), 1002},
		"length below zero":               {[]byte{0x81, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4}, 1002},
		"text that is not":                {clientFrame(0x81, 7, []byte("\xff")), 1007},
		"binary":                          {clientFrame(0x82, 7, []byte("{}")), 1003},
	} {
		r := s.open("", false)
		// Some of it is lost on a connection that is closed meanwhile.
		_, _ = r.Write(append(v.bytes, more...))
		before, closed := r.last()
		if len(closed) < 2 || int(binary.BigEndian.Uint16(closed)) != v.code || !strings.HasPrefix(string(closed[2:]), "invalid_message: ") {
			t.Errorf("%s: closed with %q, want %d", name, closed, v.code)
		}
		if len(before) != 1 || !strings.Contains(before[0], `"code":"invalid_message"`) {
			t.Errorf("%s: before it came %q", name, before)
		}
	}
	r := s.open("", true)
	_, _ = r.Write(clientFrame(0xc1, 7, []byte("\xff\xff\xff\xff")))
	if _, closed := r.last(); len(closed) < 2 || int(binary.BigEndian.Uint16(closed)) != 1007 {
		t.Errorf("what cannot be decompressed: closed with %q", closed)
	}
}

// TestAcceptedIsAnsweredBeforeTheClose: who sends and closes in one go learns what became of all of it first.
func TestAcceptedIsAnsweredBeforeTheClose(t *testing.T) {
	s := onSockets(t)
	var all []byte
	for i := range 20 {
		all = append(all, clientFrame(0x81, uint32(i), fmt.Appendf(nil, `{"type":"agent_message","data":{"message":"%d %s"}}`, i, strings.Repeat("long ", 200)))...)
	}
	for name, end := range map[string][]byte{
		"close":                  clientFrame(0x88, 1, closing(1000, "bye")),
		"close within a message": append(clientFrame(0x01, 1, []byte(`{"type"`)), clientFrame(0x88, 1, closing(1000, "bye"))...),
	} {
		for _, deflate := range []bool{false, true} {
			r := s.open("", deflate)
			if _, err := r.Write(append(bytes.Clone(all), end...)); err != nil {
				t.Fatal(err)
			}
			before, closed := r.last()
			answers := 0
			for _, m := range before {
				if strings.Contains(m, `"type":"published"`) {
					answers++
				}
			}
			if answers != 20 || !bytes.Equal(closed, closing(1000, "bye")) {
				t.Errorf("%s, compression %v: %d answers, then %q", name, deflate, answers, closed)
			}
		}
	}
}

// TestBothClose: where the edge and the peer close at once, the peer gets one close frame and the end in good order.
func TestBothClose(t *testing.T) {
	s := onSockets(t)
	for range 50 {
		r := s.open("", false)
		if _, err := r.Write(append(clientFrame(0x81, 1, []byte("{}")), clientFrame(0x88, 1, closing(1000, ""))...)); err != nil {
			t.Fatal(err)
		}
		if _, closed := r.last(); len(closed) < 2 {
			t.Fatalf("closed with %q", closed)
		}
	}
	var all []*raw
	for range 30 {
		all = append(all, s.open("", false))
	}
	drained := make(chan error)
	go func() { drained <- s.g.Drain(t.Context(), "Now.") }()
	for _, r := range all {
		if err := r.frame(0x88, closing(1000, "")); err != nil {
			t.Fatal(err)
		}
	}
	for _, r := range all {
		if _, closed := r.last(); len(closed) < 2 {
			t.Errorf("closed with %q", closed)
		}
	}
	if err := <-drained; err != nil {
		t.Error(err)
	}
}

// TestCloserDoesNotHoldTheConnection: who closes and then takes nothing, or is gone, is not waited for.
func TestCloserDoesNotHoldTheConnection(t *testing.T) {
	bubble(t, nil, func(w *world) {
		w.fill("s", texts(100)...)
		open := func() *raw {
			w.logs.Reset()
			r := w.upgrade("/ws?sessionName=s&token="+w.agentToken(), "")
			// The edge is writing what follows.
			if _, _, err := r.next(); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
			if err := r.frame(0x88, closing(1000, "")); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
			return r
		}
		ended := func(lasted string) {
			t.Helper()
			if !strings.Contains(w.logs.String(), "reason=peer_closed lasted="+lasted+" ") {
				t.Errorf("the log says\n%s", w.logs)
			}
		}
		open() // and takes nothing
		time.Sleep(gateway.DefaultCloseTimeout)
		synctest.Wait()
		ended("5s")

		r := open()
		_ = r.Close() // and is gone
		synctest.Wait()
		ended("0s")
	})
}
