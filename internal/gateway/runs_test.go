package gateway

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"tidemark/broker/worktest"
	"tidemark/schema"
)

func startOf(run string) *schema.Envelope {
	return &schema.Envelope{Payload: &schema.Envelope_StartRun{StartRun: &schema.StartRun{RunId: run}}}
}

func statusOf(run string, s schema.Status) *schema.Envelope {
	return &schema.Envelope{Payload: &schema.Envelope_RunStatus{RunStatus: &schema.RunStatus{RunId: run, Status: s}}}
}

func (w *world) wantKept(q *worktest.Queue, want ...string) {
	w.Helper()
	synctest.Wait()
	if got := q.Kept(); !slices.Equal(got, want) {
		w.Fatalf("kept are the runs %q, want %q", got, want)
	}
}

func (p *peer) heartbeat(session, run string) {
	p.Helper()
	p.frameOf(&schema.ClientFrame{Frame: &schema.ClientFrame_Heartbeat{Heartbeat: &schema.Heartbeat{Session: session, RunId: run}}})
}

// put publishes to a session and wants it stored.
func (p *peer) put(session string, envelopes ...*schema.Envelope) {
	p.Helper()
	p.publish(&schema.Publish{PublishId: 1, Session: session, Envelopes: envelopes})
	want[*schema.ServerFrame_Published](p)
}

// TestRunsArePublished: the connection of an agent, a worker or an admin keeps the runs that it starts and goes on with, from before their publish is acknowledged until they end there, or the connection does.
func TestRunsArePublished(t *testing.T) {
	working(t, nil, func(w *world, q *worktest.Queue) {
		p, worker := w.agent(), w.connect(principal("worker", "*"))
		p.put("a", startOf("r1"))
		w.wantKept(q, "a/r1")
		worker.put("b", startOf("r2"), tokenOf("x"), statusOf("r2", schema.Status_STATUS_WAITING_FOR_INPUT))
		p.put("c", statusOf("", schema.Status_STATUS_RUNNING))
		w.wantKept(q, "a/r1", "b/r2", "c/")

		// A user starts runs for others; tokens keep nothing; neither does what is refused.
		w.connect(principal("user", "*")).put("u", startOf("r"))
		p.put("t", tokenOf("x"))
		p.publish(&schema.Publish{PublishId: 9, Session: "d", ExpectedSeq: new(uint64(5)), Envelopes: []*schema.Envelope{startOf("r")}})
		p.wantRejected(9, schema.Code_CODE_CONFLICT, "")
		w.wantKept(q, "a/r1", "b/r2", "c/")

		// The end, in each of its forms.
		p.put("a", statusOf("r1", schema.Status_STATUS_COMPLETED))
		w.wantKept(q, "b/r2", "c/")
		p.put("c", statusOf("r9", schema.Status_STATUS_FAILED))
		w.wantKept(q, "b/r2")
		p.put("e", startOf("r4"))
		p.put("e", &schema.Envelope{Payload: &schema.Envelope_Error{Error: &schema.Error{Error: "hm", Recoverable: new(true)}}})
		w.wantKept(q, "b/r2", "e/r4")
		p.put("e", &schema.Envelope{Payload: &schema.Envelope_Error{Error: &schema.Error{Error: "no", Recoverable: new(false)}}})
		w.wantKept(q, "b/r2")
		p.put("f", startOf("r5"))
		p.put("f", statusOf("", schema.Status_STATUS_CANCELLED))
		w.wantKept(q, "b/r2")
		worker.leave()
		w.wantKept(q)

		// An admin's connection keeps them as well: the backend of a desktop application has no other token.
		admin := w.connect(principal("admin", "*"))
		admin.put("a", startOf("r1"))
		admin.put("c", statusOf("", schema.Status_STATUS_RUNNING))
		w.wantKept(q, "a/r1", "c/")
		admin.put("a", statusOf("r1", schema.Status_STATUS_COMPLETED))
		w.wantKept(q, "c/")
		admin.leave()
		w.wantKept(q)
	})
}

