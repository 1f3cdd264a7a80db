package broker

import (
	"container/heap"
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"

	"tidemark/schema"
)

// watchdog sees to it that every run ends (I10; docs/adr/0009). Beside each projector that holds a log stream it watches the stream's sessions with a run under way, fed with their states as they are folded:
//
//   - A run that an agent was with, and that has had neither a lease (see [RunKeeper]) nor a word of an agent or a worker for so long, gets its end: an error orphaned, and run_status failed. Not while it waits for an answer: people
//     take days. Not where nobody has taken it up: its start_run is a work item that waits.
//   - A question past its deadline gets its default answer.
//
// Exactly once: the verdict is stored only on top of the very envelope that was the session's last when it was reached, and the answer only while its question is open; both are decided under the session's fence, whoever asks. So it
// does not matter how many watchdogs there are, how long ago they reached their verdict, or how often they say it.
//
// All that it knows is in memory. One that begins, or was frozen, or has lost sight of the leases, counts absences from then on: they may come out longer, never shorter.
type watchdog struct {
	// Static after construction.
	r           *reader
	js          jetstream.JetStream
	notary      *notary
	orphanAfter time.Duration
	logger      *slog.Logger
	metrics     *watchdogMetrics
	// wake holds a token: there may be something due earlier.
	wake chan struct{}

	mu     sync.Mutex // guards all below
	wards  map[schema.SessionID]*ward
	queue  watchQueue
	leases runLeases
	// since is from when an absence counts; zero while the leases are not known.
	since time.Time
	// looked is when it last looked what is due; busy counts what it is about to say.
	looked time.Time
	busy   int
}

// Bounds of the watchdog.
const (
	// lookEvery is how often it looks at least, by which it notices that it was frozen: after frozenFor without a look.
	lookEvery = time.Second
	frozenFor = 5 * lookEvery
	// leaseGrace is how long edges are given to write their leases again where NATS may have lost them.
	leaseGrace = edgeLeaseTTL
	// maxVerdicts bounds what it says at once, and verdictWithin how long it tries before it looks anew whether it still holds.
	maxVerdicts   = 16
	verdictWithin = 10 * time.Second
	// verdictAgain is when it is tried again, longer each time up to maxVerdictAgain.
	verdictAgain    = time.Second
	maxVerdictAgain = 30 * time.Second
)

// post is the watch over one log stream, while the stream's projector holds it. nil watches nothing. Its methods may be called concurrently.
type post struct {
	// Static after construction.
	d      *watchdog
	stream string
	// hold is the projector's on the stream.
	hold holding

	// Guarded by watchdog.mu. over holds, while the registry is being read, the sessions of which the projector has said since that nothing is to be watched; nil afterwards.
	over map[schema.SessionID]bool
	left bool
}

// holding says whether the stream may be somebody else's by now. It does not wait: whoever holds the stream renews that by itself.
type holding interface{ stale() bool }

// ward is a session with a run under way. Guarded by watchdog.mu.
type ward struct {
	id   schema.SessionID
	post *post
	// head is the seq of the envelope up to which the session is known.
	head        uint64
	run         string
	orphanAfter time.Duration
	// attended: an agent was with the run.
	attended bool
	// prompt is the seq of the open question, deadline when it is answered by default; zero where none is, or never.
	prompt   uint64
	deadline time.Time
	// heard is when an agent or a worker last said something, or since when the run is watched, whatever was last. leased: it has a lease; gone is when it was seen to have none any more.
	heard, gone time.Time
	leased      bool
	// notBefore is when it is looked at again where something was said, or could not be, after tries attempts; void where the session has moved on since.
	notBefore time.Time
	tries     int
	// givenUp is the question that does not take its default answer.
	givenUp uint64
	// speaking: something is being said about it.
	speaking bool

	// at is when it is looked at, at the latest; index is its place in the queue, -1 where it is in none.
	at    time.Time
	index int
}

func newWatchdog(r *reader, js jetstream.JetStream, n *notary, orphanAfter time.Duration, m *watchdogMetrics, logger *slog.Logger) *watchdog {
	return &watchdog{
		r: r, js: js, notary: n, orphanAfter: orphanAfter, metrics: m, logger: logger, wake: make(chan struct{}, 1), wards: map[schema.SessionID]*ward{}, leases: newRunLeases(),
	}
}

