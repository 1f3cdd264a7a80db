package broker

import (
	"context"
	"time"

	"tidemark/schema"
)

// Queue is the work that sessions hold (I7): envelopes that somebody must handle, each handed to one worker of every group that wants it, until it is settled or the group gives it up. [JetStreamLog] is one.
//
// All methods may be called concurrently. Errors are of type [*schema.Refusal], or the context's.
type Queue interface {
	// Join makes a worker of a group of the tenant, and the group where there is none. What o leaves out stays as the group has it. The error is invalid_message where o is beyond its bounds, or names kinds or sessions that leave out
	// something that the group takes, unavailable where NATS does not answer.
	Join(ctx context.Context, tenant string, o WorkOptions) (Taker, error)
	// Groups are the tenant's, in the order of their names.
	Groups(ctx context.Context, tenant string) ([]*schema.WorkGroup, error)
	// DeleteGroup removes a group, whose sessions may allows. What it had in hand and what waited for it is forgotten, and its workers hear of it; its dead letters stay. The error is work_not_found where there is no such group.
	DeleteGroup(ctx context.Context, tenant, group string, may func(pattern string) error) error
	// Items lists work, the oldest first. The error is work_not_found where there is no such group.
	Items(ctx context.Context, tenant string, q ItemQuery) (ItemPage, error)
	// DeadLetters lists what groups gave up, the oldest first.
	DeadLetters(ctx context.Context, tenant string, q DeadQuery) (DeadPage, error)
	// Redrive hands dead letters to their groups again. Asked twice, it does so once; before counts those that were redriven already. The error is work_not_found where one of them is not there, or is of a session
	// that the asker may not use, and then none was redriven. Behind any other error some may be, and the sums are of those that are known to be; asked again, it goes on.
	Redrive(ctx context.Context, tenant string, may func(session string) bool, ids []string) (redriven, before int, err error)
}

// Taker is a member of a group as whoever hands its items on knows it; [*Worker] is one, and says what the methods promise. All may be called concurrently, and none waits for NATS: they are called between two
// writes to a client.
type Taker interface {
	Group() *schema.WorkGroup
	Take(most int) ([]*Item, error)
	Cancellations() []Cancellation
	Ack(id uint64) bool
	Nack(id uint64, delay *time.Duration, reason string) bool
	InProgress(id uint64) (deadline time.Time, held bool)
	Term(id uint64, reason string) bool
	Retire()
	Close()
}

var _ Taker = (*Worker)(nil)

// WorkOptions say what a worker takes. Fields are as in [schema.WorkSubscribe].
type WorkOptions struct {
	Group string
	// Kinds make work; see [schema.IsWork]. Sessions are names, and prefixes that end in *. Both are what the group takes from its beginning on, and may only name more than that later.
	Kinds    []schema.Kind
	Sessions []string
	// Credit is how many items the worker may have in hand. 1 where 0.
	Credit     int
	AckWait    time.Duration
	MaxDeliver int
	Backoff    []time.Duration
	Ordered    bool
	FromNow    bool
	// May says whether the worker may have all work of a session or prefix of the group's filter ("*" is all); the error is what the worker is told, also when the filter is widened later. It must not block. Required.
	May func(pattern string) error
	// Wake is called when there may be something to take. It must not block.
	Wake func()
}

// Item is a work item in the hands of a worker.
type Item struct {
	// ID names this delivery, unique in the process.
	ID      uint64
	Session schema.SessionID
	Epoch   string
	Attempt int
	// Deadline is when others may get it, unless it is settled or in progress is said.
	Deadline time.Time
	Kind     schema.Kind
	// Envelope is encoded as it stands in the log, with its seq.
	Envelope []byte
	// Cancelled: what it belongs to had been cancelled before it was handed out.
	Cancelled bool
}

// Cancellation says that what an item in hand belongs to was cancelled.
type Cancellation struct {
	ID     uint64
	Seq    uint64
	Reason string
}

// ItemQuery selects work items.
type ItemQuery struct {
	// Group whose unsettled items are wanted; all that are kept where empty.
	Group string
	// Session, where not empty.
	Session string
	// May says which sessions the asker may know of; all where nil.
	May   func(session string) bool
	Limit int
	Token string
}

// ItemPage is a part of a listing.
type ItemPage struct {
	Items []*schema.ListedWork
	Next  string
}

// DeadQuery selects dead letters.
type DeadQuery struct {
	Group, Session, ID string
	// Redriven: also those that were handed to their groups again.
	Redriven bool
	May      func(session string) bool
	Limit    int
	Token    string
}

// DeadPage is a part of a listing.
type DeadPage struct {
	Letters []*schema.DeadLetter
	Next    string
}

// RunKeeper knows which runs have an agent (I10).
type RunKeeper interface {
	// KeepRun says that an agent of the session's run is here, until release is called or this process dies. run is empty for the session's only run. It does not wait for NATS; release does not block and may be
	// called more than once.
	KeepRun(id schema.SessionID, run string) (release func())
}
