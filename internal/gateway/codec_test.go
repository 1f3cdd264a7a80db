package gateway

import (
	"encoding/json"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"tidemark/broker"
	"tidemark/schema"
)

// TestWireFieldNumbers compares the numbers that the hot paths write with the definitions.
func TestWireFieldNumbers(t *testing.T) {
	for _, c := range []struct {
		m    proto.Message
		name protoreflect.Name
		num  protowire.Number
	}{
		{&schema.ClientFrame{}, "publish", clientPublish},
		{&schema.Publish{}, "publish_id", publishID},
		{&schema.Publish{}, "session", publishSession},
		{&schema.Publish{}, "channel", publishChannel},
		{&schema.Publish{}, "expected_seq", publishExpected},
		{&schema.Publish{}, "envelopes", publishEnvelopes},
		{&schema.ServerFrame{}, "events", serverEvents},
		{&schema.ServerFrame{}, "published", serverPublished},
		{&schema.Events{}, "channel", eventsChannel},
		{&schema.Events{}, "through_seq", eventsThrough},
		{&schema.Events{}, "epoch", eventsEpoch},
		{&schema.Events{}, "envelopes", eventsEnvelopes},
		{&schema.Published{}, "durability", publishedDurability},
		{&schema.Published{}, "acks", publishedAcks},
		{&schema.Ack{}, "publish_id", ackID},
		{&schema.Ack{}, "first_seq", ackFirst},
		{&schema.Ack{}, "last_seq", ackLast},
		{&schema.Ack{}, "duplicate", ackDuplicate},
		{&schema.Ack{}, "epoch", ackEpoch},
		{&schema.Ack{}, "replaced", ackReplaced},
		{&schema.ServerFrame{}, "work", serverWork},
		{&schema.Work{}, "channel", workChannel},
		{&schema.Work{}, "items", workItems},
		{&schema.WorkDelivery{}, "work_id", deliveryID},
		{&schema.WorkDelivery{}, "session", deliverySession},
		{&schema.WorkDelivery{}, "epoch", deliveryEpoch},
		{&schema.WorkDelivery{}, "attempt", deliveryAttempt},
		{&schema.WorkDelivery{}, "deadline", deliveryDeadline},
		{&schema.WorkDelivery{}, "envelope", deliveryEnvelope},
		{&schema.WorkDelivery{}, "cancelled", deliveryCancelled},
		{&timestamppb.Timestamp{}, "seconds", timeSeconds},
		{&timestamppb.Timestamp{}, "nanos", timeNanos},
	} {
		d := c.m.ProtoReflect().Descriptor()
		if f := d.Fields().ByName(c.name); f == nil || f.Number() != c.num {
			t.Errorf("%s.%s is not field %d: %v", d.Name(), c.name, c.num, f)
		}
	}
	// All that Publish has is read by the hot path.
	if n := (&schema.Publish{}).ProtoReflect().Descriptor().Fields().Len(); n != 5 {
		t.Errorf("Publish has %d fields; publishRequest.parse knows 5", n)
	}
}

