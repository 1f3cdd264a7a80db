package broker

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"tidemark/schema"
)

func anything(string) error { return nil }

// wantRefused joins a group, and wants to be refused.
func (d *desk) wantRefused(o WorkOptions, code schema.Code, says string) {
	d.Helper()
	if o.May == nil {
		o.May = anything
	}
	o.Wake = func() {}
	w, err := d.l.Join(d.Context(), "default", o)
	if err == nil {
		w.Close()
		d.Fatalf("group %q was joined with %v of %q", o.Group, o.Kinds, o.Sessions)
	}
	if schema.CodeOf(err) != code || !strings.Contains(err.Error(), says) {
		d.Errorf("refused with %v, want %s and %q", err, code.Word(), says)
	}
}

// settings are a group's as they are stored.
func (d *desk) settings(group string) groupSettings {
	d.Helper()
	stream, err := d.l.js.Stream(d.Context(), workStream)
	if err != nil {
		d.Fatal(err)
	}
	have, s, err := readGroup(d.Context(), stream, groupKey{"default", group})
	if err != nil || have == nil {
		d.Fatalf("group %q is %v, %v", group, have, err)
	}
	return s
}

// TestWhatAGroupTakesOnlyGrows is the table of what may follow what.
func TestWhatAGroupTakesOnlyGrows(t *testing.T) {
	call, message := schema.KindToolCall, schema.KindUserMessage
	for _, c := range []struct {
		kinds, asked         []schema.Kind
		sessions, askedNames []string
		ok                   bool
	}{
		{kinds: []schema.Kind{call}, sessions: []string{"a"}, ok: true},
		{kinds: []schema.Kind{call}, asked: []schema.Kind{call}, sessions: []string{"a"}, askedNames: []string{"a"}, ok: true},
		{kinds: []schema.Kind{call}, asked: []schema.Kind{message, call}, sessions: []string{"a"}, ok: true},
		{kinds: []schema.Kind{call}, asked: []schema.Kind{message}, sessions: []string{"a"}},
		{kinds: []schema.Kind{call, message}, asked: []schema.Kind{call}, sessions: []string{"a"}},
		{sessions: []string{"a", "b"}, askedNames: []string{"c", "b", "a"}, ok: true},
		{sessions: []string{"a", "b"}, askedNames: []string{"a"}},
		{sessions: []string{"a", "ab", "ac*"}, askedNames: []string{"a*"}, ok: true},
		{sessions: []string{"a*"}, askedNames: []string{"*"}, ok: true},
		{sessions: []string{"a*"}, askedNames: []string{"a*", "b*"}, ok: true},
		{sessions: []string{"a*"}, askedNames: []string{"b*"}},
		{sessions: []string{"a*"}, askedNames: []string{"a"}},
		{sessions: []string{"a*"}, askedNames: []string{"ab*", "a"}},
		{sessions: []string{"*"}, askedNames: []string{"a*"}},
		{sessions: []string{"*"}, askedNames: []string{"*"}, ok: true},
		{sessions: []string{"a"}, askedNames: []string{"ab*"}},
	} {
		o := WorkOptions{Group: "tools", Kinds: c.asked, Sessions: c.askedNames}
		if err := o.Widens(c.kinds, c.sessions); (err == nil) != c.ok {
			t.Errorf("%v of %q, then %v of %q: %v", c.kinds, c.sessions, c.asked, c.askedNames, err)
		}
	}
	many := make([]string, 32)
	for i := range many {
		many[i] = fmt.Sprint("s", i)
	}
	o := WorkOptions{Group: "tools", Sessions: []string{"b"}}
	if err := o.Widens([]schema.Kind{call}, many); err == nil || !strings.Contains(err.Error(), `"tools" takes tool_call of "s0", `) || !strings.Contains(err.Error(), `"s7" and 24 more. `) || strings.Contains(err.Error(), "s8") {
		t.Errorf("of many sessions it is said: %v", err)
	}
}

