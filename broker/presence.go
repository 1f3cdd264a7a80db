package broker

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/prometheus/client_golang/prometheus"

	"tidemark/schema"
)

// Bounds of presence.
const (
	// enterWithin is how long Enter waits for NATS before it refuses as unavailable.
	enterWithin = 3 * time.Second
	// edgeLeaseTTL is how long an edge that says nothing more keeps its seats. The server counts it, in whole seconds; no clocks are compared.
	edgeLeaseTTL = 10 * time.Second
	// edgeBeatEvery leaves room for two beats that fail.
	edgeBeatEvery = 3 * time.Second
	// edgeBeatAgain is when a beat that failed is tried again.
	edgeBeatAgain = 500 * time.Millisecond
	// seatsTTL is how long a record of seats stays that nobody writes any more, such as one of an edge that died and of a user who never came back. Whoever has seats in it writes it again after
	// seatsRefresh.
	seatsTTL     = 10 * time.Minute
	seatsRefresh = seatsTTL / 3
	// maxTidying bounds the records that an edge writes at once because users left, or because all have to be written again.
	maxTidying = 16
)

// party is whose seats are counted together: a user of a session, or the agents of a run of it.
type party struct {
	session schema.SessionID
	// name is the user's subject, or the run's name; a run may have none.
	name string
	run  bool
}

// key is the party's in the bucket PRESENCE.
func (u party) key() string {
	kind, name := "user.", schema.EscapeToken(u.name)
	if u.run {
		kind = runKeys
	}
	if name == "" {
		name = noName
	}
	return kind + schema.EscapeToken(u.session.Tenant) + "." + schema.EscapeToken(u.session.Name) + "." + name
}

func tooManyConnections(u party, limit int) error {
	return schema.Refuse(schema.Code_CODE_TOO_MANY_CONNECTIONS,
		"The user has %d connections to session %s, as many as are allowed; close one of them, then try again.", limit, u.session)
}

// presence counts users' connections to sessions over all edges: each takes one of the user's seats in the session. And it says which runs have an agent: each connection that keeps a run takes a seat in it, of any
// number (I10); who counts those is the broker's watchdog. What is said of a user, or of a run, is one record in the bucket PRESENCE with the number of seats on each edge; it is written with compare-and-swap on top of
// what was read, so that of two edges that want the last seat one gets it. An edge's part of it counts while the edge's lease is there, which it writes every edgeBeatEvery and which the server
// removes edgeLeaseTTL after the last time.
//
// The bucket is in memory: it says who is connected now. When it is lost, or the edge's lease is because the edge was frozen, the edge writes its lease and all its seats again, whatever limits say.
//
// What an edge holds here is one of `seats` for each user and session that is connected to it, and for each run that is kept through it, so the bounds are those of its connections.
type presence struct {
	// Static after construction.
	log     *JetStreamLog
	logger  *slog.Logger
	holder  string // this process's life, in the bucket's words
	metrics *presenceMetrics
	// beatNow and tidyNow hold one token each: there is something to do.
	beatNow, tidyNow chan struct{}
	// beating is held by who writes or removes the edge's lease; beat, the revision of its last, and beats, how the writing goes, are theirs.
	beating chan struct{}
	beat    uint64
	beats   series
	// tidying is how the writing of records goes. It is tidyAll's.
	tidying series

	mu    sync.Mutex // guards all below
	seats map[party]*seats
	// dirty are those whose records may not say what is held.
	dirty map[*seats]bool
	state leaseState
	// lost counts how often the lease was, and with it maybe the bucket.
	lost   int
	closed bool
}

// leaseState is what an edge knows of its lease.
type leaseState int

const (
	// leaseUnknown: it was not written yet, or may have run out.
	leaseUnknown leaseState = iota
	// leaseHeld: it was there at the last beat.
	leaseHeld
	// leaseNoBucket: the deployment has no bucket PRESENCE, because its broker is of an older version, or because NATS has just lost what it had in memory. Seats are counted on this edge alone.
	leaseNoBucket
)

// seats are one party's seats, as far as this edge has them.
type seats struct {
	party party
	// turn is held by who reads and writes the party's record; record is theirs.
	turn   chan struct{}
	record seatsRecord

	// Guarded by presence.mu.
	held    int       // connections here
	refs    int       // who has them in hand
	written time.Time // the record was last
}

