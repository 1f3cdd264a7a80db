package auth

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

// Bounds of an RSA key. Below, RFC 7518, section 3.3, forbids it; above, one verification costs milliseconds, which everybody who sends a token could have us spend.
const (
	minRSABits = 2048
	maxRSABits = 8192
)

// publicKey is one key of a set. What it may verify follows from the key itself, so a token cannot choose: an RSA key is for RS256, one on P-256 for ES256, an Ed25519 key for EdDSA.
type publicKey struct {
	kid string // empty where the set gives it none
	alg string
	key any // *rsa.PublicKey, *ecdsa.PublicKey or ed25519.PublicKey
}

// keySet is a JWKS as it was read. It is immutable.
type keySet struct {
	raw  []byte
	keys []publicKey
	// skipped says of each key that is not used why.
	skipped []string
	// at is when the source was last seen to hold this set.
	at time.Time
}

// member is a JWK as far as it is looked at (RFC 7517, section 4; RFC 7518, section 6; RFC 8037, section 2). x5c, x5t and x5u are not: a set is believed because of where it was read.
type member struct {
	Kty    string    `json:"kty"`
	Kid    string    `json:"kid"`
	Use    *string   `json:"use"`
	KeyOps *[]string `json:"key_ops"`
	Alg    *string   `json:"alg"`
	Crv    string    `json:"crv"`
	N      string    `json:"n"`
	E      string    `json:"e"`
	X      string    `json:"x"`
	Y      string    `json:"y"`
	// D is there in private keys, K in symmetric ones.
	D json.RawMessage `json:"d"`
	K json.RawMessage `json:"k"`
}

// parseKeySet reads a JWKS. A key that cannot be used is skipped, as RFC 7517, section 5, wants it, and does not take the others with it; the set may even come out empty, for that is how all keys are withdrawn.
func parseKeySet(raw []byte, now time.Time) (*keySet, error) {
	var doc struct {
		Keys *[]json.RawMessage `json:"keys"`
	}
	if err := json.Unmarshal(raw, &doc); err != nil || doc.Keys == nil {
		return nil, errors.New("it is not a JWKS: a JSON object with a list named 'keys'")
	}
	s := &keySet{raw: raw, at: now}
	for i, text := range *doc.Keys {
		var m member
		if err := json.Unmarshal(text, &m); err != nil {
			s.skipped = append(s.skipped, fmt.Sprintf("key %d is not a JWK", i+1))
			continue
		}
		key, err := m.public()
		if err != nil {
			s.skipped = append(s.skipped, fmt.Sprintf("key %d (kid %.64q): %v", i+1, m.Kid, err))
			continue
		}
		s.keys = append(s.keys, key)
	}
	return s, nil
}

// public makes a key of a member, or says why it is none for signatures of ours.
func (m *member) public() (publicKey, error) {
	k := publicKey{kid: m.Kid}
	var err error
	switch {
	case m.K != nil || m.Kty == "oct":
		// Who reads the set could sign with it.
		return k, errors.New("symmetric keys are not taken from a JWKS; HS256 has the secret")
	case m.D != nil:
		return k, errors.New("it is a private key; whoever has read it can sign, so replace it, and publish its public half alone")
	case m.Kty == "RSA":
		k.alg = jwt.SigningMethodRS256.Alg()
		k.key, err = m.rsa()
	case m.Kty == "EC" && m.Crv == "P-256":
		k.alg = jwt.SigningMethodES256.Alg()
		k.key, err = m.ec()
	case m.Kty == "OKP" && m.Crv == "Ed25519":
		k.alg = jwt.SigningMethodEdDSA.Alg()
		k.key, err = m.ed()
	default:
		return k, fmt.Errorf("kty %.16q with crv %.16q is neither RSA nor EC with P-256 nor OKP with Ed25519", m.Kty, m.Crv)
	}
	switch {
	case err != nil:
		return k, err
	case m.Use != nil && *m.Use != "sig":
		return k, fmt.Errorf("its use is %.16q and not sig", *m.Use)
	case m.KeyOps != nil && !slices.Contains(*m.KeyOps, "verify"):
		return k, errors.New("verify is not among its key_ops")
	case m.Alg != nil && *m.Alg != k.alg:
		return k, fmt.Errorf("its alg is %.16q, but a key of this kind is used for %s only", *m.Alg, k.alg)
	}
	return k, nil
}

