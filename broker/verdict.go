package broker

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/protobuf/proto"

	"tidemark/schema"
)

// verdict is what is due about a session, as it stood when that was found.
type verdict struct {
	w      *ward
	id     schema.SessionID
	post   *post
	head   uint64
	run    string
	prompt uint64
	after  time.Duration
}

// codeOrphaned is the code of the error that a run ends with whose agent disappeared.
const codeOrphaned = "orphaned"

func (v *verdict) kind() string {
	if v.prompt != 0 {
		return "deadline"
	}
	return codeOrphaned
}

// errNotHeld: the stream may be another broker's by now, which watches it then.
var errNotHeld = errors.New("broker: the stream may be held by another")

// say says a verdict, and has the session looked at again where that does not settle it.
func (d *watchdog) say(ctx context.Context, v verdict) {
	saying, cancel := context.WithTimeout(ctx, verdictWithin)
	defer cancel()
	var err error
	var s *Submission
	var now *state // where the session stands, if it was read
	if v.post.hold.stale() {
		err = errNotHeld
	} else {
		s, now, err = d.word(saying, v)
	}
	if err == nil && s != nil {
		_, err = d.notary.append(saying, v.id, s)
	}
	if code := schema.CodeOf(err); err != nil && now == nil && code != schema.Code_CODE_UNAVAILABLE && code != schema.Code_CODE_STORAGE_FULL && code != schema.Code_CODE_INTERNAL && d.mistaken(v, code) {
		now, _ = d.state(saying, v.id) // where that fails, it is tried again
	}
	d.settle(ctx, v, s != nil && err == nil, now, err)
}

// mistaken reports whether a refusal means that the session is not as it is known here. A conflict usually means that the projector has not read yet what came last, and will say so in a moment.
func (d *watchdog) mistaken(v verdict, code schema.Code) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return code != schema.Code_CODE_CONFLICT || d.wards[v.id] == v.w && v.w.head == v.head && v.w.tries > 1
}

// settle takes in what became of a verdict. now is where the session stands, nil where it was not read.
func (d *watchdog) settle(ctx context.Context, v verdict, stored bool, now *state, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.busy--
	signal(d.wake)
	w := v.w
	w.speaking = false
	code := schema.CodeOf(err)
	switch {
	case stored:
		d.metrics.verdicts.WithLabelValues(v.kind()).Inc()
		d.logger.Info("the watchdog said what nobody else did", "session", v.id.String(), "run", v.run, "question", v.prompt, "verdict", v.kind())
	case err != nil && code == schema.Code_CODE_CONFLICT, errors.Is(err, errNotHeld), ctx.Err() != nil, now != nil && code != schema.Code_CODE_INVALID_RESPONSE:
	default:
		d.logger.Warn("the watchdog cannot say its verdict", "session", v.id.String(), "run", v.run, "question", v.prompt, "verdict", v.kind(), "error", err)
	}
	if d.wards[v.id] != w {
		return
	}
	if code == schema.Code_CODE_INVALID_RESPONSE {
		w.givenUp = v.prompt
	}
	if now != nil {
		// Of what it did not know of, it does not know whether it was an agent's: the absence counts anew.
		d.see(v.post, v.id, now, true, time.Now())
		return
	}
	if w.head == v.head {
		// Until the projector says how the session stands.
		w.notBefore = time.Now().Add(min(verdictAgain<<min(w.tries, 10), maxVerdictAgain))
		w.tries++
	}
	d.schedule(w)
}

