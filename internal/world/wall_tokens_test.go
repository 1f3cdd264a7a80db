package world

import (
	"crypto/hmac"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"hash"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"tidemark/schema"
)

// claims are those of a token that reaches the victim, with changes; nil takes one out.
func claims(changes map[string]any) map[string]any {
	all := map[string]any{"sub": "agent", "tenant": "default", "role": "admin", "sessions": []string{"*"}, "iat": time.Now().Unix(), "exp": time.Now().Add(time.Hour).Unix()}
	maps.Copy(all, changes)
	maps.DeleteFunc(all, func(_ string, v any) bool { return v == nil })
	return all
}

func part(v any) string {
	b, ok := v.([]byte)
	if !ok {
		b, _ = json.Marshal(v)
	}
	return base64.RawURLEncoding.EncodeToString(b)
}

// sign makes a token by hand, as it may have to be wrong.
func sign(header, claims any, key []byte, h func() hash.Hash) string {
	signed := part(header) + "." + part(claims)
	mac := hmac.New(h, key)
	mac.Write([]byte(signed))
	return signed + "." + part(mac.Sum(nil))
}

// forgeries are tokens that give access to everything of the victim's, and must not be believed.
func forgeries() map[string]string {
	type m = map[string]any
	alg := func(name any) m { return m{"alg": name, "typ": "JWT"} }
	good := claims(nil)
	right := func(changes m) string { return sign(alg("HS256"), claims(changes), secret, sha256.New) }
	valid := strings.Split(right(nil), ".")
	theirs := strings.Split(right(m{"tenant": rival}), ".")
	raw := func(text string) string { return sign(alg("HS256"), []byte(text), secret, sha256.New) }
	own := []byte("a key that the token itself brings along with it")
	exp := fmt.Sprint(time.Now().Add(time.Hour).Unix())
	all := map[string]string{
		"nothing at all":                    "",
		"nonsense":                          "nonsense",
		"three letters":                     "a.b.c",
		"dots":                              "...",
		"no signature":                      valid[0] + "." + valid[1],
		"an empty signature":                valid[0] + "." + valid[1] + ".",
		"half a signature":                  valid[0] + "." + valid[1] + "." + valid[2][:20],
		"another's signature":               valid[0] + "." + valid[1] + "." + theirs[2],
		"a part too many":                   strings.Join(valid, ".") + ".e30",
		"five parts, as if encrypted":       strings.Join(valid, ".") + ".AA.AA",
		"a dot before":                      "." + strings.Join(valid, "."),
		"a second Bearer":                   "Bearer " + strings.Join(valid, "."),
		"more than fits":                    strings.Join(valid, ".") + strings.Repeat("A", 17<<10),
		"a wrong secret":                    sign(alg("HS256"), good, []byte("another secret that is as long as a secret must be"), sha256.New),
		"an empty secret":                   sign(alg("HS256"), good, nil, sha256.New),
		"the secret and a line break":       sign(alg("HS256"), good, append(append([]byte(nil), secret...), '\n'), sha256.New),
		"half of the secret":                sign(alg("HS256"), good, secret[:len(secret)/2], sha256.New),
		"HS384 with the secret":             sign(alg("HS384"), good, secret, sha512.New384),
		"HS512 with the secret":             sign(alg("HS512"), good, secret, sha512.New),
		"RS256, signed with the secret":     sign(alg("RS256"), good, secret, sha256.New),
		"ES256, signed with the secret":     sign(alg("ES256"), good, secret, sha256.New),
		"EdDSA, signed with the secret":     sign(alg("EdDSA"), good, secret, sha256.New),
		"an algorithm in small letters":     sign(alg("hs256"), good, secret, sha256.New),
		"a number as algorithm":             sign(alg(256), good, secret, sha256.New),
		"a list as algorithm":               sign(alg([]string{"HS256"}), good, secret, sha256.New),
		"no algorithm":                      sign(m{"typ": "JWT"}, good, secret, sha256.New),
		"a key that is a file":              sign(m{"alg": "HS256", "kid": "../../../../dev/null"}, good, nil, sha256.New),
		"a key that it brings along":        sign(m{"alg": "HS256", "jwk": m{"kty": "oct", "k": part(own)}}, good, own, sha256.New),
		"a key at an address":               sign(m{"alg": "HS256", "jku": "http://evil.example.com/keys", "x5u": "http://evil.example.com/cert"}, good, own, sha256.New),
		"an end in the past":                right(m{"exp": time.Now().Add(-time.Hour).Unix()}),
		"an end just past the leeway":       right(m{"exp": time.Now().Add(-10 * time.Second).Unix()}),
		"no end":                            right(m{"exp": nil}),
		"an end in words":                   right(m{"exp": "never"}),
		"an end before all time":            right(m{"exp": -1}),
		"an end behind all time":            raw(`{"sub":"agent","tenant":"default","role":"admin","sessions":["*"],"exp":1e300}`),
		"a beginning to come":               right(m{"nbf": time.Now().Add(time.Hour).Unix()}),
		"a tenant that is a number":         right(m{"tenant": 0}),
		"a tenant that is a list":           right(m{"tenant": []string{"default"}}),
		"a tenant that is an object":        right(m{"tenant": m{"name": "default"}}),
		"a tenant that is true":             right(m{"tenant": true}),
		"a tenant that is null":             raw(`{"sub":"agent","tenant":null,"role":"admin","sessions":["*"],"exp":` + exp + `}`),
		"a tenant without a name":           right(m{"tenant": ""}),
		"a tenant with too long a name":     right(m{"tenant": strings.Repeat("default", 40)}),
		"no subject":                        right(m{"sub": nil}),
		"a subject without a name":          right(m{"sub": ""}),
		"a subject that is a number":        right(m{"sub": 7}),
		"no role":                           right(m{"role": nil}),
		"the system's role":                 right(m{"role": "system"}),
		"a role in capitals":                right(m{"role": "ADMIN"}),
		"a role that there is not":          right(m{"role": "root"}),
		"two roles":                         right(m{"role": []string{"user", "admin"}}),
		"a number of sessions":              right(m{"sessions": 1}),
		"sessions that are an object":       right(m{"sessions": m{"*": true}}),
		"a session without a name":          right(m{"sessions": []string{""}}),
		"a session that is null":            right(m{"sessions": []any{nil}}),
		"sessions without number":           right(m{"sessions": strings.Split(strings.Repeat("*,", 300)+"*", ",")}),
		"claims that are a list":            raw(`[{"sub":"agent","role":"admin"}]`),
		"claims that are no JSON":           raw(`{"sub":"agent",`),
		"claims of another spelling":        raw(`{"Sub":"agent","Tenant":"default","Role":"admin","Sessions":["*"],"Exp":` + exp + `}`),
		"claims changed behind the signing": theirs[0] + "." + part(good) + "." + theirs[2],
		"a header changed as well":          part(alg("none")) + "." + valid[1] + "." + valid[2],
	}
	for _, none := range []string{"none", "None", "NONE", "nOnE", "", " none"} {
		all[fmt.Sprintf("the algorithm %q", none)] = part(alg(none)) + "." + part(good) + "."
		all[fmt.Sprintf("the algorithm %q with an empty key", none)] = sign(alg(none), good, nil, sha256.New)
	}
	return all
}

