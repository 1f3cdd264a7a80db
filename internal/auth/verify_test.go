package auth_test

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/golang-jwt/jwt/v5"

	"tidemark/internal/auth"
	"tidemark/schema"
)

var secret = []byte("0123456789abcdef0123456789abcdef")

func verifier(t testing.TB, leeway time.Duration) *auth.Verifier {
	t.Helper()
	v, err := auth.NewVerifier(auth.Config{Secret: secret, Leeway: leeway})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func sign(t testing.TB, method jwt.SigningMethod, key any, claims jwt.MapClaims) string {
	t.Helper()
	token, err := jwt.NewWithClaims(method, claims).SignedString(key)
	if err != nil {
		t.Fatal(err)
	}
	return token
}

// good are claims that are accepted; with changes some of them. A nil value takes the claim away.
func good(changes jwt.MapClaims) jwt.MapClaims {
	c := jwt.MapClaims{"sub": "ada", "tenant": "acme", "role": "user", "sessions": []string{"chat-1", "team-*"}, "exp": time.Now().Add(time.Hour).Unix()}
	for k, v := range changes {
		if v == nil {
			delete(c, k)
		} else {
			c[k] = v
		}
	}
	return c
}

func TestVerifyGivesThePrincipal(t *testing.T) {
	exp := time.Now().Add(time.Hour).Truncate(time.Second)
	p, err := verifier(t, 0).Verify(t.Context(), sign(t, jwt.SigningMethodHS256, secret, good(jwt.MapClaims{"exp": exp.Unix()})))
	if err != nil {
		t.Fatal(err)
	}
	if p.Subject != "ada" || p.Tenant != "acme" || p.Role != schema.Role_ROLE_USER || !p.Expires.Equal(exp) {
		t.Fatalf("principal %+v", p)
	}
	if s := p.Source(); s.GetSubject() != "ada" || s.GetRole() != schema.Role_ROLE_USER {
		t.Fatalf("source %v", s)
	}
}

func TestVerifyClaims(t *testing.T) {
	now := time.Now()
	tests := []struct {
		name    string
		changes jwt.MapClaims
		says    string // part of the refusal's sentence; empty where the token is accepted
	}{
		{"as it is", nil, ""},
		{"no tenant is the default one", jwt.MapClaims{"tenant": nil}, ""},
		{"one session as a string", jwt.MapClaims{"sessions": "x"}, ""},
		{"no sessions", jwt.MapClaims{"sessions": nil}, ""},
		{"tenant of 200 bytes", jwt.MapClaims{"tenant": strings.Repeat("t", 200)}, ""},
		{"empty tenant", jwt.MapClaims{"tenant": ""}, "tenant"},
		{"tenant of 201 bytes", jwt.MapClaims{"tenant": strings.Repeat("t", 201)}, "tenant"},
		{"tenant is a number", jwt.MapClaims{"tenant": 1}, "tenant"},
		{"tenant is a list", jwt.MapClaims{"tenant": []string{"acme"}}, "tenant"},
		{"no subject", jwt.MapClaims{"sub": nil}, "subject"},
		{"empty subject", jwt.MapClaims{"sub": ""}, "subject"},
		{"subject too long", jwt.MapClaims{"sub": strings.Repeat("s", 201)}, "subject"},
		{"no role", jwt.MapClaims{"role": nil}, "role"},
		{"unknown role", jwt.MapClaims{"role": "root"}, "role"},
		{"role in upper case", jwt.MapClaims{"role": "ADMIN"}, "role"},
		{"role of Tidemark itself", jwt.MapClaims{"role": "system"}, "role"},
		{"role unspecified", jwt.MapClaims{"role": "unspecified"}, "role"},
		{"a claim of similar name is another claim", jwt.MapClaims{"role": nil, "Role": "admin"}, "role"},
		{"sessions are numbers", jwt.MapClaims{"sessions": []int{1}}, "sessions"},
		{"sessions is an object", jwt.MapClaims{"sessions": map[string]any{"a": 1}}, "sessions"},
		{"an empty session name", jwt.MapClaims{"sessions": []string{""}}, "session"},
		{"a session name too long", jwt.MapClaims{"sessions": []string{strings.Repeat("x", 201)}}, "session"},
		{"too many sessions", jwt.MapClaims{"sessions": make([]string, 257)}, "256"},
		{"no exp", jwt.MapClaims{"exp": nil}, "exp"},
		{"exp is a word", jwt.MapClaims{"exp": "tomorrow"}, ""},
		{"exp beyond all time", jwt.MapClaims{"exp": 1e300}, ""},
		{"expired", jwt.MapClaims{"exp": now.Add(-time.Minute).Unix()}, "expired"},
		{"expired within the leeway", jwt.MapClaims{"exp": now.Add(-2 * time.Second).Unix()}, ""},
		{"not yet valid", jwt.MapClaims{"nbf": now.Add(time.Minute).Unix()}, "not valid yet"},
		{"nbf within the leeway", jwt.MapClaims{"nbf": now.Add(3 * time.Second).Unix()}, ""},
		{"nbf is a word", jwt.MapClaims{"nbf": "today"}, "not valid"},
	}
	refused := map[string]bool{"exp is a word": true, "exp beyond all time": true}
	v := verifier(t, 0)
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			token := sign(t, jwt.SigningMethodHS256, secret, good(tt.changes))
			p, err := v.Verify(t.Context(), token)
			if tt.says == "" && !refused[tt.name] {
				if err != nil {
					t.Fatalf("refused: %v", err)
				}
				return
			}
			wantRefused(t, token, p, err)
			if !strings.Contains(err.Error(), tt.says) {
				t.Fatalf("%q does not say %q", err, tt.says)
			}
		})
	}
}

