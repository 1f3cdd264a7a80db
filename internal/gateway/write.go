package gateway

import (
	"slices"
	"sync"
	"time"

	"tidemark/broker"
	"tidemark/schema"
)

// outgoing is messages on their way to the transport, one behind the other in one buffer.
type outgoing struct {
	buf      []byte
	ends     []int // of each message in buf
	messages [][]byte
}

// end ends the message that was appended to buf.
func (o *outgoing) end() { o.ends = append(o.ends, len(o.buf)) }

func (o *outgoing) reset() {
	clear(o.messages)
	o.buf, o.ends, o.messages = o.buf[:0], o.ends[:0], o.messages[:0]
}

// all returns the messages, which are valid until the next change.
func (o *outgoing) all() [][]byte {
	o.messages = o.messages[:0]
	from := 0
	for _, to := range o.ends {
		o.messages = append(o.messages, o.buf[from:to:to])
		from = to
	}
	return o.messages
}

// outgoings are kept for connections that have something to say: an idle one holds no buffer.
var outgoings = sync.Pool{New: func() any { return &outgoing{buf: make([]byte, 0, 4<<10)} }} //nolint:gochecknoglobals // a pool has no state of its own

// writer is the connection's second goroutine: it alone sends, and owns the followers.
type writer struct {
	c   *conn
	out *outgoing // nil while idle

	// round is what was taken from the connection's queues and is not yet done.
	replies  []*schema.ServerFrame
	answered []*pending
	turns    []speaker

	// waiting are the attachments that are behind the tail while maxFetching others fetch.
	waiting  []*attachment
	fetching int

	// workers are the subscriptions that hold work, or may.
	workers []*subscription

	// single is the attachment that the connection was made for; nil where there is none, or not yet.
	single *attachment
	// held is a frame of a session socket that may not come before attached; nil where there is none.
	held *schema.ServerFrame

	// What the round wrote.
	publishes, envelopes int
	publishBytes         int

	stuck *time.Timer      // running while Send does
	cut   chan struct{}    // closed when the stuck timer has done its work
	late  <-chan time.Time // when appends in flight are no longer waited for; nil until the connection ends
}

func newWriter(c *conn) *writer { return &writer{c: c} }

// run writes until the connection is over, and closes the transport.
func (w *writer) run() {
	code, message := w.loop()
	// Others need not wait for the goodbye.
	w.returnWork()
	w.release()
	w.c.peer.Transport.Close(code, message)
}

// loop writes while there is something and waits while there is nothing: batches make themselves (DESIGN section 4). It returns what the transport shall say at the end.
func (w *writer) loop() (schema.Code, string) {
	c := w.c
	for {
		end, halfClosed := w.gather()
		if end != nil {
			// Nothing more is read that could settle it.
			w.returnWork()
		}
		if end != nil && end.lost != nil {
			if end.refusal != nil {
				return end.refusal.Code, end.refusal.Message
			}
			return schema.Code_CODE_UNSPECIFIED, ""
		}
		w.compose(end == nil)
		if !w.send() {
			return w.lost()
		}
		if w.more(end == nil) {
			continue
		}
		if end != nil && c.inFlight.Load() == 0 {
			return w.goodbye(end)
		}
		if end != nil && w.late == nil {
			w.late = time.After(c.g.cfg.CloseTimeout)
		}
		if end == nil && halfClosed && c.attached.Load() == 0 && c.inFlight.Load() == 0 {
			c.finish(&ending{})
			continue
		}
		w.release()
		select {
		case <-c.wake:
		case <-w.late:
			return w.goodbye(end)
		case <-c.ctx.Done():
			c.finish(c.cut())
			return w.lost()
		}
	}
}

// gather takes what the queues hold.
func (w *writer) gather() (end *ending, halfClosed bool) {
	c := w.c
	c.mu.Lock()
	defer c.mu.Unlock()
	w.replies, c.replies = c.replies, w.replies[:0]
	w.answered, c.answered = c.answered, w.answered[:0]
	if len(w.turns) == 0 {
		w.turns, c.ready = c.ready, w.turns[:0]
	}
	return c.end, c.halfClosed
}

// more says whether there is something to write without waiting for it.
func (w *writer) more(serving bool) bool {
	c := w.c
	if serving && len(w.turns) > 0 {
		return true
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.replies) > 0 || len(c.answered) > 0 || serving && len(c.ready) > 0
}

// compose makes messages of what was gathered: all replies and answers, and of the attachments in turn until there is enough for one write.
func (w *writer) compose(serving bool) {
	if len(w.replies) == 0 && len(w.answered) == 0 && (len(w.turns) == 0 || !serving) {
		return
	}
	if w.out == nil {
		w.out = outgoings.Get().(*outgoing) //nolint:errcheck // the pool holds nothing else
	}
	for i, f := range w.replies {
		w.c.codec.frame(w, f)
		w.replies[i] = nil
	}
	w.replies = w.replies[:0]
	if w.c.leaving.Load() {
		w.retire()
	}
	w.answer()
	for serving && len(w.turns) > 0 && len(w.out.buf) < roundBytes {
		s := w.turns[0]
		w.turns[0] = nil
		w.turns = w.turns[1:]
		s.speak(w)
	}
}

