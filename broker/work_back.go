package broker

import (
	"context"
	"slices"
	"strconv"
	"sync"
	"time"

	"tidemark/schema"
)

// NATS counts deliveries to edges; what counts for a group is how often an item came into a worker's hands. Where an edge has to give back an item that it could hand to nobody, it says so in a register, which whoever
// gets the item next takes off. Of an edge that dies with such an item nothing is written, and the delivery counts.

func (g *workGroup) unhandedSubject(h *heldItem) string {
	return unhandedSubject(g.key, strconv.FormatUint(h.item.seq, 10))
}

func unhandedSubject(k groupKey, item string) string {
	return "unhanded." + schema.EscapeToken(k.tenant) + "." + groupHash(k.name) + "." + item
}

// readUnhanded is how many of the item's deliveries came into nobody's hands, and the register's revision.
func (g *workGroup) readUnhanded(ctx context.Context, h *heldItem) (n int, rev uint64, err error) {
	m, err := g.log.reader.lastFromLeader(ctx, orderStream, g.unhandedSubject(h))
	if m == nil || err != nil {
		return 0, 0, err
	}
	n, err = strconv.Atoi(string(m.data))
	return n, m.seq, err
}

// handBack gives back items that came into nobody's hands.
func (g *workGroup) handBack(delay time.Duration, items ...*heldItem) {
	if len(items) == 0 {
		return
	}
	g.log.appending.Go(func() {
		for some := range slices.Chunk(items, maxWrites) {
			var wg sync.WaitGroup
			for _, h := range some {
				wg.Go(func() {
					if err := g.countUnhanded(h); err != nil {
						g.log.logger.Debug("a delivery that came into nobody's hands counts all the same", "group", g.key.name, "session", h.item.id().String(), "seq", h.item.GetSeq(), "error", err)
					}
					g.answer(h, nak(delay))
				})
			}
			wg.Wait()
		}
	})
}

func (g *workGroup) countUnhanded(h *heldItem) error {
	ctx, cancel := context.WithTimeout(g.log.storing, getTimeout)
	defer cancel()
	for {
		n, rev, err := g.readUnhanded(ctx, h)
		if err != nil {
			return err
		}
		_, err = publishFenced(ctx, g.log.conn, g.unhandedSubject(h), strconv.AppendInt(nil, int64(n+1), 10), rev)
		if !isConflict(err) {
			return err
		}
	}
}
