package client_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"tidemark/internal/client"
	"tidemark/schema"
)

// read takes envelopes until there are n, and returns their texts.
func (w *world) read(f *client.Follower, n int) []string {
	w.Helper()
	var texts []string
	for len(texts) < n {
		ev, err := f.Next(w.Context())
		if err != nil {
			w.Fatalf("after %q: %v", texts, err)
		}
		if e := ev.Envelope; e != nil {
			texts = append(texts, e.GetToken().GetText())
		}
	}
	return texts
}

func (w *world) want(got, want []string) {
	w.Helper()
	if !slices.Equal(got, want) {
		w.Fatalf("got %d: %q\nwant %d: %q", len(got), got, len(want), want)
	}
}

func TestFollowFromEveryPlace(t *testing.T) {
	inWorld(t, func(w *world) {
		w.append("s", numbers(1, 10)...)
		time.Sleep(time.Minute)
		since := time.Now()
		w.append("s", numbers(11, 20)...)
		for name, tt := range map[string]struct {
			o     client.FollowOptions
			first int
		}{
			"beginning": {client.FollowOptions{}, 1},
			"after":     {client.FollowOptions{After: 7}, 8},
			"last":      {client.FollowOptions{Last: 3}, 18},
			"since":     {client.FollowOptions{Since: since}, 11},
		} {
			tt.o.Session = "s"
			f := w.client(nil, "a:1").Follow(tt.o)
			got := w.read(f, 21-tt.first)
			if !slices.Equal(got, numbers(tt.first, 20)) {
				t.Errorf("%s: %q", name, got)
			}
			if p := f.Place(); p.Seq != 20 || p.Epoch == "" {
				t.Errorf("%s: place %+v", name, p)
			}
			f.Close()
		}
		f := w.client(nil, "a:1").Follow(client.FollowOptions{Session: "s", Head: true})
		defer f.Close()
		for ev := (client.Event{}); ev.Attached == nil; {
			var err error
			ev, err = f.Next(w.Context())
			w.must(err)
		}
		w.append("s", "21")
		w.want(w.read(f, 1), []string{"21"})
	})
}

func TestI4_FollowerComesBackGapless(t *testing.T) {
	inWorld(t, func(w *world) {
		c := w.client(nil, "a:1")
		f := c.Follow(client.FollowOptions{Session: "s"})
		defer f.Close()
		var got []string
		var wg sync.WaitGroup
		wg.Go(func() {
			for i := 1; i <= 300; i++ {
				w.append("s", fmt.Sprint(i))
				time.Sleep(10 * time.Millisecond)
				switch i {
				case 50, 51, 170:
					f.Cut()
				case 100, 200:
					w.kill("a:1")
				case 120, 240:
					w.start("a:1")
				}
			}
		})
		got = w.read(f, 300)
		wg.Wait()
		w.want(got, numbers(1, 300))
	})
}

func TestFollowerMovesToAnotherEdge(t *testing.T) {
	inWorld(t, func(w *world) {
		w.start("b:1")
		w.append("s", numbers(1, 10)...)
		f := w.client(nil, "a:1", "b:1").Follow(client.FollowOptions{Session: "s"})
		defer f.Close()
		w.want(w.read(f, 10), numbers(1, 10))
		drained := make(chan error, 1)
		go func() { drained <- w.edges["a:1"].drain(w.Context()) }()
		began := time.Now()
		going := false
		for lost := false; !lost; {
			ev, err := f.Next(w.Context())
			w.must(err)
			going = going || ev.GoingAway != nil
			lost = ev.Lost != nil
		}
		w.must(<-drained)
		if !going {
			t.Error("going_away was not told")
		}
		w.append("s", "11")
		w.want(w.read(f, 1), []string{"11"})
		if took := time.Since(began); took > 2*time.Second {
			t.Errorf("took %s to move", took)
		}
	})
}

