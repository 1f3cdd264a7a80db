package client

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"tidemark/schema"
)

// FollowOptions say what to follow, and from where. Of Head, Last, Since and After the first that is set counts; none is the beginning.
type FollowOptions struct {
	Session string
	// Head: only what comes from now on.
	Head bool
	// Last: the last n envelopes, and on.
	Last uint64
	// Since: what was stored at or after this time, and on.
	Since time.Time
	// After: behind this seq.
	After uint64
	// Epoch is the history that After belongs to; empty where that is not known.
	Epoch string
	// Types wanted, as the JSON form names them; all where empty.
	Types []string
	// MustExist refuses a session without envelopes instead of waiting for its first.
	MustExist bool
	// MergeTokens merges adjacent tokens of one message while catching up.
	MergeTokens bool
}

// Event is one thing that a follower is told; one field is set.
type Event struct {
	// Envelope is the next one. It is the caller's.
	Envelope *schema.Envelope
	// Attached: a connection follows now, the first or another one.
	Attached *schema.Attached
	// CaughtUp: what was stored when the connection attached has been told.
	CaughtUp *schema.CaughtUp
	// Truncated: envelopes were asked for that are no longer there; the next begins at its first_seq.
	Truncated *schema.Truncated
	// GoingAway: the edge is about to stop. The follower goes on until it does, and then connects elsewhere.
	GoingAway *schema.GoingAway
	// Lost: the connection was lost, and why. The next call connects again and goes on.
	Lost error
}

// Place is where a follower stands: behind the envelope Seq of the history Epoch, which is empty while that is not known.
type Place struct {
	Epoch string
	Seq   uint64
}

// Follower reads a session from its place on. Next and Close belong to one goroutine; Cut and Place may be called by anyone.
type Follower struct {
	// Static after construction.
	options FollowOptions

	// Owned by the goroutine that calls Next.
	link     link
	read     Place // behind all frames read
	attached bool  // by any connection: the place is one of the session's
	queue    []queued
	failed   error

	mu   sync.Mutex
	conn conn // nil while there is none
	told Place
}

// queued is an event that was read and not yet told, and the place behind it.
type queued struct {
	event Event
	place Place
}

// Follow makes a follower. It connects with the first call of [Follower.Next].
func (c *Client) Follow(o FollowOptions) *Follower {
	f := &Follower{options: o, link: link{c: c}, read: Place{o.Epoch, 0}}
	if !o.Head && o.Last == 0 && o.Since.IsZero() {
		f.read.Seq = o.After
	}
	f.told = f.read
	return f
}

// Place is where the follower stands: behind the last envelope that Next returned, or what a filter passed over behind it.
func (f *Follower) Place() Place {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.told
}

// Next waits for the next event. A lost connection is an event; it is made anew, from where it stopped, however long the edges are away. The error is what that does not mend: a
// [*schema.Refusal], which every later call returns too, or the context's. Where the context ended, the next call goes on.
func (f *Follower) Next(ctx context.Context) (Event, error) {
	for len(f.queue) == 0 {
		if f.failed != nil {
			return Event{}, f.failed
		}
		if err := ctx.Err(); err != nil {
			return Event{}, err
		}
		f.mu.Lock()
		c := f.conn
		f.mu.Unlock()
		if c == nil {
			if err := f.connect(ctx); err != nil {
				if ctx.Err() == nil {
					f.failed = err
				}
				return Event{}, err
			}
			continue
		}
		if err := f.receive(ctx, c); err != nil {
			f.drop(c)
			if ctx.Err() != nil {
				return Event{}, ctx.Err()
			}
			if final(err) {
				f.failed = err
				continue
			}
			f.link.failed()
			f.queue = append(f.queue, queued{Event{Lost: err}, f.read})
		}
	}
	q := f.queue[0]
	f.queue[0] = queued{}
	f.queue = f.queue[1:]
	f.mu.Lock()
	f.told = q.place
	f.mu.Unlock()
	return q.event, nil
}

// Queued is how many events Next will return without waiting. It belongs to the goroutine that calls Next.
func (f *Follower) Queued() int { return len(f.queue) }

// connect makes a connection and attaches at the place.
func (f *Follower) connect(ctx context.Context) error {
	c, err := f.link.connect(ctx)
	if err != nil {
		return err
	}
	o := &f.options
	a := &schema.Attach{
		Channel: 1, Session: o.Session, Epoch: f.read.Epoch, Types: o.Types, MustExist: o.MustExist, MergeTokens: o.MergeTokens,
		Start: &schema.Attach_AfterSeq{AfterSeq: f.read.Seq},
	}
	switch {
	case f.attached:
	case o.Head:
		a.Start = &schema.Attach_Head{Head: true}
	case o.Last > 0:
		a.Start = &schema.Attach_Last{Last: o.Last}
	case !o.Since.IsZero():
		a.Start = &schema.Attach_Since{Since: timestamppb.New(o.Since)}
	}
	frame, err := proto.Marshal(&schema.ClientFrame{Frame: &schema.ClientFrame_Attach{Attach: a}})
	if err != nil {
		c.cut()
		return schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "The attach to session %q cannot be encoded: its names must be UTF-8.", o.Session)
	}
	f.mu.Lock()
	f.conn = c
	f.mu.Unlock()
	// Where this fails, so does receive, which knows why.
	_ = c.send(ctx, frame)
	return nil
}

