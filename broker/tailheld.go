package broker

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"tidemark/schema"
)

// held is a partition in the hands of a member: two goroutines, of which one reads and the other keeps the lease and the checkpoint.
//
//	          floor                  read
//	------------|--[batch]--[batch]----|······
//	 done with,     out: queued         not read yet
//	 not wanted     or sent
type held struct {
	// Static after construction.
	m         *TailMember
	partition uint32
	stream    string
	lease     *lease
	leave     context.CancelFunc // another is to have it
	settled   chan struct{}      // holds a token: nothing that was sent is unacknowledged

	// Guarded by m.mu.
	read   uint64       // everything up to here is in out, acknowledged, or not wanted
	short  time.Time    // since when the stream seems to be shorter than that
	out    []*TailBatch // oldest first
	ended  bool         // nothing is acknowledged any more
	unread float64      // messages of the stream that were not read yet, as the metric counts them
}

// floor is the checkpoint: everything up to here is done with. Called with m.mu held.
func (h *held) floor() uint64 {
	if len(h.out) > 0 {
		return h.out[0].before
	}
	return h.read
}

// forget drops batches i to j-1 of out, and what they take of the member's room. Called with m.mu held.
func (h *held) forget(i, j int) {
	for _, b := range h.out[i:j] {
		h.m.room.Release(b.weight())
	}
	h.out = append(h.out[:i:i], h.out[j:]...)
}

// weight is what the batch takes of a member's room.
func (b *TailBatch) weight() int64 { return int64(min(max(b.size, tailBatchWeight), tailInFlight)) }

// run holds the partition until ctx ends, because another is to have it or, where closing has ended, too, because the member is closed; or until the lease is lost.
func (h *held) run(ctx, closing context.Context) {
	reading, stop := context.WithCancel(ctx)
	var reader sync.WaitGroup
	reader.Go(func() { h.follow(reading) })
	err := h.keep(ctx)
	stop()
	reader.Wait()
	if err != nil {
		h.m.logger.Warn("a member of an analytics group has lost a partition; what it did not acknowledge is sent to another", "stream", h.stream, "error", err)
		h.end()
		h.drop()
		return
	}
	h.m.mu.Lock()
	h.unqueue()
	h.m.mu.Unlock()
	h.settle(closing)
	floor := h.end()
	// The member is told when it is done, and has the partition until then: nobody takes it meanwhile, this member neither.
	defer h.drop()
	if err := h.release(floor); err != nil {
		h.m.logger.Warn("a member of an analytics group left a partition without giving it back; another takes it in a moment", "stream", h.stream, "error", err)
		return
	}
	h.m.logger.Info("a member of an analytics group has given a partition back", "stream", h.stream, "through", floor)
}

// keep renews the lease, with the checkpoint, until ctx ends; then it returns nil. The error is errLeaseLost.
func (h *held) keep(ctx context.Context) error {
	tick := time.NewTicker(tailCheckpointEvery)
	defer tick.Stop()
	last := time.Now()
	for said := false; ; {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		h.m.mu.Lock()
		floor := h.floor()
		h.m.mu.Unlock()
		if floor == h.lease.position() && time.Since(last) < beatEvery {
			continue
		}
		err := h.lease.renew(ctx, floor)
		if ctx.Err() != nil {
			return nil
		}
		if _, lost := errors.AsType[stopError](err); lost {
			return err
		}
		if err != nil {
			if !said {
				h.m.logger.Warn("the checkpoint of an analytics group could not be stored yet", "stream", h.stream, "error", err)
			}
			said = true
			continue
		}
		said, last = false, time.Now()
	}
}

// unqueue takes back what Next has not returned. Called with m.mu held.
func (h *held) unqueue() {
	kept := h.m.queue[:0:0]
	for _, b := range h.m.queue {
		if b.held != h {
			kept = append(kept, b)
		}
	}
	h.m.queue = kept
	for i, b := range h.out {
		if !b.sent {
			h.read = b.before
			h.forget(i, len(h.out))
			break
		}
	}
}

