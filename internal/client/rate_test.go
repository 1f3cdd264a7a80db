package client_test

import (
	"slices"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"tidemark/internal/client"
	"tidemark/internal/gateway"
	"tidemark/schema"
)

// TestPublisherIsSlowedByItsEdge: who publishes faster than it may is told so, rests for as long as the edge's limits ask for, sending nothing meanwhile, and stores everything once and in order.
func TestPublisherIsSlowedByItsEdge(t *testing.T) {
	inWorld(t, func(w *world) {
		metrics := prometheus.NewRegistry()
		w.limits.Agent, w.metrics = gateway.Rate{PerSecond: 20, Burst: 100}, metrics
		w.start("slow:1")
		want := numbers(1, 1000)
		slowed := 0
		p := w.client(nil, "slow:1").Publisher(w.Context(), client.PublishOptions{Session: "s", Lost: func(err error) {
			if schema.CodeOf(err) != schema.Code_CODE_RATE_EXCEEDED {
				t.Errorf("the connection was lost: %v", err)
			}
			slowed++
		}})
		began := time.Now()
		for _, text := range want {
			w.must(p.Publish(w.Context(), token(text)))
		}
		w.must(p.Close(w.Context()))
		// A connection takes its burst of a hundred, and each rest is five seconds.
		if took := time.Since(began); slowed < 8 || took < 40*time.Second || took > time.Minute {
			t.Errorf("it was slowed %d times in %s", slowed, took)
		}
		// One for each connection, and for what was on its way behind.
		if refused := exceeded(t, metrics, gateway.LimitRate); refused < float64(slowed) || refused > float64(5*slowed) {
			t.Errorf("it was refused %v times on %d connections", refused, slowed)
		}
		if got := w.stored("s"); !slices.Equal(got, want) {
			t.Errorf("stored are %d texts, want %d in order", len(got), len(want))
		}
	})
}

// exceeded is how often clients hit the limit.
func exceeded(t *testing.T, metrics prometheus.Gatherer, l gateway.Limit) float64 {
	t.Helper()
	families, err := metrics.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != "tidemark_gateway_limits_exceeded_total" {
			continue
		}
		for _, m := range f.GetMetric() {
			if m.GetLabel()[0].GetValue() == l.String() {
				return m.GetCounter().GetValue()
			}
		}
	}
	t.Fatalf("no metric counts the limit %s", l)
	return 0
}
