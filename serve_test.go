package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"tidemark/internal/auth"
	"tidemark/internal/client"
	"tidemark/schema"
)

func TestDevFromStartToEnd(t *testing.T) {
	dir := t.TempDir()
	p := dev(t, dir)
	for path, want := range map[string]string{"/healthz": "alive", "/readyz": "ready", "/metrics": "go_goroutines"} {
		res, err := http.Get("http://" + p.at.HTTP + path)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(res.Body)
		_ = res.Body.Close()
		if err != nil || res.StatusCode != http.StatusOK || !bytes.Contains(body, []byte(want)) {
			t.Errorf("%s: %s, %v", path, res.Status, err)
		}
	}
	for _, line := range []string{p.at.HTTP, p.at.GRPC, "nats://tidemark:", "token", "Ctrl-C"} {
		if !strings.Contains(p.err.String(), line) {
			t.Errorf("the welcome does not say %q", line)
		}
	}
	secret, err := os.ReadFile(secretFile(dir))
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(p.err.String(), strings.TrimSpace(string(secret))) {
		t.Error("the secret was printed")
	}

	here := map[string]string{"TIDEMARK_DATA_DIR": dir}
	r := tidemarkReading(t, t.Context(), "one\ntwo\n", here, "publish", "s").must(t)
	if !strings.Contains(r.out, "seq 1 to 3, fsync") {
		t.Errorf("publish said %q", r.out)
	}
	if r := tidemark(t, here, "follow", "--once", "s").must(t); r.out != "one\ntwo\n" {
		t.Errorf("follow showed %q", r.out)
	}

	p.stop()
	if line, more := <-p.lines; more {
		t.Errorf("standard output has more than the ready line: %q", line)
	}
	if _, err := os.Stat(addressFile(dir)); !os.IsNotExist(err) {
		t.Errorf("the address file is left: %v", err)
	}

	// What was acknowledged is there after a restart, and tokens still count. A log for machines holds nothing else, no tokens above all.
	p = dev(t, dir, "--log-format", "json")
	for line := range strings.Lines(p.err.String()) {
		if !json.Valid([]byte(line)) {
			t.Errorf("the log in JSON has the line %q", line)
		}
	}
	if r := tidemark(t, here, "follow", "--once", "s").must(t); r.out != "one\ntwo\n" {
		t.Errorf("follow showed %q after the restart", r.out)
	}
	again, err := os.ReadFile(secretFile(dir))
	if err != nil || !bytes.Equal(again, secret) {
		t.Errorf("the secret did not stay: %v", err)
	}
	p.signal(os.Interrupt)
	if code := p.wait(); code != exitDone {
		t.Errorf("exit code %d after SIGINT:\n%s", code, p.err)
	}
}

func TestI1_AcknowledgedSurvivesAKill(t *testing.T) {
	dir := t.TempDir()
	p := dev(t, dir)
	here := map[string]string{"TIDEMARK_DATA_DIR": dir}
	for i := 1; i <= 3; i++ {
		tidemarkReading(t, t.Context(), fmt.Sprintln("life", i), here, "publish", "s").must(t)
		p.kill()
		p = dev(t, dir)
	}
	if r := tidemark(t, here, "follow", "--once", "s").must(t); r.out != "life 1\nlife 2\nlife 3\n" {
		t.Errorf("follow showed %q", r.out)
	}
	if r := tidemark(t, here, "sessions", "show", "s").must(t); !strings.Contains(r.out, "  6  ") {
		t.Errorf("the session is\n%s", r.out)
	}
}

func TestDevTwiceOnOneDirectory(t *testing.T) {
	dir := t.TempDir()
	p := dev(t, dir)
	// On the same ports too, as somebody does who has forgotten the first: the directory is what to be told of.
	second := spawn(t, "dev", "--data-dir", dir, "--http", p.at.HTTP, "--grpc", p.at.GRPC, "--nats-listen", p.at.NATS)
	if code := second.wait(); code != exitFailed {
		t.Errorf("exit code %d", code)
	}
	if said := second.err.String(); !strings.Contains(said, dir) || !strings.Contains(said, fmt.Sprint("pid ", p.cmd.Process.Pid)) || strings.Count(said, "\n") != 1 {
		t.Errorf("it said %q", said)
	}
	p.stop()
}

