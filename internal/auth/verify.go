package auth

import (
	"errors"
	"math"
	"time"

	"github.com/golang-jwt/jwt/v5"

	"tidemark/schema"
)

// MinSecretBytes is the shortest secret for HS256: as long as its hash, says RFC 7518, section 3.2.
const MinSecretBytes = 32

// DefaultLeeway forgives clocks that differ by as much as machines with NTP do.
const DefaultLeeway = 5 * time.Second

// Config says which tokens to believe.
type Config struct {
	// Secret is the key of HS256, at least [MinSecretBytes]: the text of the secret file, as it is.
	Secret []byte
	// Leeway is how long after exp, and before nbf, a token is still accepted. Default [DefaultLeeway]; negative for none.
	Leeway time.Duration
}

// Verifier verifies tokens. It may be used concurrently.
type Verifier struct {
	secret []byte
	parser *jwt.Parser
}

// NewVerifier checks the configuration and makes a verifier of it.
func NewVerifier(c Config) (*Verifier, error) {
	if len(c.Secret) < MinSecretBytes {
		return nil, schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "The secret for tokens has %d bytes; HS256 needs at least %d.", len(c.Secret), MinSecretBytes)
	}
	leeway := c.Leeway
	switch {
	case leeway == 0:
		leeway = DefaultLeeway
	case leeway < 0:
		leeway = 0
	}
	return &Verifier{
		secret: append([]byte(nil), c.Secret...),
		parser: jwt.NewParser(
			// The one guard against algorithm confusion and alg:none: what the token's header asks for counts only where it is in this list.
			jwt.WithValidMethods([]string{jwt.SigningMethodHS256.Alg()}),
			jwt.WithExpirationRequired(),
			jwt.WithLeeway(leeway),
		),
	}, nil
}

// Verify says who the bearer of a token is. The error is a [*schema.Refusal] with [schema.Code_CODE_UNAUTHENTICATED] and a sentence in which nothing of the token stands.
func (v *Verifier) Verify(token string) (*Principal, error) {
	if token == "" {
		return nil, unauthenticated("A token is needed: send it as 'Authorization: Bearer', as ?token=, as the WebSocket subprotocol bearer.<token>, or in hello.")
	}
	if len(token) > MaxTokenBytes {
		return nil, unauthenticated("The token is longer than 16 KiB.")
	}
	// Claims are taken from a map by their exact names: into a struct, encoding/json would take 'Role' for 'role' too.
	claims := jwt.MapClaims{}
	if _, err := v.parser.ParseWithClaims(token, claims, v.key); err != nil {
		return nil, unauthenticated(why(err))
	}
	return principal(claims)
}

// key is where a token's header chooses the key. The parser has checked the algorithm before.
func (v *Verifier) key(*jwt.Token) (any, error) { return v.secret, nil }

func unauthenticated(sentence string) *schema.Refusal {
	return &schema.Refusal{Code: schema.Code_CODE_UNAUTHENTICATED, Message: sentence}
}

// why turns the parser's error into a sentence. The error itself goes no further, because it may quote the token.
func why(err error) string {
	for _, row := range []struct {
		err      error
		sentence string
	}{
		{jwt.ErrTokenMalformed, "The token is not a JSON Web Token."},
		{jwt.ErrTokenUnverifiable, "The token cannot be verified; only HS256 is accepted here."},
		{jwt.ErrTokenSignatureInvalid, "The token's signature is not valid here, or its algorithm is not HS256."},
		{jwt.ErrTokenExpired, "The token has expired; get a new one."},
		{jwt.ErrTokenNotValidYet, "The token is not valid yet; check the clocks."},
		{jwt.ErrTokenRequiredClaimMissing, "The token has no 'exp'; a token must expire."},
	} {
		if errors.Is(err, row.err) {
			return row.sentence
		}
	}
	return "The token's claims are not valid."
}

// principal reads the claims of a token whose signature and times were checked.
func principal(claims jwt.MapClaims) (*Principal, error) {
	p := &Principal{Tenant: DefaultTenant}
	exp, err := claims.GetExpirationTime()
	if err != nil || exp == nil || !sane(exp.Time) {
		return nil, unauthenticated("The token's 'exp' is not a time.")
	}
	p.Expires = exp.Time
	p.Subject, _ = claims["sub"].(string)
	if tenant, ok := claims["tenant"]; ok {
		// A tenant that is there and is no name must not become the default one.
		p.Tenant, _ = tenant.(string)
	}
	role, _ := claims["role"].(string)
	p.Role = ParseRole(role)
	switch sessions := claims["sessions"].(type) {
	case nil:
	case string:
		p.Sessions = []string{sessions}
	case []any:
		p.Sessions = make([]string, len(sessions))
		for i, s := range sessions {
			name, ok := s.(string)
			if !ok {
				return nil, unauthenticated("The token's 'sessions' is not a list of names.")
			}
			p.Sessions[i] = name
		}
	default:
		return nil, unauthenticated("The token's 'sessions' is not a list of names.")
	}
	if sentence := p.check(); sentence != "" {
		return nil, unauthenticated(sentence)
	}
	return p, nil
}

// sane: a time that arithmetic with durations does not overflow on.
func sane(t time.Time) bool { return t.Unix() > 0 && t.Unix() < math.MaxInt32*64 }

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
