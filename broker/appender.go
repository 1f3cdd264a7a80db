package broker

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/oklog/ulid/v2"
	"golang.org/x/sync/semaphore"

	"tidemark/schema"
)

// Bounds of what waits for one session's appends (I8); across sessions Config.QueueBytes holds.
const (
	maxQueueEnvelopes = 2 * maxFrameEnvelopes
	maxQueueBytes     = 4 << 20
	// keepBuffer is the largest buffer that stays with an idle appender, in bytes.
	keepBuffer = 16 << 10
	// lossesBeforeHandOver is how many races an appender loses before it asks the winner's edge to append for it.
	lossesBeforeHandOver = 2
)

// appender is the group commit of one session in this edge (DESIGN section 4). At most one append is in flight; what arrives meanwhile makes the next frame. Its goroutine lives while there is
// something to store.
type appender struct {
	// Static after construction.
	log     *JetStreamLog
	id      schema.SessionID
	lane    lane
	subject string

	// stored is the stream sequence of the last frame that was stored here: who attaches on this edge finds at least that.
	stored atomic.Uint64

	mu      sync.Mutex
	queue   []*Submission // waiting for the next frame
	count   int           // envelopes in the queue
	size    int           // bytes in the queue
	mayWait int           // submissions in the queue of which that is true
	room    chan struct{} // closed when something left the queue; nil while nobody waits
	more    chan struct{} // closed when something comes into the queue; nil while run does not wait for it
	running bool
	used    time.Time // when it last had work
	gone    bool      // the log has forgotten this appender; another one is the session's

	// Owned by run, or by nobody while it is not running.
	st *state
	// stale: the log must be asked whether somebody else's frame is on top of what st knows. confirmed: it was, for the batch in hand.
	stale, confirmed bool
	// buried is the id of the last tombstone that was read.
	buried string
	// rival is the edge that last wrote to the session beside us, and rivalAt is when we saw it.
	rival   string
	rivalAt time.Time
	// lean is the rival, once it has won too many races: what is to be appended goes there as long as it writes.
	lean string
	// reported is when progress was stored last that was stored here.
	reported time.Time
	buf      []byte
}

// errGoneAppender: the log has forgotten the appender; look for the session's anew.
var errGoneAppender = errors.New("broker: the appender is gone")

// submit queues a submission, waiting for room. The error says why it is not queued: errGoneAppender, or a refusal.
func (a *appender) submit(ctx context.Context, s *Submission) error {
	s.classify()
	var timer *time.Timer
	for {
		a.mu.Lock()
		if a.gone {
			a.mu.Unlock()
			return errGoneAppender
		}
		if a.count == 0 || a.count+len(s.Envelopes) <= maxQueueEnvelopes && a.size+s.size <= maxQueueBytes {
			a.queue = append(a.queue, s)
			a.count += len(s.Envelopes)
			a.size += s.size
			if s.mayWait {
				a.mayWait++
			}
			if a.more != nil {
				close(a.more)
				a.more = nil
			}
			if !a.running {
				a.running = true
				a.log.appending.Go(a.run)
			}
			a.mu.Unlock()
			return nil
		}
		if a.room == nil {
			a.room = make(chan struct{})
		}
		room := a.room
		a.mu.Unlock()
		if timer == nil {
			timer = time.NewTimer(time.Until(s.deadline))
			defer timer.Stop()
		}
		select {
		case <-room:
		case <-timer.C:
			return a.log.unavailable(a.id, errors.New("the session's queue is full"))
		case <-ctx.Done():
			return schema.Refuse(schema.Code_CODE_UNAVAILABLE, "The publish to session %s was given up while it waited for room.", a.id)
		}
	}
}

// next takes the submissions of the next frame from the queue; none ends the run. A progress that is all there is waits here for its time, or for anything else to be submitted.
func (a *appender) next() []*Submission {
	for {
		a.mu.Lock()
		n, wait := len(a.queue), time.Duration(0)
		if a.mayWait > 0 {
			until := a.queue[0].deadline
			a.mu.Unlock()
			a.learn(until)
			a.mu.Lock()
			now := time.Now()
			settled, last := a.settle(now)
			n, wait = ready(a.queue[:settled], last, now)
		}
		if n > 0 || wait == 0 {
			batch := a.take(n)
			a.mu.Unlock()
			return batch
		}
		more := make(chan struct{})
		a.more = more
		a.mu.Unlock()
		timer := time.NewTimer(wait)
		select {
		case <-more:
		case <-timer.C:
		case <-a.log.closing:
		}
		timer.Stop()
	}
}

