package world

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"tidemark/broker"
	"tidemark/internal/auth"
	"tidemark/schema"
)

// acking acknowledges every batch at once.
func acking(t *Tailer, r *schema.TailResponse) {
	if b := r.GetBatch(); b != nil {
		_ = t.Ack(b.GetPartition(), b.GetThrough()) // the test may be over
	}
}

// say publishes texts to a session and waits until they are stored.
func (w *World) say(session string, texts ...string) {
	w.t.Helper()
	x := w.Write(session, WriterOptions{})
	for _, text := range texts {
		x.Send(Token(text))
	}
	x.Flush()
	x.Stop()
}

// TestTail_OneMemberReadsAllSessions: one member has all partitions, gets every session of its tenant from the beginning, live as it is stored, and after it has left another goes on where it ended.
func TestTail_OneMemberReadsAllSessions(t *testing.T) {
	Run(t, Config{Streams: 4}, func(w *World) {
		for i := range 20 {
			w.say(fmt.Sprint("s", i), "a", "b")
		}
		a := w.Tail(w.Edge(0), "", &schema.TailOpen{Group: "g"}, acking)
		all := func(x *Tailer, want string) func() bool {
			return func() bool {
				texts := x.Texts()
				for i := range 20 {
					if texts[fmt.Sprint("s", i)] != want {
						return false
					}
				}
				return true
			}
		}
		w.Until("everything is tailed", all(a, "ab"))
		if got := a.Partitions(); len(got) != 4 {
			t.Errorf("the only member has the partitions %v", got)
		}
		began := time.Now()
		w.say("s0", "c")
		w.Until("what is stored now is tailed", func() bool { return a.Texts()["s0"] == "abc" })
		if took := time.Since(began); took > 50*time.Millisecond {
			t.Errorf("an envelope came after %s", took)
		}
		if end := a.Leave(); end.Status != 0 {
			t.Errorf("who left in good order was told %s", end)
		}
		b := w.Tail(w.Edge(1), "", &schema.TailOpen{Group: "g"}, acking)
		for i := range 20 {
			w.say(fmt.Sprint("s", i), "d")
		}
		w.Until("the next member goes on", all(b, "d"))
		other := w.Tail(w.Edge(1), "", &schema.TailOpen{Group: "h"}, acking)
		w.Until("another group begins at the beginning", func() bool { return other.Texts()["s0"] == "abcd" && other.Texts()["s1"] == "abd" })
	})
}

// TestTail_FiltersAndTenants: prefix and types are kept to, another tenant's sessions are never seen, and what is filtered out moves the checkpoint all the same.
func TestTail_FiltersAndTenants(t *testing.T) {
	Run(t, Config{}, func(w *World) {
		theirs := w.Tail(w.Edge(0), w.tokenOf("other", "eve", schema.Role_ROLE_ANALYST, "*"), &schema.TailOpen{Group: "g"}, acking)
		chats := w.Tail(w.Edge(0), "", &schema.TailOpen{Group: "g", SessionPrefix: "chat-", Types: []string{"user_message"}}, acking)
		for i := range 30 {
			name := fmt.Sprintf("%s-%d", []string{"chat", "job"}[i%2], i)
			p := w.Join(w.Edge(1), GRPC, name)
			p.Put(name, UserMessage("m"), Token("t"))
			p.Cut()
		}
		w.Until("the chats are tailed", func() bool { return len(chats.Texts()) == 15 })
		for name, text := range chats.Texts() {
			if name[:5] != "chat-" || text != "m" {
				t.Errorf("of session %q came %q", name, text)
			}
		}
		w.Sleep(2 * time.Second)
		if got := theirs.Texts(); len(got) != 0 {
			t.Errorf("another tenant saw %v", got)
		}
		// Everything is done with, so that a new member of either group begins at the end.
		for _, x := range []struct {
			was   *Tailer
			token string
		}{{theirs, w.tokenOf("other", "eve", schema.Role_ROLE_ANALYST, "*")}, {chats, ""}} {
			x.was.Leave()
			again := w.Tail(w.Edge(1), x.token, &schema.TailOpen{Group: "g"}, acking)
			w.Until("it has its partitions", func() bool { return len(again.Partitions()) == 2 })
			w.Sleep(time.Second)
			if got := again.Texts(); len(got) != 0 {
				t.Errorf("what had been filtered out came again: %v", got)
			}
		}
	})
}

