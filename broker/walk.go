package broker

import (
	"context"
	"slices"

	"tidemark/schema"
)

// walked is what a walk back through a session's frames found.
type walked struct {
	// frames are the oldest of those found, in order, without a gap.
	frames []*frame
	// later are the stream sequences of those that followed and were too much to hold, newest first.
	later []uint64
	// reached: the walk came to the seq that was wanted. Otherwise what is before the oldest frame is not in the log any more.
	reached bool
}

// maxLater bounds the positions that a walk keeps.
const maxLater = 1 << 20

// walk goes back from a frame of the session, by the stream sequences that each frame says of the one before, until it has the one that holds seq `want`. It keeps about limit bytes of the oldest
// frames, at least one, whatever the distance (I8). start is the frame to begin with where the caller has it; otherwise it is read at `at`; 0 is the end of the history.
func (r *reader) walk(ctx context.Context, ln lane, epoch string, start *frame, at, want uint64, limit int) (walked, error) {
	var newestFirst []*frame
	var w walked
	size, dropped := 0, 0
	for f := start; ; f = nil {
		if f == nil {
			if at == 0 {
				break
			}
			var err error
			if f, err = r.frameAt(ctx, ln, at); isGone(err) {
				break
			} else if err != nil {
				return w, err
			}
		}
		if f.Deleted || f.Epoch != epoch {
			break
		}
		if n := len(newestFirst); n > dropped && f.Last()+1 != newestFirst[n-1].First {
			return w, schema.Refuse(schema.Code_CODE_INTERNAL,
				"The log of session %s is damaged: the frame at %d ends with seq %d and the next begins with %d.", ln.name, f.StreamSeq, f.Last(), newestFirst[n-1].First)
		}
		newestFirst = append(newestFirst, f)
		for size += len(f.Region); size > limit && len(newestFirst)-dropped > 1; dropped++ {
			size -= len(newestFirst[dropped].Region)
			if len(w.later) == maxLater {
				w.later = slices.Delete(w.later, 0, maxLater/2)
			}
			w.later = append(w.later, newestFirst[dropped].StreamSeq)
			newestFirst[dropped] = nil
		}
		if dropped > 1024 && dropped > len(newestFirst)/2 {
			newestFirst, dropped = slices.Clone(newestFirst[dropped:]), 0
		}
		if f.First <= want {
			w.reached = true
			break
		}
		at = f.Prev
	}
	w.frames = slices.Clone(newestFirst[dropped:])
	slices.Reverse(w.frames)
	return w, nil
}

// each calls fn with the session's frames that hold the seqs behind `after` up to the frame head, in order. Where retention took the first of them, it begins with the oldest that is there.
func (r *reader) each(ctx context.Context, ln lane, head *frame, after uint64, fn func(*frame) error) error {
	const atOnce = 4 << 20
	for after < head.Last() {
		w, err := r.walk(ctx, ln, head.Epoch, head, 0, after+1, atOnce)
		if err != nil {
			return err
		}
		for _, f := range w.frames {
			if err := fn(f); err != nil {
				return err
			}
			after = f.Last()
		}
		if after, err = r.forward(ctx, ln, w.later, after, fn); err != nil {
			return err
		}
	}
	return nil
}

// forward reads the frames at the positions of a walk, the last of them first, and returns the seq that it came to. It stops early where one does not continue the one before, as after a walk that kept
// not all positions, and where retention took one meanwhile.
func (r *reader) forward(ctx context.Context, ln lane, later []uint64, after uint64, fn func(*frame) error) (uint64, error) {
	for len(later) > 0 {
		n := min(len(later), maxGets)
		frames := make([]*frame, n)
		err := together(n, func(i int) (err error) {
			frames[i], err = r.frameAt(ctx, ln, later[len(later)-1-i])
			return err
		})
		if isGone(err) {
			return after, nil
		}
		if err != nil {
			return after, err
		}
		for _, f := range frames {
			if f.First != after+1 {
				return after, nil
			}
			if err := fn(f); err != nil {
				return after, err
			}
			after = f.Last()
		}
		later = later[:len(later)-n]
	}
	return after, nil
}