func TestSilentEdgeIsLeft(t *testing.T) {
	inWorld(t, func(w *world) {
		w.start("b:1")
		w.append("s", "1")
		c := w.client(nil, "a:1", "b:1")
		f := c.Follow(client.FollowOptions{Session: "s"})
		defer f.Close()
		w.want(w.read(f, 1), []string{"1"})
		p := c.Publisher(w.Context(), client.PublishOptions{Session: "s"})
		w.must(p.Publish(w.Context(), token("2")))
		w.must(p.Flush(w.Context()))
		w.want(w.read(f, 1), []string{"2"})
		// An edge that has nothing to say is no dead one.
		idle := time.Now()
		ctx, cancel := context.WithTimeout(w.Context(), 10*time.Minute)
		defer cancel()
		for {
			ev, err := f.Next(ctx)
			if err != nil {
				break
			}
			if ev.Lost != nil {
				t.Fatalf("left an edge that was only quiet, after %s: %v", time.Since(idle), ev.Lost)
			}
		}
		w.append("s", "3")
		w.want(w.read(f, 1), []string{"3"})

		w.net.freeze("a:1")
		began := time.Now()
		w.must(p.Publish(w.Context(), token("4")))
		w.want(w.read(f, 1), []string{"4"})
		w.must(p.Close(w.Context()))
		if took := time.Since(began); took > time.Minute {
			t.Errorf("noticed after %s", took)
		}
	})
}

func TestFollowerReturnsWhatDoesNotMend(t *testing.T) {
	inWorld(t, func(w *world) {
		w.append("s", "1")
		c := w.client(nil, "a:1")
		bad := w.client(func(c *client.Config) { c.Token = "nonsense" }, "a:1")
		for name, tt := range map[string]struct {
			c    *client.Client
			o    client.FollowOptions
			code schema.Code
		}{
			"no session":      {c, client.FollowOptions{Session: "other", MustExist: true}, schema.Code_CODE_SESSION_NOT_FOUND},
			"another history": {c, client.FollowOptions{Session: "s", After: 1, Epoch: "01JBVXXXXXXXXXXXXXXXXXXXXX"}, schema.Code_CODE_EPOCH_MISMATCH},
			"beyond the head": {c, client.FollowOptions{Session: "s", After: 9}, schema.Code_CODE_SEQ_BEYOND_HEAD},
			"bad type":        {c, client.FollowOptions{Session: "s", Types: []string{"nothing"}}, schema.Code_CODE_UNKNOWN_TYPE},
			"bad name":        {c, client.FollowOptions{Session: "\xff"}, schema.Code_CODE_INVALID_MESSAGE},
			"bad token":       {bad, client.FollowOptions{Session: "s"}, schema.Code_CODE_UNAUTHENTICATED},
		} {
			f := tt.c.Follow(tt.o)
			for range 2 {
				_, err := f.Next(w.Context())
				if schema.CodeOf(err) != tt.code || err.Error() == "" || schema.AsRefusal(err).Message == "" {
					t.Errorf("%s: %v", name, err)
				}
			}
			f.Close()
		}
	})
}

func TestFollowerIsToldOfDeletionAndTruncation(t *testing.T) {
	inWorld(t, func(w *world) {
		id := schema.SessionID{Tenant: "default", Name: "s"}
		w.append("s", numbers(1, 20)...)
		w.log.Truncate(id, 8)
		f := w.client(nil, "a:1").Follow(client.FollowOptions{Session: "s"})
		defer f.Close()
		var truncated *schema.Truncated
		var got []string
		for len(got) < 13 {
			ev, err := f.Next(w.Context())
			w.must(err)
			if ev.Truncated != nil {
				truncated = ev.Truncated
			}
			if ev.Envelope != nil {
				got = append(got, ev.Envelope.GetToken().GetText())
			}
		}
		w.want(got, numbers(8, 20))
		if truncated.GetWantedSeq() != 1 || truncated.GetFirstSeq() != 8 {
			t.Errorf("truncated %v", truncated)
		}
		w.must(w.log.Delete(w.Context(), id))
		for {
			ev, err := f.Next(w.Context())
			if err != nil {
				if schema.CodeOf(err) != schema.Code_CODE_SESSION_DELETED {
					t.Errorf("%v", err)
				}
				break
			}
			if ev.Envelope != nil {
				t.Errorf("%v", ev.Envelope)
			}
		}
	})
}

