package broker

import (
	"context"
	"runtime"
	"testing"
	"testing/synctest"
	"time"

	"tidemark/schema"
)

// desk is a log in a bubble with a broker beside it, and a session with one item of work.
type desk struct {
	*testing.T
	l  *JetStreamLog
	id schema.SessionID
}

func atDesk(t *testing.T, test func(d *desk)) {
	t.Helper()
	// Timers that a library pools must not be used in another bubble. A pool is empty after two collections.
	runtime.GC()
	runtime.GC()
	synctest.Test(t, func(t *testing.T) {
		s := newShelf(t, 1, 61)
		b := s.run(nil, "one")
		l, err := Open(Config{Server: s.server(), Edge: "edge", Logger: testLogger(t)})
		if err != nil {
			t.Fatal(err)
		}
		ctx, stop := context.WithCancel(t.Context())
		over := make(chan error, 1)
		go func() { over <- l.Run(ctx) }()
		d := &desk{t, l, schema.SessionID{Tenant: "default", Name: "s"}}
		d.append("one")
		test(d)
		if err := l.Close(t.Context()); err != nil {
			t.Error(err)
		}
		stop()
		if err := <-over; err != nil {
			t.Error(err)
		}
		b.end(t)
	})
	runtime.GC()
	runtime.GC()
}

func (d *desk) append(text string) {
	d.Helper()
	d.appendTo(d.id.Name, text)
}

func (d *desk) appendTo(session, text string) {
	d.Helper()
	if _, err := Append(d.Context(), d.l, schema.SessionID{Tenant: d.id.Tenant, Name: session}, Submission{Envelopes: []schema.Accepted{benchMessage(text)}}); err != nil {
		d.Fatal(err)
	}
}

// join makes a worker, and take waits for its next item; nil where none comes within 10 s.
func (d *desk) join(o WorkOptions) (Taker, func() *Item) {
	d.Helper()
	wake := make(chan struct{}, 1)
	o.Wake = func() { signal(wake) }
	if o.May == nil {
		o.May = func(string) error { return nil }
	}
	w, err := d.l.Join(d.Context(), "default", o)
	if err != nil {
		d.Fatal(err)
	}
	return w, func() *Item {
		for {
			items, err := w.Take(1)
			if err != nil {
				d.Fatal(err)
			}
			if len(items) == 1 {
				return items[0]
			}
			select {
			case <-wake:
			case <-time.After(10 * time.Second):
				return nil
			}
		}
	}
}

// told is how many work_failed the session has.
func (d *desk) told() (n int) {
	d.Helper()
	f, err := d.l.Follow(d.Context(), d.id, FollowOptions{Kinds: []schema.Kind{schema.KindWorkFailed}})
	if err != nil {
		d.Fatal(err)
	}
	defer f.Close()
	for f.Cursor().Seq < f.Attachment().Head {
		b, err := f.Next(d.Context(), 1<<20)
		if err != nil {
			d.Fatal(err)
		}
		for _, v := range b.Views {
			n += v.Len()
		}
	}
	return n
}

// TestI7_WhoDiesWhileGivingUp: the letter is written, and who wrote it dies before the session was told. The item that comes again is not handed out, though it was not handed out as often as it may be: it is given up, and told once.
func TestI7_WhoDiesWhileGivingUp(t *testing.T) {
	atDesk(t, func(d *desk) {
		w, take := d.join(WorkOptions{Group: "g"})
		i := take()
		held := w.(*Worker).group.held[i.ID].item
		subject := letterSubject("dead", "g", d.id, i.Epoch, held.GetSeq())
		if _, _, err := d.l.writeLetter(d.Context(), subject, groupKey{"default", "g"}, w.(*Worker).group.began, held, 1, "no such tool"); err != nil {
			d.Fatal(err)
		}
		w.Nack(i.ID, nil, "")
		if again := take(); again != nil {
			d.Errorf("it is handed out again, attempt %d", again.Attempt)
		}
		if n := d.told(); n != 1 {
			d.Errorf("the session was told %d times", n)
		}
		if rec, _, err := d.l.letter(d.Context(), subject); err != nil || rec.Telling != nil || rec.GetReason() != "no such tool" {
			d.Errorf("the letter is %v, %v", rec, err)
		}
		w.Close()
	})
}

