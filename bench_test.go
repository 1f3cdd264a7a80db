package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"tidemark/bench"
)

// TestBenchFromTheCommandLine lets the command start nodes of its own, and then load one that runs.
func TestBenchFromTheCommandLine(t *testing.T) {
	dir := t.TempDir()
	quick := []string{"bench", "--rounds", "1", "--for", "200ms", "--warmup", "20ms", "--sessions", "2", "--class", "os", "--json"}
	check := func(p *proc, rows int) {
		t.Helper()
		var out strings.Builder
		for line := range p.lines {
			out.WriteString(line)
		}
		if code := p.wait(); code != exitDone {
			t.Fatalf("exit code %d", code)
		}
		var rep bench.Report
		if err := json.Unmarshal([]byte(out.String()), &rep); err != nil {
			t.Fatalf("%v in %s", err, &out)
		}
		if !rep.Sound() || len(rep.Rows) != rows || rep.Loads[0].Sent == 0 || rep.Machine.Tidemark != version() {
			t.Errorf("%s", &out)
		}
	}
	check(spawn(t, append(quick, "--dir", dir)...), 3)
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v %v", left, err)
	}

	node := dev(t, filepath.Join(dir, "node"), "--durability", "os", "--agent-rate", "0")
	token := strings.TrimSpace(tidemark(t, nil, "token", "--data-dir", filepath.Join(dir, "node"), "--role", "admin", "--session", bench.SessionPrefix+"*").must(t).out)
	check(spawn(t, append(quick, "--url", "http://"+node.at.HTTP, "--token", token)...), 0) // no baseline, no row
	node.stop()
}

func TestBenchFromTheCommandLineUsedWrongly(t *testing.T) {
	for _, args := range [][]string{{"--rounds", "0"}, {"--sessions", "0"}, {"--class", "fast"}, {"--url", "http://127.0.0.1:1"}, {"--url", "nonsense", "--token", "t"}, {"--for", "-1s"}} {
		if r := tidemark(t, nil, append([]string{"bench"}, args...)...); r.code != exitUsage || r.err == "" {
			t.Errorf("%v: exit code %d, %q", args, r.code, r.err)
		}
	}
}
