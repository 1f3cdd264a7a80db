package broker

import (
	"context"
	"time"

	"google.golang.org/protobuf/proto"

	"tidemark/schema"
)

// load brings a session into memory as it was before the frame f: from its newest page, and from the log where pages are missing. Nil where f is of a history that is over.
func (p *projection) load(ctx context.Context, id schema.SessionID, subject string, f *frame, now time.Time) (*projected, error) {
	s := &projected{id: id, ln: laneOf(id), subject: subject, st: newState(), last: now}
	if f.First == 1 {
		// It has no work yet. Were it otherwise, the fence would say so.
		s.work = map[schema.Kind]laneEnd{}
		return p.keep(s), nil
	}
	var pg *page
	var record *schema.SessionRecord
	err := together(2, func(i int) (err error) {
		if i == 0 {
			pg, err = p.pageBefore(ctx, s.ln, f)
		} else {
			record, s.recordRev, err = p.r.record(ctx, s.ln)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	if pg != nil && pg.epoch != f.Epoch && pg.through > f.StreamSeq {
		p.metrics.skipped.Inc()
		return nil, nil
	}
	if pg != nil && pg.epoch == f.Epoch {
		if err := p.restore(ctx, s, pg); err != nil {
			return nil, err
		}
	}
	if record.GetEpoch() == f.Epoch {
		s.recordHead, s.recordStatus = record.GetHeadSeq(), record.GetStatus()
	}
	p.keep(s)
	if s.st.head+1 < f.First && f.Prev > 0 {
		// Pages are missing: what they held is read back, and they are written again.
		before, err := p.r.frameAt(ctx, s.ln, f.Prev)
		if err == nil && before.Epoch == f.Epoch && !before.Deleted {
			p.logger.Info("pages of the session are missing or behind; they are made again from the log", "session", id.String(), "from", s.st.head+1)
			err = p.r.each(ctx, s.ln, before, s.st.head, func(f *frame) error {
				p.fold(s, f, now)
				if p.full() {
					return p.store(ctx, nil)
				}
				return nil
			})
		}
		if err != nil && !isGone(err) {
			return nil, err
		}
	}
	if s.st.head > 0 && (s.recordStatus != s.st.status || s.recordHead != s.st.head) {
		// The record was to be written when the projector before this one ended.
		s.transition = s.recordStatus != s.st.status
		if s.open == 0 {
			s.open, s.openSince = f.StreamSeq, now
		}
		s.unstored = f.StreamSeq
		p.dirty[s] = struct{}{}
	}
	return s, nil
}

func (p *projection) keep(s *projected) *projected {
	p.sessions[s.subject] = s
	s.at = p.idle.PushBack(s)
	p.measure(s)
	return s
}

// pageBefore is the page that holds the envelope before the frame, or the newest one before that. A page that is ahead of the frame is as good: the frame is in it.
func (p *projection) pageBefore(ctx context.Context, ln lane, f *frame) (*page, error) {
	slot := slotOf(f.First - 1)
	pg, err := p.r.page(ctx, ln, slot)
	if err != nil && !damaged(err) {
		return nil, err
	}
	if pg != nil && continues(pg, f) {
		return pg, nil
	}
	// A replica that lags, or a page that is gone.
	if pg, err = p.r.pageFromLeader(ctx, ln, slot); err != nil && !damaged(err) {
		return nil, err
	}
	if pg != nil && (continues(pg, f) || pg.epoch != f.Epoch) {
		return pg, nil
	}
	if slot == 0 {
		return nil, nil
	}
	return p.r.newestPage(ctx, ln, f.Epoch, slot*schema.PageEnvelopes)
}

// continues reports whether the frame goes on where the page ends, or is in it.
func continues(pg *page, f *frame) bool {
	if pg.epoch != f.Epoch {
		return false
	}
	if pg.through >= f.StreamSeq {
		return true
	}
	// Where page and log disagree, the log is right: the page is made again.
	return pg.last() == f.First-1 && pg.through == f.Prev
}

// restore takes the state, and the slot in the making, from a page.
func (p *projection) restore(ctx context.Context, s *projected, pg *page) error {
	st := stateOf(pg.state)
	if pg.full() {
		s.st = st
		s.begin(pg.last() + 1)
		return nil
	}
	s.begin(pg.first)
	s.count, s.frames, s.pageRev = pg.count, pg.frames, pg.rev
	if pg.parts == 1 {
		s.partCount, s.region = pg.count, pg.region
		s.st = st
		return nil
	}
	part, err := p.r.part(ctx, s.ln, pg, pg.parts-1)
	if err != nil {
		return err
	}
	if part == nil || part.last() < pg.last() {
		// A part is missing: the slot is made again from the log, from its beginning.
		s.begin(1)
		if pg.slot == 0 {
			return nil
		}
		older, err := p.r.newestPage(ctx, s.ln, pg.epoch, pg.slot*schema.PageEnvelopes)
		if older == nil || err != nil {
			return err
		}
		return p.restore(ctx, s, older)
	}
	v := part.block(pg.last())
	s.parts, s.partFirst, s.partCount, s.partRev, s.region = pg.parts-2, part.first, v.Len(), part.rev, v.Records()
	s.st = st
	return nil
}

// record is the session's record in the registry, and its stream sequence; nil and 0 where there is none.
func (r *reader) record(ctx context.Context, ln lane) (*schema.SessionRecord, uint64, error) {
	m, err := r.last(ctx, registryStream, registrySubject(ln))
	if m == nil || err != nil {
		return nil, 0, err
	}
	record := new(schema.SessionRecord)
	if proto.Unmarshal(m.data, record) != nil {
		return nil, m.seq, nil
	}
	return record, m.seq, nil
}
