package edgegrpc

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/proto"

	"tidemark/schema"
)

// put makes tool calls of a session work.
func (w *world) put(session string, seqs ...uint64) {
	for _, seq := range seqs {
		w.queue.Put(schema.SessionID{Tenant: "default", Name: session}, &schema.Envelope{Seq: seq, Payload: &schema.Envelope_ToolCall{ToolCall: &schema.ToolCall{CallId: "c"}}})
	}
}

func (w *world) wantKept(want ...string) {
	w.Helper()
	synctest.Wait()
	if got := w.queue.Kept(); !slices.Equal(got, want) {
		w.Fatalf("kept are %q, want %q", got, want)
	}
}

func TestWorkOverEveryProtocol(t *testing.T) { eachBidi(t, testWork) }

func testWork(w *world, d dialect) {
	k := w.dial(d, w.token(schema.Role_ROLE_WORKER, "s*"))
	c := k.open("Work", true)
	c.say(clientFrame(&schema.WorkSubscribe{Channel: 1, Group: "g", Sessions: []string{"s*"}, Credit: 2}))
	if g := c.next().GetWorkSubscribed().GetGroup(); g.GetGroup() != "g" {
		w.Errorf("subscribed to %v", g)
	}
	w.put("s1", 1, 2, 3)
	var items []*schema.WorkDelivery
	for len(items) < 2 {
		items = append(items, c.next().GetWork().GetItems()...)
	}
	if items[0].GetEnvelope().GetSeq() != 1 || items[1].GetEnvelope().GetToolCall().GetCallId() != "c" {
		w.Errorf("work is %v", items)
	}
	c.say(clientFrame(&schema.WorkAck{WorkIds: []uint64{items[0].GetWorkId()}}))
	third := c.next().GetWork().GetItems()[0]
	c.say(clientFrame(&schema.WorkTerm{WorkId: third.GetWorkId(), Reason: "no such tool"}))
	// It publishes, too: what it did belongs into the session.
	c.say(clientFrame(publishOf(5, "s1", "done")))
	if f := c.next(); f.GetPublished().GetAcks()[0].GetPublishId() != 5 {
		w.Errorf("published: %v", f)
	}
	synctest.Wait()
	if said := w.queue.Said(); !slices.Equal(said, []string{"ack 1", "term 3: no such tool"}) {
		w.Errorf("the queue heard %q", said)
	}
	c.finish()
	c.wantEnd()
	synctest.Wait()
	if said := w.queue.Said(); !slices.Equal(said, []string{"back 2"}) {
		w.Errorf("at the end the queue heard %q", said)
	}

	// What is not for workers.
	for _, m := range []proto.Message{&schema.Hello{Token: "x"}, &schema.Attach{Channel: 1, Session: "s"}} {
		c := k.open("Work", true)
		c.say(clientFrame(m))
		if p := c.wantStatus(schema.Code_CODE_INVALID_MESSAGE); !strings.Contains(p.message, "method Work") {
			w.Errorf("refused with %q", p.message)
		}
	}
	none := w.dial(d, "").open("Work", true)
	_ = none.send(clientFrame(&schema.WorkSubscribe{Channel: 1, Group: "g"}))
	none.wantStatus(schema.Code_CODE_UNAUTHENTICATED)
	// A stream whose client is gone lets its items go at once.
	w.put("s1", 4)
	gone := k.open("Work", true)
	gone.say(clientFrame(&schema.WorkSubscribe{Channel: 1, Group: "g"}))
	gone.next()
	gone.next()
	gone.cancel()
	if _, err := gone.recv(); err == nil || errors.Is(err, io.EOF) {
		w.Errorf("a stream that was cancelled ended with %v", err)
	}
	synctest.Wait()
	if said := w.queue.Said(); len(said) == 0 {
		w.Error("nothing came back from a stream that was cancelled")
	}
}

func TestWorkCallsOverEveryProtocol(t *testing.T) { eachDialect(t, testWorkCalls) }

