package edgegrpc

import (
	"context"
	"errors"
	"io"
	"net"
	"slices"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"
	"connectrpc.com/grpcreflect"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding/gzip"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	reflectpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"

	"tidemark/internal/auth"
	"tidemark/internal/gateway"
	"tidemark/schema"
)

type gatewayConfig = gateway.Config

func TestHealthNative(t *testing.T) {
	inWorld(t, func(w *world) {
		k := w.dial(dialects[0], "")
		h := healthpb.NewHealthClient(k.grpc)
		watch, err := h.Watch(w.ctx, &healthpb.HealthCheckRequest{})
		w.must(err)
		want := func(s healthpb.HealthCheckResponse_ServingStatus) {
			w.Helper()
			if m, err := watch.Recv(); err != nil || m.GetStatus() != s {
				w.Fatalf("watched %v, %v; want %v", m, err, s)
			}
			for _, name := range []string{"", "tidemark.v1.SessionService"} {
				if m, err := h.Check(w.ctx, &healthpb.HealthCheckRequest{Service: name}); err != nil || m.GetStatus() != s {
					w.Errorf("%q: %v, %v; want %v", name, m, err, s)
				}
			}
		}
		want(healthpb.HealthCheckResponse_SERVING)
		w.log.away.Store(true)
		want(healthpb.HealthCheckResponse_NOT_SERVING)
		w.log.away.Store(false)
		want(healthpb.HealthCheckResponse_SERVING)
		if _, err := h.Check(w.ctx, &healthpb.HealthCheckRequest{Service: "nobody"}); status.Code(err) != codes.NotFound {
			w.Errorf("an unknown service: %v", err)
		}
		if l, err := h.List(w.ctx, &healthpb.HealthListRequest{}); err != nil || len(l.GetStatuses()) != 3 {
			w.Errorf("list: %v, %v", l, err)
		}
		// A watcher does not hold up the drain, and learns of it.
		began := time.Now()
		w.must(w.edge.Drain(w.ctx, "The edge is updated."))
		if took := time.Since(began); took > time.Second {
			w.Errorf("the drain took %s", took)
		}
		if m, err := watch.Recv(); err != nil || m.GetStatus() != healthpb.HealthCheckResponse_NOT_SERVING {
			w.Errorf("watched %v, %v", m, err)
		}
		if _, err := watch.Recv(); status.Code(err) != codes.Unavailable {
			w.Errorf("the watch ended with %v", err)
		}
	})
}

func TestHealthWeb(t *testing.T) {
	inWorld(t, func(w *world) {
		k := w.dial(dialects[5], "")
		check := connect.NewClient[healthpb.HealthCheckRequest, healthpb.HealthCheckResponse](k.http, "http://edge"+healthpb.Health_Check_FullMethodName)
		res, err := check.CallUnary(w.ctx, connect.NewRequest(&healthpb.HealthCheckRequest{}))
		if err != nil || res.Msg.GetStatus() != healthpb.HealthCheckResponse_SERVING {
			w.Errorf("%v, %v", res, err)
		}
		w.log.away.Store(true)
		res, err = check.CallUnary(w.ctx, connect.NewRequest(&healthpb.HealthCheckRequest{}))
		if err != nil || res.Msg.GetStatus() != healthpb.HealthCheckResponse_NOT_SERVING {
			w.Errorf("%v, %v", res, err)
		}
		_, err = check.CallUnary(w.ctx, connect.NewRequest(&healthpb.HealthCheckRequest{Service: "nobody"}))
		if connect.CodeOf(err) != connect.CodeNotFound {
			w.Errorf("an unknown service: %v", err)
		}
		watch := connect.NewClient[healthpb.HealthCheckRequest, healthpb.HealthCheckResponse](k.http, "http://edge"+healthpb.Health_Watch_FullMethodName)
		s, err := watch.CallServerStream(w.ctx, connect.NewRequest(&healthpb.HealthCheckRequest{Service: "nobody"}))
		w.must(err)
		if !s.Receive() || s.Msg().GetStatus() != healthpb.HealthCheckResponse_SERVICE_UNKNOWN {
			w.Errorf("watched %v, %v", s.Msg(), s.Err())
		}
		go func() { _ = w.edge.Drain(w.ctx, "The edge is updated.") }()
		for s.Receive() {
		}
		if connect.CodeOf(s.Err()) != connect.CodeUnavailable {
			w.Errorf("the watch ended with %v", s.Err())
		}
	})
}

