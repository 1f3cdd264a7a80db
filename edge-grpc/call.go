package edgegrpc

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	"tidemark/internal/auth"
	"tidemark/internal/gateway"
	"tidemark/schema"
)

// call is one method of the service as both servers mount it.
type call[Req, Res any] struct {
	method string
	do     func(*Edge, context.Context, *auth.Principal, *Req) (*Res, error)
	// fail makes the failure of a refusal.
	fail func(*schema.Refusal) *failure
}

// The calls of the service that are not streams.
var (
	createSession = call[schema.CreateSessionRequest, schema.CreateSessionResponse]{"CreateSession", (*Edge).createSession, rejected} //nolint:gochecknoglobals // a row of a table that nothing writes
	getSession    = call[schema.GetSessionRequest, schema.GetSessionResponse]{"GetSession", (*Edge).getSession, failed}               //nolint:gochecknoglobals // a row of a table that nothing writes
	listSessions  = call[schema.ListSessionsRequest, schema.ListSessionsResponse]{"ListSessions", (*Edge).listSessions, failed}       //nolint:gochecknoglobals // a row of a table that nothing writes
	deleteSession = call[schema.DeleteSessionRequest, schema.DeleteSessionResponse]{"DeleteSession", (*Edge).deleteSession, failed}   //nolint:gochecknoglobals // a row of a table that nothing writes
	appendOnce    = call[schema.AppendRequest, schema.AppendResponse]{"Append", (*Edge).append, rejected}                             //nolint:gochecknoglobals // a row of a table that nothing writes

	keepRun         = call[schema.KeepRunRequest, schema.KeepRunResponse]{"KeepRun", (*Edge).keepRun, failed}                                 //nolint:gochecknoglobals // a row of a table that nothing writes
	listWorkGroups  = call[schema.ListWorkGroupsRequest, schema.ListWorkGroupsResponse]{"ListWorkGroups", (*Edge).listWorkGroups, failed}     //nolint:gochecknoglobals // a row of a table that nothing writes
	deleteWorkGroup = call[schema.DeleteWorkGroupRequest, schema.DeleteWorkGroupResponse]{"DeleteWorkGroup", (*Edge).deleteWorkGroup, failed} //nolint:gochecknoglobals // a row of a table that nothing writes
	listWork        = call[schema.ListWorkRequest, schema.ListWorkResponse]{"ListWork", (*Edge).listWork, failed}                             //nolint:gochecknoglobals // a row of a table that nothing writes
	listDeadLetters = call[schema.ListDeadLettersRequest, schema.ListDeadLettersResponse]{"ListDeadLetters", (*Edge).listDeadLetters, failed} //nolint:gochecknoglobals // a row of a table that nothing writes
	redrive         = call[schema.RedriveRequest, schema.RedriveResponse]{"Redrive", (*Edge).redrive, failed}                                 //nolint:gochecknoglobals // a row of a table that nothing writes
)

// run carries out one call for the bearer of the token.
func (c call[Req, Res]) run(ctx context.Context, e *Edge, protocol, token string, req *Req) (*Res, *failure) {
	began := time.Now()
	res, err := c.try(ctx, e, token, req)
	e.metrics.seconds.WithLabelValues(c.method).Observe(time.Since(began).Seconds())
	if err == nil {
		e.metrics.calls.WithLabelValues(c.method, protocol, "ok").Inc()
		return res, nil
	}
	r := refusalOf(ctx, err)
	e.cfg.Gateway.Refused(r.Code)
	e.metrics.calls.WithLabelValues(c.method, protocol, r.Code.Word()).Inc()
	level := slog.LevelDebug
	if r.Code == schema.Code_CODE_INTERNAL {
		level = slog.LevelError
	}
	e.cfg.Logger.LogAttrs(ctx, level, "call refused", slog.String("method", c.method), slog.String("reason", r.Code.Word()), slog.Any("err", r))
	return nil, c.fail(r)
}

