package client

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/oklog/ulid/v2"
	"golang.org/x/sync/semaphore"
	"google.golang.org/protobuf/proto"

	"tidemark/schema"
)

// DefaultWindow is what a publisher may have under way, in bytes: some thousand tokens, enough to fill the pipe and little to send again.
const DefaultWindow = 1 << 20

// publishCost is what a publish counts for in the window beside its envelopes' bytes, so that many small ones are bounded too.
const publishCost = 256

// PublishOptions say who publishes into which session.
type PublishOptions struct {
	Session string
	// Producer is the writer's name in the session, 1 to 64 bytes, and Epoch its life: a writer that begins at its first envelope again under the same name and epoch stores nothing twice. Default:
	// a new name, epoch 1.
	Producer string
	Epoch    uint64
	// Window bounds what is under way, in bytes. Default [DefaultWindow].
	Window int
	// Acked is told of every publish once it is stored, in their order, from the publisher's own goroutine. It must not block. Optional.
	Acked func(Ack)
	// Lost is told when a connection was lost, and why; the publisher comes back by itself and sends again what was not acknowledged. Called like Acked. Optional.
	Lost func(error)
}

// Ack is the place that one publish got.
type Ack struct {
	First, Last uint64
	// Duplicate: an earlier try had stored it.
	Duplicate bool
	// Epoch is the session's history.
	Epoch string
	// Durability is what it survives.
	Durability schema.Durability
	// Took is the time since Publish was called.
	Took time.Duration
}

// Publisher appends to one session, in order and exactly once (I3), with many publishes under way. What was not acknowledged when a connection broke is sent again on the next; by the
// producer's sequence the log knows what it has already.
//
// Publish, Flush and Cut may be called concurrently; the order of concurrent calls is whatever it is. Close comes last.
type Publisher struct {
	// Static after construction.
	client  *Client
	options PublishOptions
	window  *semaphore.Weighted
	life    context.Context // its cause says why the publisher has ended
	end     context.CancelCauseFunc
	wake    chan struct{} // of capacity 1: there is something to send
	over    chan struct{} // closed when the goroutine has ended

	mu      sync.Mutex // guards all below
	started bool
	id      uint64      // of the last publish
	seq     uint64      // of the last envelope, as the producer counts
	queue   []*underWay // not acknowledged, in order; their ids have no gap
	sent    int         // how many of the queue this connection has sent
	conn    conn        // nil while there is none
}

// underWay is a publish that is not acknowledged.
type underWay struct {
	id, seq uint64 // seq is that of its first envelope, as the producer counts
	frame   []byte
	cost    int64 // its part of the window
	began   time.Time
	acked   bool
	ack     Ack
}

// errClosed is why a publisher has ended that was closed.
var errClosed = errors.New("client: the publisher is closed")

// Publisher makes a publisher, which ends with ctx at the latest. It connects with the first publish.
func (c *Client) Publisher(ctx context.Context, o PublishOptions) *Publisher {
	if o.Producer == "" {
		o.Producer = ulid.Make().String()
	}
	if o.Epoch == 0 {
		o.Epoch = 1
	}
	if o.Window <= 0 {
		o.Window = DefaultWindow
	}
	p := &Publisher{client: c, options: o, window: semaphore.NewWeighted(int64(o.Window)), wake: make(chan struct{}, 1), over: make(chan struct{})}
	p.life, p.end = context.WithCancelCause(ctx)
	return p
}

// Publish takes envelopes, to be stored all or none, one behind the other, and returns once there was room for them in the window. It numbers them as the producer's next; they are the caller's again when it
// returns. The error is why the publisher has ended, or the context's; then nothing was taken.
func (p *Publisher) Publish(ctx context.Context, envelopes ...*schema.Envelope) error {
	if len(envelopes) == 0 {
		return schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "A publish to session %q has no envelopes.", p.options.Session)
	}
	u := &underWay{began: time.Now(), cost: publishCost}
	for _, e := range envelopes {
		u.cost += int64(proto.Size(e) + len(p.options.Producer))
	}
	// What is larger than the window goes alone.
	u.cost = min(u.cost, int64(p.options.Window))
	if err := p.acquire(ctx, u.cost); err != nil {
		return err
	}
	if err := p.take(u, envelopes); err != nil {
		p.window.Release(u.cost)
		return err
	}
	select {
	case p.wake <- struct{}{}:
	default:
	}
	return nil
}

// acquire waits for room in the window.
func (p *Publisher) acquire(ctx context.Context, n int64) error {
	if p.window.TryAcquire(n) {
		return nil
	}
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	ended := context.AfterFunc(p.life, func() { stop(context.Cause(p.life)) })
	defer ended()
	if p.window.Acquire(ctx, n) != nil {
		return context.Cause(ctx)
	}
	return nil
}