func TestReflection(t *testing.T) {
	inWorld(t, func(w *world) {
		k := w.dial(dialects[0], "")
		s, err := reflectpb.NewServerReflectionClient(k.grpc).ServerReflectionInfo(w.ctx)
		w.must(err)
		ask := func(req *reflectpb.ServerReflectionRequest) *reflectpb.ServerReflectionResponse {
			w.Helper()
			w.must(s.Send(req))
			res, err := s.Recv()
			w.must(err)
			return res
		}
		res := ask(&reflectpb.ServerReflectionRequest{MessageRequest: &reflectpb.ServerReflectionRequest_ListServices{}})
		var names []string
		for _, n := range res.GetListServicesResponse().GetService() {
			names = append(names, n.GetName())
		}
		if !slices.Contains(names, "tidemark.v1.SessionService") || !slices.Contains(names, healthService) {
			w.Errorf("services %q", names)
		}
		res = ask(&reflectpb.ServerReflectionRequest{MessageRequest: &reflectpb.ServerReflectionRequest_FileContainingSymbol{FileContainingSymbol: "tidemark.v1.SessionService.AppendStream"}})
		if len(res.GetFileDescriptorResponse().GetFileDescriptorProto()) == 0 {
			w.Errorf("no descriptor: %v", res)
		}
		w.must(s.CloseSend())
		_, _ = s.Recv()
	})
	inWorld(t, func(w *world) {
		k := w.dial(dialects[6], "")
		s := grpcreflect.NewClient(k.http, "http://edge").NewStream(w.ctx)
		names, err := s.ListServices()
		w.must(err)
		if !slices.Contains(names, "tidemark.v1.SessionService") || !slices.Contains(names, "grpc.health.v1.Health") {
			w.Errorf("services %q", names)
		}
		files, err := s.FileContainingSymbol("tidemark.v1.SessionService")
		if err != nil || len(files) == 0 {
			w.Errorf("no descriptor: %v", err)
		}
		_, _ = s.Close()
	})
}

// A client that compresses is understood.
func TestCompressedRequests(t *testing.T) {
	inWorld(t, func(w *world) {
		k := w.dial(dialects[0], "")
		res, err := healthpb.NewHealthClient(k.grpc).Check(w.ctx, &healthpb.HealthCheckRequest{}, grpc.UseCompressor(gzip.Name))
		if err != nil || res.GetStatus() != healthpb.HealthCheckResponse_SERVING {
			w.Errorf("%v, %v", res, err)
		}
		w.publish("s", string(make([]byte, 100_000)))
		for _, d := range dialects {
			d.options = append(slices.Clone(d.options), connect.WithSendGzip())
			k := w.dial(d, w.token(schema.Role_ROLE_AGENT, "*"))
			w.must(k.call("Append", &schema.AppendRequest{Session: d.name, Envelopes: []*schema.Envelope{tokenOf("x")}}, new(schema.AppendResponse)))
			c := k.follow(&schema.Attach{Session: "s"})
			c.next()
			if e := c.next().GetEvents().GetEnvelopes(); len(e) != 1 || len(e[0].GetToken().GetText()) != 100_000 {
				w.Errorf("%s: %d envelopes", d.name, len(e))
			}
			c.cancel()
		}
	})
}

// A gRPC client may connect long before its first call.
func TestIdleClientIsNative(t *testing.T) {
	inWorld(t, func(w *world) {
		k := w.dial(dialects[0], w.token(schema.Role_ROLE_AGENT, "*"))
		k.grpc.Connect()
		// grpc-go closes a connection without calls after half an hour.
		time.Sleep(20 * time.Minute)
		w.must(k.call("Append", &schema.AppendRequest{Session: "s", Envelopes: []*schema.Envelope{tokenOf("x")}}, new(schema.AppendResponse)))
		if n := len(*k.conns); n != 1 {
			w.Errorf("%d connections, want the one it opened first", n)
		}
	})
}

// A connection is one server's for good: begun on the web's, it carries everything; begun as native, it refuses what is not.
func TestMixedConnection(t *testing.T) {
	inWorld(t, func(w *world) {
		list := func(k *client) error {
			return k.call("ListSessions", &schema.ListSessionsRequest{}, new(schema.ListSessionsResponse))
		}
		token := w.token(schema.Role_ROLE_AGENT, "*")
		native, web := dialects[1], dialects[4]
		k := w.dial(web, token)
		w.must(list(k))
		k.d = native
		w.must(list(k))
		k.d = dialects[6]
		w.must(list(k))
		if n := len(*k.conns); n != 1 {
			w.Errorf("%d connections, want one", n)
		}
		k = w.dial(native, token)
		w.must(list(k))
		k.d = web
		if err := list(k); err == nil || len(*k.conns) != 1 {
			w.Errorf("gRPC-Web behind native gRPC: %v on %d connections", err, len(*k.conns))
		}
		k.d = native
		w.must(list(k))
	})
}

// Connections beyond the bound wait until there is room.
func TestMaxConnections(t *testing.T) {
	inWorldWith(t, func(c *Config, _ *gatewayConfig) { c.MaxConnections = 2 }, func(w *world) {
		token := w.token(schema.Role_ROLE_AGENT, "*")
		first, second := w.dial(dialects[0], token), w.dial(dialects[5], token)
		w.must(first.call("ListSessions", &schema.ListSessionsRequest{}, new(schema.ListSessionsResponse)))
		w.must(second.call("ListSessions", &schema.ListSessionsRequest{}, new(schema.ListSessionsResponse)))
		var done atomic.Bool
		third := w.dial(dialects[0], token)
		go func() {
			w.must(third.call("ListSessions", &schema.ListSessionsRequest{}, new(schema.ListSessionsResponse)))
			done.Store(true)
		}()
		synctest.Wait()
		if done.Load() {
			w.Errorf("a third connection was served")
		}
		first.close()
		time.Sleep(time.Minute)
		synctest.Wait()
		if !done.Load() {
			w.Errorf("the third connection was not served when there was room")
		}
	})
}

