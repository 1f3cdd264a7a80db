package broker

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"slices"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/protobuf/proto"

	"tidemark/schema"
)

// store stores what is queued, and all there is of the sessions in flush. It goes on trying while NATS is away, until ctx ends or the guard says to stop; the projection is of no use after an error.
func (p *projection) store(ctx context.Context, flush []*projected) error {
	if err := p.round(ctx, flush); err != nil {
		return err
	}
	return p.relieve(ctx)
}

func (p *projection) round(ctx context.Context, flush []*projected) error {
	// Before what says that these frames were projected.
	if err := p.storeWork(ctx); err != nil {
		return err
	}
	for _, s := range flush {
		if s.count > 0 && s.open > 0 {
			p.queuePage(s)
		}
		p.queueRecord(s)
	}
	jobs := p.jobs
	p.jobs, p.jobBytes = nil, 0
	for kind := range writeKinds {
		var some []*write
		for _, w := range jobs {
			if w.kind == kind {
				some = append(some, w)
			}
		}
		if err := p.storeAll(ctx, some); err != nil {
			return err
		}
	}
	for _, w := range jobs {
		if w.kind == writePage {
			w.s.unstored = w.s.open
		}
	}
	for _, s := range flush {
		s.unstored, s.open = 0, 0
		delete(p.dirty, s)
	}
	p.metrics.rounds.Inc()
	return nil
}

// queueRecord queues the session's record in the registry, if it has something new to say.
func (p *projection) queueRecord(s *projected) {
	if s.st.head == 0 || s.recordHead == s.st.head && s.recordStatus == s.st.status {
		return
	}
	data, err := proto.MarshalOptions{Deterministic: true}.Marshal(recordOf(s.id, s.st))
	if err != nil || len(data) > p.maxMessage {
		p.logger.Error("the session cannot be recorded in the registry", "session", s.id.String(), "bytes", len(data), "error", err)
		return
	}
	head, status := s.st.head, s.st.status
	p.queue(&write{
		s: s, kind: writeRecord, subject: registrySubject(s.ln), data: data, through: s.st.frame, rev: s.recordRev,
		stored: func(rev uint64) {
			s.recordRev, s.recordHead, s.recordStatus = rev, head, status
			s.transition = s.st.status != status
		},
	})
}

// storeAll stores writes that do not depend on each other.
func (p *projection) storeAll(ctx context.Context, writes []*write) error {
	var retry backoff
	for first := true; len(writes) > 0; first = false {
		if !first {
			p.metrics.retries.Inc()
			if !retry.wait(ctx, errNotStored) {
				return context.Cause(ctx)
			}
		}
		if err := p.guard.fresh(ctx); err != nil {
			return err
		}
		done := make([]bool, len(writes))
		failures := make([]error, len(writes))
		for from := 0; from < len(writes); from += maxWrites {
			some := writes[from:min(from+maxWrites, len(writes))]
			err := together(len(some), func(i int) (err error) {
				done[from+i], err = p.storeOne(ctx, some[i])
				failures[from+i] = err
				if _, stop := errors.AsType[stopError](err); stop || ctx.Err() != nil {
					return err
				}
				return nil
			})
			if err != nil {
				return err
			}
		}
		var left []*write
		for i, w := range writes {
			if !done[i] {
				left = append(left, w)
			}
		}
		if some := slices.IndexFunc(failures, func(err error) bool { return err != nil }); first && some >= 0 {
			p.logger.Warn("what was derived from the log could not be stored yet", "messages", len(left), "error", failures[some])
		}
		writes = left
	}
	return nil
}

// errNotStored lets a backoff wait.
var errNotStored = errors.New("broker: not stored yet")

// stopError ends a projection.
type stopError struct{ error }

func (e stopError) Unwrap() error { return e.error }

// storeOne makes one attempt to store a write. done: the stream has it, or something newer.
func (p *projection) storeOne(ctx context.Context, w *write) (done bool, err error) {
	rev, err := publishFenced(ctx, p.nc, w.subject, w.data, w.rev)
	if err == nil {
		p.wrote(w, rev)
		return true, nil
	}
	if errors.Is(err, nats.ErrMaxPayload) {
		p.logger.Error("NATS takes no message of this size; the session is read from the log instead", "session", w.s.id.String(), "bytes", len(w.data))
		return true, nil
	}
	if api, ok := errors.AsType[*jetstream.APIError](err); !ok || api.ErrorCode != errCodeWrongLastSequence {
		return false, err
	}
	p.metrics.conflicts.Inc()
	return p.settle(ctx, w)
}

func (p *projection) wrote(w *write, rev uint64) {
	w.stored(rev)
	p.metrics.stored(w)
	if w.kind == writeRecord {
		p.recordsStored.Add(1)
	} else {
		p.pagesStored.Add(1)
	}
}

// settle looks at what is there instead of what the write expected.
//
//	nothing                    removed by a deletion, or by hand: written anew, if we are still the one to write
//	not to be read             damaged: overwritten
//	older (through < ours)     an earlier version that we did not know: overwritten
//	the same, byte for byte    our own write, whose acknowledgement was lost, or another projector's: done
//	the same frame otherwise   damaged, or made by another version of the program: overwritten
//	newer                      another projector is ahead of us: done
func (p *projection) settle(ctx context.Context, w *write) (done bool, err error) {
	stream := p.r.pageOf(w.s.ln)
	if w.kind == writeRecord {
		stream = registryStream
	}
	m, err := p.r.lastFromLeader(ctx, stream, w.subject)
	if err != nil {
		return false, err
	}
	if m == nil {
		w.rev = 0
		may, err := p.guard.confirm(ctx, w.s.ln, w.s.st.epoch)
		return !may && err == nil, err
	}
	through, ok := w.throughOf(m)
	if ok && (through > w.through || through == w.through && bytes.Equal(m.data, w.data)) {
		w.stored(m.seq)
		return true, nil
	}
	w.rev = m.seq
	rev, err := publishFenced(ctx, p.nc, w.subject, w.data, w.rev)
	if err != nil {
		return false, err
	}
	p.wrote(w, rev)
	return true, nil
}

