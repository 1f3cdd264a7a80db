package gateway

import (
	"context"
	"errors"
	"time"

	"tidemark/broker"
	"tidemark/schema"
)

// What is particular about the attachment that a session socket is made for: attached is the first frame of the connection, it comes again when a session that was empty begins, and the connection
// ends behind the last envelope of a session that had ended before.

const (
	// openTimeout is how long a session socket waits to be told where its session stands: as long as a log of the default configuration ([broker.Config].HoldFor) holds publishes while NATS is away.
	// Behind it the connection ends with unavailable, so that the client tries another edge.
	openTimeout = 10 * time.Second
	// askTimeout bounds what a follower waits for before its first envelope, which is there.
	askTimeout = time.Second
)

// awaitAttached holds the reader, with what it has read, until the peer was told where its session stands, so that no answer is before that; false where the connection ended meanwhile. err is
// what the transport returned. The reader reads while it does not hold anything, so that a peer that leaves is noticed.
func (c *conn) awaitAttached(err error) bool {
	if c.peer.Protocol != SessionJSON || c.told.Load() {
		return true
	}
	if r, ok := errors.AsType[*schema.Refusal](err); err != nil && (!ok || r.Code == schema.Code_CODE_PEER_DEAD) {
		// There is nobody to be told anything.
		return true
	}
	for !c.told.Load() {
		if !c.waitForRoom() {
			return false
		}
	}
	return true
}

// open asks the log where the session stands. Called by the attachment's task.
func (a *attachment) open() {
	ctx := a.c.ctx
	if a.sole() {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, openTimeout)
		defer cancel()
	}
	a.follower, a.err = a.c.g.cfg.Log.Follow(ctx, a.id, a.options)
	if a.err != nil && ctx.Err() != nil && a.c.ctx.Err() == nil {
		a.err = &schema.Refusal{
			Code: schema.Code_CODE_UNAVAILABLE, Err: a.err,
			Message: "The log has not said for " + openTimeout.String() + " where session " + a.id.String() + " stands; come again in a moment, or to another edge.",
		}
	}
}

// sole says whether the attachment is the one that a session socket is made for.
func (a *attachment) sole() bool { return a.channel == 0 && a.c.peer.Protocol == SessionJSON }

// begins says whether the batch holds the first envelope of a session that was empty when it was attached to, so that the peer is to be told of its history before. It then keeps the batch and
// asks where the session stands by now.
func (w *writer) begins(a *attachment, b *broker.Batch) bool {
	if !a.sole() || !a.tellEpoch || b.Epoch == "" {
		return false
	}
	a.tellEpoch = false
	a.batch, a.phase = *b, asking
	w.c.tasks.Go(a.ask)
	return true
}

// ask finds where a session stands that has begun.
func (a *attachment) ask() {
	defer a.done()
	b := &a.batch
	// What the batch itself says, where the log says nothing, or the session was deleted again.
	a.stands = broker.Attachment{Epoch: b.Epoch, First: max(b.First, 1), Head: b.Through, Status: schema.Status_STATUS_OPEN}
	ctx, cancel := context.WithTimeout(a.c.ctx, askTimeout)
	defer cancel()
	if f, err := a.c.g.cfg.Log.Follow(ctx, a.id, broker.FollowOptions{Epoch: b.Epoch}); err == nil {
		a.stands = f.Attachment()
		f.Close()
	}
}

// begun tells what ask has found, and then what begins there.
func (w *writer) begun(a *attachment) {
	f := a.attachedFrame()
	m := f.GetAttached()
	m.Epoch, m.FirstSeq, m.HeadSeq, m.Status = a.stands.Epoch, a.stands.First, a.stands.Head, a.stands.Status
	w.c.codec.frame(w, f)
	b := a.batch
	a.batch, a.stands = broker.Batch{}, broker.Attachment{}
	w.emit(a, &b)
	a.turn()
}

// behindTheEnd closes a session socket that has received all of a session that had ended when it was attached to: nothing but notices will come, so the client need not stay, nor come again.
func (w *writer) behindTheEnd(a *attachment) {
	if !a.sole() {
		return
	}
	if status := a.follower.Attachment().Status; schema.Ended(status) {
		w.c.finish(&ending{said: schema.StatusWord(status)})
	}
}
