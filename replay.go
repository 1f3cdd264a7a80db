package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"tidemark/replay"
	"tidemark/schema"
)

// replayCommand is `tidemark replay`.
type replayCommand struct {
	Show   replayShowCommand   `cmd:"" default:"withargs" help:"Print a session as the transcript of a conversation."`
	Export replayExportCommand `cmd:"" help:"Print a session as JSON, one envelope a line, losslessly."`
	Verify replayVerifyCommand `cmd:"" help:"Check a session: contiguous, every id once, every producer in order; print a digest of its text."`
}

// replayFlags name what to read, and from where.
type replayFlags struct {
	Session string `arg:"" help:"The session."`
	connectFlags
}

// with connects, does what is to be done, and disconnects.
func (f *replayFlags) with(ctx context.Context, env *environment, do func(*link) error) error {
	if _, err := schema.ParseSessionID("any", f.Session); err != nil {
		return usageError{err}
	}
	l, err := f.connect(ctx, env)
	if err != nil {
		return err
	}
	return errors.Join(do(l), l.close())
}

type replayShowCommand struct {
	replayFlags
	Pace bool `help:"At the pace at which it was written, with pauses of three seconds at the most, instead of at once."`
}

// Run prints the transcript.
func (c *replayShowCommand) Run(ctx context.Context, env *environment) error {
	return c.with(ctx, env, func(l *link) error {
		p := replay.NewPrinter(env.stdout, isTerminal(env.stdout))
		return replay.Transcript(ctx, p, replay.Read(ctx, l.Client, replay.Options{Session: c.Session, MergeTokens: !c.Pace}), c.Pace)
	})
}

type replayExportCommand struct {
	replayFlags
	AfterSeq uint64 `help:"Begin behind this seq."`
}

// Run prints the lines, and on standard error how many there were.
func (c *replayExportCommand) Run(ctx context.Context, env *environment) error {
	return c.with(ctx, env, func(l *link) error {
		n, err := replay.Export(env.stdout, replay.Read(ctx, l.Client, replay.Options{Session: c.Session, After: c.AfterSeq}))
		if err == nil {
			fmt.Fprintf(env.stderr, "%d envelopes exported\n", n)
		}
		return err
	})
}

type replayVerifyCommand struct {
	replayFlags
	JSON bool `name:"json" help:"Print the verdict in JSON."`
}

// Run prints the verdict, and fails where it is not a good one.
func (c *replayVerifyCommand) Run(ctx context.Context, env *environment) error {
	return c.with(ctx, env, func(l *link) error {
		v, err := replay.Verify(c.Session, replay.Read(ctx, l.Client, replay.Options{Session: c.Session}))
		if err != nil {
			return err
		}
		if c.JSON {
			err = json.NewEncoder(env.stdout).Encode(v)
		} else {
			err = v.WriteText(env.stdout)
		}
		if err == nil && !v.Sound() {
			err = fmt.Errorf("the session is not sound: %d problems", v.Found)
		}
		return err
	})
}