// settle waits for the acknowledgement of what was sent, unless the member is closed, who hears of none.
func (h *held) settle(closing context.Context) {
	late := time.NewTimer(tailSettleFor)
	defer late.Stop()
	for {
		h.m.mu.Lock()
		open := len(h.out)
		h.m.mu.Unlock()
		if open == 0 {
			return
		}
		select {
		case <-h.settled:
		case <-late.C:
			return
		case <-closing.Done():
			return
		}
	}
}

// release gives the lease back with the checkpoint, as often as that takes within leaveWithin, and while the log stores anything.
func (h *held) release(floor uint64) error {
	ctx, cancel := context.WithTimeout(h.m.log.storing, leaveWithin)
	defer cancel()
	var retry backoff
	for {
		err := h.lease.release(ctx, floor)
		if _, lost := errors.AsType[stopError](err); err == nil || lost || !retry.wait(ctx, errNotStored) {
			return err
		}
	}
}

// end lets nothing more of the partition be returned or acknowledged, and returns the checkpoint.
func (h *held) end() uint64 {
	m := h.m
	m.mu.Lock()
	defer m.mu.Unlock()
	h.unqueue()
	floor := h.floor()
	h.forget(0, len(h.out))
	h.ended = true
	m.log.tails.unread.Sub(h.unread)
	h.unread = 0
	return floor
}

// drop takes the partition out of the member's hands, who is told.
func (h *held) drop() {
	m := h.m
	m.mu.Lock()
	delete(m.held, h.partition)
	m.told = false
	m.mu.Unlock()
	signal(m.wake)
}

// follow reads the partition until ctx ends.
func (h *held) follow(ctx context.Context) {
	var retry backoff
	for said := false; ; {
		began := time.Now()
		err := h.consume(ctx)
		if ctx.Err() != nil {
			return
		}
		if time.Since(began) > time.Minute {
			retry, said = backoff{}, false
		}
		if !said {
			h.m.logger.Warn("a partition of an analytics group cannot be read just now; it goes on from where it was", "stream", h.stream, "error", err)
			said = true
		}
		if !retry.wait(ctx, errNotStored) {
			return
		}
	}
}

// consume reads from where the partition was read to, until something breaks.
func (h *held) consume(ctx context.Context) error {
	l := h.m.log
	s, err := l.js.Stream(ctx, h.stream)
	if err != nil {
		return err
	}
	at, err := h.begin(s.CachedInfo().State)
	if err != nil {
		return err
	}
	o, err := l.conn.readOrdered(ctx, s, at, nil, jetstream.PullMaxMessagesWithBytesLimit(tailPull, max(2*tailBatchBytes, 2*int(l.conn.MaxPayload()))))
	if err != nil {
		return err
	}
	defer o.close()
	var open *TailBatch
	for {
		var wait time.Duration
		if open != nil {
			wait = tailLinger
		}
		msg, meta, err := o.next(ctx, wait)
		if open != nil && errors.Is(err, nats.ErrTimeout) {
			if err := h.flush(ctx, open); err != nil {
				return err
			}
			open = nil
			continue
		}
		if err != nil {
			return err
		}
		seq := meta.Sequence.Stream
		f, count, wanted := h.m.filter.pick(msg.Subject(), msg.Data())
		switch {
		case !wanted && open == nil:
			h.passed(seq, meta.NumPending)
			continue
		case !wanted:
			open.Through = seq
		default:
			if open != nil && !open.takes(f, count) {
				if err := h.flush(ctx, open); err != nil {
					return err
				}
				open = nil
			}
			if open == nil {
				open = &TailBatch{Partition: h.partition, held: h}
			}
			open.add(f, count, seq)
		}
		if meta.NumPending == 0 {
			// There is no more just now.
			if err := h.flush(ctx, open); err != nil {
				return err
			}
			open = nil
		}
		h.behind(meta.NumPending)
	}
}

// tailShortFor is how long a stream must be shorter than what was read of it before that is believed: a leader of a cluster that was deposed, and has not noticed, says so for as long as it waits for its quorum, 10 s.
const tailShortFor = 20 * time.Second

