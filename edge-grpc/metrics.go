package edgegrpc

import "github.com/prometheus/client_golang/prometheus"

// metrics are what the edge counts beside the gateway.
type metrics struct {
	calls       *prometheus.CounterVec
	seconds     *prometheus.HistogramVec
	connections *prometheus.GaugeVec
}

func newMetrics(r prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		calls: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "tidemark_grpc_calls_total", Help: "Calls and streams that ended, by method, protocol (grpc, grpcweb, connect) and code word (ok for none).",
		}, []string{"method", "protocol", "code"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "tidemark_grpc_call_seconds", Help: "How long calls took that are not streams.", Buckets: prometheus.ExponentialBuckets(0.0005, 4, 8),
		}, []string{"method"}),
		connections: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "tidemark_grpc_connections", Help: "Open connections by the server behind the port: native (grpc-go) or web (net/http).",
		}, []string{"server"}),
	}
	if r == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{m.calls, m.seconds, m.connections} {
		if err := r.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}
