package gateway

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"tidemark/internal/auth"
	"tidemark/schema"
)

// Bounds of one connection (I8), beside those of [Config].
const (
	// maxReplies bounds the frames that wait to be written beside acknowledgements and events; beyond it nothing more is read.
	maxReplies = 256
	// maxOpening bounds the attachments that are being looked up at once: a client that resumes a thousand sessions shall not ask the log for all of them together.
	maxOpening = 16
	// maxFetching bounds the attachments that read from the log at once, each at most about fetchBytes.
	maxFetching = 4
	fetchBytes  = 128 << 10
	// roundBytes is how much is gathered before it is written, and about how much one attachment gets in its turn. Clients' libraries refuse messages over 1 MiB, so a message is far below.
	roundBytes = 64 << 10
	// maxTargets bounds the sessions whose last epoch a connection remembers.
	maxTargets = 1024
	// maxPingBytes bounds what a ping carries, as RFC 6455 does.
	maxPingBytes = 125
	// tellThrough is how many envelopes a filtered follower may pass over before it is told its cursor: what it reads again after a reconnect is about a page.
	tellThrough = schema.PageEnvelopes
)

// conn is one connection. Two goroutines work for it: run reads and owns the writer, which owns the followers.
type conn struct {
	// Static after construction.
	g     *Gateway
	peer  Peer
	codec codec
	ctx   context.Context // ends with the connection
	stop  context.CancelFunc
	wake  chan struct{} // of capacity 1: there is something for the writer
	room  chan struct{} // of capacity 1: something left what the reader's bounds count
	tasks sync.WaitGroup

	// Owned by the reader.
	principal *auth.Principal
	stamp     schema.Stamp
	kinds     kinds         // the payload types that it may publish
	rate      Rate          // how fast
	limiter   *rate.Limiter // nil before the first publish; see spend
	penalty   time.Duration // how long nothing is read
	expiry    *time.Timer   // ends the connection with its token; nil while there is none
	greeted   bool          // the first frame has come
	closing   bool          // the peer closes, and reads until it is answered
	targets   map[string]*target
	channels  map[uint32]*attachment   // those that ended are taken out when their number is wanted again
	workers   map[uint32]*subscription // likewise; they share the numbers with channels
	opening   chan struct{}            // of capacity maxOpening, made when it is needed
	request   publishRequest           // its slices are used again

	// Shared.
	inFlight, inFlightBytes atomic.Int64 // publishes read and not yet answered on the wire
	attached                atomic.Int64 // attachments that have not ended
	stopped                 atomic.Bool  // end is set: nothing more is read
	leaving                 atomic.Bool  // the edge goes away: no more work is handed out
	told                    atomic.Bool  // the peer was told where the session stands that the connection was made for

	placed places
	kept   keptRuns

	mu         sync.Mutex // guards all below
	replies    []*schema.ServerFrame
	answered   []*pending
	ready      []speaker // each at most once
	end        *ending
	halfClosed bool // the peer will send no more, but reads
}

// ending is why a connection ends.
type ending struct {
	// refusal is what the peer is told; nil for an end without a fault.
	refusal *schema.Refusal
	// lost is set where the peer is gone: there is nobody to tell.
	lost error
	// said is what the peer reads about an end without a fault; empty for nothing.
	said string
	// closed: the peer wants it so.
	closed bool
}

// word is the reason as metrics and logs name it.
func (e *ending) word() string {
	switch {
	case e.refusal != nil:
		return e.refusal.Code.Word()
	case e.closed, errors.Is(e.lost, ErrPeerClosed):
		return "peer_closed"
	case e.lost != nil:
		return "peer_lost"
	default:
		return "done"
	}
}

// err is what Serve returns.
func (e *ending) err() error {
	switch {
	case e.refusal != nil:
		return e.refusal
	case errors.Is(e.lost, ErrPeerClosed):
		return nil
	default:
		return e.lost
	}
}

