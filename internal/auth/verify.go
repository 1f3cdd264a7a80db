package auth

import (
	"context"
	"encoding/base64"
	"errors"
	"log/slog"
	"math"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"github.com/prometheus/client_golang/prometheus"

	"tidemark/schema"
)

// MinSecretBytes is the shortest secret for HS256: as long as its hash, says RFC 7518, section 3.2.
const MinSecretBytes = 32

// DefaultLeeway forgives clocks that differ by as much as machines with NTP do.
const DefaultLeeway = 5 * time.Second

// Config says which tokens to believe: those signed with the secret, those signed with a key of the JWKS, or both. At least one of the two must be set.
type Config struct {
	// Secret is the key of HS256, at least [MinSecretBytes]: the text of the secret file, as it is.
	Secret []byte
	// JWKS is where the public keys of RS256, ES256 and EdDSA are (RFC 7517). Whoever has one of their private keys can be anybody in any tenant.
	JWKS Source
	// Issuer and Audience, where set, are what the claim iss of a token signed with a key of the JWKS must be, and what its claim aud must have: one set of keys often serves many applications. Tokens
	// signed with the secret need neither, because the secret is for this system alone.
	Issuer, Audience string
	// Leeway is how long after exp, and before nbf, a token is still accepted. Default [DefaultLeeway]; negative for none.
	Leeway time.Duration
	// Transport fetches the JWKS of a URL. Default: one that obeys the environment's proxy.
	Transport http.RoundTripper
	// Logger gets what happens to the JWKS. Default: discarded.
	Logger *slog.Logger
	// Metrics is where those of the JWKS are registered; nil for nowhere.
	Metrics prometheus.Registerer
}

func (c *Config) validate() error {
	refuse := func(sentence string, args ...any) error {
		return schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, sentence, args...)
	}
	switch {
	case len(c.Secret) == 0 && c.JWKS == "":
		return refuse("Neither a secret for tokens nor a JWKS is set, so nobody could come in.")
	case len(c.Secret) > 0 && len(c.Secret) < MinSecretBytes:
		return refuse("The secret for tokens has %d bytes; HS256 needs at least %d.", len(c.Secret), MinSecretBytes)
	case c.JWKS == "" && (c.Issuer != "" || c.Audience != ""):
		return refuse("An issuer or an audience is of tokens signed with keys of a JWKS, and none is set.")
	}
	switch {
	case c.Leeway == 0:
		c.Leeway = DefaultLeeway
	case c.Leeway < 0:
		c.Leeway = 0
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return nil
}

// Verifier verifies tokens. It may be used concurrently.
type Verifier struct {
	// Static after construction.
	secret           []byte // nil where HS256 is not accepted
	keys             *keys  // nil without a JWKS
	issuer, audience string
	leeway           time.Duration
	parser           *jwt.Parser
	// accepted are the algorithms, for people.
	accepted string
}

// NewVerifier checks the configuration and makes a verifier of it. A JWKS in a file is read once; it must have a key that can be used. One at a URL is read when [Verifier.Run] begins.
func NewVerifier(c Config) (*Verifier, error) {
	if err := c.validate(); err != nil {
		return nil, err
	}
	v := &Verifier{issuer: c.Issuer, audience: c.Audience, leeway: c.Leeway}
	var methods []string
	if len(c.Secret) > 0 {
		v.secret = slices.Clone(c.Secret)
		methods = append(methods, jwt.SigningMethodHS256.Alg())
	}
	if c.JWKS != "" {
		var err error
		if v.keys, err = newKeys(&c); err != nil {
			return nil, err
		}
		methods = append(methods, jwt.SigningMethodRS256.Alg(), jwt.SigningMethodES256.Alg(), jwt.SigningMethodEdDSA.Alg())
	}
	v.accepted = strings.Join(methods, ", ")
	v.parser = jwt.NewParser(
		// The first guard against algorithm confusion and alg:none (RFC 8725, section 3.1): what the token's header asks for counts only where it is in this list. The second is in key.
		jwt.WithValidMethods(methods),
		jwt.WithExpirationRequired(),
		jwt.WithLeeway(c.Leeway),
		jwt.WithStrictDecoding(),
	)
	return v, nil
}

// Run keeps the keys of the JWKS fresh until ctx ends, and returns nil then; without a JWKS it only waits. It is called once. While it does not run, the keys stay those that were read last.
func (v *Verifier) Run(ctx context.Context) error {
	if v.keys == nil {
		<-ctx.Done()
		return nil
	}
	return v.keys.run(ctx)
}

// Ready is nil while tokens can be verified, otherwise a refusal ([schema.Code_CODE_UNAVAILABLE]): the JWKS was not read yet, or not for [JWKSMaxAge], or has no key. Tokens signed with the secret are
// verified all the same.
func (v *Verifier) Ready() error {
	if v.keys == nil {
		return nil
	}
	return v.keys.ready()
}

