package gateway

import (
	"context"
	"sync/atomic"
	"testing"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"tidemark/broker"
	"tidemark/broker/worktest"
	"tidemark/schema"
)

// once is a transport whose peer sends one message and has no more to say.
type once struct {
	msg    []byte
	sent   bool
	closed atomic.Bool
}

func (o *once) Receive(context.Context) ([]byte, error) {
	if o.sent {
		return nil, ErrPeerClosed
	}
	o.sent = true
	return o.msg, nil
}

func (o *once) Send(context.Context, [][]byte) error { return nil }

func (o *once) Close(schema.Code, string) { o.closed.Store(true) }

// FuzzReceive: whatever comes in, in any protocol, the gateway answers or ends the connection with a code, and never panics.
func FuzzReceive(f *testing.F) {
	seed := func(m proto.Message) []byte {
		b, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		return b
	}
	publish := &schema.Publish{PublishId: 1, Session: "s", ExpectedSeq: new(uint64(0)), Envelopes: []*schema.Envelope{tokenOf("x")}}
	for _, m := range []*schema.ClientFrame{
		{Frame: &schema.ClientFrame_Publish{Publish: publish}},
		{Frame: &schema.ClientFrame_Publish{Publish: &schema.Publish{Channel: 1, Envelopes: []*schema.Envelope{tokenOf("x"), tokenOf("y")}}}},
		{Frame: &schema.ClientFrame_Hello{Hello: &schema.Hello{Token: "agent:*"}}},
		{Frame: &schema.ClientFrame_Attach{Attach: &schema.Attach{Channel: 1, Session: "s", Types: []string{"token"}, Start: &schema.Attach_Last{Last: 1}}}},
		{Frame: &schema.ClientFrame_Detach{Detach: &schema.Detach{Channel: 1}}},
		{Frame: &schema.ClientFrame_Ping{Ping: &schema.Ping{Data: []byte("x")}}},
		{Frame: &schema.ClientFrame_WorkSubscribe{WorkSubscribe: &schema.WorkSubscribe{Channel: 1, Group: "g", Kinds: []string{"tool_call"}, Sessions: []string{"s*"}, Credit: 7, AckWaitMs: 100, BackoffMs: []uint64{1}}}},
		{Frame: &schema.ClientFrame_WorkUnsubscribe{WorkUnsubscribe: &schema.WorkUnsubscribe{Channel: 1}}},
		{Frame: &schema.ClientFrame_Ack{Ack: &schema.WorkAck{WorkIds: []uint64{1, 2}}}},
		{Frame: &schema.ClientFrame_Nack{Nack: &schema.WorkNack{WorkId: 1, DelayMs: new(uint64(5)), Reason: "r"}}},
		{Frame: &schema.ClientFrame_InProgress{InProgress: &schema.WorkInProgress{WorkIds: []uint64{1}}}},
		{Frame: &schema.ClientFrame_Term{Term: &schema.WorkTerm{WorkId: 1, Reason: "r"}}},
		{Frame: &schema.ClientFrame_Heartbeat{Heartbeat: &schema.Heartbeat{Session: "s", RunId: "r"}}},
	} {
		f.Add(byte(Proto), seed(m))
		text, err := protojson.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(byte(ProtoJSON), text)
	}
	f.Add(byte(ProtoPublish), seed(publish))
	for _, msg := range []string{
		`{"type":"user_message","data":{"message":"hi"}}`, `{"type":"workflow_progress","data":{"step":"s","message":"m","progress":0.5}}`, `{"type":"user_input","data":{}}`,
		`{"type":"refresh","data":{"token":"agent:*"}}`, `{"type":"refresh","data":{"token":7}}`, `{"type":"refr\u0065sh","data":null}`,
		`{"type":"work_subscribe","data":{"channel":1,"group":"g","kinds":["tool_call"],"credit":2}}`, `{"type":"ack","data":{"work_ids":[1]}}`, `{"type":"nack","data":{"work_id":1,"delay_ms":5}}`,
		`{"type":"heartbeat","data":{}}`, `{"type":"term","data":null}`,
	} {
		f.Add(byte(SessionJSON), []byte(msg))
	}
	f.Fuzz(func(t *testing.T, protocol byte, msg []byte) {
		g, err := New(Config{Log: broker.NewMemoryLog(), Verify: verify, Work: new(worktest.Queue), Runs: new(worktest.Queue)})
		if err != nil {
			t.Fatal(err)
		}
		as := Peer{Protocol: Protocol((protocol-1)%4) + 1, Principal: principal("agent", "*"), Session: "s"}
		if as.Protocol == SessionJSON {
			as.Follow = &schema.Attach{Session: "s"}
		}
		tr := &once{msg: msg}
		as.Transport = tr
		err = g.Serve(context.Background(), as) //nolint:usetesting // a fuzz target's context ends too early
		if r := schema.AsRefusal(err); err != nil && (r.Code == schema.Code_CODE_INTERNAL || r.Code == schema.Code_CODE_UNSPECIFIED || r.Message == "") {
			t.Errorf("%s: it ended with %v", as.Protocol, err)
		}
		if !tr.closed.Load() {
			t.Error("it was not closed")
		}
	})
}

// FuzzParsePublish: the parser by hand and protobuf's own read the same, or both refuse.
func FuzzParsePublish(f *testing.F) {
	for _, m := range []*schema.Publish{
		{PublishId: 1, Session: "s", ExpectedSeq: new(uint64(0)), Envelopes: []*schema.Envelope{tokenOf("x"), tokenOf("y")}},
		{PublishId: 1 << 63, Channel: 1<<32 - 1},
		{},
	} {
		b, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var r publishRequest
		err := r.parse(b)
		m := new(schema.Publish)
		if other := proto.Unmarshal(b, m); other != nil {
			// What is wrong inside an envelope, or with the encoding of a name, is found later.
			return
		}
		if err != nil {
			t.Fatalf("protobuf reads %v, the parser says %v", m, err)
		}
		same := r.id == m.GetPublishId() && string(r.session) == m.GetSession() && r.channel == m.GetChannel() && len(r.envelopes) == len(m.GetEnvelopes()) &&
			(r.expected == nil) == (m.ExpectedSeq == nil) && (r.expected == nil || *r.expected == m.GetExpectedSeq())
		for i := 0; same && i < len(r.envelopes); i++ {
			e := new(schema.Envelope)
			same = proto.Unmarshal(r.envelopes[i], e) == nil && proto.Equal(e, m.GetEnvelopes()[i])
		}
		if !same {
			t.Fatalf("protobuf reads %v, the parser %+v", m, r)
		}
	})
}
