package auth

import "time"

// ReadsEvery gives a verifier that does not run yet other times between reads than the product's [JWKSEvery] and [JWKSGap], for tests on real time.
func (v *Verifier) ReadsEvery(every, gap time.Duration) { v.keys.every, v.keys.gap = every, gap }
