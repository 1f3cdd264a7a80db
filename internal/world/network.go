package world

import (
	"context"
	"net"
	"slices"
	"sync"
	"syscall"
)

// network is the hosts of a world: what dials an address reaches whoever listens there. Safe for concurrent use.
type network struct {
	buffer int // of each link and direction, in bytes

	mu    sync.Mutex
	hosts map[string]*host
}

func newNetwork(buffer int) *network { return &network{buffer: buffer, hosts: make(map[string]*host)} }

// host is a listener in memory, and the links that lead to it.
type host struct {
	name  string
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once

	mu    sync.Mutex
	links []*Link
}

// listen takes the name, from whoever had it.
func (n *network) listen(name string) *host {
	n.mu.Lock()
	defer n.mu.Unlock()
	h := &host{name: name, conns: make(chan net.Conn), done: make(chan struct{})}
	n.hosts[name] = h
	return h
}

// dial connects to an address, host or host:port.
func (n *network) dial(ctx context.Context, addr string) (*Link, net.Conn, error) {
	name := addr
	if host, _, err := net.SplitHostPort(addr); err == nil {
		name = host
	}
	n.mu.Lock()
	h := n.hosts[name]
	n.mu.Unlock()
	refused := &net.OpError{Op: "dial", Net: "memory", Err: syscall.ECONNREFUSED}
	if h == nil {
		return nil, nil, refused
	}
	l, client, server := newLink(n.buffer)
	l.onCut = func() { h.forget(l) }
	h.mu.Lock()
	h.links = append(h.links, l)
	h.mu.Unlock()
	select {
	case h.conns <- server:
		return l, client, nil
	case <-h.done:
		h.forget(l)
		return nil, nil, refused
	case <-ctx.Done():
		h.forget(l)
		return nil, nil, context.Cause(ctx)
	}
}

// cut breaks all links to the host. It stays where it is.
func (h *host) cut() {
	h.mu.Lock()
	links := slices.Clone(h.links)
	h.mu.Unlock()
	for _, l := range links {
		l.Cut()
	}
}

func (h *host) forget(l *Link) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.links = slices.DeleteFunc(h.links, func(o *Link) bool { return o == l })
}

// Accept implements [net.Listener].
func (h *host) Accept() (net.Conn, error) {
	select {
	case c := <-h.conns:
		return c, nil
	case <-h.done:
		return nil, net.ErrClosed
	}
}

// Close implements [net.Listener].
func (h *host) Close() error {
	h.once.Do(func() { close(h.done) })
	return nil
}

// Addr implements [net.Listener].
func (h *host) Addr() net.Addr { return address{} }
