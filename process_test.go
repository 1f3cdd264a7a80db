package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// TestMain lets the test binary be tidemark itself, so that tests can start, signal and kill it as a process of its own without building it first; or a server of a NATS cluster, which is nothing of ours.
func TestMain(m *testing.M) {
	if os.Getenv("TIDEMARK_TEST_PROCESS") != "" {
		if len(os.Args) > 1 && os.Args[1] == clusterMember {
			runClusterMember(os.Args[2:])
			return
		}
		main()
		return
	}
	os.Exit(m.Run())
}

// proc is a running tidemark.
type proc struct {
	t   *testing.T
	cmd *exec.Cmd
	// lines are those of its standard output.
	lines chan string
	err   *lockedBuffer
	ended chan struct{}
	// at is what its ready line says.
	at addresses
}

// lockedBuffer is what a process wrote so far.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// patience is how long a test waits for a process that shares its machine with all others.
const patience = 60 * time.Second

// spawn starts tidemark. It is killed when the test ends, if it still runs.
func spawn(t *testing.T, args ...string) *proc {
	t.Helper()
	p := &proc{t: t, cmd: exec.Command(os.Args[0], args...), lines: make(chan string, 1024), err: new(lockedBuffer), ended: make(chan struct{})}
	for _, v := range os.Environ() {
		if !strings.HasPrefix(v, "TIDEMARK_") {
			p.cmd.Env = append(p.cmd.Env, v)
		}
	}
	p.cmd.Env = append(p.cmd.Env, "TIDEMARK_TEST_PROCESS=1")
	p.cmd.Stderr = p.err
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(p.ended)
		s := bufio.NewScanner(out)
		for s.Scan() {
			p.lines <- s.Text()
		}
		close(p.lines)
		_ = p.cmd.Wait()
	}()
	t.Cleanup(func() {
		_ = p.cmd.Process.Kill()
		<-p.ended
		if t.Failed() {
			t.Logf("standard error of tidemark %s:\n%s", strings.Join(args, " "), p.err)
		}
	})
	return p
}

// serveUntilReady starts a serving command and waits for its ready line.
func serveUntilReady(t *testing.T, args ...string) *proc {
	t.Helper()
	p := spawn(t, args...)
	p.awaitReady()
	return p
}

// awaitReady waits for the ready line.
func (p *proc) awaitReady() {
	p.t.Helper()
	args := strings.Join(p.cmd.Args[1:], " ")
	select {
	case line, ok := <-p.lines:
		if _, err := fmt.Sscanf(line, "ready http=%s grpc=%s nats=%s", &p.at.HTTP, &p.at.GRPC, &p.at.NATS); !ok || err != nil {
			<-p.ended
			p.t.Fatalf("tidemark %s printed %q instead of its ready line", args, line)
		}
	case <-time.After(patience):
		p.t.Fatalf("tidemark %s is not ready after %s", args, patience)
	}
}

// dev starts `tidemark dev` on free ports.
func dev(t *testing.T, dir string, more ...string) *proc {
	t.Helper()
	return serveUntilReady(t, append([]string{"dev", "--data-dir", dir, "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--nats-listen", "127.0.0.1:0"}, more...)...)
}

// signal sends a signal.
func (p *proc) signal(s os.Signal) {
	p.t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		p.t.Fatal(err)
	}
}

// freeze stops the process where it is, and returns when it stands still. SIGCONT lets it go on.
func (p *proc) freeze() {
	p.t.Helper()
	p.signal(syscall.SIGSTOP)
	var status syscall.WaitStatus
	if _, err := syscall.Wait4(p.cmd.Process.Pid, &status, syscall.WUNTRACED, nil); err != nil || !status.Stopped() {
		p.t.Fatalf("the process does not stand still: status %#x, %v", status, err)
	}
}

// wait waits until the process has ended and returns its exit code, -1 where a signal ended it.
func (p *proc) wait() int {
	p.t.Helper()
	select {
	case <-p.ended:
	case <-time.After(patience):
		p.t.Fatalf("the process does not end:\n%s", p.err)
	}
	return p.cmd.ProcessState.ExitCode()
}

// stop ends the process in good order.
func (p *proc) stop() {
	p.t.Helper()
	p.signal(syscall.SIGTERM)
	if code := p.wait(); code != exitDone {
		p.t.Fatalf("exit code %d after SIGTERM:\n%s", code, p.err)
	}
}

// kill ends it as kill -9 does.
func (p *proc) kill() {
	p.t.Helper()
	p.signal(syscall.SIGKILL)
	p.wait()
}

// result is what a command did in this process.
type result struct {
	code     int
	out, err string
}

// tidemark runs a command line in this process, with these environment variables and nothing to read.
func tidemark(t *testing.T, vars map[string]string, args ...string) result {
	t.Helper()
	return tidemarkReading(t, t.Context(), "", vars, args...)
}

func tidemarkReading(t *testing.T, ctx context.Context, input string, vars map[string]string, args ...string) result {
	t.Helper()
	var out, errs lockedBuffer
	env := &environment{
		stdin: strings.NewReader(input), stdout: &out, stderr: &errs, program: "tidemark",
		lookup: func(name string) (string, bool) { v, ok := vars[name]; return v, ok },
	}
	code := run(ctx, env, args)
	return result{code, out.String(), errs.String()}
}

// must fails the test where the command did.
func (r result) must(t *testing.T) result {
	t.Helper()
	if r.code != exitDone {
		t.Fatalf("exit code %d:\n%s%s", r.code, r.out, r.err)
	}
	return r
}

// freePort is an address with a port that is free, and stays so while what listens there is started again.
func freePort(t *testing.T) string {
	t.Helper()
	return quietAddresses(t, 1)[0]
}
