package edgews

import (
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"mime"
	"net/http"
	"path"
	"strings"

	"tidemark/internal/auth"
)

// pageFiles are the page to look at sessions with: plain HTML, CSS and JavaScript, as browsers take them.
//
//go:embed page
var pageFiles embed.FS

// servePage adds the page's paths. It is a client of the session socket as any other; what is served here are its files, which hold no secret, and the reason of a refusal.
func (e *Edge) servePage() error {
	entries, err := pageFiles.ReadDir("page")
	if err != nil {
		return err
	}
	for _, entry := range entries {
		name := entry.Name()
		at := "/page/" + name
		if name == "index.html" {
			at = "/{$}"
		}
		body, err := pageFiles.ReadFile("page/" + name)
		if err != nil {
			return err
		}
		e.mux.Handle("GET "+at, asset(name, body))
	}
	e.mux.HandleFunc("GET /page/access", e.access)
	return nil
}

// asset serves one file of the page.
func asset(name string, body []byte) http.Handler {
	sum := sha256.Sum256(body)
	tag := `"` + hex.EncodeToString(sum[:8]) + `"`
	kind := mime.TypeByExtension(path.Ext(name))
	if path.Ext(name) == ".js" {
		kind = "text/javascript; charset=utf-8" // on Windows the registry may say something else, which browsers refuse
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Content-Type", kind)
		h.Set("Content-Security-Policy", contentPolicy(r.Host))
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Referrer-Policy", "no-referrer")
		h.Set("X-Frame-Options", "DENY") // for browsers that do not know frame-ancestors
		h.Set("Cross-Origin-Opener-Policy", "same-origin")
		h.Set("Cross-Origin-Resource-Policy", "same-origin")
		// It may be kept, and is asked for each time: another version of the binary has another page.
		h.Set("Cache-Control", "no-cache")
		h.Set("ETag", tag)
		if r.Header.Get("If-None-Match") == tag {
			w.WriteHeader(http.StatusNotModified)
			return
		}
		_, _ = w.Write(body) // the peer is gone, or reads it
	})
}

// contentPolicy lets the page load its own files, connect to its own host, and do nothing else. Browsers disagree on whether 'self' holds for a WebSocket, so the host is named, where the request
// has a plain one.
func contentPolicy(host string) string {
	sockets := ""
	if host != "" && !strings.ContainsFunc(host, func(c rune) bool {
		return (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && !strings.ContainsRune(".-:[]", c)
	}) {
		sockets = " ws://" + host + " wss://" + host
	}
	return "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'" + sockets +
		"; form-action 'none'; base-uri 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
}

// access answers as GET /ws would, with 204 in place of the upgrade: browsers do not tell a page why an upgrade was refused.
func (e *Edge) access(w http.ResponseWriter, r *http.Request) {
	p, err := e.cfg.Verify(r.Context(), auth.FromRequest(r))
	if err == nil {
		_, err = attachOf(r, p)
	}
	if err != nil {
		refuse(w, err)
		return
	}
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(http.StatusNoContent)
}