// post begins the watch over a stream, whose projector has just taken it over. learn must be called for it, leave at its end.
func (d *watchdog) post(stream string, h holding) *post {
	if d == nil {
		return nil
	}
	return &post{d: d, stream: stream, hold: h, over: map[schema.SessionID]bool{}}
}

// leave ends the watch: the stream is somebody else's now, or nobody's.
func (p *post) leave() {
	if p == nil {
		return
	}
	p.d.mu.Lock()
	defer p.d.mu.Unlock()
	p.left = true
	for _, w := range p.d.wards {
		if w.post == p {
			p.d.drop(w)
		}
	}
}

// saw takes in where a session stands, behind frames that were just folded. heard: an agent or a worker said something in them.
func (p *post) saw(id schema.SessionID, st *state, heard bool, now time.Time) {
	if p == nil {
		return
	}
	p.d.mu.Lock()
	defer p.d.mu.Unlock()
	p.d.see(p, id, st, heard, now)
}

// forget ends the watch over a session that was deleted, or that retention took.
func (p *post) forget(id schema.SessionID) {
	if p == nil {
		return
	}
	p.d.mu.Lock()
	defer p.d.mu.Unlock()
	p.d.see(p, id, newState(), false, time.Time{})
}

// see is saw with mu held.
func (d *watchdog) see(p *post, id schema.SessionID, st *state, heard bool, now time.Time) {
	w := d.wards[id]
	if !st.under() {
		if w != nil {
			d.drop(w)
		}
		if p.over != nil {
			p.over[id] = true
		}
		return
	}
	if p.left {
		return
	}
	if w == nil {
		w = &ward{id: id, post: p, run: st.run, heard: now, index: -1}
		d.wards[id] = w
		d.metrics.watched.WithLabelValues(p.stream).Inc()
	}
	delete(p.over, id)
	if another := w.run != st.run; heard || another || w.prompt != 0 && st.prompt == 0 {
		w.heard = now
		w.attended = w.attended && !another
	}
	if st.head != w.head {
		w.notBefore, w.tries = time.Time{}, 0
	}
	w.head, w.run, w.prompt, w.deadline = st.head, st.run, st.prompt, st.deadline
	w.attended = w.attended || st.about.attended
	if w.orphanAfter = d.orphanAfter; st.about.orphanAfter > 0 {
		w.orphanAfter = st.about.orphanAfter
	}
	d.lookAtLease(w, now)
}

// lookAtLease takes in whether the run has a lease. Called with mu held.
func (d *watchdog) lookAtLease(w *ward, now time.Time) {
	leased := d.leases.has(w.id, w.run)
	if w.leased && !leased {
		w.gone = now
	}
	w.leased = leased
	w.attended = w.attended || leased
	d.schedule(w)
}

// due is when something is to be said about the session; false where nothing is.
func (d *watchdog) due(w *ward) (at time.Time, ok bool) {
	switch {
	case w.speaking:
		return at, false
	case w.prompt != 0:
		at = w.deadline
		ok = !at.IsZero() && w.prompt != w.givenUp
	case w.attended && !w.leased && !d.since.IsZero():
		at = latest(w.heard, w.gone, d.since).Add(w.orphanAfter)
		ok = true
	}
	return latest(at, w.notBefore), ok
}

func latest(times ...time.Time) time.Time {
	last := times[0]
	for _, t := range times[1:] {
		if t.After(last) {
			last = t
		}
	}
	return last
}

// schedule sees to it that the session is looked at in time. One that is due later than it was is looked at too early, which costs less than to move it with every word. Called with mu held.
func (d *watchdog) schedule(w *ward) {
	at, ok := d.due(w)
	switch {
	case !ok, w.index >= 0 && !at.Before(w.at):
		return
	case w.index >= 0:
		w.at = at
		heap.Fix(&d.queue, w.index)
	default:
		w.at = at
		heap.Push(&d.queue, w)
	}
	if w.index == 0 {
		signal(d.wake)
	}
}

// drop ends the watch over a session. Called with mu held.
func (d *watchdog) drop(w *ward) {
	if w.index >= 0 {
		heap.Remove(&d.queue, w.index)
	}
	delete(d.wards, w.id)
	d.metrics.watched.WithLabelValues(w.post.stream).Dec()
}

// run says what is due, until ctx ends.
func (d *watchdog) run(ctx context.Context) {
	var speaking sync.WaitGroup
	defer speaking.Wait()
	for {
		due, wait := d.look(time.Now())
		for _, v := range due {
			speaking.Go(func() { d.say(ctx, v) })
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-d.wake:
			t.Stop()
		case <-ctx.Done():
			t.Stop()
			return
		}
	}
}

