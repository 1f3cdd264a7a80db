package gateway

import (
	"strings"

	"tidemark/internal/auth"
	"tidemark/schema"
)

// Verb is something that a token may give the right to.
type Verb int

// The verbs.
const (
	// Publish: append to a session; what, [AuthorizeType] says.
	Publish Verb = 1 << iota
	// Follow: read a session, and where it stands.
	Follow
	// Work: take work that sessions hold, and say what became of it.
	Work
	// Create: begin a session by request.
	Create
	// List: see which sessions there are, of those that the token gives access to.
	List
	// Delete: remove a session and its history.
	Delete
)

// verbs in the order of PROTOCOL.md's columns.
var verbs = [...]Verb{Publish, Follow, Work, Create, List, Delete} //nolint:gochecknoglobals // a table that nothing writes

// kinds is a set of payload types, one bit each at the kind's number.
type kinds uint64

func kindsOf(all ...schema.Kind) (k kinds) {
	for _, kind := range all {
		k |= 1 << kind
	}
	return k
}

// has says whether a kind is in the set. It is asked for every envelope. A number beyond the set's, of a payload that this version does not know, is not.
func (k kinds) has(kind schema.Kind) bool { return k&(1<<uint(kind)) != 0 }

// everything a sender may publish. SessionCreated is none of it: it comes through CreateSession alone, with the right to [Create]. WorkFailed is Tidemark's own word.
var everything = kindsOf(schema.Kinds()...) &^ kindsOf(schema.KindSessionCreated, schema.KindWorkFailed) //nolint:gochecknoglobals // a table that nothing writes

// right is what a role may do, with the sessions that its token names.
type right struct {
	verbs Verb
	// kinds are the payload types that it may publish.
	kinds kinds
}

// rights is the one table of them; PROTOCOL.md shows it, and a test compares the two.
var rights = map[schema.Role]right{ //nolint:gochecknoglobals // a table that nothing writes
	schema.Role_ROLE_USER: {
		Publish | Follow | Create | List,
		kindsOf(schema.KindUserMessage, schema.KindUserInput, schema.KindStartRun, schema.KindCancel, schema.KindToolResult, schema.KindCustom),
	},
	// An answer to a question is a person's: nobody else says that it was given.
	schema.Role_ROLE_AGENT:   {Publish | Follow | Work | Create | List | Delete, everything &^ kindsOf(schema.KindUserInput)},
	schema.Role_ROLE_WORKER:  {Publish | Follow | Work | List, everything &^ kindsOf(schema.KindUserInput)},
	schema.Role_ROLE_ANALYST: {Follow | List, 0},
	schema.Role_ROLE_ADMIN:   {Publish | Follow | Work | Create | List | Delete, everything},
}

// Authorize is the one place where rights to sessions are decided: nil, or a refusal with forbidden whose sentence is the same whether the session exists or not (I9). For [List] the session is not
// looked at; the caller shows only the sessions that [auth.Principal.MayUse] allows.
func Authorize(p *auth.Principal, v Verb, session string) error {
	if err := AuthorizeRole(p, v); err != nil {
		return err
	}
	if v != List && !p.MayUse(session) {
		return schema.Refuse(schema.Code_CODE_FORBIDDEN, "The token gives no access to session %q; use one whose claim 'sessions' names it.", session)
	}
	return nil
}

// AuthorizePattern is [Authorize] for all sessions that a pattern names: a name, or a prefix that ends in '*'. The refusal is forbidden.
func AuthorizePattern(p *auth.Principal, v Verb, pattern string) error {
	if err := AuthorizeRole(p, v); err != nil {
		return err
	}
	if !p.Covers(pattern) {
		return schema.Refuse(schema.Code_CODE_FORBIDDEN, "The token does not give access to all that %q names; use one whose claim 'sessions' does.", pattern)
	}
	return nil
}

// AuthorizeRole decides whether a role may do a thing at all: nil, or a refusal with forbidden. It is enough where no session is named; the caller shows only those that [auth.Principal.MayUse] allows.
func AuthorizeRole(p *auth.Principal, v Verb) error {
	if rights[p.Role].verbs&v == 0 {
		return schema.Refuse(schema.Code_CODE_FORBIDDEN, "The role %s may not %s; use a token with another role.", auth.RoleWord(p.Role), v)
	}
	return nil
}

// AuthorizeType decides which payload types a role may publish: nil, or a refusal with forbidden that says which it may.
func AuthorizeType(p *auth.Principal, kind schema.Kind) error {
	may := rights[p.Role].kinds
	if may.has(kind) {
		return nil
	}
	if may == 0 {
		return schema.Refuse(schema.Code_CODE_FORBIDDEN, "The role %s may not publish; use a token with another role.", auth.RoleWord(p.Role))
	}
	if kind == schema.KindSessionCreated {
		return schema.Refuse(schema.Code_CODE_FORBIDDEN, "A '%s' cannot be published; create the session with CreateSession.", kind)
	}
	var words []string
	for _, k := range schema.Kinds() {
		if may.has(k) {
			words = append(words, k.String())
		}
	}
	return schema.Refuse(schema.Code_CODE_FORBIDDEN, "The role %s may not publish '%s'; it may publish %s.", auth.RoleWord(p.Role), kind, strings.Join(words, ", "))
}

// String is the verb as a sentence about it says it.
func (v Verb) String() string {
	switch v {
	case Publish:
		return "publish"
	case Follow:
		return "follow"
	case Work:
		return "work"
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
