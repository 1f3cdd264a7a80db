package world

import (
	"fmt"
	"os"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
)

// stuckAfter is how long a bubble may take by the real clock. The longest takes some ten seconds.
const stuckAfter = 4 * time.Minute

// watch ends the process where a bubble does not come to its end, and says what its goroutines were at: those that hold its clock last. A bubble's clock stands still as long as one of its goroutines waits
// for a mutex, and go test's own dump of thousands of goroutines does not show which. Called outside of the bubble; the function that it returns ends the watch.
func watch(t *testing.T) (over func()) {
	t.Helper()
	name := t.Name()
	done := make(chan struct{})
	go func() {
		timer := time.NewTimer(stuckAfter)
		defer timer.Stop()
		select {
		case <-done:
			return
		case <-timer.C:
		}
		stacks := make([]byte, 64<<20)
		stacks = stacks[:runtime.Stack(stacks, true)]
		fmt.Fprintf(os.Stderr, "world: the bubble of %s did not come to its end within %s; its goroutines, and last of all those that hold its clock:\n%s", name, stuckAfter, summary(string(stacks)))
		os.Exit(1)
	}()
	return func() { close(done) }
}

var (
	stackHead = regexp.MustCompile(`^goroutine \d+ .*?\[(.*synctest bubble.*)\]:$`)
	stackArgs = regexp.MustCompile(`\([^()]*\)$`)
)

// summary has a line for each stack that goroutines of a bubble are at, innermost call first.
func summary(stacks string) string {
	counts := make(map[string]int)
	for stack := range strings.SplitSeq(stacks, "\n\n") {
		lines := strings.Split(stack, "\n")
		head := stackHead.FindStringSubmatch(lines[0])
		if head == nil {
			continue
		}
		var calls []string
		for _, l := range lines[1:] {
			if !strings.HasPrefix(l, "\t") && !strings.HasPrefix(l, "created by ") && len(calls) < 10 {
				calls = append(calls, stackArgs.ReplaceAllString(l[strings.LastIndexByte(l, '/')+1:], ""))
			}
		}
		counts[fmt.Sprintf("[%s] %s", head[1], strings.Join(calls, " < "))]++
	}
	lines := make([]string, 0, len(counts))
	for l := range counts {
		lines = append(lines, l)
	}
	holds := func(l string) int {
		if strings.Contains(l[:strings.IndexByte(l, ']')], "(durable)") {
			return 0
		}
		return 1
	}
	slices.SortFunc(lines, func(a, b string) int {
		if d := holds(a) - holds(b); d != 0 {
			return d
		}
		return strings.Compare(a, b)
	})
	var b strings.Builder
	for _, l := range lines {
		fmt.Fprintf(&b, "%4d %s\n", counts[l], l)
	}
	return b.String()
}
