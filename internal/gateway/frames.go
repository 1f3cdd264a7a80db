package gateway

import (
	"tidemark/broker"
	"tidemark/schema"
)

// receive handles a client's frame. The error ends the connection. Called by the reader; size is the message's, in bytes.
func (c *conn) receive(f *schema.ClientFrame, size int) error {
	if hello, ok := f.GetFrame().(*schema.ClientFrame_Hello); ok {
		if c.peer.Work {
			return notForWorkers()
		}
		return c.hello(hello.Hello)
	}
	if err := c.greet(); err != nil {
		return err
	}
	if c.peer.Work && (f.GetAttach() != nil || f.GetDetach() != nil) {
		return notForWorkers()
	}
	switch m := f.GetFrame().(type) {
	case *schema.ClientFrame_Publish:
		c.publishDecoded(m.Publish, size)
	case *schema.ClientFrame_Attach:
		return c.attach(m.Attach)
	case *schema.ClientFrame_Detach:
		if m.Detach.GetChannel() == 0 {
			return schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "A detach needs the channel of an attachment.")
		}
		c.detached(m.Detach.GetChannel())
	case *schema.ClientFrame_Refresh:
		return c.refresh(m.Refresh.GetToken())
	case *schema.ClientFrame_Ping:
		if n := len(m.Ping.GetData()); n > maxPingBytes {
			return schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "The ping carries %d bytes; at most %d are allowed.", n, maxPingBytes)
		}
		c.reply(&schema.ServerFrame{Frame: &schema.ServerFrame_Pong{Pong: &schema.Pong{Data: m.Ping.GetData()}}})
	case *schema.ClientFrame_WorkSubscribe:
		return c.subscribe(m.WorkSubscribe)
	case *schema.ClientFrame_WorkUnsubscribe:
		return c.unsubscribe(m.WorkUnsubscribe.GetChannel())
	case *schema.ClientFrame_Ack:
		return c.acked(m.Ack)
	case *schema.ClientFrame_Nack:
		c.nacked(m.Nack)
	case *schema.ClientFrame_InProgress:
		return c.inProgress(m.InProgress)
	case *schema.ClientFrame_Term:
		c.termed(m.Term)
	case *schema.ClientFrame_Heartbeat:
		return c.heartbeat(m.Heartbeat)
	default:
		return schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "The message holds no frame that this version of the server knows.")
	}
	return nil
}

// notForWorkers refuses what the stream for workers does not carry.
func notForWorkers() error {
	return schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "The stream of the method Work carries neither hello, attach nor detach; follow sessions with the method Follow or Connect.")
}

// greet is called for every frame but hello: the first of a connection must be one, unless the transport brought a token.
func (c *conn) greet() error {
	c.greeted = true
	if c.principal == nil {
		return schema.Refuse(schema.Code_CODE_UNAUTHENTICATED, "The first frame must be hello with a token.")
	}
	return nil
}

// hello fixes who the peer is, where the transport has not done it, and answers with the welcome.
func (c *conn) hello(m *schema.Hello) error {
	if c.greeted {
		return schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "Hello must be the first frame of a connection, and come once.")
	}
	c.greeted = true
	if c.principal == nil {
		p, err := c.g.cfg.Verify(c.ctx, m.GetToken())
		if err != nil {
			return err
		}
		c.identify(p)
		c.watch()
	}
	status := c.g.cfg.Log.Status()
	limits := &c.g.cfg.Limits
	c.reply(&schema.ServerFrame{Frame: &schema.ServerFrame_Welcome{Welcome: &schema.Welcome{
		Edge: status.Edge, Version: c.g.cfg.Version, Durability: status.Durability,
		Limits: &schema.Limits{
			MaxEnvelopeBytes:    uint32(min(schema.MaxEnvelopeBytes, status.MaxEnvelopeBytes)),
			MaxPublishEnvelopes: schema.MaxPublishEnvelopes,
			MaxAttachedSessions: uint32(limits.Sessions),
			MaxFrameBytes:       schema.MaxFrameBytes,
			EnvelopesPerSecond:  c.rate.PerSecond, BurstEnvelopes: uint32(c.rate.Burst),
			MaxUserConnectionsPerSession: uint32(limits.connections(c.principal.Role)),
			MaxInFlightBytes:             uint32(c.g.cfg.MaxInFlightBytes),
		},
		Principal: c.principal.Source(), Tenant: c.principal.Tenant, Expires: expiresOf(c.principal),
	}}})
	return nil
}

// errorFrame says that an attachment ends, or with channel 0 the connection.
func errorFrame(r *schema.Refusal, channel uint32) *schema.ServerFrame {
	e := &schema.ErrorFrame{Code: r.Code, Message: r.Message, Channel: channel, Reconnect: r.Code.Rule().Reconnect, Epoch: r.Epoch}
	if r.Code == schema.Code_CODE_SEQ_BEYOND_HEAD {
		e.HeadSeq = new(r.Head)
	}
	return &schema.ServerFrame{Frame: &schema.ServerFrame_Error{Error: e}}
}

// rejectedFrame says that a publish was not stored.
func rejectedFrame(p *pending) *schema.ServerFrame {
	r := p.refusal
	m := &schema.Rejected{PublishId: p.id, Code: r.Code, Message: r.Message, Retryable: r.Code.Rule().Retryable}
	switch r.Code {
	case schema.Code_CODE_CONFLICT:
		m.HeadSeq = new(r.Head)
	case schema.Code_CODE_PRODUCER_GAP, schema.Code_CODE_PRODUCER_FENCED:
		m.Expected = new(r.Expected)
	default:
	}
	return &schema.ServerFrame{Frame: &schema.ServerFrame_Rejected{Rejected: m}}
}

// attachedFrame says where the follower found its session.
func (a *attachment) attachedFrame() *schema.ServerFrame {
	at := a.follower.Attachment()
	return &schema.ServerFrame{Frame: &schema.ServerFrame_Attached{Attached: &schema.Attached{
		Channel: a.channel, Session: a.id.Name, Epoch: at.Epoch, FirstSeq: at.First, HeadSeq: at.Head, Status: at.Status, AfterSeq: at.After,
	}}}
}

// truncatedFrame says that retention took envelopes the follower wanted (I4).
func (a *attachment) truncatedFrame(b *broker.Batch) *schema.ServerFrame {
	return &schema.ServerFrame{Frame: &schema.ServerFrame_Truncated{Truncated: &schema.Truncated{Channel: a.channel, WantedSeq: b.Wanted, FirstSeq: b.First}}}
}
