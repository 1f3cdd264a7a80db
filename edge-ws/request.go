package edgews

import (
	"encoding/json"
	"net/http"
	"net/url"
	"path"
	"strconv"
	"strings"

	"tidemark/schema"
)

// admit checks what every upgrade needs, before anything else is looked at; false where it has answered.
func (e *Edge) admit(w http.ResponseWriter, r *http.Request) bool {
	return upgrades(w, r) && e.enters(w, r)
}

// upgrades says whether the request is one for a WebSocket; false where it has answered.
func upgrades(w http.ResponseWriter, r *http.Request) bool {
	if strings.EqualFold(r.Header.Get("Upgrade"), "websocket") {
		return true
	}
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
		refuse(w, e.cfg.Gateway.RefuseOrigin())
		return false
	}
	if err := e.cfg.Gateway.Admits(); err != nil {
		refuse(w, err)
		return false
	}
	return true
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
