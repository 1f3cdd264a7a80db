// Package replay reads a session's log for people: as the transcript of a conversation, as JSON lines, and to verify it.
//
// Promise: everything is read through an edge, as any client would, from the session's beginning up to where it stood when the reading began; what retention took is said. A transcript is safe to show on
// a terminal, whatever is in the session. An export is lossless: each line, parsed, is the envelope. Verify trusts nobody: neither the edge nor the client it reads through.
//
// Not here: following a session as it goes on, which is package client's.
//
// Cancellation: a call returns soon after its context ends, with the context's error.
package replay
