package gateway

import (
	"bytes"
	"context"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/proto"

	"tidemark/broker"
	"tidemark/schema"
)

func TestPublish(t *testing.T) {
	bubble(t, nil, func(w *world) {
		p := w.agent()
		p.token(1, "s", "one")
		if a := p.wantAck(1, 1, 1); a.GetEpoch() == "" {
			t.Error("the first ack does not say the epoch")
		}
		p.token(2, "s", "two")
		if a := p.wantAck(2, 2, 2); a.GetEpoch() != "" {
			t.Error("the epoch is said again")
		}
		p.publish(&schema.Publish{PublishId: 3, Session: "s", Envelopes: []*schema.Envelope{tokenOf("three"), tokenOf("four")}})
		p.wantAck(3, 3, 4)
		p.token(4, "t", "one")
		p.wantAck(4, 1, 1)

		// By channel, before the answer to the attach was even read.
		p.attach(&schema.Attach{Channel: 9, Session: "s", Start: &schema.Attach_AfterSeq{AfterSeq: 4}})
		p.publish(&schema.Publish{PublishId: 5, Channel: 9, Envelopes: []*schema.Envelope{tokenOf("five")}})
		for range 4 {
			// Where the ack stands among the frames of the attachment is open.
			switch f := p.next().GetFrame().(type) {
			case *schema.ServerFrame_Published:
				if a := f.Published.GetAcks()[0]; a.GetPublishId() != 5 || a.GetFirstSeq() != 5 {
					t.Errorf("got %v", a)
				}
			case *schema.ServerFrame_Events:
				if e := f.Events.GetEnvelopes()[0]; e.GetSeq() != 5 || e.GetSource().GetSubject() != "somebody" || e.GetSource().GetRole() != schema.Role_ROLE_AGENT {
					t.Errorf("got %v", e)
				}
			case *schema.ServerFrame_CaughtUp, *schema.ServerFrame_Attached:
			default:
				t.Errorf("got %v", f)
			}
		}
		p.leave()
	})
}

// TestI3_Retry: the same id, sent again, on another connection, is answered with the place of the first.
func TestI3_Retry(t *testing.T) {
	bubble(t, nil, func(w *world) {
		e := tokenOf("once")
		e.Id = "01ARZ3NDEKTSV4RRFFQ69G5FAV"
		p := w.agent()
		p.publish(&schema.Publish{PublishId: 1, Session: "s", Envelopes: []*schema.Envelope{e}})
		if a := p.wantAck(1, 1, 1); a.GetDuplicate() {
			t.Error("the first try is a duplicate")
		}
		p.leave()
		p = w.agent()
		p.publish(&schema.Publish{PublishId: 1, Session: "s", Envelopes: []*schema.Envelope{e}})
		if a := p.wantAck(1, 1, 1); !a.GetDuplicate() {
			t.Error("the second try is none")
		}
		p.leave()
	})
}

