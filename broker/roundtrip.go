package broker

import (
	"context"
	"errors"
	"sync"

	"github.com/nats-io/nats.go"
)

// errLost says that the connection was lost, and with it the answer to what was asked on it.
var errLost = errors.New("broker: the connection to NATS was lost before the answer came")

// connection is a connection to NATS that says when it was lost: the answers to what was asked on it cannot come any more then, and the client library would have each wait for its whole time. Its methods may be called concurrently.
type connection struct {
	*nats.Conn

	mu sync.Mutex
	// alive ends with errLost when the connection, as it is now, is lost.
	alive context.Context
	lose  context.CancelCauseFunc
}

// lost ends the waits for answers. What is asked from now on goes out when there is a connection again, or fails at once.
func (c *connection) lost() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.lose != nil {
		c.lose(errLost)
	}
	c.alive, c.lose = nil, nil
}

// onLoss does something in a goroutine of its own when the connection is lost, unless it is forgotten before.
func (c *connection) onLoss(do func()) (forget func() bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.alive == nil {
		c.alive, c.lose = context.WithCancelCause(context.Background()) //nolint:forbidigo // the connection's own lifetime
	}
	return context.AfterFunc(c.alive, do)
}

// awaitConnected waits until there is a connection; the error is ctx's cause, or says that there will be none.
func (c *connection) awaitConnected(ctx context.Context) error {
	changed := c.StatusChanged(nats.CONNECTED, nats.CLOSED)
	defer c.RemoveStatusListener(changed)
	for !c.IsConnected() {
		if c.IsClosed() {
			return nats.ErrConnectionClosed
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

// untilLost is a context that also ends when the connection is lost, with the cause errLost. stop must be called.
func (c *connection) untilLost(ctx context.Context) (asking context.Context, stop func()) {
	asking, cancel := context.WithCancelCause(ctx)
	forget := c.onLoss(func() { cancel(errLost) })
	return asking, func() {
		forget()
		cancel(nil)
	}
}

// ask does what asks NATS something, for as long as ctx and the connection as it is now last. Where one of them ended it, the error is the cause: errLost, or ctx's.
func (c *connection) ask(ctx context.Context, do func(asking context.Context) error) error {
	asking, stop := c.untilLost(ctx)
	defer stop()
	err := do(asking)
	if err != nil && context.Cause(asking) != nil {
		return context.Cause(asking)
	}
	return err
}

// roundTrip makes a request and waits for its answer until ctx ends or the connection is lost. Whether the request was carried out is not known after an error.
func (c *connection) roundTrip(ctx context.Context, m *nats.Msg) (*nats.Msg, error) {
	asking, stop := c.untilLost(ctx)
	defer stop()
	answer, err := c.RequestMsgWithContext(asking, m)
	if err != nil && errors.Is(context.Cause(asking), errLost) {
		err = errLost
	}
	return answer, err
}
