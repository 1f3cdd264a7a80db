package broker

import (
	"context"
	"time"

	"github.com/oklog/ulid/v2"

	"tidemark/schema"
)

// A run's progress is worth storing about once a second, whatever its agent sends (docs/adr/0006). A publish of one workflow_progress, without a producer and without an expected seq, may wait: it is stored at
// once where the session's last stored progress is a second old, and waits at the end of the queue otherwise. There a newer one takes its place, and is what the older is answered with. Anything else that is
// submitted behind it, the end of the second, or the closing of the log stores it. Nothing else is ever held or replaced, and nothing ever changes places.

const (
	// progressEvery is how far apart progress is stored that nothing else follows.
	progressEvery = time.Second
	// maxProgressWait bounds the waiting where other edges store progress of the session all the time.
	maxProgressWait = 3 * progressEvery
	// giveWay is how much later an edge stores progress that stored the last of it, too, while another edge writes to the session: the other's comes first then, and they take turns instead of racing.
	giveWay = 50 * time.Millisecond
	// maxReplaced bounds the publishes whose answers wait for one progress. With as many it is stored before its time (I8).
	maxReplaced = 4096
)

// throttle is the part of a [Submission] that is about waiting as progress. Owned by the appender once it is queued.
type throttle struct {
	// progress: it holds a workflow_progress. mayWait: it is nothing else, so that it may wait and be replaced. due: its time has come.
	// onTime: it is due because the second has passed, as far as this edge knows, and for no other reason.
	progress, mayWait, due, onTime bool
	// came is when it was submitted.
	came time.Time
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
	s.throttle = throttle{came: time.Now()}
	for i := range s.Envelopes {
		if s.Envelopes[i].Kind == schema.KindWorkflowProgress {
			s.progress = true
		}
	}
	s.mayWait = s.progress && len(s.Envelopes) == 1 && s.Envelopes[0].Producer.ID == "" && s.Expected == nil && s.base == nil
}

// waits reports whether it may wait and its time has not come.
func (s *Submission) waits() bool { return s.mayWait && !s.due }

// delay lets a submission that may wait do so where progress was stored last at `last`, unless its time has come.
func (s *Submission) delay(last, now time.Time) {
	s.onTime = now.Sub(last) >= progressEvery
	s.due = s.onTime
	switch {
	case s.wait != nil && (len(s.wait.replaced) >= maxReplaced || !now.Before(s.wait.until)):
		s.due, s.onTime = true, false
	case s.wait == nil && !s.due:
		s.wait = &progressWait{until: now.Add(maxProgressWait)}
	}
}

// replace lets the newer of two submissions that may wait answer for the older, which does. The older stays where the newer is its retry.
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

// settle goes through the queue once: what may wait takes the place of what waits right before it, and is due where its time has come or something else is behind it. settled is how many of the queue's first
// are done with; the rest comes behind something that decides about it, and is settled once that is stored. last is when progress was stored last, or is about to be. Called by run, with mu held, while
// something in the queue may wait.
func (a *appender) settle(now time.Time) (settled int, last time.Time) {
	if a.st != nil {
		if last = a.st.progressed; last.Equal(a.reported) && time.Since(a.rivalAt) <= maxProgressWait {
			last = last.Add(giveWay)
		}
	}
	var storing map[ulid.ULID]bool // the progress among kept whose time has come
	store := func(s *Submission) {
		if storing == nil {
			storing = make(map[ulid.ULID]bool)
		}
		storing[s.Envelopes[0].ID], last = true, now
	}
	var kept []*Submission
	for i, s := range a.queue {
		if s.mayWait && (storing[s.Envelopes[0].ID] || a.has(s)) {
			// A retry of what is stored is answered with its place, and takes nobody else's.
			s.mayWait, s.progress = false, false
			a.mayWait--
		}
		var before *Submission // what waits, with s right behind it
		if end := len(kept); end > 0 && kept[end-1].waits() {
			before = kept[end-1]
		}
		if before != nil && s.mayWait {
			s = a.merge(before, s)
			kept[len(kept)-1] = s
		} else {
			kept = append(kept, s)
		}
		if before != nil && !s.mayWait {
			// Something is behind it: it will be stored.
			before.due = true
			store(before)
		}
		if s.waits() {
			s.delay(last, now)
		}
		if s.mayWait && s.due {
			store(s)
		}
		if s.tombstone || s.progress && !s.mayWait {
			// What it comes to decides about the progress behind it.
			a.queue = append(kept, a.queue[i+1:]...)
			return len(kept), last
		}
	}
	a.queue = kept
	switch end := kept[len(kept)-1]; {
	case !end.waits():
	case a.log.isClosing():
		end.due = true
	case len(kept) == 1 && end.wait.epoch == "":
		// There is a state: with nothing before it that is about to be stored, it waits only because of the time in the state.
		end.wait.epoch = a.st.epoch
	}
	return len(kept), last
}

// ready says how many of the settled submissions may be stored now; where that is none, how long the progress waits that is all there is. last is settle's.
func ready(settled []*Submission, last, now time.Time) (n int, wait time.Duration) {
	n = len(settled)
	if end := settled[n-1]; end.waits() {
		return n - 1, min(last.Add(progressEvery).Sub(now), end.wait.until.Sub(now))
	}
	return n, 0
}

// postpone takes the batch's last away where newer progress has taken its place, which answers it, or to wait on at the front of the queue, where it is progress whose time turns out not to have come: another edge has stored some. Where two edges report of a session at
// once, the same second ends for both, and who loses the race would store its own right behind the winner's. Called by run, with the state as it is known now.
func (a *appender) postpone(batch []*Submission) []*Submission {
	end := len(batch) - 1
	s := batch[end]
	if s.mayWait && a.outdates(s) {
		s.finish(Receipt{Epoch: a.st.epoch, First: a.st.reportSeq, Last: a.st.reportSeq, Replaced: true}, nil)
		return batch[:end:end]
	}
	if !s.mayWait || !s.onTime || time.Since(a.st.progressed) >= progressEvery {
		return batch
	}
	s.due, s.onTime = false, false
	a.mu.Lock()
	defer a.mu.Unlock()
	// Beyond the queue's bounds by this one at most.
	a.queue = append([]*Submission{s}, a.queue...)
	a.count += len(s.Envelopes)
	a.size += s.size
	a.mayWait++
	return batch[:end:end]
}

// outdates reports whether newer progress was stored while this waited, by another edge: an agent that lost its connection has gone on there. Stored behind that, it would be what the session shows last. What is newer, the
// ids' times say, which are their senders'; so only what was stored since this was submitted counts, and nobody's clock keeps out what comes later.
func (a *appender) outdates(s *Submission) bool {
	return a.st.reportSeq > 0 && a.st.progressed.After(s.came) && a.st.report.Time() > s.Envelopes[0].ID.Time() && !a.has(s)
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
	a.mayWait--
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
