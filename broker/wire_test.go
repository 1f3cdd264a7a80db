package broker

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"sync/atomic"
)

// wire hands out connections to the node that can be cut after a number of messages, or held. It stands for the process behind it: cut, it is dead and never comes back; held, it is frozen.
type wire struct {
	node interface{ InProcessConn() (net.Conn, error) }
	// counts says whether a message that is published to a subject counts.
	counts func(subject string) bool
	// cutAt is the number of the message at which to cut, 0 for never; after: once the node has it, instead of before.
	cutAt int
	after bool

	seen atomic.Int64
	dead chan struct{} // closed when it was cut
	once sync.Once

	// frozen: what goes either way is kept, as the buffers of sockets keep it, until something goes the same way after the thaw.
	frozen atomic.Bool
}

func newWire(node interface{ InProcessConn() (net.Conn, error) }) *wire {
	return &wire{node: node, dead: make(chan struct{}), counts: func(string) bool { return false }}
}

func (w *wire) InProcessConn() (net.Conn, error) {
	select {
	case <-w.dead:
		return nil, errors.New("this process is dead")
	default:
	}
	c, err := w.node.InProcessConn()
	if err != nil {
		return nil, err
	}
	return &wireConn{Conn: c, wire: w}, nil
}

// wireConn reads the client's protocol on its way to the node.
type wireConn struct {
	net.Conn
	wire *wire
	line []byte // an incomplete line
	skip int    // bytes of a payload to come
	last bool   // the payload that is coming is the last to pass

	in, out []byte // kept while frozen
}

func (c *wireConn) Read(b []byte) (int, error) {
	for c.wire.frozen.Load() || len(c.in) == 0 {
		n, err := c.Conn.Read(b)
		if err != nil {
			return 0, err
		}
		c.in = append(c.in, b[:n]...)
	}
	n := copy(b, c.in)
	c.in = c.in[n:]
	return n, nil
}

func (c *wireConn) Write(b []byte) (int, error) {
	if c.wire.frozen.Load() {
		c.out = append(c.out, b...)
		return len(b), nil
	}
	if len(c.out) > 0 {
		if _, err := c.Conn.Write(c.out); err != nil {
			return 0, err
		}
		c.out = nil
	}
	n, cut := c.pass(b)
	if _, err := c.Conn.Write(b[:n]); err != nil {
		return 0, err
	}
	if cut {
		c.wire.once.Do(func() { close(c.wire.dead) })
		_ = c.Conn.Close()
		return n, net.ErrClosed
	}
	return len(b), nil
}

// pass returns how many of the bytes go through, and whether the connection is cut behind them.
func (c *wireConn) pass(b []byte) (n int, cut bool) {
	for n < len(b) {
		if c.skip > 0 {
			k := min(c.skip, len(b)-n)
			c.skip -= k
			n += k
			if c.skip == 0 && c.last {
				return n, true
			}
			continue
		}
		end := bytes.IndexByte(b[n:], '\n')
		if end < 0 {
			c.line = append(c.line, b[n:]...)
			return len(b), false
		}
		began := n - len(c.line)
		line := string(append(c.line, b[n:n+end]...))
		c.line = nil
		n += end + 1
		fields := strings.Fields(line)
		if len(fields) < 3 || fields[0] != "PUB" && fields[0] != "HPUB" {
			continue
		}
		var size int
		if _, err := fmt.Sscan(fields[len(fields)-1], &size); err != nil {
			panic(err)
		}
		c.skip = size + 2
		if !c.wire.counts(fields[1]) {
			continue
		}
		if int(c.wire.seen.Add(1)) == c.wire.cutAt {
			if !c.wire.after {
				return max(began, 0), true
			}
			c.last = true
		}
	}
	return n, false
}