func newPresence(l *JetStreamLog) *presence {
	return &presence{
		beats:   series{logger: l.logger, what: "this edge's lease", meanwhile: "users may be refused as unavailable"},
		tidying: series{logger: l.logger, what: "the connections of users to this edge", meanwhile: "other edges count them as they were"},
		log:     l, logger: l.logger, holder: newHolder(l.edge), metrics: newPresenceMetrics(l.cfg.Metrics), seats: map[party]*seats{}, dirty: map[*seats]bool{},
		beatNow: make(chan struct{}, 1), tidyNow: make(chan struct{}, 1), beating: make(chan struct{}, 1),
	}
}

// Enter implements [Log].
func (l *JetStreamLog) Enter(ctx context.Context, id schema.SessionID, subject string, limit int) (func(), error) {
	if limit <= 0 {
		return func() {}, nil
	}
	held, cancel := context.WithTimeout(ctx, enterWithin)
	defer cancel()
	leave, err := l.presence.enter(held, party{session: id, name: subject}, limit)
	switch {
	case err == nil:
		return leave, nil
	case ctx.Err() != nil:
		return nil, ctx.Err()
	case schema.CodeOf(err) == schema.Code_CODE_TOO_MANY_CONNECTIONS, schema.CodeOf(err) == schema.Code_CODE_GOING_AWAY:
		return nil, err
	}
	r := schema.Refuse(schema.Code_CODE_UNAVAILABLE, "How many connections the user has to session %s cannot be told just now; try again in a moment.", id)
	r.Err = err
	return nil, r
}

// enter takes a seat, in at most as long as ctx lasts. An error other than too_many_connections and going_away says why it is not known whether there is one.
func (p *presence) enter(ctx context.Context, u party, limit int) (leave func(), err error) {
	s := p.take(u)
	if s == nil {
		return nil, schema.Refuse(schema.Code_CODE_GOING_AWAY, "This edge is stopping; connect to session %s through another.", u.session)
	}
	defer p.drop(s)
	select {
	case s.turn <- struct{}{}:
		defer func() { <-s.turn }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	n := p.heldBy(s)
	if n >= limit {
		return nil, tooManyConnections(u, limit)
	}
	// Who leaves from here on makes the seats dirty, and they are written once more.
	err = p.whileLeased(ctx, func() error { return p.write(ctx, s, n+1, limit) })
	switch {
	case errors.Is(err, errNoBucket):
		// Counted here only.
	case schema.CodeOf(err) == schema.Code_CODE_TOO_MANY_CONNECTIONS:
		return nil, err
	case err != nil:
		// The record may have been written for all that.
		p.soil(s)
		return nil, err
	}
	p.add(s, 1)
	return p.leaving(s), nil
}

// leaving gives a seat back, once.
func (p *presence) leaving(s *seats) func() {
	return sync.OnceFunc(func() {
		p.add(s, -1)
		p.soil(s)
		signal(p.tidyNow)
	})
}

// KeepRun implements [RunKeeper]. While the edge has no lease, or NATS is away, the run is written as soon as it has; until then the watchdog does not know of it.
func (l *JetStreamLog) KeepRun(id schema.SessionID, run string) (release func()) {
	p := l.presence
	s := p.take(party{session: id, name: run, run: true})
	if s == nil {
		return func() {}
	}
	defer p.drop(s)
	p.add(s, 1)
	p.soil(s)
	signal(p.tidyNow)
	return p.leaving(s)
}

// take finds a party's seats, or makes them, and keeps them until they are dropped; nil once the log is closed.
func (p *presence) take(u party) *seats {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil
	}
	s := p.seats[u]
	if s == nil {
		s = &seats{party: u, turn: make(chan struct{}, 1)}
		p.seats[u] = s
	}
	s.refs++
	return s
}

// drop is the end of a take. Seats of which nothing is left to say are forgotten.
func (p *presence) drop(s *seats) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if s.refs--; s.refs == 0 && s.held == 0 && !p.dirty[s] {
		delete(p.seats, s.party)
	}
}

func (p *presence) heldBy(s *seats) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return s.held
}

