package gateway

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"tidemark/broker"
	"tidemark/broker/worktest"
	"tidemark/schema"
)

// working is a bubble whose gateway hands out work.
func working(t *testing.T, change func(*Config), test func(w *world, q *worktest.Queue)) {
	t.Helper()
	q := new(worktest.Queue)
	bubble(t, func(c *Config) {
		c.Work, c.Runs = q, q
		if change != nil {
			change(c)
		}
	}, func(w *world) { test(w, q) })
}

func idOf(session string) schema.SessionID {
	return schema.SessionID{Tenant: "default", Name: session}
}

// jobs puts tool calls into a session, with these seqs.
func jobs(q *worktest.Queue, session string, seqs ...uint64) {
	for _, seq := range seqs {
		q.Put(idOf(session), jobOf(seq))
	}
}

func jobOf(seq uint64) *schema.Envelope {
	return &schema.Envelope{Seq: seq, RequestId: fmt.Sprint("q", seq), Payload: &schema.Envelope_ToolCall{ToolCall: &schema.ToolCall{CallId: "c", Name: "<ls>", ArgumentsJson: `{"n": 1.50}`}}}
}

// frameOf sends a client's frame, in the connection's form.
func (p *peer) frameOf(f *schema.ClientFrame) {
	p.Helper()
	if p.proto != ProtoJSON {
		p.send(f)
		return
	}
	b, err := protojson.Marshal(f)
	if err != nil {
		p.Fatal(err)
	}
	p.sendRaw(b)
}

func (p *peer) subscribe(m *schema.WorkSubscribe) {
	p.Helper()
	if m.Channel == 0 {
		m.Channel = 1
	}
	if m.Group == "" {
		m.Group = "tools"
	}
	p.frameOf(&schema.ClientFrame{Frame: &schema.ClientFrame_WorkSubscribe{WorkSubscribe: m}})
}

func (p *peer) wantSubscribed() *schema.WorkGroup {
	p.Helper()
	f := p.frame()
	if f.GetWorkSubscribed() == nil {
		p.Fatalf("want work_subscribed, got %v", f)
	}
	return f.GetWorkSubscribed().GetGroup()
}

func (p *peer) unsubscribe(channel uint32) {
	p.Helper()
	p.frameOf(&schema.ClientFrame{Frame: &schema.ClientFrame_WorkUnsubscribe{WorkUnsubscribe: &schema.WorkUnsubscribe{Channel: channel}}})
}

func (p *peer) ack(ids ...uint64) {
	p.Helper()
	p.frameOf(&schema.ClientFrame{Frame: &schema.ClientFrame_Ack{Ack: &schema.WorkAck{WorkIds: ids}}})
}

func (p *peer) inProgress(ids ...uint64) {
	p.Helper()
	p.frameOf(&schema.ClientFrame{Frame: &schema.ClientFrame_InProgress{InProgress: &schema.WorkInProgress{WorkIds: ids}}})
}

func (p *peer) nack(m *schema.WorkNack) {
	p.Helper()
	p.frameOf(&schema.ClientFrame{Frame: &schema.ClientFrame_Nack{Nack: m}})
}

func (p *peer) term(m *schema.WorkTerm) {
	p.Helper()
	p.frameOf(&schema.ClientFrame{Frame: &schema.ClientFrame_Term{Term: m}})
}

// wantWork takes work until these seqs have come, in this order, and returns their deliveries.
func (p *peer) wantWork(seqs ...uint64) []*schema.WorkDelivery {
	p.Helper()
	var got []*schema.WorkDelivery
	for len(got) < len(seqs) {
		f := p.frame()
		if f.GetWork() == nil {
			p.Fatalf("want work of seqs %v, got %v", seqs, f)
		}
		got = append(got, f.GetWork().GetItems()...)
	}
	for i, it := range got {
		if it.GetEnvelope().GetSeq() != seqs[i] {
			p.Fatalf("item %d is of seq %d, want %v", i, it.GetEnvelope().GetSeq(), seqs)
		}
	}
	return got
}

func (p *peer) wantRefused(id uint64, code schema.Code, says string) {
	p.Helper()
	r := p.frame().GetWorkRefused()
	if r.GetWorkId() != id || r.GetCode() != code || !strings.Contains(r.GetMessage(), says) {
		p.Fatalf("got %v, want item %d refused with %s", r, id, code.Word())
	}
}

