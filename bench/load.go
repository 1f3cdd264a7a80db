package bench

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/url"
	"sync"
	"sync/atomic"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"

	"tidemark/schema"
)

// Load is what clients do to a system.
type Load struct {
	// Sessions written and followed at once, each by one publisher and one follower on connections of their own.
	Sessions int
	// Rate is how many tokens a second go into each session; 0 for full speed: as many as Window lets through.
	Rate int
	// Window is how many tokens of a session may be sent and not yet acknowledged, at full speed.
	Window int
	// TokenBytes is the size of a token's envelope, encoded, as the agent sends it; of the baseline, of the whole message.
	TokenBytes int
	// Warmup comes before Measure, and is not measured. Where no token came in Measure, it is measured until one does.
	Warmup, Measure time.Duration
}

// Outcome is what became of a load.
type Outcome struct {
	// Tokens that followers received while it was measured, and how long that was.
	Tokens  uint64
	Elapsed time.Duration
	// Latency from the moment that a token was handed to the system's socket to when a follower had it, in microseconds, for those tokens.
	Latency *hdrhistogram.Histogram
	// Sent is all tokens, those of the warm-up and the end too.
	Sent uint64
	Faults
}

// Rate is tokens a second.
func (o *Outcome) Rate() float64 { return float64(o.Tokens) / o.Elapsed.Seconds() }

// Faults count what a follower must never see. All are 0, or the system is broken.
type Faults struct {
	// Lost tokens never came, though one behind them did; Repeated ones came again, or late; Wrong ones were not those that had been sent with this number, or were acknowledged with another seq.
	Lost     uint64 `json:"lost"`
	Repeated uint64 `json:"repeated"`
	Wrong    uint64 `json:"wrong"`
}

func (f *Faults) add(o Faults) {
	f.Lost += o.Lost
	f.Repeated += o.Repeated
	f.Wrong += o.Wrong
}

// checker compares what one follower receives with what is due.
type checker struct {
	last uint64 // the seq of the last one
	Faults
}

// see takes the next token: its place in the session, and the number that its text carries.
func (c *checker) see(seq, number uint64) {
	switch due := c.last + 1; {
	case seq < due:
		c.Repeated++
		return
	case seq > due:
		c.Lost += seq - due
	}
	c.last = seq
	if number != seq {
		c.Wrong++
	}
}

// lastToken stands in the place of the time in a publisher's last token, which ends its follower.
const lastToken = ^uint64(0)

// meter measures what followers receive.
type meter struct {
	began     time.Time
	measuring atomic.Bool
	stopped   atomic.Bool // publishers send their last

	first chan struct{} // closed with the first token that was measured

	mu     sync.Mutex
	tokens uint64
	hist   *hdrhistogram.Histogram
	faults Faults
	sent   uint64
}

func newMeter() *meter {
	// 1 µs to a minute, three digits.
	return &meter{began: time.Now(), first: make(chan struct{}), hist: hdrhistogram.New(1, 60_000_000, 3)}
}

// clock is the time of the run, in nanoseconds.
func (m *meter) clock() uint64 { return uint64(time.Since(m.began)) }

// received counts tokens that came together: when they were sent, on the meter's clock.
func (m *meter) received(sent []uint64) {
	if !m.measuring.Load() {
		return
	}
	now := m.clock()
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.tokens == 0 && len(sent) > 0 {
		close(m.first)
	}
	m.tokens += uint64(len(sent))
	for _, at := range sent {
		// Beyond a minute is a minute: such a run has other problems.
		_ = m.hist.RecordValue(int64(min((now-min(at, now))/1000, 60_000_000)))
	}
}

// over counts what one side of a session came to.
func (m *meter) over(sent uint64, f Faults) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.sent += sent
	m.faults.add(f)
}

// phases lets the load warm up, measures it and stops it. A system that is slow to tell of the first token is measured until it does, because a figure of nothing compares with nothing; one that does not
// within firstTime has a figure of nothing.
func (m *meter) phases(ctx context.Context, l Load) (time.Duration, error) {
	defer m.stopped.Store(true)
	if err := pause(ctx, l.Warmup); err != nil {
		return 0, err
	}
	m.measuring.Store(true)
	from := time.Now()
	err := pause(ctx, l.Measure)
	if err == nil {
		err = m.waitForFirst(ctx)
	}
	m.measuring.Store(false)
	return time.Since(from), err
}

