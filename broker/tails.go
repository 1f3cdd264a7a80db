package broker

import (
	"context"
	"errors"
	"time"
	"unicode/utf8"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/oklog/ulid/v2"

	"tidemark/schema"
)

// Tails is how analysts read (docs/adr/0010): all sessions of a tenant at once, in groups whose members share the load. A group is durable; what its members acknowledged is not delivered to the group again, the rest is, at least once.
// [JetStreamLog] is one.
//
// The log's streams are the partitions. Each is in the hands of one member at a time, who gets its envelopes in the order in which they were stored: those of one session in their order.
//
// All methods may be called concurrently. Errors are of type [*schema.Refusal], or the context's.
type Tails interface {
	// Tail makes a member of a group of the tenant, and the group where there is none. ctx bounds the opening alone: the member lasts until it is closed. The error is invalid_message or unknown_type where o is beyond its
	// bounds, limit_exceeded where the group has as many members as it may, unavailable where NATS does not answer.
	Tail(ctx context.Context, tenant string, o TailOptions) (*TailMember, error)
}

// TailOptions say what a member reads. Rights are the caller's to check.
type TailOptions struct {
	// Group is the name, unique in the tenant: 1 to [schema.MaxGroupBytes] bytes. The filter is each member's own; members of one group that differ in it get what their partitions hold, each by its own.
	Group string
	// Prefix of the sessions' names; all where empty.
	Prefix string
	// Kinds are the payload types wanted, at most [schema.MaxAttachTypes]; all where empty.
	Kinds []schema.Kind
	// Now and Since say where a group begins that is new; its checkpoints count otherwise. Now: with what is stored after its first member was let in. Since: with what was stored at this time or later; a time to come is now. Neither: with the oldest that is kept.
	Now   bool
	Since time.Time
}

// TailEvent is one thing that a member is told: what it has now, or a batch.
type TailEvent struct {
	// Partitions are those in the member's hands from here on, in order, of so many; nil where this is a batch.
	Partitions []uint32
	Of         int
	Batch      *TailBatch
}

// TailBatch is consecutive frames of a partition, less what the filter passed over. It is immutable.
type TailBatch struct {
	Partition uint32
	// Through is the place to acknowledge: the stream sequence of the last frame, or of what was passed over behind it.
	Through uint64
	Frames  []TailFrame

	held   *held
	before uint64 // everything up to here is in the batches before
	size   int    // in bytes, of Frames and what surrounds them
	count  int    // envelopes
	sent   bool   // Next has returned it. Guarded by the member's mu
}

// TailFrame is envelopes of one session that were stored together, as far as the filter lets them through.
type TailFrame struct {
	Session string
	Epoch   string
	Stored  time.Time
	// Records are the envelopes as records of field 15, as in Frame, Events and TailEnvelopes.
	Records []byte
}

// Bounds of a member.
const (
	// tailBatchBytes and tailBatchEnvelopes close a batch; a frame that is larger by itself makes one of its own.
	tailBatchBytes     = 64 << 10
	tailBatchEnvelopes = 1000
	// tailInFlight bounds what a member was sent, or is about to be, and did not acknowledge, in bytes. Each batch counts at least tailBatchWeight, so that they are 16 at the most.
	tailInFlight    = 4 << 20
	tailBatchWeight = tailInFlight / 16
	// tailFrameCost is what a frame takes in a batch beside its bytes and its session's name.
	tailFrameCost = 64
	// tailPull bounds the messages that the client holds of a partition before they are looked at, beside the bytes that a largest message needs.
	tailPull = 500
	// tailLinger is how long a batch waits for a frame that is on its way.
	tailLinger = 50 * time.Millisecond
	// maxTailMembers bounds the members of a group: more than there are partitions have nothing to do but to stand by.
	maxTailMembers = 256
	// tailLook is how often a member says that it is here, and looks who the others are, and which partitions are free.
	tailLook = time.Second
	// tailMemberTTL is how long a member that says nothing more counts as one. The server counts it, in whole seconds; it leaves room for three beats that fail, and ends a little after leaseTTL does, so that whoever misses a
	// member knows by then that its leases are silent, too, and takes the partitions at once.
	tailMemberTTL = 5 * time.Second
	// tailCheckpointEvery is how often a checkpoint is written that has moved.
	tailCheckpointEvery = time.Second
	// tailSettleFor is how long a partition that goes to another member waits for the acknowledgement of what was sent, which otherwise is sent to the other again.
	tailSettleFor = 2 * time.Second
)

// check says what is wrong with the options.
func (o *TailOptions) check() error {
	switch {
	case o.Group == "" || len(o.Group) > schema.MaxGroupBytes || !utf8.ValidString(o.Group):
		return schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "The group's name has %d bytes; 1 to %d bytes of UTF-8 are allowed.", len(o.Group), schema.MaxGroupBytes)
	case len(o.Prefix) > schema.MaxNameBytes || !utf8.ValidString(o.Prefix):
		return schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "The prefix of group %q has %d bytes; at most %d bytes of UTF-8 are allowed.", o.Group, len(o.Prefix), schema.MaxNameBytes)
	case len(o.Kinds) > schema.MaxAttachTypes:
		return schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "The tail of group %q names %d types; at most %d are allowed.", o.Group, len(o.Kinds), schema.MaxAttachTypes)
	}
	return nil
}

// Tail implements [Tails].
func (l *JetStreamLog) Tail(ctx context.Context, tenant string, o TailOptions) (*TailMember, error) {
	if err := o.check(); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, l.cfg.HoldFor)
	defer cancel()
	if _, err := l.ready(ctx); err != nil {
		return nil, err
	}
	var retry backoff
	for {
		m, err := l.openTail(ctx, tenant, o)
		if err == nil {
			return m, nil
		}
		if r, ok := errors.AsType[*schema.Refusal](err); ok && r.Code != schema.Code_CODE_UNAVAILABLE {
			return nil, err
		}
		if l.storing.Err() != nil {
			return nil, tailGoingAway(o.Group)
		}
		if errors.Is(err, jetstream.ErrBucketNotFound) {
			return nil, &schema.Refusal{
				Code: schema.Code_CODE_UNAVAILABLE, Err: err, Message: "The deployment has no bucket " + tailsBucket + " yet; start a `tidemark broker` of this version, which makes it.",
			}
		}
		if !retry.wait(ctx, errNotStored) {
			return nil, &schema.Refusal{Code: schema.Code_CODE_UNAVAILABLE, Err: err, Message: "The group \"" + o.Group + "\" cannot be read just now; try again in a moment."}
		}
	}
}

func tailGoingAway(group string) error {
	return schema.Refuse(schema.Code_CODE_GOING_AWAY, "This edge is stopping; tail group %q through another.", group)
}

// openTail makes a member, which begins at once.
func (l *JetStreamLog) openTail(ctx context.Context, tenant string, o TailOptions) (*TailMember, error) {
	kv, err := l.js.KeyValue(ctx, tailsBucket)
	if err != nil {
		return nil, err
	}
	g := tailGroupOf(tenant, o.Group)
	others, err := l.tailMembers(ctx, g)
	if err != nil {
		return nil, err
	}
	if len(others) >= maxTailMembers {
		return nil, schema.Refuse(schema.Code_CODE_LIMIT_EXCEEDED, "The group %q has %d members, as many as it may; close one of them, then try again.", o.Group, len(others))
	}
	starts, err := l.tailStarts(ctx, kv, g, o)
	if err != nil {
		return nil, err
	}
	return l.newTailMember(kv, g, o, ulid.Make().String(), starts)
}
