package broker

import (
	"fmt"
	"time"

	"github.com/oklog/ulid/v2"

	"tidemark/schema"
)

// draft is a frame in the making on top of a session's state: it decides submission after submission what becomes of it, and is committed to the state once the frame is stored, or rolled
// back. It is pure: time and ids are handed in.
//
// While a draft is open the state's id window already holds the draft's ids; everything else of the state is as it was.
type draft struct {
	id schema.SessionID
	st *state
	// head is the seq of the last envelope of the draft.
	head uint64
	// life is where the session stands behind the draft's envelopes.
	life lifecycle
	// producers holds where the producers that the draft touches have come to.
	producers map[producerKey]producerHead
	// taken are the submissions that the frame answers, each with its receipt.
	taken []answer
	// envelopes are those of the frame, in order.
	envelopes []*schema.Accepted
	size      int
}

type producerHead struct{ epoch, last uint64 }

// answer is what a submission will be told once the frame is stored.
type answer struct {
	s *Submission
	r Receipt
}

// lookup says that only the log knows whether, and where, a producer's envelope is stored: it was stored long ago, or the producer may be one that was forgotten.
type lookup struct {
	place schema.ProducerPlace
	// forgotten: the producer is not known, and may be new.
	forgotten bool
}

func (l *lookup) Error() string {
	return fmt.Sprintf("broker: the place of %+v is to be looked up", l.place)
}

func newDraft(id schema.SessionID, st *state) *draft {
	return &draft{id: id, st: st, head: st.head, life: st.lifecycle}
}

// add decides about a submission. stored is set where the answer is known at once: it is a duplicate of what is stored. Otherwise, without an error, the frame answers it.
// The error is a refusal, or a [*lookup].
func (d *draft) add(s *Submission, size int) (stored *Receipt, err error) {
	first, dup, err := d.duplicate(s)
	if err != nil {
		return nil, err
	}
	if dup {
		r := Receipt{Epoch: d.st.epoch, First: first, Last: first + uint64(len(s.Envelopes)) - 1, Duplicate: true}
		if r.Last <= d.st.head {
			return &r, nil
		}
		d.taken = append(d.taken, answer{s, r})
		return nil, nil
	}
	if s.wait != nil && s.wait.epoch != "" && s.wait.epoch != d.st.epoch {
		// Stored at once it would have gone with that history; it must not begin another.
		return nil, schema.Refuse(schema.Code_CODE_SESSION_DELETED, "Session %s was deleted while the progress waited to be stored, and the progress with it.", d.id)
	}
	if s.base != nil && !d.st.recent.covers(d.st, *s.base) {
		return nil, schema.Refuse(schema.Code_CODE_UNAVAILABLE, "The envelopes handed over for session %s come too late to tell whether they are stored.", d.id)
	}
	if s.Expected != nil && *s.Expected != d.head {
		r := schema.Refuse(schema.Code_CODE_CONFLICT, "Session %s is at seq %d, not at the expected %d; read what came in between and decide anew.", d.id, d.head, *s.Expected)
		r.Head = d.head
		return nil, r
	}
	heads, err := d.sequence(s)
	if err != nil {
		return nil, err
	}
	life, own, refusal := d.life.take(d.id, s.Kind, d.head, s.Envelopes)
	if refusal != nil {
		return nil, refusal
	}
	r := Receipt{Epoch: d.st.epoch, First: d.head + 1, Last: d.head + uint64(len(s.Envelopes))}
	for i := range s.Envelopes {
		e := &s.Envelopes[i]
		if _, twice := d.st.recent.find(e.ID); twice {
			// Nothing of the submission was in the window before: it is one of its own.
			d.st.recent.drop(i)
			return nil, schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "Two envelopes of one publish to session %s have the same id, %s.", d.id, e.ID)
		}
		d.st.recent.put(r.First+uint64(i), e.ID)
	}
	for i := range s.Envelopes {
		d.envelopes = append(d.envelopes, &s.Envelopes[i])
	}
	d.head, d.life = r.Last, life
	for i := range own {
		// Behind the publish, so that its own seqs follow each other.
		d.head++
		d.st.recent.put(d.head, own[i].ID)
		d.envelopes = append(d.envelopes, &own[i])
	}
	d.size += size
	for k, h := range heads {
		if d.producers == nil {
			d.producers = make(map[producerKey]producerHead)
		}
		d.producers[k] = h
	}
	d.taken = append(d.taken, answer{s, r})
	return nil, nil
}

// duplicate reports whether the submission is stored, or in the draft, already, and the seq of its first envelope.
func (d *draft) duplicate(s *Submission) (first uint64, dup bool, err error) {
	var found int
	for i := range s.Envelopes {
		e := &s.Envelopes[i]
		seq, ok := d.st.recent.find(e.ID)
		if !ok && e.Producer.ID != "" {
			seq, ok, err = d.placeOf(e.Producer)
			if err != nil && found < i {
				return 0, false, d.inPart(s)
			}
			if err != nil {
				return 0, false, err
			}
		}
		if !ok {
			continue
		}
		if found == 0 {
			first = seq - uint64(i)
		}
		found++
		if seq != first+uint64(i) {
			found = -1
			break
		}
	}
	switch found {
	case 0:
		return 0, false, nil
	case len(s.Envelopes):
		return first, true, nil
	}
	return 0, false, d.inPart(s)
}

