package broker

import (
	"context"
	"crypto/sha256"
	"strconv"
	"strings"
	"time"

	"github.com/oklog/ulid/v2"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"tidemark/schema"
)

// An item that a group gives up becomes a dead letter, in this order: its record is written to DEAD, the session is told with a work_failed envelope, the record says that it was, and then NATS is told that the item is settled.
// Whoever is killed on the way leaves the item to be handed out again, and whoever gets it finds the record, and goes on from there. The record is a register of its subject that only grows, by the item's place in WORK; but a group that was deleted and begun anew is handed all that is kept once more, and a letter of the one before is no letter of its.

// maxGiving bounds the items that an edge gives up at once.
const maxGiving = 64

// giveUp makes a dead letter of an item that is in nobody's hands any more.
func (g *workGroup) giveUp(h *heldItem, s groupSettings, attempts int, reason string) {
	l := g.log
	g.mu.Lock()
	g.busy++
	g.mu.Unlock()
	l.appending.Go(func() {
		defer func() {
			g.forget(h)
			g.mu.Lock()
			g.busy--
			g.mu.Unlock()
			g.ask()
		}()
		select {
		case l.giving <- struct{}{}:
			defer func() { <-l.giving }()
		case <-l.closing:
			return
		}
		ctx, cancel := context.WithTimeout(l.storing, max(s.ackWait, getTimeout))
		defer cancel()
		if err := l.writeOff(ctx, g.key, g.began, h.item, attempts, reason); err != nil {
			l.logger.Warn("a work item could not be given up yet; it comes again", "group", g.key.name, "session", h.item.id().String(), "seq", h.item.GetSeq(), "error", err)
			return
		}
		l.metrics.workGivenUp.Inc()
		g.done(h)
	})
}

// writeOff writes the dead letter of an item, and tells its session. Done twice, or by two at once, it is done once.
func (l *JetStreamLog) writeOff(ctx context.Context, k groupKey, began time.Time, w *workItem, attempts int, reason string) error {
	subject := letterSubject("dead", k.name, w.id(), w.GetEpoch(), w.GetSeq())
	rec, rev, err := l.writeLetter(ctx, subject, k, began, w, attempts, reason)
	if err != nil || rec == nil || rec.WorkSeq != w.seq || rec.Telling == nil {
		// Written before, and all that follows; or a later life of the item has been given up already.
		return err
	}
	if err := l.tellFailed(ctx, subject, k, w, rec); err != nil {
		return err
	}
	rec.Telling = nil
	_, err = l.putLetter(ctx, subject, rec, rev)
	if isConflict(err) {
		// Somebody else got here, or the letter was redriven meanwhile; the next look tells.
		return l.writeOff(ctx, k, began, w, attempts, reason)
	}
	return err
}

// stands reports whether a letter is of this item, or of a newer life of it, in the group that began then.
func stands(rec *schema.DeadRecord, began time.Time, workSeq uint64) bool {
	return rec != nil && rec.GetGroupBegan().AsTime().Equal(began) && rec.GetWorkSeq() >= workSeq
}

// writeLetter writes the record, unless there is one of this item, or a newer, and returns what there is. Nil where the history is over: what was deleted leaves no letter.
func (l *JetStreamLog) writeLetter(ctx context.Context, subject string, k groupKey, began time.Time, w *workItem, attempts int, reason string) (*schema.DeadRecord, uint64, error) {
	for {
		rec, rev, err := l.letter(ctx, subject)
		if err != nil || stands(rec, began, w.seq) {
			return rec, rev, err
		}
		s, err := l.Session(ctx, w.id())
		if schema.CodeOf(err) == schema.Code_CODE_SESSION_NOT_FOUND || err == nil && s.GetEpoch() != w.GetEpoch() {
			return nil, 0, nil
		}
		if err != nil {
			return nil, 0, err
		}
		item, err := w.encode()
		if err != nil {
			return nil, 0, err
		}
		rec = &schema.DeadRecord{Group: k.name, GroupBegan: timestamppb.New(began), WorkSeq: w.seq, Attempts: uint32(attempts), Reason: clipReason(reason), Time: timestamppb.Now(), Item: new(schema.WorkItem), Telling: new(s.GetHeadSeq())}
		if err := proto.Unmarshal(item, rec.Item); err != nil {
			return nil, 0, err
		}
		rev, err = l.putLetter(ctx, subject, rec, rev)
		if isConflict(err) {
			continue
		}
		return rec, rev, err
	}
}

func clipReason(reason string) string {
	if len(reason) > schema.MaxReasonBytes {
		reason = strings.ToValidUTF8(reason[:schema.MaxReasonBytes], "")
	}
	return reason
}

