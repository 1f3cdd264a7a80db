// Package natsd runs the nats-server that is embedded in the process: `tidemark dev`, `tidemark broker --embedded`, the demo and the tests. It is the only package that imports
// nats-server.
//
// Promise: a started server accepts connections and answers what JetStream is asked, keeps its data under one directory that no second process can open, and acknowledges what JetStream stores as the chosen
// durability class says (I1). Shutdown returns when everything is on its way to the disk and the directory is free again.
//
// Not here: streams, subjects and everything else that package broker says over the connection.
package natsd
