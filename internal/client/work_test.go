package client_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"tidemark/broker"
	"tidemark/internal/client"
	"tidemark/schema"
)

// jobs makes tool calls of the session s work, with these seqs.
func (w *world) jobs(seqs ...uint64) {
	for _, seq := range seqs {
		w.queue.Put(schema.SessionID{Tenant: "default", Name: "s"}, &schema.Envelope{Seq: seq, Payload: &schema.Envelope_ToolCall{ToolCall: &schema.ToolCall{CallId: "c", Name: fmt.Sprint("job", seq)}}})
	}
}

// crew is a worker that runs until it is dismissed.
type crew struct {
	w       *world
	worker  *client.Worker
	joined  chan *schema.WorkGroup
	lost    chan error
	dismiss context.CancelFunc
	over    chan error
}

// hire starts a worker and waits until it has joined.
func (w *world) hire(c *client.Client, o client.WorkOptions, do func(context.Context, *client.Item) error) *crew {
	w.Helper()
	k := w.apply(c, o, do)
	<-k.joined
	return k
}

// apply starts a worker.
func (w *world) apply(c *client.Client, o client.WorkOptions, do func(context.Context, *client.Item) error) *crew {
	k := &crew{w: w, joined: make(chan *schema.WorkGroup, 100), lost: make(chan error, 100), over: make(chan error, 1)}
	o.Joined = func(g *schema.WorkGroup) { k.joined <- g }
	o.Lost = func(err error) { k.lost <- err }
	if o.Group == "" {
		o.Group = "tools"
	}
	k.worker = c.Worker(o, do)
	ctx, dismiss := context.WithCancel(w.Context())
	k.dismiss = dismiss
	go func() { k.over <- k.worker.Run(ctx) }()
	return k
}

// end dismisses the worker and wants it to end well.
func (k *crew) end() {
	k.w.Helper()
	k.dismiss()
	k.w.must(<-k.over)
}

func (w *world) wantSaid(want ...string) {
	w.Helper()
	synctest.Wait()
	if got := w.queue.Said(); !slices.Equal(got, want) {
		w.Fatalf("the group heard %q, want %q", got, want)
	}
}

func TestWorkerSettlesAsTheCallbackSays(t *testing.T) {
	inWorld(t, func(w *world) {
		long := strings.Repeat("ü", 600)
		k := w.hire(w.client(nil, "a:1"), client.WorkOptions{Kinds: []string{"tool_call"}, Sessions: []string{"s"}, MaxDeliver: 2, Backoff: []time.Duration{time.Hour}}, func(_ context.Context, it *client.Item) error {
			if it.Session != "s" || it.Epoch != "E" || it.ID == 0 || it.Deadline.Before(time.Now()) || it.Cancelled {
				t.Errorf("the item is %+v", it)
			}
			switch it.Envelope.GetToolCall().GetName() {
			case "job2":
				if it.Attempt == 1 {
					return errors.New("the disk is full")
				}
			case "job3":
				return fmt.Errorf("job3: %w", client.Term("no such tool"))
			case "job4":
				if it.Attempt == 1 {
					return client.Later(time.Minute, "busy")
				}
			case "job5":
				return errors.New(long + "\xff")
			}
			return nil
		})
		w.jobs(1, 2, 3, 4, 5)
		synctest.Wait()
		said := w.queue.Said()
		if len(said) != 5 || !slices.Equal(said[:4], []string{"ack 1", "nack 2: the disk is full", "term 3: no such tool", "nack 4 1m0s: busy"}) || len(said[4]) > len("nack 5: ")+schema.MaxReasonBytes || !strings.HasSuffix(said[4], "ü…") {
			t.Errorf("the group heard %q", said)
		}
		time.Sleep(time.Minute)
		w.wantSaid("ack 4")
		time.Sleep(time.Hour)
		synctest.Wait()
		k.end()
	})
}

// TestWorkerKeepsItsItems: it works on as many at once as its credit allows, and says in progress for each as long as it takes.
func TestWorkerKeepsItsItems(t *testing.T) {
	inWorld(t, func(w *world) {
		var most, now atomic.Int64
		k := w.hire(w.client(nil, "a:1"), client.WorkOptions{Credit: 3, AckWait: 3 * time.Second}, func(ctx context.Context, it *client.Item) error {
			n := now.Add(1)
			defer now.Add(-1)
			for old := most.Load(); n > old && !most.CompareAndSwap(old, n); old = most.Load() {
			}
			if it.Attempt != 1 {
				t.Errorf("%v comes again", it.Envelope)
			}
			time.Sleep(20 * time.Second)
			return ctx.Err()
		})
		w.jobs(1, 2, 3, 4, 5, 6, 7)
		time.Sleep(61 * time.Second)
		k.end()
		acks := 0
		for _, s := range w.queue.Said() {
			if strings.HasPrefix(s, "ack") {
				acks++
			} else if !strings.HasPrefix(s, "in_progress") {
				t.Errorf("the group heard %q", s)
			}
		}
		if acks != 7 || most.Load() != 3 {
			t.Errorf("%d were acknowledged, and %d at once in hand", acks, most.Load())
		}
	})
}

