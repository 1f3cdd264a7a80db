package logtest

import (
	"bytes"
	"time"

	"tidemark/broker"
	"tidemark/schema"
)

func testFollowFromEveryStart(w *world) {
	all := join(w.fill(6, 1), w.fill(8, 4), w.fill(1, 1))
	n := uint64(len(all))
	epoch := w.session().GetEpoch()
	check := func(o broker.FollowOptions, after uint64) {
		w.Helper()
		r := w.follow(o)
		defer r.f.Close()
		want := broker.Attachment{Epoch: epoch, First: 1, Head: n, Status: schema.Status_STATUS_OPEN, After: after}
		if at := r.f.Attachment(); at != want {
			w.Errorf("with start %+v attached at %+v, want %+v", o.Start, at, want)
		}
		r.until(n).holds(after+1, all[after:])
		r.nothing()
		if r.caughtUp != 1 {
			w.Errorf("with start %+v told %d times that it caught up", o.Start, r.caughtUp)
		}
	}
	check(broker.FollowOptions{}, 0)
	check(broker.FollowOptions{MustExist: true}, 0)
	for after := range n + 1 {
		check(broker.FollowOptions{Start: broker.Start{After: after}}, after)
		check(broker.FollowOptions{Start: broker.Start{After: after}, Epoch: epoch}, after)
	}
	check(broker.FollowOptions{Start: broker.Start{Head: true}}, n)
	for _, last := range []uint64{1, 2, 7, n - 1, n, n + 1, 1 << 60} {
		check(broker.FollowOptions{Start: broker.Start{Last: last}}, n-min(n, last))
	}
	// Of several, the first in the order of declaration counts; the others are not looked at.
	check(broker.FollowOptions{Start: broker.Start{Head: true, Last: 3, After: 1000}}, n)
	check(broker.FollowOptions{Start: broker.Start{Last: 3, After: 1000}}, n-3)
}

func testFollowSince(w *world) {
	var all []schema.Accepted
	type mark struct {
		at    time.Time
		after uint64
	}
	var marks []mark
	for i := range 12 {
		marks = append(marks, mark{time.Now(), uint64(len(all))})
		time.Sleep(time.Minute)
		part := Tokens("m", 1+i%3)
		all = append(all, part...)
		w.publish(part...)
		// A frame is stored at its own time.
		marks = append(marks, mark{w.session().GetUpdated().AsTime(), marks[len(marks)-1].after})
		time.Sleep(time.Minute)
	}
	marks = append(marks, mark{time.Now(), uint64(len(all))}, mark{time.Now().Add(time.Hour), uint64(len(all))}, mark{time.Unix(1, 0), 0})
	check := func() {
		w.Helper()
		for _, m := range marks {
			r := w.follow(broker.FollowOptions{Start: broker.Start{Since: m.at}})
			if after := r.f.Attachment().After; after != m.after {
				w.Fatalf("since %s attached after %d, want %d", m.at, after, m.after)
			}
			r.until(uint64(len(all))).holds(m.after+1, all[m.after:])
			r.f.Close()
		}
	}
	check()
	w.settle()
	check()
	if w.in.Restart != nil {
		w.log = w.in.Restart(w.T)
		check()
	}
	// A session without envelopes has nothing since any time.
	if at := w.of(ID("empty")).follow(broker.FollowOptions{Start: broker.Start{Since: marks[0].at}}).f.Attachment(); at != (broker.Attachment{}) {
		w.Errorf("an empty session was attached at %+v", at)
	}
}

func testFollowRefused(w *world) {
	other := w.of(ID("another")).publish(Token("m", "x")).Epoch
	w.unfollowable(schema.Code_CODE_SESSION_NOT_FOUND, broker.FollowOptions{MustExist: true})
	w.unfollowable(schema.Code_CODE_SESSION_NOT_FOUND, broker.FollowOptions{MustExist: true, Epoch: other, Start: broker.Start{After: 3}})
	w.unfollowable(schema.Code_CODE_EPOCH_MISMATCH, broker.FollowOptions{Epoch: other})
	if r := w.unfollowable(schema.Code_CODE_SEQ_BEYOND_HEAD, broker.FollowOptions{Start: broker.Start{After: 1}}); r.Head != 0 {
		w.Errorf("told that the head is %d, want 0", r.Head)
	}
	epoch := w.publish(Tokens("m", 5)...).Epoch
	for _, o := range []broker.FollowOptions{{Epoch: other}, {Epoch: other, Start: broker.Start{Head: true}}, {Epoch: other, Start: broker.Start{After: 9}}, {Epoch: "no ulid"}} {
		if r := w.unfollowable(schema.Code_CODE_EPOCH_MISMATCH, o); r.Epoch != epoch {
			w.Errorf("told that the epoch is %q, want %q", r.Epoch, epoch)
		}
	}
	for _, after := range []uint64{6, 7, 1 << 63} {
		if r := w.unfollowable(schema.Code_CODE_SEQ_BEYOND_HEAD, broker.FollowOptions{Start: broker.Start{After: after}, Epoch: epoch}); r.Head != 5 {
			w.Errorf("told that the head is %d, want 5", r.Head)
		}
	}
	w.follow(broker.FollowOptions{Start: broker.Start{After: 5}, Epoch: epoch, MustExist: true}).nothing()
}

