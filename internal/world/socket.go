package world

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"

	"github.com/coder/websocket"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"tidemark/schema"
)

// socket is a WebSocket of any of the edge's paths.
type socket struct {
	token     string
	transport *http.Transport
	c         *websocket.Conn
	refused   *http.Response // of an upgrade that was refused
	body      []byte
}

func newSocket(p path, token string) *socket {
	return &socket{token: token, transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return p.dial(ctx) }}}
}

// dial upgrades.
func (s *socket) dial(ctx context.Context, target string, subprotocols ...string) error {
	h := make(http.Header)
	if s.token != "" {
		h.Set("Authorization", "Bearer "+s.token)
	}
	c, res, err := websocket.Dial(ctx, target, &websocket.DialOptions{HTTPClient: &http.Client{Transport: s.transport}, HTTPHeader: h, Subprotocols: subprotocols})
	if err != nil {
		if res != nil && res.StatusCode != http.StatusSwitchingProtocols {
			s.refused = res
			s.body, _ = io.ReadAll(res.Body)
		}
		return err
	}
	c.SetReadLimit(-1)
	s.c = c
	return nil
}

func (s *socket) read() ([]byte, error) {
	_, b, err := s.c.Read(context.Background())
	return b, err
}

func (s *socket) write(typ websocket.MessageType, b []byte) error {
	return s.c.Write(context.Background(), typ, b)
}

func (s *socket) close() {
	if s.c != nil {
		_ = s.c.Close(websocket.StatusNormalClosure, "")
	}
	s.transport.CloseIdleConnections()
}

func (s *socket) drop() {
	if s.c != nil {
		_ = s.c.CloseNow()
	}
	s.transport.CloseIdleConnections()
}

func (s *socket) ending(err error) Ending {
	e := Ending{Err: err}
	if s.refused != nil {
		var said struct{ Details, Code string }
		_ = json.Unmarshal(s.body, &said)
		e.Status, e.Message = s.refused.StatusCode, said.Details
		e.Code = codeOf(said.Code)
		return e
	}
	if c, ok := errors.AsType[websocket.CloseError](err); ok {
		word, text, _ := strings.Cut(c.Reason, ": ")
		e.Status, e.Message = int(c.Code), text
		if c.Code != websocket.StatusNormalClosure {
			// Behind the end of a session the reason is how that ended, and cancelled is a code's word, too.
			e.Code = codeOf(word)
		}
	}
	return e
}

// codeOf is the code with this word.
func codeOf(word string) schema.Code {
	return schema.Code(schema.Code_value["CODE_"+strings.ToUpper(word)])
}

// socketWire is /v1/connect.
type socketWire struct {
	*socket
	json bool
}

func (s *socketWire) open(ctx context.Context, _ *schema.Attach) error {
	if s.json {
		return s.dial(ctx, "ws://edge/v1/connect", "tidemark.v1.json")
	}
	return s.dial(ctx, "ws://edge/v1/connect", "tidemark.v1.proto")
}

func (s *socketWire) send(f *schema.ClientFrame) error {
	marshal := proto.Marshal
	if s.json {
		marshal = protojson.Marshal
	}
	b, err := marshal(f)
	if err != nil {
		return err
	}
	return s.raw(b)
}

func (s *socketWire) raw(b []byte) error {
	if s.json {
		return s.write(websocket.MessageText, b)
	}
	return s.write(websocket.MessageBinary, b)
}

func (s *socketWire) receive() ([]*schema.ServerFrame, error) {
	b, err := s.read()
	if err != nil {
		return nil, err
	}
	f := new(schema.ServerFrame)
	if s.json {
		err = protojson.Unmarshal(b, f)
	} else {
		err = proto.Unmarshal(b, f)
	}
	return []*schema.ServerFrame{f}, err
}

// sessionWire is /ws. What it says is put into the words of the multiplexed connection.
type sessionWire struct {
	*socket
	session   string
	channel   uint32
	attached  bool
	epoch     string // to be told with the first events
	published map[string]uint64
	lock      chan struct{} // guards published; nil until open
}

func (s *sessionWire) open(ctx context.Context, first *schema.Attach) error {
	q := url.Values{"sessionName": {first.GetSession()}}
	switch start := first.GetStart().(type) {
	case nil:
	case *schema.Attach_AfterSeq:
		q.Set("lastSeq", fmt.Sprint(start.AfterSeq))
	case *schema.Attach_Head:
		q.Set("lastSeq", "latest")
	default:
		return errNotThisWay
	}
	if len(first.GetTypes()) > 0 || first.GetMustExist() || first.GetMergeTokens() {
		return errNotThisWay
	}
	if first.GetEpoch() != "" {
		q.Set("epoch", first.GetEpoch())
	}
	s.session, s.channel = first.GetSession(), first.GetChannel()
	s.lock = make(chan struct{}, 1)
	return s.dial(ctx, "ws://edge/ws?"+q.Encode())
}

