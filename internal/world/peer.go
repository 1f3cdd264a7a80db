package world

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"tidemark/schema"
)

// Peer is a scripted client on one connection. It reads only while the test wants something, beyond one frame in hand: a peer that wants nothing is a slow reader.
type Peer struct {
	w    *World
	way  Way
	edge *Edge
	wire wire
	link atomic.Pointer[Link]

	// frames is closed when the connection has ended; ending is set before.
	frames chan *schema.ServerFrame
	ending Ending
	gone   chan struct{} // closed by Close and Cut: nobody wants frames any more
	once   sync.Once
	read   sync.WaitGroup

	// inbox has what came while the test wanted something else.
	inbox []*schema.ServerFrame
	ids   uint64
}

// Dial connects by a way that needs no session for it.
func (w *World) Dial(e *Edge, way Way) *Peer {
	w.t.Helper()
	return w.DialAs(e, way, Dial{}, nil)
}

// DialAs connects, with an attach on the way where that is how the way attaches.
func (w *World) DialAs(e *Edge, way Way, d Dial, first *schema.Attach) *Peer {
	w.t.Helper()
	p, end := w.TryDial(e, way, d, first)
	if p == nil {
		w.t.Fatalf("%s at %s: %s", way, e.Name, end)
	}
	w.closers = append(w.closers, p.Close)
	return p
}

// Follow connects and attaches, as every way can, on channel 1.
func (w *World) Follow(e *Edge, way Way, a *schema.Attach) *Peer {
	w.t.Helper()
	a = clone(a)
	a.Channel = 1
	p := w.DialAs(e, way, Dial{}, a)
	if !way.Single() {
		p.Send(&schema.ClientFrame{Frame: &schema.ClientFrame_Attach{Attach: a}})
	}
	return p
}

// Join connects so that the peer can publish to the session, as every way can: where connecting means to follow, it follows from the head.
func (w *World) Join(e *Edge, way Way, session string) *Peer {
	w.t.Helper()
	var first *schema.Attach
	if way == SessionSocket {
		first = &schema.Attach{Channel: 1, Session: session, Start: &schema.Attach_Head{Head: true}}
	}
	return w.DialAs(e, way, Dial{}, first)
}

// TryDial connects, or says why not. Whoever calls it closes the peer.
func (w *World) TryDial(e *Edge, way Way, d Dial, first *schema.Attach) (*Peer, Ending) {
	p := &Peer{w: w, way: way, edge: e, frames: make(chan *schema.ServerFrame), gone: make(chan struct{})}
	told := d.Link
	d.Link = func(l *Link) {
		p.link.Store(l)
		if told != nil {
			told(l)
		}
	}
	p.wire = w.wireTo(e, way, d)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := p.wire.open(ctx, first); err != nil {
		end := p.wire.ending(err)
		p.wire.drop()
		return nil, end
	}
	p.read.Go(func() {
		defer close(p.frames)
		for {
			frames, err := p.wire.receive()
			if err != nil {
				p.ending = p.wire.ending(err)
				return
			}
			for _, f := range frames {
				select {
				case p.frames <- f:
				case <-p.gone:
					return
				}
			}
		}
	})
	return p, Ending{}
}

// Link is the peer's connection; nil before there is one.
func (p *Peer) Link() *Link { return p.link.Load() }

// Close ends the connection in good order.
func (p *Peer) Close() { p.leave(p.wire.close) }

// Cut breaks the connection.
func (p *Peer) Cut() {
	p.leave(func() {
		if l := p.Link(); l != nil {
			l.Cut()
		}
	})
}

func (p *Peer) leave(how func()) {
	p.once.Do(func() {
		close(p.gone)
		how()
		p.wire.drop()
		p.read.Wait()
	})
}

// Send sends a frame. Where the connection has ended, that is for a want to find.
func (p *Peer) Send(f *schema.ClientFrame) {
	p.w.t.Helper()
	if err := p.wire.send(f); err == errNotThisWay { //nolint:errorlint // as it is returned
		p.w.t.Fatalf("%s: %v: %v", p.way, err, f)
	}
}

// SendRaw sends a message as it is: of the way's kind, text or binary.
func (p *Peer) SendRaw(b []byte) { _ = p.wire.raw(b) }

// Attach follows a session on a channel of this connection.
func (p *Peer) Attach(a *schema.Attach) {
	p.w.t.Helper()
	p.Send(&schema.ClientFrame{Frame: &schema.ClientFrame_Attach{Attach: a}})
}

// Publish sends envelopes as one publish, and returns its id.
func (p *Peer) Publish(session string, envelopes ...*schema.Envelope) uint64 {
	p.w.t.Helper()
	return p.PublishAs(&schema.Publish{Session: session, Envelopes: envelopes})
}