// Verify says who the bearer of a token is. It may wait for one read of the JWKS, [JWKSTimeout] at most and no longer than ctx lasts, where the token names a key that is not known.
//
// The error is a [*schema.Refusal] with a sentence in which nothing of the token stands: [schema.Code_CODE_UNAUTHENTICATED], or [schema.Code_CODE_UNAVAILABLE] where the token cannot be judged because
// the JWKS cannot be read, and its bearer should come again.
func (v *Verifier) Verify(ctx context.Context, token string) (*Principal, error) {
	if token == "" {
		return nil, unauthenticated("A token is needed: send it as 'Authorization: Bearer', as ?token=, as the WebSocket subprotocol bearer.<token>, or in hello.")
	}
	if len(token) > MaxTokenBytes {
		return nil, unauthenticated("The token is longer than 16 KiB.")
	}
	// base64 would skip line breaks. With strict decoding beside this, a token has one spelling.
	if strings.ContainsAny(token, "\r\n") {
		return nil, unauthenticated("The token is not a JSON Web Token.")
	}
	// Claims are taken from a map by their exact names: into a struct, encoding/json would take 'Role' for 'role' too.
	claims := jwt.MapClaims{}
	parsed, err := v.parser.ParseWithClaims(token, claims, func(t *jwt.Token) (any, error) { return v.key(ctx, t) })
	if err != nil {
		if r, ok := errors.AsType[*schema.Refusal](err); ok {
			return nil, r
		}
		return nil, unauthenticated(v.why(err))
	}
	// RFC 7519, section 4, lets one choose: refuse a name that stands twice, or take the last. Whoever looked at the claims before they were signed may have taken the first.
	if members(token, 1) != len(claims) {
		return nil, unauthenticated("A claim stands twice in the token.")
	}
	p, err := principal(claims)
	if err != nil {
		return nil, err
	}
	if parsed.Method.Alg() != jwt.SigningMethodHS256.Alg() {
		if err := v.checkOrigin(claims); err != nil {
			return nil, err
		}
	}
	p.Until = p.Expires.Add(v.leeway)
	return p, nil
}

// key is where a token's header chooses the key. The parser has checked before that the algorithm is in the list. Nothing else in the header is looked at: keys that a token brings along, or says where
// to find (jwk, x5c, jku, x5u), are not keys of ours (RFC 8725, section 3.10).
func (v *Verifier) key(ctx context.Context, t *jwt.Token) (any, error) {
	if members(t.Raw, 0) != len(t.Header) {
		return nil, unauthenticated("A name stands twice in the token's header.")
	}
	// RFC 7515, section 4.1.11: what is listed there must be understood, and none of it is.
	if _, ok := t.Header["crit"]; ok {
		return nil, unauthenticated("The token demands extensions ('crit'), and none is known here.")
	}
	alg := t.Method.Alg()
	if alg == jwt.SigningMethodHS256.Alg() {
		// The secret, whatever key the token names: a public key is never a secret.
		return v.secret, nil
	}
	claimed, named := t.Header["kid"]
	kid, ok := claimed.(string)
	if named && !ok {
		return nil, unauthenticated("The token's 'kid' is not a string.")
	}
	return v.keys.find(ctx, alg, kid, named)
}

// checkOrigin checks who issued the token, and for whom.
func (v *Verifier) checkOrigin(claims jwt.MapClaims) error {
	if v.issuer != "" {
		if issuer, err := claims.GetIssuer(); err != nil || issuer != v.issuer {
			return unauthenticated("The token's issuer ('iss') is not the one whose tokens are accepted here.")
		}
	}
	if v.audience != "" {
		if audience, err := claims.GetAudience(); err != nil || !slices.Contains(audience, v.audience) {
			return unauthenticated("The token is not for this audience ('aud').")
		}
	}
	return nil
}

// members counts the members of the object that is a part of a token: 0 the header, 1 the claims. The part was decoded before, so it is valid JSON; where a name stands twice, the map that came out has
// fewer.
func members(token string, part int) (n int) {
	b, err := base64.RawURLEncoding.DecodeString(strings.Split(token, ".")[part])
	if err != nil {
		return -1
	}
	depth, quoted := 0, false
	for i := 0; i < len(b); i++ {
		switch c := b[i]; {
		case quoted && c == '\\':
			i++
		case c == '"':
			quoted = !quoted
		case quoted:
		case c == '{' || c == '[':
			depth++
		case c == '}' || c == ']':
			depth--
		case c == ':' && depth == 1:
			n++
		}
	}
	return n
}

func unauthenticated(sentence string) *schema.Refusal {
	return &schema.Refusal{Code: schema.Code_CODE_UNAUTHENTICATED, Message: sentence}
}

// why turns the parser's error into a sentence. The error itself goes no further, because it may quote the token.
func (v *Verifier) why(err error) string {
	for _, row := range []struct {
		err      error
		sentence string
	}{
		{jwt.ErrTokenMalformed, "The token is not a JSON Web Token."},
		{jwt.ErrTokenUnverifiable, "The token cannot be verified; its algorithm must be one of " + v.accepted + "."},
		{jwt.ErrTokenSignatureInvalid, "The token's signature is not valid here, or its algorithm is not one of " + v.accepted + "."},
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
