package broker

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/types/known/timestamppb"
	"pgregory.net/rapid"

	"tidemark/schema"
)

var rewrite = flag.Bool("rewrite", false, "write what the transcripts of testdata/lifecycle should say")

// life is a session that lives in a test: a state, and the frames that are drafted on it.
type life struct {
	id    schema.SessionID
	kind  schema.SessionKind
	st    *state
	stamp schema.Stamp
}

func newLife(kind schema.SessionKind) *life {
	return &life{id: schema.SessionID{Tenant: "t", Name: "a"}, kind: kind, st: newState(), stamp: schema.NewStamp(&schema.Source{Subject: "a"})}
}

func (l *life) accept(t testing.TB, e *schema.Envelope) *Submission {
	t.Helper()
	return l.acceptBy(t, l.stamp, e)
}

// say accepts a command of a transcript; "as ROLE" before it says whose it is.
func (l *life) say(t testing.TB, command string) *Submission {
	t.Helper()
	stamp := l.stamp
	if as, of, ok := strings.Cut(strings.TrimPrefix(command, "as "), " "); ok && strings.HasPrefix(command, "as ") {
		role, known := schema.Role_value["ROLE_"+strings.ToUpper(as)]
		if !known {
			t.Fatalf("there is no role %q", as)
		}
		stamp, command = schema.NewStamp(&schema.Source{Subject: as, Role: schema.Role(role)}), of
	}
	return l.acceptBy(t, stamp, envelopeOf(t, command))
}

func (l *life) acceptBy(t testing.TB, stamp schema.Stamp, e *schema.Envelope) *Submission {
	t.Helper()
	a, err := stamp.AcceptEnvelope(e, storedAt)
	if err != nil {
		t.Fatal(err)
	}
	return &Submission{Envelopes: []schema.Accepted{a}, Kind: l.kind}
}

// append decides about the submissions as one frame, and stores what is taken.
func (l *life) append(t testing.TB, subs ...*Submission) []error {
	t.Helper()
	d := newDraft(l.id, l.st)
	errs := make([]error, len(subs))
	for i, s := range subs {
		if _, errs[i] = d.add(s, 0); errs[i] != nil && !strings.Contains(errs[i].Error(), l.id.String()) {
			t.Errorf("%v names no session", errs[i])
		}
	}
	if len(d.taken) == 0 {
		return errs
	}
	f, data := d.frame("edge", subs[0].Envelopes[0].ID, storedAt, nil)
	f.StreamSeq = l.st.frame + 1
	// Who reads the frame comes to the same state as who wrote it.
	read, err := parseFrame(bytes.Clone(data))
	if err != nil {
		t.Fatal(err)
	}
	read.StreamSeq = f.StreamSeq
	other := l.restored()
	if err := other.st.foldFrame(read); err != nil {
		t.Fatal(err)
	}
	d.commit(f)
	if !reflect.DeepEqual(l.st.lifecycle, other.st.lifecycle) || l.st.head != other.st.head || !l.st.progressed.Equal(other.st.progressed) {
		t.Fatalf("the writer is at %+v, seq %d, who reads the frame at %+v, seq %d", l.st.lifecycle, l.st.head, other.st.lifecycle, other.st.head)
	}
	return errs
}

// restored is the life as an edge has it that takes the session over from its newest page.
func (l *life) restored() *life {
	other := *l
	if l.st.head > 0 {
		other.st = stateOf(l.st.proto())
	} else {
		other.st = newState()
	}
	return &other
}

