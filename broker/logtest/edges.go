package logtest

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"tidemark/broker"
	"tidemark/schema"
)

func testEdgesSeeEachOther(w *world) {
	b := w.otherEdge()
	onB, onA := b.follow(broker.FollowOptions{}), w.follow(broker.FollowOptions{})
	var all []schema.Accepted
	for i := range 40 {
		v := w
		if i%3 == 0 {
			v = b
		}
		part := Tokens("m", 1+i%4)
		if r := v.publish(part...); r.First != uint64(len(all))+1 {
			w.Fatalf("publish %d went to %+v behind %d envelopes", i, r, len(all))
		}
		all = append(all, part...)
		if n := uint64(len(all)); w.head() != n || b.head() != n {
			w.Fatalf("the head is %d on one edge and %d on the other, %d envelopes are acknowledged", w.head(), b.head(), n)
		}
	}
	onA.until(uint64(len(all))).holds(1, all)
	onB.until(uint64(len(all))).holds(1, all)
}

// testEdgesAppendAtOnce has writers on two edges flood one session.
func testEdgesAppendAtOnce(w *world) {
	b := w.otherEdge()
	var writers []*writer
	for i := range 8 {
		x := &writer{w: w}
		if i%2 == 1 {
			x.w = b
		}
		for j := range 20 {
			x.parts = append(x.parts, Tokens(fmt.Sprint("m", i), 1+(i+j)%4))
		}
		writers = append(writers, x)
	}
	writeAll(w, writers)
}

// testEdgesFloodAndTrickle has a busy agent on one edge and a person on another: the person is answered in good time.
func testEdgesFloodAndTrickle(w *world) {
	b := w.otherEdge()
	var writers []*writer
	for i := range 4 {
		x := &writer{w: w}
		for range 60 {
			x.parts = append(x.parts, Tokens(fmt.Sprint("flood", i), 3))
		}
		writers = append(writers, x)
	}
	slow := &writer{w: b}
	var asked time.Time
	slow.pause = func(i int) {
		if took := time.Since(asked); i > 0 && took > 5*time.Second {
			w.Errorf("the person on the other edge waited %s", took)
		}
		time.Sleep(3 * time.Millisecond)
		asked = time.Now()
	}
	for range 10 {
		slow.parts = append(slow.parts, []schema.Accepted{UserMessage("wait")})
	}
	writeAll(w, append(writers, slow))
}

func testRepeatedOnAnotherEdge(w *world) {
	b := w.otherEdge()
	a := Tokens("m", 3)
	p := []schema.Accepted{Produced("p", 1, 1), Produced("p", 1, 2)}
	ra, rp := w.publish(a...), w.publish(p...)
	for round := range 2 {
		if r := b.publish(a...); !r.Duplicate || r.First != ra.First || r.Epoch != ra.Epoch {
			w.Errorf("the retry of %+v on another edge was answered with %+v", ra, r)
		}
		if r := b.publish(Produced("p", 1, 1), Produced("p", 1, 2)); !r.Duplicate || r.First != rp.First {
			w.Errorf("the retry of %+v on another edge was answered with %+v", rp, r)
		}
		// Once more when the other edge has an appender that others have overtaken.
		b.publish(Tokens("n", 2)...)
		if round == 0 {
			a = Tokens("m", 2)
			ra = w.publish(a...)
		}
	}
	// The same at the same time on both edges: one is stored, the other learns where.
	for i := range 20 {
		e := Tokens("twice", 1+i%3)
		x, y := w.submit(broker.Submission{Envelopes: e}), b.submit(broker.Submission{Envelopes: e})
		gx, gy := <-x, <-y
		if gx.err != nil || gy.err != nil || gx.r.First != gy.r.First || gx.r.Last != gy.r.Last || gx.r.Epoch != gy.r.Epoch {
			w.Fatalf("one publish on two edges at once was answered %+v, %v and %+v, %v", gx.r, gx.err, gy.r, gy.err)
		}
		if all := w.follow(broker.FollowOptions{Start: broker.Start{After: gx.r.First - 1}}).until(gx.r.Last); !bytes.Equal(all.got[0].raw, stored(e[0], gx.r.First)) {
			w.Fatalf("round %d is not at the place that it was answered with", i)
		}
	}
	// A retry that was cut anew, racing with what it is a retry of: whatever is acknowledged is there.
	for i := range 20 {
		e := Tokens("cut", 3)
		x, y := w.submit(broker.Submission{Envelopes: e[:1]}), b.submit(broker.Submission{Envelopes: e})
		for j, ch := range []<-chan answer{x, y} {
			g := <-ch
			if g.err != nil {
				w.refusal(schema.Code_CODE_INVALID_MESSAGE, g.err)
				continue
			}
			want := [][]schema.Accepted{e[:1], e}[j]
			r := w.follow(broker.FollowOptions{Start: broker.Start{After: g.r.First - 1}})
			for r.through < g.r.Last {
				if _, err := r.next(); err != nil {
					w.Fatalf("round %d: acknowledged %+v, but only %d is there: %v", i, g.r, r.through, err)
				}
			}
			r.got = r.got[:len(want)]
			r.holds(g.r.First, want)
			r.f.Close()
		}
	}
}

