package main

import (
	"context"
	"fmt"
	"time"

	"tidemark/internal/auth"
	"tidemark/schema"
)

// tokenCommand is `tidemark token`.
type tokenCommand struct {
	Role    string        `default:"user" enum:"user,agent,worker,analyst,admin" help:"What the bearer may do: ${enum}."`
	Session []string      `sep:"none" placeholder:"NAME" help:"Session that the token gives access to, or a prefix that ends in *; may be repeated. Default: all of the tenant."`
	TTL     time.Duration `name:"ttl" default:"24h" help:"How long it lives."`
	Sub     string        `placeholder:"NAME" help:"Who the bearer is. Default: the role."`
	Tenant  string        `default:"default" help:"The tenant."`
	DataDir string        `default:"${data_dir}" help:"Data directory of the node whose secret signs the token."`
	secretFlags
}

// Run prints the token and nothing else.
func (c *tokenCommand) Run(_ context.Context, env *environment) error {
	secret, err := c.secret(c.DataDir)
	if err != nil {
		return err
	}
	p := auth.Principal{Subject: c.Sub, Tenant: c.Tenant, Role: auth.ParseRole(c.Role), Sessions: c.Session}
	if p.Subject == "" {
		p.Subject = c.Role
	}
	if len(p.Sessions) == 0 {
		p.Sessions = []string{"*"}
	}
	token, err := auth.Mint(secret, p, c.TTL)
	if schema.CodeOf(err) == schema.Code_CODE_INVALID_MESSAGE && err != nil {
		return usageError{err}
	}
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(env.stdout, token)
	return err
}