// TestRejected: what is wrong with a publish is answered, and the connection goes on.
func TestRejected(t *testing.T) {
	produced := func(epoch, seq uint64) *schema.Envelope {
		e := tokenOf("x")
		e.Producer = &schema.Producer{Id: "p", Epoch: epoch, Seq: seq}
		return e
	}
	large := tokenOf(strings.Repeat("x", schema.MaxEnvelopeBytes))
	for _, c := range []struct {
		name string
		m    *schema.Publish
		code schema.Code
		says string
		also func(*testing.T, *schema.Rejected)
	}{
		{"no session", &schema.Publish{Envelopes: []*schema.Envelope{tokenOf("x")}}, schema.Code_CODE_INVALID_MESSAGE, "name is empty", nil},
		{"session and channel", &schema.Publish{Session: "s", Channel: 1, Envelopes: []*schema.Envelope{tokenOf("x")}}, schema.Code_CODE_INVALID_MESSAGE, "name one of them", nil},
		{"unknown channel", &schema.Publish{Channel: 7, Envelopes: []*schema.Envelope{tokenOf("x")}}, schema.Code_CODE_INVALID_MESSAGE, "Channel 7 is no open attachment", nil},
		{"long name", &schema.Publish{Session: strings.Repeat("n", 201), Envelopes: []*schema.Envelope{tokenOf("x")}}, schema.Code_CODE_INVALID_MESSAGE, "201 bytes", nil},
		{"no envelope", &schema.Publish{Session: "s"}, schema.Code_CODE_INVALID_MESSAGE, "this one holds 0", nil},
		{"too many", &schema.Publish{Session: "s", Envelopes: make([]*schema.Envelope, 1001)}, schema.Code_CODE_INVALID_MESSAGE, "this one holds 1001", nil},
		{"no payload", &schema.Publish{Session: "s", Envelopes: []*schema.Envelope{{}}}, schema.Code_CODE_UNKNOWN_TYPE, "no payload", nil},
		{"second envelope bad", &schema.Publish{Session: "s", Envelopes: []*schema.Envelope{tokenOf("x"), {Id: "?"}}}, schema.Code_CODE_INVALID_MESSAGE, "not a ULID", nil},
		{"too large", &schema.Publish{Session: "s", Envelopes: []*schema.Envelope{large}}, schema.Code_CODE_TOO_LARGE, "at most 1048576", nil},
		{"conflict", &schema.Publish{Session: "s", ExpectedSeq: new(uint64(7)), Envelopes: []*schema.Envelope{tokenOf("x")}}, schema.Code_CODE_CONFLICT, "seq 2", func(t *testing.T, r *schema.Rejected) {
			if r.GetHeadSeq() != 2 || r.Expected != nil {
				t.Errorf("got %v", r)
			}
		}},
		{"expected none", &schema.Publish{Session: "s", ExpectedSeq: new(uint64(0)), Envelopes: []*schema.Envelope{tokenOf("x")}}, schema.Code_CODE_CONFLICT, "seq 2", nil},
		{"gap", &schema.Publish{Session: "s", Envelopes: []*schema.Envelope{produced(3, 9)}}, schema.Code_CODE_PRODUCER_GAP, "", func(t *testing.T, r *schema.Rejected) {
			if r.GetExpected() != 2 || r.HeadSeq != nil {
				t.Errorf("got %v", r)
			}
		}},
		{"fenced", &schema.Publish{Session: "s", Envelopes: []*schema.Envelope{produced(2, 1)}}, schema.Code_CODE_PRODUCER_FENCED, "", func(t *testing.T, r *schema.Rejected) {
			if r.GetExpected() != 3 {
				t.Errorf("got %v", r)
			}
		}},
		{"forbidden", &schema.Publish{Session: "other", Envelopes: []*schema.Envelope{tokenOf("x")}}, schema.Code_CODE_FORBIDDEN, "no access", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			bubble(t, nil, func(w *world) {
				w.fill("s", "one")
				p := w.connect(principal("agent", "s", strings.Repeat("n", 200)))
				p.publish(&schema.Publish{PublishId: 1, Session: "s", Envelopes: []*schema.Envelope{produced(3, 1)}})
				p.wantAck(1, 2, 2)
				for i, e := range c.m.Envelopes {
					if e == nil {
						c.m.Envelopes[i] = new(schema.Envelope)
					}
				}
				c.m.PublishId = 2
				p.publish(c.m)
				r := p.wantRejected(2, c.code, c.says)
				if c.also != nil {
					c.also(t, r)
				}
				p.token(3, "s", "goes on")
				p.wantAck(3, 3, 3)
				p.leave()
			})
		})
	}
}

// TestPublishInUnusualEncoding: what is not encoded as every client does it means the same.
func TestPublishInUnusualEncoding(t *testing.T) {
	encode := func(m proto.Message) []byte {
		b, err := proto.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	publish := &schema.Publish{PublishId: 7, Session: "s", Envelopes: []*schema.Envelope{tokenOf("x")}}
	frame := encode(&schema.ClientFrame{Frame: &schema.ClientFrame_Publish{Publish: publish}})
	for name, msg := range map[string][]byte{
		"plain":                  frame,
		"unknown field behind":   append(bytes.Clone(frame), 0xa2, 0x06, 0x00),
		"in two parts":           append(encode(&schema.ClientFrame{Frame: &schema.ClientFrame_Publish{Publish: &schema.Publish{PublishId: 7, Session: "s"}}}), encode(&schema.ClientFrame{Frame: &schema.ClientFrame_Publish{Publish: &schema.Publish{Envelopes: publish.Envelopes}}})...),
		"unknown field in it":    encode(&schema.ClientFrame{Frame: &schema.ClientFrame_Publish{Publish: withUnknown(publish)}}),
		"session twice":          frameOf(append([]byte{0x12, 0x01, 'z'}, encode(publish)...)),
		"known number of a type": frameOf(append([]byte{0x0a, 0x01, 'z'}, encode(publish)...)),
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, nil, func(w *world) {
				p := w.agent()
				p.sendRaw(msg)
				p.wantAck(7, 1, 1)
				if s, err := w.log.Session(w.Context(), schema.SessionID{Tenant: "default", Name: "s"}); err != nil || s.GetHeadSeq() != 1 {
					t.Errorf("the session is %v, %v", s, err)
				}
				p.leave()
			})
		})
	}
}

func withUnknown(m *schema.Publish) *schema.Publish {
	m = proto.CloneOf(m)
	m.ProtoReflect().SetUnknown([]byte{0xa2, 0x06, 0x01, 'x'})
	return m
}

func frameOf(publish []byte) []byte {
	return append([]byte{0x0a, byte(len(publish))}, publish...)
}

