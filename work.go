package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"text/tabwriter"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"tidemark/internal/client"
	"tidemark/schema"
)

// workCommand is `tidemark work`.
type workCommand struct {
	Groups  workGroupsCommand  `cmd:"" set:"edge_url=grpc://HOST:PORT (grpcs:// with TLS)" help:"List the groups of workers, and how each is doing."`
	Ls      workLsCommand      `cmd:"" set:"edge_url=grpc://HOST:PORT (grpcs:// with TLS)" help:"List work that a group has not settled, or all that is kept, the oldest first."`
	Dead    workDeadCommand    `cmd:"" set:"edge_url=grpc://HOST:PORT (grpcs:// with TLS)" help:"List dead letters: work that groups gave up."`
	Redrive workRedriveCommand `cmd:"" set:"edge_url=grpc://HOST:PORT (grpcs:// with TLS)" help:"Hand dead letters to their groups again."`
	Rm      workRmCommand      `cmd:"" set:"edge_url=grpc://HOST:PORT (grpcs:// with TLS)" help:"Remove a group, with what it has in hand and what waits for it; its dead letters stay."`
	Take    workTakeCommand    `cmd:"" help:"Take work of a group: print each item as a line of JSON. An item is acknowledged as soon as its line is written; from then on whoever reads the lines answers for it."`
}

type workGroupsCommand struct {
	connectFlags
	JSON bool `name:"json" help:"Print one group a line, in JSON."`
}

// Run lists all groups of the tenant.
func (c *workGroupsCommand) Run(ctx context.Context, env *environment) error {
	l, err := c.connect(ctx, env)
	if err != nil {
		return err
	}
	groups, err := l.WorkGroups(ctx)
	if err != nil {
		return errors.Join(err, l.close())
	}
	t := newWorkTable(env, c.JSON, "GROUP", "KINDS", "SESSIONS", "WAITING", "IN HAND", "REDELIVERED", "ACK WAIT", "MAX DELIVER", "BACKOFF", "ORDERED", "CREATED")
	for _, g := range groups {
		var names, rests []string
		for _, s := range g.GetSessions() {
			names = append(names, printable(s))
		}
		for _, ms := range g.GetBackoffMs() {
			rests = append(rests, lasting(ms))
		}
		err := t.add(g, printable(g.GetGroup()), list(g.GetKinds()), list(names), fmt.Sprint(g.GetWaiting()), fmt.Sprint(g.GetInHand()), fmt.Sprint(g.GetRedelivered()),
			lasting(g.GetAckWaitMs()), fmt.Sprint(g.GetMaxDeliver()), list(rests), yes(g.GetOrdered()), when(g.GetCreated()))
		if err != nil {
			return errors.Join(err, l.close())
		}
	}
	return errors.Join(t.end(), l.close())
}

type workRmCommand struct {
	Group string `arg:"" help:"The group."`
	connectFlags
}

// Run removes the group. Whoever works for it is told, and begins it anew if it joins again.
func (c *workRmCommand) Run(ctx context.Context, env *environment) error {
	l, err := c.connect(ctx, env)
	if err != nil {
		return err
	}
	if err = l.DeleteWorkGroup(ctx, c.Group); err == nil {
		fmt.Fprintf(env.stdout, "removed group %q\n", c.Group)
	}
	return errors.Join(err, l.close())
}

type workLsCommand struct {
	Group string `arg:"" optional:"" help:"The group. Default: all that is kept, whatever became of it."`
	connectFlags
	Session string `placeholder:"NAME" help:"Only work of this session."`
	Limit   int    `default:"1000" help:"Most items to list; 0 for all."`
	JSON    bool   `name:"json" help:"Print one item a line, in JSON."`
}

// Run lists page by page.
func (c *workLsCommand) Run(ctx context.Context, env *environment) error {
	l, err := c.connect(ctx, env)
	if err != nil {
		return err
	}
	t := newWorkTable(env, c.JSON, "SESSION", "SEQ", "KIND", "STATE", "STORED", "EPOCH")
	req := &schema.ListWorkRequest{Group: c.Group, Session: c.Session, PageSize: 1000}
	more, err := pages(c.Limit, func() ([]*schema.ListedWork, string, error) {
		page, err := l.Work(ctx, req)
		req.PageToken = page.GetNextPageToken()
		return page.GetItems(), req.PageToken, err
	}, func(it *schema.ListedWork) error {
		state := strings.ToLower(strings.TrimPrefix(it.GetState().String(), "WORK_ITEM_STATE_"))
		if it.GetState() == schema.WorkItemState_WORK_ITEM_STATE_UNSPECIFIED {
			state = "-"
		}
		return t.add(it, printable(it.GetSession()), fmt.Sprint(it.GetSeq()), it.GetKind(), state, when(it.GetStored()), it.GetEpoch())
	})
	if err != nil {
		return errors.Join(err, t.end(), l.close())
	}
	if more {
		fmt.Fprintf(env.stderr, "there are more than %d; see --limit and --session\n", c.Limit)
	}
	return errors.Join(t.end(), l.close())
}