func (m *member) rsa() (*rsa.PublicKey, error) {
	n, err := decode("n", m.N)
	if err != nil {
		return nil, err
	}
	e, err := decode("e", m.E)
	if err != nil {
		return nil, err
	}
	modulus, exponent := new(big.Int).SetBytes(n), new(big.Int).SetBytes(e)
	if bits := modulus.BitLen(); bits < minRSABits || bits > maxRSABits {
		return nil, fmt.Errorf("its modulus has %d bits; %d to %d are accepted", bits, minRSABits, maxRSABits)
	}
	// With an exponent of 1 everything is its own signature.
	if exponent.BitLen() > 31 || exponent.Int64() < 3 || exponent.Bit(0) == 0 {
		return nil, errors.New("its exponent is not an odd number from 3 to 2147483647")
	}
	return &rsa.PublicKey{N: modulus, E: int(exponent.Int64())}, nil
}

func (m *member) ec() (*ecdsa.PublicKey, error) {
	x, err := decode("x", m.X)
	if err != nil {
		return nil, err
	}
	y, err := decode("y", m.Y)
	if err != nil {
		return nil, err
	}
	if len(x) != 32 || len(y) != 32 {
		return nil, errors.New("its coordinates have not 32 bytes each")
	}
	// SEC 1, section 2.3.3. Points off the curve are refused there.
	key, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), slices.Concat([]byte{4}, x, y))
	if err != nil {
		return nil, errors.New("its coordinates are no point of P-256")
	}
	return key, nil
}

func (m *member) ed() (ed25519.PublicKey, error) {
	x, err := decode("x", m.X)
	if err != nil {
		return nil, err
	}
	if len(x) != ed25519.PublicKeySize {
		return nil, fmt.Errorf("its x has %d bytes; Ed25519 has %d", len(x), ed25519.PublicKeySize)
	}
	y := slices.Clone(x)
	y[31] &= 0x7f // the sign of the other coordinate
	if slices.Contains(smallOrder, hex.EncodeToString(y)) {
		return nil, errors.New("it is no key but a point of small order, as zeros are, under which anybody can sign")
	}
	return x, nil
}

// smallOrder are the points of Ed25519 whose order divides 8, in every encoding, without the sign: eight times each of them is the neutral point (RFC 8032, section 5.1). crypto/ed25519 does not refuse
// them.
//
//nolint:gochecknoglobals // a table that nothing writes
var smallOrder = []string{
	"0000000000000000000000000000000000000000000000000000000000000000",
	"0100000000000000000000000000000000000000000000000000000000000000",
	"26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
	"c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
	"ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
	"edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
	"eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
}

// decode decodes a parameter. Some issuers pad them, against RFC 7515, section 2; it changes nothing.
func decode(name, text string) ([]byte, error) {
	b, err := base64.RawURLEncoding.DecodeString(strings.TrimRight(text, "="))
	if err != nil || len(b) == 0 {
		return nil, fmt.Errorf("its %s is missing or not base64url", name)
	}
	return b, nil
}

// choice is what looking for a token's key came to.
type choice int

const (
	chosen    choice = iota
	unknown          // there is none of this name, or, without a name, none for the algorithm
	misfit           // the key of this name is for another algorithm
	ambiguous        // several fit, so the token must name one
)

// choose finds the one key for a token: of its name, where it gives one, and for its algorithm. It never tries keys.
func (s *keySet) choose(alg, kid string, named bool) (any, choice) {
	var found any
	result := unknown
	for i := range s.keys {
		k := &s.keys[i]
		if named && (k.kid == "" || k.kid != kid) {
			continue
		}
		switch {
		case k.alg == alg && result == chosen:
			return nil, ambiguous
		case k.alg == alg:
			found, result = k.key, chosen
		case named && result == unknown:
			result = misfit
		}
	}
	return found, result
}
