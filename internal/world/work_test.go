package world

import (
	"fmt"
	"testing"
	"time"

	"tidemark/broker"
	"tidemark/schema"
)

// TestI7_WorkIsHandedOutOnce: each envelope of a kind that makes work comes to one worker of every group, on whichever edge, and not again once it is settled; what makes no work comes to none.
func TestI7_WorkIsHandedOutOnce(t *testing.T) {
	Run(t, Config{}, func(w *World) {
		p := w.Join(w.Edge(0), ProtoSocket, "s")
		p.Put("s", UserMessage("before"))
		one := w.JoinGroup(w.Edge(1), broker.WorkOptions{Group: "g", Credit: 2})
		other := w.JoinGroup(w.Edge(0), broker.WorkOptions{Group: "another"})
		late := w.JoinGroup(w.Edge(0), broker.WorkOptions{Group: "late", FromNow: true})
		p.Put("s", Token("no work"), UserMessage("one"), Token("none"))
		for _, want := range []string{"before", "one"} {
			for _, h := range []*Hand{one, other} {
				i := h.Want()
				if ItemText(i) != want || i.Attempt != 1 || i.Session != Session("s") || ItemEnvelope(i).GetSeq() == 0 {
					t.Errorf("%q is wanted; it is %+v", want, i)
				}
				if h == other {
					h.WantNothing(time.Second)
				}
				h.Done(i)
			}
		}
		if i := late.Want(); ItemText(i) != "one" {
			t.Errorf("who begins now gets %q", ItemText(i))
		} else {
			late.Done(i)
		}
		w.RestartBroker()
		w.Settle()
		for _, h := range []*Hand{one, other, late} {
			h.WantNothing(time.Minute)
		}
		p.Put("s", UserMessage("two"))
		for _, h := range []*Hand{one, other, late} {
			h.Done(h.Want())
		}
	})
}

// TestI7_WhatIsNotSettledComesAgain: given back, it comes after its delay; held in silence, when its time is over; in progress, not before; of a worker that leaves, at once, and to another edge.
func TestI7_WhatIsNotSettledComesAgain(t *testing.T) {
	Run(t, Config{}, func(w *World) {
		p := w.Join(w.Edge(0), ProtoSocket, "s")
		h := w.JoinGroup(w.Edge(0), broker.WorkOptions{Group: "g", AckWait: 10 * time.Second, MaxDeliver: 20, Backoff: []time.Duration{time.Second, 3 * time.Second}})
		p.Put("s", UserMessage("m"))
		within := func(attempt int, least, most time.Duration, how func()) *broker.Item {
			t.Helper()
			how()
			began := time.Now()
			i := h.Want()
			if took := time.Since(began); took < least || took > most || i.Attempt != attempt {
				t.Errorf("attempt %d came after %s; attempt %d is wanted after %s to %s", i.Attempt, took, attempt, least, most)
			}
			return i
		}
		i := h.Want()
		i = within(2, time.Second, 1100*time.Millisecond, func() { h.worker.Nack(i.ID, nil, "") })
		i = within(3, 3*time.Second, 3100*time.Millisecond, func() { h.worker.Nack(i.ID, nil, "") })
		i = within(4, 5*time.Second, 5100*time.Millisecond, func() { h.worker.Nack(i.ID, new(5*time.Second), "") })
		i = within(5, 0, 100*time.Millisecond, func() { h.worker.Nack(i.ID, new(time.Duration(0)), "") })
		i = within(6, 9*time.Second, 11*time.Second, func() {})
		old := i
		i = within(7, 9*time.Second, 11*time.Second, func() {
			w.Sleep(6 * time.Second)
			if until, held := h.worker.InProgress(i.ID); !held || time.Until(until) > 10*time.Second || time.Until(until) < 9*time.Second {
				t.Errorf("the item was lost before its time was over, or has it for another %s", time.Until(until))
			}
		})
		if _, held := h.worker.InProgress(old.ID); held || h.worker.Ack(old.ID) || h.worker.Term(old.ID, "") || h.worker.Nack(old.ID, nil, "") {
			t.Error("an answer about an item that was handed out again was taken")
		}
		next := w.JoinGroup(w.Edge(1), broker.WorkOptions{Group: "g"})
		began := time.Now()
		h.Close()
		i = next.Want()
		if took := time.Since(began); took > 100*time.Millisecond || i.Attempt != 8 {
			t.Errorf("attempt %d came %s after the worker left", i.Attempt, took)
		}
		next.Done(i)
		next.WantNothing(time.Minute)
	})
}

