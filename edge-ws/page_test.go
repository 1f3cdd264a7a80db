package edgews

import (
	"io/fs"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"testing"

	"tidemark/schema"
)

func get(h http.Handler, path string, header map[string]string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(http.MethodGet, path, http.NoBody)
	for k, v := range header {
		r.Header.Set(k, v)
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w
}

func TestPageIsServedWhereItIsAskedFor(t *testing.T) {
	off := handler(t, func(*Config) {})
	on := handler(t, func(c *Config) { c.Page = true })
	for path, kind := range map[string]string{
		"/": "text/html", "/page/app.js": "text/javascript", "/page/link.js": "text/javascript", "/page/timeline.js": "text/javascript",
		"/page/style.css": "text/css", "/page/icon.svg": "image/svg+xml",
	} {
		if w := get(off, path, nil); w.Code != http.StatusNotFound {
			t.Errorf("%s without the page: %d", path, w.Code)
		}
		w := get(on, path, nil)
		if w.Code != http.StatusOK || !strings.HasPrefix(w.Header().Get("Content-Type"), kind) || w.Body.Len() == 0 {
			t.Errorf("%s: %d, %s, %d bytes", path, w.Code, w.Header().Get("Content-Type"), w.Body.Len())
		}
		for name, want := range map[string]string{
			"Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self' ws://example.com wss://example.com; " +
				"form-action 'none'; base-uri 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
			"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "X-Frame-Options": "DENY",
		} {
			if got := w.Header().Get(name); got != want {
				t.Errorf("%s: %s is %q", path, name, got)
			}
		}
		if again := get(on, path, map[string]string{"If-None-Match": w.Header().Get("ETag")}); again.Code != http.StatusNotModified || again.Body.Len() > 0 {
			t.Errorf("%s again: %d, %d bytes", path, again.Code, again.Body.Len())
		}
	}
	for _, path := range []string{"/index.html", "/page/", "/page/index.html", "/page/../edge.go", "/other"} {
		if w := get(on, path, nil); w.Code == http.StatusOK {
			t.Errorf("%s is served", path)
		}
	}
}

// TestPolicyTakesNothingFromTheRequest: a Host that is no plain one says nothing in the policy.
func TestPolicyTakesNothingFromTheRequest(t *testing.T) {
	plain := contentPolicy("")
	for _, host := range []string{"a;script-src *", "a b", "a,b", "'unsafe-eval'", "ä.example", "a\r\nX: y", "*"} {
		if got := contentPolicy(host); got != plain {
			t.Errorf("%q gives %q", host, got)
		}
	}
	if got := contentPolicy("[::1]:80"); !strings.Contains(got, " ws://[::1]:80 wss://[::1]:80;") {
		t.Error(got)
	}
}

// TestPageAsksNobodyElse: the page's files name no other host, hold no code in markup, and make no markup of data.
func TestPageAsksNobodyElse(t *testing.T) {
	never := regexp.MustCompile(`(?i)https?://|\bimport\(|innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|\bon[a-z]+="|style="|<style|javascript:|srcdoc|console\.`)
	files, err := fs.Glob(pageFiles, "page/*")
	if err != nil || len(files) < 6 {
		t.Fatalf("%d files, %v", len(files), err)
	}
	for _, name := range files {
		b, err := pageFiles.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		text := strings.ReplaceAll(string(b), `xmlns="http://www.w3.org/2000/svg"`, "")
		if found := never.FindString(text); found != "" {
			t.Errorf("%s has %q", name, found)
		}
		if lines := strings.Count(text, "\n"); lines > 600 {
			t.Errorf("%s has %d lines", name, lines)
		}
	}
}

// TestPageLearnsWhyItIsRefused: what browsers keep to themselves when an upgrade is refused.
func TestPageLearnsWhyItIsRefused(t *testing.T) {
	h := handler(t, func(c *Config) { c.Page = true })
	user := token(t, schema.Role_ROLE_USER, "mine-*")
	for name, tt := range map[string]struct {
		query, token string
		status       int
	}{
		"may come in":       {"sessionName=mine-1", user, http.StatusNoContent},
		"no token":          {"sessionName=mine-1", "", http.StatusUnauthorized},
		"a forged one":      {"sessionName=mine-1", user[:len(user)-8] + "AAAAAAAA", http.StatusUnauthorized},
		"another's session": {"sessionName=yours", user, http.StatusForbidden},
		"no session":        {"", user, http.StatusBadRequest},
	} {
		w := get(h, "/page/access?"+tt.query, map[string]string{"Authorization": "Bearer " + tt.token})
		if w.Code != tt.status {
			t.Errorf("%s: %d, want %d: %s", name, w.Code, tt.status, w.Body)
		}
		if strings.Contains(w.Body.String(), user) {
			t.Errorf("%s: the answer repeats the token", name)
		}
	}
}
