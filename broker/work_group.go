package broker

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/base32"
	"encoding/json"
	"errors"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/protobuf/types/known/timestamppb"

	"tidemark/schema"
)

// A group is a durable pull consumer of WORK; its settings stand in the consumer's configuration, and what that has no place for in its metadata.

// Settings of a group that begins and is told nothing else.
const (
	// defaultAckWait is longer than most tools take, and short for a person who waits.
	defaultAckWait    = 30 * time.Second
	defaultMaxDeliver = 5
	// maxInHand bounds the items of a group that are in hand anywhere at once.
	maxInHand = 100_000
	// maxTenantGroups bounds a tenant's share of maxGroups.
	maxTenantGroups = 512
	// maxFilters bounds the subjects that a consumer filters by; where a group's sessions would need more, the edges pass over what it does not want.
	maxFilters = 64
)

// The consumer's metadata.
const (
	metaTenant     = "tidemark.tenant"
	metaGroup      = "tidemark.group"
	metaAckWait    = "tidemark.ack_wait_ms"
	metaKinds      = "tidemark.kinds"
	metaSessions   = "tidemark.sessions"
	metaMaxDeliver = "tidemark.max_deliver"
	metaBackoff    = "tidemark.backoff_ms"
	metaOrdered    = "tidemark.ordered"
	metaBegan      = "tidemark.began"
)

type groupKey struct{ tenant, name string }

// consumer is the name of the group's consumer: of any two names one of fixed length.
func (k groupKey) consumer() string {
	sum := sha256.Sum256([]byte(k.tenant + "\x00" + k.name))
	return "W" + base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString(sum[:15])
}

// groupSettings are what a group's members agreed on. They are a value: a change is another. What the group takes, its kinds and sessions, only ever grows.
type groupSettings struct {
	kinds    []schema.Kind
	sessions []string
	ackWait  time.Duration
	// maxDeliver is how often an item is handed out.
	maxDeliver int
	backoff    []time.Duration
	ordered    bool
	// start is the sequence of WORK behind which the group began.
	start uint64
	began time.Time
}

// with is the settings after a worker has joined that asks for o.
func (s groupSettings) with(o WorkOptions) groupSettings {
	if len(o.Kinds) > 0 {
		s.kinds = slices.Compact(slices.Sorted(slices.Values(o.Kinds)))
	}
	if len(o.Sessions) > 0 {
		s.sessions = slices.Compact(slices.Sorted(slices.Values(o.Sessions)))
	}
	s.ackWait = cmp.Or(o.AckWait, s.ackWait)
	s.maxDeliver = cmp.Or(o.MaxDeliver, s.maxDeliver)
	if len(o.Backoff) > 0 {
		s.backoff = o.Backoff
	}
	return s
}

// same reports whether two settings of one group are.
func (s groupSettings) same(o groupSettings) bool {
	return slices.Equal(s.kinds, o.kinds) && slices.Equal(s.sessions, o.sessions) && s.ackWait == o.ackWait && s.maxDeliver == o.maxDeliver && slices.Equal(s.backoff, o.backoff)
}

// openTo says why a worker may not have every item of the group; nil where it may.
func (s groupSettings) openTo(may func(pattern string) error) error {
	for _, pattern := range s.sessions {
		if err := may(pattern); err != nil {
			return err
		}
	}
	return nil
}

// wants reports whether the group takes items of the session.
func (s groupSettings) wants(session string) bool {
	return slices.ContainsFunc(s.sessions, func(pattern string) bool {
		prefix, open := strings.CutSuffix(pattern, "*")
		return session == pattern || open && strings.HasPrefix(session, prefix)
	})
}

// rest is how long an item rests after its n-th delivery was given back.
func (s groupSettings) rest(n int) time.Duration {
	if len(s.backoff) == 0 {
		return 0
	}
	return s.backoff[min(max(n, 1), len(s.backoff))-1]
}

// predecessor is the sequence, in WORK, of the last item before this one of its session that the group takes; 0 for none.
func (s groupSettings) predecessor(w *workItem) uint64 {
	var last uint64
	for _, b := range w.GetBefore() {
		if b.GetWorkSeq() > s.start && slices.Contains(s.kinds, schema.Kind(b.GetKind())) {
			last = max(last, b.GetWorkSeq())
		}
	}
	return last
}

// filters are the subjects that the consumer takes.
func (s groupSettings) filters(k groupKey) []string {
	tenant := schema.EscapeToken(k.tenant)
	redriven := redriveSubjects(k)
	exact := len(s.sessions)*len(s.kinds) < maxFilters && !slices.ContainsFunc(s.sessions, func(p string) bool { return strings.HasSuffix(p, "*") })
	if !exact && len(s.kinds) == len(schema.WorkKinds()) {
		// The fewer, the quicker the server finds the next.
		return []string{"work." + tenant + ".>", redriven}
	}
	var subjects []string
	for _, kind := range s.kinds {
		root := "work." + tenant + "." + strconv.Itoa(int(kind)) + "."
		if !exact {
			subjects = append(subjects, root+"*")
			continue
		}
		for _, name := range s.sessions {
			subjects = append(subjects, root+schema.EscapeToken(name))
		}
	}
	return append(subjects, redriven)
}

