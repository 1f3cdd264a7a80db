package edgegrpc

import (
	"errors"
	"testing"

	"connectrpc.com/connect"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"tidemark/schema"
)

// Every code has a status of its rule, the same from both stacks, with its word and its frame.
func TestEveryCodeHasItsStatus(t *testing.T) {
	for n := range schema.Code_name {
		code := schema.Code(n)
		if code == schema.Code_CODE_UNSPECIFIED {
			continue
		}
		f := failed(schema.Refuse(code, "Something about session %q that \xff is no UTF-8.", "s"))
		s := status.Convert(f.native())
		if s.Code() != codes.Code(code.Rule().GRPC) || len(s.Details()) != 1 || s.Code() == codes.OK {
			t.Errorf("%s: %v with %v", code.Word(), s.Code(), s.Details())
		}
		if w := f.trailer().Get(codeTrailer); len(w) != 1 || w[0] != code.Word() {
			t.Errorf("%s: trailer %q", code.Word(), w)
		}
		e, ok := errors.AsType[*connect.Error](f.web())
		if !ok || uint32(e.Code()) != uint32(s.Code()) || len(e.Details()) != 1 || e.Meta().Get(codeTrailer) != code.Word() {
			t.Errorf("%s: %v", code.Word(), e)
		}
	}
}

// The byte that tells an error frame from others is the descriptor's.
func TestErrorTag(t *testing.T) {
	b, err := proto.Marshal(&schema.ServerFrame{Frame: &schema.ServerFrame_Error{Error: &schema.ErrorFrame{Code: schema.Code_CODE_CONFLICT}}})
	if err != nil || b[0] != errorTag {
		t.Errorf("an error frame begins with %x, %v; want %x", b[0], err, errorTag)
	}
}
