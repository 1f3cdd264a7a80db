package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"google.golang.org/protobuf/encoding/protojson"

	"tidemark/schema"
)

// sessionsCommand is `tidemark sessions`.
type sessionsCommand struct {
	Ls   sessionsLsCommand   `cmd:"" help:"List sessions, the longest unchanged first."`
	Show sessionsShowCommand `cmd:"" help:"Show where sessions stand now."`
	Rm   sessionsRmCommand   `cmd:"" help:"Remove sessions with all their envelopes."`
}

type sessionsLsCommand struct {
	connectFlags
	Prefix string `placeholder:"TEXT" help:"Only sessions whose name begins so."`
	Status string `placeholder:"STATUS" help:"Only sessions that stand so: open, running, waiting_for_input, completed, failed, cancelled."`
	Limit  int    `default:"1000" help:"Most sessions to list; 0 for all."`
	JSON   bool   `name:"json" help:"Print one session a line, in JSON."`
}

// Run lists page by page.
func (c *sessionsLsCommand) Run(ctx context.Context, env *environment) error {
	status := schema.Status(schema.Status_value["STATUS_"+strings.ToUpper(c.Status)])
	if c.Status != "" && (status == schema.Status_STATUS_UNSPECIFIED || schema.StatusWord(status) != c.Status) {
		return usage("--status %s is none that sessions have: open, running, waiting_for_input, completed, failed, cancelled", c.Status)
	}
	l, err := c.connect(ctx, env)
	if err != nil {
		return err
	}
	t := newSessionTable(env, c.JSON, false)
	left, more := c.Limit, false
	req := &schema.ListSessionsRequest{PageSize: 1000, Prefix: c.Prefix, Status: status}
	for {
		page, err := l.Sessions(ctx, req)
		if err != nil {
			return errors.Join(err, l.close())
		}
		for _, s := range page.GetSessions() {
			if more = c.Limit > 0 && left == 0; more {
				break
			}
			left--
			if err := t.add(s); err != nil {
				return errors.Join(err, l.close())
			}
		}
		if req.PageToken = page.GetNextPageToken(); req.PageToken == "" || more {
			break
		}
	}
	if more {
		fmt.Fprintf(env.stderr, "there are more than %d; see --limit and --prefix\n", c.Limit)
	}
	return errors.Join(t.end(), l.close())
}

type sessionsShowCommand struct {
	Session []string `arg:"" help:"The sessions."`
	connectFlags
	JSON bool `name:"json" help:"Print one session a line, in JSON."`
}

// Run shows each session that is there, and fails where one is not.
func (c *sessionsShowCommand) Run(ctx context.Context, env *environment) error {
	l, err := c.connect(ctx, env)
	if err != nil {
		return err
	}
	t := newSessionTable(env, c.JSON, true)
	var failed error
	for _, name := range c.Session {
		s, err := l.Session(ctx, name)
		if err == nil {
			err = t.add(s)
		}
		if err != nil {
			failed = oneBehindTheOther(env, failed, err)
		}
	}
	return errors.Join(t.end(), failed, l.close())
}

type sessionsRmCommand struct {
	Session []string `arg:"" help:"The sessions."`
	connectFlags
}

// Run removes each session that is there, and fails where one is not.
func (c *sessionsRmCommand) Run(ctx context.Context, env *environment) error {
	l, err := c.connect(ctx, env)
	if err != nil {
		return err
	}
	var failed error
	for _, name := range c.Session {
		if err := l.Delete(ctx, name); err != nil {
			failed = oneBehindTheOther(env, failed, err)
			continue
		}
		fmt.Fprintf(env.stdout, "removed session %q\n", name)
	}
	return errors.Join(failed, l.close())
}

// oneBehindTheOther tells of a failure when the next one comes, so that each has a line of its own; the last is the command's.
func oneBehindTheOther(env *environment, before, err error) error {
	if before != nil {
		complain(env, before, exitFailed)
	}
	return err
}

// sessionTable prints sessions.
type sessionTable struct {
	env  *environment
	json bool
	// live: it is known which seq is the first that can still be read. The registry, which listings come from, does not know.
	live bool
	tab  *tabwriter.Writer
	rows int
}

func newSessionTable(env *environment, json, live bool) *sessionTable {
	return &sessionTable{env: env, json: json, live: live, tab: tabwriter.NewWriter(env.stdout, 0, 0, 2, ' ', 0)}
}

func (t *sessionTable) add(s *schema.Session) error {
	if t.json {
		b, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(s)
		if err != nil {
			return err
		}
		_, err = fmt.Fprintln(t.env.stdout, string(b))
		return err
	}
	if t.rows == 0 {
		t.row("FIRST", "SESSION", "KIND", "STATUS", "HEAD", "CREATED", "UPDATED", "EPOCH")
	}
	t.rows++
	t.row(fmt.Sprint(s.GetFirstSeq()), printable(s.GetSession()), kindWord(s.GetKind()), schema.StatusWord(s.GetStatus()), fmt.Sprint(s.GetHeadSeq()),
		s.GetCreated().AsTime().Format(time.RFC3339), s.GetUpdated().AsTime().Format(time.RFC3339), s.GetEpoch())
	return nil
}

// row writes a line, with the first seq before the head where that is known.
func (t *sessionTable) row(first string, cells ...string) {
	if t.live {
		cells = slices.Insert(cells, 3, first)
	}
	fmt.Fprintln(t.tab, strings.Join(cells, "\t")) // a tabwriter remembers its error for Flush
}

// kindWord is the kind of a session.
func kindWord(k schema.SessionKind) string {
	return strings.ToLower(strings.TrimPrefix(k.String(), "SESSION_KIND_"))
}

func (t *sessionTable) end() error { return t.tab.Flush() }

// printable is a name that leaves the table and the terminal as they are: as it is where that does, otherwise quoted.
func printable(name string) string {
	if strings.ContainsFunc(name, func(r rune) bool { return !unicode.IsPrint(r) || r == '"' }) || strings.TrimSpace(name) != name {
		return fmt.Sprintf("%q", name)
	}
	return name
}
