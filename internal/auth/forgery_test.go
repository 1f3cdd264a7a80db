package auth_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"maps"
	"math/big"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"

	"tidemark/internal/auth"
	"tidemark/schema"
)

func TestVerifyByJWKS(t *testing.T) {
	k := keyring()
	all := ofSet(t, auth.Config{}, k.rsa.public(), k.ec.public(), k.ed.public(), k.rsa2.public(), k.ec2.public())
	bare := jwk{"use": nil, "alg": nil, "kid": nil}
	for _, s := range []signer{k.rsa, k.rsa2, k.ec, k.ec2, k.ed} {
		p, err := all.Verify(t.Context(), s.token(t, nil))
		if err != nil {
			t.Fatalf("%s: %v", s.kid, err)
		}
		if p.Subject != "ada" || p.Tenant != "acme" || p.Role != schema.Role_ROLE_USER || !p.Until.Equal(p.Expires.Add(auth.DefaultLeeway)) {
			t.Errorf("%s: %+v", s.kid, p)
		}
		// A set with one key for the algorithm needs no names, neither in the token nor in the set, and no word on what it is for.
		if _, err := ofSet(t, auth.Config{}, s.public().with(bare)).Verify(t.Context(), s.tokenWith(t, jwk{"kid": nil}, nil)); err != nil {
			t.Errorf("%s without a name: %v", s.kid, err)
		}
	}
	// A token that names a key means one of this name, and none has no name.
	nameless := ofSet(t, auth.Config{}, k.ec.public().with(jwk{"kid": nil}))
	for _, kid := range []string{"e1", ""} {
		token := k.ec.tokenWith(t, jwk{"kid": kid}, nil)
		p, err := nameless.Verify(t.Context(), token)
		wantRefused(t, token, p, err)
	}
	// One of them is the only one for its algorithm.
	if _, err := all.Verify(t.Context(), k.ed.tokenWith(t, jwk{"kid": nil}, nil)); err != nil {
		t.Error(err)
	}
	// Keys of different kinds may share a name (RFC 7517, section 4.5).
	shared := ofSet(t, auth.Config{}, k.rsa.public().with(jwk{"kid": "x"}), k.ec.public().with(jwk{"kid": "x"}))
	for _, s := range []signer{k.rsa, k.ec} {
		if _, err := shared.Verify(t.Context(), s.tokenWith(t, jwk{"kid": "x"}, nil)); err != nil {
			t.Error(s.kid, err)
		}
	}
	// The secret counts beside the set, and only where it was given.
	byHand := sign(t, jwt.SigningMethodHS256, secret, good(nil))
	if _, err := ofSet(t, auth.Config{Secret: secret}, k.ed.public()).Verify(t.Context(), byHand); err != nil {
		t.Error(err)
	}
	p, err := all.Verify(t.Context(), byHand)
	wantRefused(t, byHand, p, err)
}

