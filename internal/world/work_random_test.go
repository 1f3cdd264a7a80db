package world

import (
	"context"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"tidemark/broker"
)

// crew is the workers of one group, and what the test knows of its items.
type crew struct {
	w      *World
	r      *rand.Rand
	o      broker.WorkOptions
	hands  []*Hand
	inHand map[*Hand][]*broker.Item
	acked  map[string]int
	termed map[string]bool
	handed map[string]int
	// lossy: what was said may not have been heard, so that what was settled may come again.
	lossy bool
}

func (c *crew) join(e *Edge) {
	h := c.w.JoinGroup(e, c.o)
	c.hands = append(c.hands, h)
}

func (c *crew) leave(i int, killed bool) {
	h := c.hands[i]
	c.hands = append(c.hands[:i:i], c.hands[i+1:]...)
	delete(c.inHand, h)
	if !killed {
		h.Close()
	}
}

// take lets every worker see what it is handed.
func (c *crew) take() {
	for _, h := range c.hands {
		for {
			i := h.Try(0)
			if i == nil {
				break
			}
			c.check(h, i)
			c.inHand[h] = append(c.inHand[h], i)
			c.handed[ItemText(i)]++
		}
	}
}

// check says what must hold whenever an item is handed out.
func (c *crew) check(h *Hand, i *broker.Item) {
	t, text := c.w.t, ItemText(i)
	n := 0
	for _, j := range c.inHand[h] {
		if time.Now().Before(j.Deadline) {
			n++
		}
	}
	if n >= c.o.Credit && !c.lossy {
		t.Errorf("a worker holds %d items and is handed another", n)
	}
	if i.Attempt > c.o.MaxDeliver {
		t.Errorf("%s is handed out a %d. time", text, i.Attempt)
	}
	if !c.lossy && (c.acked[text] > 0 || c.termed[text]) {
		t.Errorf("%s is handed out again after it was settled", text)
	}
	if !c.o.Ordered || c.lossy {
		return
	}
	for _, x := range c.hands {
		for _, j := range c.inHand[x] {
			if j.Session == i.Session && time.Now().Before(j.Deadline) {
				t.Errorf("%s is handed out while %s is in hand", text, ItemText(j))
			}
		}
	}
}

// act does something with an item that some worker holds.
func (c *crew) act() {
	for _, h := range c.hands {
		items := c.inHand[h]
		if len(items) == 0 || c.r.IntN(3) == 0 {
			continue
		}
		k := c.r.IntN(len(items))
		i := items[k]
		text := ItemText(i)
		drop := func() { c.inHand[h] = append(items[:k:k], items[k+1:]...) }
		switch c.r.IntN(10) {
		case 0:
			h.worker.Nack(i.ID, nil, "not now")
			drop()
		case 1:
			h.worker.Nack(i.ID, new(time.Duration(c.r.IntN(3000))*time.Millisecond), "later")
			drop()
		case 2:
			if c.r.IntN(4) == 0 {
				if h.worker.Term(i.ID, "never") {
					c.termed[text] = true
				}
				drop()
			}
		case 3:
			if deadline, held := h.worker.InProgress(i.ID); held {
				i.Deadline = deadline
			}
		case 4:
			// It hangs. The item goes elsewhere when its time is over.
			if time.Now().After(i.Deadline) {
				drop()
			}
		default:
			if h.worker.Ack(i.ID) {
				c.acked[text]++
			}
			drop()
		}
	}
}

// TestI7_RandomWorkers: workers on several edges take items, settle them, give them back, hang, leave and die; edges, brokers and NATS die beside them. Every item is acknowledged or a dead letter in the end, of which its session was told
// once. As long as nothing dies, nothing that was settled comes again, and ordered groups keep the order.
func TestI7_RandomWorkers(t *testing.T) {
	for _, seed := range seeds(4, 60) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			Run(t, Config{Latency: 200 * time.Microsecond}, func(w *World) { randomWorkers(w, seed) })
		})
	}
}

