// Package schema holds the words of Tidemark: envelopes, frames, the connection protocol, names, ids, limits, codes, and the JSON form of an
// envelope. It knows no transport, no NATS and no goroutine, and imports nothing of ours.
//
// The protobuf definitions are in proto/, the Go code made from them is checked in beside this file (`just gen`; the checks prove it fresh).
//
// Functions are pure and may be called concurrently. What comes from outside is validated here, once, at the gateway; inside it is trusted.
package schema
