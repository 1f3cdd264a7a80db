package edgews

import (
	"context"
	"encoding/binary"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/proto"

	"tidemark/broker"
	"tidemark/internal/gateway"
	"tidemark/schema"
)

// TestIdleConnectionLives: who answers pings is never closed.
func TestIdleConnectionLives(t *testing.T) {
	bubble(t, nil, func(w *world) {
		c := w.connect(SubprotocolProto)
		got := make(chan *schema.ServerFrame, 1)
		go func() {
			// Reading answers pings.
			_, b, err := c.c.Read(w.Context())
			if err == nil && len(b) > 0 {
				got <- nil
			}
		}()
		time.Sleep(24 * time.Hour)
		c.publish(1, "s", "still here")
		<-got
		if strings.Contains(w.logs.String(), "peer_dead") {
			t.Errorf("the log says\n%s", w.logs)
		}
	})
}

// silent reads what the edge sends, and answers nothing. It returns what it was sent, and when and how it was closed.
func silent(r *raw) (pings int, status int, reason string, after time.Duration) {
	began := time.Now()
	for {
		op, payload, err := r.next()
		if err != nil {
			return pings, status, reason, time.Since(began)
		}
		switch op {
		case 9:
			pings++
		case 8:
			status, reason, after = int(binary.BigEndian.Uint16(payload)), string(payload[2:]), time.Since(began)
			return pings, status, reason, after
		}
	}
}

// TestDeadPeer: two pings without an answer, and the connection is closed with a reason.
func TestDeadPeer(t *testing.T) {
	bubble(t, nil, func(w *world) {
		for _, path := range []string{"/ws?sessionName=s&token=" + w.agentToken(), "/v1/connect?token=" + w.agentToken()} {
			pings, status, reason, after := silent(w.upgrade(path, "Sec-WebSocket-Protocol: "+SubprotocolProto+"\r\n"))
			if pings != 2 || status != 1001 || !strings.HasPrefix(reason, "peer_dead: ") || after != 90*time.Second {
				t.Errorf("after %d pings and %s it was closed with %d %q", pings, after, status, reason)
			}
			synctest.Wait()
		}
	})
}

// TestPeerThatOnlySends: whoever sends is alive, be it half a message.
func TestPeerThatOnlySends(t *testing.T) {
	bubble(t, nil, func(w *world) {
		r := w.upgrade("/v1/connect?token="+w.agentToken(), "Sec-WebSocket-Protocol: "+SubprotocolProto+"\r\n")
		end := make(chan time.Duration)
		go func() {
			_, _, _, after := silent(r)
			end <- after
		}()
		// A message of 100 bytes, one every 20 s.
		if _, err := r.Write([]byte{0x82, 0x80 | 100, 0, 0, 0, 0}); err != nil {
			t.Fatal(err)
		}
		for range 30 {
			time.Sleep(20 * time.Second)
			if _, err := r.Write([]byte{0}); err != nil {
				t.Fatal(err)
			}
		}
		if after := <-end; after < 10*time.Minute+30*time.Second || after > 12*time.Minute {
			t.Errorf("it was closed after %s", after)
		}
	})
}

// TestBusyEdgeBlamesNobody: while the log takes nothing the edge does not read, and so sees no pong; that is not the peer's fault.
func TestBusyEdgeBlamesNobody(t *testing.T) {
	full := new(fullLog)
	bubble(t, func(_ *Config, g *gateway.Config) { full.Log, g.Log = g.Log, full }, func(w *world) {
		full.release = make(chan struct{})
		r := w.upgrade("/v1/connect?token="+w.agentToken(), "Sec-WebSocket-Protocol: "+SubprotocolProto+"\r\n")
		// The peer answers every ping at once; its answers wait in the socket.
		socket := make(chan []byte, 100)
		go func() {
			for {
				select {
				case pong := <-socket:
					_ = r.frame(0x8a, pong)
				case <-w.Context().Done():
					return
				}
			}
		}()
		acked := make(chan struct{}, 1)
		go func() {
			for {
				switch op, payload, err := r.next(); {
				case err != nil:
					return
				case op == 9:
					socket <- payload
				case op == 2:
					acked <- struct{}{}
				}
			}
		}()
		publish, err := proto.Marshal(&schema.ClientFrame{Frame: &schema.ClientFrame_Publish{Publish: &schema.Publish{PublishId: 1, Session: "s", Envelopes: []*schema.Envelope{
			{Payload: &schema.Envelope_System{System: &schema.System{Message: "held"}}},
		}}}})
		if err != nil {
			t.Fatal(err)
		}
		if err := r.frame(0x82, publish); err != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Minute)
		if strings.Contains(w.logs.String(), "connection ended") {
			t.Errorf("the log says\n%s", w.logs)
		}
		close(full.release)
		<-acked
		time.Sleep(10 * time.Minute)
		if strings.Contains(w.logs.String(), "connection ended") {
			t.Errorf("the log says\n%s", w.logs)
		}
	})
}

// fullLog has no room until it is released.
type fullLog struct {
	broker.Log
	release chan struct{}
}

func (l *fullLog) Publish(ctx context.Context, id schema.SessionID, s *broker.Submission) {
	select {
	case <-l.release:
		l.Log.Publish(ctx, id, s)
	case <-ctx.Done():
		s.Done(broker.Receipt{}, ctx.Err())
	}
}
