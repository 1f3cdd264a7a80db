package client

import (
	"context"

	"github.com/oklog/ulid/v2"
	"google.golang.org/protobuf/proto"

	"tidemark/schema"
)

// Call asks for a tool through a session, and waits for its result until ctx ends: it publishes the call with a request_id of its own and follows the session from there, over lost connections and edges.
// However often it has to send again, there is one call. A call without a call_id gets one; call stays the caller's.
//
// The result may say that the tool failed, which is no error of Call's. The error is a [*schema.Refusal]: cancelled where the request was cancelled, or the run in which it called, otherwise why the call was not stored or the session
// cannot be followed; or the context's, and then the result may still come.
func (c *Client) Call(ctx context.Context, session string, call *schema.ToolCall) (*schema.ToolResult, error) {
	request := ulid.Make().String()
	call, _ = proto.Clone(call).(*schema.ToolCall)
	if call.GetCallId() == "" {
		call.CallId = request
	}
	at, err := c.ask(ctx, session, &schema.Envelope{RequestId: request, Payload: &schema.Envelope_ToolCall{ToolCall: call}})
	if err != nil {
		return nil, err
	}
	f := c.Follow(FollowOptions{
		Session: session, After: at.First, Epoch: at.Epoch, Types: []string{
			schema.KindToolResult.String(), schema.KindCancel.String(), schema.KindStartRun.String(), schema.KindRunStatus.String(),
		},
	})
	defer f.Close()
	// another: the run in which it was called may not be the one under way any more.
	for another := false; ; {
		ev, err := f.Next(ctx)
		if err != nil {
			return nil, err
		}
		e := ev.Envelope
		if r := e.GetToolResult(); r != nil && e.GetRequestId() == request && r.GetCallId() == call.GetCallId() {
			return r, nil
		}
		if gone := e.GetCancel(); gone != nil && (gone.GetSession() || gone.GetRequestId() == request) {
			return nil, cancelledCall(session, call.GetCallId(), e.GetSeq(), gone.GetReason())
		}
		if s := e.GetRunStatus(); s.GetStatus() == schema.Status_STATUS_CANCELLED && e.GetSource().GetRole() == schema.Role_ROLE_SYSTEM && !another {
			return nil, cancelledCall(session, call.GetCallId(), e.GetReplyTo(), s.GetReason())
		}
		another = another || e.GetStartRun() != nil || schema.Ended(e.GetRunStatus().GetStatus())
	}
}

// ask publishes one envelope, once, and returns its place.
func (c *Client) ask(ctx context.Context, session string, e *schema.Envelope) (Ack, error) {
	var at Ack
	p := c.Publisher(ctx, PublishOptions{Session: session, Acked: func(a Ack) { at = a }})
	err := p.Publish(ctx, e)
	// It waits for the answer, and for the goroutine that notes it.
	if closed := p.Close(ctx); err == nil {
		err = closed
	}
	return at, err
}

func cancelledCall(session, call string, seq uint64, reason string) error {
	if reason != "" {
		reason = ": " + reason
	}
	return schema.Refuse(schema.Code_CODE_CANCELLED, "The call %q in session %q was cancelled by seq %d%s.", call, session, seq, reason)
}