func (p *presence) add(s *seats, n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	s.held += n
	if s.party.run {
		p.metrics.runs.Add(float64(n))
	} else {
		p.metrics.seats.Add(float64(n))
	}
}

// soil marks seats whose record has to be written. They stay until that is done.
func (p *presence) soil(s *seats) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.dirty[s] = true
}

// whileLeased calls fn while the edge has its lease, which at first is for it to wait for. The error is errNoBucket where there is nothing to have a lease in, or fn's.
func (p *presence) whileLeased(ctx context.Context, fn func() error) error {
	var retry backoff
	for {
		p.mu.Lock()
		state := p.state
		p.mu.Unlock()
		switch state {
		case leaseHeld:
			err := fn()
			if errors.Is(err, errNoBucket) {
				p.lose(leaseNoBucket)
				signal(p.beatNow)
			}
			return err
		case leaseNoBucket:
			return errNoBucket
		case leaseUnknown:
		}
		if !retry.wait(ctx, errNotStored) {
			return ctx.Err()
		}
	}
}

// lose notes that the lease is not there. What was read of the bucket's records is void.
func (p *presence) lose(state leaseState) {
	p.mu.Lock()
	noBucket := state == leaseNoBucket && p.state != leaseNoBucket && !p.closed
	if p.state == leaseHeld {
		p.metrics.leasesLost.Inc()
	}
	p.lost++
	p.state = state
	p.mu.Unlock()
	if noBucket {
		p.logger.Warn("the deployment has no bucket for the presence of users; until a broker makes it, their connections are counted on each edge by itself", "bucket", presenceBucket)
	}
}

// run keeps the lease and the records until ctx ends.
func (p *presence) run(ctx context.Context) {
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { p.tidyAll(ctx) })
	for {
		pause := edgeBeatEvery
		if err := p.beatOnce(ctx); err != nil {
			pause = edgeBeatAgain
		}
		p.soilOld(time.Now().Add(-seatsRefresh))
		t := time.NewTimer(pause)
		select {
		case <-t.C:
		case <-p.beatNow:
			t.Stop()
			// Whoever found the bucket missing was not alone.
			if !sleep(ctx, edgeBeatAgain) {
				return
			}
		case <-ctx.Done():
			t.Stop()
			return
		}
	}
}

// beatOnce writes the edge's lease. Where it is not the one that was written before, everything the edge has is written again.
func (p *presence) beatOnce(ctx context.Context) error {
	select {
	case p.beating <- struct{}{}:
		defer func() { <-p.beating }()
	case <-ctx.Done():
		return ctx.Err()
	}
	p.mu.Lock()
	closed, again := p.closed, p.state != leaseHeld
	p.mu.Unlock()
	if closed {
		return nil
	}
	rev, err := p.putLease(ctx, p.beat)
	if isConflict(err) {
		// It ran out, or NATS lost the bucket and has another, or the acknowledgement of the beat before was lost. Nobody else writes it.
		p.lose(leaseUnknown)
		again = true
		rev, err = p.putLease(ctx, 0)
	}
	p.beats.note(ctx, err)
	switch {
	case errors.Is(err, errNoBucket):
		p.beat = 0
		p.lose(leaseNoBucket)
		return err
	case err != nil:
		return err
	}
	p.beat = rev
	p.mu.Lock()
	p.state = leaseHeld
	if again {
		for _, s := range p.seats {
			p.dirty[s] = true
		}
	}
	p.mu.Unlock()
	signal(p.tidyNow)
	return nil
}

// soilOld marks the seats whose records were last written before t, so that they do not run out.
func (p *presence) soilOld(t time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, s := range p.seats {
		if s.held > 0 && s.written.Before(t) {
			p.dirty[s] = true
		}
	}
}

// tidyAll brings records to what is held, whenever there are some that may not say it.
func (p *presence) tidyAll(ctx context.Context) {
	for {
		select {
		case <-p.tidyNow:
		case <-ctx.Done():
			return
		}
		dirty := p.takeDirty()
		if len(dirty) == 0 {
			continue
		}
		p.tidying.note(ctx, p.tidyThese(ctx, dirty))
	}
}