// TestWorkerIsCancelled: a cancel ends the item's context, and whatever the callback then says, nobody does it again.
func TestWorkerIsCancelled(t *testing.T) {
	inWorld(t, func(w *world) {
		causes := make(chan error, 3)
		k := w.hire(w.client(nil, "a:1"), client.WorkOptions{}, func(ctx context.Context, it *client.Item) error {
			<-ctx.Done()
			causes <- context.Cause(ctx)
			return ctx.Err()
		})
		id := schema.SessionID{Tenant: "default", Name: "s"}
		w.jobs(1, 2)
		synctest.Wait()
		w.queue.Cancel(id, 9, "enough")
		for _, says := range []string{"enough", "before"} {
			if err := <-causes; schema.CodeOf(err) != schema.Code_CODE_CANCELLED || !strings.Contains(err.Error(), says) {
				t.Errorf("its context ended with %v", err)
			}
		}
		w.wantSaid("ack 1", "ack 2")
		k.end()
	})
}

// TestWorkerComesBack: a connection that is lost, an edge that dies or goes away: the items' contexts end, others get them, and the worker comes back.
func TestWorkerComesBack(t *testing.T) {
	for name, lose := range map[string]func(*world, *crew){
		"cut":   func(_ *world, k *crew) { k.worker.Cut() },
		"kill":  func(w *world, _ *crew) { w.kill("a:1") },
		"drain": func(w *world, _ *crew) { w.must(w.edges["a:1"].drain(w.Context())) },
		"late": func(w *world, k *crew) {
			w.queue.End("default", "tools", schema.Refuse(schema.Code_CODE_UNAVAILABLE, "The consumer is gone."))
		},
	} {
		t.Run(name, func(t *testing.T) {
			inWorld(t, func(w *world) {
				w.start("b:1")
				var mu sync.Mutex
				done := map[uint64]int{}
				hold := make(chan struct{})
				k := w.hire(w.client(nil, "a:1", "b:1"), client.WorkOptions{Credit: 2}, func(ctx context.Context, it *client.Item) error {
					select {
					case <-hold:
					case <-ctx.Done():
						return ctx.Err()
					}
					mu.Lock()
					defer mu.Unlock()
					done[it.Envelope.GetSeq()]++
					return nil
				})
				w.jobs(1, 2, 3)
				synctest.Wait()
				began := time.Now()
				lose(w, k)
				<-k.joined
				if took := time.Since(began); took > 3*time.Second {
					t.Errorf("it took %s to come back", took)
				}
				if err := <-k.lost; err == nil {
					t.Error("nothing was lost")
				}
				close(hold)
				synctest.Wait()
				k.end()
				for seq := range uint64(3) {
					if done[seq+1] != 1 {
						t.Errorf("done: %v", done)
					}
				}
			})
		})
	}
}

// TestWorkerEnds: told to end, it finishes what is in hand, the answers reach the group, and what it did not finish is with others at once.
func TestWorkerEnds(t *testing.T) {
	inWorld(t, func(w *world) {
		k := w.hire(w.client(nil, "a:1"), client.WorkOptions{Credit: 2}, func(ctx context.Context, it *client.Item) error {
			<-ctx.Done()
			time.Sleep(time.Second) // what has begun is brought to its end
			if it.Envelope.GetSeq() == 1 {
				return nil
			}
			return ctx.Err()
		})
		w.jobs(1, 2, 3)
		synctest.Wait()
		began := time.Now()
		k.end()
		if took := time.Since(began); took != time.Second {
			t.Errorf("it took %s", took)
		}
		said := w.queue.Said()
		slices.Sort(said)
		if want := []string{"ack 1", "back 2", "back 3"}; !slices.Equal(said, want) {
			t.Errorf("the group heard %q, want %q", said, want)
		}
	})
}

// TestWorkerIsRefused: what connecting again does not mend is returned.
func TestWorkerIsRefused(t *testing.T) {
	inWorld(t, func(w *world) {
		never := func(context.Context, *client.Item) error { return nil }
		for _, o := range []client.WorkOptions{{Kinds: []string{"token"}}, {Credit: 5000}, {Sessions: []string{"\xff"}}, {AckWait: time.Millisecond}} {
			if err := <-w.apply(w.client(nil, "a:1"), o, never).over; schema.CodeOf(err) != schema.Code_CODE_INVALID_MESSAGE {
				t.Errorf("%+v: %v", o, err)
			}
		}
		forbidden := w.client(func(c *client.Config) { c.Token = "nonsense" }, "a:1")
		if err := <-w.apply(forbidden, client.WorkOptions{}, never).over; schema.CodeOf(err) != schema.Code_CODE_UNAUTHENTICATED {
			t.Errorf("a token that is none: %v", err)
		}
		w.queue.Refuse = func(broker.WorkOptions) error { return schema.Refuse(schema.Code_CODE_UNAVAILABLE, "NATS is away.") }
		k := w.apply(w.client(nil, "a:1"), client.WorkOptions{}, never)
		for range 3 {
			if err := <-k.lost; schema.CodeOf(err) != schema.Code_CODE_UNAVAILABLE {
				t.Errorf("lost: %v", err)
			}
		}
		k.end()
	})
}

