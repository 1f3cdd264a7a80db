package logtest

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/oklog/ulid/v2"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"tidemark/broker"
	"tidemark/schema"
)

func testPublishBeginsASession(w *world) {
	if s := w.session(); s != nil {
		w.Fatalf("a session without envelopes is there: %v", s)
	}
	r := w.publish(Token("m", "first"))
	if r.First != 1 || r.Last != 1 || r.Duplicate {
		w.Fatalf("the first publish went to %+v", r)
	}
	if _, err := ulid.ParseStrict(r.Epoch); err != nil {
		w.Errorf("the epoch %q is no ULID: %v", r.Epoch, err)
	}
	again := w.publish(Token("m", "second"), Token("m", "third"))
	if again.First != 2 || again.Last != 3 || again.Epoch != r.Epoch {
		w.Errorf("the second publish went to %+v, in epoch %s", again, r.Epoch)
	}
	s := w.session()
	if s.GetSession() != w.id.Name || s.GetEpoch() != r.Epoch || s.GetFirstSeq() != 1 || s.GetHeadSeq() != 3 || s.GetStatus() != schema.Status_STATUS_OPEN {
		w.Errorf("the session stands at %v", s)
	}
	if other := w.of(ID("another")).publish(Token("m", "x")); other.First != 1 || other.Epoch == r.Epoch {
		w.Errorf("another session begins at %+v, this one is %s", other, r.Epoch)
	}
}

func testSeqsAreContiguous(w *world) {
	var all []schema.Accepted
	for i := range 120 {
		part := Tokens("m", 1+i%5)
		if r := w.publish(part...); r.First != uint64(len(all))+1 {
			w.Fatalf("publish %d went to %+v behind %d envelopes", i, r, len(all))
		}
		all = append(all, part...)
	}
	w.contains(all)
}

func testStoredAsAccepted(w *world) {
	all := []schema.Accepted{
		Created(schema.SessionKind_SESSION_KIND_WORKFLOW, `{"n": 12345678901234567890, "b":1, "a":2}`), UserMessage("go on"), StartRun("r1"), Token("m", ""), Token("m", "日本\x00"),
		Produced("p", 7, 1), Waiting("?"), Input(`"yes"`), Failure("it failed", true), RunStatus(schema.Status_STATUS_COMPLETED),
	}
	w.publish(all...)
	w.contains(all)
	for i, g := range w.all() {
		if g.env.GetId() != all[i].ID.String() || g.env.GetSource().GetSubject() != "logtest" || g.env.GetTime() == nil {
			w.Errorf("seq %d came back as %v", g.seq, g.env)
		}
	}
}

func testPublishAllOrNone(w *world) {
	w.publish(Produced("p", 1, 1))
	w.refused(schema.Code_CODE_PRODUCER_GAP, broker.Submission{Envelopes: []schema.Accepted{Token("m", "a"), Produced("p", 1, 2), Produced("p", 1, 4)}})
	w.refused(schema.Code_CODE_PRODUCER_FENCED, broker.Submission{Envelopes: []schema.Accepted{Token("m", "a"), Produced("q", 1, 1), Produced("p", 0, 2)}})
	w.refused(schema.Code_CODE_CONFLICT, broker.Submission{Envelopes: Tokens("m", 3), Expected: new(uint64(9))})
	// What was refused left no trace: the same producers go on as if it had not been sent.
	if r := w.publish(Produced("q", 1, 1), Produced("p", 1, 2)); r.First != 2 {
		w.Errorf("the publish after the refusals went to %+v", r)
	}
}

func testPublishOfNothing(w *world) {
	w.refused(schema.Code_CODE_INVALID_MESSAGE, broker.Submission{})
	w.refused(schema.Code_CODE_INVALID_MESSAGE, broker.Submission{Envelopes: Tokens("m", schema.MaxPublishEnvelopes+1)})
}

func testPublishOfThousand(w *world) {
	all := Tokens("m", schema.MaxPublishEnvelopes)
	if r := w.publish(all...); r.First != 1 || r.Last != schema.MaxPublishEnvelopes {
		w.Fatalf("went to %+v", r)
	}
	w.contains(all)
	if r := w.publish(all...); r.First != 1 || !r.Duplicate {
		w.Errorf("the retry of a thousand envelopes went to %+v", r)
	}
}