// A client of grpc-go knows the bound on streams from the first, and waits.
func TestMaxConcurrentStreams(t *testing.T) {
	inWorldWith(t, func(c *Config, _ *gatewayConfig) { c.MaxConcurrentStreams = 3 }, func(w *world) {
		k := w.dial(dialects[0], w.token(schema.Role_ROLE_USER, "*"))
		var open []*conversation
		for range 3 {
			c := k.follow(&schema.Attach{Session: "s"})
			c.next()
			open = append(open, c)
		}
		var done atomic.Bool
		go func() {
			c := k.follow(&schema.Attach{Session: "s"})
			c.next()
			done.Store(true)
			c.cancel()
		}()
		synctest.Wait()
		if done.Load() {
			w.Errorf("a fourth stream was served")
		}
		open[0].cancel()
		synctest.Wait()
		if !done.Load() {
			w.Errorf("the fourth stream was not served when there was room")
		}
		open[1].cancel()
		open[2].cancel()
	})
}

// failingListener fails so often before it accepts.
type failingListener struct {
	*pipeListener
	err  error
	left atomic.Int32
}

func (l *failingListener) Accept() (net.Conn, error) {
	if l.left.Add(-1) >= 0 {
		return nil, l.err
	}
	return l.pipeListener.Accept()
}

func TestListenerFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		serve := func(l net.Listener) (chan error, *Edge, context.CancelFunc) {
			inner := &world{T: t, log: new(testLog)}
			g, err := gateway.New(gateway.Config{Log: inner.log, Verify: nobody})
			inner.must(err)
			e, err := New(Config{Gateway: g, Log: inner.log, Verify: nobody})
			inner.must(err)
			ctx, stop := context.WithCancel(t.Context())
			done := make(chan error, 1)
			go func() { done <- e.Serve(ctx, l) }()
			return done, e, stop
		}
		// Too many open files: it waits and goes on.
		l := &failingListener{pipeListener: newPipeListener(), err: &net.OpError{Op: "accept", Err: syscall.EMFILE}}
		l.left.Store(20)
		began := time.Now()
		done, e, stop := serve(l)
		c, err := l.dial(t.Context())
		if err != nil || time.Since(began) < time.Second {
			t.Errorf("%v after %s", err, time.Since(began))
		}
		if err := e.Serve(t.Context(), l); err == nil {
			t.Error("Serve may be called twice")
		}
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
		_ = c.Close()
		// Anything else ends Serve.
		l = &failingListener{pipeListener: newPipeListener(), err: errors.New("the network is gone")}
		l.left.Store(1)
		done, _, stop = serve(l)
		if err := <-done; err == nil || !errors.Is(err, l.err) {
			t.Errorf("Serve returned %v", err)
		}
		stop()
		// A drained edge serves no more.
		done, e, stop = serve(newPipeListener())
		synctest.Wait()
		if err := e.Drain(t.Context(), "The edge is updated."); err != nil {
			t.Error(err)
		}
		if err := <-done; err != nil {
			t.Error(err)
		}
		stop()
	})
}

func nobody(context.Context, string) (*auth.Principal, error) { return nil, errors.New("nobody") }

// An edge that was drained, or whose context had ended, before Serve does not serve.
func TestServeAfterTheEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := new(testLog)
		g, err := gateway.New(gateway.Config{Log: log, Verify: nobody})
		if err != nil {
			t.Fatal(err)
		}
		e, err := New(Config{Gateway: g, Log: log, Verify: nobody})
		if err != nil {
			t.Fatal(err)
		}
		if err := e.Drain(t.Context(), "Never mind."); err != nil {
			t.Error(err)
		}
		l := newPipeListener()
		if err := e.Serve(t.Context(), l); err != nil {
			t.Error(err)
		}
		if _, err := l.dial(t.Context()); err == nil {
			t.Error("the listener is open")
		}
	})
}

func TestConfig(t *testing.T) {
	if _, err := New(Config{}); err == nil {
		t.Error("a configuration without a gateway was taken")
	}
}

// A connection that is being looked at when the edge stops is closed with it.
func TestStopWhileRouting(t *testing.T) {
	inWorld(t, func(w *world) {
		c, err := w.l.dial(w.ctx)
		w.must(err)
		_, err = io.WriteString(c, "PRI * HT")
		w.must(err)
		synctest.Wait()
		began := time.Now()
		w.must(w.edge.Drain(w.ctx, "The edge is updated."))
		if _, err := io.ReadAll(c); time.Since(began) > time.Second {
			w.Errorf("closed after %s, %v", time.Since(began), err)
		}
		_ = c.Close()
	})
}