// TestI7_RedriveNamesWhatIsNotThere: where one of the letters is not there, or not the asker's, none is redriven, so that the error says all that happened.
func TestI7_RedriveNamesWhatIsNotThere(t *testing.T) {
	atDesk(t, func(d *desk) {
		w, take := d.join(WorkOptions{Group: "g"})
		w.Term(take().ID, "no such tool")
		time.Sleep(time.Second)
		page, err := d.l.DeadLetters(d.Context(), "default", DeadQuery{Group: "g", Limit: 10})
		if err != nil || len(page.Letters) != 1 {
			d.Fatalf("the dead letters are %v, %v", page.Letters, err)
		}
		id := page.Letters[0].GetId()
		elsewhere := letterID(letterSubject("dead", "g", schema.SessionID{Tenant: "default", Name: "other"}, page.Letters[0].GetEpoch(), 1))
		mine := func(session string) bool { return session == "s" }
		for _, bad := range []string{"nix", elsewhere, id + ".more"} {
			redriven, before, err := d.l.Redrive(d.Context(), "default", mine, []string{id, bad})
			if schema.CodeOf(err) != schema.Code_CODE_WORK_NOT_FOUND || redriven+before != 0 {
				d.Errorf("beside %q: %d redriven, %d before, %v", bad, redriven, before, err)
			}
		}
		if i := take(); i != nil {
			d.Errorf("it is handed out again: %+v", i)
		}
		redriven, before, err := d.l.Redrive(d.Context(), "default", mine, []string{id, id})
		if err != nil || redriven != 1 || before != 1 {
			d.Errorf("named twice: %d redriven, %d before, %v", redriven, before, err)
		}
		if i := take(); i == nil {
			d.Error("what was redriven does not come")
		}
		w.Close()
	})
}

// TestI7_SettingsThatChange: an edge that goes by settings of a moment ago does not pass over items that the group wants by now.
func TestI7_SettingsThatChange(t *testing.T) {
	atDesk(t, func(d *desk) {
		w, take := d.join(WorkOptions{Group: "g", Sessions: []string{"other*"}, Credit: 5})
		g := w.(*Worker).group
		// As another edge does it, of which this one knows nothing.
		if _, _, err := d.l.settleGroup(d.Context(), g.key, WorkOptions{Sessions: []string{"*"}, May: func(string) error { return nil }}); err != nil {
			d.Fatal(err)
		}
		d.append("two")
		if i := take(); i == nil {
			d.Error("what the group wants by now was passed over")
		}
		w.Close()
	})
}

// TestI7_AnOrderThatIsLong: however many items wait for the first of their session, it comes again when it was given back.
func TestI7_AnOrderThatIsLong(t *testing.T) {
	atDesk(t, func(d *desk) {
		for range maxParked + 200 {
			d.append("more")
		}
		w, take := d.join(WorkOptions{Group: "g", Ordered: true, Credit: 2, MaxDeliver: 100})
		first := take()
		for range 3 {
			w.InProgress(first.ID)
			time.Sleep(20 * time.Second)
		}
		w.Nack(first.ID, nil, "")
		for n := range maxParked + 201 {
			i := take()
			if i == nil {
				d.Fatalf("nothing comes behind %d items", n)
			}
			if s, err := schema.Scan(i.Envelope); err != nil || s.Seq != uint64(n+1) {
				d.Fatalf("seq %d comes where %d is next", s.Seq, n+1)
			}
			w.Ack(i.ID)
		}
		w.Close()
	})
}

// TestI7_WhatNobodySaw: items that a worker was given and never took do not count as handed out, however often that happens.
func TestI7_WhatNobodySaw(t *testing.T) {
	atDesk(t, func(d *desk) {
		for range 5 {
			w, _ := d.join(WorkOptions{Group: "g", Credit: 5, MaxDeliver: 1})
			time.Sleep(time.Second)
			w.Close()
			time.Sleep(time.Second)
		}
		w, take := d.join(WorkOptions{Group: "g"})
		if i := take(); i == nil || i.Attempt != 1 {
			d.Errorf("an item that nobody saw comes as %+v", i)
		}
		w.Close()
	})
}

// TestI7_AGroupThatIsRemoved: its workers are told, and begin it anew.
func TestI7_AGroupThatIsRemoved(t *testing.T) {
	atDesk(t, func(d *desk) {
		w, take := d.join(WorkOptions{Group: "g"})
		w.Ack(take().ID)
		if err := d.l.js.DeleteConsumer(d.Context(), workStream, groupKey{"default", "g"}.consumer()); err != nil {
			d.Fatal(err)
		}
		time.Sleep(2 * settingsFor)
		if _, err := w.Take(1); schema.CodeOf(err) != schema.Code_CODE_UNAVAILABLE {
			d.Errorf("a worker of a group that is gone is told %v", err)
		}
		w.Close()
		w, take = d.join(WorkOptions{Group: "g"})
		if i := take(); i == nil {
			d.Error("the group that was begun anew hands nothing out")
		}
		w.Close()
	})
}
