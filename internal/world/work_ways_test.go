package world

import (
	"slices"
	"testing"
	"time"

	"tidemark/broker/worktest"
	"tidemark/edge-grpc"
	"tidemark/internal/gateway"
	"tidemark/schema"
)

// workInMemory is a world whose edges hand out work that is in memory, so that nothing but the ways to it is looked at.
func workInMemory(q *worktest.Queue) Config {
	return Config{
		Gateway: func(c *gateway.Config) { c.Work, c.Runs = q, q },
		GRPC:    func(c *edgegrpc.Config) { c.Work, c.Runs = q, q },
	}
}

func toolCall(seq uint64) *schema.Envelope {
	return &schema.Envelope{Seq: seq, Id: "01JBV00000000000000000000A", RequestId: "q", Payload: &schema.Envelope_ToolCall{ToolCall: &schema.ToolCall{CallId: "c", Name: "ls"}}}
}

// TestWorkOverEveryWay: every way that carries work carries all of it alike.
func TestWorkOverEveryWay(t *testing.T) {
	for _, way := range WorkWays() {
		t.Run(way.String(), func(t *testing.T) {
			q := new(worktest.Queue)
			Run(t, workInMemory(q), func(w *World) {
				id := Session("s")
				p := w.Hire(w.Edge(0), way, "s", &schema.WorkSubscribe{Group: "g", Sessions: []string{"s"}, Credit: 2, AckWaitMs: 60_000, MaxDeliver: 3})
				for seq := range uint64(3) {
					q.Put(id, toolCall(seq+1))
				}
				items := p.WantWork(2)
				for i, it := range items {
					if it.GetEnvelope().GetSeq() != uint64(i)+1 || it.GetSession() != "s" || it.GetAttempt() != 1 || !it.GetDeadline().AsTime().Equal(time.Now().Add(time.Minute)) || it.GetEnvelope().GetToolCall().GetName() != "ls" {
						t.Errorf("item %d is %v", i, it)
					}
				}
				p.WantNoWork(time.Second)
				p.InProgress(items...)
				p.AckWork(items[0])
				third := p.WantItem(3)
				p.NackWorkFor(items[1], time.Minute, "busy")
				p.TermWork(third, "no such tool")
				p.AckWork(items[0])
				p.WantWorkRefused(items[0], schema.Code_CODE_WORK_LOST)
				p.WantNoWork(59 * time.Second)
				again := p.WantItem(2)
				p.NackWork(again, "still busy")
				again = p.WantItem(2)
				if again.GetAttempt() != 3 {
					t.Errorf("handed out again as %v", again)
				}
				q.Cancel(id, 9, "enough")
				if gone := p.WantWorkCancelled(again); gone.GetSeq() != 9 || gone.GetReason() != "enough" || gone.GetChannel() != 1 {
					t.Errorf("cancelled: %v", gone)
				}
				p.Heartbeat("s", "r")
				if kept := q.Kept(); !slices.Equal(kept, []string{"s/r"}) {
					t.Errorf("kept are %q", kept)
				}
				p.Unsubscribe(1)
				p.WantUnsubscribed(1)
				p.Subscribe(&schema.WorkSubscribe{Group: "g", Credit: 5000})
				p.WantError(1, schema.Code_CODE_INVALID_MESSAGE)
				said := q.Said()
				if want := []string{"in_progress 1", "in_progress 2", "ack 1", "nack 2 1m0s: busy", "term 3: no such tool", "nack 2: still busy", "back 2"}; !slices.Equal(said, want) {
					t.Errorf("the group heard %q, want %q", said, want)
				}

				// A connection that breaks gives its items back at once, to whoever works elsewhere.
				p.Subscribe(&schema.WorkSubscribe{Group: "g"})
				p.WantSubscribed()
				p.WantItem(2)
				other := w.Hire(w.Edge(1), way, "s", &schema.WorkSubscribe{Group: "g", MaxDeliver: 9})
				other.WantNoWork(time.Second)
				began := time.Now()
				p.Cut()
				other.WantItem(2)
				if took := time.Since(began); took > 50*time.Millisecond {
					t.Errorf("it took %s", took)
				}
				w.Until("the run is kept no more", func() bool { return len(q.Kept()) == 0 })
				p = other
				p.Close()
				w.Until("the item is back", func() bool { return slices.Contains(q.Said(), "back 2") })
			})
		})
	}
}
