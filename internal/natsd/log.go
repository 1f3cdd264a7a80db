package natsd

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
)

// bridge hands the server's log to slog. What the server notes about its own life is for whoever debugs it, so notices go to the level debug. It never ends the process, as the server's
// own logger does on a fatal error: Start reports it instead.
type bridge struct {
	log *slog.Logger

	mu    sync.Mutex
	fatal string // the first fatal error; guarded by mu
}

func (b *bridge) put(level slog.Level, format string, args []any) {
	ctx := context.Background() //nolint:forbidigo // the server's logger carries no context
	if b.log.Enabled(ctx, level) {
		b.log.Log(ctx, level, fmt.Sprintf(format, args...), "from", "nats-server") //nolint:sloglint // the sentences are the server's
	}
}

func (b *bridge) Noticef(format string, v ...any) { b.put(slog.LevelDebug, format, v) }
func (b *bridge) Warnf(format string, v ...any)   { b.put(slog.LevelWarn, format, v) }
func (b *bridge) Errorf(format string, v ...any)  { b.put(slog.LevelError, format, v) }
func (b *bridge) Debugf(format string, v ...any)  { b.put(slog.LevelDebug, format, v) }
func (b *bridge) Tracef(format string, v ...any)  { b.put(slog.LevelDebug, format, v) }

func (b *bridge) Fatalf(format string, v ...any) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.fatal == "" {
		b.fatal = fmt.Sprintf(format, v...)
	}
}

func (b *bridge) failed() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.fatal
}
