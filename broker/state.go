package broker

import (
	"bytes"
	"cmp"
	"slices"
	"strings"
	"time"

	"github.com/oklog/ulid/v2"
	"google.golang.org/protobuf/types/known/timestamppb"

	"tidemark/schema"
)

// Bounds of a session's state (I8).
const (
	// recentIDs is how many envelopes back a repeated id is recognised (DESIGN section 4).
	recentIDs = 1024
	// maxProducers bounds the producers that a session remembers. Of the sender who has the most, the one that wrote least recently is forgotten; from then on a producer that is not known is looked up in the log.
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

	lifecycle
	created, updated time.Time
	// progressed is when the last frame was written that holds a WorkflowProgress; zero where none does.
	progressed time.Time
	// report is the id of the last WorkflowProgress, and reportSeq its seq; zero in a state that was restored and has met none since.
	report    ulid.ULID
	reportSeq uint64

	producers map[producerKey]*producerState
	// forgot: there were more producers than are remembered.
	forgot bool
	recent idWindow
}

// producerKey names a producer: it is its sender's (I6).
type producerKey struct{ owner, id string }

func keyOf(p schema.ProducerPlace) producerKey { return producerKey{p.Owner, p.ID} }

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
	return &state{producers: map[producerKey]*producerState{}, recent: idWindow{from: 1}}
}

// foldFrame folds a frame of the session, which must be the next one.
func (s *state) foldFrame(f *frame) error {
	if f.Deleted {
		*s = *newState()
		s.frame, s.deleted = f.StreamSeq, true
		return nil
	}
	s.meetFrame(f)
	for seq, raw := range f.All().Each() {
		e, err := schema.Scan(raw)
		if err != nil {
			return badFrame(err)
		}
		s.recent.add(seq, e.ID)
		s.foldPayload(seq, said{e.Kind, e.Payload, raw}, e.Producer)
		s.meetReport(seq, e.ID, e.Kind)
	}
	s.frame = f.StreamSeq
	return nil
}

// meetFrame takes in what a frame says of itself, before its envelopes.
func (s *state) meetFrame(f *frame) {
	if s.head == 0 {
		s.epoch, s.created, s.deleted = f.Epoch, f.Time, false
		s.begin(f.Kind)
	}
	s.updated = f.Time
}

// meetReport notes which WorkflowProgress is the last.
func (s *state) meetReport(seq uint64, id ulid.ULID, kind schema.Kind) {
	if kind == schema.KindWorkflowProgress {
		s.report, s.reportSeq = id, seq
	}
}

// foldPayload folds the envelope with the next seq, without its id.
func (s *state) foldPayload(seq uint64, e said, p schema.ProducerPlace) {
	s.advance(seq, e.kind, p)
	s.lifecycle.fold(seq, e)
}

// advance is foldPayload without what the payload does to the session's life, which a draft has folded already.
func (s *state) advance(seq uint64, kind schema.Kind, p schema.ProducerPlace) {
	s.head = seq
	if p.ID != "" {
		s.foldProducer(seq, p)
	}
	if kind == schema.KindWorkflowProgress {
		s.progressed = s.updated
	}
}

