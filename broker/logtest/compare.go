package logtest

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"tidemark/broker"
	"tidemark/schema"
)

// Compare does the same random operations on two logs and fails where they differ: in receipts, in refusals with what they tell, in where sessions stand, in what followers read from any cut. Epochs
// are each log's own: they must correspond one to one. It is to be called in a synctest bubble; the same seed makes the same operations.
func Compare(t *testing.T, a, b Instance, seed uint64) {
	p := &pair{
		T: t, rng: rand.New(rand.NewPCG(seed, seed)), epochs: map[string]string{"": ""}, back: map[string]string{"": ""},
		sides: [2]*side{newSide(t, a), newSide(t, b)},
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("seed %d; the last operations were\n%s", seed, strings.Join(p.trace[max(0, len(p.trace)-40):], "\n"))
		}
	})
	for _, id := range []schema.SessionID{ID("one"), ID("two"), {Tenant: "other", Name: "one"}} {
		p.sessions = append(p.sessions, &twin{id: id, next: map[writing]schema.ProducerPlace{}})
	}
	for range 250 {
		p.step()
		if t.Failed() {
			t.FailNow()
		}
	}
	for _, s := range p.sessions {
		p.compareSession(s, 0)
		p.compareRead(s, 0, broker.FollowOptions{})
		for len(s.followers) > 0 {
			p.closeFollower(s, 0)
		}
	}
}

// pair is two logs under the same operations.
type pair struct {
	*testing.T
	rng      *rand.Rand
	sides    [2]*side
	sessions []*twin
	// epochs are the first log's, each with the second's; back is the reverse.
	epochs, back map[string]string
	// marks are times at which nothing was being stored.
	marks []time.Time
	trace []string
}

// side is one of the logs, with its edges.
type side struct {
	in    Instance
	edges []*world
}

func newSide(t *testing.T, in Instance) *side {
	w := &world{T: t, in: in, log: in.Log}
	s := &side{in: in, edges: []*world{w, w}}
	s.openEdge()
	return s
}

func (s *side) openEdge() {
	s.edges[1] = s.edges[0]
	if s.in.OpenEdge != nil {
		s.edges[1] = s.edges[0].otherEdge()
	}
}

// writing is a producer: whose, and its id.
type writing struct{ owner, id string }

// twin is a session in both logs, and what the operations know of it.
type twin struct {
	id schema.SessionID
	// sent are the publishes that were stored in this history, newest last; epochs all there were.
	sent   [][]schema.Accepted
	epochs []string
	head   uint64
	next   map[writing]schema.ProducerPlace
	// ended: this history takes no more.
	ended bool
	// truncated: retention took a part of this history.
	truncated bool
	// followers are open on both sides.
	followers [][2]*reader
}

func (p *pair) note(format string, args ...any) {
	p.trace = append(p.trace, fmt.Sprintf(format, args...))
}

// on is a side's edge, with the session to use.
func (p *pair) on(i, edge int, s *twin) *world { return p.sides[i].edges[edge].of(s.id) }

func (p *pair) step() {
	s, edge := p.sessions[p.rng.IntN(len(p.sessions))], p.rng.IntN(2)
	switch n := p.rng.IntN(100); {
	case s.ended && n < 10:
		p.delete(s, edge)
	case n < 35:
		p.publish(s, edge, 1)
	case n < 50:
		p.publish(s, edge, 2+p.rng.IntN(12))
	case n < 62:
		p.compareRead(s, edge, p.someStart(s))
	case n < 70:
		p.openFollower(s, edge)
	case n < 82:
		p.drain(s)
	case n < 85:
		p.closeFollower(s, p.rng.IntN(4))
	case n < 91:
		p.compareSession(s, edge)
	case n < 93:
		p.delete(s, edge)
	case n < 95:
		p.note("a minute passes")
		time.Sleep(time.Minute)
		p.marks = append(p.marks, time.Now())
		time.Sleep(time.Minute)
	case n < 97:
		p.note("projections settle")
		for _, side := range p.sides {
			side.edges[0].settle()
		}
	case n < 98:
		p.restart()
	default:
		p.truncate(s)
	}
}

