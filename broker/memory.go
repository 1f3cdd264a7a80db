package broker

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/oklog/ulid/v2"
	"google.golang.org/protobuf/types/known/timestamppb"

	"tidemark/schema"
)

// MemoryLog is the model of [Log]: sessions as slices in memory, every rule in its plainest form, nothing shared with [JetStreamLog] but what followers are made of, the
// lifecycle, and which progress may wait and takes whose place. It is what the tests compare the other log with, and what the packages above test on; where both share a rule, the comparison proves nothing of
// it: the transcripts in testdata/lifecycle and the progress tests of logtest do. It keeps everything until it is deleted or truncated, so it is no log for a server.
//
// All methods may be called concurrently.
type MemoryLog struct {
	mu sync.Mutex // guards all below; never held while Done or Wake is called
	// sessions are those that have a history; a deleted one is not there.
	sessions  map[schema.SessionID]*memorySession
	followers map[schema.SessionID]map[*memorySource]bool
	changes   uint64
	// seats are those taken; who has none is not there.
	seats map[party]int
}

var _ Log = (*MemoryLog)(nil)

// memorySession is one history. What was truncated is gone from blocks alone.
type memorySession struct {
	epoch string
	// blocks are what the publishes stored, one for each.
	blocks []*Block
	// ids and envelopes of all that was ever stored: that of seq n is at n-1.
	ids       []ulid.ULID
	producers map[producerKey]*memoryProducer
	life      lifecycle
	created   time.Time
	updated   time.Time
	// progressed is when progress was stored last; waiting is the progress that waits for a second to pass since then, nil where none does.
	progressed time.Time
	waiting    *Submission
	// changed orders the registry.
	changed uint64
}

type memoryProducer struct {
	epoch, last uint64
	// places has the session's seq of each of the producer's seqs of this epoch.
	places map[uint64]uint64
}

// NewMemoryLog makes an empty log.
func NewMemoryLog() *MemoryLog {
	return &MemoryLog{sessions: map[schema.SessionID]*memorySession{}, followers: map[schema.SessionID]map[*memorySource]bool{}, seats: map[party]int{}}
}

// Status implements [Log]. The log is always ready.
func (l *MemoryLog) Status() Status {
	return Status{Ready: true, Durability: schema.Durability_DURABILITY_MEMORY, MaxEnvelopeBytes: schema.MaxEnvelopeBytes, Edge: "memory"}
}

// Publish implements [Log]. It never waits for room.
func (l *MemoryLog) Publish(_ context.Context, id schema.SessionID, s *Submission) {
	s.classify()
	var said saying
	l.mu.Lock()
	if err := l.check(id, s); err != nil {
		said.answer(s, Receipt{}, err)
	} else if !l.wait(id, s, &said) {
		l.storeWaiting(id, &said)
		l.submit(id, s, &said)
	}
	l.mu.Unlock()
	said.out()
}

// submit decides about a submission that waits no longer.
func (l *MemoryLog) submit(id schema.SessionID, s *Submission, said *saying) {
	r, err := l.publish(id, s)
	said.wake(l.wakes(id, err == nil && !r.Duplicate))
	said.answer(s, r, err)
}

// check refuses what is too much, or nothing, whatever the session holds.
func (l *MemoryLog) check(id schema.SessionID, s *Submission) error {
	// What the edge adds to an envelope does not count.
	const added = 512
	n := len(s.Envelopes)
	size := -n * added
	for i := range s.Envelopes {
		size += s.Envelopes[i].Size()
	}
	switch {
	case n == 0 || n > schema.MaxPublishEnvelopes:
		return schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "A publish to session %s holds %d envelopes; it may hold 1 to %d.", id, n, schema.MaxPublishEnvelopes)
	case size > l.Status().MaxEnvelopeBytes:
		return schema.Refuse(schema.Code_CODE_TOO_LARGE, "A publish to session %s has %d bytes; at most %d are allowed.", id, size, l.Status().MaxEnvelopeBytes)
	}
	return nil
}

