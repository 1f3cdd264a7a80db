package broker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/oklog/ulid/v2"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/semaphore"

	"tidemark/schema"
)

// Config of a [JetStreamLog].
type Config struct {
	Server Server
	// Edge is the name under which this process writes frames; unique among the edges that are alive. Default: a new ULID.
	Edge string
	// HoldFor is how long a publish is held while NATS is away, before it is refused with a retryable code. Default 10 s: longer than a leader election, shorter than people wait.
	HoldFor time.Duration
	// QueueBytes bounds what all appenders hold together. Default 64 MiB.
	QueueBytes int64
	// TailBytes bounds what the tails of all streams hold together. Default 128 MiB.
	TailBytes int
	// WarmFor is how far back the tail begins when the process starts, so that clients which reconnect after a deployment find what they missed in memory. Default 2 minutes.
	WarmFor time.Duration
	Logger  *slog.Logger
	// Metrics registers the log's metrics; none where nil.
	Metrics prometheus.Registerer
}

func (c *Config) setDefaults() {
	if c.Edge == "" {
		c.Edge = ulid.Make().String()
	}
	if c.HoldFor == 0 {
		c.HoldFor = 10 * time.Second
	}
	if c.QueueBytes == 0 {
		c.QueueBytes = 64 << 20
	}
	if c.TailBytes == 0 {
		c.TailBytes = 128 << 20
	}
	if c.WarmFor == 0 {
		c.WarmFor = 2 * time.Minute
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
}

// JetStreamLog is the [Log] on NATS JetStream. One serves any number of connections; a process has one.
type JetStreamLog struct {
	// Static after construction.
	cfg     Config
	edge    string
	logger  *slog.Logger
	metrics *metrics
	conn    *connection // appends and tails
	reads   *connection // replay: a large answer there delays no acknowledgement here
	js      jetstream.JetStream

	// Static once ready: discovered from the deployment.
	layout atomic.Pointer[deployment]

	// storing ends when the log is closed: what is being stored then is given up.
	storing   context.Context //nolint:containedctx // the lifetime of appends, which outlive the calls that submitted them
	stop      context.CancelFunc
	appending sync.WaitGroup
	queued    *semaphore.Weighted
	handOvers chan struct{}
	closing   chan struct{} // closed by Close: what waits to be stored waits no longer
	reader    *reader       // set with layout
	presence  *presence
	tails     *tailMetrics

	// giving holds a permit for each item that is being given up.
	giving  chan struct{}
	workIDs atomic.Uint64 // of deliveries
	// workBytes is what the items take that are on this edge.
	workBytes atomic.Int64
	cancels   cancelWatches

	workMu     sync.Mutex // guards groups and workClosed
	groups     map[groupKey]*workGroup
	workClosed bool

	mu        sync.Mutex
	appenders map[schema.SessionID]*appender
	tailing   map[*TailMember]bool // those that have not ended
	closed    bool
}

// deployment is what the streams' metadata say.
type deployment struct {
	durability schema.Durability
	tails      []*tail
	warm       atomic.Int32 // tails that have caught up with what was stored when they began
}

// Open connects to the server. It does not wait for it: until [JetStreamLog.Run] has found the deployment, publishes are held and follows are refused as unavailable.
func Open(cfg Config) (*JetStreamLog, error) {
	cfg.setDefaults()
	conn, err := cfg.Server.connect(cfg.Logger, "log")
	if err != nil {
		return nil, err
	}
	reads, err := cfg.Server.connect(cfg.Logger, "reads")
	if err != nil {
		conn.Close()
		return nil, err
	}
	js, err := jetstream.New(conn.Conn)
	if err != nil {
		conn.Close()
		reads.Close()
		return nil, err
	}
	l := &JetStreamLog{
		cfg: cfg, edge: cfg.Edge, logger: cfg.Logger, metrics: newMetrics(cfg.Metrics), conn: conn, reads: reads, js: js,
		queued: semaphore.NewWeighted(cfg.QueueBytes), handOvers: make(chan struct{}, maxHandOvers), closing: make(chan struct{}), appenders: make(map[schema.SessionID]*appender),
	}
	l.giving, l.groups = make(chan struct{}, maxGiving), make(map[groupKey]*workGroup)
	l.presence, l.tails = newPresence(l), newTailMetrics(cfg.Metrics)
	l.storing, l.stop = context.WithCancel(context.Background()) //nolint:forbidigo // the log's own lifetime, ended by Close
	return l, nil
}

// Run finds the deployment, follows its streams and takes hand-overs, until ctx ends; then it returns nil. Call it once.
func (l *JetStreamLog) Run(ctx context.Context) error {
	streams, err := l.find(ctx)
	if err != nil || ctx.Err() != nil {
		return err // the log may be closed before there was anything to follow
	}
	sub, err := l.conn.Subscribe(edgeSubject(l.edge), l.takeHandOver)
	if err != nil {
		return l.unavailable(schema.SessionID{}, err)
	}
	defer func() {
		if err := sub.Unsubscribe(); err != nil && !errors.Is(err, nats.ErrConnectionClosed) {
			l.logger.Warn("hand-overs are not refused yet while the log stops", "error", err)
		}
	}()
	var wg sync.WaitGroup
	defer wg.Wait()
	for i, t := range l.layout.Load().tails {
		wg.Go(func() { l.follow(ctx, logStreamName(i), t) })
	}
	wg.Go(func() { l.sweep(ctx) })
	wg.Go(func() { l.presence.run(ctx) })
	<-ctx.Done()
	l.logger.Info("the log stops following", "streams", streams)
	return nil
}

// find waits until the deployment is there.
func (l *JetStreamLog) find(ctx context.Context) (int, error) {
	var retry backoff
	for said := false; ; said = true {
		streams, durability, err := discover(ctx, l.js)
		if err == nil {
			d := &deployment{durability: durability}
			for range streams {
				d.tails = append(d.tails, newTail(l.cfg.TailBytes/streams))
			}
			l.reader = newReader(l.reads, streams)
			l.layout.Store(d)
			return streams, nil
		}
		if !said {
			l.logger.Warn("waiting for the deployment", "error", err)
		}
		if schema.CodeOf(err) == schema.Code_CODE_INTERNAL {
			return 0, err
		}
		if !retry.wait(ctx, err) {
			return 0, nil
		}
	}
}

// Close waits until what was submitted is answered, or ctx ends, and disconnects. Nothing may be submitted meanwhile. Run must have returned, or be about to.
func (l *JetStreamLog) Close(ctx context.Context) error {
	l.mu.Lock()
	if !l.closed {
		l.closed = true
		close(l.closing)
	}
	l.mu.Unlock()
	l.closeWork()
	l.closeTails()
	done := make(chan struct{})
	go func() {
		l.appending.Wait()
		close(done)
	}()
	var err error
	select {
	case <-done:
	case <-ctx.Done():
		err = fmt.Errorf("broker: closed with appends in flight: %w", context.Cause(ctx))
	}
	l.stop()
	<-done
	l.presence.close(ctx)
	l.conn.Close()
	l.reads.Close()
	return err
}

// Status implements [Log].
func (l *JetStreamLog) Status() Status {
	s := Status{Edge: l.edge, MaxEnvelopeBytes: schema.MaxEnvelopeBytes}
	if most := int(l.conn.MaxPayload()) - frameOverhead - stampBytes; most > 0 {
		s.MaxEnvelopeBytes = min(s.MaxEnvelopeBytes, most)
	}
	d := l.layout.Load()
	switch {
	case !l.conn.IsConnected():
		s.Reason = "NATS is not reachable."
	case d == nil:
		s.Reason = "The log streams are not there yet."
	case int(d.warm.Load()) < len(d.tails):
		s.Reason = "The tail is still being read."
	default:
		s.Ready = true
	}
	if d != nil {
		s.Durability = d.durability
	}
	return s
}

// ready waits until the deployment is known.
func (l *JetStreamLog) ready(ctx context.Context) (*deployment, error) {
	var retry backoff
	for {
		if d := l.layout.Load(); d != nil {
			return d, nil
		}
		if !retry.wait(ctx, l.unavailable(schema.SessionID{}, nil)) {
			return nil, &schema.Refusal{Code: schema.Code_CODE_UNAVAILABLE, Message: l.Status().Reason + " Try again in a moment."}
		}
	}
}

// tailOf is the tail of the session's stream. The deployment must be known.
func (l *JetStreamLog) tailOf(ln lane) *tail {
	tails := l.layout.Load().tails
	return tails[streamOf(ln.slice, len(tails))]
}

// frameAt is the session's frame with this stream sequence, from the tail or from the log.
func (l *JetStreamLog) frameAt(ctx context.Context, ln lane, streamSeq uint64) (*frame, error) {
	if f := l.tailOf(ln).frameAt(ln.logSubject(), streamSeq); f != nil {
		return f, nil
	}
	return l.reader.frameAt(ctx, ln, streamSeq)
}

// Publish implements [Log].
func (l *JetStreamLog) Publish(ctx context.Context, id schema.SessionID, s *Submission) {
	if err := l.submit(ctx, id, s); err != nil {
		s.Done(Receipt{}, err)
	}
}

// submit is Publish, but for what is refused before it is queued: that is returned.
func (l *JetStreamLog) submit(ctx context.Context, id schema.SessionID, s *Submission) error {
	s.deadline = time.Now().Add(l.cfg.HoldFor)
	if err := l.admit(ctx, id, s); err != nil {
		return err
	}
	for {
		a := l.appender(id)
		if a == nil {
			s.release()
			return schema.Refuse(schema.Code_CODE_GOING_AWAY, "This edge is stopping; publish to session %s through another.", id)
		}
		err := a.submit(ctx, s)
		if errors.Is(err, errGoneAppender) {
			continue
		}
		if err != nil {
			s.release()
		}
		return err
	}
}

// smallPublish is a size, in bytes, that every server takes that can be of use; asking the connection what its server takes goes through the connection's lock.
const smallPublish = 16 << 10

// stampBytes is more than an edge adds to an envelope: id, time, source, seq.
const stampBytes = 512

// admit measures the submission and takes its bytes out of the log's bound.
func (l *JetStreamLog) admit(ctx context.Context, id schema.SessionID, s *Submission) error {
	if n := len(s.Envelopes); (n == 0 || n > schema.MaxPublishEnvelopes) && !s.tombstone {
		return schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "The publish to session %s holds %d envelopes; 1 to %d are allowed.", id, n, schema.MaxPublishEnvelopes)
	}
	s.size = 0
	ends := 0 // envelopes that Tidemark may store the end of a run with
	for i := range s.Envelopes {
		s.size += s.Envelopes[i].Size()
		if k := s.Envelopes[i].Kind; k == schema.KindCancel || k == schema.KindStartRun {
			ends++
		}
	}
	limit := schema.MaxFrameBytes + stampBytes*len(s.Envelopes)
	if s.size > smallPublish {
		if most := int(l.conn.MaxPayload()) - frameOverhead; most > 0 {
			limit = min(limit, most)
		}
	}
	if s.size > limit {
		return schema.Refuse(schema.Code_CODE_TOO_LARGE, "The publish to session %s takes %d bytes; at most %d are allowed.", id, s.size, limit)
	}
	s.size += ends * endingBytes
	if l.layout.Load() == nil {
		held, cancel := context.WithDeadline(ctx, s.deadline)
		defer cancel()
		if _, err := l.ready(held); err != nil {
			return err
		}
	}
	if !l.queued.TryAcquire(int64(s.size)) {
		held, cancel := context.WithDeadline(ctx, s.deadline)
		defer cancel()
		if err := l.queued.Acquire(held, int64(s.size)); err != nil {
			return l.unavailable(id, errors.New("this edge holds as much as it may"))
		}
	}
	s.held = l.queued
	return nil
}

