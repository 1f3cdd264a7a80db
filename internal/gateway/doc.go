// Package gateway is where transports end: one state machine for a connection, whatever carries its messages.
//
// An edge accepts a connection, wraps it as a [Transport] that moves whole messages, and calls [Gateway.Serve], which blocks until the connection is over and everything it
// started has ended. A new transport is one small package.
//
// What the gateway upholds: rights are checked in one place ([Authorize]); every message is answered or ends the connection with a code and a sentence; acknowledgements are sent after
// the log has stored (I1); followers are read in order, from the log where the tail has moved on, and data is never dropped (I4, I8); what a connection holds in memory is bounded, and a
// peer that does not take its messages delays nobody else (I8).
//
// Whoever it serves is bounded ([Limits], counted by [Limit]), and served for as long as its token lasts: the connection ends with that, unless a refresh brings a new one before.
//
// What it does not do: know transports, parse payloads (package schema does), or store (package broker does).
//
// Cancellation: when the context of Serve ends, the connection is closed at once with going_away. [Gateway.Drain] is the gentle way.
package gateway
