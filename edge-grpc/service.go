package edgegrpc

import (
	"context"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	"tidemark/broker"
	"tidemark/internal/auth"
	"tidemark/internal/gateway"
	"tidemark/schema"
)

// Bounds of a listing.
const (
	defaultPageSize = 100
	maxPageSize     = 1000
)

// session checks the name and the right to it.
func session(p *auth.Principal, v gateway.Verb, name string) (schema.SessionID, error) {
	id, err := schema.ParseSessionID(p.Tenant, name)
	if err != nil {
		return id, err
	}
	return id, gateway.Authorize(p, v, name)
}

// createSession appends the session's first envelope: of two who create a session at once exactly one does.
func (e *Edge) createSession(ctx context.Context, p *auth.Principal, req *schema.CreateSessionRequest) (*schema.CreateSessionResponse, error) {
	id, err := session(p, gateway.Create, req.GetSession())
	if err != nil {
		return nil, err
	}
	if err := e.cfg.Gateway.Allow(p, 1); err != nil {
		return nil, err
	}
	created := &schema.SessionCreated{Kind: req.GetKind(), MetadataJson: req.GetMetadataJson()}
	if created.Kind == schema.SessionKind_SESSION_KIND_UNSPECIFIED {
		created.Kind = schema.SessionKind_SESSION_KIND_CHAT
	}
	a, err := schema.NewStamp(p.Source()).AcceptEnvelope(&schema.Envelope{Payload: &schema.Envelope_SessionCreated{SessionCreated: created}}, time.Now())
	if err != nil {
		return nil, err
	}
	_, err = broker.Append(ctx, e.cfg.Log, id, broker.Submission{Envelopes: []schema.Accepted{a}, Expected: new(uint64(0))})
	if schema.CodeOf(err) == schema.Code_CODE_CONFLICT {
		r := schema.AsRefusal(err)
		return nil, &schema.Refusal{
			Code: schema.Code_CODE_ALREADY_EXISTS, Head: r.Head, Err: err,
			Message: "The session \"" + id.Name + "\" exists already; append to it, or choose another name.",
		}
	}
	if err != nil {
		return nil, err
	}
	s, err := e.cfg.Log.Session(ctx, id)
	if err != nil {
		return nil, err
	}
	return &schema.CreateSessionResponse{Session: s}, nil
}

func (e *Edge) getSession(ctx context.Context, p *auth.Principal, req *schema.GetSessionRequest) (*schema.GetSessionResponse, error) {
	id, err := session(p, gateway.Follow, req.GetSession())
	if err != nil {
		return nil, err
	}
	s, err := e.cfg.Log.Session(ctx, id)
	if err != nil {
		return nil, err
	}
	return &schema.GetSessionResponse{Session: s}, nil
}

// listSessions shows the sessions that the token gives access to. A page may so hold fewer than were asked for, even none; only an empty token says that it was the last.
func (e *Edge) listSessions(ctx context.Context, p *auth.Principal, req *schema.ListSessionsRequest) (*schema.ListSessionsResponse, error) {
	if err := gateway.Authorize(p, gateway.List, ""); err != nil {
		return nil, err
	}
	if _, known := schema.Status_name[int32(req.GetStatus())]; !known {
		return nil, schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "There is no status with the number %d.", req.GetStatus())
	}
	prefix, any := narrowed(p, req.GetPrefix())
	if !any {
		return &schema.ListSessionsResponse{}, nil
	}
	limit := int(min(req.GetPageSize(), maxPageSize))
	if limit == 0 {
		limit = defaultPageSize
	}
	page, err := e.cfg.Log.Sessions(ctx, p.Tenant, broker.Query{Prefix: prefix, Status: req.GetStatus(), May: p.MayUse, Limit: limit, Token: req.GetPageToken()})
	if err != nil {
		return nil, err
	}
	return &schema.ListSessionsResponse{Sessions: page.Sessions, NextPageToken: page.Next}, nil
}

// narrowed returns the longest prefix that all sessions have which are asked for and which a token with one pattern gives access to, so that the registry is not read for nothing; false where
// there can be none.
func narrowed(p *auth.Principal, prefix string) (string, bool) {
	if len(p.Sessions) != 1 {
		return prefix, len(p.Sessions) > 0
	}
	own := strings.TrimSuffix(p.Sessions[0], "*")
	switch {
	case strings.HasPrefix(own, prefix):
		return own, true
	case strings.HasPrefix(prefix, own):
		return prefix, true
	default:
		return "", false
	}
}

func (e *Edge) deleteSession(ctx context.Context, p *auth.Principal, req *schema.DeleteSessionRequest) (*schema.DeleteSessionResponse, error) {
	id, err := session(p, gateway.Delete, req.GetSession())
	if err != nil {
		return nil, err
	}
	if err := e.cfg.Log.Delete(ctx, id); err != nil {
		return nil, err
	}
	return &schema.DeleteSessionResponse{}, nil
}

func (e *Edge) append(ctx context.Context, p *auth.Principal, req *schema.AppendRequest) (*schema.AppendResponse, error) {
	if n := proto.Size(req); n > schema.MaxFrameBytes {
		return nil, schema.Refuse(schema.Code_CODE_TOO_LARGE, "The request has %d bytes; at most %d are allowed. Append fewer envelopes at once.", n, schema.MaxFrameBytes)
	}
	if err := e.cfg.Gateway.Allow(p, len(req.GetEnvelopes())); err != nil {
		return nil, err
	}
	if n := len(req.GetEnvelopes()); n == 0 || n > schema.MaxPublishEnvelopes {
		return nil, schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "An append holds 1 to %d envelopes; this one holds %d.", schema.MaxPublishEnvelopes, n)
	}
	id, err := session(p, gateway.Publish, req.GetSession())
	if err != nil {
		return nil, err
	}
	stamp, now := schema.NewStamp(p.Source()), time.Now()
	s := broker.Submission{Expected: req.ExpectedSeq, Envelopes: make([]schema.Accepted, 0, len(req.GetEnvelopes()))}
	for _, envelope := range req.GetEnvelopes() {
		a, err := stamp.AcceptEnvelope(envelope, now)
		if err == nil {
			err = gateway.AuthorizeType(p, a.Kind)
		}
		if err != nil {
			return nil, err
		}
		s.Envelopes = append(s.Envelopes, a)
	}
	r, err := broker.Append(ctx, e.cfg.Log, id, s)
	if err != nil {
		return nil, err
	}
	return &schema.AppendResponse{FirstSeq: r.First, LastSeq: r.Last, Duplicate: r.Duplicate, Epoch: r.Epoch, Durability: e.cfg.Log.Status().Durability, Replaced: r.Replaced}, nil
}
