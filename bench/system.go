package bench

import (
	"bufio"
	"context"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	"tidemark/schema"
)

// is asks the edge for its durability class and refuses another one than was wanted.
func (s *System) is(ctx context.Context, class schema.Durability) error {
	have, err := s.Durability(ctx)
	if err == nil && have != class {
		err = fmt.Errorf("bench: the system's durability is %s, not %s", schema.DurabilityWord(have), schema.DurabilityWord(class))
	}
	return err
}

// Durability asks the edge what its acknowledgements promise.
func (s *System) Durability(ctx context.Context) (schema.Durability, error) {
	c, err := dial(ctx, s.Edge, s.Token)
	if err != nil {
		return 0, err
	}
	defer context.AfterFunc(ctx, c.close)()
	defer c.close()
	hello, err := proto.Marshal(&schema.ClientFrame{Frame: &schema.ClientFrame_Hello{Hello: &schema.Hello{Client: "tidemark bench"}}})
	if err != nil {
		return 0, err
	}
	if err := c.send(hello); err != nil {
		return 0, err
	}
	msg, err := c.next()
	if err != nil {
		return 0, err
	}
	f := new(schema.ServerFrame)
	if proto.Unmarshal(msg, f) != nil || f.GetWelcome() == nil {
		return 0, errMalformed
	}
	return f.GetWelcome().GetDurability(), nil
}

const (
	// A system has settled when its process took less than a twentieth of a processor for settleFor. A projector may have work left when the last token was delivered, and that work is part of what the
	// token costs.
	settleFor = 200 * time.Millisecond
	// settleWithin is how long that may take; a system that others use, too, never settles.
	settleWithin = 20 * time.Second
)

// settle waits until the system has nothing to do and returns the processor time that its process has taken; 0 where it does not say.
func (s *System) settle(ctx context.Context) (time.Duration, error) {
	until := time.Now().Add(settleWithin)
	for last := -settleFor; ; {
		now, err := s.cpu(ctx)
		if err != nil || now == 0 || now-last < settleFor/20 || time.Now().After(until) {
			return now, err
		}
		last = now
		if err := pause(ctx, settleFor); err != nil {
			return 0, err
		}
	}
}

// cpu is the processor time that the edge's process has taken, from its metrics; 0 where they do not say.
func (s *System) cpu(ctx context.Context) (time.Duration, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.Edge.JoinPath("metrics").String(), nil)
	if err != nil {
		return 0, err
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, fmt.Errorf("bench: the edge's metrics cannot be read: %w", err)
	}
	defer res.Body.Close()
	for lines := bufio.NewScanner(res.Body); lines.Scan(); {
		if text, ok := strings.CutPrefix(lines.Text(), "process_cpu_seconds_total "); ok {
			seconds, err := strconv.ParseFloat(text, 64)
			if err != nil {
				return 0, nil //nolint:nilerr // as if it were not there
			}
			return time.Duration(seconds * float64(time.Second)), nil
		}
	}
	return 0, nil
}
