package logtest

import (
	"context"
	"fmt"
	"slices"
	"testing/synctest"
	"time"

	"tidemark/broker"
	"tidemark/schema"
)

func testSessionIsLive(w *world) {
	w.publish(Created(schema.SessionKind_SESSION_KIND_CHAT, `{"a": 1}`))
	began := time.Now()
	for i := range uint64(20) {
		time.Sleep(time.Second)
		w.publish(Token("m", "x"))
		s := w.session()
		if s.GetHeadSeq() != i+2 {
			w.Fatalf("the head is %d right after seq %d was acknowledged", s.GetHeadSeq(), i+2)
		}
		if c, u := s.GetCreated().AsTime(), s.GetUpdated().AsTime(); c.Sub(began).Abs() > time.Second/2 || time.Since(u).Abs() > time.Second/2 {
			w.Fatalf("created %s and updated %s; it was created at %s and updated now", c, u, began)
		}
	}
	s := w.session()
	if s.GetKind() != schema.SessionKind_SESSION_KIND_CHAT || s.GetMetadataJson() != `{"a": 1}` || s.GetStatus() != schema.Status_STATUS_OPEN {
		w.Errorf("the session stands at %v", s)
	}
}

// list reads the whole listing, page by page.
func (w *world) list(tenant string, q broker.Query) []*schema.Session {
	w.Helper()
	var all []*schema.Session
	for {
		ctx, cancel := context.WithTimeout(w.Context(), patience)
		page, err := w.log.Sessions(ctx, tenant, q)
		cancel()
		if err != nil {
			w.Fatalf("list %+v: %v", q, err)
		}
		if len(page.Sessions) > q.Limit {
			w.Fatalf("a page of %d sessions, asked for %d", len(page.Sessions), q.Limit)
		}
		all = append(all, page.Sessions...)
		if page.Next == "" {
			return all
		}
		q.Token = page.Next
	}
}

func names(sessions []*schema.Session) []string {
	out := []string{}
	for _, s := range sessions {
		out = append(out, s.GetSession())
	}
	slices.Sort(out)
	return out
}

func testSessionsListed(w *world) {
	w.of(schema.SessionID{Tenant: "wall", Name: "a/secret"}).publish(Token("m", "x"))
	for _, name := range []string{"a/1", "a/2", "b", "a.*", "ü", "a/3"} {
		v := w.of(ID(name))
		v.publish(Created(schema.SessionKind_SESSION_KIND_CHAT, `{"of":"`+name+`"}`), Token("m", "x"))
		if name == "a/2" || name == "b" {
			v.publish(StartRun("r"), Waiting("?"))
		}
	}
	w.of(ID("a/3")).delete()
	w.settle()
	for _, c := range []struct {
		tenant string
		q      broker.Query
		want   []string
	}{
		{"default", broker.Query{}, []string{"a.*", "a/1", "a/2", "b", "ü"}},
		{"default", broker.Query{Prefix: "a"}, []string{"a.*", "a/1", "a/2"}},
		{"default", broker.Query{Prefix: "a/"}, []string{"a/1", "a/2"}},
		{"default", broker.Query{Prefix: "a.*"}, []string{"a.*"}},
		{"default", broker.Query{Prefix: "ü"}, []string{"ü"}},
		{"default", broker.Query{Prefix: "*"}, []string{}},
		{"default", broker.Query{Status: schema.Status_STATUS_WAITING_FOR_INPUT}, []string{"a/2", "b"}},
		{"default", broker.Query{Status: schema.Status_STATUS_WAITING_FOR_INPUT, Prefix: "a"}, []string{"a/2"}},
		{"default", broker.Query{Status: schema.Status_STATUS_FAILED}, []string{}},
		{"default", broker.Query{May: func(name string) bool { return name == "b" || name == "ü" }}, []string{"b", "ü"}},
		{"default", broker.Query{May: func(name string) bool { return name == "b" || name == "ü" }, Prefix: "a"}, []string{}},
		{"wall", broker.Query{}, []string{"a/secret"}},
		{"def", broker.Query{}, []string{}},
		{"*", broker.Query{}, []string{}},
		{">", broker.Query{}, []string{}},
	} {
		for _, limit := range []int{1000, 1, 2} {
			c.q.Limit = limit
			if got := names(w.list(c.tenant, c.q)); !slices.Equal(got, c.want) {
				w.Errorf("of tenant %q, %+v lists %q, want %q", c.tenant, c.q, got, c.want)
			}
		}
	}
	// What the asker may not know of leaves no trace, in a page's token either (I9).
	nothing := broker.Query{Limit: 1, May: func(string) bool { return false }}
	if page, err := w.log.Sessions(w.Context(), "default", nothing); err != nil || len(page.Sessions) > 0 || page.Next != "" {
		w.Errorf("who may know of no session is told %+v, %v", page, err)
	}
	for _, s := range w.list("default", broker.Query{Prefix: "a/", Limit: 10}) {
		live := w.of(ID(s.GetSession())).session()
		if s.GetEpoch() != live.GetEpoch() || s.GetStatus() != live.GetStatus() || s.GetKind() != live.GetKind() || s.GetHeadSeq() != live.GetHeadSeq() ||
			s.GetMetadataJson() != live.GetMetadataJson() || !s.GetCreated().AsTime().Equal(live.GetCreated().AsTime()) {
			w.Errorf("listed as %v, it stands at %v", s, live)
		}
	}
}

