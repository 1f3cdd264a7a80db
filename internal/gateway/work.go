package gateway

import (
	"math"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"tidemark/broker"
	"tidemark/internal/auth"
	"tidemark/schema"
)

// MaxSubscriptions bounds the groups that one connection works for at once: each is a consumer of the log's, on this edge.
const MaxSubscriptions = 16

// subscription is a connection's part in a group of workers: it hands out what the group gives this connection. It is to work what an attachment is to events.
//
//	joining ──> working ──> ended
//	   └───────────────────────┘
type subscription struct {
	// Static after construction.
	c       *conn
	channel uint32
	options broker.WorkOptions

	queued atomic.Bool // it is in conn.ready
	leave  atomic.Bool // the peer wants no more; set by the reader
	// revoked is why the peer may work no longer; set by the reader.
	revoked atomic.Pointer[schema.Refusal]
	ended   atomic.Bool // its last frame is written, or about to be; set by the writer
	back    atomic.Bool // the group was joined, or was not; set by the task, taken by the writer
	// who is the peer, by its newest token; set by the reader, read wherever the group asks.
	who atomic.Pointer[auth.Principal]
	// group is nil before the group was joined; set by the writer, and from then on the reader may use taker.
	group atomic.Pointer[schema.WorkGroup]

	// Set by the task that joins, before back.
	taker broker.Taker
	err   error

	// Owned by the writer.
	joined bool // it has taken what the task found
	// gone is what was cancelled and not told yet.
	gone []broker.Cancellation
}

// subscribe handles a [schema.WorkSubscribe]. The error ends the connection. Called by the reader.
func (c *conn) subscribe(m *schema.WorkSubscribe) error {
	channel := m.GetChannel()
	if channel == 0 {
		return schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "A work_subscribe needs a channel above 0, chosen by the client.")
	}
	if c.isOpen(channel) {
		return alreadyOpen(channel)
	}
	if n := c.working(); n >= MaxSubscriptions {
		c.g.exceeded(LimitGroups)
		c.reply(errorFrame(schema.Refuse(schema.Code_CODE_LIMIT_EXCEEDED, "The connection works for %d groups; at most %d are allowed. Unsubscribe from some, or open another.", n, MaxSubscriptions), channel))
		return nil
	}
	s, err := c.newSubscription(m)
	if err != nil {
		r := schema.AsRefusal(err)
		c.g.Refused(r.Code)
		c.reply(errorFrame(r, channel))
		return nil
	}
	if c.workers == nil {
		c.workers = make(map[uint32]*subscription, 1)
	}
	c.workers[channel] = s
	c.g.metrics.subscriptions.Inc()
	tenant := c.principal.Tenant
	c.tasks.Go(func() {
		s.taker, s.err = c.g.cfg.Work.Join(c.ctx, tenant, s.options)
		s.back.Store(true)
		s.turn()
	})
	return nil
}

// working is for how many groups the connection works; those that ended are forgotten. Called by the reader.
func (c *conn) working() int {
	for channel, s := range c.workers {
		if s.ended.Load() {
			delete(c.workers, channel)
		}
	}
	return len(c.workers)
}

// isOpen says whether an attachment or a subscription has this number. Called by the reader.
func (c *conn) isOpen(channel uint32) bool {
	if a := c.channels[channel]; a != nil && !a.ended.Load() {
		return true
	}
	s := c.workers[channel]
	return s != nil && !s.ended.Load()
}

// alreadyOpen ends the connection: an error for the channel would end, in the client's eyes, what is there.
func alreadyOpen(channel uint32) error {
	return schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "Channel %d is open already; wait for its last frame, or choose another.", channel)
}

// newSubscription checks what was asked for.
func (c *conn) newSubscription(m *schema.WorkSubscribe) (*subscription, error) {
	if c.g.cfg.Work == nil {
		return nil, schema.Refuse(schema.Code_CODE_UNSUPPORTED_PROTOCOL, "This edge hands out no work; subscribe at another.")
	}
	if c.leaving.Load() {
		return nil, schema.Refuse(schema.Code_CODE_GOING_AWAY, "This edge is going away; subscribe to group %q at another.", m.GetGroup())
	}
	if err := c.spend(1, time.Now()); err != nil {
		return nil, err
	}
	if err := AuthorizeRole(c.principal, Work); err != nil {
		return nil, err
	}
	s := &subscription{c: c, channel: m.GetChannel()}
	s.who.Store(c.principal)
	if err := s.settings(m); err != nil {
		return nil, err
	}
	s.options.Wake = s.turn
	s.options.May = s.may
	return s, nil
}

