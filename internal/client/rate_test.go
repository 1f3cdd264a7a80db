package client_test

import (
	"slices"
	"testing"
	"time"

	"tidemark/internal/client"
	"tidemark/internal/gateway"
	"tidemark/schema"
)

// TestPublisherIsSlowedByItsEdge: who publishes faster than it may is told so, rests, and stores everything once and in order.
func TestPublisherIsSlowedByItsEdge(t *testing.T) {
	inWorld(t, func(w *world) {
		w.limits.Agent = gateway.Rate{PerSecond: 50, Burst: 100}
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
		// A connection takes its burst of a hundred, and each rest is two seconds.
		if took := time.Since(began); slowed < 5 || took < 10*time.Second || took > time.Minute {
			t.Errorf("it was slowed %d times in %s", slowed, took)
		}
		if got := w.stored("s"); !slices.Equal(got, want) {
			t.Errorf("stored are %d texts, want %d in order", len(got), len(want))
		}
	})
}
