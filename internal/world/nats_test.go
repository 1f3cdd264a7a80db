package world

import (
	"sync"

	"github.com/nats-io/nats.go"
	"google.golang.org/protobuf/proto"

	"tidemark/schema"
)

// nats is a connection to the world's NATS as an operator has it.
func (w *World) nats() *nats.Conn {
	w.t.Helper()
	c := w.newCable()
	conn, err := nats.Connect("", nats.InProcessServer(c), nats.NoReconnect())
	w.must(err)
	w.closers = append(w.closers, func() {
		conn.Close()
		c.pull()
		c.bridges.Wait()
	})
	return conn
}

// frames counts what an edge sent to the log.
type frames struct{ stored, refused int }

// attempts begins to listen to what edges send to the log, and to what becomes of it. It returns a function that counts what one of them sent since.
func (w *World) attempts() func(e *Edge) frames {
	w.t.Helper()
	conn := w.nats()
	var mu sync.Mutex
	sent := make(map[string]int) // by edge
	_, err := conn.Subscribe("log.>", func(m *nats.Msg) {
		f := new(schema.Frame)
		if proto.Unmarshal(m.Data, f) == nil {
			mu.Lock()
			sent[f.GetEdge()]++
			mu.Unlock()
		}
	})
	w.must(err)
	w.must(conn.Flush())
	names := make(map[*Edge]string)
	before := make(map[*Edge]float64)
	for _, e := range w.edges {
		names[e] = e.Log.Status().Edge
		before[e] = e.Counted("tidemark_log_frames_total")
	}
	return func(e *Edge) frames {
		w.must(conn.Flush())
		stored := int(e.Counted("tidemark_log_frames_total") - before[e])
		mu.Lock()
		defer mu.Unlock()
		return frames{stored, sent[names[e]] - stored}
	}
}
