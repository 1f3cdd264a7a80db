package client

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/proto"

	"tidemark/schema"
)

const (
	// workChannel is the number of a worker's one subscription.
	workChannel = 1
	// goodbyeFor is how long an edge may take to answer a worker that leaves.
	goodbyeFor = 5 * time.Second
)

// WorkOptions say what a worker takes, and how its group hands it out. What is left out stays as the group has it; [schema.WorkSubscribe] has the bounds.
type WorkOptions struct {
	Group string
	// Kinds are payload types, as the JSON form names them: of those that make work. Kinds and Sessions, where they are named, are all that the group takes, and perhaps more.
	Kinds []string
	// Sessions are names, and prefixes that end in *.
	Sessions []string
	// Credit is how many items are worked on at once. Default 1.
	Credit int
	// AckWait is how long an edge may hear nothing of an item before others get it. The worker says in progress by itself, three times as often.
	AckWait    time.Duration
	MaxDeliver int
	Backoff    []time.Duration
	Ordered    bool
	FromNow    bool
	// Joined is told whenever a connection has become a member of the group; Lost, when it was lost and why. They are called one at a time and must not block. Optional.
	Joined func(*schema.WorkGroup)
	Lost   func(error)
}

// Item is a work item. It is the callback's.
type Item struct {
	// ID names this delivery, on its connection.
	ID      uint64
	Session string
	// Epoch is the session's history.
	Epoch string
	// Attempt is how often it was handed out, this time included.
	Attempt int
	// Deadline is the first, by the edge's clock; the worker has it renewed.
	Deadline time.Time
	// Cancelled: what it belongs to had been cancelled before it was handed out. Its context has ended from the beginning.
	Cancelled bool
	Envelope  *schema.Envelope
}

// Worker takes items of a group and settles them as a callback says. Run may be called once; Cut by anyone.
type Worker struct {
	// Static after construction.
	client  *Client
	options WorkOptions
	do      func(ctx context.Context, it *Item) error

	mu   sync.Mutex
	conn conn // nil while there is none
}

// Worker makes a worker; do is called for each item, for as many at once as the credit allows. What it returns settles the item: nil acknowledges it; [Term] gives it up; [Later] and any other error give
// it back with their sentence, to be handed out again to anybody. Of an item that was cancelled any error but [Term] acknowledges it: nobody shall do it again.
//
// Its context ends, with a cause that says why, when what the item belongs to was cancelled ([schema.Code_CODE_CANCELLED]), when others have the item, when the connection is lost, and when the worker
// is told to end. What do returns after the latter three is not said any more unless it is nil: the item is with others anyhow.
func (c *Client) Worker(o WorkOptions, do func(ctx context.Context, it *Item) error) *Worker {
	return &Worker{client: c, options: o, do: do}
}

// Term is what a callback returns for an item that nobody can do: its group gives it up, and it is a dead letter.
func Term(reason string) error { return termError(reason) }

type termError string

func (e termError) Error() string { return string(e) }

// Later is what a callback returns to have an item handed out again after so long, instead of as the group's backoff says.
func Later(after time.Duration, reason string) error { return &laterError{after, reason} }

type laterError struct {
	after  time.Duration
	reason string
}

func (e *laterError) Error() string { return e.reason }

// Run works until ctx ends, over lost connections and edges, and returns when all callbacks have: then nil. Otherwise the error is one that connecting again does not mend, a [*schema.Refusal].
func (w *Worker) Run(ctx context.Context) error {
	l := &link{c: w.client}
	for {
		c, err := l.connect(ctx)
		if ctx.Err() != nil {
			if err == nil {
				c.cut()
			}
			return nil
		}
		if err != nil {
			return err
		}
		w.mu.Lock()
		w.conn = c
		w.mu.Unlock()
		err = w.serve(ctx, c, l)
		w.mu.Lock()
		w.conn = nil
		w.mu.Unlock()
		if ctx.Err() != nil {
			return nil
		}
		if final(err) {
			return err
		}
		l.failed()
		w.client.cfg.Logger.Debug("connection lost", "group", w.options.Group, "error", err)
		if w.options.Lost != nil {
			w.options.Lost(err)
		}
	}
}

// Cut breaks the connection as a broken network does. The worker comes back by itself.
func (w *Worker) Cut() {
	w.mu.Lock()
	c := w.conn
	w.mu.Unlock()
	if c != nil {
		c.cut()
	}
}

// shift is a worker's time on one connection.
type shift struct {
	// Static after construction.
	w    *Worker
	c    conn
	told context.Context // ends when the worker is told to end
	life context.Context // of the connection, and of the items on it; its cause says why it ended
	end  context.CancelCauseFunc
	out  chan []byte   // frames to send
	over chan struct{} // closed when nothing more is sent

	working sync.WaitGroup // callbacks, and the beat

	mu sync.Mutex // guards all below
	// hands has what ends the context of each item in hand; closed: no more is taken.
	hands  map[uint64]context.CancelCauseFunc
	closed bool
}

