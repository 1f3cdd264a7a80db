package broker_test

import (
	"context"
	"testing"
	"time"

	"tidemark/broker"
	"tidemark/internal/natsd"
	"tidemark/schema"
)

// TestLogEndsBeforeItsDeployment: an edge that is stopped while no broker has made the streams ends in good order.
func TestLogEndsBeforeItsDeployment(t *testing.T) {
	node, err := natsd.Start(natsd.Config{DataDir: t.TempDir(), Durability: schema.Durability_DURABILITY_MEMORY})
	if err != nil {
		t.Fatal(err)
	}
	l, err := broker.Open(broker.Config{Server: broker.Server{InProcess: node, Name: "test"}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer stop()
	if err := l.Run(ctx); err != nil {
		t.Errorf("Run: %v", err)
	}
	if err := l.Close(t.Context()); err != nil {
		t.Errorf("Close: %v", err)
	}
	if err := node.Shutdown(t.Context()); err != nil {
		t.Error(err)
	}
}