// TestCall asks through a session: the result with its request_id and call_id is the answer, whatever else comes, and over lost connections.
func TestCall(t *testing.T) {
	inWorld(t, func(w *world) {
		w.append("s", "1", "2")
		c := w.client(nil, "a:1")
		calls := c.Follow(client.FollowOptions{Session: "s", Types: []string{"tool_call"}})
		defer calls.Close()
		asked := func() *schema.Envelope {
			for {
				ev, err := calls.Next(w.Context())
				w.must(err)
				if ev.Envelope != nil {
					return ev.Envelope
				}
			}
		}
		answer := c.Publisher(w.Context(), client.PublishOptions{Session: "s"})
		result := func(request, call, json string) {
			w.must(answer.Publish(w.Context(), &schema.Envelope{RequestId: request, Payload: &schema.Envelope_ToolResult{ToolResult: &schema.ToolResult{CallId: call, ResultJson: json}}}))
			w.must(answer.Flush(w.Context()))
		}
		type outcome struct {
			r   *schema.ToolResult
			err error
		}
		call := func(ctx context.Context, m *schema.ToolCall) chan outcome {
			over := make(chan outcome, 1)
			go func() {
				r, err := c.Call(ctx, "s", m)
				over <- outcome{r, err}
			}()
			return over
		}

		mine := &schema.ToolCall{CallId: "c", Name: "ls", ArgumentsJson: "{}"}
		over := call(w.Context(), mine)
		e := asked()
		if e.GetRequestId() == "" || e.GetToolCall().GetName() != "ls" || mine.GetCallId() != "c" {
			t.Errorf("asked with %v", e)
		}
		result("another", "c", `"of another request"`)
		result(e.GetRequestId(), "other", `"of another call"`)
		w.kill("a:1")
		w.start("a:1")
		result(e.GetRequestId(), "c", `["file"]`)
		if o := <-over; o.err != nil || o.r.GetResultJson() != `["file"]` {
			t.Errorf("got %v, %v", o.r, o.err)
		}

		// Without a call_id it has one; a deadline ends the waiting; a cancel, too.
		ctx, stop := context.WithTimeout(w.Context(), time.Minute)
		defer stop()
		over = call(ctx, &schema.ToolCall{Name: "never"})
		if e := asked(); e.GetToolCall().GetCallId() != e.GetRequestId() {
			t.Errorf("asked with %v", e)
		}
		if o := <-over; !errors.Is(o.err, context.DeadlineExceeded) {
			t.Errorf("behind the deadline: %v, %v", o.r, o.err)
		}
		over = call(w.Context(), &schema.ToolCall{Name: "stopped"})
		e = asked()
		w.must(answer.Publish(w.Context(), &schema.Envelope{Payload: &schema.Envelope_Cancel{Cancel: &schema.Cancel{Target: &schema.Cancel_RequestId{RequestId: e.GetRequestId()}, Reason: "enough"}}}))
		if o := <-over; schema.CodeOf(o.err) != schema.Code_CODE_CANCELLED || !strings.Contains(o.err.Error(), "enough") {
			t.Errorf("cancelled: %v, %v", o.r, o.err)
		}
		// So does the cancel of the run in which it was called, not that of another.
		say := func(e *schema.Envelope) {
			w.must(answer.Publish(w.Context(), e))
			w.must(answer.Flush(w.Context()))
		}
		start := func(run string) {
			say(&schema.Envelope{Payload: &schema.Envelope_StartRun{StartRun: &schema.StartRun{RunId: run}}})
		}
		stopRun := func(run string) {
			say(&schema.Envelope{Payload: &schema.Envelope_Cancel{Cancel: &schema.Cancel{Target: &schema.Cancel_RunId{RunId: run}, Reason: "enough of " + run}}})
		}
		start("r")
		over = call(w.Context(), &schema.ToolCall{Name: "stopped"})
		asked()
		stopRun("another")
		stopRun("r")
		if o := <-over; schema.CodeOf(o.err) != schema.Code_CODE_CANCELLED || !strings.Contains(o.err.Error(), "enough of r") {
			t.Errorf("its run was cancelled: %v, %v", o.r, o.err)
		}
		start("s")
		over = call(w.Context(), &schema.ToolCall{CallId: "c", Name: "ls"})
		e = asked()
		start("t")
		stopRun("t")
		result(e.GetRequestId(), "c", `"after all"`)
		if o := <-over; o.err != nil || o.r.GetResultJson() != `"after all"` {
			t.Errorf("another run was cancelled: %v, %v", o.r, o.err)
		}
		if _, err := c.Call(w.Context(), "s", &schema.ToolCall{CallId: strings.Repeat("c", 201)}); schema.CodeOf(err) != schema.Code_CODE_INVALID_MESSAGE {
			t.Errorf("a call_id that is too long: %v", err)
		}
		w.must(answer.Close(w.Context()))
	})
}