// submission makes a publish that may be new, a retry, cut anew, out of a producer's order, or on top of another head.
func (p *pair) submission(s *twin) broker.Submission {
	var sub broker.Submission
	switch n := p.rng.IntN(20); {
	case n < 3 && len(s.sent) > 0:
		sub.Envelopes = s.sent[len(s.sent)-1-p.rng.IntN(min(20, len(s.sent)))]
		switch from := p.rng.IntN(len(sub.Envelopes)); p.rng.IntN(4) {
		case 0:
			sub.Envelopes = sub.Envelopes[from:]
		case 1:
			sub.Envelopes = append(slices.Clone(sub.Envelopes[from:]), Token("m", "behind a retry"))
		}
	case n < 10:
		sub.Envelopes = p.produced(s)
	case n < 13:
		sub.Envelopes = []schema.Accepted{Progress(fmt.Sprint(s.head))}
	default:
		for range 1 + p.rng.IntN(6) {
			sub.Envelopes = append(sub.Envelopes, p.envelope())
		}
	}
	if p.rng.IntN(6) == 0 {
		sub.Kind = p.kind()
	}
	switch p.rng.IntN(10) {
	case 0:
		sub.Expected = new(s.head)
	case 1:
		sub.Expected = new(uint64(p.rng.IntN(int(s.head) + 3)))
	}
	return sub
}

// produced are envelopes of a producer: mostly the next, sometimes old ones, sometimes with a hole, sometimes of another epoch.
func (p *pair) produced(s *twin) []schema.Accepted {
	subject, id := fmt.Sprint("s", p.rng.IntN(3)), fmt.Sprint("p", p.rng.IntN(2))
	at := s.next[writing{ProducedBy(subject, id, 1, 1).Producer.Owner, id}]
	epoch, seq := at.Epoch, at.Seq+1
	switch p.rng.IntN(8) {
	case 0:
		if from := uint64(1 + p.rng.IntN(int(seq)+2)); from > at.Seq || !s.truncated {
			seq = from
		}
	case 1:
		epoch, seq = epoch+1, 1
	case 2:
		if epoch > 0 {
			epoch--
		}
	}
	var out []schema.Accepted
	for range 1 + p.rng.IntN(3) {
		out = append(out, ProducedBy(subject, id, epoch, seq))
		seq++
	}
	return out
}

func (p *pair) kind() schema.SessionKind {
	return []schema.SessionKind{schema.SessionKind_SESSION_KIND_CHAT, schema.SessionKind_SESSION_KIND_WORKFLOW}[p.rng.IntN(2)]
}

func (p *pair) envelope() schema.Accepted {
	run := []string{"", "r", "s"}[p.rng.IntN(3)]
	switch p.rng.IntN(20) {
	case 0:
		return UserMessage("hello")
	case 1:
		return Created(p.kind(), fmt.Sprintf(`{"n":%d}`, p.rng.IntN(9)))
	case 2:
		return StartRun("r")
	case 3:
		return StartRun(run + "r")
	case 4:
		return Waiting("?")
	case 5:
		return Waiting("?", "a", "b")
	case 6:
		return InputTo(1+uint64(p.rng.IntN(20)), "1")
	case 7:
		return Input([]string{"1", `"a"`, `"c"`}[p.rng.IntN(3)])
	case 8:
		return Failure("no", p.rng.IntN(2) == 0)
	case 9:
		return RunStatusOf(run, schema.Status(1+p.rng.IntN(6)))
	case 10:
		return Progress("among others")
	case 11:
		return []schema.Accepted{System("x"), Cancel(), CancelRun("r"), CancelRun(run + "r"), CancelRequest("q")}[p.rng.IntN(5)]
	case 13:
		return by(asAgent, []string{"", "q", "r"}[p.rng.IntN(3)], []*schema.Envelope{resultOf("c"), resultOf("d"), startOf(run + "r"), tokenOf("m", "late")}[p.rng.IntN(4)])
	case 12:
		return Token("m", strings.Repeat("long ", p.rng.IntN(2000)))
	}
	return Token(fmt.Sprint("m", p.rng.IntN(2)), "text ")
}

