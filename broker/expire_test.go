package broker_test

import (
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"tidemark/broker"
	"tidemark/broker/logtest"
	"tidemark/schema"
)

// Retention takes a whole session away under an edge that has followers of it: whoever is behind is told that the history has ended, whoever comes finds an empty session, and the next envelope begins
// another history.
func TestI4_SessionThatExpiredUnderItsFollowers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, began := newSubstrate(t), time.Now()
		s.config = tiny
		l, id := s.open(), logtest.ID("expires")
		publish := func(id schema.SessionID, n int) broker.Receipt {
			t.Helper()
			r, err := broker.Append(t.Context(), l, id, broker.Submission{Envelopes: logtest.Tokens("m", n)})
			if err != nil {
				t.Fatal(err)
			}
			return r
		}
		old := publish(id, 100)
		behind, err := l.Follow(t.Context(), id, broker.FollowOptions{})
		if err != nil {
			t.Fatal(err)
		}
		defer behind.Close()
		if b, err := behind.Next(t.Context(), 500); err != nil || b.Through == 0 || b.Through == 100 {
			t.Fatalf("through %d, %v", b.Through, err)
		}
		atHead, err := l.Follow(t.Context(), id, broker.FollowOptions{Start: broker.Start{Head: true}})
		if err != nil {
			t.Fatal(err)
		}
		defer atHead.Close()
		// Others take its place in the tails.
		for i := range 40 {
			publish(logtest.ID(fmt.Sprint("another ", i)), 20)
		}
		s.settle(t)
		if err := broker.ExpireSession(t.Context(), s.server(), id); err != nil {
			t.Fatal(err)
		}

		ended := func(f *broker.Follower) {
			t.Helper()
			for range 20 {
				_, err := f.Take(1 << 20)
				if errors.Is(err, broker.ErrBehind) {
					_, err = f.Fetch(t.Context(), 1<<20)
				}
				if schema.CodeOf(err) == schema.Code_CODE_SESSION_DELETED {
					return
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			t.Errorf("a follower at %+v goes round and round", f.Cursor())
		}
		ended(behind)
		ended(atHead)
		for _, start := range []broker.Start{{}, {Last: 5}, {Head: true}, {Since: began}} {
			f, err := l.Follow(t.Context(), id, broker.FollowOptions{Start: start})
			if err != nil {
				t.Fatalf("from %+v: %v", start, err)
			}
			if at := f.Attachment(); at != (broker.Attachment{}) {
				t.Errorf("from %+v attached at %+v", start, at)
			}
			f.Close()
		}
		for code, o := range map[schema.Code]broker.FollowOptions{
			schema.Code_CODE_SESSION_NOT_FOUND: {MustExist: true}, schema.Code_CODE_EPOCH_MISMATCH: {Epoch: old.Epoch}, schema.Code_CODE_SEQ_BEYOND_HEAD: {Start: broker.Start{After: 7}},
		} {
			if f, err := l.Follow(t.Context(), id, o); schema.CodeOf(err) != code {
				if err == nil {
					f.Close()
				}
				t.Errorf("following with %+v: %v, want %s", o, err, code.Word())
			}
		}
		if _, err := l.Session(t.Context(), id); schema.CodeOf(err) != schema.Code_CODE_SESSION_NOT_FOUND {
			t.Errorf("where it stands: %v", err)
		}
		if r := publish(id, 2); r.First != 1 || r.Epoch == old.Epoch {
			t.Errorf("the next envelopes went to %+v; the history before was %s", r, old.Epoch)
		}
	})
}