// TestI7_WhatWaitsIsNotLost: nobody who joins can take away from a group what it takes, so what waits is handed out.
func TestI7_WhatWaitsIsNotLost(t *testing.T) {
	atDesk(t, func(d *desk) {
		first, _ := d.join(WorkOptions{Group: "g", Kinds: []schema.Kind{schema.KindUserMessage}, Sessions: []string{"s*"}, Credit: 1})
		first.Close()
		d.append("two")
		d.wantRefused(WorkOptions{Group: "g", Kinds: []schema.Kind{schema.KindToolCall}}, schema.Code_CODE_INVALID_MESSAGE, `Group "g" takes user_message of "s*".`)
		d.wantRefused(WorkOptions{Group: "g", Sessions: []string{"t*"}}, schema.Code_CODE_INVALID_MESSAGE, "use another group")
		d.wantRefused(WorkOptions{Group: "g", Sessions: []string{"t*"}, May: func(p string) error {
			if p == "s*" {
				return schema.Refuse(schema.Code_CODE_FORBIDDEN, "Not yours.")
			}
			return nil
		}}, schema.Code_CODE_FORBIDDEN, "Not yours")
		w, take := d.join(WorkOptions{Group: "g", AckWait: time.Minute})
		for range 2 {
			i := take()
			if i == nil {
				d.Fatal("what waited was lost")
			}
			w.Ack(i.ID)
		}
		w.Close()
	})
}

// TestI7_AWiderGroup: a group that is widened is handed what comes, of the old and of the new, and of what had come before what it takes by name and it did not look past.
func TestI7_AWiderGroup(t *testing.T) {
	atDesk(t, func(d *desk) {
		w, take := d.join(WorkOptions{Group: "g", Sessions: []string{"s"}})
		held := take()
		d.appendTo("t", "behind what was handed out")
		time.Sleep(time.Second)
		wide, more := d.join(WorkOptions{Group: "g", Sessions: []string{"t", "s"}, Credit: 5})
		d.append("two")
		d.appendTo("t", "three")
		got := map[string]bool{}
		for range 3 {
			i := more()
			if i == nil {
				d.Fatalf("nothing comes behind %v", got)
			}
			s, err := schema.Scan(i.Envelope)
			if err != nil {
				d.Fatal(err)
			}
			got[fmt.Sprint(i.Session.Name, s.Seq)] = true
			wide.Ack(i.ID)
		}
		if len(got) != 3 || !got["s2"] || !got["t1"] || !got["t2"] {
			d.Errorf("handed out: %v", got)
		}
		w.Ack(held.ID)
		w.Close()
		wide.Close()
	})
}

// TestI7_WorkersThatWidenAtOnce: while one who has read what the group takes is about to widen it, another comes that names something else. It is refused, and does not undo what the first did.
func TestI7_WorkersThatWidenAtOnce(t *testing.T) {
	atDesk(t, func(d *desk) {
		w, _ := d.join(WorkOptions{Group: "g", Sessions: []string{"s"}})
		k := groupKey{"default", "g"}
		second := make(chan error, 1)
		err := d.l.claimOf(k).hold(d.Context(), claimChanging, claimFree, func() error {
			_, _, err := d.l.joined(d.Context(), k, WorkOptions{Group: "g", Sessions: []string{"s", "t"}, May: anything}, func(ctx context.Context, stream jetstream.Stream, k groupKey, s groupSettings, have *jetstream.ConsumerConfig) (groupSettings, error) {
				go func() {
					w, err := d.l.Join(d.Context(), "default", WorkOptions{Group: "g", Sessions: []string{"s", "u"}, May: anything, Wake: func() {}})
					if err == nil {
						w.Close()
					}
					second <- err
				}()
				synctest.Wait()
				return d.l.change(ctx, stream, k, s, have)
			})
			return err
		})
		if err != nil {
			d.Fatal(err)
		}
		if err := <-second; schema.CodeOf(err) != schema.Code_CODE_INVALID_MESSAGE || !strings.Contains(err.Error(), `of "s", "t".`) {
			d.Errorf("the second is told %v", err)
		}
		if s := d.settings("g"); !slices.Equal(s.sessions, []string{"s", "t"}) {
			d.Errorf("the group takes %q", s.sessions)
		}
		w.Close()
	})
}

