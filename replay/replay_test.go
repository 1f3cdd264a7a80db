package replay_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/oklog/ulid/v2"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"tidemark/broker"
	edgegrpc "tidemark/edge-grpc"
	"tidemark/internal/auth"
	"tidemark/internal/client"
	"tidemark/internal/gateway"
	"tidemark/replay"
	"tidemark/schema"
)

// session is events as a client is told them.
type session []client.Event

// of makes a session of envelopes, numbered, with ids, and a second between them.
func of(envelopes ...*schema.Envelope) session {
	s := session{{Attached: &schema.Attached{Epoch: ulid.Make().String(), FirstSeq: 1, HeadSeq: uint64(len(envelopes))}}}
	for i, e := range envelopes {
		e.Seq, e.Id, e.Time = uint64(i+1), ulid.Make().String(), timestamppb.New(time.Date(2025, 11, 4, 10, 0, i, 0, time.UTC))
		if e.Source == nil {
			e.Source = &schema.Source{Subject: "bot", Role: schema.Role_ROLE_AGENT}
		}
		s = append(s, client.Event{Envelope: e})
	}
	return s
}

func (s session) events() iter.Seq2[client.Event, error] {
	return func(yield func(client.Event, error) bool) {
		for _, ev := range s {
			if !yield(ev, nil) {
				return
			}
		}
	}
}

func (s session) at(seq int) *schema.Envelope { return s[seq].Envelope }

func token(message string, channel schema.Channel, text string) *schema.Envelope {
	return &schema.Envelope{Payload: &schema.Envelope_Token{Token: &schema.Token{MessageId: message, Channel: channel, Text: text}}}
}

func text(message, text string) *schema.Envelope {
	return token(message, schema.Channel_CHANNEL_TEXT, text)
}

func completed(message, reason, text string) *schema.Envelope {
	return &schema.Envelope{Payload: &schema.Envelope_MessageCompleted{MessageCompleted: &schema.MessageCompleted{MessageId: message, FinishReason: reason, Text: text}}}
}

