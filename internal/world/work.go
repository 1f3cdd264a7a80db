package world

import (
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"tidemark/schema"
)

// Subscribe makes the peer a worker of a group, on channel 1 unless another is named.
func (p *Peer) Subscribe(m *schema.WorkSubscribe) {
	p.w.t.Helper()
	m = clone(m)
	if m.GetChannel() == 0 {
		m.Channel = 1
	}
	p.Send(&schema.ClientFrame{Frame: &schema.ClientFrame_WorkSubscribe{WorkSubscribe: m}})
}

// Hire connects so that the peer is a worker of a group, as every way of [WorkWays] can. A session socket needs the session; the others leave it.
func (w *World) Hire(e *Edge, way Way, session string, m *schema.WorkSubscribe) *Peer {
	w.t.Helper()
	return w.HireAs(e, way, Dial{}, session, m)
}

// HireAs is [World.Hire] with another token, or over a link that the test wants to know.
func (w *World) HireAs(e *Edge, way Way, d Dial, session string, m *schema.WorkSubscribe) *Peer {
	w.t.Helper()
	var first *schema.Attach
	if way == SessionSocket {
		first = &schema.Attach{Channel: 99, Session: session, Start: &schema.Attach_Head{Head: true}}
	}
	p := w.DialAs(e, way, d, first)
	p.Subscribe(m)
	p.WantSubscribed()
	return p
}

// Unsubscribe ends a subscription; what is in hand goes back.
func (p *Peer) Unsubscribe(channel uint32) {
	p.w.t.Helper()
	p.Send(&schema.ClientFrame{Frame: &schema.ClientFrame_WorkUnsubscribe{WorkUnsubscribe: &schema.WorkUnsubscribe{Channel: channel}}})
}

// AckWork settles items.
func (p *Peer) AckWork(items ...*schema.WorkDelivery) {
	p.w.t.Helper()
	p.Send(&schema.ClientFrame{Frame: &schema.ClientFrame_Ack{Ack: &schema.WorkAck{WorkIds: idsOf(items)}}})
}

// NackWork gives an item back, as the group's backoff says.
func (p *Peer) NackWork(it *schema.WorkDelivery, reason string) {
	p.w.t.Helper()
	p.Send(&schema.ClientFrame{Frame: &schema.ClientFrame_Nack{Nack: &schema.WorkNack{WorkId: it.GetWorkId(), Reason: reason}}})
}

// NackWorkFor gives an item back, to rest for so long.
func (p *Peer) NackWorkFor(it *schema.WorkDelivery, rest time.Duration, reason string) {
	p.w.t.Helper()
	ms := uint64(rest.Milliseconds())
	p.Send(&schema.ClientFrame{Frame: &schema.ClientFrame_Nack{Nack: &schema.WorkNack{WorkId: it.GetWorkId(), DelayMs: &ms, Reason: reason}}})
}

// TermWork gives an item up.
func (p *Peer) TermWork(it *schema.WorkDelivery, reason string) {
	p.w.t.Helper()
	p.Send(&schema.ClientFrame{Frame: &schema.ClientFrame_Term{Term: &schema.WorkTerm{WorkId: it.GetWorkId(), Reason: reason}}})
}

// InProgress begins items' deadlines anew.
func (p *Peer) InProgress(items ...*schema.WorkDelivery) {
	p.w.t.Helper()
	p.Send(&schema.ClientFrame{Frame: &schema.ClientFrame_InProgress{InProgress: &schema.WorkInProgress{WorkIds: idsOf(items)}}})
}

// Heartbeat keeps a run, and wants that to be heard.
func (p *Peer) Heartbeat(session, run string) {
	p.w.t.Helper()
	p.Send(&schema.ClientFrame{Frame: &schema.ClientFrame_Heartbeat{Heartbeat: &schema.Heartbeat{Session: session, RunId: run}}})
	p.want("heard", func(f *schema.ServerFrame) bool { return f.GetHeard() != nil && f.GetHeard().GetRunId() == run })
}

func idsOf(items []*schema.WorkDelivery) []uint64 {
	ids := make([]uint64, len(items))
	for i, it := range items {
		ids[i] = it.GetWorkId()
	}
	return ids
}

// WantSubscribed wants the group's settings.
func (p *Peer) WantSubscribed() *schema.WorkGroup {
	p.w.t.Helper()
	return p.want("work_subscribed", func(f *schema.ServerFrame) bool { return f.GetWorkSubscribed() != nil }).GetWorkSubscribed().GetGroup()
}

// WantUnsubscribed wants the subscription to end as the peer asked.
func (p *Peer) WantUnsubscribed(channel uint32) {
	p.w.t.Helper()
	p.want(fmt.Sprintf("work_unsubscribed on channel %d", channel), func(f *schema.ServerFrame) bool {
		return f.GetWorkUnsubscribed() != nil && f.GetWorkUnsubscribed().GetChannel() == channel
	})
}

// WantWork wants n items, of whatever subscription, and returns them in the order they came; what came with them waits for another want.
func (p *Peer) WantWork(n int) []*schema.WorkDelivery {
	p.w.t.Helper()
	var got []*schema.WorkDelivery
	for len(got) < n {
		f := p.want(fmt.Sprintf("%d items of work; it has %d", n, len(got)), func(f *schema.ServerFrame) bool { return f.GetWork() != nil })
		items := f.GetWork().GetItems()
		take := min(len(items), n-len(got))
		got = append(got, items[:take]...)
		if take < len(items) {
			rest := clone(f)
			rest.GetWork().Items = rest.GetWork().Items[take:]
			p.inbox = slices.Insert(p.inbox, 0, rest)
		}
	}
	return got
}

