package gateway

import (
	"tidemark/internal/auth"
	"tidemark/schema"
)

// AuthorizePrefix is [Authorize] for all sessions whose names begin so, those included that there are not yet; an empty prefix is every session of the tenant.
func AuthorizePrefix(p *auth.Principal, v Verb, prefix string) error {
	if rights[p.Role].verbs&v == 0 {
		return schema.Refuse(schema.Code_CODE_FORBIDDEN, "The role %s may not %s; use a token with another role.", auth.RoleWord(p.Role), v)
	}
	switch {
	case p.Covers(prefix + "*"):
		return nil
	case prefix == "":
		return schema.Refuse(schema.Code_CODE_FORBIDDEN, "The token does not give access to all sessions; use one whose claim 'sessions' has \"*\", or name a prefix.")
	default:
		return schema.Refuse(schema.Code_CODE_FORBIDDEN, "The token does not give access to all sessions that begin with %q; use one whose claim 'sessions' has %q, or a shorter prefix.", prefix, prefix+"*")
	}
}
