package world

import (
	"fmt"
	"slices"
	"sync"
	"time"

	"tidemark/schema"
)

// WriterOptions say how a writer publishes.
type WriterOptions struct {
	// Ways and Edges are used in turn, one for each connection. Default: the binary socket; all edges of the world that are not gone.
	Ways  []Way
	Edges []*Edge
	// Producer numbers the envelopes, in this epoch; empty: they have ids alone.
	Producer string
	Epoch    uint64
	// Window is how many publishes may be unacknowledged. Default 16.
	Window int
	// CutAfter says after how many bytes that went out each connection is cut; 0 for not at all. Optional.
	CutAfter func() int
	// DeafAfter says after how many bytes that came in each connection is cut, which loses acknowledgements; 0 for not at all. Optional.
	DeafAfter func() int
}

// Writer publishes to a session, and sends again, with the same ids, what was not acknowledged when its connection was lost or the edge refused it for now. Its methods may be called concurrently.
type Writer struct {
	w       *World
	session string
	o       WriterOptions
	stop    chan struct{}
	once    sync.Once
	over    chan struct{}

	mu      sync.Mutex
	changed chan struct{} // closed and made anew at every change
	queue   []*Sent       // everything that was sent, in order
	open    int           // the first that is not acknowledged
	acked   int           // how many are
	seq     uint64        // of the producer
	refused *schema.Rejected
	lost    int // connections
	peer    *Peer
}

// Sent is a publish of a writer.
type Sent struct {
	Envelopes []*schema.Envelope
	// Acked: the rest is what the acknowledgement said, and when it came.
	Acked bool
	Ack   Ack
	At    time.Time
}

// Write starts a writer. It ends with the world, or with [Writer.Stop].
func (w *World) Write(session string, o WriterOptions) *Writer {
	w.t.Helper()
	if len(o.Ways) == 0 {
		o.Ways = []Way{ProtoSocket}
	}
	if len(o.Edges) == 0 {
		o.Edges = w.living()
	}
	if o.Window == 0 {
		o.Window = 16
	}
	if o.Producer != "" && o.Epoch == 0 {
		o.Epoch = 1
	}
	x := &Writer{w: w, session: session, o: o, stop: make(chan struct{}), over: make(chan struct{}), changed: make(chan struct{})}
	w.closers = append(w.closers, x.Stop)
	go x.run()
	return x
}

// Send queues envelopes as one publish.
func (x *Writer) Send(envelopes ...*schema.Envelope) {
	x.change(func() { x.queued(envelopes) })
}

// SendEach queues each envelope as a publish of its own.
func (x *Writer) SendEach(envelopes []*schema.Envelope) {
	x.change(func() {
		for i := range envelopes {
			x.queued(envelopes[i : i+1 : i+1])
		}
	})
}

// queued numbers and queues a publish. Called with mu held.
func (x *Writer) queued(envelopes []*schema.Envelope) {
	for _, e := range envelopes {
		if x.o.Producer != "" {
			x.seq++
			e.Producer = &schema.Producer{Id: x.o.Producer, Epoch: x.o.Epoch, Seq: x.seq}
		}
	}
	x.queue = append(x.queue, &Sent{Envelopes: envelopes})
}

func (x *Writer) run() {
	defer close(x.over)
	for turn := 0; ; turn++ {
		x.connection(x.o.Edges[turn%len(x.o.Edges)], x.o.Ways[turn%len(x.o.Ways)])
		x.mu.Lock()
		x.lost++
		refused := x.refused != nil
		x.mu.Unlock()
		if refused {
			return
		}
		select {
		case <-x.stop:
			return
		case <-time.After(comeBackAfter):
		}
	}
}

// connection publishes over one connection, from the first that is not acknowledged on.
func (x *Writer) connection(e *Edge, way Way) {
	var first *schema.Attach
	if way == SessionSocket {
		first = &schema.Attach{Channel: 1, Session: x.session, Start: &schema.Attach_Head{Head: true}}
	}
	p, end := x.w.TryDial(e, way, Dial{Link: func(l *Link) {
		if x.o.CutAfter != nil {
			if n := x.o.CutAfter(); n > 0 {
				l.CutUp(n)
			}
		}
		if x.o.DeafAfter != nil {
			if n := x.o.DeafAfter(); n > 0 {
				l.CutDown(n)
			}
		}
	}}, first)
	if p == nil {
		if end.Code != schema.Code_CODE_UNSPECIFIED && end.Code.Rule().Reconnect == schema.Reconnect_RECONNECT_NO {
			x.change(func() { x.refused = &schema.Rejected{Code: end.Code, Message: end.Message} })
		}
		return
	}
	defer p.Cut()
	x.change(func() { x.peer = p })
	defer x.change(func() { x.peer = nil })

	// Sending may block, so it has a goroutine of its own.
	gone := make(chan struct{})
	var sending sync.WaitGroup
	sending.Go(func() { x.send(p, gone) })
	defer sending.Wait()
	defer p.Cut()
	defer close(gone)
	for {
		select {
		case f, more := <-p.frames:
			if !more || !x.take(f) {
				return
			}
		case <-x.stop:
			return
		}
	}
}

