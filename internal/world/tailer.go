package world

import (
	"context"
	"io"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"

	"tidemark/schema"
)

// Tailer is a member of an analytics group, over the method Tail. Its methods may be called concurrently.
type Tailer struct {
	w      *World
	calls  *calls
	stream grpc.ClientStream
	// see is called with every response, before the next is received. Optional.
	see  func(t *Tailer, r *schema.TailResponse)
	over chan struct{}

	sending sync.Mutex // a stream has one sender at a time

	mu       sync.Mutex
	assigned *schema.TailAssigned // nil before the first
	batches  []*schema.TailBatch
	ending   Ending
}

// Tail opens a tail at an edge with the token of an analyst of all sessions, or another.
func (w *World) Tail(e *Edge, token string, open *schema.TailOpen, see func(t *Tailer, r *schema.TailResponse)) *Tailer {
	w.t.Helper()
	if token == "" {
		token = w.Token(schema.Role_ROLE_ANALYST, "*")
	}
	t := &Tailer{w: w, calls: newCalls(path{net: w.net, addr: e.Name + ".grpc"}, token), see: see, over: make(chan struct{})}
	w.must(t.calls.err)
	w.closers = append(w.closers, t.Cut)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	s, err := t.calls.stream(ctx, "Tail", true, true)
	if err == nil {
		t.stream = s
		err = t.send(&schema.TailRequest{Request: &schema.TailRequest_Open{Open: open}})
	}
	if err != nil && err != io.EOF { //nolint:errorlint // grpc-go returns it as it is
		t.ending = t.calls.ending(err)
		close(t.over)
		return t
	}
	go t.run()
	return t
}

func (t *Tailer) run() {
	defer close(t.over)
	for {
		r := new(schema.TailResponse)
		if err := t.stream.RecvMsg(r); err != nil {
			t.mu.Lock()
			defer t.mu.Unlock()
			t.ending = t.calls.ending(&failedCall{err, t.stream.Trailer()})
			return
		}
		t.mu.Lock()
		if a := r.GetAssigned(); a != nil {
			t.assigned = a
		} else {
			t.batches = append(t.batches, r.GetBatch())
		}
		t.mu.Unlock()
		if t.see != nil {
			t.see(t, r)
		}
	}
}

func (t *Tailer) send(r *schema.TailRequest) error {
	t.sending.Lock()
	defer t.sending.Unlock()
	return t.stream.SendMsg(r)
}

// Ack acknowledges. The error says that nobody hears it, because the stream has ended.
func (t *Tailer) Ack(partition uint32, through uint64) error {
	return t.send(&schema.TailRequest{Request: &schema.TailRequest_Ack{Ack: &schema.TailAck{Partition: partition, Through: through}}})
}

// Partitions are those that it has now; nil where it was told nothing yet.
func (t *Tailer) Partitions() []uint32 {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.assigned == nil {
		return nil
	}
	return append([]uint32{}, t.assigned.GetPartitions()...)
}

// Batches are all that came.
func (t *Tailer) Batches() []*schema.TailBatch {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Clone(t.batches)
}

// Texts are what envelopes said that came, by session.
func (t *Tailer) Texts() map[string]string {
	all := make(map[string]string)
	for _, b := range t.Batches() {
		for _, f := range b.GetSessions() {
			all[f.GetSession()] += Texts(f.GetEnvelopes())
		}
	}
	return all
}

// Leave says that it sends no more, and waits for the edge to end the stream.
func (t *Tailer) Leave() Ending {
	t.w.t.Helper()
	t.sending.Lock()
	_ = t.stream.CloseSend()
	t.sending.Unlock()
	return t.Ended()
}

// Ended waits for the stream's end.
func (t *Tailer) Ended() Ending {
	t.w.t.Helper()
	select {
	case <-t.over:
	case <-time.After(patience):
		t.w.t.Fatal("the tail has not ended")
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.ending
}

// Gone reports whether the stream has ended.
func (t *Tailer) Gone() bool {
	select {
	case <-t.over:
		return true
	default:
		return false
	}
}

// Cut ends the connection at once.
func (t *Tailer) Cut() {
	t.calls.drop()
	<-t.over
}