func randomWorkers(w *World, seed uint64) {
	t := w.t
	r := rand.New(rand.NewPCG(seed, 7))
	deadly := seed%2 == 1
	var crews []*crew
	for n := range 2 {
		crews = append(crews, &crew{
			w: w, r: r, inHand: map[*Hand][]*broker.Item{}, acked: map[string]int{}, termed: map[string]bool{}, handed: map[string]int{},
			o: broker.WorkOptions{
				Group: fmt.Sprint("g", n), Credit: 1 + r.IntN(4), AckWait: time.Duration(1+r.IntN(4)) * time.Second, MaxDeliver: 1 + r.IntN(5), Ordered: n == 1,
				Backoff: []time.Duration{time.Duration(r.IntN(500)) * time.Millisecond},
			},
		})
	}
	x := w.Write("s0", WriterOptions{})
	y := w.Write("s1", WriterOptions{Ways: []Way{GRPC}})
	sent := 0
	for range 150 {
		if r.IntN(2) == 0 {
			sent++
			p := []*Writer{x, y}[r.IntN(2)]
			p.Send(UserMessage(fmt.Sprint("m", sent)))
		}
		for _, c := range crews {
			if len(c.hands) < 3 && r.IntN(6) == 0 {
				c.join(w.edges[r.IntN(len(w.edges))])
			}
			if len(c.hands) > 0 && r.IntN(15) == 0 {
				c.leave(r.IntN(len(c.hands)), false)
			}
			c.take()
			c.act()
		}
		if deadly && r.IntN(25) == 0 {
			for _, c := range crews {
				c.lossy = true
			}
			switch r.IntN(4) {
			case 0:
				w.KillBroker()
				w.StartBroker()
			case 1:
				e := w.edges[r.IntN(len(w.edges))]
				for _, c := range crews {
					for i := len(c.hands) - 1; i >= 0; i-- {
						if c.hands[i].edge == e {
							c.leave(i, true)
						}
					}
				}
				w.RestartEdge(e)
			case 2:
				w.CrashNATS()
			default:
				w.edges[r.IntN(len(w.edges))].CutNATS()
			}
		}
		w.Sleep(time.Duration(r.IntN(400)) * time.Millisecond)
	}
	x.Flush()
	y.Flush()
	for _, c := range crews {
		for i := len(c.hands) - 1; i >= 0; i-- {
			c.leave(i, false)
		}
		h := w.JoinGroup(w.edges[0], broker.WorkOptions{Group: c.o.Group, Credit: 50})
		for {
			i := h.Try(2 * time.Minute)
			if i == nil {
				break
			}
			if h.worker.Ack(i.ID) {
				c.acked[ItemText(i)]++
			}
		}
		h.Close()
	}
	told := map[string]int{}
	for _, session := range []string{"s0", "s1"} {
		for _, v := range w.edges[0].Stored(session) {
			if f := v.GetWorkFailed(); f != nil {
				told[fmt.Sprint(f.GetGroup(), session, v.GetReplyTo())]++
			}
		}
	}
	for _, c := range crews {
		page, err := w.edges[0].Log.DeadLetters(context.Background(), "default", broker.DeadQuery{Group: c.o.Group, Limit: 1000})
		w.must(err)
		dead := map[string]bool{}
		for _, l := range page.Letters {
			key := fmt.Sprint(c.o.Group, l.GetSession(), l.GetSeq())
			if told[key] != 1 {
				t.Errorf("the session was told %d times of %s", told[key], key)
			}
			delete(told, key)
			one, err := w.edges[0].Log.DeadLetters(context.Background(), "default", broker.DeadQuery{ID: l.GetId(), Limit: 1})
			w.must(err)
			dead[Text(one.Letters[0].GetEnvelope())] = true
		}
		for n := range sent {
			if m := fmt.Sprint("m", n+1); c.acked[m] == 0 && !dead[m] {
				t.Errorf("group %s: %s was neither acknowledged nor given up; it was handed out %d times", c.o.Group, m, c.handed[m])
			}
		}
		if !deadly {
			for m := range c.termed {
				if !dead[m] {
					t.Errorf("group %s: %s was given up and is no dead letter", c.o.Group, m)
				}
			}
		}
		groups, err := w.edges[0].Log.Groups(context.Background(), "default")
		w.must(err)
		for _, g := range groups {
			if g.GetWaiting() != 0 || g.GetInHand() != 0 {
				t.Errorf("group %s has %d items waiting and %d in hand", g.GetGroup(), g.GetWaiting(), g.GetInHand())
			}
		}
		t.Logf("group %s, ordered %v: %d items, %d acknowledged, %d dead letters", c.o.Group, c.o.Ordered, sent, len(c.acked), len(dead))
	}
	for key, n := range told {
		t.Errorf("a session was told %d times of %s, which is no dead letter", n, key)
	}
}