// appender finds a session's appender, or makes one; nil once the log is closed.
func (l *JetStreamLog) appender(id schema.SessionID) *appender {
	l.mu.Lock()
	defer l.mu.Unlock()
	a := l.appenders[id]
	if l.closed {
		return nil
	}
	if a == nil {
		if len(l.appenders) >= maxAppenders {
			l.makeRoom()
		}
		ln := laneOf(id)
		a = &appender{log: l, id: id, lane: ln, subject: ln.logSubject()}
		l.appenders[id] = a
	}
	return a
}

// Bounds of what idle appenders remember of their sessions; a session that is forgotten is taken over anew when it is written to.
const (
	keepIdle   = 5 * time.Minute
	sweepEvery = 10 * time.Second
	// maxAppenders bounds those that are idle, at some 75 KiB each for a session of more than a thousand envelopes. Those at work are bounded by what is queued.
	maxAppenders = 2048
)

// makeRoom forgets a few appenders that are idle, whichever come first. Called with mu held.
func (l *JetStreamLog) makeRoom() {
	const few = 16
	looked, gone := 0, 0
	for id, a := range l.appenders {
		if a.leave(time.Now()) {
			delete(l.appenders, id)
			gone++
		}
		if looked++; gone == few || looked == 16*few {
			return
		}
	}
}

