package client

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/url"
	"time"

	"tidemark/schema"
)

// Bounds and times that are not configurable.
const (
	// dialTimeout bounds one attempt to reach an edge.
	dialTimeout = 10 * time.Second
	// A lost connection is made anew after minWait, then after twice as long each time, up to maxWait, and a random part less, so that the clients of a lost edge do not come together.
	minWait = 50 * time.Millisecond
	maxWait = 5 * time.Second
	// maxServerFrame bounds a frame of the server, in bytes: the gateway's are below some 300 KiB, or one envelope.
	maxServerFrame = 4 << 20
	// silence is how long a connection may be silent before the edge is asked whether it is there; deadAfter, how long the answer may take.
	silence   = 15 * time.Second
	deadAfter = 10 * time.Second
)

// DefaultConnectFor is how long a process that starts beside its edge may take longer than that.
const DefaultConnectFor = 10 * time.Second

// Config says where the edges are, and who asks.
type Config struct {
	// Edges are the URLs of edges of one deployment; when one is gone, the next is tried. For the WebSocket http://HOST:PORT or ws://, with TLS https:// or wss://; for gRPC
	// grpc://HOST:PORT, with TLS grpcs://. At least one.
	Edges []string
	// Token is sent with every connection and call.
	Token string
	// Name of this client, as the edges' connections show it. Optional.
	Name string
	// ConnectFor is how long to try for the first connection. Once there was one, a client comes back however long the edges are away. Default [DefaultConnectFor]; negative
	// for as long as it takes.
	ConnectFor time.Duration
	// TLS is for https, wss and grpcs. Default: the system's roots.
	TLS *tls.Config
	// Dial makes the connection to an edge's address. Default: the network.
	Dial func(ctx context.Context, network, addr string) (net.Conn, error)
	// Logger gets what happens to connections. Default: discarded.
	Logger *slog.Logger
}

// Client knows the edges of a deployment. It may be used concurrently.
type Client struct {
	cfg   Config
	edges []edge
}

// edge is one of them.
type edge struct {
	url    *url.URL
	grpc   bool
	secure bool
}

// New checks the configuration and makes a client of it. It connects to nothing.
func New(cfg Config) (*Client, error) {
	if len(cfg.Edges) == 0 {
		return nil, errors.New("client: no edge is named")
	}
	c := &Client{cfg: cfg}
	for _, s := range cfg.Edges {
		e, err := parseEdge(s)
		if err != nil {
			return nil, err
		}
		c.edges = append(c.edges, e)
	}
	if c.cfg.ConnectFor == 0 {
		c.cfg.ConnectFor = DefaultConnectFor
	}
	if c.cfg.Dial == nil {
		c.cfg.Dial = new(net.Dialer).DialContext
	}
	if c.cfg.Logger == nil {
		c.cfg.Logger = slog.New(slog.DiscardHandler)
	}
	return c, nil
}

func parseEdge(s string) (edge, error) {
	u, err := url.Parse(s)
	if err != nil || u.Host == "" || u.User != nil || (u.Path != "" && u.Path != "/") || u.RawQuery != "" {
		return edge{}, fmt.Errorf("client: the edge %q is not a URL like grpc://HOST:PORT or http://HOST:PORT", s)
	}
	e := edge{url: &url.URL{Host: u.Host}}
	switch u.Scheme {
	case "grpc":
		e.grpc = true
	case "grpcs":
		e.grpc, e.secure = true, true
	case "http", "ws":
	case "https", "wss":
		e.secure = true
	default:
		return edge{}, fmt.Errorf("client: the scheme of the edge %q is not one of grpc, grpcs, http, https, ws, wss", s)
	}
	e.url.Scheme = u.Scheme
	return e, nil
}

// conn is a connection to an edge: it moves whole frames, encoded.
//
// send and receive may each be called by one goroutine at a time. cut and close may be called at any time, by anyone, more than once.
type conn interface {
	send(ctx context.Context, frame []byte) error
	// receive returns the next frame, valid until the next call. When ctx ends, the connection does. The error is a [*schema.Refusal] where the edge said why it closed.
	receive(ctx context.Context) ([]byte, error)
	// cut ends the connection as a broken network does, and lets go whoever is blocked in it.
	cut()
	// close ends it in good order.
	close()
}

// dial connects to the edge.
func (c *Client) dial(ctx context.Context, e edge) (conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	if e.grpc {
		return c.dialGRPC(ctx, e, "Connect")
	}
	return c.dialWebSocket(ctx, e)
}

// dialTail opens the method Tail at the edge. An edge without gRPC has none.
func (c *Client) dialTail(ctx context.Context, e edge) (conn, error) {
	if !e.grpc {
		return nil, schema.Refuse(schema.Code_CODE_UNSUPPORTED_PROTOCOL, "Groups tail over gRPC alone; name edges as grpc://HOST:PORT, not as %s.", e.url)
	}
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	return c.dialGRPC(ctx, e, "Tail")
}

// link makes connections for a follower, a publisher or a tailer, one after the other, and knows how long to wait between them. It belongs to one goroutine.
type link struct {
	c *Client
	// dial makes one; [Client.dial] where nil.
	dial func(ctx context.Context, e edge) (conn, error)
	// next is the edge to try.
	next int
	// fails counts what went wrong since the last progress.
	fails int
	// reached: an edge took a connection before.
	reached bool
}

// connect returns a new connection, however long that takes. The error is one that trying again does not mend, or the context's.
func (l *link) connect(ctx context.Context) (conn, error) {
	began := time.Now()
	dial := l.dial
	if dial == nil {
		dial = l.c.dial
	}
	for {
		if err := l.wait(ctx); err != nil {
			return nil, err
		}
		e := l.c.edges[l.next%len(l.c.edges)]
		conn, err := dial(ctx, e)
		if err == nil {
			if l.fails > 0 {
				l.c.cfg.Logger.Info("connected again", "edge", e.url.String())
			}
			l.reached = true
			return conn, nil
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if final(err) {
			return nil, err
		}
		l.failed()
		if took := time.Since(began); !l.reached && l.c.cfg.ConnectFor >= 0 && took >= l.c.cfg.ConnectFor {
			return nil, &schema.Refusal{
				Code: schema.Code_CODE_UNAVAILABLE, Err: err,
				Message: fmt.Sprintf("No edge could be reached within %s, the last tried was %s; check that it is running and its address.", l.c.cfg.ConnectFor, e.url),
			}
		}
		l.c.cfg.Logger.Debug("edge not reached", "edge", e.url.String(), "error", err)
	}
}

// failed is called when a connection was not made, or was lost.
func (l *link) failed() {
	l.fails++
	l.next++
}

// progress is called when a connection has brought something on.
func (l *link) progress() { l.fails = 0 }

// wait waits before the next attempt, not at all before the first, nor while there is another edge that was not tried.
func (l *link) wait(ctx context.Context) error {
	rounds := l.fails / len(l.c.edges)
	if l.fails == 0 || l.fails%len(l.c.edges) != 0 {
		return ctx.Err()
	}
	d := min(minWait<<min(rounds-1, 16), maxWait)
	t := time.NewTimer(d/2 + rand.N(d/2+1))
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// final says whether the edge said something that connecting again does not mend.
func final(err error) bool {
	r, ok := errors.AsType[*schema.Refusal](err)
	if !ok {
		return false
	}
	rule := r.Code.Rule()
	return !rule.Retryable && rule.Reconnect != schema.Reconnect_RECONNECT_SAME_CURSOR
}
