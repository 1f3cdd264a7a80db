package edgegrpc

import (
	"context"
	"slices"

	"tidemark/broker"
	"tidemark/internal/auth"
	"tidemark/internal/gateway"
	"tidemark/schema"
)

const (
	// maxRedrive bounds the dead letters of one call.
	maxRedrive = 1000
	// maxLetterID bounds a dead letter's id, in bytes: it names a session, whose name can triple in it.
	maxLetterID = 1 << 10
)

// queue is where the groups are; a refusal where the log has none.
func (e *Edge) queue() (broker.Queue, error) {
	if e.cfg.Work == nil {
		return nil, schema.Refuse(schema.Code_CODE_UNSUPPORTED_PROTOCOL, "This edge has no work; ask another.")
	}
	return e.cfg.Work, nil
}

// keepRun keeps a run of a session for [keepFor].
func (e *Edge) keepRun(_ context.Context, p *auth.Principal, req *schema.KeepRunRequest) (*schema.KeepRunResponse, error) {
	id, err := session(p, gateway.Work, req.GetSession())
	if err != nil {
		return nil, err
	}
	if err := gateway.CheckRun(req.GetRunId()); err != nil {
		return nil, err
	}
	if e.cfg.Runs == nil {
		return nil, schema.Refuse(schema.Code_CODE_UNSUPPORTED_PROTOCOL, "This edge keeps no runs; ask another.")
	}
	if err := e.cfg.Gateway.Allow(p, 1); err != nil {
		return nil, err
	}
	if err := e.runs.keep(e.cfg.Runs, id, req.GetRunId()); err != nil {
		return nil, err
	}
	return &schema.KeepRunResponse{}, nil
}

// listWorkGroups shows all groups of the tenant to whoever may work: a group's name is no session's.
func (e *Edge) listWorkGroups(ctx context.Context, p *auth.Principal, _ *schema.ListWorkGroupsRequest) (*schema.ListWorkGroupsResponse, error) {
	if err := gateway.AuthorizeRole(p, gateway.Work); err != nil {
		return nil, err
	}
	q, err := e.queue()
	if err != nil {
		return nil, err
	}
	groups, err := q.Groups(ctx, p.Tenant)
	if err != nil {
		return nil, err
	}
	// What a group takes names sessions.
	groups = slices.DeleteFunc(groups, func(g *schema.WorkGroup) bool {
		return slices.ContainsFunc(g.GetSessions(), func(pattern string) bool { return !p.Covers(pattern) })
	})
	return &schema.ListWorkGroupsResponse{Groups: groups}, nil
}

// deleteWorkGroup removes a group of whose sessions the token gives access to all.
func (e *Edge) deleteWorkGroup(ctx context.Context, p *auth.Principal, req *schema.DeleteWorkGroupRequest) (*schema.DeleteWorkGroupResponse, error) {
	if err := gateway.AuthorizeRole(p, gateway.Work); err != nil {
		return nil, err
	}
	if n := len(req.GetGroup()); n == 0 || n > schema.MaxGroupBytes {
		return nil, schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "The group's name has %d bytes; give it 1 to %d.", n, schema.MaxGroupBytes)
	}
	q, err := e.queue()
	if err != nil {
		return nil, err
	}
	if err := e.cfg.Gateway.Allow(p, 1); err != nil {
		return nil, err
	}
	may := func(pattern string) error { return gateway.AuthorizePattern(p, gateway.Work, pattern) }
	if err := q.DeleteGroup(ctx, p.Tenant, req.GetGroup(), may); err != nil {
		return nil, err
	}
	return &schema.DeleteWorkGroupResponse{}, nil
}

// listing checks what both listings ask for, and returns how many they want.
func listing(p *auth.Principal, group, name string, pageSize uint32) (int, error) {
	if err := gateway.AuthorizeRole(p, gateway.Work); err != nil {
		return 0, err
	}
	if len(group) > schema.MaxGroupBytes {
		return 0, schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "The group's name has %d bytes; at most %d are allowed.", len(group), schema.MaxGroupBytes)
	}
	if name != "" {
		if _, err := session(p, gateway.Work, name); err != nil {
			return 0, err
		}
	}
	if pageSize == 0 {
		return defaultPageSize, nil
	}
	return int(min(pageSize, maxPageSize)), nil
}

// listWork shows the items of sessions that the token gives access to; a page may so hold fewer than were asked for, even none.
func (e *Edge) listWork(ctx context.Context, p *auth.Principal, req *schema.ListWorkRequest) (*schema.ListWorkResponse, error) {
	limit, err := listing(p, req.GetGroup(), req.GetSession(), req.GetPageSize())
	if err != nil {
		return nil, err
	}
	q, err := e.queue()
	if err != nil {
		return nil, err
	}
	page, err := q.Items(ctx, p.Tenant, broker.ItemQuery{Group: req.GetGroup(), Session: req.GetSession(), May: p.MayUse, Limit: limit, Token: req.GetPageToken()})
	if err != nil {
		return nil, err
	}
	return &schema.ListWorkResponse{Items: page.Items, NextPageToken: page.Next}, nil
}

// listDeadLetters shows the dead letters of sessions that the token gives access to.
func (e *Edge) listDeadLetters(ctx context.Context, p *auth.Principal, req *schema.ListDeadLettersRequest) (*schema.ListDeadLettersResponse, error) {
	limit, err := listing(p, req.GetGroup(), req.GetSession(), req.GetPageSize())
	if err != nil {
		return nil, err
	}
	if err := checkLetter(req.GetId()); err != nil {
		return nil, err
	}
	q, err := e.queue()
	if err != nil {
		return nil, err
	}
	page, err := q.DeadLetters(ctx, p.Tenant, broker.DeadQuery{
		Group: req.GetGroup(), Session: req.GetSession(), ID: req.GetId(), Redriven: req.GetRedriven(), May: p.MayUse, Limit: limit, Token: req.GetPageToken(),
	})
	if err != nil {
		return nil, err
	}
	return &schema.ListDeadLettersResponse{Letters: page.Letters, NextPageToken: page.Next}, nil
}

// redrive hands dead letters to their groups again. It costs an envelope for each: so many items it makes.
func (e *Edge) redrive(ctx context.Context, p *auth.Principal, req *schema.RedriveRequest) (*schema.RedriveResponse, error) {
	if err := gateway.AuthorizeRole(p, gateway.Work); err != nil {
		return nil, err
	}
	n := len(req.GetIds())
	if n == 0 || n > maxRedrive {
		return nil, schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "A redrive names 1 to %d dead letters; this one names %d.", maxRedrive, n)
	}
	for _, id := range req.GetIds() {
		if id == "" {
			return nil, schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "A redrive names a dead letter without an id; ListDeadLetters has the ids.")
		}
		if err := checkLetter(id); err != nil {
			return nil, err
		}
	}
	q, err := e.queue()
	if err != nil {
		return nil, err
	}
	if err := e.cfg.Gateway.Allow(p, n); err != nil {
		return nil, err
	}
	redriven, before, err := q.Redrive(ctx, p.Tenant, p.MayUse, req.GetIds())
	if err != nil {
		return nil, err
	}
	return &schema.RedriveResponse{Redriven: uint32(redriven), Before: uint32(before)}, nil
}

// checkLetter says what is wrong with a dead letter's id, which may be empty.
func checkLetter(id string) error {
	if len(id) > maxLetterID {
		return schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "The dead letter's id has %d bytes; none has more than %d.", len(id), maxLetterID)
	}
	return nil
}
