package gateway

import (
	"context"
	"errors"
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	"tidemark/broker"
	"tidemark/schema"
)

// publishRequest is a Publish as it came in. Its slices point into the message.
type publishRequest struct {
	id        uint64
	session   []byte
	channel   uint32
	expected  *uint64
	envelopes [][]byte
}

// parse reads an encoded [schema.Publish] without decoding its envelopes: this is done for every token. Of a field that stands twice the last counts, and unknown ones are passed over, as
// protobuf says.
func (p *publishRequest) parse(b []byte) error {
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return malformed(protowire.ParseError(n))
		}
		b = b[n:]
		switch {
		case num == publishEnvelopes && typ == protowire.BytesType:
			body, m := protowire.ConsumeBytes(b)
			if m < 0 {
				return malformed(protowire.ParseError(m))
			}
			p.envelopes = append(p.envelopes, body)
			b = b[m:]
		case num == publishSession && typ == protowire.BytesType:
			body, m := protowire.ConsumeBytes(b)
			if m < 0 {
				return malformed(protowire.ParseError(m))
			}
			p.session = body
			b = b[m:]
		case num <= publishExpected && typ == protowire.VarintType:
			v, m := protowire.ConsumeVarint(b)
			if m < 0 {
				return malformed(protowire.ParseError(m))
			}
			switch num {
			case publishID:
				p.id = v
			case publishChannel:
				p.channel = uint32(v)
			case publishExpected:
				p.expected = new(v)
			}
			b = b[m:]
		default:
			m := protowire.ConsumeFieldValue(num, typ, b)
			if m < 0 {
				return malformed(protowire.ParseError(m))
			}
			b = b[m:]
		}
	}
	return nil
}

// forget lets go of the message, which may be large, and of what a publish of many envelopes needed.
func (p *publishRequest) forget() {
	clear(p.envelopes)
	envelopes := p.envelopes[:0]
	if cap(envelopes) > 64 {
		envelopes = nil
	}
	*p = publishRequest{envelopes: envelopes}
}

// Field numbers of [schema.Publish] and [schema.ClientFrame]. TestWireFieldNumbers compares them with the descriptors.
const (
	publishID        protowire.Number = 1
	publishSession   protowire.Number = 2
	publishChannel   protowire.Number = 3
	publishExpected  protowire.Number = 4
	publishEnvelopes protowire.Number = 15

	clientPublish protowire.Number = 1
)

func malformed(err error) error {
	return &schema.Refusal{Code: schema.Code_CODE_INVALID_MESSAGE, Message: "The message is not a well-formed frame of the protocol.", Err: err}
}

// target is a session that the connection publishes to.
type target struct {
	id schema.SessionID
	// epoch is that of the last acknowledgement. Owned by the writer.
	epoch string
}

// pending is a publish between the reader and its answer on the wire.
type pending struct {
	broker.Submission
	c      *conn
	target *target // nil where there is no such session to be had
	id     uint64
	size   int         // bytes, as counted in flight
	runs   []runChange // what it says of runs; nil for nearly all
	came   time.Time

	// The answer.
	receipt broker.Receipt
	refusal *schema.Refusal

	// one is where the envelope of most publishes stands.
	one [1]schema.Accepted
}

// admit waits until the bounds in flight leave room for a publish of this size, and counts it; nil where the connection ended meanwhile. Called by the reader, before any work is done.
func (c *conn) admit(id uint64, size int) *pending {
	for full := false; c.inFlight.Load() >= int64(c.g.cfg.MaxInFlight) || c.inFlightBytes.Load() >= int64(c.g.cfg.MaxInFlightBytes); full = true {
		if !full {
			c.g.exceeded(LimitInFlight)
		}
		if !c.waitForRoom() {
			return nil
		}
	}
	c.inFlight.Add(1)
	c.inFlightBytes.Add(int64(size))
	p := &pending{c: c, id: id, size: size, came: time.Now()}
	p.Done = p.answer
	return p
}

// drop takes a publish that will not be answered out of what is in flight. Called by the reader instead of handing it on.
func (c *conn) drop(p *pending) {
	c.inFlight.Add(-1)
	c.inFlightBytes.Add(-int64(p.size))
}

// mayPublish checks that the peer's role may publish this type: forbidden.
func (c *conn) mayPublish(kind schema.Kind) error {
	if c.kinds.has(kind) {
		return nil
	}
	return AuthorizeType(c.principal, kind)
}

// answer takes the log's answer. It may be called from anywhere, once, and does not block.
func (p *pending) answer(r broker.Receipt, err error) {
	p.receipt = r
	if err != nil {
		p.refusal = asAnswer(err)
	}
	c := p.c
	c.mu.Lock()
	c.answered = append(c.answered, p)
	c.mu.Unlock()
	c.poke()
}

