package gateway

import (
	"tidemark/internal/auth"
	"tidemark/schema"
)

// Verb is something that a token may give the right to.
type Verb int

// The verbs.
const (
	// Publish: append to a session.
	Publish Verb = 1 << iota
	// Follow: read a session, and where it stands.
	Follow
	// Create: begin a session by request.
	Create
	// List: see which sessions there are, of those that the token gives access to.
	List
	// Delete: remove a session and its history.
	Delete
)

// rights says what each role may do, with the sessions that its token names.
var rights = map[schema.Role]Verb{ //nolint:gochecknoglobals // a table that nothing writes
	schema.Role_ROLE_USER:    Publish | Follow | Create | List,
	schema.Role_ROLE_AGENT:   Publish | Follow | Create | List | Delete,
	schema.Role_ROLE_WORKER:  Publish | Follow | List,
	schema.Role_ROLE_ANALYST: Follow | List,
	schema.Role_ROLE_ADMIN:   Publish | Follow | Create | List | Delete,
}

// Authorize is the one place where rights are decided: nil, or a refusal with forbidden whose sentence is the same whether the session exists or not (I9). For [List] the session is not
// looked at; the caller shows only the sessions that [auth.Principal.MayUse] allows.
func Authorize(p *auth.Principal, v Verb, session string) error {
	if rights[p.Role]&v == 0 {
		return schema.Refuse(schema.Code_CODE_FORBIDDEN, "The role %s may not %s; use a token with another role.", auth.RoleWord(p.Role), v)
	}
	if v != List && !p.MayUse(session) {
		return schema.Refuse(schema.Code_CODE_FORBIDDEN, "The token gives no access to session %q; use one whose claim 'sessions' names it.", session)
	}
	return nil
}

// String is the verb as a sentence about it says it.
func (v Verb) String() string {
	switch v {
	case Publish:
		return "publish"
	case Follow:
		return "follow"
	case Create:
		return "create sessions"
	case List:
		return "list sessions"
	case Delete:
		return "delete sessions"
	default:
		return "do that"
	}
}