type workDeadCommand struct {
	Group string `arg:"" optional:"" help:"Only of this group. Default: of all."`
	connectFlags
	Session  string `placeholder:"NAME" help:"Only of this session."`
	ID       string `name:"id" placeholder:"ID" help:"Only the one with this id; with --json, with its envelope."`
	Redriven bool   `help:"Those that were handed to their groups again, too."`
	Limit    int    `default:"1000" help:"Most dead letters to list; 0 for all."`
	JSON     bool   `name:"json" help:"Print one dead letter a line, in JSON."`
}

// Run lists page by page.
func (c *workDeadCommand) Run(ctx context.Context, env *environment) error {
	l, err := c.connect(ctx, env)
	if err != nil {
		return err
	}
	t := newWorkTable(env, c.JSON, "ID", "GROUP", "SESSION", "SEQ", "KIND", "ATTEMPTS", "GIVEN UP", "REDRIVEN", "REASON")
	found := false
	more, err := deadLetters(ctx, l, &schema.ListDeadLettersRequest{Group: c.Group, Session: c.Session, Id: c.ID, Redriven: c.Redriven, PageSize: 1000}, c.Limit, func(d *schema.DeadLetter) error {
		found = true
		return t.add(d, printable(d.GetId()), printable(d.GetGroup()), printable(d.GetSession()), fmt.Sprint(d.GetSeq()), d.GetKind(), fmt.Sprint(d.GetAttempts()),
			when(d.GetTime()), when(d.GetRedriven()), printable(d.GetReason()))
	})
	if err != nil {
		return errors.Join(err, t.end(), l.close())
	}
	if !found {
		err = thereIs(ctx, l, c.Group)
	}
	if more {
		fmt.Fprintf(env.stderr, "there are more than %d; see --limit and --session\n", c.Limit)
	}
	return errors.Join(err, t.end(), l.close())
}

// thereIs is the error of a group that is not there, which a name that was mistyped is not. Dead letters outlive their group, so it is asked where there are none.
func thereIs(ctx context.Context, l *link, group string) error {
	if group == "" {
		return nil
	}
	_, err := l.Work(ctx, &schema.ListWorkRequest{Group: group, PageSize: 1})
	return err
}

func deadLetters(ctx context.Context, l *link, req *schema.ListDeadLettersRequest, limit int, each func(*schema.DeadLetter) error) (more bool, err error) {
	return pages(limit, func() ([]*schema.DeadLetter, string, error) {
		page, err := l.DeadLetters(ctx, req)
		req.PageToken = page.GetNextPageToken()
		return page.GetLetters(), req.PageToken, err
	}, each)
}

type workRedriveCommand struct {
	ID []string `arg:"" optional:"" name:"id" help:"The dead letters, as tidemark work dead names them."`
	connectFlags
	Group string `placeholder:"NAME" help:"All dead letters of this group, instead of some by their ids."`
}

// Validate is called by kong.
func (c *workRedriveCommand) Validate() error {
	if (len(c.ID) == 0) == (c.Group == "") {
		return errors.New("name dead letters by their ids, or a group with --group")
	}
	return nil
}

// redriveAtOnce is how many dead letters are redriven in one call, at most.
const redriveAtOnce = 1000

// Run redrives them in parts, each of which fails as a whole where one of its letters is not there. Started again after it failed, it goes on: what was redriven is not again.
func (c *workRedriveCommand) Run(ctx context.Context, env *environment) error {
	l, err := c.connect(ctx, env)
	if err != nil {
		return err
	}
	ids := c.ID
	if c.Group != "" {
		_, err = deadLetters(ctx, l, &schema.ListDeadLettersRequest{Group: c.Group, PageSize: 1000}, 0, func(d *schema.DeadLetter) error {
			ids = append(ids, d.GetId())
			return nil
		})
		if err == nil && len(ids) == 0 {
			err = thereIs(ctx, l, c.Group)
		}
	}
	redriven, before, parts := 0, 0, 0
	for err == nil && len(ids) > 0 {
		n := min(len(ids), redriveAtOnce)
		var now, was int
		if now, was, err = l.Redrive(ctx, ids[:n]); err == nil {
			redriven, before, parts, ids = redriven+now, before+was, parts+1, ids[n:]
		}
	}
	// Of a part that failed the sums are not known; the error says what became of it.
	if err == nil || parts > 0 {
		fmt.Fprintf(env.stdout, "redriven: %d\n", redriven)
		if before > 0 {
			fmt.Fprintf(env.stdout, "redriven before: %d\n", before)
		}
	}
	if err != nil && parts > 0 {
		fmt.Fprintf(env.stderr, "%d of the dead letters are not among these sums; run the command again for them\n", len(ids))
	}
	return errors.Join(err, l.close())
}

