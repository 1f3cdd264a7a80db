// Package client is a client of the edges in Go: the command line, the demo and the tests speak to a running system through it.
//
// Promise: a [Follower] yields every envelope of a session once and in order, over any number of broken connections and edges, and checks that it does (I4); a [Publisher] stores every
// envelope that it was given once and in order (I3), and says where. What neither can mend by connecting again it returns as a [*schema.Refusal].
//
// A Follower and a Publisher have one connection each, over the WebSocket or gRPC: the URL of the edge says which. The frames are the same on both.
//
// Not here: files, terminals, tokens (package auth mints them), and what envelopes mean.
//
// Cancellation: a call returns when its context ends, with the context's error. A Follower's next call goes on where that one stopped; what a Publisher has taken is still published.
package client
