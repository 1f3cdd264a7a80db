package broker

import (
	"context"
	"errors"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"tidemark/schema"
)

// Follow implements [Log].
func (l *JetStreamLog) Follow(ctx context.Context, id schema.SessionID, o FollowOptions) (*Follower, error) {
	if _, err := l.ready(ctx); err != nil {
		return nil, err
	}
	var wake chan struct{}
	if o.Wake == nil {
		wake = make(chan struct{}, 1)
		o.Wake = func() {
			select {
			case wake <- struct{}{}:
			default:
			}
		}
	}
	src := &tailFollower{log: l, id: id, lane: laneOf(id), wake: o.Wake}
	l.tailOf(src.lane).open(src, src.lane.logSubject())
	at, err := src.begin(ctx, o)
	if err != nil {
		src.close()
		return nil, err
	}
	f := newFollower(src, o, at)
	f.wake = wake
	return f, nil
}

// begin finds where the session stands and where the follower starts. The tail may be a moment behind an acknowledgement that the client has seen, so no start is refused before the log was
// asked, too.
func (f *tailFollower) begin(ctx context.Context, o FollowOptions) (Attachment, error) {
	if seq := f.log.stored(f.id); seq > f.tail.position() {
		if err := f.log.tailReaches(ctx, f.tail, seq); err != nil {
			return Attachment{}, err
		}
	}
	at, err := f.beginAt(ctx, o)
	switch schema.CodeOf(err) {
	case schema.Code_CODE_SEQ_BEYOND_HEAD, schema.Code_CODE_EPOCH_MISMATCH, schema.Code_CODE_SESSION_NOT_FOUND:
		if err := f.reachHead(ctx); err != nil {
			return at, err
		}
		return f.beginAt(ctx, o)
	default:
		return at, err
	}
}

func (f *tailFollower) beginAt(ctx context.Context, o FollowOptions) (Attachment, error) {
	g, err := f.glance(ctx)
	if err != nil {
		return Attachment{}, err
	}
	at := Attachment{Epoch: g.epoch, Head: g.head}
	if at.First, err = f.first(ctx, g); err != nil {
		return at, err
	}
	if at.First == 0 {
		return Attachment{}, fitEmpty(f.id, o)
	}
	st, err := f.log.folded(ctx, f.lane, f.tail, f.at)
	if err != nil {
		return at, err
	}
	at.Status = st.status
	if at.After, err = fit(f.id, o, at); err != nil {
		return at, err
	}
	if o.startsAtTime() {
		at.After, err = f.since(ctx, g, o.Start.Since)
		at.After = max(at.After, at.First-1)
	}
	return at, err
}

// first is the oldest seq that can be read; 0 where there is none, or none any more.
func (f *tailFollower) first(ctx context.Context, g glance) (uint64, error) {
	if g.epoch == "" {
		return 0, nil
	}
	if len(g.frames) > 0 && g.before == 0 {
		return 1, nil
	}
	first, err := f.log.reader.first(ctx, f.lane, g.epoch, nil)
	if first > 0 || err != nil {
		return first, err
	}
	if len(g.frames) > 0 {
		return g.before + 1, nil
	}
	return 0, f.expire(ctx, g)
}

// expire ends the session's history in the tail, where that has nothing of it and the log neither: retention took it all.
func (f *tailFollower) expire(ctx context.Context, g glance) error {
	head, err := f.log.reader.headFrameFromLeader(ctx, f.lane)
	if head == nil && err == nil {
		f.tail.expire(f.at, g)
	}
	return err
}

// reachHead waits until the tail has come to the session's head as the log has it now.
func (f *tailFollower) reachHead(ctx context.Context) error {
	head, err := f.log.reader.headFrameFromLeader(ctx, f.lane)
	if err != nil || head == nil {
		return err
	}
	return f.log.tailReaches(ctx, f.tail, head.StreamSeq)
}

// stored is the stream sequence of the last frame of the session that this edge stored; 0 where it remembers none.
func (l *JetStreamLog) stored(id schema.SessionID) uint64 {
	l.mu.Lock()
	a := l.appenders[id]
	l.mu.Unlock()
	if a == nil {
		return 0
	}
	return a.stored.Load()
}

// startsAtTime reports whether it is the time that says where to start.
func (o *FollowOptions) startsAtTime() bool {
	return !o.Start.Head && o.Start.Last == 0 && !o.Start.Since.IsZero()
}

// fitEmpty checks a start against a session that has no envelope.
func fitEmpty(id schema.SessionID, o FollowOptions) error {
	switch {
	case o.MustExist:
		return notFound(id)
	case o.Epoch != "":
		return epochMismatch(id, o.Epoch, "")
	case !o.Start.Head && o.Start.Last == 0 && o.Start.Since.IsZero() && o.Start.After > 0:
		return beyondHead(id, o.Start.After, 0)
	}
	return nil
}

