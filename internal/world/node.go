package world

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing/synctest"
	"time"

	"tidemark/internal/natsd"
)

// node is the NATS server of the world, and the directory it keeps.
type node struct {
	mu     sync.Mutex
	dir    string
	server *natsd.Server // nil while it is stopped
	conns  []net.Conn    // all that were made to this server
}

var errNoNATS = errors.New("world: NATS is stopped")

func (n *node) connect() (net.Conn, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.server == nil {
		return nil, errNoNATS
	}
	c, err := n.server.InProcessConn()
	if err == nil {
		n.conns = append(n.conns, c)
	}
	return c, err
}

// StartNATS starts the server on what it kept.
func (w *World) StartNATS() {
	w.t.Helper()
	s, err := natsd.Start(natsd.Config{DataDir: w.node.dir, Durability: w.cfg.Durability, MaxStore: w.cfg.MaxStore, MaxPayload: w.cfg.MaxPayload})
	w.must(err)
	w.node.mu.Lock()
	defer w.node.mu.Unlock()
	w.node.server = s
}

// StopNATS stops the server in good order.
func (w *World) StopNATS() {
	w.t.Helper()
	w.node.mu.Lock()
	s, conns := w.node.server, w.node.conns
	w.node.server, w.node.conns = nil, nil
	w.node.mu.Unlock()
	if s == nil {
		return
	}
	if w.bubble {
		// The server sleeps with its locks held while it shuts down, and a request that waits for one of them stops the bubble's clock. So none comes any more, not even one that is on its way.
		for _, c := range conns {
			_ = c.Close()
		}
		synctest.Wait()
	}
	w.must(s.Shutdown(context.Background()))
}

// RestartNATS stops the server in good order and starts it again.
func (w *World) RestartNATS() {
	w.t.Helper()
	w.StopNATS()
	w.StartNATS()
}

// SetMaxStore bounds what NATS stores, from its next start on.
func (w *World) SetMaxStore(bytes int64) { w.cfg.MaxStore = bytes }

// CrashNATS is a kill -9 of the server and its start on what was on the disk at that moment: what it had answered and nobody heard may be there, what it held in memory is not, nothing was closed or
// written out. Only in a bubble.
func (w *World) CrashNATS() {
	w.t.Helper()
	if !w.bubble {
		w.t.Fatal("world: CrashNATS needs a bubble")
	}
	// From here on nobody hears of anything that the copy may lack.
	cables := w.cables()
	for _, c := range cables {
		c.freeze(true)
	}
	synctest.Wait()
	image := filepath.Join(w.t.TempDir(), "image")
	w.must(os.CopyFS(image, os.DirFS(w.node.dir)))
	for _, c := range cables {
		c.cut()
	}
	w.StopNATS()
	w.node.mu.Lock()
	w.node.dir = image
	w.node.mu.Unlock()
	for _, c := range cables {
		c.freeze(false)
	}
	w.StartNATS()
}

// cable is how one process reaches NATS.
//
// The client library holds a mutex while it introduces itself to the server, and a goroutine that waits for a mutex stops a bubble's clock. So nothing is held or slowed down before the server has
// said PONG for the first time.
type cable struct {
	node    *node
	latency time.Duration
	// bridges are what carries bytes between a process and the server.
	bridges sync.WaitGroup

	mu     sync.Mutex
	frozen bool
	pulled bool
	links  map[*Link]*atomic.Bool // whether they have been introduced
}

func (w *World) newCable() *cable {
	return &cable{node: w.node, latency: w.cfg.Latency, links: make(map[*Link]*atomic.Bool)}
}

// cableBuffer is more than a process has on its way to NATS, for the same reason: a write that blocks would, too, with the mutex held.
const cableBuffer = 64 << 20

// InProcessConn makes a connection, as broker.Server wants it.
func (c *cable) InProcessConn() (net.Conn, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.pulled || c.frozen {
		return nil, errors.New("world: this process does not reach NATS")
	}
	there, err := c.node.connect()
	if err != nil {
		return nil, err
	}
	l, client, server := newLink(cableBuffer)
	introduced := new(atomic.Bool)
	c.links[l] = introduced
	over := sync.OnceFunc(func() {
		_ = there.Close()
		_ = server.Close()
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.links, l)
	})
	c.bridges.Go(func() {
		defer over()
		c.carry(there, server, introduced)
	})
	c.bridges.Go(func() {
		defer over()
		c.carry(server, &greeting{Conn: there, over: introduced}, introduced)
	})
	return client, nil
}

// carry copies bytes until one of the ends is closed.
func (c *cable) carry(to, from net.Conn, introduced *atomic.Bool) {
	b := make([]byte, 64<<10)
	for {
		slow := introduced.Load()
		n, err := from.Read(b)
		if n > 0 && slow && c.latency > 0 {
			time.Sleep(c.latency)
		}
		if _, werr := to.Write(b[:n]); err != nil || werr != nil {
			return
		}
	}
}

// greeting is the server's side of a connection, and notes when it has said PONG.
type greeting struct {
	net.Conn
	over *atomic.Bool
	said []byte
}

func (g *greeting) Read(b []byte) (int, error) {
	n, err := g.Conn.Read(b)
	if !g.over.Load() {
		g.said = append(g.said, b[:n]...)
		if bytes.Contains(g.said, []byte("PONG")) {
			g.over.Store(true)
			g.said = nil
		}
	}
	return n, err
}

// each does something with every connection.
func (c *cable) each(do func(l *Link, introduced bool)) {
	c.mu.Lock()
	links := make(map[*Link]bool, len(c.links))
	for l, introduced := range c.links {
		links[l] = introduced.Load()
	}
	c.mu.Unlock()
	for l, introduced := range links {
		do(l, introduced)
	}
}

// freeze holds what goes either way.
func (c *cable) freeze(yes bool) {
	c.mu.Lock()
	c.frozen = yes
	c.mu.Unlock()
	c.each(func(l *Link, introduced bool) {
		if !introduced {
			l.Cut()
			return
		}
		l.down.freeze(yes)
		l.up.freeze(yes)
	})
}

// deafen holds what comes from NATS.
func (c *cable) deafen() {
	c.each(func(l *Link, introduced bool) {
		if !introduced {
			l.Cut()
			return
		}
		l.down.freeze(true)
	})
}

// cut breaks the connections; the process may make new ones.
func (c *cable) cut() { c.each(func(l *Link, _ bool) { l.Cut() }) }

// pull breaks the connections for good.
func (c *cable) pull() {
	c.mu.Lock()
	c.pulled = true
	c.mu.Unlock()
	c.cut()
}

func (c *cable) isPulled() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.pulled
}
