package broker

import (
	"context"
	"time"

	"github.com/oklog/ulid/v2"

	"tidemark/schema"
)

// A run's progress is worth storing about once a second, whatever its agent sends (docs/adr/0006). A publish of one workflow_progress, without a producer and without an expected seq, is passing: it is stored at
// once where the session's last stored progress is a second old, and waits at the end of the queue otherwise. There a newer one takes its place, and is what the older is answered with. Anything else that is
// submitted behind it, the end of the second, or the closing of the log stores it. Nothing else is ever held or replaced, and nothing ever changes places.

const (
	// progressEvery is how far apart progress is stored that nothing else follows.
	progressEvery = time.Second
	// maxProgressWait bounds the waiting where other edges store progress of the session all the time.
	maxProgressWait = 3 * progressEvery
	// maxReplaced bounds the publishes whose answers wait for one progress. With as many it is stored before its time (I8).
	maxReplaced = 4096
)

// throttle is the part of a [Submission] that is about waiting as progress. Owned by the appender once it is queued.
type throttle struct {
	// progress: it holds a workflow_progress. passing: it is nothing else, so that it may wait and be replaced. due: its time has come.
	progress, passing, due bool
	// wait is nil where it did not have to.
	wait *progressWait
}

// progressWait is what a submission that waits has to remember.
type progressWait struct {
	// until is when it waits no longer.
	until time.Time
	// epoch is the history in which it waits; empty until it is all there is in the queue.
	epoch string
	// replaced are those that it took the place of, and its own retries.
	replaced []replaced
}

// replaced is what is left of a publish whose place another one took.
type replaced struct {
	id   ulid.ULID
	done func(Receipt, error)
}

// classify notes what the submission is to the throttle.
func (s *Submission) classify() {
	s.throttle = throttle{}
	for i := range s.Envelopes {
		if s.Envelopes[i].Kind == schema.KindWorkflowProgress {
			s.progress = true
		}
	}
	s.passing = s.progress && len(s.Envelopes) == 1 && s.Envelopes[0].Producer.ID == "" && s.Expected == nil && s.base == nil
}

// waits reports whether it is passing and its time has not come.
func (s *Submission) waits() bool { return s.passing && !s.due }

// delay lets a passing submission wait where progress was stored last at `last`, unless its time has come.
func (s *Submission) delay(last, now time.Time) {
	s.due = now.Sub(last) >= progressEvery
	switch {
	case s.wait != nil:
		s.due = s.due || len(s.wait.replaced) >= maxReplaced || !now.Before(s.wait.until)
	case !s.due:
		s.wait = &progressWait{until: now.Add(maxProgressWait)}
	}
}

// replace lets the newer of two passing submissions answer for the older, which waits. The older stays where the newer is its retry.
func replace(older, newer *Submission) (stays, goes *Submission) {
	stays, goes = newer, older
	if newer.Envelopes[0].ID == older.Envelopes[0].ID {
		stays, goes = older, newer
	} else {
		newer.wait = &progressWait{until: older.wait.until, replaced: older.wait.replaced}
	}
	stays.wait.replaced = append(stays.wait.replaced, replaced{goes.Envelopes[0].ID, goes.Done})
	return stays, goes
}

// answerReplaced answers those whose place the submission took, now that it is answered itself.
func (s *Submission) answerReplaced(r Receipt, err error) {
	for _, old := range s.wait.replaced {
		if err != nil {
			old.done(Receipt{}, err)
			continue
		}
		again := old.id == s.Envelopes[0].ID
		old.done(Receipt{Epoch: r.Epoch, First: r.First, Last: r.Last, Duplicate: again, Replaced: !again}, nil)
	}
	s.wait.replaced = nil
}

// hold says how many of the queue's first submissions may be stored now; where that is none, how long the progress waits that is all there is. Called by run, with mu held, while there is a passing
// submission in the queue.
func (a *appender) hold(now time.Time) (n int, wait time.Duration) {
	var last time.Time // when progress was stored last, or is about to be
	if a.st != nil {
		last = a.st.progressed
	}
	var kept []*Submission
	var storing map[ulid.ULID]bool // the progress among kept whose time has come
	for i, s := range a.queue {
		var before *Submission
		if n := len(kept); n > 0 && kept[n-1].waits() {
			before = kept[n-1]
		}
		if s.passing && (storing[s.Envelopes[0].ID] || a.has(s)) {
			// A retry of what is stored is answered with its place, and takes nobody else's.
			s.passing, s.progress = false, false
			a.passing--
		}
		if before != nil && s.passing {
			s = a.merge(before, s)
			kept[len(kept)-1] = s
		} else {
			kept = append(kept, s)
		}
		if before != nil && !s.passing {
			// Something is behind it: it will be stored.
			before.due = true
		}
		if s.waits() {
			s.delay(last, now)
		}
		for _, p := range []*Submission{before, s} {
			if p != nil && p.passing && p.due {
				if storing == nil {
					storing = make(map[ulid.ULID]bool)
				}
				storing[p.Envelopes[0].ID], last = true, now
			}
		}
		if s.tombstone || s.progress && !s.passing {
			// What it comes to decides about the progress behind it.
			n = len(kept)
			a.queue = append(kept, a.queue[i+1:]...)
			return n, 0
		}
	}
	a.queue = kept
	n = len(kept)
	if at := kept[n-1]; at.waits() {
		if a.log.isClosing() {
			at.due = true
			return n, 0
		}
		if n--; n == 0 && at.wait.epoch == "" {
			at.wait.epoch = a.st.epoch
		}
		wait = min(last.Add(progressEvery).Sub(now), at.wait.until.Sub(now))
	}
	return n, wait
}

// has reports whether the submission's first envelope is stored, as far as the state knows.
func (a *appender) has(s *Submission) bool {
	if a.st == nil {
		return false
	}
	_, stored := a.st.recent.find(s.Envelopes[0].ID)
	return stored
}

// merge is replace for two submissions in the queue: there is one afterwards.
func (a *appender) merge(older, newer *Submission) *Submission {
	stays, goes := replace(older, newer)
	a.passing--
	a.count--
	a.size -= goes.size
	goes.release()
	a.makeRoom()
	return stays
}

// learn brings the state to where this edge knows the session to be, so that the progress of others counts. Where it cannot, the store that follows finds out and says so.
func (a *appender) learn(until time.Time) {
	ctx, cancel := context.WithDeadlineCause(a.log.storing, until, errHeldTooLong)
	defer cancel()
	none := []*Submission{}
	err := a.know(ctx, &none)
	if err == nil && a.log.tailOf(a.lane).knowsBetter(a.subject, a.st) {
		// The session was deleted, say: the tail tells that, but not how one came there.
		a.behind()
		err = a.know(ctx, &none)
	}
	if err != nil {
		a.log.logger.Debug("the time of the session's last progress is not known", "session", a.id.String(), "error", err)
	}
}

// isClosing reports whether the log is being closed: nothing waits any more.
func (l *JetStreamLog) isClosing() bool {
	select {
	case <-l.closing:
		return true
	default:
		return false
	}
}
