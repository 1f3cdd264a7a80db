package gateway

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"tidemark/internal/auth"
	"tidemark/internal/doctable"
	"tidemark/schema"
)

var roles = []schema.Role{schema.Role_ROLE_USER, schema.Role_ROLE_AGENT, schema.Role_ROLE_WORKER, schema.Role_ROLE_ANALYST, schema.Role_ROLE_ADMIN}

// mayPublish is the table of roles and types, written down a second time.
var mayPublish = map[schema.Role]string{
	schema.Role_ROLE_USER:    "user_message user_input start_run cancel tool_result custom",
	schema.Role_ROLE_AGENT:   "token message_completed tool_call tool_result workflow_progress custom start_run run_status system user_message agent_message chat_error workflow_waiting_for_input cancel error",
	schema.Role_ROLE_WORKER:  "token message_completed tool_call tool_result workflow_progress custom start_run run_status system user_message agent_message chat_error workflow_waiting_for_input cancel error",
	schema.Role_ROLE_ANALYST: "",
	schema.Role_ROLE_ADMIN:   "token message_completed tool_call tool_result workflow_progress custom start_run run_status system user_message agent_message chat_error workflow_waiting_for_input user_input cancel error",
}

// specimen is a valid envelope of each type.
func specimen(k schema.Kind) *schema.Envelope {
	switch k {
	case schema.KindToken:
		return tokenOf("x")
	case schema.KindMessageCompleted:
		return &schema.Envelope{Payload: &schema.Envelope_MessageCompleted{MessageCompleted: &schema.MessageCompleted{MessageId: "m1"}}}
	case schema.KindToolCall:
		return &schema.Envelope{Payload: &schema.Envelope_ToolCall{ToolCall: &schema.ToolCall{CallId: "c", Name: "n", ArgumentsJson: "{}"}}}
	case schema.KindToolResult:
		return &schema.Envelope{Payload: &schema.Envelope_ToolResult{ToolResult: &schema.ToolResult{CallId: "c", ResultJson: "1"}}}
	case schema.KindWorkflowProgress:
		return &schema.Envelope{Payload: &schema.Envelope_WorkflowProgress{WorkflowProgress: &schema.WorkflowProgress{Step: "s", Message: "m"}}}
	case schema.KindCustom:
		return &schema.Envelope{Payload: &schema.Envelope_Custom{Custom: &schema.Custom{Type: "t", Data: []byte("{}")}}}
	case schema.KindSessionCreated:
		return &schema.Envelope{Payload: &schema.Envelope_SessionCreated{SessionCreated: &schema.SessionCreated{Kind: schema.SessionKind_SESSION_KIND_CHAT}}}
	case schema.KindStartRun:
		return &schema.Envelope{Payload: &schema.Envelope_StartRun{StartRun: &schema.StartRun{RunId: "r"}}}
	case schema.KindRunStatus:
		return &schema.Envelope{Payload: &schema.Envelope_RunStatus{RunStatus: &schema.RunStatus{RunId: "r", Status: schema.Status_STATUS_RUNNING}}}
	case schema.KindSystem:
		return &schema.Envelope{Payload: &schema.Envelope_System{System: &schema.System{Message: "m"}}}
	case schema.KindUserMessage:
		return &schema.Envelope{Payload: &schema.Envelope_UserMessage{UserMessage: &schema.UserMessage{Message: "m"}}}
	case schema.KindAgentMessage:
		return &schema.Envelope{Payload: &schema.Envelope_AgentMessage{AgentMessage: &schema.AgentMessage{Message: "m"}}}
	case schema.KindChatError:
		return &schema.Envelope{Payload: &schema.Envelope_ChatError{ChatError: &schema.ChatError{Error: "e"}}}
	case schema.KindWaitingForInput:
		return &schema.Envelope{Payload: &schema.Envelope_WaitingForInput{WaitingForInput: &schema.WaitingForInput{Prompt: "p"}}}
	case schema.KindUserInput:
		return &schema.Envelope{Payload: &schema.Envelope_UserInput{UserInput: &schema.UserInput{ResponseJson: `"yes"`}}}
	case schema.KindCancel:
		return &schema.Envelope{Payload: &schema.Envelope_Cancel{Cancel: &schema.Cancel{Target: &schema.Cancel_Session{Session: true}}}}
	case schema.KindError:
		return &schema.Envelope{Payload: &schema.Envelope_Error{Error: &schema.Error{Error: "e", Recoverable: new(true)}}}
	case schema.KindWorkFailed:
		return &schema.Envelope{Payload: &schema.Envelope_WorkFailed{WorkFailed: &schema.WorkFailed{Group: "g", Reason: "r"}}}
	}
	return nil
}