// errLeaving is why the connection ends of a worker that was told to end.
var errLeaving = errors.New("client: the worker ends")

// serve works on one connection. It returns why that was lost, after all that ran for it has ended.
func (w *Worker) serve(ctx context.Context, c conn, l *link) error {
	s := &shift{w: w, c: c, told: ctx, out: make(chan []byte), over: make(chan struct{}), hands: make(map[uint64]context.CancelCauseFunc)}
	s.life, s.end = context.WithCancelCause(context.WithoutCancel(ctx))
	var sending sync.WaitGroup
	sending.Go(s.send)
	left := make(chan struct{})
	stay := context.AfterFunc(ctx, func() {
		defer close(left)
		s.leave()
	})
	err := s.subscribe()
	for err == nil {
		err = s.receive(l)
	}
	s.close()
	s.end(err)
	if errors.Is(err, errLeaving) {
		defer c.close()
	} else {
		// Nobody waits for what cannot be sent any more.
		c.cut()
	}
	s.working.Wait()
	close(s.over)
	if !stay() {
		<-left
	}
	sending.Wait()
	return err
}

// close takes no more items.
func (s *shift) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
}

// leave ends the shift in good order: what is in hand comes to its end, its answers are sent, and the edge confirms that it has them.
func (s *shift) leave() {
	s.close()
	s.end(errLeaving)
	s.working.Wait()
	s.say(&schema.ClientFrame{Frame: &schema.ClientFrame_WorkUnsubscribe{WorkUnsubscribe: &schema.WorkUnsubscribe{Channel: workChannel}}})
	t := time.NewTimer(goodbyeFor)
	defer t.Stop()
	select {
	case <-s.over:
	case <-t.C:
		s.c.cut()
	}
}

// say hands a frame to the sender, unless the connection is over.
func (s *shift) say(f *schema.ClientFrame) {
	b, err := proto.Marshal(f)
	if err != nil {
		// What is not UTF-8 was found before.
		return
	}
	select {
	case s.out <- b:
	case <-s.over:
	}
}

// send sends what is said. When it cannot, receive finds out why.
func (s *shift) send() {
	ctx, broken := context.WithoutCancel(s.told), false
	for {
		select {
		case b := <-s.out:
			broken = broken || s.c.send(ctx, b) != nil
		case <-s.over:
			return
		}
	}
}

// subscribe joins the group.
func (s *shift) subscribe() error {
	o := &s.w.options
	m := &schema.WorkSubscribe{
		Channel: workChannel, Group: o.Group, Kinds: o.Kinds, Sessions: o.Sessions, Credit: uint32(max(o.Credit, 0)), AckWaitMs: uint64(max(o.AckWait, 0).Milliseconds()), MaxDeliver: uint32(max(o.MaxDeliver, 0)),
		Ordered: o.Ordered, FromNow: o.FromNow,
	}
	for _, d := range o.Backoff {
		m.BackoffMs = append(m.BackoffMs, uint64(max(d, 0).Milliseconds()))
	}
	f := &schema.ClientFrame{Frame: &schema.ClientFrame_WorkSubscribe{WorkSubscribe: m}}
	if _, err := proto.Marshal(f); err != nil {
		return schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "The subscription to group %q cannot be encoded: its names must be UTF-8.", o.Group)
	}
	s.say(f)
	return nil
}

// receive takes one frame. The error ends the connection.
func (s *shift) receive(l *link) error {
	// Not the worker's context: a read that it ends would cut the connection.
	msg, err := s.c.receive(context.WithoutCancel(s.told))
	if err != nil {
		return err
	}
	frame := new(schema.ServerFrame)
	if err := proto.Unmarshal(msg, frame); err != nil {
		return fmt.Errorf("client: the edge sent what is no frame: %w", err)
	}
	switch m := frame.GetFrame().(type) {
	case *schema.ServerFrame_WorkSubscribed:
		l.progress()
		g := m.WorkSubscribed.GetGroup()
		if s.w.options.Joined != nil {
			s.w.options.Joined(g)
		}
		s.hire(func() { s.beat(time.Duration(g.GetAckWaitMs()) * time.Millisecond / 3) })
	case *schema.ServerFrame_Work:
		l.progress()
		for _, d := range m.Work.GetItems() {
			s.take(d)
		}
	case *schema.ServerFrame_WorkCancelled:
		gone := m.WorkCancelled
		s.stop(gone.GetWorkId(), cancelled(gone.GetReason()))
	case *schema.ServerFrame_WorkRefused:
		r := m.WorkRefused
		s.w.client.cfg.Logger.Debug("answer refused", "group", s.w.options.Group, "item", r.GetWorkId(), "code", r.GetCode().Word())
		// Others have it.
		s.stop(r.GetWorkId(), &schema.Refusal{Code: r.GetCode(), Message: r.GetMessage()})
	case *schema.ServerFrame_WorkUnsubscribed:
		return errLeaving
	case *schema.ServerFrame_Error:
		e := m.Error
		return &schema.Refusal{Code: e.GetCode(), Message: e.GetMessage()}
	}
	return nil
}

