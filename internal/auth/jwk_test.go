package auth

import (
	"encoding/base64"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

// The keys and signatures that the RFCs print.
const (
	rfc7515A2Key = `{"kty":"RSA","n":"ofgWCuLjybRlzo0tZWJjNiuSfb4p4fAkd_wWJcyQoTbji9k0l8W26mPddxHmfHQp-Vaw-4qPCJrcS2mJPMEzP1Pt0Bm4d4QlL-yRT-SFd2lZS-pCgNMsD1W_YpRPEwOWvG6b32690r2jZ47soMZo9wGzjb_7OMg0LOL-bSf63kpaSHSXndS5z5rexMdbBYUsLA9e-KXBdQOS-UTo7WTBEMa2R2CapHg665xsmtdVMTBQY4uDZlxvb3qCo5ZwKh9kG4LT6_I5IhlJH7aGhyxXFvUK-DWNmoudF8NAco9_h9iaGNj8q2ethFkMLs91kzk2PAcDTW9gb54h4FRWyuXpoQ","e":"AQAB"}`
	rfc7515A2    = `eyJhbGciOiJSUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ.cC4hiUPoj9Eetdgtv3hF80EGrhuB__dzERat0XF9g2VtQgr9PJbu3XOiZj5RZmh7AAuHIm4Bh-0Qc_lF5YKt_O8W2Fp5jujGbds9uJdbF9CUAr7t1dnZcAcQjbKBYNX4BAynRFdiuB--f_nZLgrnbyTyWzO75vRK5h6xBArLIARNPvkSjtQBMHlb1L07Qe7K0GarZRmB_eSN9383LcOLn6_dO--xi12jzDwusC-eOkHWEsqtFZESc6BfI7noOPqvhJ1phCnvWh6IeYI2w9QOYEUipUTI8np6LbgGY9Fs98rqVt5AXLIhWkWywlVmtVrBp0igcN_IoypGlUPQGe77Rw`
	rfc7515A3Key = `{"kty":"EC","crv":"P-256","x":"f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU","y":"x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"}`
	rfc7515A3    = `eyJhbGciOiJFUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ.DtEhU3ljbEg8L38VWAfUAqOyKAM6-Xx-F4GawxaepmXFCgfTjDxw5djxLa8ISlSApmWQxfKTUJqPP3-Kg6NU1Q`
	rfc8037A4Key = `{"kty":"OKP","crv":"Ed25519","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}`
	rfc8037A4    = `eyJhbGciOiJFZERTQSJ9.RXhhbXBsZSBvZiBFZDI1NTE5IHNpZ25pbmc.hgyY0il_MGCjP0JzlnLWG1PPOt7-09PGcvMg3AIbQR6dWbhijcNR4ki4iylGjg5BhVsPt9g7sVvpAr_MuM0KAg`
)

func TestKeysOfTheRFCs(t *testing.T) {
	for name, row := range map[string]struct{ key, token, alg string }{
		"RFC 7515, A.2": {rfc7515A2Key, rfc7515A2, "RS256"},
		"RFC 7515, A.3": {rfc7515A3Key, rfc7515A3, "ES256"},
		"RFC 8037, A.4": {rfc8037A4Key, rfc8037A4, "EdDSA"},
	} {
		set, err := parseKeySet([]byte(`{"keys":[`+row.key+`]}`), time.Now())
		if err != nil || len(set.keys) != 1 || set.keys[0].alg != row.alg {
			t.Errorf("%s: %+v, %v", name, set, err)
			continue
		}
		dot := strings.LastIndexByte(row.token, '.')
		sig, err := base64.RawURLEncoding.DecodeString(row.token[dot+1:])
		if err != nil {
			t.Fatal(err)
		}
		method := jwt.GetSigningMethod(row.alg)
		if err := method.Verify(row.token[:dot], sig, set.keys[0].key); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		sig[len(sig)/2] ^= 1
		if method.Verify(row.token[:dot], sig, set.keys[0].key) == nil {
			t.Errorf("%s: a changed signature is accepted", name)
		}
	}
}

// TestKeysThatAreNotUsed puts each beside a good one, which must stay.
func TestKeysThatAreNotUsed(t *testing.T) {
	n := func(bits int) string { // an odd number of so many bits
		b := make([]byte, bits/8)
		b[0], b[len(b)-1] = 0x80, 1
		return base64.RawURLEncoding.EncodeToString(b)
	}
	x := "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU"
	y := "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"
	for name, row := range map[string]struct{ key, says string }{
		"a number":                   {`7`, "not a JWK"},
		"null":                       {`null`, "kty"},
		"nothing in it":              {`{}`, "kty"},
		"kty a number":               {`{"kty":1}`, "not a JWK"},
		"kty unknown":                {`{"kty":"XYZ"}`, "kty"},
		"symmetric":                  {`{"kty":"oct","k":"b29vb29vb29vb29vb29vb29vb29vb29vb29vb29vb28"}`, "symmetric"},
		"symmetric, called RSA":      {`{"kty":"RSA","k":"b29v","n":"` + n(2048) + `","e":"AQAB"}`, "symmetric"},
		"symmetric, k empty":         {`{"kty":"RSA","k":"","n":"` + n(2048) + `","e":"AQAB"}`, "symmetric"},
		"private RSA":                {`{"kty":"RSA","n":"` + n(2048) + `","e":"AQAB","d":"AQAB"}`, "private"},
		"private EC":                 {`{"kty":"EC","crv":"P-256","x":"` + x + `","y":"` + y + `","d":"` + x + `"}`, "private"},
		"RSA of 1024 bits":           {`{"kty":"RSA","n":"` + n(1024) + `","e":"AQAB"}`, "1024 bits"},
		"RSA of 2040 bits":           {`{"kty":"RSA","n":"` + n(2040) + `","e":"AQAB"}`, "2040 bits"},
		"RSA of 16384 bits":          {`{"kty":"RSA","n":"` + n(16384) + `","e":"AQAB"}`, "16384 bits"},
		"RSA of 2048 bits in zeros":  {`{"kty":"RSA","n":"` + base64.RawURLEncoding.EncodeToString(make([]byte, 256)) + `","e":"AQAB"}`, "0 bits"},
		"RSA without a modulus":      {`{"kty":"RSA","e":"AQAB"}`, "its n"},
		"RSA without an exponent":    {`{"kty":"RSA","n":"` + n(2048) + `"}`, "its e"},
		"RSA with exponent 1":        {`{"kty":"RSA","n":"` + n(2048) + `","e":"AQ"}`, "exponent"},
		"RSA with exponent 4":        {`{"kty":"RSA","n":"` + n(2048) + `","e":"BA"}`, "exponent"},
		"RSA with a huge exponent":   {`{"kty":"RSA","n":"` + n(2048) + `","e":"AQAAAAAAAAAB"}`, "exponent"},
		"RSA not in base64url":       {`{"kty":"RSA","n":"++//","e":"AQAB"}`, "its n"},
		"EC on P-384":                {`{"kty":"EC","crv":"P-384","x":"` + x + `","y":"` + y + `"}`, "P-384"},
		"EC on secp256k1":            {`{"kty":"EC","crv":"secp256k1","x":"` + x + `","y":"` + y + `"}`, "secp256k1"},
		"EC without a curve":         {`{"kty":"EC","x":"` + x + `","y":"` + y + `"}`, "crv"},
		"EC with x for y":            {`{"kty":"EC","crv":"P-256","x":"` + y + `","y":"` + x + `"}`, "no point"},
		"EC with a short coordinate": {`{"kty":"EC","crv":"P-256","x":"AQ","y":"` + y + `"}`, "32 bytes"},
		"EC at zero":                 {`{"kty":"EC","crv":"P-256","x":"` + strings.Repeat("A", 43) + `","y":"` + strings.Repeat("A", 43) + `"}`, "no point"},
		"X25519":                     {`{"kty":"OKP","crv":"X25519","x":"` + x + `"}`, "X25519"},
		"Ed448":                      {`{"kty":"OKP","crv":"Ed448","x":"` + x + `"}`, "Ed448"},
		"Ed25519 of 31 bytes":        {`{"kty":"OKP","crv":"Ed25519","x":"` + base64.RawURLEncoding.EncodeToString(make([]byte, 31)) + `"}`, "31 bytes"},
		"Ed25519 of zeros":           {`{"kty":"OKP","crv":"Ed25519","x":"` + strings.Repeat("A", 43) + `"}`, "small order"},
		"Ed25519 of order 8":         {`{"kty":"OKP","crv":"Ed25519","x":"xxdqcD1N2E-6PAt2DRBnDyogU_osOczGTsf9d5KsA_o"}`, "small order"},
		"use enc":                    {`{"kty":"EC","crv":"P-256","x":"` + x + `","y":"` + y + `","use":"enc"}`, "its use"},
		"use empty":                  {`{"kty":"EC","crv":"P-256","x":"` + x + `","y":"` + y + `","use":""}`, "its use"},
		"key_ops sign":               {`{"kty":"EC","crv":"P-256","x":"` + x + `","y":"` + y + `","key_ops":["sign"]}`, "key_ops"},
		"key_ops empty":              {`{"kty":"EC","crv":"P-256","x":"` + x + `","y":"` + y + `","key_ops":[]}`, "key_ops"},
		"alg of another kind":        {`{"kty":"EC","crv":"P-256","x":"` + x + `","y":"` + y + `","alg":"RS256"}`, "its alg"},
		"alg HS256":                  {`{"kty":"EC","crv":"P-256","x":"` + x + `","y":"` + y + `","alg":"HS256"}`, "its alg"},
		"alg none":                   {`{"kty":"EC","crv":"P-256","x":"` + x + `","y":"` + y + `","alg":"none"}`, "its alg"},
		"alg ECDH":                   {`{"kty":"EC","crv":"P-256","x":"` + x + `","y":"` + y + `","alg":"ECDH-ES"}`, "its alg"},
	} {
		set, err := parseKeySet([]byte(`{"keys":[`+row.key+`,`+rfc8037A4Key+`]}`), time.Now())
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if len(set.keys) != 1 || set.keys[0].alg != "EdDSA" || len(set.skipped) != 1 || !strings.Contains(set.skipped[0], row.says) {
			t.Errorf("%s: %d keys, %q; want it to say %q", name, len(set.keys), set.skipped, row.says)
		}
	}
}

func TestSetsThatAreNone(t *testing.T) {
	for _, text := range []string{``, `null`, `[]`, `"x"`, `{}`, `{"keys":null}`, `{"keys":{}}`, `{"keys":"x"}`, `{"keys":[`, rfc8037A4Key, `{"keys":[]}{"keys":[]}`, `<html></html>`} {
		if set, err := parseKeySet([]byte(text), time.Now()); err == nil {
			t.Errorf("%q gave %+v", text, set)
		}
	}
	// All keys were withdrawn.
	if set, err := parseKeySet([]byte(`{"keys":[],"more":1}`), time.Now()); err != nil || len(set.keys) != 0 {
		t.Errorf("%+v, %v", set, err)
	}
}

// FuzzKeySet: whatever a set holds, what comes out are keys for one algorithm each, strong enough, which the algorithm can work with.
func FuzzKeySet(f *testing.F) {
	for _, key := range []string{rfc7515A2Key, rfc7515A3Key, rfc8037A4Key, `{"kty":"oct","k":"AA"}`, `{"kty":"RSA","n":"AQ","e":"AQ","use":"sig","key_ops":["verify"],"alg":"RS256"}`} {
		f.Add(fmt.Appendf(nil, `{"keys":[%s]}`, key))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		set, err := parseKeySet(text, time.Now())
		if err != nil {
			return
		}
		for _, k := range set.keys {
			method := jwt.GetSigningMethod(k.alg)
			switch k.alg {
			case "RS256", "ES256", "EdDSA":
			default:
				t.Fatalf("a key for %q", k.alg)
			}
			if err := method.Verify("a.b", make([]byte, 64), k.key); err == nil {
				t.Fatal("a signature of zeros is accepted")
			}
		}
		if len(set.keys) > 0 {
			k := set.keys[0]
			if key, result := set.choose(k.alg, k.kid, true); (key == nil) == (result == chosen) {
				t.Fatalf("%v with %v", key, result)
			}
			if key, result := set.choose("none", k.kid, true); key != nil || result == chosen {
				t.Fatal("a key for none")
			}
		}
	})
}
