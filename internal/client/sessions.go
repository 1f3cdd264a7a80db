package client

import (
	"context"

	"tidemark/schema"
)

// The calls below need an edge that speaks gRPC. Errors are refusals with what the edge said, or the context's.

// Create begins a session by request. The error is already_exists where it has envelopes.
func (c *Client) Create(ctx context.Context, req *schema.CreateSessionRequest) (*schema.Session, error) {
	res := new(schema.CreateSessionResponse)
	err := c.call(ctx, "CreateSession", req, res)
	return res.GetSession(), err
}

// Session tells where a session stands now.
func (c *Client) Session(ctx context.Context, name string) (*schema.Session, error) {
	res := new(schema.GetSessionResponse)
	err := c.call(ctx, "GetSession", &schema.GetSessionRequest{Session: name}, res)
	return res.GetSession(), err
}

// Sessions returns one page of the tenant's sessions.
func (c *Client) Sessions(ctx context.Context, req *schema.ListSessionsRequest) (*schema.ListSessionsResponse, error) {
	res := new(schema.ListSessionsResponse)
	err := c.call(ctx, "ListSessions", req, res)
	return res, err
}

// Delete removes a session with all its envelopes.
func (c *Client) Delete(ctx context.Context, name string) error {
	return c.call(ctx, "DeleteSession", &schema.DeleteSessionRequest{Session: name}, new(schema.DeleteSessionResponse))
}

// Append stores the envelopes of one request, all or none, and returns once they are stored. It does not try again; a caller that does gives each envelope an id, or a producer.
func (c *Client) Append(ctx context.Context, req *schema.AppendRequest) (*schema.AppendResponse, error) {
	res := new(schema.AppendResponse)
	err := c.call(ctx, "Append", req, res)
	return res, err
}
