package bench

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"time"

	"github.com/oklog/ulid/v2"

	"tidemark/schema"
)

// System is a running system to load.
type System struct {
	// Edge is the URL of a WebSocket edge: http://HOST:PORT or https://.
	Edge *url.URL
	// Token lets its bearer publish to and follow sessions whose names begin with [SessionPrefix].
	Token string
	// NATS is the URL of the system's NATS server, with user and password where it wants them, for the baseline. Empty for none: then nothing is compared.
	NATS string
	// Stop ends the system, and removes what it stored. Nil where it goes on.
	Stop func() error
}

// SessionPrefix begins the names of all sessions that a bench makes.
const SessionPrefix = "bench-"

// Config says what to measure.
type Config struct {
	// Start starts a new system of a durability class, in every round one for each class.
	Start func(ctx context.Context, class schema.Durability) (*System, error)
	// Classes to measure. The target for fsync is a part of what os does, measured in the same round, so where both are wanted both are here. Default: os, fsync.
	Classes []schema.Durability
	// Sessions are the numbers of sessions to flood. Default: 50, 200.
	Sessions []int
	// Rounds is how often each load is put on; medians are reported. Default 3.
	Rounds int
	// Warmup and Measure are how long a load is put on before it is measured, and while it is: longer where no token came by then. Default 1 s and 3 s.
	Warmup, Measure time.Duration
	// Window is how many tokens of a session are sent and not yet acknowledged at full speed. Default 256.
	Window int
	// TokenBytes is a token's envelope as the agent sends it, encoded; default 110. RawBytes is a message of the baseline; default 128.
	TokenBytes, RawBytes int
	// LatencyRate is how many tokens a second go into the one session whose latency is measured. Default 1,000.
	LatencyRate int
	// Version of the program, for the report.
	Version string
	// Progress is told what was measured, one line at a time. Optional.
	Progress func(line string)
}

func (c *Config) setDefaults() error {
	if c.Start == nil {
		return errors.New("bench: Config needs Start")
	}
	if len(c.Classes) == 0 {
		c.Classes = []schema.Durability{schema.Durability_DURABILITY_OS, schema.Durability_DURABILITY_FSYNC}
	}
	if len(c.Sessions) == 0 {
		c.Sessions = []int{50, 200}
	}
	for value, standard := range map[*int]int{&c.Rounds: 3, &c.Window: 256, &c.TokenBytes: 110, &c.RawBytes: 128, &c.LatencyRate: 1000} {
		if *value == 0 {
			*value = standard
		}
		if *value < 0 {
			return errors.New("bench: a number in Config is negative")
		}
	}
	if c.Warmup == 0 {
		c.Warmup = time.Second
	}
	if c.Measure == 0 {
		c.Measure = 3 * time.Second
	}
	if c.Progress == nil {
		c.Progress = func(string) {}
	}
	return nil
}

// Run measures, and returns the report: of a system that lost or repeated something, too, which the report says. The error is why it could not be measured.
func Run(ctx context.Context, cfg Config) (*Report, error) {
	if err := cfg.setDefaults(); err != nil {
		return nil, err
	}
	r := &run{cfg: cfg, results: make(map[key][]result)}
	for round := range cfg.Rounds {
		if err := r.round(ctx, round); err != nil {
			return nil, err
		}
	}
	return r.report(), nil
}

// key names a load: on Tidemark, or its baseline.
type key struct {
	class    schema.Durability
	sessions int
	rate     int
	raw      bool
}

// result is one round of a load.
type result struct {
	*Outcome
	// Processor time for each token sent, until there was nothing left to do, of the system's process and of this one. Negative where it is not known.
	server, client time.Duration
}

// run gathers the results of a bench.
type run struct {
	cfg     Config
	results map[key][]result
}

