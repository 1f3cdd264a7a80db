package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"tidemark/internal/client"
	"tidemark/schema"
)

// toil is what is known of the work of a deployment whose processes die.
type toil struct {
	*killing
	standby *killable

	mu sync.Mutex
	// due has the items that were published, by envelope id, with where they are stored; done those that somebody said were done.
	due  map[string]placed
	done map[string]bool
	// runs are the sessions of runs whose agents have gone.
	runs []string
}

// placed is where an envelope is stored.
type placed struct {
	session string
	seq     uint64
}

// TestKillsAtWork is promises I7 and I10 under kill -9, and under SIGSTOP and SIGCONT: node, brokers, edges and workers die while others publish work and begin runs that nobody ends. Every item was done at least once or is a dead letter, of which its session
// was told once; every run has one end.
func TestKillsAtWork(t *testing.T) {
	t.Parallel()
	items, faults := 400, 6
	if os.Getenv("TIDEMARK_SLOW") != "" {
		items, faults = 10_000, 40
	}
	w := newToil(t)
	w.toil(items, func() {
		for i := range faults {
			w.fault(i, 300*time.Millisecond)
		}
	})
}

// fault kills a process, which is down for a while, or, each fifth time, freezes the standby.
func (w *toil) fault(i int, down time.Duration) {
	w.t.Helper()
	w.pause(500 * time.Millisecond)
	if i%5 == 4 {
		w.freezeStandby()
		return
	}
	v := w.all[w.random.IntN(len(w.all))]
	v.kill()
	w.pause(down)
	v.start()
	v.p.awaitReady()
}

func newToil(t *testing.T) *toil {
	t.Helper()
	w := newToilAt(newKilling(t))
	w.node.kill()
	w.node.args = append(w.node.args, "--orphan-after", "2s")
	w.node.start()
	w.node.p.awaitReady()
	password, err := os.ReadFile(passwordFile(w.dir))
	if err != nil {
		t.Fatal(err)
	}
	server := url.URL{Scheme: "nats", Host: w.node.addr, User: url.UserPassword(natsUser, strings.TrimSpace(string(password)))}
	w.startStandby("broker", "--nats", server.String(), "--http", "off", "--broker-name", "standby", "--orphan-after", "2s")
	return w
}

// newToilAt is work at a deployment that is there.
func newToilAt(k *killing) *toil {
	return &toil{killing: k, due: map[string]placed{}, done: map[string]bool{}}
}

// startStandby starts a broker beside the one that is there.
func (w *toil) startStandby(args ...string) {
	w.standby = &killable{k: w.killing, args: args}
	w.all = append(w.all, w.standby)
	w.standby.start()
	w.standby.p.awaitReady()
}

// freezeStandby lets another broker take over from one that is frozen; then there are two.
func (w *toil) freezeStandby() {
	w.t.Helper()
	w.standby.p.freeze()
	w.pass(5 * time.Second) // its leases run out
	w.standby.p.signal(syscall.SIGCONT)
}

// toil lets people of every kind work, and processes die, until all is settled.
func (w *toil) toil(items int, faults func()) {
	w.t.Helper()
	const sessions = 10
	for i := range sessions {
		w.writing.Go(func() { w.publish(fmt.Sprint("toil ", i), items/sessions) })
	}
	for i := range max(items/50, 4) {
		w.runs = append(w.runs, fmt.Sprint("run ", i))
	}
	w.writing.Go(func() { w.agents(w.runs) })
	working, rest := context.WithCancel(w.ctx)
	defer rest()
	ws, grpc := "http://"+w.overWS.addr, "grpc://"+w.overGRPC.addr
	for _, edges := range [][]string{{ws}, {grpc}, {ws, grpc}, {grpc, ws}} {
		seed := w.random.Uint64()
		w.seeing.Go(func() { w.workers(working, rand.New(rand.NewPCG(seed, 1)), edges) })
	}
	w.seeing.Go(func() { w.takers(working) })
	faults()
	w.waitLong("the publishers", &w.writing)
	w.drained()
	rest()
	w.waitLong("the workers", &w.seeing)
	w.audit()
}

