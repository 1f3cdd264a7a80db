package main

import (
	"net"
	"strings"
	"testing"
)

// The README's first command, faster than its natural pace: everything in it is real.
func TestDemo(t *testing.T) {
	t.Setenv("TIDEMARK_TEST_PROCESS", "1") // for the edges that it starts
	// It needs none of the ports that the commands have by default: somebody may have a node running on them.
	for _, port := range []string{"8080", "8081", "8082"} {
		if l, err := net.Listen("tcp", "127.0.0.1:"+port); err == nil {
			defer l.Close()
		}
	}
	r := tidemark(t, nil, "demo", "--speed", "10")
	if r.code != exitDone || !strings.Contains(r.out, "Nothing lost, nothing repeated, everything in order.") {
		t.Fatalf("exit code %d\n%s\n%s", r.code, r.out, r.err)
	}
	if n := strings.Count(r.out, "the connection is cut"); n != 3 {
		t.Errorf("Ada's connection was cut %d times, not 3", n)
	}
	if !strings.Contains(r.out, "the gRPC edge is killed") || !strings.Contains(r.out, "the gRPC edge is back") {
		t.Error("no edge was killed and started again")
	}
}

// A recording that is over before Ada is back from a cut is held until she is.
func TestDemoOfAShortRecording(t *testing.T) {
	t.Setenv("TIDEMARK_TEST_PROCESS", "1") // for the edges that it starts
	r := tidemark(t, nil, "demo", "--speed", "20", "--input", "testdata/short.chunks.txt")
	if n := strings.Count(r.out, "the connection is cut"); r.code != exitDone || n != 3 {
		t.Errorf("exit code %d, %d cuts\n%s\n%s", r.code, n, r.out, r.err)
	}
}
