package demo

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"
)

// process is an edge of the demo, in a process of its own.
type process struct {
	// Static after start.
	cmd  *exec.Cmd
	over chan struct{} // closed when the process has ended
	// addr is where it listens, from its ready line.
	addr string

	mu   sync.Mutex
	said strings.Builder // the last of what it wrote to its log, for when it does not come up
}

// readyTimeout is how long an edge may take from its start to its ready line.
const readyTimeout = 20 * time.Second

// startEdge starts an edge and waits until it is ready. kind is http or grpc: the key of its address in the ready line `ready http=… grpc=… nats=…`.
func startEdge(ctx context.Context, self, kind string, env []string, args ...string) (*process, error) {
	p := &process{cmd: exec.Command(self, args...), over: make(chan struct{})}
	p.cmd.Env = append(os.Environ(), env...)
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	logs, err := p.cmd.StderrPipe()
	if err != nil {
		return nil, err
	}
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("demo: the edge does not start: %w", err)
	}
	ready := make(chan string, 1)
	var pipes sync.WaitGroup
	pipes.Go(func() { p.keepLog(logs) })
	pipes.Go(func() {
		lines := bufio.NewScanner(out)
		for lines.Scan() {
			if rest, ok := strings.CutPrefix(lines.Text(), "ready "); ok {
				for field := range strings.FieldsSeq(rest) {
					if addr, ok := strings.CutPrefix(field, kind+"="); ok {
						ready <- addr
					}
				}
			}
		}
	})
	go func() {
		pipes.Wait()
		// How it ended is no news: the demo kills it.
		_ = p.cmd.Wait()
		close(p.over)
	}()
	timer := time.NewTimer(readyTimeout)
	defer timer.Stop()
	select {
	case p.addr = <-ready:
		return p, nil
	case <-p.over:
		err = fmt.Errorf("demo: the edge `%s` ended before it was ready:\n%s", strings.Join(args, " "), p.log())
	case <-timer.C:
		err = fmt.Errorf("demo: the edge `%s` was not ready after %s:\n%s", strings.Join(args, " "), readyTimeout, p.log())
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	p.kill()
	return nil, err
}

// kill ends the process as kill -9 does, and waits until it is gone.
func (p *process) kill() {
	_ = p.cmd.Process.Kill()
	<-p.over
}

// stop asks the process to end, and kills it where it takes too long.
func (p *process) stop() {
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.over:
	case <-time.After(10 * time.Second):
		p.kill()
	}
}

func (p *process) keepLog(r io.Reader) {
	const keep = 4 << 10
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		p.mu.Lock()
		if p.said.Len() > keep {
			p.said.Reset()
		}
		p.said.WriteString(lines.Text() + "\n")
		p.mu.Unlock()
	}
}

func (p *process) log() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.said.String()
}
