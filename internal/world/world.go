package world

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/oklog/ulid/v2"
	"google.golang.org/protobuf/proto"

	"tidemark/broker"
	"tidemark/edge-grpc"
	"tidemark/edge-ws"
	"tidemark/internal/auth"
	"tidemark/internal/gateway"
	"tidemark/internal/natsd"
	"tidemark/schema"
)

// Prepare must be called in TestMain, before any bubble.
func Prepare() { natsd.PrepareBubbles() }

// Config of a world. The zero value is a small deployment with class fsync and two edges.
type Config struct {
	// Edges is how many there are at first. Default 2.
	Edges int
	// Streams is how many log streams there are. Default 2.
	Streams int
	// Durability of what is stored. Default fsync. With class memory nothing outlives the server, and age limits follow fake time.
	Durability schema.Durability
	// MaxAge is how long envelopes are kept. Default 100 years: a file store ages by the real clock, and a bubble begins in the year 2000.
	MaxAge time.Duration
	// MaxStore bounds what NATS stores, in bytes. Default: nothing that a test fills.
	MaxStore int64
	// MaxPayload bounds a message of NATS, in bytes. Default: natsd's.
	MaxPayload int
	// Latency is how long what is said between a process and NATS takes on its way, in each direction. Default none, and then a bubble's clock does not move while envelopes are stored; with some, there is
	// always something on its way.
	Latency time.Duration
	// Buffer is what a link to an edge holds on its way, in bytes and for each direction. Default 64 KiB.
	Buffer int
	// Log, Gateway, Socket, GRPC and Broker change how the parts are configured. Optional.
	Log     func(*broker.Config)
	Gateway func(*gateway.Config)
	Socket  func(*edgews.Config)
	GRPC    func(*edgegrpc.Config)
	Broker  func(*broker.BrokerConfig)
}

// World is a deployment and its clients. Its verbs belong to the goroutine of the test; those of peers, readers and writers may be called by any goroutine, one at a time.
type World struct {
	// Static after construction.
	t        *testing.T
	cfg      Config
	bubble   bool
	logger   *slog.Logger
	verifier *auth.Verifier
	net      *network
	node     *node

	// Owned by the test's goroutine.
	edges   []*Edge
	broker  *process
	closers []func()
}

// secret is what every process of the world signs and checks tokens with.
var secret = []byte("a secret that every process of the world knows") //nolint:gochecknoglobals // a constant

// patience is how long a verb waits for what it wants. In a bubble that is no time at all.
const patience = time.Minute

// Run runs a test in a world of its own, in a bubble. Not for parallel tests.
func Run(t *testing.T, cfg Config, test func(w *World)) {
	t.Helper()
	// Libraries pool timers and channels, and those of one bubble must not be used in another. A pool is empty after two collections.
	runtime.GC()
	runtime.GC()
	defer watch(t)()
	synctest.Test(t, func(t *testing.T) {
		w := boot(t, cfg, true)
		test(w)
	})
}

// New boots a world outside of a bubble, in real time.
func New(t *testing.T, cfg Config) *World {
	t.Helper()
	return boot(t, cfg, false)
}

func boot(t *testing.T, cfg Config, bubble bool) *World {
	t.Helper()
	if cfg.Edges == 0 {
		cfg.Edges = 2
	}
	if cfg.Streams == 0 {
		cfg.Streams = 2
	}
	if cfg.Durability == schema.Durability_DURABILITY_UNSPECIFIED {
		cfg.Durability = schema.Durability_DURABILITY_FSYNC
	}
	if cfg.MaxAge == 0 {
		cfg.MaxAge = 100 * 365 * 24 * time.Hour
	}
	if cfg.Buffer == 0 {
		cfg.Buffer = 64 << 10
	}
	w := &World{t: t, cfg: cfg, bubble: bubble, logger: slog.New(slog.DiscardHandler), net: newNetwork(cfg.Buffer), node: &node{dir: t.TempDir()}}
	if testing.Verbose() {
		w.logger = slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelInfo}))
	}
	v, err := auth.NewVerifier(auth.Config{Secret: secret})
	w.must(err)
	w.verifier = v
	t.Cleanup(w.close)
	w.StartNATS()
	w.StartBroker()
	for range cfg.Edges {
		w.StartEdge()
	}
	return w
}

// close ends everything, the clients first.
func (w *World) close() {
	for _, c := range w.cables() {
		c.freeze(false)
	}
	for i := len(w.closers) - 1; i >= 0; i-- {
		w.closers[i]()
	}
	for _, e := range w.edges {
		w.stopEdge(e)
	}
	if w.broker != nil {
		w.StopBroker()
	}
	w.StopNATS()
	if w.bubble {
		// net/http lingers for half a second over a connection whose client spoke nonsense, whatever its server is told.
		time.Sleep(time.Second)
	}
}