// TestFramesWrittenByHand compares what the hot paths write with what protobuf makes of the same, in both forms.
func TestFramesWrittenByHand(t *testing.T) {
	bubble(t, nil, func(w *world) {
		var b broker.Batch
		var envelopes []*schema.Envelope
		w.fill("s", texts(300)...)
		f, err := w.log.Follow(w.Context(), schema.SessionID{Tenant: "default", Name: "s"}, broker.FollowOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if b, err = f.Take(1 << 20); err != nil {
			t.Fatal(err)
		}
		for _, v := range b.Views {
			for _, raw := range v.Each() {
				envelopes = append(envelopes, decoded(raw))
			}
		}
		acks := func() []*pending {
			a, z := &target{}, &target{epoch: "E2"}
			return []*pending{
				{id: 1, target: a, receipt: broker.Receipt{Epoch: "E1", First: 1, Last: 1}},
				{id: 1 << 40, target: a, receipt: broker.Receipt{Epoch: "E1", First: 1 << 33, Last: 1<<33 + 7, Duplicate: true}},
				{id: 0, target: z, receipt: broker.Receipt{Epoch: "E2", First: 300, Last: 300, Replaced: true}},
				{id: 3, target: z, receipt: broker.Receipt{Epoch: "E3", First: 1, Last: 1}},
			}
		}
		published := &schema.ServerFrame{Frame: &schema.ServerFrame_Published{Published: &schema.Published{
			Durability: schema.Durability_DURABILITY_MEMORY, Acks: []*schema.Ack{
				{PublishId: 1, FirstSeq: 1, LastSeq: 1, Epoch: "E1"},
				{PublishId: 1 << 40, FirstSeq: 1 << 33, LastSeq: 1<<33 + 7, Duplicate: true},
				{FirstSeq: 300, LastSeq: 300, Replaced: true},
				{PublishId: 3, FirstSeq: 1, LastSeq: 1, Epoch: "E3"},
			},
		}}}
		events := func(channel uint32, epoch string) *schema.ServerFrame {
			return &schema.ServerFrame{Frame: &schema.ServerFrame_Events{Events: &schema.Events{Channel: channel, ThroughSeq: b.Through, Epoch: epoch, Envelopes: envelopes}}}
		}
		for _, c := range []struct {
			codec codec
			parse func([]byte, proto.Message) error
		}{
			{protoCodec{}, proto.Unmarshal},
			{protoJSONCodec{}, protojson.Unmarshal},
		} {
			check := func(what string, wanted *schema.ServerFrame, write func(*writer)) {
				wr := &writer{c: &conn{g: w.g, codec: c.codec}, out: new(outgoing)}
				write(wr)
				messages := wr.out.all()
				if len(messages) != 1 {
					t.Fatalf("%T: %s made %d messages", c.codec, what, len(messages))
				}
				got := new(schema.ServerFrame)
				if err := c.parse(messages[0], got); err != nil || !proto.Equal(got, wanted) {
					t.Errorf("%T: %s is %v, %v, want %v", c.codec, what, got, err, wanted)
				}
			}
			check("published", published, func(wr *writer) { c.codec.published(wr, acks()) })
			check("events", events(7, ""), func(wr *writer) { c.codec.events(wr, &attachment{channel: 7}, &b) })
			check("events of a new session", events(0, b.Epoch), func(wr *writer) { c.codec.events(wr, &attachment{tellEpoch: true}, &b) })
			none := &schema.ServerFrame{Frame: &schema.ServerFrame_Events{Events: &schema.Events{Channel: 1, ThroughSeq: 9}}}
			check("no events", none, func(wr *writer) { c.codec.events(wr, &attachment{channel: 1}, &broker.Batch{Through: 9}) })
		}
	})
}

// TestProtoJSON: the same connection in protobuf's JSON form.
func TestProtoJSON(t *testing.T) {
	bubble(t, nil, func(w *world) {
		p := w.dial(Peer{Protocol: ProtoJSON})
		next := func() *schema.ServerFrame {
			f := new(schema.ServerFrame)
			if err := protojson.Unmarshal(p.nextRaw(), f); err != nil {
				t.Fatal(err)
			}
			return f
		}
		p.sendRaw([]byte(`{"hello":{"token":"agent:s"}}`))
		if f := next(); f.GetWelcome().GetTenant() != "default" {
			t.Errorf("got %v", f)
		}
		p.sendRaw([]byte(`{"attach":{"channel":1,"session":"s"}}`))
		if f := next(); f.GetAttached().GetChannel() != 1 {
			t.Errorf("got %v", f)
		}
		if f := next(); f.GetCaughtUp() == nil {
			t.Errorf("got %v", f)
		}
		for _, msg := range []string{
			`{"publish":{"publishId":"1","session":"s","envelopes":[{"token":{"messageId":"m","text":"hi"}}]}}`,
			`{"publish":{"publishId":"2","channel":1,"envelopes":[{"token":{"messageId":"m","text":"you"}},{"userMessage":{"message":"ho"}}]}}`,
		} {
			p.sendRaw([]byte(msg))
			var ack *schema.Ack
			for range 2 {
				f := next()
				if f.GetPublished() != nil {
					ack = f.GetPublished().GetAcks()[0]
				} else if len(f.GetEvents().GetEnvelopes()) == 0 {
					t.Errorf("got %v", f)
				}
			}
			if ack.GetPublishId() == 2 && (ack.GetFirstSeq() != 2 || ack.GetLastSeq() != 3) {
				t.Errorf("got %v", ack)
			}
		}
		p.sendRaw([]byte(`{"publish":{"publishId":"3","session":"s","envelopes":[{"token":{"text":"no message"}}]}}`))
		if r := next().GetRejected(); r.GetPublishId() != 3 || r.GetCode() != schema.Code_CODE_INVALID_MESSAGE || !strings.Contains(r.GetMessage(), "message_id") {
			t.Errorf("got %v", r)
		}
		p.sendRaw([]byte(`{"publish":{"publishId":"4","session":"s"}}`))
		if r := next().GetRejected(); r.GetPublishId() != 4 || r.GetCode() != schema.Code_CODE_INVALID_MESSAGE {
			t.Errorf("got %v", r)
		}
		p.sendRaw([]byte(`{"publish":{"publishId":"5","session":"t","envelopes":[{"token":{"messageId":"m"}}]}}`))
		if r := next().GetRejected(); r.GetPublishId() != 5 || r.GetCode() != schema.Code_CODE_FORBIDDEN {
			t.Errorf("got %v", r)
		}
		p.sendRaw([]byte(`{"attach":{"channel":2,"session":"s","nonsense":1}}`))
		if e := next().GetError(); e.GetCode() != schema.Code_CODE_INVALID_MESSAGE || e.GetChannel() != 0 || !strings.HasSuffix(e.GetMessage(), `JSON form: unknown field "nonsense", at line 1, column 38.`) {
			t.Errorf("got %v", e)
		}
		p.wantClosed(schema.Code_CODE_INVALID_MESSAGE, "nonsense")
	})
}

// session opens a session socket.
func (w *world) session(name string, a *schema.Attach) *peer {
	a.Session = name
	return w.dial(Peer{Protocol: SessionJSON, Principal: principal("agent", "*"), Session: name, Follow: a})
}

// wantJSON takes the next message and compares it with a pattern: an object of which every key must be there and equal, "*" is anything, and a key that begins with "-" must not be there.
func (p *peer) wantJSON(pattern string) map[string]any {
	p.Helper()
	msg := p.nextRaw()
	var got, wanted map[string]any
	if err := json.Unmarshal(msg, &got); err != nil {
		p.Fatalf("%s: %v", msg, err)
	}
	if err := json.Unmarshal([]byte(pattern), &wanted); err != nil {
		p.Fatalf("%s: %v", pattern, err)
	}
	if bad := mismatch("", got, wanted); bad != "" {
		p.Fatalf("got %s: %s, want %s", msg, bad, pattern)
	}
	return got
}

func mismatch(at string, got, wanted map[string]any) string {
	for k, v := range wanted {
		g, ok := got[strings.TrimPrefix(k, "-")]
		switch inner, object := v.(map[string]any); {
		case strings.HasPrefix(k, "-"):
			if ok {
				return at + k + " is there"
			}
		case !ok:
			return at + k + " is missing"
		case v == "*":
		case object:
			gi, ok := g.(map[string]any)
			if !ok {
				return at + k + " is no object"
			}
			if bad := mismatch(at+k+".", gi, inner); bad != "" {
				return bad
			}
		case !reflect.DeepEqual(g, v):
			return fmt.Sprintf("%s%s is %v", at, k, g)
		}
	}
	return ""
}

func TestSessionSocket(t *testing.T) {
	bubble(t, nil, func(w *world) {
		p := w.session("s", &schema.Attach{})
		p.wantJSON(`{"type":"attached","timestamp":"2000-01-01T00:00:00Z","-seq":0,"-id":0,"data":{"epoch":"","first_seq":0,"head_seq":0,"after_seq":0,"status":"open"}}`)
		p.wantNothing()
		p.sendRaw([]byte(`{"type":"user_message","data":{"message":"hi"}}`))
		// The answer may come before, between or behind the two that the first envelope of a session makes.
		var published, again, event map[string]any
		for range 3 {
			var m map[string]any
			if err := json.Unmarshal(p.nextRaw(), &m); err != nil {
				t.Fatal(err)
			}
			switch {
			case m["type"] == "published":
				published = m
			case m["type"] == "attached" && event == nil:
				again = m
			default:
				event = m
			}
		}
		if bad := mismatch("", again, map[string]any{"-seq": 0, "-id": 0, "data": map[string]any{
			"epoch": published["data"].(map[string]any)["epoch"], "first_seq": 1.0, "head_seq": 1.0, "after_seq": 0.0, "status": "open",
		}}); bad != "" {
			t.Errorf("attached again %v: %s", again, bad)
		}
		if bad := mismatch("", published, map[string]any{"-seq": 0, "-id": 0, "data": map[string]any{"id": "*", "seq": 1.0, "durability": "memory", "epoch": "*", "-duplicate": 0}}); bad != "" {
			t.Errorf("published %v: %s", published, bad)
		}
		data := published["data"].(map[string]any)
		if bad := mismatch("", event, map[string]any{
			"type": "user_message", "timestamp": "2000-01-01T00:00:00Z", "seq": 1.0, "id": data["id"], "data": map[string]any{"message": "hi"},
			"source": map[string]any{"subject": "somebody", "role": "agent"},
		}); bad != "" {
			t.Errorf("event %v: %s", event, bad)
		}
		// A retry with the same id.
		p.sendRaw([]byte(`{"type":"user_message","id":"` + data["id"].(string) + `","data":{"message":"hi"}}`))
		p.wantJSON(`{"type":"published","data":{"seq":1,"duplicate":true,"-epoch":0}}`)
		// Another follower, from the beginning, after 1, and at the head.
		w.fill("s", "two")
		p.wantJSON(`{"type":"token","seq":2,"data":{"message_id":"m1","text":"two"}}`)
		for after := range uint64(3) {
			f := w.session("s", &schema.Attach{Start: &schema.Attach_AfterSeq{AfterSeq: after}})
			f.wantJSON(fmt.Sprintf(`{"type":"attached","data":{"epoch":"*","first_seq":1,"head_seq":2,"after_seq":%d,"status":"open"}}`, after))
			for seq := after + 1; seq <= 2; seq++ {
				f.wantJSON(fmt.Sprintf(`{"seq":%d}`, seq))
			}
			f.wantNothing()
			f.leave()
		}
		p.leave()
	})
}

func TestSessionSocketBadMessage(t *testing.T) {
	for _, c := range []struct{ msg, code, details string }{
		{`hello`, "invalid_message", "JSON"},
		{`[]`, "invalid_message", "not a JSON object"},
		{`{"type":"user_input","data":{}}`, "invalid_message", "'response'"},
		{`{"type":"nonsense","data":{}}`, "unknown_type", "nonsense"},
		{`{"data":{}}`, "invalid_message", "'type'"},
		{`{"type":"system","data":{"message":"x","more":1}}`, "invalid_message", "more"},
		{`{"type":"token","data":{"message_id":"m"},"id":"short"}`, "invalid_message", "ULID"},
		{"{\"type\":\"system\",\"data\":{\"message\":\"\xff\"}}", "invalid_message", "UTF-8"},
	} {
		t.Run(c.msg, func(t *testing.T) {
			bubble(t, nil, func(w *world) {
				held := make(chan struct{})
				p := w.session("s", &schema.Attach{Start: &schema.Attach_Head{Head: true}})
				p.wantJSON(`{"type":"attached"}`)
				w.g.cfg.Log = &heldLog{Log: w.log, held: held}
				p.sendRaw([]byte(`{"type":"system","data":{"message":"before"}}`))
				p.sendRaw([]byte(c.msg))
				synctest.Wait()
				close(held)
				p.wantJSON(`{"type":"published","data":{"seq":1}}`)
				m := p.wantJSON(fmt.Sprintf(`{"type":"error","timestamp":"2000-01-01T00:00:00Z","-seq":0,"data":{"error":"Invalid message format","details":"*","code":%q}}`, c.code))
				if details := m["data"].(map[string]any)["details"].(string); !strings.Contains(details, c.details) {
					t.Errorf("the details are %q, want %q in them", details, c.details)
				}
				code := schema.Code(schema.Code_value["CODE_"+strings.ToUpper(c.code)])
				if p.wantClosed(code, c.details); code.Rule().Close != 1008 {
					t.Errorf("closed with %d", code.Rule().Close)
				}
			})
		})
	}
}

// TestSessionSocketRejected: what the log refuses is answered, and the socket goes on.
func TestSessionSocketRejected(t *testing.T) {
	bubble(t, nil, func(w *world) {
		p := w.session("s", &schema.Attach{Start: &schema.Attach_Head{Head: true}})
		p.wantJSON(`{"type":"attached"}`)
		p.sendRaw([]byte(`{"type":"system","id":"01ARZ3NDEKTSV4RRFFQ69G5FAV","producer":{"id":"p","epoch":1,"seq":5},"data":{"message":"x"}}`))
		p.wantJSON(`{"type":"error","-seq":0,"data":{"code":"producer_gap","error":"Producer gap","details":"*","id":"01ARZ3NDEKTSV4RRFFQ69G5FAV","expected":1,"-retryable":0}}`)
		w.g.cfg.Log = awayLog{w.log, time.Second}
		p.sendRaw([]byte(`{"type":"system","data":{"message":"x"}}`))
		p.wantJSON(`{"type":"error","data":{"code":"unavailable","details":"*","id":"*","retryable":true}}`)
		w.g.cfg.Log = w.log
		w.fill("s", "goes on")
		p.wantJSON(`{"type":"attached","data":{"epoch":"*","first_seq":1,"head_seq":1}}`)
		p.wantJSON(`{"type":"token","seq":1}`)
		p.leave()
	})
	bubble(t, nil, func(w *world) {
		p := w.dial(Peer{Protocol: SessionJSON, Principal: principal("analyst", "*"), Session: "s", Follow: &schema.Attach{Session: "s"}})
		p.wantJSON(`{"type":"attached"}`)
		p.sendRaw([]byte(`{"type":"system","data":{"message":"x"}}`))
		p.wantJSON(`{"type":"error","data":{"code":"forbidden","details":"*"}}`)
		p.wantClosed(schema.Code_CODE_FORBIDDEN, "publish")
	})
}

func TestSessionSocketEnds(t *testing.T) {
	bubble(t, nil, func(w *world) {
		w.fill("s", texts(9)...)
		id := schema.SessionID{Tenant: "default", Name: "s"}
		w.log.Truncate(id, 4)
		p := w.session("s", &schema.Attach{Start: &schema.Attach_AfterSeq{AfterSeq: 1}})
		p.wantJSON(`{"type":"attached","data":{"first_seq":4,"after_seq":1}}`)
		p.wantJSON(`{"type":"truncated","-seq":0,"data":{"wanted_seq":2,"first_seq":4}}`)
		for seq := 4; seq <= 9; seq++ {
			p.wantJSON(fmt.Sprintf(`{"seq":%d}`, seq))
		}
		if err := w.log.Delete(w.Context(), id); err != nil {
			t.Fatal(err)
		}
		p.wantJSON(`{"type":"error","data":{"code":"session_deleted","details":"*"}}`)
		p.wantClosed(schema.Code_CODE_SESSION_DELETED, "deleted")

		p = w.session("s", &schema.Attach{Start: &schema.Attach_AfterSeq{AfterSeq: 5}})
		p.wantJSON(`{"type":"error","data":{"code":"seq_beyond_head","head_seq":0}}`)
		p.wantClosed(schema.Code_CODE_SEQ_BEYOND_HEAD, "")

		w.fill("s", "new")
		p = w.session("s", &schema.Attach{Epoch: "another"})
		p.wantJSON(`{"type":"error","data":{"code":"epoch_mismatch"}}`)
		p.wantClosed(schema.Code_CODE_EPOCH_MISMATCH, "")

		p = w.session("s", &schema.Attach{})
		p.wantJSON(`{"type":"attached"}`)
		p.wantJSON(`{"seq":1}`)
		done := w.drain(w.Context())
		p.wantJSON(`{"type":"going_away","-seq":0,"data":{"reason":"*","grace_ms":1000,"last_seq":1}}`)
		p.wantClosed(schema.Code_CODE_GOING_AWAY, "")
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// TestSingleFollower is what a streaming call makes of a connection: one attachment without a channel, whose end is the connection's.
func TestSingleFollower(t *testing.T) {
	bubble(t, nil, func(w *world) {
		follow := func(a *schema.Attach) *peer {
			return w.dial(Peer{Protocol: Proto, Principal: principal("user", "s"), Follow: a})
		}
		w.fill("s", "one")
		p := follow(&schema.Attach{Session: "s"})
		p.wantAttached(0, 1)
		p.wantTexts(0, 1, "one")
		p.wantCaughtUp(0, 1)
		if err := w.log.Delete(w.Context(), schema.SessionID{Tenant: "default", Name: "s"}); err != nil {
			t.Fatal(err)
		}
		p.wantFailed(schema.Code_CODE_SESSION_DELETED, "deleted")
		p = follow(&schema.Attach{Session: "s", MustExist: true})
		p.wantFailed(schema.Code_CODE_SESSION_NOT_FOUND, "")
		p = follow(&schema.Attach{Session: "other"})
		p.wantFailed(schema.Code_CODE_FORBIDDEN, "")
		p = follow(&schema.Attach{Session: "s", Types: []string{"nonsense"}})
		p.wantFailed(schema.Code_CODE_UNKNOWN_TYPE, "")
	})
}

// TestPublishStream is the other streaming call: publishes in, answers out.
func TestPublishStream(t *testing.T) {
	bubble(t, nil, func(w *world) {
		p := w.dial(Peer{Protocol: ProtoPublish, Principal: principal("agent", "*"), Session: "s"})
		p.send(&schema.Publish{PublishId: 1, Envelopes: []*schema.Envelope{tokenOf("one")}})
		p.wantAck(1, 1, 1)
		p.send(&schema.Publish{PublishId: 2, Session: "t", Envelopes: []*schema.Envelope{tokenOf("one")}})
		p.wantAck(2, 1, 1)
		p.send(&schema.Publish{PublishId: 3})
		p.wantRejected(3, schema.Code_CODE_INVALID_MESSAGE, "holds 0")
		p.send(&schema.Publish{PublishId: 4, Channel: 3, Envelopes: []*schema.Envelope{tokenOf("one")}})
		p.wantRejected(4, schema.Code_CODE_INVALID_MESSAGE, "Channel 3")
		close(p.eof)
		if err := p.wantClosed(schema.Code_CODE_UNSPECIFIED, ""); err != nil {
			t.Error(err)
		}
		p = w.dial(Peer{Protocol: ProtoPublish, Principal: principal("agent", "*")})
		p.sendRaw([]byte("\xff"))
		p.wantFailed(schema.Code_CODE_INVALID_MESSAGE, "not a well-formed")
	})
}
