package bench

import (
	"bytes"
	"context"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"tidemark/schema"
)

const (
	classOS    = schema.Durability_DURABILITY_OS
	classFsync = schema.Durability_DURABILITY_FSYNC
)

func TestRawCountsEveryMessage(t *testing.T) {
	ns, _ := node(t, classOS)
	for name, l := range map[string]Load{
		"at full speed": {Sessions: 3, TokenBytes: 128, Warmup: 50 * time.Millisecond, Measure: 300 * time.Millisecond},
		"at a rate":     {Sessions: 1, Rate: 500, TokenBytes: 128, Warmup: 50 * time.Millisecond, Measure: 400 * time.Millisecond},
	} {
		t.Run(name, func(t *testing.T) {
			began := time.Now()
			out, err := l.runRaw(t.Context(), ns.URL(), "bench-raw", classOS)
			if err != nil {
				t.Fatal(err)
			}
			if out.Faults != (Faults{}) || out.Tokens == 0 || out.Sent < out.Tokens || uint64(out.Latency.TotalCount()) != out.Tokens {
				t.Errorf("%+v", out)
			}
			if most := l.most(time.Since(began)); l.Rate > 0 && out.Sent > most {
				t.Errorf("%d messages were sent, want at most %d", out.Sent, most)
			}
		})
	}
	if _, err := (Load{TokenBytes: 10}).runRaw(t.Context(), ns.URL(), "bench-raw", classOS); err == nil {
		t.Error("a message that has no room for its stamp is accepted")
	}
	nc, err := nats.Connect(ns.URL())
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	for name := range js.StreamNames(t.Context()).Name() {
		if strings.Contains(strings.ToLower(name), "bench") {
			t.Errorf("stream %s is left behind", name)
		}
	}
}

// TestRawEndsWithItsPublisher: what is refused ends the load, which else would wait for what will not come.
func TestRawEndsWithItsPublisher(t *testing.T) {
	ns, _ := node(t, classOS)
	nc, err := nats.Connect(ns.URL())
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	ended := make(chan error, 1)
	go func() {
		_, err := Load{Sessions: 1, Rate: 100, TokenBytes: 128, Measure: time.Hour}.runRaw(ctx, ns.URL(), "bench-raw", classOS)
		ended <- err
	}()
	// Once it has something, its stream is taken away: then nobody answers what is published.
	for {
		s, err := js.Stream(ctx, "BENCH-RAW")
		if err == nil && s.CachedInfo().State.Msgs > 0 {
			break
		}
		if err := pause(ctx, 5*time.Millisecond); err != nil {
			t.Fatal(err)
		}
	}
	if err := js.DeleteStream(ctx, "BENCH-RAW"); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err == nil || !strings.Contains(err.Error(), "refused") {
		t.Error(err)
	}
}

func TestRunMeasuresARealSystem(t *testing.T) {
	stopped := 0
	var lines []string
	rep, err := Run(t.Context(), Config{
		Start: func(_ context.Context, class schema.Durability) (*System, error) {
			ns, log := node(t, class)
			s := edgeOn(t, log)
			s.NATS, s.Stop = ns.URL(), func() error { stopped++; return nil }
			return s, nil
		},
		Sessions: []int{2}, Rounds: 1, Warmup: 20 * time.Millisecond, Measure: 200 * time.Millisecond, LatencyRate: 200, Version: "test",
		Progress: func(line string) { lines = append(lines, line) },
	})
	if err != nil {
		t.Fatal(err)
	}
	var text bytes.Buffer
	if err := rep.WriteText(&text); err != nil {
		t.Fatal(err)
	}
	if !rep.Sound() || stopped != 2 || len(lines) != 8 || len(rep.Loads) != 8 || len(rep.Rows) != 7 {
		t.Errorf("%d stopped, %d lines, %d loads, %d rows\n%s", stopped, len(lines), len(rep.Loads), len(rep.Rows), &text)
	}
	for _, l := range rep.Loads {
		if l.Sent == 0 || l.TokensPerSecond <= 0 || l.P50Millis <= 0 {
			t.Errorf("%+v", l)
		}
	}
	b, err := json.Marshal(rep)
	if err != nil {
		t.Fatal(err)
	}
	again := new(Report)
	if err := json.Unmarshal(b, again); err != nil || len(again.Rows) != len(rep.Rows) {
		t.Errorf("%v", err)
	}
}

