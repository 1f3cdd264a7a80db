package broker

import (
	"context"
	"errors"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/oklog/ulid/v2"

	"tidemark/schema"
)

// notary appends what Tidemark itself has to say of sessions, from a process that follows no log: each submission is decided and stored on top of the session's head as it is read for it. That costs a few reads each
// time; it is for words that are rare. All its methods may be called concurrently; it holds nothing of a session.
type notary struct {
	nc *connection
	r  *reader
	// name is under which it writes frames. No edge has it: who loses races to it has nobody to hand over to.
	name string
}

// submissionOf makes a submission of Tidemark's own envelopes.
func submissionOf(expected *uint64, envelopes ...*schema.Envelope) (*Submission, error) {
	s := &Submission{Expected: expected}
	now := time.Now()
	for _, e := range envelopes {
		a, err := systemStamp.AcceptEnvelope(e, now)
		if err != nil {
			return nil, err
		}
		s.Envelopes = append(s.Envelopes, a)
		s.size += a.Size()
	}
	return s, nil
}

// append stores the submission once, or says why it is not to be: it is decided as an edge would, under the session's fence. It tries on while NATS is away, until ctx ends; after unavailable it may be stored or not, and to
// append the same submission again finds out. It never begins a history: the session must have an envelope.
func (n *notary) append(ctx context.Context, id schema.SessionID, s *Submission) (Receipt, error) {
	var retry backoff
	d := deed{n: n, id: id, ln: laneOf(id), s: s}
	for {
		r, err := d.attempt(ctx)
		if err == nil {
			return r, nil
		}
		if errors.Is(err, errLostRace) {
			d.losses++
			retry = backoff{}
		} else if refused, ok := errors.AsType[*schema.Refusal](err); ok && refused.Code != schema.Code_CODE_UNAVAILABLE {
			return Receipt{}, refused
		}
		if !retry.wait(ctx, errNotStored) {
			return Receipt{}, &schema.Refusal{Code: schema.Code_CODE_UNAVAILABLE, Message: "The log cannot be reached; what Tidemark has to say of session " + id.String() + " may or may not be stored.", Err: err}
		}
	}
}

// deed is one submission on its way.
type deed struct {
	n  *notary
	id schema.SessionID
	ln lane
	s  *Submission
	// st is where the session stood at the attempt before; nil where that is not known.
	st *state
	// losses are the races that were lost.
	losses int
	// doubtful: an attempt was not answered, so that it may be stored.
	doubtful bool
}

// attempt decides on the head as it is now, and stores. The error is errLostRace where another frame came first, a refusal, or one that passes.
func (d *deed) attempt(ctx context.Context) (r Receipt, err error) {
	head, err := d.n.r.headFrameFromLeader(ctx, d.ln)
	if err != nil {
		return r, err
	}
	if head == nil || head.Deleted {
		return r, notFound(d.id)
	}
	// Another that writes without a pause wins every race, so it is asked to.
	rival := ""
	if d.losses >= lossesBeforeHandOver && head.Edge != d.n.name {
		rival = head.Edge
	}
	if rival != "" && !d.doubtful {
		// Where the session stands need not be known for it, only that nothing of this is stored up to here; to read that would take too long.
		if r, done, err := d.handOver(ctx, rival, Cursor{Epoch: head.Epoch, Seq: head.Last()}); done {
			return r, err
		}
	}
	st := d.st
	d.st = nil
	if st != nil && st.epoch == head.Epoch {
		err = d.n.r.each(ctx, d.ln, head, st.head, st.foldRest)
	} else {
		st, err = d.n.r.state(ctx, d.ln, head)
	}
	if err != nil {
		return r, err
	}
	draft := newDraft(d.id, st)
	stored, err := draft.add(d.s, d.s.size)
	if stored != nil {
		return *stored, nil
	}
	if err != nil {
		return r, err
	}
	if rival != "" && d.doubtful {
		if r, done, err := d.handOver(ctx, rival, Cursor{Epoch: st.epoch, Seq: st.head}); done {
			return r, err
		}
	}
	_, data := draft.frame(d.n.name, ulid.Make(), time.Now(), nil)
	_, err = publishFenced(ctx, d.n.nc, d.ln.logSubject(), data, st.frame)
	if err == nil {
		return draft.taken[0].r, nil
	}
	draft.rollback()
	if d.st = st; isConflict(err) {
		return r, errLostRace
	}
	if _, answered := errors.AsType[*jetstream.APIError](err); !answered {
		d.doubtful = true
	}
	return r, err
}

// handOver asks the rival's edge to store the submission, of which nothing is stored up to base. Not done: it did not, as far as is known.
func (d *deed) handOver(ctx context.Context, rival string, base Cursor) (r Receipt, done bool, err error) {
	results, err := handOver(ctx, d.n.nc, rival, d.id, base, []*Submission{d.s})
	if err != nil {
		d.doubtful = d.doubtful || !errors.Is(err, nats.ErrNoResponders)
		return r, false, err
	}
	if m := results[0]; m.GetCode() != schema.Code_CODE_UNSPECIFIED {
		return r, true, &schema.Refusal{Code: m.GetCode(), Message: m.GetDetail(), Head: m.GetHeadSeq(), Expected: m.GetExpected()}
	}
	return Receipt{Epoch: results[0].GetEpoch(), First: results[0].GetFirstSeq(), Last: results[0].GetLastSeq(), Duplicate: results[0].GetDuplicate()}, true, nil
}