func (s *sessionWire) send(f *schema.ClientFrame) error {
	if b, is := workControl(f); is {
		return s.raw(b)
	}
	p := f.GetPublish()
	if p == nil || len(p.GetEnvelopes()) != 1 || p.ExpectedSeq != nil {
		return errNotThisWay
	}
	e := p.GetEnvelopes()[0]
	s.lock <- struct{}{}
	s.published[e.GetId()] = p.GetPublishId()
	<-s.lock
	return s.raw(schema.AppendJSON(nil, e))
}

func (s *sessionWire) raw(b []byte) error { return s.write(websocket.MessageText, b) }

func (s *sessionWire) receive() ([]*schema.ServerFrame, error) {
	b, err := s.read()
	if err != nil {
		return nil, err
	}
	var head struct {
		Type string
		Seq  uint64
		Data json.RawMessage
	}
	if err := json.Unmarshal(b, &head); err != nil {
		return nil, fmt.Errorf("the session socket sent what is no JSON: %w: %s", err, b)
	}
	if head.Seq > 0 {
		e, err := schema.ParseJSON(b)
		if err != nil {
			return nil, fmt.Errorf("the session socket sent what is no envelope: %w: %s", err, b)
		}
		return []*schema.ServerFrame{{Frame: &schema.ServerFrame_Events{
			Events: &schema.Events{Channel: s.channel, ThroughSeq: head.Seq, Epoch: s.tellEpoch(), Envelopes: []*schema.Envelope{e}},
		}}}, nil
	}
	f, err := s.control(head.Type, head.Data)
	if err != nil {
		return nil, fmt.Errorf("the session socket sent %s: %w", b, err)
	}
	if a := f.GetAttached(); a != nil {
		if s.attached {
			// The session was empty and begins now: the other ways say that with its first events.
			s.epoch = a.GetEpoch()
			return s.receive()
		}
		s.attached = true
	}
	return []*schema.ServerFrame{setChannel(f, s.channel)}, nil
}

// control puts a control frame into the words of the multiplexed connection.
func (s *sessionWire) control(kind string, data []byte) (*schema.ServerFrame, error) {
	var d struct {
		Epoch, Status, ID, Durability, Reason, Error, Details, Code string
		FirstSeq                                                    uint64 `json:"first_seq"`
		HeadSeq                                                     uint64 `json:"head_seq"`
		AfterSeq                                                    uint64 `json:"after_seq"`
		WantedSeq                                                   uint64 `json:"wanted_seq"`
		GraceMS                                                     uint32 `json:"grace_ms"`
		Seq                                                         uint64
		Duplicate, Retryable                                        bool
		Expected                                                    *uint64
		Channel                                                     uint32
	}
	if err := json.Unmarshal(data, &d); err != nil {
		return nil, err
	}
	if f, is, err := workFrame(kind, data); is {
		for _, it := range f.GetWork().GetItems() {
			it.Session = s.session
		}
		return f, err
	}
	switch kind {
	case "attached":
		return &schema.ServerFrame{Frame: &schema.ServerFrame_Attached{Attached: &schema.Attached{
			Epoch: d.Epoch, FirstSeq: d.FirstSeq, HeadSeq: d.HeadSeq, AfterSeq: d.AfterSeq, Status: schema.Status(schema.Status_value["STATUS_"+strings.ToUpper(d.Status)]),
		}}}, nil
	case "published":
		return &schema.ServerFrame{Frame: &schema.ServerFrame_Published{Published: &schema.Published{
			Durability: schema.ParseDurability(d.Durability), Acks: []*schema.Ack{{PublishId: s.idOf(d.ID), FirstSeq: d.Seq, LastSeq: d.Seq, Duplicate: d.Duplicate, Epoch: d.Epoch}},
		}}}, nil
	case "truncated":
		return &schema.ServerFrame{Frame: &schema.ServerFrame_Truncated{Truncated: &schema.Truncated{WantedSeq: d.WantedSeq, FirstSeq: d.FirstSeq}}}, nil
	case "going_away":
		return &schema.ServerFrame{Frame: &schema.ServerFrame_GoingAway{GoingAway: &schema.GoingAway{Reason: d.Reason, GraceMs: d.GraceMS}}}, nil
	case "error":
		if d.ID != "" {
			return &schema.ServerFrame{Frame: &schema.ServerFrame_Rejected{Rejected: &schema.Rejected{
				PublishId: s.idOf(d.ID), Code: codeOf(d.Code), Message: d.Details, Retryable: d.Retryable, Expected: d.Expected,
			}}}, nil
		}
		return &schema.ServerFrame{Frame: &schema.ServerFrame_Error{Error: &schema.ErrorFrame{Code: codeOf(d.Code), Message: d.Details, Channel: d.Channel}}}, nil
	default:
		return nil, errors.New("a control frame of an unknown type")
	}
}

// tellEpoch is the history that begins with the next events; empty where none does.
func (s *sessionWire) tellEpoch() string {
	epoch := s.epoch
	s.epoch = ""
	return epoch
}

func (s *sessionWire) idOf(envelope string) uint64 {
	s.lock <- struct{}{}
	defer func() { <-s.lock }()
	return s.published[envelope]
}
