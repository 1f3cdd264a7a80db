package broker

import (
	"context"
	"errors"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"tidemark/schema"
)

const (
	// joinWithin is how long a worker that joins waits for NATS, in attempts that take no longer than joinAttempt.
	joinWithin  = 10 * time.Second
	joinAttempt = 2 * time.Second
	// claimFor is how long a claim counts whose holder does not say that it is over: longer than an attempt, and than what it sent may be on its way.
	claimFor = 5 * time.Second
)

// What a claim's register says: why the group is claimed, or how it was left.
const (
	claimChanging = "changing"
	claimRemoving = "removing"
	claimFree     = "free"
	claimRemoved  = "removed" // it says so of a group that is not there; of one that is, nothing
)

// claim is the right to begin, change or remove a group. An update of a consumer has no fence: it is carried out whatever the consumer has become since it was read, and of two who widen a group at once one would undo what the other did. So who
// changes a group first writes that it does into a register of the stream ORDER, on top of what was read there, and reads the group again then. It counts until its holder says how it left the group, or claimFor after another has seen it.
type claim struct {
	l       *JetStreamLog
	subject string
	// seen is the claim of another that stands in the way, since when it was seen here.
	seen  uint64
	since time.Time
}

// errClaimed says that another changes the group just now.
var errClaimed = errors.New("broker: another changes the group")

func (l *JetStreamLog) claimOf(k groupKey) *claim {
	return &claim{l: l, subject: claimSubject(k)}
}

func claimSubject(k groupKey) string {
	return "group." + schema.EscapeToken(k.tenant) + "." + groupHash(k.name)
}

// read returns what the register says, and its revision.
func (c *claim) read(ctx context.Context) (state string, rev uint64, err error) {
	m, err := c.l.reader.lastFromLeader(ctx, orderStream, c.subject)
	if m == nil || err != nil {
		return claimFree, 0, err
	}
	return string(m.data), m.seq, nil
}

// hold claims the group, has do do something with it, and writes how it was left, also where that is not known for want of an answer. Where another holds it the error is errClaimed: to be tried again a moment later.
func (c *claim) hold(ctx context.Context, why, left string, do func() error) error {
	state, rev, err := c.read(ctx)
	if err != nil {
		return err
	}
	if state == claimChanging || state == claimRemoving {
		if c.seen != rev {
			c.seen, c.since = rev, time.Now()
		}
		if time.Since(c.since) < claimFor {
			return errClaimed
		}
	}
	if rev, err = publishFenced(ctx, c.l.conn, c.subject, []byte(why), rev); err != nil {
		return err
	}
	err = do()
	if _, refused := errors.AsType[*schema.Refusal](err); refused {
		left = claimFree
	}
	// Also when the attempt is over: nobody shall wait for it.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), storeTimeout)
	defer cancel()
	_, lost := publishFenced(ctx, c.l.conn, c.subject, []byte(left), rev)
	if err == nil && isConflict(lost) {
		// It took too long, and another may have changed the group on top of what was read before.
		return lost
	}
	return err
}

// persist tries until something is done, or refused, or NATS was away for too long. what is in the words of the error.
func (l *JetStreamLog) persist(ctx context.Context, k groupKey, what string, try func(context.Context) error) error {
	var retry backoff
	for {
		// A request whose connection broke is never answered.
		attempt, cancel := context.WithTimeout(ctx, joinAttempt)
		err := try(attempt)
		cancel()
		if err == nil {
			return nil
		}
		if r, refused := errors.AsType[*schema.Refusal](err); refused && r.Code != schema.Code_CODE_UNAVAILABLE {
			return err
		}
		// Two who change it at once, or NATS that is away for a moment.
		if !retry.wait(ctx, errNotStored) {
			if ctx.Err() != nil && !errors.Is(ctx.Err(), context.DeadlineExceeded) {
				return ctx.Err()
			}
			return &schema.Refusal{Code: schema.Code_CODE_UNAVAILABLE, Err: err, Message: "Group \"" + k.name + "\" cannot be " + what + " just now; try again in a moment."}
		}
	}
}

