package broker

import (
	"container/list"
	"context"
	"log/slog"
	"slices"
	"sync/atomic"
	"time"

	"tidemark/schema"
)

// projection folds the frames of one log stream and keeps what is derived from them: pages and registry records (DESIGN section 6). It is fed frames in the order of the stream and told when to
// store. It is owned by one goroutine.
//
// Whatever it stores is a register that only grows: it names the frame it was derived from (through), the same frames make the same bytes, and a write that would put an older version in the place of a newer
// one is refused by the fence and given up. So it may be killed anywhere, begin again at any frame before what was not stored yet, or run twice at once, as with a projector that was thought dead:
// the outcome is the same.
type projection struct {
	// Static after construction.
	r          *reader
	nc         *connection
	logger     *slog.Logger
	metrics    *projectionMetrics
	guard      guard
	post       *post // nil where nothing is watched
	maxMessage int   // bytes that a message may have
	budget     int   // bytes of sessions in memory

	sessions map[string]*projected // by log subject
	idle     *list.List            // of *projected, the one without a frame for longest first
	dirty    map[*projected]struct{}
	size     int // of all sessions, in bytes
	jobs     []*write
	jobBytes int
	work     *dispatch // nil where no work is dispatched

	// What was stored, parts of pages included.
	pagesStored, recordsStored atomic.Uint64
}

// guard says whether this projection is still the one to write. The fences make a write by another harmless, except for one: what was deleted must not come back.
type guard interface {
	// fresh returns an error where somebody else has taken over, as far as can be known without asking at every write.
	fresh(ctx context.Context) error
	// confirm asks, now, whether pages and a record of this history of the session may be stored, which somebody removed. The error is as with fresh.
	confirm(ctx context.Context, ln lane, epoch string) (bool, error)
	// mayClear asks, now, whether the pages of a session may be removed that were stored before now, because the tombstone at streamSeq is all there was when it began to ask.
	mayClear(ctx context.Context, ln lane, streamSeq uint64) (bool, error)
}

// projected is a session in the projection.
type projected struct {
	id      schema.SessionID
	ln      lane
	subject string
	at      *list.Element // in idle

	// st is the state behind the last frame. It remembers no ids.
	st *state

	// The slot in the making: `count` envelopes from seq `first`, in `parts` closed parts and the one that grows.
	slot    uint64
	first   uint64
	count   int
	parts   int
	frames  []frameMark
	pageRev uint64 // of the slot's page as it was stored last; 0 for not known
	// The growing part: envelopes from seq partFirst.
	partFirst uint64
	partCount int
	partRev   uint64
	region    []byte

	// recordRev is the stream sequence of the registry's record, 0 for not known; transition: it says another status than st, or there is none yet.
	recordRev    uint64
	recordHead   uint64
	recordStatus schema.Status
	transition   bool

	// work is how far the session's lanes in WORK have come; nil for not read.
	work map[schema.Kind]laneEnd

	// unstored is the stream sequence of the oldest frame of which something is stored neither in a page nor in the record; 0 for none. open is the same as it will be when the writes
	// that are queued are done.
	unstored, open uint64
	// openSince is when open was set; last is when the last frame came.
	openSince, last time.Time
	size            int
}

// write is a message to be stored, fenced by the version that it replaces.
type write struct {
	s       *projected
	kind    writeKind
	subject string
	data    []byte
	through uint64
	// rev is the stream sequence of the message that is there, as far as is known.
	rev uint64
	// slot and part name a page.
	slot uint64
	part int
	// stored takes the stream sequence of the message that is there now.
	stored func(rev uint64)
}

type writeKind int

// The order in which writes of one round are stored: a page after its parts, because it says that they are there; the record last, because it is what people look at.
const (
	writePart writeKind = iota
	writePage
	writeRecord
	writeKinds
)

// Bounds of what waits to be stored.
const (
	maxWrites     = 64
	maxWriteBytes = 4 << 20
	// sessionCost is what a session takes in memory beside what is counted, in bytes.
	sessionCost = 1 << 10
	// flushIdle is how long a session is without a frame before its last page is stored, flushAfter how long a frame waits at most: the length of what is read again after a crash.
	flushIdle  = 2 * time.Second
	flushAfter = 10 * time.Second
)

func newProjection(nc *connection, r *reader, g guard, budget int, m *projectionMetrics, logger *slog.Logger) *projection {
	return &projection{
		r: r, nc: nc, guard: g, budget: budget, metrics: m, logger: logger, maxMessage: int(nc.MaxPayload()) - 1<<10,
		sessions: make(map[string]*projected), idle: list.New(), dirty: make(map[*projected]struct{}),
	}
}

