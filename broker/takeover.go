package broker

import (
	"context"

	"tidemark/schema"
)

// state is the session's folded state at a frame of it, usually its head: the newest page's state, and the frames behind it folded on top. nil is the state of a session that has no frame, a tombstone that of
// one that was deleted. Where pages are ahead of the frame, so is the state: that happens when the frame came from a replica that lags, and the fence tells.
//
// The ids of the last envelopes are read back from pages and frames; where retention took some, the window is shorter.
func (r *reader) state(ctx context.Context, ln lane, head *frame) (*state, error) {
	st := newState()
	if head == nil {
		return st, nil
	}
	if head.Deleted {
		return st, st.foldFrame(head)
	}
	p, err := r.newestPage(ctx, ln, head.Epoch, head.Last())
	if err != nil {
		return nil, err
	}
	if p != nil {
		st = stateOf(p.state)
		if err := r.recentIDs(ctx, ln, st, p); err != nil {
			return nil, err
		}
		if p.through > head.StreamSeq {
			// The page may end within a frame; the state must not.
			if head, err = r.frameAt(ctx, ln, p.through); isGone(err) {
				return st, nil
			} else if err != nil {
				return nil, err
			}
		}
	}
	return st, r.each(ctx, ln, head, st.head, func(f *frame) error { return st.foldRest(f) })
}

// foldRest folds what the frame has behind the state's head. It need not be the next frame: where retention took some before it, folding goes on with what is there.
func (s *state) foldRest(f *frame) error {
	v := f.After(s.head)
	if v.Len() == 0 {
		return nil
	}
	part := frame{Block: Block{Epoch: f.Epoch, First: v.From, Count: v.Len(), Region: v.Records(), Time: f.Time}, StreamSeq: f.StreamSeq, Kind: f.Kind}
	return s.foldFrame(&part)
}

// recentIDs puts the ids of the last envelopes up to the page's end into the state.
func (r *reader) recentIDs(ctx context.Context, ln lane, st *state, p *page) error {
	const atOnce = 1 << 20
	s := stretch{ln: ln, epoch: p.epoch, from: st.head - min(st.head, recentIDs) + 1, to: st.head, endAt: p.through}
	for s.from <= s.to {
		views, gap, err := r.replay(ctx, s, atOnce)
		if err != nil {
			return err
		}
		if gap > 0 {
			s.from, st.recent = gap, idWindow{from: gap}
		}
		for _, v := range views {
			if st.recent.from > s.to {
				st.recent = idWindow{from: v.From}
			}
			for seq, raw := range v.Each() {
				e, err := schema.Scan(raw)
				if err != nil {
					return badFrame(err)
				}
				st.recent.add(seq, e.ID)
			}
			s.from = v.To + 1
		}
	}
	return nil
}

// producerPlace finds in the log where a producer's envelope went, of which the state remembers only that it was stored; 0 where retention took it.
func (r *reader) producerPlace(ctx context.Context, ln lane, epoch string, p schema.ProducerPlace) (uint64, error) {
	head, err := r.headFrame(ctx, ln)
	if head == nil || err != nil || head.Deleted || head.Epoch != epoch {
		return 0, err
	}
	// The first page at whose end it was stored. The pages' states say so, unless the producer was forgotten in between; then everything is read.
	newest, err := r.newestPage(ctx, ln, epoch, head.Last())
	if err != nil {
		return 0, err
	}
	if newest != nil && reached(newest.state, p) {
		found, from, to := newest, uint64(0), newest.slot
		for from < to {
			slot := from + (to-from)/2
			q, err := r.pageIn(ctx, ln, epoch, slot)
			if err != nil {
				return 0, err
			}
			if q == nil || !reached(q.state, p) {
				from = slot + 1
			} else {
				found, to = q, slot
			}
		}
		at := stretch{ln: ln, epoch: epoch, from: found.first, to: found.last(), endAt: found.through}
		if seq, err := r.placeIn(ctx, at, p); seq > 0 || err != nil {
			return seq, err
		}
	}
	return r.placeIn(ctx, stretch{ln: ln, epoch: epoch, from: 1, to: head.Last(), end: head}, p)
}

// reached reports whether the producer had come to this place, or begun a later epoch.
func reached(st *schema.SessionState, p schema.ProducerPlace) bool {
	for _, have := range st.GetProducers() {
		if have.GetId() == p.ID && string(have.GetOwner()) == p.Owner {
			return have.GetEpoch() > p.Epoch || have.GetEpoch() == p.Epoch && have.GetLastSeq() >= p.Seq
		}
	}
	return false
}

// placeIn reads a stretch to find a producer's envelope.
func (r *reader) placeIn(ctx context.Context, s stretch, p schema.ProducerPlace) (uint64, error) {
	const atOnce = 1 << 20
	for s.from <= s.to {
		views, gap, err := r.replay(ctx, s, atOnce)
		if err != nil {
			return 0, err
		}
		s.from = max(s.from, gap)
		for _, v := range views {
			for seq, raw := range v.Each() {
				if e, err := schema.Scan(raw); err == nil && e.Producer == p {
					return seq, nil
				}
			}
			s.from = v.To + 1
		}
	}
	return 0, nil
}