func newConn(ctx context.Context, g *Gateway, p Peer) *conn {
	c := &conn{g: g, peer: p, codec: codecs[p.Protocol], wake: make(chan struct{}, 1), room: make(chan struct{}, 1)}
	c.ctx, c.stop = context.WithCancel(ctx)
	if p.Principal != nil {
		c.identify(p.Principal)
	}
	return c
}

// identify fixes who the peer is. Called before the reader starts, or by it.
func (c *conn) identify(p *auth.Principal) {
	c.principal, c.stamp = p, schema.NewStamp(p.Source())
	c.kinds, c.rate = rights[p.Role].kinds, c.g.cfg.Limits.rate(p.Role)
}

// run serves the connection until it is over.
func (c *conn) run() *ending {
	// The hard end: whoever blocks in the transport is let go. The gentle one goes through finish.
	cut := make(chan struct{})
	uncut := context.AfterFunc(c.ctx, func() {
		defer close(cut)
		c.peer.Transport.Close(schema.Code_CODE_GOING_AWAY, "This edge stops now; attach elsewhere.")
	})
	written := make(chan struct{})
	go func() {
		defer close(written)
		newWriter(c).run()
		c.stop()
	}()
	c.read()
	if c.closing {
		c.letGo(written)
	}
	<-written
	// Not before: a follower may stay that sends no more.
	c.unwatch()
	if !uncut() {
		<-cut
	}
	c.tasks.Wait()

	c.mu.Lock()
	defer c.mu.Unlock()
	for _, a := range c.channels {
		if !a.ended.Load() {
			c.g.metrics.attachments.Dec()
		}
		a.close()
	}
	for _, s := range c.workers {
		if !s.ended.Load() {
			c.g.metrics.subscriptions.Dec()
		}
		s.close()
	}
	c.kept.end()
	return c.end
}

// letGo bounds what a peer that closes is still sent: where it does not read that, it does not hold the connection. Called by run, when nothing is read any more.
func (c *conn) letGo(written <-chan struct{}) {
	t := time.NewTimer(c.g.cfg.CloseTimeout)
	defer t.Stop()
	select {
	case <-written:
	case <-t.C:
		c.peer.Transport.Close(schema.Code_CODE_UNSPECIFIED, "")
	}
}

// read is the reader: it takes the peer's messages until the connection ends.
func (c *conn) read() {
	if c.principal != nil {
		c.watch()
	} else {
		// The timer ends with the first frame, or with the connection.
		late := time.AfterFunc(c.g.cfg.HelloTimeout, func() {
			c.fail(schema.Refuse(schema.Code_CODE_UNAUTHENTICATED, "No hello with a token came within %s; send it as the first frame.", c.g.cfg.HelloTimeout))
		})
		defer late.Stop()
		if !c.readOne() {
			return
		}
		late.Stop()
	}
	if c.peer.Follow != nil {
		if err := c.attach(c.peer.Follow); err != nil {
			c.fail(err)
			return
		}
	}
	for c.readOne() {
	}
}

// readOne takes one message; false where it was the last.
func (c *conn) readOne() bool {
	if c.penalty > 0 {
		c.sitOut()
	}
	msg, err := c.peer.Transport.Receive(c.ctx)
	if !c.awaitAttached(err) {
		return false
	}
	switch {
	case c.stopped.Load():
		return false
	case errors.Is(err, io.EOF):
		c.mu.Lock()
		c.halfClosed = true
		c.mu.Unlock()
		c.poke()
		return false
	case err != nil:
		c.over(err)
		return false
	}
	c.g.metrics.bytesIn.Add(float64(len(msg)))
	if len(msg) > schema.MaxFrameBytes {
		err = schema.Refuse(schema.Code_CODE_TOO_LARGE, "The message has %d bytes; at most %d are allowed.", len(msg), schema.MaxFrameBytes)
	} else {
		err = c.codec.receive(c, msg)
	}
	if err != nil {
		c.fail(err)
		return false
	}
	return !c.stopped.Load()
}

