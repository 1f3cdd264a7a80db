package world

import (
	"os"
	"runtime"
	"strconv"
	"testing"
)

func TestMain(m *testing.M) {
	runtime.MemProfileRate = 64 << 10 // see held
	Prepare()
	os.Exit(m.Run())
}

// seeds are those of a random test: few as a rule, many where TIDEMARK_SLOW is set, one where TIDEMARK_SEED names it.
func seeds(few, many int) []uint64 {
	if one, err := strconv.ParseUint(os.Getenv("TIDEMARK_SEED"), 10, 64); err == nil {
		return []uint64{one}
	}
	n := few
	if slow() {
		n = many
	}
	all := make([]uint64, n)
	for i := range all {
		all[i] = uint64(i)
	}
	return all
}

func slow() bool { return os.Getenv("TIDEMARK_SLOW") != "" }
