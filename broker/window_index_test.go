package broker

import (
	"math/rand/v2"
	"testing"

	"github.com/oklog/ulid/v2"
)

// The window answers as a map would that is never forgotten, for the ids that are in it: whatever is put, trimmed, dropped and put again, with ids that come again, across the place where short seqs begin
// again.
func TestIDWindowIsAMap(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for _, from := range []uint64{1, 5000, cycle - 3000, 7*cycle - 100} {
		w := idWindow{from: from}
		model := map[ulid.ULID]uint64{} // the newest seq of each id
		var order []ulid.ULID
		next := from
		pick := func() ulid.ULID {
			if len(order) > 0 && r.IntN(10) == 0 {
				return order[r.IntN(len(order))]
			}
			return ulid.ULID{0: byte(r.IntN(3)), 8: byte(r.Uint32()), 15: byte(r.Uint32()), 3: byte(r.Uint32())}
		}
		for range 200 {
			before := len(order)
			for range r.IntN(300) {
				id := pick()
				w.put(next, id)
				order, next = append(order, id), next+1
			}
			if r.IntN(3) == 0 {
				n := r.IntN(len(order) - before + 1)
				w.drop(n)
				order, next = order[:len(order)-n], next-uint64(n)
			}
			w.trim()
			if len(w.ids) > recentIDs || w.from+uint64(len(w.ids)) != next {
				t.Fatalf("the window holds %d ids from %d on; the next is %d", len(w.ids), w.from, next)
			}
			clear(model)
			for i, id := range order[len(order)-len(w.ids):] {
				model[id] = w.from + uint64(i)
			}
			for _, id := range append(order[max(0, len(order)-3000):], ulid.ULID{0: 9}) {
				got, ok := w.find(id)
				want, there := model[id]
				if ok != there || got != want {
					t.Fatalf("from %d: id %s is at %d %v, want %d %v", from, id, got, ok, want, there)
				}
			}
		}
	}
}

func BenchmarkIDWindow(b *testing.B) {
	var windows [50]idWindow
	for i := range windows {
		windows[i].from = 1
	}
	b.ReportAllocs()
	for n := 0; b.Loop(); n++ {
		w := &windows[n%len(windows)]
		id := ulid.ULID{8: byte(n), 9: byte(n >> 8), 10: byte(n >> 16)}
		if _, ok := w.find(id); ok {
			b.Fatal("found")
		}
		w.add(w.from+uint64(len(w.ids)), id)
	}
}
