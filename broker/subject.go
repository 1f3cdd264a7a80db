package broker

import (
	"fmt"
	"hash/fnv"
	"strconv"
	"strings"

	"tidemark/schema"
)

// sliceCount is how many parts the space of sessions has (the `vs` of DESIGN section 3). Each log stream owns a contiguous range of them, so that the number of streams can
// be chosen without renaming a subject. It is part of what is on disk and can never change.
const sliceCount = 256

// sliceOf places a session: stable for ever, tested against golden values.
func sliceOf(id schema.SessionID) int {
	h := fnv.New64a()
	h.Write([]byte(id.Tenant))
	h.Write([]byte{0})
	h.Write([]byte(id.Name))
	x := h.Sum64()
	// FNV's low bits follow the last byte closely; the murmur finalizer spreads names that differ only in a trailing number.
	x ^= x >> 33
	x *= 0xff51afd7ed558ccd
	x ^= x >> 33
	return int(x % sliceCount)
}

// streamOf is the index of the stream, of n, that owns a slice.
func streamOf(slice, n int) int { return slice * n / sliceCount }

// lane is where a session's messages are: its slice and the last two tokens of its subjects.
type lane struct {
	slice int
	// name is <tenant>.<session>, escaped.
	name string
}

func laneOf(id schema.SessionID) lane {
	return lane{slice: sliceOf(id), name: schema.EscapeToken(id.Tenant) + "." + schema.EscapeToken(id.Name)}
}

func sliceToken(slice int) string {
	const digits = "0123456789"
	return string([]byte{digits[slice/100], digits[slice/10%10], digits[slice%10]})
}

// logSubject is the subject of the session's frames.
func (l lane) logSubject() string { return "log." + sliceToken(l.slice) + "." + l.name }

// pageSubject is the subject of part `part` of a slot of the session. Part 0 carries the slot's state and is written last.
func (l lane) pageSubject(slot uint64, part int) string {
	s := "page." + sliceToken(l.slice) + "." + l.name + "." + strconv.FormatUint(slot, 10)
	if part > 0 {
		s += "." + strconv.Itoa(part)
	}
	return s
}

// pagesSubject is the subject of all the session's pages and their parts.
func (l lane) pagesSubject() string { return "page." + sliceToken(l.slice) + "." + l.name + ".>" }

// registryKey is the session's key in the bucket SESSIONS.
func (l lane) registryKey() string { return l.name }

// parseLogSubject is the reverse of logSubject.
func parseLogSubject(subject string) (schema.SessionID, error) {
	parts := strings.Split(subject, ".")
	if len(parts) != 4 || parts[0] != "log" {
		return schema.SessionID{}, fmt.Errorf("broker: %q is not a log subject", subject)
	}
	tenant, err := schema.UnescapeToken(parts[2])
	if err != nil {
		return schema.SessionID{}, err
	}
	name, err := schema.UnescapeToken(parts[3])
	if err != nil {
		return schema.SessionID{}, err
	}
	return schema.ParseSessionID(tenant, name)
}

// slotOf is the page slot that holds seq: slot k holds 256k+1 … 256k+256.
func slotOf(seq uint64) uint64 { return (seq - 1) / schema.PageEnvelopes }

func logStreamName(i int) string  { return fmt.Sprintf("LOG_%02d", i) }
func pageStreamName(i int) string { return fmt.Sprintf("PAGE_%02d", i) }

// edgeSubject is where an edge takes hand-overs.
func edgeSubject(edge string) string { return "tidemark.edge." + schema.EscapeToken(edge) + ".append" }