// wantRefused checks that nobody came in, with the right code, and that the error repeats nothing of the token.
func wantRefused(t *testing.T, token string, p *auth.Principal, err error) {
	t.Helper()
	r, ok := errors.AsType[*schema.Refusal](err)
	if p != nil || !ok || r.Code != schema.Code_CODE_UNAUTHENTICATED {
		t.Fatalf("principal %v, error %v; want unauthenticated", p, err)
	}
	for part := range strings.SplitSeq(token, ".") {
		if len(part) > 3 && strings.Contains(err.Error(), part) {
			t.Fatalf("the error repeats a part of the token: %q", err)
		}
	}
}

func TestVerifyRefusesOtherAlgorithms(t *testing.T) {
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	ecKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ok := sign(t, jwt.SigningMethodHS256, secret, good(nil))
	parts := strings.Split(ok, ".")
	header := func(json string) string { return base64.RawURLEncoding.EncodeToString([]byte(json)) }
	flipped := []byte(ok)
	flipped[len(flipped)-10] ^= 1
	tests := map[string]string{
		"alg none":                   sign(t, jwt.SigningMethodNone, jwt.UnsafeAllowNoneSignatureType, good(nil)),
		"alg none, signature kept":   header(`{"alg":"none","typ":"JWT"}`) + "." + parts[1] + "." + parts[2],
		"alg None":                   header(`{"alg":"None","typ":"JWT"}`) + "." + parts[1] + ".",
		"alg missing":                header(`{"typ":"JWT"}`) + "." + parts[1] + "." + parts[2],
		"alg unknown":                header(`{"alg":"HS1","typ":"JWT"}`) + "." + parts[1] + "." + parts[2],
		"HS384 with the same secret": sign(t, jwt.SigningMethodHS384, secret, good(nil)),
		"HS512 with the same secret": sign(t, jwt.SigningMethodHS512, secret, good(nil)),
		"RS256":                      sign(t, jwt.SigningMethodRS256, rsaKey, good(nil)),
		"ES256":                      sign(t, jwt.SigningMethodES256, ecKey, good(nil)),
		"another secret":             sign(t, jwt.SigningMethodHS256, []byte("fedcba9876543210fedcba9876543210"), good(nil)),
		"a changed bit":              string(flipped),
		"no signature":               parts[0] + "." + parts[1] + ".",
		"two parts":                  parts[0] + "." + parts[1],
		"four parts":                 ok + "." + parts[2],
		"claims of another token":    parts[0] + "." + strings.Split(sign(t, jwt.SigningMethodHS256, secret, good(jwt.MapClaims{"role": "admin"})), ".")[1] + "." + parts[2],
		"padded":                     ok + "=",
		"with white space":           " " + ok,
		"not base64":                 "a.b!.c",
		"a word":                     "secret",
		"empty":                      "",
		"too long":                   sign(t, jwt.SigningMethodHS256, secret, good(jwt.MapClaims{"extra": strings.Repeat("x", auth.MaxTokenBytes)})),
	}
	v := verifier(t, 0)
	if _, err := v.Verify(t.Context(), ok); err != nil {
		t.Fatalf("the token that the others are made from: %v", err)
	}
	for name, token := range tests {
		t.Run(name, func(t *testing.T) {
			p, err := v.Verify(t.Context(), token)
			wantRefused(t, token, p, err)
		})
	}
}

