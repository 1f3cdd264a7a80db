// Package broker keeps the promises of Tidemark on NATS JetStream. It is the only package that speaks NATS.
//
// A session is one subject of a log stream. Each message there is a frame: consecutive envelopes of the session, published with a fence
// (Nats-Expected-Last-Subject-Sequence) that only the writer which knows the session's last frame can satisfy. From that follow the promises that
// this package upholds and its tests are named for:
//
//	I1 durable before acknowledged   a publish is answered after the PubAck of its frame, with the durability class of the stream
//	I2 one order                     seqs are assigned on top of the frame that the fence names
//	I3 exactly-once append           producers and envelope ids are folded into the session's state before an append is decided
//	I4 gapless delivery              a follower takes seq n+1 after n, from the tail, a page or the log, and checks it
//	I5 durable before visible        followers read what JetStream stored, never what an edge has in hand
//	I6 fenced                        the loser of a race reads the winner's frame and decides anew
//	I8 everything is bounded         queues, the tail, pages in the making: in count and bytes
//	I10 every run ends               a cancel that hits a run is stored with the run's end; the watchdog beside the projector ends a run whose agent is gone
//
// What a session may take next its lifecycle decides (lifecycle.go): a fold of its envelopes, without a clock or a socket, which the appender asks and the projector repeats. How often a run's progress is
// stored the appender's queue decides (progress.go): about once a second, and before anything else that comes. How many connections a user has to a session, over all edges, the bucket PRESENCE counts
// (presence.go, presence_bucket.go): nothing there is in the log, or outlives the connections. It says also which runs have an agent, and the watchdog (watchdog.go, verdict.go, runleases.go) fails those that have none, by the way of
// all envelopes: under the fence, decided by the lifecycle (notary.go).
//
// What it does not do: parse what clients send (package schema does), know transports, or check rights (the gateway does).
//
// Cancellation: a function returns when its context ends, with the context's error. What was submitted to an appender goes on being stored; only the
// waiting ends.
package broker
