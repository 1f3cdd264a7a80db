package auth

import (
	"net/http"
	"strings"
)

// Subprotocol is what a WebSocket subprotocol that carries a token begins with. It is never selected: the server answers with the one beside it.
const Subprotocol = "bearer."

// FromRequest finds the token that a request carries, empty where it carries none: from the header Authorization (Bearer), a WebSocket subprotocol bearer.<token>, or the query's
// token, in this order. Browsers cannot set headers for a WebSocket, so the last two serve them. Whoever logs the request must leave the query and these two headers out.
func FromRequest(r *http.Request) string {
	if scheme, token, ok := strings.Cut(r.Header.Get("Authorization"), " "); ok && strings.EqualFold(scheme, "Bearer") {
		return strings.TrimSpace(token)
	}
	for _, line := range r.Header.Values("Sec-WebSocket-Protocol") {
		for p := range strings.SplitSeq(line, ",") {
			if token, ok := strings.CutPrefix(strings.TrimSpace(p), Subprotocol); ok {
				return token
			}
		}
	}
	return r.URL.Query().Get("token")
}