type answer struct {
	r   broker.Receipt
	err error
}

// submit publishes without waiting; the answers come through the channel, which has room for all.
func (w *world) submit(s broker.Submission) <-chan answer {
	ch := make(chan answer, 2)
	s.Done = func(r broker.Receipt, err error) {
		select {
		case ch <- answer{r, err}:
		default:
			panic("logtest: Done was called a third time")
		}
	}
	w.log.Publish(w.Context(), w.id, &s)
	return ch
}

func testPublishInOrderSubmitted(w *world) {
	var all []schema.Accepted
	var answers []<-chan answer
	var sizes []int
	for i := range 150 {
		part := Tokens("m", 1+i%7)
		all = append(all, part...)
		sizes = append(sizes, len(part))
		answers = append(answers, w.submit(broker.Submission{Envelopes: part}))
	}
	next := uint64(1)
	for i, ch := range answers {
		a := <-ch
		if a.err != nil || a.r.First != next || a.r.Last != next+uint64(sizes[i])-1 {
			w.Fatalf("submission %d was answered %+v, %v; it should begin at %d", i, a.r, a.err, next)
		}
		next = a.r.Last + 1
	}
	w.contains(all)
	for i, ch := range answers {
		if len(ch) > 0 {
			w.Errorf("submission %d was answered twice", i)
		}
	}
}

// writer is one of several that write to a session at once.
type writer struct {
	w *world
	// pause is called before each publish.
	pause    func(i int)
	parts    [][]schema.Accepted
	receipts []broker.Receipt
}

// writeAll lets the writers publish at once, each its parts one after the other, and checks what the session is then: every part in one piece at the place of its receipt, each writer's parts
// in its order, and nothing else.
func writeAll(w *world, writers []*writer) {
	var wg sync.WaitGroup
	for _, x := range writers {
		wg.Go(func() {
			for i, part := range x.parts {
				if x.pause != nil {
					x.pause(i)
				}
				r, err := x.w.try(broker.Submission{Envelopes: part})
				if err != nil || r.Duplicate {
					w.Errorf("publish %d: %+v, %v", i, r, err)
					return
				}
				x.receipts = append(x.receipts, r)
			}
		})
	}
	wg.Wait()
	if w.Failed() {
		w.FailNow()
	}
	total := uint64(0)
	for _, x := range writers {
		for _, part := range x.parts {
			total += uint64(len(part))
		}
	}
	r := w.follow(broker.FollowOptions{})
	defer r.f.Close()
	r.until(total)
	for _, x := range writers {
		last := uint64(0)
		for i, part := range x.parts {
			place := x.receipts[i]
			if place.First <= last || place.Last-place.First+1 != uint64(len(part)) || place.Last > total {
				w.Fatalf("part %d was answered with %+v, behind one that ended at %d", i, place, last)
			}
			last = place.Last
			for j, a := range part {
				if g := r.got[place.First-1+uint64(j)]; !bytes.Equal(g.raw, stored(a, g.seq)) {
					w.Fatalf("part %d was answered with %+v, but seq %d is %v", i, place, g.seq, g.env)
				}
			}
		}
	}
}

func testPublishersAtOnce(w *world) {
	var writers []*writer
	for i := range 8 {
		x := &writer{w: w}
		for j := range 30 {
			x.parts = append(x.parts, Tokens(fmt.Sprint("m", i), 1+(i+j)%4))
		}
		writers = append(writers, x)
	}
	writeAll(w, writers)
}

func testLargeEnvelopes(w *world) {
	const room = 4 << 10 // for what stands around the text
	most := min(w.log.Status().MaxEnvelopeBytes, schema.MaxEnvelopeBytes)
	all := []schema.Accepted{Token("m", "small"), Token("m", strings.Repeat("x", most-room)), Token("m", "small"), Token("m", strings.Repeat("y", most-room))}
	for _, a := range all {
		w.publish(a)
	}
	w.contains(all)
	// More than a message of the log holds, in envelopes that are each allowed.
	part := 0
	var tooMuch []schema.Accepted
	for part <= w.log.Status().MaxEnvelopeBytes {
		tooMuch = append(tooMuch, Token("m", strings.Repeat("z", most/2)))
		part += most / 2
	}
	w.refused(schema.Code_CODE_TOO_LARGE, broker.Submission{Envelopes: tooMuch})
	w.contains(all)
}