// take numbers and encodes a publish, and queues it.
func (p *Publisher) take(u *underWay, envelopes []*schema.Envelope) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.life.Err() != nil {
		return context.Cause(p.life)
	}
	u.id, u.seq = p.id+1, p.seq+1
	for i, e := range envelopes {
		e.Producer = &schema.Producer{Id: p.options.Producer, Epoch: p.options.Epoch, Seq: u.seq + uint64(i)}
	}
	m := &schema.Publish{PublishId: u.id, Session: p.options.Session, Envelopes: envelopes}
	var err error
	if u.frame, err = proto.Marshal(&schema.ClientFrame{Frame: &schema.ClientFrame_Publish{Publish: m}}); err != nil {
		return schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "The publish to session %q cannot be encoded: its strings must be UTF-8.", p.options.Session)
	}
	if len(u.frame) > schema.MaxFrameBytes {
		return schema.Refuse(schema.Code_CODE_TOO_LARGE, "The publish to session %q takes %d bytes; at most %d are allowed.", p.options.Session, len(u.frame), schema.MaxFrameBytes)
	}
	p.id, p.seq = u.id, u.seq+uint64(len(envelopes))-1
	p.queue = append(p.queue, u)
	if !p.started {
		p.started = true
		go p.run()
	}
	return nil
}

// run connects, sends and takes the answers until the publisher ends.
func (p *Publisher) run() {
	defer close(p.over)
	l := &link{c: p.client}
	for {
		c, err := l.connect(p.life)
		if err != nil {
			p.end(err)
			return
		}
		p.mu.Lock()
		p.conn, p.sent = c, 0
		p.mu.Unlock()
		err = p.serve(c, l)
		p.mu.Lock()
		p.conn = nil
		p.mu.Unlock()
		if p.life.Err() != nil {
			return
		}
		l.failed()
		p.client.cfg.Logger.Debug("connection lost", "session", p.options.Session, "error", err)
		if p.options.Lost != nil {
			p.options.Lost(err)
		}
	}
}

// serve runs one connection. It returns why it was lost, after all that ran for it has ended.
func (p *Publisher) serve(c conn, l *link) error {
	// When the publisher ends, so does the connection: in good order where it was closed.
	left := make(chan struct{})
	stay := context.AfterFunc(p.life, func() {
		defer close(left)
		if errors.Is(context.Cause(p.life), errClosed) {
			c.close()
		} else {
			c.cut()
		}
	})
	sendable, stop := context.WithCancel(p.life)
	var sending sync.WaitGroup
	sending.Go(func() { p.send(sendable, c) })

	// Not the publisher's context: a read that it ends would cut the connection.
	ctx := context.WithoutCancel(p.life)
	var err error
	pause := ratePause
	for epoch := ""; err == nil; {
		err = p.receive(ctx, c, l, &epoch, &pause)
	}
	stop()
	if !stay() {
		<-left
	}
	c.cut()
	sending.Wait()
	if schema.CodeOf(err) == schema.Code_CODE_RATE_EXCEEDED {
		// Now that nothing is sent any more: each publish behind the one that was too fast would be refused as it was.
		p.rest(pause)
	}
	return err
}

// send asks for the welcome, which says how fast one may publish, and then sends what is queued. When it cannot, receive finds out why.
func (p *Publisher) send(ctx context.Context, c conn) {
	// Who asks is known from the connection's beginning.
	hello, err := proto.Marshal(&schema.ClientFrame{Frame: &schema.ClientFrame_Hello{Hello: &schema.Hello{}}})
	if err != nil || c.send(ctx, hello) != nil {
		return
	}
	for {
		p.mu.Lock()
		var u *underWay
		if p.sent < len(p.queue) {
			u = p.queue[p.sent]
			p.sent++
		}
		p.mu.Unlock()
		if u != nil {
			if c.send(ctx, u.frame) != nil {
				return
			}
			continue
		}
		select {
		case <-p.wake:
		case <-ctx.Done():
			return
		}
	}
}

