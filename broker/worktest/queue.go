// Package worktest has work in memory, for tests of what hands it on: gateway, edges and clients.
package worktest

import (
	"cmp"
	"context"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"tidemark/broker"
	"tidemark/schema"
)

// Queue is work in memory, every rule in its plainest form: [broker.Queue] and [broker.RunKeeper] without a log. What is put in goes to the groups that are there. The zero value is empty.
//
// All methods may be called concurrently.
type Queue struct {
	// Refuse, where it is set and returns an error, is what Join says. Set it before the queue is used.
	Refuse func(o broker.WorkOptions) error

	mu     sync.Mutex // guards all below; never held while Wake is called
	groups map[groupName]*group
	dead   []*letter
	ids    uint64
	said   []string
	kept   map[keptRun]int
}

type groupName struct{ tenant, name string }

type keptRun struct {
	id  schema.SessionID
	run string
}

// group has items that wait, the oldest first, and its workers.
type group struct {
	o       broker.WorkOptions
	created time.Time
	waiting []*item
	workers []*worker
}

type item struct {
	broker.Item
	seq    uint64
	stored time.Time
	// resting until the time is over; in hand of a worker while holder is set, until the timer ends.
	resting bool
	holder  *worker
	taken   bool // by the worker's Take
	before  bool // it was cancelled before it was given to the worker
	timer   *time.Timer
}

type letter struct {
	tenant string
	*schema.DeadLetter
	of *item
}

// worker is a [broker.Taker].
type worker struct {
	q      *Queue
	g      *group
	credit int
	wake   func()
	in     []*item
	gone   []broker.Cancellation
	over   error
}

var (
	_ broker.Queue     = (*Queue)(nil)
	_ broker.RunKeeper = (*Queue)(nil)
	_ broker.Taker     = (*worker)(nil)
)

