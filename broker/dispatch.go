package broker

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"tidemark/schema"
)

// The projector copies envelopes that make work to the stream WORK: each exactly once, whenever it is killed, and though two projectors may be at it for a moment (I7; docs/adr/0008).
//
// A session's items of one kind are a lane: a subject of WORK whose last message says how far the lane has come. An item is published on top of what the lane was read to be, with the fence of its subject, so
// whoever comes second finds the lane there already. Lanes are read when a session's first item is to be stored, and kept while the session is in memory. What is derived from a frame is stored
// after the frame's items: where a page, or a checkpoint, says that a frame was projected, its work was dispatched.

const (
	// maxDispatch bounds the items that wait to be stored; then they are, whatever else there is to read.
	maxDispatch      = 256
	maxDispatchBytes = 4 << 20
	// dispatchWithin is how long an item waits for the projector to have nothing else to read.
	dispatchWithin = time.Millisecond
)

// laneEnd is how far a lane has come.
type laneEnd struct {
	// rev is the stream sequence, in WORK, of its last item; 0 for none.
	rev uint64
	// through and seq are the last item's frame in the log and its seq in the session.
	through, seq uint64
}

// dispatch is what waits to be stored in WORK, in the order of the log.
type dispatch struct {
	// from is the checkpoint that the projector began behind. Frames up to it were dispatched by who was there before.
	from  uint64
	items []*pendingItem
	bytes int
	// since is when the first of them came.
	since time.Time
}

type pendingItem struct {
	s    *projected
	item *workItem
}

// makeWork puts the work of a frame's envelope, folded just now, into what waits to be stored.
func (p *projection) makeWork(s *projected, f *frame, seq uint64, e schema.Scanned, raw []byte) {
	d := p.work
	if d == nil || f.StreamSeq <= d.from || !schema.IsWork(e.Kind) || !complete(e) {
		return
	}
	if len(d.items) == 0 {
		d.since = time.Now()
	}
	d.items = append(d.items, &pendingItem{s, &workItem{
		WorkItem: &schema.WorkItem{
			Tenant: s.id.Tenant, Session: s.id.Name, Epoch: f.Epoch, Seq: seq, Through: f.StreamSeq, Stored: timestamppb.New(f.Time), RunId: s.st.run, RunRequestId: s.st.about.request, Cancelled: s.st.cancelledWork(e),
		},
		kind: e.Kind, envelope: bytes.Clone(raw), // not all of its frame
	}})
	d.bytes += len(raw)
}

// complete says whether the envelope is all of its work: of a tool call whose arguments are streamed only the last is, and who gets it reads the others from the session.
func complete(e schema.Scanned) bool {
	if e.Kind != schema.KindToolCall {
		return true
	}
	var m schema.ToolCall
	return proto.Unmarshal(e.Payload, &m) != nil || m.GetArgumentsDelta() == "" || m.GetDone()
}

// workDue says whether what waits is to be stored now. idle: there is nothing else to read.
func (p *projection) workDue(idle bool) bool {
	d := p.work
	return d != nil && len(d.items) > 0 && (idle || len(d.items) >= maxDispatch || d.bytes >= maxDispatchBytes || time.Since(d.since) >= dispatchWithin)
}

// storeWork stores what waits: the items of one session one behind the other, sessions beside each other. It goes on trying while NATS is away, until ctx ends or the guard says to stop.
func (p *projection) storeWork(ctx context.Context) error {
	d := p.work
	if d == nil || len(d.items) == 0 {
		return nil
	}
	items := d.items
	d.items, d.bytes = nil, 0
	var sessions [][]*pendingItem
	at := make(map[*projected]int)
	for _, x := range items {
		i, ok := at[x.s]
		if !ok {
			i = len(sessions)
			at[x.s] = i
			sessions = append(sessions, nil)
		}
		sessions[i] = append(sessions[i], x)
	}
	for from := 0; from < len(sessions); from += maxWrites {
		some := sessions[from:min(from+maxWrites, len(sessions))]
		if len(some) == 1 {
			if err := p.storeWorkOf(ctx, some[0]); err != nil {
				return err
			}
			continue
		}
		if err := together(len(some), func(i int) error { return p.storeWorkOf(ctx, some[i]) }); err != nil {
			return err
		}
	}
	return nil
}