// TestI7_DeadLetters: what was handed out as often as allowed, and what nobody can do, is a dead letter, and its session is told, once; redriven, it comes to its group again, once, and may die again.
func TestI7_DeadLetters(t *testing.T) {
	Run(t, Config{}, func(w *World) {
		ctx := w.t.Context()
		p := w.Join(w.Edge(0), ProtoSocket, "s")
		h := w.JoinGroup(w.Edge(0), broker.WorkOptions{Group: "g", AckWait: time.Second, MaxDeliver: 2})
		bystander := w.JoinGroup(w.Edge(1), broker.WorkOptions{Group: "bystander"})
		letters := func(redriven bool) []*schema.DeadLetter {
			page, err := w.Edge(1).Log.DeadLetters(ctx, "default", broker.DeadQuery{Limit: 100, Redriven: redriven})
			w.must(err)
			return page.Letters
		}
		for n, kill := range []func(i *broker.Item){
			func(i *broker.Item) { h.worker.Term(i.ID, "no such tool") },
			func(i *broker.Item) {
				h.worker.Nack(i.ID, nil, "busy")
				h.worker.Nack(h.Want().ID, nil, "still busy")
			},
			func(*broker.Item) {
				// Silence.
				h.Want()
				w.Sleep(2 * time.Second)
			},
		} {
			e := UserMessage(fmt.Sprint("m", n))
			e.RequestId = fmt.Sprint("r", n)
			at := p.Put("s", e).First
			kill(h.Want())
			w.Until("it is a dead letter", func() bool { return len(letters(false)) == 1 })
			l := letters(false)[0]
			want := []string{"no such tool", "still busy", "It was handed out 2 times, and nobody settled it in time."}[n]
			if l.GetSeq() != at || l.GetGroup() != "g" || l.GetReason() != want || l.GetKind() != "user_message" || l.GetAttempts() != []uint32{1, 2, 2}[n] || l.GetSession() != "s" {
				t.Errorf("the dead letter is %v", l)
			}
			var told []*schema.Envelope
			w.Until("the session is told", func() bool {
				told = nil
				for _, v := range w.Edge(1).Stored("s") {
					if v.GetWorkFailed() != nil && v.GetReplyTo() == at {
						told = append(told, v)
					}
				}
				return len(told) > 0
			})
			if f := told[0]; len(told) != 1 || f.GetRequestId() != e.RequestId || f.GetWorkFailed().GetReason() != want || f.GetSource().GetRole() != schema.Role_ROLE_SYSTEM {
				t.Errorf("the session was told %v", told)
			}
			h.WantNothing(time.Minute)

			one, err := w.Edge(1).Log.DeadLetters(ctx, "default", broker.DeadQuery{ID: l.GetId(), Limit: 1})
			if err != nil || Text(one.Letters[0].GetEnvelope()) != fmt.Sprint("m", n) {
				t.Errorf("the letter by its id is %v, %v", one, err)
			}
			for k := range 3 {
				redriven, before, err := w.Edge(k%2).Log.Redrive(ctx, "default", func(string) bool { return true }, []string{l.GetId()})
				if err != nil || redriven != []int{1, 0, 0}[k] || before != []int{0, 1, 1}[k] {
					t.Errorf("redriven %d, before %d: %v", redriven, before, err)
				}
			}
			again := h.Want()
			if ItemText(again) != fmt.Sprint("m", n) || again.Attempt != 1 {
				t.Errorf("redriven it comes as %+v", again)
			}
			if len(letters(false)) != 0 || len(letters(true)) != n+1 {
				t.Errorf("the dead letters are %v", letters(true))
			}
			h.Done(again)
			h.WantNothing(time.Minute)
			bystander.Done(bystander.Want())
			bystander.WantNothing(time.Second)
		}
		// One dies twice.
		p.Put("s", UserMessage("twice"))
		h.worker.Term(h.Want().ID, "first")
		w.Until("it is a dead letter", func() bool { return len(letters(false)) == 1 })
		id := letters(false)[0].GetId()
		for k := range 3 {
			_, _, err := w.Edge(0).Log.Redrive(ctx, "default", func(string) bool { return true }, []string{id})
			w.must(err)
			h.worker.Term(h.Want().ID, fmt.Sprint("again ", k))
			w.Until("it is a dead letter again", func() bool { l := letters(false); return len(l) == 1 && l[0].GetReason() == fmt.Sprint("again ", k) })
		}
		if _, _, err := w.Edge(0).Log.Redrive(ctx, "other", func(string) bool { return true }, []string{id}); schema.CodeOf(err) != schema.Code_CODE_WORK_NOT_FOUND {
			t.Errorf("another tenant's redrive: %v", err)
		}
		if _, _, err := w.Edge(0).Log.Redrive(ctx, "default", func(string) bool { return false }, []string{id}); schema.CodeOf(err) != schema.Code_CODE_WORK_NOT_FOUND {
			t.Errorf("a redrive without access: %v", err)
		}
	})
}

