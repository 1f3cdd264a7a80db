package broker

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics are the log's, as Prometheus counts them.
type metrics struct {
	envelopes    prometheus.Counter
	frames       prometheus.Counter
	bytes        prometheus.Counter
	store        prometheus.Histogram
	storeRetries prometheus.Counter
	racesLost    prometheus.Counter
	handOvers    prometheus.Counter
	fetches      prometheus.Counter
	unsound      prometheus.Counter
	workHanded   prometheus.Counter
	workExpired  prometheus.Counter
	workGivenUp  prometheus.Counter
}

func newMetrics(r prometheus.Registerer) *metrics {
	counter := func(name, help string) prometheus.Counter {
		c := prometheus.NewCounter(prometheus.CounterOpts{Namespace: "tidemark", Subsystem: "log", Name: name, Help: help})
		if r != nil {
			r.MustRegister(c)
		}
		return c
	}
	m := &metrics{
		envelopes:    counter("envelopes_total", "Envelopes that this edge stored."),
		frames:       counter("frames_total", "Frames that this edge stored."),
		bytes:        counter("bytes_total", "Bytes of frames that this edge stored."),
		storeRetries: counter("store_retries_total", "Frames sent again because NATS did not answer or was not ready."),
		racesLost:    counter("races_lost_total", "Frames refused by the fence because another edge's came first."),
		handOvers:    counter("hand_overs_total", "Batches handed to the edge that keeps winning a session's races."),
		fetches:      counter("fetches_total", "Reads of the log by followers that were behind the tail."),
		unsound:      counter("unsound_frames_total", "Frames in the tail that did not continue their session. Should be 0."),
		workHanded:   counter("work_handed_out_total", "Work items that were given into a worker's hands on this edge, each time counted."),
		workExpired:  counter("work_expired_total", "Work items whose worker was silent about them for too long."),
		workGivenUp:  counter("work_given_up_total", "Work items that this edge made dead letters of."),
		store: prometheus.NewHistogram(prometheus.HistogramOpts{
			Namespace: "tidemark", Subsystem: "log", Name: "store_seconds", Help: "From making a frame to its acknowledgement by JetStream.",
			Buckets: prometheus.ExponentialBuckets(0.0001, 2, 16),
		}),
	}
	if r != nil {
		r.MustRegister(m.store)
	}
	return m
}

func (m *metrics) appended(envelopes, bytes int, took time.Duration) {
	m.envelopes.Add(float64(envelopes))
	m.frames.Inc()
	m.bytes.Add(float64(bytes))
	m.store.Observe(took.Seconds())
}
