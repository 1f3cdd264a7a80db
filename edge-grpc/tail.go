package edgegrpc

import (
	"context"
	"errors"
	"io"
	"sync"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"tidemark/broker"
	"tidemark/internal/gateway"
	"tidemark/schema"
)

// serveTail serves a member of an analytics group: what its partitions hold goes out, acknowledgements come in. The partitions are given back before the peer hears of the end, so that where it comes again they are free.
//
// Three goroutines beside this one: one reads, one writes, one waits for the edge to leave. Whatever ends the stream is the cause of their context's end; the first counts.
func (e *Edge) serveTail(peer context.Context, p gateway.Peer) {
	ctx, end := context.WithCancelCause(peer)
	var running sync.WaitGroup
	running.Go(func() {
		select {
		case <-e.health.leaving:
			end(schema.Refuse(schema.Code_CODE_GOING_AWAY, "This edge is going away; tail through another, behind what you acknowledged."))
		case <-ctx.Done():
		}
	})
	if until := p.Principal.Until; !until.IsZero() {
		expiry := time.AfterFunc(time.Until(until), func() {
			end(schema.Refuse(schema.Code_CODE_TOKEN_EXPIRED, "The stream's token expired; come again with a new one, behind what you acknowledged."))
		})
		defer expiry.Stop()
	}
	opens, members := make(chan *schema.TailOpen), make(chan *broker.TailMember, 1)
	running.Go(func() { end(receiveTail(ctx, p, opens, members)) })
	member, err := e.openTail(ctx, p, opens)
	if err != nil {
		end(err)
	} else {
		members <- member
		running.Go(func() { end(sendTail(ctx, end, p, member)) })
	}
	<-ctx.Done()
	if member != nil {
		member.Close()
		<-e.tails
	}
	p.Transport.Close(farewellTo(ctx))
	running.Wait()
}

// farewellTo is what the peer is told at the end of ctx: nothing where it has gone by itself.
func farewellTo(ctx context.Context) (schema.Code, string) {
	err := context.Cause(ctx)
	if err == nil || errors.Is(err, io.EOF) || errors.Is(err, gateway.ErrPeerClosed) || errors.Is(err, gateway.ErrPeerLeft) {
		return schema.Code_CODE_UNSPECIFIED, ""
	}
	if errors.Is(err, context.Canceled) {
		return schema.Code_CODE_GOING_AWAY, "This edge is stopping; tail through another, behind what you acknowledged."
	}
	r := schema.AsRefusal(err)
	return r.Code, r.Message
}

// openTail waits for the first message and makes a member as it says. With the member comes a token in e.tails, which the caller takes out again.
func (e *Edge) openTail(ctx context.Context, p gateway.Peer, opens <-chan *schema.TailOpen) (*broker.TailMember, error) {
	late := time.NewTimer(gateway.DefaultHelloTimeout)
	defer late.Stop()
	var open *schema.TailOpen
	select {
	case open = <-opens:
	case <-late.C:
		return nil, schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "No 'open' came within %s; it is the first message of a tail.", gateway.DefaultHelloTimeout)
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	o, err := tailOptions(open)
	if err != nil {
		return nil, err
	}
	if err := gateway.AuthorizePrefix(p.Principal, gateway.Follow, o.Prefix); err != nil {
		return nil, err
	}
	if r, ok := errors.AsType[*schema.Refusal](e.cfg.Gateway.Ready()); ok && r.Code == schema.Code_CODE_GOING_AWAY {
		return nil, r
	}
	if e.cfg.Tails == nil {
		return nil, schema.Refuse(schema.Code_CODE_UNSUPPORTED_PROTOCOL, "This edge has no analytics groups; tail through one that has.")
	}
	select {
	case e.tails <- struct{}{}:
	default:
		return nil, schema.Refuse(schema.Code_CODE_LIMIT_EXCEEDED, "This edge has %d tails, as many as it takes; come again later, or use another edge.", cap(e.tails))
	}
	m, err := e.cfg.Tails.Tail(ctx, p.Principal.Tenant, o)
	if err != nil {
		<-e.tails
		return nil, err
	}
	return m, nil
}

// tailOptions reads the first message.
func tailOptions(open *schema.TailOpen) (o broker.TailOptions, err error) {
	o.Group, o.Prefix = open.GetGroup(), open.GetSessionPrefix()
	if n := len(open.GetTypes()); n > schema.MaxAttachTypes {
		return o, schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "The tail names %d types; at most %d are allowed.", n, schema.MaxAttachTypes)
	}
	if o.Kinds, err = schema.ParseTypes("The tail", open.GetTypes()); err != nil {
		return o, err
	}
	switch s := open.GetStart().(type) {
	case *schema.TailOpen_Now:
		o.Now = s.Now
	case *schema.TailOpen_Since:
		if err := s.Since.CheckValid(); err != nil {
			return o, &schema.Refusal{Code: schema.Code_CODE_INVALID_MESSAGE, Message: "The time to start from is not one.", Err: err}
		}
		o.Since = s.Since.AsTime()
	}
	return o, nil
}

