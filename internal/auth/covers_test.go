package auth_test

import (
	"strings"
	"testing"

	"pgregory.net/rapid"

	"tidemark/internal/auth"
)

// TestCoveredIsGiven: whatever a token covers gives nothing that the token does not.
func TestCoveredIsGiven(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		word := rapid.StringOfN(rapid.SampledFrom([]rune("ab*")), 0, 4, -1)
		p := auth.Principal{Sessions: rapid.SliceOfN(word, 0, 4).Draw(t, "sessions")}
		pattern, session := word.Draw(t, "pattern"), word.Draw(t, "session")
		prefix, many := strings.CutSuffix(pattern, "*")
		if named := session == pattern || many && strings.HasPrefix(session, prefix); named && p.Covers(pattern) && !p.MayUse(session) {
			t.Fatalf("%q covers %q, and gives no access to %q", p.Sessions, pattern, session)
		}
	})
}
