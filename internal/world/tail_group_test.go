package world

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/protobuf/proto"

	"tidemark/schema"
)

// place is an envelope's.
type place struct {
	session string
	seq     uint64
}

// hold is a partition in a member's hands, as its stream told it.
type hold struct {
	prompt  bool              // the member acknowledges at once, so that it is told of a partition's end when it ends
	last    map[string]uint64 // by session: the seq that came last
	through uint64
	seen    []ackedBatch // what came
	acked   uint64       // through which it was acknowledged
}

type ackedBatch struct {
	through uint64
	places  []place
}

// analysts is a group under random members, and what it must be true of: envelopes of one session come in order while one member has the partition, what comes again begins behind what was acknowledged, and what
// was acknowledged and written down does not come again.
type analysts struct {
	w   *World
	rnd *rand.Rand
	js  jetstream.JetStream

	mu      sync.Mutex
	got     map[place]int
	done    map[place]bool   // somebody acknowledged it
	settled map[place]string // what must not come again, and why
	holds   map[*Tailer]map[uint32]*hold
	through map[string]uint64 // the checkpoints, by key, as they were last
	again   int
	fault   time.Time // when an edge was killed last, or cut off from NATS: a partition may be lost then, which looks like one that was handed over
}

func newAnalysts(w *World, seed uint64) *analysts {
	return &analysts{
		w: w, rnd: rand.New(rand.NewPCG(seed, 7)), js: w.jetStream(), got: map[place]int{}, done: map[place]bool{}, settled: map[place]string{}, holds: map[*Tailer]map[uint32]*hold{},
		through: map[string]uint64{},
	}
}

// join lets a member in, who acknowledges as mood says: 0 everything at once, 1 late, 2 every other batch, 3 nothing.
func (a *analysts) join(e *Edge, mood int) *Tailer {
	rnd := rand.New(rand.NewPCG(a.rnd.Uint64(), 1))
	a.mu.Lock()
	defer a.mu.Unlock()
	t := a.w.Tail(e, "", &schema.TailOpen{Group: "g"}, func(t *Tailer, r *schema.TailResponse) { a.see(t, r, mood, rnd) })
	a.holds[t] = map[uint32]*hold{}
	return t
}

// see checks what a member is told.
func (a *analysts) see(t *Tailer, r *schema.TailResponse, mood int, rnd *rand.Rand) {
	if mood == 1 {
		time.Sleep(time.Duration(rnd.IntN(300)) * time.Millisecond)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if as := r.GetAssigned(); as != nil {
		for p, h := range a.holds[t] {
			if !slices.Contains(as.GetPartitions(), p) {
				if h.prompt && time.Since(a.fault) > 20*time.Second {
					a.settle(h, h.acked, "handed over")
				}
				delete(a.holds[t], p)
			}
		}
		for _, p := range as.GetPartitions() {
			if a.holds[t][p] == nil {
				a.holds[t][p] = &hold{prompt: mood != 1, last: map[string]uint64{}}
			}
		}
		return
	}
	b := r.GetBatch()
	h := a.holds[t][b.GetPartition()]
	if h == nil {
		a.w.t.Errorf("a batch came of partition %d, which the member does not have", b.GetPartition())
		return
	}
	if b.GetThrough() <= h.through {
		a.w.t.Errorf("partition %d: a batch through %d came behind one through %d", b.GetPartition(), b.GetThrough(), h.through)
	}
	h.through = b.GetThrough()
	var places []place
	for _, f := range b.GetSessions() {
		for _, e := range f.GetEnvelopes() {
			at := place{f.GetSession(), e.GetSeq()}
			if last := h.last[at.session]; last != 0 && at.seq != last+1 {
				a.w.t.Errorf("session %s: seq %d came behind %d", at.session, at.seq, last)
			}
			h.last[at.session] = at.seq
			// Who reads late may have had it on the way since before.
			if why := a.settled[at]; why != "" && mood != 1 {
				a.w.t.Fatalf("session %s: seq %d was acknowledged and %s, and came again", at.session, at.seq, why)
			}
			if a.got[at]++; a.got[at] > 1 {
				a.again++
			}
			places = append(places, at)
		}
	}
	h.seen = append(h.seen, ackedBatch{b.GetThrough(), places})
	if mood == 3 || mood == 2 && len(h.seen)%2 == 1 {
		return
	}
	if t.Ack(b.GetPartition(), b.GetThrough()) == nil {
		h.acked = b.GetThrough()
		for _, seen := range h.seen {
			for _, at := range seen.places {
				a.done[at] = true
			}
		}
	}
}

// settle notes that what came in a hold up to there must not come again. Called with mu held.
func (a *analysts) settle(h *hold, through uint64, why string) {
	h.seen = slices.DeleteFunc(h.seen, func(b ackedBatch) bool {
		if b.through > through {
			return false
		}
		for _, at := range b.places {
			a.settled[at] = why
		}
		return true
	})
}

// failed notes a fault.
func (a *analysts) failed() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.fault = time.Now()
}

// watch settles what is written down by now, and looks at the checkpoints: none moves back, nor beyond what was acknowledged.
func (a *analysts) watch() {
	for key, record := range a.checkpoints() {
		if record.GetThrough() < a.through[key] {
			a.w.t.Errorf("the checkpoint %s moved back from %d to %d", key, a.through[key], record.GetThrough())
		}
		a.through[key] = record.GetThrough()
		var partition uint32
		_, err := fmt.Sscanf(key[strings.LastIndexByte(key, '.')+1:], "LOG_%d", &partition)
		a.w.must(err)
		a.mu.Lock()
		for _, holds := range a.holds {
			if h := holds[partition]; h != nil {
				a.settle(h, record.GetThrough(), "written down")
			}
		}
		a.mu.Unlock()
	}
}