func (l *MemoryLog) publish(id schema.SessionID, s *Submission) (Receipt, error) {
	n := uint64(len(s.Envelopes))
	seen := map[ulid.ULID]bool{}
	for i := range s.Envelopes {
		if seen[s.Envelopes[i].ID] {
			return Receipt{}, schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "Two envelopes of one publish to session %s have the id %s.", id, s.Envelopes[i].ID)
		}
		seen[s.Envelopes[i].ID] = true
	}
	m := l.sessions[id]
	if m == nil {
		m = &memorySession{epoch: ulid.Make().String(), producers: map[producerKey]*memoryProducer{}}
	}

	// All stored before, one behind the other: the first try's answer. None: go on. Anything else is no retry.
	var known int
	var first uint64
	adjacent := true
	for i := range s.Envelopes {
		place := m.placeOf(&s.Envelopes[i])
		if place == 0 {
			continue
		}
		known++
		if i == 0 {
			first = place
		}
		adjacent = adjacent && place == first+uint64(i)
	}
	if known == len(s.Envelopes) && adjacent {
		return Receipt{Epoch: m.epoch, First: first, Last: first + n - 1, Duplicate: true}, nil
	}
	if p := s.Envelopes[0].Producer; known > 0 && p.ID != "" {
		return Receipt{}, producerGap(id, p, m.producer(p).last+1)
	} else if known > 0 {
		return Receipt{}, schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "Some of the envelopes' ids are in session %s already, but not as this publish has them.", id)
	}

	if s.Expected != nil && *s.Expected != m.head() {
		r := schema.Refuse(schema.Code_CODE_CONFLICT, "Session %s is at seq %d, not at %d.", id, m.head(), *s.Expected)
		r.Head = m.head()
		return Receipt{}, r
	}
	if err := m.checkProducers(id, s.Envelopes); err != nil {
		return Receipt{}, err
	}
	life, own, refusal := m.life.take(id, s.Kind, m.head(), s.Envelopes)
	if refusal != nil {
		return Receipt{}, refusal
	}
	m.life = life
	r := Receipt{Epoch: m.epoch, First: m.head() + 1, Last: m.head() + n}
	m.store(slices.Concat(s.Envelopes, own), time.Now())
	l.changes++
	m.changed = l.changes
	l.sessions[id] = m
	return r, nil
}

// placeOf is the seq at which the envelope is stored; 0 where it is not known.
func (m *memorySession) placeOf(e *schema.Accepted) uint64 {
	for i := len(m.ids) - 1; i >= 0 && i >= len(m.ids)-recentIDs; i-- {
		if m.ids[i] == e.ID {
			return uint64(i) + 1
		}
	}
	if p := m.producer(e.Producer); p.epoch == e.Producer.Epoch {
		return p.places[e.Producer.Seq]
	}
	return 0
}

// producer is what is known of the producer whose place this is; nothing, where it never wrote.
func (m *memorySession) producer(place schema.ProducerPlace) *memoryProducer {
	if p := m.producers[keyOf(place)]; p != nil {
		return p
	}
	return new(memoryProducer)
}

// checkProducers walks the producers' sequences through the envelopes.
func (m *memorySession) checkProducers(id schema.SessionID, envelopes []schema.Accepted) error {
	walked := map[producerKey]schema.ProducerPlace{}
	for _, e := range envelopes {
		p := e.Producer
		if p.ID == "" {
			continue
		}
		at, ok := walked[keyOf(p)]
		if !ok {
			at = schema.ProducerPlace{Epoch: m.producer(p).epoch, Seq: m.producer(p).last}
		}
		if p.Epoch < at.Epoch {
			r := schema.Refuse(schema.Code_CODE_PRODUCER_FENCED, "Producer %q of session %s is at epoch %d; epoch %d is over.", p.ID, id, at.Epoch, p.Epoch)
			r.Expected = at.Epoch
			return r
		}
		if p.Epoch > at.Epoch {
			at.Seq = 0
		}
		if p.Seq != at.Seq+1 {
			return producerGap(id, p, at.Seq+1)
		}
		walked[keyOf(p)] = p
	}
	return nil
}

func producerGap(id schema.SessionID, p schema.ProducerPlace, expected uint64) error {
	r := schema.Refuse(schema.Code_CODE_PRODUCER_GAP, "Producer %q of session %s sent seq %d where %d is next.", p.ID, id, p.Seq, expected)
	r.Expected = expected
	return r
}