type workTakeCommand struct {
	Group string `arg:"" help:"The group. It begins with its first worker."`
	connectFlags
	Kinds      []string        `placeholder:"TYPE" help:"What the group takes: tool_call, start_run, user_message, user_input, cancel. Default: as it has it; all for a new one. It can only be widened."`
	Sessions   []string        `placeholder:"NAME" help:"Sessions, and prefixes that end in *, that the group takes work of. Default: as it has it; all for a new one. It can only be widened."`
	AckWait    time.Duration   `help:"How long a worker of the group may be silent about an item. Default: as it has it; 30s for a new one."`
	MaxDeliver int             `placeholder:"N" help:"How often an item is handed out before it is a dead letter. Default: as the group has it; 5 for a new one."`
	Backoff    []time.Duration `help:"How long an item rests that was given back, by its attempt; the last for all that follow. Default: as the group has it; none for a new one."`
	Ordered    bool            `help:"Let a new group hand out the work of one session one by one and in its order."`
	Credit     int             `placeholder:"N" default:"1" help:"Most items in hand at once."`
	FromNow    bool            `help:"Let a new group begin with what comes from now on."`
	Limit      int             `placeholder:"N" help:"End after so many items."`
}

// Run prints items until the process is told to stop. An item whose line could not be written goes back.
func (c *workTakeCommand) Run(ctx context.Context, env *environment) error {
	l, err := c.connect(ctx, env)
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	var printing sync.Mutex // guards the two below, and the output
	taken := 0
	var gone error
	if c.AckWait != 0 && c.AckWait < schema.MinAckWaitMs*time.Millisecond {
		return usage("--ack-wait %s is too short; %d ms is the least", c.AckWait, schema.MinAckWaitMs)
	}
	w := l.Worker(client.WorkOptions{
		Group: c.Group, Kinds: c.Kinds, Sessions: c.Sessions, AckWait: c.AckWait, MaxDeliver: c.MaxDeliver, FromNow: c.FromNow,
		Backoff: c.Backoff, Ordered: c.Ordered, Credit: c.Credit,
		Lost: func(err error) { fmt.Fprintf(env.stderr, "connection lost: %s\n", sentence(err)) },
	}, func(_ context.Context, it *client.Item) error {
		line, err := takenLine(it)
		printing.Lock()
		defer printing.Unlock()
		if ctx.Err() != nil {
			// Others were in hand beside the last that was wanted.
			return ctx.Err()
		}
		if err == nil {
			_, err = env.stdout.Write(line)
		}
		if err != nil {
			gone = fmt.Errorf("the output is gone: %w", err)
			stop()
			return err
		}
		if taken++; taken == c.Limit {
			stop()
		}
		return nil
	})
	err = w.Run(ctx)
	return errors.Join(err, gone, l.close())
}

func takenLine(it *client.Item) ([]byte, error) {
	// Marshalled without the envelope, which comes out byte for byte behind the rest.
	line, err := json.Marshal(struct {
		Session   string `json:"session"`
		Epoch     string `json:"epoch"`
		Attempt   int    `json:"attempt"`
		Cancelled bool   `json:"cancelled,omitempty"`
	}{it.Session, it.Epoch, it.Attempt, it.Cancelled})
	if err != nil {
		return nil, err
	}
	line = append(line[:len(line)-1], `,"envelope":`...)
	line = schema.AppendJSON(line, it.Envelope)
	return append(line, "}\n"...), nil
}

// pages goes over a listing, at most so far (0: to its end); more says that there was more.
func pages[T any](limit int, page func() (items []T, next string, err error), each func(T) error) (more bool, err error) {
	for left := limit; ; {
		items, next, err := page()
		if err != nil {
			return false, err
		}
		for _, it := range items {
			if limit > 0 && left == 0 {
				return true, nil
			}
			left--
			if err := each(it); err != nil {
				return false, err
			}
		}
		if next == "" {
			return false, nil
		}
	}
}

// workTable prints what a listing has: as a table, or in JSON, one a line.
type workTable struct {
	env  *environment
	json bool
	head []string
	tab  *tabwriter.Writer
	rows int
}

func newWorkTable(env *environment, json bool, head ...string) *workTable {
	return &workTable{env: env, json: json, head: head, tab: tabwriter.NewWriter(env.stdout, 0, 0, 2, ' ', 0)}
}

func (t *workTable) add(m proto.Message, cells ...string) error {
	if t.json {
		b, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(m)
		if err != nil {
			return err
		}
		_, err = fmt.Fprintln(t.env.stdout, string(b))
		return err
	}
	if t.rows == 0 {
		t.row(t.head)
	}
	t.rows++
	t.row(cells)
	return nil
}

func (t *workTable) row(cells []string) {
	fmt.Fprintln(t.tab, strings.Join(cells, "\t")) // a tabwriter remembers its error for Flush
}

func (t *workTable) end() error { return t.tab.Flush() }

// The cells of tables.

func when(at *timestamppb.Timestamp) string {
	if at == nil {
		return "-"
	}
	return at.AsTime().Format(time.RFC3339)
}

func lasting(ms uint64) string { return (time.Duration(ms) * time.Millisecond).String() }

func list(words []string) string {
	if len(words) == 0 {
		return "-"
	}
	return strings.Join(words, ",")
}

func yes(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}
