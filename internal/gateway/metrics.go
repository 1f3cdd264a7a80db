package gateway

import (
	"errors"

	"github.com/prometheus/client_golang/prometheus"

	"tidemark/schema"
)

// metrics are what the gateway counts. Label values are closed sets: protocols, limits, and the words of codes.
type metrics struct {
	connections  *prometheus.GaugeVec
	attachments  prometheus.Gauge
	envelopesIn  prometheus.Counter
	envelopesOut prometheus.Counter
	bytesIn      prometheus.Counter
	bytesOut     prometheus.Counter
	rejects      *prometheus.CounterVec
	closes       *prometheus.CounterVec
	// limits are the counters of exceeded, by [Limit]: looked up once, because a client that is over its rate makes us count at its own.
	exceeded *prometheus.CounterVec
	limits   [len(limits)]prometheus.Counter
	// fetches counts the times that a follower was behind the tail and read the log: the fallback of a slow reader (I8).
	fetches        prometheus.Counter
	publishSeconds prometheus.Histogram
	subscriptions  prometheus.Gauge
	// items are those handed to workers, by the kind of their envelopes; answers what these said of them.
	items       *prometheus.CounterVec
	workAnswers *prometheus.CounterVec
	answers     map[workAnswer]prometheus.Counter
}

// newMetrics makes the metrics and registers them, where there is a place to.
func newMetrics(r prometheus.Registerer) (*metrics, error) {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Namespace: "tidemark", Subsystem: "gateway", Name: name, Help: help})
	}
	m := &metrics{
		connections: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Namespace: "tidemark", Subsystem: "gateway", Name: "connections", Help: "Connections that are open, by protocol.",
		}, []string{"protocol"}),
		attachments: prometheus.NewGauge(prometheus.GaugeOpts{
			Namespace: "tidemark", Subsystem: "gateway", Name: "attachments", Help: "Followers that are attached.",
		}),
		envelopesIn:  counter("received_envelopes_total", "Envelopes that clients published and that were valid."),
		envelopesOut: counter("sent_envelopes_total", "Envelopes sent to followers."),
		bytesIn:      counter("received_bytes_total", "Bytes of clients' messages."),
		bytesOut:     counter("sent_bytes_total", "Bytes of messages to clients."),
		fetches:      counter("fetches_total", "Times that a follower was behind the tail and read the log."),
		rejects: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: "tidemark", Subsystem: "gateway", Name: "rejected_publishes_total", Help: "Publishes that were not stored, by code.",
		}, []string{"code"}),
		closes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: "tidemark", Subsystem: "gateway", Name: "closed_connections_total", Help: "Connections that ended, by reason.",
		}, []string{"reason"}),
		exceeded: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: "tidemark", Subsystem: "gateway", Name: "limits_exceeded_total", Help: "Times that a client hit a limit, by limit.",
		}, []string{"limit"}),
		publishSeconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Namespace: "tidemark", Subsystem: "gateway", Name: "publish_seconds", Help: "Time from a publish's arrival until its answer is written.",
			// From what memory takes to what a log that is away takes.
			Buckets: []float64{.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30},
		}),
	}
	m.subscriptions = prometheus.NewGauge(prometheus.GaugeOpts{
		Namespace: "tidemark", Subsystem: "gateway", Name: "subscriptions", Help: "Groups that connections work for.",
	})
	m.items = prometheus.NewCounterVec(prometheus.CounterOpts{
		Namespace: "tidemark", Subsystem: "gateway", Name: "work_items_total", Help: "Work items handed to workers, by the type of their envelopes.",
	}, []string{"type"})
	m.workAnswers = prometheus.NewCounterVec(prometheus.CounterOpts{
		Namespace: "tidemark", Subsystem: "gateway", Name: "work_answers_total", Help: "Work items that workers have answered, by answer; lost are those that the worker did not hold.",
	}, []string{"answer"})
	m.answers = make(map[workAnswer]prometheus.Counter, len(workAnswers))
	for _, a := range workAnswers {
		m.answers[a] = m.workAnswers.WithLabelValues(string(a))
	}
	for l := range limits {
		m.limits[l] = m.exceeded.WithLabelValues(Limit(l).String())
	}
	if r == nil {
		return m, nil
	}
	var errs []error
	for _, c := range []prometheus.Collector{
		m.connections, m.attachments, m.envelopesIn, m.envelopesOut, m.bytesIn, m.bytesOut, m.rejects, m.closes, m.exceeded, m.fetches, m.publishSeconds, m.subscriptions, m.items, m.workAnswers,
	} {
		errs = append(errs, r.Register(c))
	}
	return m, errors.Join(errs...)
}

func (m *metrics) rejected(c schema.Code) { m.rejects.WithLabelValues(c.Word()).Inc() }
