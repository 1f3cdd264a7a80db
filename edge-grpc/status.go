package edgegrpc

import (
	"bytes"
	"errors"
	"strings"

	"connectrpc.com/connect"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
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
	r.Message = strings.ToValidUTF8(r.Message, "\uFFFD")
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

// farewell is how a stream ends: with the last frame's words where that frame was an error.
type farewell struct {
	frame *schema.ErrorFrame
}

// errorTag begins a ServerFrame that is an error: field 9, length-delimited.
const errorTag = 9<<3 | 2

// note keeps the error frame that ends what was sent. Called for every write, so it looks at the first bytes.
func (l *farewell) note(messages [][]byte, isJSON bool) {
	m := messages[len(messages)-1]
	f := new(schema.ServerFrame)
	switch {
	case isJSON && bytes.Contains(m[:min(len(m), 16)], []byte(`"error"`)):
		if protojson.Unmarshal(m, f) != nil {
			return
		}
	case !isJSON && len(m) > 0 && m[0] == errorTag:
		if proto.Unmarshal(m, f) != nil {
			return
		}
	}
	if e := f.GetError(); e != nil && e.GetChannel() == 0 {
		l.frame = e
	}
}

// failure makes the status of the code and the sentence; nil for an end without a fault.
func (l *farewell) failure(code schema.Code, text string) *failure {
	if code == schema.Code_CODE_UNSPECIFIED {
		return nil
	}
	f := failed(&schema.Refusal{Code: code, Message: text})
	if l.frame.GetCode() == code {
		f.detail = l.frame
	}
	return f
}
