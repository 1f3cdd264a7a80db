package broker

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/protobuf/proto"

	"tidemark/schema"
)

// The bucket TAILS holds what analytics groups have done with:
//
//	<group>.start    a tailStart, written by the group's first member and never again
//	<group>.LOG_nn   a schema.Projection: the member that holds the partition, and the group's checkpoint in it
//
// <group> is a hash of the tenant and the group's name, which together may be longer than a key. Members are in the bucket PRESENCE, for as long as they say something:
//
//	tail.<group>.<member>
//
// What nobody has written for as long as the log keeps envelopes is forgotten, so that groups that nobody uses any more take no room: the log has nothing left of what they had not read.
const (
	tailsBucket = "TAILS"
	tailsStream = "KV_" + tailsBucket
	tailsPrefix = "$KV." + tailsBucket + "."
)

// tailStart says where a group began in each partition: everything up to that stream sequence is not its business.
type tailStart struct {
	// Tenant and Group are for people who look at the bucket.
	Tenant string    `json:"tenant"`
	Group  string    `json:"group"`
	Opened time.Time `json:"opened"`
	Starts []uint64  `json:"starts"`
}

// provisionTails makes the bucket where it is not there, and brings its settings up to date.
func provisionTails(ctx context.Context, js jetstream.JetStream, l Layout) error {
	_, err := js.CreateOrUpdateKeyValue(ctx, jetstream.KeyValueConfig{
		Bucket: tailsBucket, History: 1, Replicas: l.Replicas, Storage: l.storage(), TTL: l.MaxAge, Description: "Tidemark's analytics groups: leases and checkpoints",
	})
	if err != nil {
		return fmt.Errorf("broker: bucket %s: %w", tailsBucket, err)
	}
	return nil
}

// tailGroup names a group of a tenant.
type tailGroup struct {
	tenant, name string
	// key is the hash that stands for both.
	key string
}

func tailGroupOf(tenant, name string) tailGroup {
	sum := sha256.Sum256([]byte(tenant + "\x00" + name))
	return tailGroup{tenant, name, hex.EncodeToString(sum[:16])}
}

func (g tailGroup) leaseKey(stream string) string  { return g.key + "." + stream }
func (g tailGroup) memberKey(member string) string { return "tail." + g.key + "." + member }

// tailStarts is where the group begins in each partition, as its first member says. The places are read before they are written down, so that everything that is stored once a member was let in is behind a start at now.
func (l *JetStreamLog) tailStarts(ctx context.Context, kv jetstream.KeyValue, g tailGroup, o TailOptions) ([]uint64, error) {
	key := g.key + ".start"
	for {
		e, err := kv.Get(ctx, key)
		if err == nil {
			var s tailStart
			if err := json.Unmarshal(e.Value(), &s); err != nil || len(s.Starts) != len(l.layout.Load().tails) {
				return nil, schema.Refuse(schema.Code_CODE_INTERNAL, "What the bucket %s says of the group %q cannot be read.", tailsBucket, g.name)
			}
			return s.Starts, nil
		}
		if !errors.Is(err, jetstream.ErrKeyNotFound) {
			return nil, err
		}
		s := tailStart{Tenant: g.tenant, Group: g.name, Opened: time.Now().UTC(), Starts: make([]uint64, len(l.layout.Load().tails))}
		err = together(len(s.Starts), func(i int) (err error) {
			s.Starts[i], err = l.tailStartIn(ctx, logStreamName(i), o)
			return err
		})
		if err != nil {
			return nil, err
		}
		data, err := json.Marshal(s)
		if err != nil {
			return nil, err
		}
		_, err = kv.Create(ctx, key, data)
		if err == nil {
			return s.Starts, nil
		}
		// Of two that are first at once, one is. What is read next may come from a replica that does not know it yet.
		if !errors.Is(err, jetstream.ErrKeyExists) || !sleep(ctx, 10*time.Millisecond) {
			return nil, err
		}
	}
}

// tailStartIn is the stream sequence behind which a group begins that starts so.
func (l *JetStreamLog) tailStartIn(ctx context.Context, stream string, o TailOptions) (uint64, error) {
	if !o.Now && o.Since.IsZero() {
		return 0, nil
	}
	s, err := l.js.Stream(ctx, stream)
	if err != nil {
		return 0, err
	}
	last := s.CachedInfo().State.LastSeq
	if o.Now || o.Since.After(time.Now()) {
		return last, nil
	}
	// A consumer that begins at a time says at which message that is.
	c, err := s.CreateConsumer(ctx, jetstream.ConsumerConfig{
		DeliverPolicy: jetstream.DeliverByStartTimePolicy, OptStartTime: &o.Since, AckPolicy: jetstream.AckNonePolicy, MemoryStorage: true, InactiveThreshold: getTimeout,
	})
	if err != nil {
		return 0, err
	}
	// Where this fails, it goes by itself.
	_ = s.DeleteConsumer(ctx, c.CachedInfo().Name)
	return c.CachedInfo().Delivered.Stream, nil
}

// tailMembers are those of the group that have said so lately.
func (l *JetStreamLog) tailMembers(ctx context.Context, g tailGroup) (map[string]bool, error) {
	prefix := presencePrefix + g.memberKey("")
	found, err := l.reader.latest(ctx, presenceStream, prefix+"*")
	if err != nil {
		return nil, err
	}
	members := make(map[string]bool, len(found))
	for _, m := range found {
		if !removed(m) {
			members[strings.TrimPrefix(m.subject, prefix)] = true
		}
	}
	return members, nil
}

// tailLease is a partition's record as it was found.
type tailLease struct {
	rev    uint64
	record *schema.Projection
}

// tailLeases are the group's records, by the partition's stream. One that was removed by hand is as one that was never written.
func (l *JetStreamLog) tailLeases(ctx context.Context, g tailGroup, starts []uint64) ([]tailLease, error) {
	prefix := tailsPrefix + g.leaseKey("")
	found, err := l.reader.latest(ctx, tailsStream, prefix+"*")
	if err != nil {
		return nil, err
	}
	leases := make([]tailLease, len(starts))
	for i, start := range starts {
		leases[i].record = &schema.Projection{Through: start}
	}
	for _, m := range found {
		var i int
		if _, err := fmt.Sscanf(strings.TrimPrefix(m.subject, prefix), "LOG_%d", &i); err != nil || i < 0 || i >= len(leases) {
			continue
		}
		leases[i].rev = m.seq
		if removed(m) {
			continue
		}
		record := new(schema.Projection)
		if err := proto.Unmarshal(m.data, record); err != nil {
			return nil, &schema.Refusal{Code: schema.Code_CODE_INTERNAL, Message: "A checkpoint of the group \"" + g.name + "\" cannot be read.", Err: err}
		}
		leases[i].record = record
	}
	return leases, nil
}

// putTailMember says that the member is here, for tailMemberTTL.
func (l *JetStreamLog) putTailMember(ctx context.Context, g tailGroup, member string) error {
	_, err := l.presence.publish(ctx, g.memberKey(member), nats.Header{jetstream.MsgTTLHeader: {tailMemberTTL.String()}}, nil)
	return err
}

// removeTailMember says that it has gone.
func (l *JetStreamLog) removeTailMember(ctx context.Context, g tailGroup, member string) error {
	_, err := l.presence.publish(ctx, g.memberKey(member), remove(nats.Header{}), nil)
	return err
}
