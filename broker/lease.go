package broker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/oklog/ulid/v2"
	"google.golang.org/protobuf/proto"

	"tidemark/schema"
)

// lease is a hold on a log stream, and a checkpoint in it: one record, so that whoever loses the one cannot move the other (docs/adr/0003). Projectors hold one for each stream, and the members of an analytics
// group (docs/adr/0010) one of the group's for each.
//
// The holder writes the record every beatEvery. Another takes it over when it has seen the same revision for leaseTTL by its own clock: no clocks are compared. A holder that was frozen and
// thaws fails at its next beat; what a projector writes before that is fenced by the projection's registers.
type lease struct {
	// Static after construction.
	kv     jetstream.KeyValue
	key    string // of the record; a projector's is the log stream's name
	name   string // who would hold it: this process, or a member
	logger *slog.Logger
	// writing is held by who renews the record: a channel, because renewing may take long.
	writing chan struct{}

	// Owned by who waits for the lease: the revision that was there last, and since when.
	seen  uint64
	since time.Time

	mu      sync.Mutex
	holder  string // name and a ULID for each time it was acquired
	rev     uint64
	through uint64
	beat    time.Time // wall clock of the last write: a virtual machine that was suspended does not see its monotonic clock move
}

const (
	beatEvery = time.Second
	leaseTTL  = 4 * time.Second
	// freshFor is how long after a beat the holder may write without asking: well before anybody takes over.
	freshFor = leaseTTL / 2
	// pollEvery is how often one that waits looks.
	pollEvery = 250 * time.Millisecond
)

// errLeaseLost: another has taken the stream over.
var errLeaseLost = stopError{errors.New("broker: another has taken the stream over")}

func newLease(kv jetstream.KeyValue, key, name string, logger *slog.Logger) *lease {
	return &lease{kv: kv, key: key, name: name, logger: logger, writing: make(chan struct{}, 1)}
}

// acquire waits until the stream is this projector's.
func (l *lease) acquire(ctx context.Context) error {
	for said := ""; ; {
		rev, record, err := l.read(ctx)
		switch {
		case err != nil:
			if said != err.Error() {
				l.logger.Warn("waiting for the projector's checkpoint", "stream", l.key, "error", err)
				said = err.Error()
			}
		case l.free(rev, record, time.Now()):
			if l.take(ctx, rev, record.GetThrough()) == nil {
				return nil
			}
		case said != record.GetHolder():
			l.logger.Info("another projector has the stream; standing by", "stream", l.key, "holder", record.GetHolder())
			said = record.GetHolder()
		}
		if !sleep(ctx, pollEvery) {
			return context.Cause(ctx)
		}
	}
}

// free notes how the record was found, and reports whether it may be taken: nobody holds it, or whoever is called as we are, or its holder has said nothing for leaseTTL.
func (l *lease) free(rev uint64, record *schema.Projection, now time.Time) bool {
	if rev != l.seen {
		l.seen, l.since = rev, now
	}
	return record.GetHolder() == "" || nameOf(record.GetHolder()) == l.name || now.Sub(l.since) >= leaseTTL
}

// nameOf is the process in a holder.
func nameOf(holder string) string {
	name, _, _ := strings.Cut(holder, "/")
	return name
}

// read is the record as it is stored; revision 0 where there is none.
func (l *lease) read(ctx context.Context) (uint64, *schema.Projection, error) {
	record := new(schema.Projection)
	e, err := l.kv.Get(ctx, l.key)
	if errors.Is(err, jetstream.ErrKeyNotFound) {
		return 0, record, nil
	}
	if err != nil {
		return 0, nil, err
	}
	if err := proto.Unmarshal(e.Value(), record); err != nil {
		return 0, nil, fmt.Errorf("broker: the checkpoint of %s cannot be read: %w", l.key, err)
	}
	return e.Revision(), record, nil
}

// take makes us the holder, unless somebody was faster.
func (l *lease) take(ctx context.Context, rev, through uint64) error {
	l.mu.Lock()
	l.holder, l.rev, l.through = l.name+"/"+ulid.Make().String(), rev, through
	l.mu.Unlock()
	return l.write(ctx, l.holder, through)
}

// renew writes the record: a beat, and the checkpoint where it has moved. The error is errLeaseLost where another is the holder; others pass.
func (l *lease) renew(ctx context.Context, through uint64) error {
	return l.rewrite(ctx, l.holder, through)
}

// release leaves the stream to whoever comes next. The error is as with renew.
func (l *lease) release(ctx context.Context, through uint64) error {
	return l.rewrite(ctx, "", through)
}

// rewrite writes the record on top of our own last one.
func (l *lease) rewrite(ctx context.Context, holder string, through uint64) error {
	select {
	case l.writing <- struct{}{}:
		defer func() { <-l.writing }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	err := l.write(ctx, holder, through)
	if !isConflict(err) {
		return err
	}
	// Our own write, of which the acknowledgement was lost, or somebody else's.
	for range 3 {
		rev, record, err := l.read(ctx)
		if err != nil {
			return err
		}
		if record.GetHolder() != l.holder {
			return errLeaseLost
		}
		l.mu.Lock()
		l.rev = rev
		l.mu.Unlock()
		if err = l.write(ctx, holder, through); !isConflict(err) {
			return err
		}
		// What was read came from a replica that lags.
		if !sleep(ctx, 50*time.Millisecond) {
			return context.Cause(ctx)
		}
	}
	return errLeaseLost
}

// isConflict reports whether a write was refused because the record has another revision.
func isConflict(err error) bool {
	api, ok := errors.AsType[*jetstream.APIError](err)
	return ok && api.ErrorCode == errCodeWrongLastSequence || errors.Is(err, jetstream.ErrKeyExists)
}

// write writes the record, for one goroutine at a time.
func (l *lease) write(ctx context.Context, holder string, through uint64) error {
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	data, err := proto.Marshal(&schema.Projection{Holder: holder, Through: through})
	if err != nil {
		return err
	}
	began := time.Now().Round(0)
	rev, err := l.kv.Update(ctx, l.key, data, l.rev)
	if err != nil {
		return err
	}
	l.mu.Lock()
	l.rev, l.through, l.beat = rev, through, began
	l.mu.Unlock()
	return nil
}

// position is the checkpoint as it is stored.
func (l *lease) position() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.through
}

// stale reports whether the last beat is so long ago that nothing may be written without another.
func (l *lease) stale() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return time.Now().Round(0).Sub(l.beat) >= freshFor
}

// fresh implements guard.
func (l *lease) fresh(ctx context.Context) error {
	if !l.stale() {
		return nil
	}
	return l.ask(ctx)
}

// ask renews the lease, as often as it takes.
func (l *lease) ask(ctx context.Context) error {
	var retry backoff
	for {
		err := l.renew(ctx, l.position())
		if err == nil {
			return nil
		}
		if _, stop := errors.AsType[stopError](err); stop {
			return err
		}
		if !retry.wait(ctx, errNotStored) {
			return context.Cause(ctx)
		}
	}
}

// confirm implements guard.
func (l *lease) confirm(ctx context.Context, _ lane, _ string) (bool, error) {
	err := l.ask(ctx)
	return err == nil, err
}

// mayClear implements guard. The holder may: if frames of the next history were projected before it became the holder, they are behind its checkpoint, as the tombstone is, and it projects them again.
func (l *lease) mayClear(ctx context.Context, ln lane, _ uint64) (bool, error) {
	return l.confirm(ctx, ln, "")
}
