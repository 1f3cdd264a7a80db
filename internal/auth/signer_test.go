package auth_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"maps"
	"math/big"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/golang-jwt/jwt/v5"

	"tidemark/internal/auth"
)

var enc = base64.RawURLEncoding

// jwk is a key as it stands in a set.
type jwk map[string]any

// with is the key with other members; nil takes one away.
func (k jwk) with(changes jwk) jwk {
	c := jwk{}
	maps.Copy(c, k)
	for name, value := range changes {
		if c[name] = value; value == nil {
			delete(c, name)
		}
	}
	return c
}

// set is a JWKS.
func set(keys ...jwk) []byte {
	if keys == nil {
		keys = []jwk{}
	}
	b, err := json.Marshal(map[string]any{"keys": keys})
	if err != nil {
		panic(err)
	}
	return b
}

// signer signs tokens and has a public key.
type signer struct {
	kid    string
	method jwt.SigningMethod
	key    crypto.Signer
}

// public is the signer's key as issuers publish it.
func (s signer) public() jwk {
	k := jwk{"kid": s.kid, "use": "sig", "alg": s.method.Alg()}
	switch p := s.key.Public().(type) {
	case *rsa.PublicKey:
		return k.with(jwk{"kty": "RSA", "n": enc.EncodeToString(p.N.Bytes()), "e": enc.EncodeToString(big.NewInt(int64(p.E)).Bytes())})
	case *ecdsa.PublicKey:
		b, err := p.Bytes()
		if err != nil {
			panic(err)
		}
		half := (len(b) - 1) / 2
		return k.with(jwk{"kty": "EC", "crv": p.Curve.Params().Name, "x": enc.EncodeToString(b[1 : 1+half]), "y": enc.EncodeToString(b[1+half:])})
	case ed25519.PublicKey:
		return k.with(jwk{"kty": "OKP", "crv": "Ed25519", "x": enc.EncodeToString(p)})
	}
	panic("no such key")
}

// token is one of this signer's that names its key.
func (s signer) token(t testing.TB, changes jwt.MapClaims) string {
	t.Helper()
	return s.tokenWith(t, jwk{"kid": s.kid}, changes)
}

// tokenWith is a token with these members in its header.
func (s signer) tokenWith(t testing.TB, header jwk, changes jwt.MapClaims) string {
	t.Helper()
	return s.sign(t, text(t, jwk{"alg": s.method.Alg(), "typ": "JWT"}.with(header)), text(t, good(changes)))
}

// sign signs whatever header and claims are given.
func (s signer) sign(t testing.TB, header, claims string) string {
	t.Helper()
	signed := enc.EncodeToString([]byte(header)) + "." + enc.EncodeToString([]byte(claims))
	sig, err := s.method.Sign(signed, s.key)
	if err != nil {
		t.Fatal(err)
	}
	return signed + "." + enc.EncodeToString(sig)
}

// hs256 signs with a secret.
func hs256(secret []byte, header, claims string) string {
	signed := enc.EncodeToString([]byte(header)) + "." + enc.EncodeToString([]byte(claims))
	mac := hmac.New(sha256.New, secret)
	mac.Write([]byte(signed))
	return signed + "." + enc.EncodeToString(mac.Sum(nil))
}

func text(t testing.TB, v any) string {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// ring are the keys that tests sign with. Making RSA keys takes long, so they are made once.
type ring struct {
	rsa, rsa2, weak, ec, ec2, p384, ed, ed2 signer
}

var keyring = sync.OnceValue(func() ring {
	rsaKey := func(kid string, bits int) signer {
		k, err := rsa.GenerateKey(rand.Reader, bits)
		if err != nil {
			panic(err)
		}
		return signer{kid, jwt.SigningMethodRS256, k}
	}
	ecKey := func(kid string, method jwt.SigningMethod, curve elliptic.Curve) signer {
		k, err := ecdsa.GenerateKey(curve, rand.Reader)
		if err != nil {
			panic(err)
		}
		return signer{kid, method, k}
	}
	edKey := func(kid string) signer {
		_, k, err := ed25519.GenerateKey(rand.Reader)
		if err != nil {
			panic(err)
		}
		return signer{kid, jwt.SigningMethodEdDSA, k}
	}
	return ring{
		rsa: rsaKey("r1", 2048), rsa2: rsaKey("r2", 2048), weak: rsaKey("weak", 1024),
		ec: ecKey("e1", jwt.SigningMethodES256, elliptic.P256()), ec2: ecKey("e2", jwt.SigningMethodES256, elliptic.P256()),
		p384: ecKey("p384", jwt.SigningMethodES384, elliptic.P384()),
		ed:   edKey("d1"), ed2: edKey("d2"),
	}
})

// write puts a set into a file, in one step.
func write(t testing.TB, path string, content []byte) {
	t.Helper()
	if err := os.WriteFile(path+".new", content, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

// ofSet makes a verifier with a set in a file.
func ofSet(t testing.TB, c auth.Config, keys ...jwk) *auth.Verifier {
	t.Helper()
	path := filepath.Join(t.TempDir(), "jwks.json")
	write(t, path, set(keys...))
	c.JWKS = auth.Source(path)
	v, err := auth.NewVerifier(c)
	if err != nil {
		t.Fatal(err)
	}
	return v
}
