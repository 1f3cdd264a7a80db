package bench

import (
	"cmp"
	"fmt"
	"io"
	"maps"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"tidemark/schema"
)

// Report is what a bench found, for people and as JSON.
type Report struct {
	Machine    Machine    `json:"machine"`
	Parameters Parameters `json:"parameters"`
	Rows       []Row      `json:"rows"`
	Loads      []LoadRow  `json:"loads"`
	// Faults over all rounds and loads. Where there are any, the figures mean nothing.
	Faults Faults `json:"faults"`
}

// Machine is where it was measured, and what.
type Machine struct {
	OS       string            `json:"os"`
	Arch     string            `json:"arch"`
	CPU      string            `json:"cpu,omitempty"`
	CPUs     int               `json:"cpus"`
	Go       string            `json:"go"`
	Tidemark string            `json:"tidemark"`
	Modules  map[string]string `json:"modules"`
}

// Parameters are what the loads were made with.
type Parameters struct {
	Rounds        int     `json:"rounds"`
	WarmupSeconds float64 `json:"warmup_seconds"`
	Seconds       float64 `json:"seconds"`
	Window        int     `json:"window"`
	TokenBytes    int     `json:"token_bytes"`
	RawBytes      int     `json:"raw_bytes"`
}

// Row compares one figure with its baseline and its target. Figures are medians over the rounds; Ratio is the median of the rounds' own ratios, because a round and its baseline had the same
// neighbours on the machine.
type Row struct {
	What     string  `json:"what"`
	Unit     string  `json:"unit"`
	Measured float64 `json:"measured"`
	// Baseline is what Measured is compared with; BaselineOf says what that is.
	Baseline   float64 `json:"baseline"`
	BaselineOf string  `json:"baseline_of"`
	Ratio      float64 `json:"ratio"`
	// Target for the ratio; 0 where DESIGN section 11 sets none. AtMost: it is an upper bound.
	Target float64 `json:"target,omitempty"`
	AtMost bool    `json:"at_most,omitempty"`
	// Verdict is met, missed, or empty.
	Verdict string `json:"verdict,omitempty"`
	// The rounds, in their order.
	Rounds         []float64 `json:"rounds"`
	BaselineRounds []float64 `json:"baseline_rounds"`
}

// LoadRow is what one load came to, in medians over the rounds.
type LoadRow struct {
	What            string  `json:"what"`
	TokensPerSecond float64 `json:"tokens_per_second"`
	P50Millis       float64 `json:"p50_ms"`
	P99Millis       float64 `json:"p99_ms"`
	// Processor time for a token, in microseconds: of the system's process, all that it did because of the load, and of the load's own. Negative where it is not known.
	ServerMicros float64 `json:"server_us_per_token"`
	ClientMicros float64 `json:"client_us_per_token"`
	// Sent is all tokens of all rounds.
	Sent uint64 `json:"sent"`
	Faults
}

// The targets of DESIGN section 11.
const (
	targetFlood   = 3.0
	targetFsync   = 0.6
	targetLatency = 1.5
)

func (r *run) report() *Report {
	c := &r.cfg
	rep := &Report{
		Machine: machine(c.Version),
		Parameters: Parameters{
			Rounds: c.Rounds, WarmupSeconds: c.Warmup.Seconds(), Seconds: c.Measure.Seconds(), Window: c.Window, TokenBytes: c.TokenBytes, RawBytes: c.RawBytes,
		},
	}
	const os = schema.Durability_DURABILITY_OS
	perSecond := func(o result) float64 { return o.Rate() }
	for _, sessions := range c.Sessions {
		for _, class := range c.Classes {
			ours := key{class: class, sessions: sessions}
			raw, target := ours, targetFlood
			raw.raw = true
			if class != os {
				// The target is stated for os. One message, one sync: there the ratio to raw says more about the disk.
				target = 0
			}
			what := fmt.Sprintf("%s, class %s", ours.load(), schema.DurabilityWord(class))
			rep.row(r, Row{What: what, Unit: "tokens/s", BaselineOf: "raw", Target: target}, ours, raw, perSecond)
			if class == schema.Durability_DURABILITY_FSYNC {
				rep.row(r, Row{What: what, Unit: "tokens/s", BaselineOf: "class os", Target: targetFsync}, ours, key{class: os, sessions: sessions}, perSecond)
			}
		}
	}
	for _, class := range c.Classes {
		ours := key{class: class, sessions: 1, rate: c.LatencyRate}
		raw := ours
		raw.raw = true
		for _, q := range []float64{50, 99} {
			what := fmt.Sprintf("%s, class %s: p%v", ours.load(), schema.DurabilityWord(class), q)
			rep.row(r, Row{What: what, Unit: "ms", BaselineOf: "raw", Target: targetLatency, AtMost: true}, ours, raw, func(o result) float64 { return o.quantile(q) })
		}
	}
	rep.loads(r)
	return rep
}