// way is how a publish reaches the gateway, and how its fate comes back.
type way struct {
	name string
	as   Peer
	send func(p *peer, e *schema.Envelope)
	// fate is the code that it was refused with, unspecified where it was stored; ended says whether the connection ends for it.
	fate func(p *peer) (code schema.Code, ended bool)
}

var ways = []way{
	{"proto", Peer{Protocol: Proto}, func(p *peer, e *schema.Envelope) {
		p.publish(&schema.Publish{PublishId: 1, Session: "s", Envelopes: []*schema.Envelope{e}})
	}, protoFate},
	{"proto in an unusual encoding", Peer{Protocol: Proto}, func(p *peer, e *schema.Envelope) {
		m, _ := proto.Marshal(&schema.ClientFrame{Frame: &schema.ClientFrame_Publish{Publish: &schema.Publish{PublishId: 1, Session: "s", Envelopes: []*schema.Envelope{e}}}})
		p.sendRaw(append(m, 0xa2, 0x06, 0x00))
	}, protoFate},
	{"append stream", Peer{Protocol: ProtoPublish}, func(p *peer, e *schema.Envelope) {
		p.send(&schema.Publish{PublishId: 1, Session: "s", Envelopes: []*schema.Envelope{e}})
	}, protoFate},
	{"json", Peer{Protocol: ProtoJSON}, func(p *peer, e *schema.Envelope) {
		m, _ := protojson.Marshal(&schema.ClientFrame{Frame: &schema.ClientFrame_Publish{Publish: &schema.Publish{PublishId: 1, Session: "s", Envelopes: []*schema.Envelope{e}}}})
		p.sendRaw(m)
	}, func(p *peer) (schema.Code, bool) {
		f := new(schema.ServerFrame)
		if err := protojson.Unmarshal(p.nextRaw(), f); err != nil {
			p.Fatal(err)
		}
		return f.GetRejected().GetCode(), f.GetError() != nil
	}},
	{"session socket", Peer{Protocol: SessionJSON, Session: "s", Follow: &schema.Attach{Session: "s"}}, func(p *peer, e *schema.Envelope) {
		p.sendRaw(schema.AppendJSON(nil, e))
	}, func(p *peer) (schema.Code, bool) {
		for {
			m := p.nextRaw()
			var frame struct {
				Type string
				Data struct{ Code string }
			}
			if err := json.Unmarshal(m, &frame); err != nil {
				p.Fatal(err)
			}
			switch frame.Type {
			case "published":
				return schema.Code_CODE_UNSPECIFIED, false
			case "error":
				if frame.Data.Code == "" {
					continue // it is the envelope
				}
				code := schema.Code(schema.Code_value["CODE_"+strings.ToUpper(frame.Data.Code)])
				return code, code == schema.Code_CODE_FORBIDDEN
			}
		}
	}},
}

func protoFate(p *peer) (schema.Code, bool) {
	f := p.next()
	return f.GetRejected().GetCode(), f.GetError() != nil
}

// TestRights tries every role with every type in every way. What else may be wrong with an envelope, where the session stands, is not looked at here.
func TestRights(t *testing.T) {
	for _, way := range ways {
		t.Run(way.name, func(t *testing.T) {
			for _, role := range roles {
				for _, kind := range schema.Kinds() {
					bubble(t, nil, func(w *world) {
						as := way.as
						if as.Follow != nil {
							as.Follow = proto.CloneOf(as.Follow)
						}
						as.Principal = principal(auth.RoleWord(role), "s")
						p := w.dial(as)
						way.send(p, specimen(kind))
						code, ended := way.fate(p)
						may := slices.Contains(strings.Fields(mayPublish[role]), kind.String())
						if may == (code == schema.Code_CODE_FORBIDDEN) {
							t.Errorf("%s publishes %s: %s, want it allowed: %v", auth.RoleWord(role), kind, code.Word(), may)
						}
						if ends := way.as.Protocol == SessionJSON && !may; ended != ends {
							t.Errorf("%s publishes %s: the connection ends: %v, want %v", auth.RoleWord(role), kind, ended, ends)
						}
						_, err := w.log.Session(w.Context(), schema.SessionID{Tenant: "default", Name: "s"})
						if stored := err == nil; stored && !may {
							t.Errorf("%s publishes %s: it was stored", auth.RoleWord(role), kind)
						}
						p.cancel()
					})
				}
			}
		})
	}
}

