package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"tidemark/broker"
	"tidemark/broker/worktest"
	"tidemark/edge-grpc"
	"tidemark/internal/auth"
	"tidemark/internal/gateway"
	"tidemark/schema"
)

// workshop is a gRPC edge over work in memory, and what the command line needs to reach it.
func workshop(t *testing.T) (q *worktest.Queue, vars map[string]string) {
	t.Helper()
	q = new(worktest.Queue)
	secret := []byte("a secret that only this test knows, long enough")
	v, err := auth.NewVerifier(auth.Config{Secret: secret})
	if err != nil {
		t.Fatal(err)
	}
	log := broker.NewMemoryLog()
	g, err := gateway.New(gateway.Config{Log: log, Work: q, Runs: q, Verify: v.Verify})
	if err != nil {
		t.Fatal(err)
	}
	e, err := edgegrpc.New(edgegrpc.Config{Gateway: g, Log: log, Work: q, Runs: q, Verify: v.Verify})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- e.Serve(ctx, l) }()
	t.Cleanup(func() {
		stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	token, err := auth.Mint(secret, auth.Principal{Subject: "s", Role: schema.Role_ROLE_ADMIN, Sessions: []string{"*"}}, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	return q, map[string]string{"TIDEMARK_EDGE": "grpc://" + l.Addr().String(), "TIDEMARK_TOKEN": token}
}

// job makes a tool call of a session work, in all groups that are there.
func job(q *worktest.Queue, session string, seq uint64) {
	q.Put(schema.SessionID{Tenant: "default", Name: session}, &schema.Envelope{Seq: seq, Payload: &schema.Envelope_ToolCall{ToolCall: &schema.ToolCall{CallId: "c", ArgumentsJson: `{"n": 1.50}`}}})
}

func TestWorkFromTheCommandLine(t *testing.T) {
	q, vars := workshop(t)
	here := func(args ...string) result {
		t.Helper()
		return tidemark(t, vars, append([]string{"work"}, args...)...)
	}
	// A group that is there, with one item given up and two that wait.
	join := broker.WorkOptions{Group: "to\tols", Kinds: []schema.Kind{schema.KindToolCall}, Backoff: []time.Duration{time.Second, time.Minute}, May: func(string) error { return nil }}
	w, err := q.Join(t.Context(), "default", join)
	if err != nil {
		t.Fatal(err)
	}
	job(q, "s", 1)
	items, err := w.Take(1)
	if err != nil || len(items) != 1 || !w.Term(items[0].ID, "no such\x1b[2J tool") {
		t.Fatalf("took %v, %v", items, err)
	}
	w.Close()
	job(q, "s", 2)
	job(q, "t", 3)

	if r := here("groups").must(t); !strings.HasPrefix(r.out, "GROUP ") || !strings.Contains(r.out, `"to\tols"  tool_call  *         2        0        0            30s       5            1s,1m0s  no `) {
		t.Errorf("the groups are\n%s", r.out)
	}
	if r := here("groups", "--json").must(t); json.Unmarshal([]byte(r.out), new(map[string]any)) != nil || !strings.Contains(strings.ReplaceAll(r.out, " ", ""), `"max_deliver":5`) {
		t.Errorf("in JSON the groups are %s", r.out)
	}
	if r := here("ls", "to\tols").must(t); strings.Count(r.out, "\n") != 3 || !strings.Contains(r.out, "s        2    tool_call  waiting  ") {
		t.Errorf("the work is\n%s", r.out)
	}
	if r := here("ls", "--session", "t").must(t); strings.Count(r.out, "\n") != 2 || !strings.Contains(r.out, "tool_call  -  ") {
		t.Errorf("the work of t is\n%s", r.out)
	}
	if r := here("ls", "--limit", "1").must(t); strings.Count(r.out, "\n") != 2 || !strings.Contains(r.err, "more than 1") {
		t.Errorf("one item: %s%s", r.out, r.err)
	}
	if r := here("ls", "nobody"); r.code != exitFailed || !strings.Contains(r.err, "work_not_found") {
		t.Errorf("a group that is not there: %d %s", r.code, r.err)
	}
	if r := here("dead").must(t); !strings.Contains(r.out, `1   "to\tols"  s        1    tool_call  1 `) || !strings.Contains(r.out, `"no such\x1b[2J tool"`) {
		t.Errorf("the dead letters are\n%s", r.out)
	}
	if r := here("dead", "--id", "1", "--json").must(t); !strings.Contains(r.out, `"envelope"`) {
		t.Errorf("the dead letter is %s", r.out)
	}

	if r := here("redrive"); r.code != exitUsage {
		t.Errorf("nothing to redrive: %d %s", r.code, r.err)
	}
	if r := here("redrive", "7"); r.code != exitFailed || !strings.Contains(r.err, "work_not_found") {
		t.Errorf("a dead letter that is not there: %d %s", r.code, r.err)
	}
	if r := here("redrive", "1", "7"); r.code != exitFailed || r.out != "" || !strings.Contains(r.err, `"7", so none`) {
		t.Errorf("one that is there and one that is not: %d %s%s", r.code, r.out, r.err)
	}
	if r := here("redrive", "--group", "to\tols").must(t); r.out != "redriven: 1\n" {
		t.Errorf("redriven: %s", r.out)
	}
	if r := here("redrive", "1").must(t); r.out != "redriven: 0\nredriven before: 1\n" {
		t.Errorf("redriven again: %s", r.out)
	}
	// Two parts, the second of which fails: the sums are of the first.
	if r := here(slices.Concat([]string{"redrive"}, slices.Repeat([]string{"1"}, redriveAtOnce), []string{"7"})...); r.code != exitFailed || r.out != fmt.Sprintf("redriven: 0\nredriven before: %d\n", redriveAtOnce) || !strings.Contains(r.err, "1 of the dead letters") {
		t.Errorf("a second part that fails: %d %s%s", r.code, r.out, r.err)
	}
	if r := here("dead").must(t); r.out != "" {
		t.Errorf("dead letters are left:\n%s", r.out)
	}

	// A group without dead letters is one thing, and one that is not there another.
	if r := here("dead", "to\tols").must(t); r.out != "" {
		t.Errorf("dead letters of the group are left:\n%s", r.out)
	}
	if r := here("redrive", "--group", "to\tols").must(t); r.out != "redriven: 0\n" {
		t.Errorf("redriven without a dead letter: %s", r.out)
	}
	for _, args := range [][]string{{"dead", "nobody"}, {"redrive", "--group", "nobody"}} {
		if r := here(args...); r.code != exitFailed || r.out != "" || !strings.Contains(r.err, "nobody") || !strings.Contains(r.err, "work_not_found") {
			t.Errorf("%v of a group that is not there: %d %s%s", args, r.code, r.out, r.err)
		}
	}

	// Taken one by one, printed and then acknowledged.
	q.Said()
	r := here("take", "to\tols", "--limit", "3").must(t)
	var seqs []uint64
	for line := range strings.Lines(r.out) {
		var it struct {
			Session, Epoch string
			Attempt        int
			Envelope       json.RawMessage
		}
		if err := json.Unmarshal([]byte(line), &it); err != nil || it.Epoch != "E" || it.Attempt != 1 || !strings.Contains(line, `{"n": 1.50}`) {
			t.Errorf("a line is %s: %v", line, err)
		}
		e, err := schema.ParseJSON(it.Envelope)
		if err != nil {
			t.Errorf("%s: %v", line, err)
		}
		seqs = append(seqs, e.GetSeq())
	}
	if want := []string{"ack 2", "ack 3", "ack 1"}; !slices.Equal(seqs, []uint64{2, 3, 1}) || !slices.Equal(q.Said(), want) {
		t.Errorf("taken: %v", seqs)
	}
	if r := here("take", "to\tols", "--kinds", "user_message"); r.code != exitFailed || !strings.Contains(r.err, "takes tool_call of all sessions. What a group takes can be widened") {
		t.Errorf("a group that takes something else: %d %s", r.code, r.err)
	}
	if r := here("rm", "nobody"); r.code != exitFailed || !strings.Contains(r.err, "work_not_found") {
		t.Errorf("a group that is not there is removed: %d %s", r.code, r.err)
	}
	if r := here("rm", "to\tols").must(t); r.out != "removed group \"to\\tols\"\n" {
		t.Errorf("removed: %s", r.out)
	}
	if r := here("groups").must(t); r.out != "" {
		t.Errorf("groups are left:\n%s", r.out)
	}
	if r := here("take", strings.Repeat("g", 201)); r.code != exitFailed || !strings.Contains(r.err, "201 bytes") {
		t.Errorf("a name that is too long: %d %s", r.code, r.err)
	}
}

// TestWorkIsTakenAsWanted: the flags reach the group, and of what is in hand beside the last item that was wanted nothing is printed, and all goes back.
func TestWorkIsTakenAsWanted(t *testing.T) {
	q, vars := workshop(t)
	take := func(args ...string) result {
		return tidemark(t, vars, append([]string{"work", "take", "g"}, args...)...)
	}
	w, err := q.Join(t.Context(), "default", broker.WorkOptions{Group: "g", May: func(string) error { return nil }})
	if err != nil {
		t.Fatal(err)
	}
	w.Close()
	for seq := range uint64(6) {
		job(q, "s", seq+1)
	}
	if r := take("--credit", "4", "--backoff", "1s,1m", "--limit", "2").must(t); strings.Count(r.out, "\n") != 2 {
		t.Errorf("taken:\n%s", r.out)
	}
	acked, back := 0, 0
	for _, said := range q.Said() {
		if strings.HasPrefix(said, "ack") {
			acked++
		} else if strings.HasPrefix(said, "back") {
			back++
		}
	}
	if acked != 2 || back < 2 {
		t.Errorf("%d were acknowledged, and %d went back", acked, back)
	}
	groups, err := q.Groups(t.Context(), "default")
	if err != nil || len(groups) != 1 || !slices.Equal(groups[0].GetBackoffMs(), []uint64{1000, 60_000}) {
		t.Errorf("the groups are %v, %v", groups, err)
	}
	if r := take("--credit", "5000"); r.code != exitFailed || !strings.Contains(r.err, "5000") {
		t.Errorf("a credit that is too much: %d %s", r.code, r.err)
	}
}

// TestEdgeOutOfReach: who names an edge that is not there, or does not do it, is told that in words of their own.
func TestEdgeOutOfReach(t *testing.T) {
	for edge, says := range map[string]string{
		"grpc://127.0.0.1:1": "The edge grpc://127.0.0.1:1 cannot be reached; check that it is running and its address. (unavailable): dial tcp 127.0.0.1:1: connect: connection refused\n",
		"http://127.0.0.1:1": "name one as grpc://HOST:PORT.",
	} {
		r := tidemark(t, map[string]string{"TIDEMARK_TOKEN": "x"}, "work", "groups", "--edge", edge)
		if r.code != exitFailed || !strings.Contains(r.err, says) || strings.Contains(r.err, "rpc error") {
			t.Errorf("%s: %d %s", edge, r.code, r.err)
		}
	}
	if help := tidemark(t, nil, "work", "dead", "--help").must(t).out; strings.Contains(help, "http://") {
		t.Errorf("the help names an edge that does not do it:\n%s", help)
	}
	if help := tidemark(t, nil, "work", "take", "--help").must(t).out; !strings.Contains(help, "http://") {
		t.Errorf("the help names no edge with a WebSocket:\n%s", help)
	}
}

// broken is an output that nobody reads any more.
type broken struct{}

func (broken) Write([]byte) (int, error) { return 0, fmt.Errorf("the pipe is broken") }

// TestWorkIsNotTakenInVain: what could not be printed goes back.
func TestWorkIsNotTakenInVain(t *testing.T) {
	q, vars := workshop(t)
	w, err := q.Join(t.Context(), "default", broker.WorkOptions{Group: "g", May: func(string) error { return nil }})
	if err != nil {
		t.Fatal(err)
	}
	w.Close()
	job(q, "s", 1)
	var errs lockedBuffer
	env := &environment{stdin: strings.NewReader(""), stdout: broken{}, stderr: &errs, program: "tidemark", lookup: func(name string) (string, bool) { v, ok := vars[name]; return v, ok }}
	if code := run(t.Context(), env, []string{"work", "take", "g"}); code != exitFailed || !strings.Contains(errs.String(), "the output is gone: the pipe is broken") {
		t.Errorf("exit code %d: %s", code, &errs)
	}
	if said := q.Said(); !slices.Equal(said, []string{"back 1"}) {
		t.Errorf("the group heard %q", said)
	}
}