func (w *world) wantSaid(q *worktest.Queue, want ...string) {
	w.Helper()
	synctest.Wait()
	if got := q.Said(); !slices.Equal(got, want) {
		w.Fatalf("the queue heard %q, want %q", got, want)
	}
}

// TestWork: a worker of a group is told the group's settings, gets items within its credit, and what it says of them reaches the group; what it does not hold is refused.
func TestWork(t *testing.T) {
	for _, as := range []Protocol{Proto, ProtoJSON} {
		t.Run(as.String(), func(t *testing.T) {
			working(t, nil, func(w *world, q *worktest.Queue) {
				p := w.dial(Peer{Protocol: as, Principal: principal("worker", "*")})
				p.subscribe(&schema.WorkSubscribe{Channel: 7, Kinds: []string{"tool_call", "start_run", "tool_call"}, Sessions: []string{"s*"}, Credit: 3, AckWaitMs: 60_000, MaxDeliver: 3, BackoffMs: []uint64{1000}})
				g := p.wantSubscribed()
				if want := []string{"tool_call", "start_run"}; g.GetGroup() != "tools" || !slices.Equal(g.GetKinds(), want) || g.GetSessions()[0] != "s*" || g.GetAckWaitMs() != 60_000 || g.GetMaxDeliver() != 3 || g.GetBackoffMs()[0] != 1000 {
					t.Errorf("the group is %v", g)
				}
				jobs(q, "elsewhere", 99)
				jobs(q, "s1", 1, 2, 3, 4, 5)
				got := p.wantWork(1, 2, 3)
				it := got[0]
				if it.GetWorkId() == 0 || it.GetSession() != "s1" || it.GetEpoch() != "E" || it.GetAttempt() != 1 || !it.GetDeadline().AsTime().Equal(time.Now().Add(time.Minute)) || it.GetCancelled() || !proto.Equal(it.GetEnvelope(), jobOf(1)) {
					t.Errorf("the item is %v", it)
				}
				p.wantNothing()

				// Each answer makes room, or does not.
				p.inProgress(got[0].GetWorkId())
				p.ack(got[0].GetWorkId(), got[1].GetWorkId())
				more := p.wantWork(4, 5)
				p.nack(&schema.WorkNack{WorkId: got[2].GetWorkId(), Reason: "busy"})
				p.nack(&schema.WorkNack{WorkId: more[0].GetWorkId(), DelayMs: new(uint64(5000)), Reason: "later"})
				p.term(&schema.WorkTerm{WorkId: more[1].GetWorkId(), Reason: "no such tool"})
				w.wantSaid(q, "in_progress 1", "ack 1", "ack 2", "nack 3: busy", "nack 4 5s: later", "term 5: no such tool")
				again := p.wantWork(3)
				if again[0].GetAttempt() != 2 {
					t.Errorf("handed out again as attempt %d", again[0].GetAttempt())
				}
				later := p.wantWork(4)

				// What is not in hand is refused, one by one.
				p.ack(got[0].GetWorkId(), 12345, later[0].GetWorkId())
				p.wantRefused(got[0].GetWorkId(), schema.Code_CODE_WORK_LOST, "not in this connection's hands")
				p.wantRefused(12345, schema.Code_CODE_WORK_LOST, "12345")
				p.term(&schema.WorkTerm{WorkId: 1 << 40})
				p.wantRefused(1<<40, schema.Code_CODE_WORK_LOST, "never handed it")
				w.wantSaid(q, "ack 4")

				// A cancel reaches the item in hand; what waits is handed out as cancelled.
				q.Cancel(idOf("s1"), 9, "enough")
				f := p.frame().GetWorkCancelled()
				if f.GetChannel() != 7 || f.GetWorkId() != again[0].GetWorkId() || f.GetSeq() != 9 || f.GetReason() != "enough" {
					t.Errorf("cancelled: %v", f)
				}
				p.nack(&schema.WorkNack{WorkId: again[0].GetWorkId(), DelayMs: new(uint64(0))})
				if it := p.wantWork(3); !it[0].GetCancelled() || it[0].GetAttempt() != 3 {
					t.Errorf("handed out as %v", it[0])
				}
				w.wantSaid(q, "nack 3 0s: ")

				p.unsubscribe(7)
				if f := p.frame().GetWorkUnsubscribed(); f.GetChannel() != 7 {
					t.Errorf("unsubscribed: %v", f)
				}
				w.wantSaid(q, "back 3")
				p.unsubscribe(7)
				if f := p.frame(); f.GetWorkUnsubscribed().GetChannel() != 7 {
					t.Errorf("what is over is answered with %v", f)
				}
				m := w.g.metrics
				for answer, n := range map[workAnswer]float64{answerAck: 3, answerNack: 3, answerInProgress: 1, answerTerm: 1, answerLost: 3} {
					if got := counter(t, m.answers[answer]); got != n {
						t.Errorf("%s was counted %v times, want %v", answer, got, n)
					}
				}
				if n := counter(t, m.items.WithLabelValues("tool_call")); n != 8 || gauge(t, m.subscriptions) != 0 {
					t.Errorf("%v items were counted, and %v subscriptions are left", n, gauge(t, m.subscriptions))
				}
			})
		})
	}
}