// TestTail_Starts: a new group begins at the beginning, now or at a time, for all partitions alike, and only its first member says so.
func TestTail_Starts(t *testing.T) {
	Run(t, Config{Streams: 4}, func(w *World) {
		const n = 12
		round := func(text string) {
			for i := range n {
				w.say(fmt.Sprint("s", i), text)
			}
		}
		round("a")
		w.Sleep(10 * time.Second)
		middle := time.Now()
		w.Sleep(10 * time.Second)
		round("b")
		now := w.Tail(w.Edge(0), "", &schema.TailOpen{Group: "now", Start: &schema.TailOpen_Now{Now: true}}, acking)
		w.Until("it is a member", func() bool { return now.Partitions() != nil })
		since := w.Tail(w.Edge(0), "", &schema.TailOpen{Group: "since", Start: &schema.TailOpen_Since{Since: timestamppb.New(middle)}}, acking)
		beginning := w.Tail(w.Edge(0), "", &schema.TailOpen{Group: "beginning"}, acking)
		w.Until("they are members", func() bool { return since.Partitions() != nil && beginning.Partitions() != nil })
		second := w.Tail(w.Edge(1), "", &schema.TailOpen{Group: "now"}, acking)
		w.Sleep(5 * time.Second)
		round("c")
		w.Sleep(5 * time.Second)
		for what, x := range map[string]struct {
			texts []map[string]string
			want  string
		}{
			"now":       {[]map[string]string{now.Texts(), second.Texts()}, "c"},
			"since":     {[]map[string]string{since.Texts()}, "bc"},
			"beginning": {[]map[string]string{beginning.Texts()}, "abc"},
		} {
			for i := range n {
				var got strings.Builder
				for _, texts := range x.texts {
					got.WriteString(texts[fmt.Sprint("s", i)])
				}
				if got.String() != x.want {
					t.Errorf("%s: of session s%d came %q, want %q", what, i, got.String(), x.want)
				}
			}
		}
		if len(second.Texts()) == 0 || len(now.Texts()) == 0 {
			t.Error("the members of one group do not share its load")
		}
	})
}

// TestTail_Refusals: who may not read all of it, or asks for what there is not, is told so.
func TestTail_Refusals(t *testing.T) {
	Run(t, Config{Edges: 1}, func(w *World) {
		for what, x := range map[string]struct {
			token string
			open  *schema.TailOpen
			want  schema.Code
		}{
			"sessions beyond the token's": {w.Token(schema.Role_ROLE_ANALYST, "chat-*", "one"), &schema.TailOpen{Group: "g"}, schema.Code_CODE_FORBIDDEN},
			"one session is no prefix":    {w.Token(schema.Role_ROLE_ANALYST, "one"), &schema.TailOpen{Group: "g", SessionPrefix: "one"}, schema.Code_CODE_FORBIDDEN},
			"a shorter prefix":            {w.Token(schema.Role_ROLE_ANALYST, "chat-*"), &schema.TailOpen{Group: "g", SessionPrefix: "chat"}, schema.Code_CODE_FORBIDDEN},
			"no group":                    {"", &schema.TailOpen{}, schema.Code_CODE_INVALID_MESSAGE},
			"an unknown type":             {"", &schema.TailOpen{Group: "g", Types: []string{"tokens"}}, schema.Code_CODE_UNKNOWN_TYPE},
			"too many types":              {"", &schema.TailOpen{Group: "g", Types: slices.Repeat([]string{"token"}, 33)}, schema.Code_CODE_INVALID_MESSAGE},
			"no open":                     {"", nil, schema.Code_CODE_INVALID_MESSAGE},
			"not a token":                 {"x", &schema.TailOpen{Group: "g"}, schema.Code_CODE_UNAUTHENTICATED},
		} {
			if end := w.Tail(w.Edge(0), x.token, x.open, nil).Ended(); end.Code != x.want {
				t.Errorf("%s: %s, want %s", what, end, x.want.Word())
			}
		}
		ok := w.Tail(w.Edge(0), w.Token(schema.Role_ROLE_ANALYST, "chat-*"), &schema.TailOpen{Group: "g", SessionPrefix: "chat-1"}, nil)
		w.Until("a longer prefix is", func() bool { return len(ok.Partitions()) == 2 })
		w.must(ok.Ack(2, 1))
		if end := ok.Ended(); end.Code != schema.Code_CODE_INVALID_MESSAGE {
			t.Errorf("an acknowledgement of a partition that is not there: %s", end)
		}
	})
}