// TestAuthorizePrefix: what a refusal advises is what helps.
func TestAuthorizePrefix(t *testing.T) {
	for _, tt := range []struct {
		claim, prefix, says string
	}{
		{"ab*", "ab", ""},
		{"ab*", "abc", ""},
		{"a*", "ab", ""},
		{"*", "", ""},
		{"abc*", "ab", `has "ab*", or a shorter prefix`},
		{"ab", "ab", `has "ab*", or a shorter prefix`},
		{"a*", "", `has "*", or name a prefix`},
	} {
		err := AuthorizePrefix(principal("analyst", tt.claim), Follow, tt.prefix)
		if (err == nil) != (tt.says == "") || err != nil && !strings.Contains(err.Error(), tt.says) {
			t.Errorf("all that begins with %q for %q: %v", tt.prefix, tt.claim, err)
		}
	}
}

// TestAuthorize compares what is decided with PROTOCOL.md, for every role, verb and type.
func TestAuthorize(t *testing.T) {
	byVerb, byType := rightsInProtocol(t)
	for _, role := range roles {
		p := principal(auth.RoleWord(role), "mine", "my-*")
		for _, v := range verbs {
			for session, mine := range map[string]bool{"mine": true, "my-own": true, "other": false, "mine-not": false, "": false} {
				err := Authorize(p, v, session)
				want := byVerb[role][v.String()] && (mine || v == List)
				if (err == nil) != want || err != nil && schema.CodeOf(err) != schema.Code_CODE_FORBIDDEN {
					t.Errorf("%s, verb %q, session %q: %v, want it allowed: %v", auth.RoleWord(role), v, session, err, want)
				}
			}
		}
		for _, k := range schema.Kinds() {
			err := AuthorizeType(p, k)
			if (err == nil) != byType[role][k.String()] || err != nil && schema.CodeOf(err) != schema.Code_CODE_FORBIDDEN {
				t.Errorf("%s, type %s: %v, PROTOCOL.md says %v", auth.RoleWord(role), k, err, byType[role][k.String()])
			}
			if byType[role][k.String()] != slices.Contains(strings.Fields(mayPublish[role]), k.String()) {
				t.Errorf("%s, type %s: PROTOCOL.md says %v", auth.RoleWord(role), k, byType[role][k.String()])
			}
		}
		for _, k := range []schema.Kind{0, 1, 7, 14, 15, 63, 64, 72, 99, 1 << 20, -1} {
			if AuthorizeType(p, k) == nil {
				t.Errorf("%s may publish type number %d", auth.RoleWord(role), k)
			}
		}
	}
	for _, role := range []schema.Role{schema.Role_ROLE_UNSPECIFIED, schema.Role_ROLE_SYSTEM, 99} {
		p := &auth.Principal{Subject: "x", Tenant: "default", Role: role, Sessions: []string{"*"}}
		for _, v := range verbs {
			if Authorize(p, v, "s") == nil {
				t.Errorf("role %v may %s", role, v)
			}
		}
		for _, k := range schema.Kinds() {
			if AuthorizeType(p, k) == nil {
				t.Errorf("role %v may publish %s", role, k)
			}
		}
	}
}

// rightsInProtocol reads the tables of PROTOCOL.md's section Rights: their first columns name the verbs and the types, the others are roles.
func rightsInProtocol(t *testing.T) (byVerb, byType map[schema.Role]map[string]bool) {
	t.Helper()
	tables, err := doctable.Tables("../../PROTOCOL.md", "Rights")
	if err != nil {
		t.Fatal(err)
	}
	byVerb, byType = map[schema.Role]map[string]bool{}, map[schema.Role]map[string]bool{}
	for _, role := range roles {
		byVerb[role], byType[role] = map[string]bool{}, map[string]bool{}
	}
	rows := 0
	for _, table := range tables {
		into := map[string]map[schema.Role]map[string]bool{"may": byVerb, "type": byType}[table.Head[0]]
		if into == nil {
			t.Fatalf("a table begins with %q", table.Head[0])
		}
		var columns []schema.Role
		for _, word := range table.Head[1:] {
			columns = append(columns, auth.ParseRole(doctable.Plain(word)))
		}
		if !slices.Equal(columns, roles) {
			t.Fatalf("the columns of %q are not the roles", table.Head)
		}
		for _, r := range table.Rows {
			rows++
			for i, role := range columns {
				if r[1+i] != "yes" && r[1+i] != "" {
					t.Errorf("the row %q has a cell that is neither yes nor empty", r)
				}
				into[role][doctable.Plain(r[0])] = r[1+i] == "yes"
			}
		}
	}
	if want := len(verbs) + len(schema.Kinds()); rows != want {
		t.Errorf("PROTOCOL.md has %d rows of rights, the code %d", rows, want)
	}
	return byVerb, byType
}
