package broker

import (
	"time"

	"tidemark/schema"
)

// Worker is a member of a group, on this edge. Its methods may be called concurrently.
type Worker struct{}

// Group is the group's settings as they were when the worker joined.
func (w *Worker) Group() *schema.WorkGroup { return nil }

// Take returns items that the worker has in its hands now, at most so many; none where there is nothing, and then Wake is called when there is. The error is why the worker is none any more: unavailable, going_away.
func (w *Worker) Take(most int) ([]*Item, error) { return nil, nil }

// Cancellations returns what was cancelled of what is in hand, each once. Wake is called when there is something.
func (w *Worker) Cancellations() []Cancellation { return nil }

// Ack settles an item: it is done. False where the worker does not hold it.
func (w *Worker) Ack(id uint64) bool { return false }

// Nack gives an item back: it is handed out again after delay, or, where that is nil, as the group's backoff says. The group gives it up where it was handed out as often as it allows.
func (w *Worker) Nack(id uint64, delay *time.Duration, reason string) bool { return false }

// InProgress begins an item's deadline anew.
func (w *Worker) InProgress(id uint64) bool { return false }

// Term settles an item for good: the group gives it up.
func (w *Worker) Term(id uint64, reason string) bool { return false }

// Close ends the worker; what it has in hand goes back to the group at once. It may be called more than once.
func (w *Worker) Close() {}
