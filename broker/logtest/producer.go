package logtest

import (
	"fmt"
	"math"

	"tidemark/broker"
	"tidemark/schema"
)

// testProducerOfItsSender has several senders write under one producer's id: each counts for itself, is answered with its own places, and ends nobody's epoch but its own.
func testProducerOfItsSender(w *world) {
	agent := Produced("p", 1, 1)
	first := w.publish(agent)
	// The id is there to be read by everybody who follows the session. What another makes of it is no retry of the agent's, and no continuation.
	if r := w.refused(schema.Code_CODE_PRODUCER_GAP, one(ProducedBy("other", "p", 1, 2))); r.Expected != 1 {
		w.Errorf("another sender's producer was told to go on from %d, want 1", r.Expected)
	}
	other := w.publish(ProducedBy("other", "p", 1, 1))
	if other.Duplicate || other.First != first.First+1 {
		w.Errorf("another sender's first went to %+v", other)
	}
	role := w.publish(acceptOf("logtest", schema.Role_ROLE_USER, producedOf("p", 1, 1)))
	if role.Duplicate || role.First != first.First+2 {
		w.Errorf("the first of the same subject in another role went to %+v", role)
	}
	w.publish(ProducedBy("other", "p", 1, 2))
	second := w.publish(Produced("p", 1, 2))
	if second.Duplicate || second.First != first.First+4 {
		w.Fatalf("the agent's second went to %+v", second)
	}
	// Each retry finds its own.
	for _, c := range []struct {
		again schema.Accepted
		seq   uint64
	}{
		{Produced("p", 1, 1), first.First},
		{Produced("p", 1, 2), second.First},
		{ProducedBy("other", "p", 1, 1), other.First},
		{ProducedBy("other", "p", 1, 2), other.First + 2},
		{acceptOf("logtest", schema.Role_ROLE_USER, producedOf("p", 1, 1)), role.First},
	} {
		if r := w.publish(c.again); !r.Duplicate || r.First != c.seq {
			w.Errorf("the retry of what went to seq %d was answered with %+v", c.seq, r)
		}
	}
	// Nor does a fence hold for another.
	w.publish(ProducedBy("other", "p", math.MaxUint64, 1))
	w.publish(Produced("p", 1, 3))
	if r := w.refused(schema.Code_CODE_PRODUCER_FENCED, one(ProducedBy("other", "p", 1, 3))); r.Expected != math.MaxUint64 {
		w.Errorf("told that the epoch is %d", r.Expected)
	}
	w.publish(Produced("p", 2, 1))
	w.refused(schema.Code_CODE_PRODUCER_FENCED, one(Produced("p", 1, 4)))
}

// testProducerOfItsSenderAnyTime is the same long after, when the log must be asked, and where more producers are there than are remembered.
func testProducerOfItsSenderAnyTime(w *world) {
	var agent, other []uint64
	for i := uint64(1); i <= 20; i++ {
		agent = append(agent, w.publish(Produced("p", 1, i)).First)
		other = append(other, w.publish(ProducedBy("other", "p", 1, i)).First)
	}
	const many = 300
	for i := range many {
		w.publish(ProducedBy("many", fmt.Sprint("p", i), 1, 1))
	}
	w.fill(800, 200)
	w.settle()
	for i := range uint64(20) {
		if r := w.publish(Produced("p", 1, i+1)); !r.Duplicate || r.First != agent[i] {
			w.Errorf("the retry of what went to seq %d was answered with %+v", agent[i], r)
		}
		if r := w.publish(ProducedBy("other", "p", 1, i+1)); !r.Duplicate || r.First != other[i] {
			w.Errorf("the retry of what another sent to seq %d was answered with %+v", other[i], r)
		}
	}
	// Known by another sender alone, and so looked up in vain.
	if r := w.publish(Produced("p0", 1, 1)); r.Duplicate {
		w.Errorf("a new producer's first was answered with %+v", r)
	}
	if r := w.refused(schema.Code_CODE_PRODUCER_GAP, one(ProducedBy("other", "p1", 1, 2))); r.Expected != 1 {
		w.Errorf("told to go on from %d, want 1", r.Expected)
	}
	w.publish(Produced("p", 1, 21))
	w.publish(ProducedBy("other", "p", 1, 21))
}

// testProducersRestored takes a session of two senders' producers over after a restart.
func testProducersRestored(w *world) {
	if w.in.Restart == nil {
		w.Skip("this log cannot be restarted")
	}
	w.publish(Produced("p", 2, 1))
	w.publish(ProducedBy("other", "p", 7, 1), ProducedBy("other", "p", 7, 2))
	for round := range uint64(2) {
		w.fill(600, 60)
		w.settle()
		w.log = w.in.Restart(w.T)
		if r := w.publish(Produced("p", 2, 1)); !r.Duplicate || r.First != 1 {
			w.Errorf("round %d: the retry was answered with %+v", round, r)
		}
		if r := w.publish(ProducedBy("other", "p", 7, 1), ProducedBy("other", "p", 7, 2)); !r.Duplicate || r.First != 2 {
			w.Errorf("round %d: the other's retry was answered with %+v", round, r)
		}
		if r := w.refused(schema.Code_CODE_PRODUCER_FENCED, one(ProducedBy("other", "p", 2, 2))); r.Expected != 7 {
			w.Errorf("round %d: told that the epoch is %d, want 7", round, r.Expected)
		}
		w.publish(Produced("p", 2, 2+round))
		w.publish(ProducedBy("other", "p", 7, 3+round))
	}
}

// testProducersOverEdges floods a session on two edges, each with a sender's producer of the same id, so that each edge's appends are handed over to the other: none is lost, refused or taken for another's.
func testProducersOverEdges(w *world) {
	b := w.otherEdge()
	const n, sent = 120, 8
	var open [2][]<-chan answer
	last := [2]uint64{}
	settle := func(i int) {
		w.Helper()
		got := <-open[i][0]
		open[i] = open[i][1:]
		if got.err != nil || got.r.Duplicate || got.r.First <= last[i] {
			w.Fatalf("sender %d was answered %+v, %v behind seq %d", i, got.r, got.err, last[i])
		}
		last[i] = got.r.First
	}
	for seq := uint64(1); seq <= n; seq++ {
		open[0] = append(open[0], w.submit(one(ProducedBy("a", "p", 1, seq))))
		open[1] = append(open[1], b.submit(one(ProducedBy("b", "p", 2, seq))))
		for i := range open {
			if len(open[i]) > sent {
				settle(i)
			}
		}
	}
	for i := range open {
		for len(open[i]) > 0 {
			settle(i)
		}
	}
	counts := map[string]uint64{}
	for _, g := range w.follow(broker.FollowOptions{}).until(2 * n).got {
		subject := g.env.GetSource().GetSubject()
		if counts[subject]++; g.env.GetProducer().GetSeq() != counts[subject] {
			w.Fatalf("seq %d is number %d of the producer of %s, where %d is due", g.seq, g.env.GetProducer().GetSeq(), subject, counts[subject])
		}
	}
	// Whoever of them comes back on the other edge is known there.
	for _, v := range []*world{w, b} {
		if r := v.publish(ProducedBy("a", "p", 1, n)); !r.Duplicate || r.First != last[0] {
			w.Errorf("the retry of seq %d was answered with %+v", last[0], r)
		}
		if r := v.publish(ProducedBy("b", "p", 2, n)); !r.Duplicate || r.First != last[1] {
			w.Errorf("the retry of seq %d was answered with %+v", last[1], r)
		}
	}
}