// may says why the peer may not have all work of a session or prefix of the group's filter. A session socket has the work of its own session, and its frames do not say of which an item is.
func (s *subscription) may(pattern string) error {
	if err := AuthorizePattern(s.who.Load(), Work, pattern); err != nil {
		return err
	}
	if own := s.c.peer.Session; own != "" && pattern != own {
		return schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "Group %q takes work of %q, and the session socket of session %q works for that session alone; give each session a group of its own, or use /v1/connect.", s.options.Group, pattern, own)
	}
	return nil
}

// settings takes the group's settings over; each is left out where the client leaves it out. Whoever joins the group checks their bounds.
func (s *subscription) settings(m *schema.WorkSubscribe) error {
	o := &s.options
	o.Group, o.Credit, o.MaxDeliver, o.Ordered, o.FromNow = m.GetGroup(), max(int(m.GetCredit()), 1), int(m.GetMaxDeliver()), m.GetOrdered(), m.GetFromNow()
	o.AckWait = milliseconds(m.GetAckWaitMs())
	for _, ms := range m.GetBackoffMs() {
		o.Backoff = append(o.Backoff, milliseconds(ms))
	}
	for _, word := range m.GetKinds() {
		k, err := schema.ParseType(word)
		if err != nil {
			return schema.Refuse(schema.Code_CODE_UNKNOWN_TYPE, "Group %q asks for the kind %q, which is none that makes work; those are %s.", o.Group, word, schema.Words(schema.WorkKinds()))
		}
		if !slices.Contains(o.Kinds, k) {
			o.Kinds = append(o.Kinds, k)
		}
	}
	return s.filter(m.GetSessions())
}

// filter takes the sessions that the group is to hold. A session socket works for its own.
func (s *subscription) filter(sessions []string) error {
	c := s.c
	if own := c.peer.Session; own != "" {
		if len(sessions) > 1 || len(sessions) == 1 && sessions[0] != own {
			return schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "The session socket of session %q works for that session alone; leave 'sessions' out.", own)
		}
		if strings.HasSuffix(own, "*") {
			return schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "The name of session %q ends in *, so that a group of it takes work of all sessions that begin so, and its session socket works for it alone; use /v1/connect.", own)
		}
		sessions = []string{own}
	}
	for _, pattern := range sessions {
		if _, err := schema.ParseSessionID(c.principal.Tenant, pattern); err != nil {
			return err
		}
		if err := AuthorizePattern(c.principal, Work, pattern); err != nil {
			return err
		}
		s.options.Sessions = append(s.options.Sessions, pattern)
	}
	return nil
}

// milliseconds is a duration of the wire's, and the longest that there is where it is longer.
func milliseconds(ms uint64) time.Duration {
	return time.Duration(min(ms, math.MaxInt64/uint64(time.Millisecond))) * time.Millisecond
}

// unsubscribe handles a [schema.WorkUnsubscribe]. The error ends the connection. Called by the reader.
func (c *conn) unsubscribe(channel uint32) error {
	if channel == 0 {
		return schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "A work_unsubscribe needs the channel of a subscription.")
	}
	s := c.workers[channel]
	if s == nil || s.ended.Load() {
		// As for attachments: it ended by itself meanwhile, and nobody shall wait.
		c.reply(unsubscribedFrame(channel))
		return nil
	}
	s.leave.Store(true)
	s.turn()
	return nil
}

// mayWork asks anew whether the peer may work for its groups, when it has a new token. It returns the subscriptions that end, marked, so that nothing more is handed to them. Called by the reader.
func (c *conn) mayWork(p *auth.Principal) []*subscription {
	var revoked []*subscription
	for _, s := range c.workers {
		if s.ended.Load() {
			continue
		}
		// Before the group is looked at: of this and the writer, that sets the group and then looks at who, one sees the other's.
		s.who.Store(p)
		if err := s.mayWork(); err != nil {
			s.revoked.Store(schema.AsRefusal(err))
			revoked = append(revoked, s)
		}
	}
	return revoked
}

// mayWork says why the peer may not work for the group, with all the sessions that it may hold; nil before it was joined.
func (s *subscription) mayWork() error {
	g := s.group.Load()
	if g == nil {
		return nil
	}
	if len(g.GetSessions()) == 0 {
		return s.may("*")
	}
	for _, pattern := range g.GetSessions() {
		if err := s.may(pattern); err != nil {
			return err
		}
	}
	return nil
}

// turn puts the subscription into the writer's queue, unless it is there. It is the worker's Wake: it does not block.
func (s *subscription) turn() {
	if !s.queued.Swap(true) {
		s.c.enqueue(s)
	}
}

// speak gives the subscription its turn: it hands out what the group gave, about as much as one message holds. Called by the writer.
func (s *subscription) speak(w *writer) {
	s.queued.Store(false)
	if !s.joined {
		if !s.back.Load() {
			return
		}
		s.joined = true
		w.joined(s)
	}
	switch {
	case s.ended.Load():
	case s.leave.Load():
		w.worked(s, nil)
	case s.revoked.Load() != nil:
		w.worked(s, s.revoked.Load())
	default:
		w.handOut(s)
	}
}