func TestTokenExpiresWithLeeway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v, strict := verifier(t, 10*time.Second), verifier(t, -1)
		token, err := auth.Mint(secret, auth.Principal{Subject: "ada", Role: schema.Role_ROLE_AGENT, Sessions: []string{"*"}}, time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		at := func(d time.Duration, ok, okStrict bool) {
			t.Helper()
			if _, err := v.Verify(t.Context(), token); (err == nil) != ok {
				t.Errorf("after %s with 10 s leeway: %v", d, err)
			}
			if _, err := strict.Verify(t.Context(), token); (err == nil) != okStrict {
				t.Errorf("after %s without leeway: %v", d, err)
			}
		}
		at(0, true, true)
		time.Sleep(59 * time.Second)
		at(59*time.Second, true, true)
		time.Sleep(2 * time.Second)
		at(61*time.Second, true, false)
		time.Sleep(10 * time.Second)
		at(71*time.Second, false, false)
	})
}

func TestMintVerifyRoundTrip(t *testing.T) {
	for _, word := range []string{"user", "agent", "worker", "analyst", "admin"} {
		in := auth.Principal{Subject: "svc/1 ü", Tenant: "täglich", Role: auth.ParseRole(word), Sessions: []string{"a", "b.*", "*"}}
		token, err := auth.Mint(secret, in, 90*time.Second)
		if err != nil {
			t.Fatal(word, err)
		}
		out, err := verifier(t, 0).Verify(t.Context(), token)
		if err != nil {
			t.Fatal(word, err)
		}
		if out.Subject != in.Subject || out.Tenant != in.Tenant || out.Role != in.Role || strings.Join(out.Sessions, ",") != "a,b.*,*" || auth.RoleWord(out.Role) != word {
			t.Errorf("%s: %+v", word, out)
		}
	}
}

func TestMintRefuses(t *testing.T) {
	ok := auth.Principal{Subject: "ada", Role: schema.Role_ROLE_USER}
	for name, mint := range map[string]func() (string, error){
		"a short secret":  func() (string, error) { return auth.Mint(secret[:31], ok, time.Hour) },
		"no time to live": func() (string, error) { return auth.Mint(secret, ok, 0) },
		"no subject":      func() (string, error) { return auth.Mint(secret, auth.Principal{Role: ok.Role}, time.Hour) },
		"the role system": func() (string, error) {
			return auth.Mint(secret, auth.Principal{Subject: "x", Role: schema.Role_ROLE_SYSTEM}, time.Hour)
		},
		"a number that is no role": func() (string, error) { return auth.Mint(secret, auth.Principal{Subject: "x", Role: 77}, time.Hour) },
	} {
		if token, err := mint(); err == nil || token != "" {
			t.Errorf("%s: token %q, error %v", name, token, err)
		}
	}
}

func TestMayUse(t *testing.T) {
	tests := []struct {
		sessions string
		session  string
		may      bool
	}{
		{"chat", "chat", true},
		{"chat", "chat2", false},
		{"chat", "Chat", false},
		{"chat", "cha", false},
		{"chat*", "chat", true},
		{"chat*", "chat2", true},
		{"chat*", "xchat", false},
		{"*", "anything", true},
		{"", "anything", false},
		{"a,b*", "bc", true},
		{"a*c", "abc", false}, // only a last * is a wildcard
		{"a*c", "a*c", true},
		{"a.>", "a.b", false}, // no wildcards of NATS
	}
	for _, tt := range tests {
		var p auth.Principal
		if tt.sessions != "" {
			p.Sessions = strings.Split(tt.sessions, ",")
		}
		if got := p.MayUse(tt.session); got != tt.may {
			t.Errorf("sessions %q, session %q: %v", tt.sessions, tt.session, got)
		}
	}
}

