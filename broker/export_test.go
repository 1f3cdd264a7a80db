package broker

import (
	"context"
	"log/slog"

	"github.com/nats-io/nats.go/jetstream"
)

// Provision lays a deployment out without running a broker.
func Provision(ctx context.Context, s Server, l Layout) error {
	conn, err := s.connect(slog.New(slog.DiscardHandler), "provision")
	if err != nil {
		return err
	}
	defer conn.Close()
	js, err := jetstream.New(conn.Conn)
	if err != nil {
		return err
	}
	return provision(ctx, js, l)
}