func TestFilteredFollowerKeepsItsPlace(t *testing.T) {
	inWorld(t, func(w *world) {
		w.append("s", numbers(1, 600)...)
		f := w.client(nil, "a:1").Follow(client.FollowOptions{Session: "s", Types: []string{"system"}})
		defer f.Close()
		for caught := false; !caught; {
			ev, err := f.Next(w.Context())
			w.must(err)
			caught = ev.CaughtUp != nil
		}
		if p := f.Place(); p.Seq != 600 {
			t.Errorf("place %+v", p)
		}
	})
}

func TestNextGoesOnAfterItsContextEnded(t *testing.T) {
	inWorld(t, func(w *world) {
		w.append("s", numbers(1, 5)...)
		f := w.client(nil, "a:1").Follow(client.FollowOptions{Session: "s"})
		defer f.Close()
		w.want(w.read(f, 5), numbers(1, 5))
		ctx, cancel := context.WithTimeout(w.Context(), time.Second)
		defer cancel()
		for {
			if _, err := f.Next(ctx); err != nil {
				if !errors.Is(err, context.DeadlineExceeded) {
					t.Fatal(err)
				}
				break
			}
		}
		w.append("s", "6")
		w.want(w.read(f, 1), []string{"6"})
	})
}

func TestEdgeThatIsNeverThere(t *testing.T) {
	inWorld(t, func(w *world) {
		c := w.client(func(c *client.Config) { c.ConnectFor = 3 * time.Second }, "nobody:1")
		began := time.Now()
		_, err := c.Follow(client.FollowOptions{Session: "s"}).Next(w.Context())
		if schema.CodeOf(err) != schema.Code_CODE_UNAVAILABLE || !strings.Contains(err.Error(), "nobody:1") {
			t.Errorf("%v", err)
		}
		if d := time.Since(began); d < 3*time.Second || d > 8*time.Second {
			t.Errorf("gave up after %s", d)
		}
		p := c.Publisher(w.Context(), client.PublishOptions{Session: "s"})
		w.must(p.Publish(w.Context(), token("x")))
		if err := p.Close(w.Context()); schema.CodeOf(err) != schema.Code_CODE_UNAVAILABLE {
			t.Errorf("%v", err)
		}
		if n := w.net.dials; n > 60 {
			t.Errorf("%d attempts in 6 seconds", n)
		}
	})
}

func TestI3_PublisherStoresOnce(t *testing.T) {
	inWorld(t, func(w *world) {
		var acks []client.Ack
		lost := 0
		p := w.client(nil, "a:1").Publisher(w.Context(), client.PublishOptions{
			Session: "s", Window: 16 << 10, Acked: func(a client.Ack) { acks = append(acks, a) }, Lost: func(error) { lost++ },
		})
		for i := 1; i <= 2000; i++ {
			w.must(p.Publish(w.Context(), token(fmt.Sprint(i))))
			switch i {
			case 100, 101, 1500:
				p.Cut()
			case 500, 900:
				w.kill("a:1")
				time.AfterFunc(time.Second, func() { w.start("a:1") })
			case 1200:
				w.log.mu.Lock()
				w.log.refuse = 3
				w.log.mu.Unlock()
			}
		}
		w.must(p.Flush(w.Context()))
		if len(acks) != 2000 {
			t.Fatalf("%d acknowledgements", len(acks))
		}
		for i, a := range acks {
			if a.First != uint64(i+1) || a.Last != a.First || a.Epoch == "" || a.Epoch != acks[0].Epoch || a.Durability == 0 {
				t.Fatalf("acknowledgement %d is %+v", i, a)
			}
		}
		if lost == 0 {
			t.Error("no lost connection was told")
		}
		w.must(p.Close(w.Context()))
		if err := p.Publish(w.Context(), token("late")); err == nil {
			t.Error("published after Close")
		}
		w.want(w.stored("s"), numbers(1, 2000))
	})
}

