// Package demo shows on one terminal what Tidemark promises: an agent streams a recorded answer over gRPC to two people, one on the WebSocket and one on gRPC, while connections are cut and an edge process
// is killed; then it counts what arrived.
//
// Everything in it is real: an embedded node with its data on disk, the edges as processes of their own, sockets, kill -9. What it reports it counts from the envelopes that the clients received, not from what
// should have happened.
//
// Not here: load (package bench), tests of the promises (internal/world).
//
// Cancellation: Run returns when its context ends, after it has stopped what it started.
package demo
