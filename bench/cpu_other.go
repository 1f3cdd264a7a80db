//go:build !unix

package bench

import "time"

// ownCPU is the processor time that this process has taken; 0 where that is not known.
func ownCPU() time.Duration { return 0 }