func testUnknownFieldsSurvive(w *world) {
	e := tokenOf("m", "known")
	raw, err := proto.Marshal(e)
	if err != nil {
		w.Fatal(err)
	}
	// Fields of a later version: one of each wire type.
	raw = protowire.AppendVarint(protowire.AppendTag(raw, 200, protowire.VarintType), 12345)
	raw = protowire.AppendString(protowire.AppendTag(raw, 201, protowire.BytesType), "of a later version")
	raw = protowire.AppendFixed64(protowire.AppendTag(raw, 202, protowire.Fixed64Type), 1<<60)
	a, err := schema.NewStamp(&schema.Source{Subject: "s"}).Accept(raw, time.Now())
	if err != nil {
		w.Fatal(err)
	}
	w.publish(Token("m", "before"), a)
	g := w.all()[1]
	if !bytes.Equal(g.raw, stored(a, 2)) {
		w.Errorf("came back as %x, want %x", g.raw, stored(a, 2))
	}
	for _, want := range []string{"of a later version", "known"} {
		if !bytes.Contains(g.raw, []byte(want)) {
			w.Errorf("%q is not in what came back", want)
		}
	}
	if n := len(g.env.ProtoReflect().GetUnknown()); n == 0 {
		w.Error("no unknown field came back")
	}
}

func testNamesOfAnyCharacters(w *world) {
	names := []string{
		"a", "A", "a.b", "a.b.>", "*", ">", "a b", "=2E", "a=2Eb", "\x00", "\n", "é", "日本語", "🌊", "$JS.API", "a/b", ".", "..", "-", "_", strings.Repeat("é", 100), strings.Repeat(".", 200),
	}
	want := map[schema.SessionID]string{}
	for i, name := range names {
		for _, tenant := range []string{"default", "other", names[(i+1)%len(names)]} {
			id, err := schema.ParseSessionID(tenant, name)
			if err != nil {
				w.Fatal(err)
			}
			if want[id] != "" {
				continue
			}
			want[id] = fmt.Sprintf("%q of %q", name, tenant)
			w.of(id).publish(Token("m", want[id]))
		}
	}
	for id, text := range want {
		v := w.of(id)
		if all := v.all(); len(all) != 1 || all[0].env.GetToken().GetText() != text {
			w.Errorf("session %q holds %v, want %s alone", id, all, text)
		}
		if s := v.session(); s.GetSession() != id.Name {
			w.Errorf("session %q says that its name is %q", id, s.GetSession())
		}
	}
}

func testRepeatedIDs(w *world) {
	a, b := Tokens("m", 3), Tokens("m", 2)
	ra, rb := w.publish(a...), w.publish(b...)
	for _, c := range []struct {
		again []schema.Accepted
		first uint64
	}{{a, ra.First}, {b, rb.First}, {a[1:], ra.First + 1}, {a[2:], ra.First + 2}, {join(a, b), ra.First}} {
		r := w.publish(c.again...)
		if !r.Duplicate || r.First != c.first || r.Epoch != ra.Epoch {
			w.Errorf("the retry of what went to seq %d was answered with %+v", c.first, r)
		}
	}
	w.contains(join(a, b))
}

// testRepeatedIDsWindow repeats the id that is 1,024 envelopes old, over frames of different sizes, after a refusal of a large publish that must not cost any of the window.
func testRepeatedIDsWindow(w *world) {
	before := w.fill(20, 7)
	a := Token("m", "to be repeated")
	r := w.publish(a)
	w.fill(1000, 250)
	w.fill(23, 1)
	w.refused(schema.Code_CODE_CONFLICT, broker.Submission{Envelopes: Tokens("m", 900), Expected: new(uint64(1))})
	if again := w.publish(a); !again.Duplicate || again.First != r.First {
		w.Errorf("the retry, 1,023 envelopes later, of what went to seq %d was answered with %+v", r.First, again)
	}
	if head, want := w.head(), uint64(len(before)+1+1023); head != want {
		w.Errorf("the head is %d, want %d", head, want)
	}
}

