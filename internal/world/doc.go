// Package world is the test world: an embedded NATS server, a broker, any number of edges with both of their faces, and the clients and the network between them, in one process. Tests say what
// happens in it by verbs: [World.RestartNATS], [World.CrashNATS], [World.KillEdge], [World.DrainEdge], [Edge.Freeze], [Link.Cut], [Link.FreezeReader].
//
// It is meant for a bubble of testing/synctest ([Run]): hours pass in milliseconds, and what is not ended is found. Everything in it is the real thing; only the wires are ours. Outside a bubble it
// runs too, in real time.
//
// Three kinds of clients stand in it. A [Peer] is scripted: it does what the test says and wants what the test says, on one connection of any way in ([Way]). A [Reader] follows a session as a
// client should: whatever happens to its connection, it comes back from the last seq it saw, and fails the test where a seq is skipped or told twice (I4). A [Writer] publishes as a client should: it
// sends again, with the same ids, what was not acknowledged.
//
// What a world has started ends with its test; a goroutine that is left fails the bubble. TestMain must call [Prepare].
package world