// letter is a dead letter's record and its revision; nil and 0 where there is none.
func (l *JetStreamLog) letter(ctx context.Context, subject string) (*schema.DeadRecord, uint64, error) {
	m, err := l.reader.lastFromLeader(ctx, deadStream, subject)
	if m == nil || err != nil {
		return nil, 0, err
	}
	rec := new(schema.DeadRecord)
	if err := proto.Unmarshal(m.data, rec); err != nil {
		return nil, m.seq, badItem(err)
	}
	return rec, m.seq, nil
}

func (l *JetStreamLog) putLetter(ctx context.Context, subject string, rec *schema.DeadRecord, rev uint64) (uint64, error) {
	data, err := proto.MarshalOptions{Deterministic: true}.Marshal(rec)
	if err != nil {
		return 0, err
	}
	var retry backoff
	for {
		next, err := publishFenced(ctx, l.conn, subject, data, rev)
		if err == nil || isConflict(err) {
			return next, err
		}
		if !retry.wait(ctx, errNotStored) {
			return 0, err
		}
	}
}

// tellFailed appends the work_failed envelope, unless it is there: behind the head that the record was written at. Its id follows from the record, so that two who tell at once tell once.
func (l *JetStreamLog) tellFailed(ctx context.Context, subject string, k groupKey, w *workItem, rec *schema.DeadRecord) error {
	e := &schema.Envelope{
		ReplyTo: new(w.GetSeq()),
		Payload: &schema.Envelope_WorkFailed{WorkFailed: &schema.WorkFailed{Group: k.name, Attempts: uint64(rec.GetAttempts()), Reason: rec.GetReason()}},
	}
	if s, err := schema.Scan(w.envelope); err == nil {
		e.RequestId = string(s.RequestID)
	}
	sum := sha256.Sum256([]byte(subject + " " + strconv.FormatUint(rec.GetWorkSeq(), 10)))
	id, err := ulid.New(ulid.Timestamp(rec.GetTime().AsTime()), strings.NewReader(string(sum[:])))
	if err != nil {
		return err
	}
	e.Id = id.String()
	a, err := systemStamp.AcceptEnvelope(e, rec.GetTime().AsTime())
	if err != nil {
		return err
	}
	return l.appendOnce(ctx, w.id(), w.GetEpoch(), rec.GetTelling(), a)
}

// appendOnce appends an envelope whose id says whether it is there, behind seq `after` of the history; not where that history is over, or has ended and takes nothing more.
func (l *JetStreamLog) appendOnce(ctx context.Context, id schema.SessionID, epoch string, after uint64, a schema.Accepted) error {
	for try := 1; ; try++ {
		head, there, err := l.look(ctx, id, epoch, after, a)
		if there || err != nil {
			return overIsDone(err)
		}
		s := Submission{Envelopes: []schema.Accepted{a}, Expected: &head}
		if try > 3 {
			// Others never pause. What was not there a moment ago the session's memory for ids tells from now on.
			s.Expected = nil
		}
		_, err = Append(ctx, l, id, s)
		if schema.CodeOf(err) != schema.Code_CODE_CONFLICT || err == nil {
			return overIsDone(err)
		}
		after = head
	}
}

// overIsDone takes what says that the session is no more, or has ended, for the end of what was to be said to it.
func overIsDone(err error) error {
	if err == nil {
		return nil
	}
	switch schema.CodeOf(err) {
	case schema.Code_CODE_SESSION_NOT_FOUND, schema.Code_CODE_EPOCH_MISMATCH, schema.Code_CODE_SESSION_DELETED, schema.Code_CODE_SEQ_BEYOND_HEAD, schema.Code_CODE_SESSION_ENDED:
		return nil
	default:
		return err
	}
}

// look reads a session from behind a seq to its head, and reports whether the envelope is there.
func (l *JetStreamLog) look(ctx context.Context, id schema.SessionID, epoch string, after uint64, a schema.Accepted) (head uint64, there bool, err error) {
	f, err := l.Follow(ctx, id, FollowOptions{Start: Start{After: after}, Epoch: epoch, Kinds: []schema.Kind{a.Kind}, MustExist: true})
	if err != nil {
		return 0, false, err
	}
	defer f.Close()
	head = f.Attachment().Head
	for f.Cursor().Seq < head {
		b, err := f.Next(ctx, 256<<10)
		if err != nil {
			return 0, false, err
		}
		for _, v := range b.Views {
			for _, raw := range v.Each() {
				if s, err := schema.Scan(raw); err == nil && s.ID == a.ID {
					return head, true, nil
				}
			}
		}
	}
	return f.Cursor().Seq, false, nil
}

// letterID is a dead letter's name for its tenant's users: its subject behind the tenant.
func letterID(subject string) string {
	_, rest, _ := strings.Cut(strings.TrimPrefix(subject, "dead."), ".")
	return rest
}

