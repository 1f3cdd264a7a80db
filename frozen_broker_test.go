package main

import (
	"context"
	"fmt"
	"syscall"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"tidemark/broker"
	"tidemark/internal/natsd"
	"tidemark/schema"
)

// TestI10_FrozenBroker is two brokers as real processes, of which the one at work is stopped in the middle of its verdicts on many runs, and goes on when the other has given its own: each run is failed once, each question answered once.
func TestI10_FrozenBroker(t *testing.T) {
	t.Parallel()
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
	first := start("first")
	second := start("second")

	log, err := broker.Open(broker.Config{Server: broker.Server{URL: url, Name: "test"}})
	if err != nil {
		t.Fatal(err)
	}
	running, stop := context.WithCancel(t.Context())
	over := make(chan error, 1)
	go func() { over <- log.Run(running) }()
	t.Cleanup(func() {
		stop()
		if err := <-over; err != nil {
			t.Error(err)
		}
		if err := log.Close(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	const n = 60
	id := func(what string, i int) schema.SessionID {
		return schema.SessionID{Tenant: "default", Name: fmt.Sprint(what, i)}
	}
	agent := schema.NewStamp(&schema.Source{Subject: "agent", Role: schema.Role_ROLE_AGENT})
	say := func(id schema.SessionID, payload *schema.Envelope) {
		t.Helper()
		a, err := agent.AcceptEnvelope(payload, time.Now())
		if err == nil {
			_, err = broker.Append(t.Context(), log, id, broker.Submission{Envelopes: []schema.Accepted{a}})
		}
		if err != nil {
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
		s, err := log.Session(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		f, err := log.Follow(t.Context(), id, broker.FollowOptions{})
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
	first.signal(syscall.SIGSTOP)
	runs, questions := ended()
	t.Logf("%s after the first run began, the broker is frozen with %d runs of %d failed and %d questions answered", time.Since(began).Round(time.Millisecond), runs, n, questions)
	waitFor(t, "the other broker to give its verdicts", func() bool {
		runs, questions := ended()
		return runs == n && questions == n
	})
	t.Logf("all have ended after %s", time.Since(began).Round(time.Millisecond))
	first.signal(syscall.SIGCONT)
	time.Sleep(5 * time.Second) // whatever it still has to say
	for i := range n {
		if orphaned, failed, answered := said(id("run", i)); orphaned != 1 || failed != 1 || answered != 0 {
			t.Errorf("run %d: %d times an orphan, %d times failed, %d answers", i, orphaned, failed, answered)
		}
		if orphaned, failed, answered := said(id("question", i)); answered != 1 || orphaned > 1 || failed > 1 {
			t.Errorf("question %d: %d times an orphan, %d times failed, %d answers", i, orphaned, failed, answered)
		}
	}
	first.stop()
	second.stop()
}