// row completes a row and adds it, where both sides were measured.
func (rep *Report) row(r *run, row Row, measured, baseline key, figure func(result) float64) {
	var ratios []float64
	for i, o := range r.results[measured] {
		if i >= len(r.results[baseline]) {
			return
		}
		a, b := figure(o), figure(r.results[baseline][i])
		if b <= 0 {
			// Nothing came: there is nothing to compare with.
			return
		}
		row.Rounds, row.BaselineRounds, ratios = append(row.Rounds, a), append(row.BaselineRounds, b), append(ratios, a/b)
	}
	if len(ratios) == 0 {
		return
	}
	row.Measured, row.Baseline, row.Ratio = median(row.Rounds), median(row.BaselineRounds), median(ratios)
	if row.Target > 0 {
		row.Verdict = "missed"
		if row.AtMost && row.Ratio <= row.Target || !row.AtMost && row.Ratio >= row.Target {
			row.Verdict = "met"
		}
	}
	rep.Rows = append(rep.Rows, row)
}

func (rep *Report) loads(r *run) {
	keys := slices.Collect(maps.Keys(r.results))

	slices.SortFunc(keys, func(a, b key) int {
		return cmp.Or(cmp.Compare(a.rate, b.rate), cmp.Compare(a.sessions, b.sessions), cmp.Compare(a.class, b.class), strings.Compare(b.String(), a.String()))
	})
	for _, k := range keys {
		of := func(figure func(result) float64) float64 {
			var all []float64
			for _, o := range r.results[k] {
				all = append(all, figure(o))
			}
			return median(all)
		}
		row := LoadRow{
			What: k.String(), TokensPerSecond: of(func(o result) float64 { return o.Rate() }),
			P50Millis: of(func(o result) float64 { return o.quantile(50) }), P99Millis: of(func(o result) float64 { return o.quantile(99) }),
			ServerMicros: of(func(o result) float64 { return micro(o.server) }), ClientMicros: of(func(o result) float64 { return micro(o.client) }),
		}
		for _, o := range r.results[k] {
			row.Sent += o.Sent
			row.add(o.Faults)
		}
		rep.Faults.add(row.Faults)
		rep.Loads = append(rep.Loads, row)
	}
}

// median of some figures; the mean of the two in the middle where their number is even.
func median(all []float64) float64 {
	if len(all) == 0 {
		return 0
	}
	s := slices.Sorted(slices.Values(all))
	return (s[(len(s)-1)/2] + s[len(s)/2]) / 2
}

// Sound reports whether nothing was lost, repeated or wrong.
func (rep *Report) Sound() bool { return rep.Faults == Faults{} }