// T is the test that the world belongs to.
func (w *World) T() *testing.T { return w.t }

// Sleep lets time pass.
func (w *World) Sleep(d time.Duration) { time.Sleep(d) }

// Call makes a gRPC call at an edge that is answered once, with an agent's token. The error is a [*schema.Refusal] where the edge said why.
func (w *World) Call(e *Edge, method string, req, res proto.Message) error {
	return w.CallAs(e, Dial{}, method, req, res)
}

// Settle waits until the projector has stored what it derives from sessions that are idle.
func (w *World) Settle() { time.Sleep(5 * time.Second) }

// Until waits for something that becomes true by itself.
func (w *World) Until(what string, ok func() bool) {
	w.t.Helper()
	for began := time.Now(); !ok(); time.Sleep(time.Millisecond) {
		if time.Since(began) > patience {
			w.t.Fatalf("%s: not within %s", what, patience)
		}
	}
}

// Token mints a token of the default tenant.
func (w *World) Token(role schema.Role, sessions ...string) string {
	w.t.Helper()
	t, err := auth.Mint(secret, auth.Principal{Subject: auth.RoleWord(role), Role: role, Sessions: sessions}, 365*24*time.Hour)
	w.must(err)
	return t
}

// Session is the id of a session in the tenant that the world's tokens are of.
func Session(name string) schema.SessionID {
	return schema.SessionID{Tenant: auth.DefaultTenant, Name: name}
}

func (w *World) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// cables of all processes.
func (w *World) cables() []*cable {
	var all []*cable
	for _, e := range w.edges {
		all = append(all, e.cable)
	}
	if w.broker != nil {
		all = append(all, w.broker.cable)
	}
	return all
}

// process is something that runs until its context ends.
type process struct {
	cable *cable
	stop  context.CancelFunc
	over  chan error
}

// StartBroker starts the broker, which lays the deployment out where that has not been done.
func (w *World) StartBroker() {
	w.t.Helper()
	c := w.newCable()
	cfg := broker.BrokerConfig{
		Server: broker.Server{InProcess: c, Name: "broker"}, Name: "broker", Logger: w.logger,
		Layout: broker.Layout{Streams: w.cfg.Streams, Durability: w.cfg.Durability, MaxAge: w.cfg.MaxAge},
	}
	if w.cfg.Broker != nil {
		w.cfg.Broker(&cfg)
	}
	b, err := broker.NewBroker(cfg)
	w.must(err)
	ctx, stop := context.WithCancel(context.Background())
	w.broker = &process{cable: c, stop: stop, over: make(chan error, 1)}
	p := w.broker
	go func() { p.over <- b.Run(ctx) }()
}

// StopBroker stops the broker in good order.
func (w *World) StopBroker() {
	w.t.Helper()
	w.broker.stop()
	err := <-w.broker.over
	w.broker.cable.pull()
	w.broker.cable.bridges.Wait()
	w.broker = nil
	if err != nil {
		w.t.Error(err)
	}
}

// KillBroker stops the broker at once: nothing that it still had to say reaches NATS.
func (w *World) KillBroker() {
	w.t.Helper()
	w.broker.cable.pull()
	w.StopBroker()
}

// RestartBroker stops the broker in good order and starts it again.
func (w *World) RestartBroker() {
	w.t.Helper()
	w.StopBroker()
	w.StartBroker()
}

// Token makes an envelope with a piece of text.
func Token(text string) *schema.Envelope {
	return &schema.Envelope{Id: ulid.Make().String(), Payload: &schema.Envelope_Token{Token: &schema.Token{MessageId: "m1", Text: text}}}
}

// UserMessage makes an envelope in which a person says something.
func UserMessage(text string) *schema.Envelope {
	return &schema.Envelope{Id: ulid.Make().String(), Payload: &schema.Envelope_UserMessage{UserMessage: &schema.UserMessage{Message: text}}}
}

// Tokens makes n envelopes whose texts tell them apart: name and number.
func Tokens(name string, n int) []*schema.Envelope {
	all := make([]*schema.Envelope, n)
	for i := range all {
		all[i] = Token(fmt.Sprintf("%s%d ", name, i+1))
	}
	return all
}

// Text is what an envelope says, of the kinds that the world makes.
func Text(e *schema.Envelope) string {
	switch {
	case e.GetToken() != nil:
		return e.GetToken().GetText()
	case e.GetUserMessage() != nil:
		return e.GetUserMessage().GetMessage()
	default:
		return ""
	}
}

// Texts joins what envelopes say.
func Texts(envelopes []*schema.Envelope) string {
	var b strings.Builder
	for _, e := range envelopes {
		b.WriteString(Text(e))
	}
	return b.String()
}

// refused is the refusal in err, nil where there is none.
func refused(err error) *schema.Refusal {
	r, _ := errors.AsType[*schema.Refusal](err)
	return r
}
