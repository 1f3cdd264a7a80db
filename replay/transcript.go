package replay

import (
	"context"
	"iter"
	"time"

	"tidemark/internal/client"
)

// maxPause bounds the pause before an envelope, where a transcript is shown at the pace at which it was written: nobody waits a night for an answer twice.
const maxPause = 3 * time.Second

// Transcript shows a session: at once, or at the pace that its envelopes' times have, pauses shortened to three seconds.
func Transcript(ctx context.Context, p *Printer, events iter.Seq2[client.Event, error], paced bool) error {
	var last, due time.Time
	for ev, err := range events {
		if err != nil {
			return err
		}
		switch {
		case ev.Truncated != nil:
			p.Note("envelopes %d to %d are gone, retention took them", ev.Truncated.GetWantedSeq(), ev.Truncated.GetFirstSeq()-1)
		case ev.Envelope != nil:
			if at := ev.Envelope.GetTime().AsTime(); paced {
				if due.IsZero() {
					due = time.Now()
				} else {
					due = due.Add(min(max(at.Sub(last), 0), maxPause))
				}
				last = at
				if err := p.sleepUntil(ctx, due); err != nil {
					return err
				}
			}
			p.Print(ev.Envelope)
		}
		if p.err != nil {
			return p.err
		}
	}
	return p.Close()
}

// sleepUntil waits, with all that was printed to be seen.
func (p *Printer) sleepUntil(ctx context.Context, due time.Time) error {
	wait := time.Until(due)
	if wait <= 0 {
		return ctx.Err()
	}
	if err := p.flush(); err != nil {
		return err
	}
	t := time.NewTimer(wait)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
