package broker

import (
	"context"
	"time"

	"tidemark/schema"
)

// pagesPerRound is how many pages a replay asks for at once: 2,048 envelopes.
const pagesPerRound = 8

// stretch is a part of a session's past that is to be read: the seqs from `from` to `to`, both included.
type stretch struct {
	ln       lane
	epoch    string
	from, to uint64
	// The frame with seq `to`: itself, or its stream sequence. It is where the log is entered.
	end   *frame
	endAt uint64
}

// cold reads the envelopes behind c from where they are stored, about limit bytes, at least one if there is any: up to the frame before `before`, the oldest that the caller has itself, or up to the head where
// it has none. gap is the first seq that is still there, where retention took some behind c, otherwise 0; the views begin at it. Nothing and no error: c is the head, or the frame before `before`.
//
// The refusal is session_deleted where c's history has ended. An empty c.Epoch is any history.
func (r *reader) cold(ctx context.Context, ln lane, c Cursor, before *frame, limit int) (views []View, gap uint64, err error) {
	s := stretch{ln: ln, from: c.Seq + 1}
	if before != nil {
		s.epoch, s.to, s.endAt = before.Epoch, before.First-1, before.Prev
	} else {
		head, err := r.headFrame(ctx, ln)
		if head == nil || err != nil {
			return nil, 0, err
		}
		if head.Deleted {
			return nil, 0, schema.Refuse(schema.Code_CODE_SESSION_DELETED, "Session %s was deleted; what is published to it now begins another history.", ln.name)
		}
		s.epoch, s.to, s.end = head.Epoch, head.Last(), head
	}
	if c.Epoch != "" && c.Epoch != s.epoch {
		return nil, 0, schema.Refuse(schema.Code_CODE_SESSION_DELETED, "Session %s was deleted; what is published to it now begins another history.", ln.name)
	}
	return r.replay(ctx, s, limit)
}

// replay reads the beginning of a stretch: from pages where there are any, otherwise from the log.
//
//	slots   |-------|-------|-------|---
//	pages    =======|=======|==            written behind the log
//	frames       --------------------->    retention takes the oldest
//	          ^from                  ^to
//
// A slot without a usable page is read from the log, which is entered at the end, or at the first frame of the next page that there is: frames know the one before, not the one after.
func (r *reader) replay(ctx context.Context, s stretch, limit int) (views []View, gap uint64, err error) {
	if s.from > s.to {
		return nil, 0, nil
	}
	slot := slotOf(s.from)
	top := min(slotOf(s.to), slot+pagesPerRound-1)
	pages, err := r.pages(ctx, s.ln, s.epoch, slot, top)
	if err != nil {
		return nil, 0, err
	}
	if views, err = r.fromPages(ctx, s, pages, limit); len(views) > 0 || err != nil {
		return views, 0, err
	}
	above, err := r.above(ctx, s, pages)
	if err != nil {
		return nil, 0, err
	}
	end, endAt, to := s.end, s.endAt, s.to
	if above != nil {
		end, endAt, to = nil, above.frames[0].streamSeq, above.first-1
	}
	w, err := r.walk(ctx, s.ln, s.epoch, end, endAt, s.from, limit)
	if err != nil {
		return nil, 0, err
	}
	if !w.reached {
		// Before anybody is told that something is gone, the leader is asked: the page may be on its way to the replicas.
		p, err := r.pageFromLeader(ctx, s.ln, slot)
		if err != nil && !damaged(err) {
			return nil, 0, err
		}
		if p != nil && p.epoch == s.epoch {
			if views, err = r.fromPages(ctx, s, []*page{p}, limit); len(views) > 0 || err != nil {
				return views, 0, err
			}
		}
	}
	views = viewsOf(w.frames, s.from, to, limit)
	switch {
	case len(views) > 0 && views[0].From > s.from:
		return views, views[0].From, nil
	case len(views) > 0:
		return views, 0, nil
	case above != nil:
		if views, err = r.views(ctx, s.ln, above, above.first, limit); len(views) > 0 || err != nil {
			return clip(views, s.to), above.first, err
		}
	}
	// Nothing of the stretch is left.
	return nil, s.to + 1, nil
}

// fromPages are the envelopes that the pages have from s.from on, without a gap.
func (r *reader) fromPages(ctx context.Context, s stretch, pages []*page, limit int) ([]View, error) {
	var views []View
	next := s.from
	for _, p := range pages {
		if p == nil || p.first > next || p.last() < next || limit <= 0 || next > s.to {
			break
		}
		some, err := r.views(ctx, s.ln, p, next, limit)
		if err != nil {
			return nil, err
		}
		for _, v := range clip(some, s.to) {
			if v.From != next {
				return views, nil
			}
			views = append(views, v)
			limit -= len(v.Records())
			next = v.To + 1
		}
		if next <= p.last() {
			break
		}
	}
	return views, nil
}