// testRepeatedInFlight sends retries while the first tries are on their way.
func testRepeatedInFlight(w *world) {
	a, b := Tokens("m", 2), Tokens("m", 3)
	p := []schema.Accepted{Produced("p", 1, 1), Produced("p", 1, 2)}
	// The producer's retry has other ids, as when the edge mints them.
	p2 := []schema.Accepted{Produced("p", 1, 1), Produced("p", 1, 2)}
	var answers []<-chan answer
	for _, e := range [][]schema.Accepted{a, a, b, a, b, join(a, b), p, p2, p, b[1:], p2[1:]} {
		answers = append(answers, w.submit(broker.Submission{Envelopes: e}))
	}
	want := []struct {
		first uint64
		dup   bool
	}{{1, false}, {1, true}, {3, false}, {1, true}, {3, true}, {1, true}, {6, false}, {6, true}, {6, true}, {4, true}, {7, true}}
	var epoch string
	for i, ch := range answers {
		got := <-ch
		if epoch == "" {
			epoch = got.r.Epoch
		}
		if got.err != nil || got.r.First != want[i].first || got.r.Duplicate != want[i].dup || got.r.Epoch != epoch || epoch == "" {
			w.Errorf("submission %d was answered %+v, %v; want first seq %d, duplicate %t, epoch %s", i, got.r, got.err, want[i].first, want[i].dup, epoch)
		}
	}
	w.contains(join(a, b, p))
}

// testRepeatedInPart sends publishes of which a part is stored: they are no retries, and storing the rest would tear them apart.
func testRepeatedInPart(w *world) {
	a, b := Tokens("m", 3), Tokens("m", 2)
	w.publish(a...)
	fresh := func() schema.Accepted { return Token("m", "new") }
	w.refused(schema.Code_CODE_INVALID_MESSAGE, broker.Submission{Envelopes: join(a, []schema.Accepted{fresh()})})
	w.refused(schema.Code_CODE_INVALID_MESSAGE, broker.Submission{Envelopes: []schema.Accepted{fresh(), a[0]}})
	w.refused(schema.Code_CODE_INVALID_MESSAGE, broker.Submission{Envelopes: []schema.Accepted{a[0], fresh(), a[2]}})
	w.refused(schema.Code_CODE_INVALID_MESSAGE, broker.Submission{Envelopes: []schema.Accepted{a[1], a[0]}})
	w.refused(schema.Code_CODE_INVALID_MESSAGE, broker.Submission{Envelopes: []schema.Accepted{a[0], a[2]}})
	w.contains(a)
	w.publish(b...)
	w.contains(join(a, b))

	// A producer that cuts its publishes anew learns where to go on.
	v := w.of(ID("of a producer"))
	v.publish(Produced("p", 1, 1), Produced("p", 1, 2), Produced("p", 1, 3))
	r := v.refused(schema.Code_CODE_PRODUCER_GAP, broker.Submission{Envelopes: []schema.Accepted{Produced("p", 1, 2), Produced("p", 1, 3), Produced("p", 1, 4)}})
	if r.Expected != 4 {
		w.Errorf("the producer is told to go on from %d, want 4", r.Expected)
	}
	if got := v.publish(Produced("p", 1, 4)); got.First != 4 || got.Duplicate {
		w.Errorf("going on from 4 went to %+v", got)
	}
}

func testRepeatedInOnePublish(w *world) {
	a, b := Token("m", "a"), Token("m", "b")
	w.refused(schema.Code_CODE_INVALID_MESSAGE, broker.Submission{Envelopes: []schema.Accepted{a, a}})
	w.refused(schema.Code_CODE_INVALID_MESSAGE, broker.Submission{Envelopes: []schema.Accepted{a, b, a}})
	if s := w.session(); s != nil {
		w.Fatalf("a refused publish began a session: %v", s)
	}
	w.publish(a, b)
}

