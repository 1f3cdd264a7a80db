package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"tidemark/internal/client"
	"tidemark/schema"
)

// tailCommand is `tidemark tail`.
type tailCommand struct {
	Group string `arg:"" help:"The group. It is made where there is none; its members share the load, and what one has printed no other prints."`
	connectFlags
	Prefix  string   `help:"Only sessions whose names begin so."`
	Types   []string `placeholder:"TYPE" help:"Only these types: token, tool_call, user_message and so on."`
	FromNow bool     `help:"Begin a new group with what comes from now on, and not with the oldest that is kept."`
	Since   moment   `placeholder:"TIME" help:"Begin a new group with what was stored at or after this time, as 2025-11-04T10:00:15Z."`
}

// tailLeaveWithin is how long the edge is given to take the last acknowledgements.
const tailLeaveWithin = 5 * time.Second

// Validate is called by kong.
func (c *tailCommand) Validate() error {
	if c.FromNow && !c.Since.IsZero() {
		return errors.New("--from-now and --since each say where to begin; give one of them")
	}
	return nil
}

// Run prints what comes until the process is told to stop, one envelope a line: {"session":…,"epoch":…,"stored":…,"envelope":{…}}. What was written out is acknowledged.
func (c *tailCommand) Run(ctx context.Context, env *environment) error {
	if n := len(c.Group); n == 0 || n > schema.MaxGroupBytes {
		return usageError{fmt.Errorf("the group's name has %d bytes; 1 to %d are allowed", n, schema.MaxGroupBytes)}
	}
	if _, err := schema.ParseTypes("The tail", c.Types); err != nil {
		return usageError{err}
	}
	l, err := c.connect(ctx, env)
	if err != nil {
		return err
	}
	t := l.Tail(client.TailOptions{Group: c.Group, Prefix: c.Prefix, Types: c.Types, Now: c.FromNow, Since: c.Since.Time})
	// At a signal the member leaves in good order, for which its connection outlives the signal.
	reading, cut := context.WithCancel(context.WithoutCancel(ctx))
	unsignalled := context.AfterFunc(ctx, func() {
		late := time.AfterFunc(tailLeaveWithin, cut)
		if !t.Leave() {
			late.Stop()
			cut()
		}
	})
	err = c.print(ctx, reading, env, t)
	unsignalled()
	cut()
	t.Close()
	return errors.Join(err, l.close())
}

// print writes each batch out before it is acknowledged.
func (c *tailCommand) print(ctx, reading context.Context, env *environment, t *client.Tailer) error {
	out := bufio.NewWriterSize(env.stdout, 64<<10)
	share := shareTeller{out: env.stderr}
	defer share.close()
	var line []byte
	for {
		e, err := t.Next(reading)
		switch {
		case errors.Is(err, io.EOF) || reading.Err() != nil:
			return nil
		case err != nil:
			return err
		case e.Assigned != nil:
			share.told(fmt.Sprintf("has %d of %d partitions of group %q\n", len(e.Assigned.GetPartitions()), e.Assigned.GetOf(), c.Group))
		case e.Lost != nil:
			fmt.Fprintf(env.stderr, "connection lost, going on behind what was acknowledged when it is back: %s\n", sentence(e.Lost))
		case ctx.Err() != nil:
			// It is on its way out and could not acknowledge this any more.
		default:
			for _, f := range e.Batch.GetSessions() {
				for _, envelope := range f.GetEnvelopes() {
					line = appendTailed(line[:0], f, envelope)
					_, _ = out.Write(line) // a Writer remembers its error for Flush
				}
			}
			if err := out.Flush(); err != nil {
				return fmt.Errorf("the output is gone: %w", err)
			}
			if err := t.Ack(reading, e.Batch.GetPartition(), e.Batch.GetThrough()); err != nil {
				return nil //nolint:nilerr // the context ended, and so does the command
			}
		}
	}
}

// shareSettles is how long a member's share must stand to be told: partitions come and go one by one.
const shareSettles = time.Second

// shareTeller tells what share of the group a member has, once for each change that lasts.
type shareTeller struct {
	out io.Writer

	mu     sync.Mutex // guards all below
	last   string     // what was told
	next   string     // what is to be told
	timer  *time.Timer
	closed bool
}

// told takes what is the case from now on.
func (s *shareTeller) told(share string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.next = share
	if s.timer != nil {
		s.timer.Stop()
	}
	s.timer = time.AfterFunc(shareSettles, s.tell)
}

func (s *shareTeller) tell() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed && s.next != s.last {
		_, _ = io.WriteString(s.out, s.next)
		s.last = s.next
	}
}

// close tells nothing more.
func (s *shareTeller) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	if s.timer != nil {
		s.timer.Stop()
	}
}

// tailedLine is what stands before the envelope in a line.
type tailedLine struct {
	Session string    `json:"session"`
	Epoch   string    `json:"epoch"`
	Stored  time.Time `json:"stored"`
}

// appendTailed appends the line of an envelope.
func appendTailed(b []byte, f *schema.TailEnvelopes, e *schema.Envelope) []byte {
	head, err := json.Marshal(tailedLine{f.GetSession(), f.GetEpoch(), f.GetStored().AsTime()})
	if err != nil {
		// A frame's time is beyond the year 9999: whoever stored it had a broken clock.
		f.Stored = nil
		return appendTailed(b, f, e)
	}
	b = append(append(b, head[:len(head)-1]...), `,"envelope":`...)
	return append(schema.AppendJSON(b, e), "}\n"...)
}