// PublishAs sends a publish, and returns the id that it was given.
func (p *Peer) PublishAs(m *schema.Publish) uint64 {
	p.w.t.Helper()
	p.ids++
	m.PublishId = p.ids
	p.Send(&schema.ClientFrame{Frame: &schema.ClientFrame_Publish{Publish: m}})
	return p.ids
}

// next waits for a frame; nil where the connection has ended, or nothing came for so long.
func (p *Peer) next(most time.Duration) (f *schema.ServerFrame, over bool) {
	t := time.NewTimer(most)
	defer t.Stop()
	select {
	case f, ok := <-p.frames:
		return f, !ok
	case <-t.C:
		return nil, false
	}
}

// want returns the first frame that matches, of those that came and those that come; what does not match waits for another want.
func (p *Peer) want(what string, matches func(*schema.ServerFrame) bool) *schema.ServerFrame {
	p.w.t.Helper()
	if i := slices.IndexFunc(p.inbox, matches); i >= 0 {
		f := p.inbox[i]
		p.inbox = slices.Delete(p.inbox, i, i+1)
		return f
	}
	for {
		f, over := p.next(patience)
		switch {
		case over:
			p.w.t.Fatalf("%s peer at %s wants %s; the connection ended: %s; it has %s", p.way, p.edge.Name, what, p.ending, brief(p.inbox))
		case f == nil:
			p.w.t.Fatalf("%s peer at %s wants %s; nothing of the kind came within %s; it has %s", p.way, p.edge.Name, what, patience, brief(p.inbox))
		case matches(f):
			return f
		}
		p.inbox = append(p.inbox, f)
	}
}

func brief(frames []*schema.ServerFrame) string {
	s := fmt.Sprint(frames)
	if len(s) > 600 {
		s = s[:600] + "…"
	}
	return s
}

// Ack is where a publish went.
type Ack struct {
	First, Last uint64
	Duplicate   bool
	Durability  schema.Durability
}

// WantAck wants the publish to be acknowledged.
func (p *Peer) WantAck(id uint64) Ack {
	p.w.t.Helper()
	var a Ack
	var rejected *schema.Rejected
	p.want(fmt.Sprintf("publish %d acknowledged", id), func(f *schema.ServerFrame) bool {
		if r := f.GetRejected(); r.GetPublishId() == id && r != nil {
			rejected = r
			return true
		}
		acks := f.GetPublished().GetAcks()
		i := slices.IndexFunc(acks, func(a *schema.Ack) bool { return a.GetPublishId() == id })
		if i < 0 {
			return false
		}
		a = Ack{acks[i].GetFirstSeq(), acks[i].GetLastSeq(), acks[i].GetDuplicate(), f.GetPublished().GetDurability()}
		if len(acks) > 1 {
			// The others are for another want.
			rest := clone(f)
			rest.GetPublished().Acks = slices.Delete(rest.GetPublished().Acks, i, i+1)
			p.inbox = append(p.inbox, rest)
		}
		return true
	})
	if rejected != nil {
		p.w.t.Fatalf("%s peer at %s: publish %d was rejected: %v", p.way, p.edge.Name, id, rejected)
	}
	return a
}

// Put publishes and wants it acknowledged.
func (p *Peer) Put(session string, envelopes ...*schema.Envelope) Ack {
	p.w.t.Helper()
	return p.WantAck(p.Publish(session, envelopes...))
}

// WantRejected wants the publish to be refused with this code.
func (p *Peer) WantRejected(id uint64, code schema.Code) *schema.Rejected {
	p.w.t.Helper()
	r := p.want(fmt.Sprintf("publish %d rejected with %s", id, code.Word()), func(f *schema.ServerFrame) bool {
		return f.GetRejected().GetPublishId() == id && f.GetRejected() != nil ||
			slices.ContainsFunc(f.GetPublished().GetAcks(), func(a *schema.Ack) bool { return a.GetPublishId() == id })
	}).GetRejected()
	if r.GetCode() != code || r.GetMessage() == "" {
		p.w.t.Fatalf("%s peer at %s: publish %d should be rejected with %s and a sentence; it was told %v", p.way, p.edge.Name, id, code.Word(), r)
	}
	return r
}

// WantAttached wants the attachment to stand.
func (p *Peer) WantAttached() *schema.Attached {
	p.w.t.Helper()
	return p.want("attached", func(f *schema.ServerFrame) bool { return f.GetAttached() != nil }).GetAttached()
}

// WantCaughtUp wants all that was stored at attach to have come.
func (p *Peer) WantCaughtUp() *schema.CaughtUp {
	p.w.t.Helper()
	return p.want("caught_up", func(f *schema.ServerFrame) bool { return f.GetCaughtUp() != nil }).GetCaughtUp()
}

