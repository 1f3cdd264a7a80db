package gateway

import (
	"testing"

	"tidemark/broker/worktest"
	"tidemark/schema"
)

// TestAnswersThatNameNoItem: an answer without a work_id is not one about an item that was lost, and the connection goes on.
func TestAnswersThatNameNoItem(t *testing.T) {
	working(t, nil, func(w *world, q *worktest.Queue) {
		p := w.dial(Peer{Protocol: Proto, Principal: principal("worker", "*")})
		p.subscribe(&schema.WorkSubscribe{Channel: 7})
		p.wantSubscribed()
		jobs(q, "s", 1)
		it := p.wantWork(1)[0]
		p.ack(0)
		p.inProgress(0)
		p.term(&schema.WorkTerm{})
		p.nack(&schema.WorkNack{})
		for _, what := range []string{"ack", "in_progress", "term", "nack"} {
			p.wantRefused(0, schema.Code_CODE_INVALID_MESSAGE, "The "+what+" names no item")
		}
		p.ack(0, it.GetWorkId())
		p.wantRefused(0, schema.Code_CODE_INVALID_MESSAGE, "work_id")
		w.wantSaid(q, "ack 1")
		p.leave()
	})
}
