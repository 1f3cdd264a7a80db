package logtest

import (
	"fmt"
	"slices"
	"strings"
	"testing/synctest"
	"time"

	"tidemark/broker"
	"tidemark/schema"
)

// progressIn are the messages of the stored progress, and its seqs.
func (w *world) progressIn() (messages []string, seqs []uint64) {
	w.Helper()
	for _, g := range w.all() {
		if p := g.env.GetWorkflowProgress(); p != nil {
			messages, seqs = append(messages, p.GetMessage()), append(seqs, g.seq)
		}
	}
	return messages, seqs
}

// soon is the answer that must be there in no time.
func (w *world) soon(what string, ch <-chan answer) broker.Receipt {
	w.Helper()
	return w.within(what, ch, 500*time.Millisecond)
}

func (w *world) within(what string, ch <-chan answer, d time.Duration) broker.Receipt {
	w.Helper()
	select {
	case a := <-ch:
		if a.err != nil {
			w.Fatalf("%s was answered with %v", what, a.err)
		}
		return a.r
	case <-time.After(d):
		w.Fatalf("%s was not answered within %s", what, d)
	}
	return broker.Receipt{}
}

// waits checks that there is no answer, and will be none before time goes on.
func (w *world) waits(what string, ch <-chan answer) {
	w.Helper()
	synctest.Wait()
	select {
	case a := <-ch:
		w.Fatalf("%s was answered %+v, %v; it should wait", what, a.r, a.err)
	default:
	}
}

// testProgressOnceASecond reports ten times a second for five: what is stored is about once a second, the newest of each second, and every report is answered with the place of one that is as new.
func testProgressOnceASecond(w *world) {
	w.publish(StartRun("r"))
	began := time.Now()
	var answers []<-chan answer
	for i := range 50 {
		answers = append(answers, w.submit(one(Progress(fmt.Sprint(i)))))
		time.Sleep(100 * time.Millisecond)
	}
	// The last is stored without anything behind it.
	last := w.within("the last report", answers[49], 2*time.Second)
	messages, seqs := w.progressIn()
	if most := int(time.Since(began)/time.Second) + 1; len(messages) < 5 || len(messages) > most || messages[0] != "0" || messages[len(messages)-1] != "49" {
		w.Fatalf("of 50 reports in %s these are stored: %q; at most %d should be, the first and the last among them", time.Since(began), messages, most)
	}
	if last.Replaced || last.First != w.head() {
		w.Errorf("the last report was answered with %+v, the head is %d", last, w.head())
	}
	stored := map[uint64]string{}
	for i, seq := range seqs {
		stored[seq] = messages[i]
	}
	for i, ch := range answers[:49] {
		r := w.soon(fmt.Sprint("report ", i), ch)
		is := stored[r.First]
		var number int
		if _, err := fmt.Sscan(is, &number); err != nil || r.First != r.Last || r.Duplicate || number < i || r.Replaced != (number > i) || r.Epoch != last.Epoch {
			w.Errorf("report %d was answered with %+v, where report %q is", i, r, is)
		}
	}
	// After a second of silence the next is stored at once.
	time.Sleep(time.Second)
	w.soon("a report after a pause", w.submit(one(Progress("again"))))
}

// testProgressBeforeAnythingElse has whatever is published behind a report that waits store it, in its place before it.
func testProgressBeforeAnythingElse(w *world) {
	w.publish(Progress("first"))
	head := uint64(1)
	for i, a := range []schema.Accepted{Token("m", "x"), UserMessage("hello"), ProducedProgress("p", 1, 1), Produced("p", 1, 2), Failure("no", true), System("x")} {
		replaced, waiting := w.submit(one(Progress("replaced"))), w.submit(one(Progress(fmt.Sprint(i))))
		w.waits("a report", waiting)
		behind := w.soon("what is behind a report", w.submit(one(a)))
		x, y := w.soon("the report", waiting), w.soon("the report before it", replaced)
		if x.First != head+1 || x.Replaced || y.First != head+1 || !y.Replaced || behind.First != head+2 {
			w.Fatalf("behind seq %d, round %d went to %+v, %+v and %+v", head, i, y, x, behind)
		}
		head += 2
	}
	// Also what is refused, and what is stored already.
	waiting := w.submit(one(Progress("before a refusal")))
	w.waits("a report", waiting)
	if got := <-w.submit(one(Input("1"))); schema.CodeOf(got.err) != schema.Code_CODE_NOT_WAITING {
		w.Errorf("an answer was answered with %+v, %v", got.r, got.err)
	}
	if r := w.soon("the report before a refusal", waiting); r.First != head+1 {
		w.Errorf("it went to %+v behind %d", r, head)
	}
	// And another session's does not.
	waiting = w.submit(one(Progress("to itself")))
	w.of(ID("another")).publish(Token("m", "x"))
	w.waits("a report", waiting)
	w.within("a report", waiting, 2*time.Second)
}

