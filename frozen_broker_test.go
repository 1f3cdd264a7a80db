package main

import (
	"context"
	"fmt"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"tidemark/broker"
	"tidemark/internal/natsd"
	"tidemark/schema"
)

// twoBrokers are two brokers as real processes, on a NATS of the test's own, and an edge's log in the test's process.
type twoBrokers struct {
	t             *testing.T
	first, second *proc
	log           *broker.JetStreamLog
	agent         schema.Stamp
}

func newTwoBrokers(t *testing.T) *twoBrokers {
	t.Helper()
	node, err := natsd.Start(natsd.Config{DataDir: t.TempDir(), Durability: schema.Durability_DURABILITY_OS, Listen: "127.0.0.1:0", User: natsUser, Password: "test"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := node.Shutdown(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	url := node.URL()
	start := func(name string) *proc {
		p := serveUntilReady(t, "broker", "--nats", url, "--http", "127.0.0.1:0", "--broker-name", name, "--orphan-after", "2s")
		waitReady(t, name, p.at.HTTP)
		return p
	}
	w := &twoBrokers{t: t, first: start("first"), second: start("second"), agent: schema.NewStamp(&schema.Source{Subject: "agent", Role: schema.Role_ROLE_AGENT})}
	if w.log, err = broker.Open(broker.Config{Server: broker.Server{URL: url, Name: "test"}}); err != nil {
		t.Fatal(err)
	}
	running, stop := context.WithCancel(t.Context())
	over := make(chan error, 1)
	go func() { over <- w.log.Run(running) }()
	t.Cleanup(func() {
		stop()
		if err := <-over; err != nil {
			t.Error(err)
		}
		if err := w.log.Close(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	return w
}

// append stores an envelope of an agent.
func (w *twoBrokers) append(id schema.SessionID, e *schema.Envelope) (seq uint64, err error) {
	a, err := w.agent.AcceptEnvelope(e, time.Now())
	if err != nil {
		return 0, err
	}
	ack, err := broker.Append(w.t.Context(), w.log, id, broker.Submission{Envelopes: []schema.Accepted{a}})
	return ack.First, err
}

// dispatches are what was published as work, and what of it was handed out.
type dispatches struct {
	mu     sync.Mutex
	stored map[placed]time.Time
	handed map[placed]time.Time
	again  []placed // handed out once more
}

// take makes a worker of the group that wants everything. It works until stop is called.
func (d *dispatches) take(t *testing.T, log *broker.JetStreamLog) (stop func()) {
	t.Helper()
	wake := make(chan struct{}, 1)
	worker, err := log.Join(t.Context(), "default", broker.WorkOptions{Group: "all", Credit: 100, AckWait: time.Minute, May: func(string) error { return nil }, Wake: func() {
		select {
		case wake <- struct{}{}:
		default:
		}
	}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var working sync.WaitGroup
	working.Go(func() {
		for {
			select {
			case <-wake:
			case <-ctx.Done():
				return
			}
			for {
				items, err := worker.Take(100)
				if err != nil {
					t.Error(err)
					return
				}
				if len(items) == 0 {
					break
				}
				for _, i := range items {
					e := new(schema.Envelope)
					if err := proto.Unmarshal(i.Envelope, e); err != nil {
						t.Error(err)
					}
					d.handOut(placed{i.Session.Name, e.GetSeq()})
					worker.Ack(i.ID)
				}
			}
		}
	})
	return func() {
		cancel()
		working.Wait()
		worker.Close()
	}
}

func (d *dispatches) handOut(at placed) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, before := d.handed[at]; before {
		d.again = append(d.again, at)
		return
	}
	d.handed[at] = time.Now()
}

func (d *dispatches) store(at placed) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.stored[at] = time.Now()
}

// since says in how many sessions something was handed out that was stored after the moment, and how long the slowest of it took.
func (d *dispatches) since(moment time.Time) (sessions int, slowest time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	seen := map[string]bool{}
	for at, handed := range d.handed {
		if stored, known := d.stored[at]; known && stored.After(moment) {
			seen[at.session] = true
			slowest = max(slowest, handed.Sub(stored))
		}
	}
	return len(seen), slowest
}

func (d *dispatches) missing() (n int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for at := range d.stored {
		if _, handed := d.handed[at]; !handed {
			n++
		}
	}
	return n
}

// TestI7_FrozenBroker is two brokers as real processes that are stopped one after the other while work is published, and go on when the other has taken over: every item is dispatched, and once.
func TestI7_FrozenBroker(t *testing.T) {
	t.Parallel()
	w := newTwoBrokers(t)
	d := &dispatches{stored: map[placed]time.Time{}, handed: map[placed]time.Time{}}
	defer d.take(t, w.log)()
	const sessions = 12
	publishing, enough := context.WithCancel(t.Context())
	defer enough()
	var publishers sync.WaitGroup
	for i := range sessions {
		publishers.Go(func() {
			session := fmt.Sprint("s", i)
			tick := time.NewTicker(10 * time.Millisecond)
			defer tick.Stop()
			for publishing.Err() == nil {
				seq, err := w.append(schema.SessionID{Tenant: "default", Name: session}, &schema.Envelope{Payload: &schema.Envelope_ToolCall{ToolCall: &schema.ToolCall{CallId: "c", Name: "toil"}}})
				if err != nil {
					t.Error(err)
					return
				}
				d.store(placed{session, seq})
				<-tick.C
			}
		})
	}
	flows := func(since time.Time) func() bool {
		return func() bool {
			n, _ := d.since(since)
			return n == sessions
		}
	}
	waitFor(t, "work in every session", flows(time.Time{}))
	for _, b := range []struct {
		name string
		*proc
	}{{"first", w.first}, {"second", w.second}} {
		b.freeze()
		frozen := time.Now()
		waitFor(t, "the other broker to dispatch", flows(frozen))
		b.signal(syscall.SIGCONT)
		_, slowest := d.since(frozen)
		t.Logf("while the %s broker was frozen, an item took up to %s", b.name, slowest.Round(time.Millisecond))
		// The second had taken over all that the first had.
		if b.proc == w.second && slowest < time.Second {
			t.Errorf("the broker that was frozen had nothing to do: no item took longer than %s", slowest)
		}
		waitFor(t, "work in every session, with both brokers", flows(time.Now()))
	}
	enough()
	publishers.Wait()
	waitFor(t, "all that was published", func() bool { return d.missing() == 0 })
	time.Sleep(time.Second) // whatever the one that was frozen last still has to say
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.again) > 0 || len(d.handed) != len(d.stored) {
		t.Errorf("of %d items %d were handed out; again: %v", len(d.stored), len(d.handed), d.again)
	}
	w.first.stop()
	w.second.stop()
}

// TestI10_FrozenBroker is two brokers as real processes, of which the one at work is stopped in the middle of its verdicts on many runs, and goes on when the other has given its own: each run is failed once, each question answered once.
func TestI10_FrozenBroker(t *testing.T) {
	t.Parallel()
	w := newTwoBrokers(t)
	const n = 60
	id := func(what string, i int) schema.SessionID {
		return schema.SessionID{Tenant: "default", Name: fmt.Sprint(what, i)}
	}
	say := func(id schema.SessionID, e *schema.Envelope) {
		t.Helper()
		if _, err := w.append(id, e); err != nil {
			t.Fatal(err)
		}
	}
	began := time.Now()
	for i := range n {
		say(id("run", i), &schema.Envelope{Payload: &schema.Envelope_StartRun{StartRun: &schema.StartRun{RunId: "r"}}})
		// All absences count from some 10 s after the broker's start, and end together.
		say(id("question", i), &schema.Envelope{Payload: &schema.Envelope_WaitingForInput{WaitingForInput: &schema.WaitingForInput{
			Prompt: "Go on?", Deadline: timestamppb.New(began.Add(11 * time.Second)), DefaultJson: `"yes"`,
		}}})
	}
	// said counts what Tidemark itself has said in the session.
	said := func(id schema.SessionID) (orphaned, failed, answered int) {
		t.Helper()
		s, err := w.log.Session(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		f, err := w.log.Follow(t.Context(), id, broker.FollowOptions{})
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		for f.Cursor().Seq < s.GetHeadSeq() {
			b, err := f.Next(t.Context(), 1<<20)
			if err != nil {
				t.Fatal(err)
			}
			for _, v := range b.Views {
				for _, raw := range v.Each() {
					e := new(schema.Envelope)
					if err := proto.Unmarshal(raw, e); err != nil {
						t.Fatal(err)
					}
					switch {
					case e.GetSource().GetRole() != schema.Role_ROLE_SYSTEM:
					case e.GetError().GetCode() == "orphaned":
						orphaned++
					case e.GetRunStatus().GetStatus() == schema.Status_STATUS_FAILED:
						failed++
					case e.GetUserInput() != nil:
						answered++
					}
				}
			}
		}
		return orphaned, failed, answered
	}
	ended := func() (runs, questions int) {
		for i := range n {
			if orphaned, _, _ := said(id("run", i)); orphaned > 0 {
				runs++
			}
			if _, _, answered := said(id("question", i)); answered > 0 {
				questions++
			}
		}
		return runs, questions
	}
	waitFor(t, "the first verdict", func() bool {
		for i := range n {
			if orphaned, _, _ := said(id("run", i)); orphaned > 0 {
				return true
			}
		}
		return false
	})
	w.first.freeze()
	runs, questions := ended()
	t.Logf("%s after the first run began, the broker is frozen with %d runs of %d failed and %d questions answered", time.Since(began).Round(time.Millisecond), runs, n, questions)
	waitFor(t, "the other broker to give its verdicts", func() bool {
		runs, questions := ended()
		return runs == n && questions == n
	})
	t.Logf("all have ended after %s", time.Since(began).Round(time.Millisecond))
	w.first.signal(syscall.SIGCONT)
	time.Sleep(5 * time.Second) // whatever it still has to say
	for i := range n {
		if orphaned, failed, answered := said(id("run", i)); orphaned != 1 || failed != 1 || answered != 0 {
			t.Errorf("run %d: %d times an orphan, %d times failed, %d answers", i, orphaned, failed, answered)
		}
		if orphaned, failed, answered := said(id("question", i)); answered != 1 || orphaned > 1 || failed > 1 {
			t.Errorf("question %d: %d times an orphan, %d times failed, %d answers", i, orphaned, failed, answered)
		}
	}
	w.first.stop()
	w.second.stop()
}
