package broker

import (
	"hash/maphash"

	"github.com/oklog/ulid/v2"
)

// idWindow remembers the ids of the last envelopes of a session, and where they are. For every token one id comes in, one is looked for and one is forgotten, so its index is a table that is written over
// and not a map: its slots hold seqs, found by the hash of their ids with linear probing. A seq that has left the window stays in its slot until the table is three quarters full and made anew.
//
//	from
//	|-------- ids --------|
//	     ^ slots[hash(id)], or a slot behind it
type idWindow struct {
	// ids are those of the seqs from `from` on.
	ids []ulid.ULID
	// from is the oldest seq whose id is known: an id that is not found was not stored at or behind it.
	from uint64
	// slots hold seqs as short has them, 0 where they are empty; they are a power of two. used counts those that are not empty.
	slots []uint32
	used  int
}

// minSlots is the size of a new session's table.
const minSlots = 64

// seed makes the ids' hashes unforeseeable: clients choose them.
var seed = maphash.MakeSeed() //nolint:gochecknoglobals // a constant of the process

// find returns the newest seq that has the id; false where the window does not hold it.
func (w *idWindow) find(id ulid.ULID) (uint64, bool) {
	if len(w.slots) == 0 {
		return 0, false
	}
	mask := uint64(len(w.slots) - 1)
	var newest uint64
	for h := maphash.Bytes(seed, id[:]) & mask; w.slots[h] != 0; h = (h + 1) & mask {
		if at, ok := w.at(w.slots[h]); ok && w.ids[at] == id && w.from+at > newest {
			newest = w.from + at
		}
	}
	return newest, newest > 0
}

// cycle is after how many seqs their short forms come again: far more than a window has.
const cycle = 1<<32 - 1

// short is a seq as it stands in a slot: never 0.
func short(seq uint64) uint32 { return uint32(seq%cycle) + 1 }

// at is the place in ids of the seq in a slot; false where it has left the window.
func (w *idWindow) at(slot uint32) (uint64, bool) {
	at := (uint64(slot-1) + cycle - w.from%cycle) % cycle
	return at, at < uint64(len(w.ids))
}

// add takes in the id of the next seq.
func (w *idWindow) add(seq uint64, id ulid.ULID) {
	w.put(seq, id)
	w.trim()
}

// put takes in the id of the next seq and forgets none, so that it can be taken out again.
func (w *idWindow) put(seq uint64, id ulid.ULID) {
	if seq != w.from+uint64(len(w.ids)) {
		// Retention took what was before.
		*w = idWindow{from: seq}
	}
	w.ids = append(w.ids, id)
	if (w.used+1)*4 > len(w.slots)*3 {
		w.index()
		return
	}
	w.mark(uint64(len(w.ids) - 1))
}

// mark puts the place of an id into the table.
func (w *idWindow) mark(at uint64) {
	mask := uint64(len(w.slots) - 1)
	h := maphash.Bytes(seed, w.ids[at][:]) & mask
	for w.slots[h] != 0 {
		h = (h + 1) & mask
	}
	w.slots[h] = short(w.from + at)
	w.used++
}

// index makes the table anew, with room for as many ids again.
func (w *idWindow) index() {
	n := max(minSlots, len(w.slots))
	for n < 3*len(w.ids) {
		n *= 2
	}
	if n == len(w.slots) {
		clear(w.slots)
	} else {
		w.slots = make([]uint32, n)
	}
	w.used = 0
	for at := range w.ids {
		w.mark(uint64(at))
	}
}

// trim forgets the oldest ids until there are recentIDs.
func (w *idWindow) trim() {
	if n := len(w.ids) - recentIDs; n > 0 {
		w.ids = w.ids[n:]
		w.from += uint64(n)
	}
}

// drop takes the last n ids out again, which were put and not trimmed.
func (w *idWindow) drop(n int) {
	if n == 0 {
		return
	}
	w.ids = w.ids[:len(w.ids)-n]
	// The seqs will come again, with other ids: no slot may lead to them.
	w.index()
}
