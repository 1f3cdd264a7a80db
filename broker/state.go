package broker

import (
	"slices"
	"time"

	"github.com/oklog/ulid/v2"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"tidemark/schema"
)

// Bounds of a session's state (I8).
const (
	// recentIDs is how many envelopes back a repeated id is recognised (DESIGN section 4).
	recentIDs = 1024
	// maxProducers bounds the producers that a session remembers; the one that wrote least recently is forgotten. From then on a producer that is not known is looked up in the log.
	maxProducers = 256
	// maxProducerRuns bounds how far back a producer's repeated seq is answered from memory; older ones are looked up in the log.
	maxProducerRuns = 8
)

// state is what a session's envelopes fold into. It is pure: no clock, socket or goroutine. Its owner is the appender or the projector that folds it; it is not safe for
// concurrent use.
type state struct {
	epoch string
	// head is the seq of the last envelope; 0 before the first.
	head uint64
	// frame is the stream sequence of the session's last frame: what the next fence names. After a deletion it is the tombstone's.
	frame uint64
	// deleted: the last frame is a tombstone; the next append begins another history.
	deleted bool

	kind             schema.SessionKind
	status           schema.Status
	prompt           uint64
	run              string
	metadata         string
	created, updated time.Time

	producers map[string]*producerState
	// forgot: there were more producers than are remembered.
	forgot bool
	recent idWindow
}

type producerState struct {
	epoch, last uint64
	// seq is where the last one went: the order in which producers are forgotten.
	seq  uint64
	runs []producerRun
}

type producerRun struct {
	from, seq uint64
	count     uint64
}

func newState() *state {
	return &state{producers: map[string]*producerState{}, recent: idWindow{from: 1}}
}

// foldFrame folds a frame of the session, which must be the next one.
func (s *state) foldFrame(f *frame) error {
	if f.Deleted {
		*s = *newState()
		s.frame, s.deleted = f.StreamSeq, true
		return nil
	}
	if s.head == 0 {
		s.epoch, s.created, s.deleted = f.Epoch, f.Time, false
	}
	s.updated = f.Time
	for seq, raw := range f.All().Each() {
		e, err := schema.Scan(raw)
		if err != nil {
			return badFrame(err)
		}
		s.fold(seq, e.ID, e.Kind, e.Payload, e.Producer)
	}
	s.frame = f.StreamSeq
	return nil
}

// fold folds the envelope with the next seq.
func (s *state) fold(seq uint64, id ulid.ULID, kind schema.Kind, payload []byte, p schema.ProducerPlace) {
	s.recent.add(seq, id)
	s.foldPayload(seq, kind, payload, p)
}

// foldPayload is fold without the id, which a draft has put in already.
func (s *state) foldPayload(seq uint64, kind schema.Kind, payload []byte, p schema.ProducerPlace) {
	s.head = seq
	if p.ID != "" {
		s.foldProducer(seq, p)
	}
	if s.status == schema.Status_STATUS_UNSPECIFIED {
		s.status = schema.Status_STATUS_OPEN
	}
	switch kind {
	case schema.KindSessionCreated:
		var m schema.SessionCreated
		if proto.Unmarshal(payload, &m) == nil {
			s.kind, s.metadata = m.GetKind(), m.GetMetadataJson()
		}
	case schema.KindStartRun:
		var m schema.StartRun
		if proto.Unmarshal(payload, &m) == nil {
			s.run, s.status, s.prompt = m.GetRunId(), schema.Status_STATUS_RUNNING, 0
		}
	case schema.KindRunStatus:
		var m schema.RunStatus
		if proto.Unmarshal(payload, &m) == nil {
			s.foldStatus(m.GetStatus())
		}
	case schema.KindWaitingForInput:
		s.prompt, s.status = seq, schema.Status_STATUS_WAITING_FOR_INPUT
	case schema.KindUserInput:
		if s.prompt != 0 {
			s.prompt, s.status = 0, schema.Status_STATUS_RUNNING
		}
	case schema.KindError:
		var m schema.Error
		if proto.Unmarshal(payload, &m) == nil && m.Recoverable != nil && !m.GetRecoverable() {
			s.foldStatus(schema.Status_STATUS_FAILED)
		}
	default:
		// The others do not move the session.
	}
}

// foldStatus moves the session to where its run is. A chat is open again when a run has ended.
func (s *state) foldStatus(to schema.Status) {
	s.prompt = 0
	if terminal(to) && s.kind == schema.SessionKind_SESSION_KIND_CHAT {
		to = schema.Status_STATUS_OPEN
	}
	s.status = to
}