// publish submits n publishes one behind the other to both logs and compares the answers.
func (p *pair) publish(s *twin, edge, n int) {
	// Behind what was sent there may be ends of runs.
	defer func() { s.head = p.on(0, edge, s).head() }()
	var subs []broker.Submission
	var answers [2][]<-chan answer
	for range n {
		subs = append(subs, p.submission(s))
	}
	for _, sub := range subs {
		if len(sub.Envelopes) == 1 && sub.Envelopes[0].Kind == schema.KindWorkflowProgress {
			// Whether an edge knows what the other has stored within a second depends on its tail.
			time.Sleep(2 * time.Second)
			break
		}
	}
	for i := range p.sides {
		for _, sub := range subs {
			answers[i] = append(answers[i], p.on(i, edge, s).submit(sub))
		}
	}
	for j, sub := range subs {
		a, b := <-answers[0][j], <-answers[1][j]
		p.note("publish %d of %d envelopes to %s on edge %d, %s: %s", j, len(sub.Envelopes), s.id, edge, describe(sub), outcome(a.r, a.err))
		if !p.sameError(a.err, b.err) || a.err == nil && (a.r.First != b.r.First || a.r.Last != b.r.Last || a.r.Duplicate != b.r.Duplicate || a.r.Replaced != b.r.Replaced) {
			p.Fatalf("a publish to %s, %s, was answered %s and %s", s.id, describe(sub), outcome(a.r, a.err), outcome(b.r, b.err))
		}
		if a.err != nil {
			s.ended = schema.CodeOf(a.err) == schema.Code_CODE_SESSION_ENDED
			continue
		}
		p.sameEpoch(a.r.Epoch, b.r.Epoch)
		if a.r.Duplicate || a.r.Replaced {
			continue
		}
		if a.r.First == 1 {
			s.epochs = append(s.epochs, a.r.Epoch)
		}
		s.sent = append(s.sent, sub.Envelopes)
		for _, e := range sub.Envelopes {
			if e.Producer.ID != "" {
				s.next[writing{e.Producer.Owner, e.Producer.ID}] = e.Producer
			}
		}
	}
}

func describe(s broker.Submission) string {
	out := "ids"
	if e := s.Envelopes[0].Producer; e.ID != "" {
		out = fmt.Sprintf("producer %s epoch %d from seq %d", e.ID, e.Epoch, e.Seq)
	}
	if s.Expected != nil {
		out += fmt.Sprintf(", on top of %d", *s.Expected)
	}
	return out
}

func outcome(r broker.Receipt, err error) string {
	if err != nil {
		return err.Error()
	}
	return fmt.Sprintf("seq %d to %d, duplicate %t, replaced %t", r.First, r.Last, r.Duplicate, r.Replaced)
}

// sameError reports whether both refusals say the same.
func (p *pair) sameError(a, b error) bool {
	x, okX := errors.AsType[*schema.Refusal](a)
	y, okY := errors.AsType[*schema.Refusal](b)
	if !okX || !okY {
		return a == nil && b == nil
	}
	if x.Epoch != "" || y.Epoch != "" {
		p.sameEpoch(x.Epoch, y.Epoch)
	}
	return x.Code == y.Code && x.Head == y.Head && x.Expected == y.Expected
}

// sameEpoch checks that two epochs stand for each other.
func (p *pair) sameEpoch(a, b string) {
	p.Helper()
	x, okX := p.epochs[a]
	y, okY := p.back[b]
	if !okX && !okY {
		p.epochs[a], p.back[b] = b, a
		return
	}
	if x != b || y != a {
		p.Fatalf("epoch %q of the one log stands beside %q of the other, and beside %q before", a, b, x)
	}
}