func (c call[Req, Res]) try(ctx context.Context, e *Edge, token string, req *Req) (*Res, error) {
	p, err := e.identify(ctx, token)
	if err != nil {
		return nil, err
	}
	if r, ok := errors.AsType[*schema.Refusal](e.cfg.Gateway.Ready()); ok && r.Code == schema.Code_CODE_GOING_AWAY {
		return nil, r
	}
	return c.do(e, ctx, p, req)
}

// refusalOf makes a refusal of err. A caller whose deadline passed while the log was away is told to try again; it rarely hears it.
func refusalOf(ctx context.Context, err error) *schema.Refusal {
	if ctx.Err() != nil && errors.Is(err, ctx.Err()) {
		return &schema.Refusal{Code: schema.Code_CODE_UNAVAILABLE, Message: "The call was given up before it was done; try again with the same ids.", Err: err}
	}
	return schema.AsRefusal(err)
}

// identify says whose token it is. An empty one is none.
func (e *Edge) identify(ctx context.Context, token string) (*auth.Principal, error) {
	if token == "" {
		return nil, schema.Refuse(schema.Code_CODE_UNAUTHENTICATED, "The call carries no token; send one as metadata: authorization: Bearer TOKEN.")
	}
	return e.cfg.Verify(ctx, token)
}

// bearer is the token in an authorization header; empty where there is none.
func bearer(header string) string {
	scheme, token, ok := strings.Cut(header, " ")
	if !ok || !strings.EqualFold(scheme, "Bearer") {
		return ""
	}
	return strings.TrimSpace(token)
}

// stream is one of the service's streams as both servers mount it.
type stream struct {
	method string
	// protocol of its messages where they are binary.
	protocol gateway.Protocol
	// follows: the first message is an Attach, and it is the only one.
	follows bool
	// hello: the token may come in the first frame.
	hello bool
	// work: it carries what workers say and hear, and nothing else.
	work bool
	// serve serves the stream until it has ended, and closes its transport. Nil: the gateway does.
	serve func(e *Edge, ctx context.Context, p gateway.Peer)
}

var (
	appendStream = stream{method: "AppendStream", protocol: gateway.ProtoPublish}            //nolint:gochecknoglobals // a row of a table that nothing writes
	follow       = stream{method: "Follow", protocol: gateway.Proto, follows: true}          //nolint:gochecknoglobals // a row of a table that nothing writes
	connection   = stream{method: "Connect", protocol: gateway.Proto, hello: true}           //nolint:gochecknoglobals // a row of a table that nothing writes
	workers      = stream{method: "Work", protocol: gateway.Proto, work: true}               //nolint:gochecknoglobals // a row of a table that nothing writes
	tail         = stream{method: "Tail", protocol: gateway.Proto, serve: (*Edge).serveTail} //nolint:gochecknoglobals // a row of a table that nothing writes
)

// run serves the stream of a peer that is prepared.
func (s stream) run(ctx context.Context, e *Edge, p gateway.Peer) {
	if s.serve != nil {
		s.serve(e, ctx, p)
		return
	}
	_ = e.cfg.Gateway.Serve(ctx, p)
}

// peer prepares what the gateway needs to know of a stream whose caller sent this token. first is the message of a stream that follows.
func (s stream) peer(ctx context.Context, e *Edge, token, remote string, first func(*schema.Attach) error) (gateway.Peer, error) {
	peer := gateway.Peer{Protocol: s.protocol, Remote: remote, Work: s.work}
	if token != "" || !s.hello {
		p, err := e.identify(ctx, token)
		if err != nil {
			return peer, err
		}
		peer.Principal = p
	}
	if s.follows {
		peer.Follow = new(schema.Attach)
		if err := first(peer.Follow); err != nil {
			return peer, err
		}
	}
	return peer, nil
}

// attachOf decodes a binary Attach.
func attachOf(m *message) func(*schema.Attach) error {
	return func(a *schema.Attach) error {
		if err := proto.Unmarshal(m.bytes, a); err != nil {
			return &schema.Refusal{Code: schema.Code_CODE_INVALID_MESSAGE, Message: "The message is not an Attach.", Err: err}
		}
		return nil
	}
}