// TestI7_WhoDiesWhileChangingAGroup: a claim that nobody ends keeps others from changing the group for a while, and from joining it not at all.
func TestI7_WhoDiesWhileChangingAGroup(t *testing.T) {
	atDesk(t, func(d *desk) {
		w, _ := d.join(WorkOptions{Group: "g", Sessions: []string{"s"}})
		_, rev, err := d.l.claimOf(groupKey{"default", "g"}).read(d.Context())
		if err == nil {
			_, err = publishFenced(d.Context(), d.l.conn, claimSubject(groupKey{"default", "g"}), []byte(claimChanging), rev)
		}
		if err != nil {
			d.Fatal(err)
		}
		began := time.Now()
		same, _ := d.join(WorkOptions{Group: "g"})
		if took := time.Since(began); took > time.Second {
			d.Errorf("a worker that changes nothing joined after %s", took)
		}
		wide, _ := d.join(WorkOptions{Group: "g", Sessions: []string{"*"}})
		if took := time.Since(began); took < claimFor {
			d.Errorf("the group was changed %s after another had claimed it", took)
		}
		for _, w := range []Taker{w, same, wide} {
			w.Close()
		}
	})
}

// TestI7_AGroupThatOutgrowsAWorker: one who may not have what a group takes by now is let go, before it is handed any of it.
func TestI7_AGroupThatOutgrowsAWorker(t *testing.T) {
	for _, here := range []bool{true, false} {
		t.Run(map[bool]string{true: "here", false: "on another edge"}[here], func(t *testing.T) {
			atDesk(t, func(d *desk) {
				small, take := d.join(WorkOptions{Group: "g", Sessions: []string{"s"}, Credit: 10, MaxDeliver: 1, May: func(p string) error {
					if p != "s" {
						return schema.Refuse(schema.Code_CODE_FORBIDDEN, "Not yours.")
					}
					return nil
				}})
				held := take()
				o := WorkOptions{Sessions: []string{"*"}, May: anything}
				if here {
					o.Group = "g"
					w, _ := d.join(o)
					w.Close()
				} else if _, _, err := d.l.settleGroup(d.Context(), groupKey{"default", "g"}, o); err != nil {
					d.Fatal(err)
				}
				d.appendTo("t", "not for all")
				time.Sleep(time.Second)
				if items, err := small.Take(10); schema.CodeOf(err) != schema.Code_CODE_FORBIDDEN || len(items) > 0 {
					d.Errorf("it is handed %v, and told %v", items, err)
				}
				if small.Ack(held.ID) {
					d.Error("it holds an item still")
				}
				w, take := d.join(WorkOptions{Group: "g"})
				if i := take(); i == nil || i.Session.Name != "t" || i.Attempt != 1 {
					d.Errorf("what was not for all comes as %+v", i)
				}
				w.Close()
			})
		})
	}
}

