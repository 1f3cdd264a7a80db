// Package edgegrpc is the gRPC edge: it carries calls and streams between clients and the gateway, on one port for gRPC, gRPC-Web and Connect.
//
// Promise: a client gets the same frames, codes and order as on any other transport, because the same gateway makes them; this package only moves them. What the hot streams carry is
// handed through as bytes, in both directions. A refusal becomes a status as its code's rule says, with the code's word in the trailer tidemark-code and the frame that the multiplexed
// connection would have sent as the status's detail.
//
// Two servers stand behind the port (docs/adr/0002-grpc-stack.md has the measurement that decided it): grpc-go for native gRPC, where a frame of one token costs an eighth of what it costs on net/http, and connect-go
// on net/http for what browsers and curl speak. Each connection goes to one of them by how it begins.
//
// Not here: rights and the state machine (internal/gateway), tokens (internal/auth), the log (broker), TLS (whatever terminates it in front).
//
// Cancellation: when the context of [Edge.Serve] ends, everything is cut at once. [Edge.Drain] is the gentle way.
package edgegrpc