// view is a copy that tells where the session stands, and can be folded on, but decides nothing: it remembers neither ids nor producers.
func (s *state) view() *state {
	v := *s
	v.producers = map[string]*producerState{}
	v.recent = idWindow{from: s.head + 1}
	return &v
}

// session is the state as clients see it.
func (s *state) session(name string, first uint64) *schema.Session {
	return &schema.Session{
		Session: name, Epoch: s.epoch, Kind: s.kind, Status: s.status, FirstSeq: first, HeadSeq: s.head,
		Created: timestamppb.New(s.created), Updated: timestamppb.New(s.updated), MetadataJson: s.metadata,
	}
}

func terminal(s schema.Status) bool {
	return s == schema.Status_STATUS_COMPLETED || s == schema.Status_STATUS_FAILED || s == schema.Status_STATUS_CANCELLED
}

func (s *state) foldProducer(seq uint64, p schema.ProducerPlace) {
	ps := s.meet(p.ID)
	if p.Epoch != ps.epoch {
		*ps = producerState{epoch: p.Epoch}
	}
	ps.last, ps.seq = p.Seq, seq
	if n := len(ps.runs); n > 0 && ps.runs[n-1].from+ps.runs[n-1].count == p.Seq && ps.runs[n-1].seq+ps.runs[n-1].count == seq {
		ps.runs[n-1].count++
		return
	}
	if len(ps.runs) >= maxProducerRuns {
		ps.runs = slices.Delete(ps.runs, 0, 1)
	}
	ps.runs = append(ps.runs, producerRun{from: p.Seq, seq: seq, count: 1})
}

// meet finds a producer, or makes the acquaintance of a new one.
func (s *state) meet(id string) *producerState {
	ps := s.producers[id]
	if ps == nil {
		if len(s.producers) >= maxProducers {
			s.forgetProducer()
		}
		ps = &producerState{seq: s.head}
		s.producers[id] = ps
	}
	return ps
}

func (s *state) forgetProducer() {
	var oldest string
	for id, p := range s.producers {
		if oldest == "" || p.seq < s.producers[oldest].seq {
			oldest = id
		}
	}
	delete(s.producers, oldest)
	s.forgot = true
}

// place is where the producer's envelope went; false where it is older than what is remembered.
func (p *producerState) place(seq uint64) (uint64, bool) {
	for _, r := range slices.Backward(p.runs) {
		if seq >= r.from && seq < r.from+r.count {
			return r.seq + seq - r.from, true
		}
	}
	return 0, false
}

// proto is the part of the state that a page carries. The ids are not in it: they are read back from the envelopes.
func (s *state) proto() *schema.SessionState {
	m := &schema.SessionState{
		Epoch: s.epoch, HeadSeq: s.head, HeadFrame: s.frame, Kind: s.kind, Status: s.status, PromptSeq: s.prompt, RunId: s.run,
		MetadataJson: s.metadata, Created: timestamppb.New(s.created), Updated: timestamppb.New(s.updated), ProducersForgotten: s.forgot,
	}
	for id, p := range s.producers {
		ps := &schema.ProducerState{Id: id, Epoch: p.epoch, LastSeq: p.last}
		for _, r := range p.runs {
			ps.Runs = append(ps.Runs, &schema.ProducerRun{ProducerSeq: r.from, Seq: r.seq, Count: uint32(r.count)})
		}
		m.Producers = append(m.Producers, ps)
	}
	slices.SortFunc(m.Producers, func(a, b *schema.ProducerState) int {
		if a.Id < b.Id {
			return -1
		}
		return 1
	})
	return m
}

// stateOf restores a state from a page. The ids are not in it: its window is empty and begins behind the page, until the caller puts one in that it read back.
func stateOf(m *schema.SessionState) *state {
	s := newState()
	s.epoch, s.head, s.frame = m.GetEpoch(), m.GetHeadSeq(), m.GetHeadFrame()
	s.kind, s.status, s.prompt, s.run, s.metadata = m.GetKind(), m.GetStatus(), m.GetPromptSeq(), m.GetRunId(), m.GetMetadataJson()
	s.forgot = m.GetProducersForgotten()
	s.created, s.updated = m.GetCreated().AsTime(), m.GetUpdated().AsTime()
	for _, p := range m.GetProducers() {
		ps := &producerState{epoch: p.GetEpoch(), last: p.GetLastSeq()}
		for _, r := range p.GetRuns() {
			ps.runs = append(ps.runs, producerRun{from: r.GetProducerSeq(), seq: r.GetSeq(), count: uint64(r.GetCount())})
		}
		if n := len(ps.runs); n > 0 {
			ps.seq = ps.runs[n-1].seq + ps.runs[n-1].count - 1
		}
		s.producers[p.GetId()] = ps
	}
	s.recent = idWindow{from: s.head + 1}
	return s
}
