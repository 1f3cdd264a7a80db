package broker

import (
	"context"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/protobuf/proto"

	"tidemark/schema"
)

// sweepEveryHour is how often the registry is rid of sessions that retention has taken; a little late is soon enough for what was kept for days.
const sweepEveryHour = time.Hour

// sweepRegistry removes, now and then until ctx ends, the records of this stream's sessions of which retention took the last frame. Nothing in the log says that a session is gone.
func (p *projector) sweepRegistry(ctx context.Context) {
	for sleep(ctx, sweepEveryHour) {
		n, err := p.sweepBefore(ctx, time.Now().Add(-p.maxAge))
		if err != nil && ctx.Err() == nil {
			p.logger.Warn("the registry could not be swept; it is tried again in an hour", "stream", p.stream, "error", err)
		}
		if n > 0 {
			p.logger.Info("sessions that retention took were removed from the registry", "stream", p.stream, "sessions", n)
		}
	}
}

// sweepBefore removes the records of this stream's sessions that have no frame left and got their last one before a time, and returns how many. The registry is in the order of its last writes, so
// that it is read only as far as it is old, and no further than maxScanned records.
func (p *projector) sweepBefore(ctx context.Context, before time.Time) (int, error) {
	registry, err := p.js.Stream(ctx, registryStream)
	if err != nil {
		return 0, err
	}
	removed, from, more := 0, uint64(1), true
	for scanned := 0; more && scanned < maxScanned; {
		var batch []*stored
		if batch, more, err = p.r.scan(ctx, registryStream, from); err != nil {
			return removed, err
		}
		scanned += len(batch)
		for _, m := range batch {
			from = m.seq + 1
			var record schema.SessionRecord
			if proto.Unmarshal(m.data, &record) != nil || record.GetEpoch() == "" {
				continue
			}
			if !record.GetUpdated().AsTime().Before(before) {
				return removed, nil
			}
			id := schema.SessionID{Tenant: record.GetTenant(), Name: record.GetSession()}
			ln := laneOf(id)
			if p.r.logOf(ln) != p.stream {
				continue
			}
			head, err := p.r.headFrameFromLeader(ctx, ln)
			if err != nil {
				return removed, err
			}
			if head != nil {
				continue
			}
			// By its sequence: what is written of the next history meanwhile stays.
			if err := registry.Purge(ctx, jetstream.WithPurgeSubject(m.subject), jetstream.WithPurgeSequence(m.seq+1)); err != nil {
				return removed, err
			}
			p.post.forget(id)
			removed++
		}
	}
	return removed, nil
}
