package broker

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"golang.org/x/sync/semaphore"

	"tidemark/schema"
)

// TailMember is a member of an analytics group, on this edge. Next belongs to one goroutine at a time; the other methods may be called concurrently.
//
// Every tailLook it looks who the others are (the bucket PRESENCE) and which partitions are free (their leases in the bucket TAILS), gives back what is not its any more, and takes what is. Partition i is for member i modulo n, in the
// order of their ULIDs. All members compute the same; where they do not know the same yet, a partition is for a moment nobody's, and never two members', because of the lease.
type TailMember struct {
	// Static after construction.
	log    *JetStreamLog
	group  tailGroup
	id     string // a ULID
	filter tailFilter
	starts []uint64
	logger *slog.Logger
	// room bounds what is in flight; a batch takes its weight of it until it is acknowledged or given up.
	room *semaphore.Weighted
	// leases are one for each partition. Those of partitions in hand are their held's, the others run's.
	leases []*lease
	// again holds a token: run is to look at once.
	again chan struct{}
	// leave ends run; over is closed when it has ended.
	leave context.CancelFunc
	over  chan struct{}

	// Owned by run.
	others map[string]bool // as they were seen last; empty where they never were
	looked time.Time       // when the leases were read last
	warned bool            // that something cannot be read or written just now

	mu     sync.Mutex // guards all below
	held   map[uint32]*held
	queue  []*TailBatch     // read and not returned yet
	told   bool             // Next has said which partitions the member has
	said   map[uint32]*held // what it said last
	closed bool
	wake   chan struct{} // holds a token: Next may have something
}

// newTailMember makes a member, which begins at once. The error is going_away where the log is closed.
func (l *JetStreamLog) newTailMember(kv jetstream.KeyValue, g tailGroup, o TailOptions, id string, starts []uint64) (*TailMember, error) {
	m := &TailMember{
		log: l, group: g, id: id, filter: newTailFilter(g.tenant, o), starts: starts, room: semaphore.NewWeighted(tailInFlight),
		logger: l.logger.With("group", g.name, "tenant", g.tenant, "member", id),
		again:  make(chan struct{}, 1), over: make(chan struct{}), held: make(map[uint32]*held), wake: make(chan struct{}, 1),
	}
	for i := range starts {
		m.leases = append(m.leases, newLease(kv, g.leaseKey(logStreamName(i)), id, m.logger))
	}
	// It ends with the log, where nobody closes it before.
	ctx, leave := context.WithCancel(l.storing)
	m.leave = leave
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		leave()
		return nil, tailGoingAway(g.name)
	}
	if l.tailing == nil {
		l.tailing = make(map[*TailMember]bool, 1)
	}
	l.tailing[m] = true
	l.appending.Go(func() { m.run(ctx) })
	return m, nil
}

// closeTails lets all members leave, and does not wait for them: they are among what Close waits for.
func (l *JetStreamLog) closeTails() {
	l.mu.Lock()
	all := slices.Collect(maps.Keys(l.tailing))
	l.mu.Unlock()
	for _, m := range all {
		m.end()
	}
}

// Next waits for the next event: first the partitions that the member has, and so again whenever they have changed; then batches of theirs. What is returned of one partition comes in order. The error is the context's, or going_away once the
// member is closed.
func (m *TailMember) Next(ctx context.Context) (TailEvent, error) {
	for {
		if e, ok := m.take(); ok {
			return e, nil
		}
		select {
		case <-m.wake:
		case <-m.over:
			return TailEvent{}, tailGoingAway(m.group.name)
		case <-ctx.Done():
			return TailEvent{}, context.Cause(ctx)
		}
	}
}

// take is Next where there is something.
func (m *TailMember) take() (TailEvent, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return TailEvent{}, false
	}
	if !m.told {
		// One that was lost and taken again since is said to be gone first: what comes of it begins anew.
		now := maps.Clone(m.held)
		maps.DeleteFunc(now, func(i uint32, h *held) bool { return m.said[i] != nil && m.said[i] != h })
		m.said, m.told = now, len(now) == len(m.held)
		return TailEvent{Partitions: append([]uint32{}, slices.Sorted(maps.Keys(now))...), Of: len(m.starts)}, true
	}
	if len(m.queue) == 0 {
		return TailEvent{}, false
	}
	b := m.queue[0]
	m.queue[0] = nil
	m.queue = m.queue[1:]
	b.sent = true
	m.log.tails.batches.Inc()
	m.log.tails.envelopes.Add(float64(b.count))
	return TailEvent{Batch: b}, true
}

// Ack says that all batches of the partition up to through are done with. Of a partition that the member does not hold any more, and of what it was not sent, nothing is acknowledged. The error is invalid_message where there is no
// such partition.
func (m *TailMember) Ack(partition uint32, through uint64) error {
	if n := len(m.starts); partition >= uint32(n) {
		return schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "There is no partition %d to acknowledge in group %q; the log has %d, counted from 0.", partition, m.group.name, n)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	h := m.held[partition]
	if h == nil || h.ended {
		return nil
	}
	for len(h.out) > 0 && h.out[0].sent && h.out[0].Through <= through {
		h.forget(0, 1)
	}
	if len(h.out) == 0 || !h.out[0].sent {
		signal(h.settled)
	}
	return nil
}

