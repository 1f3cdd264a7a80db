package broker

import (
	"errors"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"golang.org/x/sync/semaphore"

	"tidemark/schema"
)

// TestTailMemberCountsSilenceItHasHeard: a member that could not look for a while, because NATS was away, takes nothing for silent that could not speak.
func TestTailMemberCountsSilenceItHasHeard(t *testing.T) {
	l := newLease(nil, "k", "me", slog.New(slog.DiscardHandler))
	m := &TailMember{leases: []*lease{l}}
	record := &schema.Projection{Holder: "other/1"}
	now := time.Now()
	look := func(after time.Duration) bool {
		now = now.Add(after)
		m.sees(now)
		return l.free(7, record, now)
	}
	if look(0) || look(tailLook) || look(20*time.Second) {
		t.Error("a holder was taken for silent that was not heard in time")
	}
	silent := time.Duration(0)
	for ; !look(tailLook) && silent < time.Minute; silent += tailLook {
	}
	if silent += tailLook; silent != leaseTTL {
		t.Errorf("a holder was taken for silent after %s", silent)
	}
}

// TestTailHeldOverAnotherStream: when a log stream goes back, what was out of the one before is forgotten, and what is said of it moves no checkpoint in the new one.
func TestTailHeldOverAnotherStream(t *testing.T) {
	m := &TailMember{log: &JetStreamLog{tails: newTailMetrics(nil)}, logger: slog.New(slog.DiscardHandler), room: semaphore.NewWeighted(tailInFlight), held: make(map[uint32]*held), wake: make(chan struct{}, 1), told: true, starts: make([]uint64, 1)}
	h := &held{m: m, settled: make(chan struct{}, 1)}
	m.held[0] = h
	put := func(through uint64) {
		t.Helper()
		if err := h.flush(t.Context(), &TailBatch{held: h, Through: through}); err != nil {
			t.Fatal(err)
		}
	}
	put(50)
	put(100)
	put(150)
	for range 2 {
		if e, ok := m.take(); !ok || e.Batch == nil {
			t.Fatalf("the member was told %v", e)
		}
	}
	short := jetstream.StreamState{Msgs: 3, FirstSeq: 1, LastSeq: 3}
	if at, err := h.begin(short); !errors.Is(err, errWentBack) {
		t.Fatalf("one answer is believed, and the stream is read from behind %d: %v", at, err)
	}
	h.short = h.short.Add(-tailShortFor / 2)
	if at, err := h.begin(jetstream.StreamState{Msgs: 150, FirstSeq: 1, LastSeq: 150}); at != 150 || err != nil {
		t.Fatalf("a stream that was never shorter is read from behind %d: %v", at, err)
	}
	if _, err := h.begin(short); !errors.Is(err, errWentBack) {
		t.Fatalf("what was said before the stream was whole again counts: %v", err)
	}
	h.short = h.short.Add(-tailShortFor)
	if at, err := h.begin(short); at != 0 || err != nil {
		t.Fatalf("the new stream is read from behind %d: %v", at, err)
	}
	put(2)
	ack := func(partition uint32, through uint64) {
		t.Helper()
		if err := m.Ack(partition, through); (err != nil) != (partition > 0) || err != nil && !strings.Contains(err.Error(), "the log has 1") {
			t.Errorf("partition %d was acknowledged: %v", partition, err)
		}
	}
	ack(1, 100)
	ack(0, 100)
	if floor := h.floor(); floor != 0 {
		t.Errorf("the checkpoint is %d before anything of the new stream was sent", floor)
	}
	if e, ok := m.take(); !ok || e.Batch.Through != 2 {
		t.Errorf("the member was told %v, want what the new stream holds", e.Batch)
	}
	ack(0, 2)
	if floor := h.floor(); floor != 2 || len(h.out) != 0 {
		t.Errorf("the checkpoint is %d with %d batches out", floor, len(h.out))
	}
	if !m.room.TryAcquire(tailInFlight) {
		t.Error("the batches of the old stream take room still")
	}
}

// TestTailHeldCheckpointOnlyGrows: what was passed over stays so while a batch behind it is out.
func TestTailHeldCheckpointOnlyGrows(t *testing.T) {
	m := &TailMember{log: &JetStreamLog{tails: newTailMetrics(nil)}, logger: slog.New(slog.DiscardHandler), room: semaphore.NewWeighted(tailInFlight), held: make(map[uint32]*held), wake: make(chan struct{}, 1), told: true, starts: make([]uint64, 1)}
	h := &held{m: m, settled: make(chan struct{}, 1)}
	m.held[0] = h
	want := func(floor uint64) {
		t.Helper()
		if got := h.floor(); got != floor {
			t.Errorf("the checkpoint is %d, want %d", got, floor)
		}
	}
	h.passed(1000, 0)
	want(1000)
	for _, through := range []uint64{1001, 1010} {
		if err := h.flush(t.Context(), &TailBatch{held: h, Through: through}); err != nil {
			t.Fatal(err)
		}
		want(1000)
	}
	h.passed(2000, 0)
	for _, b := range h.out {
		b.sent = true
	}
	if err := m.Ack(0, 1001); err != nil {
		t.Fatal(err)
	}
	want(1001)
	if err := m.Ack(0, 1010); err != nil {
		t.Fatal(err)
	}
	want(2000)
}