// WriteText writes the report for people.
func (rep *Report) WriteText(w io.Writer) error {
	m, p := rep.Machine, rep.Parameters
	fmt.Fprintf(w, "Tidemark %s on %s/%s, %d CPUs", m.Tidemark, m.OS, m.Arch, m.CPUs)
	if m.CPU != "" {
		fmt.Fprintf(w, " (%s)", m.CPU)
	}
	fmt.Fprintf(w, ", shared by system and load; %s", m.Go)
	for _, name := range slices.Sorted(maps.Keys(m.Modules)) {
		fmt.Fprintf(w, ", %s %s", name, m.Modules[name])
	}
	fmt.Fprintf(w, "\n%d rounds of %v s after %v s of warm-up, medians; one token in a WebSocket frame, its envelope %d bytes, at full speed %d of a session under way;\n", p.Rounds, p.Seconds, p.WarmupSeconds, p.TokenBytes, p.Window)
	fmt.Fprintf(w, "raw: JetStream on the same server with the same store settings, one message of %d bytes for a token, PublishAsync to one ordered consumer.\n\n", p.RawBytes)

	rows := [][]string{{"end to end", "measured", "baseline", "", "ratio", "target", ""}}
	for _, r := range rep.Rows {
		target := ""
		if r.Target > 0 {
			target = "≥ "
			if r.AtMost {
				target = "≤ "
			}
			target += strconv.FormatFloat(r.Target, 'g', -1, 64)
		}
		rows = append(rows, []string{r.What, figure(r.Measured, r.Unit) + " " + r.Unit, figure(r.Baseline, r.Unit), r.BaselineOf, strconv.FormatFloat(r.Ratio, 'f', 2, 64), target, r.Verdict})
	}
	writeTable(w, rows, "lrrlrrl")
	fmt.Fprintln(w)
	rows = [][]string{{"load", "tokens/s", "p50 ms", "p99 ms", "server µs/token", "client µs/token", "tokens"}}
	for _, l := range rep.Loads {
		rows = append(rows, []string{
			l.What, grouped(l.TokensPerSecond), figure(l.P50Millis, "ms"), figure(l.P99Millis, "ms"), known(l.ServerMicros), known(l.ClientMicros), grouped(float64(l.Sent)),
		})
	}
	writeTable(w, rows, "lrrrrrr")
	verdict := "Every token came once and in order."
	if !rep.Sound() {
		verdict = fmt.Sprintf("BROKEN: %d tokens lost, %d repeated, %d wrong. The figures mean nothing.", rep.Faults.Lost, rep.Faults.Repeated, rep.Faults.Wrong)
	}
	_, err := fmt.Fprintf(w, "\n%s\n", verdict)
	return err
}

// writeTable writes rows in columns, each aligned to the left (l) or the right (r).
func writeTable(w io.Writer, rows [][]string, align string) {
	widths := make([]int, len(align))
	for _, row := range rows {
		for i, cell := range row {
			widths[i] = max(widths[i], utf8.RuneCountInString(cell))
		}
	}
	for _, row := range rows {
		var line strings.Builder
		for i, cell := range row {
			space := strings.Repeat(" ", widths[i]-utf8.RuneCountInString(cell))
			if align[i] == 'r' {
				cell, space = space+cell, ""
			}
			line.WriteString(cell + space + "  ")
		}
		fmt.Fprintln(w, strings.TrimRight(line.String(), " "))
	}
}

func figure(v float64, unit string) string {
	if unit == "ms" {
		return strconv.FormatFloat(v, 'f', 2, 64)
	}
	return grouped(v)
}

// known is a figure that is negative where it is not known.
func known(v float64) string {
	if v < 0 {
		return "–"
	}
	return strconv.FormatFloat(v, 'f', 2, 64)
}

// grouped is a whole number with commas between its thousands.
func grouped(v float64) string {
	s := strconv.FormatFloat(v, 'f', 0, 64)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

// machine says where this process runs.
func machine(version string) Machine {
	m := Machine{OS: runtime.GOOS, Arch: runtime.GOARCH, CPU: processor(), CPUs: runtime.NumCPU(), Go: runtime.Version(), Tidemark: version, Modules: map[string]string{}}
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, d := range info.Deps {
			for path, name := range map[string]string{"github.com/nats-io/nats-server/v2": "nats-server", "github.com/nats-io/nats.go": "nats.go"} {
				if d.Path == path {
					m.Modules[name] = d.Version
				}
			}
		}
	}
	return m
}

// processor is its name, where the system has it in a file.
func processor() string {
	b, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(b)) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return ""
}
