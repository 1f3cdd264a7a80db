package broker_test

import (
	"fmt"
	"os"
	"runtime"
	"strconv"
	"testing"
	"testing/synctest"

	"tidemark/broker"
	"tidemark/broker/logtest"
	"tidemark/schema"
)

// truncatable is a jetStream whose past can be taken away. config changes how its logs are opened.
func truncatable(config func(*broker.Config)) func(t *testing.T) logtest.Instance {
	return func(t *testing.T) logtest.Instance {
		s := newSubstrate(t)
		s.config = config
		in := s.instance()
		in.Truncate = func(t *testing.T, id schema.SessionID, first uint64) uint64 {
			t.Helper()
			s.settle(t)
			left, err := broker.TruncateSession(t.Context(), s.server(), id, first)
			if err != nil {
				t.Fatal(err)
			}
			return left
		}
		return in
	}
}

// tiny has room for a few frames in the tail, so that nearly everything is read from the log (I8).
func tiny(c *broker.Config) { c.TailBytes = 4 << 10 }

func TestJetStreamLogWithATinyTail(t *testing.T) { logtest.Run(t, truncatable(tiny)) }

// TestJetStreamLogIsTheModel compares both logs under random operations. TIDEMARK_SEED runs one seed alone, TIDEMARK_SEEDS more of them.
func TestJetStreamLogIsTheModel(t *testing.T) {
	from, seeds := uint64(0), uint64(6)
	if one, err := strconv.ParseUint(os.Getenv("TIDEMARK_SEED"), 10, 64); err == nil {
		from, seeds = one, 1
	} else if more, err := strconv.ParseUint(os.Getenv("TIDEMARK_SEEDS"), 10, 64); err == nil {
		seeds = more
	}
	for seed := from; seed < from+seeds; seed++ {
		open := truncatable(nil)
		if seed%2 == 1 {
			open = truncatable(tiny)
		}
		t.Run(fmt.Sprint("seed", seed), func(t *testing.T) {
			// See logtest.Run.
			runtime.GC()
			runtime.GC()
			synctest.Test(t, func(t *testing.T) { logtest.Compare(t, memory(t), open(t), seed) })
		})
	}
}
