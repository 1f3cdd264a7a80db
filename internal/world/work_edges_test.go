package world

import (
	"strings"
	"testing"
	"time"

	"tidemark/schema"
)

func callOf(id string) *schema.Envelope {
	return &schema.Envelope{RequestId: id, Payload: &schema.Envelope_ToolCall{ToolCall: &schema.ToolCall{CallId: id, Name: "ls"}}}
}

func cancelOfRequest(request, reason string) *schema.Envelope {
	return cancelOf(&schema.Cancel{Target: &schema.Cancel_RequestId{RequestId: request}, Reason: reason})
}

// TestI7_ASessionSocketHasItsOwnGroup: two session sockets cannot share a group, and one is let go when its group is widened, before it is handed anything of another session.
func TestI7_ASessionSocketHasItsOwnGroup(t *testing.T) {
	Run(t, Config{}, func(w *World) {
		pub := w.DialAs(w.Edge(0), ProtoSocket, Dial{}, nil)
		a := w.Hire(w.Edge(0), SessionSocket, "sa", &schema.WorkSubscribe{Group: "tools", Credit: 10, MaxDeliver: 1})
		b := w.DialAs(w.Edge(1), SessionSocket, Dial{}, &schema.Attach{Channel: 99, Session: "sb", Start: &schema.Attach_Head{Head: true}})
		b.Subscribe(&schema.WorkSubscribe{Group: "tools"})
		if e := b.WantError(1, schema.Code_CODE_INVALID_MESSAGE); !strings.Contains(e.GetMessage(), "give each session a group of its own, or use /v1/connect") {
			t.Errorf("the second socket is told %v", e)
		}
		pub.Put("sb", callOf("b"))
		pub.Put("sa", callOf("a"))
		a.AckWork(a.WantItem(1))
		a.WantNoWork(time.Second)

		all := w.Hire(w.Edge(1), GRPC, "", &schema.WorkSubscribe{Group: "tools", Sessions: []string{"s*"}, Credit: 10})
		pub.Put("sb", callOf("b2"))
		// Whatever edge it lands on, the socket's is not to have it.
		if it := all.WantWork(1)[0]; it.GetSession() != "sb" || it.GetAttempt() != 1 {
			t.Errorf("the wider group is handed %v", it)
		}
		if e := a.WantError(1, schema.Code_CODE_INVALID_MESSAGE); !strings.Contains(e.GetMessage(), `takes work of "s*"`) {
			t.Errorf("the socket is told %v", e)
		}
		a.WantNoWork(time.Second)
	})
}

// TestI7_AGroupIsDeletedForAllEdges: workers everywhere are told, at once where they wait for work, and within 10 s where their hands are full.
func TestI7_AGroupIsDeletedForAllEdges(t *testing.T) {
	Run(t, Config{}, func(w *World) {
		pub := w.DialAs(w.Edge(0), ProtoSocket, Dial{}, nil)
		full := w.Hire(w.Edge(0), GRPC, "", &schema.WorkSubscribe{Group: "g"})
		pub.Put("s", callOf("a"))
		held := full.WantItem(1)
		idle := w.Hire(w.Edge(1), GRPC, "", &schema.WorkSubscribe{Group: "g"})
		third := w.StartEdge()
		w.must(w.Call(third, "DeleteWorkGroup", &schema.DeleteWorkGroupRequest{Group: "g"}, new(schema.DeleteWorkGroupResponse)))
		began := time.Now()
		idle.WantError(1, schema.Code_CODE_WORK_NOT_FOUND)
		if took := time.Since(began); took > time.Second {
			t.Errorf("a worker that waits was told after %s", took)
		}
		full.WantError(1, schema.Code_CODE_WORK_NOT_FOUND)
		if took := time.Since(began); took > 11*time.Second {
			t.Errorf("a worker with full hands was told after %s", took)
		}
		full.AckWork(held)
		full.WantWorkRefused(held, schema.Code_CODE_WORK_LOST)
	})
}