// TestWorkIsBatched: many items are a few messages, none of them above what clients take.
func TestWorkIsBatched(t *testing.T) {
	working(t, nil, func(w *world, q *worktest.Queue) {
		p := w.agent()
		p.subscribe(&schema.WorkSubscribe{Credit: 1000})
		p.wantSubscribed()
		e := jobOf(1)
		e.GetToolCall().ArgumentsJson = `"` + strings.Repeat("x", 10_000) + `"`
		for range 100 {
			q.Put(idOf("s"), e)
		}
		sizes, n := 0, 0
		for n < 100 {
			b := p.nextRaw()
			f := new(schema.ServerFrame)
			if err := proto.Unmarshal(b, f); err != nil {
				t.Fatal(err)
			}
			if len(b) > 2*roundBytes {
				t.Errorf("a message of %d bytes", len(b))
			}
			n += len(f.GetWork().GetItems())
			sizes++
		}
		if n != 100 || sizes > 100/2 {
			t.Errorf("%d items came in %d messages", n, sizes)
		}
	})
}

// TestCancelsComeBehind: no cancel is told before the item that it is of, however much waits to be written.
func TestCancelsComeBehind(t *testing.T) {
	working(t, nil, func(w *world, q *worktest.Queue) {
		p := w.agent()
		p.subscribe(&schema.WorkSubscribe{Credit: 100})
		p.wantSubscribed()
		for seq := range uint64(50) {
			e := jobOf(seq + 1)
			e.GetToolCall().ArgumentsJson = `"` + strings.Repeat("x", 10_000) + `"`
			q.Put(idOf("s"), e)
		}
		// The first message waits for its reader; most of the items are with the worker and were not taken.
		synctest.Wait()
		q.Cancel(idOf("s"), 99, "enough")
		has, gone := map[uint64]bool{}, 0
		for gone < 50 {
			f := p.next()
			for _, it := range f.GetWork().GetItems() {
				has[it.GetWorkId()] = true
			}
			if c := f.GetWorkCancelled(); c != nil {
				if gone++; !has[c.GetWorkId()] {
					t.Fatalf("item %d was cancelled before it came", c.GetWorkId())
				}
			}
		}
		if len(has) != 50 {
			t.Errorf("%d items came", len(has))
		}
	})
}

// TestWorkFramesWrittenByHand compares what is written by hand with what protobuf makes of the same.
func TestWorkFramesWrittenByHand(t *testing.T) {
	working(t, nil, func(w *world, _ *worktest.Queue) {
		at := time.Date(2026, 1, 2, 3, 4, 5, 678, time.UTC)
		raw, err := proto.Marshal(jobOf(5))
		if err != nil {
			t.Fatal(err)
		}
		items := []*broker.Item{
			{ID: 1, Session: idOf("s"), Epoch: "E", Attempt: 1, Deadline: at, Kind: schema.KindToolCall, Envelope: raw},
			{ID: 1 << 50, Session: idOf("ü"), Attempt: 300, Deadline: time.Unix(1, 0), Kind: schema.KindToolCall, Envelope: raw, Cancelled: true},
		}
		s := &subscription{channel: 300}
		var texts [2]string
		for i, c := range []codec{protoCodec{}, protoJSONCodec{}} {
			wr := &writer{c: &conn{g: w.g, codec: c}, out: new(outgoing)}
			c.work(wr, s, items)
			f := new(schema.ServerFrame)
			parse := proto.Unmarshal
			if i == 1 {
				parse = protojson.Unmarshal
			}
			if err := parse(wr.out.all()[0], f); err != nil {
				t.Fatal(err)
			}
			texts[i] = protojson.Format(f)
		}
		if strings.Join(strings.Fields(texts[0]), "") != strings.Join(strings.Fields(texts[1]), "") || !strings.Contains(texts[0], "05.000000678Z") {
			t.Errorf("by hand:\n%s\nby protobuf:\n%s", texts[0], texts[1])
		}
	})
}

