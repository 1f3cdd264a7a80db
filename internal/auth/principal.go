package auth

import (
	"strings"
	"time"
	"unicode/utf8"

	"tidemark/schema"
)

// DefaultTenant is the tenant of a token that names none.
const DefaultTenant = "default"

// Bounds of a token's content; a token beyond them is refused.
const (
	// MaxTokenBytes bounds an encoded token. Larger ones do not fit into the request headers that proxies let through.
	MaxTokenBytes = 16 << 10
	// MaxSessionPatterns bounds the entries of the claim sessions: each is compared at every attach and publish by name.
	MaxSessionPatterns = 256
)

// Principal is who a client is, as its token says. It is immutable once it was verified and may be read concurrently.
type Principal struct {
	// Subject is the claim sub: 1 to [schema.MaxIDBytes] bytes of UTF-8. It becomes the source of what the client appends.
	Subject string
	// Tenant is the wall around all that the client can reach (I9).
	Tenant string
	// Role is one of user, agent, worker, analyst, admin.
	Role schema.Role
	// Sessions are the names the client may use, and prefixes that end in '*'. "*" is every session of the tenant; none means no session at all.
	Sessions []string
	// Expires is when the token ends, without the leeway; zero for one that never does, which no verified token is.
	Expires time.Time
	// Until is when the token is no longer accepted: Expires and the leeway; zero for never.
	Until time.Time
}

// MayUse says whether the token gives access to the session of this name in its tenant.
func (p *Principal) MayUse(session string) bool {
	for _, s := range p.Sessions {
		if prefix, ok := strings.CutSuffix(s, "*"); ok {
			if strings.HasPrefix(session, prefix) {
				return true
			}
		} else if s == session {
			return true
		}
	}
	return false
}

// Covers says whether the token gives access to every session that a pattern stands for: a name, a prefix that ends in '*', or "*" for all of the tenant.
func (p *Principal) Covers(pattern string) bool {
	prefix, many := strings.CutSuffix(pattern, "*")
	if !many {
		return p.MayUse(pattern)
	}
	for _, s := range p.Sessions {
		if own, ok := strings.CutSuffix(s, "*"); ok && strings.HasPrefix(prefix, own) {
			return true
		}
	}
	return false
}

// Source is the principal as it stands in the envelopes that the client appends.
func (p *Principal) Source() *schema.Source {
	return &schema.Source{Subject: p.Subject, Role: p.Role}
}

// check says what is wrong with a principal, as a sentence; empty where nothing is.
func (p *Principal) check() string {
	switch {
	case p.Subject == "":
		return "The token has no subject; the claim 'sub' must say who the client is."
	case len(p.Subject) > schema.MaxIDBytes || !utf8.ValidString(p.Subject):
		return "The token's subject is longer than 200 bytes or not valid UTF-8."
	case p.Role == schema.Role_ROLE_UNSPECIFIED || RoleWord(p.Role) == "" || p.Role == schema.Role_ROLE_SYSTEM:
		return "The token's role is missing or unknown; the claim 'role' must be one of user, agent, worker, analyst, admin."
	case len(p.Sessions) > MaxSessionPatterns:
		return "The token names more than 256 sessions; use a prefix that ends in '*'."
	}
	if _, err := schema.ParseSessionID(p.Tenant, "any"); err != nil {
		return "The token's tenant is not a valid name; the claim 'tenant' must have 1 to 200 bytes of UTF-8, or be left out."
	}
	for _, s := range p.Sessions {
		if _, err := schema.ParseSessionID(p.Tenant, s); err != nil {
			return "The token names a session that is not a valid name; each entry of the claim 'sessions' must have 1 to 200 bytes of UTF-8."
		}
	}
	return ""
}

// RoleWord is the role as tokens and configuration name it: user, agent, worker, analyst, admin; empty for a number that is no role.
func RoleWord(r schema.Role) string {
	if _, ok := schema.Role_name[int32(r)]; !ok || r == schema.Role_ROLE_UNSPECIFIED {
		return ""
	}
	return strings.ToLower(strings.TrimPrefix(r.String(), "ROLE_"))
}

// ParseRole is the reverse of [RoleWord] for the roles that a token can have; unspecified where the word is not one of them. The role system is Tidemark's own, so no token has it.
func ParseRole(word string) schema.Role {
	r := schema.Role(schema.Role_value["ROLE_"+strings.ToUpper(word)])
	if r == schema.Role_ROLE_SYSTEM || RoleWord(r) != word {
		return schema.Role_ROLE_UNSPECIFIED
	}
	return r
}