// publish puts items into a session.
func (w *toil) publish(session string, n int) {
	var ids []string // of those that are not acknowledged, in their order
	p := w.client(schema.Role_ROLE_AGENT, "http://"+w.overWS.addr, "grpc://"+w.overGRPC.addr).Publisher(w.ctx, client.PublishOptions{
		Session: session, Acked: func(a client.Ack) {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.due[ids[0]] = placed{session, a.First}
			ids = ids[1:]
		},
	})
	for i := range n {
		id := newID()
		w.mu.Lock()
		ids = append(ids, id)
		w.mu.Unlock()
		call := &schema.ToolCall{CallId: fmt.Sprint("c", i), Name: "toil"}
		if err := p.Publish(w.ctx, &schema.Envelope{Id: id, Payload: &schema.Envelope_ToolCall{ToolCall: call}}); err != nil {
			w.fail(err)
			return
		}
	}
	if err := p.Close(w.ctx); err != nil {
		w.fail(err)
	}
}

// agents begin a run in each session, and go.
func (w *toil) agents(sessions []string) {
	for _, session := range sessions {
		p := w.client(schema.Role_ROLE_AGENT, "grpc://"+w.overGRPC.addr, "http://"+w.overWS.addr).Publisher(w.ctx, client.PublishOptions{Session: session})
		err := p.Publish(w.ctx, &schema.Envelope{Payload: &schema.Envelope_StartRun{StartRun: &schema.StartRun{RunId: "r"}}}, spoken(newID(), "m", "working"))
		if err := errors.Join(err, p.Close(w.ctx)); err != nil {
			w.fail(err)
			return
		}
	}
}

// toilGroup is the group of all workers.
const toilGroup = "toilers"

// workers are one worker after the other, each of whom works for a while.
func (w *toil) workers(ctx context.Context, r *rand.Rand, edges []string) {
	for ctx.Err() == nil {
		life, end := context.WithTimeout(ctx, time.Duration(500+r.IntN(3000))*time.Millisecond)
		o := client.WorkOptions{Group: toilGroup, Kinds: []string{"tool_call"}, Credit: 20, AckWait: 2 * time.Second, MaxDeliver: 8}
		var mu sync.Mutex
		draw := func(n int) int {
			mu.Lock()
			defer mu.Unlock()
			return r.IntN(n)
		}
		err := w.client(schema.Role_ROLE_WORKER, edges...).Worker(o, func(ctx context.Context, it *client.Item) error {
			switch draw(20) {
			case 0:
				return client.Later(100*time.Millisecond, "not now")
			case 1:
				return errors.New("it failed")
			case 2:
				if draw(5) == 0 {
					return client.Term("nobody can do this")
				}
			}
			if strings.HasSuffix(it.Envelope.GetToolCall().GetCallId(), "13") {
				return client.Term("nobody ever can")
			}
			w.mu.Lock()
			defer w.mu.Unlock()
			w.done[it.Envelope.GetId()] = true
			return nil
		}).Run(life)
		end()
		if err != nil {
			w.fail(fmt.Errorf("a worker over %v: %w", edges, err))
			return
		}
	}
}

// takers are processes that print what they take, and are killed. They may be the first of the group, and name what it takes as the workers do.
func (w *toil) takers(ctx context.Context) {
	for ctx.Err() == nil {
		p := spawn(w.t, "work", "take", toilGroup, "--kinds", "tool_call", "--data-dir", w.dir, "--edge", "grpc://"+w.overGRPC.addr)
		over := time.NewTimer(2 * time.Second)
		for reading := true; reading; {
			select {
			case line, more := <-p.lines:
				if !more {
					reading = false
					break
				}
				var it struct {
					Envelope struct {
						ID string `json:"id"`
					} `json:"envelope"`
				}
				if json.Unmarshal([]byte(line), &it) != nil || it.Envelope.ID == "" {
					w.fail(fmt.Errorf("a taker printed %q, which is no item", line))
					return
				}
				w.mu.Lock()
				w.done[it.Envelope.ID] = true
				w.mu.Unlock()
			case <-over.C:
				_ = p.cmd.Process.Kill() // it may have ended by itself, with the edge
			case <-ctx.Done():
				_ = p.cmd.Process.Kill()
				for range p.lines {
				}
				reading = false
			}
		}
		over.Stop()
		<-p.ended
		if p.cmd.ProcessState.ExitCode() == exitUsage {
			w.fail(fmt.Errorf("a taker was told what it does not understand: %s", p.err))
			return
		}
	}
}

// pass lets so much time pass.
func (w *toil) pass(d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-w.ctx.Done():
		w.t.Fatal(context.Cause(w.ctx))
	}
}

// waitLong is wait, for what takes longer than patience in the long form.
func (w *toil) waitLong(who string, group *sync.WaitGroup) {
	w.t.Helper()
	over := make(chan struct{})
	go func() {
		defer close(over)
		group.Wait()
	}()
	select {
	case <-over:
	case <-w.ctx.Done():
		w.t.Fatalf("%s do not finish: %v", who, context.Cause(w.ctx))
	}
}

