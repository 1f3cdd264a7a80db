package broker

import (
	"context"
	"strconv"
	"testing"
	"time"

	"tidemark/schema"
)

// What comes again in a group, and to whom.

func mayAll(string) bool { return true }

// edge opens a second edge; the test closes what it has there before it calls over.
func (d *desk) edge() (l *JetStreamLog, over func()) {
	d.Helper()
	l, err := Open(Config{Server: d.l.cfg.Server, Edge: "another", Logger: testLogger(d.T)})
	if err != nil {
		d.Fatal(err)
	}
	ctx, stop := context.WithCancel(d.Context())
	ended := make(chan error, 1)
	go func() { ended <- l.Run(ctx) }()
	return l, func() {
		d.Helper()
		if err := l.Close(d.Context()); err != nil {
			d.Error(err)
		}
		stop()
		if err := <-ended; err != nil {
			d.Error(err)
		}
	}
}

// TestWork_WhatFindsNoRoomGoesOn: an item that comes to an edge whose worker has left, or for which the edge asked twice because its connection broke, does not lie there for as long as another worker's job lasts: a worker of another edge has room.
func TestWork_WhatFindsNoRoomGoesOn(t *testing.T) {
	for name, odd := range map[string]func(d *desk, g *workGroup){
		"a worker leaves while its request stands": func(d *desk, _ *workGroup) {
			leaving, _ := d.join(WorkOptions{Group: "g"})
			time.Sleep(time.Second)
			leaving.Close()
		},
		"NATS still knows what was asked before the connection broke": func(_ *desk, g *workGroup) {
			g.again()
			g.ask()
		},
	} {
		t.Run(name, func(t *testing.T) {
			atDesk(t, func(d *desk) {
				other, over := d.edge()
				w, take := d.join(WorkOptions{Group: "g"})
				w.Ack(take().ID)
				odd(d, w.(*Worker).group)
				idle, err := other.Join(d.Context(), "default", WorkOptions{Group: "g", May: anything, Wake: func() {}})
				if err != nil {
					d.Fatal(err)
				}
				time.Sleep(time.Second)
				for _, text := range []string{"two", "three", "four"} {
					d.append(text)
				}
				long := take()
				done := 0
				for range 60 {
					time.Sleep(time.Second)
					w.InProgress(long.ID)
					items, err := idle.Take(1)
					if err != nil {
						d.Fatal(err)
					}
					for _, i := range items {
						done++
						if i.Attempt != 1 {
							d.Errorf("what nobody had in hand is said to be handed out for the %d. time", i.Attempt)
						}
						idle.Ack(i.ID)
					}
				}
				if done != 2 {
					d.Errorf("the idle worker of the other edge was handed %d of 2 within a minute", done)
				}
				w.Close()
				idle.Close()
				over()
			})
		})
	}
}

// TestI7_AGroupBegunAnewHasNoLetters: what a group of that name gave up before it was deleted is handed to the one that is begun anew as often as anything, and given up by it with a letter and a word of its own; and that letter is redriven like any.
func TestI7_AGroupBegunAnewHasNoLetters(t *testing.T) {
	atDesk(t, func(d *desk) {
		letters := func() []*schema.DeadLetter {
			page, err := d.l.DeadLetters(d.Context(), "default", DeadQuery{Group: "g", Limit: 10, May: mayAll})
			if err != nil {
				d.Fatal(err)
			}
			return page.Letters
		}
		redrive := func() {
			n, _, err := d.l.Redrive(d.Context(), "default", mayAll, []string{letters()[0].GetId()})
			if n != 1 || err != nil {
				d.Fatalf("%d were redriven, %v", n, err)
			}
		}
		life := func(reason string) {
			w, take := d.join(WorkOptions{Group: "g", MaxDeliver: 3})
			for attempt := 1; attempt <= 2; attempt++ {
				i := take()
				if i == nil || i.Attempt != attempt {
					d.Fatalf("%s: at attempt %d it is handed out as %+v", reason, attempt, i)
				}
				w.Nack(i.ID, nil, "")
			}
			w.Term(take().ID, reason)
			time.Sleep(time.Second)
			if all := letters(); len(all) != 1 || all[0].GetReason() != reason {
				d.Fatalf("%s: the letters are %v", reason, all)
			}
			redrive()
			i := take()
			if i == nil {
				d.Fatalf("%s: what was redriven is handed to nobody", reason)
			}
			w.Ack(i.ID)
			time.Sleep(time.Second)
			w.Close()
		}
		life("first life")
		if err := d.l.DeleteGroup(d.Context(), "default", "g", anything); err != nil {
			d.Fatal(err)
		}
		life("second life")
		if n := d.told(); n != 2 {
			d.Errorf("the session was told %d times", n)
		}
	})
}

// TestWork_OrderedDoesNotHandOutWhatIsSettled: the register says that an item was settled, and NATS did not hear it. When it comes again it is not handed out behind those that came after it.
func TestWork_OrderedDoesNotHandOutWhatIsSettled(t *testing.T) {
	atDesk(t, func(d *desk) {
		d.append("two")
		w, take := d.join(WorkOptions{Group: "g", Ordered: true})
		i := take()
		g := w.(*Worker).group
		seq := g.held[i.ID].item.seq
		// This is how far an edge comes that dies.
		if _, err := publishFenced(d.Context(), d.l.conn, orderSubject(g.key, schema.EscapeToken(d.id.Name)), strconv.AppendUint(nil, seq, 10), 0); err != nil {
			d.Fatal(err)
		}
		next, takeNext := d.join(WorkOptions{Group: "g"})
		j := takeNext()
		if j == nil {
			d.Fatal("the next of the session is not handed out")
		}
		next.Ack(j.ID)
		w.Close()
		if again := takeNext(); again != nil {
			d.Errorf("what is settled is handed out again, attempt %d", again.Attempt)
		}
		if groups, err := d.l.Groups(d.Context(), "default"); err != nil || groups[0].GetWaiting() != 0 || groups[0].GetInHand() != 0 {
			d.Errorf("the group is %v, %v", groups, err)
		}
		next.Close()
	})
}

// TestWork_AWorkerKeepsItsAckWait: a worker goes by the time that it was told when it joined; another who gives the group a shorter one does not take the items out of its hands.
func TestWork_AWorkerKeepsItsAckWait(t *testing.T) {
	atDesk(t, func(d *desk) {
		w, take := d.join(WorkOptions{Group: "g", AckWait: 30 * time.Second})
		i := take()
		hasty, takeHasty := d.join(WorkOptions{Group: "g", AckWait: time.Second})
		for range 5 {
			time.Sleep(10 * time.Second)
			if _, held := w.InProgress(i.ID); !held {
				d.Fatal("the item is out of the hands of who says in time that it is at it")
			}
			if j := takeHasty(); j != nil {
				d.Fatalf("the item is in two hands; attempt %d", j.Attempt)
			}
		}
		w.Ack(i.ID)
		d.append("two")
		d.append("three")
		if i, j := take(), takeHasty(); i == nil || j == nil || time.Until(i.Deadline) < 15*time.Second || time.Until(j.Deadline) > time.Second {
			d.Errorf("the patient one has %+v, the hasty one %+v", i, j)
		}
		w.Close()
		hasty.Close()
	})
}
