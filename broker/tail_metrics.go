package broker

import "github.com/prometheus/client_golang/prometheus"

// tailMetrics are those of the members of analytics groups on this edge. Groups are not told apart: their names are their users', and without bound.
type tailMetrics struct {
	members   prometheus.Gauge
	batches   prometheus.Counter
	envelopes prometheus.Counter
	unread    prometheus.Gauge
}

func newTailMetrics(r prometheus.Registerer) *tailMetrics {
	m := &tailMetrics{
		members:   prometheus.NewGauge(prometheus.GaugeOpts{Name: "tidemark_tail_members", Help: "Members of analytics groups on this edge."}),
		batches:   prometheus.NewCounter(prometheus.CounterOpts{Name: "tidemark_tail_batches_total", Help: "Batches sent to members of analytics groups."}),
		envelopes: prometheus.NewCounter(prometheus.CounterOpts{Name: "tidemark_tail_envelopes_total", Help: "Envelopes in batches sent to members of analytics groups, those sent again included."}),
		unread: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "tidemark_tail_unread_frames", Help: "Frames of the log that members on this edge have not read yet of their partitions, summed over the members.",
		}),
	}
	if r != nil {
		r.MustRegister(m.members, m.batches, m.envelopes, m.unread)
	}
	return m
}