// TestI9_ForgedTokens: a token that is not believed opens nothing, wherever it is put.
func TestI9_ForgedTokens(t *testing.T) {
	attach := func(target string) string {
		return jsonFrame(attachFrame(&schema.Attach{Channel: 1, Session: target}))
	}
	ws := func(target string) string { return "/ws?sessionName=" + url.QueryEscape(target) }
	places := []struct {
		name string
		try  func(x *intruder, token, target string)
	}{
		{"the header", func(x *intruder, token, target string) { x.Socket(ws(target), bearer(token), nil) }},
		{"the query", func(x *intruder, token, target string) {
			x.Socket(ws(target)+"&token="+url.QueryEscape(token), nil, nil)
		}},
		{"the query of the multiplexed socket", func(x *intruder, token, target string) {
			if token == "" {
				token = "-"
			}
			x.Socket("/v1/connect?token="+url.QueryEscape(token), nil, []string{"tidemark.v1.json"}, attach(target))
		}},
		{"the subprotocol", func(x *intruder, token, target string) { x.Socket(ws(target), nil, []string{"bearer." + token}) }},
		{"hello", func(x *intruder, token, target string) {
			x.Socket("/v1/connect", nil, []string{"tidemark.v1.json"}, jsonFrame(&schema.ClientFrame{Frame: &schema.ClientFrame_Hello{Hello: &schema.Hello{Token: token}}}), attach(target))
		}},
		{"hello over gRPC", func(x *intruder, token, target string) {
			x.Stream("", "Connect", false, &schema.ClientFrame{Frame: &schema.ClientFrame_Hello{Hello: &schema.Hello{Token: token}}}, attachFrame(&schema.Attach{Channel: 1, Session: target}))
		}},
		{"a call", func(x *intruder, token, target string) {
			x.Call(token, "GetSession", &schema.GetSessionRequest{Session: target}, new(schema.GetSessionResponse))
		}},
		{"a call by Connect", func(x *intruder, token, target string) {
			h := bearer(token)
			h.Set("Content-Type", "application/json")
			x.HTTP(".grpc", http.MethodPost, "/tidemark.v1.SessionService/DeleteSession", h, []byte(`{"session":"`+target+`"}`))
		}},
	}
	Run(t, Config{}, func(w *World) {
		v := w.inside()
		var all []attempt
		for _, name := range slices.Sorted(maps.Keys(forgeries())) {
			token := forgeries()[name]
			for _, p := range places {
				all = append(all, attempt{name + " in " + p.name, "unauthenticated", func(x *intruder, target string) { p.try(x, token, target) }})
			}
		}
		v.all(all)
		// What is wrong with them is what they say: one that says all of it right is believed in each of these places.
		for _, p := range places {
			token := sign(map[string]any{"alg": "HS256"}, claims(nil), secret, sha256.New)
			said, wrong := v.make(attempt{p.name, "", func(x *intruder, target string) { p.try(x, token, target) }})
			if wrong == "" {
				t.Errorf("a good token in %s opens nothing:\n%s", p.name, said)
			}
		}
	})
}