func (l *life) String() string {
	s := l.st
	if s.head == 0 {
		return "not there"
	}
	var out strings.Builder
	out.WriteString(strings.ToLower(strings.TrimPrefix(s.kind.String(), "SESSION_KIND_")) + " " + schema.StatusWord(s.status))
	if s.run != "" {
		out.WriteString(", run " + s.run)
	}
	if s.prompt != 0 {
		fmt.Fprintf(&out, ", question %d", s.prompt)
	}
	if len(s.options) > 0 {
		out.WriteString(" of " + strings.Join(s.options, "|"))
	}
	if !s.deadline.IsZero() {
		fmt.Fprintf(&out, " till %s for %s", s.deadline.Format(time.TimeOnly), s.fallback)
	}
	if s.about.request != "" {
		out.WriteString(", asked by " + s.about.request)
	}
	if s.about.orphanAfter != 0 {
		out.WriteString(", orphan after " + s.about.orphanAfter.String())
	}
	if s.about.attended {
		out.WriteString(", attended")
	}
	for i, c := range s.cancelled {
		out.WriteString([...]string{", cancelled ", " "}[min(i, 1)] + c.run + "/" + c.request)
	}
	for i, r := range s.ended {
		out.WriteString([...]string{", ended ", " "}[min(i, 1)] + r.run + ":" + schema.StatusWord(r.status))
	}
	if s.overruled != (endedRun{}) {
		out.WriteString(", overruled")
	}
	for _, fate := range []schema.CallFate{schema.CallFate_CALL_FATE_OPEN, schema.CallFate_CALL_FATE_ANSWERED, schema.CallFate_CALL_FATE_CANCELLED} {
		n := 0
		for _, c := range s.calls {
			if c.fate == fate {
				n++
			}
		}
		if n > 0 {
			fmt.Fprintf(&out, ", calls %d %s", n, strings.ToLower(strings.TrimPrefix(fate.String(), "CALL_FATE_")))
		}
	}
	if n := len(s.answered); n > 0 {
		fmt.Fprintf(&out, ", %d results of none", n)
	}
	return out.String()
}