func testFollowBeforeTheFirst(w *world) {
	starts := []broker.FollowOptions{{}, {Start: broker.Start{Head: true}}, {Start: broker.Start{Last: 3}}, {MergeTokens: true}}
	var readers []*reader
	for _, o := range starts {
		r := w.follow(o)
		if at := r.f.Attachment(); at != (broker.Attachment{}) {
			w.Errorf("attached at %+v before there was anything", at)
		}
		r.nothing()
		readers = append(readers, r)
	}
	if s := w.session(); s != nil {
		w.Errorf("following began a session: %v", s)
	}
	all := Tokens("m", 3)
	epoch := w.publish(all...).Epoch
	for _, r := range readers {
		r.until(3).holds(1, all)
		if r.epoch != epoch || r.f.Cursor().Epoch != epoch {
			w.Errorf("the follower says epoch %q, want %q", r.epoch, epoch)
		}
	}
	w.delete()
	for _, r := range readers {
		r.ends(schema.Code_CODE_SESSION_DELETED)
	}
}

func testFollowWithinBlocks(w *world) {
	all := Tokens("m", 60)
	w.publish(all...)
	for after := range uint64(61) {
		r := w.follow(broker.FollowOptions{Start: broker.Start{After: after}})
		r.limit = 100 // a few envelopes
		r.until(60).holds(after+1, all[after:])
		r.f.Close()
	}
}

// testCutAnywhere follows from every cut, while the session grows beyond pages, after the projections have caught up and after a restart.
func testCutAnywhere(w *world) {
	var all []schema.Accepted
	check := func(step uint64) {
		w.Helper()
		n := uint64(len(all))
		for cut := uint64(0); cut <= n; cut += step {
			r := w.follow(broker.FollowOptions{Start: broker.Start{After: cut}})
			if cut%2 == 0 {
				r.limit = 5000
			}
			r.until(n).holds(cut+1, all[cut:])
			r.f.Close()
		}
	}
	live := w.follow(broker.FollowOptions{})
	for i, size := range []int{1, 100, 155, 1, 254, 3, 300, 11} {
		part := Tokens("m", size)
		w.publish(part...)
		all = append(all, part...)
		if i%2 == 1 {
			w.settle()
		}
		live.until(uint64(len(all)))
	}
	check(17)
	w.settle()
	check(17)
	live.holds(1, all)
	live.f.Close()
	if w.in.Restart != nil {
		w.log = w.in.Restart(w.T)
		check(51)
		part := Tokens("m", 20)
		w.publish(part...)
		all = append(all, part...)
		check(64)
	}
}

func testTruncated(w *world) {
	if w.in.Truncate == nil {
		w.Skip("this log cannot be truncated by the test")
	}
	all := w.fill(600, 10)
	w.settle()
	first := w.in.Truncate(w.T, w.id, 300)
	if first < 2 || first > 300 {
		w.Fatalf("truncated up to %d, asked for 300", first)
	}
	if w.in.Restart != nil {
		// What is in memory may still be read; this is about what is not.
		w.log = w.in.Restart(w.T)
	}
	if s := w.session(); s.GetFirstSeq() != first || s.GetHeadSeq() != 600 {
		w.Errorf("the session stands at %v, want %d to 600", s, first)
	}
	check := func(o broker.FollowOptions, after, wanted uint64) {
		w.Helper()
		r := w.follow(o)
		defer r.f.Close()
		if at := r.f.Attachment(); at.First != first || at.Head != 600 || at.After != after {
			w.Errorf("with %+v attached at %+v, want after %d, from %d to 600", o.Start, at, after, first)
		}
		r.until(600)
		from := after + 1
		switch {
		case wanted == 0 && len(r.gaps) > 0:
			w.Fatalf("with %+v told of %v", o.Start, r.gaps)
		case wanted > 0 && (len(r.gaps) != 1 || r.gaps[0] != [2]uint64{wanted, first}):
			w.Fatalf("with %+v told of %v, want %d to %d", o.Start, r.gaps, wanted, first)
		case wanted > 0:
			from = first
		}
		r.holds(from, all[from-1:])
	}
	check(broker.FollowOptions{}, 0, 1)
	check(broker.FollowOptions{Start: broker.Start{After: first - 2}}, first-2, first-1)
	check(broker.FollowOptions{Start: broker.Start{After: first - 1}}, first-1, 0)
	check(broker.FollowOptions{Start: broker.Start{After: first}}, first, 0)
	check(broker.FollowOptions{Start: broker.Start{Last: 5}}, 595, 0)
	check(broker.FollowOptions{Start: broker.Start{Last: 599}}, first-1, 0)
	check(broker.FollowOptions{Start: broker.Start{Head: true}}, 600, 0)
	check(broker.FollowOptions{Start: broker.Start{Since: time.Unix(1, 0)}}, first-1, 0)
	w.unfollowable(schema.Code_CODE_SEQ_BEYOND_HEAD, broker.FollowOptions{Start: broker.Start{After: 601}})
	// What comes next goes on as if nothing had happened.
	if r := w.publish(Token("m", "next")); r.First != 601 {
		w.Errorf("the publish after the truncation went to %+v", r)
	}
}

func testTruncatedUnderFollower(w *world) {
	if w.in.Truncate == nil {
		w.Skip("this log cannot be truncated by the test")
	}
	all := w.fill(600, 10)
	w.settle()
	r := w.follow(broker.FollowOptions{})
	r.limit = 1000
	if _, err := r.next(); err != nil {
		w.Fatal(err)
	}
	read := r.through
	first := w.in.Truncate(w.T, w.id, 500)
	r.until(600)
	// What it had in memory it may go on with; where it begins again it says so.
	at := uint64(1)
	for _, g := range r.got {
		if g.seq != at {
			if len(r.gaps) == 0 || r.gaps[0] != [2]uint64{at, g.seq} || g.seq != first || at <= read {
				w.Fatalf("went on at %d behind %d, told of %v; %d is the first that is left", g.seq, at-1, r.gaps, first)
			}
			at = g.seq
		}
		if !bytes.Equal(g.raw, stored(all[g.seq-1], g.seq)) {
			w.Fatalf("seq %d is not as it was stored", g.seq)
		}
		at++
	}
}
