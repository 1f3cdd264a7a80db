package edgews

import (
	"net"
	"net/http"
	"slices"
	"strings"

	"tidemark/internal/auth"
	"tidemark/internal/gateway"
	"tidemark/schema"
)

// An edge on loopback ([Config.Loopback]) serves the programs of one desktop application: its UI and its backend. Any page in the user's browser, and any program of another user on the machine,
// can open a connection to it too. So it believes nobody: the peer's address, the request's Host and its Origin are checked before anything else, and the token is taken from one place alone, the
// first frame, because a page can choose the address and the subprotocols of a WebSocket, and proxies and browsers keep addresses in logs and histories.

// onLoopback refuses requests from other machines, and those that name another host than this machine: a page whose name was made to resolve to 127.0.0.1 (DNS rebinding) is of our origin for its
// browser, but the browser still says in Host what the page called us.
func (e *Edge) onLoopback(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case !isLoopback(hostOf(r.RemoteAddr)):
			e.refuse(w, schema.Refuse(schema.Code_CODE_FORBIDDEN, "This server serves its own machine alone."))
		case !isLocalName(hostOf(r.Host)):
			e.refuse(w, schema.Refuse(schema.Code_CODE_FORBIDDEN, "The request's Host does not name this machine; use 127.0.0.1."))
		default:
			next.ServeHTTP(w, r)
		}
	})
}

// connectOnLoopback serves the one connection that there is on loopback: many sessions, in protobuf.
func (e *Edge) connectOnLoopback(w http.ResponseWriter, r *http.Request) {
	if !e.enters(w, r) || !e.upgrades(w, r) {
		return
	}
	if auth.FromRequest(r) != "" || r.Header.Get("Authorization") != "" {
		e.refuse(w, schema.Refuse(schema.Code_CODE_UNAUTHENTICATED, "On loopback a token is taken in the first frame, hello, and in no other place."))
		return
	}
	if !slices.Contains(offers(r), SubprotocolProto) {
		e.refuse(w, schema.Refuse(schema.Code_CODE_UNSUPPORTED_PROTOCOL, "On loopback there is one protocol; offer %s in Sec-WebSocket-Protocol.", SubprotocolProto))
		return
	}
	e.serve(w, r, gateway.Peer{Protocol: gateway.Proto, Remote: r.RemoteAddr}, SubprotocolProto)
}

// hostOf is an address without its port.
func hostOf(addr string) string {
	if host, _, err := net.SplitHostPort(addr); err == nil {
		return host
	}
	return strings.TrimSuffix(strings.TrimPrefix(addr, "["), "]")
}

func isLoopback(host string) bool {
	ip := net.ParseIP(host)
	return ip != nil && ip.IsLoopback()
}

// isLocalName: names that no DNS server answers for.
func isLocalName(host string) bool { return strings.EqualFold(host, "localhost") || isLoopback(host) }
