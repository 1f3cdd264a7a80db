package broker

import (
	"errors"
	"fmt"
	"testing"

	"pgregory.net/rapid"

	"tidemark/schema"
)

// Whatever is in the ring and whatever has left it: a follower is given exactly what is behind its cursor, or told to read the log, and the ring keeps its bound (I4, I8).
func TestI4_TailGivesWhatIsBehindTheCursorOrSaysItIsGone(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		limit := rapid.IntRange(1, 20_000).Draw(rt, "limit")
		tl := newTail(limit)
		ids := []schema.SessionID{{Tenant: "t", Name: "a"}, {Tenant: "t", Name: "b"}}
		heads := make([]Cursor, len(ids))
		followers := make([]*tailFollower, len(ids))
		for i, id := range ids {
			heads[i].Epoch = fmt.Sprintf("%s-0", id.Name)
			followers[i] = &tailFollower{id: id, lane: laneOf(id), wake: func() {}}
			tl.open(followers[i], laneOf(id).logSubject())
			tl.learn(followers[i].at, nil)
		}
		for seq := uint64(1); seq <= 60; seq++ {
			i := rapid.IntRange(0, len(ids)-1).Draw(rt, "session")
			var f *frame
			if heads[i].Seq > 0 && rapid.IntRange(0, 19).Draw(rt, "delete") == 0 {
				f = &frame{Deleted: true}
				f.Epoch = heads[i].Epoch
				heads[i] = Cursor{Epoch: fmt.Sprintf("%s-%d", ids[i].Name, seq)}
			} else {
				n := rapid.IntRange(1, 5).Draw(rt, "envelopes")
				f, _ = testFrame(t, heads[i].Epoch, heads[i].Seq+1, n)
				heads[i].Seq += uint64(n)
			}
			f.StreamSeq, f.subject = seq, laneOf(ids[i]).logSubject()
			if !tl.add(f) {
				rt.Fatalf("frame %d was called unsound", seq)
			}
			if tl.size > limit && len(tl.ring) > 1 {
				rt.Fatalf("the ring holds %d bytes in %d frames; its bound is %d", tl.size, len(tl.ring), limit)
			}
			for i, fl := range followers {
				if heads[i].Seq == 0 {
					continue
				}
				after := rapid.Uint64Range(0, heads[i].Seq).Draw(rt, "after")
				views, err := fl.take(Cursor{Epoch: heads[i].Epoch, Seq: after}, 1<<20)
				if errors.Is(err, ErrBehind) {
					if before := fl.at.before; after >= before {
						rt.Fatalf("behind at %d, though the tail has everything after %d", after, before)
					}
					continue
				}
				if err != nil {
					rt.Fatal(err)
				}
				next := after + 1
				for _, v := range views {
					if v.From != next {
						rt.Fatalf("after %d: got %d, want %d", after, v.From, next)
					}
					next = v.To + 1
				}
				if next != heads[i].Seq+1 {
					rt.Fatalf("after %d: ends at %d, the head is %d", after, next-1, heads[i].Seq)
				}
				if _, err := fl.take(Cursor{Epoch: "another", Seq: after}, 1); schema.CodeOf(err) != schema.Code_CODE_SESSION_DELETED {
					rt.Fatalf("a cursor of another history: %v", err)
				}
			}
		}
		for _, fl := range followers {
			fl.close()
		}
		for len(tl.ring) > 1 {
			tl.limit = 0
			tl.trim()
		}
		if len(tl.lanes) > 1 {
			rt.Errorf("%d lanes are left with one frame in the ring", len(tl.lanes))
		}
	})
}

func TestTailCallsAFrameThatLeavesAHoleUnsound(t *testing.T) {
	tl := newTail(1 << 20)
	for i, first := range []uint64{1, 4, 9} {
		f, _ := testFrame(t, "E", first, 3)
		f.StreamSeq, f.subject = uint64(i+1), "log.000.t.a"
		if sound := tl.add(f); sound != (first != 9) {
			t.Errorf("frame from seq %d: sound is %v", first, sound)
		}
	}
	f := &tailFollower{id: schema.SessionID{Tenant: "t", Name: "a"}}
	tl.open(f, "log.000.t.a")
	if _, err := f.take(Cursor{Epoch: "E", Seq: 6}, 1<<20); !errors.Is(err, ErrBehind) {
		t.Errorf("across the hole: %v, want %v", err, ErrBehind)
	}
}