// into writes the settings into a consumer's configuration.
func (s groupSettings) into(k groupKey, c jetstream.ConsumerConfig) (jetstream.ConsumerConfig, error) {
	var backoff []int64
	for _, d := range s.backoff {
		backoff = append(backoff, d.Milliseconds())
	}
	c.Metadata = map[string]string{
		metaTenant: k.tenant, metaGroup: k.name, metaAckWait: strconv.FormatInt(s.ackWait.Milliseconds(), 10), metaMaxDeliver: strconv.Itoa(s.maxDeliver), metaOrdered: strconv.FormatBool(s.ordered), metaBegan: s.began.UTC().Format(time.RFC3339Nano),
	}
	for name, v := range map[string]any{metaKinds: s.kinds, metaSessions: s.sessions, metaBackoff: backoff} {
		text, err := json.Marshal(v)
		if err != nil {
			return c, err
		}
		c.Metadata[name] = string(text)
	}
	// The edges count the time, so that nobody gets an item while another has it; the server's is for those that die.
	c.Durable, c.AckPolicy, c.AckWait = k.consumer(), jetstream.AckExplicitPolicy, max(c.AckWait, s.ackWait+patienceFor(s.ackWait))
	// The edges count: they know what became of an item that was handed out for the last time, and write it down before it is settled.
	c.MaxDeliver, c.MaxAckPending = -1, maxInHand
	c.FilterSubject, c.FilterSubjects = "", s.filters(k)
	return c, nil
}

// patienceFor is how much longer the server waits for an answer than the edges do. It never waits less than it did: what is in hand has the deadline of its time.
func patienceFor(ackWait time.Duration) time.Duration {
	return min(max(ackWait/10, 50*time.Millisecond), time.Second)
}

// settingsOf reads them back. The error says that the consumer is not one of Tidemark's.
func settingsOf(c jetstream.ConsumerConfig) (groupKey, groupSettings, error) {
	k := groupKey{c.Metadata[metaTenant], c.Metadata[metaGroup]}
	s := groupSettings{ordered: c.Metadata[metaOrdered] == "true"}
	if k.tenant == "" || k.name == "" {
		return k, s, errors.New("broker: its metadata names no group")
	}
	var backoff []int64
	for name, v := range map[string]any{metaKinds: &s.kinds, metaSessions: &s.sessions, metaBackoff: &backoff} {
		if err := json.Unmarshal([]byte(c.Metadata[name]), v); err != nil {
			return k, s, err
		}
	}
	for _, ms := range backoff {
		s.backoff = append(s.backoff, time.Duration(ms)*time.Millisecond)
	}
	ms, err := strconv.ParseInt(c.Metadata[metaAckWait], 10, 64)
	if err != nil {
		return k, s, err
	}
	s.ackWait = time.Duration(ms) * time.Millisecond
	if s.maxDeliver, err = strconv.Atoi(c.Metadata[metaMaxDeliver]); err != nil {
		return k, s, err
	}
	if s.began, err = time.Parse(time.RFC3339Nano, c.Metadata[metaBegan]); err != nil {
		return k, s, err
	}
	if c.OptStartSeq > 0 {
		s.start = c.OptStartSeq - 1
	}
	return k, s, nil
}

// proto is the group as clients see it.
func (s groupSettings) proto(k groupKey) *schema.WorkGroup {
	g := &schema.WorkGroup{
		Group: k.name, Sessions: s.sessions, AckWaitMs: uint64(s.ackWait.Milliseconds()), MaxDeliver: uint32(s.maxDeliver), Ordered: s.ordered, Created: timestamppb.New(s.began),
	}
	for _, kind := range s.kinds {
		g.Kinds = append(g.Kinds, kind.String())
	}
	for _, d := range s.backoff {
		g.BackoffMs = append(g.BackoffMs, uint64(d.Milliseconds()))
	}
	return g
}

