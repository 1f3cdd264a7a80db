package main

import (
	"crypto/ed25519"
	"encoding/base64"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"

	"tidemark/internal/auth"
	"tidemark/schema"
)

// TestJWKSBesideAndInsteadOfASecret: dev takes tokens of both kinds, an edge without a secret those of an issuer alone.
func TestJWKSBesideAndInsteadOfASecret(t *testing.T) {
	dir := t.TempDir()
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	keys := filepath.Join(t.TempDir(), "jwks.json")
	if err := os.WriteFile(keys, []byte(`{"keys":[{"kty":"OKP","crv":"Ed25519","kid":"k1","x":"`+base64.RawURLEncoding.EncodeToString(public)+`"}]}`), 0o600); err != nil {
		t.Fatal(err)
	}
	token := func(issuer string) string {
		token := jwt.NewWithClaims(jwt.SigningMethodEdDSA, jwt.MapClaims{
			"sub": "ada", "role": "user", "sessions": "s", "iss": issuer, "aud": []string{"tidemark", "billing"}, "exp": time.Now().Add(time.Hour).Unix(),
		})
		token.Header["kid"] = "k1"
		text, err := token.SignedString(private)
		if err != nil {
			t.Fatal(err)
		}
		return text
	}
	// answer is how the session socket answers a request that is no upgrade: 401, or what comes after the token was checked.
	answer := func(at, token string) int {
		res, err := http.Get("http://" + at + "/ws?sessionName=s&token=" + token)
		if err != nil {
			t.Fatal(err)
		}
		_ = res.Body.Close()
		return res.StatusCode
	}

	p := dev(t, dir, "--jwks", keys)
	secret, err := auth.ReadSecret(secretFile(dir))
	if err != nil {
		t.Fatal(err)
	}
	minted, err := auth.Mint(secret, auth.Principal{Subject: "ada", Role: schema.Role_ROLE_USER, Sessions: []string{"s"}}, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	for name, token := range map[string]string{"the issuer's": token("https://idp"), "the secret's": minted} {
		if status := answer(p.at.HTTP, token); status != http.StatusUpgradeRequired {
			t.Errorf("dev answered %s token with %d", name, status)
		}
	}
	if status := answer(p.at.HTTP, token("https://idp")+"x"); status != http.StatusUnauthorized {
		t.Errorf("dev answered a forged token with %d", status)
	}

	password, err := os.ReadFile(passwordFile(dir))
	if err != nil {
		t.Fatal(err)
	}
	server := "nats://" + natsUser + ":" + strings.TrimSpace(string(password)) + "@" + p.at.NATS
	edge := serveUntilReady(t, "edge-ws", "--data-dir", dir, "--nats", server, "--http", "127.0.0.1:0", "--jwks", keys, "--issuer", "https://idp", "--audience", "tidemark")
	for name, row := range map[string]struct {
		token  string
		status int
	}{
		"the issuer's":      {token("https://idp"), http.StatusUpgradeRequired},
		"another issuer's":  {token("https://idp.example"), http.StatusUnauthorized},
		"the secret's":      {minted, http.StatusUnauthorized}, // although it lies in the data directory
		"one without a key": {"", http.StatusUnauthorized},
	} {
		if status := answer(edge.at.HTTP, row.token); status != row.status {
			t.Errorf("the edge answered %s token with %d", name, status)
		}
	}
	waitFor(t, "the edge to be ready", func() bool { return statusOf(edge.at.HTTP, "/readyz") == http.StatusOK })

	// A JWKS that is out of reach: the edge starts, says that it is not ready, and tells people to come again.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	nowhere := l.Addr().String()
	_ = l.Close()
	blind := serveUntilReady(t, "edge-ws", "--data-dir", t.TempDir(), "--nats", server, "--http", "127.0.0.1:0", "--jwks", "http://"+nowhere+"/jwks")
	var body string
	waitFor(t, "the edge to say that keys are missing", func() bool {
		res, err := http.Get("http://" + blind.at.HTTP + "/readyz")
		if err != nil {
			return false
		}
		defer res.Body.Close()
		b, err := io.ReadAll(res.Body)
		body = string(b)
		return err == nil && res.StatusCode == http.StatusServiceUnavailable && strings.Contains(body, "JWKS")
	})
	if strings.Contains(body, nowhere) {
		t.Errorf("it tells everybody where keys are: %s", body)
	}
	if status := answer(blind.at.HTTP, token("https://idp")); status != http.StatusServiceUnavailable {
		t.Errorf("it answered a token that it cannot judge with %d", status)
	}
	for _, p := range []*proc{blind, edge, p} {
		p.stop()
	}
}

func TestTokenFlags(t *testing.T) {
	dir := t.TempDir()
	for name, tt := range map[string]struct {
		args []string
		code int
		says string
	}{
		"issuer alone":         {[]string{"edge-ws", "--issuer", "x"}, exitUsage, "--jwks"},
		"audience alone":       {[]string{"dev", "--audience", "x"}, exitUsage, "--jwks"},
		"a scheme":             {[]string{"edge-grpc", "--jwks", "ftp://idp.example/jwks"}, exitUsage, "https://"},
		"a file not there":     {[]string{"edge-ws", "--http", "127.0.0.1:0", "--jwks", filepath.Join(dir, "none")}, exitFailed, "none"},
		"neither":              {[]string{"edge-ws", "--http", "127.0.0.1:0"}, exitFailed, "no secret"},
		"a secret not there":   {[]string{"edge-ws", "--http", "127.0.0.1:0", "--secret-file", filepath.Join(dir, "no-secret"), "--jwks", "https://idp.example/"}, exitFailed, "no-secret"},
		"ipc and other people": {[]string{"dev", "--ipc", "--jwks", "https://idp.example/"}, exitUsage, "--ipc"},
	} {
		r := tidemark(t, map[string]string{"TIDEMARK_DATA_DIR": dir}, tt.args...)
		if r.code != tt.code || !strings.Contains(r.err, tt.says) || r.out != "" {
			t.Errorf("%s: exit code %d, standard output %q, standard error %q", name, r.code, r.out, r.err)
		}
	}
	out := tidemark(t, nil, "config", "edge-ws", "--jwks", "https://ada:pass-word@idp.example/jwks?key=que-ry").must(t).out
	if strings.Contains(out, "pass-word") || strings.Contains(out, "que-ry") || !strings.Contains(out, "idp.example/jwks") {
		t.Errorf("config shows %s", out)
	}
}