// take takes as many of the queue's first `most` submissions as make a frame. Called by run, with mu held.
func (a *appender) take(most int) []*Submission {
	var n, count, size int
	for _, s := range a.queue[:most] {
		if n > 0 && (count+len(s.Envelopes) > maxFrameEnvelopes || size+s.size > maxFrameBytes || s.tombstone || a.queue[n-1].tombstone) {
			break
		}
		n++
		count += len(s.Envelopes)
		size += s.size
		if s.mayWait {
			a.mayWait--
		}
	}
	a.used = time.Now()
	if n == 0 {
		a.running, a.queue = false, nil
		if cap(a.buf) > keepBuffer {
			a.buf = nil
		}
		return nil
	}
	batch := a.queue[:n:n]
	if first := batch[0]; first.wait != nil {
		// Its waiting was not for NATS.
		first.deadline = a.used.Add(a.log.cfg.HoldFor)
	}
	a.queue = a.queue[n:]
	a.count -= count
	a.size -= size
	a.makeRoom()
	return batch
}

// makeRoom tells those who wait for room in the queue. Called with mu held.
func (a *appender) makeRoom() {
	if a.room != nil {
		close(a.room)
		a.room = nil
	}
}

func (a *appender) run() {
	for {
		batch := a.next()
		if batch == nil {
			return
		}
		if batch[0].tombstone {
			a.bury(batch[0])
			continue
		}
		a.store(batch)
	}
}

// store sees to it that every submission of the batch is answered.
func (a *appender) store(batch []*Submission) {
	ctx, cancel := context.WithDeadlineCause(a.log.storing, batch[0].deadline, errHeldTooLong)
	defer cancel()
	losses := 0
	a.confirmed = false
	var retry backoff
	for len(batch) > 0 {
		if err := a.know(ctx, &batch); err != nil {
			if !retry.wait(ctx, err) {
				a.refuse(batch, err)
				return
			}
			continue
		}
		if len(batch) == 0 {
			return
		}
		if batch = a.postpone(batch); len(batch) == 0 {
			return
		}
		if edge := a.leaning(batch, losses); edge != "" {
			var err error
			if batch, err = a.handOver(ctx, edge, batch); err != nil {
				// Whether the other edge stores them all the same, the frames that are read before the next race will tell.
				a.log.logger.Info("hand-over failed; appending here", "session", a.id.String(), "to", edge, "error", err)
				// The head that is read now may still be the other edge's, though that is dead: only losing again leads back to it.
				a.rival, a.lean, losses = "", "", 0
				a.behind()
			}
			continue
		}
		d, sure := a.draft(ctx, batch)
		if !sure {
			// Something would be answered without a frame, that is without the fence saying that the state is the newest.
			d.rollback()
			a.behind()
			continue
		}
		if len(d.taken) == 0 {
			return
		}
		f, data := d.frame(a.log.edge, ulid.Make(), time.Now(), a.buf)
		a.buf = data
		seq, err := a.log.store(ctx, a, data, false)
		switch {
		case err == nil:
			f.StreamSeq = seq
			d.commit(f)
			if a.st.progressed.Equal(f.Time) {
				a.reported = f.Time
			}
			a.stored.Store(seq)
			a.log.metrics.appended(f.Count, len(data), time.Since(f.Time))
			d.releaseAll()
			for _, t := range d.taken {
				t.s.finish(t.r, nil)
			}
			return
		case errors.Is(err, errLostRace):
			// Another frame is on top of ours, or ours is: know tells, by the ids in what was stored meanwhile.
			d.rollback()
			batch = d.submissions()
			losses++
			a.log.metrics.racesLost.Inc()
			a.behind()
		default:
			d.rollback()
			// Whether the frame was stored may be unknown: the next append begins with what the log says.
			a.st = nil
			a.refuse(d.submissions(), err)
			return
		}
	}
}

// draft decides about the batch and answers what can be answered at once: refusals, and duplicates of what is stored. It does so only where the state was just compared with the log; otherwise it
// answers nothing and is not sure, if there is anything to answer.
func (a *appender) draft(ctx context.Context, batch []*Submission) (d *draft, sure bool) {
	d = newDraft(a.id, a.st)
	for _, s := range batch {
		stored, err := d.add(s, s.size)
		if stored == nil && err == nil {
			continue
		}
		if !a.confirmed {
			return d, false
		}
		for l, ok := errors.AsType[*lookup](err); ok; l, ok = errors.AsType[*lookup](err) {
			if stored, err = a.lookUp(ctx, d, s, l); stored == nil && err == nil {
				stored, err = d.add(s, s.size)
			}
		}
		switch {
		case err != nil:
			s.finish(Receipt{}, err)
		case stored != nil:
			s.finish(*stored, nil)
		}
	}
	return d, true
}

