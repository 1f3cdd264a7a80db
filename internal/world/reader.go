package world

import (
	"fmt"
	"slices"
	"sync"
	"time"

	"tidemark/schema"
)

// comeBackAfter is how long readers and writers wait before they connect again.
const comeBackAfter = 20 * time.Millisecond

// ReaderOptions say how a reader follows.
type ReaderOptions struct {
	// Ways and Edges are used in turn, one for each connection. Default: the binary socket; all edges of the world that are not gone.
	Ways  []Way
	Edges []*Edge
	// After is where it starts, by default at the beginning; Epoch is the history that After belongs to.
	After uint64
	Epoch string
	// Types are the payload types it wants, merging whether it wants tokens merged. Ways that cannot say so are left out.
	Types []string
	// CutAfter says after how many bytes that came in each connection is cut; 0 for not at all. Optional.
	CutAfter func() int
}

// Reader follows a session, and comes back whenever its connection is lost, from the last seq that it saw. It fails the test where a seq is skipped or told twice (I4). Its methods may be called
// concurrently.
type Reader struct {
	w       *World
	session string
	o       ReaderOptions
	stop    chan struct{}
	once    sync.Once
	over    chan struct{}

	mu        sync.Mutex
	changed   chan struct{} // closed and made anew at every change
	seq       uint64
	epoch     string
	got       []*schema.Envelope
	truncated []*schema.Truncated
	refused   *schema.Refusal // why it does not come back
	attached  int
	peer      *Peer
}

// Read starts a reader. It ends with the world, or with [Reader.Stop].
func (w *World) Read(session string, o ReaderOptions) *Reader {
	w.t.Helper()
	if len(o.Ways) == 0 {
		o.Ways = []Way{ProtoSocket}
	}
	if len(o.Types) > 0 {
		o.Ways = slices.DeleteFunc(slices.Clone(o.Ways), func(y Way) bool { return y == SessionSocket })
	}
	if len(o.Edges) == 0 {
		o.Edges = w.living()
	}
	r := &Reader{w: w, session: session, o: o, seq: o.After, epoch: o.Epoch, stop: make(chan struct{}), over: make(chan struct{}), changed: make(chan struct{})}
	w.closers = append(w.closers, r.Stop)
	go r.run()
	return r
}

// living are the edges that are not gone.
func (w *World) living() []*Edge {
	return slices.DeleteFunc(slices.Clone(w.edges), func(e *Edge) bool { return e.gone })
}

func (r *Reader) run() {
	defer close(r.over)
	for turn := 0; ; turn++ {
		r.follow(r.o.Edges[turn%len(r.o.Edges)], r.o.Ways[turn%len(r.o.Ways)])
		r.mu.Lock()
		ended := r.refused != nil
		r.mu.Unlock()
		if ended {
			return
		}
		select {
		case <-r.stop:
			return
		case <-time.After(comeBackAfter):
		}
	}
}

// follow is one connection.
func (r *Reader) follow(e *Edge, way Way) {
	r.mu.Lock()
	a := &schema.Attach{Channel: 1, Session: r.session, Epoch: r.epoch, Types: r.o.Types, Start: &schema.Attach_AfterSeq{AfterSeq: r.seq}}
	r.mu.Unlock()
	p, end := r.w.TryDial(e, way, Dial{Link: func(l *Link) {
		if r.o.CutAfter != nil {
			if n := r.o.CutAfter(); n > 0 {
				l.CutDown(n)
			}
		}
	}}, a)
	if p == nil {
		r.ended(end)
		return
	}
	defer p.Cut()
	r.change(func() { r.peer = p })
	defer r.change(func() { r.peer = nil })
	if !way.Single() {
		p.Attach(a)
	}
	for {
		select {
		case f, more := <-p.frames:
			if !more {
				r.ended(p.ending)
				return
			}
			if !r.take(p, f) {
				return
			}
		case <-r.stop:
			return
		}
	}
}

// ended notes a refusal that coming back from the same cursor does not mend.
func (r *Reader) ended(end Ending) {
	if end.Code == schema.Code_CODE_UNSPECIFIED || end.Code.Rule().Reconnect == schema.Reconnect_RECONNECT_SAME_CURSOR {
		return
	}
	r.change(func() { r.refused = &schema.Refusal{Code: end.Code, Message: end.Message} })
}

