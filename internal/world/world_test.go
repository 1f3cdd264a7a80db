package world

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go"

	"tidemark/schema"
)

// TestEveryWay is the world itself: what goes in by any way comes out by every other, on the other edge.
func TestEveryWay(t *testing.T) {
	Run(t, Config{}, func(w *World) {
		var readers []*Reader
		for _, out := range Ways() {
			readers = append(readers, w.Read("s", ReaderOptions{Ways: []Way{out}, Edges: []*Edge{w.Edge(1)}}))
		}
		for i, in := range Ways() {
			p := w.Join(w.Edge(0), in, "s")
			if a := p.Put("s", Token(in.String())); a.First != uint64(i+1) || a.Durability != schema.Durability_DURABILITY_FSYNC {
				t.Errorf("%s: %+v", in, a)
			}
		}
		for _, r := range readers {
			if got := Texts(r.Wait(5)); got != "protojsonsessiongrpccalls" {
				t.Errorf("%v read %q", r.o.Ways, got)
			}
		}
	})
}

// TestAnEdgeThatIsGone: whoever comes to it hears so, by ways that connect at once and by those that connect with the first publish.
func TestAnEdgeThatIsGone(t *testing.T) {
	Run(t, Config{}, func(w *World) {
		w.KillEdge(w.Edge(1))
		for _, way := range Ways() {
			p, end := w.TryDial(w.Edge(1), way, Dial{}, &schema.Attach{Channel: 1, Session: "s"})
			if p != nil {
				t.Errorf("%s: connected", way)
				p.Close()
			} else if end.Err == nil {
				t.Errorf("%s: no error", way)
			}
		}
		p := w.Join(w.Edge(1), Calls, "s")
		p.Publish("s", Token("one"))
		if end := p.WantEnd(schema.Code_CODE_UNSPECIFIED); end.Err == nil {
			t.Error("no error")
		}
	})
}

// TestNATSStopsWhileItIsAsked: its server sleeps with a lock held while it shuts down, and a request that is still on the wire then would wait for that lock and so stop the bubble's clock.
func TestNATSStopsWhileItIsAsked(t *testing.T) {
	Run(t, Config{Latency: time.Millisecond}, func(w *World) {
		cable := w.newCable()
		nc, err := nats.Connect("", nats.InProcessServer(cable), nats.MaxReconnects(-1), nats.ReconnectWait(time.Millisecond))
		w.must(err)
		defer nc.Close()
		w.must(nc.PublishRequest("$JS.API.CONSUMER.CREATE.LOG_00", "here", []byte(`{"stream_name":"LOG_00","config":{"ack_policy":"explicit"}}`)))
		synctest.Wait()
		w.RestartNATS()
		for _, e := range w.edges {
			e.WaitReady()
		}
	})
}
