package broker_test

import (
	"testing"

	"tidemark/broker"
	"tidemark/broker/logtest"
	"tidemark/schema"
)

// memory opens a MemoryLog for the suite. Two edges of it are one.
func memory(*testing.T) logtest.Instance {
	l := broker.NewMemoryLog()
	return logtest.Instance{
		Log:      l,
		OpenEdge: func(*testing.T) broker.Log { return l },
		Truncate: func(_ *testing.T, id schema.SessionID, first uint64) uint64 { return l.Truncate(id, first) },
	}
}

func TestMemoryLog(t *testing.T) { logtest.Run(t, memory) }