// TestI10_CancelledCallsHaveNoResult: of each call whose worker is told to stop, whatever the cancel names, the session takes no result of a worker any more; and of no other.
func TestI10_CancelledCallsHaveNoResult(t *testing.T) {
	for what, cancel := range map[string]*schema.Cancel{
		"run":     {Target: &schema.Cancel_RunId{RunId: "r"}},
		"request": {Target: &schema.Cancel_RequestId{RequestId: "q"}},
		"session": {Target: &schema.Cancel_Session{Session: true}},
	} {
		t.Run(what, func(t *testing.T) {
			Run(t, Config{Latency: time.Millisecond}, func(w *World) {
				agent, user := w.Join(w.Edge(0), ProtoSocket, "s"), w.joinAs(w.Edge(1), ProtoSocket, "s", "ana")
				p := w.Hire(w.Edge(0), ProtoSocket, "s", &schema.WorkSubscribe{Group: "g", Kinds: []string{"tool_call"}, Sessions: []string{"s"}, Credit: 9, AckWaitMs: 60_000})
				start, asked, nameless, before := startRun("r"), callOf("c1"), callOf("c3"), callOf("before")
				start.RequestId, asked.RequestId, nameless.RequestId = "q", "q", ""
				agent.Put("s", before, start, asked, callOf("c2"), nameless)
				items := p.WantWork(4)
				w.Sleep(time.Second)
				user.Put("s", cancelOf(cancel))
				for i, it := range items {
					name := it.GetEnvelope().GetToolCall().GetCallId()
					if i > 0 || what == "session" {
						p.WantWorkCancelled(it)
					}
					late := &schema.Envelope{Payload: &schema.Envelope_ToolResult{ToolResult: &schema.ToolResult{CallId: name}}}
					if i > 0 || what == "session" {
						p.WantRejected(p.Publish("s", late), schema.Code_CODE_CANCELLED)
					} else {
						p.Put("s", late)
					}
					p.AckWork(it)
				}
			})
		})
	}
}

// TestI7_OverTheEdges: a worker by every way is handed items as far as its credit goes, settles them, is told within 50 ms of a cancel that came through another edge, and leaves what it holds to a worker elsewhere when its connection is cut.
func TestI7_OverTheEdges(t *testing.T) {
	for _, way := range WorkWays() {
		t.Run(way.String(), func(t *testing.T) {
			Run(t, Config{Latency: time.Millisecond}, func(w *World) {
				pub, other := w.Join(w.Edge(0), ProtoSocket, "s"), w.Join(w.Edge(1), ProtoSocket, "s")
				p := w.Hire(w.Edge(0), way, "s", &schema.WorkSubscribe{Group: "g", Kinds: []string{"tool_call"}, Sessions: []string{"s"}, Credit: 2, AckWaitMs: 60_000, MaxDeliver: 3})
				pub.Put("s", Token("x"), callOf("a"), callOf("b"), callOf("c"))
				items := p.WantWork(2)
				if items[0].GetEnvelope().GetSeq() != 2 || items[1].GetEnvelope().GetSeq() != 3 {
					t.Errorf("the first two are %v", items)
				}
				p.InProgress(items...)
				p.AckWork(items[0])
				third := p.WantItem(4)
				p.NackWorkFor(items[1], 50*time.Second, "busy")
				p.TermWork(third, "no such tool")
				p.AckWork(items[0])
				p.WantWorkRefused(items[0], schema.Code_CODE_WORK_LOST)
				again := p.WantItem(3)

				began := time.Now()
				other.Put("s", cancelOfRequest("b", "enough"))
				gone := p.WantWorkCancelled(again)
				if took := time.Since(began); took > 50*time.Millisecond || gone.GetReason() != "enough" || gone.GetSeq() == 0 {
					t.Errorf("a cancel came after %s: %v", took, gone)
				}
				next := w.Hire(w.Edge(1), way, "s", &schema.WorkSubscribe{Group: "g", MaxDeliver: 9})
				next.WantNoWork(time.Second)
				began = time.Now()
				p.Cut()
				it := next.WantItem(3)
				if took := time.Since(began); took > 100*time.Millisecond || it.GetAttempt() != 3 {
					t.Errorf("attempt %d came %s after the worker's connection broke", it.GetAttempt(), took)
				}
				// It was cancelled before this worker had it.
				if gone := next.WantWorkCancelled(it); gone.GetReason() != "enough" {
					t.Errorf("the next worker is told %v", gone)
				}
				next.AckWork(it)
				// What belongs to a request that was cancelled says so when it is handed out.
				other.Put("s", cancelOfRequest("d", ""))
				users := w.Hire(w.Edge(1), way, "s", &schema.WorkSubscribe{Group: "users", Kinds: []string{"user_message"}, Sessions: []string{"s"}})
				u := w.DialAs(w.Edge(0), ProtoSocket, Dial{Token: w.Token(schema.Role_ROLE_USER, "*")}, nil)
				e := UserMessage("after all")
				e.RequestId = "d"
				u.Put("s", e)
				if i := users.WantWork(1)[0]; !i.GetCancelled() {
					t.Errorf("the item of a cancelled request is %v", i)
				}
			})
		})
	}
}
