package gateway

import (
	"errors"
	"fmt"
	"math"

	"tidemark/schema"
)

// Rate bounds how fast a client may publish.
type Rate struct {
	// PerSecond is the envelopes a second in the long run; 0 for no bound.
	PerSecond float64
	// Burst is how many may come at once after a pause; at least 1 where there is a rate. A publish of more than that costs the burst, so that it passes after a pause: otherwise it never could.
	Burst int
}

// Limits bound what one client may do, so that it costs the others nothing. Over a limit the client is told, with a code of its own; the others notice nothing. The zero value of each but Sessions is
// no bound. [DefaultLimits] are those of a server that strangers reach.
type Limits struct {
	// User bounds each user, and each analyst, over all its connections and calls on this edge; Agent each connection of an agent, worker or admin, whose calls that are no streams are counted together. Who is the
	// same is told by tenant, subject and role.
	User, Agent Rate
	// UserConnections is how many connections of one user may follow one session at once, over all edges.
	UserConnections int
	// Sessions is how many sessions one connection may follow at once. Default [schema.MaxAttachedSessions].
	Sessions int
}

// DefaultLimits are the limits of the command line's defaults: a person types less than ten messages a second, and a model says some hundred tokens.
func DefaultLimits() Limits {
	return Limits{User: Rate{10, 20}, Agent: Rate{5_000, 10_000}, UserConnections: 5, Sessions: schema.MaxAttachedSessions}
}

// Largest is the largest number that a limit may have: the welcome tells it to clients in 32 bits.
const Largest = 1_000_000_000

func (l *Limits) validate() error {
	defaultTo(&l.Sessions, schema.MaxAttachedSessions)
	for _, r := range []Rate{l.User, l.Agent} {
		if r.PerSecond < 0 || math.IsNaN(r.PerSecond) || math.IsInf(r.PerSecond, 0) {
			return errors.New("gateway: a rate in Limits is not a number from 0 on")
		}
		if r.PerSecond > 0 && r.Burst < 1 {
			return errors.New("gateway: a rate in Limits needs a burst of at least 1")
		}
		if r.Burst < 0 || r.Burst > Largest {
			return errTooFar("a burst in Limits", Largest)
		}
	}
	if l.UserConnections < 0 || l.UserConnections > Largest || l.Sessions < 0 || l.Sessions > Largest {
		return errTooFar("a number in Limits", Largest)
	}
	return nil
}

func errTooFar(what string, most int) error {
	return fmt.Errorf("gateway: %s is not within 0 and %d", what, most)
}

// rate is the role's.
func (l *Limits) rate(r schema.Role) Rate {
	if isAgent(r) {
		return l.Agent
	}
	return l.User
}

// isAgent says whose limits the role has: those of an agent, or of a user.
func isAgent(r schema.Role) bool {
	return r == schema.Role_ROLE_AGENT || r == schema.Role_ROLE_WORKER || r == schema.Role_ROLE_ADMIN
}

// connections is how many connections of one bearer of the role may follow one session; 0 for any number.
func (l *Limits) connections(r schema.Role) int {
	if r != schema.Role_ROLE_USER {
		return 0
	}
	return l.UserConnections
}

// Limit is one of the bounds whose hits are counted.
type Limit int

// The limits.
const (
	// LimitRate: envelopes a second.
	LimitRate Limit = iota
	// LimitMessageBytes: an envelope or a message.
	LimitMessageBytes
	// LimitConnections: those of the edge.
	LimitConnections
	// LimitUserConnections: one user's in one session.
	LimitUserConnections
	// LimitSessions: those that one connection follows.
	LimitSessions
	// LimitInFlight: one connection's publishes that are not answered. It is not refused: the edge reads no further until some are.
	LimitInFlight
	// LimitOrigin: pages that may connect.
	LimitOrigin
	// LimitGroups: those that one connection works for.
	LimitGroups
)

// limits are the limits as the metric names them, and as whoever is over them is refused.
var limits = [...]struct { //nolint:gochecknoglobals // a table that nothing writes
	word string
	code schema.Code
}{
	LimitRate:            {"rate", schema.Code_CODE_RATE_EXCEEDED},
	LimitMessageBytes:    {"message_bytes", schema.Code_CODE_TOO_LARGE},
	LimitConnections:     {"connections", schema.Code_CODE_LIMIT_EXCEEDED},
	LimitUserConnections: {"user_connections", schema.Code_CODE_TOO_MANY_CONNECTIONS},
	LimitSessions:        {"sessions", schema.Code_CODE_TOO_MANY_SESSIONS},
	LimitInFlight:        {"in_flight", schema.Code_CODE_UNSPECIFIED},
	LimitOrigin:          {"origin", schema.Code_CODE_ORIGIN_NOT_ALLOWED},
	// It is refused with limit_exceeded, as a connection too many is, and counted where that is said.
	LimitGroups: {"groups", schema.Code_CODE_UNSPECIFIED},
}

// String is the limit as the metric names it.
func (l Limit) String() string { return limits[l].word }

// Refused counts a refusal that a client is told, where it is a limit's. The gateway counts what it says itself on connections, and what [Gateway.Admits] returns; edges call it, once each, for what
// they refuse without a connection of the gateway. It may be called concurrently.
func (g *Gateway) Refused(c schema.Code) {
	for l := range limits {
		if limits[l].code == c && c != schema.Code_CODE_UNSPECIFIED {
			g.exceeded(Limit(l))
		}
	}
}

// RefuseOrigin is what a browser is told whose page may not connect; it is counted. It may be called concurrently.
func (g *Gateway) RefuseOrigin() *schema.Refusal {
	g.exceeded(LimitOrigin)
	return schema.Refuse(schema.Code_CODE_ORIGIN_NOT_ALLOWED, "Pages of this origin may not connect; the server's configuration names those that may.")
}

// exceeded counts that a client hit a limit.
func (g *Gateway) exceeded(l Limit) { g.metrics.limits[l].Inc() }
