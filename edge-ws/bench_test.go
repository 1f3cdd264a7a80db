package edgews

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"net/http"
	"runtime"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"tidemark/broker"
	"tidemark/internal/auth"
	"tidemark/internal/gateway"
	"tidemark/schema"
)

// quickLog stores nothing and says yes.
type quickLog struct {
	broker.Log
	seq uint64
}

func (l *quickLog) Publish(_ context.Context, _ schema.SessionID, s *broker.Submission) {
	l.seq++
	s.Done(broker.Receipt{Epoch: "01ARZ3NDEKTSV4RRFFQ69G5FAV", First: l.seq, Last: l.seq}, nil)
}

// serveTCP runs an edge on a loopback socket until the benchmark ends, and returns its address and a token.
func serveTCP(b *testing.B, log broker.Log) (addr, bearer string) {
	b.Helper()
	v, err := auth.NewVerifier(auth.Config{Secret: []byte(secret)})
	if err != nil {
		b.Fatal(err)
	}
	g, err := gateway.New(gateway.Config{Log: log, Verify: v.Verify})
	if err != nil {
		b.Fatal(err)
	}
	e, err := New(Config{Gateway: g, Verify: v.Verify})
	if err != nil {
		b.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	srv := &http.Server{Handler: e.Handler()}
	go func() { _ = srv.Serve(l) }()
	b.Cleanup(func() {
		_ = srv.Close()
		e.Close()
	})
	return l.Addr().String(), token(b, schema.Role_ROLE_AGENT, "*")
}

// dialTCP opens a WebSocket by hand on a real socket.
func dialTCP(b *testing.B, addr, token string) (net.Conn, *bufio.Reader) {
	b.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = c.Close() })
	_, err = fmt.Fprintf(c, "GET /v1/connect HTTP/1.1\r\nHost: edge\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nAuthorization: Bearer %s\r\nSec-WebSocket-Protocol: %s\r\n\r\n",
		token, SubprotocolProto)
	if err != nil {
		b.Fatal(err)
	}
	br := bufio.NewReaderSize(c, 512)
	resp, err := http.ReadResponse(br, nil)
	if err != nil || resp.StatusCode != http.StatusSwitchingProtocols {
		b.Fatal(resp, err)
	}
	return c, br
}

func masked(frame []byte) []byte {
	return append([]byte{0x82, 0x80 | byte(len(frame)), 0, 0, 0, 0}, frame...)
}

// BenchmarkPublish is a token in a frame of its own, over a loopback socket, to its acknowledgement: what the edge and the gateway spend on it, and the client's writing of many at once.
func BenchmarkPublish(b *testing.B) {
	addr, token := serveTCP(b, &quickLog{Log: broker.NewMemoryLog()})
	c, br := dialTCP(b, addr, token)
	frame, err := proto.Marshal(&schema.ClientFrame{Frame: &schema.ClientFrame_Publish{Publish: &schema.Publish{
		PublishId: 12345, Session: "a-session-of-usual-length", Envelopes: []*schema.Envelope{
			{Payload: &schema.Envelope_Token{Token: &schema.Token{MessageId: "m1", Text: " example"}}},
		},
	}}})
	if err != nil {
		b.Fatal(err)
	}
	one := masked(frame)
	var chunk []byte
	for range 256 {
		chunk = append(chunk, one...)
	}
	b.ReportAllocs()
	b.ResetTimer()
	go func() {
		for left := b.N; left > 0; left -= 256 {
			if _, err := c.Write(chunk[:min(left, 256)*len(one)]); err != nil {
				return
			}
		}
	}()
	r := &raw{Conn: c, br: br}
	for acked := 0; acked < b.N; {
		_, payload, err := r.next()
		if err != nil {
			b.Fatal(err)
		}
		f := new(schema.ServerFrame)
		if err := proto.Unmarshal(payload, f); err != nil || f.GetPublished() == nil {
			b.Fatal(f, err)
		}
		acked += len(f.GetPublished().GetAcks())
	}
}

// BenchmarkIdleConnection is the memory that a connection costs which follows a session where nothing happens, in bytes, both ends of the socket not counted.
func BenchmarkIdleConnection(b *testing.B) {
	const n = 2000
	for b.Loop() {
		addr, token := serveTCP(b, broker.NewMemoryLog())
		attach, err := proto.Marshal(&schema.ClientFrame{Frame: &schema.ClientFrame_Attach{Attach: &schema.Attach{Channel: 1, Session: "s"}}})
		if err != nil {
			b.Fatal(err)
		}
		attach = masked(attach)
		clients := make([]net.Conn, n)
		before := memory()
		for i := range clients {
			c, br := dialTCP(b, addr, token)
			if _, err := c.Write(attach); err != nil {
				b.Fatal(err)
			}
			for range 2 {
				if _, _, err := (&raw{Conn: c, br: br}).next(); err != nil {
					b.Fatal(err)
				}
			}
			clients[i] = c
		}
		time.Sleep(100 * time.Millisecond) // the writers go idle
		after := memory()
		b.ReportMetric(float64(after.HeapInuse-before.HeapInuse+after.StackInuse-before.StackInuse)/n, "B/conn")
		b.ReportMetric(float64(after.StackInuse-before.StackInuse)/n, "stack-B/conn")
		runtime.KeepAlive(clients)
		for _, c := range clients {
			_ = c.Close()
		}
	}
}

// memory is what the heap and the stacks hold once the garbage is gone.
func memory() (m runtime.MemStats) {
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return m
}