// storeWorkOf stores items of one session.
func (p *projection) storeWorkOf(ctx context.Context, items []*pendingItem) error {
	s := items[0].s
	var retry backoff
	// warned is about the first of the items.
	warned := false
	for len(items) > 0 {
		err := p.guard.fresh(ctx)
		if err == nil {
			if err = p.storeItem(ctx, s, items[0].item); err == nil {
				items, retry, warned = items[1:], backoff{}, false
				continue
			}
		}
		if _, stop := errors.AsType[stopError](err); stop || ctx.Err() != nil {
			return err
		}
		p.metrics.retries.Inc()
		switch {
		case retry.d == 0 && isConflict(err):
			// Others had come further, as after a restart or a takeover. The lane is read again, and that is all.
			p.logger.Debug("the lane of a work item was another than it was known to be", "session", s.id.String(), "seq", items[0].item.GetSeq(), "error", err)
		case !warned:
			warned = true
			p.logger.Warn("work could not be dispatched yet", "session", s.id.String(), "seq", items[0].item.GetSeq(), "error", err)
		}
		if !retry.wait(ctx, errNotStored) {
			return context.Cause(ctx)
		}
	}
	return nil
}

// storeItem makes one attempt to store an item, unless the lane is past it.
func (p *projection) storeItem(ctx context.Context, s *projected, w *workItem) error {
	if s.work == nil {
		lanes, err := p.readLanes(ctx, s)
		if err != nil {
			return err
		}
		s.work = lanes
	}
	end := s.work[w.kind]
	if end.through > w.GetThrough() || end.through == w.GetThrough() && end.seq >= w.GetSeq() {
		return nil
	}
	w.Before = nil
	for _, kind := range schema.WorkKinds() {
		if rev := s.work[kind].rev; rev > 0 {
			w.Before = append(w.Before, &schema.WorkBefore{Kind: uint32(kind), WorkSeq: rev})
		}
	}
	data, err := w.encode()
	if err != nil || len(data) > p.maxMessage {
		p.metrics.unreadable.Inc()
		p.logger.Error("an envelope is too large for a work item; nobody is handed it", "session", s.id.String(), "seq", w.GetSeq(), "bytes", len(data), "error", err)
		return nil
	}
	rev, err := publishFenced(ctx, p.nc, workSubject(s.ln, w.kind), data, end.rev)
	if err != nil {
		if isConflict(err) {
			p.metrics.conflicts.Inc()
		}
		// Whatever it was, the lane may be another than it was read to be: it is read again.
		s.work = nil
		return err
	}
	s.work[w.kind] = laneEnd{rev: rev, through: w.GetThrough(), seq: w.GetSeq()}
	p.metrics.dispatched(w)
	return nil
}

// readLanes reads how far the session's lanes have come.
func (p *projection) readLanes(ctx context.Context, s *projected) (map[schema.Kind]laneEnd, error) {
	kinds := schema.WorkKinds()
	ends := make([]laneEnd, len(kinds))
	err := together(len(kinds), func(i int) error {
		m, err := p.r.lastFromLeader(ctx, workStream, workSubject(s.ln, kinds[i]))
		if m == nil || err != nil {
			return err
		}
		w, err := parseWorkItem(m.data)
		if err != nil {
			p.logger.Error("a work item cannot be read; its lane goes on behind it", "session", s.id.String(), "sequence", m.seq, "error", err)
			ends[i].rev = m.seq
			return nil
		}
		ends[i] = laneEnd{rev: m.seq, through: w.GetThrough(), seq: w.GetSeq()}
		return nil
	})
	if err != nil {
		return nil, err
	}
	lanes := make(map[schema.Kind]laneEnd, len(kinds))
	for i, kind := range kinds {
		if ends[i].rev > 0 {
			lanes[kind] = ends[i]
		}
	}
	return lanes, nil
}

// workGrave is a part of a stream that goes with a session: what stands on subject before end.
type workGrave struct {
	stream  jetstream.Stream
	subject string
	end     uint64
}

// workGraves are the items and dead letters of a session as they are now.
func (p *projection) workGraves(ctx context.Context, js jetstream.JetStream, ln lane) ([]workGrave, error) {
	if p.work == nil {
		return nil, nil
	}
	tenant, session, _ := strings.Cut(ln.name, ".")
	var graves []workGrave
	for _, x := range []struct{ stream, subject string }{
		{workStream, "work." + tenant + ".*." + session},
		{workStream, "redrive." + tenant + ".*." + session + ".>"},
		{deadStream, "dead." + tenant + ".*." + session + ".>"},
		{orderStream, "order." + tenant + ".*." + session},
	} {
		s, err := js.Stream(ctx, x.stream)
		if err != nil {
			return nil, err
		}
		if state := s.CachedInfo().State; state.Msgs > 0 {
			graves = append(graves, workGrave{s, x.subject, state.LastSeq + 1})
		}
	}
	return graves, nil
}

func (g workGrave) purge(ctx context.Context) error {
	return g.stream.Purge(ctx, jetstream.WithPurgeSubject(g.subject), jetstream.WithPurgeSequence(g.end))
}