func TestPortInUseIsNamed(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	taken := l.Addr().String()
	secret := []string{"--secret", strings.Repeat("x", 32)}
	nowhere := []string{"--nats", "nats://127.0.0.1:1"}
	for name, args := range map[string][]string{
		"http":        {"dev", "--http", taken, "--grpc", "127.0.0.1:0", "--nats-listen", "off"},
		"grpc":        {"dev", "--grpc", taken, "--http", "127.0.0.1:0", "--nats-listen", "off"},
		"nats-listen": {"dev", "--nats-listen", taken, "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"},
		"http of ws":  append(append([]string{"edge-ws", "--http", taken}, secret...), nowhere...),
		"grpc alone":  append(append([]string{"edge-grpc", "--grpc", taken, "--http", "off"}, secret...), nowhere...),
		"status":      append(append([]string{"edge-grpc", "--http", taken, "--grpc", "127.0.0.1:0"}, secret...), nowhere...),
		"broker":      append([]string{"broker", "--http", taken}, nowhere...),
	} {
		dir := t.TempDir()
		r := tidemark(t, map[string]string{"TIDEMARK_DATA_DIR": dir}, args...)
		flag, _, _ := strings.Cut(name, " ")
		if flag == "status" || flag == "broker" {
			flag = "http"
		}
		if r.code != exitFailed || r.out != "" || !strings.Contains(r.err, taken) || !strings.Contains(r.err, "in use") || !strings.Contains(r.err, "--"+flag) {
			t.Errorf("%s: exit code %d, %q", name, r.code, r.err)
		}
	}
}