// TestForgeries: nobody comes in with any of these. The verifier has a secret, and a set with a good key of each kind beside keys that must never be used.
func TestForgeries(t *testing.T) {
	k := keyring()
	// Whoever answers there would be asked only by a verifier that follows what a token says.
	var asked atomic.Int32
	foreign := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		asked.Add(1)
		_, _ = w.Write(set(k.rsa2.public(), k.ed2.public()))
	}))
	defer foreign.Close()

	octSecret := bytes.Repeat([]byte("o"), 32)
	v := ofSet(t, auth.Config{Secret: secret, Issuer: "https://idp", Audience: "tidemark"},
		k.rsa.public(), k.ec.public(), k.ed.public(),
		k.weak.public(),
		k.rsa2.public().with(jwk{"kid": "enc", "use": "enc"}),
		k.rsa2.public().with(jwk{"kid": "ps", "alg": "PS256"}),
		k.ec2.public().with(jwk{"kid": "wrap", "key_ops": []string{"wrapKey"}, "use": nil}),
		k.ed2.public().with(jwk{"kid": "private", "d": "AAAA"}),
		k.ec2.public().with(jwk{"kid": "twice"}), k.ec2.public().with(jwk{"kid": "twice"}),
		jwk{"kty": "oct", "kid": "oct", "alg": "HS256", "k": enc.EncodeToString(octSecret)},
		jwk{"kty": "RSA", "kid": "oct-in-rsa", "k": enc.EncodeToString(octSecret), "n": k.rsa.public()["n"], "e": "AQAB"},
	)
	ours := jwt.MapClaims{"iss": "https://idp", "aud": "tidemark"}
	with := func(changes jwt.MapClaims) jwt.MapClaims {
		c := jwt.MapClaims{"iss": "https://idp", "aud": "tidemark"}
		maps.Copy(c, changes)
		return c
	}
	claims := text(t, good(ours))
	honest := k.rsa.token(t, ours)
	parts := strings.Split(honest, ".")
	part := func(json string) string { return enc.EncodeToString([]byte(json)) }

	der := func(pub any) []byte {
		b, err := x509.MarshalPKIXPublicKey(pub)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	rsaPublic, ok := k.rsa.key.Public().(*rsa.PublicKey)
	if !ok {
		t.Fatal("no RSA key")
	}
	ecPublic, ok := k.ec.key.Public().(*ecdsa.PublicKey)
	if !ok {
		t.Fatal("no EC key")
	}
	pkix := der(rsaPublic)
	pkixPEM := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: pkix})
	hs := func(key []byte) string { return hs256(key, `{"alg":"HS256","typ":"JWT","kid":"r1"}`, claims) }
	as := func(alg, kid string, s signer) string { return s.sign(t, text(t, jwk{"alg": alg, "kid": kid}), claims) }
	raw := func(header, body string) string { return k.rsa.sign(t, header, body) }
	member := func(claim string) string {
		return raw(`{"alg":"RS256","kid":"r1"}`, strings.TrimSuffix(claims, "}")+","+claim+"}")
	}
	ecdsaDER := func() string { // what OpenSSL makes, and JOSE does not take
		signed := part(`{"alg":"ES256","kid":"e1"}`) + "." + part(claims)
		digest := sha256.Sum256([]byte(signed))
		sig, err := k.ec.key.Sign(nil, digest[:], nil)
		if err != nil {
			sig = []byte{0x30}
		}
		return signed + "." + enc.EncodeToString(sig)
	}

	tests := map[string]string{
		// No algorithm.
		"alg none":                          part(`{"alg":"none","kid":"r1"}`) + "." + part(claims) + ".",
		"alg none, signature kept":          part(`{"alg":"none","kid":"r1"}`) + "." + parts[1] + "." + parts[2],
		"alg None":                          part(`{"alg":"None","kid":"r1"}`) + "." + part(claims) + ".",
		"alg NONE":                          part(`{"alg":"NONE","kid":"r1"}`) + "." + part(claims) + ".",
		"alg nOnE":                          part(`{"alg":"nOnE","kid":"r1"}`) + "." + part(claims) + ".",
		"alg empty":                         part(`{"alg":"","kid":"r1"}`) + "." + part(claims) + ".",
		"alg null":                          part(`{"alg":null,"kid":"r1"}`) + "." + part(claims) + "." + parts[2],
		"alg a list":                        part(`{"alg":["RS256"],"kid":"r1"}`) + "." + part(claims) + "." + parts[2],
		"alg with a space":                  part(`{"alg":"none ","kid":"r1"}`) + "." + part(claims) + ".",
		"alg missing":                       part(`{"kid":"r1"}`) + "." + part(claims) + "." + parts[2],
		"alg named Alg":                     raw(`{"Alg":"RS256","kid":"r1"}`, claims),
		"alg twice, none first":             raw(`{"alg":"none","alg":"RS256","kid":"r1"}`, claims),
		"alg twice, none last":              part(`{"alg":"RS256","alg":"none","kid":"r1"}`) + "." + part(claims) + ".",
		"no signature":                      parts[0] + "." + parts[1] + ".",
		"alg rs256":                         raw(`{"alg":"rs256","kid":"r1"}`, claims),
		"alg by a name that is not of ours": raw(`{"alg":"RSA-SHA256","kid":"r1"}`, claims),

		// A public key for a secret.
		"HS256 with the RSA key as PEM":          hs(pkixPEM),
		"HS256 with the PEM, no line break":      hs(bytes.TrimSpace(pkixPEM)),
		"HS256 with the RSA key as DER":          hs(pkix),
		"HS256 with the RSA key as PKCS #1":      hs(x509.MarshalPKCS1PublicKey(rsaPublic)),
		"HS256 with the RSA modulus":             hs(rsaPublic.N.Bytes()),
		"HS256 with the RSA modulus as text":     hs([]byte(text(t, k.rsa.public()["n"]))),
		"HS256 with the JWK":                     hs([]byte(text(t, k.rsa.public()))),
		"HS256 with the whole set":               hs(set(k.rsa.public(), k.ec.public(), k.ed.public())),
		"HS256 with the EC key as DER":           hs(der(ecPublic)),
		"HS256 with the Ed25519 key's bytes":     hs256(must(enc.DecodeString(str(k.ed.public()["x"]))), `{"alg":"HS256","kid":"d1"}`, claims),
		"HS256 with the set's symmetric key":     hs256(octSecret, `{"alg":"HS256","kid":"oct"}`, claims),
		"HS256 with a symmetric key in disguise": hs256(octSecret, `{"alg":"HS256","kid":"oct-in-rsa"}`, claims),
		"HS256 with nothing":                     hs256(nil, `{"alg":"HS256"}`, claims),
		"HS256 with another secret":              hs([]byte(strings.Repeat("s", 32))),
		"HS384 with the secret":                  sign(t, jwt.SigningMethodHS384, secret, good(ours)),
		"HS512 with the secret":                  sign(t, jwt.SigningMethodHS512, secret, good(ours)),

		// An algorithm that does not fit the key.
		"RS256 with an EC key's name":           as("RS256", "e1", k.rsa),
		"RS256 with an Ed25519 key's name":      as("RS256", "d1", k.rsa),
		"ES256 with an RSA key's name":          as("ES256", "r1", k.ec),
		"EdDSA with an EC key's name":           as("EdDSA", "e1", k.ed),
		"ES256 of a token signed with Ed25519":  as("ES256", "e1", k.ed),
		"EdDSA of a token signed with ECDSA":    as("EdDSA", "d1", k.ec),
		"RS512 with a key for RS256":            signer{"r1", jwt.SigningMethodRS512, k.rsa.key}.token(t, ours),
		"PS256 with a key for RS256":            signer{"r1", jwt.SigningMethodPS256, k.rsa.key}.token(t, ours),
		"PS256 called RS256":                    signer{"r1", jwt.SigningMethodPS256, k.rsa.key}.tokenWith(t, jwk{"alg": "RS256", "kid": "r1"}, ours),
		"ES384 with a key on P-384":             k.p384.token(t, ours),
		"Ed25519, the new name":                 as("Ed25519", "d1", k.ed),
		"a key for PS256":                       as("RS256", "ps", k.rsa2),
		"a key for encryption":                  as("RS256", "enc", k.rsa2),
		"a key for wrapping keys":               as("ES256", "wrap", k.ec2),
		"a private key that was published":      as("EdDSA", "private", k.ed2),
		"RSA with 1024 bits":                    k.weak.token(t, ours),
		"an ECDSA signature in DER":             ecdsaDER(),
		"an ECDSA signature of zeros":           part(`{"alg":"ES256","kid":"e1"}`) + "." + part(claims) + "." + enc.EncodeToString(make([]byte, 64)),
		"an Ed25519 signature of zeros":         part(`{"alg":"EdDSA","kid":"d1"}`) + "." + part(claims) + "." + enc.EncodeToString(make([]byte, 64)),
		"an RSA signature of zero":              part(`{"alg":"RS256","kid":"r1"}`) + "." + part(claims) + "." + enc.EncodeToString(make([]byte, 256)),
		"an RSA signature of one":               part(`{"alg":"RS256","kid":"r1"}`) + "." + part(claims) + "." + enc.EncodeToString(big.NewInt(1).FillBytes(make([]byte, 256))),
		"an RSA signature and the modulus over": part(`{"alg":"RS256","kid":"r1"}`) + "." + part(claims) + "." + enc.EncodeToString(rsaPublic.N.Bytes()),

		// A name that is no key's.
		"kid of nobody":              as("RS256", "r9", k.rsa),
		"kid empty":                  as("RS256", "", k.rsa),
		"kid of the upper directory": as("RS256", "../../../../etc/passwd", k.rsa),
		"kid of a null device":       hs256([]byte{}, `{"alg":"HS256","kid":"/dev/null"}`, claims),
		"kid of SQL":                 as("RS256", "r1' OR '1'='1", k.rsa),
		"kid with a zero byte":       as("RS256", "r1\x00", k.rsa),
		"kid of a URL":               as("RS256", foreign.URL, k.rsa2),
		"kid in upper case":          as("RS256", "R1", k.rsa),
		"kid with a space":           as("RS256", "r1 ", k.rsa),
		"kid a number":               k.rsa.tokenWith(t, jwk{"kid": 1}, ours),
		"kid a list":                 k.rsa.tokenWith(t, jwk{"kid": []string{"r1"}}, ours),
		"kid null":                   raw(`{"alg":"RS256","kid":null}`, claims),
		"kid twice":                  raw(`{"alg":"RS256","kid":"e1","kid":"r1"}`, claims),
		"kid of two keys":            as("ES256", "twice", k.ec2),
		"no kid, several keys":       k.ec.tokenWith(t, jwk{"kid": nil}, ours),

		// A key that the token brings along.
		"jwk":                 k.rsa2.tokenWith(t, jwk{"kid": "r1", "jwk": k.rsa2.public()}, ours),
		"jwk, no kid":         k.ed2.tokenWith(t, jwk{"kid": nil, "jwk": k.ed2.public()}, ours),
		"jku":                 k.rsa2.tokenWith(t, jwk{"kid": "r1", "jku": foreign.URL}, ours),
		"jku of another kid":  k.rsa2.tokenWith(t, jwk{"kid": "r2", "jku": foreign.URL}, ours),
		"x5u":                 k.rsa2.tokenWith(t, jwk{"kid": "r1", "x5u": foreign.URL}, ours),
		"x5c":                 k.rsa2.tokenWith(t, jwk{"kid": "r1", "x5c": []string{base64.StdEncoding.EncodeToString(pkix)}}, ours),
		"crit":                k.rsa.tokenWith(t, jwk{"kid": "r1", "crit": []string{"exp"}}, ours),
		"crit empty":          k.rsa.tokenWith(t, jwk{"kid": "r1", "crit": []string{}}, ours),
		"crit null":           raw(`{"alg":"RS256","kid":"r1","crit":null}`, claims),
		"crit with b64":       k.rsa.tokenWith(t, jwk{"kid": "r1", "crit": []string{"b64"}, "b64": false}, ours),
		"crit under HS256":    hs256(secret, `{"alg":"HS256","crit":["x"],"x":1}`, claims),
		"another key's token": as("RS256", "r1", k.rsa2),

		// Times.
		"expired":            k.rsa.token(t, with(jwt.MapClaims{"exp": time.Now().Add(-time.Minute).Unix()})),
		"not valid yet":      k.rsa.token(t, with(jwt.MapClaims{"nbf": time.Now().Add(time.Minute).Unix()})),
		"no exp":             k.rsa.token(t, with(jwt.MapClaims{"exp": nil})),
		"exp null":           raw(`{"alg":"RS256","kid":"r1"}`, strings.Replace(claims, `"exp":`, `"exp":null,"was":`, 1)),
		"exp a string":       k.rsa.token(t, with(jwt.MapClaims{"exp": "4102444800"})),
		"exp a list":         k.rsa.token(t, with(jwt.MapClaims{"exp": []int{4102444800}})),
		"exp negative":       k.rsa.token(t, with(jwt.MapClaims{"exp": -1})),
		"exp zero":           k.rsa.token(t, with(jwt.MapClaims{"exp": 0})),
		"exp beyond time":    k.rsa.token(t, with(jwt.MapClaims{"exp": 1e300})),
		"exp beyond int64":   k.rsa.token(t, with(jwt.MapClaims{"exp": 9.3e18})),
		"exp in nanoseconds": k.rsa.token(t, with(jwt.MapClaims{"exp": time.Now().Add(time.Hour).UnixNano()})),
		"exp named Exp":      k.rsa.token(t, with(jwt.MapClaims{"exp": nil, "Exp": time.Now().Add(time.Hour).Unix()})),
		"exp twice":          member(`"exp":4102444800`),

		// Claims.
		"role twice":                   member(`"role":"admin"`),
		"role twice, escaped":          member(`"ro\u006ce":"admin"`),
		"sub twice, the same":          member(`"sub":"ada"`),
		"tenant a number":              k.rsa.token(t, with(jwt.MapClaims{"tenant": 1})),
		"tenant null":                  raw(`{"alg":"RS256","kid":"r1"}`, strings.Replace(claims, `"acme"`, "null", 1)),
		"tenant a list":                k.rsa.token(t, with(jwt.MapClaims{"tenant": []string{"acme"}})),
		"tenant an object":             k.rsa.token(t, with(jwt.MapClaims{"tenant": jwk{"name": "acme"}})),
		"tenant empty":                 k.rsa.token(t, with(jwt.MapClaims{"tenant": ""})),
		"role of Tidemark itself":      k.rsa.token(t, with(jwt.MapClaims{"role": "system"})),
		"role a list":                  k.rsa.token(t, with(jwt.MapClaims{"role": []string{"admin"}})),
		"sub a number":                 k.rsa.token(t, with(jwt.MapClaims{"sub": 7})),
		"sessions a number":            k.rsa.token(t, with(jwt.MapClaims{"sessions": 7})),
		"no issuer":                    k.rsa.token(t, with(jwt.MapClaims{"iss": nil})),
		"another issuer":               k.rsa.token(t, with(jwt.MapClaims{"iss": "https://idp.example"})),
		"issuer with a slash more":     k.rsa.token(t, with(jwt.MapClaims{"iss": "https://idp/"})),
		"issuers":                      k.rsa.token(t, with(jwt.MapClaims{"iss": []string{"https://idp"}})),
		"no audience":                  k.rsa.token(t, with(jwt.MapClaims{"aud": nil})),
		"another audience":             k.rsa.token(t, with(jwt.MapClaims{"aud": []string{"billing", "tidemark2"}})),
		"audience a number":            k.rsa.token(t, with(jwt.MapClaims{"aud": 1})),
		"claims null":                  raw(`{"alg":"RS256","kid":"r1"}`, "null"),
		"claims a list":                raw(`{"alg":"RS256","kid":"r1"}`, "["+claims+"]"),
		"claims twice":                 raw(`{"alg":"RS256","kid":"r1"}`, claims+claims),
		"claims of another token":      parts[0] + "." + strings.Split(k.rsa.token(t, with(jwt.MapClaims{"role": "admin"})), ".")[1] + "." + parts[2],
		"a header of another token":    strings.Split(k.rsa.tokenWith(t, jwk{"kid": "r1", "x": 1}, ours), ".")[0] + "." + parts[1] + "." + parts[2],
		"a token within a token":       raw(`{"alg":"RS256","kid":"r1","cty":"JWT"}`, honest),
		"claims only with good spirit": part(`{"alg":"RS256","kid":"r1"}`) + "." + part(claims) + "." + part("trust me"),

		// Spellings.
		"padded":                       honest + strings.Repeat("=", (4-len(parts[2])%4)%4) + "=",
		"claims padded":                parts[0] + "." + parts[1] + "=." + parts[2],
		"a dot before":                 "." + honest,
		"a dot behind":                 honest + ".",
		"two dots between":             parts[0] + ".." + parts[1] + "." + parts[2],
		"five parts, as encrypted":     honest + "." + parts[1] + "." + parts[2],
		"two parts":                    parts[0] + "." + parts[1],
		"dots":                         "..",
		"a line break within":          parts[0] + ".\n" + parts[1] + "." + parts[2],
		"a line break behind":          honest + "\r\n",
		"a space before":               " " + honest,
		"with its scheme":              "Bearer " + honest,
		"the other base64":             parts[0] + "." + parts[1] + "." + base64.RawStdEncoding.EncodeToString(must(enc.DecodeString(parts[2]))) + "+",
		"other bits behind the last":   otherLast(honest),
		"a signature with a byte more": parts[0] + "." + parts[1] + "." + enc.EncodeToString(append(must(enc.DecodeString(parts[2])), 0)),
		"JSON serialization":           `{"protected":"` + parts[0] + `","payload":"` + parts[1] + `","signature":"` + parts[2] + `"}`,
		"too long":                     k.rsa.token(t, with(jwt.MapClaims{"extra": strings.Repeat("x", auth.MaxTokenBytes)})),
	}
	if _, err := v.Verify(t.Context(), honest); err != nil {
		t.Fatalf("the token that the others are made from: %v", err)
	}
	if _, err := v.Verify(t.Context(), k.ec.token(t, with(jwt.MapClaims{"aud": []string{"billing", "tidemark"}, "iat": time.Now().Add(time.Hour).Unix()}))); err != nil {
		t.Errorf("one of several audiences, issued by a clock that is ahead: %v", err)
	}
	if _, err := v.Verify(t.Context(), k.ed.tokenWith(t, jwk{"kid": "d1", "x:y": []any{jwk{"alg": "a:b"}}}, with(jwt.MapClaims{"a\":{b": "c\\\":[", "nested": jwk{"role": jwk{"role": ":"}}}))); err != nil {
		t.Errorf("claims that need a close look: %v", err)
	}
	if _, err := v.Verify(t.Context(), sign(t, jwt.SigningMethodHS256, secret, good(nil))); err != nil {
		t.Errorf("a token signed with the secret needs neither issuer nor audience: %v", err)
	}
	for name, token := range tests {
		t.Run(name, func(t *testing.T) {
			p, err := v.Verify(t.Context(), token)
			wantRefused(t, token, p, err)
		})
	}
	if n := asked.Load(); n != 0 {
		t.Errorf("a URL that tokens named was asked %d times", n)
	}
}

func must(b []byte, err error) []byte {
	if err != nil {
		panic(err)
	}
	return b
}

func str(v any) string {
	s, ok := v.(string)
	if !ok {
		panic("not a string")
	}
	return s
}

// otherLast is the token with another last character that stands for the same bytes, if one does not look closely: 256 bytes leave two or four bits over.
func otherLast(token string) string {
	const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
	last := strings.IndexByte(alphabet, token[len(token)-1])
	return token[:len(token)-1] + string(alphabet[last^1])
}