// testSessionsPaged lists while sessions change: none that was there all the time is missed.
func testSessionsPaged(w *world) {
	var want []string
	for i := range 30 {
		name := fmt.Sprintf("s%02d", i)
		want = append(want, name)
		w.of(ID(name)).publish(Token("m", "x"))
	}
	w.settle()
	seen := map[string]bool{}
	q := broker.Query{Limit: 4}
	for pages := 0; ; pages++ {
		page, err := w.log.Sessions(w.Context(), "default", q)
		if err != nil || pages > 100 {
			w.Fatalf("page %d: %v", pages, err)
		}
		for _, s := range page.Sessions {
			seen[s.GetSession()] = true
		}
		if page.Next == "" {
			break
		}
		q.Token = page.Next
		if pages < 6 {
			w.of(ID(want[pages*4])).publish(StartRun("r"))
			w.settle()
		}
	}
	for _, name := range want {
		if !seen[name] {
			w.Errorf("session %s is on no page", name)
		}
	}
	if _, err := w.log.Sessions(w.Context(), "default", broker.Query{Limit: 4, Token: "not a token"}); schema.CodeOf(err) != schema.Code_CODE_INVALID_MESSAGE {
		w.Errorf("a page token that is none was answered with %v", err)
	}
}

func testDeleteEndsTheHistory(w *world) {
	w.refusal(schema.Code_CODE_SESSION_NOT_FOUND, w.log.Delete(w.Context(), w.id))
	a := Tokens("m", 3)
	for round := range 3 {
		begin := join([]schema.Accepted{Created(schema.SessionKind_SESSION_KIND_WORKFLOW, `{"a":1}`)}, a, []schema.Accepted{Produced("p", 1, 1)})
		old, err := w.try(broker.Submission{Envelopes: begin, Expected: new(uint64(0))})
		if err != nil || old.First != 1 || old.Duplicate {
			w.Fatalf("round %d went to %+v, %v; the ids of the history before are forgotten with it", round, old, err)
		}
		w.publish(StartRun("r"), Waiting("?", "yes"))
		w.settle()
		w.delete()
		if s := w.session(); s != nil {
			w.Fatalf("deleted, it stands at %v", s)
		}
		w.refusal(schema.Code_CODE_SESSION_NOT_FOUND, w.log.Delete(w.Context(), w.id))
		w.unfollowable(schema.Code_CODE_SESSION_NOT_FOUND, broker.FollowOptions{MustExist: true})
		w.unfollowable(schema.Code_CODE_EPOCH_MISMATCH, broker.FollowOptions{Epoch: old.Epoch})
		if r := w.refused(schema.Code_CODE_CONFLICT, broker.Submission{Envelopes: Tokens("m", 1), Expected: new(uint64(6))}); r.Head != 0 {
			w.Errorf("told that the head is %d, want 0", r.Head)
		}
		w.settle()
		if got := names(w.list("default", broker.Query{Limit: 10})); len(got) > 0 {
			w.Errorf("deleted, it is listed: %q", got)
		}
		next := w.publish(UserMessage("hello"))
		if next.First != 1 || next.Epoch == old.Epoch {
			w.Fatalf("what came after the deletion went to %+v; the history before was %s", next, old.Epoch)
		}
		w.unfollowable(schema.Code_CODE_EPOCH_MISMATCH, broker.FollowOptions{Epoch: old.Epoch})
		if s := w.session(); s.GetStatus() != schema.Status_STATUS_OPEN || s.GetHeadSeq() != 1 || s.GetKind() != schema.SessionKind_SESSION_KIND_CHAT || s.GetMetadataJson() != "" {
			w.Errorf("the new history stands at %v", s)
		}
		if all := w.all(); len(all) != 1 || all[0].env.GetUserMessage() == nil {
			w.Fatalf("the new history holds %v", all)
		}
		if w.in.Restart != nil {
			w.log = w.in.Restart(w.T)
			if all := w.all(); len(all) != 1 || all[0].env.GetUserMessage() == nil {
				w.Fatalf("after a restart the new history holds %v", all)
			}
		}
		w.delete()
	}
}

func testDeleteTellsFollowers(w *world) {
	w.fill(50, 10)
	atHead, behind := w.follow(broker.FollowOptions{}).until(50), w.follow(broker.FollowOptions{})
	other := w.of(ID("another"))
	otherReader := other.follow(broker.FollowOptions{})
	other.publish(Token("m", "x"))
	waiting := make(chan error, 1)
	third := w.follow(broker.FollowOptions{Start: broker.Start{Head: true}})
	go func() {
		for {
			ctx, cancel := context.WithTimeout(w.Context(), patience)
			_, err := third.f.Next(ctx, third.limit)
			cancel()
			if err != nil {
				waiting <- err
				return
			}
		}
	}()
	// It waits for a wake by now.
	synctest.Wait()
	w.delete()
	w.refusal(schema.Code_CODE_SESSION_DELETED, <-waiting)
	atHead.ends(schema.Code_CODE_SESSION_DELETED)
	behind.ends(schema.Code_CODE_SESSION_DELETED)
	// They stay told, though another history has begun, and others are not concerned.
	w.publish(Token("m", "anew"))
	atHead.ends(schema.Code_CODE_SESSION_DELETED)
	behind.ends(schema.Code_CODE_SESSION_DELETED)
	w.follow(broker.FollowOptions{}).until(1)
	otherReader.until(1)
}

func testStatusSaysReady(w *world) {
	s := w.log.Status()
	if !s.Ready || s.Edge == "" || s.Durability == schema.Durability_DURABILITY_UNSPECIFIED || s.MaxEnvelopeBytes < 64<<10 {
		w.Errorf("the log says of itself %+v", s)
	}
}