// Join implements [broker.Queue].
func (q *Queue) Join(_ context.Context, tenant string, o broker.WorkOptions) (broker.Taker, error) {
	if err := o.Check(); err != nil {
		return nil, err
	}
	if q.Refuse != nil {
		if err := q.Refuse(o); err != nil {
			return nil, err
		}
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	g := q.groups[groupName{tenant, o.Group}]
	fresh := g == nil
	if fresh {
		g = &group{o: broker.WorkOptions{Group: o.Group, Ordered: o.Ordered, AckWait: 30 * time.Second, MaxDeliver: 5, Kinds: schema.WorkKinds(), Sessions: []string{"*"}}, created: time.Now()}
	}
	if !fresh {
		for _, s := range g.o.Sessions {
			if err := o.May(s); err != nil {
				return nil, err
			}
		}
		if err := o.Widens(g.o.Kinds, g.o.Sessions); err != nil {
			return nil, err
		}
	}
	settings := g.o
	if len(o.Kinds) > 0 {
		settings.Kinds = o.Kinds
	}
	if len(o.Sessions) > 0 {
		settings.Sessions = o.Sessions
	}
	settings.AckWait = cmp.Or(o.AckWait, settings.AckWait)
	settings.MaxDeliver = cmp.Or(o.MaxDeliver, settings.MaxDeliver)
	if len(o.Backoff) > 0 {
		settings.Backoff = o.Backoff
	}
	for _, s := range settings.Sessions {
		if err := o.May(s); err != nil {
			return nil, err
		}
	}
	g.o = settings
	if fresh {
		if q.groups == nil {
			q.groups = map[groupName]*group{}
		}
		q.groups[groupName{tenant, o.Group}] = g
	}
	w := &worker{q: q, g: g, credit: max(o.Credit, 1), wake: o.Wake}
	g.workers = append(g.workers, w)
	g.deal()
	return w, nil
}

// Put makes work of an envelope, for every group that wants it, and returns how many do.
func (q *Queue) Put(id schema.SessionID, e *schema.Envelope) int {
	raw, err := proto.Marshal(e)
	if err != nil {
		panic(err) //nolint:forbidigo // a test's own envelope, which is valid
	}
	q.mu.Lock()
	var wakes []func()
	n := 0
	for name, g := range q.groups {
		if name.tenant != id.Tenant || !slices.Contains(g.o.Kinds, e.Kind()) || !slices.ContainsFunc(g.o.Sessions, func(p string) bool { return matches(p, id.Name) }) {
			continue
		}
		n++
		g.waiting = append(g.waiting, &item{Item: broker.Item{Session: id, Epoch: "E", Kind: e.Kind(), Envelope: raw}, seq: e.GetSeq(), stored: time.Now()})
		wakes = append(wakes, g.deal()...)
	}
	q.mu.Unlock()
	all(wakes)
	return n
}

// Cancel cancels the items of a session: those in hand hear of it, those that wait are handed out as cancelled.
func (q *Queue) Cancel(id schema.SessionID, seq uint64, reason string) {
	q.mu.Lock()
	var wakes []func()
	for _, g := range q.groups {
		for _, it := range g.waiting {
			if it.Session != id {
				continue
			}
			it.Cancelled = true
			if w := it.holder; w != nil {
				w.gone = append(w.gone, broker.Cancellation{ID: it.ID, Seq: seq, Reason: reason})
				wakes = append(wakes, w.wake)
			}
		}
	}
	q.mu.Unlock()
	all(wakes)
}

// End ends all workers of the tenant's group: what they take next is err.
func (q *Queue) End(tenant, name string, err error) {
	q.mu.Lock()
	var wakes []func()
	if g := q.groups[groupName{tenant, name}]; g != nil {
		for _, w := range g.workers {
			w.over = err
			wakes = append(wakes, w.wake)
		}
	}
	q.mu.Unlock()
	all(wakes)
}

// Said is what was said of items since it was asked last: "ack 3", "nack 3 5s: why", "in_progress 3", "term 3: why", "back 3", where 3 is the seq of the envelope.
func (q *Queue) Said() []string {
	q.mu.Lock()
	defer q.mu.Unlock()
	said := q.said
	q.said = nil
	return said
}

// Kept are the runs that are kept now, as "session/run".
func (q *Queue) Kept() []string {
	q.mu.Lock()
	defer q.mu.Unlock()
	var all []string
	for k := range q.kept {
		all = append(all, k.id.Name+"/"+k.run)
	}
	slices.Sort(all)
	return all
}

// KeepRun implements [broker.RunKeeper].
func (q *Queue) KeepRun(id schema.SessionID, run string) func() {
	k := keptRun{id, run}
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.kept == nil {
		q.kept = map[keptRun]int{}
	}
	q.kept[k]++
	return sync.OnceFunc(func() {
		q.mu.Lock()
		defer q.mu.Unlock()
		if q.kept[k]--; q.kept[k] == 0 {
			delete(q.kept, k)
		}
	})
}

// deal gives what waits to workers with room, and returns whom to wake. The caller holds the queue's mu.
func (g *group) deal() []func() {
	var wakes []func()
	for _, it := range g.waiting {
		if it.holder != nil || it.resting {
			continue
		}
		i := slices.IndexFunc(g.workers, func(w *worker) bool { return len(w.in) < w.credit && w.over == nil })
		if i < 0 {
			break
		}
		if g.o.Ordered && slices.ContainsFunc(g.waiting, func(other *item) bool {
			return other.Session == it.Session && other.seq < it.seq
		}) {
			continue
		}
		w := g.workers[i]
		w.q.ids++
		it.holder, it.taken, it.before, it.ID = w, false, it.Cancelled, w.q.ids
		it.Attempt++
		it.Deadline = time.Now().Add(g.o.AckWait)
		id := it.ID
		it.timer = time.AfterFunc(g.o.AckWait, func() {
			w.let(id, false, "late %", func(it *item) { w.q.back(g, it, nil, "nobody settled it in time") })
		})
		w.in = append(w.in, it)
		wakes = append(wakes, w.wake)
	}
	return wakes
}

// back gives an item back to its group, or gives it up. The caller holds mu.
func (q *Queue) back(g *group, it *item, delay *time.Duration, reason string) {
	if it.Attempt >= g.o.MaxDeliver {
		q.giveUp(g, it, reason)
		return
	}
	rest := time.Duration(0)
	if n := len(g.o.Backoff); n > 0 {
		rest = g.o.Backoff[min(it.Attempt, n)-1]
	}
	if delay != nil {
		rest = *delay
	}
	if rest == 0 {
		return
	}
	it.resting = true
	time.AfterFunc(rest, func() {
		q.mu.Lock()
		it.resting = false
		wakes := g.deal()
		q.mu.Unlock()
		all(wakes)
	})
}

// giveUp makes a dead letter of an item. The caller holds mu.
func (q *Queue) giveUp(g *group, it *item, reason string) {
	g.waiting = slices.DeleteFunc(g.waiting, func(of *item) bool { return of == it })
	e := new(schema.Envelope)
	_ = proto.Unmarshal(it.Envelope, e) // it was marshalled by Put
	q.dead = append(q.dead, &letter{it.Session.Tenant, &schema.DeadLetter{
		Id: strconv.Itoa(len(q.dead) + 1), Group: g.o.Group, Session: it.Session.Name, Epoch: it.Epoch, Seq: it.seq, Kind: it.Kind.String(), Attempts: uint32(it.Attempt), Reason: reason,
		Time: timestamppb.Now(), Envelope: e,
	}, it})
}

// Groups implements [broker.Queue].
func (q *Queue) Groups(_ context.Context, tenant string) ([]*schema.WorkGroup, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	var groups []*schema.WorkGroup
	for _, name := range slices.SortedFunc(maps.Keys(q.groups), func(a, b groupName) int { return cmp.Compare(a.name, b.name) }) {
		if name.tenant == tenant {
			groups = append(groups, q.groups[name].state())
		}
	}
	return groups, nil
}

// DeleteGroup implements [broker.Queue].
func (q *Queue) DeleteGroup(_ context.Context, tenant, group string, may func(string) error) error {
	q.mu.Lock()
	var wakes []func()
	// Deferred calls are made in the other order: after the unlock.
	defer func() { all(wakes) }()
	defer q.mu.Unlock()
	g := q.groups[groupName{tenant, group}]
	if g == nil {
		return schema.Refuse(schema.Code_CODE_WORK_NOT_FOUND, "There is no group %q.", group)
	}
	for _, s := range g.o.Sessions {
		if err := may(s); err != nil {
			return err
		}
	}
	delete(q.groups, groupName{tenant, group})
	g.waiting = nil
	for _, w := range g.workers {
		w.over = schema.Refuse(schema.Code_CODE_WORK_NOT_FOUND, "Group %q was deleted.", group)
		wakes = append(wakes, w.wake)
	}
	return nil
}

// Items implements [broker.Queue]. Without a group it lists what any group has not settled.
func (q *Queue) Items(_ context.Context, tenant string, in broker.ItemQuery) (broker.ItemPage, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if in.Group != "" && q.groups[groupName{tenant, in.Group}] == nil {
		return broker.ItemPage{}, schema.Refuse(schema.Code_CODE_WORK_NOT_FOUND, "There is no group %q.", in.Group)
	}
	var found []*schema.ListedWork
	for name, g := range q.groups {
		if name.tenant != tenant || in.Group != "" && name.name != in.Group {
			continue
		}
		for _, it := range g.waiting {
			if in.Session != "" && it.Session.Name != in.Session || in.May != nil && !in.May(it.Session.Name) {
				continue
			}
			l := &schema.ListedWork{Session: it.Session.Name, Epoch: it.Epoch, Seq: it.seq, Kind: it.Kind.String(), Stored: timestamppb.New(it.stored)}
			if in.Group != "" {
				l.State = schema.WorkItemState_WORK_ITEM_STATE_WAITING
				if it.Attempt > 0 {
					l.State = schema.WorkItemState_WORK_ITEM_STATE_HANDED_OUT
				}
			}
			found = append(found, l)
		}
	}
	items, next, err := page(found, in.Limit, in.Token)
	return broker.ItemPage{Items: items, Next: next}, err
}

// DeadLetters implements [broker.Queue].
func (q *Queue) DeadLetters(_ context.Context, tenant string, in broker.DeadQuery) (broker.DeadPage, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	var found []*schema.DeadLetter
	for _, l := range q.dead {
		switch {
		case l.tenant != tenant, in.May != nil && !in.May(l.GetSession()), in.Group != "" && l.GetGroup() != in.Group, in.Session != "" && l.GetSession() != in.Session:
		case in.ID != "" && l.GetId() != in.ID, in.ID == "" && !in.Redriven && l.GetRedriven() != nil:
		default:
			m, _ := proto.Clone(l.DeadLetter).(*schema.DeadLetter)
			if in.ID == "" {
				m.Envelope = nil
			}
			found = append(found, m)
		}
	}
	if in.ID != "" && len(found) == 0 {
		return broker.DeadPage{}, schema.Refuse(schema.Code_CODE_WORK_NOT_FOUND, "There is no dead letter %q.", in.ID)
	}
	letters, next, err := page(found, in.Limit, in.Token)
	return broker.DeadPage{Letters: letters, Next: next}, err
}

// Redrive implements [broker.Queue].
func (q *Queue) Redrive(_ context.Context, tenant string, may func(string) bool, ids []string) (redriven, before int, err error) {
	q.mu.Lock()
	var letters []*letter
	for _, id := range ids {
		i := slices.IndexFunc(q.dead, func(l *letter) bool {
			return l.tenant == tenant && l.GetId() == id && (may == nil || may(l.GetSession()))
		})
		if i < 0 {
			q.mu.Unlock()
			return 0, 0, schema.Refuse(schema.Code_CODE_WORK_NOT_FOUND, "There is no dead letter %q, so none of those named was redriven.", id)
		}
		letters = append(letters, q.dead[i])
	}
	var wakes []func()
	for _, l := range letters {
		if l.Redriven != nil {
			before++
			continue
		}
		redriven++
		l.Redriven = timestamppb.Now()
		g := q.groups[groupName{tenant, l.GetGroup()}]
		if g == nil {
			continue
		}
		l.of.Attempt = 0
		g.waiting = append(g.waiting, l.of)
		wakes = append(wakes, g.deal()...)
	}
	q.mu.Unlock()
	all(wakes)
	return redriven, before, nil
}

// page cuts a listing; a token is how many came before.
func page[T any](found []T, limit int, token string) ([]T, string, error) {
	from := 0
	if token != "" {
		n, err := strconv.Atoi(token)
		if err != nil || n < 0 || n > len(found) {
			return nil, "", schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "The page token is none that a listing gave.")
		}
		from = n
	}
	to := min(from+limit, len(found))
	if to < len(found) {
		return found[from:to], strconv.Itoa(to), nil
	}
	return found[from:to], "", nil
}

func matches(pattern, session string) bool {
	prefix, many := strings.CutSuffix(pattern, "*")
	return pattern == session || many && strings.HasPrefix(session, prefix)
}

func all(wakes []func()) {
	for _, wake := range wakes {
		if wake != nil {
			wake()
		}
	}
}