func (m *meter) waitForFirst(ctx context.Context) error {
	t := time.NewTimer(firstTime)
	defer t.Stop()
	select {
	case <-m.first:
		return nil
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (m *meter) outcome(elapsed time.Duration) *Outcome {
	return &Outcome{Tokens: m.tokens, Elapsed: elapsed, Latency: m.hist, Sent: m.sent, Faults: m.faults}
}

func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// pace calls send with 1, 2, 3 … at a rate a second, all that are due at once, until stopped is set; then with the last number and true. What comes late because this process had no processor is
// stamped when it is sent, so that latencies are the system's.
func (m *meter) pace(ctx context.Context, rate int, send func(from, to uint64, last bool) error) error {
	tick := time.NewTicker(max(time.Second/time.Duration(rate), time.Millisecond))
	defer tick.Stop()
	began, sent := time.Now(), uint64(0)
	for !m.stopped.Load() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		due := uint64(time.Since(began).Seconds() * float64(rate))
		if due > sent {
			if err := send(sent+1, due, false); err != nil {
				return err
			}
			sent = due
		}
	}
	return send(sent+1, sent+1, true)
}

// connectTime is how long the clients may take to connect, firstTime is how much longer than Measure they wait for a first token, and drainTime is how long the load may take to come to its end.
const (
	connectTime = time.Minute
	firstTime   = 30 * time.Second
	drainTime   = 30 * time.Second
)

// within is how long the load may take in all.
func (l Load) within() time.Duration { return l.Warmup + l.Measure + firstTime + drainTime }

var errStuck = errors.New("bench: the load did not come to its end in time")

// run puts the load on an edge and says what became of it. Sessions are named after name, and must be new.
func (l Load) run(ctx context.Context, edge *url.URL, token, name string) (*Outcome, error) {
	connecting, cancel := context.WithTimeoutCause(ctx, connectTime, errStuck)
	defer cancel()
	// Everybody is there before the first token is sent.
	m := newMeter()
	var pairs []*pair
	defer func() {
		for _, p := range pairs {
			p.close()
		}
	}()
	for i := range l.Sessions {
		p, err := l.connect(connecting, edge, token, fmt.Sprintf("%s-%04d", name, i), m)
		if err != nil {
			return nil, err
		}
		pairs = append(pairs, p)
	}
	ctx, cancelLoad := context.WithTimeoutCause(ctx, l.within(), errStuck)
	defer cancelLoad()
	group, ctx := errgroup.WithContext(ctx)
	for i, p := range pairs {
		defer context.AfterFunc(ctx, p.close)()
		group.Go(func() error { return p.follow(m) })
		group.Go(func() error {
			if l.Rate == 0 {
				return p.flood(uint64(l.Window))
			}
			// So that sessions do not beat in time.
			if err := pause(ctx, time.Second/time.Duration(l.Rate)*time.Duration(i)/time.Duration(l.Sessions)); err != nil {
				return err
			}
			return p.pace(ctx, l.Rate)
		})
	}
	elapsed, err := m.phases(ctx, l)
	err = errors.Join(err, group.Wait())
	if err != nil {
		// The first that went wrong closed the others' connections.
		return nil, cmp.Or(context.Cause(ctx), err)
	}
	return m.outcome(elapsed), nil
}

// pair is a session's publisher and its follower's connection.
type pair struct {
	publisher
	follower *socket
}

// connect connects both and attaches the follower.
func (l Load) connect(ctx context.Context, edge *url.URL, token, session string, m *meter) (*pair, error) {
	t, err := newTemplate(session, l.TokenBytes)
	if err != nil {
		return nil, err
	}
	p := &pair{publisher: publisher{t: t, m: m}}
	if p.s, err = dial(ctx, edge, token); err != nil {
		return nil, err
	}
	if p.follower, err = dial(ctx, edge, token); err != nil {
		p.s.close()
		return nil, err
	}
	defer context.AfterFunc(ctx, p.close)()
	if err := attach(p.follower, session); err != nil {
		p.close()
		return nil, cmp.Or(context.Cause(ctx), err)
	}
	return p, nil
}

func (p *pair) close() {
	p.s.close()
	p.follower.close()
}

// attach follows the session from its beginning on, and waits until the edge does.
func attach(s *socket, session string) error {
	msg, err := proto.Marshal(&schema.ClientFrame{Frame: &schema.ClientFrame_Attach{Attach: &schema.Attach{Channel: 1, Session: session}}})
	if err != nil {
		return err
	}
	if err := s.send(msg); err != nil {
		return err
	}
	for {
		msg, err := s.next()
		if err != nil {
			return err
		}
		f := new(schema.ServerFrame)
		if err := proto.Unmarshal(msg, f); err != nil {
			return errMalformed
		}
		switch m := f.GetFrame().(type) {
		case *schema.ServerFrame_Attached:
			if m.Attached.GetHeadSeq() != 0 {
				return fmt.Errorf("bench: session %q has envelopes already; it must be new", session)
			}
			return nil
		default:
			if err := unexpected(f); err != nil {
				return err
			}
		}
	}
}

// unexpected is the error that a frame means; nil for one that may come at any time.
func unexpected(f *schema.ServerFrame) error {
	switch m := f.GetFrame().(type) {
	case *schema.ServerFrame_Error:
		return fmt.Errorf("bench: the edge ended an attachment: %s: %s", m.Error.GetCode().Word(), m.Error.GetMessage())
	case *schema.ServerFrame_Rejected:
		return fmt.Errorf("bench: the edge rejected publish %d: %s: %s", m.Rejected.GetPublishId(), m.Rejected.GetCode().Word(), m.Rejected.GetMessage())
	case *schema.ServerFrame_Truncated:
		return fmt.Errorf("bench: the edge says that the session begins at seq %d", m.Truncated.GetFirstSeq())
	case *schema.ServerFrame_GoingAway:
		return fmt.Errorf("bench: the edge goes away: %s", m.GoingAway.GetReason())
	}
	return nil
}

// look is unexpected for an encoded frame.
func look(msg []byte) error {
	f := new(schema.ServerFrame)
	if err := proto.Unmarshal(msg, f); err != nil {
		return errMalformed
	}
	return unexpected(f)
}

// follow receives until the last token.
func (p *pair) follow(m *meter) error {
	var c checker
	var sent []uint64
	for last := false; !last; {
		msg, err := p.follower.next()
		if err != nil {
			return err
		}
		sent = sent[:0]
		events, err := eachEnvelope(msg, func(seq uint64, text []byte) {
			number, at, ok := stamp(text)
			if !ok {
				c.Wrong++
				return
			}
			c.see(seq, number)
			if at == lastToken {
				last = true
				return
			}
			sent = append(sent, at)
		})
		if err == nil && !events {
			err = look(msg)
		}
		if err != nil {
			return err
		}
		m.received(sent)
	}
	m.over(0, c.Faults)
	return nil
}

// publisher writes one session.
type publisher struct {
	s    *socket
	t    *template
	m    *meter
	sent uint64
	buf  []byte

	// Owned by whoever reads the acknowledgements.
	acked  uint64
	faults Faults
}

// write sends the tokens up to a number, each in a frame of its own, with one system call.
func (p *publisher) write(to uint64, last bool) error {
	at := p.m.clock()
	if last {
		at = lastToken
	}
	p.buf = p.buf[:0]
	for p.sent < to {
		p.sent++
		p.buf = p.t.append(p.buf, p.sent, at)
	}
	return p.s.write(p.buf)
}

// readAcks reads one message.
func (p *publisher) readAcks() error {
	msg, err := p.s.next()
	if err != nil {
		return err
	}
	acks, err := eachAck(msg, func(id, seq uint64, duplicate bool) {
		if id != p.acked+1 || seq != id || duplicate {
			p.faults.Wrong++
		}
		p.acked = id
	})
	if err == nil && !acks {
		err = look(msg)
	}
	return err
}

// flood keeps window tokens under way. One goroutine does it all: what an acknowledgement frees is written at once, together.
func (p *publisher) flood(window uint64) error {
	for !p.m.stopped.Load() {
		if err := p.write(p.acked+window, false); err != nil {
			return err
		}
		if err := p.readAcks(); err != nil {
			return err
		}
	}
	if err := p.write(p.sent+1, true); err != nil {
		return err
	}
	for p.acked < p.sent {
		if err := p.readAcks(); err != nil {
			return err
		}
	}
	p.m.over(p.sent, p.faults)
	return nil
}

// pace sends at a rate and takes acknowledgements as they come.
func (p *publisher) pace(ctx context.Context, rate int) error {
	var group errgroup.Group
	end := make(chan uint64, 1)
	group.Go(func() error {
		for {
			if err := p.readAcks(); err != nil {
				return err
			}
			select {
			case last := <-end:
				for p.acked < last {
					if err := p.readAcks(); err != nil {
						return err
					}
				}
				return nil
			default:
			}
		}
	})
	err := p.m.pace(ctx, rate, func(_, to uint64, last bool) error {
		if last {
			end <- to
		}
		return p.write(to, last)
	})
	if err != nil {
		p.s.close()
	}
	if rerr := group.Wait(); err == nil {
		err = rerr
	}
	p.m.over(p.sent, p.faults)
	return err
}
