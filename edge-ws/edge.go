package edgews

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/coder/websocket"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"tidemark/internal/auth"
	"tidemark/internal/gateway"
	"tidemark/schema"
)

// DefaultPingInterval keeps a connection open through proxies, which commonly cut what is silent for 60 s.
const DefaultPingInterval = 30 * time.Second

// The subprotocols of /v1/connect.
const (
	SubprotocolProto = "tidemark.v1.proto"
	SubprotocolJSON  = "tidemark.v1.json"
)

// Config says how the edge serves.
type Config struct {
	// Gateway serves the connections. Required.
	Gateway *gateway.Gateway
	// Verify says who the bearer of a token is. Required. The error is a [*schema.Refusal].
	Verify func(ctx context.Context, token string) (*auth.Principal, error)
	// Origins are the web pages that browsers may connect from, beside those of the edge's own host: patterns of [path.Match] for a host (app.example.com, *.example.com) or, with a scheme,
	// for an origin (https://app.example.com). "*" is every page: tokens alone protect then. Default: none. Clients that are no browsers send no origin and are not asked.
	Origins []string
	// Loopback makes it an edge for the programs of one desktop application (local.go): it refuses peers and host names that are not this machine's, takes tokens in hello alone, and serves
	// /v1/connect in protobuf and /healthz, nothing else. Pages must then be listed in Origins. Give the gateway a short HelloTimeout.
	Loopback bool
	// Page serves the page to look at sessions with, at / and below /page/. It is for development, and needs a token as any client does. Not on loopback.
	Page bool
	// PingInterval is how often a peer is pinged; it is closed (peer_dead) when two pings in a row went unanswered. Default [DefaultPingInterval].
	PingInterval time.Duration
	// Metrics is what /metrics shows. Optional, and unused on loopback, where there is no such path.
	Metrics prometheus.Gatherer
	// Register is where the edge's own metrics are registered; nil for nowhere.
	Register prometheus.Registerer
	// Logger gets what happens, never tokens or queries. Default: discarded.
	Logger *slog.Logger
}

// Edge is the WebSocket and HTTP edge. Its handlers may be called concurrently.
type Edge struct {
	// Static after construction.
	cfg Config
	mux *http.ServeMux
	// refused counts what is refused before the upgrade, by code.
	refused *prometheus.CounterVec

	running sync.WaitGroup // connections

	mu     sync.Mutex // guards all below
	cuts   map[*transport]context.CancelFunc
	closed bool
}

// New checks the configuration and makes an edge of it. It starts nothing.
func New(cfg Config) (*Edge, error) {
	if cfg.Gateway == nil || cfg.Verify == nil {
		return nil, errors.New("edgews: Config needs Gateway and Verify")
	}
	if cfg.Page && cfg.Loopback {
		return nil, errors.New("edgews: Config has Page and Loopback, and on loopback there is no page")
	}
	for _, pattern := range cfg.Origins {
		if err := checkOrigin(pattern); err != nil {
			return nil, err
		}
	}
	if cfg.PingInterval == 0 {
		cfg.PingInterval = DefaultPingInterval
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Metrics == nil {
		cfg.Metrics = prometheus.NewRegistry()
	}
	e := &Edge{cfg: cfg, mux: http.NewServeMux(), cuts: make(map[*transport]context.CancelFunc)}
	e.refused = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "tidemark_edge_ws_refused_total", Help: "Requests that were refused before the upgrade, by code.",
	}, []string{"code"})
	if cfg.Register != nil {
		if err := cfg.Register.Register(e.refused); err != nil {
			return nil, fmt.Errorf("edgews: metrics: %w", err)
		}
	}
	e.mux.HandleFunc("/", e.nothingHere)
	e.mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { answer(w, http.StatusOK, state{State: "alive"}) })
	if cfg.Loopback {
		e.mux.HandleFunc("GET /v1/connect", e.connectOnLoopback)
		return e, nil
	}
	if cfg.Page {
		if err := e.servePage(); err != nil {
			return nil, err
		}
	}
	e.mux.HandleFunc("GET /v1/connect", e.connect)
	e.mux.HandleFunc("GET /ws", e.session)
	e.mux.HandleFunc("GET /readyz", e.ready)
	e.mux.Handle("GET /metrics", promhttp.HandlerFor(cfg.Metrics, promhttp.HandlerOpts{}))
	return e, nil
}

// Handler serves all of the edge's paths.
func (e *Edge) Handler() http.Handler {
	if e.cfg.Loopback {
		return e.onLoopback(e.mux)
	}
	return e.mux
}

// connect serves the multiplexed connection.
func (e *Edge) connect(w http.ResponseWriter, r *http.Request) {
	if !e.admit(w, r) {
		return
	}
	peer := gateway.Peer{Remote: r.RemoteAddr}
	subprotocol := ""
	for _, offered := range offers(r) {
		switch offered {
		case SubprotocolProto:
			peer.Protocol = gateway.Proto
		case SubprotocolJSON:
			peer.Protocol = gateway.ProtoJSON
		default:
			continue
		}
		subprotocol = offered
		break
	}
	if subprotocol == "" {
		e.refuse(w, schema.Refuse(schema.Code_CODE_UNSUPPORTED_PROTOCOL,
			"The request offers no subprotocol that this edge speaks; offer %s or %s in Sec-WebSocket-Protocol.", SubprotocolProto, SubprotocolJSON))
		return
	}
	if token := auth.FromRequest(r); token != "" {
		p, err := e.cfg.Verify(r.Context(), token)
		if err != nil {
			e.refuse(w, err)
			return
		}
		peer.Principal = p
	}
	if _, err := queryOf(r, "token"); err != nil {
		e.refuse(w, err)
		return
	}
	e.serve(w, r, peer, subprotocol)
}