// envelopeOf reads a command of a transcript.
func envelopeOf(t testing.TB, command string) *schema.Envelope {
	t.Helper()
	name, rest, _ := strings.Cut(command, " ")
	if to, of, ok := strings.Cut(strings.TrimPrefix(command, "to "), " "); ok && name == "to" {
		seq, err := strconv.ParseUint(to, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		e := envelopeOf(t, of)
		e.ReplyTo = &seq
		return e
	}
	if request, of, ok := strings.Cut(strings.TrimPrefix(command, "for "), " "); ok && name == "for" {
		e := envelopeOf(t, of)
		e.RequestId = request
		return e
	}
	words := strings.Fields(rest)
	word := func(i int) string {
		if i < len(words) {
			return words[i]
		}
		return ""
	}
	e := new(schema.Envelope)
	switch name {
	case "created":
		kind := schema.SessionKind(schema.SessionKind_value["SESSION_KIND_"+strings.ToUpper(word(0))])
		e.Payload = &schema.Envelope_SessionCreated{SessionCreated: &schema.SessionCreated{Kind: kind, MetadataJson: `{"a":1}`}}
	case "start":
		var orphan uint64
		if word(1) != "" {
			orphan, _ = strconv.ParseUint(word(1), 10, 64)
		}
		e.Payload = &schema.Envelope_StartRun{StartRun: &schema.StartRun{RunId: word(0), OrphanAfterMs: orphan}}
	case "status":
		status, ok := schema.Status_value["STATUS_"+strings.ToUpper(word(0))]
		if !ok {
			t.Fatalf("there is no status %q", word(0))
		}
		e.Payload = &schema.Envelope_RunStatus{RunStatus: &schema.RunStatus{Status: schema.Status(status), RunId: word(1)}}
	case "ask":
		e.Payload = &schema.Envelope_WaitingForInput{WaitingForInput: &schema.WaitingForInput{Prompt: "?", Options: words}}
	case "prompt":
		e.Payload = &schema.Envelope_WaitingForInput{WaitingForInput: &schema.WaitingForInput{
			Prompt: "?", Options: words, Deadline: timestamppb.New(storedAt.Add(time.Minute)), DefaultJson: fmt.Sprintf("%q", word(0)),
		}}
	case "call":
		e.Payload = &schema.Envelope_ToolCall{ToolCall: &schema.ToolCall{CallId: word(0), Name: "x"}}
	case "more":
		e.Payload = &schema.Envelope_ToolCall{ToolCall: &schema.ToolCall{CallId: word(0), ArgumentsDelta: "{"}}
	case "result":
		e.Payload = &schema.Envelope_ToolResult{ToolResult: &schema.ToolResult{CallId: word(0)}}
	case "answer":
		e.Payload = &schema.Envelope_UserInput{UserInput: &schema.UserInput{ResponseJson: rest}}
	case "error":
		e.Payload = &schema.Envelope_Error{Error: &schema.Error{Error: "no", Recoverable: new(word(0) == "recoverable")}}
	case "cancel":
		c := &schema.Cancel{Reason: "enough"}
		switch word(0) {
		case "run":
			c.Target = &schema.Cancel_RunId{RunId: word(1)}
		case "request":
			c.Target = &schema.Cancel_RequestId{RequestId: word(1)}
		default:
			c.Target = &schema.Cancel_Session{Session: true}
		}
		e.Payload = &schema.Envelope_Cancel{Cancel: c}
	case "token":
		e.Payload = &schema.Envelope_Token{Token: &schema.Token{MessageId: "m", Text: "x"}}
	case "message":
		e.Payload = &schema.Envelope_UserMessage{UserMessage: &schema.UserMessage{Message: "x"}}
	case "progress":
		e.Payload = &schema.Envelope_WorkflowProgress{WorkflowProgress: &schema.WorkflowProgress{Step: "s", Message: "x"}}
	case "custom":
		e.Payload = &schema.Envelope_Custom{Custom: &schema.Custom{Type: "x", Data: []byte("x")}}
	case "system":
		e.Payload = &schema.Envelope_System{System: &schema.System{Message: "x"}}
	default:
		t.Fatalf("a transcript cannot say %q", command)
	}
	return e
}

// do takes one line of a transcript and returns what comes of it.
func (l *life) do(t testing.TB, line string) string {
	t.Helper()
	command, rest, _ := strings.Cut(line, " ")
	switch command {
	case "begin":
		*l = *newLife(schema.SessionKind(schema.SessionKind_value["SESSION_KIND_"+strings.ToUpper(rest)]))
		return l.String()
	case "restore":
		*l = *l.restored()
		return l.String()
	case "together":
		line = rest
	}
	var subs []*Submission
	for c := range strings.SplitSeq(line, " + ") {
		// What is joined by & is one publish.
		s := new(Submission)
		for one := range strings.SplitSeq(c, " & ") {
			next := l.say(t, one)
			next.Envelopes = append(s.Envelopes, next.Envelopes...)
			s = next
		}
		subs = append(subs, s)
	}
	var said []string
	head, sent := l.st.head, 0
	for _, s := range subs {
		sent += len(s.Envelopes)
	}
	for _, err := range l.append(t, subs...) {
		if err != nil {
			said = append(said, "refused "+schema.CodeOf(err).Word())
		} else {
			said = append(said, "taken")
		}
	}
	if n := int(l.st.head-head) - sent; n > 0 {
		said[len(said)-1] += fmt.Sprintf(" and %d more", n)
	}
	if len(said) == 1 && said[0] == "taken" {
		return l.String()
	}
	return strings.Join(said, ", ") + "; " + l.String()
}

// Each transcript is a session's life, line by line: what comes next, and where it leads. -rewrite writes the right-hand sides.
func TestLifecycleTranscripts(t *testing.T) {
	names, err := filepath.Glob("testdata/lifecycle/*.txt")
	if err != nil || len(names) == 0 {
		t.Fatal("no transcripts", err)
	}
	for _, name := range names {
		t.Run(strings.TrimSuffix(filepath.Base(name), ".txt"), func(t *testing.T) {
			want, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			var got strings.Builder
			l := newLife(schema.SessionKind_SESSION_KIND_UNSPECIFIED)
			for line := range strings.Lines(string(want)) {
				line = strings.TrimRight(line, "\n")
				command, _, _ := strings.Cut(line, " -> ")
				if command = strings.TrimRight(command, " "); command == "" || command[0] == '#' {
					fmt.Fprintln(&got, line)
					continue
				}
				fmt.Fprintf(&got, "%-55s -> %s\n", command, l.do(t, command))
			}
			if *rewrite {
				if err := os.WriteFile(name, []byte(got.String()), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if got.String() != string(want) {
				t.Errorf("%s is now\n%s", name, got.String())
			}
		})
	}
}

// possible checks the invariants that lifecycle names.
func (l lifecycle) possible(head uint64) error {
	begun := l.status != schema.Status_STATUS_UNSPECIFIED
	switch {
	case begun != (head > 0), begun && kindOf(l.kind) != l.kind:
		return fmt.Errorf("at seq %d kind and status are %s and %s", head, l.kind, l.status)
	case (l.prompt != 0) != (l.status == schema.Status_STATUS_WAITING_FOR_INPUT), l.prompt > head:
		return fmt.Errorf("at seq %d it is %s, with question %d open", head, l.status, l.prompt)
	case l.prompt == 0 && len(l.options) > 0:
		return errors.New("no question is open, but it has options")
	case l.deadline.IsZero() != (l.fallback == ""), l.prompt == 0 && !l.deadline.IsZero():
		return fmt.Errorf("question %d has the deadline %s and the default answer %q", l.prompt, l.deadline, l.fallback)
	case !l.under() && l.about != (runFacts{}):
		return fmt.Errorf("no run is under way, but of it is known %+v", l.about)
	case len(l.cancelled) > maxCancelled || len(l.answered) > maxAnswered || len(l.calls) > maxOpenCalls+maxSettledCalls:
		return fmt.Errorf("%d cancelled targets, %d calls and %d answered ones are remembered", len(l.cancelled), len(l.calls), len(l.answered))
	case len(l.ended) > maxEnded, l.under() && l.endOf(l.run) >= 0:
		return fmt.Errorf("in run %s, %d runs are remembered to have ended: %v", l.run, len(l.ended), l.ended)
	case l.overruled != (endedRun{}) && (l.status != schema.Status_STATUS_OPEN || l.kind != schema.SessionKind_SESSION_KIND_CHAT):
		return fmt.Errorf("%s of kind %s, its run was ended by Tidemark: %v", l.status, l.kind, l.overruled)
	case l.status == schema.Status_STATUS_OPEN && l.kind == schema.SessionKind_SESSION_KIND_CHAT && l.run != "":
		return fmt.Errorf("an open chat has the run %s", l.run)
	}
	return nil
}

// someWords draws a command of a transcript.
func someWords(rt *rapid.T) string {
	status := rapid.SampledFrom([]string{"open", "running", "waiting_for_input", "completed", "failed", "cancelled"})
	run := rapid.SampledFrom([]string{"", "r", "s"})
	command := rapid.SampledFrom([]string{
		"created", "created chat", "created workflow", "start r", "start s", "status", "status", "status", "ask", "ask yes no", "ask no", "answer 1", `answer "yes"`, `answer "no"`, "to 1 answer 1", "to 2 answer 1", `to 3 answer "yes"`, "error recoverable",
		"error final", "cancel", "cancel run r", "cancel run s", "cancel request p", "cancel request q", "token", "message", "progress", "system", "prompt yes no", "start r 5000", "call c", "call c", "call d", "more c", "result c", "result c", "result d",
	}).Draw(rt, "command")
	if command == "status" {
		command = strings.TrimRight("status "+status.Draw(rt, "status")+" "+run.Draw(rt, "run"), " ")
	}
	return rapid.SampledFrom([]string{"", "", "as agent ", "as agent ", "as worker ", "as admin ", "as user ", "as system "}).Draw(rt, "role") + rapid.SampledFrom([]string{"", "", "for p ", "for q "}).Draw(rt, "request") + command
}

// Whatever is tried, what is taken never leads to a state that cannot be; what has ended stays as it is; and an edge that takes the session over from a page, anywhere on the way, decides as the one that was there all the time.
func TestLifecycleIsNeverImpossible(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		l := newLife(rapid.SampledFrom([]schema.SessionKind{
			schema.SessionKind_SESSION_KIND_UNSPECIFIED, schema.SessionKind_SESSION_KIND_CHAT, schema.SessionKind_SESSION_KIND_WORKFLOW,
		}).Draw(rt, "kind"))
		for range rapid.IntRange(1, 40).Draw(rt, "frames") {
			var subs, same []*Submission
			for range rapid.IntRange(1, 4).Draw(rt, "publishes") {
				s := l.say(t, someWords(rt))
				for range rapid.IntRange(0, 2).Draw(rt, "more") {
					s.Envelopes = append(s.Envelopes, l.say(t, someWords(rt)).Envelopes...)
				}
				subs, same = append(subs, s), append(same, new(*s))
			}
			before, other := l.st.lifecycle, l.restored()
			head := l.st.head
			errs, others := l.append(t, subs...), other.append(t, same...)
			for i := range errs {
				if schema.CodeOf(errs[i]) != schema.CodeOf(others[i]) || fmt.Sprint(errs[i]) != fmt.Sprint(others[i]) {
					rt.Fatalf("publish %d was answered %v, and %v by who took the session over", i, errs[i], others[i])
				}
			}
			if !reflect.DeepEqual(l.st.lifecycle, other.st.lifecycle) || l.st.head != other.st.head {
				rt.Fatalf("it stands at %s, and at %s for who took it over", l, other)
			}
			if err := l.st.possible(l.st.head); err != nil {
				rt.Fatal(err)
			}
			if schema.Ended(before.status) && (!reflect.DeepEqual(before, l.st.lifecycle) || l.st.head < head) {
				rt.Fatalf("it had ended as %+v, and stands at %+v", before, l.st.lifecycle)
			}
		}
	})
}

// What need not be decided is not decoded: a token costs the draft no memory beside its id.
func TestLifecycleCostsTokensNothing(t *testing.T) {
	l := newLife(schema.SessionKind_SESSION_KIND_UNSPECIFIED)
	l.append(t, l.accept(t, envelopeOf(t, "ask yes no")))
	tokens := accepted(t, 1)
	life := l.st.lifecycle
	allocations := testing.AllocsPerRun(100, func() {
		if refusal := life.decide(l.id, &tokens[0]); refusal != nil {
			t.Error(refusal)
		}
		life.fold(2, saidIn(&tokens[0]))
	})
	if allocations > 0 {
		t.Errorf("a token takes %.0f allocations", allocations)
	}
}

// A page carries all that the session's life and its throttle need.
func TestStateOfAPage(t *testing.T) {
	l := newLife(schema.SessionKind_SESSION_KIND_WORKFLOW)
	for _, c := range []string{"created workflow", "cancel run z", "cancel request y", "as agent for q start r 5000", "progress", "result c", "for q result c", "prompt yes no"} {
		l.do(t, c)
	}
	got := l.restored().st
	if !reflect.DeepEqual(got.lifecycle, l.st.lifecycle) || !got.progressed.Equal(storedAt) || got.metadata != `{"a":1}` || len(got.options) != 2 {
		t.Errorf("restored is %+v, progressed %s; it was %+v", got.lifecycle, got.progressed, l.st.lifecycle)
	}
	if st := newLife(0).restored().st; !st.progressed.Equal(time.Time{}) {
		t.Errorf("nothing was stored, but progress at %s", st.progressed)
	}
}

// A publish that is handed over brings along what it makes of the session: the other edge may be the one that begins it.
func TestHandOverKeepsTheKind(t *testing.T) {
	l := newLife(schema.SessionKind_SESSION_KIND_WORKFLOW)
	s := l.accept(t, envelopeOf(t, "progress"))
	s.Expected = new(uint64(0))
	data := appendString(appendString(nil, 1, l.id.Tenant), 2, l.id.Name)
	data = protowire.AppendBytes(protowire.AppendTag(data, 5, protowire.BytesType), s.handOverRequest())
	id, batch, err := parseHandOver(data)
	if err != nil || id != l.id || len(batch) != 1 {
		t.Fatalf("handed over were %d publishes to %s: %v", len(batch), id, err)
	}
	if got := batch[0]; got.Kind != s.Kind || *got.Expected != 0 || got.Envelopes[0].ID != s.Envelopes[0].ID {
		t.Errorf("handed over, %+v became %+v", s, got)
	}
	// It has waited where it came from.
	batch[0].Expected = nil
	batch[0].classify()
	if batch[0].mayWait || !batch[0].progress {
		t.Error("progress that was handed over would wait again")
	}
}