func TestSecondSignalEndsAtOnce(t *testing.T) {
	dir := t.TempDir()
	p := dev(t, dir, "--drain-for", "10m")
	c := adminOf(t, dir, "http://"+p.at.HTTP)
	f := c.Follow(client.FollowOptions{Session: "s"})
	defer f.Close()
	if _, err := f.Next(t.Context()); err != nil {
		t.Fatal(err)
	}
	p.signal(os.Interrupt)
	for going := false; !going; {
		e, err := f.Next(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		going = e.GoingAway != nil
	}
	select {
	case <-p.ended:
		t.Fatal("it did not wait for the follower to go")
	default:
	}
	// What comes within a moment of the first is the same signal.
	for ended := false; !ended; {
		// It may have ended this moment.
		if err := p.cmd.Process.Signal(os.Interrupt); err != nil && !errors.Is(err, os.ErrProcessDone) {
			t.Fatal(err)
		}
		select {
		case <-p.ended:
			ended = true
		case <-time.After(sameSignal):
		}
	}
	if code := p.wait(); code != exitFailed || !strings.Contains(p.err.String(), "at once") {
		t.Errorf("exit code %d", code)
	}
}

// adminOf is a client with all rights on the node of a data directory.
func adminOf(t *testing.T, dir string, edges ...string) *client.Client {
	t.Helper()
	secret, err := auth.ReadSecret(secretFile(dir))
	if err != nil {
		t.Fatal(err)
	}
	token, err := auth.Mint(secret, auth.Principal{Subject: "test", Role: schema.Role_ROLE_ADMIN, Sessions: []string{"*"}}, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	c, err := client.New(client.Config{Edges: edges, Token: token})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestStoppingLosesNothing(t *testing.T) {
	dir := t.TempDir()
	p := dev(t, dir, "--grpc", freePort(t), "--agent-rate", "0")
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	c := adminOf(t, dir, "grpc://"+p.at.GRPC)
	var acked atomic.Int64
	pub := c.Publisher(ctx, client.PublishOptions{Session: "s", Window: 64 << 10, Acked: func(client.Ack) { acked.Add(1) }})
	published, enough := 0, make(chan struct{})
	var publishing sync.WaitGroup
	publishing.Go(func() {
		for {
			select {
			case <-enough:
				return
			default:
			}
			if err := pub.Publish(ctx, &schema.Envelope{Payload: &schema.Envelope_Token{Token: &schema.Token{MessageId: "m", Text: fmt.Sprintln(published + 1)}}}); err != nil {
				t.Error(err)
				return
			}
			published++
		}
	})
	more := func() {
		t.Helper()
		before := acked.Load()
		waitFor(t, "acknowledgements", func() bool { return acked.Load() > before+100 })
	}
	more()
	p.stop()
	dev(t, dir, "--grpc", p.at.GRPC, "--agent-rate", "0")
	more()
	close(enough)
	publishing.Wait()
	if err := pub.Close(ctx); err != nil {
		t.Fatal(err)
	}
	if int(acked.Load()) != published {
		t.Errorf("%d publishes, %d acknowledged", published, acked.Load())
	}
	var want strings.Builder
	for i := range published {
		fmt.Fprintln(&want, i+1)
	}
	if r := tidemark(t, map[string]string{"TIDEMARK_DATA_DIR": dir}, "follow", "--once", "s").must(t); r.out != want.String() {
		t.Errorf("of %d envelopes published while the process was stopped and started again, others are stored: %d bytes, want %d", published, len(r.out), want.Len())
	}
}

func TestProcessesOfTheirOwn(t *testing.T) {
	dir := t.TempDir()
	data := []string{"--data-dir", dir}
	broker := serveUntilReady(t, append([]string{"broker", "--embedded", "--http", "127.0.0.1:0", "--nats-listen", "127.0.0.1:0", "--durability", "os"}, data...)...)
	if broker.at.GRPC != off || broker.at.NATS == off {
		t.Errorf("the broker is at %+v", broker.at)
	}
	// One edge finds the node in the data directory, the other is told as it would be of a machine elsewhere.
	overWS := serveUntilReady(t, append([]string{"edge-ws", "--http", "127.0.0.1:0"}, data...)...)
	port := freePort(t)
	edgeGRPC := func() *proc {
		return serveUntilReady(t, append([]string{"edge-grpc", "--grpc", port, "--http", "127.0.0.1:0", "--nats", "nats://" + broker.at.NATS}, data...)...)
	}
	overGRPC := edgeGRPC()
	for name, at := range map[string]string{"broker": broker.at.HTTP, "edge-ws": overWS.at.HTTP, "edge-grpc": overGRPC.at.HTTP} {
		waitReady(t, name, at)
	}

	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	pub := adminOf(t, dir, "grpc://"+port).Publisher(ctx, client.PublishOptions{Session: "s"})
	f := adminOf(t, dir, "http://"+overWS.at.HTTP).Follow(client.FollowOptions{Session: "s"})
	const n = 600
	for i := range n {
		if err := pub.Publish(ctx, &schema.Envelope{Payload: &schema.Envelope_Token{Token: &schema.Token{MessageId: "m", Text: fmt.Sprint(i + 1)}}}); err != nil {
			t.Fatal(err)
		}
		if i == n/3 {
			overGRPC.kill()
			overGRPC = edgeGRPC()
		}
	}
	if err := pub.Close(ctx); err != nil {
		t.Fatal(err)
	}
	for i := 0; i < n; {
		e, err := f.Next(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if e.Envelope != nil {
			if i++; e.Envelope.GetToken().GetText() != fmt.Sprint(i) {
				t.Fatalf("envelope %d is %v", i, e.Envelope)
			}
		}
	}

	f.Close()

	// A command may do without an edge.
	r := tidemark(t, map[string]string{"TIDEMARK_DATA_DIR": dir}, "follow", "--once", "--json", "--after-seq", "599", "--nats", "nats://"+broker.at.NATS, "s").must(t)
	var last struct {
		Seq  uint64
		Data struct{ Text string }
	}
	if err := json.Unmarshal([]byte(r.out), &last); err != nil || last.Seq != n || last.Data.Text != fmt.Sprint(n) || r.err != "" {
		t.Errorf("follow over NATS: %q, %q, %v", r.out, r.err, err)
	}
	if r := tidemark(t, map[string]string{"TIDEMARK_DATA_DIR": dir}, "rebuild").must(t); !strings.Contains(r.out, "frames") {
		t.Errorf("rebuild said %q", r.out)
	}

	// Edges stay up while the node is away, and say so.
	broker.kill()
	waitFor(t, "edge-ws to notice", func() bool { return statusOf(overWS.at.HTTP, "/readyz") == http.StatusServiceUnavailable })
	if statusOf(overWS.at.HTTP, "/healthz") != http.StatusOK {
		t.Error("an edge without NATS is not healthy")
	}
	overWS.stop()
	overGRPC.stop()
}

func waitReady(t *testing.T, name, at string) {
	t.Helper()
	waitFor(t, name, func() bool { return statusOf(at, "/readyz") == http.StatusOK })
}

func statusOf(at, path string) int {
	res, err := http.Get("http://" + at + path)
	if err != nil {
		return 0
	}
	_ = res.Body.Close()
	return res.StatusCode
}

// waitFor looks again and again: another process says by itself only what it was asked.
func waitFor(t *testing.T, what string, done func() bool) {
	t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	late := time.After(patience)
	for !done() {
		select {
		case <-tick.C:
		case <-late:
			t.Fatalf("waited %s for %s", patience, what)
		}
	}
}

func TestDurabilityThatDoesNotFit(t *testing.T) {
	dir := t.TempDir()
	dev(t, dir, "--durability", "os").stop()
	for _, class := range []string{"fsync", "os"} {
		dev(t, dir, "--durability", class).stop()
	}
	p := spawn(t, "dev", "--data-dir", dir, "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--nats-listen", "off", "--durability", "memory")
	if code := p.wait(); code != exitFailed || !strings.Contains(p.err.String(), "the durability memory is not possible here") {
		t.Errorf("exit code %d:\n%s", code, p.err)
	}
	if line, more := <-p.lines; more {
		t.Errorf("it printed %q", line)
	}
}

func TestReadyLineWithoutNATSListener(t *testing.T) {
	p := dev(t, t.TempDir(), "--nats-listen", "off", "--durability", "memory")
	if p.at.NATS != off {
		t.Errorf("nats is at %q", p.at.NATS)
	}
	p.stop()
}