// TestI7_InOrder: a group that asks for it gets the items of a session in their order, each once the one before it is settled, on whichever edge; sessions do not wait for each other.
func TestI7_InOrder(t *testing.T) {
	Run(t, Config{}, func(w *World) {
		o := broker.WorkOptions{Group: "g", Credit: 10, Ordered: true, AckWait: 20 * time.Second, MaxDeliver: 100}
		a, b := w.JoinGroup(w.Edge(0), o), w.JoinGroup(w.Edge(1), o)
		p := w.Join(w.Edge(0), ProtoSocket, "s")
		for _, session := range []string{"s", "t"} {
			for i := range 6 {
				p.Put(session, UserMessage(fmt.Sprint(session, i)))
			}
		}
		at := map[string]int{}
		for at["s"]+at["t"] < 12 {
			var i *broker.Item
			h := a
			w.Until("something comes", func() bool {
				for _, h = range []*Hand{a, b} {
					if i = h.Try(0); i != nil {
						return true
					}
				}
				return false
			})
			session := i.Session.Name
			if want := fmt.Sprint(session, at[session]); ItemText(i) != want {
				t.Fatalf("%q comes where %q is next", ItemText(i), want)
			}
			// While it is in hand, nothing of its session comes.
			for _, x := range []*Hand{a, b} {
				if j := x.Try(2 * time.Second); j != nil {
					if j.Session == i.Session {
						t.Fatalf("%q comes while %q is in hand", ItemText(j), ItemText(i))
					}
					x.worker.Nack(j.ID, new(time.Second), "")
				}
			}
			switch {
			case i.Attempt == 1 && at[session] == 1:
				h.worker.Nack(i.ID, new(3*time.Second), "")
			case at[session] == 1:
				h.worker.Term(i.ID, "enough")
				at[session]++
			default:
				h.Done(i)
				at[session]++
			}
		}
	})
}

// TestI7_DoneWhileNATSIsAway: what was settled while the edge had no connection is settled, though NATS could not be told at once.
func TestI7_DoneWhileNATSIsAway(t *testing.T) {
	Run(t, Config{}, func(w *World) {
		p := w.Join(w.Edge(1), ProtoSocket, "s")
		p.Put("s", UserMessage("m"))
		h := w.JoinGroup(w.Edge(0), broker.WorkOptions{Group: "g", AckWait: 2 * time.Second, MaxDeliver: 1})
		i := h.Want()
		w.Edge(0).CutNATS()
		// It knows, and is not back yet.
		w.Sleep(time.Millisecond)
		h.Done(i)
		h.WantNothing(time.Minute)
		page, err := w.Edge(1).Log.DeadLetters(w.t.Context(), "default", broker.DeadQuery{Limit: 10})
		w.must(err)
		if len(page.Letters) > 0 {
			t.Errorf("what was settled is a dead letter: %v", page.Letters)
		}
	})
}
