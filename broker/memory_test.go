package broker_test

import (
	"testing"
	"testing/synctest"

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

// The comparison itself: two models agree whatever is done to them.
func TestMemoryLogAgreesWithItself(t *testing.T) {
	for seed := range uint64(20) {
		synctest.Test(t, func(t *testing.T) { logtest.Compare(t, memory(t), memory(t), seed) })
	}
}