func TestWorkRefused(t *testing.T) {
	working(t, nil, func(w *world, q *worktest.Queue) {
		q.Refuse = func(o broker.WorkOptions) error {
			if o.Group == "gone" {
				return schema.Refuse(schema.Code_CODE_UNAVAILABLE, "NATS is away.")
			}
			return nil
		}
		p := w.agent()
		long := strings.Repeat("g", 201)
		for _, c := range []struct {
			m    *schema.WorkSubscribe
			code schema.Code
			says string
		}{
			{&schema.WorkSubscribe{Group: long}, schema.Code_CODE_INVALID_MESSAGE, "201 bytes"},
			{&schema.WorkSubscribe{Kinds: []string{"nonsense"}}, schema.Code_CODE_UNKNOWN_TYPE, `Group "tools" asks for the kind "nonsense", which is none that makes work; those are tool_call, start_run, `},
			{&schema.WorkSubscribe{Kinds: []string{"token"}}, schema.Code_CODE_INVALID_MESSAGE, "'token', which makes no work"},
			{&schema.WorkSubscribe{Sessions: slices.Repeat([]string{"s"}, 33)}, schema.Code_CODE_INVALID_MESSAGE, "33 sessions"},
			{&schema.WorkSubscribe{Sessions: []string{""}}, schema.Code_CODE_INVALID_MESSAGE, "empty"},
			{&schema.WorkSubscribe{Sessions: []string{long}}, schema.Code_CODE_INVALID_MESSAGE, "201 bytes"},
			{&schema.WorkSubscribe{Credit: 1001}, schema.Code_CODE_INVALID_MESSAGE, "a credit of 1001"},
			{&schema.WorkSubscribe{AckWaitMs: 99}, schema.Code_CODE_INVALID_MESSAGE, "an ack wait of 99ms; 100ms to 12h0m0s"},
			{&schema.WorkSubscribe{AckWaitMs: schema.MaxAckWaitMs + 1}, schema.Code_CODE_INVALID_MESSAGE, "an ack wait of 12h0m0.001s"},
			{&schema.WorkSubscribe{AckWaitMs: 1 << 63}, schema.Code_CODE_INVALID_MESSAGE, "an ack wait of 2562047h47m"},
			{&schema.WorkSubscribe{MaxDeliver: 1001}, schema.Code_CODE_INVALID_MESSAGE, "handed out 1001 times"},
			{&schema.WorkSubscribe{BackoffMs: make([]uint64, 33)}, schema.Code_CODE_INVALID_MESSAGE, "33 rests"},
			{&schema.WorkSubscribe{BackoffMs: []uint64{0, schema.MaxBackoffMs + 1}}, schema.Code_CODE_INVALID_MESSAGE, "a rest of 24h0m0.001s"},
			{&schema.WorkSubscribe{BackoffMs: []uint64{math.MaxUint64}}, schema.Code_CODE_INVALID_MESSAGE, "a rest of 2562047h47m"},
			{&schema.WorkSubscribe{Credit: math.MaxUint32, MaxDeliver: math.MaxUint32}, schema.Code_CODE_INVALID_MESSAGE, "a credit of 4294967295"},
			{&schema.WorkSubscribe{Group: "gone"}, schema.Code_CODE_UNAVAILABLE, "NATS is away"},
		} {
			c.m.Channel = 4
			p.subscribe(c.m)
			p.wantError(4, c.code, c.says)
		}
		p.send(&schema.ClientFrame{Frame: &schema.ClientFrame_WorkSubscribe{WorkSubscribe: &schema.WorkSubscribe{Channel: 4}}})
		p.wantError(4, schema.Code_CODE_INVALID_MESSAGE, "name has 0 bytes")

		// The largest that are allowed.
		p.subscribe(&schema.WorkSubscribe{Group: long[1:], Credit: 1000, AckWaitMs: schema.MaxAckWaitMs, MaxDeliver: 1000, BackoffMs: slices.Repeat([]uint64{schema.MaxBackoffMs}, 32), Sessions: []string{long[1:]}})
		p.wantSubscribed()
		jobs(q, long[1:], 1)
		it := p.wantWork(1)[0]

		// What is wrong in an answer leaves the item in hand.
		p.nack(&schema.WorkNack{WorkId: it.GetWorkId(), Reason: strings.Repeat("r", 1001)})
		p.wantRefused(it.GetWorkId(), schema.Code_CODE_INVALID_MESSAGE, "1001 bytes")
		p.nack(&schema.WorkNack{WorkId: it.GetWorkId(), DelayMs: new(uint64(schema.MaxBackoffMs + 1))})
		p.wantRefused(it.GetWorkId(), schema.Code_CODE_INVALID_MESSAGE, "delay_ms 86400001")
		p.term(&schema.WorkTerm{WorkId: it.GetWorkId(), Reason: strings.Repeat("r", 1001)})
		p.wantRefused(it.GetWorkId(), schema.Code_CODE_INVALID_MESSAGE, "still in hand")
		w.wantSaid(q)

		// What no client does by accident ends the connection.
		for _, c := range []struct {
			f    *schema.ClientFrame
			says string
		}{
			{&schema.ClientFrame{Frame: &schema.ClientFrame_WorkSubscribe{WorkSubscribe: &schema.WorkSubscribe{Group: "g"}}}, "channel above 0"},
			{&schema.ClientFrame{Frame: &schema.ClientFrame_WorkUnsubscribe{WorkUnsubscribe: &schema.WorkUnsubscribe{}}}, "channel of a subscription"},
			{&schema.ClientFrame{Frame: &schema.ClientFrame_Ack{Ack: &schema.WorkAck{WorkIds: make([]uint64, 1001)}}}, "names 1001 items"},
			{&schema.ClientFrame{Frame: &schema.ClientFrame_InProgress{InProgress: &schema.WorkInProgress{WorkIds: make([]uint64, 1001)}}}, "names 1001 items"},
		} {
			p := w.agent()
			p.send(c.f)
			p.wantFailed(schema.Code_CODE_INVALID_MESSAGE, c.says)
		}
		// Attachments and subscriptions share their numbers.
		for _, first := range []bool{true, false} {
			p := w.agent()
			if first {
				p.subscribe(&schema.WorkSubscribe{Channel: 3})
				p.wantSubscribed()
				p.attach(&schema.Attach{Channel: 3, Session: "s"})
			} else {
				p.attach(&schema.Attach{Channel: 3, Session: "s"})
				p.wantAttached(3, 0)
				p.wantCaughtUp(3, 0)
				p.subscribe(&schema.WorkSubscribe{Channel: 3})
			}
			p.wantFailed(schema.Code_CODE_INVALID_MESSAGE, "Channel 3 is open already")
		}
	})
	// An edge whose log has no work says so.
	bubble(t, nil, func(w *world) {
		p := w.agent()
		p.subscribe(&schema.WorkSubscribe{})
		p.wantError(1, schema.Code_CODE_UNSUPPORTED_PROTOCOL, "hands out no work")
	})
}