func TestPublisherUnderAnOldNameStoresNothingTwice(t *testing.T) {
	inWorld(t, func(w *world) {
		for run, n := range []int{10, 30, 30} {
			var acks []client.Ack
			p := w.client(nil, "a:1").Publisher(w.Context(), client.PublishOptions{Session: "s", Producer: "file.txt", Acked: func(a client.Ack) { acks = append(acks, a) }})
			for i := 1; i <= n; i++ {
				w.must(p.Publish(w.Context(), token(fmt.Sprint(i))))
			}
			w.must(p.Close(w.Context()))
			duplicates := 0
			for _, a := range acks {
				if a.Duplicate {
					duplicates++
				}
			}
			if want := []int{0, 10, 30}[run]; duplicates != want {
				t.Errorf("run %d: %d duplicates, want %d", run, duplicates, want)
			}
		}
		w.want(w.stored("s"), numbers(1, 30))
	})
}

func TestPublisherEndsWithWhatDoesNotMend(t *testing.T) {
	inWorld(t, func(w *world) {
		c := w.client(nil, "a:1")
		p := c.Publisher(w.Context(), client.PublishOptions{Session: "s"})
		w.must(p.Publish(w.Context(), token("1")))
		w.must(p.Flush(w.Context()))
		w.must(p.Publish(w.Context(), &schema.Envelope{Payload: &schema.Envelope_Token{Token: &schema.Token{Text: "without a message"}}}))
		if err := p.Flush(w.Context()); schema.CodeOf(err) != schema.Code_CODE_INVALID_MESSAGE {
			t.Errorf("%v", err)
		}
		if err := p.Publish(w.Context(), token("2")); schema.CodeOf(err) != schema.Code_CODE_INVALID_MESSAGE {
			t.Errorf("%v", err)
		}
		if err := p.Close(w.Context()); schema.CodeOf(err) != schema.Code_CODE_INVALID_MESSAGE {
			t.Errorf("%v", err)
		}

		// The session that it counts in is gone: what it published before is lost, and it must say so.
		p = c.Publisher(w.Context(), client.PublishOptions{Session: "s"})
		w.must(p.Publish(w.Context(), token("2")))
		w.must(p.Flush(w.Context()))
		w.must(w.log.Delete(w.Context(), schema.SessionID{Tenant: "default", Name: "s"}))
		w.must(p.Publish(w.Context(), token("3")))
		if err := p.Close(w.Context()); schema.CodeOf(err) != schema.Code_CODE_PRODUCER_GAP {
			t.Errorf("%v", err)
		}

		p = c.Publisher(w.Context(), client.PublishOptions{Session: "s"})
		if err := p.Publish(w.Context()); schema.CodeOf(err) != schema.Code_CODE_INVALID_MESSAGE {
			t.Errorf("no envelopes: %v", err)
		}
		if err := p.Publish(w.Context(), token(strings.Repeat("x", schema.MaxFrameBytes))); schema.CodeOf(err) != schema.Code_CODE_TOO_LARGE {
			t.Errorf("too large: %v", err)
		}
		if err := p.Publish(w.Context(), token("\xff")); schema.CodeOf(err) != schema.Code_CODE_INVALID_MESSAGE {
			t.Errorf("not UTF-8: %v", err)
		}
		w.must(p.Publish(w.Context(), token(strings.Repeat("x", 900<<10)), token("after")))
		w.must(p.Close(w.Context()))
		w.must(c.Publisher(w.Context(), client.PublishOptions{}).Close(w.Context()))
	})
}

func TestI8_PublisherIsBounded(t *testing.T) {
	inWorld(t, func(w *world) {
		w.kill("a:1")
		p := w.client(func(c *client.Config) { c.ConnectFor = -1 }, "a:1").Publisher(w.Context(), client.PublishOptions{Session: "s", Window: 8 << 10})
		ctx, cancel := context.WithTimeout(w.Context(), time.Minute)
		defer cancel()
		n := 0
		for ; p.Publish(ctx, token(fmt.Sprint(n+1))) == nil; n++ {
		}
		if n == 0 || n > 32 {
			t.Errorf("%d publishes fit into 8 KiB", n)
		}
		w.start("a:1")
		w.must(p.Close(w.Context()))
		w.want(w.stored("s"), numbers(1, n))
	})
}