// someStart makes options to follow with, good and bad.
func (p *pair) someStart(s *twin) broker.FollowOptions {
	o := broker.FollowOptions{MustExist: p.rng.IntN(4) == 0}
	if len(s.epochs) > 0 && p.rng.IntN(3) == 0 {
		o.Epoch = s.epochs[len(s.epochs)-1-p.rng.IntN(min(2, len(s.epochs)))]
	}
	switch p.rng.IntN(8) {
	case 0:
		o.Start.Head = true
	case 1:
		o.Start.Last = uint64(1 + p.rng.IntN(int(s.head)+3))
	case 2:
		if len(p.marks) > 0 {
			o.Start.Since = p.marks[p.rng.IntN(len(p.marks))]
		}
	case 3:
		o.Start.After = s.head + uint64(p.rng.IntN(2))
	default:
		o.Start.After = uint64(p.rng.IntN(int(s.head) + 1))
	}
	switch p.rng.IntN(6) {
	case 0:
		o.Kinds = []schema.Kind{schema.KindToken, schema.KindUserMessage}
	case 1:
		o.Kinds = []schema.Kind{schema.KindWaitingForInput}
	}
	return o
}

// follow opens a follower on both sides; false where both refuse.
func (p *pair) follow(s *twin, edge int, o broker.FollowOptions) ([2]*reader, bool) {
	p.Helper()
	var fs [2]*broker.Follower
	var errs [2]error
	var readers [2]*reader
	for i := range p.sides {
		w, mine := p.on(i, edge, s), o
		// Asked where the session stands, an edge comes to where it stands; its tail alone may be a moment behind what was acknowledged.
		w.session()
		if i == 1 {
			mine.Epoch = p.epochs[o.Epoch]
		}
		fs[i], errs[i] = w.log.Follow(w.Context(), s.id, mine)
		if errs[i] == nil {
			readers[i] = &reader{
				w: w, f: fs[i], limit: 1 << (5 + p.rng.IntN(12)), sparse: len(o.Kinds) > 0,
				through: fs[i].Attachment().After, epoch: fs[i].Attachment().Epoch,
			}
		}
	}
	p.note("follow %s on edge %d with %+v: %v", s.id, edge, o, errs[0])
	if !p.sameError(errs[0], errs[1]) {
		p.Fatalf("to follow %s with %+v gave %v and %v", s.id, o, errs[0], errs[1])
	}
	if errs[0] != nil {
		return readers, false
	}
	x, y := fs[0].Attachment(), fs[1].Attachment()
	p.sameEpoch(x.Epoch, y.Epoch)
	if y.Epoch = x.Epoch; x != y {
		p.Fatalf("following %s with %+v was attached at %+v and %+v", s.id, o, x, y)
	}
	return readers, true
}

// compareRead follows on both sides up to the head.
func (p *pair) compareRead(s *twin, edge int, o broker.FollowOptions) {
	p.Helper()
	if readers, ok := p.follow(s, edge, o); ok {
		p.readOn(s, readers)
		readers[0].f.Close()
		readers[1].f.Close()
	}
}

// readOn reads both sides up to the head and compares what came. False: both were refused, as the history has ended.
func (p *pair) readOn(s *twin, readers [2]*reader) bool {
	p.Helper()
	var errs [2]error
	for i, r := range readers {
		// A follower of a history that has ended has nowhere to read up to.
		for errs[i] == nil && (r.through < s.head || r.epoch != "" && r.epoch != p.on(i, 0, s).session().GetEpoch()) {
			_, errs[i] = r.next()
		}
	}
	if !p.sameError(errs[0], errs[1]) {
		p.Fatalf("reading %s gave %v at %d and %v at %d", s.id, errs[0], readers[0].through, errs[1], readers[1].through)
	}
	if errs[0] != nil {
		return false
	}
	x, y := readers[0], readers[1]
	p.sameEpoch(x.epoch, y.epoch)
	if x.through != y.through || !slices.Equal(x.gaps, y.gaps) || len(x.got) != len(y.got) {
		p.Fatalf("reading %s came to %d with %d envelopes and the gaps %v, and to %d with %d and %v", s.id, x.through, len(x.got), x.gaps, y.through, len(y.got), y.gaps)
	}
	for i := range x.got {
		if x.got[i].seq != y.got[i].seq || !bytes.Equal(x.got[i].raw, y.got[i].raw) {
			p.Fatalf("reading %s gave %v and %v", s.id, x.got[i].env, y.got[i].env)
		}
	}
	x.got, y.got = nil, nil
	return true
}

