package logtest

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	"tidemark/broker"
	"tidemark/schema"
)

// world is one case's log, and the verbs of the cases.
type world struct {
	*testing.T
	in  Instance
	log broker.Log
	// id is a session for the case to use.
	id schema.SessionID
}

// on is the world as another edge sees it.
func (w *world) on(l broker.Log) *world {
	v := *w
	v.log = l
	return &v
}

// of is the world with another session to use.
func (w *world) of(id schema.SessionID) *world {
	v := *w
	v.id = id
	return &v
}

// otherEdge opens a second edge, or skips the case.
func (w *world) otherEdge() *world {
	w.Helper()
	if w.in.OpenEdge == nil {
		w.Skip("this log has one edge")
	}
	return w.on(w.in.OpenEdge(w.T))
}

func (w *world) settle() {
	if w.in.Settle != nil {
		w.in.Settle(w.T)
	}
}

// try publishes to the case's session and waits for the answer.
func (w *world) try(s broker.Submission) (broker.Receipt, error) {
	w.Helper()
	ctx, cancel := context.WithTimeout(w.Context(), patience)
	defer cancel()
	return broker.Append(ctx, w.log, w.id, s)
}

// publish publishes what must be stored.
func (w *world) publish(envelopes ...schema.Accepted) broker.Receipt {
	w.Helper()
	r, err := w.try(broker.Submission{Envelopes: envelopes})
	if err != nil {
		w.Fatalf("publish of %d envelopes: %v", len(envelopes), err)
	}
	if r.Last-r.First+1 != uint64(len(envelopes)) || r.First == 0 || r.Epoch == "" {
		w.Fatalf("publish of %d envelopes was answered with %+v", len(envelopes), r)
	}
	return r
}

// fill publishes n tokens, in publishes of the given size.
func (w *world) fill(n, size int) []schema.Accepted {
	w.Helper()
	all := Tokens("filler", n)
	for part := range slices.Chunk(all, size) {
		w.publish(part...)
	}
	return all
}

// refused publishes what must be refused, and checks that the session stands as before.
func (w *world) refused(code schema.Code, s broker.Submission) *schema.Refusal {
	w.Helper()
	before := w.head()
	_, err := w.try(s)
	r := w.refusal(code, err)
	if head := w.head(); head != before {
		w.Fatalf("a publish was refused with %s, but the head moved from %d to %d", code.Word(), before, head)
	}
	return r
}

// refusal checks that err is one, of this code, whose sentence names the session.
func (w *world) refusal(code schema.Code, err error) *schema.Refusal {
	w.Helper()
	r, ok := errors.AsType[*schema.Refusal](err)
	if !ok || r.Code != code {
		w.Fatalf("got %v, want the refusal %s", err, code.Word())
	}
	if !strings.Contains(r.Message, w.id.Name) || !strings.HasSuffix(r.Message, ".") {
		w.Errorf("the refusal %q is not a sentence that names session %s", r.Message, w.id)
	}
	return r
}

// head is the session's head; 0 where there is no session.
func (w *world) head() uint64 {
	w.Helper()
	s := w.session()
	return s.GetHeadSeq()
}

// session is where the session stands; nil where there is none.
func (w *world) session() *schema.Session {
	w.Helper()
	ctx, cancel := context.WithTimeout(w.Context(), patience)
	defer cancel()
	s, err := w.log.Session(ctx, w.id)
	if schema.CodeOf(err) == schema.Code_CODE_SESSION_NOT_FOUND {
		w.refusal(schema.Code_CODE_SESSION_NOT_FOUND, err)
		return nil
	}
	if err != nil {
		w.Fatalf("where does the session stand: %v", err)
	}
	return s
}

// delete deletes the session, which must be there.
func (w *world) delete() {
	w.Helper()
	ctx, cancel := context.WithTimeout(w.Context(), patience)
	defer cancel()
	if err := w.log.Delete(ctx, w.id); err != nil {
		w.Fatalf("delete: %v", err)
	}
}

// unfollowable checks that a follower is refused.
func (w *world) unfollowable(code schema.Code, o broker.FollowOptions) *schema.Refusal {
	w.Helper()
	f, err := w.log.Follow(w.Context(), w.id, o)
	if err == nil {
		f.Close()
	}
	return w.refusal(code, err)
}

// got is one envelope as a follower received it.
type got struct {
	seq uint64
	raw []byte
	env *schema.Envelope
}

// reader is a follower that checks what it gets.
type reader struct {
	w     *world
	f     *broker.Follower
	limit int
	// sparse: kinds are filtered out or tokens merged, so that seqs may be missing between those received.
	sparse bool

	got      []got
	epoch    string
	through  uint64
	caughtUp int
	// gaps are the pairs of Wanted and First that it was told.
	gaps [][2]uint64
}

func (w *world) follow(o broker.FollowOptions) *reader {
	w.Helper()
	f, err := w.log.Follow(w.Context(), w.id, o)
	if err != nil {
		w.Fatalf("follow with %+v: %v", o, err)
	}
	w.Cleanup(f.Close)
	if c := f.Cursor(); c.Seq != f.Attachment().After || c.Epoch != f.Attachment().Epoch {
		w.Errorf("attached at %+v, but the cursor is %+v", f.Attachment(), c)
	}
	return &reader{w: w, f: f, limit: 64 << 10, sparse: len(o.Kinds) > 0 || o.MergeTokens, through: f.Attachment().After, epoch: f.Attachment().Epoch}
}