// TestI8_InFlight: a peer may have so many publishes unanswered; then nothing more is read from it.
func TestI8_InFlight(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(*Config)
		most   int
	}{
		{"count", func(c *Config) { c.MaxInFlight = 10 }, 10},
		{"bytes", func(c *Config) { c.MaxInFlightBytes = 990 }, 30},
	} {
		t.Run(c.name, func(t *testing.T) {
			bubble(t, c.change, func(w *world) {
				held := make(chan struct{})
				w.g.cfg.Log = &heldLog{Log: w.log, held: held}
				p := w.agent()
				frame, _ := proto.Marshal(&schema.ClientFrame{Frame: &schema.ClientFrame_Publish{
					Publish: &schema.Publish{PublishId: 1, Session: "s", Envelopes: []*schema.Envelope{tokenOf(strings.Repeat("x", 20))}},
				}})
				sent := 0
				for {
					synctest.Wait()
					select {
					case p.in <- frame:
						sent++
						continue
					default:
					}
					break
				}
				// One more is read before it is known that there is no room for it.
				if sent < c.most || sent > c.most+1 {
					t.Errorf("%d publishes were read, want %d", sent, c.most)
				}
				close(held)
				for acks := 0; acks < sent; {
					acks += len(want[*schema.ServerFrame_Published](p).Published.GetAcks())
				}
				p.token(2, "s", "goes on")
				p.wantAck(2, uint64(sent)+1, uint64(sent)+1)
				p.leave()
			})
		})
	}
}

// TestAcksAreCoalesced: answers that are there together make one frame.
func TestAcksAreCoalesced(t *testing.T) {
	bubble(t, nil, func(w *world) {
		held := make(chan struct{})
		w.g.cfg.Log = &heldLog{Log: w.log, held: held}
		p := w.agent()
		for i := range 100 {
			p.token(uint64(i)+1, fmt.Sprint("s", i%3), "x")
		}
		close(held)
		synctest.Wait()
		frames, seen := 0, map[uint64]bool{}
		epochs := 0
		for len(seen) < 100 {
			frames++
			for _, a := range want[*schema.ServerFrame_Published](p).Published.GetAcks() {
				seen[a.GetPublishId()] = true
				if a.GetEpoch() != "" {
					epochs++
				}
			}
		}
		if frames > 2 || epochs != 3 {
			t.Errorf("100 acks came in %d frames, with %d epochs; want at most 2, and 3", frames, epochs)
		}
		p.leave()
	})
}

// TestPublishGivenUp: a publish that waits for room when the connection ends is given up, and Serve returns.
func TestPublishGivenUp(t *testing.T) {
	bubble(t, nil, func(w *world) {
		w.g.cfg.Log = fullLog{w.log}
		p := w.agent()
		p.token(1, "s", "x")
		synctest.Wait()
		p.cancel()
		synctest.Wait()
		if err := p.wantClosed(schema.Code_CODE_GOING_AWAY, ""); err == nil {
			t.Error("Serve returned nil")
		}
		if r := asAnswer(context.Canceled); r.Code != schema.Code_CODE_UNAVAILABLE {
			t.Errorf("it would be answered with %v", r)
		}
	})
}

// fullLog never has room.
type fullLog struct{ broker.Log }

func (fullLog) Publish(ctx context.Context, _ schema.SessionID, s *broker.Submission) {
	<-ctx.Done()
	s.Done(broker.Receipt{}, ctx.Err())
}

// awayLog is a log whose NATS is away: publishes are held for a while and refused, reads fail.
type awayLog struct {
	broker.Log
	heldFor time.Duration
}

func (l awayLog) Publish(ctx context.Context, id schema.SessionID, s *broker.Submission) {
	time.AfterFunc(l.heldFor, func() {
		s.Done(broker.Receipt{}, schema.Refuse(schema.Code_CODE_UNAVAILABLE, "NATS is away; session %s took nothing.", id))
	})
}

func (l awayLog) Status() broker.Status { return broker.Status{Reason: "NATS is not reachable."} }

// TestLogAway: publishes are refused with a code that says that the same may be tried again; followers stay connected and go on.
func TestLogAway(t *testing.T) {
	bubble(t, nil, func(w *world) {
		w.fill("s", "one")
		p := w.agent()
		p.attach(&schema.Attach{Channel: 1, Session: "s"})
		p.wantAttached(1, 1)
		p.wantTexts(1, 1, "one")
		p.wantCaughtUp(1, 1)

		w.g.cfg.Log = awayLog{w.log, 10 * time.Second}
		if err := w.g.Ready(); schema.CodeOf(err) != schema.Code_CODE_UNAVAILABLE {
			t.Errorf("the gateway is ready: %v", err)
		}
		began := time.Now()
		p.token(1, "s", "lost?")
		p.wantRejected(1, schema.Code_CODE_UNAVAILABLE, "NATS is away")
		if took := time.Since(began); took != 10*time.Second {
			t.Errorf("it took %s", took)
		}
		w.g.cfg.Log = w.log
		p.token(2, "s", "two")
		var acked, seen bool
		for !acked || !seen {
			switch f := p.next().GetFrame().(type) {
			case *schema.ServerFrame_Published:
				acked = f.Published.GetAcks()[0].GetFirstSeq() == 2
			case *schema.ServerFrame_Events:
				seen = f.Events.GetEnvelopes()[0].GetSeq() == 2
			}
		}
		p.leave()
	})
}