func TestRunRefusesAnotherClass(t *testing.T) {
	_, err := Run(t.Context(), Config{
		Start: func(_ context.Context, _ schema.Durability) (*System, error) {
			_, log := node(t, classOS)
			return edgeOn(t, log), nil
		},
		Classes: []schema.Durability{classFsync},
	})
	if err == nil || !strings.Contains(err.Error(), "os, not fsync") {
		t.Errorf("%v", err)
	}
	if _, err := Run(t.Context(), Config{}); err == nil {
		t.Error("a configuration without Start is accepted")
	}
}

// rounds makes the results of a load from its rates and its latencies in milliseconds.
func rounds(millis int64, rates ...float64) []result {
	var all []result
	for i, rate := range rates {
		h := hdrhistogram.New(1, 60_000_000, 3)
		_ = h.RecordValue(1000 * (millis + int64(i)))
		all = append(all, result{Outcome: &Outcome{Tokens: uint64(rate), Elapsed: time.Second, Latency: h, Sent: 10}, server: 5 * time.Microsecond, client: -1})
	}
	return all
}

func TestReport(t *testing.T) {
	r := &run{results: map[key][]result{
		{classOS, 50, 0, false}: rounds(10, 300_000, 330_000, 200_000), {classOS, 50, 0, true}: rounds(20, 100_000, 100_000, 100_000),
		{classFsync, 50, 0, false}: rounds(10, 150_000, 165_000, 160_000), {classFsync, 50, 0, true}: rounds(20, 0, 0, 0),
		{classOS, 1, 1000, false}: rounds(3, 1000, 1000, 1000), {classOS, 1, 1000, true}: rounds(2, 1000, 1000, 1000),
	}}
	r.cfg = Config{Start: func(context.Context, schema.Durability) (*System, error) { return nil, nil }, Sessions: []int{50}, Version: "v1"}
	if err := r.cfg.setDefaults(); err != nil {
		t.Fatal(err)
	}
	rep := r.report()
	var got strings.Builder
	if err := rep.WriteText(&got); err != nil {
		t.Fatal(err)
	}
	_, tables, _ := strings.Cut(got.String(), "\n\n")
	const want = `end to end                                          measured  baseline            ratio  target
50 sessions at full speed, class os         300,000 tokens/s   100,000  raw        3.00     ≥ 3  met
50 sessions at full speed, class fsync      160,000 tokens/s   300,000  class os   0.50   ≥ 0.6  missed
1 session at 1,000 tokens/s, class os: p50           4.00 ms      3.00  raw        1.33   ≤ 1.5  met
1 session at 1,000 tokens/s, class os: p99           4.00 ms      3.00  raw        1.33   ≤ 1.5  met

load                                                   tokens/s  p50 ms  p99 ms  server µs/token  client µs/token  tokens
tidemark, 50 sessions at full speed, class os           300,000   11.01   11.01             5.00                –      30
raw JetStream, 50 sessions at full speed, class os      100,000   21.01   21.01             5.00                –      30
tidemark, 50 sessions at full speed, class fsync        160,000   11.01   11.01             5.00                –      30
raw JetStream, 50 sessions at full speed, class fsync         0   21.01   21.01             5.00                –      30
tidemark, 1 session at 1,000 tokens/s, class os           1,000    4.00    4.00             5.00                –      30
raw JetStream, 1 session at 1,000 tokens/s, class os      1,000    3.00    3.00             5.00                –      30

Every token came once and in order.
`
	if tables != want {
		t.Errorf("got\n%s\nwant\n%s", tables, want)
	}
	if _, err := json.Marshal(rep); err != nil {
		t.Error(err)
	}
	r.results[key{classOS, 50, 0, true}][1].Lost = 3
	rep = r.report()
	got.Reset()
	if err := rep.WriteText(&got); err != nil || rep.Sound() || !strings.Contains(got.String(), "BROKEN: 3 tokens lost") {
		t.Errorf("%v\n%s", err, &got)
	}
}

func TestMedian(t *testing.T) {
	for want, of := range map[float64][]float64{0: nil, 3: {3}, 2: {9, 1, 2}, 2.5: {4, 1, 2, 3}} {
		if got := median(of); got != want {
			t.Errorf("median of %v: %v", of, got)
		}
	}
}