// letterOf is the subject of a dead letter, and the session that it is of; false where id is none.
func letterOf(tenant, id string) (subject, session string, ok bool) {
	parts := strings.Split(id, ".")
	if len(parts) != 4 || len(id) > 1024 {
		return "", "", false
	}
	for _, p := range parts {
		if _, err := schema.UnescapeToken(p); err != nil || p == "" {
			return "", "", false
		}
	}
	session, err := schema.UnescapeToken(parts[1])
	return "dead." + schema.EscapeToken(tenant) + "." + id, session, err == nil
}

func noLetter(id string) error {
	return schema.Refuse(schema.Code_CODE_WORK_NOT_FOUND, "There is no dead letter %q; list them to see which there are.", id)
}

// Redrive implements [Queue]. It looks at all letters before it touches the first, and then once more at each: what a thousand of them hold is not kept in memory meanwhile. A letter's next life is an item of its own, on a subject that only its group takes. It is written before the letter says that it was; its fence and what it says of the letter make it one, however often it is asked for.
func (l *JetStreamLog) Redrive(ctx context.Context, tenant string, may func(string) bool, ids []string) (redriven, before int, err error) {
	if _, err := l.ready(ctx); err != nil {
		return 0, 0, err
	}
	subjects := make([]string, len(ids))
	for i, id := range ids {
		subject, session, ok := letterOf(tenant, id)
		if !ok || !may(session) {
			return 0, 0, noneRedriven(id)
		}
		rec, _, err := l.letter(ctx, subject)
		if err != nil {
			return 0, 0, err
		}
		if rec == nil {
			return 0, 0, noneRedriven(id)
		}
		subjects[i] = subject
	}
	for _, subject := range subjects {
		now, was, err := l.redrive(ctx, subject)
		switch {
		case err != nil:
			return redriven, before, err
		case now:
			redriven++
		case was:
			before++
		}
	}
	return redriven, before, nil
}

func noneRedriven(id string) error {
	return schema.Refuse(schema.Code_CODE_WORK_NOT_FOUND, "There is no dead letter %q, so none of those named was redriven; list them to see which there are.", id)
}

// redrive hands one letter to its group again, or finds that it was before; neither where the letter has gone meanwhile, with its session.
func (l *JetStreamLog) redrive(ctx context.Context, subject string) (now, before bool, err error) {
	for {
		rec, rev, err := l.letter(ctx, subject)
		switch {
		case err != nil:
			return now, false, err
		case rec == nil:
			return now, false, nil
		case rec.Redriven != nil:
			return now, !now, nil
		}
		if now, err = l.writeRedriven(ctx, rec, now); err == nil {
			rec.Redriven = timestamppb.Now()
			_, err = l.putLetter(ctx, subject, rec, rev)
		}
		switch {
		case err == nil:
			return now, !now, nil
		case !isConflict(err):
			return now, false, unreadable(err)
		}
	}
}

// writeRedriven writes the item's next life, unless it is there.
func (l *JetStreamLog) writeRedriven(ctx context.Context, rec *schema.DeadRecord, now bool) (bool, error) {
	item, ok := proto.Clone(rec.GetItem()).(*schema.WorkItem)
	if !ok || item == nil {
		return now, badItem(nil)
	}
	id := schema.SessionID{Tenant: item.GetTenant(), Name: item.GetSession()}
	subject := letterSubject("redrive", rec.GetGroup(), id, item.GetEpoch(), item.GetSeq())
	m, err := l.reader.lastFromLeader(ctx, workStream, subject)
	if err != nil {
		return now, err
	}
	rev := uint64(0)
	if m != nil {
		last, err := parseWorkItem(m.data)
		if err != nil {
			return now, err
		}
		if last.GetRedrivenFrom() >= rec.GetWorkSeq() {
			return now, nil
		}
		rev = m.seq
	}
	item.RedrivenFrom, item.Before = rec.GetWorkSeq(), nil
	data, err := proto.MarshalOptions{Deterministic: true}.Marshal(item)
	if err != nil {
		return now, err
	}
	_, err = publishFenced(ctx, l.conn, subject, data, rev)
	return now || err == nil, err
}

// deadLetter is a record as clients see it.
func deadLetter(subject string, rec *schema.DeadRecord, envelope bool) *schema.DeadLetter {
	item := rec.GetItem()
	d := &schema.DeadLetter{
		Id: letterID(subject), Group: rec.GetGroup(), Session: item.GetSession(), Epoch: item.GetEpoch(), Seq: item.GetSeq(), Kind: item.GetEnvelope().Type(),
		Attempts: rec.GetAttempts(), Reason: rec.GetReason(), Time: rec.GetTime(), Redriven: rec.GetRedriven(),
	}
	if envelope {
		d.Envelope = item.GetEnvelope()
	}
	return d
}