// TestI7_AGroupThatIsDeleted: its workers are told that it was, and what it had is forgotten, but for its dead letters; whoever joins then begins a group anew, which has its order.
func TestI7_AGroupThatIsDeleted(t *testing.T) {
	atDesk(t, func(d *desk) {
		d.append("two")
		d.append("three")
		o := WorkOptions{Group: "g", Ordered: true, Sessions: []string{"s"}, Credit: 2}
		w, take := d.join(o)
		w.Term(take().ID, "no")
		w.Ack(take().ID)
		if take() == nil {
			d.Fatal("the third item does not come")
		}
		page, err := d.l.DeadLetters(d.Context(), "default", DeadQuery{Limit: 10})
		if err != nil || len(page.Letters) != 1 {
			d.Fatalf("dead letters: %v, %v", page, err)
		}
		if _, _, err := d.l.Redrive(d.Context(), "default", func(string) bool { return true }, []string{page.Letters[0].GetId()}); err != nil {
			d.Fatal(err)
		}
		for _, c := range []struct {
			group string
			may   func(string) error
			code  schema.Code
		}{
			{"nobody", anything, schema.Code_CODE_WORK_NOT_FOUND},
			{"g", func(string) error { return schema.Refuse(schema.Code_CODE_FORBIDDEN, "Not yours.") }, schema.Code_CODE_FORBIDDEN},
		} {
			if err := d.l.DeleteGroup(d.Context(), "default", c.group, c.may); schema.CodeOf(err) != c.code {
				d.Errorf("deleting %q: %v", c.group, err)
			}
		}
		if err := d.l.DeleteGroup(d.Context(), "default", "g", anything); err != nil {
			d.Fatal(err)
		}
		time.Sleep(time.Second)
		if _, err := w.Take(1); schema.CodeOf(err) != schema.Code_CODE_WORK_NOT_FOUND || !strings.Contains(err.Error(), `Group "g" was deleted`) {
			d.Errorf("its worker is told %v", err)
		}
		w.Close()
		if err := d.l.DeleteGroup(d.Context(), "default", "g", anything); schema.CodeOf(err) != schema.Code_CODE_WORK_NOT_FOUND {
			d.Errorf("deleting it again: %v", err)
		}
		if page, err := d.l.DeadLetters(d.Context(), "default", DeadQuery{Limit: 10, Redriven: true}); err != nil || len(page.Letters) != 1 {
			d.Errorf("its dead letters: %v, %v", page, err)
		}

		o.Credit, o.Sessions = 10, []string{"*"}
		w, take = d.join(o)
		for n := range 3 {
			i := take()
			if i == nil {
				d.Fatalf("the group that was begun anew is handed nothing behind %d items", n)
			}
			time.Sleep(time.Second)
			if more, err := w.Take(1); err != nil || len(more) > 0 {
				d.Errorf("beside item %d it is handed %v, %v", n, more, err)
			}
			if s, err := schema.Scan(i.Envelope); err != nil || s.Seq != uint64(n+1) || i.Attempt != 1 {
				d.Errorf("item %d is of seq %d, attempt %d: %v", n, s.Seq, i.Attempt, err)
			}
			w.Ack(i.ID)
		}
		if i := take(); i != nil {
			d.Errorf("what was redriven to the group that is no more comes as %+v", i)
		}
		w.Close()
	})
}

// TestI7_AGroupThatIsBegunAnewElsewhere: an edge that heard of neither finds out, at the latest when another joins there; its workers are told.
func TestI7_AGroupThatIsBegunAnewElsewhere(t *testing.T) {
	for _, joins := range []bool{true, false} {
		t.Run(map[bool]string{true: "joined", false: "left alone"}[joins], func(t *testing.T) {
			atDesk(t, func(d *desk) {
				w, take := d.join(WorkOptions{Group: "g"})
				if take() == nil {
					d.Fatal("nothing to do")
				}
				k := groupKey{"default", "g"}
				time.Sleep(time.Second)
				if err := d.l.js.DeleteConsumer(d.Context(), workStream, k.consumer()); err != nil {
					d.Fatal(err)
				}
				if _, _, err := d.l.settleGroup(d.Context(), k, WorkOptions{May: anything}); err != nil {
					d.Fatal(err)
				}
				if joins {
					next, take := d.join(WorkOptions{Group: "g"})
					if i := take(); i == nil || i.Attempt != 1 {
						d.Errorf("the group that was begun anew is handed %+v", i)
					}
					next.Close()
				} else {
					time.Sleep(2 * settingsFor)
				}
				if _, err := w.Take(1); schema.CodeOf(err) != schema.Code_CODE_WORK_NOT_FOUND {
					d.Errorf("a worker of the group that is no more is told %v", err)
				}
				w.Close()
			})
		})
	}
}