// testProgressOnlyAlone publishes progress in the ways that are never held nor replaced.
func testProgressOnlyAlone(w *world) {
	w.publish(Progress("first"))
	head := uint64(1)
	for range 3 {
		for i, s := range []broker.Submission{
			one(ProducedProgress(fmt.Sprint("p", head), 1, 1)),
			{Envelopes: []schema.Accepted{Progress("a"), Progress("b")}},
			{Envelopes: []schema.Accepted{Progress("on top"), Token("m", "x")}},
			{Envelopes: []schema.Accepted{Progress("on top")}, Expected: &head},
		} {
			r := w.soon(fmt.Sprint("publish ", i), w.submit(s))
			if r.First != head+1 || r.Replaced {
				w.Fatalf("publish %d went to %+v behind %d", i, r, head)
			}
			head = r.Last
		}
	}
}

// testProgressRepeated retries reports: one that waits, one that is stored, one whose place another one took.
func testProgressRepeated(w *world) {
	first := Progress("first")
	w.publish(first)
	old, next := Progress("old"), Progress("next")
	a, b, again := w.submit(one(old)), w.submit(one(next)), w.submit(one(next))
	w.waits("a report", b)
	w.waits("its retry", again)
	time.Sleep(1100 * time.Millisecond)
	x, y, z := w.soon("the old report", a), w.soon("the report", b), w.soon("its retry", again)
	if x.First != 2 || !x.Replaced || y.First != 2 || y.Replaced || y.Duplicate || z.First != 2 || z.Replaced || !z.Duplicate {
		w.Errorf("answered %+v, %+v and %+v", x, y, z)
	}
	// A retry of what is stored takes nobody's place, and is not held.
	waiting := w.submit(one(Progress("waits")))
	w.waits("a report", waiting)
	if r := w.soon("a retry", w.submit(one(first))); r.First != 1 || !r.Duplicate {
		w.Errorf("the retry of the first report was answered with %+v", r)
	}
	if r := w.within("a report", waiting, 2*time.Second); r.First != 3 || r.Replaced {
		w.Errorf("a report with a retry behind it went to %+v", r)
	}
	if messages, _ := w.progressIn(); fmt.Sprint(messages) != "[first next waits]" {
		w.Errorf("stored is %q", messages)
	}
}

// testProgressOfAFlood reports more often in a second than answers can wait: all are answered, and hardly any is stored.
func testProgressOfAFlood(w *world) {
	w.publish(Progress("first"))
	const flood = 10_000
	var answers []<-chan answer
	for i := range flood {
		answers = append(answers, w.submit(one(Progress(fmt.Sprint(i)))))
	}
	tail := Token("m", "behind the flood")
	r := w.within("a token behind the flood", w.submit(one(tail)), 2*time.Second)
	var places []uint64
	var replaced []bool
	for i, ch := range answers {
		got := w.soon(fmt.Sprint("report ", i), ch)
		places, replaced = append(places, got.First), append(replaced, got.Replaced)
	}
	for i, at := range append(places[1:], r.First) {
		if at < places[i] || replaced[i] != (at == places[i]) {
			w.Fatalf("report %d was answered with seq %d, replaced %t; the next with %d", i, places[i], replaced[i], at)
		}
	}
	messages, _ := w.progressIn()
	if len(messages) > 5 || messages[len(messages)-1] != fmt.Sprint(flood-1) {
		w.Errorf("of %d reports at once these are stored: %q", flood, messages)
	}
}