// checkpoints are the group's records.
func (a *analysts) checkpoints() map[string]*schema.Projection {
	ctx := a.w.t.Context()
	kv, err := a.js.KeyValue(ctx, "TAILS")
	a.w.must(err)
	keys, err := kv.Keys(ctx)
	if err != nil {
		return nil
	}
	all := map[string]*schema.Projection{}
	for _, key := range keys {
		if strings.HasSuffix(key, ".start") {
			continue
		}
		e, err := kv.Get(ctx, key)
		a.w.must(err)
		record := new(schema.Projection)
		a.w.must(proto.Unmarshal(e.Value(), record))
		all[key] = record
	}
	return all
}

// members are those whose streams have not ended.
func (a *analysts) members() []*Tailer {
	a.mu.Lock()
	defer a.mu.Unlock()
	for t := range a.holds {
		if t.Gone() {
			delete(a.holds, t)
		}
	}
	all := slices.Collect(maps.Keys(a.holds))
	slices.SortFunc(all, func(x, y *Tailer) int { return strings.Compare(fmt.Sprintf("%p", x), fmt.Sprintf("%p", y)) })
	return all
}

// leave lets a member go in good order. What it acknowledged before is settled.
func (a *analysts) leave(t *Tailer) {
	end := t.Leave()
	a.mu.Lock()
	defer a.mu.Unlock()
	if end.Status == 0 && time.Since(a.fault) > 20*time.Second {
		for _, h := range a.holds[t] {
			if h.prompt {
				a.settle(h, h.acked, "given back")
			}
		}
	}
	delete(a.holds, t)
}

// TestTail_GroupsShareAndLoseNothing lets members join, leave, die and fall silent in random order, while writers publish to many sessions, and edges are killed. Every envelope comes to the group until it is acknowledged, and in order, what was acknowledged
// and written down not again, no checkpoint moves back, and when it is calm each member has its share.
func TestTail_GroupsShareAndLoseNothing(t *testing.T) {
	for _, seed := range seeds(3, 60) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			Run(t, Config{Edges: 3, Streams: 4}, func(w *World) {
				a := newAnalysts(w, seed)
				var writers []*Writer
				for i := range 8 {
					writers = append(writers, w.Write(fmt.Sprint("s", i), WriterOptions{Producer: "p"}))
				}
				a.join(w.Edge(0), 0)
				for step := range 60 {
					for range 1 + a.rnd.IntN(4) {
						i := a.rnd.IntN(len(writers))
						writers[i].SendEach(Tokens(fmt.Sprint(i, ".", step, "."), 1+a.rnd.IntN(200)))
					}
					members := a.members()
					switch n := a.rnd.IntN(12); {
					case n < 4 && len(members) < 6:
						a.join(w.Edge(a.rnd.IntN(3)), a.rnd.IntN(4))
					case n < 6 && len(members) > 0:
						a.leave(members[a.rnd.IntN(len(members))])
					case n == 6 && len(members) > 0:
						members[a.rnd.IntN(len(members))].Cut()
					case n == 7 && step%20 < 10:
						a.failed()
						w.RestartEdge(w.Edge(a.rnd.IntN(3)))
					case n == 8 && step%20 < 10:
						a.failed()
						w.Edge(a.rnd.IntN(3)).CutNATS()
					}
					w.Sleep(time.Duration(a.rnd.IntN(4000)) * time.Millisecond)
					a.watch()
				}
				for _, x := range writers {
					x.Flush()
				}
				for _, m := range a.members() {
					a.leave(m)
				}
				var calm []*Tailer
				for i := range 3 {
					calm = append(calm, a.join(w.Edge(i), 0))
				}
				share := func() (all []uint32) {
					for _, m := range calm {
						if n := len(m.Partitions()); n == 0 || n > 2 {
							return nil
						}
						all = append(all, m.Partitions()...)
					}
					slices.Sort(all)
					return all
				}
				w.Until("each has its share", func() bool { return slices.Equal(share(), []uint32{0, 1, 2, 3}) })
				total := 0
				for i := range writers {
					name := fmt.Sprint("s", i)
					head := uint64(len(w.Edge(0).WantStored(name, writers[i])))
					total += int(head)
					w.Until("all of "+name+" was delivered, until it was acknowledged", func() bool {
						a.mu.Lock()
						defer a.mu.Unlock()
						for seq := uint64(1); seq <= head; seq++ {
							if !a.done[place{name, seq}] {
								return false
							}
						}
						return true
					})
				}
				w.Sleep(3 * time.Second)
				a.watch()
				for key, record := range a.checkpoints() {
					stream := key[strings.LastIndexByte(key, '.')+1:]
					s, err := a.js.Stream(w.t.Context(), stream)
					w.must(err)
					if last := s.CachedInfo().State.LastSeq; record.GetThrough() != last {
						t.Errorf("everything was acknowledged, and the checkpoint of %s is %d of %d", stream, record.GetThrough(), last)
					}
				}
				a.mu.Lock()
				defer a.mu.Unlock()
				t.Logf("%d envelopes, %d of them came again", total, a.again)
				if len(a.settled) < total/4 {
					t.Errorf("only %d of %d envelopes were settled; the test shows little", len(a.settled), total)
				}
			})
		})
	}
}