// conversation has one of everything.
func conversation() session {
	ada := &schema.Source{Subject: "ada", Role: schema.Role_ROLE_USER}
	return of(
		&schema.Envelope{Source: ada, Payload: &schema.Envelope_SessionCreated{SessionCreated: &schema.SessionCreated{}}},
		&schema.Envelope{Source: ada, Payload: &schema.Envelope_UserMessage{UserMessage: &schema.UserMessage{Message: "How is\nthe weather?"}}},
		&schema.Envelope{Payload: &schema.Envelope_StartRun{StartRun: &schema.StartRun{RunId: "r1"}}},
		token("m1", schema.Channel_CHANNEL_REASONING, "They ask "),
		token("m1", schema.Channel_CHANNEL_REASONING, "of weather."),
		text("m1", "I will "),
		text("m1", ""),
		text("m1", "look."),
		&schema.Envelope{Payload: &schema.Envelope_ToolCall{ToolCall: &schema.ToolCall{CallId: "c1", Name: "weather"}}},
		&schema.Envelope{Payload: &schema.Envelope_ToolCall{ToolCall: &schema.ToolCall{CallId: "c1", ArgumentsDelta: `{"city":`}}},
		&schema.Envelope{Payload: &schema.Envelope_WorkflowProgress{WorkflowProgress: &schema.WorkflowProgress{Step: "look", Message: "asking", Progress: new(0.5)}}},
		&schema.Envelope{Payload: &schema.Envelope_ToolCall{ToolCall: &schema.ToolCall{CallId: "c1", ArgumentsDelta: `"Bern"}`, Done: true}}},
		&schema.Envelope{Payload: &schema.Envelope_ToolResult{ToolResult: &schema.ToolResult{CallId: "c1", ResultJson: `{"sky":"blue"}`}}},
		&schema.Envelope{Payload: &schema.Envelope_ToolCall{ToolCall: &schema.ToolCall{CallId: "c2", Name: "sing", ArgumentsJson: `{}`, Done: true}}},
		&schema.Envelope{Payload: &schema.Envelope_ToolResult{ToolResult: &schema.ToolResult{CallId: "c2", Error: "hoarse"}}},
		text("m1", " It is blue."),
		completed("m1", "length", ""),
		completed("m2", "stop", "A message that came whole."),
		&schema.Envelope{Payload: &schema.Envelope_WaitingForInput{WaitingForInput: &schema.WaitingForInput{Prompt: "More?", Options: []string{"yes", "no"}}}},
		&schema.Envelope{Source: ada, Payload: &schema.Envelope_UserInput{UserInput: &schema.UserInput{ResponseJson: `"no"`}}},
		&schema.Envelope{Payload: &schema.Envelope_ChatError{ChatError: &schema.ChatError{Error: "It rains."}}},
		&schema.Envelope{Payload: &schema.Envelope_Error{Error: &schema.Error{Error: "Lost.", Details: "in fog", Recoverable: new(true)}}},
		&schema.Envelope{Payload: &schema.Envelope_Custom{Custom: &schema.Custom{Type: "cite", Data: []byte(`{"a":1}`)}}},
		&schema.Envelope{Payload: &schema.Envelope_Custom{Custom: &schema.Custom{Type: "image", Data: []byte{0xff, 0xd8}}}},
		&schema.Envelope{Source: ada, Payload: &schema.Envelope_Cancel{Cancel: &schema.Cancel{Target: &schema.Cancel_RunId{RunId: "r1"}, Reason: "enough"}}},
		&schema.Envelope{Payload: &schema.Envelope_RunStatus{RunStatus: &schema.RunStatus{RunId: "r1", Status: schema.Status_STATUS_CANCELLED, Reason: "by Ada"}}},
		&schema.Envelope{Payload: &schema.Envelope_System{System: &schema.System{Message: "Closed."}}},
		&schema.Envelope{Payload: &schema.Envelope_ToolCall{ToolCall: &schema.ToolCall{CallId: "c3", Name: "never", ArgumentsDelta: `{"a`}}},
		&schema.Envelope{Payload: &schema.Envelope_AgentMessage{AgentMessage: &schema.AgentMessage{Message: "Bye."}}},
	)
}

const transcript = `· session created by ada (user)
ada (user): How is
the weather?
· run r1 starts
bot (agent) thinks: They ask of weather.
bot (agent): I will look.
· look: asking (50 %)
→ weather({"city":"Bern"})
← weather: {"sky":"blue"}
→ sing({})
← sing failed: hoarse
bot (agent): …  It is blue.
· the message ended: length
bot (agent): A message that came whole.
? More? [yes | no]
! ada (user): "no"
✗ It rains.
✗ Lost.: in fog (the run goes on)
· cite: {"a":1}
· image: 2 bytes
· ada (user) cancels run r1, enough
· run r1: cancelled, by Ada
· Closed.
bot (agent): Bye.
→ never({"a)… (not complete)
`

