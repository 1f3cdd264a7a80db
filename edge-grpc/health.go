package edgegrpc

import (
	"context"
	"net/http"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"tidemark/internal/gateway"
	"tidemark/schema/schemaconnect"
)

// healthService is the name of gRPC's health protocol (grpc/doc/health-checking.md).
const healthService = "grpc.health.v1.Health"

// healthInterval is how often a watcher is told of changes, at the most.
const healthInterval = time.Second

// health answers gRPC's health protocol with the gateway's readiness: SERVING while the log is connected and the edge is not going away. It needs no token.
type health struct {
	healthpb.UnimplementedHealthServer
	gateway *gateway.Gateway
	// leaving is closed when the edge stops; watchers are told and let go.
	leaving chan struct{}
}

// status of a service: "" is the whole edge.
func (h *health) status(service string) healthpb.HealthCheckResponse_ServingStatus {
	switch service {
	case "", schemaconnect.SessionServiceName, healthService:
	default:
		return healthpb.HealthCheckResponse_SERVICE_UNKNOWN
	}
	select {
	case <-h.leaving:
		return healthpb.HealthCheckResponse_NOT_SERVING
	default:
	}
	if h.gateway.Ready() != nil {
		return healthpb.HealthCheckResponse_NOT_SERVING
	}
	return healthpb.HealthCheckResponse_SERVING
}

// Check answers at once.
func (h *health) Check(_ context.Context, req *healthpb.HealthCheckRequest) (*healthpb.HealthCheckResponse, error) {
	s := h.status(req.GetService())
	if s == healthpb.HealthCheckResponse_SERVICE_UNKNOWN {
		return nil, status.Error(codes.NotFound, "There is no service of this name here.")
	}
	return &healthpb.HealthCheckResponse{Status: s}, nil
}

// List answers with all services.
func (h *health) List(context.Context, *healthpb.HealthListRequest) (*healthpb.HealthListResponse, error) {
	res := &healthpb.HealthListResponse{Statuses: make(map[string]*healthpb.HealthCheckResponse)}
	for _, s := range []string{"", schemaconnect.SessionServiceName, healthService} {
		res.Statuses[s] = &healthpb.HealthCheckResponse{Status: h.status(s)}
	}
	return res, nil
}

// Watch tells the status now and whenever it has changed, until the client goes or the edge does.
func (h *health) Watch(req *healthpb.HealthCheckRequest, s grpc.ServerStreamingServer[healthpb.HealthCheckResponse]) error {
	return h.watch(s.Context(), req, s.Send)
}

func (h *health) watch(ctx context.Context, req *healthpb.HealthCheckRequest, send func(*healthpb.HealthCheckResponse) error) error {
	tick := time.NewTicker(healthInterval)
	defer tick.Stop()
	last := healthpb.HealthCheckResponse_UNKNOWN
	for {
		left := false
		select {
		case <-h.leaving:
			left = true
		default:
		}
		if now := h.status(req.GetService()); now != last {
			last = now
			if err := send(&healthpb.HealthCheckResponse{Status: now}); err != nil {
				return err
			}
		}
		if left {
			return status.Error(codes.Unavailable, "This edge is going away; watch another.")
		}
		select {
		case <-tick.C:
		case <-h.leaving:
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		}
	}
}

// mount adds the protocol to connect-go's handlers.
func (h *health) mount(mux *http.ServeMux) {
	mux.Handle(healthpb.Health_Check_FullMethodName, connect.NewUnaryHandlerSimple(healthpb.Health_Check_FullMethodName,
		func(ctx context.Context, req *healthpb.HealthCheckRequest) (*healthpb.HealthCheckResponse, error) {
			res, err := h.Check(ctx, req)
			return res, webStatus(err)
		}, webOptions()))
	mux.Handle(healthpb.Health_List_FullMethodName, connect.NewUnaryHandlerSimple(healthpb.Health_List_FullMethodName,
		func(ctx context.Context, req *healthpb.HealthListRequest) (*healthpb.HealthListResponse, error) {
			res, err := h.List(ctx, req)
			return res, webStatus(err)
		}, webOptions()))
	mux.Handle(healthpb.Health_Watch_FullMethodName, connect.NewServerStreamHandler(healthpb.Health_Watch_FullMethodName,
		func(ctx context.Context, req *connect.Request[healthpb.HealthCheckRequest], out *connect.ServerStream[healthpb.HealthCheckResponse]) error {
			unhurried(ctx)
			return webStatus(h.watch(ctx, req.Msg, out.Send))
		}, webOptions()))
}

// webStatus is an error of the health protocol as connect-go sends it: the codes are the same numbers.
func webStatus(err error) error {
	if s, ok := status.FromError(err); ok && err != nil {
		return connect.NewError(connect.Code(s.Code()), s.Err())
	}
	return err
}