// take takes in one frame; false where the connection is of no more use.
func (r *Reader) take(p *Peer, f *schema.ServerFrame) bool {
	wrong := ""
	more := true
	r.change(func() {
		switch m := f.GetFrame().(type) {
		case *schema.ServerFrame_Attached:
			r.attached++
			if m.Attached.GetEpoch() != "" {
				r.epoch = m.Attached.GetEpoch()
			}
			if m.Attached.GetAfterSeq() != r.seq {
				wrong = fmt.Sprintf("it was attached after %d instead of %d", m.Attached.GetAfterSeq(), r.seq)
			}
		case *schema.ServerFrame_Truncated:
			r.truncated = append(r.truncated, m.Truncated)
			if m.Truncated.GetWantedSeq() != r.seq+1 || m.Truncated.GetFirstSeq() <= r.seq+1 {
				wrong = fmt.Sprintf("at %d it was told %v", r.seq, m.Truncated)
			}
			r.seq = m.Truncated.GetFirstSeq() - 1
		case *schema.ServerFrame_Events:
			wrong = r.events(m.Events)
		case *schema.ServerFrame_Error:
			// One on a channel leaves the connection open; a refusal that ends it is in its end, too.
			if m.Error.GetChannel() != 0 {
				more = false
				if m.Error.GetReconnect() != schema.Reconnect_RECONNECT_SAME_CURSOR {
					r.refused = &schema.Refusal{Code: m.Error.GetCode(), Message: m.Error.GetMessage(), Epoch: m.Error.GetEpoch()}
				}
			}
		case *schema.ServerFrame_GoingAway:
			more = false
		}
	})
	if wrong != "" {
		r.w.t.Errorf("reader of %q, %s at %s: %s", r.session, p.way, p.edge.Name, wrong)
		return false
	}
	return more
}

// events takes in envelopes. The caller holds mu.
func (r *Reader) events(m *schema.Events) (wrong string) {
	if m.GetEpoch() != "" {
		r.epoch = m.GetEpoch()
	}
	for _, e := range m.GetEnvelopes() {
		switch seq := e.GetSeq(); {
		case seq <= r.seq:
			return fmt.Sprintf("seq %d came again behind %d", seq, r.seq)
		case seq != r.seq+1 && len(r.o.Types) == 0:
			return fmt.Sprintf("seq %d came behind %d", seq, r.seq)
		case seq > m.GetThroughSeq():
			return fmt.Sprintf("seq %d came in events through %d", seq, m.GetThroughSeq())
		}
		r.seq = e.GetSeq()
		r.got = append(r.got, e)
	}
	if m.GetThroughSeq() != r.seq && len(r.o.Types) == 0 || m.GetThroughSeq() < r.seq {
		return fmt.Sprintf("events through %d end at %d", m.GetThroughSeq(), r.seq)
	}
	r.seq = m.GetThroughSeq()
	return ""
}

func (r *Reader) change(how func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	how()
	close(r.changed)
	r.changed = make(chan struct{})
}

// until waits for a condition on the reader's fields.
func (r *Reader) until(what func() string, ok func() bool) {
	r.w.t.Helper()
	t := time.NewTimer(patience)
	defer t.Stop()
	for {
		r.mu.Lock()
		yes, changed, refused := ok(), r.changed, r.refused
		r.mu.Unlock()
		switch {
		case yes:
			return
		case refused != nil:
			r.w.t.Fatalf("reader of %q: %s: it was refused: %v", r.session, what(), refused)
		}
		select {
		case <-changed:
		case <-t.C:
			r.w.t.Fatalf("reader of %q: %s: not within %s", r.session, what(), patience)
		}
	}
}

// Wait waits until the reader has come to seq, and returns what it got.
func (r *Reader) Wait(seq uint64) []*schema.Envelope {
	r.w.t.Helper()
	r.until(func() string { return fmt.Sprintf("it should come to seq %d and is at %d", seq, r.Seq()) }, func() bool { return r.seq >= seq })
	return r.Got()
}

// WaitAttached waits until the reader has been attached so many times.
func (r *Reader) WaitAttached(times int) {
	r.w.t.Helper()
	r.until(func() string { return fmt.Sprintf("it should be attached %d times", times) }, func() bool { return r.attached >= times })
}

// WaitRefused waits until the reader was told not to come back with its cursor, and why.
func (r *Reader) WaitRefused() *schema.Refusal {
	r.w.t.Helper()
	<-r.over
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.refused == nil {
		r.w.t.Fatalf("reader of %q: it was stopped, not refused", r.session)
	}
	return r.refused
}

// Got is what the reader got, in order.
func (r *Reader) Got() []*schema.Envelope {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.got)
}

// Seq is where the reader is.
func (r *Reader) Seq() uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.seq
}

// Epoch is the history that the reader reads; empty while it knows none.
func (r *Reader) Epoch() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.epoch
}

// Attached is how often it was.
func (r *Reader) Attached() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.attached
}

// Truncated is what the reader was told that it cannot have.
func (r *Reader) Truncated() []*schema.Truncated {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.truncated)
}

// Link is the reader's connection; nil while there is none.
func (r *Reader) Link() *Link {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.peer == nil {
		return nil
	}
	return r.peer.Link()
}

// Cut breaks the reader's connection, if there is one.
func (r *Reader) Cut() {
	if l := r.Link(); l != nil {
		l.Cut()
	}
}

// Stop ends the reader.
func (r *Reader) Stop() {
	r.once.Do(func() { close(r.stop) })
	<-r.over
}
