package main

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
)

// TestLimitsOfAProcess: what the flags say holds on a running edge, with its codes, and is counted; what else they could say is wrong usage.
func TestLimitsOfAProcess(t *testing.T) {
	dir := t.TempDir()
	p := dev(t, dir, "--durability", "memory", "--user-rate", "0.001", "--user-burst", "2", "--user-connections", "1", "--max-sessions", "7", "--max-in-flight-mb", "3")
	token := func(role string) string {
		return strings.TrimSpace(tidemark(t, map[string]string{"TIDEMARK_DATA_DIR": dir}, "token", "--role", role).must(t).out)
	}
	say := func(token string) (status int, code string) {
		t.Helper()
		body := `{"session":"s","envelopes":[{"userMessage":{"message":"m"}}]}`
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://"+p.at.GRPC+"/tidemark.v1.SessionService/Append", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", "application/json")
		req.Header.Set("Authorization", "Bearer "+token)
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		if _, err := io.Copy(io.Discard, res.Body); err != nil {
			t.Fatal(err)
		}
		return res.StatusCode, res.Header.Get("tidemark-code")
	}
	user, agent := token("user"), token("agent")
	for i, want := range []string{"200 ", "200 ", "429 rate_exceeded", "429 rate_exceeded"} {
		status, code := say(user)
		if got := fmt.Sprint(status, " ", code); got != want {
			t.Errorf("append %d of a user: %s, want %s", i+1, got, want)
		}
		if status, code := say(agent); status != http.StatusOK {
			t.Errorf("append %d of an agent: %d %s", i+1, status, code)
		}
	}
	res, err := http.Get("http://" + p.at.HTTP + "/metrics") //nolint:noctx // a test's
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	metrics, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	for limit, n := range map[string]int{"rate": 2, "message_bytes": 0, "connections": 0, "user_connections": 0, "sessions": 0, "in_flight": 0, "origin": 0, "groups": 0} {
		if want := fmt.Sprintf("tidemark_gateway_limits_exceeded_total{limit=%q} %d\n", limit, n); !strings.Contains(string(metrics), want) {
			t.Errorf("the metrics do not have %q", want)
		}
	}

	for _, args := range [][]string{
		{"--user-rate=-1"},
		{"--agent-rate=-1"},
		{"--user-rate=fast"},
		{"--user-burst=0"},
		{"--agent-burst=-1"},
		{"--user-connections=-1"},
		{"--max-sessions=0"},
		{"--max-in-flight-mb=0"},
		{"--max-in-flight-mb=1025"},
		{"--max-in-flight-mb=8796093022208"},
		{"--queue-mb=8796093022208"},
		{"--agent-burst=1000000001"},
		{"--max-sessions=4294967297"},
	} {
		for _, command := range []string{"dev", "edge-ws", "edge-grpc"} {
			if r := tidemark(t, nil, append([]string{command, "--data-dir", dir}, args...)...); r.code != exitUsage {
				t.Errorf("%s %s: exit code %d, %s", command, args, r.code, r.err)
			}
		}
	}
}