// TestWorkRights: to work takes the role and every session that the group may hold (I9).
func TestWorkRights(t *testing.T) {
	working(t, nil, func(w *world, q *worktest.Queue) {
		for _, role := range []string{"user", "analyst"} {
			p := w.connect(principal(role, "*"))
			p.subscribe(&schema.WorkSubscribe{Sessions: []string{"s"}})
			p.wantError(1, schema.Code_CODE_FORBIDDEN, "may not work")
		}
		p := w.connect(principal("worker", "a*", "b"))
		for _, sessions := range [][]string{{"*"}, {"c"}, {"b*"}, {"a", "bb"}, {}} {
			p.subscribe(&schema.WorkSubscribe{Sessions: sessions})
			p.wantError(1, schema.Code_CODE_FORBIDDEN, "")
		}
		p.subscribe(&schema.WorkSubscribe{Sessions: []string{"ab*", "a*", "b", "a"}})
		p.wantSubscribed()

		// A filter that grew since says nothing of the rights of who came before.
		all := w.agent()
		all.subscribe(&schema.WorkSubscribe{Sessions: []string{"*"}})
		all.wantSubscribed()
		jobs(q, "c", 1)
		if e := p.wantError(1, schema.Code_CODE_FORBIDDEN, `Group "tools" holds work`); strings.Contains(e.GetMessage(), `"c"`) {
			t.Errorf("it says which session that is: %s", e.GetMessage())
		}
		if it := all.wantWork(1)[0]; it.GetAttempt() != 2 {
			t.Errorf("the item is %v", it)
		}
		w.wantSaid(q, "back 1")
	})
}