// until waits for something that becomes true by itself.
func (w *toil) until(what func() string, ok func() bool) {
	w.t.Helper()
	look := time.NewTicker(100 * time.Millisecond)
	defer look.Stop()
	for !ok() {
		select {
		case <-look.C:
		case <-w.ctx.Done():
			w.t.Fatalf("%s: %v", what(), context.Cause(w.ctx))
		}
	}
}

// drained waits until all work is settled, and all runs have ended.
func (w *toil) drained() {
	w.t.Helper()
	admin := w.client(schema.Role_ROLE_ADMIN, "grpc://"+w.overGRPC.addr)
	var open string
	w.until(func() string { return "the group still has " + open }, func() bool {
		groups, err := admin.WorkGroups(w.ctx)
		if err != nil {
			return false
		}
		i := slices.IndexFunc(groups, func(g *schema.WorkGroup) bool { return g.GetGroup() == toilGroup })
		if i < 0 {
			return false
		}
		open = groups[i].String()
		return groups[i].GetWaiting() == 0 && groups[i].GetInHand() == 0
	})
	for _, session := range w.runs {
		w.until(func() string { return "the run in " + session + " does not end" }, func() bool {
			s, err := admin.Session(w.ctx, session)
			return err == nil && s.GetStatus() == schema.Status_STATUS_OPEN
		})
	}
}

// said reads a session to its head.
func (w *toil) said(c *client.Client, session string) (all []*schema.Envelope) {
	w.t.Helper()
	s, err := c.Session(w.ctx, session)
	if err != nil {
		w.t.Fatal(err)
	}
	f := c.Follow(client.FollowOptions{Session: session})
	defer f.Close()
	for uint64(len(all)) < s.GetHeadSeq() {
		e, err := f.Next(w.ctx)
		if err != nil {
			w.t.Fatal(err)
		}
		if e.Envelope != nil {
			all = append(all, e.Envelope)
		}
	}
	return all
}

// audit compares what was published with what was done, given up and told.
func (w *toil) audit() {
	w.t.Helper()
	admin := w.client(schema.Role_ROLE_ADMIN, "grpc://"+w.overGRPC.addr)
	dead := map[placed]bool{}
	for token := ""; ; {
		page, err := admin.DeadLetters(w.ctx, &schema.ListDeadLettersRequest{Group: toilGroup, PageSize: 1000, PageToken: token, Redriven: true})
		if err != nil {
			w.t.Fatal(err)
		}
		for _, l := range page.GetLetters() {
			dead[placed{l.GetSession(), l.GetSeq()}] = true
		}
		if token = page.GetNextPageToken(); token == "" {
			break
		}
	}
	told := map[placed]int{}
	sessions := map[string]bool{}
	for _, at := range w.due {
		sessions[at.session] = true
	}
	for session := range sessions {
		for _, e := range w.said(admin, session) {
			if e.GetWorkFailed() != nil {
				told[placed{session, e.GetReplyTo()}]++
			}
		}
	}
	for id, at := range w.due {
		if !w.done[id] && !dead[at] {
			w.t.Errorf("%s, seq %d of %q, was neither done nor given up", id, at.seq, at.session)
		}
	}
	for at, n := range told {
		if n != 1 || !dead[at] {
			w.t.Errorf("session %q was told %d times that seq %d was given up; it is a dead letter: %v", at.session, n, at.seq, dead[at])
		}
	}
	for at := range dead {
		if told[at] != 1 {
			w.t.Errorf("session %q was told %d times of the dead letter of seq %d", at.session, told[at], at.seq)
		}
	}
	if len(dead) == 0 {
		w.t.Error("nothing was given up; the test shows less than it should")
	}
	for _, v := range w.all {
		if strings.Contains(v.p.err.String(), "panic") {
			w.t.Errorf("tidemark %s panicked:\n%s", v.args[0], v.p.err)
		}
	}
	for _, session := range w.runs {
		ends, errs := 0, 0
		for _, e := range w.said(admin, session) {
			if schema.Ended(e.GetRunStatus().GetStatus()) {
				ends++
			}
			if e.GetError().GetCode() == "orphaned" {
				errs++
			}
		}
		if ends != 1 || errs != 1 {
			w.t.Errorf("the run in %q has %d ends, and was called an orphan %d times", session, ends, errs)
		}
	}
	w.t.Logf("%d items, %d done, %d dead letters, %d runs", len(w.due), len(w.done), len(dead), len(w.runs))
}
