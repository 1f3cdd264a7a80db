package broker

import (
	"fmt"
	"testing"

	"tidemark/schema"
)

// Who begins one producer after the other displaces his own: the others' are remembered as long as they have no more than their share, so that nobody can make their retries costly.
func TestProducersAreForgottenOfWhoHasMost(t *testing.T) {
	s := newState()
	seq := uint64(0)
	write := func(owner, id string) {
		seq++
		s.foldPayload(seq, said{kind: schema.KindToken}, schema.ProducerPlace{Owner: owner, ID: id, Epoch: 1, Seq: 1})
	}
	known := func(owner string, from, to int) {
		t.Helper()
		for i := range to {
			if _, ok := s.producers[producerKey{owner, fmt.Sprint(i)}]; ok != (i >= from) {
				t.Fatalf("after seq %d it is said that producer %d of %s is remembered: %v", seq, i, owner, ok)
			}
		}
	}
	const agents = maxProducers / 2
	for i := range agents {
		write("agent", fmt.Sprint(i))
	}
	for i := range 3 * maxProducers {
		write("user", fmt.Sprint(i))
	}
	known("agent", 0, agents)
	known("user", 3*maxProducers-agents, 3*maxProducers)
	if len(s.producers) != maxProducers || !s.forgot {
		t.Errorf("%d producers are remembered, and that one was forgotten: %v", len(s.producers), s.forgot)
	}
	// Beyond its share a sender makes room for whoever has less, oldest first.
	for i := range 3 {
		write("third", fmt.Sprint(i))
	}
	known("third", 0, 3)
	if n := len(s.producers); n != maxProducers {
		t.Errorf("%d producers are remembered", n)
	}
	// A page carries whose they are.
	restored := stateOf(s.proto())
	for k, p := range s.producers {
		if r := restored.producers[k]; r == nil || r.epoch != p.epoch || r.last != p.last {
			t.Fatalf("restored, producer %+v is at %+v; it was at %+v", k, r, p)
		}
	}
}

// A page from before producers had owners does not say whose they are: the log does.
func TestPageOfProducersWithoutOwner(t *testing.T) {
	s := stateOf(&schema.SessionState{Epoch: "e", HeadSeq: 1, Producers: []*schema.ProducerState{{Id: "p", Epoch: 1, LastSeq: 1, Runs: []*schema.ProducerRun{{ProducerSeq: 1, Seq: 1, Count: 1}}}}})
	if len(s.producers) > 0 || !s.forgot {
		t.Errorf("%d producers are remembered; that others were: %v", len(s.producers), s.forgot)
	}
}
