package main

import (
	"encoding/json"
	"strings"
	"testing"
	"time"
)

// TestTailPrintsOnce: what a member has printed before it was told to stop is not printed by the next, with a process of its own each time.
func TestTailPrintsOnce(t *testing.T) {
	dir := t.TempDir()
	dev(t, dir)
	here := map[string]string{"TIDEMARK_DATA_DIR": dir}
	for _, session := range []string{"chat-1", "chat-2", "job"} {
		tidemarkReading(t, t.Context(), "one\n", here, "publish", session).must(t)
	}
	tail := func(want ...string) {
		t.Helper()
		p := spawn(t, "tail", "g", "--prefix", "chat-", "--types", "token", "--data-dir", dir)
		missing := map[string]bool{}
		for _, w := range want {
			missing[w] = true
		}
		late := time.After(20 * time.Second)
		for len(missing) > 0 {
			select {
			case text, more := <-p.lines:
				if !more {
					t.Fatalf("tail has ended: %s", p.err.String())
				}
				var line struct {
					Session, Epoch string
					Stored         time.Time
					Envelope       struct {
						Seq  int
						Data struct{ Text string }
					}
				}
				if err := json.Unmarshal([]byte(text), &line); err != nil || line.Epoch == "" || line.Stored.IsZero() || line.Envelope.Seq == 0 {
					t.Fatalf("tail printed %q: %v", text, err)
				}
				got := line.Session + " " + strings.TrimSpace(line.Envelope.Data.Text)
				if !missing[got] {
					t.Errorf("tail printed %q", got)
				}
				delete(missing, got)
			case <-late:
				t.Fatalf("tail has not printed %v: %s", missing, p.err.String())
			}
		}
		p.stop()
	}
	tail("chat-1 one", "chat-2 one")
	tidemarkReading(t, t.Context(), "two\n", here, "publish", "chat-2").must(t)
	tail("chat-2 two")
}