// over ends the connection after the transport's error. Where the peer is gone, the writer is not left waiting for it to read.
func (c *conn) over(err error) {
	r, ok := errors.AsType[*schema.Refusal](err)
	switch {
	case c.ctx.Err() != nil:
		c.finish(c.cut())
	case errors.Is(err, ErrPeerClosing):
		c.closing = true
		c.finish(&ending{closed: true})
	case !ok:
		c.finish(&ending{lost: err})
		c.peer.Transport.Close(schema.Code_CODE_UNSPECIFIED, "")
	case r.Code == schema.Code_CODE_PEER_DEAD:
		c.finish(&ending{lost: err, refusal: r})
		c.peer.Transport.Close(r.Code, r.Message)
	default:
		c.finish(&ending{refusal: r})
	}
}

// fail ends the connection with what the peer is told; err becomes a refusal.
func (c *conn) fail(err error) {
	if c.ctx.Err() != nil {
		// What failed did so because the connection is cut.
		c.finish(c.cut())
		return
	}
	c.finish(&ending{refusal: schema.AsRefusal(err)})
}

// cut is why the connection ends when its context has ended.
func (c *conn) cut() *ending {
	if cause := context.Cause(c.ctx); errors.Is(cause, ErrPeerLeft) {
		return &ending{lost: cause}
	}
	return &ending{refusal: errCut}
}

// finish ends the connection; the first reason counts. The writer does what remains to be done. It may be called from anywhere.
func (c *conn) finish(e *ending) {
	c.mu.Lock()
	if c.end == nil {
		c.end = e
	}
	c.mu.Unlock()
	c.stopped.Store(true)
	c.poke()
}

// poke tells the writer that there is something to do.
func (c *conn) poke() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// reply queues a frame for the peer. It waits while too many are queued; false where the connection ended meanwhile. Called by the reader.
func (c *conn) reply(f *schema.ServerFrame) bool {
	for {
		c.mu.Lock()
		if len(c.replies) < maxReplies {
			c.replies = append(c.replies, f)
			c.mu.Unlock()
			c.poke()
			return true
		}
		c.mu.Unlock()
		if !c.waitForRoom() {
			return false
		}
	}
}

// waitForRoom blocks until the writer has written something; false where the connection ended meanwhile. Called by the reader.
func (c *conn) waitForRoom() bool {
	select {
	case <-c.room:
		return !c.stopped.Load()
	case <-c.ctx.Done():
		return false
	}
}

// speaker is what takes turns at the writer: an attachment or a subscription.
type speaker interface {
	// speak takes it out of the queue and says what it has to say, about as much as one message holds. Called by the writer.
	speak(w *writer)
}

// enqueue puts a speaker into the writer's queue. It does not block.
func (c *conn) enqueue(s speaker) {
	c.mu.Lock()
	c.ready = append(c.ready, s)
	c.mu.Unlock()
	c.poke()
}

// goingAway tells the peer that the edge is about to stop. What work it has in hand it may settle; it gets no more.
func (c *conn) goingAway(reason string, grace time.Duration) {
	c.leaving.Store(true)
	c.mu.Lock()
	c.replies = append(c.replies, &schema.ServerFrame{Frame: &schema.ServerFrame_GoingAway{
		GoingAway: &schema.GoingAway{Reason: reason, GraceMs: uint32(grace.Milliseconds())},
	}})
	c.mu.Unlock()
	c.poke()
}

// logged says how the connection ended.
func (c *conn) logged(e *ending, began time.Time) {
	level := slog.LevelDebug
	attrs := []slog.Attr{
		slog.String("remote", c.peer.Remote), slog.String("protocol", c.peer.Protocol.String()), slog.String("reason", e.word()),
		slog.Duration("lasted", time.Since(began)),
	}
	if c.principal != nil {
		attrs = append(attrs, slog.String("tenant", c.principal.Tenant), slog.String("subject", c.principal.Subject))
	}
	if err := e.err(); err != nil {
		attrs = append(attrs, slog.Any("err", err))
		if e.refusal != nil {
			level = slog.LevelInfo
		}
	}
	if e.refusal != nil && e.refusal.Code == schema.Code_CODE_INTERNAL {
		level = slog.LevelError
	}
	c.g.cfg.Logger.LogAttrs(c.ctx, level, "connection ended", attrs...)
}
