package gateway

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"tidemark/schema"
)

func read(t *testing.T, m prometheus.Metric) *dto.Metric {
	t.Helper()
	var d dto.Metric
	if err := m.Write(&d); err != nil {
		t.Fatal(err)
	}
	return &d
}

func gauge(t *testing.T, m prometheus.Metric) float64   { return read(t, m).GetGauge().GetValue() }
func counter(t *testing.T, m prometheus.Metric) float64 { return read(t, m).GetCounter().GetValue() }

// drain starts to drain and returns where its result will be.
func (w *world) drain(ctx context.Context) <-chan error {
	synctest.Wait()
	done := make(chan error, 1)
	go func() { done <- w.g.Drain(ctx, "It is replaced by a newer version.") }()
	synctest.Wait()
	return done
}

// TestDrain is the whole sequence: going_away, a time of grace, appends in flight answered, the close.
func TestDrain(t *testing.T) {
	bubble(t, nil, func(w *world) {
		held := make(chan struct{})
		w.g.cfg.Log = &heldLog{Log: w.log, held: held}
		idle, busy, follower := w.agent(), w.agent(), w.agent()
		follower.attach(&schema.Attach{Channel: 1, Session: "s"})
		follower.wantAttached(1, 0)
		follower.wantCaughtUp(1, 0)
		busy.token(1, "s", "in flight")

		began := time.Now()
		done := w.drain(w.Context())
		for _, p := range []*peer{idle, busy, follower} {
			if m := want[*schema.ServerFrame_GoingAway](p).GoingAway; m.GetReason() != "It is replaced by a newer version." || m.GetGraceMs() != 1000 {
				t.Errorf("got %v", m)
			}
		}
		if err := w.g.Ready(); schema.CodeOf(err) != schema.Code_CODE_GOING_AWAY {
			t.Errorf("it is ready: %v", err)
		}
		late := w.agent()
		if err := late.wantClosed(schema.Code_CODE_GOING_AWAY, "connect to another"); err == nil {
			t.Error("Serve returned nil")
		}
		// It serves in the time of grace.
		busy.token(2, "s", "still served")
		idle.leave()
		time.Sleep(time.Second)
		follower.wantClosed(schema.Code_CODE_GOING_AWAY, "newer version")
		time.Sleep(time.Second)
		busy.wantNothing()
		close(held)
		for acks := 0; acks < 2; {
			acks += len(want[*schema.ServerFrame_Published](busy).Published.GetAcks())
		}
		if err := busy.wantClosed(schema.Code_CODE_GOING_AWAY, "newer version"); schema.CodeOf(err) != schema.Code_CODE_GOING_AWAY {
			t.Errorf("Serve returned %v", err)
		}
		if err := <-done; err != nil || time.Since(began) != 2*time.Second {
			t.Errorf("Drain returned %v after %s", err, time.Since(began))
		}
	})
}

// TestDrainReturnsEarly: clients that go by themselves are not waited for any longer.
func TestDrainReturnsEarly(t *testing.T) {
	bubble(t, nil, func(w *world) {
		if err := w.g.Drain(w.Context(), "Nobody is here."); err != nil {
			t.Error(err)
		}
	})
	bubble(t, nil, func(w *world) {
		p := w.agent()
		synctest.Wait()
		began := time.Now()
		done := w.drain(w.Context())
		want[*schema.ServerFrame_GoingAway](p)
		p.leave()
		if err := <-done; err != nil || time.Since(began) != 0 {
			t.Errorf("Drain returned %v after %s", err, time.Since(began))
		}
	})
}

// TestDrainDoesNotWaitForAStuckPeer: it is bounded by CloseTimeout and WriteTimeout, and by its context.
func TestDrainDoesNotWaitForAStuckPeer(t *testing.T) {
	bubble(t, nil, func(w *world) {
		p := w.agent()
		p.token(1, "s", "nobody reads the answer")
		synctest.Wait()
		began := time.Now()
		if err := <-w.drain(w.Context()); err != nil {
			t.Error(err)
		}
		if took := time.Since(began); took != DefaultWriteTimeout {
			t.Errorf("it took %s", took)
		}
		p.wantClosed(schema.Code_CODE_PEER_DEAD, "")
	})
	bubble(t, nil, func(w *world) {
		p := w.agent()
		p.token(1, "s", "nobody reads the answer")
		synctest.Wait()
		ctx, cancel := context.WithTimeout(w.Context(), 3*time.Second)
		defer cancel()
		began := time.Now()
		if err := <-w.drain(ctx); err == nil || err.Error() != "gateway: 1 connections did not end in time" {
			t.Errorf("Drain returned %v", err)
		}
		if took := time.Since(began); took != 3*time.Second {
			t.Errorf("it took %s", took)
		}
		p.cancel()
		synctest.Wait()
		p.wantClosed(schema.Code_CODE_GOING_AWAY, "")
	})
}

// TestMetrics: what happens is counted, under words that are a closed set.
func TestMetrics(t *testing.T) {
	registry := prometheus.NewRegistry()
	bubble(t, func(c *Config) { c.Metrics = registry }, func(w *world) {
		p := w.agent()
		p.attach(&schema.Attach{Channel: 1, Session: "s", Start: &schema.Attach_Head{Head: true}})
		p.wantAttached(1, 0)
		p.wantCaughtUp(1, 0)
		f := w.agent()
		f.token(1, "s", "hi")
		f.wantAck(1, 1, 1)
		p.wantTexts(1, 1, "hi")
		f.token(2, "", "nowhere")
		f.wantRejected(2, schema.Code_CODE_INVALID_MESSAGE, "")
		synctest.Wait()
		m := w.g.metrics
		for name, c := range map[string]struct{ got, want float64 }{
			"connections":  {gauge(t, m.connections.WithLabelValues("proto")), 2},
			"attachments":  {gauge(t, m.attachments), 1},
			"in":           {counter(t, m.envelopesIn), 1},
			"out":          {counter(t, m.envelopesOut), 1},
			"rejected":     {counter(t, m.rejects.WithLabelValues("invalid_message")), 1},
			"answered":     {float64(read(t, m.publishSeconds).GetHistogram().GetSampleCount()), 2},
			"nothing read": {counter(t, m.fetches), 0},
		} {
			if c.got != c.want {
				t.Errorf("%s: %v, want %v", name, c.got, c.want)
			}
		}
		f.leave()
		p.sendRaw([]byte("nonsense"))
		p.wantFailed(schema.Code_CODE_INVALID_MESSAGE, "")
		for reason, n := range map[string]float64{"peer_closed": 1, "invalid_message": 1} {
			if got := counter(t, m.closes.WithLabelValues(reason)); got != n {
				t.Errorf("closed for %s: %v, want %v", reason, got, n)
			}
		}
		if n := gauge(t, m.connections.WithLabelValues("proto")) + gauge(t, m.attachments); n != 0 {
			t.Errorf("%v are left", n)
		}
		families, err := registry.Gather()
		if err != nil || len(families) != 13 {
			t.Errorf("the registry has %d families, %v", len(families), err)
		}
	})
	if _, err := newMetrics(registry); err == nil {
		t.Error("the same metrics were registered twice")
	}
}