// session serves the session socket. Who may not use it is told so first, whatever else is wrong with the request.
func (e *Edge) session(w http.ResponseWriter, r *http.Request) {
	if !e.enters(w, r) {
		return
	}
	p, err := e.cfg.Verify(r.Context(), auth.FromRequest(r))
	if err != nil {
		e.refuse(w, err)
		return
	}
	a, err := attachOf(r, p)
	if err != nil {
		e.refuse(w, err)
		return
	}
	if !e.upgrades(w, r) {
		return
	}
	// A browser that offers subprotocols wants one selected. The only ones that there are here carry a token: the peer's own comes back to it.
	subprotocol := ""
	for _, offered := range offers(r) {
		if strings.HasPrefix(offered, auth.Subprotocol) {
			subprotocol = offered
			break
		}
	}
	e.serve(w, r, gateway.Peer{Protocol: gateway.SessionJSON, Principal: p, Session: a.GetSession(), Follow: a, Remote: r.RemoteAddr}, subprotocol)
}

// attachOf is what the query of a session socket asks for.
func attachOf(r *http.Request, p *auth.Principal) (*schema.Attach, error) {
	q, err := queryOf(r, "sessionName", "token", "lastSeq", "epoch")
	if err != nil {
		return nil, err
	}
	id, err := schema.ParseSessionID(p.Tenant, q.Get("sessionName"))
	if err != nil {
		return nil, err
	}
	if err := gateway.Authorize(p, gateway.Follow, id.Name); err != nil {
		return nil, err
	}
	a := &schema.Attach{Session: id.Name, Epoch: q.Get("epoch")}
	switch last := q.Get("lastSeq"); last {
	case "":
	case "latest":
		a.Start = &schema.Attach_Head{Head: true}
	default:
		seq, err := parseSeq(last)
		if err != nil {
			return nil, err
		}
		a.Start = &schema.Attach_AfterSeq{AfterSeq: seq}
	}
	return a, nil
}

// serve upgrades the request and starts the connection.
func (e *Edge) serve(w http.ResponseWriter, r *http.Request, peer gateway.Peer, subprotocol string) {
	t, err := accept(w, r, subprotocol, peer.Protocol != gateway.Proto)
	if err != nil {
		// The library has answered, through upgrade.
		e.refused.WithLabelValues(schema.Code_CODE_INVALID_MESSAGE.Word()).Inc()
		e.cfg.Logger.DebugContext(r.Context(), "upgrade refused", "remote", r.RemoteAddr, "err", err)
		return
	}
	peer.Transport = t
	e.start(t, peer)
}

// accept upgrades a request.
func accept(w http.ResponseWriter, r *http.Request, subprotocol string, text bool) (*transport, error) {
	up := &upgrade{ResponseWriter: w}
	opts := &websocket.AcceptOptions{
		// admit has checked the origin, and has an answer in JSON.
		InsecureSkipVerify: true,
		// Without context: 1.2 MB for each connection that has one is too much. Small messages go as they are.
		CompressionMode: websocket.CompressionNoContextTakeover,
	}
	if subprotocol != "" {
		opts.Subprotocols = []string{subprotocol}
	}
	c, err := websocket.Accept(up, r, opts)
	if err != nil {
		return nil, err
	}
	return newTransport(context.WithoutCancel(r.Context()), c, up.wire, text, w.Header().Get("Sec-WebSocket-Extensions") != ""), nil
}

// start runs a connection in a goroutine of its own, which Close waits for: the request, the server's buffers and the stack of its goroutine are several times what the connection needs.
func (e *Edge) start(t *transport, peer gateway.Peer) {
	ctx, cut := context.WithCancel(t.ctx)
	e.mu.Lock()
	if e.closed {
		e.mu.Unlock()
		cut()
		t.Close(schema.Code_CODE_GOING_AWAY, "This edge has stopped; connect to another.")
		return
	}
	e.cuts[t] = cut
	e.running.Go(func() {
		pings := startPings(t, e.cfg.PingInterval)
		// Serve logs and counts the end.
		_ = e.cfg.Gateway.Serve(ctx, peer)
		pings.stop()
		cut()
		e.mu.Lock()
		delete(e.cuts, t)
		e.mu.Unlock()
	})
	e.mu.Unlock()
}

// Close cuts the connections that are left, refuses new ones, and waits until everything has ended. Drain the gateway first, so that nothing is cut.
func (e *Edge) Close() {
	e.mu.Lock()
	e.closed = true
	for _, cut := range e.cuts {
		cut()
	}
	e.mu.Unlock()
	e.running.Wait()
}

// ready says whether the edge takes connections.
func (e *Edge) ready(w http.ResponseWriter, _ *http.Request) {
	if err := e.cfg.Gateway.Ready(); err != nil {
		refuse(w, err)
		return
	}
	answer(w, http.StatusOK, state{State: "ready"})
}