func testRepeatedExpected(w *world) {
	a := Tokens("m", 2)
	first, err := w.try(broker.Submission{Envelopes: a, Expected: new(uint64(0))})
	if err != nil {
		w.Fatal(err)
	}
	w.publish(Token("m", "later"))
	// The head has moved, by the first try itself among others: the retry learns where it went.
	again, err := w.try(broker.Submission{Envelopes: a, Expected: new(uint64(0))})
	if err != nil || !again.Duplicate || again.First != first.First || again.Last != first.Last {
		w.Errorf("the retry was answered with %+v, %v; the first try went to %+v", again, err, first)
	}
}

func testProducerRepeats(w *world) {
	w.publish(Token("m", "before"))
	first := w.publish(Produced("p", 3, 1), Produced("p", 3, 2))
	w.publish(Token("m", "between"))
	second := w.publish(Produced("p", 3, 3), Produced("q", 1, 1))
	for _, c := range []struct {
		again []schema.Accepted
		first uint64
	}{
		{[]schema.Accepted{Produced("p", 3, 1), Produced("p", 3, 2)}, first.First},
		{[]schema.Accepted{Produced("p", 3, 2)}, first.Last},
		{[]schema.Accepted{Produced("p", 3, 3), Produced("q", 1, 1)}, second.First},
		{[]schema.Accepted{Produced("q", 1, 1)}, second.Last},
	} {
		if r := w.publish(c.again...); !r.Duplicate || r.First != c.first {
			w.Errorf("the retry of what went to seq %d was answered with %+v", c.first, r)
		}
	}
	if head := w.head(); head != 6 {
		w.Errorf("the head is %d, want 6", head)
	}
}

// testProducerRepeatsAnyTime retries after so much else that no memory of the session's last envelopes reaches back.
func testProducerRepeatsAnyTime(w *world) {
	places := map[uint64]uint64{}
	for i := uint64(1); i <= 50; i++ {
		places[i] = w.publish(Produced("p", 1, i)).First
		w.publish(Token("m", "between"))
	}
	w.fill(1200, 300)
	w.settle()
	head := w.head()
	for _, i := range []uint64{1, 2, 10, 17, 18, 19, 49, 50} {
		if r := w.publish(Produced("p", 1, i)); !r.Duplicate || r.First != places[i] {
			w.Errorf("the retry of seq %d of the producer, at %d, was answered with %+v", i, places[i], r)
		}
	}
	// Cut anew, what was not stored is not acknowledged with what was, and what does not stand side by side is not said to.
	for _, to := range []uint64{51, 52, 2} {
		var cut []schema.Accepted
		for i := uint64(1); i <= to; i++ {
			cut = append(cut, Produced("p", 1, i))
		}
		if r := w.refused(schema.Code_CODE_PRODUCER_GAP, broker.Submission{Envelopes: cut}); r.Expected != 51 {
			w.Errorf("told to go on from %d, want 51", r.Expected)
		}
	}
	w.refused(schema.Code_CODE_INVALID_MESSAGE, broker.Submission{Envelopes: []schema.Accepted{Token("m", "new"), Produced("p", 1, 1)}})
	if r := w.publish(Produced("p", 1, 51)); r.Duplicate || r.First != head+1 {
		w.Errorf("the producer's next went to %+v behind %d", r, head)
	}
}

// testManyProducers has more producers write to a session than its state remembers. One that comes back may be refused; what it wrote is never stored twice.
func testManyProducers(w *world) {
	const producers = 300
	for i := range producers {
		w.publish(Produced(fmt.Sprint("p", i), 1, 1))
	}
	for _, i := range []int{0, 1, 40, 150, producers - 1} {
		r, err := w.try(broker.Submission{Envelopes: []schema.Accepted{Produced(fmt.Sprint("p", i), 1, 1)}})
		switch {
		case err == nil && r.Duplicate && r.First == uint64(i)+1:
		case schema.CodeOf(err) == schema.Code_CODE_PRODUCER_GAP && i < producers-256:
		default:
			w.Errorf("producer %d of %d wrote its first envelope again and was answered %+v, %v", i, producers, r, err)
		}
	}
	if head := w.head(); head != producers {
		w.Errorf("the head is %d, want %d", head, producers)
	}
}

