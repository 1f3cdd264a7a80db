package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"tidemark/internal/client"
	"tidemark/schema"
)

// followCommand is `tidemark follow`.
type followCommand struct {
	Session string `arg:"" help:"The session. It may have no envelope yet."`
	connectFlags
	AfterSeq  uint64   `help:"Begin behind this seq."`
	Epoch     string   `placeholder:"EPOCH" help:"The history that --after-seq belongs to; another one is refused."`
	Head      bool     `help:"Only what comes from now on."`
	Last      uint64   `placeholder:"N" help:"Begin with the last N envelopes."`
	Since     moment   `placeholder:"TIME" help:"Begin with what was stored at or after this time, as 2025-11-04T10:00:15Z."`
	Types     []string `placeholder:"TYPE" help:"Only these types: token, tool_call, user_message and so on."`
	MustExist bool     `help:"Refuse a session without envelopes instead of waiting for its first."`
	Once      bool     `help:"End when everything that was stored at the start has been shown."`
	JSON      bool     `name:"json" help:"Print one envelope a line, in JSON."`
}

// Validate is called by kong.
func (c *followCommand) Validate() error {
	n := 0
	for _, given := range []bool{c.AfterSeq > 0, c.Head, c.Last > 0, !c.Since.IsZero()} {
		if given {
			n++
		}
	}
	if n > 1 {
		return errors.New("--after-seq, --head, --last and --since each say where to begin; give one of them")
	}
	return nil
}

// Run shows the session until the process is told to stop.
func (c *followCommand) Run(ctx context.Context, env *environment) error {
	if _, err := schema.ParseSessionID("any", c.Session); err != nil {
		return usageError{err}
	}
	if _, err := schema.ParseTypes("The command", c.Types); err != nil {
		return usageError{err}
	}
	l, err := c.connect(ctx, env)
	if err != nil {
		return err
	}
	f := l.Follow(client.FollowOptions{
		Session: c.Session, Head: c.Head, Last: c.Last, Since: c.Since.Time, After: c.AfterSeq, Epoch: c.Epoch, Types: c.Types, MustExist: c.MustExist,
	})
	err = c.show(ctx, env, f)
	f.Close()
	return errors.Join(err, l.close())
}

// show writes what comes. It writes out whenever it has to wait for more.
func (c *followCommand) show(ctx context.Context, env *environment, f *client.Follower) error {
	out := bufio.NewWriterSize(env.stdout, 64<<10)
	var r renderer = &textRenderer{out: out, terminal: isTerminal(env.stdout)}
	if c.JSON {
		r = &jsonRenderer{out: out}
	}
	notice := func(format string, args ...any) {
		r.pause()
		_ = out.Flush()
		fmt.Fprintf(env.stderr, format+"\n", args...)
	}
	for {
		if f.Queued() == 0 {
			if err := out.Flush(); err != nil {
				return fmt.Errorf("the output is gone: %w", err)
			}
		}
		e, err := f.Next(ctx)
		switch {
		case ctx.Err() != nil:
			notice("stopped at seq %d; go on with --after-seq %d", f.Place().Seq, f.Place().Seq)
			return nil
		case err != nil:
			r.pause()
			return errors.Join(err, out.Flush())
		case e.Envelope != nil:
			r.show(e.Envelope)
		case e.Lost != nil:
			notice("connection lost, going on behind seq %d when it is back: %s", f.Place().Seq, sentence(e.Lost))
		case e.Truncated != nil:
			notice("the envelopes from seq %d to %d are no longer kept", e.Truncated.GetWantedSeq(), e.Truncated.GetFirstSeq()-1)
		case e.CaughtUp != nil && c.Once:
			r.pause()
			return out.Flush()
		}
	}
}

// renderer shows envelopes.
type renderer interface {
	show(e *schema.Envelope)
	// pause ends a line that is not ended, before something else is written.
	pause()
}

type jsonRenderer struct {
	out *bufio.Writer
	buf []byte
}

func (r *jsonRenderer) show(e *schema.Envelope) {
	r.buf = append(schema.AppendJSON(r.buf[:0], e), '\n')
	_, _ = r.out.Write(r.buf) // a Writer remembers its error for Flush
}

func (r *jsonRenderer) pause() {}

// isTerminal says whether somebody reads along, and not a file or a pipe.
func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}