// joined tells of the group that was joined.
func (w *writer) joined(s *subscription) {
	if s.err != nil {
		w.worked(s, s.err)
		return
	}
	w.workers = append(w.workers, s)
	g := s.taker.Group()
	s.group.Store(g)
	if err := s.mayWork(); err != nil {
		// The token that gave the right was replaced meanwhile, or the group is not one for a session socket.
		w.worked(s, err)
		return
	}
	if !s.leave.Load() && s.revoked.Load() == nil {
		w.c.codec.frame(w, &schema.ServerFrame{Frame: &schema.ServerFrame_WorkSubscribed{WorkSubscribed: &schema.WorkSubscribed{Channel: s.channel, Group: g}}})
	}
}

// retire lets the groups hand nothing more to this connection, whose edge goes away: what the peer has not got goes to others at once.
func (w *writer) retire() {
	for _, s := range w.workers {
		s.taker.Retire()
	}
}

// handOut writes the items that the worker holds and the peer has not, and what was cancelled of those that it has. An edge that goes away hands out nothing new.
func (w *writer) handOut(s *subscription) {
	// Asked before, told behind: what was cancelled may be an item that the peer has not got yet.
	s.gone = append(s.gone, s.taker.Cancellations()...)
	if w.c.leaving.Load() {
		s.taker.Retire()
	}
	var items []*broker.Item
	var over error
	more := false
	for size := 0; !w.c.leaving.Load(); {
		if more = size >= roundBytes; more {
			s.turn()
			break
		}
		got, err := s.taker.Take(1)
		if over = err; err != nil || len(got) == 0 {
			break
		}
		it := got[0]
		if over = s.mayHave(it); over != nil {
			// It goes back to the group with all the others.
			break
		}
		items = append(items, it)
		size += len(it.Envelope)
		w.c.g.metrics.items.WithLabelValues(it.Kind.String()).Inc()
		if it.Kind == schema.KindStartRun {
			w.c.holdRun(s, it)
		}
	}
	if len(items) > 0 {
		w.c.codec.work(w, s, items)
	}
	if !more {
		for _, gone := range s.gone {
			w.c.codec.frame(w, &schema.ServerFrame{Frame: &schema.ServerFrame_WorkCancelled{
				WorkCancelled: &schema.WorkCancelled{Channel: s.channel, WorkId: gone.ID, Seq: gone.Seq, Reason: gone.Reason},
			}})
		}
		s.gone = nil
	}
	if over != nil {
		w.worked(s, over)
	}
}

// mayHave says why the peer may not have an item: a group's filter may have grown since it joined, and rights are not the group's to give (I9).
func (s *subscription) mayHave(it *broker.Item) error {
	who := s.who.Load()
	if it.Session.Tenant != who.Tenant {
		return schema.Refuse(schema.Code_CODE_INTERNAL, "The group handed out an item of another tenant.")
	}
	if Authorize(who, Work, it.Session.Name) != nil {
		// Which session that is, the peer is not to know.
		return schema.Refuse(schema.Code_CODE_FORBIDDEN, "Group %q holds work of sessions that the token gives no access to, by now; use one whose claim 'sessions' names all of them.", s.options.Group)
	}
	if own := s.c.peer.Session; own != "" {
		return s.may(it.Session.Name)
	}
	return nil
}

// worked writes the subscription's last frame: that the peer has ended it, or why it ends. What is in hand goes back to the group.
func (w *writer) worked(s *subscription, err error) {
	if s.ended.Swap(true) {
		return
	}
	s.close()
	w.workers = slices.DeleteFunc(w.workers, func(of *subscription) bool { return of == s })
	w.c.g.metrics.subscriptions.Dec()
	if err == nil {
		w.c.codec.frame(w, unsubscribedFrame(s.channel))
		return
	}
	r := schema.AsRefusal(err)
	w.c.g.Refused(r.Code)
	w.c.codec.frame(w, errorFrame(r, s.channel))
}

// returnWork gives all items back, at once: their connection ends, and nothing more is said of them.
func (w *writer) returnWork() {
	for _, s := range w.workers {
		s.close()
	}
	w.workers = nil
}

// close ends the worker. Called by the writer, or when both it and the tasks have ended.
func (s *subscription) close() {
	if s.taker != nil {
		s.taker.Close()
		s.c.letRunsOf(s)
	}
}

func unsubscribedFrame(channel uint32) *schema.ServerFrame {
	return &schema.ServerFrame{Frame: &schema.ServerFrame_WorkUnsubscribed{WorkUnsubscribed: &schema.WorkUnsubscribed{Channel: channel}}}
}