// fit checks a start against where the session stands, and returns the seq behind which it is. A start by time is left to the caller.
func fit(id schema.SessionID, o FollowOptions, at Attachment) (uint64, error) {
	switch {
	case o.Epoch != "" && o.Epoch != at.Epoch:
		return 0, epochMismatch(id, o.Epoch, at.Epoch)
	case o.Start.Head:
		return at.Head, nil
	case o.Start.Last > 0:
		return max(at.Head-min(o.Start.Last, at.Head), at.First-1), nil
	case o.Start.After > at.Head:
		return 0, beyondHead(id, o.Start.After, at.Head)
	}
	return o.Start.After, nil
}

func epochMismatch(id schema.SessionID, want, have string) error {
	r := schema.Refuse(schema.Code_CODE_EPOCH_MISMATCH, "Session %s has another history than epoch %s; the cursor is void: read from the beginning.", id, want)
	r.Epoch = have
	return r
}

func beyondHead(id schema.SessionID, after, head uint64) error {
	r := schema.Refuse(schema.Code_CODE_SEQ_BEYOND_HEAD,
		"Session %s ends at seq %d; there is no seq %d to go on behind. If the cursor came from here, the history was lost: read from the beginning.", id, head, after)
	r.Head = head
	return r
}

// glance is what the tail knows of the session, after asking the log where it knows nothing.
func (f *tailFollower) glance(ctx context.Context) (glance, error) {
	for {
		if g := f.tail.glance(f.at); g.known {
			return g, nil
		}
		head, err := f.log.head(ctx, f.lane)
		if err != nil {
			return glance{}, err
		}
		f.tail.learn(f.at, head)
		// A frame that the tail is about to bring counts as the head only when it is there.
		if head != nil {
			if err := f.log.tailReaches(ctx, f.tail, head.StreamSeq); err != nil {
				return glance{}, err
			}
		}
	}
}

// tailReaches waits until the tail has come to a stream sequence.
func (l *JetStreamLog) tailReaches(ctx context.Context, t *tail, seq uint64) error {
	ctx, cancel := context.WithTimeout(ctx, l.cfg.HoldFor)
	defer cancel()
	var retry backoff
	for t.position() < seq {
		if !retry.wait(ctx, l.unavailable(schema.SessionID{}, nil)) {
			return l.unavailable(schema.SessionID{}, context.Cause(ctx))
		}
	}
	return nil
}

// head is the session's last frame as a follower may rely on it: what the tail is told here it believes, so a replica that may lag is not asked.
func (l *JetStreamLog) head(ctx context.Context, ln lane) (*frame, error) {
	if l.layout.Load().durability == schema.Durability_DURABILITY_REPLICATED {
		return l.reader.headFrameFromLeader(ctx, ln)
	}
	return l.reader.headFrame(ctx, ln)
}

// since is the seq behind which the first frame stored at or after t begins; the head where there is none.
func (f *tailFollower) since(ctx context.Context, g glance, t time.Time) (uint64, error) {
	// The tail can tell where it holds a frame from before t, or all there are.
	if n := len(g.frames); n == 0 || g.before > 0 && !g.frames[0].Time.Before(t) {
		return f.log.reader.since(ctx, f.lane, t, nil)
	}
	for _, b := range g.frames {
		if !b.Time.Before(t) {
			return b.First - 1, nil
		}
	}
	return g.head, nil
}

// read implements source.
func (f *tailFollower) read(ctx context.Context, c Cursor, limit int) ([]View, uint64, error) {
	f.log.metrics.fetches.Inc()
	g, err := f.glance(ctx)
	if err != nil {
		return nil, 0, err
	}
	if c.Epoch != "" && c.Epoch != g.epoch {
		return nil, 0, sessionDeleted(f.id)
	}
	if c.Seq >= g.before {
		// The tail has it by now.
		return nil, 0, nil
	}
	var oldest *frame
	if len(g.frames) > 0 {
		oldest = g.frames[0]
	}
	views, gap, err := f.log.reader.cold(ctx, f.lane, Cursor{Epoch: g.epoch, Seq: c.Seq}, oldest, limit)
	if len(views) == 0 && gap == 0 && err == nil && oldest == nil {
		err = f.expire(ctx, g)
	}
	return views, gap, err
}