// WantEvents wants envelopes up to seq, in order without a gap behind the first, and returns them.
func (p *Peer) WantEvents(through uint64) []*schema.Envelope {
	p.w.t.Helper()
	var all []*schema.Envelope
	for at := uint64(0); at < through; {
		e := p.want(fmt.Sprintf("events through %d; it is at %d", through, at), func(f *schema.ServerFrame) bool { return f.GetEvents() != nil }).GetEvents()
		for _, v := range e.GetEnvelopes() {
			if at != 0 && v.GetSeq() != at+1 {
				p.w.t.Fatalf("%s peer at %s: seq %d came behind %d", p.way, p.edge.Name, v.GetSeq(), at)
			}
			at = v.GetSeq()
		}
		all = append(all, e.GetEnvelopes()...)
		at = max(at, e.GetThroughSeq())
	}
	return all
}

// WantTruncated wants to be told that envelopes are gone.
func (p *Peer) WantTruncated() *schema.Truncated {
	p.w.t.Helper()
	return p.want("truncated", func(f *schema.ServerFrame) bool { return f.GetTruncated() != nil }).GetTruncated()
}

// WantError wants an attachment to end with this code; where it is the connection's only one, WantEnd is for that.
func (p *Peer) WantError(channel uint32, code schema.Code) *schema.ErrorFrame {
	p.w.t.Helper()
	e := p.want(fmt.Sprintf("error %s on channel %d", code.Word(), channel), func(f *schema.ServerFrame) bool {
		return f.GetError() != nil && f.GetError().GetChannel() == channel
	}).GetError()
	if e.GetCode() != code || e.GetMessage() == "" {
		p.w.t.Fatalf("%s peer at %s: channel %d should end with %s and a sentence; it was told %v", p.way, p.edge.Name, channel, code.Word(), e)
	}
	return e
}

// WantGoingAway wants to be told that the edge goes.
func (p *Peer) WantGoingAway() *schema.GoingAway {
	p.w.t.Helper()
	return p.want("going_away", func(f *schema.ServerFrame) bool { return f.GetGoingAway() != nil }).GetGoingAway()
}

// WantEnd wants the connection to end, with the status of the way and this code; what came before is in the inbox.
func (p *Peer) WantEnd(code schema.Code) Ending {
	p.w.t.Helper()
	for {
		f, over := p.next(2 * patience)
		if over {
			break
		}
		if f == nil {
			p.w.t.Fatalf("%s peer at %s: the connection should end with %s; it stays; it has %s", p.way, p.edge.Name, code.Word(), brief(p.inbox))
		}
		p.inbox = append(p.inbox, f)
	}
	if p.ending.Code != code {
		p.w.t.Fatalf("%s peer at %s: the connection should end with %s; it ended with %s", p.way, p.edge.Name, code.Word(), p.ending)
	}
	return p.ending
}

// WantNothing wants nothing to come for so long.
func (p *Peer) WantNothing(d time.Duration) {
	p.w.t.Helper()
	if len(p.inbox) > 0 {
		p.w.t.Fatalf("%s peer at %s wants nothing; it has %s", p.way, p.edge.Name, brief(p.inbox))
	}
	f, over := p.next(d)
	if over {
		p.w.t.Fatalf("%s peer at %s wants nothing; the connection ended: %s", p.way, p.edge.Name, p.ending)
	}
	if f != nil {
		p.w.t.Fatalf("%s peer at %s wants nothing; this came: %v", p.way, p.edge.Name, f)
	}
}

// WantUnanswered wants the publish neither acknowledged nor rejected for so long.
func (p *Peer) WantUnanswered(id uint64, d time.Duration) {
	p.w.t.Helper()
	for end := time.Now().Add(d); ; {
		f, over := p.next(time.Until(end))
		switch {
		case over:
			p.w.t.Fatalf("%s peer at %s: publish %d should wait; the connection ended: %s", p.way, p.edge.Name, id, p.ending)
		case f == nil:
			return
		case f.GetPublished() != nil || f.GetRejected() != nil:
			p.w.t.Fatalf("%s peer at %s: publish %d should wait; this came: %v", p.way, p.edge.Name, id, f)
		}
		p.inbox = append(p.inbox, f)
	}
}

// Ping wants a pong: the connection works. Ways that have no ping publish nothing and are taken at their word.
func (p *Peer) Ping() {
	p.w.t.Helper()
	if p.way.Single() {
		return
	}
	p.Send(&schema.ClientFrame{Frame: &schema.ClientFrame_Ping{Ping: &schema.Ping{Data: []byte("p")}}})
	p.want("pong", func(f *schema.ServerFrame) bool { return f.GetPong() != nil })
}