// sweep forgets the appenders that have been idle for long, and more of them where there are many.
func (l *JetStreamLog) sweep(ctx context.Context) {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-tick.C:
			l.mu.Lock()
			for id, a := range l.appenders {
				if a.leave(now.Add(-keepIdle)) {
					delete(l.appenders, id)
				}
			}
			l.mu.Unlock()
		}
	}
}

// leave makes the appender gone if it has had nothing to do since, and reports whether it did.
func (a *appender) leave(since time.Time) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.gone = !a.running && a.used.Before(since)
	return a.gone
}

// Delete implements [Log].
func (l *JetStreamLog) Delete(ctx context.Context, id schema.SessionID) error {
	_, err := Append(ctx, l, id, Submission{tombstone: true})
	return err
}

// Sessions implements [Log].
func (l *JetStreamLog) Sessions(ctx context.Context, tenant string, q Query) (SessionPage, error) {
	if _, err := l.ready(ctx); err != nil {
		return SessionPage{}, err
	}
	return l.reader.listSessions(ctx, tenant, q)
}

// unavailable is the refusal of a publish that could not be stored for now.
func (l *JetStreamLog) unavailable(id schema.SessionID, cause error) error {
	r := &schema.Refusal{Code: schema.Code_CODE_UNAVAILABLE, Err: cause}
	r.Message = fmt.Sprintf("The log cannot be reached. What was published to session %s may or may not be stored: send it again with the same ids.", id)
	if id.Name == "" {
		r.Message = "The log cannot be reached; try again in a moment."
	}
	return r
}