func testProducerGap(w *world) {
	expect := func(want uint64, e ...schema.Accepted) {
		w.Helper()
		if r := w.refused(schema.Code_CODE_PRODUCER_GAP, broker.Submission{Envelopes: e}); r.Expected != want {
			w.Errorf("expected %d, want %d: %v", r.Expected, want, r)
		}
	}
	expect(1, Produced("p", 1, 2))
	expect(2, Produced("p", 1, 1), Produced("p", 1, 1))
	w.publish(Produced("p", 1, 1))
	expect(2, Produced("p", 1, 3))
	expect(3, Produced("p", 1, 2), Produced("p", 1, 4))
	// A new epoch begins at 1.
	expect(1, Produced("p", 2, 2))
	w.publish(Produced("p", 2, 1), Produced("p", 2, 2))
	expect(3, Produced("p", 2, 7))
	w.publish(Produced("p", 2, 3), Produced("p", 3, 1))
	expect(2, Produced("p", 3, 4))
}

func testProducerFenced(w *world) {
	w.publish(Produced("p", 1, 1), Produced("p", 1, 2))
	w.publish(Produced("p", 4, 1))
	for _, e := range []schema.Accepted{Produced("p", 1, 3), Produced("p", 1, 1), Produced("p", 3, 1), Produced("p", 0, 1)} {
		if r := w.refused(schema.Code_CODE_PRODUCER_FENCED, broker.Submission{Envelopes: []schema.Accepted{e}}); r.Expected != 4 {
			w.Errorf("told that the epoch is %d, want 4", r.Expected)
		}
	}
	w.publish(Produced("p", 4, 2), Produced("q", 1, 1))
	if r := w.refused(schema.Code_CODE_PRODUCER_FENCED, broker.Submission{Envelopes: []schema.Accepted{Produced("p", 5, 1), Produced("p", 4, 3)}}); r.Expected != 5 {
		w.Errorf("told that the epoch is %d, want 5", r.Expected)
	}
}

func testExpectedSeq(w *world) {
	if r := w.refused(schema.Code_CODE_CONFLICT, broker.Submission{Envelopes: Tokens("m", 1), Expected: new(uint64(1))}); r.Head != 0 {
		w.Errorf("told that the head is %d, want 0", r.Head)
	}
	if r, err := w.try(broker.Submission{Envelopes: Tokens("m", 3), Expected: new(uint64(0))}); err != nil || r.First != 1 {
		w.Fatalf("%+v, %v", r, err)
	}
	for _, wrong := range []uint64{0, 2, 4} {
		if r := w.refused(schema.Code_CODE_CONFLICT, broker.Submission{Envelopes: Tokens("m", 1), Expected: &wrong}); r.Head != 3 {
			w.Errorf("told that the head is %d, want 3", r.Head)
		}
	}
	if r, err := w.try(broker.Submission{Envelopes: Tokens("m", 1), Expected: new(uint64(3))}); err != nil || r.First != 4 {
		w.Fatalf("%+v, %v", r, err)
	}
}

func testExpectedSeqHasOneWinner(w *world) { oneWinner(w, w, w) }

// oneWinner lets several publish on top of the same head, through both worlds, and checks that exactly one could.
func oneWinner(w, a, b *world) {
	for round := range uint64(10) {
		var answers []<-chan answer
		for i := range 6 {
			v := a
			if i%2 == 1 {
				v = b
			}
			answers = append(answers, v.submit(broker.Submission{Envelopes: Tokens("m", 1), Expected: new(round)}))
		}
		won := 0
		for _, ch := range answers {
			got := <-ch
			r, refused := errors.AsType[*schema.Refusal](got.err)
			switch {
			case got.err == nil && got.r.First == round+1:
				won++
			case refused && r.Code == schema.Code_CODE_CONFLICT && r.Head == round+1:
			default:
				w.Errorf("on top of %d: %+v, %v", round, got.r, got.err)
			}
		}
		if won != 1 {
			w.Fatalf("%d of 6 publishes on top of seq %d were stored; exactly one can be", won, round)
		}
	}
}