func show(t *testing.T, s session, color bool) string {
	t.Helper()
	var b bytes.Buffer
	if err := replay.Transcript(t.Context(), replay.NewPrinter(&b, color), s.events(), false); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func TestTranscript(t *testing.T) {
	if got := show(t, conversation(), false); got != transcript {
		t.Errorf("got:\n%s\nwant:\n%s", got, transcript)
	}
	truncated := append(session{{Truncated: &schema.Truncated{WantedSeq: 1, FirstSeq: 5}}}, of(text("m", "x"))...)
	if got, want := show(t, truncated, false), "· envelopes 1 to 4 are gone, retention took them\nbot (agent): x\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestTranscriptCannotCommandATerminal(t *testing.T) {
	evil := "a\x1b[2J\x07\u009b2J\u202eb\x7f\r"
	s := conversation()
	s = append(s, of(
		text("m", evil+"\n\tend"),
		&schema.Envelope{Source: &schema.Source{Subject: evil}, Payload: &schema.Envelope_UserMessage{UserMessage: &schema.UserMessage{Message: evil}}},
		&schema.Envelope{Payload: &schema.Envelope_System{System: &schema.System{Message: evil + "\nsecond line"}}},
		&schema.Envelope{Payload: &schema.Envelope_ToolCall{ToolCall: &schema.ToolCall{CallId: "c", Name: evil, ArgumentsJson: `"` + evil + `"`}}},
		completed("m", evil, ""),
	)[1:]...)
	for _, color := range []bool{false, true} {
		got := show(t, s, color)
		if color {
			if !strings.Contains(got, "\x1b[1m") {
				t.Error("there is no color")
			}
			for _, ours := range []string{"\x1b[0m", "\x1b[1m", "\x1b[2m", "\x1b[31m", "\x1b[36m"} {
				got = strings.ReplaceAll(got, ours, "")
			}
		}
		if strings.ContainsAny(got, "\x1b\x07\u009b\u202e\x7f\r") {
			t.Errorf("color %v: a control character came through: %q", color, got)
		}
		if !strings.Contains(got, "a␛[2J␇�2J�b␡␍\n\tend\n") || !strings.Contains(got, "⏎second line\n") {
			t.Errorf("color %v: not shown as it should be: %q", color, got)
		}
	}
}

// clock notes when each write came.
type clock struct {
	began time.Time
	at    []time.Duration
}

func (c *clock) Write(p []byte) (int, error) {
	c.at = append(c.at, time.Since(c.began))
	return len(p), nil
}

func TestTranscriptKeepsThePace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := of(text("m", "a"), text("m", "b"), text("m", "c"), text("m", "d"))
		s.at(3).Time = timestamppb.New(s.at(2).Time.AsTime().Add(time.Hour))
		s.at(4).Time = timestamppb.New(s.at(2).Time.AsTime()) // a sender's clock that was put back
		c := &clock{began: time.Now()}
		if err := replay.Transcript(t.Context(), replay.NewPrinter(c, false), s.events(), true); err != nil {
			t.Fatal(err)
		}
		if got, want := fmt.Sprint(c.at), "[0s 1s 4s]"; got != want {
			t.Errorf("written at %s, want %s", got, want)
		}
		if took := time.Since(c.began); took != 4*time.Second {
			t.Errorf("took %s", took)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
		defer cancel()
		if err := replay.Transcript(ctx, replay.NewPrinter(c, false), s.events(), true); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("cancelled: %v", err)
		}
	})
}

func TestExportIsLossless(t *testing.T) {
	s := conversation()
	var b bytes.Buffer
	n, err := replay.Export(&b, s.events())
	if err != nil || n != len(s)-1 {
		t.Fatalf("%d envelopes, %v", n, err)
	}
	for i, line := range strings.Split(strings.TrimSuffix(b.String(), "\n"), "\n") {
		e, err := schema.ParseJSON([]byte(line))
		if err != nil {
			t.Fatal(err)
		}
		if !proto.Equal(e, s.at(i+1)) {
			t.Errorf("line %d: %v, want %v", i+1, e, s.at(i+1))
		}
	}
}

