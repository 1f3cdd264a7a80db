package main

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"

	"tidemark/schema"
)

func TestReplayFromTheCommandLine(t *testing.T) {
	dir := t.TempDir()
	node := dev(t, dir, "--durability", "os")
	// A name that is also a word of the command line.
	const session = "export"
	publish := []string{"publish", "--data-dir", dir, session}
	tidemarkReading(t, t.Context(), "one\ntwo\n", nil, publish...).must(t)

	show := tidemark(t, nil, "replay", "show", "--data-dir", dir, session).must(t)
	if want := "tidemark-cli (admin): one\ntwo\n"; !strings.Contains(show.out, want) {
		t.Errorf("show printed %q, without %q", show.out, want)
	}
	paced := tidemark(t, nil, "replay", "show", "--pace", "--data-dir", dir, session).must(t)
	if paced.out != show.out {
		t.Errorf("at its pace: %q, at once: %q", paced.out, show.out)
	}

	export := tidemark(t, nil, "replay", "export", "--data-dir", dir, session).must(t)
	lines := bytes.Split([]byte(strings.TrimSuffix(export.out, "\n")), []byte("\n"))
	for i, line := range lines {
		if e, err := schema.ParseJSON(line); err != nil || e.GetSeq() != uint64(i+1) {
			t.Errorf("line %d: %v %v", i+1, e, err)
		}
	}

	var verdict struct {
		Envelopes, Found int
		Digest           string `json:"text_digest"`
	}
	verify := tidemark(t, nil, "replay", "verify", "--json", "--data-dir", dir, session).must(t)
	// printf 'one\ntwo\n\0\0' | sha256sum
	const digest = "d6320a029fd345bfd79b5ac93ab9f161faf60930f51279432725d4bde271db43"
	if err := json.Unmarshal([]byte(verify.out), &verdict); err != nil || verdict.Envelopes != len(lines) || verdict.Found != 0 || verdict.Digest != digest {
		t.Errorf("%v %s", err, verify.out)
	}
	// Without the word show.
	if r := tidemark(t, nil, "replay", "--data-dir", dir, "nobody"); r.code != exitFailed || !strings.Contains(r.err, "session_not_found") {
		t.Errorf("a session that is not there: exit code %d, %q", r.code, r.err)
	}
	if r := tidemark(t, nil, "replay", "verify"); r.code != exitUsage {
		t.Errorf("no session: exit code %d", r.code)
	}
	node.stop()
}