// Covers must say yes only where MayUse does for every name that the pattern stands for.
func TestCovers(t *testing.T) {
	tests := []struct {
		sessions string
		pattern  string
		covers   bool
	}{
		{"chat", "chat", true},
		{"chat", "chat*", false},
		{"chat*", "chat", true},
		{"chat*", "chat*", true},
		{"chat*", "chat-1*", true},
		{"chat*", "cha*", false},
		{"chat*", "*", false},
		{"*", "*", true},
		{"*", "chat*", true},
		{"", "*", false},
		{"a,b*", "b*", true},
		{"a,b*", "a*", false},
		{"a**", "a*", false},
		{"a**", "a**", true},
	}
	for _, tt := range tests {
		var p auth.Principal
		if tt.sessions != "" {
			p.Sessions = strings.Split(tt.sessions, ",")
		}
		if got := p.Covers(tt.pattern); got != tt.covers {
			t.Errorf("sessions %q, pattern %q: %v", tt.sessions, tt.pattern, got)
		}
		prefix, many := strings.CutSuffix(tt.pattern, "*")
		for _, name := range []string{prefix, prefix + "x", prefix + "*"} {
			if tt.covers && (many || name == tt.pattern) && name != "" && !p.MayUse(name) {
				t.Errorf("sessions %q cover %q, and not %q", tt.sessions, tt.pattern, name)
			}
		}
	}
}

func FuzzVerify(f *testing.F) {
	// The fuzzer's processes must agree on what is good, so it is the same in each.
	k := keyring()
	edKey := signer{"fixed", jwt.SigningMethodEdDSA, ed25519.NewKeyFromSeed(secret)}
	later := jwt.MapClaims{"exp": 4102444800}
	known := []string{sign(f, jwt.SigningMethodHS256, secret, good(later)), edKey.token(f, later)}
	for _, token := range known {
		f.Add(token)
	}
	f.Add(sign(f, jwt.SigningMethodHS256, []byte("fedcba9876543210fedcba9876543210"), good(nil)))
	f.Add(sign(f, jwt.SigningMethodNone, jwt.UnsafeAllowNoneSignatureType, good(nil)))
	f.Add(k.rsa2.token(f, nil))
	f.Add("..")
	f.Add("")
	v := ofSet(f, auth.Config{Secret: secret}, k.rsa.public(), k.ec.public(), k.ed.public(), edKey.public())
	for _, token := range known {
		if _, err := v.Verify(f.Context(), token); err != nil {
			f.Fatal(err)
		}
	}
	f.Fuzz(func(t *testing.T, token string) {
		p, err := v.Verify(t.Context(), token)
		// Nobody comes in who was not given exactly this token.
		if err == nil && !slices.Contains(known, token) {
			t.Fatalf("accepted %q as %+v", token, p)
		}
		if err != nil {
			wantRefused(t, token, p, err)
		}
	})
}

// FuzzClaims signs whatever claims it is given: they may be refused, but never panic, and a principal that comes out is one that Mint takes back.
func FuzzClaims(f *testing.F) {
	f.Add(`{"sub":"a","role":"user","exp":4102444800,"sessions":["*"]}`)
	f.Add(`{"sub":"a","role":"user","exp":1e999,"nbf":-1e308}`)
	f.Add(`{"sub":{"a":1},"role":["user"],"exp":"4102444800","tenant":null}`)
	f.Add(`[]`)
	v := verifier(f, 0)
	f.Fuzz(func(t *testing.T, claims string) {
		enc := base64.RawURLEncoding
		signed := enc.EncodeToString([]byte(`{"alg":"HS256","typ":"JWT"}`)) + "." + enc.EncodeToString([]byte(claims))
		sig, err := jwt.SigningMethodHS256.Sign(signed, secret)
		if err != nil {
			t.Fatal(err)
		}
		token := signed + "." + enc.EncodeToString(sig)
		p, err := v.Verify(t.Context(), token)
		if err != nil {
			return
		}
		if _, err := auth.Mint(secret, *p, time.Minute); err != nil {
			t.Fatalf("%s gave %+v, which Mint refuses: %v", claims, p, err)
		}
	})
}

func BenchmarkVerify(b *testing.B) {
	k := keyring()
	v := ofSet(b, auth.Config{Secret: secret}, k.rsa.public(), k.ec.public(), k.ed.public())
	for name, token := range map[string]string{
		"HS256": sign(b, jwt.SigningMethodHS256, secret, good(nil)), "RS256": k.rsa.token(b, nil), "ES256": k.ec.token(b, nil), "EdDSA": k.ed.token(b, nil),
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := v.Verify(b.Context(), token); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