// Check refuses options that no group can have: invalid_message.
func (o *WorkOptions) Check() error {
	wrong := func(format string, args ...any) error {
		return schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, format, args...)
	}
	if n := len(o.Group); n == 0 || n > schema.MaxGroupBytes {
		return wrong("The group's name has %d bytes; give it 1 to %d.", n, schema.MaxGroupBytes)
	}
	for _, kind := range o.Kinds {
		if !schema.IsWork(kind) {
			return wrong("Group %q asks for '%s', which makes no work; what does is %s.", o.Group, kind, words(schema.WorkKinds()))
		}
	}
	if len(o.Sessions) > schema.MaxWorkSessions {
		return wrong("Group %q names %d sessions; at most %d are allowed. Use prefixes.", o.Group, len(o.Sessions), schema.MaxWorkSessions)
	}
	for _, pattern := range o.Sessions {
		if n := len(pattern); n == 0 || n > schema.MaxNameBytes+1 {
			return wrong("Group %q names a session of %d bytes; give it 1 to %d.", o.Group, n, schema.MaxNameBytes)
		}
	}
	const least, most = schema.MinAckWaitMs * time.Millisecond, schema.MaxAckWaitMs * time.Millisecond
	switch {
	case o.Credit < 0 || o.Credit > schema.MaxWorkCredit:
		return wrong("A worker of group %q asks for a credit of %d items; 1 to %d are allowed.", o.Group, o.Credit, schema.MaxWorkCredit)
	case o.AckWait != 0 && (o.AckWait < least || o.AckWait > most):
		return wrong("Group %q asks for an ack wait of %s; %s to %s are allowed.", o.Group, o.AckWait, least, most)
	case o.MaxDeliver < 0 || o.MaxDeliver > schema.MaxDeliveries:
		return wrong("Group %q asks for items to be handed out %d times; 1 to %d are allowed.", o.Group, o.MaxDeliver, schema.MaxDeliveries)
	case len(o.Backoff) > schema.MaxBackoffs:
		return wrong("Group %q names %d rests; at most %d are allowed.", o.Group, len(o.Backoff), schema.MaxBackoffs)
	}
	for _, d := range o.Backoff {
		if d < 0 || d > schema.MaxBackoffMs*time.Millisecond {
			return wrong("Group %q names a rest of %s; at most %s are allowed.", o.Group, d, schema.MaxBackoffMs*time.Millisecond)
		}
	}
	return nil
}

// Widens refuses options that would take something from what a group takes: invalid_message. Items wait where the group's consumer has them; what its filter left out for a while would never be handed out, and nobody would know.
func (o *WorkOptions) Widens(kinds []schema.Kind, sessions []string) error {
	narrower := func(kind schema.Kind) bool { return !slices.Contains(o.Kinds, kind) }
	lost := func(pattern string) bool {
		return !slices.ContainsFunc(o.Sessions, func(by string) bool { return coversPattern(by, pattern) })
	}
	if (len(o.Kinds) == 0 || !slices.ContainsFunc(kinds, narrower)) && (len(o.Sessions) == 0 || !slices.ContainsFunc(sessions, lost)) {
		return nil
	}
	return schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "Group %q takes %s of %s. What a group takes can be widened and not be changed otherwise, so that nothing that waits is lost: leave 'kinds' and 'sessions' out to work as the group is set, or use another group.",
		o.Group, words(kinds), quoted(sessions))
}

// coversPattern reports whether a name or prefix takes everything that another takes.
func coversPattern(by, pattern string) bool {
	prefix, open := strings.CutSuffix(by, "*")
	return by == pattern || open && strings.HasPrefix(pattern, prefix)
}

// quotedMost bounds the names that a sentence lists.
const quotedMost = 8

// quoted is what sentences say of a group's sessions.
func quoted(sessions []string) string {
	if slices.Contains(sessions, "*") {
		return "all sessions"
	}
	var names []string
	for _, s := range sessions[:min(len(sessions), quotedMost)] {
		names = append(names, strconv.Quote(s))
	}
	if more := len(sessions) - len(names); more > 0 {
		return strings.Join(names, ", ") + " and " + strconv.Itoa(more) + " more"
	}
	return strings.Join(names, ", ")
}

func words(kinds []schema.Kind) string {
	all := make([]string, len(kinds))
	for i, k := range kinds {
		all[i] = k.String()
	}
	return strings.Join(all, ", ")
}

// Groups implements [Queue].
func (l *JetStreamLog) Groups(ctx context.Context, tenant string) ([]*schema.WorkGroup, error) {
	if _, err := l.ready(ctx); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, getTimeout)
	defer cancel()
	stream, err := l.js.Stream(ctx, workStream)
	if err != nil {
		return nil, unreadable(err)
	}
	var groups []*schema.WorkGroup
	all := stream.ListConsumers(ctx)
	for info := range all.Info() {
		k, s, err := settingsOf(info.Config)
		if err != nil || k.tenant != tenant {
			continue
		}
		g := s.proto(k)
		g.Waiting, g.InHand, g.Redelivered = info.NumPending, uint64(info.NumAckPending), uint64(info.NumRedelivered)
		groups = append(groups, g)
	}
	if err := all.Err(); err != nil {
		return nil, unreadable(err)
	}
	slices.SortFunc(groups, func(a, b *schema.WorkGroup) int { return strings.Compare(a.GetGroup(), b.GetGroup()) })
	return groups, nil
}
