// Package auth says who a client is: it verifies the JSON Web Tokens that edges receive, and mints them for development and for the command line.
//
// Promise: a [Principal] comes only from a token whose signature, algorithm, times and claims were all checked; what was checked does not change while the principal lives. Errors
// never contain a token or a part of one.
//
// Tokens are signed with a secret (HS256), or with keys whose public halves stand in a JWKS (RS256, ES256, EdDSA). Each key is for one algorithm, which follows from the key and not from the token.
// [Verifier.Run] reads the JWKS, and is the only goroutine; what waits for it waits for one read at most. ADR 7 has the rules and their reasons.
//
// Not here: what a role may do. The gateway decides that in one place, with the principal in hand.
package auth