// round starts a system of each class and puts every load on each.
func (r *run) round(ctx context.Context, n int) (err error) {
	var systems []*System
	defer func() {
		for _, s := range systems {
			if s.Stop != nil {
				err = errors.Join(err, s.Stop())
			}
		}
	}()
	for _, class := range r.cfg.Classes {
		s, err := r.cfg.Start(ctx, class)
		if err != nil {
			return err
		}
		systems = append(systems, s)
		if err := s.is(ctx, class); err != nil {
			return err
		}
		if _, err := s.settle(ctx); err != nil {
			return err
		}
	}
	loads := make([]Load, 0, len(r.cfg.Sessions)+1)
	for _, sessions := range r.cfg.Sessions {
		loads = append(loads, Load{Sessions: sessions, Window: r.cfg.Window})
	}
	loads = append(loads, Load{Sessions: 1, Rate: r.cfg.LatencyRate})
	for _, l := range loads {
		l.Warmup, l.Measure = r.cfg.Warmup, r.cfg.Measure
		for i, class := range r.cfg.Classes {
			// In every other round the baseline comes first, so that neither always has what the other left behind.
			for _, raw := range []bool{n%2 == 1, n%2 == 0} {
				if raw && systems[i].NATS == "" {
					continue
				}
				if err := r.put(ctx, n, l, class, raw, systems[i]); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// put puts a load on a system, or on raw JetStream beside it, and waits until the system has done all that it made it do.
func (r *run) put(ctx context.Context, n int, l Load, class schema.Durability, raw bool, s *System) error {
	name := SessionPrefix + strings.ToLower(ulid.Make().String())
	serverFrom, err := s.cpu(ctx)
	if err != nil {
		return err
	}
	clientFrom := ownCPU()
	var out *Outcome
	if raw {
		l.TokenBytes = r.cfg.RawBytes
		out, err = l.runRaw(ctx, s.NATS, name, class)
	} else {
		l.TokenBytes = r.cfg.TokenBytes
		out, err = l.run(ctx, s.Edge, s.Token, name)
	}
	k := key{class, l.Sessions, l.Rate, raw}
	if err != nil {
		return fmt.Errorf("%s: %w", k, err)
	}
	res := result{Outcome: out, server: -1, client: -1}
	if to := ownCPU(); to > 0 {
		res.client = (to - clientFrom) / time.Duration(out.Sent)
	}
	serverTo, err := s.settle(ctx)
	if err != nil {
		return err
	}
	if serverTo > 0 {
		res.server = (serverTo - serverFrom) / time.Duration(out.Sent)
	}
	r.results[k] = append(r.results[k], res)
	r.cfg.Progress(fmt.Sprintf("round %d of %d: %s: %s", n+1, r.cfg.Rounds, k, res))
	return nil
}

// String says what the load is.
func (k key) String() string {
	who := "tidemark"
	if k.raw {
		who = "raw JetStream"
	}
	return fmt.Sprintf("%s, %s, class %s", who, k.load(), schema.DurabilityWord(k.class))
}

func (k key) load() string {
	sessions := "1 session"
	if k.sessions != 1 {
		sessions = fmt.Sprintf("%d sessions", k.sessions)
	}
	if k.rate == 0 {
		return sessions + " at full speed"
	}
	return fmt.Sprintf("%s at %s tokens/s", sessions, grouped(float64(k.rate)))
}

// String is the result for people.
func (r result) String() string {
	s := fmt.Sprintf("%s tokens/s, p50 %.2f ms, p99 %.2f ms", grouped(r.Rate()), r.quantile(50), r.quantile(99))
	if r.server >= 0 {
		s += fmt.Sprintf(", server %.2f µs a token", micro(r.server))
	}
	if r.Faults != (Faults{}) {
		s += fmt.Sprintf("; %d LOST, %d REPEATED, %d WRONG", r.Lost, r.Repeated, r.Wrong)
	}
	return s
}

// quantile is a latency in milliseconds.
func (o *Outcome) quantile(q float64) float64 { return float64(o.Latency.ValueAtQuantile(q)) / 1000 }

func micro(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }
