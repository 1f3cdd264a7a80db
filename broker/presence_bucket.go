package broker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/oklog/ulid/v2"

	"tidemark/schema"
)

// The bucket PRESENCE, in memory:
//
//	edge.<edge>.<life>                 the lease of an edge, from its start to its end; life is a ULID, so that an edge that comes back under its name is another
//	user.<tenant>.<session>.<subject>  a seatsRecord: where the user is connected to the session
//	run.<tenant>.<session>.<run>       a seatsRecord: where agents of the run are
//
// Names are escaped; = stands for a run that has none. Every key has a time to live, which a write begins anew. The KV interface of nats.go sets one on creation only, so the messages are made here (ADR-8, ADR-43 and ADR-48 of NATS).
const (
	presenceBucket = "PRESENCE"
	edgeKeys       = "edge."
	runKeys        = "run."
	// noName is no escaped name.
	noName         = "="
	presencePrefix = "$KV." + presenceBucket + "."
	presenceStream = "KV_" + presenceBucket
	// presenceMarkers is how long the bucket says that a key has run out, for those who watch it.
	presenceMarkers = time.Minute
	// presenceRemoved is how long it says that a key was removed: the least that there is.
	presenceRemoved = time.Second
	// presenceLooked is how often a broker looks whether the bucket is still there.
	presenceLooked = 15 * time.Second
	// kvOperation is in the header of a message that removes a key.
	kvOperation = "KV-Operation"
)

// errNoBucket: the deployment has no bucket PRESENCE.
var errNoBucket = errors.New("broker: there is no bucket " + presenceBucket)

// provisionPresence makes the bucket where it is not there, and brings its settings up to date.
func provisionPresence(ctx context.Context, js jetstream.JetStream, replicas int) error {
	_, err := js.CreateOrUpdateKeyValue(ctx, jetstream.KeyValueConfig{
		Bucket: presenceBucket, History: 1, Replicas: replicas, Storage: jetstream.MemoryStorage, LimitMarkerTTL: presenceMarkers,
		Description: "Tidemark's edges and the connections of users, as they are now",
	})
	if err != nil {
		return fmt.Errorf("broker: bucket %s: %w", presenceBucket, err)
	}
	return nil
}

// keepPresence makes the bucket again whenever NATS has lost it, as a single server has after a restart, until ctx ends.
func (b *Broker) keepPresence(ctx context.Context, nc *connection, js jetstream.JetStream) {
	connected := nc.StatusChanged(nats.CONNECTED)
	defer nc.RemoveStatusListener(connected)
	tick := time.NewTicker(presenceLooked)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-connected:
		case <-tick.C:
		}
		var retry backoff
		for said := false; ; said = true {
			err := b.restorePresence(ctx, js)
			if err == nil {
				break
			}
			if !said && ctx.Err() == nil {
				b.cfg.Logger.Warn("the bucket for the presence of users cannot be looked after just now", "bucket", presenceBucket, "error", err)
			}
			if !nc.IsConnected() || !passing(err) || !retry.wait(ctx, errNotStored) {
				break
			}
		}
	}
}

func (b *Broker) restorePresence(ctx context.Context, js jetstream.JetStream) error {
	ctx, cancel := context.WithTimeout(ctx, getTimeout)
	defer cancel()
	if _, err := js.Stream(ctx, presenceStream); !errors.Is(err, jetstream.ErrStreamNotFound) {
		return err
	}
	return provisionPresence(ctx, js, b.cfg.Layout.Replicas)
}

// newHolder names one life of an edge.
func newHolder(edge string) string { return schema.EscapeToken(edge) + "." + ulid.Make().String() }

// seatsRecord is what the bucket says of a party.
type seatsRecord struct {
	// Seats has their number on each edge, by holder.
	Seats map[string]int `json:"seats"`

	// known: it was read or written under rev. Otherwise there may be one or not.
	known bool
	rev   uint64
	// lost is presence.lost at that time. When the lease was lost since, the bucket may be another, with revisions of its own.
	lost int
}

// write brings the record to n seats on this edge. The error is too_many_connections where they and those of other edges that are alive are more than limit, if that is positive; errNoBucket; or one that says that
// it is not known what the record is now. The caller has the seats' turn.
func (p *presence) write(ctx context.Context, s *seats, n, limit int) error {
	var retry backoff
	var dead map[string]bool
	for current := false; ; {
		rec := &s.record
		p.mu.Lock()
		lost := p.lost
		p.mu.Unlock()
		if rec.lost != lost {
			*rec = seatsRecord{lost: lost}
		}
		if !rec.known && n == 0 {
			if err := p.read(ctx, s); err != nil {
				return err
			}
		}
		next := seatsRecord{Seats: maps.Clone(rec.Seats)}
		maps.DeleteFunc(next.Seats, func(holder string, _ int) bool { return dead[holder] || holder == p.holder })
		total := n
		for _, m := range next.Seats {
			total += m
		}
		if limit > 0 && total > limit {
			// Nobody is refused on what this edge remembers, nor for an edge that is no more.
			if !current {
				if err := p.read(ctx, s); err != nil {
					return err
				}
				current = true
				continue
			}
			if dead == nil {
				var err error
				if dead, err = p.findDead(ctx, next.Seats); err != nil {
					return err
				}
				continue
			}
			return tooManyConnections(s.party, limit)
		}
		if n > 0 {
			if next.Seats == nil {
				next.Seats = map[string]int{}
			}
			next.Seats[p.holder] = n
		} else if rec.Seats[p.holder] == 0 {
			return nil
		}
		rev, err := p.put(ctx, s.party.key(), rec.rev, next)
		switch {
		case err == nil:
			next.known, next.rev, next.lost = true, rev, lost
			s.record = next
			p.mu.Lock()
			s.written = time.Now()
			p.mu.Unlock()
			return nil
		case errors.Is(err, errNoBucket):
			return err
		case isConflict(err):
			if err := p.read(ctx, s); err != nil {
				return err
			}
			current = true
			continue
		}
		*rec = seatsRecord{lost: lost}
		if !retry.wait(ctx, errNotStored) {
			return err
		}
	}
}

// read reads a party's record from the bucket's leader.
func (p *presence) read(ctx context.Context, s *seats) error {
	s.record = seatsRecord{lost: s.record.lost}
	m, err := p.get(ctx, s.party.key())
	if err != nil {
		return err
	}
	rec := seatsRecord{known: true, lost: s.record.lost}
	if m != nil {
		rec.rev = m.seq
		if !removed(m) {
			if err := json.Unmarshal(m.data, &rec); err != nil {
				// It says who is connected; those who are write it again.
				p.logger.Warn("a record of a user's connections cannot be read and is written anew", "session", s.party.session.String(), "error", err)
				rec.Seats = nil
			}
		}
	}
	s.record = rec
	return nil
}

// findDead finds those of the holders whose lease is not there. The answer is not nil.
func (p *presence) findDead(ctx context.Context, holders map[string]int) (map[string]bool, error) {
	dead := map[string]bool{}
	for holder := range holders {
		m, err := p.get(ctx, edgeKeys+holder)
		if err != nil {
			return nil, err
		}
		if m == nil || removed(m) {
			dead[holder] = true
		}
	}
	return dead, nil
}

// removed reports whether a message says that its key is gone: removed, or run out.
func removed(m *stored) bool {
	return m.header.Get(kvOperation) != "" || m.header.Get(jetstream.MarkerReasonHeader) != ""
}

// put writes a party's record on top of a revision, or removes it where it has no seats.
func (p *presence) put(ctx context.Context, key string, rev uint64, rec seatsRecord) (uint64, error) {
	header := nats.Header{jetstream.ExpectedLastSubjSeqHeader: {strconv.FormatUint(rev, 10)}}
	if len(rec.Seats) == 0 {
		return p.publish(ctx, key, remove(header), nil)
	}
	header.Set(jetstream.MsgTTLHeader, seatsTTL.String())
	data, err := json.Marshal(rec)
	if err != nil {
		return 0, err
	}
	return p.publish(ctx, key, header, data)
}

// putLease writes the edge's lease on top of a revision; 0 for any.
func (p *presence) putLease(ctx context.Context, rev uint64) (uint64, error) {
	header := nats.Header{jetstream.MsgTTLHeader: {edgeLeaseTTL.String()}}
	if rev > 0 {
		header.Set(jetstream.ExpectedLastSubjSeqHeader, strconv.FormatUint(rev, 10))
	}
	return p.publish(ctx, edgeKeys+p.holder, header, nil)
}

func (p *presence) removeLease(ctx context.Context) error {
	_, err := p.publish(ctx, edgeKeys+p.holder, remove(nats.Header{}), nil)
	return err
}

// remove makes a header one that removes the key, and in a moment the trace of it.
func remove(h nats.Header) nats.Header {
	h.Set(kvOperation, "PURGE")
	h.Set(jetstream.MsgRollup, jetstream.MsgRollupSubject)
	h.Set(jetstream.MsgTTLHeader, presenceRemoved.String())
	return h
}

// publish writes a key and returns its revision.
func (p *presence) publish(ctx context.Context, key string, header nats.Header, data []byte) (uint64, error) {
	rev, err := p.log.request(ctx, &nats.Msg{Subject: presencePrefix + key, Header: header, Data: data})
	if !errors.Is(err, nats.ErrNoResponders) {
		return rev, err
	}
	// Nobody stores it: there is no bucket, or it has no leader just now.
	looking, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	if _, err := p.log.js.Stream(looking, presenceStream); errors.Is(err, jetstream.ErrStreamNotFound) {
		return 0, errNoBucket
	}
	return 0, err
}

// get reads a key from the bucket's leader; nil where there is none.
func (p *presence) get(ctx context.Context, key string) (*stored, error) {
	m, err := p.log.reader.lastFromLeader(ctx, presenceStream, presencePrefix+key)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		return nil, errNoBucket
	}
	return m, err
}