// TestTail_Draining: a drained edge tells its members to go, and their partitions are free at once; a token's end ends a tail.
func TestTail_Draining(t *testing.T) {
	Run(t, Config{}, func(w *World) {
		a := w.Tail(w.Edge(0), "", &schema.TailOpen{Group: "g"}, acking)
		token, err := auth.Mint(secret, auth.Principal{Subject: "ana", Role: schema.Role_ROLE_ANALYST, Sessions: []string{"*"}}, time.Minute)
		w.must(err)
		b := w.Tail(w.Edge(1), token, &schema.TailOpen{Group: "g"}, acking)
		w.Until("they share", func() bool { return len(a.Partitions()) == 1 && len(b.Partitions()) == 1 })
		began := time.Now()
		w.DrainEdge(w.Edge(0), "A deployment.")
		if end := a.Ended(); end.Code != schema.Code_CODE_GOING_AWAY {
			t.Errorf("the member was told %s", end)
		}
		w.Until("the other has all", func() bool { return len(b.Partitions()) == 2 })
		if took := time.Since(began); took > 3*time.Second {
			t.Errorf("the partitions were free after %s", took)
		}
		w.Sleep(90 * time.Second)
		if end := b.Ended(); end.Code != schema.Code_CODE_TOKEN_EXPIRED {
			t.Errorf("later it was told %s", end)
		}
	})
}

// TestTail_ClosedWithItsLog: a log that is closed waits until its members have left in good order, and lets no other in.
func TestTail_ClosedWithItsLog(t *testing.T) {
	Run(t, Config{}, func(w *World) {
		log, ctx := w.Edge(0).Log, w.t.Context()
		m, err := log.Tail(ctx, Session("").Tenant, broker.TailOptions{Group: "g"})
		w.must(err)
		for n := 0; n < 2; {
			e, err := m.Next(ctx)
			w.must(err)
			n = len(e.Partitions)
		}
		w.must(log.Close(ctx))
		if e, err := m.Next(ctx); schema.CodeOf(err) != schema.Code_CODE_GOING_AWAY {
			t.Errorf("the member was told %v, %v", e.Partitions, err)
		}
		if _, err := log.Tail(ctx, Session("").Tenant, broker.TailOptions{Group: "g"}); schema.CodeOf(err) != schema.Code_CODE_GOING_AWAY {
			t.Errorf("a member of a closed log: %v", err)
		}
		began := time.Now()
		next := w.Tail(w.Edge(1), "", &schema.TailOpen{Group: "g"}, acking)
		w.Until("another has all", func() bool { return len(next.Partitions()) == 2 })
		if took := time.Since(began); took > time.Second {
			t.Errorf("the partitions were free after %s", took)
		}
	})
}
