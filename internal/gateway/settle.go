package gateway

import (
	"time"

	"tidemark/broker"
	"tidemark/schema"
)

// workAnswer is what a worker says of an item, as the metric names it.
type workAnswer string

// The answers.
const (
	answerAck        workAnswer = "ack"
	answerNack       workAnswer = "nack"
	answerInProgress workAnswer = "in_progress"
	answerTerm       workAnswer = "term"
	// answerLost: any of them, about an item that the connection does not hold.
	answerLost workAnswer = "lost"
)

// workAnswers are all of them.
var workAnswers = [...]workAnswer{answerAck, answerNack, answerInProgress, answerTerm, answerLost} //nolint:gochecknoglobals // a table that nothing writes

// acked handles a [schema.WorkAck]. The error ends the connection. Answers to work cost nothing: who asked for items bounds how many there are. Called by the reader, as all of this file is.
func (c *conn) acked(m *schema.WorkAck) error {
	return c.eachItem("ack", m.GetWorkIds(), func(id uint64) { c.settle(answerAck, id, func(t broker.Taker) bool { return t.Ack(id) }) })
}

// nacked handles a [schema.WorkNack].
func (c *conn) nacked(m *schema.WorkNack) {
	if !c.named("nack", m.GetWorkId()) {
		return
	}
	var delay *time.Duration
	if m.DelayMs != nil {
		if m.GetDelayMs() > schema.MaxBackoffMs {
			c.refuseAnswer(m.GetWorkId(), schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "The nack of item %d has the delay_ms %d; at most %d are allowed. The item is still in hand.", m.GetWorkId(), m.GetDelayMs(), schema.MaxBackoffMs))
			return
		}
		delay = new(time.Duration(m.GetDelayMs()) * time.Millisecond)
	}
	if !c.shortReason("nack", m.GetWorkId(), m.GetReason()) {
		return
	}
	c.settle(answerNack, m.GetWorkId(), func(t broker.Taker) bool { return t.Nack(m.GetWorkId(), delay, m.GetReason()) })
}

// inProgress handles a [schema.WorkInProgress]. The error ends the connection.
func (c *conn) inProgress(m *schema.WorkInProgress) error {
	return c.eachItem("in_progress", m.GetWorkIds(), func(id uint64) {
		c.settle(answerInProgress, id, func(t broker.Taker) bool {
			deadline, held := t.InProgress(id)
			if held {
				c.goOnWithRun(id, deadline)
			}
			return held
		})
	})
}

// termed handles a [schema.WorkTerm].
func (c *conn) termed(m *schema.WorkTerm) {
	if c.named("term", m.GetWorkId()) && c.shortReason("term", m.GetWorkId(), m.GetReason()) {
		c.settle(answerTerm, m.GetWorkId(), func(t broker.Taker) bool { return t.Term(m.GetWorkId(), m.GetReason()) })
	}
}

// eachItem goes over the items of an answer, which are no more than one worker may have in hand.
func (c *conn) eachItem(what string, ids []uint64, do func(id uint64)) error {
	if len(ids) > schema.MaxWorkCredit {
		return schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "The %s names %d items; at most %d are allowed.", what, len(ids), schema.MaxWorkCredit)
	}
	for _, id := range ids {
		if c.named(what, id) {
			do(id)
		}
	}
	return nil
}

// named refuses an answer that is about no item; false where it did.
func (c *conn) named(what string, id uint64) bool {
	if id == 0 {
		c.refuseAnswer(0, schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "The %s names no item: a work_id is missing, or 0. Name items by the work_id that they were handed out with.", what))
	}
	return id != 0
}

// shortReason refuses an answer that says too much; false where it did.
func (c *conn) shortReason(what string, id uint64, reason string) bool {
	if len(reason) <= schema.MaxReasonBytes {
		return true
	}
	c.refuseAnswer(id, schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "The reason in the %s of item %d has %d bytes; at most %d are allowed. The item is still in hand.", what, id, len(reason), schema.MaxReasonBytes))
	return false
}

// settle says an answer to the worker that holds the item, which one of the connection's subscriptions is, or none.
func (c *conn) settle(what workAnswer, id uint64, say func(broker.Taker) bool) {
	for _, s := range c.workers {
		if s.group.Load() == nil || s.ended.Load() || !say(s.taker) {
			continue
		}
		c.g.metrics.answers[what].Inc()
		if what != answerInProgress {
			c.letRun(id)
		}
		return
	}
	c.g.metrics.answers[answerLost].Inc()
	c.letRun(id)
	c.refuseAnswer(id, schema.Refuse(schema.Code_CODE_WORK_LOST, "The item %d is not in this connection's hands: it was settled, its deadline passed and others have it, or this connection was never handed it. What was done for it may be done again.", id))
}

// refuseAnswer says that an answer was not taken. The connection goes on.
func (c *conn) refuseAnswer(id uint64, r *schema.Refusal) {
	c.reply(&schema.ServerFrame{Frame: &schema.ServerFrame_WorkRefused{WorkRefused: &schema.WorkRefused{WorkId: id, Code: r.Code, Message: r.Message}}})
}
