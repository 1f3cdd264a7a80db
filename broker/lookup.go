package broker

import (
	"context"

	"tidemark/schema"
)

// lookUp finds in the log where a submission of a producer went that the state says is stored, or may be. Nothing: the producer was forgotten, or is new; the state knows it now, decide again.
//
// It reads pages, in the worst case all of the session's. That is the price of answering a retry at any time (I3), paid only for retries of long ago, and in sessions of more than
// maxProducers producers.
func (a *appender) lookUp(ctx context.Context, d *draft, s *Submission, l *lookup) (*Receipt, error) {
	if l.forgotten {
		return nil, a.remember(ctx, keyOf(l.place))
	}
	n := uint64(len(s.Envelopes))
	last := l.place
	last.Seq += n - 1
	for i := range s.Envelopes {
		want := l.place
		want.Seq += uint64(i)
		if s.Envelopes[i].Producer != want || want.Seq > a.st.producers[keyOf(want)].last {
			return nil, d.inPart(s)
		}
	}
	from, err := a.log.reader.producerPlace(ctx, a.lane, a.st.epoch, l.place)
	if err != nil {
		return nil, err
	}
	to, known := a.st.producers[keyOf(last)].place(last.Seq)
	switch {
	case n == 1:
		to = from
	case !known:
		if to, err = a.log.reader.producerPlace(ctx, a.lane, a.st.epoch, last); err != nil {
			return nil, err
		}
	}
	switch {
	case from == 0 || to == 0:
		return nil, schema.Refuse(schema.Code_CODE_PRODUCER_GAP,
			"Producer %q's seq %d was stored in session %s before, but retention has taken it; send from seq %d.", l.place.ID, l.place.Seq, a.id, a.st.producers[keyOf(last)].last+1)
	case to != from+n-1:
		// Both ends are where they are in their producer's order, so side by side means: all of them, and nothing else between.
		return nil, d.inPart(s)
	}
	return &Receipt{Epoch: a.st.epoch, First: from, Last: to, Duplicate: true}, nil
}

// remember reads the session for the last place of a producer that is not known.
func (a *appender) remember(ctx context.Context, producer producerKey) error {
	at := stretch{ln: a.lane, epoch: a.st.epoch, from: 1, to: a.st.head, endAt: a.st.frame}
	const atOnce = 1 << 20
	var places []schema.ProducerPlace
	var seqs []uint64
	for at.from <= at.to {
		views, gap, err := a.log.reader.replay(ctx, at, atOnce)
		if err != nil {
			return err
		}
		if len(views) == 0 && gap <= at.from {
			break
		}
		at.from = max(at.from, gap)
		for _, v := range views {
			for seq, raw := range v.Each() {
				if e, err := schema.Scan(raw); err == nil && keyOf(e.Producer) == producer {
					places, seqs = append(places, e.Producer), append(seqs, seq)
				}
			}
			at.from = v.To + 1
		}
		// Only the newest runs are kept; the fold below makes the same of them.
		if keep := 4 * maxProducerRuns; len(places) > keep {
			places, seqs = places[len(places)-keep:], seqs[len(seqs)-keep:]
		}
	}
	a.st.meet(producer)
	for i, p := range places {
		a.st.foldProducer(seqs[i], p)
	}
	return nil
}
