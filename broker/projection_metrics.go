package broker

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// projectionMetrics are the projectors', as Prometheus counts them.
type projectionMetrics struct {
	lagMessages *prometheus.GaugeVec
	lagSeconds  *prometheus.GaugeVec
	leading     *prometheus.GaugeVec
	memory      *prometheus.GaugeVec
	pages       prometheus.Counter
	pageBytes   prometheus.Counter
	records     prometheus.Counter
	rounds      prometheus.Counter
	retries     prometheus.Counter
	conflicts   prometheus.Counter
	evicted     prometheus.Counter
	skipped     prometheus.Counter
	unreadable  prometheus.Counter
	work        *prometheus.CounterVec
	workLag     prometheus.Histogram
}

func newProjectionMetrics(r prometheus.Registerer) *projectionMetrics {
	register := func(c prometheus.Collector) {
		if r != nil {
			r.MustRegister(c)
		}
	}
	opts := func(name, help string) prometheus.Opts {
		return prometheus.Opts{Namespace: "tidemark", Subsystem: "projector", Name: name, Help: help}
	}
	counter := func(name, help string) prometheus.Counter {
		c := prometheus.NewCounter(prometheus.CounterOpts(opts(name, help)))
		register(c)
		return c
	}
	byStream := func(name, help string) *prometheus.GaugeVec {
		g := prometheus.NewGaugeVec(prometheus.GaugeOpts(opts(name, help)), []string{"stream"})
		register(g)
		return g
	}
	work := prometheus.NewCounterVec(prometheus.CounterOpts(opts("work_items_total", "Items dispatched to the stream WORK.")), []string{"kind"})
	register(work)
	lag := prometheus.NewHistogram(prometheus.HistogramOpts{
		Namespace: "tidemark", Subsystem: "projector", Name: "work_lag_seconds", Help: "From the storing of an envelope to that of its work item, by the clocks of edge and broker.",
		Buckets: prometheus.ExponentialBuckets(0.0005, 4, 10),
	})
	register(lag)
	return &projectionMetrics{
		work: work, workLag: lag,
		lagMessages: byStream("lag_messages", "Frames of the log stream that are not projected yet."),
		lagSeconds:  byStream("lag_seconds", "How long ago the frame was stored that is being projected; 0 when there is none to project."),
		leading:     byStream("leading", "1 where this process projects the log stream, 0 where it stands by."),
		memory:      byStream("session_bytes", "What the sessions of the log stream take in memory."),
		pages:       counter("pages_total", "Pages stored, parts included."),
		pageBytes:   counter("page_bytes_total", "Bytes of pages stored."),
		records:     counter("records_total", "Records written to the registry."),
		rounds:      counter("rounds_total", "Times that what was due was stored."),
		retries:     counter("store_retries_total", "Times that something could not be stored at once."),
		conflicts:   counter("conflicts_total", "Writes refused by the fence because something else was there than expected."),
		evicted:     counter("evicted_sessions_total", "Sessions put out of memory to keep within the bound."),
		skipped:     counter("skipped_frames_total", "Frames of a history that was over when they were projected."),
		unreadable:  counter("unreadable_total", "Messages of the log that could not be read, and pages that could not be stored. Should be 0."),
	}
}

func (m *projectionMetrics) stored(w *write) {
	if w.kind == writeRecord {
		m.records.Inc()
		return
	}
	m.pages.Inc()
	m.pageBytes.Add(float64(len(w.data)))
}

func (m *projectionMetrics) dispatched(w *workItem) {
	m.work.WithLabelValues(w.kind.String()).Inc()
	m.workLag.Observe(time.Since(w.GetStored().AsTime()).Seconds())
}

func (m *projectionMetrics) behind(stream string, messages uint64, by time.Duration) {
	m.lagMessages.WithLabelValues(stream).Set(float64(messages))
	m.lagSeconds.WithLabelValues(stream).Set(by.Seconds())
}