// Close ends the member: its partitions and their checkpoints are given back, within seconds, and the others learn of it in a moment. It may be called more than once.
func (m *TailMember) Close() {
	m.end()
	<-m.over
}

// end is Close without waiting.
func (m *TailMember) end() {
	m.mu.Lock()
	m.closed = true
	m.mu.Unlock()
	m.leave()
}

// run keeps the member a member until ctx ends.
func (m *TailMember) run(ctx context.Context) {
	defer close(m.over)
	defer m.leave()
	defer func() {
		m.log.mu.Lock()
		delete(m.log.tailing, m)
		m.log.mu.Unlock()
	}()
	m.log.tails.members.Inc()
	defer m.log.tails.members.Dec()
	var holding sync.WaitGroup
	tick := time.NewTicker(tailLook)
	defer tick.Stop()
	for ctx.Err() == nil {
		err := m.look(ctx, &holding)
		switch {
		case err == nil:
			m.warned = false
		case ctx.Err() == nil && !m.warned:
			m.warned = true
			m.logger.Warn("a member of an analytics group cannot look at the others just now; it keeps what it has", "error", err)
		}
		select {
		case <-tick.C:
		case <-m.again:
		case <-ctx.Done():
		}
	}
	// Those who hold something have seen the end of ctx, too.
	holding.Wait()
	leaving, cancel := context.WithTimeout(m.log.storing, storeTimeout)
	defer cancel()
	if err := m.log.removeTailMember(leaving, m.group, m.id); err != nil {
		m.logger.Info("a member of an analytics group left without saying so; the others notice in a moment", "error", err)
	}
}

// look says that the member is here, and brings what it holds to what it should. The error is one of those that happened; the rest was done.
func (m *TailMember) look(ctx context.Context, holding *sync.WaitGroup) error {
	beating := m.log.putTailMember(ctx, m.group, m.id)
	others, seeing := m.log.tailMembers(ctx, m.group)
	if seeing == nil {
		m.others = others
	}
	wanted := m.share()
	m.giveBack(wanted)
	leases, err := m.log.tailLeases(ctx, m.group, m.starts)
	if err != nil {
		return errors.Join(beating, seeing, err)
	}
	m.sees(time.Now())
	for i, found := range leases {
		m.mu.Lock()
		h := m.held[uint32(i)]
		m.mu.Unlock()
		if h != nil {
			continue
		}
		// Those of others are watched too: who has been silent for long is known by the time that the partition is to be taken.
		l := m.leases[i]
		if !l.free(found.rev, found.record, time.Now()) || !wanted[uint32(i)] {
			continue
		}
		if err := l.take(ctx, found.rev, found.record.GetThrough()); err != nil {
			if !isConflict(err) {
				beating = errors.Join(beating, err)
			}
			continue
		}
		m.hold(ctx, uint32(i), holding)
	}
	return errors.Join(beating, seeing)
}

// sees notes that the leases were read. Where that could not be done for a while, nor could their holders write them, perhaps: their silence counts anew.
func (m *TailMember) sees(now time.Time) {
	if now.Sub(m.looked) >= freshFor {
		for _, l := range m.leases {
			l.seen = 0
		}
	}
	m.looked = now
}

// share is the partitions that should be this member's.
func (m *TailMember) share() map[uint32]bool {
	all := maps.Clone(m.others)
	if all == nil {
		all = make(map[string]bool)
	}
	all[m.id] = true
	sorted := slices.Sorted(maps.Keys(all))
	wanted := make(map[uint32]bool)
	for i := range m.starts {
		if sorted[i%len(sorted)] == m.id {
			wanted[uint32(i)] = true
		}
	}
	return wanted
}

// giveBack lets go of what others should have.
func (m *TailMember) giveBack(wanted map[uint32]bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for i, h := range m.held {
		if !wanted[i] {
			h.leave()
		}
	}
}

// hold begins with a partition whose lease was taken.
func (m *TailMember) hold(ctx context.Context, partition uint32, holding *sync.WaitGroup) {
	through := m.leases[partition].position()
	giving, leave := context.WithCancel(ctx)
	h := &held{
		m: m, partition: partition, stream: logStreamName(int(partition)), lease: m.leases[partition], leave: leave, settled: make(chan struct{}, 1), read: through,
	}
	m.mu.Lock()
	m.held[partition] = h
	m.told = false
	m.mu.Unlock()
	signal(m.wake)
	m.logger.Info("a member of an analytics group has a partition", "stream", h.stream, "from", through+1)
	holding.Go(func() {
		defer leave()
		h.run(giving, ctx)
		// What it let go of, another may be waiting for; and if it was lost, it may be free again.
		signal(m.again)
	})
}

// tailFilter is what a member wants.
type tailFilter struct {
	tenant string // escaped
	prefix string
	kinds  map[schema.Kind]bool // nil for all
}

func newTailFilter(tenant string, o TailOptions) tailFilter {
	f := tailFilter{tenant: schema.EscapeToken(tenant), prefix: o.Prefix}
	if len(o.Kinds) > 0 {
		f.kinds = make(map[schema.Kind]bool, len(o.Kinds))
		for _, k := range o.Kinds {
			f.kinds[k] = true
		}
	}
	return f
}
