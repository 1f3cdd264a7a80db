// Package bench loads a running system from outside, over sockets only, and measures what DESIGN section 11 sets targets for, each beside its baseline: raw JetStream in the same run, on the
// same machine and the same server with the same store settings.
//
// Promise: nothing is counted that was not checked. Every token carries its number, and every follower compares that number and the seq with the next one due; a report of a run that lost or repeated
// one says so and has no figures worth reading. Rounds of a load and of its baseline alternate, and medians are reported, so that a busy machine disturbs both alike.
//
// The clients here are made to cost little, because they share the processors with what they measure: they write many WebSocket frames with one system call, each still one token, and read events without
// decoding envelopes. They are no example of a client; package client is.
//
// Cancellation: Run returns soon after its context ends, with the context's error, and leaves no process and no file behind.
package bench
