package main

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
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
		late := time.After(patience)
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

// TestTailTellsItsShareOnce: partitions that come one by one are one sentence, what is again as it was told is none, and nothing is told once it is over.
func TestTailTellsItsShareOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out strings.Builder
		s := shareTeller{out: &out}
		want := func(text string) {
			t.Helper()
			time.Sleep(2 * shareSettles)
			synctest.Wait()
			if out.String() != text {
				t.Errorf("told %q, want %q", out.String(), text)
			}
		}
		for n := range 5 {
			s.told(fmt.Sprintln("has", n))
			time.Sleep(shareSettles / 2)
		}
		want("has 4\n")
		s.told("has 3\n")
		s.told("has 4\n")
		want("has 4\n")
		s.told("has 2\n")
		want("has 4\nhas 2\n")
		s.told("has 0\n")
		s.close()
		want("has 4\nhas 2\n")
	})
}

// TestTailIsRefused: what is wrong with a command is said as everywhere, with the code behind the sentence, and what would be right.
func TestTailIsRefused(t *testing.T) {
	for _, tt := range []struct {
		args []string
		says string
	}{
		{[]string{"--types", "nope"}, `tidemark: The tail asks for the type "nope", which is no payload's; the payload types, which PROTOCOL.md lists, are token, message_completed, `},
		{[]string{"--types", "nope"}, "work_failed. (unknown_type)\n"},
		{[]string{"--since", "yesterday"}, `"yesterday" is not a time in the form of RFC 3339; give date, time and zone, as 2025-11-04T10:00:15Z or`},
	} {
		if r := tidemark(t, nil, append([]string{"tail", "g"}, tt.args...)...); r.code != exitUsage || !strings.Contains(r.err, tt.says) {
			t.Errorf("%v: %d %s", tt.args, r.code, r.err)
		}
	}
}