func (p *pair) openFollower(s *twin, edge int) {
	if len(s.followers) >= 4 {
		p.closeFollower(s, 0)
	}
	if readers, ok := p.follow(s, edge, p.someStart(s)); ok {
		s.followers = append(s.followers, readers)
	}
}

// drain reads all followers of a session that stayed open, and closes those that were refused.
func (p *pair) drain(s *twin) {
	p.note("drain %d followers of %s", len(s.followers), s.id)
	s.followers = slices.DeleteFunc(s.followers, func(readers [2]*reader) bool {
		if p.readOn(s, readers) {
			return false
		}
		readers[0].f.Close()
		readers[1].f.Close()
		return true
	})
}

func (p *pair) closeFollower(s *twin, i int) {
	if i < len(s.followers) {
		s.followers[i][0].f.Close()
		s.followers[i][1].f.Close()
		s.followers = slices.Delete(s.followers, i, i+1)
	}
}

func (p *pair) compareSession(s *twin, edge int) {
	p.Helper()
	x, y := p.on(0, edge, s).session(), p.on(1, edge, s).session()
	p.note("session %s: %v", s.id, x)
	p.sameEpoch(x.GetEpoch(), y.GetEpoch())
	if (x == nil) != (y == nil) || x.GetSession() != y.GetSession() || x.GetKind() != y.GetKind() || x.GetStatus() != y.GetStatus() || x.GetFirstSeq() != y.GetFirstSeq() ||
		x.GetHeadSeq() != y.GetHeadSeq() || x.GetMetadataJson() != y.GetMetadataJson() {
		p.Fatalf("session %s stands at %v and %v", s.id, x, y)
	}
}

func (p *pair) delete(s *twin, edge int) {
	var errs [2]error
	for i := range p.sides {
		w := p.on(i, edge, s)
		errs[i] = w.log.Delete(w.Context(), s.id)
	}
	p.note("delete %s on edge %d: %v", s.id, edge, errs[0])
	if !p.sameError(errs[0], errs[1]) {
		p.Fatalf("deleting %s gave %v and %v", s.id, errs[0], errs[1])
	}
	s.sent, s.head, s.next, s.truncated, s.ended = nil, 0, map[writing]schema.ProducerPlace{}, false, false
}

// restart restarts the logs that can be, and so ends all followers.
func (p *pair) restart() {
	p.note("restart")
	for _, s := range p.sessions {
		for len(s.followers) > 0 {
			p.closeFollower(s, 0)
		}
	}
	for _, side := range p.sides {
		if side.in.Restart != nil {
			side.edges[0] = side.edges[0].on(side.in.Restart(p.T))
			side.openEdge()
		}
	}
}

// truncate takes the older part of a session away, where both logs can: the second as far as its frames let it, the first just as far. Then both are restarted, because a log may go on with what it has
// in memory of what was taken away, and that is right.
func (p *pair) truncate(s *twin) {
	if p.sides[0].in.Truncate == nil || p.sides[1].in.Truncate == nil || s.head < 2 {
		return
	}
	first := p.sides[1].in.Truncate(p.T, s.id, uint64(1+p.rng.IntN(int(s.head))))
	p.note("truncate %s to what is behind %d", s.id, first-1)
	if x := p.sides[0].in.Truncate(p.T, s.id, first); x != first {
		p.Fatalf("truncated, session %s begins at %d and %d", s.id, x, first)
	}
	p.restart()
	// What was taken away cannot be recognised for sure.
	s.sent, s.truncated = nil, first > 1
}
