package auth_test

import (
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"tidemark/internal/auth"
)

func TestFromRequest(t *testing.T) {
	tests := []struct {
		name, url, header, protocols, want string
	}{
		{"nothing", "/ws", "", "", ""},
		{"header", "/ws", "Bearer abc", "", "abc"},
		{"header, scheme in lower case", "/ws", "bearer abc", "", "abc"},
		{"another scheme", "/ws", "Basic abc", "", ""},
		{"another scheme and query", "/ws?token=q", "Basic abc", "", "q"},
		{"a scheme without a token", "/ws?token=q", "Bearer", "", "q"},
		{"query", "/ws?sessionName=s&token=abc", "", "", "abc"},
		{"subprotocol", "/ws", "", "tidemark.v1.json, bearer.a.b.c", "a.b.c"},
		{"header before subprotocol before query", "/ws?token=q", "Bearer h", "bearer.p", "h"},
		{"subprotocol before query", "/ws?token=q", "", "bearer.p", "p"},
	}
	for _, tt := range tests {
		r := httptest.NewRequest("GET", tt.url, nil)
		if tt.header != "" {
			r.Header.Set("Authorization", tt.header)
		}
		if tt.protocols != "" {
			// Two header lines are one list.
			for p := range strings.SplitSeq(tt.protocols, ";") {
				r.Header.Add("Sec-WebSocket-Protocol", p)
			}
		}
		if got := auth.FromRequest(r); got != tt.want {
			t.Errorf("%s: %q, want %q", tt.name, got, tt.want)
		}
	}
	r := httptest.NewRequest("GET", "/ws", nil)
	r.Header.Add("Sec-WebSocket-Protocol", "tidemark.v1.proto")
	r.Header.Add("Sec-WebSocket-Protocol", "bearer.xyz")
	if got := auth.FromRequest(r); got != "xyz" {
		t.Errorf("second header line: %q", got)
	}
}

func TestSecretIsMadeOnce(t *testing.T) {
	path := filepath.Join(t.TempDir(), "secret")
	got := make([]string, 16)
	var wg sync.WaitGroup
	for i := range got {
		wg.Go(func() {
			s, err := auth.LoadOrCreateSecret(path)
			if err != nil {
				t.Error(err)
			}
			got[i] = string(s)
		})
	}
	wg.Wait()
	for _, s := range got {
		if s != got[0] || len(s) != 64 {
			t.Fatalf("secrets differ or are short: %d and %d bytes", len(s), len(got[0]))
		}
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("mode %v, %v; want 0600", info.Mode(), err)
	}
	if left, _ := filepath.Glob(path + ".new-*"); len(left) != 0 {
		t.Fatalf("left behind: %v", left)
	}
}

func TestSecretIsChecked(t *testing.T) {
	path := filepath.Join(t.TempDir(), "secret")
	if _, err := auth.ReadSecret(path); err == nil {
		t.Error("a file that is not there was read")
	}
	if err := os.WriteFile(path, []byte("  short\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := auth.LoadOrCreateSecret(path); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("a short secret: %v", err)
	}
	if err := os.WriteFile(path, []byte(" "+strings.Repeat("k", 32)+"\r\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if s, err := auth.ReadSecret(path); err != nil || len(s) != 32 {
		t.Errorf("%d bytes, %v", len(s), err)
	}
}
