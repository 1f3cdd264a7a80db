package auth

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"tidemark/schema"
)

// How fresh the keys of a JWKS are.
const (
	// JWKSEvery is how often the set is read again: the longest that a key which was withdrawn goes on being accepted while its source can be read.
	JWKSEvery = 5 * time.Minute
	// JWKSGap is the shortest time between two reads that tokens with an unknown key ask for. Such a token costs its sender nothing; the source must not pay for it.
	JWKSGap = 5 * time.Second
	// JWKSMaxAge is how long keys go on being used while their source cannot be read. An outage of an issuer should not be one of ours; but a key withdrawn meanwhile must not live for ever.
	JWKSMaxAge = 24 * time.Hour
	// jwksFilePoll is how often a file is looked at. Only one that changed is read.
	jwksFilePoll = 10 * time.Second
)

// keys are those of a JWKS, as they stand now. One goroutine, run, reads the source; who meets an unknown key asks it to, and waits.
type keys struct {
	// Static after construction.
	every, gap time.Duration
	log        *slog.Logger
	metrics    *keyMetrics

	// Owned by run, and by newKeys before it.
	source *keySource

	// current is nil until the source was read once.
	current atomic.Pointer[keySet]
	// wake has room for one: run is asked to read. Only who has just set reading sends.
	wake chan struct{}

	mu      sync.Mutex // never held while something is read
	running bool
	reading chan struct{} // closed when the read that is under way, or asked for, is over; nil where none is
	ended   time.Time     // when the last read ended; zero before the first
	failed  error         // of the last read; nil where it went well
}

// keyMetrics are what is known of the reads.
type keyMetrics struct {
	reads *prometheus.CounterVec
	keys  prometheus.Gauge
	last  prometheus.Gauge
}

func newKeyMetrics(r prometheus.Registerer) (*keyMetrics, error) {
	m := &keyMetrics{
		reads: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: "tidemark", Subsystem: "auth", Name: "jwks_reads_total", Help: "Reads of the JWKS, by result: ok or failed.",
		}, []string{"result"}),
		keys: prometheus.NewGauge(prometheus.GaugeOpts{Namespace: "tidemark", Subsystem: "auth", Name: "jwks_keys", Help: "Keys of the JWKS that can be used."}),
		last: prometheus.NewGauge(prometheus.GaugeOpts{
			Namespace: "tidemark", Subsystem: "auth", Name: "jwks_last_read_timestamp_seconds", Help: "When the JWKS was last read successfully; 0 for never.",
		}),
	}
	if r == nil {
		return m, nil
	}
	return m, errors.Join(r.Register(m.reads), r.Register(m.keys), r.Register(m.last))
}

// newKeys reads a file once, for a wrong one should be noticed at the start. A URL is read when run begins.
func newKeys(c *Config) (*keys, error) {
	source, err := newKeySource(c.JWKS, c.Transport)
	if err != nil {
		return nil, err
	}
	m, err := newKeyMetrics(c.Metrics)
	if err != nil {
		return nil, err
	}
	k := &keys{every: JWKSEvery, gap: JWKSGap, log: c.Logger, metrics: m, source: source, wake: make(chan struct{}, 1)}
	if source.url != nil {
		return k, nil
	}
	b, err := source.readFile()
	if err != nil {
		return nil, fmt.Errorf("the JWKS cannot be read: %w", err)
	}
	set, err := parseKeySet(b, time.Now())
	if err != nil {
		return nil, fmt.Errorf("the JWKS in %s cannot be used: %w", source, err)
	}
	if len(set.keys) == 0 {
		return nil, fmt.Errorf("the JWKS in %s has no key that can be used (%s)", source, strings.Join(append(set.skipped, "RSA, EC with P-256 and OKP with Ed25519 can"), "; "))
	}
	k.store(set)
	return k, nil
}

// find is the key for a token. Where there is none of its name, the source is read first, unless that was done just now; this is the only thing that it waits for,
// and while ctx lasts.
func (k *keys) find(ctx context.Context, alg, kid string, named bool) (any, error) {
	key, result, err := k.look(alg, kid, named)
	if result == unknown && k.ask(ctx) {
		key, _, err = k.look(alg, kid, named)
	}
	return key, err
}

// look is find in the keys as they stand.
func (k *keys) look(alg, kid string, named bool) (any, choice, error) {
	set := k.usable()
	if set == nil {
		return nil, unknown, errNoKeys()
	}
	key, result := set.choose(alg, kid, named)
	switch result {
	case chosen:
		return key, result, nil
	case misfit:
		return nil, result, unauthenticated("The token's algorithm is not the one of the key that it names.")
	case ambiguous:
		return nil, result, unauthenticated("More than one key fits the token; it must name one ('kid') that no other has.")
	default:
		// Whether the key exists is not known while the source cannot be read: the token may be good, so its bearer should come again.
		if k.lastFailed() != nil {
			return nil, unknown, errNoKeys()
		}
		return nil, unknown, unauthenticated("The key that the token was signed with is not among those that are accepted here.")
	}
}

// usable is the set, nil where there is none that is young enough.
func (k *keys) usable() *keySet {
	if set := k.current.Load(); set != nil && time.Since(set.at) < JWKSMaxAge {
		return set
	}
	return nil
}

func errNoKeys() error {
	return schema.Refuse(schema.Code_CODE_UNAVAILABLE, "The keys for tokens cannot be read at present; try again in a few seconds.")
}

func (k *keys) lastFailed() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.failed
}

