package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"

	"tidemark/internal/demo"
	"tidemark/internal/recording"
)

// demoCommand shows a session survive what usually breaks one, and counts.
type demoCommand struct {
	Input string  `placeholder:"FILE" help:"A recorded stream to play instead of the built-in one: chat completions, responses or messages chunks, one JSON object a line."`
	Speed float64 `default:"1" help:"How many times faster than its natural pace."`
}

// Validate is called by kong.
func (c *demoCommand) Validate() error {
	if c.Speed <= 0 {
		return errors.New("--speed must be above 0")
	}
	return nil
}

// Run is called by kong.
func (c *demoCommand) Run(ctx context.Context, env *environment) error {
	rec, err := c.recording()
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	fmt.Fprintf(env.stdout, "An agent streams %d envelopes over gRPC to two people, in about %.0f s. Ada's connection is cut three times, and an edge is killed once.\n\n",
		len(rec.Steps), rec.Duration().Seconds()/c.Speed)
	cfg := demo.Config{Recording: rec, Speed: c.Speed, Self: self, Out: env.stdout}
	if env.log.Enabled(ctx, slog.LevelDebug) {
		cfg.Logger = env.log // otherwise the screen is for the play
	}
	report, err := demo.Run(ctx, cfg)
	if err != nil {
		return err
	}
	fmt.Fprintln(env.stdout)
	if err := report.Print(env.stdout); err != nil {
		return err
	}
	if !report.OK() {
		return errors.New("the demo did not come out as it must; the table says where")
	}
	return nil
}

func (c *demoCommand) recording() (*recording.Recording, error) {
	if c.Input == "" {
		return recording.Own(recording.Config{})
	}
	f, err := os.Open(c.Input)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return recording.Read(f, recording.Config{})
}