// receive reads one frame and queues what it says.
func (f *Follower) receive(ctx context.Context, c conn) error {
	msg, err := c.receive(ctx)
	if err != nil {
		return err
	}
	frame := new(schema.ServerFrame)
	if err := proto.Unmarshal(msg, frame); err != nil {
		return fmt.Errorf("client: the edge sent what is no frame: %w", err)
	}
	f.queue = f.queue[:0]
	switch m := frame.GetFrame().(type) {
	case *schema.ServerFrame_Events:
		f.link.progress()
		return f.events(m.Events)
	case *schema.ServerFrame_Attached:
		return f.takeAttached(m.Attached)
	case *schema.ServerFrame_CaughtUp:
		f.link.progress()
		f.tell(Event{CaughtUp: m.CaughtUp})
	case *schema.ServerFrame_Truncated:
		if m.Truncated.GetFirstSeq() <= f.read.Seq {
			return f.outOfOrder("says that it begins at", m.Truncated.GetFirstSeq())
		}
		f.read.Seq = m.Truncated.GetFirstSeq() - 1
		f.tell(Event{Truncated: m.Truncated})
	case *schema.ServerFrame_GoingAway:
		f.tell(Event{GoingAway: m.GoingAway})
	case *schema.ServerFrame_Error:
		e := m.Error
		return &schema.Refusal{Code: e.GetCode(), Message: e.GetMessage(), Head: e.GetHeadSeq(), Epoch: e.GetEpoch()}
	case *schema.ServerFrame_Detached:
		return errors.New("client: the edge ended the attachment")
	}
	return nil
}

func (f *Follower) takeAttached(a *schema.Attached) error {
	if f.attached && a.GetAfterSeq() != f.read.Seq {
		return f.outOfOrder("attached after", a.GetAfterSeq())
	}
	f.attached = true
	f.read.Seq = a.GetAfterSeq()
	if a.GetEpoch() != "" {
		f.read.Epoch = a.GetEpoch()
	}
	f.tell(Event{Attached: a})
	return nil
}

// events checks the order (I4) and queues the envelopes.
func (f *Follower) events(m *schema.Events) error {
	if m.GetEpoch() != "" {
		f.read.Epoch = m.GetEpoch()
	}
	filtered := len(f.options.Types) > 0
	for _, e := range m.GetEnvelopes() {
		first := e.GetSeq()
		if e.FirstSeq != nil {
			first = e.GetFirstSeq()
		}
		if first <= f.read.Seq || !filtered && first != f.read.Seq+1 || e.GetSeq() < first {
			return f.outOfOrder("sent", first)
		}
		f.read.Seq = e.GetSeq()
		f.tell(Event{Envelope: e})
	}
	through := m.GetThroughSeq()
	if through < f.read.Seq || !filtered && through != f.read.Seq {
		return f.outOfOrder("says that it has sent all up to", through)
	}
	f.read.Seq = through
	if n := len(f.queue); n > 0 {
		f.queue[n-1].place = f.read
	} else {
		f.mu.Lock()
		f.told = f.read
		f.mu.Unlock()
	}
	return nil
}

func (f *Follower) tell(e Event) { f.queue = append(f.queue, queued{e, f.read}) }

// outOfOrder is an edge that breaks I4. Connecting again would hide it.
func (f *Follower) outOfOrder(what string, seq uint64) error {
	f.failed = schema.Refuse(schema.Code_CODE_INTERNAL, "The edge broke the order of session %q: it %s seq %d where %d was due.", f.options.Session, what, seq, f.read.Seq+1)
	return f.failed
}

// drop forgets a connection that is over.
func (f *Follower) drop(c conn) {
	c.cut()
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.conn == c {
		f.conn = nil
	}
}

// Cut breaks the connection as a broken network does. The follower comes back by itself.
func (f *Follower) Cut() {
	f.mu.Lock()
	c := f.conn
	f.mu.Unlock()
	if c != nil {
		c.cut()
	}
}

// Close ends the follower.
func (f *Follower) Close() {
	f.mu.Lock()
	c := f.conn
	f.conn = nil
	f.mu.Unlock()
	if c != nil {
		c.close()
	}
	if f.failed == nil {
		f.failed = schema.Refuse(schema.Code_CODE_GOING_AWAY, "The follower of session %q was closed.", f.options.Session)
	}
	f.queue = nil
}