func verify(t *testing.T, s session) *replay.Verdict {
	t.Helper()
	v, err := replay.Verify("s", s.events())
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func TestVerifyASoundSession(t *testing.T) {
	s := conversation()
	for i, seq := range []int{4, 5, 6, 8} {
		s.at(seq).Producer = &schema.Producer{Id: "p", Epoch: 2, Seq: uint64(i + 1)}
	}
	s.at(9).Producer = &schema.Producer{Id: "p", Epoch: 3, Seq: 1}
	// Another sender's producer of that id is another one.
	s.at(10).Producer, s.at(10).Source = &schema.Producer{Id: "p", Epoch: 2, Seq: 1}, &schema.Source{Subject: "other", Role: schema.Role_ROLE_USER}
	v := verify(t, s)
	if !v.Sound() || v.First != 1 || v.Last != 29 || v.Envelopes != 29 || v.Messages == 0 || v.Epoch == "" {
		t.Errorf("%+v", v)
	}
	var b bytes.Buffer
	if err := v.WriteText(&b); err != nil || !strings.Contains(b.String(), "verdict   sound") {
		t.Errorf("%v %s", err, &b)
	}
}

func TestDigestIsOfTheTextAlone(t *testing.T) {
	whole := verify(t, of(text("m1", "Hello, you."), completed("m1", "stop", "")))
	cut := verify(t, of(text("other", "Hel"), text("other", "lo, "), &schema.Envelope{Payload: &schema.Envelope_System{System: &schema.System{Message: "x"}}}, text("other", "you.")))
	changed := verify(t, of(text("m1", "Hello, You.")))
	if whole.TextDigest != cut.TextDigest || whole.TextDigest == changed.TextDigest || whole.TextBytes != 11 {
		t.Errorf("%+v\n%+v\n%+v", whole, cut, changed)
	}
}

func TestVerifyFinds(t *testing.T) {
	tests := map[string]struct {
		change func(s session) session
		says   string
	}{
		"a gap":               {func(s session) session { return append(s[:3], s[4:]...) }, "Seq 4 came where 3 was due"},
		"a repetition":        {func(s session) session { return append(s[:4:4], s[3:]...) }, "Seq 3 came where 4 was due"},
		"a lost end":          {func(s session) session { return s[:5] }, "ended at seq 4; its head was 6"},
		"an id twice":         {func(s session) session { s.at(5).Id = s.at(2).Id; return s }, "Seqs 2 and 5 have the same id"},
		"no id":               {func(s session) session { s.at(5).Id = ""; return s }, "is not a ULID"},
		"a producer's gap":    {func(s session) session { s.at(4).Producer.Seq = 4; return s }, `number 4 of producer "p" in its epoch 1, where 3 was due`},
		"a producer's retry":  {func(s session) session { s.at(4).Producer.Seq = 2; return s }, `number 2 of producer "p" in its epoch 1, where 3 was due`},
		"a producer's middle": {func(s session) session { s.at(2).Producer.Seq = 2; return s }, `number 2 of producer "p" in its epoch 1, where 1 was due`},
		"nobody":              {func(s session) session { s.at(5).Source = nil; return s }, "does not say who sent it"},
		"an empty id":         {func(s session) session { s.at(5).GetToken().MessageId = ""; return s }, "Seq 5 is not as it must be"},
		"another text":        {func(s session) session { s.at(6).GetMessageCompleted().Text = "abd"; return s }, "says that its text has 3 bytes"},
		"no epoch":            {func(s session) session { s[0].Attached.Epoch = ""; return s }, "epoch"},
		"a late truncation": {func(s session) session {
			return append(s[:3:3], append(session{{Truncated: &schema.Truncated{WantedSeq: 3, FirstSeq: 5}}}, s[5:]...)...)
		}, "After seq 2 the edge says that the session begins at seq 5"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			s := of(text("m", "a"), text("m", "b"), text("m", "c"), text("m2", "x"), text("m2", "y"), completed("m", "stop", "abc"))
			for i := range 3 {
				s.at(i + 2).Producer = &schema.Producer{Id: "p", Epoch: 1, Seq: uint64(i + 1)}
			}
			if v := verify(t, s); !v.Sound() {
				t.Fatalf("before the change: %q", v.Problems)
			}
			v := verify(t, tt.change(s))
			if v.Sound() || !strings.Contains(strings.Join(v.Problems, "\n"), tt.says) {
				t.Errorf("problems %q; want one that says %q", v.Problems, tt.says)
			}
		})
	}
}

