package demo

import (
	"fmt"
	"io"
	"iter"
	"reflect"
	"slices"
	"strings"
	"time"

	"tidemark/internal/recording"
	"tidemark/schema"
)

// sent is an envelope that the agent published.
type sent struct {
	id string
	at time.Time
}

// received is an envelope as a client saw it.
type received struct {
	id  string
	seq uint64
	at  time.Time
}

// Tally is what one client received, counted from the data.
type Tally struct {
	Client string
	// Received is how many envelopes came; Lost, Repeated and OutOfOrder are those of them, or of what was published, that should not have been so.
	Received, Lost, Repeated, OutOfOrder int
	// Cuts is how often its connection was lost.
	Cuts int
	// SameText: what the client gathered is, text for text, what the recording says.
	SameText bool
	// P50, P99 and Max are of the time from the agent's publish to the client's receipt, of the envelopes that came while the client was connected and caught up. Longest is over all of them: how long the
	// worst outage kept one back.
	P50, P99, Max, Longest time.Duration
}

// Report is how a demo went.
type Report struct {
	Published int
	// Stored is how many envelopes the session holds at the end, as the log says.
	Stored  uint64
	Took    time.Duration
	Tallies []Tally
	// Kills is how often an edge process was killed, Cuts how often the first client's connection was to be cut.
	Kills, Cuts int
}

// OK reports whether nothing was lost, repeated, out of order or changed.
func (r *Report) OK() bool {
	ok := r.Published > 0 && r.Stored == uint64(r.Published) && len(r.Tallies) > 0 && r.Tallies[0].Cuts >= r.Cuts
	for _, t := range r.Tallies {
		ok = ok && t.Received == r.Published && t.Lost == 0 && t.Repeated == 0 && t.OutOfOrder == 0 && t.SameText
	}
	return ok
}

// tally compares what a client received with what was published. live says which arrivals were neither delayed by an outage nor replayed after one.
func tally(name string, published []sent, got []received, live []bool) Tally {
	t := Tally{Client: name, Received: len(got)}
	order := make(map[string]int, len(published))
	for i, s := range published {
		order[s.id] = i
	}
	seen := make(map[string]bool, len(got))
	lastSeq, lastOrder := uint64(0), -1
	var quick []time.Duration
	for i, g := range got {
		if seen[g.id] {
			t.Repeated++
			continue
		}
		seen[g.id] = true
		at, known := order[g.id]
		if !known || g.seq != lastSeq+1 || at != lastOrder+1 {
			t.OutOfOrder++
		}
		lastSeq, lastOrder = g.seq, at
		if known {
			took := g.at.Sub(published[at].at)
			t.Longest = max(t.Longest, took)
			if live[i] {
				quick = append(quick, took)
			}
		}
	}
	for _, s := range published {
		if !seen[s.id] {
			t.Lost++
		}
	}
	slices.Sort(quick)
	t.P50, t.P99, t.Max = percentile(quick, 50), percentile(quick, 99), percentile(quick, 100)
	return t
}

// percentile is the nearest rank in sorted durations; 0 where there are none.
func percentile(sorted []time.Duration, p int) time.Duration {
	if len(sorted) == 0 {
		return 0
	}
	return sorted[max(0, (len(sorted)*p+99)/100-1)]
}

// sameText compares what envelopes say when they are joined.
func sameText(want iter.Seq[*schema.Envelope], got []*schema.Envelope) bool {
	return reflect.DeepEqual(recording.Gather(want), recording.Gather(slices.Values(got)))
}

// Print writes the report as a table.
func (r *Report) Print(w io.Writer) error {
	rows := [][]string{{"", "published"}, {"envelopes", fmt.Sprint(r.Published)}, {"lost", ""}, {"repeated", ""}, {"out of order", ""}, {"text identical", ""}, {"times cut off", ""}, {"latency p50", ""}, {"latency p99", ""}, {"longest wait", ""}}
	for _, t := range r.Tallies {
		cells := []string{
			t.Client, fmt.Sprint(t.Received), fmt.Sprint(t.Lost), fmt.Sprint(t.Repeated), fmt.Sprint(t.OutOfOrder), yes(t.SameText), fmt.Sprint(t.Cuts),
			millis(t.P50), millis(t.P99), millis(t.Longest),
		}
		for i := range rows {
			rows[i] = append(rows[i], cells[i])
		}
	}
	widths := make([]int, len(rows[0]))
	for _, row := range rows {
		for i, cell := range row {
			widths[i] = max(widths[i], len([]rune(cell)))
		}
	}
	for i, row := range rows {
		cells := []string{fmt.Sprintf("  %-*s", widths[0], row[0])}
		for j, cell := range row[1:] {
			cells = append(cells, fmt.Sprintf("%*s", widths[j+1], cell))
		}
		line := strings.Join(cells, "   ")
		if _, err := fmt.Fprintln(w, line); err != nil {
			return err
		}
		if i == 0 {
			if _, err := fmt.Fprintln(w, "  "+rule(len([]rune(line))-2)); err != nil {
				return err
			}
		}
	}
	verdict := "Nothing lost, nothing repeated, everything in order."
	if !r.OK() {
		verdict = "This is NOT what Tidemark promises: see the table."
	}
	_, err := fmt.Fprintf(w, "\n  %s  (%d envelopes stored, %d edge killed and started again, %s)\n", verdict, r.Stored, r.Kills, r.Took.Round(100*time.Millisecond))
	return err
}

func yes(b bool) string {
	if b {
		return "yes"
	}
	return "NO"
}

func millis(d time.Duration) string {
	return fmt.Sprintf("%.1f ms", float64(d)/float64(time.Millisecond))
}

func rule(n int) string {
	b := make([]rune, n)
	for i := range b {
		b[i] = '─'
	}
	return string(b)
}