// begin is where to read on. A stream that stays shorter than what was read of it is another one.
func (h *held) begin(s jetstream.StreamState) (uint64, error) {
	h.m.mu.Lock()
	defer h.m.mu.Unlock()
	if s.LastSeq >= h.read {
		h.short = time.Time{}
	} else if h.short.IsZero() {
		h.short = time.Now()
	}
	switch {
	case s.LastSeq < h.read && time.Since(h.short) < tailShortFor:
		return 0, fmt.Errorf("%w: it ends at %d, %d was read", errWentBack, s.LastSeq, h.read)
	case s.LastSeq < h.read:
		h.m.logger.Error("a log stream went back behind the checkpoint of an analytics group, which begins anew in it", "stream", h.stream, "checkpoint", h.read, "last", s.LastSeq)
		// What is out is of the other stream: its places say nothing of this one.
		h.unqueue()
		h.forget(0, len(h.out))
		h.read = 0
	case s.Msgs > 0 && s.FirstSeq > h.read+1:
		h.m.logger.Warn("retention took what an analytics group had not read", "stream", h.stream, "from", h.read+1, "to", s.FirstSeq-1)
	}
	return h.read, nil
}

// passed notes that everything up to seq was read, and the last of it is not wanted.
func (h *held) passed(seq, pending uint64) {
	h.m.mu.Lock()
	h.read = seq
	h.m.mu.Unlock()
	h.behind(pending)
}

// behind notes how much of the stream was not read yet.
func (h *held) behind(pending uint64) {
	h.m.mu.Lock()
	defer h.m.mu.Unlock()
	h.m.log.tails.unread.Add(float64(pending) - h.unread)
	h.unread = float64(pending)
}

// takes reports whether the batch has room for a frame.
func (b *TailBatch) takes(f TailFrame, count int) bool {
	return b.size+f.size() <= tailBatchBytes && b.count+count <= tailBatchEnvelopes
}

func (f *TailFrame) size() int { return len(f.Records) + len(f.Session) + tailFrameCost }

// add puts the frame at stream sequence seq into the batch.
func (b *TailBatch) add(f TailFrame, count int, seq uint64) {
	b.Frames = append(b.Frames, f)
	b.size += f.size()
	b.count += count
	b.Through = seq
}

// flush hands a batch to Next as soon as the member has room for it: while it has none, nothing more is read. The error is the context's.
func (h *held) flush(ctx context.Context, b *TailBatch) error {
	if err := h.m.room.Acquire(ctx, b.weight()); err != nil {
		return err
	}
	h.m.mu.Lock()
	b.before = h.read
	h.read = b.Through
	h.out = append(h.out, b)
	h.m.queue = append(h.m.queue, b)
	h.m.mu.Unlock()
	signal(h.m.wake)
	return nil
}

// pick takes out of a message of the log what is wanted, and how many envelopes that is; false for nothing.
func (t *tailFilter) pick(subject string, data []byte) (f TailFrame, count int, wanted bool) {
	// log.<slice>.<tenant>.<session>: most are of others where there are many tenants, and cost no more than this.
	parts := strings.SplitN(subject, ".", 4)
	if len(parts) != 4 || parts[2] != t.tenant {
		return f, 0, false
	}
	session, err := schema.UnescapeToken(parts[3])
	if err != nil || !strings.HasPrefix(session, t.prefix) {
		return f, 0, false
	}
	frame, err := parseFrame(data)
	if err != nil || frame.Deleted {
		// The projector says of what is no frame that it is none.
		return f, 0, false
	}
	f = TailFrame{Session: session, Epoch: frame.Epoch, Stored: frame.Time, Records: frame.Region}
	if t.kinds == nil {
		return f, frame.Count, true
	}
	f.Records = nil
	for rest := frame.Region; len(rest) > 0; {
		n := recordLen(rest)
		if e, err := schema.Scan(recordBody(rest[:n])); err == nil && t.kinds[e.Kind] {
			f.Records = append(f.Records, rest[:n]...)
			count++
		}
		rest = rest[n:]
	}
	return f, count, count > 0
}