func TestVerifyCountsMoreProblemsThanItTells(t *testing.T) {
	var tokens []*schema.Envelope
	for range 50 {
		tokens = append(tokens, text("", "no message"))
	}
	v := verify(t, of(tokens...))
	var b bytes.Buffer
	if err := v.WriteText(&b); err != nil {
		t.Fatal(err)
	}
	if v.Found < 50 || len(v.Problems) != replay.MaxProblems || !strings.Contains(b.String(), fmt.Sprintf("%d problems, the first 20 above", v.Found)) {
		t.Errorf("%d found, %d told\n%s", v.Found, len(v.Problems), &b)
	}
}

// edge serves a log over gRPC on loopback and returns a client of it.
func edge(t *testing.T, log *broker.MemoryLog) *client.Client {
	t.Helper()
	secret := []byte("a secret that only tests know, long enough")
	v, err := auth.NewVerifier(auth.Config{Secret: secret})
	if err != nil {
		t.Fatal(err)
	}
	g, err := gateway.New(gateway.Config{Log: log, Verify: v.Verify})
	if err != nil {
		t.Fatal(err)
	}
	e, err := edgegrpc.New(edgegrpc.Config{Gateway: g, Log: log, Verify: v.Verify})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background()) //nolint:usetesting // it ends in Cleanup, after the client
	served := make(chan error, 1)
	go func() { served <- e.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	token, err := auth.Mint(secret, auth.Principal{Subject: "ada", Role: schema.Role_ROLE_ADMIN, Sessions: []string{"*"}}, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	c, err := client.New(client.Config{Edges: []string{"grpc://" + l.Addr().String()}, Token: token})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestReadThroughAnEdge(t *testing.T) {
	log := broker.NewMemoryLog()
	c := edge(t, log)
	id := schema.SessionID{Tenant: "default", Name: "s"}
	stamp := schema.NewStamp(&schema.Source{Subject: "bot", Role: schema.Role_ROLE_AGENT})
	var want strings.Builder
	for i := range 700 {
		word := fmt.Sprint(" word", i)
		a, err := stamp.AcceptEnvelope(text("m", word), time.Now())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := broker.Append(t.Context(), log, id, broker.Submission{Envelopes: []schema.Accepted{a}}); err != nil {
			t.Fatal(err)
		}
		want.WriteString(word)
	}
	read := func(o replay.Options) iter.Seq2[client.Event, error] { return replay.Read(t.Context(), c, o) }

	events := read(replay.Options{Session: "s"})
	for range 2 { // it can be ranged over again
		v, err := replay.Verify("s", events)
		if err != nil || !v.Sound() || v.Envelopes != 700 || v.TextBytes != len(want.String()) {
			t.Fatalf("%+v %v", v, err)
		}
	}
	for _, merge := range []bool{false, true} {
		var b bytes.Buffer
		err := replay.Transcript(t.Context(), replay.NewPrinter(&b, false), read(replay.Options{Session: "s", MergeTokens: merge}), false)
		if err != nil || b.String() != "bot (agent): "+want.String()+"\n" {
			t.Errorf("merged %v: %v, %d bytes: %.200s", merge, err, b.Len(), &b)
		}
	}
	var b bytes.Buffer
	if n, err := replay.Export(&b, read(replay.Options{Session: "s", After: 690})); err != nil || n != 10 || strings.Count(b.String(), "\n") != 10 {
		t.Errorf("%d lines, %v", n, err)
	}

	log.Truncate(id, 101)
	v, err := replay.Verify("s", events)
	if err != nil || !v.Sound() || v.First != 101 || v.Gone != 100 || v.Envelopes != 600 {
		t.Errorf("after truncation: %+v %v", v, err)
	}
	if _, err := replay.Verify("other", read(replay.Options{Session: "other"})); schema.CodeOf(err) != schema.Code_CODE_SESSION_NOT_FOUND {
		t.Errorf("a session that is not there: %v", err)
	}
}