// TestWorkIsRefreshed: a new token that loses the right ends the subscription behind its refreshed, and nothing is handed out after that.
func TestWorkIsRefreshed(t *testing.T) {
	q := new(worktest.Queue)
	bubble(t, func(c *Config) { tickets(c); c.Work = q }, func(w *world) {
		k := ticket{Subject: "w", Tenant: "default", Role: "worker", Sessions: []string{"*"}, For: time.Hour}
		p := w.connect(k.principal())
		p.subscribe(&schema.WorkSubscribe{Channel: 1, Group: "all"})
		p.wantSubscribed()
		p.subscribe(&schema.WorkSubscribe{Channel: 2, Group: "some", Sessions: []string{"s*"}})
		p.wantSubscribed()
		jobs(q, "s1", 1)
		p.wantWork(1)
		p.wantWork(1)
		k.Sessions = []string{"s*"}
		p.renew(k.token())
		want[*schema.ServerFrame_Refreshed](p)
		p.wantError(1, schema.Code_CODE_FORBIDDEN, `"*"`)
		w.wantSaid(q, "back 1")
		jobs(q, "x", 2)
		p.wantNothing()
		// The other goes on.
		jobs(q, "s2", 3)
		p.unsubscribe(2)
		want[*schema.ServerFrame_WorkUnsubscribed](p)
	})
}

// TestWorkGoesBack: however a connection ends, what it had in hand is with others at once, not after the ack wait.
func TestWorkGoesBack(t *testing.T) {
	for name, end := range map[string]func(*peer){
		"closed":      func(p *peer) { p.lost <- ErrPeerClosed },
		"closing":     func(p *peer) { p.lost <- ErrPeerClosing },
		"lost":        func(p *peer) { p.lost <- fmt.Errorf("reset") },
		"half-closed": func(p *peer) { close(p.eof) },
		"cut":         func(p *peer) { p.cancel() },
		// What was published before is answered before the connection ends: the second progress in a second waits.
		"in flight": func(p *peer) {
			for range 2 {
				p.publish(&schema.Publish{Session: "s", Envelopes: []*schema.Envelope{{Payload: &schema.Envelope_WorkflowProgress{WorkflowProgress: &schema.WorkflowProgress{Step: "s", Message: "m"}}}}})
			}
			p.next()
			p.lost <- ErrPeerClosing
		},
		"nonsense": func(p *peer) { p.sendRaw([]byte("nonsense")); p.wantError(0, schema.Code_CODE_INVALID_MESSAGE, "") },
	} {
		t.Run(name, func(t *testing.T) {
			working(t, nil, func(w *world, q *worktest.Queue) {
				p, other := w.agent(), w.agent()
				p.subscribe(&schema.WorkSubscribe{Credit: 2})
				p.wantSubscribed()
				jobs(q, "s", 1, 2)
				p.wantWork(1, 2)
				other.subscribe(&schema.WorkSubscribe{Credit: 2})
				other.wantSubscribed()
				began := time.Now()
				end(p)
				for _, it := range other.wantWork(1, 2) {
					if it.GetAttempt() != 2 {
						t.Errorf("handed out as attempt %d", it.GetAttempt())
					}
				}
				if took := time.Since(began); took != 0 {
					t.Errorf("it took %s", took)
				}
				w.wantSaid(q, "back 1", "back 2")
				if name == "in flight" {
					p.next()
				}
				<-p.closed
			})
		})
	}
}