// settleGroup makes the group what it is with a worker that joins: begins it, or changes what the worker names. Nobody joins, or changes, a group that takes sessions which he may not have.
// at is when the reading of the settings began.
func (l *JetStreamLog) settleGroup(ctx context.Context, k groupKey, o WorkOptions) (s groupSettings, at time.Time, err error) {
	c := l.claimOf(k)
	err = l.persist(ctx, k, "joined", func(ctx context.Context) error {
		at = time.Now()
		var there bool
		s, there, err = l.joined(ctx, k, o, nil)
		if err != nil || there {
			return err
		}
		return c.hold(ctx, claimChanging, claimFree, func() error {
			at = time.Now()
			s, _, err = l.joined(ctx, k, o, l.change)
			return err
		})
	})
	return s, at, err
}

// joined is the group's settings with a worker that joins; there, where the group has them already. Otherwise change, unless it is nil, makes it so.
func (l *JetStreamLog) joined(ctx context.Context, k groupKey, o WorkOptions, change func(context.Context, jetstream.Stream, groupKey, groupSettings, *jetstream.ConsumerConfig) (groupSettings, error)) (s groupSettings, there bool, err error) {
	stream, err := l.js.Stream(ctx, workStream)
	if err != nil {
		return s, false, err
	}
	have, s, err := readGroup(ctx, stream, k)
	if err != nil {
		return s, false, err
	}
	if have == nil {
		s = groupSettings{kinds: schema.WorkKinds(), sessions: []string{"*"}, ackWait: defaultAckWait, maxDeliver: defaultMaxDeliver, ordered: o.Ordered, began: time.Now()}
		if o.FromNow {
			s.start = stream.CachedInfo().State.LastSeq
		}
	} else {
		if err := s.openTo(o.May); err != nil {
			return s, false, err
		}
		if err := o.Widens(s.kinds, s.sessions); err != nil {
			return s, false, err
		}
	}
	next := s.with(o)
	if err := next.openTo(o.May); err != nil {
		return s, false, err
	}
	if there = have != nil && next.same(s); there || change == nil {
		return next, there, nil
	}
	next, err = change(ctx, stream, k, next, have)
	return next, err == nil, err
}

// readGroup reads a group's consumer and its settings; nil where there is no such group.
func readGroup(ctx context.Context, stream jetstream.Stream, k groupKey) (*jetstream.ConsumerConfig, groupSettings, error) {
	cons, err := stream.Consumer(ctx, k.consumer())
	if errors.Is(err, jetstream.ErrConsumerNotFound) {
		return nil, groupSettings{}, nil
	}
	if err != nil {
		return nil, groupSettings{}, err
	}
	have := cons.CachedInfo().Config
	_, s, err := settingsOf(have)
	if err != nil {
		return nil, s, &schema.Refusal{Code: schema.Code_CODE_INTERNAL, Err: err, Message: "The settings of group \"" + k.name + "\" cannot be read."}
	}
	return &have, s, nil
}

// change begins a group, where have is nil, or gives it other settings. The caller has claimed it.
func (l *JetStreamLog) change(ctx context.Context, stream jetstream.Stream, k groupKey, s groupSettings, have *jetstream.ConsumerConfig) (groupSettings, error) {
	if have != nil {
		c, err := s.into(k, *have)
		if err == nil {
			_, err = stream.UpdateConsumer(ctx, c)
		}
		return s, err
	}
	if err := l.roomForGroup(ctx, stream, k); err != nil {
		return s, err
	}
	if err := l.forgetGroup(ctx, k); err != nil {
		return s, err
	}
	c := jetstream.ConsumerConfig{DeliverPolicy: jetstream.DeliverAllPolicy}
	if s.start > 0 {
		c.DeliverPolicy, c.OptStartSeq = jetstream.DeliverByStartSequencePolicy, s.start+1
	}
	c, err := s.into(k, c)
	if err == nil {
		// A group that nobody has worked for in all that time has nothing left to be handed out.
		c.InactiveThreshold = stream.CachedInfo().Config.MaxAge
		_, err = stream.CreateConsumer(ctx, c)
	}
	return s, err
}