// WantItem wants one item, of this seq.
func (p *Peer) WantItem(seq uint64) *schema.WorkDelivery {
	p.w.t.Helper()
	it := p.WantWork(1)[0]
	if it.GetEnvelope().GetSeq() != seq {
		p.w.t.Fatalf("%s peer at %s: the item is of seq %d, want %d: %v", p.way, p.edge.Name, it.GetEnvelope().GetSeq(), seq, it)
	}
	return it
}

// WantNoWork wants no item to come for so long; what else comes waits for another want.
func (p *Peer) WantNoWork(d time.Duration) {
	p.w.t.Helper()
	for end := time.Now().Add(d); ; {
		if i := slices.IndexFunc(p.inbox, func(f *schema.ServerFrame) bool { return f.GetWork() != nil }); i >= 0 {
			p.w.t.Fatalf("%s peer at %s wants no work; it has %v", p.way, p.edge.Name, p.inbox[i])
		}
		f, over := p.next(time.Until(end))
		switch {
		case over:
			p.w.t.Fatalf("%s peer at %s wants no work; the connection ended: %s", p.way, p.edge.Name, p.ending)
		case f == nil:
			return
		}
		p.inbox = append(p.inbox, f)
	}
}

// WantWorkCancelled wants to be told that what an item belongs to was cancelled.
func (p *Peer) WantWorkCancelled(it *schema.WorkDelivery) *schema.WorkCancelled {
	p.w.t.Helper()
	return p.want(fmt.Sprintf("work_cancelled of item %d", it.GetWorkId()), func(f *schema.ServerFrame) bool {
		return f.GetWorkCancelled() != nil && f.GetWorkCancelled().GetWorkId() == it.GetWorkId()
	}).GetWorkCancelled()
}

// WantWorkRefused wants an answer about an item to be refused, with this code and a sentence.
func (p *Peer) WantWorkRefused(it *schema.WorkDelivery, code schema.Code) {
	p.w.t.Helper()
	r := p.want(fmt.Sprintf("work_refused of item %d", it.GetWorkId()), func(f *schema.ServerFrame) bool {
		return f.GetWorkRefused() != nil && f.GetWorkRefused().GetWorkId() == it.GetWorkId()
	}).GetWorkRefused()
	if r.GetCode() != code || r.GetMessage() == "" {
		p.w.t.Fatalf("%s peer at %s: item %d should be refused with %s and a sentence; it was told %v", p.way, p.edge.Name, it.GetWorkId(), code.Word(), r)
	}
}

// workControl is a worker's frame as the session socket takes it; false for any other.
func workControl(f *schema.ClientFrame) ([]byte, bool) {
	m := f.ProtoReflect()
	field := m.WhichOneof(m.Descriptor().Oneofs().ByName("frame"))
	switch f.GetFrame().(type) {
	case *schema.ClientFrame_WorkSubscribe, *schema.ClientFrame_WorkUnsubscribe, *schema.ClientFrame_Ack, *schema.ClientFrame_Nack, *schema.ClientFrame_InProgress, *schema.ClientFrame_Term, *schema.ClientFrame_Heartbeat:
	default:
		return nil, false
	}
	data, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(m.Get(field).Message().Interface())
	if err != nil {
		return nil, false
	}
	b, err := json.Marshal(map[string]any{"type": string(field.Name()), "data": json.RawMessage(data)})
	return b, err == nil
}

// workFrame puts what the session socket says to workers into the words of the multiplexed connection; false where it is something else. Of an item it does not say the session, which is the socket's, nor the epoch.
func workFrame(kind string, data []byte) (*schema.ServerFrame, bool, error) {
	frame := func(f *schema.ServerFrame, m proto.Message) (*schema.ServerFrame, bool, error) {
		return f, true, protojson.Unmarshal(data, m)
	}
	switch kind {
	case "work_subscribed":
		m := new(schema.WorkSubscribed)
		return frame(&schema.ServerFrame{Frame: &schema.ServerFrame_WorkSubscribed{WorkSubscribed: m}}, m)
	case "work_unsubscribed":
		m := new(schema.WorkUnsubscribed)
		return frame(&schema.ServerFrame{Frame: &schema.ServerFrame_WorkUnsubscribed{WorkUnsubscribed: m}}, m)
	case "work_cancelled":
		m := new(schema.WorkCancelled)
		return frame(&schema.ServerFrame{Frame: &schema.ServerFrame_WorkCancelled{WorkCancelled: m}}, m)
	case "heard":
		m := new(schema.Heard)
		return frame(&schema.ServerFrame{Frame: &schema.ServerFrame_Heard{Heard: m}}, m)
	case "work_refused":
		var d struct {
			WorkID        uint64 `json:"work_id"`
			Code, Details string
		}
		err := json.Unmarshal(data, &d)
		return &schema.ServerFrame{Frame: &schema.ServerFrame_WorkRefused{WorkRefused: &schema.WorkRefused{WorkId: d.WorkID, Code: codeOf(d.Code), Message: d.Details}}}, true, err
	case "work":
		var d struct {
			Channel   uint32
			WorkID    uint64 `json:"work_id"`
			Attempt   uint32
			Deadline  time.Time
			Cancelled bool
			Envelope  json.RawMessage
		}
		if err := json.Unmarshal(data, &d); err != nil {
			return nil, true, err
		}
		e, err := schema.ParseJSON(d.Envelope)
		return &schema.ServerFrame{Frame: &schema.ServerFrame_Work{Work: &schema.Work{Channel: d.Channel, Items: []*schema.WorkDelivery{{
			WorkId: d.WorkID, Attempt: d.Attempt, Deadline: timestamppb.New(d.Deadline), Cancelled: d.Cancelled, Envelope: e,
		}}}}}, true, err
	default:
		return nil, false, nil
	}
}