// store appends what was decided.
func (m *memorySession) store(envelopes []schema.Accepted, now time.Time) {
	b := &Block{Epoch: m.epoch, First: m.head() + 1, Count: len(envelopes), Time: now}
	if m.head() == 0 {
		m.created = now
	}
	m.updated = now
	for _, e := range envelopes {
		m.ids = append(m.ids, e.ID)
		b.Region = e.AppendRecord(b.Region, m.head())
		if p := e.Producer; p.ID != "" {
			k := keyOf(p)
			if m.producer(p).epoch != p.Epoch || m.producers[k] == nil {
				m.producers[k] = &memoryProducer{epoch: p.Epoch, places: map[uint64]uint64{}}
			}
			m.producers[k].last, m.producers[k].places[p.Seq] = p.Seq, m.head()
		}
		if e.Kind == schema.KindWorkflowProgress {
			m.progressed = now
		}
	}
	m.blocks = append(m.blocks, b)
}

func (m *memorySession) head() uint64 {
	if m == nil {
		return 0
	}
	return uint64(len(m.ids))
}

// first is the oldest seq that is left; 0 where there is no session.
func (m *memorySession) first() uint64 {
	if m == nil {
		return 0
	}
	return m.blocks[0].First
}

// Follow implements [Log].
func (l *MemoryLog) Follow(_ context.Context, id schema.SessionID, o FollowOptions) (*Follower, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	m := l.sessions[id]
	at := Attachment{First: m.first(), Head: m.head()}
	if m != nil {
		at.Epoch, at.Status = m.epoch, m.life.status
	}
	if m == nil && o.MustExist {
		return nil, noSession(id)
	}
	if o.Epoch != "" && o.Epoch != at.Epoch {
		r := schema.Refuse(schema.Code_CODE_EPOCH_MISMATCH, "The history %s of session %s is over; begin anew without a cursor.", o.Epoch, id)
		r.Epoch = at.Epoch
		return nil, r
	}
	switch s := o.Start; {
	case s.Head:
		at.After = at.Head
	case s.Last > 0 && m != nil:
		at.After = at.Head - min(s.Last, at.Head-at.First+1)
	case s.Last > 0:
	case !s.Since.IsZero():
		at.After = at.Head
		for _, b := range slices.Backward(m.left()) {
			if !b.Time.Before(s.Since) {
				at.After = b.First - 1
			}
		}
	case s.After > at.Head:
		r := schema.Refuse(schema.Code_CODE_SEQ_BEYOND_HEAD, "Session %s is at seq %d; there is nothing behind seq %d.", id, at.Head, s.After)
		r.Head = at.Head
		return nil, r
	default:
		at.After = s.After
	}
	src := &memorySource{log: l, id: id, wake: o.Wake}
	f := newFollower(src, o, at)
	if src.wake == nil {
		f.wake = make(chan struct{}, 1)
		src.wake = func() {
			select {
			case f.wake <- struct{}{}:
			default:
			}
		}
	}
	if l.followers[id] == nil {
		l.followers[id] = map[*memorySource]bool{}
	}
	l.followers[id][src] = true
	return f, nil
}

func (m *memorySession) left() []*Block {
	if m == nil {
		return nil
	}
	return m.blocks
}

// Session implements [Log].
func (l *MemoryLog) Session(_ context.Context, id schema.SessionID) (*schema.Session, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if m := l.sessions[id]; m != nil {
		return m.session(id), nil
	}
	return nil, noSession(id)
}

func (m *memorySession) session(id schema.SessionID) *schema.Session {
	return &schema.Session{
		Session: id.Name, Epoch: m.epoch, Kind: m.life.kind, Status: m.life.status, FirstSeq: m.first(), HeadSeq: m.head(),
		Created: timestamppb.New(m.created), Updated: timestamppb.New(m.updated), MetadataJson: m.life.metadata,
	}
}

