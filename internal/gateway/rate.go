package gateway

import (
	"sync"
	"time"

	"golang.org/x/time/rate"

	"tidemark/internal/auth"
	"tidemark/schema"
)

// limiter makes a limiter of the rate, whose burst is there from the beginning.
func (r Rate) limiter() *rate.Limiter { return rate.NewLimiter(rate.Limit(r.PerSecond), r.Burst) }

// cost is what n envelopes cost: at most the burst, see [Rate], and an empty publish as much as one.
func (r Rate) cost(n int) int { return max(1, min(n, r.Burst)) }

// exceeded is the refusal.
func (r Rate) exceeded(p *auth.Principal) error {
	return schema.Refuse(schema.Code_CODE_RATE_EXCEEDED, "The role %s may publish %g envelopes a second, and %d at once after a pause; send this again a little later, with the same ids.",
		auth.RoleWord(p.Role), r.PerSecond, r.Burst)
}

// spend takes n envelopes from what the connection may publish now; a refusal with rate_exceeded where it has not so many left. Called by the reader, when it has taken the message apart and there is room
// in flight, before rights are looked at and the log hears of it.
//
// A connection that never publishes has no limiter. All that a user has on this edge share one, also over calls that are no streams: otherwise who connects again and again would publish as fast as it connects. Each
// connection of an agent has its own.
func (c *conn) spend(n int, now time.Time) error {
	if c.rate.PerSecond == 0 {
		return nil
	}
	if c.limiter == nil {
		if isAgent(c.principal.Role) {
			c.limiter = c.rate.limiter()
		} else {
			c.limiter = c.g.callers.bucket(callerOf(c.principal), c.rate, now)
		}
	}
	if c.limiter.AllowN(now, c.rate.cost(n)) {
		return nil
	}
	c.penalty = min(time.Duration(float64(time.Second)/c.rate.PerSecond), maxPenalty)
	return c.rate.exceeded(c.principal)
}

// maxPenalty is how long a connection is not read after something that came too fast, at most, or as long as its rate says: who floods an edge without reading the answers costs it a hundred refusals a
// second and no more, while a client that was a little too fast hardly waits, and its pongs still come in time.
const maxPenalty = 10 * time.Millisecond

// sitOut sits the penalty out. Called by the reader before it reads.
func (c *conn) sitOut() {
	t := time.NewTimer(c.penalty)
	defer t.Stop()
	c.penalty = 0
	select {
	case <-t.C:
	case <-c.ctx.Done():
	}
}

// Bounds of what is kept about who publishes.
const (
	// maxBuckets bounds the callers that are remembered, each some 200 bytes.
	maxBuckets = 16 << 10
	// evictOf is among how many the one is chosen that is forgotten for a new one.
	evictOf = 16
)

// caller is whom envelopes are counted for where that is no connection.
type caller struct {
	tenant, subject string
	role            schema.Role
}

func callerOf(p *auth.Principal) caller { return caller{p.Tenant, p.Subject, p.Role} }

// buckets are the rates of callers. The zero value is empty.
type buckets struct {
	mu sync.Mutex // guards all below
	of map[caller]*rate.Limiter
}

// bucket finds the caller's limiter, or makes one.
func (b *buckets) bucket(who caller, r Rate, now time.Time) *rate.Limiter {
	b.mu.Lock()
	defer b.mu.Unlock()
	l := b.of[who]
	if l != nil {
		return l
	}
	if b.of == nil {
		b.of = make(map[caller]*rate.Limiter)
	}
	if len(b.of) >= maxBuckets {
		b.evict(now)
	}
	l = r.limiter()
	b.of[who] = l
	return l
}

// evict forgets a caller. One whose bucket is full again is as one that never came; where none of those that are looked at is, it is the one with the most left, which gains the least: nobody is refused
// because others call. The map's order is random. The caller holds mu.
func (b *buckets) evict(now time.Time) {
	var fullest caller
	most, seen, freed := -1.0, 0, false
	for who, l := range b.of {
		switch left := l.TokensAt(now) / float64(l.Burst()); {
		case left >= 1:
			delete(b.of, who)
			freed = true
		case left > most:
			fullest, most = who, left
		}
		if seen++; seen == evictOf {
			break
		}
	}
	if !freed {
		delete(b.of, fullest)
	}
}

// Allow takes n envelopes from what the principal may publish now without a connection, in calls that are no streams: nil, or a refusal with rate_exceeded, which the caller counts ([Gateway.Refused])
// with whatever else it refuses. It may be called concurrently.
func (g *Gateway) Allow(p *auth.Principal, n int) error {
	r := g.cfg.Limits.rate(p.Role)
	if r.PerSecond == 0 {
		return nil
	}
	now := time.Now()
	if g.callers.bucket(callerOf(p), r, now).AllowN(now, r.cost(n)) {
		return nil
	}
	return r.exceeded(p)
}