// folded is the session's state at the head of its lane, which must be known and not empty. It is kept in the lane, so that the next follower folds only what came since.
func (l *JetStreamLog) folded(ctx context.Context, ln lane, t *tail, at *tailLane) (*state, error) {
	g := t.glance(at)
	st := g.folded
	switch {
	case st != nil && st.epoch == g.epoch && st.head >= g.before:
		st = st.view()
	case g.before == 0:
		st = newState()
	case len(g.frames) > 0:
		// The frame that the oldest one here stands on is the head of what is behind the tail.
		behind, err := l.frameAt(ctx, ln, g.frames[0].Prev)
		if errors.Is(err, errGone) {
			// Retention took it, but pages may remember.
			behind, err = g.frames[len(g.frames)-1], nil
		}
		if err != nil {
			return nil, err
		}
		if st, err = l.reader.state(ctx, ln, behind); err != nil {
			return nil, err
		}
	default:
		head, err := l.reader.headFrame(ctx, ln)
		if err != nil {
			return nil, err
		}
		if st, err = l.reader.state(ctx, ln, head); err != nil {
			return nil, err
		}
	}
	for _, f := range g.frames {
		if f.First > st.head {
			if err := st.foldFrame(f); err != nil {
				return nil, err
			}
		}
	}
	t.mu.Lock()
	if at.known && at.epoch == st.epoch {
		at.folded = st.view()
	}
	t.mu.Unlock()
	return st, nil
}

// Session implements [Log].
func (l *JetStreamLog) Session(ctx context.Context, id schema.SessionID) (*schema.Session, error) {
	if _, err := l.ready(ctx); err != nil {
		return nil, err
	}
	f := &tailFollower{log: l, id: id, lane: laneOf(id), wake: func() {}}
	l.tailOf(f.lane).open(f, f.lane.logSubject())
	defer f.close()
	if err := f.reachHead(ctx); err != nil {
		return nil, err
	}
	at, err := f.beginAt(ctx, FollowOptions{MustExist: true})
	if err != nil {
		return nil, err
	}
	st, err := l.folded(ctx, f.lane, f.tail, f.at)
	if err != nil {
		return nil, err
	}
	return st.session(id.Name, at.First), nil
}

// follow feeds a tail from its stream until ctx ends.
func (l *JetStreamLog) follow(ctx context.Context, stream string, t *tail) {
	var retry backoff
	warm := false
	for ctx.Err() == nil {
		err := l.consume(ctx, stream, t, func() {
			retry = backoff{}
			if !warm {
				warm = true
				l.layout.Load().warm.Add(1)
			}
		})
		if ctx.Err() != nil {
			return
		}
		l.logger.Warn("the tail of a stream was interrupted; it goes on from where it was", "stream", stream, "at", t.position(), "error", err)
		retry.wait(ctx, l.unavailable(schema.SessionID{}, err))
	}
}

// consume reads the stream from where the tail is until something breaks. caughtUp is called when it has come to what was the end when it began.
func (l *JetStreamLog) consume(ctx context.Context, stream string, t *tail, caughtUp func()) error {
	s, err := l.js.Stream(ctx, stream)
	if err != nil {
		return err
	}
	now := s.CachedInfo().State
	at := t.position()
	if now.LastSeq < at {
		l.logger.Error("a log stream went back; sessions in it are read anew", "stream", stream, "was_at", at, "is_at", now.LastSeq)
		t.reset()
		at = 0
	}
	var since *time.Time
	if at == 0 {
		at = l.warmFrom(now) - 1
		if from := time.Now().Add(-l.cfg.WarmFor); at < now.LastSeq && now.FirstTime.Before(from) {
			since = &from
		}
	}
	o, err := l.conn.readOrdered(ctx, s, at, since)
	if err != nil {
		return err
	}
	defer o.close()
	info := o.cons.CachedInfo()
	t.passed(info.Delivered.Stream)
	if info.NumPending == 0 {
		caughtUp()
	}
	for {
		msg, meta, err := o.next(ctx, 0)
		if err != nil {
			return err
		}
		if meta.Sequence.Stream <= t.position() {
			continue
		}
		if err := l.takeIn(t, msg.Subject(), meta.Sequence.Stream, msg.Data()); err != nil {
			l.logger.Error("a message of the log is not a frame; it is passed over", "stream", stream, "sequence", meta.Sequence.Stream, "error", err)
		}
		if meta.NumPending == 0 || meta.Sequence.Stream >= now.LastSeq {
			caughtUp()
		}
	}
}

// takeIn puts a message of the stream into the tail.
func (l *JetStreamLog) takeIn(t *tail, subject string, seq uint64, data []byte) error {
	f, err := parseFrame(data)
	if err != nil {
		return err
	}
	f.StreamSeq, f.subject = seq, subject
	if !t.add(f) {
		l.metrics.unsound.Inc()
		return errors.New("it does not continue its session")
	}
	return nil
}

// warmFrom is the stream sequence from which about as much follows as the tail may hold.
func (l *JetStreamLog) warmFrom(s jetstream.StreamState) uint64 {
	if s.Msgs == 0 || s.Bytes <= uint64(l.cfg.TailBytes) {
		return max(s.FirstSeq, 1)
	}
	each := s.Bytes/s.Msgs + 1
	back := uint64(l.cfg.TailBytes) / each
	if back >= s.LastSeq {
		return 1
	}
	return max(s.FirstSeq, s.LastSeq-back)
}