// above is the first page that begins behind s.from: where it can be entered from. Nil where there is none.
func (r *reader) above(ctx context.Context, s stretch, pages []*page) (*page, error) {
	for _, p := range pages {
		if p != nil && p.first > s.from && p.first <= s.to && len(p.frames) > 0 {
			return p, nil
		}
	}
	after := slotOf(s.from) + uint64(len(pages))
	if after > slotOf(s.to) {
		return nil, nil
	}
	p, err := r.firstPage(ctx, s.ln, s.epoch, after, slotOf(s.to))
	if p == nil || err != nil || p.first > s.to || len(p.frames) == 0 {
		return nil, err
	}
	return p, nil
}

// viewsOf are the envelopes from … to of frames that follow each other, about limit bytes.
func viewsOf(frames []*frame, from, to uint64, limit int) []View {
	var views []View
	for _, f := range frames {
		v := f.After(from - 1)
		v.To = min(v.To, to)
		if v.Len() == 0 {
			continue
		}
		v = v.Limit(limit)
		views = append(views, v)
		if limit -= len(v.Records()); limit <= 0 || v.To < f.Last() {
			break
		}
	}
	return views
}

// clip ends the views at seq `to`.
func clip(views []View, to uint64) []View {
	for i, v := range views {
		if v.To >= to {
			views[i].To = to
			return views[:i+1]
		}
	}
	return views
}

// first is the oldest seq of the session's history that can still be read; 0 where there is none. head may be nil; then it is looked up.
func (r *reader) first(ctx context.Context, ln lane, epoch string, head *frame) (uint64, error) {
	if p, err := r.pageIn(ctx, ln, epoch, 0); err != nil || p != nil && p.first == 1 {
		return 1, err
	}
	if head == nil {
		var err error
		if head, err = r.headFrame(ctx, ln); head == nil || err != nil {
			return 0, err
		}
	}
	if head.Deleted || head.Epoch != epoch {
		return 0, nil
	}
	p, err := r.firstPage(ctx, ln, epoch, 0, slotOf(head.Last()))
	if err != nil {
		return 0, err
	}
	oldest := head.First
	start, at := head, uint64(0)
	if p != nil && len(p.frames) > 0 {
		// What the log has of before the page counts as well.
		oldest, start, at = p.first, nil, p.frames[0].streamSeq
	}
	w, err := r.walk(ctx, ln, epoch, start, at, 1, 0)
	if err != nil {
		return 0, err
	}
	if len(w.frames) > 0 {
		oldest = min(oldest, w.frames[0].First)
	}
	return oldest, nil
}

// since is the seq behind which the first frame begins that was stored at or after t; the head where there is none. Times are those of the edges that wrote the frames, compared in
// microseconds; where their clocks differ, the place may be off by as much. head may be nil; then it is looked up.
func (r *reader) since(ctx context.Context, ln lane, t time.Time, head *frame) (uint64, error) {
	if head == nil {
		var err error
		if head, err = r.headFrame(ctx, ln); head == nil || err != nil {
			return 0, err
		}
	}
	if head.Deleted {
		return 0, nil
	}
	want := t.UnixMicro()
	newest, err := r.newestPage(ctx, ln, head.Epoch, head.Last())
	if err != nil {
		return 0, err
	}
	if newest == nil || newest.time() < want {
		return r.sinceInLog(ctx, ln, head, want)
	}
	// The first page whose last frame is not older. Pages that are missing are older than those that are there.
	found, from, to := newest, uint64(0), newest.slot
	for from < to {
		slot := from + (to-from)/2
		p, err := r.pageIn(ctx, ln, head.Epoch, slot)
		if err != nil {
			return 0, err
		}
		if p == nil || p.time() < want {
			from = slot + 1
		} else {
			found, to = p, slot
		}
	}
	for _, m := range found.frames {
		if m.time >= want {
			return m.first - 1, nil
		}
	}
	return found.last(), nil
}

// time is when the page's last frame was written, in microseconds since 1970.
func (p *page) time() int64 {
	if n := len(p.frames); n > 0 {
		return p.frames[n-1].time
	}
	return 0
}

// sinceInLog walks back from the head to the first frame that is older.
func (r *reader) sinceInLog(ctx context.Context, ln lane, head *frame, want int64) (uint64, error) {
	for f := head; ; {
		if f.Time.UnixMicro() < want {
			return f.Last(), nil
		}
		if f.Prev == 0 {
			return f.First - 1, nil
		}
		before, err := r.frameAt(ctx, ln, f.Prev)
		if isGone(err) {
			return f.First - 1, nil
		}
		if err != nil {
			return 0, err
		}
		if before.Epoch != f.Epoch || before.Deleted {
			return f.First - 1, nil
		}
		f = before
	}
}