// TestRunsAreHeld: who has a start_run in hand as work keeps its run until it has settled it, or its deadline has passed.
func TestRunsAreHeld(t *testing.T) {
	working(t, nil, func(w *world, q *worktest.Queue) {
		p := w.agent()
		p.subscribe(&schema.WorkSubscribe{Credit: 9, AckWaitMs: 10_000})
		p.wantSubscribed()
		put := func(seq uint64, run string) {
			e := startOf(run)
			e.Seq = seq
			q.Put(idOf("s"), e)
		}
		put(1, "r1")
		jobs(q, "s", 2)
		both := p.wantWork(1, 2)
		first := both[0]
		p.ack(both[1].GetWorkId())
		w.wantKept(q, "s/r1")
		p.ack(first.GetWorkId())
		w.wantKept(q)

		// Published there, too, it stays beyond the item.
		put(3, "r3")
		it := p.wantWork(3)[0]
		p.put("s", statusOf("r3", schema.Status_STATUS_RUNNING))
		p.ack(it.GetWorkId())
		w.wantKept(q, "s/r3")
		p.put("s", statusOf("r3", schema.Status_STATUS_COMPLETED))
		w.wantKept(q)

		// Who hangs does not keep it for ever.
		put(4, "r4")
		it = p.wantWork(4)[0]
		time.Sleep(8 * time.Second)
		p.inProgress(it.GetWorkId())
		time.Sleep(8 * time.Second)
		w.wantKept(q, "s/r4")
		q.Said()
		p.unsubscribe(1)
		for f := p.next(); f.GetWorkUnsubscribed() == nil; f = p.next() { // what came late is handed out again
		}
		w.wantKept(q)

		p.subscribe(&schema.WorkSubscribe{Group: "new", AckWaitMs: 10_000, MaxDeliver: 1})
		p.wantSubscribed()
		put(5, "r5")
		p.wantWork(5)
		w.wantKept(q, "s/r5")
		time.Sleep(11 * time.Second)
		w.wantKept(q)

		// Nor does a connection that ends.
		put(6, "r6")
		p.wantWork(6)
		w.wantKept(q, "s/r6")
		p.leave()
		w.wantKept(q)
	})
}

// TestRunsAreHeldByTheirOwnItem: a run that has ended is nothing to the next of its name, whenever its item is settled; and the deadline that counts is the item's, as the group has it now.
func TestRunsAreHeldByTheirOwnItem(t *testing.T) {
	working(t, nil, func(w *world, q *worktest.Queue) {
		p := w.agent()
		p.subscribe(&schema.WorkSubscribe{Credit: 2, AckWaitMs: 10_000, MaxDeliver: 1})
		p.wantSubscribed()
		put := func(seq uint64) uint64 {
			e := startOf("")
			e.Seq = seq
			q.Put(idOf("s"), e)
			return p.wantWork(seq)[0].GetWorkId()
		}
		first := put(1)
		p.put("s", statusOf("", schema.Status_STATUS_COMPLETED))
		w.wantKept(q)
		second := put(2)
		p.ack(first)
		w.wantKept(q, "s/")

		// Another worker changes the group's ack wait, which counts for items from their next deadline on.
		other := w.agent()
		other.subscribe(&schema.WorkSubscribe{AckWaitMs: 60_000})
		other.wantSubscribed()
		p.inProgress(second)
		time.Sleep(50 * time.Second)
		w.wantKept(q, "s/")
		time.Sleep(11 * time.Second)
		w.wantKept(q)
	})
}

// TestHeartbeat keeps runs by name: for who may work with the session, as long as the connection lasts.
func TestHeartbeat(t *testing.T) {
	working(t, nil, func(w *world, q *worktest.Queue) {
		p := w.connect(principal("agent", "s*"))
		p.heartbeat("s1", "r")
		if h := want[*schema.ServerFrame_Heard](p).Heard; h.GetSession() != "s1" || h.GetRunId() != "r" {
			t.Errorf("heard %v", h)
		}
		p.heartbeat("s1", "r")
		want[*schema.ServerFrame_Heard](p)
		p.heartbeat("s2", "")
		want[*schema.ServerFrame_Heard](p)
		w.wantKept(q, "s1/r", "s2/")
		p.heartbeat("other", "r")
		p.wantFailed(schema.Code_CODE_FORBIDDEN, "other")
		w.wantKept(q)
		for _, c := range []struct {
			role, session, run string
			code               schema.Code
		}{
			{"user", "s", "r", schema.Code_CODE_FORBIDDEN},
			{"analyst", "s", "r", schema.Code_CODE_FORBIDDEN},
			{"agent", "", "r", schema.Code_CODE_INVALID_MESSAGE},
			{"agent", "s", strings.Repeat("r", 201), schema.Code_CODE_INVALID_MESSAGE},
		} {
			p := w.connect(principal(c.role, "*"))
			p.heartbeat(c.session, c.run)
			p.wantFailed(c.code, "")
		}
		w.wantKept(q)
	})
	bubble(t, nil, func(w *world) {
		p := w.agent()
		p.heartbeat("s", "r")
		p.wantFailed(schema.Code_CODE_UNSUPPORTED_PROTOCOL, "keeps no runs")
	})
}

// TestKeptRunsAreBounded: beyond the bound the run that was kept first is let go; one that is kept again counts as new.
func TestKeptRunsAreBounded(t *testing.T) {
	working(t, nil, func(w *world, q *worktest.Queue) {
		p := w.agent()
		beat := func(i int) {
			p.heartbeat("s", fmt.Sprintf("r%04d", i))
			want[*schema.ServerFrame_Heard](p)
		}
		for i := range MaxKeptRuns {
			beat(i)
		}
		beat(0)
		beat(MaxKeptRuns)
		kept := q.Kept()
		if len(kept) != MaxKeptRuns || kept[0] != "s/r0000" || kept[1] != "s/r0002" {
			t.Errorf("%d runs are kept, from %s, %s on", len(kept), kept[0], kept[1])
		}
		p.leave()
		w.wantKept(q)
	})
}