func (d *draft) submissions() []*Submission {
	batch := make([]*Submission, len(d.taken))
	for i, t := range d.taken {
		batch[i] = t.s
	}
	return batch
}

// bury ends the session's history with a tombstone.
func (a *appender) bury(s *Submission) {
	ctx, cancel := context.WithDeadlineCause(a.log.storing, s.deadline, errHeldTooLong)
	defer cancel()
	var retry backoff
	a.confirmed = false
	var sent *frame // the tombstone that lost its race, or its acknowledgement
	emptied := false
	for {
		none := []*Submission{}
		if err := a.know(ctx, &none); err != nil {
			if retry.wait(ctx, err) {
				continue
			}
			s.finish(Receipt{}, a.log.unavailable(a.id, err))
			return
		}
		if !a.confirmed {
			// What is to be deleted is the history that there is now. One that another edge began in the place of the one that is known here would be taken, below, for one that began after the tombstone.
			a.behind()
			continue
		}
		if sent != nil && (a.buried == sent.ID || a.st.head > 0 && a.st.epoch != sent.Epoch) {
			// It was stored, or the next history has begun already.
			s.finish(Receipt{Epoch: sent.Epoch}, nil)
			return
		}
		if a.st.head == 0 {
			s.finish(Receipt{}, notFound(a.id))
			return
		}
		f := &frame{Edge: a.log.edge, ID: ulid.Make().String(), Prev: a.st.frame, Deleted: true}
		f.Epoch, f.First, f.Time = a.st.epoch, a.st.head+1, time.Now()
		seq, err := a.log.store(ctx, a, f.appendHeader(nil), true)
		if errors.Is(err, errLostRace) {
			sent = f
			a.behind()
			continue
		}
		if schema.CodeOf(err) == schema.Code_CODE_STORAGE_FULL && !emptied {
			// The tombstone needs room, and what it would remove has it.
			emptied = true
			if err = a.log.empty(ctx, a.lane); err == nil {
				continue
			}
		}
		if err == nil {
			f.StreamSeq = seq
			err = a.st.foldFrame(f)
		} else {
			a.st = nil
		}
		s.finish(Receipt{Epoch: f.Epoch}, err)
		return
	}
}

// refuse answers submissions that were not stored, or of which it is not known.
func (a *appender) refuse(batch []*Submission, err error) {
	if schema.CodeOf(err) == schema.Code_CODE_INTERNAL {
		err = a.log.unavailable(a.id, err)
	}
	for _, s := range batch {
		s.finish(Receipt{}, err)
	}
}

func notFound(id schema.SessionID) error {
	return schema.Refuse(schema.Code_CODE_SESSION_NOT_FOUND, "Session %s has no envelope.", id)
}

// release gives back the bytes that it holds.
func (s *Submission) release() {
	if s.held != nil {
		s.held.Release(int64(s.size))
		s.held = nil
	}
}

// releaseAll gives back what the submissions of a stored frame hold, at once: the bound is shared by all sessions.
func (d *draft) releaseAll() {
	var held *semaphore.Weighted
	size := 0
	for _, t := range d.taken {
		if t.s.held != nil {
			held, t.s.held = t.s.held, nil
			size += t.s.size
		}
	}
	if held != nil {
		held.Release(int64(size))
	}
}

// finish answers the submission.
func (s *Submission) finish(r Receipt, err error) {
	s.release()
	if s.wait != nil {
		s.answerReplaced(r, err)
	}
	s.Done(r, err)
}

// errHeldTooLong is the cause when NATS was away for longer than Config.HoldFor.
var errHeldTooLong = errors.New("broker: held for as long as is allowed")

// backoff waits longer and longer between attempts.
type backoff struct{ d time.Duration }

// wait waits before the next attempt; false where there shall be none, because ctx has ended or err will not go away.
func (b *backoff) wait(ctx context.Context, err error) bool {
	if c := schema.CodeOf(err); c != schema.Code_CODE_UNAVAILABLE && c != schema.Code_CODE_INTERNAL {
		return false
	}
	b.d = min(max(2*b.d, 2*time.Millisecond), 250*time.Millisecond)
	t := time.NewTimer(b.d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
