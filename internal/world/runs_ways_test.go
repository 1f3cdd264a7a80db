package world

import (
	"testing"
	"time"

	"tidemark/schema"
)

// TestI10_ConnectionKeepsItsRun: by every way, a run lives as long as the connection of its agent, whatever it says, and is failed a minute after that is gone; one that comes back on another edge in time keeps it.
func TestI10_ConnectionKeepsItsRun(t *testing.T) {
	Run(t, Config{Durability: schema.Durability_DURABILITY_OS}, func(w *World) {
		w.settled()
		for i, way := range []Way{ProtoSocket, JSONSocket, SessionSocket, GRPC} {
			gone, back := "gone by "+way.String(), "back by "+way.String()
			a, b := w.Join(w.Edge(i%2), way, gone), w.Join(w.Edge(i%2), way, back)
			a.Put(gone, startRun("r"))
			b.Put(back, startRun("r"))
			// Whoever takes nothing answers no ping.
			for range 10 {
				w.Sleep(30 * time.Second)
				a.drain()
				b.drain()
			}
			w.Edge(0).wantAlive(gone, "while its agent is connected")
			a.Cut()
			b.Cut()
			w.Sleep(50 * time.Second)
			again := w.Join(w.Edge(1-i%2), way, back)
			again.Put(back, runStatus("r", schema.Status_STATUS_RUNNING))
			for range 10 {
				w.Sleep(30 * time.Second)
				again.drain()
			}
			w.Edge(0).wantFailed(gone, "r", "whose connection was cut")
			w.Edge(0).wantAlive(back, "whose agent came back")
			again.Close()
			w.Sleep(59 * time.Second)
			w.Edge(0).wantAlive(back, "59 s after its agent left")
			w.Sleep(5 * time.Second)
			w.Edge(0).wantFailed(back, "r", "whose agent left")
		}
	})
}

// TestI10_AdminKeepsItsRun: the backend of a desktop application has an admin's token. Its run lives while its connection does, and ends with it; what people say in the session through another admin's connection keeps nothing.
func TestI10_AdminKeepsItsRun(t *testing.T) {
	Run(t, Config{Durability: schema.Durability_DURABILITY_OS}, func(w *World) {
		w.settled()
		admin := func(e *Edge) *Peer {
			return w.DialAs(e, ProtoSocket, Dial{Token: w.tokenOf("", "ipc", schema.Role_ROLE_ADMIN, "*")}, nil)
		}
		backend, ui := admin(w.Edge(0)), admin(w.Edge(1))
		backend.Put("a", startRun("r"))
		backend.Put("a", Token("so "))
		for range 10 {
			w.Sleep(30 * time.Second)
			backend.drain()
			ui.drain()
		}
		w.Edge(0).wantAlive("a", "while its agent is connected")
		backend.Cut()
		for range 2 {
			w.Sleep(29 * time.Second)
			ui.Put("a", &schema.Envelope{Payload: &schema.Envelope_UserMessage{UserMessage: &schema.UserMessage{Message: "and?"}}})
		}
		w.Edge(0).wantAlive("a", "58 s after its agent was cut off")
		w.Sleep(7 * time.Second)
		w.Edge(0).wantFailed("a", "r", "whose agent was cut off")
	})
}

// drain takes what has come, and looks at none of it.
func (p *Peer) drain() {
	for f, over := p.next(time.Millisecond); f != nil && !over; f, over = p.next(time.Millisecond) {
	}
}