// send sends what is queued, as far as the window allows.
func (x *Writer) send(p *Peer, gone chan struct{}) {
	x.mu.Lock()
	next := x.open
	x.mu.Unlock()
	for {
		x.mu.Lock()
		var s *Sent
		if next < len(x.queue) && next < x.open+x.o.Window {
			s = x.queue[next]
			next++
		}
		changed := x.changed
		x.mu.Unlock()
		if s == nil {
			select {
			case <-changed:
				continue
			case <-gone:
				return
			}
		}
		m := &schema.Publish{PublishId: uint64(next), Session: x.session, Envelopes: s.Envelopes}
		if p.wire.send(&schema.ClientFrame{Frame: &schema.ClientFrame_Publish{Publish: m}}) != nil {
			return
		}
	}
}

// take takes in an answer; false where the connection is of no more use.
func (x *Writer) take(f *schema.ServerFrame) bool {
	more := true
	wrong := ""
	x.change(func() {
		switch m := f.GetFrame().(type) {
		case *schema.ServerFrame_Published:
			for _, a := range m.Published.GetAcks() {
				if a.GetPublishId() == 0 || a.GetPublishId() > uint64(len(x.queue)) {
					wrong = fmt.Sprintf("an acknowledgement of nothing that was sent: %v", a)
					continue
				}
				s := x.queue[a.GetPublishId()-1]
				ack := Ack{a.GetFirstSeq(), a.GetLastSeq(), a.GetDuplicate(), m.Published.GetDurability()}
				if s.Acked && (s.Ack.First != ack.First || s.Ack.Last != ack.Last) {
					wrong = fmt.Sprintf("publish %d is at %d, and then at %d", a.GetPublishId(), s.Ack.First, ack.First)
				}
				if ack.Last-ack.First+1 != uint64(len(s.Envelopes)) {
					wrong = fmt.Sprintf("publish %d of %d envelopes was acknowledged as %v", a.GetPublishId(), len(s.Envelopes), a)
				}
				if !s.Acked {
					x.acked++
					s.Acked, s.Ack, s.At = true, ack, time.Now()
				}
			}
			for x.open < len(x.queue) && x.queue[x.open].Acked {
				x.open++
			}
		case *schema.ServerFrame_Rejected:
			more = false
			// Behind a publish that was refused for now, a producer's others have a gap.
			if !m.Rejected.GetRetryable() && m.Rejected.GetCode() != schema.Code_CODE_PRODUCER_GAP {
				x.refused = m.Rejected
			}
		case *schema.ServerFrame_GoingAway, *schema.ServerFrame_Error:
			more = false
		}
	})
	if wrong != "" {
		x.w.t.Errorf("writer to %q: %s", x.session, wrong)
		return false
	}
	return more
}

func (x *Writer) change(how func()) {
	x.mu.Lock()
	defer x.mu.Unlock()
	how()
	close(x.changed)
	x.changed = make(chan struct{})
}

// until waits for a condition on the writer's fields; most is how long.
func (x *Writer) until(what func() string, most time.Duration, ok func() bool) {
	x.w.t.Helper()
	t := time.NewTimer(most)
	defer t.Stop()
	for {
		x.mu.Lock()
		yes, changed, refused := ok(), x.changed, x.refused
		x.mu.Unlock()
		switch {
		case yes:
			return
		case refused != nil:
			x.w.t.Fatalf("writer to %q: %s: it was refused: %v", x.session, what(), refused)
		}
		select {
		case <-changed:
		case <-t.C:
			x.w.t.Fatalf("writer to %q: %s: not within %s", x.session, what(), most)
		}
	}
}

// Flush waits until everything is acknowledged, and returns it.
func (x *Writer) Flush() []Sent {
	x.w.t.Helper()
	x.until(func() string { return fmt.Sprintf("%d publishes should be acknowledged", x.Unacked()) }, 10*patience, func() bool { return x.open == len(x.queue) })
	return x.Sent()
}

// WaitAcked waits until the first n publishes are acknowledged.
func (x *Writer) WaitAcked(n int) {
	x.w.t.Helper()
	x.until(func() string { return fmt.Sprintf("%d publishes should be acknowledged", n) }, patience, func() bool { return x.open >= n })
}

// WaitRefused waits until a publish was refused for good.
func (x *Writer) WaitRefused() *schema.Rejected {
	x.w.t.Helper()
	<-x.over
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.refused == nil {
		x.w.t.Fatalf("writer to %q: it was stopped, not refused", x.session)
	}
	return x.refused
}

// Sent is everything that was queued, as it stands.
func (x *Writer) Sent() []Sent {
	x.mu.Lock()
	defer x.mu.Unlock()
	all := make([]Sent, len(x.queue))
	for i, s := range x.queue {
		all[i] = *s
	}
	return all
}

// Acked is what is acknowledged, in the order in which it was sent; there may be some behind one that is not.
func (x *Writer) Acked() []Sent {
	return slices.DeleteFunc(x.Sent(), func(s Sent) bool { return !s.Acked })
}

// Unacked is how many publishes are not acknowledged.
func (x *Writer) Unacked() int {
	x.mu.Lock()
	defer x.mu.Unlock()
	return len(x.queue) - x.acked
}

// Lost is how many connections the writer has lost.
func (x *Writer) Lost() int {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.lost
}

// Cut breaks the writer's connection, if there is one.
func (x *Writer) Cut() {
	x.mu.Lock()
	p := x.peer
	x.mu.Unlock()
	if p != nil {
		if l := p.Link(); l != nil {
			l.Cut()
		}
	}
}

// Stop ends the writer.
func (x *Writer) Stop() {
	x.once.Do(func() { close(x.stop) })
	<-x.over
}