// add takes in a message of the log. Storing may be due afterwards: see full. The error is the context's, or that of a guard who says to stop.
func (p *projection) add(ctx context.Context, subject string, streamSeq uint64, data []byte, now time.Time) error {
	f, err := parseFrame(data)
	if err != nil {
		p.metrics.unreadable.Inc()
		p.logger.Error("a message of the log is not a frame; it is passed over", "subject", subject, "sequence", streamSeq, "error", err)
		return nil
	}
	f.StreamSeq = streamSeq
	return p.take(ctx, subject, f, now)
}

// take takes in a frame.
func (p *projection) take(ctx context.Context, subject string, f *frame, now time.Time) error {
	s := p.sessions[subject]
	if s != nil && f.StreamSeq <= s.st.frame && f.Last() <= s.st.head {
		return nil
	}
	if f.Deleted || s != nil && s.st.epoch != f.Epoch {
		if s != nil {
			p.post.forget(s.id)
		}
		p.drop(s)
		s = nil
	}
	if s == nil {
		id, err := parseLogSubject(subject)
		if err != nil {
			p.logger.Error("a frame has a subject that names no session; it is passed over", "subject", subject, "sequence", f.StreamSeq, "error", err)
			return nil
		}
		if f.Deleted {
			p.post.forget(id)
			return p.bury(ctx, laneOf(id), f)
		}
		if s, err = p.load(ctx, id, subject, f, now); s == nil || err != nil {
			return err
		}
	}
	p.fold(s, f, now)
	return nil
}

// fold folds what is new in the frame.
func (p *projection) fold(s *projected, f *frame, now time.Time) {
	s.last = now
	p.idle.MoveToBack(s.at)
	rest := f.After(s.st.head)
	if rest.Len() == 0 {
		return
	}
	if s.st.head > 0 && rest.From > s.st.head+1 {
		p.logger.Warn("retention took frames before they were projected; the session's pages go on behind the gap",
			"session", s.id.String(), "from", s.st.head+1, "to", rest.From-1)
		if s.count > 0 && s.open > 0 && slotOf(rest.From) != s.slot {
			p.queuePage(s)
		}
		s.begin(rest.From)
	}
	if s.open == 0 {
		s.open, s.openSince = f.StreamSeq, now
	}
	if s.unstored == 0 {
		s.unstored = f.StreamSeq
	}
	watched, heard := s.st.under(), false
	for rest.Len() > 0 {
		if s.count == 0 || slotOf(rest.From) != s.slot {
			s.begin(rest.From)
		}
		v := rest
		v.To = min(v.To, (s.slot+1)*schema.PageEnvelopes)
		words, err := s.st.project(f, v, func(seq uint64, e schema.Scanned, raw []byte) { p.makeWork(s, f, seq, e, raw) })
		heard = heard || words
		if err != nil {
			// The envelopes were scanned by the edge that stored them; one that cannot be read is one nobody can follow.
			p.metrics.unreadable.Inc()
			p.logger.Error("a frame holds what is not an envelope; it is passed over", "session", s.id.String(), "sequence", f.StreamSeq, "error", err)
			return
		}
		p.append(s, f, v)
		if v.To == (s.slot+1)*schema.PageEnvelopes {
			p.queuePage(s)
			s.begin(v.To + 1)
			// The rest of the frame, and the record, are still to be stored.
			s.open, s.openSince = f.StreamSeq, now
		}
		rest.From = v.To + 1
	}
	if s.st.status != s.recordStatus {
		s.transition = true
	}
	if watched || s.st.under() {
		p.post.saw(s.id, s.st, heard, now)
	}
	p.dirty[s] = struct{}{}
	p.measure(s)
}

// project folds a part of a frame, without the ids: nothing is decided on this state. folded is told of each envelope once it is. heard: some of it an agent or a worker said.
func (s *state) project(f *frame, v View, folded func(seq uint64, e schema.Scanned, raw []byte)) (heard bool, err error) {
	s.meetFrame(f)
	for seq, raw := range v.Each() {
		e, err := schema.Scan(raw)
		if err != nil {
			return heard, badFrame(err)
		}
		heard = heard || attends(e.Role(), e.Kind, e.Payload)
		s.foldPayload(seq, said{e.Kind, e.Payload, raw}, e.Producer)
		folded(seq, e, raw)
	}
	s.frame = f.StreamSeq
	return heard, nil
}

// begin starts a slot, or the part of one that is still there, at seq first.
func (s *projected) begin(first uint64) {
	s.slot, s.first, s.count, s.parts, s.pageRev = slotOf(first), first, 0, 0, 0
	s.frames = nil
	s.beginPart(first)
}

func (s *projected) beginPart(first uint64) {
	s.partFirst, s.partCount, s.partRev, s.region = first, 0, 0, nil
}

// append puts envelopes of the frame into the slot in the making.
func (p *projection) append(s *projected, f *frame, v View) {
	s.frames = append(s.frames, markOf(f))
	s.count += v.Len()
	records := v.Records()
	if len(s.region)+len(records) <= partBytes {
		s.region = append(s.region, records...)
		s.partCount += v.Len()
		return
	}
	for seq := v.From; seq <= v.To; seq++ {
		n := recordLen(records)
		if s.partCount > 0 && len(s.region)+n > partBytes {
			p.closePart(s, f.StreamSeq, seq)
		}
		s.region = append(s.region, records[:n]...)
		s.partCount++
		records = records[n:]
	}
}

