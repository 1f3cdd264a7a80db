package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"tidemark/internal/client"
	"tidemark/internal/recording"
	"tidemark/schema"
)

// flushWithin is how long a publish that was interrupted waits for what is under way.
const flushWithin = 10 * time.Second

// publishCommand is `tidemark publish`.
type publishCommand struct {
	Session string `arg:"" help:"The session; its first envelope creates it."`
	File    string `arg:"" optional:"" help:"What to publish: lines of text, each a token, or a recorded LLM stream (chat completions, responses, messages). Default: standard input."`
	connectFlags
	Format   string `default:"auto" enum:"auto,text,chat_completions,responses,messages" help:"Format of the lines: ${enum}."`
	Pace     bool   `help:"Publish at the pace of the recording instead of at once."`
	Producer string `placeholder:"NAME" help:"Name of the writer in the session. The same input published again under the same name and epoch is stored once. Default: a new name."`
	Epoch    uint64 `name:"producer-epoch" default:"1" help:"Life of the writer: a greater one begins anew and fences the older."`
	IDPrefix string `name:"id-prefix" placeholder:"TEXT" help:"Put this before the ids of messages, calls and runs, to publish one recording to one session twice."`
	JSON     bool   `name:"json" help:"Print one line for each acknowledgement, as it comes."`
}

// acknowledged is one line of --json.
type acknowledged struct {
	First      uint64 `json:"first_seq"`
	Last       uint64 `json:"last_seq"`
	Duplicate  bool   `json:"duplicate,omitempty"`
	Epoch      string `json:"epoch"`
	Durability string `json:"durability"`
}

// Run publishes until the input ends, and returns when all of it is stored.
func (c *publishCommand) Run(ctx context.Context, env *environment) error {
	format, err := recording.ParseFormat(c.Format)
	if err != nil {
		return usageError{err}
	}
	if _, err := schema.ParseSessionID("any", c.Session); err != nil {
		return usageError{err}
	}
	in, closeInput, err := c.open(env)
	if err != nil {
		return err
	}
	defer closeInput()
	l, err := c.connect(ctx, env)
	if err != nil {
		return err
	}
	var sum summary
	// Its life is not the command's: what it took when a signal comes is still stored.
	p := l.Publisher(context.WithoutCancel(ctx), client.PublishOptions{
		Session: c.Session, Producer: c.Producer, Epoch: c.Epoch,
		Acked: func(a client.Ack) {
			sum.add(a)
			if c.JSON {
				b, err := json.Marshal(acknowledged{a.First, a.Last, a.Duplicate, a.Epoch, schema.DurabilityWord(a.Durability)})
				if err == nil {
					fmt.Fprintln(env.stdout, string(b))
				}
			}
		},
		Lost: func(err error) {
			what := "connection lost, publishing goes on when it is back"
			if _, said := errors.AsType[*schema.Refusal](err); said {
				what = "refused for now, trying again"
			}
			fmt.Fprintf(env.stderr, "%s: %s\n", what, sentence(err))
		},
	})
	published := c.publish(ctx, p, recording.NewDecoder(in, recording.Config{Format: format, IDPrefix: c.IDPrefix}))
	flushing, cancel := c.flushContext(ctx)
	defer cancel()
	stored := p.Close(flushing)
	if errors.Is(stored, context.DeadlineExceeded) {
		stored = fmt.Errorf("not everything was acknowledged within %s; what is missing may be stored or not", flushWithin)
	}
	closed := l.close()
	if !c.JSON || published != nil || stored != nil {
		out := env.stdout
		if c.JSON {
			out = env.stderr
		}
		fmt.Fprintln(out, sum.sentence(c.Session))
	}
	if stored != nil {
		return stored // the cause, where Publish failed too
	}
	return errors.Join(published, closed)
}

// flushContext bounds the wait for acknowledgements only once the command was told to stop.
func (c *publishCommand) flushContext(ctx context.Context) (context.Context, context.CancelFunc) {
	flushing, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, func() {
		t := time.AfterFunc(flushWithin, func() { cancel(context.DeadlineExceeded) })
		context.AfterFunc(flushing, func() { t.Stop() })
	})
	return flushing, func() {
		stop()
		cancel(nil)
	}
}

// open opens the input. Reading standard input cannot be interrupted; closing it lets the process end all the same.
func (c *publishCommand) open(env *environment) (io.Reader, func(), error) {
	if c.File == "" || c.File == "-" {
		return env.stdin, func() {}, nil
	}
	f, err := os.Open(c.File)
	if err != nil {
		return nil, nil, fmt.Errorf("the input cannot be read: %w", err)
	}
	return f, func() { _ = f.Close() }, nil
}

// publish publishes step by step, until the input ends or ctx does.
func (c *publishCommand) publish(ctx context.Context, p *client.Publisher, d *recording.Decoder) error {
	type next struct {
		step recording.Step
		err  error
	}
	// The reading blocks in the input, where no signal reaches it: it has a goroutine of its own, which ends with the process where the input does not end before.
	steps := make(chan next)
	go func() {
		defer close(steps)
		for {
			s, err := d.Next()
			select {
			case steps <- next{s, err}:
			case <-ctx.Done():
				return
			}
			if err != nil {
				return
			}
		}
	}()
	for {
		var n next
		select {
		case n = <-steps:
		case <-ctx.Done():
			return nil
		}
		switch {
		case errors.Is(n.err, io.EOF):
			return nil
		case n.err != nil:
			return n.err
		}
		if c.Pace && !wait(ctx, n.step.After) {
			return nil
		}
		if err := p.Publish(ctx, n.step.Envelope); err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
	}
}

// wait waits so long; false where ctx ended before.
func wait(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// summary is what became of a publish. Its acks come from one goroutine, which has ended when it is read.
type summary struct {
	envelopes, duplicates uint64
	first, last           uint64
	epoch                 string
	durability            schema.Durability
}

func (s *summary) add(a client.Ack) {
	n := a.Last - a.First + 1
	if s.envelopes == 0 {
		s.first = a.First
	}
	s.envelopes += n
	if a.Duplicate {
		s.duplicates += n
	}
	s.last, s.epoch, s.durability = a.Last, a.Epoch, a.Durability
}

func (s *summary) sentence(session string) string {
	if s.envelopes == 0 {
		return fmt.Sprintf("nothing was stored in session %q", session)
	}
	text := fmt.Sprintf("stored %d envelopes in session %q: seq %d to %d, %s, epoch %s", s.envelopes, session, s.first, s.last, schema.DurabilityWord(s.durability), s.epoch)
	if s.duplicates > 0 {
		text += fmt.Sprintf("; %d of them were there before", s.duplicates)
	}
	return text
}