// forgetGroup takes away what is written of an earlier group of that name, which says nothing of one that begins: how far it had come in its sessions, and which deliveries did not count.
func (l *JetStreamLog) forgetGroup(ctx context.Context, k groupKey) error {
	stream, err := l.js.Stream(ctx, orderStream)
	if err != nil {
		return err
	}
	for _, subject := range []string{orderSubject(k, "*"), unhandedSubject(k, "*")} {
		if err := stream.Purge(ctx, jetstream.WithPurgeSubject(subject)); err != nil {
			return err
		}
	}
	return nil
}

// roomForGroup refuses a group where its tenant has as many as it may.
func (l *JetStreamLog) roomForGroup(ctx context.Context, stream jetstream.Stream, k groupKey) error {
	n := 0
	all := stream.ListConsumers(ctx)
	for info := range all.Info() {
		if info.Config.Metadata[metaTenant] == k.tenant {
			n++
		}
	}
	if err := all.Err(); err != nil {
		return err
	}
	if n >= maxTenantGroups {
		return schema.Refuse(schema.Code_CODE_LIMIT_EXCEEDED, "There are %d groups, as many as a tenant may have; use one that there is, or delete one. One that nobody works for goes by itself when all that it could be handed has expired.", n)
	}
	return nil
}

// DeleteGroup implements [Queue].
func (l *JetStreamLog) DeleteGroup(ctx context.Context, tenant, group string, may func(pattern string) error) error {
	ctx, cancel := context.WithTimeout(ctx, joinWithin)
	defer cancel()
	if _, err := l.ready(ctx); err != nil {
		return err
	}
	k := groupKey{tenant, group}
	c := l.claimOf(k)
	asked := false
	err := l.persist(ctx, k, "deleted", func(ctx context.Context) error {
		stream, err := l.js.Stream(ctx, workStream)
		if err != nil {
			return err
		}
		there := func() error {
			have, s, err := readGroup(ctx, stream, k)
			switch {
			case err != nil:
				return err
			case have == nil:
				return schema.Refuse(schema.Code_CODE_WORK_NOT_FOUND, "There is no group %q; list the groups to see which there are.", group)
			}
			return s.openTo(may)
		}
		if err := there(); err != nil {
			if asked && schema.CodeOf(err) == schema.Code_CODE_WORK_NOT_FOUND {
				// It is gone, by what was asked before and not answered.
				return nil
			}
			return err
		}
		return c.hold(ctx, claimRemoving, claimRemoved, func() error {
			if err := there(); err != nil {
				return err
			}
			asked = true
			// What was redriven waits on subjects of the group's own. A group begun anew has the items themselves.
			if err := stream.Purge(ctx, jetstream.WithPurgeSubject(redriveSubjects(k))); err != nil {
				return err
			}
			return stream.DeleteConsumer(ctx, k.consumer())
		})
	})
	if err != nil {
		return err
	}
	l.workMu.Lock()
	g := l.groups[k]
	l.workMu.Unlock()
	if g != nil {
		// Those on other edges hear of it from NATS.
		g.refresh()
	}
	return nil
}

// gone is what the workers of a group are told that is there no more.
func (g *workGroup) gone(ctx context.Context) error {
	if state, _, err := g.log.claimOf(g.key).read(ctx); err == nil && (state == claimRemoving || state == claimRemoved) {
		return g.deleted()
	}
	return schema.Refuse(schema.Code_CODE_UNAVAILABLE, "NATS has lost group %q; join again to begin it anew.", g.key.name)
}

func (g *workGroup) deleted() error {
	return schema.Refuse(schema.Code_CODE_WORK_NOT_FOUND, "Group %q was deleted, with all that it had in hand and that waited; whoever joins begins it anew.", g.key.name)
}