// Sessions implements [Log]. The registry does not lag; its token is the place of the last session listed in the order of changes.
func (l *MemoryLog) Sessions(_ context.Context, tenant string, q Query) (SessionPage, error) {
	var after uint64
	if q.Token != "" {
		var err error
		if after, err = strconv.ParseUint(q.Token, 10, 64); err != nil {
			return SessionPage{}, schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "The page token is not one that a listing returned; list again from the beginning.")
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	var ids []schema.SessionID
	for id, m := range l.sessions {
		if id.Tenant == tenant && strings.HasPrefix(id.Name, q.Prefix) && m.changed > after &&
			(q.Status == schema.Status_STATUS_UNSPECIFIED || q.Status == m.life.status) && (q.May == nil || q.May(id.Name)) {
			ids = append(ids, id)
		}
	}
	slices.SortFunc(ids, func(a, b schema.SessionID) int { return cmp.Compare(l.sessions[a].changed, l.sessions[b].changed) })
	var page SessionPage
	for i, id := range ids {
		if i == q.Limit {
			page.Next = fmt.Sprint(l.sessions[ids[i-1]].changed)
			break
		}
		page.Sessions = append(page.Sessions, l.sessions[id].session(id))
	}
	return page, nil
}

// Delete implements [Log].
func (l *MemoryLog) Delete(_ context.Context, id schema.SessionID) error {
	var said saying
	l.mu.Lock()
	// What waits is of the history that ends.
	l.storeWaiting(id, &said)
	err := noSession(id)
	if l.sessions[id] != nil {
		delete(l.sessions, id)
		said.wake(l.wakes(id, true))
		err = nil
	}
	l.mu.Unlock()
	said.out()
	return err
}

// Enter implements [Log]. It never waits.
func (l *MemoryLog) Enter(_ context.Context, id schema.SessionID, subject string, limit int) (func(), error) {
	if limit <= 0 {
		return func() {}, nil
	}
	u := party{session: id, name: subject}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.seats[u] >= limit {
		return nil, tooManyConnections(u, limit)
	}
	l.seats[u]++
	return sync.OnceFunc(func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.seats[u]--; l.seats[u] == 0 {
			delete(l.seats, u)
		}
	}), nil
}

// Truncate takes the envelopes before seq first away, as retention does, and never the last. It returns the oldest seq that is left, 0 where there is no session.
func (l *MemoryLog) Truncate(id schema.SessionID, first uint64) uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	m := l.sessions[id]
	first = min(first, m.head())
	for m.first() < first {
		b := m.blocks[0]
		if m.blocks = m.blocks[1:]; b.Last() >= first {
			v := b.After(first - 1)
			m.blocks = append([]*Block{{Epoch: b.Epoch, First: v.From, Count: v.Len(), Region: v.Records(), Time: b.Time}}, m.blocks...)
		}
	}
	return m.first()
}

func noSession(id schema.SessionID) error {
	return schema.Refuse(schema.Code_CODE_SESSION_NOT_FOUND, "Session %s has no envelope; publish one to begin it.", id)
}

// wakes gathers the wake calls of the session's followers, to be made once the lock is released.
func (l *MemoryLog) wakes(id schema.SessionID, changed bool) func() {
	var calls []func()
	if changed {
		for src := range l.followers[id] {
			calls = append(calls, src.wake)
		}
	}
	return func() {
		for _, call := range calls {
			call()
		}
	}
}

// memorySource is a session of a MemoryLog as a follower sees it.
type memorySource struct {
	log  *MemoryLog
	id   schema.SessionID
	wake func()
}

func (s *memorySource) take(c Cursor, limit int) ([]View, error) {
	s.log.mu.Lock()
	defer s.log.mu.Unlock()
	m, err := s.session(c)
	if err != nil || m == nil {
		return nil, err
	}
	if c.Seq+1 < m.first() {
		return nil, ErrBehind
	}
	return m.behind(c.Seq, limit), nil
}

func (s *memorySource) read(_ context.Context, c Cursor, limit int) (views []View, gap uint64, err error) {
	s.log.mu.Lock()
	defer s.log.mu.Unlock()
	m, err := s.session(c)
	if err != nil || m == nil {
		return nil, 0, err
	}
	if c.Seq+1 < m.first() {
		gap = m.first()
	}
	return m.behind(c.Seq, limit), gap, nil
}

func (s *memorySource) close() {
	s.log.mu.Lock()
	defer s.log.mu.Unlock()
	if delete(s.log.followers[s.id], s); len(s.log.followers[s.id]) == 0 {
		delete(s.log.followers, s.id)
	}
}

// session is the one that c is a place in; nil while there is none.
func (s *memorySource) session(c Cursor) (*memorySession, error) {
	m := s.log.sessions[s.id]
	if c.Epoch != "" && (m == nil || m.epoch != c.Epoch) {
		return nil, schema.Refuse(schema.Code_CODE_SESSION_DELETED, "Session %s was deleted; follow it anew, without a cursor, for what comes after.", s.id)
	}
	return m, nil
}

// behind is what is left behind seq, about limit bytes of it.
func (m *memorySession) behind(seq uint64, limit int) []View {
	var views []View
	for _, b := range m.blocks {
		if v := b.After(seq); v.Len() > 0 && limit > 0 {
			v = v.Limit(limit)
			limit -= len(v.Records())
			views = append(views, v)
			if v.To < b.Last() {
				break
			}
		}
	}
	return views
}