// ready is nil while there are keys.
func (k *keys) ready() error {
	set := k.usable()
	switch failed := k.lastFailed(); {
	case set == nil && failed != nil:
		return schema.Refuse(schema.Code_CODE_UNAVAILABLE, "The keys for tokens (JWKS) cannot be read; the server's log says why.")
	case set == nil:
		return schema.Refuse(schema.Code_CODE_UNAVAILABLE, "The keys for tokens (JWKS) have not been read yet.")
	case len(set.keys) == 0:
		return schema.Refuse(schema.Code_CODE_UNAVAILABLE, "None of the keys for tokens (JWKS) can be used; the server's log says why.")
	}
	return nil
}

// ask has the source read and waits until that is over, which takes no longer than one read: all who ask meanwhile wait for the same one. It says whether something was read; not so where the last
// read ended less than the gap ago, nobody reads, or ctx ended before the read did, which goes on for the others.
func (k *keys) ask(ctx context.Context) bool {
	k.mu.Lock()
	reading := k.reading
	if reading == nil {
		if !k.running || !k.ended.IsZero() && time.Since(k.ended) < k.gap {
			k.mu.Unlock()
			return false
		}
		reading = make(chan struct{})
		k.reading = reading
		k.wake <- struct{}{} // never blocks: reading was nil, so nothing is in it
	}
	k.mu.Unlock()
	select {
	case <-reading:
		return true
	case <-ctx.Done():
		return false
	}
}

// run reads the source at once where that has not been done, then now and then, and whenever it is asked to, until ctx ends.
func (k *keys) run(ctx context.Context) error {
	k.mu.Lock()
	if k.running {
		k.mu.Unlock()
		return errors.New("auth: Run was called twice")
	}
	k.running = true
	k.mu.Unlock()
	defer func() {
		k.mu.Lock()
		k.running = false
		k.finish()
		k.mu.Unlock()
	}()
	if k.source.open() {
		k.log.WarnContext(ctx, "the keys for tokens are read over http: whoever is on the way can put keys of their own among them; use https", "jwks", k.source.String())
	}
	failures := 0
	full := time.Now() // when a file was last read in any case
	timer := time.NewTimer(k.pause(0))
	defer timer.Stop()
	if set := k.current.Load(); set != nil {
		k.announce(ctx, set)
	} else {
		timer.Reset(0)
	}
	for {
		byTimer := true
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		case <-k.wake:
			byTimer = false
		}
		if time.Since(full) >= k.every {
			// Not every file system's times can be relied on.
			k.source.seen, full = nil, time.Now()
		}
		err := k.read(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		case err == nil:
			failures = 0
			timer.Reset(k.pause(0))
		case byTimer || failures == 0:
			failures++
			timer.Reset(k.pause(failures))
		}
	}
}

// pause is how long run waits for the next read after so many failures: longer after each, so that a source that comes back is noticed soon, and one that does not is left in peace.
func (k *keys) pause(failures int) time.Duration {
	usual := k.every
	if k.source.url == nil {
		usual = min(usual, jwksFilePoll)
	}
	if failures == 0 {
		return usual
	}
	return min(usual, max(k.gap, time.Millisecond)<<min(failures-1, 10))
}

// read reads the source and tells those who wait.
func (k *keys) read(ctx context.Context) error {
	k.mu.Lock()
	if k.reading == nil {
		k.reading = make(chan struct{})
	}
	select {
	case <-k.wake: // this read is the one that was asked for
	default:
	}
	k.mu.Unlock()

	set, err := k.load(ctx)

	k.mu.Lock()
	before, last := k.failed, k.current.Load()
	if err == nil {
		k.store(set)
	}
	k.failed, k.ended = err, time.Now()
	k.finish()
	k.mu.Unlock()

	switch {
	case ctx.Err() != nil:
	case err != nil:
		k.metrics.reads.WithLabelValues("failed").Inc()
		level := slog.LevelWarn
		if before != nil && before.Error() == err.Error() {
			level = slog.LevelDebug // said already
		}
		meanwhile := "the last ones go on being used for a day"
		if last == nil {
			meanwhile = "there were none yet, so tokens signed with them are refused"
		}
		k.log.Log(ctx, level, "the keys for tokens cannot be read", "meanwhile", meanwhile, "jwks", k.source.String(), "error", err)
	case last == nil || !bytes.Equal(last.raw, set.raw):
		k.announce(ctx, set)
	case before != nil:
		k.log.InfoContext(ctx, "the keys for tokens can be read again", "jwks", k.source.String())
	}
	return err
}

// finish lets go those who wait for a read. The caller holds mu.
func (k *keys) finish() {
	if k.reading != nil {
		close(k.reading)
		k.reading = nil
	}
}

// load reads a set; the last one, with a new time, where the source has not changed.
func (k *keys) load(ctx context.Context) (*keySet, error) {
	last, now := k.current.Load(), time.Now()
	b, err := k.source.read(ctx)
	if errors.Is(err, errUnchanged) || err == nil && last != nil && bytes.Equal(b, last.raw) {
		again := *last
		again.at = now
		return &again, nil
	}
	if err != nil {
		k.source.seen = nil
		return nil, err
	}
	set, err := parseKeySet(b, now)
	if err != nil {
		k.source.seen = nil
		return nil, err
	}
	return set, nil
}

// store makes a set the current one.
func (k *keys) store(set *keySet) {
	k.current.Store(set)
	k.metrics.reads.WithLabelValues("ok").Inc()
	k.metrics.keys.Set(float64(len(set.keys)))
	k.metrics.last.Set(float64(set.at.Unix()))
}

// announce says which keys there are now.
func (k *keys) announce(ctx context.Context, set *keySet) {
	k.log.InfoContext(ctx, "the keys for tokens were read", "jwks", k.source.String(), "usable", len(set.keys), "skipped", len(set.skipped))
	for _, why := range set.skipped[:min(len(set.skipped), 20)] {
		k.log.WarnContext(ctx, "a key for tokens is not used", "jwks", k.source.String(), "why", why)
	}
}
