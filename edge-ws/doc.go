// Package edgews is the WebSocket and HTTP edge: it upgrades requests, moves whole messages between sockets and the gateway, and knows nothing of what they say.
//
//	GET /v1/connect   many sessions over one socket; subprotocol tidemark.v1.proto (binary frames) or tidemark.v1.json (text frames)
//	GET /ws           the session socket: one session, one envelope a text frame, ?sessionName=&token=&lastSeq=N|latest&epoch=E
//	GET /healthz      200 while the process lives
//	GET /readyz       200 while connections are taken, the log is ready and tokens can be verified, 503 otherwise
//	GET /metrics      Prometheus
//	GET /, /page/…    the page to look at sessions with, where it is asked for ([Config].Page)
//
// Promise: tokens, origins and parameters are checked before the upgrade; what is refused there is answered with a status, a code and a sentence in JSON. After it, every end has a close
// code of RFC 6455 and a reason that begins with the code's word. A peer that answers no ping, or takes nothing, is closed with a reason.
//
// On loopback ([Config].Loopback, local.go) it serves the programs of one desktop application: /v1/connect in protobuf and /healthz, for peers of this machine alone.
//
// What it does not do: listen (the binary runs the http.Server), or drain ([gateway.Gateway.Drain] does, for all edges of the process).
//
// Cancellation: connections outlive their requests, which end with the upgrade. [Edge.Close] cuts those that the drained gateway has left, and waits for them.
package edgews
