package gateway

import (
	"strconv"
	"sync/atomic"
	"time"

	"tidemark/broker"
	"tidemark/schema"
)

// attachment is a follower on a connection.
//
//	opening ──> live <──> waiting ──> fetching, and once live <──> asking
//	   └──────────┴──> ended <──┘────────┘
type attachment struct {
	// Static after construction.
	c       *conn
	channel uint32 // 0 for the one that the connection was made for
	id      schema.SessionID
	options broker.FollowOptions

	queued atomic.Bool // it is in conn.ready
	detach atomic.Bool // the peer wants no more; set by the reader
	// revoked is why the peer may follow no longer; set by the reader.
	revoked atomic.Pointer[schema.Refusal]
	ended   atomic.Bool // its last frame is written, or about to be; set by the writer
	back    atomic.Bool // what was opened or fetched is there; set by the task, taken by the writer

	// Owned by the task that opens, fetches or asks until back is set, and by the writer otherwise.
	placed   bool // it holds a place of the user's in the session; see enter
	follower *broker.Follower
	batch    broker.Batch
	err      error
	dry      bool // the last fetch found nothing
	// stands is where the session stands that was empty when it was attached to; see ask.
	stands broker.Attachment

	// Owned by the writer.
	phase phase
	// through is the cursor behind all that was written, or passed over by the filter; told is the one that the peer knows.
	through, told uint64
	// tellEpoch: the session was empty when it was attached, so that the first events name its history.
	tellEpoch bool
}

type phase int

const (
	opening  phase = iota // the log is asked where the session stands
	live                  // its envelopes come from memory
	waiting               // it is behind the tail, and others are fetching
	fetching              // it reads from the log
	asking                // its session has begun, and the log is asked where it stands
)

// attach handles an [schema.Attach]. The error ends the connection. Called by the reader.
func (c *conn) attach(m *schema.Attach) error {
	channel := m.GetChannel()
	if channel == 0 && m != c.peer.Follow {
		return schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "An attach needs a channel above 0, chosen by the client.")
	}
	if c.isOpen(channel) {
		return alreadyOpen(channel)
	}
	a, err := c.newAttachment(m)
	if err != nil {
		if channel == 0 {
			return err
		}
		r := schema.AsRefusal(err)
		c.g.Refused(r.Code)
		c.reply(errorFrame(r, channel))
		return nil
	}
	if c.opening == nil {
		c.opening = make(chan struct{}, maxOpening)
		c.channels = make(map[uint32]*attachment, 1)
	}
	if len(c.channels) > 2*c.g.cfg.Limits.Sessions {
		for ch, old := range c.channels {
			if old.ended.Load() {
				delete(c.channels, ch)
			}
		}
	}
	c.channels[channel] = a
	c.attached.Add(1)
	c.g.metrics.attachments.Inc()
	select {
	case c.opening <- struct{}{}:
	case <-c.ctx.Done():
		a.err = c.ctx.Err()
		a.done()
		return nil
	}
	who := c.principal
	c.tasks.Go(func() {
		if a.err = a.enter(who); a.err == nil {
			a.open()
		}
		<-c.opening
		a.done()
	})
	return nil
}

// newAttachment checks what was asked for.
func (c *conn) newAttachment(m *schema.Attach) (*attachment, error) {
	if n, most := c.attached.Load(), c.g.cfg.Limits.Sessions; n >= int64(most) {
		return nil, schema.Refuse(schema.Code_CODE_TOO_MANY_SESSIONS, "The connection follows %d sessions; at most %d are allowed. Detach some, or open another.", n, most)
	}
	id, err := schema.ParseSessionID(c.principal.Tenant, m.GetSession())
	if err != nil {
		return nil, err
	}
	if err := Authorize(c.principal, Follow, id.Name); err != nil {
		return nil, err
	}
	if len(m.GetTypes()) > schema.MaxAttachTypes {
		return nil, schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "The attach to session %q names %d types; at most %d are allowed.", id.Name, len(m.GetTypes()), schema.MaxAttachTypes)
	}
	a := &attachment{c: c, channel: m.GetChannel(), id: id}
	a.options = broker.FollowOptions{Epoch: m.GetEpoch(), MustExist: m.GetMustExist(), MergeTokens: m.GetMergeTokens(), Wake: a.turn}
	if a.options.Kinds, err = schema.ParseTypes("The attach to session "+strconv.Quote(id.Name), m.GetTypes()); err != nil {
		return nil, err
	}
	switch s := m.GetStart().(type) {
	case *schema.Attach_AfterSeq:
		a.options.Start.After = s.AfterSeq
	case *schema.Attach_Head:
		a.options.Start.Head = s.Head
	case *schema.Attach_Last:
		if s.Last == 0 {
			return nil, schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "The attach to session %q asks for the last 0 envelopes; ask for head instead.", id.Name)
		}
		a.options.Start.Last = s.Last
	case *schema.Attach_Since:
		if err := s.Since.CheckValid(); err != nil {
			return nil, schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "The attach to session %q names a time that there is not.", id.Name)
		}
		a.options.Start.Since = s.Since.AsTime()
	}
	return a, nil
}

// detached handles a [schema.Detach]. Called by the reader.
func (c *conn) detached(channel uint32) {
	a := c.channels[channel]
	if a == nil || a.ended.Load() {
		// It ended by itself while the client's frame was on its way, or never was: the answer is the same, so that nobody waits for it.
		c.reply(&schema.ServerFrame{Frame: &schema.ServerFrame_Detached{Detached: &schema.Detached{Channel: channel}}})
		return
	}
	a.detach.Store(true)
	a.turn()
}

// leaving says whether the attachment is about to end: the peer wants no more of it, or may have no more.
func (a *attachment) leaving() bool { return a.detach.Load() || a.revoked.Load() != nil }

// turn puts the attachment into the writer's queue, unless it is there. It is the follower's Wake: called from the tail, it does not block.
func (a *attachment) turn() {
	if !a.queued.Swap(true) {
		a.c.enqueue(a)
	}
}

// speak gives the attachment its turn.
func (a *attachment) speak(w *writer) {
	a.queued.Store(false)
	w.turn(a)
}

// done hands the attachment back to the writer, with what its task found.
func (a *attachment) done() {
	a.back.Store(true)
	a.turn()
}

// fetch reads from the log what is no longer in memory. Nothing but a refusal ends it: while the log is away the attachment waits for it, connected.
func (a *attachment) fetch() {
	defer a.done()
	wait := 5 * time.Millisecond
	for {
		before := a.follower.Cursor()
		a.batch, a.err = a.follower.Fetch(a.c.ctx, fetchBytes)
		switch {
		case a.err == nil && (!a.batch.Empty() || a.follower.Cursor() != before):
			a.dry = false
			return
		case a.err == nil && !a.dry:
			// The tail should have it by now. If it has not, the next read waits a little.
			a.dry = true
			return
		case a.c.ctx.Err() != nil, a.leaving(), a.err != nil && schema.CodeOf(a.err) != schema.Code_CODE_UNAVAILABLE:
			return
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-a.c.ctx.Done():
			t.Stop()
			return
		}
		wait = min(2*wait, time.Second)
	}
}

// close ends the follower and gives the user's place in the session back. Called by the writer, or when both it and the tasks have ended.
func (a *attachment) close() {
	if a.follower != nil {
		a.follower.Close()
	}
	a.leave()
}