func TestClosingPublisherGivesUpWithItsContext(t *testing.T) {
	inWorld(t, func(w *world) {
		p := w.client(nil, "a:1").Publisher(w.Context(), client.PublishOptions{Session: "s"})
		w.must(p.Publish(w.Context(), token("1")))
		w.must(p.Flush(w.Context()))
		w.kill("a:1")
		w.must(p.Publish(w.Context(), token("2")))
		ctx, cancel := context.WithTimeout(w.Context(), 5*time.Second)
		defer cancel()
		if err := p.Close(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v", err)
		}
		synctest.Wait()
	})
}

func TestCalls(t *testing.T) {
	inWorld(t, func(w *world) {
		ctx := w.Context()
		c := w.client(nil, "a:1")
		if w.scheme == "ws" {
			if _, err := c.Session(ctx, "s"); schema.CodeOf(err) != schema.Code_CODE_UNSUPPORTED_PROTOCOL {
				t.Errorf("over WebSocket: %v", err)
			}
			return
		}
		s, err := c.Create(ctx, &schema.CreateSessionRequest{Session: "s", MetadataJson: `{"a":1}`})
		w.must(err)
		if s.GetSession() != "s" || s.GetHeadSeq() != 1 {
			t.Errorf("created %v", s)
		}
		if _, err := c.Create(ctx, &schema.CreateSessionRequest{Session: "s"}); schema.CodeOf(err) != schema.Code_CODE_ALREADY_EXISTS {
			t.Errorf("created twice: %v", err)
		}
		res, err := c.Append(ctx, &schema.AppendRequest{Session: "s", ExpectedSeq: new(uint64(1)), Envelopes: []*schema.Envelope{token("2"), token("3")}})
		w.must(err)
		if res.GetFirstSeq() != 2 || res.GetLastSeq() != 3 {
			t.Errorf("appended %v", res)
		}
		_, err = c.Append(ctx, &schema.AppendRequest{Session: "s", ExpectedSeq: new(uint64(1)), Envelopes: []*schema.Envelope{token("x")}})
		if r := schema.AsRefusal(err); r.Code != schema.Code_CODE_CONFLICT || r.Head != 3 {
			t.Errorf("conflict: %v", err)
		}
		page, err := c.Sessions(ctx, &schema.ListSessionsRequest{})
		w.must(err)
		if len(page.GetSessions()) != 1 || page.GetSessions()[0].GetSession() != "s" {
			t.Errorf("listed %v", page)
		}
		w.must(c.Delete(ctx, "s"))
		if _, err := c.Session(ctx, "s"); schema.CodeOf(err) != schema.Code_CODE_SESSION_NOT_FOUND {
			t.Errorf("deleted: %v", err)
		}
		w.kill("a:1")
		if _, err := c.Session(ctx, "s"); schema.CodeOf(err) != schema.Code_CODE_UNAVAILABLE || !strings.Contains(err.Error(), "a:1") {
			t.Errorf("nobody there: %v", err)
		}
		w.start("b:1")
		if _, err := w.client(nil, "a:1", "b:1").Sessions(ctx, &schema.ListSessionsRequest{}); err != nil {
			t.Errorf("the second edge: %v", err)
		}
	})
}

func TestEdgesAreChecked(t *testing.T) {
	for _, edges := range [][]string{{}, {""}, {"127.0.0.1:8081"}, {"ftp://a:1"}, {"grpc://"}, {"http://a/b"}, {"http://user:pw@a"}, {"grpc://a?token=x"}} {
		if _, err := client.New(client.Config{Edges: edges}); err == nil {
			t.Errorf("%q was accepted", edges)
		}
	}
	for _, edge := range []string{"grpc://a:1", "grpcs://a:1", "http://a", "https://a/", "ws://[::1]:8080", "wss://a"} {
		if _, err := client.New(client.Config{Edges: []string{edge}}); err != nil {
			t.Errorf("%q: %v", edge, err)
		}
	}
}