// TestWorkIsDrained: an edge that goes away hands out nothing new, and what is in hand may be settled while its grace lasts.
func TestWorkIsDrained(t *testing.T) {
	working(t, func(c *Config) { c.DrainGrace = 10 * time.Second }, func(w *world, q *worktest.Queue) {
		p := w.agent()
		p.subscribe(&schema.WorkSubscribe{Credit: 3})
		p.wantSubscribed()
		jobs(q, "s", 1, 2)
		got := p.wantWork(1, 2)
		drained := make(chan error, 1)
		go func() { drained <- w.g.Drain(w.Context(), "It is replaced.") }()
		want[*schema.ServerFrame_GoingAway](p)
		jobs(q, "s", 3)
		p.wantNothing()
		p.ack(got[0].GetWorkId())
		p.subscribe(&schema.WorkSubscribe{Channel: 2})
		p.wantError(2, schema.Code_CODE_GOING_AWAY, "at another")
		w.wantSaid(q, "ack 1")
		if err := p.wantClosed(schema.Code_CODE_GOING_AWAY, ""); schema.CodeOf(err) != schema.Code_CODE_GOING_AWAY {
			t.Errorf("Serve: %v", err)
		}
		if err := <-drained; err != nil {
			t.Error(err)
		}
		// What came meanwhile was never this connection's.
		w.wantSaid(q, "back 2")
	})
}

// TestWorkIsLimited: a connection works for so many groups, and asking for one costs as much as an envelope; answers cost nothing.
func TestWorkIsLimited(t *testing.T) {
	working(t, func(c *Config) { c.Limits.Agent = Rate{PerSecond: 1, Burst: 18} }, func(w *world, q *worktest.Queue) {
		p := w.agent()
		for i := range MaxSubscriptions {
			p.subscribe(&schema.WorkSubscribe{Channel: uint32(i + 1), Group: fmt.Sprint("g", i)})
			p.wantSubscribed()
		}
		p.subscribe(&schema.WorkSubscribe{Channel: 99})
		p.wantError(99, schema.Code_CODE_LIMIT_EXCEEDED, "works for 16 groups")
		p.unsubscribe(3)
		want[*schema.ServerFrame_WorkUnsubscribed](p)
		p.subscribe(&schema.WorkSubscribe{Channel: 99})
		p.wantSubscribed()
		w.wantExceeded(map[Limit]float64{LimitGroups: 1})

		p.frameOf(&schema.ClientFrame{Frame: &schema.ClientFrame_Heartbeat{Heartbeat: &schema.Heartbeat{Session: "s"}}})
		want[*schema.ServerFrame_Heard](p)
		p.unsubscribe(4)
		want[*schema.ServerFrame_WorkUnsubscribed](p)
		p.subscribe(&schema.WorkSubscribe{Channel: 4})
		p.wantError(4, schema.Code_CODE_RATE_EXCEEDED, "")
		for range 100 {
			p.ack(1 << 40)
			p.wantRefused(1<<40, schema.Code_CODE_WORK_LOST, "")
		}
	})
}

// TestWorkEnds: a group that takes its workers no further ends their subscriptions, and nothing else.
func TestWorkEnds(t *testing.T) {
	working(t, nil, func(w *world, q *worktest.Queue) {
		p := w.agent()
		p.subscribe(&schema.WorkSubscribe{})
		p.wantSubscribed()
		q.End("default", "tools", schema.Refuse(schema.Code_CODE_UNAVAILABLE, "The consumer is gone."))
		p.wantError(1, schema.Code_CODE_UNAVAILABLE, "consumer is gone")
		p.subscribe(&schema.WorkSubscribe{Group: "others"})
		p.wantSubscribed()
	})
}

// TestWorkStream: the stream for workers has no hello, attach and detach.
func TestWorkStream(t *testing.T) {
	for _, f := range []*schema.ClientFrame{
		{Frame: &schema.ClientFrame_Hello{Hello: &schema.Hello{Token: "agent:*"}}},
		{Frame: &schema.ClientFrame_Attach{Attach: &schema.Attach{Channel: 1, Session: "s"}}},
		{Frame: &schema.ClientFrame_Detach{Detach: &schema.Detach{Channel: 1}}},
	} {
		working(t, nil, func(w *world, q *worktest.Queue) {
			p := w.dial(Peer{Protocol: Proto, Principal: principal("worker", "*"), Work: true})
			p.subscribe(&schema.WorkSubscribe{})
			p.wantSubscribed()
			p.token(1, "s", "x")
			p.wantAck(1, 1, 1)
			p.send(f)
			p.wantFailed(schema.Code_CODE_INVALID_MESSAGE, "method Work")
		})
	}
}
