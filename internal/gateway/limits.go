package gateway

import (
	"errors"
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
	// User bounds each connection of a user, of an analyst too; Agent those of agents, workers and admins. Calls that are no streams are counted by tenant, subject and role on this edge.
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

func (l *Limits) validate() error {
	defaultTo(&l.Sessions, schema.MaxAttachedSessions)
	for _, r := range []Rate{l.User, l.Agent} {
		if r.PerSecond < 0 || math.IsNaN(r.PerSecond) || math.IsInf(r.PerSecond, 0) {
			return errors.New("gateway: a rate in Limits is not a number from 0 on")
		}
		if r.PerSecond > 0 && r.Burst < 1 {
			return errors.New("gateway: a rate in Limits needs a burst of at least 1")
		}
	}
	if l.UserConnections < 0 || l.Sessions < 0 {
		return errors.New("gateway: a number in Limits is negative")
	}
	return nil
}

// rate is the role's.
func (l *Limits) rate(r schema.Role) Rate {
	switch r {
	case schema.Role_ROLE_AGENT, schema.Role_ROLE_WORKER, schema.Role_ROLE_ADMIN:
		return l.Agent
	default:
		return l.User
	}
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
	// LimitRate: envelopes a second. rate_exceeded.
	LimitRate Limit = iota
	// LimitMessageBytes: an envelope or a message. too_large.
	LimitMessageBytes
	// LimitConnections: those of the edge. limit_exceeded.
	LimitConnections
	// LimitUserConnections: one user's in one session. too_many_connections.
	LimitUserConnections
	// LimitSessions: those that one connection follows. too_many_sessions.
	LimitSessions
	// LimitInFlight: one connection's publishes that are not answered. It is not refused: the edge reads no further until some are.
	LimitInFlight
	// LimitOrigin: pages that may connect. origin_not_allowed.
	LimitOrigin
)

// limitWords are the limits as the metric names them.
var limitWords = [...]string{ //nolint:gochecknoglobals // a table that nothing writes
	LimitRate: "rate", LimitMessageBytes: "message_bytes", LimitConnections: "connections", LimitUserConnections: "user_connections",
	LimitSessions: "sessions", LimitInFlight: "in_flight", LimitOrigin: "origin",
}

// String is the limit as the metric names it.
func (l Limit) String() string { return limitWords[l] }

// Exceeded counts that a client hit a limit. The gateway counts what it refuses itself; edges call it for what they refuse before a connection is made. It may be called concurrently.
func (g *Gateway) Exceeded(l Limit) { g.metrics.limits[l].Inc() }

// refused counts a refusal that is told to a client, where it is a limit's.
func (g *Gateway) refused(c schema.Code) {
	switch c {
	case schema.Code_CODE_RATE_EXCEEDED:
		g.Exceeded(LimitRate)
	case schema.Code_CODE_TOO_LARGE:
		g.Exceeded(LimitMessageBytes)
	case schema.Code_CODE_LIMIT_EXCEEDED:
		g.Exceeded(LimitConnections)
	case schema.Code_CODE_TOO_MANY_CONNECTIONS:
		g.Exceeded(LimitUserConnections)
	case schema.Code_CODE_TOO_MANY_SESSIONS:
		g.Exceeded(LimitSessions)
	case schema.Code_CODE_ORIGIN_NOT_ALLOWED:
		g.Exceeded(LimitOrigin)
	default:
	}
}