func testWorkCalls(w *world, d dialect) {
	all := w.dial(d, w.token(schema.Role_ROLE_ADMIN, "*"))
	k := w.dial(d, w.token(schema.Role_ROLE_WORKER, "a*"))
	w.giveUp("g", "a1", 1, 2)
	w.giveUp("g", "b1", 3)
	w.put("a1", 4, 5)
	w.put("b1", 6)

	// A group is shown to who may have all of its sessions.
	groups := new(schema.ListWorkGroupsResponse)
	w.must(k.call("ListWorkGroups", &schema.ListWorkGroupsRequest{}, groups))
	if len(groups.GetGroups()) != 0 {
		w.Errorf("a worker of a part of its sessions sees %v", groups)
	}
	w.must(all.call("ListWorkGroups", &schema.ListWorkGroupsRequest{}, groups))
	if len(groups.GetGroups()) != 1 || groups.GetGroups()[0].GetGroup() != "g" || groups.GetGroups()[0].GetWaiting() != 3 {
		w.Errorf("groups: %v", groups)
	}

	// Items, page by page, of the sessions that the token gives access to.
	seqs := func(k *client, req *schema.ListWorkRequest) (seqs []uint64) {
		w.Helper()
		for {
			page := new(schema.ListWorkResponse)
			w.must(k.call("ListWork", req, page))
			for _, it := range page.GetItems() {
				seqs = append(seqs, it.GetSeq())
			}
			if req.PageToken = page.GetNextPageToken(); req.PageToken == "" {
				return seqs
			}
		}
	}
	for _, tt := range []struct {
		k    *client
		req  *schema.ListWorkRequest
		want []uint64
	}{
		{all, &schema.ListWorkRequest{}, []uint64{4, 5, 6}},
		{all, &schema.ListWorkRequest{Group: "g", PageSize: 1}, []uint64{4, 5, 6}},
		{all, &schema.ListWorkRequest{Session: "b1"}, []uint64{6}},
		{k, &schema.ListWorkRequest{Group: "g", PageSize: 1}, []uint64{4, 5}},
		{k, &schema.ListWorkRequest{Session: "a1", PageSize: 5000}, []uint64{4, 5}},
	} {
		if got := seqs(tt.k, tt.req); !slices.Equal(got, tt.want) {
			w.Errorf("%v: %v, want %v", tt.req, got, tt.want)
		}
	}

	// Dead letters: their envelopes come one by one.
	letters := new(schema.ListDeadLettersResponse)
	w.must(k.call("ListDeadLetters", &schema.ListDeadLettersRequest{}, letters))
	if n := len(letters.GetLetters()); n != 2 || letters.GetLetters()[0].GetReason() != "no such tool" || letters.GetLetters()[0].GetEnvelope() != nil || letters.GetLetters()[0].GetAttempts() != 1 {
		w.Fatalf("dead letters: %v", letters)
	}
	ids := []string{letters.GetLetters()[0].GetId(), letters.GetLetters()[1].GetId()}
	w.must(k.call("ListDeadLetters", &schema.ListDeadLettersRequest{Id: ids[1]}, letters))
	if len(letters.GetLetters()) != 1 || letters.GetLetters()[0].GetEnvelope().GetSeq() != 2 {
		w.Errorf("the dead letter %s: %v", ids[1], letters)
	}
	w.must(all.call("ListDeadLetters", &schema.ListDeadLettersRequest{Session: "b1", Group: "g"}, letters))
	foreign := letters.GetLetters()[0].GetId()

	// Redriven once, however often it is asked.
	driven := new(schema.RedriveResponse)
	w.must(k.call("Redrive", &schema.RedriveRequest{Ids: ids[:1]}, driven))
	if driven.GetRedriven() != 1 || driven.GetBefore() != 0 {
		w.Errorf("redriven: %v", driven)
	}
	w.must(k.call("Redrive", &schema.RedriveRequest{Ids: ids}, driven))
	if driven.GetRedriven() != 1 || driven.GetBefore() != 1 {
		w.Errorf("redriven again: %v", driven)
	}
	w.must(k.call("ListDeadLetters", &schema.ListDeadLettersRequest{}, letters))
	if len(letters.GetLetters()) != 0 {
		w.Errorf("dead letters are left: %v", letters)
	}
	w.must(k.call("ListDeadLetters", &schema.ListDeadLettersRequest{Redriven: true}, letters))
	if len(letters.GetLetters()) != 2 || letters.GetLetters()[0].GetRedriven() == nil {
		w.Errorf("those that were redriven: %v", letters)
	}

	// What is wrong, or not the asker's.
	long := strings.Repeat("x", 201)
	gone := new(schema.DeleteWorkGroupResponse)
	user := w.dial(d, w.token(schema.Role_ROLE_USER, "*"))
	for _, tt := range []struct {
		k        *client
		method   string
		req, res proto.Message
		code     schema.Code
	}{
		{user, "ListWorkGroups", &schema.ListWorkGroupsRequest{}, groups, schema.Code_CODE_FORBIDDEN},
		{user, "ListWork", &schema.ListWorkRequest{}, new(schema.ListWorkResponse), schema.Code_CODE_FORBIDDEN},
		{user, "ListDeadLetters", &schema.ListDeadLettersRequest{}, letters, schema.Code_CODE_FORBIDDEN},
		{user, "Redrive", &schema.RedriveRequest{Ids: ids}, driven, schema.Code_CODE_FORBIDDEN},
		{user, "DeleteWorkGroup", &schema.DeleteWorkGroupRequest{Group: "g"}, gone, schema.Code_CODE_FORBIDDEN},
		{k, "DeleteWorkGroup", &schema.DeleteWorkGroupRequest{Group: "g"}, gone, schema.Code_CODE_FORBIDDEN},
		{all, "DeleteWorkGroup", &schema.DeleteWorkGroupRequest{Group: "nobody"}, gone, schema.Code_CODE_WORK_NOT_FOUND},
		{all, "DeleteWorkGroup", &schema.DeleteWorkGroupRequest{}, gone, schema.Code_CODE_INVALID_MESSAGE},
		{all, "DeleteWorkGroup", &schema.DeleteWorkGroupRequest{Group: long}, gone, schema.Code_CODE_INVALID_MESSAGE},
		{user, "KeepRun", &schema.KeepRunRequest{Session: "a1"}, new(schema.KeepRunResponse), schema.Code_CODE_FORBIDDEN},
		{k, "ListWork", &schema.ListWorkRequest{Session: "b1"}, new(schema.ListWorkResponse), schema.Code_CODE_FORBIDDEN},
		{k, "ListWork", &schema.ListWorkRequest{Group: "nobody"}, new(schema.ListWorkResponse), schema.Code_CODE_WORK_NOT_FOUND},
		{k, "ListWork", &schema.ListWorkRequest{Group: long}, new(schema.ListWorkResponse), schema.Code_CODE_INVALID_MESSAGE},
		{k, "ListDeadLetters", &schema.ListDeadLettersRequest{Session: "b1"}, letters, schema.Code_CODE_FORBIDDEN},
		{k, "ListDeadLetters", &schema.ListDeadLettersRequest{Id: strings.Repeat("x", 1025)}, letters, schema.Code_CODE_INVALID_MESSAGE},
		{k, "ListDeadLetters", &schema.ListDeadLettersRequest{Id: foreign}, letters, schema.Code_CODE_WORK_NOT_FOUND},
		{k, "Redrive", &schema.RedriveRequest{}, driven, schema.Code_CODE_INVALID_MESSAGE},
		{k, "Redrive", &schema.RedriveRequest{Ids: make([]string, 1001)}, driven, schema.Code_CODE_INVALID_MESSAGE},
		{k, "Redrive", &schema.RedriveRequest{Ids: []string{""}}, driven, schema.Code_CODE_INVALID_MESSAGE},
		{k, "Redrive", &schema.RedriveRequest{Ids: []string{foreign}}, driven, schema.Code_CODE_WORK_NOT_FOUND},
		{k, "KeepRun", &schema.KeepRunRequest{Session: "b1"}, new(schema.KeepRunResponse), schema.Code_CODE_FORBIDDEN},
		{k, "KeepRun", &schema.KeepRunRequest{Session: "a1", RunId: long}, new(schema.KeepRunResponse), schema.Code_CODE_INVALID_MESSAGE},
	} {
		w.wantProblem(tt.k.call(tt.method, tt.req, tt.res), tt.code)
	}
	w.wantKept()

	// A group that is deleted is listed no more; its dead letters are.
	w.must(all.call("DeleteWorkGroup", &schema.DeleteWorkGroupRequest{Group: "g"}, gone))
	w.must(all.call("ListWorkGroups", &schema.ListWorkGroupsRequest{}, groups))
	w.must(all.call("ListDeadLetters", &schema.ListDeadLettersRequest{Group: "g"}, letters))
	if len(groups.GetGroups()) != 0 || len(letters.GetLetters()) != 1 {
		w.Errorf("a group was deleted, and there are %v, and %v", groups, letters)
	}
}

