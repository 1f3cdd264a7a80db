package demo

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

var start = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// stream is n envelopes as the agent published them, and as a client received them 2 ms later, all live.
func stream(n int) (published []sent, got []received, live []bool) {
	for i := range n {
		at := start.Add(time.Duration(i) * 10 * time.Millisecond)
		published = append(published, sent{fmt.Sprint(i), at})
		got = append(got, received{fmt.Sprint(i), uint64(i + 1), at.Add(2 * time.Millisecond)})
		live = append(live, true)
	}
	return published, got, live
}

func TestTallyCountsWhatShouldNotBe(t *testing.T) {
	for name, c := range map[string]struct {
		change                     func(got []received) []received
		lost, repeated, outOfOrder int
	}{
		"all well":       {func(g []received) []received { return g }, 0, 0, 0},
		"one lost":       {func(g []received) []received { return append(g[:3:3], g[4:]...) }, 1, 0, 1},
		"the last lost":  {func(g []received) []received { return g[:9] }, 1, 0, 0},
		"one repeated":   {func(g []received) []received { return append(g[:4:4], g[3:]...) }, 0, 1, 0},
		"two swapped":    {func(g []received) []received { g[3], g[4] = g[4], g[3]; return g }, 0, 0, 3},
		"one of another": {func(g []received) []received { g[9].id = "alien"; return g }, 1, 0, 1},
		"nothing":        {func([]received) []received { return nil }, 10, 0, 0},
	} {
		published, got, live := stream(10)
		got = c.change(got)
		tl := tally(name, published, got, append(live, true))
		if tl.Lost != c.lost || tl.Repeated != c.repeated || tl.OutOfOrder != c.outOfOrder || tl.Received != len(got) {
			t.Errorf("%s: lost %d, repeated %d, out of order %d; want %d, %d, %d", name, tl.Lost, tl.Repeated, tl.OutOfOrder, c.lost, c.repeated, c.outOfOrder)
		}
		tl.SameText = true
		r := Report{Published: 10, Stored: 10, Tallies: []Tally{tl}}
		if want := name == "all well"; r.OK() != want {
			t.Errorf("%s: OK is %v", name, r.OK())
		}
	}
}

func TestTallyMeasuresOutagesApart(t *testing.T) {
	published, got, live := stream(200)
	got[150].at = published[150].at.Add(3 * time.Second)
	live[150] = false
	tl := tally("x", published, got, live)
	if tl.P50 != 2*time.Millisecond || tl.P99 != 2*time.Millisecond || tl.Max != 2*time.Millisecond || tl.Longest != 3*time.Second {
		t.Errorf("p50 %s, p99 %s, max %s, longest %s", tl.P50, tl.P99, tl.Max, tl.Longest)
	}
}

func TestReportFailsWhereTheLogHoldsAnotherNumber(t *testing.T) {
	published, got, live := stream(3)
	tl := tally("x", published, got, live)
	tl.SameText = true
	if r := (Report{Published: 3, Stored: 4, Tallies: []Tally{tl}}); r.OK() {
		t.Error("four envelopes are stored, three were published, and the report is content")
	}
}

func TestColumnsWaitForEachOther(t *testing.T) {
	var out strings.Builder
	c := newColumns(&out, 2, 10)
	c.text(0, "one two three four\n")
	if out.Len() != 0 {
		t.Errorf("printed %q before the other column had a line", out.String())
	}
	c.text(1, "one two thr")
	c.note("cut")
	c.text(1, "ee four\n")
	if err := c.end(); err != nil {
		t.Fatal(err)
	}
	want := "  one two    │ one two\n  ── cut\n  three four │ three four\n"
	got := strings.ReplaceAll(out.String(), "             │\n", "")
	if got != want {
		t.Errorf("printed\n%swant\n%s", got, want)
	}
}
