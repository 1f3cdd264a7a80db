package broker

import (
	"os"
	"testing"

	"tidemark/internal/natsd"
)

func TestMain(m *testing.M) {
	natsd.PrepareBubbles()
	os.Exit(m.Run())
}