// cancelled is why the context of an item ends that was cancelled.
func cancelled(reason string) error {
	if reason == "" {
		reason = "no reason was given"
	}
	return schema.Refuse(schema.Code_CODE_CANCELLED, "What the item belongs to was cancelled: %s.", reason)
}

// hire runs a part of the shift, unless it takes no more.
func (s *shift) hire(do func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed {
		s.working.Go(do)
	}
}

// take begins to work on an item. The edge sends no more than the credit.
func (s *shift) take(d *schema.WorkDelivery) {
	it := &Item{
		ID: d.GetWorkId(), Session: d.GetSession(), Epoch: d.GetEpoch(), Attempt: int(d.GetAttempt()), Deadline: d.GetDeadline().AsTime(), Cancelled: d.GetCancelled(), Envelope: d.GetEnvelope(),
	}
	ctx, stop := context.WithCancelCause(s.life)
	if it.Cancelled {
		stop(cancelled("before it was handed out"))
	}
	s.mu.Lock()
	if !s.closed {
		s.hands[it.ID] = stop
	}
	s.mu.Unlock()
	s.hire(func() {
		defer stop(nil)
		err := s.w.do(ctx, it)
		s.mu.Lock()
		delete(s.hands, it.ID)
		s.mu.Unlock()
		s.settle(ctx, it.ID, err)
	})
}

// stop ends the context of an item in hand.
func (s *shift) stop(id uint64, why error) {
	s.mu.Lock()
	stop := s.hands[id]
	s.mu.Unlock()
	if stop != nil {
		stop(why)
	}
}

// settle says what became of an item.
func (s *shift) settle(ctx context.Context, id uint64, err error) {
	term, isTerm := errors.AsType[termError](err)
	later, isLater := errors.AsType[*laterError](err)
	cause := context.Cause(ctx)
	if cause == nil && s.told.Err() != nil {
		// It is about to be told, too.
		cause = errLeaving
	}
	switch {
	case isTerm:
		s.say(&schema.ClientFrame{Frame: &schema.ClientFrame_Term{Term: &schema.WorkTerm{WorkId: id, Reason: reason(term)}}})
	case err == nil, cause != nil && schema.CodeOf(cause) == schema.Code_CODE_CANCELLED:
		s.say(&schema.ClientFrame{Frame: &schema.ClientFrame_Ack{Ack: &schema.WorkAck{WorkIds: []uint64{id}}}})
	case cause != nil:
		// It is with others, or will be as soon as the connection has ended.
	case isLater:
		ms := uint64(max(later.after, 0).Milliseconds())
		s.say(&schema.ClientFrame{Frame: &schema.ClientFrame_Nack{Nack: &schema.WorkNack{WorkId: id, DelayMs: &ms, Reason: reason(later)}}})
	default:
		s.say(&schema.ClientFrame{Frame: &schema.ClientFrame_Nack{Nack: &schema.WorkNack{WorkId: id, Reason: reason(err)}}})
	}
}

// reason is an error's sentence as an edge takes it: valid UTF-8 of bounded length.
func reason(err error) string {
	text := strings.ToValidUTF8(err.Error(), "\uFFFD")
	if len(text) <= schema.MaxReasonBytes {
		return text
	}
	end := schema.MaxReasonBytes - len("…")
	for !utf8.RuneStart(text[end]) {
		end--
	}
	return text[:end] + "…"
}

// beat says of all items in hand, again and again, that they are in progress.
func (s *shift) beat(every time.Duration) {
	tick := time.NewTicker(max(every, 10*time.Millisecond))
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-s.life.Done():
			return
		}
		s.mu.Lock()
		ids := make([]uint64, 0, len(s.hands))
		for id := range s.hands {
			ids = append(ids, id)
		}
		s.mu.Unlock()
		slices.Sort(ids)
		for part := range slices.Chunk(ids, schema.MaxWorkCredit) {
			s.say(&schema.ClientFrame{Frame: &schema.ClientFrame_InProgress{InProgress: &schema.WorkInProgress{WorkIds: part}}})
		}
	}
}
