package edgews

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"path"
	"slices"
	"strconv"
	"strings"

	"tidemark/schema"
)

// admit checks what every upgrade needs, before anything else is looked at; false where it has answered.
func (e *Edge) admit(w http.ResponseWriter, r *http.Request) bool {
	return e.upgrades(w, r) && e.enters(w, r)
}

// upgrades says whether the request is one for a WebSocket; false where it has answered.
func (e *Edge) upgrades(w http.ResponseWriter, r *http.Request) bool {
	if strings.EqualFold(r.Header.Get("Upgrade"), "websocket") {
		return true
	}
	e.refused.WithLabelValues(schema.Code_CODE_UNSUPPORTED_PROTOCOL.Word()).Inc()
	w.Header().Set("Connection", "Upgrade")
	w.Header().Set("Upgrade", "websocket")
	answer(w, http.StatusUpgradeRequired, problem{
		Error: "Upgrade required", Details: "This path speaks WebSocket; send an upgrade request.", Code: schema.Code_CODE_UNSUPPORTED_PROTOCOL.Word(),
	})
	return false
}

// enters checks where the request comes from, and whether there is room; false where it has answered.
func (e *Edge) enters(w http.ResponseWriter, r *http.Request) bool {
	if !e.mayComeFrom(r) {
		e.refuse(w, e.cfg.Gateway.RefuseOrigin())
		return false
	}
	if err := e.cfg.Gateway.Admits(); err != nil {
		e.refuse(w, err)
		return false
	}
	return true
}

// checkOrigin refuses a pattern of [Config].Origins that is none, or that no origin can be.
func checkOrigin(pattern string) error {
	if _, err := path.Match(pattern, ""); err != nil {
		return fmt.Errorf("edgews: the origin %q is not a pattern: %w", pattern, err)
	}
	host := pattern
	if scheme, rest, ok := strings.Cut(pattern, "://"); ok {
		switch host = rest; {
		case scheme == "":
			host = ""
		case pattern == "file://":
			return nil // the one origin without a host: that of pages which some desktop programs load from files
		}
	}
	if host == "" || strings.ContainsAny(host, "/ ,?#@") {
		return fmt.Errorf("edgews: the origin %q is that of no page; name a host (app.example.com), or an origin as browsers do, without a path (https://app.example.com), or * for all", pattern)
	}
	return nil
}

// mayComeFrom checks the page that a browser connects from.
func (e *Edge) mayComeFrom(r *http.Request) bool {
	origin := strings.ToLower(r.Header.Get("Origin"))
	if origin == "" {
		return true
	}
	u, err := url.Parse(origin)
	if err != nil {
		return false
	}
	// On loopback there is no page of this server's own that could be meant: where it listens says nothing about who sends.
	if !e.cfg.Loopback && strings.EqualFold(u.Host, r.Host) {
		return true
	}
	for _, pattern := range e.cfg.Origins {
		name := u.Host
		if strings.Contains(pattern, "://") {
			name = u.Scheme + "://" + u.Host
		}
		// New has checked the pattern.
		if ok, _ := path.Match(strings.ToLower(pattern), name); ok {
			return true
		}
	}
	return false
}

// offers lists the subprotocols that the request offers, in its order.
func offers(r *http.Request) []string {
	var all []string
	for _, line := range r.Header.Values("Sec-WebSocket-Protocol") {
		for p := range strings.SplitSeq(line, ",") {
			all = append(all, strings.TrimSpace(p))
		}
	}
	return all
}

// queryOf is the request's query, where it is one and has nothing but these names, each at most once: what is misspelt would otherwise be passed over in silence, and another thing done than was
// asked for. The error does not repeat what stands in it, which may be a token.
func queryOf(r *http.Request, names ...string) (url.Values, error) {
	q, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return nil, schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "The query cannot be read; write what is special in a value as %%XX.")
	}
	for name, values := range q {
		if !slices.Contains(names, name) {
			return nil, schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "The query has a name that %s does not know; it knows %s.", r.URL.Path, strings.Join(names, ", "))
		}
		if len(values) > 1 {
			return nil, schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "The query has %s more than once.", name)
		}
	}
	return q, nil
}

func parseSeq(s string) (uint64, error) {
	seq, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		return 0, schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "The query's lastSeq is neither a whole number from 0 on nor 'latest'.")
	}
	return seq, nil
}

// problem is the body of a refusal before the upgrade.
type problem struct {
	Error   string `json:"error"`
	Details string `json:"details"`
	Code    string `json:"code"`
}

// state is the body of a health check.
type state struct {
	State string `json:"state"`
}

// refuse answers a request for a connection, and counts.
func (e *Edge) refuse(w http.ResponseWriter, err error) {
	e.refused.WithLabelValues(schema.CodeOf(err).Word()).Inc()
	refuse(w, err)
}

// nothingHere answers for the paths and methods that there are not.
func (e *Edge) nothingHere(w http.ResponseWriter, r *http.Request) {
	read := *r
	read.Method = http.MethodGet
	p := problem{Error: http.StatusText(http.StatusNotFound), Details: "There is nothing under this path.", Code: schema.Code_CODE_INVALID_MESSAGE.Word()}
	if _, pattern := e.mux.Handler(&read); pattern == "/" {
		answer(w, http.StatusNotFound, p)
		return
	}
	w.Header().Set("Allow", "GET, HEAD")
	p.Error, p.Details = http.StatusText(http.StatusMethodNotAllowed), "This path is for GET alone."
	answer(w, http.StatusMethodNotAllowed, p)
}

// refuse answers a request with a refusal's status and sentence.
func refuse(w http.ResponseWriter, err error) {
	r := schema.AsRefusal(err)
	status := http.StatusInternalServerError
	switch r.Code {
	case schema.Code_CODE_UNAUTHENTICATED:
		status = http.StatusUnauthorized
		w.Header().Set("WWW-Authenticate", "Bearer")
	case schema.Code_CODE_FORBIDDEN, schema.Code_CODE_ORIGIN_NOT_ALLOWED:
		status = http.StatusForbidden
	case schema.Code_CODE_INVALID_MESSAGE, schema.Code_CODE_UNSUPPORTED_PROTOCOL:
		status = http.StatusBadRequest
	case schema.Code_CODE_UNAVAILABLE, schema.Code_CODE_GOING_AWAY, schema.Code_CODE_LIMIT_EXCEEDED:
		status = http.StatusServiceUnavailable
		w.Header().Set("Retry-After", "1")
	default:
	}
	title := http.StatusText(status)
	if status == http.StatusForbidden {
		// One word for both, which clients test for; the status and the code tell them apart.
		title = http.StatusText(http.StatusUnauthorized)
	}
	answer(w, status, problem{Error: title, Details: r.Message, Code: r.Code.Word()})
}

func answer(w http.ResponseWriter, status int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(body) // the peer is gone, or reads it
}