// testProgressGoesWithItsSession deletes a session while a report waits there: it is answered, and begins no other history.
func testProgressGoesWithItsSession(w *world) {
	old := w.publish(Progress("first"))
	waiting := w.submit(one(Progress("waits")))
	w.waits("a report", waiting)
	w.delete()
	if r := w.soon("the report", waiting); r.First != 2 || r.Epoch != old.Epoch {
		w.Errorf("a report that waited when its session was deleted went to %+v of %s", r, old.Epoch)
	}
	time.Sleep(3 * time.Second)
	if s := w.session(); s != nil {
		w.Fatalf("the session is back: %v", s)
	}
	if r := w.soon("the first report of the next history", w.submit(one(Progress("first")))); r.First != 1 {
		w.Errorf("it went to %+v", r)
	}
}

// testProgressOnAnotherEdge reports on an edge that has seen, from the other, that progress was stored a moment ago.
func testProgressOnAnotherEdge(w *world) {
	b := w.otherEdge()
	for i := range uint64(5) {
		w.publish(Token("m", "x"))
		time.Sleep(2 * time.Second)
		w.soon("a report", w.submit(one(Progress("here"))))
		// Asked where the session stands, the other edge sees it.
		if s := b.session(); s.GetHeadSeq() != 3*i+2 {
			w.Fatalf("round %d: it stands at %v", i, s)
		}
		there := b.submit(one(Progress("there")))
		time.Sleep(500 * time.Millisecond)
		w.waits("a report on the other edge", there)
		if r := b.within("a report on the other edge", there, time.Second); r.First != 3*i+3 {
			w.Fatalf("round %d: it went to %+v", i, r)
		}
	}
}

// testProgressOnTwoEdgesAtOnce reports twenty times a second on two edges, whose seconds end at the same time: one report a second is stored, and not one of each edge. The last is stored always.
func testProgressOnTwoEdgesAtOnce(w *world) {
	b := w.otherEdge()
	for _, v := range []*world{w, b, w} {
		v.publish(Token("m", "x"))
	}
	const n, every = 200, 50 * time.Millisecond
	var open [2][]<-chan answer
	for i := range n {
		for j, v := range []*world{w, b} {
			open[j] = append(open[j], v.submit(one(Progress(fmt.Sprint(i, " of edge ", j)))))
		}
		time.Sleep(every)
	}
	answered := make(map[uint64]bool)
	var last [2]broker.Receipt
	for j := range open {
		for _, ch := range open[j] {
			last[j] = w.within("a report", ch, 2*time.Second)
			answered[last[j].First] = true
		}
	}
	messages, seqs := w.progressIn()
	// One as each of ten seconds begins, and the last of each edge.
	if len(seqs) > 12 || len(answered) != len(seqs) {
		w.Errorf("%d reports were stored in ten seconds, and %d places were answered: %q", len(seqs), len(answered), messages)
	}
	for j, r := range last {
		i := slices.Index(seqs, r.First)
		if i < 0 || !strings.HasPrefix(messages[i], fmt.Sprint(n-1, " ")) || !r.Replaced && messages[i] != fmt.Sprint(n-1, " of edge ", j) {
			w.Errorf("the last report of edge %d was answered %+v: %q at %d", j, r, messages, seqs)
		}
	}
}

// testProgressLeftBehind reports on one edge, and then once on another, as an agent does whose connection was lost: what the session shows last is the newer report, and who waits for the older is told so.
func testProgressLeftBehind(w *world) {
	b := w.otherEdge()
	for _, v := range []*world{w, b, w} {
		v.publish(Token("m", "x"))
	}
	for range 5 {
		first := w.submit(one(Progress("stored at once")))
		time.Sleep(300 * time.Millisecond)
		older := w.submit(one(Progress("left behind")))
		time.Sleep(100 * time.Millisecond)
		newer := b.submit(one(Progress("gone on")))
		w.within("the first report", first, 5*time.Second)
		old, last := w.within("the older report", older, 5*time.Second), w.within("the newer report", newer, 5*time.Second)
		messages, seqs := w.progressIn()
		if end := len(seqs) - 1; messages[end] != "gone on" || last.First != seqs[end] || old.First > last.First || old.Replaced != (old.First == last.First) {
			w.Fatalf("the older was answered %+v, the newer %+v; stored are %q at %d", old, last, messages, seqs)
		}
		time.Sleep(5 * time.Second)
	}
}

