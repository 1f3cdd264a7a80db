package auth_test

import (
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"tidemark/internal/auth"
)

// TestSourceNames: a file is told from a URL, and nothing that may be secret in one is shown.
func TestSourceNames(t *testing.T) {
	for where, shown := range map[auth.Source]string{
		"": "", "keys/jwks.json": "keys/jwks.json", "https://ada:pass-word@idp.example:8443/keys?key=que-ry#x": "https://idp.example:8443/keys", "http://idp.example": "http://idp.example",
	} {
		if where.String() != shown || where.Check() != nil {
			t.Errorf("%q is shown as %q, %v", string(where), where, where.Check())
		}
	}
	for _, where := range []auth.Source{"ftp://idp.example/pass-word", "https:///pass-word", "https://pass-word%zz/"} {
		if err := where.Check(); err == nil || strings.Contains(err.Error()+where.String(), "pass-word") {
			t.Errorf("%q is shown as %q, %v", string(where), where, err)
		}
	}
}

// TestSourcesThatAreNotBelieved: each answer has the set of a key in it, somehow, and none may make the key count. Logs repeat nothing that is secret in the URL.
func TestSourcesThatAreNotBelieved(t *testing.T) {
	k := keyring()
	good := set(k.ed.public())
	plain := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(good) }))
	defer plain.Close()
	write := func(b []byte) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(b) }
	}
	for name, row := range map[string]struct {
		answer http.HandlerFunc
		logs   string // empty where the set is believed
	}{
		"as it should be":             {write(good), ""},
		"redirected on the same host": {redirectOnce("/there", good), ""},
		"redirected to http":          {func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, plain.URL, http.StatusFound) }, "redirected from https"},
		"redirected for ever":         {func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, r.URL.Path+"x", http.StatusFound) }, "redirected more than"},
		"redirected to a file": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "file:///etc/passwd", http.StatusFound)
		}, "redirected from https"},
		"status 203":                    {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(203); _, _ = w.Write(good) }, "status 203"},
		"status 404":                    {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(404); _, _ = w.Write(good) }, "status 404"},
		"too large":                     {write(append(good, bytes.Repeat([]byte(" "), auth.JWKSMaxBytes)...)), "larger than"},
		"too large once it is unpacked": {zipped(append(good, bytes.Repeat([]byte(" "), 64<<20)...)), "larger than"},
		"cut off": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", fmt.Sprint(len(good)+1))
			_, _ = w.Write(good)
		}, "unexpected EOF"},
		"cut before the answer": {func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, "EOF"},
		"a page":                {write([]byte("<html>" + string(good))), "not a JWKS"},
		"a list":                {write([]byte("[" + string(good) + "]")), "not a JWKS"},
		"nothing":               {write(nil), "not a JWKS"},
		"something behind it":   {write(append(bytes.Clone(good), "{}"...)), "not a JWKS"},
	} {
		t.Run(name, func(t *testing.T) {
			server := httptest.NewTLSServer(row.answer)
			defer server.Close()
			var logs lockedBuffer
			where := strings.Replace(server.URL, "https://", "https://ada:pass-word@", 1) + "/jwks?key=que-ry"
			v := running(t, auth.Config{
				JWKS: auth.Source(where), Transport: server.Client().Transport, Logger: slog.New(slog.NewTextHandler(&logs, &slog.HandlerOptions{Level: slog.LevelDebug})),
			}, func(v *auth.Verifier) { v.ReadsEvery(auth.JWKSEvery, time.Millisecond) })
			if row.logs == "" {
				waitReady(t, v)
				wants(t, v, name, in, k.ed.token(t, nil))
			} else {
				// Whatever it says, it is not let in; the second time Run has surely read.
				for range 2 {
					wants(t, v, name, cannot, k.ed.token(t, nil))
				}
				logs.waitFor(t, row.logs)
				logs.waitFor(t, "there were none yet")
			}
			if s := logs.String(); strings.Contains(s, "pass-word") || strings.Contains(s, "que-ry") {
				t.Errorf("the log says %s", s)
			}
		})
	}
}

func redirectOnce(to string, b []byte) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != to {
			http.Redirect(w, r, to, http.StatusFound)
			return
		}
		_, _ = w.Write(b)
	}
}

func zipped(b []byte) http.HandlerFunc {
	var packed bytes.Buffer
	z := gzip.NewWriter(&packed)
	_, err := z.Write(b)
	if err = errors.Join(err, z.Close()); err != nil {
		panic(err)
	}
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Encoding", "gzip")
		_, _ = w.Write(packed.Bytes())
	}
}
