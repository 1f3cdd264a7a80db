package broker

import (
	"context"
	"errors"
	"slices"

	"github.com/oklog/ulid/v2"

	"tidemark/schema"
)

// maxCatchUpBytes bounds the frames that an appender holds while it folds what others wrote; further behind it takes the session over anew.
const maxCatchUpBytes = 8 << 20

// know brings the state to the session's head: by taking the session over, by what the tail has, or, after a lost race, by asking the leader. Submissions of the batch that turn out to be stored
// are answered and leave it. The head may move on at once; the fence tells.
func (a *appender) know(ctx context.Context, batch *[]*Submission) error {
	if a.st == nil {
		head, err := a.log.reader.headFrame(ctx, a.lane)
		if err != nil {
			return err
		}
		st, err := a.log.reader.state(ctx, a.lane, head)
		if err != nil {
			return err
		}
		a.st, a.stale = st, false
		if head != nil {
			a.saw(head)
		}
		return nil
	}
	if !a.stale {
		return a.fromTail(batch)
	}
	head, err := a.log.reader.headFrameFromLeader(ctx, a.lane)
	if err != nil {
		return err
	}
	if err := a.catchUp(ctx, head, batch); err != nil {
		return err
	}
	a.stale, a.confirmed = false, true
	return nil
}

// behind notes that somebody else's frame may be on top of what the state knows.
func (a *appender) behind() { a.stale = true }

// fromTail folds what the tail has of other writers' frames, so that an appender that was idle does not lose a race to learn of them.
func (a *appender) fromTail(batch *[]*Submission) error {
	for _, f := range a.log.tailOf(a.lane).framesBehind(a.subject, a.st.frame) {
		if f.Prev != a.st.frame && !f.Deleted {
			// Not the next one, as far as we know: leave it to the fence.
			return nil
		}
		a.saw(f)
		a.answerStored(f, batch)
		if err := a.st.foldFrame(f); err != nil {
			return err
		}
	}
	return nil
}

// catchUp folds the frames between the state and the session's head, walking back from the head.
func (a *appender) catchUp(ctx context.Context, head *frame, batch *[]*Submission) error {
	if head == nil {
		// Retention took all of it, or nothing was ever there.
		a.st = newState()
		return nil
	}
	a.saw(head)
	var walked []*frame
	size := 0
	for f := head; f.StreamSeq > a.st.frame; {
		a.answerStored(f, batch)
		if size += len(f.Region); size <= maxCatchUpBytes {
			walked = append(walked, f)
		}
		if f.Deleted {
			a.buried = f.ID
		}
		if f.Deleted || f.Prev == 0 {
			a.st = newState()
			break
		}
		if f.Prev <= a.st.frame {
			if f.Prev < a.st.frame {
				size = maxCatchUpBytes + 1 // another history than ours: begin anew
			}
			break
		}
		prev, err := a.log.frameAt(ctx, a.lane, f.Prev)
		if errors.Is(err, errGone) {
			size = maxCatchUpBytes + 1
			break
		}
		if err != nil {
			return err
		}
		f = prev
	}
	if size > maxCatchUpBytes {
		st, err := a.log.reader.state(ctx, a.lane, head)
		if err != nil {
			return err
		}
		a.st = st
		return nil
	}
	for _, f := range slices.Backward(walked) {
		if err := a.st.foldFrame(f); err != nil {
			return err
		}
	}
	return nil
}

// answerStored answers the submissions whose envelopes are in the frame: ours, that was stored though its acknowledgement was lost, or what another edge appended for us. That holds without any bound
// in time, because an appender reads every frame between the one it knew and the one it writes on (I3).
func (a *appender) answerStored(f *frame, batch *[]*Submission) {
	if len(*batch) == 0 || f.Deleted {
		return
	}
	waiting := make(map[ulid.ULID]int, len(*batch))
	for i, s := range *batch {
		if len(s.Envelopes) > 0 {
			waiting[s.Envelopes[0].ID] = i
		}
	}
	ids := make([]ulid.ULID, 0, f.Count)
	for _, raw := range f.All().Each() {
		e, err := schema.Scan(raw)
		if err != nil {
			return
		}
		ids = append(ids, e.ID)
	}
	var done map[int]bool
	for at, id := range ids {
		i, ok := waiting[id]
		if !ok || !(*batch)[i].is(ids[at:]) {
			continue
		}
		s := (*batch)[i]
		first := f.First + uint64(at)
		// In a frame of another edge it is an earlier try of the client, or a hand-over whose answer was lost, which is the same to it.
		s.finish(Receipt{Epoch: f.Epoch, First: first, Last: first + uint64(len(s.Envelopes)) - 1, Duplicate: f.Edge != a.log.edge}, nil)
		if done == nil {
			done = make(map[int]bool)
		}
		done[i] = true
	}
	if done != nil {
		var left []*Submission
		for i, s := range *batch {
			if !done[i] {
				left = append(left, s)
			}
		}
		*batch = left
	}
}

// is reports whether the ids begin with those of the submission's envelopes. A publish lands in one frame, so they are all there or none is.
func (s *Submission) is(ids []ulid.ULID) bool {
	if len(ids) < len(s.Envelopes) {
		return false
	}
	for i := range s.Envelopes {
		if s.Envelopes[i].ID != ids[i] {
			return false
		}
	}
	return true
}