// asAnswer makes a refusal of what the log said.
func asAnswer(err error) *schema.Refusal {
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return &schema.Refusal{
			Code: schema.Code_CODE_UNAVAILABLE, Message: "It was given up waiting for the publish to be stored; send it again with the same ids.", Err: err,
		}
	}
	return schema.AsRefusal(err)
}

// publishEncoded handles an encoded [schema.Publish]. The error ends the connection.
func (c *conn) publishEncoded(body []byte) error {
	r := &c.request
	defer r.forget()
	if err := r.parse(body); err != nil {
		return err
	}
	p := c.admit(r.id, len(body))
	if p == nil {
		return nil
	}
	n := len(r.envelopes)
	if err := c.spend(n, p.came); err != nil {
		p.answer(broker.Receipt{}, err)
		return nil
	}
	if err := c.aim(p, r.session, r.channel); err != nil {
		p.answer(broker.Receipt{}, err)
		return nil
	}
	if n == 0 || n > schema.MaxPublishEnvelopes {
		p.answer(broker.Receipt{}, wrongCount(n))
		return nil
	}
	p.Envelopes = p.one[:0]
	if n > 1 {
		p.Envelopes = make([]schema.Accepted, 0, n)
	}
	for _, raw := range r.envelopes {
		a, err := c.stamp.Accept(raw, p.came)
		if err == nil {
			err = c.mayPublish(a.Kind)
		}
		if err != nil {
			p.answer(broker.Receipt{}, err)
			return nil
		}
		p.Envelopes = append(p.Envelopes, a)
		p.noteRun(&a)
	}
	p.Expected = r.expected
	c.submit(p)
	return nil
}

// publishDecoded handles a publish that was decoded, from JSON or from an unusual encoding. size is the message's, in bytes.
func (c *conn) publishDecoded(m *schema.Publish, size int) {
	p := c.admit(m.GetPublishId(), size)
	if p == nil {
		return
	}
	n := len(m.GetEnvelopes())
	if err := c.spend(n, p.came); err != nil {
		p.answer(broker.Receipt{}, err)
		return
	}
	if err := c.aim(p, []byte(m.GetSession()), m.GetChannel()); err != nil {
		p.answer(broker.Receipt{}, err)
		return
	}
	if n == 0 || n > schema.MaxPublishEnvelopes {
		p.answer(broker.Receipt{}, wrongCount(n))
		return
	}
	for _, e := range m.GetEnvelopes() {
		a, err := c.stamp.AcceptEnvelope(e, p.came)
		if err == nil {
			err = c.mayPublish(a.Kind)
		}
		if err != nil {
			p.answer(broker.Receipt{}, err)
			return
		}
		p.Envelopes = append(p.Envelopes, a)
		p.noteRun(&a)
	}
	p.Expected = m.ExpectedSeq
	c.submit(p)
}

// submit hands the publish to the log. It blocks while the session's appender is full, which is how a fast producer is slowed down.
func (c *conn) submit(p *pending) {
	c.g.metrics.envelopesIn.Add(float64(len(p.Envelopes)))
	c.g.cfg.Log.Publish(c.ctx, p.target.id, &p.Submission)
}

func wrongCount(n int) error {
	return schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "A publish holds 1 to %d envelopes; this one holds %d.", schema.MaxPublishEnvelopes, n)
}

// aim finds the session that a publish goes to, and checks that the peer may publish there.
func (c *conn) aim(p *pending, session []byte, channel uint32) error {
	var t *target
	var name string // set where it is not in session
	switch {
	case len(session) > 0 && channel != 0:
		return schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "The publish names session %q and channel %d; name one of them.", session, channel)
	case len(session) > 0:
		t = c.targets[string(session)]
	case channel != 0:
		a := c.channels[channel]
		if a == nil || a.ended.Load() || a.detach.Load() {
			return schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "Channel %d is no open attachment; attach first, or name the session.", channel)
		}
		name = a.id.Name
		t = c.targets[name]
	default:
		name = c.peer.Session
		t = c.targets[name]
	}
	if t != nil {
		p.target = t
		return nil
	}
	if name == "" {
		name = string(session)
	}
	id, err := schema.ParseSessionID(c.principal.Tenant, name)
	if err != nil {
		return err
	}
	if err := Authorize(c.principal, Publish, id.Name); err != nil {
		return err
	}
	if c.targets == nil || len(c.targets) >= maxTargets {
		c.targets = make(map[string]*target)
	}
	p.target = &target{id: id}
	c.targets[id.Name] = p.target
	return nil
}
