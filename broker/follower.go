package broker

import (
	"context"
	"errors"
	"sync"

	"tidemark/schema"
)

// ErrBehind says that the envelopes wanted are no longer in the tail: call [Follower.Fetch].
var ErrBehind = errors.New("broker: the follower is behind the tail")

// source is a session as a follower sees it: the one difference between the logs.
type source interface {
	// take returns what is in memory behind c, at most about limit bytes, without waiting. Nothing and no error: c is the head. [ErrBehind]: read is needed. session_deleted
	// where c's history has ended.
	take(c Cursor, limit int) ([]View, error)
	// read reads what is stored behind c, at most about limit bytes: at least one envelope where there are any. gap is the first seq that is still there, where retention took some
	// behind c, otherwise 0. Nothing and no error: c is the head, or the tail has it by now.
	read(ctx context.Context, c Cursor, limit int) (views []View, gap uint64, err error)
	// close ends the wake calls.
	close()
}

// Follower is a cursor on a session. It holds no queue: what it has not taken is in the tail or in the log, so a slow reader costs only itself (I8).
//
// Take, Fetch and Next are the read side and belong to one goroutine. Close may be called concurrently with them.
type Follower struct {
	// Static after construction.
	src   source
	kinds map[schema.Kind]bool
	merge bool
	at    Attachment
	wake  chan struct{} // of Next; nil where the caller gave a Wake

	// Owned by the reading goroutine.
	cursor   Cursor
	caughtUp bool

	closeOnce sync.Once
}

// Attachment is where a follower found its session.
type Attachment struct {
	// Epoch is empty while the session has no envelope.
	Epoch string
	// First is the oldest seq that can still be read, Head the last; both are 0 while there is none.
	First, Head uint64
	Status      schema.Status
	// After is the seq behind which the follower starts.
	After uint64
}

// Batch is what a follower gets at once.
type Batch struct {
	// Views are the envelopes, in order.
	Views []View
	// Through is the cursor behind the batch: at least the seq of the last envelope, more where some were filtered out.
	Through uint64
	// Epoch is the history they belong to.
	Epoch string
	// Wanted and First, where First is not 0, say that retention took the envelopes from Wanted to First-1: the batch begins at First (I4).
	Wanted, First uint64
	// CaughtUp: with this batch the follower has everything that was stored when it was opened. Once.
	CaughtUp bool

	// moved: the cursor did, be it over envelopes that were filtered out.
	moved bool
}

// Empty reports whether the batch says nothing. A batch without views whose Through has moved, because all of its envelopes were filtered out, is not empty: there may be more to take.
func (b *Batch) Empty() bool { return !b.moved && !b.CaughtUp && b.First == 0 }

func newFollower(src source, o FollowOptions, at Attachment) *Follower {
	f := &Follower{src: src, merge: o.MergeTokens, at: at, cursor: Cursor{Epoch: at.Epoch, Seq: at.After}}
	if len(o.Kinds) > 0 {
		f.kinds = make(map[schema.Kind]bool, len(o.Kinds))
		for _, k := range o.Kinds {
			f.kinds[k] = true
		}
	}
	return f
}

// Attachment says where the follower began.
func (f *Follower) Attachment() Attachment { return f.at }

// Cursor is the place behind the last envelope taken.
func (f *Follower) Cursor() Cursor { return f.cursor }

// Take returns what is in memory behind the cursor, at most about limit bytes, and moves the cursor. It does not wait: an empty batch means that the cursor is at the head, and that Wake
// will be called when there is more. The error is [ErrBehind], or a refusal that ends the follower: session_deleted.
func (f *Follower) Take(limit int) (Batch, error) {
	views, err := f.src.take(f.cursor, limit)
	if err != nil {
		return Batch{}, err
	}
	return f.advance(views, 0)
}

// Fetch reads what is stored behind the cursor, where Take said [ErrBehind], and moves the cursor. It may take as long as the log does. An empty batch: call Take again.
func (f *Follower) Fetch(ctx context.Context, limit int) (Batch, error) {
	views, gap, err := f.src.read(ctx, f.cursor, limit)
	if err != nil {
		return Batch{}, err
	}
	return f.advance(views, gap)
}

// Next waits until there is something and returns it, from wherever it is.
func (f *Follower) Next(ctx context.Context, limit int) (Batch, error) {
	for {
		b, err := f.Take(limit)
		if errors.Is(err, ErrBehind) {
			b, err = f.Fetch(ctx, limit)
			if err == nil && b.Empty() {
				if ctx.Err() != nil {
					return Batch{}, ctx.Err()
				}
				continue
			}
		}
		if err != nil || !b.Empty() {
			return b, err
		}
		select {
		case <-f.wake:
		case <-ctx.Done():
			return Batch{}, ctx.Err()
		}
	}
}

// Close ends the follower. It may be called more than once.
func (f *Follower) Close() { f.closeOnce.Do(f.src.close) }

// advance moves the cursor over the views and makes the batch of them.
func (f *Follower) advance(views []View, gap uint64) (Batch, error) {
	b := Batch{Views: views, moved: len(views) > 0}
	if gap > f.cursor.Seq+1 {
		b.Wanted, b.First = f.cursor.Seq+1, gap
		f.cursor.Seq = gap - 1
	}
	catching := !f.caughtUp
	for _, v := range views {
		if v.From != f.cursor.Seq+1 {
			// The sources check this; a hole that came through them would break I4, and going on would hide it.
			return Batch{}, schema.Refuse(schema.Code_CODE_INTERNAL, "The log gave seq %d where %d is next; read again from the last seq you saw.", v.From, f.cursor.Seq+1)
		}
		f.cursor.Seq = v.To
		f.cursor.Epoch = v.Epoch
	}
	if !f.caughtUp && f.cursor.Seq >= f.at.Head {
		f.caughtUp, b.CaughtUp = true, true
	}
	b.Through, b.Epoch = f.cursor.Seq, f.cursor.Epoch
	if f.kinds != nil {
		b.Views = f.filter(b.Views)
	}
	if f.merge && catching {
		b.Views = mergeTokens(b.Views)
	}
	return b, nil
}

// filter keeps the envelopes of the wanted kinds, as views of the same blocks: one for each unbroken run.
func (f *Follower) filter(views []View) []View {
	var out []View
	for _, v := range views {
		var run View
		for seq, raw := range v.Each() {
			// The envelope was scanned before it was stored.
			if e, err := schema.Scan(raw); err != nil || !f.kinds[e.Kind] {
				continue
			}
			if run.Block != nil && run.To+1 == seq {
				run.To = seq
				continue
			}
			if run.Block != nil {
				out = append(out, run)
			}
			run = View{v.Block, seq, seq}
		}
		if run.Block != nil {
			out = append(out, run)
		}
	}
	return out
}
