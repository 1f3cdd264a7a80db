package client

import (
	"context"
	"fmt"
	"io"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"tidemark/schema"
)

// TailOptions say what a member of an analytics group reads.
type TailOptions struct {
	Group string
	// Prefix of the sessions' names; all where empty.
	Prefix string
	// Types wanted, as the JSON form names them; all where empty.
	Types []string
	// Now and Since say where a group begins that is new: with what comes from now on, or with what was stored at this time or later; with the beginning where neither is set.
	Now   bool
	Since time.Time
}

// TailEvent is one thing that a member is told; one field is set.
type TailEvent struct {
	// Assigned says which partitions the member has from here on.
	Assigned *schema.TailAssigned
	// Batch is envelopes of one of them. It is the caller's, who acknowledges it when it is done with.
	Batch *schema.TailBatch
	// Lost: the connection was lost, and why. The next call connects again; what was not acknowledged comes again, to this member or to another.
	Lost error
}

// Tailer is a member of an analytics group, who comes back whenever the connection is lost. Next and Close belong to one goroutine; Ack and Leave may be called by anyone.
type Tailer struct {
	// Static after construction.
	options TailOptions

	// Owned by the goroutine that calls Next.
	link   link
	failed error

	// sending is held by who sends: a stream has one sender at a time.
	sending chan struct{}

	mu   sync.Mutex
	conn conn // nil while there is none
	left bool
}

// Tail makes a member of a group. It connects with the first call of [Tailer.Next].
func (c *Client) Tail(o TailOptions) *Tailer {
	return &Tailer{options: o, link: link{c: c, dial: c.dialTail}, sending: make(chan struct{}, 1)}
}

// Next waits for the next event. A lost connection is an event; it is made anew however long the edges are away. The error is what that does not mend: a [*schema.Refusal], which every later call returns too, or the
// context's. Where the context ended, the next call goes on.
func (t *Tailer) Next(ctx context.Context) (TailEvent, error) {
	for {
		if t.failed != nil {
			return TailEvent{}, t.failed
		}
		if err := ctx.Err(); err != nil {
			return TailEvent{}, err
		}
		c := t.current()
		if c == nil {
			if err := t.connect(ctx); err != nil {
				if ctx.Err() == nil {
					t.failed = err
				}
				return TailEvent{}, err
			}
			continue
		}
		e, err := t.receive(ctx, c)
		if err == nil {
			return e, nil
		}
		t.drop(c)
		if ctx.Err() != nil {
			return TailEvent{}, ctx.Err()
		}
		t.mu.Lock()
		left := t.left
		t.mu.Unlock()
		if left {
			t.failed = io.EOF
			continue
		}
		if final(err) {
			t.failed = err
			continue
		}
		t.link.failed()
		return TailEvent{Lost: err}, nil
	}
}

func (t *Tailer) current() conn {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.conn
}

// connect makes a connection and opens the tail.
func (t *Tailer) connect(ctx context.Context) error {
	c, err := t.link.connect(ctx)
	if err != nil {
		return err
	}
	o := &t.options
	open := &schema.TailOpen{Group: o.Group, SessionPrefix: o.Prefix, Types: o.Types}
	switch {
	case o.Now:
		open.Start = &schema.TailOpen_Now{Now: true}
	case !o.Since.IsZero():
		open.Start = &schema.TailOpen_Since{Since: timestamppb.New(o.Since)}
	}
	t.mu.Lock()
	t.conn = c
	t.mu.Unlock()
	// Where this fails, so does receive, which knows why.
	if err := t.send(ctx, c, &schema.TailRequest{Request: &schema.TailRequest_Open{Open: open}}); err != nil && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return nil
}

func (t *Tailer) receive(ctx context.Context, c conn) (TailEvent, error) {
	msg, err := c.receive(ctx)
	if err != nil {
		return TailEvent{}, err
	}
	r := new(schema.TailResponse)
	if err := proto.Unmarshal(msg, r); err != nil {
		return TailEvent{}, fmt.Errorf("client: the edge sent what is no TailResponse: %w", err)
	}
	t.link.progress()
	return TailEvent{Assigned: r.GetAssigned(), Batch: r.GetBatch()}, nil
}

// Ack says that everything of the partition up to through, from a batch, is done with. Where the connection is lost nobody hears it, and the batch comes again. The error is the context's.
func (t *Tailer) Ack(ctx context.Context, partition uint32, through uint64) error {
	c := t.current()
	if c == nil {
		return nil
	}
	if err := t.send(ctx, c, &schema.TailRequest{Request: &schema.TailRequest_Ack{Ack: &schema.TailAck{Partition: partition, Through: through}}}); err != nil && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return nil
}

func (t *Tailer) send(ctx context.Context, c conn, r *schema.TailRequest) error {
	b, err := proto.Marshal(r)
	if err != nil {
		return schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "The tail cannot be encoded: its names must be UTF-8.")
	}
	select {
	case t.sending <- struct{}{}:
		defer func() { <-t.sending }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	return c.send(ctx, b)
}

func (t *Tailer) drop(c conn) {
	c.cut()
	t.mu.Lock()
	defer t.mu.Unlock()
	t.conn = nil
}

// Leave ends the member in good order, with all that it acknowledged: its partitions are free for others at once. Next goes on until the edge has ended the stream, and then returns [io.EOF]. False where there is no
// connection, and so nothing to wait for. It may be called by anyone, once.
func (t *Tailer) Leave() bool {
	t.sending <- struct{}{}
	defer func() { <-t.sending }()
	t.mu.Lock()
	c := t.conn
	t.left = true
	t.mu.Unlock()
	g, ok := c.(*grpcConn)
	if ok {
		g.closeSend()
	}
	return ok
}

// Close cuts the connection, where there is one.
func (t *Tailer) Close() {
	if c := t.current(); c != nil {
		t.drop(c)
	}
}
