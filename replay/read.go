package replay

import (
	"bufio"
	"context"
	"io"
	"iter"

	"tidemark/internal/client"
	"tidemark/schema"
)

// Options say what of a session to read.
type Options struct {
	Session string
	// After: behind this seq. 0 is the beginning.
	After uint64
	// MergeTokens lets the edge merge adjacent tokens of one message: fewer envelopes, the same text.
	MergeTokens bool
}

// Read yields what is told of a session up to its head: the first attached, truncated where retention took something, and every envelope once and in order, over lost connections. The session must
// exist. It ends after the first error. It can be ranged over more than once, and reads anew each time.
func Read(ctx context.Context, c *client.Client, o Options) iter.Seq2[client.Event, error] {
	return func(yield func(client.Event, error) bool) {
		f := c.Follow(client.FollowOptions{Session: o.Session, After: o.After, MustExist: true, MergeTokens: o.MergeTokens})
		defer f.Close()
		for attached := false; ; {
			ev, err := f.Next(ctx)
			switch {
			case err != nil:
				yield(ev, err)
				return
			case ev.CaughtUp != nil:
				return
			case ev.Attached != nil && attached, ev.Lost != nil, ev.GoingAway != nil:
				continue
			case ev.Attached != nil:
				attached = true
			}
			if !yield(ev, nil) {
				return
			}
		}
	}
}

// Export writes each envelope as a line of JSON and returns how many there were.
func Export(w io.Writer, events iter.Seq2[client.Event, error]) (int, error) {
	out := bufio.NewWriterSize(w, 64<<10)
	var line []byte
	n := 0
	for ev, err := range events {
		if err != nil {
			// What came before is whole lines, and worth having.
			_ = out.Flush()
			return n, err
		}
		if ev.Envelope == nil {
			continue
		}
		line = append(schema.AppendJSON(line[:0], ev.Envelope), '\n')
		if _, err := out.Write(line); err != nil {
			return n, err
		}
		n++
	}
	return n, out.Flush()
}