// testProgressBesideAFlood reports on one edge, also between other things, while the session is flooded on the other, so that the reports lose races and are handed over: all are answered with the place of a report
// that is as new, and nothing that is not progress is missing.
func testProgressBesideAFlood(w *world) {
	b := w.otherEdge()
	var flood [][]schema.Accepted
	for range 150 {
		flood = append(flood, Tokens("flood", 3))
	}
	var reports []<-chan answer
	var between []<-chan answer
	over := make(chan struct{})
	go func() {
		defer close(over)
		for i := range 60 {
			reports = append(reports, b.submit(one(Progress(fmt.Sprint(i)))))
			if i%7 == 0 {
				between = append(between, b.submit(one(UserMessage(fmt.Sprint("after ", i)))))
			}
			time.Sleep(time.Duration(i%4) * 20 * time.Millisecond)
		}
	}()
	for i, part := range flood {
		if r, err := w.try(broker.Submission{Envelopes: part}); err != nil || r.Last != r.First+2 {
			w.Fatalf("part %d of the flood: %+v, %v", i, r, err)
		}
		time.Sleep(time.Duration(i%3) * 5 * time.Millisecond)
	}
	<-over
	places := map[uint64]int{}
	for i, ch := range reports {
		r := w.within(fmt.Sprint("report ", i), ch, 5*time.Second)
		if r.First != r.Last || r.Duplicate {
			w.Fatalf("report %d was answered with %+v", i, r)
		}
		// The last that is answered with a place is the one that stands there.
		if !r.Replaced {
			places[r.First] = i
		}
	}
	all := w.all()
	messages := 0
	for _, g := range all {
		if p := g.env.GetWorkflowProgress(); p != nil {
			if at, ok := places[g.seq]; !ok || p.GetMessage() != fmt.Sprint(at) {
				w.Errorf("at seq %d stands report %s; there should be %d, %t", g.seq, p.GetMessage(), at, ok)
			}
			delete(places, g.seq)
		}
		if g.env.GetUserMessage() != nil {
			messages++
		}
	}
	for seq, i := range places {
		w.Errorf("report %d is not at seq %d", i, seq)
	}
	for i, ch := range between {
		w.soon(fmt.Sprint("message ", i), ch)
	}
	if messages != len(between) {
		w.Errorf("%d messages are there, %d were sent", messages, len(between))
	}
}

// testProgressDeletedOnAnotherEdge deletes the session on one edge while a report waits on the other, which does not bring it back.
func testProgressDeletedOnAnotherEdge(w *world) {
	b := w.otherEdge()
	for range 3 {
		w.publish(Token("m", "x"), Progress("first"))
		waiting := w.submit(one(Progress("waits")))
		w.waits("a report", waiting)
		b.delete()
		select {
		case got := <-waiting:
			// One of two edges that are one stores it before.
			if got.err != nil {
				w.refusal(schema.Code_CODE_SESSION_DELETED, got.err)
			}
		case <-time.After(5 * time.Second):
			w.Fatal("the report was not answered")
		}
		time.Sleep(3 * time.Second)
		if s := w.session(); s != nil {
			w.Fatalf("a report that waited brought the session back: %v", s)
		}
	}
	// What is reported behind the deletion begins the next history, at once: its last progress is not this one's.
	for range 3 {
		w.publish(Token("m", "x"), Progress("first"))
		b.delete()
		if s := w.session(); s != nil {
			w.Fatalf("deleted, it stands at %v", s)
		}
		if r := w.soon("a report", w.submit(one(Progress("anew")))); r.First != 1 {
			w.Errorf("a report behind the deletion went to %+v", r)
		}
		b.delete()
	}
}

// testClosingStoresProgress closes the log while a report waits.
func testClosingStoresProgress(w *world) {
	if w.in.Restart == nil {
		w.Skip("this log cannot be restarted")
	}
	w.publish(Progress("first"))
	a, b := w.submit(one(Progress("replaced"))), w.submit(one(Progress("waits")))
	w.waits("a report", b)
	began := time.Now()
	w.log = w.in.Restart(w.T)
	x, y := w.soon("the report", b), w.soon("the report before it", a)
	if x.First != 2 || y.First != 2 || !y.Replaced {
		w.Errorf("closed, the log answered %+v and %+v", y, x)
	}
	all := w.follow(broker.FollowOptions{}).until(2).got
	if got := all[1].env.GetWorkflowProgress().GetMessage(); got != "waits" {
		w.Errorf("stored is %q", got)
	}
	s := w.session()
	if stored := s.GetUpdated().AsTime().Sub(began); stored > 500*time.Millisecond {
		w.Errorf("the log took %s to store what waited when it was closed", stored)
	}
}