// receiveTail hands on what the peer opens with, and then takes its acknowledgements, all that came before it left. The error is why nothing more does.
func receiveTail(ctx context.Context, p gateway.Peer, opens chan<- *schema.TailOpen, members <-chan *broker.TailMember) error {
	var member *broker.TailMember
	for {
		m, err := receiveTailRequest(ctx, p)
		if err != nil {
			return err
		}
		open, ack := m.GetOpen(), m.GetAck()
		switch {
		case member == nil && open == nil:
			return schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "The first message of a tail is its 'open'.")
		case member != nil && ack == nil:
			return schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "Behind its 'open' a tail takes nothing but 'ack'.")
		case member != nil:
			if err := member.Ack(ack.GetPartition(), ack.GetThrough()); err != nil {
				return err
			}
			continue
		}
		select {
		case opens <- open:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		select {
		case member = <-members:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

func receiveTailRequest(ctx context.Context, p gateway.Peer) (*schema.TailRequest, error) {
	b, err := p.Transport.Receive(ctx)
	if err != nil {
		return nil, err
	}
	m := new(schema.TailRequest)
	if p.Protocol == gateway.ProtoJSON {
		err = protojson.UnmarshalOptions{DiscardUnknown: true}.Unmarshal(b, m)
	} else {
		err = proto.Unmarshal(b, m)
	}
	if err != nil {
		return nil, &schema.Refusal{Code: schema.Code_CODE_INVALID_MESSAGE, Message: "The message is not a TailRequest.", Err: err}
	}
	return m, nil
}

// sendTail sends the peer what the member is told, until ctx ends. A write that takes too long ends the stream.
func sendTail(ctx context.Context, end context.CancelCauseFunc, p gateway.Peer, m *broker.TailMember) error {
	for {
		event, err := m.Next(ctx)
		if err != nil {
			return err
		}
		b, err := encodeTail(event)
		if err == nil && p.Protocol == gateway.ProtoJSON {
			b, err = tailJSON(b)
		}
		if err != nil {
			return err
		}
		stuck := time.AfterFunc(gateway.DefaultWriteTimeout, func() {
			end(schema.Refuse(schema.Code_CODE_PEER_DEAD, "The client took nothing for %s; come again, behind what you acknowledged.", gateway.DefaultWriteTimeout))
		})
		err = p.Transport.Send(ctx, [][]byte{b})
		stuck.Stop()
		if err != nil {
			// The stream is lost, or has ended; whoever reads it knows better, perhaps.
			return gateway.ErrPeerLeft
		}
	}
}

// Field numbers that encodeTail writes. TestTailFieldNumbers compares them with the descriptor.
const (
	tailResponseBatch protowire.Number = 2
	tailBatchSessions protowire.Number = 3
)

// encodeTail makes the TailResponse of an event. Envelopes go through as they are stored: the log's records and TailEnvelopes have them in the same field (docs/adr/0001-bytes-go-through.md).
func encodeTail(event broker.TailEvent) ([]byte, error) {
	batch := event.Batch
	if batch == nil {
		return marshalTail(&schema.TailResponse{Response: &schema.TailResponse_Assigned{Assigned: &schema.TailAssigned{Partitions: event.Partitions, Of: uint32(event.Of)}}})
	}
	body, err := marshalTail(&schema.TailBatch{Partition: batch.Partition, Through: batch.Through})
	for i := range batch.Frames {
		f := &batch.Frames[i]
		head, failed := marshalTail(&schema.TailEnvelopes{Session: f.Session, Epoch: f.Epoch, Stored: timestamppb.New(f.Stored)})
		if err = errors.Join(err, failed); err != nil {
			return nil, err
		}
		body = protowire.AppendTag(body, tailBatchSessions, protowire.BytesType)
		body = protowire.AppendVarint(body, uint64(len(head)+len(f.Records)))
		body = append(append(body, head...), f.Records...)
	}
	return protowire.AppendBytes(protowire.AppendTag(nil, tailResponseBatch, protowire.BytesType), body), err
}

func marshalTail(m proto.Message) ([]byte, error) {
	b, err := proto.Marshal(m)
	if err != nil {
		return nil, &schema.Refusal{Code: schema.Code_CODE_INTERNAL, Message: "What is stored cannot be sent.", Err: err}
	}
	return b, nil
}

// tailJSON is an encoded TailResponse in protobuf's JSON form.
func tailJSON(b []byte) ([]byte, error) {
	m := new(schema.TailResponse)
	if err := proto.Unmarshal(b, m); err != nil {
		return nil, &schema.Refusal{Code: schema.Code_CODE_INTERNAL, Message: "What is stored cannot be read.", Err: err}
	}
	return protojson.Marshal(m)
}