// next waits for the next batch and checks it.
func (r *reader) next() (broker.Batch, error) {
	r.w.Helper()
	ctx, cancel := context.WithTimeout(r.w.Context(), patience)
	defer cancel()
	b, err := r.f.Next(ctx, r.limit)
	if err == nil {
		r.take(b)
	}
	return b, err
}

// take checks a batch and keeps what is in it.
func (r *reader) take(b broker.Batch) {
	r.w.Helper()
	if b.First != 0 {
		if b.Wanted != r.through+1 || b.First <= b.Wanted {
			r.w.Fatalf("told that %d to %d are gone; the cursor was at %d", b.Wanted, b.First-1, r.through)
		}
		r.gaps = append(r.gaps, [2]uint64{b.Wanted, b.First})
		r.through = b.First - 1
	}
	at := r.through
	for _, v := range b.Views {
		if v.Epoch != b.Epoch {
			r.w.Fatalf("a view of epoch %q in a batch of %q", v.Epoch, b.Epoch)
		}
		for seq, raw := range v.Each() {
			e := new(schema.Envelope)
			if err := proto.Unmarshal(raw, e); err != nil {
				r.w.Fatalf("seq %d cannot be decoded: %v", seq, err)
			}
			if seq <= at || !r.sparse && seq != at+1 || e.GetSeq() != seq {
				r.w.Fatalf("got seq %d (in the envelope: %d) behind %d", seq, e.GetSeq(), at)
			}
			at = seq
			r.got = append(r.got, got{seq, bytes.Clone(raw), e})
		}
	}
	if b.Through < at || !r.sparse && b.Through != at || b.Through != r.f.Cursor().Seq {
		r.w.Fatalf("the batch ends at seq %d and says through %d; the cursor is at %d", at, b.Through, r.f.Cursor().Seq)
	}
	if r.epoch != "" && b.Epoch != r.epoch {
		r.w.Fatalf("the epoch turned from %q to %q under a follower", r.epoch, b.Epoch)
	}
	if b.CaughtUp {
		r.caughtUp++
	}
	r.through, r.epoch = b.Through, b.Epoch
}

// until reads until the cursor is at seq.
func (r *reader) until(seq uint64) *reader {
	r.w.Helper()
	for r.through < seq {
		if _, err := r.next(); err != nil {
			r.w.Fatalf("reading up to seq %d: at %d: %v", seq, r.through, err)
		}
	}
	if r.through != seq {
		r.w.Fatalf("read through seq %d; there should be none behind %d", r.through, seq)
	}
	return r
}

// nothing checks that there is nothing to take.
func (r *reader) nothing() {
	r.w.Helper()
	b, err := r.f.Take(r.limit)
	if err != nil {
		r.w.Fatalf("take at the head: %v", err)
	}
	r.take(b)
	if len(b.Views) > 0 || b.First != 0 {
		r.w.Fatalf("there is something behind the head: %+v", b)
	}
}

// ends reads until the follower is refused.
func (r *reader) ends(code schema.Code) {
	r.w.Helper()
	for {
		if _, err := r.next(); err != nil {
			r.w.refusal(code, err)
			return
		}
	}
}

// holds checks that what was received is want, the first at seq first.
func (r *reader) holds(first uint64, want []schema.Accepted) {
	r.w.Helper()
	if len(r.got) != len(want) {
		r.w.Fatalf("received %d envelopes, want %d", len(r.got), len(want))
	}
	for i, g := range r.got {
		if g.seq != first+uint64(i) || !bytes.Equal(g.raw, stored(want[i], g.seq)) {
			r.w.Fatalf("envelope %d is seq %d, %v; want seq %d, id %s", i, g.seq, g.env, first+uint64(i), want[i].ID)
		}
	}
}

// stored is the envelope as the log must hold it at seq.
func stored(a schema.Accepted, seq uint64) []byte {
	v := broker.Block{First: seq, Count: 1, Region: a.AppendRecord(nil, seq)}
	for _, raw := range v.All().Each() {
		return raw
	}
	panic("logtest: a record of no envelope")
}

// text is what the received tokens of a message say together.
func (r *reader) text(message string) string {
	var b strings.Builder
	for _, g := range r.got {
		if t := g.env.GetToken(); t.GetMessageId() == message {
			b.WriteString(t.GetText())
		}
	}
	return b.String()
}

// all reads the whole session and returns it.
func (w *world) all() []got {
	w.Helper()
	r := w.follow(broker.FollowOptions{})
	defer r.f.Close()
	return r.until(max(w.head(), r.f.Attachment().Head)).got
}

// contains checks that the session is exactly these envelopes.
func (w *world) contains(want []schema.Accepted) {
	w.Helper()
	r := w.follow(broker.FollowOptions{})
	defer r.f.Close()
	r.until(uint64(len(want))).holds(1, want)
	if head := w.head(); head != uint64(len(want)) {
		w.Fatalf("the head is %d, want %d", head, len(want))
	}
}

// join is one slice of all.
func join(parts ...[]schema.Accepted) []schema.Accepted { return slices.Concat(parts...) }
