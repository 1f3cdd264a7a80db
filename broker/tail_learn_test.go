package broker

import (
	"errors"
	"testing"

	"tidemark/schema"
)

// A follower that comes while the tail is still on its way to the session's head must not take what the log said for what the tail holds.
func TestI4_TailThatHasNotComeToTheHeadClaimsNothing(t *testing.T) {
	id := schema.SessionID{Tenant: "t", Name: "a"}
	subject := laneOf(id).logSubject()
	put := func(tl *tail, streamSeq, first uint64) bool {
		f, _ := testFrame(t, "E", first, 3)
		f.StreamSeq, f.subject = streamSeq, subject
		return tl.add(f)
	}
	begin := func() (*tail, *tailFollower, *frame) {
		tl := newTail(1 << 20)
		f := &tailFollower{id: id, wake: func() {}}
		tl.open(f, subject)
		head, _ := testFrame(t, "E", 4, 3)
		head.StreamSeq = 7
		tl.learn(f.at, head)
		return tl, f, head
	}

	t.Run("the tail begins behind it", func(t *testing.T) {
		tl, f, head := begin()
		tl.passed(10)
		if views, err := f.take(Cursor{Epoch: "E", Seq: 3}, 1<<20); !errors.Is(err, ErrBehind) {
			t.Fatalf("the tail gives %v, %v for what it will never have", views, err)
		}
		tl.learn(f.at, head)
		if _, err := f.take(Cursor{Epoch: "E", Seq: 3}, 1<<20); !errors.Is(err, ErrBehind) {
			t.Errorf("before the head: %v", err)
		}
		if views, err := f.take(Cursor{Epoch: "E", Seq: 6}, 1<<20); views != nil || err != nil {
			t.Errorf("at the head: %v, %v", views, err)
		}
	})
	t.Run("the tail brings others first", func(t *testing.T) {
		tl, f, _ := begin()
		if !put(tl, 6, 1) || !put(tl, 7, 4) {
			t.Error("frames that follow each other were called unsound")
		}
		views, err := f.take(Cursor{Epoch: "E", Seq: 0}, 1<<20)
		if err != nil || len(views) != 2 || views[1].To != 6 {
			t.Errorf("the tail gives %v, %v", views, err)
		}
	})
}
