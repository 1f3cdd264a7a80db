package broker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"tidemark/schema"
)

// runLeases are the runs that have an agent, as the bucket PRESENCE says: those with a seat on an edge whose own lease is there. It is of the size of what is in the bucket. Owned by the watchdog, under its lock.
type runLeases struct {
	// edges are the holders whose lease is there; runs has the holders of each run's seats, held the runs of each holder.
	edges map[string]bool
	runs  map[party][]string
	held  map[string]map[party]bool
}

func newRunLeases() runLeases {
	return runLeases{edges: map[string]bool{}, runs: map[party][]string{}, held: map[string]map[party]bool{}}
}

// has reports whether the session's run of this name has an agent. Who keeps a session's run without naming it keeps the one that is under way.
func (l *runLeases) has(id schema.SessionID, run string) bool {
	return l.kept(party{session: id, name: run, run: true}) || run != "" && l.kept(party{session: id, run: true})
}

func (l *runLeases) kept(p party) bool {
	for _, holder := range l.runs[p] {
		if l.edges[holder] {
			return true
		}
	}
	return false
}

// take takes in a key of the bucket as it is now, and returns the sessions of which it may say something else than before.
func (l *runLeases) take(key string, m *stored) ([]schema.SessionID, error) {
	if holder, ok := strings.CutPrefix(key, edgeKeys); ok {
		if removed(m) {
			delete(l.edges, holder)
		} else if l.edges[holder] {
			return nil, nil
		} else {
			l.edges[holder] = true
		}
		var changed []schema.SessionID
		for p := range l.held[holder] {
			changed = append(changed, p.session)
		}
		return changed, nil
	}
	p, err := parseRunKey(key)
	if err != nil {
		return nil, err
	}
	var rec seatsRecord
	if !removed(m) {
		if err := json.Unmarshal(m.data, &rec); err != nil {
			return nil, fmt.Errorf("broker: the record %s cannot be read: %w", key, err)
		}
	}
	for _, holder := range l.runs[p] {
		if delete(l.held[holder], p); len(l.held[holder]) == 0 {
			delete(l.held, holder)
		}
	}
	delete(l.runs, p)
	for holder := range rec.Seats {
		l.runs[p] = append(l.runs[p], holder)
		if l.held[holder] == nil {
			l.held[holder] = map[party]bool{}
		}
		l.held[holder][p] = true
	}
	return []schema.SessionID{p.session}, nil
}

// parseRunKey is the reverse of party.key for a run.
func parseRunKey(key string) (party, error) {
	parts := strings.Split(strings.TrimPrefix(key, runKeys), ".")
	if !strings.HasPrefix(key, runKeys) || len(parts) != 3 {
		return party{}, fmt.Errorf("broker: %q is not a run's key", key)
	}
	if parts[2] == noName {
		parts[2] = ""
	}
	for i := range parts {
		name, err := schema.UnescapeToken(parts[i])
		if err != nil {
			return party{}, err
		}
		parts[i] = name
	}
	id, err := schema.ParseSessionID(parts[0], parts[1])
	return party{session: id, name: parts[2], run: true}, err
}

const (
	// leasesPulled is how many keys are on their way at most; leasesSilent, after how long without any sign of the server what is known of leases is void.
	leasesPulled = 512
	leasesSilent = 10 * time.Second
	// leaseConsumerTTL is how long the server keeps the consumer of a broker that is gone.
	leaseConsumerTTL = time.Minute
)

// followLeases keeps the watchdog's leases until ctx ends. Whenever it cannot be sure to have missed nothing it reads all of them anew, and until it has, nothing is known.
func (d *watchdog) followLeases(ctx context.Context) {
	var retry backoff
	for said := false; ; {
		began := time.Now()
		err := d.readLeases(ctx)
		if ctx.Err() != nil {
			return
		}
		if time.Since(began) > leasesSilent {
			retry, said = backoff{}, false
		}
		if !said {
			d.logger.Warn("which runs have an agent is not known just now; none is failed meanwhile", "bucket", presenceBucket, "error", err)
			said = true
		}
		if !retry.wait(ctx, errNotStored) {
			return
		}
	}
}

// readLeases reads the leases and what becomes of them, until something breaks.
func (d *watchdog) readLeases(ctx context.Context) error {
	d.forgetLeases()
	defer d.forgetLeases()
	asking, cancel := context.WithTimeout(ctx, getTimeout)
	defer cancel()
	bucket, err := d.js.Stream(asking, presenceStream)
	if err != nil {
		return err
	}
	// No ordered consumer: that would go on behind its last message where NATS has lost the bucket and has another.
	cons, err := bucket.CreateConsumer(asking, jetstream.ConsumerConfig{
		FilterSubjects: []string{presencePrefix + runKeys + ">", presencePrefix + edgeKeys + ">"},
		DeliverPolicy:  jetstream.DeliverLastPerSubjectPolicy, AckPolicy: jetstream.AckNonePolicy, MemoryStorage: true, Replicas: 1, InactiveThreshold: leaseConsumerTTL,
	})
	if err != nil {
		return err
	}
	name := cons.CachedInfo().Name
	defer func() {
		leaving, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		if err := bucket.DeleteConsumer(leaving, name); err != nil {
			d.logger.Debug("the server removes the consumer of leases by itself", "in", leaseConsumerTTL, "error", err)
		}
	}()
	it, err := cons.Messages(jetstream.PullMaxMessages(leasesPulled), jetstream.PullExpiry(leasesSilent), jetstream.PullHeartbeat(leasesSilent/4))
	if err != nil {
		return err
	}
	defer it.Stop()
	stop := context.AfterFunc(ctx, it.Stop)
	defer stop()
	if cons.CachedInfo().NumPending == 0 {
		d.knowLeases()
	}
	for last := uint64(0); ; last++ {
		msg, err := it.Next()
		if err != nil {
			return err
		}
		meta, err := msg.Metadata()
		if err != nil {
			return err
		}
		if meta.Sequence.Consumer != last+1 {
			return errors.New("broker: leases were lost on their way")
		}
		d.takeLease(strings.TrimPrefix(msg.Subject(), presencePrefix), &stored{header: msg.Headers(), data: msg.Data()})
		if meta.NumPending == 0 {
			d.knowLeases()
		}
	}
}