// closePart queues the part that grows, which ends before seq next, and begins another.
func (p *projection) closePart(s *projected, through, next uint64) {
	if v := s.frames; len(v) > 1 && v[len(v)-1].streamSeq == through && v[len(v)-1].first >= next {
		// Nothing of this frame is in it.
		through = v[len(v)-2].streamSeq
	}
	s.parts++
	p.queuePart(s, through)
	s.beginPart(next)
}

// queuePart queues the part that grows, which is part number s.parts.
func (p *projection) queuePart(s *projected, through uint64) {
	part := &page{slot: s.slot, part: s.parts, epoch: s.st.epoch, first: s.partFirst, count: s.partCount, through: through, region: s.region}
	slot, number := s.slot, s.parts
	p.queue(&write{
		s: s, kind: writePart, slot: slot, part: number, subject: s.ln.pageSubject(slot, number), through: through, rev: s.partRev,
		data: p.encode(s, part), stored: func(rev uint64) {
			// It may have been closed, and another begun, meanwhile.
			if s.slot == slot && s.parts+1 == number {
				s.partRev = rev
			}
		},
	})
}

// queuePage queues the slot in the making as it is: its page, and the growing part where it has several.
func (p *projection) queuePage(s *projected) {
	all := &page{
		slot: s.slot, epoch: s.st.epoch, first: s.first, count: s.count, through: s.st.frame, parts: 1, state: s.st.proto(), frames: s.frames, region: s.region,
	}
	if s.parts > 0 {
		s.parts++
		p.queuePart(s, s.st.frame)
		all.parts, all.region = s.parts+1, nil
		s.parts--
	}
	slot := s.slot
	p.queue(&write{
		s: s, kind: writePage, slot: slot, subject: s.ln.pageSubject(slot, 0), through: s.st.frame, rev: s.pageRev,
		data: p.encode(s, all), stored: func(rev uint64) {
			if s.slot == slot {
				s.pageRev = rev
			}
		},
	})
}

// encode makes a page's message. Where the state makes it too large, producers keep only where their last envelopes went: older ones are looked up in the log.
func (p *projection) encode(s *projected, pg *page) []byte {
	data, err := encodePage(pg)
	if err == nil && len(data) > p.maxMessage && pg.state != nil {
		for _, producer := range pg.state.GetProducers() {
			producer.Runs = producer.GetRuns()[max(0, len(producer.GetRuns())-1):]
		}
		data, err = encodePage(pg)
	}
	if err != nil || len(data) > p.maxMessage {
		p.metrics.unreadable.Inc()
		p.logger.Error("a page cannot be stored; the session is read from the log instead", "session", s.id.String(), "slot", pg.slot, "bytes", len(data), "error", err)
		return nil
	}
	return data
}

func (p *projection) queue(w *write) {
	if w.data == nil {
		return
	}
	p.jobs = append(p.jobs, w)
	p.jobBytes += len(w.data)
}

// full reports whether so much waits to be stored that it should be now.
func (p *projection) full() bool {
	return len(p.jobs) >= maxWrites || p.jobBytes >= maxWriteBytes || p.size > p.budget
}

// measure counts what the session takes in memory.
func (p *projection) measure(s *projected) {
	size := sessionCost + len(s.subject) + cap(s.region) + cap(s.frames)*24 + len(s.st.metadata) + len(s.st.fallback) + len(s.st.answered)*8 + len(s.st.calls)*40
	for _, t := range s.st.cancelled {
		size += 32 + len(t.request) + len(t.run)
	}
	for k, producer := range s.st.producers {
		size += 200 + len(k.owner) + len(k.id) + len(producer.runs)*24
	}
	p.size += size - s.size
	s.size = size
}

// drop forgets a session and what waits to be stored of it.
func (p *projection) drop(s *projected) {
	if s == nil {
		return
	}
	delete(p.sessions, s.subject)
	delete(p.dirty, s)
	p.idle.Remove(s.at)
	p.size -= s.size
	p.jobs = slices.DeleteFunc(p.jobs, func(w *write) bool {
		if w.s == s {
			p.jobBytes -= len(w.data)
		}
		return w.s == s
	})
	if p.work != nil {
		p.work.items = slices.DeleteFunc(p.work.items, func(x *pendingItem) bool {
			if x.s == s {
				p.work.bytes -= len(x.item.envelope)
			}
			return x.s == s
		})
	}
}

// stored is the stream sequence up to which everything that is derived is stored, given that all frames up to read were taken in.
func (p *projection) stored(read uint64) uint64 {
	for s := range p.dirty {
		if s.unstored > 0 {
			read = min(read, s.unstored-1)
		}
	}
	return read
}