// inPart refuses a submission that is stored in part: no retry of a publish, which is stored as a whole.
func (d *draft) inPart(s *Submission) error {
	if p := s.Envelopes[0].Producer; p.ID != "" {
		return d.gap(p, d.headOf(keyOf(p)).last+1)
	}
	return schema.Refuse(schema.Code_CODE_INVALID_MESSAGE,
		"Some, but not all, of the envelopes are in session %s already, or they stand apart there; a retry must hold the same envelopes as the first try, and a new envelope needs a new id.", d.id)
}

// placeOf is where a producer's envelope is stored, if it is.
func (d *draft) placeOf(p schema.ProducerPlace) (uint64, bool, error) {
	k := keyOf(p)
	if d.st.forgot && d.st.producers[k] == nil && d.producers[k] == (producerHead{}) {
		return 0, false, &lookup{place: p, forgotten: true}
	}
	h := d.headOf(k)
	if p.Epoch != h.epoch || p.Seq > h.last {
		return 0, false, nil
	}
	if ps := d.st.producers[k]; ps != nil && ps.epoch == p.Epoch && p.Seq <= ps.last {
		if seq, ok := ps.place(p.Seq); ok {
			return seq, true, nil
		}
		return 0, false, &lookup{place: p}
	}
	// It is in this very draft, so its id is, or should be, the same.
	for i, e := range d.envelopes {
		if e.Producer == p {
			return d.st.head + uint64(i) + 1, true, nil
		}
	}
	return 0, false, nil
}

func (d *draft) headOf(k producerKey) producerHead {
	if h, ok := d.producers[k]; ok {
		return h
	}
	if ps := d.st.producers[k]; ps != nil {
		return producerHead{ps.epoch, ps.last}
	}
	return producerHead{}
}

// sequence checks the producers' sequences and returns where they come to (I3, I6).
func (d *draft) sequence(s *Submission) (map[producerKey]producerHead, error) {
	var heads map[producerKey]producerHead
	for i := range s.Envelopes {
		p := s.Envelopes[i].Producer
		if p.ID == "" {
			continue
		}
		k := keyOf(p)
		h, ok := heads[k]
		if !ok {
			h = d.headOf(k)
		}
		switch {
		case p.Epoch < h.epoch:
			r := schema.Refuse(schema.Code_CODE_PRODUCER_FENCED,
				"Producer %q of session %s has begun epoch %d; epoch %d writes no more.", p.ID, d.id, h.epoch, p.Epoch)
			r.Expected = h.epoch
			return nil, r
		case p.Epoch > h.epoch:
			h = producerHead{epoch: p.Epoch}
		}
		if p.Seq != h.last+1 {
			return nil, d.gap(p, h.last+1)
		}
		h.last = p.Seq
		if heads == nil {
			heads = make(map[producerKey]producerHead, 1)
		}
		heads[k] = h
	}
	return heads, nil
}

func (d *draft) gap(p schema.ProducerPlace, expected uint64) error {
	r := schema.Refuse(schema.Code_CODE_PRODUCER_GAP, "Producer %q of session %s sent seq %d where %d is next; send from there.", p.ID, d.id, p.Seq, expected)
	r.Expected = expected
	return r
}

// frame makes the draft's frame. buf is used for the message, if it is large enough; the second result is the whole encoded frame.
func (d *draft) frame(edge string, id ulid.ULID, now time.Time, buf []byte) (*frame, []byte) {
	f := &frame{Edge: edge, ID: id.String(), Prev: d.st.frame}
	f.Epoch, f.First, f.Count, f.Time = d.st.epoch, d.st.head+1, len(d.envelopes), now
	if d.st.head == 0 {
		// The first envelope of a history names it.
		f.Epoch, f.Prev, f.Kind = id.String(), 0, d.life.kind
		for i := range d.taken {
			d.taken[i].r.Epoch = f.Epoch
		}
	}
	b := f.appendHeader(buf[:0])
	from := len(b)
	for i, e := range d.envelopes {
		b = e.AppendRecord(b, f.First+uint64(i))
	}
	f.Region = b[from:]
	return f, b
}

// commit folds the draft into the state: its frame is stored.
func (d *draft) commit(f *frame) {
	d.st.meetFrame(f)
	for i, e := range d.envelopes {
		d.st.advance(f.First+uint64(i), e.Kind, e.Producer)
		d.st.meetReport(f.First+uint64(i), e.ID, e.Kind)
	}
	d.st.lifecycle = d.life
	d.st.recent.trim()
	d.st.frame = f.StreamSeq
}

// rollback leaves the state as it was before the draft.
func (d *draft) rollback() { d.st.recent.drop(len(d.envelopes)) }

// covers reports whether every envelope behind c is in the window.
func (w *idWindow) covers(st *state, c Cursor) bool {
	return (c.Epoch == st.epoch || c.Seq == 0) && w.from <= c.Seq+1
}