// answer writes what became of publishes.
func (w *writer) answer() {
	if len(w.answered) == 0 {
		return
	}
	now := time.Now()
	m := w.c.g.metrics
	for i := 0; i < len(w.answered); {
		// A run of acknowledgements is one frame; rejections stand alone.
		n := 0
		for i+n < len(w.answered) && n < maxAcks && w.answered[i+n].refusal == nil {
			n++
		}
		if n == 0 {
			p := w.answered[i]
			m.rejected(p.refusal.Code)
			w.c.g.Refused(p.refusal.Code)
			w.c.codec.rejected(w, p)
			n = 1
		} else {
			for _, p := range w.answered[i : i+n] {
				if p.runs != nil {
					w.c.keepRuns(p)
				}
			}
			w.c.codec.published(w, w.answered[i:i+n])
		}
		i += n
	}
	for i, p := range w.answered {
		m.publishSeconds.Observe(now.Sub(p.came).Seconds())
		w.publishes++
		w.publishBytes += p.size
		w.answered[i] = nil
	}
	w.answered = w.answered[:0]
}

// maxAcks bounds the acknowledgements in one frame: some 40 KiB.
const maxAcks = 2048

// send hands the round to the transport; false where the connection is over.
func (w *writer) send() bool {
	c := w.c
	if w.out != nil && len(w.out.ends) > 0 {
		messages := w.out.all()
		if w.stuck == nil {
			w.cut = make(chan struct{})
			w.stuck = time.AfterFunc(c.g.cfg.WriteTimeout, func() {
				defer close(w.cut)
				c.finish(&ending{lost: errStuck, refusal: errStuck})
				c.peer.Transport.Close(errStuck.Code, errStuck.Message)
			})
		} else {
			w.stuck.Reset(c.g.cfg.WriteTimeout)
		}
		err := c.peer.Transport.Send(c.ctx, messages)
		if !w.stuck.Stop() {
			<-w.cut
			return false
		}
		switch {
		case c.ctx.Err() != nil:
			c.finish(c.cut())
			return false
		case err != nil:
			c.finish(&ending{lost: err})
			return false
		}
		c.g.metrics.bytesOut.Add(float64(len(w.out.buf)))
		c.g.metrics.envelopesOut.Add(float64(w.envelopes))
		w.envelopes = 0
		w.out.reset()
	}
	if w.publishes > 0 {
		c.inFlight.Add(-int64(w.publishes))
		c.inFlightBytes.Add(-int64(w.publishBytes))
		w.publishes, w.publishBytes = 0, 0
	}
	w.roomMade()
	return true
}

// roomMade lets the reader go on where it waits.
func (w *writer) roomMade() {
	select {
	case w.c.room <- struct{}{}:
	default:
	}
}

// What a connection ends with that is not closed gently.
var (
	errStuck = schema.Refuse(schema.Code_CODE_PEER_DEAD, "The peer has taken nothing for too long; come again from the last seq seen.")
	errCut   = schema.Refuse(schema.Code_CODE_GOING_AWAY, "This edge stops now; attach elsewhere after the last seq seen.")
)

// lost is what the transport says where the connection broke.
func (w *writer) lost() (schema.Code, string) {
	w.c.mu.Lock()
	defer w.c.mu.Unlock()
	if r := w.c.end.refusal; r != nil {
		return r.Code, r.Message
	}
	return schema.Code_CODE_UNSPECIFIED, ""
}

// goodbye tells the peer why the connection ends.
func (w *writer) goodbye(e *ending) (schema.Code, string) {
	r := e.refusal
	if r == nil {
		return schema.Code_CODE_UNSPECIFIED, e.said
	}
	if r.Code != schema.Code_CODE_GOING_AWAY {
		// That the edge goes away was said already.
		if w.out == nil {
			w.out = outgoings.Get().(*outgoing) //nolint:errcheck // the pool holds nothing else
		}
		w.c.codec.frame(w, errorFrame(r, 0))
		w.send()
	}
	return r.Code, r.Message
}

// release gives the buffers back while there is nothing to write.
func (w *writer) release() {
	if w.out != nil {
		if cap(w.out.buf) <= 4*roundBytes {
			w.out.reset()
			outgoings.Put(w.out)
		}
		w.out = nil
	}
	if cap(w.answered) > smallQueue {
		w.answered = nil
	}
	if len(w.turns) == 0 {
		w.turns = nil
	}
	c := w.c
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.answered) == 0 && cap(c.answered) > smallQueue {
		c.answered = nil
	}
}