// tidyThese brings the records of seats that are taken to what is held, and drops them. The error is one of those that happened.
func (p *presence) tidyThese(ctx context.Context, dirty []*seats) error {
	var wg sync.WaitGroup
	room := make(chan struct{}, maxTidying)
	failed := make(chan error, 1)
	for _, s := range dirty {
		room <- struct{}{}
		wg.Go(func() {
			defer func() { <-room }()
			defer p.drop(s)
			if err := p.tidy(ctx, s); err != nil {
				// The next beat that succeeds has it tried again.
				p.soil(s)
				select {
				case failed <- err:
				default:
				}
			}
		})
	}
	wg.Wait()
	select {
	case err := <-failed:
		return err
	default:
		return nil
	}
}

// series is how something goes that is tried again and again, so that the log says when it begins to fail and when it works again, and not each time. Not for concurrent use.
type series struct {
	logger          *slog.Logger
	what, meanwhile string // what is written, and what its failing means, as the log says it
	failing         bool
}

// note takes in the outcome of an attempt. What the end of ctx, or of the log, made of it is no failure.
func (s *series) note(ctx context.Context, err error) {
	switch {
	case err == nil && s.failing:
		s.failing = false
		s.logger.Info("presence is written again", "what", s.what, "bucket", presenceBucket)
	case err == nil || s.failing || ctx.Err() != nil || errors.Is(err, nats.ErrConnectionClosed):
	case errors.Is(err, errNoBucket):
		// lose says it.
		s.failing = true
	default:
		s.failing = true
		s.logger.Warn("presence cannot be written", "what", s.what, "meanwhile", s.meanwhile, "bucket", presenceBucket, "error", err)
	}
}

func (p *presence) takeDirty() []*seats {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.state != leaseHeld || p.closed {
		return nil
	}
	for s := range p.dirty {
		s.refs++
	}
	return slices.Collect(maps.Keys(p.dirty))
}

// tidy writes what is held of one user's seats.
func (p *presence) tidy(ctx context.Context, s *seats) error {
	ctx, cancel := context.WithTimeout(ctx, enterWithin)
	defer cancel()
	select {
	case s.turn <- struct{}{}:
		defer func() { <-s.turn }()
	case <-ctx.Done():
		return ctx.Err()
	}
	p.mu.Lock()
	n := s.held
	delete(p.dirty, s)
	p.mu.Unlock()
	return p.whileLeased(ctx, func() error { return p.write(ctx, s, n, 0) })
}

// close takes no more seats and gives the edge's lease back, and with it all its seats. It waits for NATS at most as long as ctx lasts.
func (p *presence) close(ctx context.Context) {
	p.mu.Lock()
	again := p.closed
	p.closed = true
	p.mu.Unlock()
	select {
	case p.beating <- struct{}{}:
		defer func() { <-p.beating }()
	case <-ctx.Done():
		return
	}
	if p.beat == 0 || again || !p.log.conn.IsConnected() {
		return
	}
	// A beat whose caller gave up was sent before this on the same connection, so it cannot bring the lease back.
	if err := p.removeLease(ctx); err != nil {
		p.logger.Warn("the seats of this edge's users are free only when its lease runs out", "in", edgeLeaseTTL, "error", err)
	}
}

// signal leaves a token where there is none.
func signal(ch chan<- struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}

// presenceMetrics are presence's, as Prometheus counts them.
type presenceMetrics struct {
	seats      prometheus.Gauge
	runs       prometheus.Gauge
	leasesLost prometheus.Counter
}

func newPresenceMetrics(r prometheus.Registerer) *presenceMetrics {
	m := &presenceMetrics{
		seats: prometheus.NewGauge(prometheus.GaugeOpts{
			Namespace: "tidemark", Subsystem: "presence", Name: "seats", Help: "Seats in sessions that users hold by their connections to this edge.",
		}),
		runs: prometheus.NewGauge(prometheus.GaugeOpts{
			Namespace: "tidemark", Subsystem: "presence", Name: "kept_runs", Help: "Connections to this edge that keep a run, counted once for each run.",
		}),
		leasesLost: prometheus.NewCounter(prometheus.CounterOpts{
			Namespace: "tidemark", Subsystem: "presence", Name: "leases_lost_total", Help: "Times that this edge had to write its lease and its users' seats again.",
		}),
	}
	if r != nil {
		r.MustRegister(m.seats, m.runs, m.leasesLost)
	}
	return m
}
