// Package auth says who a client is: it verifies the JSON Web Tokens that edges receive, and mints them for development and for the command line.
//
// Promise: a [Principal] comes only from a token whose signature, algorithm, times and claims were all checked; what was checked does not change while the principal lives. Errors
// never contain a token or a part of one.
//
// Not here: what a role may do. The gateway decides that in one place, with the principal in hand.
package auth