// look takes what is due out of the queue, and says how long there is nothing more to do.
func (d *watchdog) look(now time.Time) (due []verdict, wait time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.looked.IsZero() && now.Sub(d.looked) > frozenFor && !d.since.IsZero() {
		d.logger.Warn("the watchdog did not run for a while; the absences of agents count from now on", "for", now.Sub(d.looked))
		d.since = latest(d.since, now.Add(leaseGrace))
	}
	d.looked = now
	for len(d.queue) > 0 && d.busy < maxVerdicts {
		w := d.queue[0]
		if w.at.After(now) {
			break
		}
		heap.Pop(&d.queue)
		at, ok := d.due(w)
		if !ok || at.After(now) {
			d.schedule(w)
			continue
		}
		w.speaking = true
		d.busy++
		due = append(due, verdict{w: w, id: w.id, post: w.post, head: w.head, run: w.run, prompt: w.prompt, after: w.orphanAfter})
	}
	if wait = lookEvery; len(d.queue) > 0 && d.busy < maxVerdicts {
		wait = min(wait, max(d.queue[0].at.Sub(now), time.Millisecond))
	}
	return due, wait
}

// forgetLeases notes that it is not known which runs have an agent.
func (d *watchdog) forgetLeases() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.leases, d.since = newRunLeases(), time.Time{}
}

// knowLeases notes that all leases are known now, as far as they have been written.
func (d *watchdog) knowLeases() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.since.IsZero() {
		return
	}
	now := time.Now()
	d.since = now.Add(leaseGrace)
	for _, w := range d.wards {
		d.lookAtLease(w, now)
	}
	d.metrics.leases.Set(float64(len(d.leases.runs)))
}

// takeLease takes in a key of the bucket.
func (d *watchdog) takeLease(key string, m *stored) {
	d.mu.Lock()
	defer d.mu.Unlock()
	changed, err := d.leases.take(key, m)
	if err != nil {
		d.logger.Warn("a key of the bucket is passed over", "bucket", presenceBucket, "key", key, "error", err)
		return
	}
	if d.since.IsZero() {
		return
	}
	now := time.Now()
	for _, id := range changed {
		if w := d.wards[id]; w != nil {
			d.lookAtLease(w, now)
		}
	}
	d.metrics.leases.Set(float64(len(d.leases.runs)))
}

// watchQueue has the wards in the order in which they are to be looked at: a heap.
type watchQueue []*ward

func (q watchQueue) Len() int           { return len(q) }
func (q watchQueue) Less(i, j int) bool { return q[i].at.Before(q[j].at) }
func (q watchQueue) Swap(i, j int) {
	q[i], q[j] = q[j], q[i]
	q[i].index, q[j].index = i, j
}

// Push implements [heap.Interface].
func (q *watchQueue) Push(x any) {
	w := x.(*ward) //nolint:errcheck,forcetypeassert // the queue holds nothing else
	w.index = len(*q)
	*q = append(*q, w)
}

// Pop implements [heap.Interface].
func (q *watchQueue) Pop() any {
	old := *q
	w := old[len(old)-1]
	old[len(old)-1] = nil
	*q = old[:len(old)-1]
	w.index = -1
	return w
}

// watchdogMetrics are the watchdog's, as Prometheus counts them.
type watchdogMetrics struct {
	watched  *prometheus.GaugeVec
	verdicts *prometheus.CounterVec
	leases   prometheus.Gauge
}

func newWatchdogMetrics(r prometheus.Registerer) *watchdogMetrics {
	opts := func(name, help string) prometheus.Opts {
		return prometheus.Opts{Namespace: "tidemark", Subsystem: "watchdog", Name: name, Help: help}
	}
	m := &watchdogMetrics{
		watched:  prometheus.NewGaugeVec(prometheus.GaugeOpts(opts("sessions", "Sessions with a run under way that this process watches.")), []string{"stream"}),
		verdicts: prometheus.NewCounterVec(prometheus.CounterOpts(opts("verdicts_total", "What this process said for want of anybody else: orphaned, of a run whose agent disappeared; deadline, the default answer to a question.")), []string{"verdict"}),
		leases:   prometheus.NewGauge(prometheus.GaugeOpts(opts("leases", "Runs that have an agent, over all edges."))),
	}
	if r != nil {
		r.MustRegister(m.watched, m.verdicts, m.leases)
	}
	return m
}