// testRetriesUnderContention has several writers flood one session over two edges and send much of it twice, to the same edge or to the other, at once or a moment later, as clients do that lose their
// connection: all tries are answered with one place, and everything is there once.
func testRetriesUnderContention(w *world) {
	edges := []*world{w, w.otherEdge()}
	var wg sync.WaitGroup
	var mu sync.Mutex
	places := map[uint64][]schema.Accepted{} // by first seq
	for i := range 6 {
		rng := rand.New(rand.NewPCG(uint64(i), 1))
		next := uint64(1)
		wg.Go(func() {
			for j := range 25 {
				// Half of the writers have a producer, whose retries have other ids.
				n := 1 + rng.IntN(4)
				again := func() []schema.Accepted {
					var part []schema.Accepted
					for k := range n {
						part = append(part, Produced(fmt.Sprint("p", i), 1, next+uint64(k)))
					}
					return part
				}
				if i%2 == 0 {
					part := Tokens(fmt.Sprint("m", i), n)
					again = func() []schema.Accepted { return part }
				}
				var answers []<-chan answer
				var tried [][]schema.Accepted
				for try := range 1 + rng.IntN(3) {
					if try > 0 && rng.IntN(2) == 0 {
						time.Sleep(time.Duration(rng.IntN(3000)) * time.Microsecond)
					}
					part := again()
					tried = append(tried, part)
					answers = append(answers, edges[rng.IntN(2)].submit(broker.Submission{Envelopes: part}))
				}
				first := uint64(0)
				for try, ch := range answers {
					a := <-ch
					if a.err != nil || first != 0 && a.r.First != first || a.r.Last != a.r.First+uint64(n)-1 {
						w.Errorf("writer %d, publish %d, try %d was answered %+v, %v; the first went to %d", i, j, try, a.r, a.err, first)
						return
					}
					first = a.r.First
				}
				next += uint64(n)
				mu.Lock()
				places[first] = tried[0]
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if w.Failed() {
		w.FailNow()
	}
	// The places are side by side, and what is there is what was sent there.
	all := w.follow(broker.FollowOptions{}).until(w.head()).got
	seq := uint64(1)
	for seq <= uint64(len(all)) {
		part := places[seq]
		if part == nil {
			w.Fatalf("nobody was told of seq %d, %v", seq, all[seq-1].env)
		}
		for k, a := range part {
			e := all[seq-1+uint64(k)].env
			if p := a.Producer; p.ID != "" && (e.GetProducer().GetId() != p.ID || e.GetProducer().GetSeq() != p.Seq) || p.ID == "" && e.GetId() != a.ID.String() {
				w.Fatalf("at seq %d stands %v, not what was acknowledged there", seq+uint64(k), e)
			}
		}
		seq += uint64(len(part))
	}
	if seq != uint64(len(all))+1 {
		w.Fatalf("the last place goes up to %d, and the session to %d", seq-1, len(all))
	}
}

func testFencedOnAnotherEdge(w *world) {
	b := w.otherEdge()
	w.publish(Produced("p", 1, 1))
	b.publish(Produced("p", 2, 1))
	// The zombie, on the edge that does not know of its successor.
	w.refused(schema.Code_CODE_PRODUCER_FENCED, broker.Submission{Envelopes: []schema.Accepted{Produced("p", 1, 2)}})
	b.refused(schema.Code_CODE_PRODUCER_FENCED, broker.Submission{Envelopes: []schema.Accepted{Produced("p", 1, 2)}})
	w.publish(Produced("p", 2, 2))
	b.publish(Produced("p", 2, 3))
}

func testExpectedSeqOverEdges(w *world) { oneWinner(w, w, w.otherEdge()) }

// testDecidedOnWhatIsAcknowledged goes to and fro between edges with what only the other edge can have seen yet: what is decided without storing anything is decided on the session as it stands,
// not on what this edge last knew.
func testDecidedOnWhatIsAcknowledged(w *world) {
	b := w.otherEdge()
	w.publish(Token("m", "x"))
	b.publish(Token("m", "x"))
	head := uint64(2)
	for i := range uint64(20) {
		from, to := w, b
		if i%2 == 1 {
			from, to = b, w
		}
		// The other edge wrote last; this head is right.
		if r, err := from.try(broker.Submission{Envelopes: Tokens("m", 2), Expected: &head}); err != nil || r.First != head+1 {
			w.Fatalf("round %d: on top of %d: %+v, %v", i, head, r, err)
		}
		stale := head
		head += 2
		if r := to.refused(schema.Code_CODE_CONFLICT, broker.Submission{Envelopes: Tokens("m", 1), Expected: &stale}); r.Head != head {
			w.Fatalf("round %d: told that the head is %d, want %d", i, r.Head, head)
		}
		p := fmt.Sprint("p", i/4)
		if r := to.publish(Produced(p, 1, 2*(i%4)+1)); r.First != head+1 {
			w.Fatalf("round %d: a producer's went to %+v behind %d", i, r, head)
		}
		// Not the next on the edge that has not seen the one before.
		if r := from.refused(schema.Code_CODE_PRODUCER_GAP, broker.Submission{Envelopes: []schema.Accepted{Produced(p, 1, 2*(i%4)+4)}}); r.Expected != 2*(i%4)+2 {
			w.Fatalf("round %d: told to go on from %d, want %d", i, r.Expected, 2*(i%4)+2)
		}
		if r := from.publish(Produced(p, 1, 2*(i%4)+2)); r.First != head+2 {
			w.Fatalf("round %d: a producer's went to %+v behind %d", i, r, head+1)
		}
		head += 2
	}
}

// testResumeOnAnotherEdgeAtOnce goes to the other edge with a cursor that that edge cannot have seen from its tail yet: what was acknowledged is there, on any edge, at once.
func testResumeOnAnotherEdgeAtOnce(w *world) {
	b := w.otherEdge()
	resume := func(v *world, r broker.Receipt) *reader {
		w.Helper()
		x := v.follow(broker.FollowOptions{Start: broker.Start{After: r.Last}, Epoch: r.Epoch, MustExist: true})
		if at := x.f.Attachment(); at.Head < r.Last || at.Epoch != r.Epoch || at.After != r.Last {
			w.Fatalf("attached at %+v behind %+v", at, r)
		}
		return x
	}
	for i := range 30 {
		from, to := w, b
		if i%2 == 1 {
			from, to = b, w
		}
		if i%10 == 5 {
			from.delete()
		}
		r := from.publish(Tokens("m", 2)...)
		x := resume(to, r)
		next := Tokens("m", 1)
		x.until(from.publish(next...).Last).holds(r.Last+1, next)
		x.f.Close()
		if s := to.session(); s.GetHeadSeq() != r.Last+1 || s.GetEpoch() != r.Epoch {
			w.Fatalf("the other edge says %v, seq %d of %s is acknowledged", s, r.Last+1, r.Epoch)
		}
	}
}

func testDeleteOnAnotherEdge(w *world) {
	b := w.otherEdge()
	a := Tokens("m", 5)
	old := w.publish(a...)
	onA, onB := w.follow(broker.FollowOptions{}).until(5), b.follow(broker.FollowOptions{}).until(5)
	b.delete()
	onA.ends(schema.Code_CODE_SESSION_DELETED)
	onB.ends(schema.Code_CODE_SESSION_DELETED)
	w.unfollowable(schema.Code_CODE_EPOCH_MISMATCH, broker.FollowOptions{Epoch: old.Epoch})
	// This edge's appender knew the old history, and its ids.
	r := w.publish(a...)
	if r.First != 1 || r.Duplicate || r.Epoch == old.Epoch {
		w.Fatalf("after a deletion on another edge a publish went to %+v; the history before was %s", r, old.Epoch)
	}
	if next := b.publish(Token("m", "x")); next.First != 6 || next.Epoch != r.Epoch {
		w.Errorf("the other edge went on at %+v, behind %+v", next, r)
	}
	// To and fro, with no time between.
	for i := range 10 {
		x, y := w, b
		if i%2 == 0 {
			x, y = b, w
		}
		x.delete()
		if r := y.publish(a...); r.First != 1 || r.Duplicate {
			w.Fatalf("round %d went to %+v", i, r)
		}
	}
}

// testDeleteTheHistoryThatIsThere deletes through an edge that knew the history before the one there is now: it is that one that goes.
func testDeleteTheHistoryThatIsThere(w *world) {
	b := w.otherEdge()
	for i := range 20 {
		v := w.of(ID(fmt.Sprint("deleted ", i)))
		u := b.of(v.id)
		u.publish(Tokens("m", 3)...)
		v.delete()
		v.publish(Tokens("m", 2)...)
		u.delete()
		if r := u.publish(Token("m", "a third history")); r.First != 1 {
			w.Errorf("behind what was deleted an envelope went to %+v", r)
		}
	}
}

func testRestartKeepsAll(w *world) {
	if w.in.Restart == nil {
		w.Skip("this log cannot be restarted")
	}
	var all []schema.Accepted
	var epoch string
	for round := range 3 {
		for i := range 20 {
			part := Tokens("m", 1+i)
			r := w.publish(part...)
			if r.First != uint64(len(all))+1 || epoch != "" && r.Epoch != epoch {
				w.Fatalf("round %d, publish %d went to %+v behind %d envelopes of %s", round, i, r, len(all), epoch)
			}
			epoch = r.Epoch
			all = append(all, part...)
		}
		if round == 1 {
			w.settle()
		}
		w.log = w.in.Restart(w.T)
		w.contains(all)
		if s := w.session(); s.GetEpoch() != epoch || s.GetFirstSeq() != 1 {
			w.Errorf("after the restart it stands at %v; the epoch was %s", s, epoch)
		}
	}
}

func testRestartKnowsRetries(w *world) {
	if w.in.Restart == nil {
		w.Skip("this log cannot be restarted")
	}
	a := Tokens("m", 3)
	w.publish(Produced("p", 2, 1), Produced("p", 2, 2))
	w.fill(400, 50)
	ra := w.publish(a...)
	w.fill(600, 60)
	for round := range 2 {
		w.log = w.in.Restart(w.T)
		if r := w.publish(a...); !r.Duplicate || r.First != ra.First {
			w.Errorf("round %d: the retry of %+v was answered with %+v", round, ra, r)
		}
		if r := w.publish(Produced("p", 2, 1), Produced("p", 2, 2)); !r.Duplicate || r.First != 1 {
			w.Errorf("round %d: the producer's retry was answered with %+v", round, r)
		}
		w.refused(schema.Code_CODE_PRODUCER_FENCED, broker.Submission{Envelopes: []schema.Accepted{Produced("p", 1, 3)}})
		if r := w.refused(schema.Code_CODE_PRODUCER_GAP, broker.Submission{Envelopes: []schema.Accepted{Produced("p", 2, uint64(5+round))}}); r.Expected != uint64(3+round) {
			w.Errorf("round %d: told to go on from %d", round, r.Expected)
		}
		w.publish(Produced("p", 2, uint64(3+round)))
		w.settle()
	}
}
