package client

import (
	"context"

	"tidemark/schema"
)

// Like those of sessions, the calls below need an edge that speaks gRPC.

// WorkGroups returns the tenant's groups, in the order of their names.
func (c *Client) WorkGroups(ctx context.Context) ([]*schema.WorkGroup, error) {
	res := new(schema.ListWorkGroupsResponse)
	err := c.call(ctx, "ListWorkGroups", &schema.ListWorkGroupsRequest{}, res)
	return res.GetGroups(), err
}

// DeleteWorkGroup removes a group, with what it had in hand and what waited for it. The error is work_not_found where there is no such group.
func (c *Client) DeleteWorkGroup(ctx context.Context, group string) error {
	return c.call(ctx, "DeleteWorkGroup", &schema.DeleteWorkGroupRequest{Group: group}, new(schema.DeleteWorkGroupResponse))
}

// Work returns one page of items. The error is work_not_found where there is no such group.
func (c *Client) Work(ctx context.Context, req *schema.ListWorkRequest) (*schema.ListWorkResponse, error) {
	res := new(schema.ListWorkResponse)
	err := c.call(ctx, "ListWork", req, res)
	return res, err
}

// DeadLetters returns one page of what groups gave up.
func (c *Client) DeadLetters(ctx context.Context, req *schema.ListDeadLettersRequest) (*schema.ListDeadLettersResponse, error) {
	res := new(schema.ListDeadLettersResponse)
	err := c.call(ctx, "ListDeadLetters", req, res)
	return res, err
}

// Redrive hands dead letters to their groups again; before counts those that were redriven already. The error is work_not_found where one is not there, and then none was redriven; behind any other error some may be, and asked again, it goes on.
func (c *Client) Redrive(ctx context.Context, ids []string) (redriven, before int, err error) {
	res := new(schema.RedriveResponse)
	err = c.call(ctx, "Redrive", &schema.RedriveRequest{Ids: ids}, res)
	return int(res.GetRedriven()), int(res.GetBefore()), err
}

// KeepRun keeps a run for a minute, for agents without a connection. run is empty for the session's only one.
func (c *Client) KeepRun(ctx context.Context, session, run string) error {
	return c.call(ctx, "KeepRun", &schema.KeepRunRequest{Session: session, RunId: run}, new(schema.KeepRunResponse))
}