// receive takes one frame, and keeps what later ones need to be understood: the session's epoch, and the pause after a publish that was too fast. The error ends the connection, and the publisher too where that was ended.
func (p *Publisher) receive(ctx context.Context, c conn, l *link, epoch *string, pause *time.Duration) error {
	msg, err := c.receive(ctx)
	if err != nil {
		return p.fatal(err, final(err))
	}
	frame := new(schema.ServerFrame)
	if err := proto.Unmarshal(msg, frame); err != nil {
		return fmt.Errorf("client: the edge sent what is no frame: %w", err)
	}
	switch m := frame.GetFrame().(type) {
	case *schema.ServerFrame_Welcome:
		*pause = pauseFor(m.Welcome.GetLimits())
	case *schema.ServerFrame_Published:
		l.progress()
		for _, a := range m.Published.GetAcks() {
			if a.GetEpoch() != "" {
				*epoch = a.GetEpoch()
			}
			p.acked(a.GetPublishId(), Ack{
				First: a.GetFirstSeq(), Last: a.GetLastSeq(), Duplicate: a.GetDuplicate(), Epoch: *epoch, Durability: m.Published.GetDurability(),
			})
		}
	case *schema.ServerFrame_Rejected:
		r := m.Rejected
		return p.fatal(&schema.Refusal{Code: r.GetCode(), Message: r.GetMessage(), Head: r.GetHeadSeq(), Expected: r.GetExpected()}, !p.mends(r))
	case *schema.ServerFrame_Error:
		e := m.Error
		err := &schema.Refusal{Code: e.GetCode(), Message: e.GetMessage(), Head: e.GetHeadSeq(), Epoch: e.GetEpoch()}
		return p.fatal(err, final(err))
	}
	return nil
}

// fatal ends the publisher where connecting again would not help.
func (p *Publisher) fatal(err error, ends bool) error {
	if ends {
		p.end(err)
	}
	return err
}

// How long a publisher rests that was too fast for its edge: what a burst takes to come back, so that connecting again gains no more than waiting.
const (
	// ratePause where the edge has not said how fast one may be: that of the default limits.
	ratePause = 2 * time.Second
	// Whatever an edge says, a publisher neither hurries nor sleeps beyond these.
	minRatePause = 50 * time.Millisecond
	maxRatePause = 30 * time.Second
)

// pauseFor is the pause under an edge's limits.
func pauseFor(l *schema.Limits) time.Duration {
	rate := l.GetEnvelopesPerSecond()
	if rate <= 0 {
		return ratePause
	}
	seconds := min(float64(l.GetBurstEnvelopes())/rate, maxRatePause.Seconds())
	return max(time.Duration(seconds*float64(time.Second)), minRatePause)
}

// rest waits for so long, unless the publisher ends.
func (p *Publisher) rest(pause time.Duration) {
	t := time.NewTimer(pause)
	defer t.Stop()
	select {
	case <-t.C:
	case <-p.life.Done():
	}
}

// mends says whether what was rejected may be stored when it is sent again, with all that is behind it, on another connection.
func (p *Publisher) mends(r *schema.Rejected) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	// One publish that the log could not take for a moment makes a gap for those behind it, which are rejected for that.
	gap := r.GetCode() == schema.Code_CODE_PRODUCER_GAP && len(p.queue) > 0 && r.GetExpected() == p.queue[0].seq && r.GetPublishId() != p.queue[0].id
	return r.GetRetryable() || gap
}

// acked notes that a publish is stored, and gives its room back once all before it are.
func (p *Publisher) acked(id uint64, a Ack) {
	p.mu.Lock()
	if len(p.queue) == 0 || id < p.queue[0].id || id-p.queue[0].id >= uint64(len(p.queue)) {
		p.mu.Unlock()
		return
	}
	u := p.queue[id-p.queue[0].id]
	a.Took = time.Since(u.began)
	u.acked, u.ack = true, a
	n := 0
	for n < len(p.queue) && p.queue[n].acked {
		n++
	}
	done := p.queue[:n:n]
	p.queue = p.queue[n:]
	p.sent = max(p.sent-n, 0)
	p.mu.Unlock()
	for i, u := range done {
		if p.options.Acked != nil {
			p.options.Acked(u.ack)
		}
		p.window.Release(u.cost)
		done[i] = nil
	}
}

// Flush waits until all that was taken is acknowledged. The error is why the publisher has ended, or the context's.
func (p *Publisher) Flush(ctx context.Context) error {
	all := int64(p.options.Window)
	if err := p.acquire(ctx, all); err != nil {
		return err
	}
	p.window.Release(all)
	if p.life.Err() != nil {
		return context.Cause(p.life)
	}
	return nil
}

// Cut breaks the connection as a broken network does. The publisher comes back by itself.
func (p *Publisher) Cut() {
	p.mu.Lock()
	c := p.conn
	p.mu.Unlock()
	if c != nil {
		c.cut()
	}
}

// Close waits like [Publisher.Flush], then ends the publisher and everything it started. What ctx did not give the time to acknowledge may be stored or not.
func (p *Publisher) Close(ctx context.Context) error {
	err := p.Flush(ctx)
	p.end(errClosed)
	p.mu.Lock()
	started := p.started
	p.mu.Unlock()
	if started {
		<-p.over
	}
	if errors.Is(err, errClosed) {
		return nil
	}
	return err
}