// view is a copy that tells where the session stands, and can be folded on, but decides nothing: it remembers neither ids nor producers.
func (s *state) view() *state {
	v := *s
	v.producers = map[producerKey]*producerState{}
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

func (s *state) foldProducer(seq uint64, p schema.ProducerPlace) {
	ps := s.meet(keyOf(p))
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
func (s *state) meet(k producerKey) *producerState {
	ps := s.producers[k]
	if ps == nil {
		if len(s.producers) >= maxProducers {
			s.forgetProducer(k.owner)
		}
		ps = &producerState{seq: s.head}
		s.producers[k] = ps
	}
	return ps
}

// forgetProducer makes room for one of the owner's. It takes it from the sender who has the most, the newcomer counted: who begins one producer after the other displaces his own, and nobody loses a producer
// while he has no more than his share. A bound for each sender would
// need another one over all senders.
func (s *state) forgetProducer(owner string) {
	counts, most := map[string]int{owner: 1}, 1
	for k := range s.producers {
		counts[k.owner]++
		most = max(most, counts[k.owner])
	}
	var oldest producerKey
	for k, p := range s.producers {
		if counts[k.owner] == most && (oldest.id == "" || p.seq < s.producers[oldest].seq) {
			oldest = k
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
		MetadataJson: s.metadata, Created: timestamppb.New(s.created), Updated: timestamppb.New(s.updated), ProducersForgotten: s.forgot, PromptOptions: s.options,
		PromptDefaultJson: s.fallback, OrphanAfterMs: uint64(s.about.orphanAfter.Milliseconds()), RunAttended: s.about.attended, RunRequestId: s.about.request, AnsweredCalls: s.answered,
	}
	if !s.deadline.IsZero() {
		m.PromptDeadline = timestamppb.New(s.deadline)
	}
	for _, c := range s.calls {
		m.Calls = append(m.Calls, &schema.RememberedCall{Call: c.id, Request: c.request, Run: c.run, Asked: c.asked, Fate: c.fate})
	}
	for _, r := range s.ended {
		m.EndedRuns = append(m.EndedRuns, &schema.EndedRun{RunId: r.run, Status: r.status, ByError: r.byError})
	}
	if s.overruled != (endedRun{}) {
		m.Overruled = &schema.EndedRun{RunId: s.overruled.run, Status: s.overruled.status}
	}
	for _, t := range s.cancelled {
		m.Cancelled = append(m.Cancelled, &schema.CancelledTarget{RequestId: t.request, RunId: t.run})
	}
	if !s.progressed.IsZero() {
		m.Progressed = timestamppb.New(s.progressed)
	}
	for k, p := range s.producers {
		ps := &schema.ProducerState{Owner: []byte(k.owner), Id: k.id, Epoch: p.epoch, LastSeq: p.last}
		for _, r := range p.runs {
			ps.Runs = append(ps.Runs, &schema.ProducerRun{ProducerSeq: r.from, Seq: r.seq, Count: uint32(r.count)})
		}
		m.Producers = append(m.Producers, ps)
	}
	slices.SortFunc(m.Producers, func(a, b *schema.ProducerState) int {
		return cmp.Or(strings.Compare(a.GetId(), b.GetId()), bytes.Compare(a.GetOwner(), b.GetOwner()))
	})
	return m
}

// stateOf restores a state from a page. The ids are not in it: its window is empty and begins behind the page, until the caller puts one in that it read back.
func stateOf(m *schema.SessionState) *state {
	s := newState()
	s.epoch, s.head, s.frame = m.GetEpoch(), m.GetHeadSeq(), m.GetHeadFrame()
	s.lifecycle = lifecycle{
		kind: kindOf(m.GetKind()), status: m.GetStatus(), run: m.GetRunId(), prompt: m.GetPromptSeq(), options: m.GetPromptOptions(), metadata: m.GetMetadataJson(),
		fallback: m.GetPromptDefaultJson(), answered: m.GetAnsweredCalls(),
		about: runFacts{request: m.GetRunRequestId(), orphanAfter: time.Duration(m.GetOrphanAfterMs()) * time.Millisecond, attended: m.GetRunAttended()},
	}
	if m.PromptDeadline != nil {
		s.deadline = m.GetPromptDeadline().AsTime()
	}
	for _, c := range m.GetCalls() {
		s.calls = append(s.calls, call{id: c.GetCall(), request: c.GetRequest(), run: c.GetRun(), asked: c.GetAsked(), fate: c.GetFate()})
	}
	for _, r := range m.GetEndedRuns() {
		s.ended = append(s.ended, endedRun{run: r.GetRunId(), status: r.GetStatus(), byError: r.GetByError()})
	}
	s.overruled = endedRun{run: m.GetOverruled().GetRunId(), status: m.GetOverruled().GetStatus()}
	for _, t := range m.GetCancelled() {
		s.cancelled = append(s.cancelled, target{request: t.GetRequestId(), run: t.GetRunId()})
	}
	if m.Progressed != nil {
		s.progressed = m.GetProgressed().AsTime()
	}
	s.forgot = m.GetProducersForgotten()
	s.created, s.updated = m.GetCreated().AsTime(), m.GetUpdated().AsTime()
	for _, p := range m.GetProducers() {
		if len(p.GetOwner()) == 0 {
			// The page is of a time when producers had no owner; the envelopes say whose it is.
			s.forgot = true
			continue
		}
		ps := &producerState{epoch: p.GetEpoch(), last: p.GetLastSeq()}
		for _, r := range p.GetRuns() {
			ps.runs = append(ps.runs, producerRun{from: r.GetProducerSeq(), seq: r.GetSeq(), count: uint64(r.GetCount())})
		}
		if n := len(ps.runs); n > 0 {
			ps.seq = ps.runs[n-1].seq + ps.runs[n-1].count - 1
		}
		s.producers[producerKey{string(p.GetOwner()), p.GetId()}] = ps
	}
	s.recent = idWindow{from: s.head + 1}
	return s
}