// throughOf is how new a stored message is; false where it cannot be read.
func (w *write) throughOf(m *stored) (uint64, bool) {
	if w.kind == writeRecord {
		var record schema.SessionRecord
		// A deletion by the client of a key-value bucket leaves a message without a body.
		if proto.Unmarshal(m.data, &record) != nil || record.GetEpoch() == "" {
			return 0, false
		}
		return record.GetThrough(), true
	}
	pg, err := decodePage(m.data, w.slot, w.part, m.seq)
	if err != nil {
		return 0, false
	}
	return pg.through, true
}

// publishFenced stores a message, if the last one of its subject is the one with sequence rev, and returns its sequence.
func publishFenced(ctx context.Context, nc *connection, subject string, data []byte, rev uint64) (uint64, error) {
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	reply, err := nc.roundTrip(ctx, &nats.Msg{Subject: subject, Data: data, Header: nats.Header{
		jetstream.ExpectedLastSubjSeqHeader: {strconv.FormatUint(rev, 10)},
	}})
	if err != nil {
		return 0, err
	}
	var ack struct {
		Error *jetstream.APIError `json:"error"`
		Seq   uint64              `json:"seq"`
	}
	if err := json.Unmarshal(reply.Data, &ack); err != nil {
		return 0, err
	}
	if ack.Error != nil {
		return 0, ack.Error
	}
	return ack.Seq, nil
}

// due are the sessions whose pages and records are to be stored now, and those of which only the record is.
func (p *projection) due(now time.Time) (flush, records []*projected) {
	for s := range p.dirty {
		switch {
		case now.Sub(s.last) >= flushIdle, now.Sub(s.openSince) >= flushAfter:
			flush = append(flush, s)
		case s.transition:
			records = append(records, s)
		}
	}
	return flush, records
}

// tick stores what is due.
func (p *projection) tick(ctx context.Context, now time.Time) error {
	flush, records := p.due(now)
	for _, s := range records {
		p.queueRecord(s)
	}
	if len(flush) == 0 && len(p.jobs) == 0 {
		return nil
	}
	return p.store(ctx, flush)
}

// flush stores everything.
func (p *projection) flush(ctx context.Context) error {
	var all []*projected
	for s := range p.dirty {
		all = append(all, s)
	}
	return p.store(ctx, all)
}

// relieve forgets sessions until they are within the bound: those without a frame for longest first, storing what there is of them.
func (p *projection) relieve(ctx context.Context) error {
	for p.size > p.budget && p.idle.Len() > 1 {
		// Down to three quarters, so that storing pays.
		var out, flush []*projected
		left := p.size
		for e := p.idle.Front(); e != p.idle.Back() && left > p.budget*3/4 && len(flush) < maxWrites; e = e.Next() {
			s := e.Value.(*projected) //nolint:errcheck,forcetypeassert // the list holds nothing else
			out = append(out, s)
			left -= s.size
			if _, dirty := p.dirty[s]; dirty {
				flush = append(flush, s)
			}
		}
		if err := p.round(ctx, flush); err != nil {
			return err
		}
		for _, s := range out {
			p.drop(s)
		}
		p.metrics.evicted.Add(float64(len(out)))
	}
	return nil
}

// bury removes what was derived from a session that was deleted.
func (p *projection) bury(ctx context.Context, ln lane, tombstone *frame) error {
	var retry backoff
	for {
		err := p.clear(ctx, ln, tombstone.StreamSeq)
		if err == nil {
			return nil
		}
		if _, stop := errors.AsType[stopError](err); stop {
			return err
		}
		p.logger.Warn("the pages of a deleted session could not be removed yet", "session", ln.name, "error", err)
		if !retry.wait(ctx, errNotStored) {
			return context.Cause(ctx)
		}
	}
}

// clear removes the session's pages and its record, as far as they were stored before its tombstone was projected. A projector that was thought dead must not take away what the next history has stored
// meanwhile: so the end of the page stream is read first, then the guard says whether we are still the one to write, and only what is before that end is purged. The record is named by its sequence.
func (p *projection) clear(ctx context.Context, ln lane, streamSeq uint64) error {
	js, err := jetstream.New(p.nc.Conn)
	if err != nil {
		return err
	}
	pages, err := js.Stream(ctx, p.r.pageOf(ln))
	if err != nil {
		return err
	}
	end := pages.CachedInfo().State.LastSeq + 1
	graves, err := p.workGraves(ctx, js, ln)
	if err != nil {
		return err
	}
	may, err := p.guard.mayClear(ctx, ln, streamSeq)
	if err != nil {
		return err
	}
	if may {
		for _, g := range graves {
			if err := g.purge(ctx); err != nil {
				return err
			}
		}
		if err := pages.Purge(ctx, jetstream.WithPurgeSubject(ln.pagesSubject()), jetstream.WithPurgeSequence(end)); err != nil {
			return err
		}
	}
	m, err := p.r.lastFromLeader(ctx, registryStream, registrySubject(ln))
	if m == nil || err != nil {
		return err
	}
	if through, ok := (&write{kind: writeRecord}).throughOf(m); ok && through > streamSeq {
		return nil
	}
	registry, err := js.Stream(ctx, registryStream)
	if err != nil {
		return err
	}
	return registry.Purge(ctx, jetstream.WithPurgeSubject(m.subject), jetstream.WithPurgeSequence(m.seq+1))
}
