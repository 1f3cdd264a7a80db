package broker

import (
	"context"
	"errors"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/oklog/ulid/v2"

	"tidemark/schema"
)

// notary appends what Tidemark itself has to say of sessions, from a process that follows no log: each submission is decided and stored on top of the session's head as it is read for it. That costs a few reads each
// time; it is for words that are rare. All its methods may be called concurrently; it holds nothing of a session.
type notary struct {
	nc *nats.Conn
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
	for losses := 0; ; {
		r, err := n.attempt(ctx, id, s, losses >= lossesBeforeHandOver)
		if err == nil {
			return r, nil
		}
		if errors.Is(err, errLostRace) {
			losses++
		} else if refused, ok := errors.AsType[*schema.Refusal](err); ok && refused.Code != schema.Code_CODE_UNAVAILABLE {
			return Receipt{}, refused
		}
		if !retry.wait(ctx, errNotStored) {
			return Receipt{}, &schema.Refusal{Code: schema.Code_CODE_UNAVAILABLE, Message: "The log cannot be reached; what Tidemark has to say of session " + id.String() + " may or may not be stored.", Err: err}
		}
	}
}

// attempt decides on the head as it is now and stores. The error is errLostRace where another frame came first, a refusal, or one that passes. handsOver: another writes without a pause, so it is asked to.
func (n *notary) attempt(ctx context.Context, id schema.SessionID, s *Submission, handsOver bool) (r Receipt, err error) {
	ln := laneOf(id)
	head, err := n.r.headFrameFromLeader(ctx, ln)
	if err != nil {
		return r, err
	}
	if head == nil || head.Deleted {
		return r, notFound(id)
	}
	st, err := n.r.state(ctx, ln, head)
	if err != nil {
		return r, err
	}
	d := newDraft(id, st)
	stored, err := d.add(s, s.size)
	if err != nil || stored != nil {
		if stored != nil {
			r = *stored
		}
		return r, err
	}
	if handsOver && head.Edge != n.name {
		results, err := handOver(ctx, n.nc, head.Edge, id, Cursor{Epoch: st.epoch, Seq: st.head}, []*Submission{s})
		if err == nil {
			return receiptOf(results[0])
		}
		// Whether it was stored there all the same, the next head tells.
	}
	_, data := d.frame(n.name, ulid.Make(), time.Now(), nil)
	_, err = publishFenced(ctx, n.nc, ln.logSubject(), data, st.frame)
	if isConflict(err) {
		return r, errLostRace
	}
	if err != nil {
		return r, err
	}
	return d.taken[0].r, nil
}

// receiptOf reads what became of a submission that was handed over.
func receiptOf(r *schema.HandOverResult) (Receipt, error) {
	if r.GetCode() != schema.Code_CODE_UNSPECIFIED {
		return Receipt{}, &schema.Refusal{Code: r.GetCode(), Message: r.GetDetail(), Head: r.GetHeadSeq(), Expected: r.GetExpected()}
	}
	return Receipt{Epoch: r.GetEpoch(), First: r.GetFirstSeq(), Last: r.GetLastSeq(), Duplicate: r.GetDuplicate()}, nil
}