// giveUp makes dead letters of a session's items.
func (w *world) giveUp(group, session string, seqs ...uint64) {
	w.Helper()
	k := w.dial(dialects[0], w.token(schema.Role_ROLE_ADMIN, "*"))
	c := k.open("Work", true)
	c.say(clientFrame(&schema.WorkSubscribe{Channel: 1, Group: group, Credit: 100}))
	c.next()
	for _, seq := range seqs {
		w.put(session, seq)
		for {
			items := c.next().GetWork().GetItems()
			for _, it := range items {
				c.say(clientFrame(&schema.WorkTerm{WorkId: it.GetWorkId(), Reason: "no such tool"}))
			}
			if items[len(items)-1].GetEnvelope().GetSeq() == seq {
				break
			}
		}
	}
	synctest.Wait()
	c.cancel()
	synctest.Wait()
	w.queue.Said()
}

// TestKeepRun: a call keeps a run for a minute, and the next call for a minute from then.
func TestKeepRun(t *testing.T) {
	inWorld(t, func(w *world) {
		k := w.dial(dialects[0], w.token(schema.Role_ROLE_AGENT, "*"))
		keep := func(session, run string) {
			w.must(k.call("KeepRun", &schema.KeepRunRequest{Session: session, RunId: run}, new(schema.KeepRunResponse)))
		}
		keep("s", "r")
		keep("s", "")
		w.wantKept("s/", "s/r")
		time.Sleep(40 * time.Second)
		keep("s", "r")
		time.Sleep(40 * time.Second)
		w.wantKept("s/r")
		time.Sleep(20 * time.Second)
		w.wantKept()
		// Not with the connection, but with the edge.
		keep("t", "r")
		k.close()
		w.wantKept("t/r")
		w.must(w.edge.Drain(w.ctx, "It is replaced."))
		w.must(<-w.served)
		close(w.served)
		w.wantKept()
	})
}

// TestKeptRunsAreBounded: beyond the bound a call is refused; what is kept goes on.
func TestKeptRunsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := &counting{}
		l := new(leases)
		for i := range maxKept {
			if err := l.keep(q, schema.SessionID{Tenant: "t", Name: "s"}, fmt.Sprint(i)); err != nil {
				t.Fatal(err)
			}
		}
		id := schema.SessionID{Tenant: "t", Name: "s"}
		if err := l.keep(q, id, "one more"); schema.CodeOf(err) != schema.Code_CODE_LIMIT_EXCEEDED {
			t.Errorf("one more: %v", err)
		}
		if err := l.keep(q, id, "0"); err != nil {
			t.Errorf("one that is kept: %v", err)
		}
		l.end()
		if err := l.keep(q, id, "late"); schema.CodeOf(err) != schema.Code_CODE_GOING_AWAY || q.n != 0 {
			t.Errorf("behind the end: %v, and %d are kept", err, q.n)
		}
	})
}

// counting counts the runs that are kept. It belongs to one goroutine.
type counting struct{ n int }

func (c *counting) KeepRun(schema.SessionID, string) func() {
	c.n++
	return func() { c.n-- }
}
