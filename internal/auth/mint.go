package auth

import (
	"time"

	"github.com/golang-jwt/jwt/v5"

	"tidemark/schema"
)

// Mint makes a token for the principal that [Verifier.Verify] accepts for ttl from now on, which replaces p.Expires. An empty tenant is the default one.
func Mint(secret []byte, p Principal, ttl time.Duration) (string, error) {
	if p.Tenant == "" {
		p.Tenant = DefaultTenant
	}
	switch sentence := p.check(); {
	case len(secret) < MinSecretBytes:
		return "", schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "The secret for tokens has %d bytes; HS256 needs at least %d.", len(secret), MinSecretBytes)
	case sentence != "":
		return "", schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "%s", sentence)
	case ttl <= 0:
		return "", schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "A token must live longer than %s.", ttl)
	}
	now := time.Now()
	// exp has whole seconds; rounded up, a token lives at least as long as was asked for.
	exp := now.Add(ttl + time.Second - 1)
	if !sane(exp) {
		return "", schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "A token cannot live as long as %s.", ttl)
	}
	token, err := jwt.NewWithClaims(jwt.SigningMethodHS256, jwt.MapClaims{
		"sub": p.Subject, "tenant": p.Tenant, "role": RoleWord(p.Role), "sessions": p.Sessions, "iat": now.Unix(), "exp": exp.Unix(),
	}).SignedString(secret)
	if err != nil {
		return "", &schema.Refusal{Code: schema.Code_CODE_INTERNAL, Message: "The token could not be signed.", Err: err}
	}
	return token, nil
}
