package edgegrpc

import (
	"errors"

	"connectrpc.com/connect"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/protoadapt"

	"tidemark/schema"
)

// codeTrailer is the metadata key under which a failed call carries its code's word: session_not_found. Codes of gRPC are coarser.
const codeTrailer = "tidemark-code"

// failure is a refusal on its way to a caller.
type failure struct {
	refusal *schema.Refusal
	// detail is the frame that a multiplexed connection would have sent: [schema.Rejected] for an append, otherwise [schema.ErrorFrame].
	detail proto.Message
}

// failed is the failure of anything but an append.
func failed(r *schema.Refusal) *failure {
	f := &schema.ErrorFrame{Code: r.Code, Message: r.Message, Reconnect: r.Code.Rule().Reconnect, Epoch: r.Epoch}
	if r.Head != 0 {
		f.HeadSeq = new(r.Head)
	}
	return &failure{r, f}
}

// rejected is the failure of an append.
func rejected(r *schema.Refusal) *failure {
	f := &schema.Rejected{Code: r.Code, Message: r.Message, Retryable: r.Code.Rule().Retryable}
	if r.Head != 0 || r.Code == schema.Code_CODE_CONFLICT {
		f.HeadSeq = new(r.Head)
	}
	if r.Expected != 0 || r.Code == schema.Code_CODE_PRODUCER_GAP {
		f.Expected = new(r.Expected)
	}
	return &failure{r, f}
}

// trailer is the failure's metadata.
func (f *failure) trailer() metadata.MD {
	return metadata.Pairs(codeTrailer, f.refusal.Code.Word())
}

// native is the failure as grpc-go sends it.
func (f *failure) native() error {
	s := status.New(codes.Code(f.refusal.Code.Rule().GRPC), f.refusal.Message)
	if d, err := s.WithDetails(protoadapt.MessageV1Of(f.detail)); err == nil {
		s = d
	}
	return s.Err()
}

// web is the failure as connect-go sends it.
func (f *failure) web() error {
	e := connect.NewError(connect.Code(f.refusal.Code.Rule().GRPC), errors.New(f.refusal.Message))
	if d, err := connect.NewErrorDetail(f.detail); err == nil {
		e.AddDetail(d)
	}
	e.Meta().Set(codeTrailer, f.refusal.Code.Word())
	return e
}
