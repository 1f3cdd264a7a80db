package broker

import (
	"context"
	"time"

	"golang.org/x/sync/semaphore"

	"tidemark/schema"
)

// Log is the one way to sessions. [JetStreamLog] keeps them, [MemoryLog] is the model that tests compare it with; package logtest holds the
// conformance suite that both pass.
//
// All methods may be called concurrently. Errors are of type [*schema.Refusal], or the context's.
type Log interface {
	// Publish submits one publish request to the session's appender. It blocks while the appender's queue is full, which is the back pressure that a
	// transport hands on to its client, at most [Config.HoldFor]. Requests submitted one after the other are stored in that order.
	//
	// A request of one workflow_progress, without a producer and without an expected seq, may wait for up to a second behind the session's last stored one, be replaced by a newer such request
	// meanwhile, and is then answered with the newer's place and Receipt.Replaced. Whatever else is submitted behind it stores it first.
	//
	// The answer comes through s.Done, exactly once, possibly before Publish returns: after the envelopes are stored under the log's durability class (I1),
	// or when they are refused. ctx bounds the waiting for room, not the storing.
	Publish(ctx context.Context, id schema.SessionID, s *Submission)

	// Follow opens a cursor on the session. The error is a refusal where the start does not fit the session's history: epoch_mismatch, seq_beyond_head,
	// session_not_found.
	Follow(ctx context.Context, id schema.SessionID, o FollowOptions) (*Follower, error)

	// Session tells where a session stands, live. session_not_found where it has no envelope.
	Session(ctx context.Context, id schema.SessionID) (*schema.Session, error)

	// Sessions lists a tenant's sessions from the registry, which lags by moments and is written on transitions only.
	Sessions(ctx context.Context, tenant string, q Query) (SessionPage, error)

	// Delete removes the session with all its envelopes and ends its history: followers are told session_deleted, the next envelope begins another epoch.
	// session_not_found where there is none.
	Delete(ctx context.Context, id schema.SessionID) error

	// Enter takes one of the seats that a user, the subject, has in the session: of all connections over all edges at most limit hold one at a time. The refusal is too_many_connections
	// where all are taken, and unavailable where NATS does not say so within seconds. Seats are counted, not kept: while NATS restarts, and after an edge was frozen, there may be more
	// than limit for as long as their connections last, but nobody is refused for seats that nobody holds, except for those of an edge that died, which are free within seconds.
	//
	// leave gives the seat back. It does not block and may be called more than once; other edges learn of it in a moment. limit <= 0: no bound, and nothing is counted.
	Enter(ctx context.Context, id schema.SessionID, subject string, limit int) (leave func(), err error)

	// Status is how the log is doing now, for readiness and for the welcome.
	Status() Status
}

// Submission is one publish request on its way into the log: all of its envelopes or none, one behind the other.
type Submission struct {
	// Envelopes are 1 to [schema.MaxPublishEnvelopes], each from [schema.Accept].
	Envelopes []schema.Accepted
	// Expected, where not nil, is the seq that the session's head must have (0: no envelope yet), or the submission is refused with conflict.
	Expected *uint64
	// Kind is what the session becomes where this is its first publish and holds no SessionCreated; unspecified means chat.
	Kind schema.SessionKind
	// Done receives the answer. It is called from the appender and must not block.
	Done func(Receipt, error)

	// base is set for a submission that another edge handed over: none of its envelopes is stored up to this place. It is not handed over again.
	base *Cursor
	// tombstone: delete the session instead of appending.
	tombstone bool
	// size is what the envelopes take in a frame, in bytes; deadline is until when they are held. Both are set when it is submitted.
	size     int
	deadline time.Time
	// held is what it holds bytes of; nil where it holds none.
	held *semaphore.Weighted
	throttle
}

// Receipt is the place that a submission got.
type Receipt struct {
	Epoch       string
	First, Last uint64
	// Duplicate: it was stored before, by an earlier try.
	Duplicate bool
	// Replaced: it was a workflow_progress, and a newer one took its place before it was stored; the seq is the newer one's.
	Replaced bool
}

// Cursor is a place in a session: behind the envelope with this seq of this history.
type Cursor struct {
	// Epoch is empty where any history will do.
	Epoch string
	Seq   uint64
}

// FollowOptions say where a follower starts and what it gets.
type FollowOptions struct {
	Start Start
	// Epoch is the history that the client's cursor belongs to; empty where it names none.
	Epoch string
	// Kinds are the payload types wanted; all where empty.
	Kinds []schema.Kind
	// MustExist refuses a session without envelopes instead of waiting for its first.
	MustExist bool
	// MergeTokens merges adjacent tokens of one message while the follower catches up.
	MergeTokens bool
	// Wake is called when there may be something to take after [Follower.Take] had nothing. It is called from the tail and must not block. Nil for callers that
	// use [Follower.Next].
	Wake func()
}

// Start names a place to start from. The zero value is the beginning. Of the fields that are set, the first in the order of declaration counts.
type Start struct {
	// Head: only what comes from now on.
	Head bool
	// Last: the last n envelopes, and on.
	Last uint64
	// Since: the first frame stored at or after this time, and on.
	Since time.Time
	// After: behind this seq.
	After uint64
}

// Query selects sessions from the registry.
type Query struct {
	// Prefix of the name; all where empty.
	Prefix string
	// Status, where specified.
	Status schema.Status
	// May says which sessions the asker may know of; all where nil. Of the others neither the page nor its token tells anything (I9).
	May func(name string) bool
	// Limit is the most sessions wanted: 1 to 1,000.
	Limit int
	// Token is the Next of the page before; empty for the first.
	Token string
}

// SessionPage is a part of a listing.
type SessionPage struct {
	Sessions []*schema.Session
	// Next is empty on the last page.
	Next string
}

// Status is how a log is doing.
type Status struct {
	// Ready: connected, and the tail has caught up with what was stored when it began.
	Ready bool
	// Why it is not ready: a sentence.
	Reason string
	// Durability is the class that acknowledgements have.
	Durability schema.Durability
	// MaxEnvelopeBytes is the most that the envelopes of one publish may take together, in bytes, as their sender encoded them: [schema.MaxEnvelopeBytes], or the server's
	// max_payload less what a frame needs, where that is less.
	MaxEnvelopeBytes int
	// Edge is the name under which this log writes frames.
	Edge string
}

// Append publishes and waits for the answer. When ctx ends first, the envelopes may be stored all the same; the same ids, tried again, find out.
func Append(ctx context.Context, l Log, id schema.SessionID, s Submission) (Receipt, error) {
	type answer struct {
		r   Receipt
		err error
	}
	ch := make(chan answer, 1)
	s.Done = func(r Receipt, err error) { ch <- answer{r, err} }
	l.Publish(ctx, id, &s)
	select {
	case a := <-ch:
		return a.r, a.err
	case <-ctx.Done():
		return Receipt{}, ctx.Err()
	}
}