// word is what is to be said. Nil where the session turns out to stand otherwise than it was known to: as now says.
func (d *watchdog) word(ctx context.Context, v verdict) (s *Submission, now *state, err error) {
	if v.prompt != 0 {
		st, err := d.state(ctx, v.id)
		if err != nil || st.prompt != v.prompt {
			return nil, st, err
		}
		s, err = submissionOf(nil, &schema.Envelope{ReplyTo: &v.prompt, Payload: &schema.Envelope_UserInput{UserInput: &schema.UserInput{ResponseJson: st.fallback}}})
		return s, nil, err
	}
	// How long it really was without one, nobody knows: where the server was away itself, it counts anew.
	limit, run := v.after.String(), "The run"
	if v.run != "" {
		run = fmt.Sprintf("The run %q", v.run)
	}
	s, err = submissionOf(&v.head, &schema.Envelope{Payload: &schema.Envelope_Error{Error: &schema.Error{
		Error: run + " has been without its agent for longer than " + limit + ", which is its limit, and is over; start it again to go on.", Recoverable: new(true), Code: codeOrphaned,
	}}}, &schema.Envelope{Payload: &schema.Envelope_RunStatus{RunStatus: &schema.RunStatus{
		RunId: v.run, Status: schema.Status_STATUS_FAILED, Reason: "Its agent has been gone for longer than " + limit + ".",
	}}})
	return s, nil, err
}

// state is where the session stands by the log; before its beginning where there is nothing of it.
func (d *watchdog) state(ctx context.Context, id schema.SessionID) (*state, error) {
	ln := laneOf(id)
	head, err := d.r.headFrameFromLeader(ctx, ln)
	if err != nil {
		return nil, err
	}
	return d.r.state(ctx, ln, head)
}

// learn finds the sessions with a run under way that the projector will not say anything of, because their frames are behind its checkpoint: all of them have a record in the registry that says so, and a page. It reads the registry
// once, from its beginning to its end; what changes meanwhile the projector says.
func (p *post) learn(ctx context.Context) {
	if p == nil {
		return
	}
	var retry backoff
	for {
		n, err := p.learnAll(ctx)
		if err == nil {
			p.d.logger.Debug("sessions with a run under way are watched again", "stream", p.stream, "sessions", n)
			break
		}
		if ctx.Err() == nil {
			p.d.logger.Warn("the sessions with a run under way cannot be found yet", "stream", p.stream, "error", err)
		}
		if !retry.wait(ctx, errNotStored) {
			return
		}
	}
	p.d.mu.Lock()
	defer p.d.mu.Unlock()
	p.over = nil
}

func (p *post) learnAll(ctx context.Context) (n int, err error) {
	for from, more := uint64(1), true; more; {
		var batch []*stored
		if batch, more, err = p.d.r.scan(ctx, registryStream, from); err != nil {
			return n, err
		}
		for _, m := range batch {
			from = m.seq + 1
			var record schema.SessionRecord
			if proto.Unmarshal(m.data, &record) != nil || record.GetEpoch() == "" {
				continue
			}
			if s := record.GetStatus(); s != schema.Status_STATUS_RUNNING && s != schema.Status_STATUS_WAITING_FOR_INPUT {
				continue
			}
			id, err := schema.ParseSessionID(record.GetTenant(), record.GetSession())
			if err != nil || p.d.r.logOf(laneOf(id)) != p.stream {
				continue
			}
			if err := p.learnOne(ctx, id, &record); err != nil {
				return n, err
			}
			n++
		}
	}
	return n, nil
}

// learnOne takes in a session as the registry knows it.
func (p *post) learnOne(ctx context.Context, id schema.SessionID, record *schema.SessionRecord) error {
	pg, err := p.d.r.newestPage(ctx, laneOf(id), record.GetEpoch(), record.GetHeadSeq())
	if err != nil && !damaged(err) {
		return err
	}
	var st *state
	if pg != nil && pg.state != nil {
		st = stateOf(pg.state)
	} else if st, err = p.d.state(ctx, id); err != nil {
		return err
	}
	p.d.mu.Lock()
	defer p.d.mu.Unlock()
	if p.d.wards[id] == nil && !p.over[id] && st.under() {
		p.d.see(p, id, st, true, time.Now())
	}
	return nil
}