// smallQueue is a queue that may stay with an idle connection, in entries.
const smallQueue = 16

// turn gives one attachment its turn: it says what it has to say, about as much as one message holds.
func (w *writer) turn(a *attachment) {
	switch a.phase {
	case opening:
		if !a.back.Swap(false) {
			return
		}
		if !w.opened(a) {
			return
		}
	case fetching:
		if !a.back.Swap(false) {
			return
		}
		w.fetching--
		a.phase = live
		w.fetchNext()
		switch {
		case a.leaving():
		case a.err != nil:
			w.ended(a, a.err)
			return
		default:
			b := a.batch
			a.batch = broker.Batch{}
			w.emit(a, &b)
			a.turn()
			return
		}
	case asking:
		if !a.back.Swap(false) {
			return
		}
		a.phase = live
		if !a.leaving() {
			w.begun(a)
			return
		}
	case waiting, live:
	}
	if a.ended.Load() {
		return
	}
	if a.detach.Load() {
		w.ended(a, nil)
		return
	}
	if r := a.revoked.Load(); r != nil {
		w.ended(a, r)
		return
	}
	if a.phase == waiting {
		return
	}
	before := a.follower.Cursor()
	b, err := a.follower.Take(roundBytes)
	switch {
	case err == broker.ErrBehind: //nolint:errorlint // Take returns it as it is
		a.phase = waiting
		w.waiting = append(w.waiting, a)
		w.fetchNext()
	case err != nil:
		w.ended(a, err)
	default:
		w.emit(a, &b)
		if a.follower.Cursor() != before {
			// There may be more. Where everything was filtered out, too.
			a.turn()
		}
	}
}

// opened says where the attachment found its session; false where it did not come so far.
func (w *writer) opened(a *attachment) bool {
	a.phase = live
	if a.channel == 0 {
		w.single = a
	}
	if a.err != nil {
		w.ended(a, a.err)
		return false
	}
	at := a.follower.Attachment()
	a.through, a.told, a.tellEpoch = at.After, at.After, at.Epoch == ""
	// Behind the refreshed of the token that took the session away nothing is said of it, either.
	if !a.leaving() {
		w.c.codec.frame(w, a.attachedFrame())
	}
	if a.channel == 0 {
		// What the reader does now is answered behind this.
		w.c.told.Store(true)
		w.roomMade()
	}
	return true
}

// fetchNext starts as many reads from the log as are allowed at once.
func (w *writer) fetchNext() {
	for w.fetching < maxFetching && len(w.waiting) > 0 {
		a := w.waiting[0]
		w.waiting[0] = nil
		w.waiting = w.waiting[1:]
		if a.ended.Load() {
			continue
		}
		a.phase = fetching
		w.fetching++
		w.c.g.metrics.fetches.Inc()
		w.c.tasks.Go(a.fetch)
	}
}

// emit writes what a follower got.
func (w *writer) emit(a *attachment, b *broker.Batch) {
	if w.begins(a, b) {
		return
	}
	a.through = b.Through
	if b.First != 0 {
		w.c.codec.frame(w, a.truncatedFrame(b))
	}
	b.Views = split(b.Views)
	if len(b.Views) > 0 || b.Through >= a.told+tellThrough {
		w.c.codec.events(w, a, b)
		a.told = b.Through
	}
	if b.CaughtUp {
		a.told = b.Through
		w.c.codec.frame(w, &schema.ServerFrame{Frame: &schema.ServerFrame_CaughtUp{CaughtUp: &schema.CaughtUp{Channel: a.channel, ThroughSeq: b.Through}}})
		w.behindTheEnd(a)
	}
}

// split cuts views that are too large for one message by themselves.
func split(views []broker.View) []broker.View {
	if !slices.ContainsFunc(views, func(v broker.View) bool { return len(v.Records()) > 2*roundBytes }) {
		return views
	}
	var parts []broker.View
	for _, v := range views {
		for v.Len() > 0 {
			part := v.Limit(2 * roundBytes)
			parts = append(parts, part)
			v.From = part.To + 1
		}
	}
	return parts
}

// ended writes the attachment's last frame: that it was detached, or why it ends. The attachment that the connection was made for takes the connection with it.
func (w *writer) ended(a *attachment, err error) {
	if a.ended.Swap(true) {
		return
	}
	a.close()
	w.c.attached.Add(-1)
	w.c.g.metrics.attachments.Dec()
	switch {
	case err == nil:
		// Not the follower's cursor: what was fetched since is not written.
		w.c.codec.frame(w, &schema.ServerFrame{Frame: &schema.ServerFrame_Detached{Detached: &schema.Detached{Channel: a.channel, ThroughSeq: a.through}}})
	case a.channel == 0:
		w.c.fail(err)
	default:
		r := schema.AsRefusal(err)
		w.c.g.Refused(r.Code)
		w.c.codec.frame(w, errorFrame(r, a.channel))
	}
}
