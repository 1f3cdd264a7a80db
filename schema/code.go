package schema

import (
	"errors"
	"fmt"
	"strings"
)

// Refusal is the one error type of Tidemark: why something that was asked for was not done. Its code belongs to a closed set, its message is a
// sentence for people that names the session and says what to do.
type Refusal struct {
	Code    Code
	Message string
	// Head is the session's head, where the code speaks of it: [Code_CODE_CONFLICT], [Code_CODE_SEQ_BEYOND_HEAD].
	Head uint64
	// Expected is the producer's next seq for [Code_CODE_PRODUCER_GAP], its current epoch for [Code_CODE_PRODUCER_FENCED].
	Expected uint64
	// Epoch is the session's history, for [Code_CODE_EPOCH_MISMATCH].
	Epoch string
	// Err is the cause, where there is one; it is for logs and is not sent to clients.
	Err error
}

// Refuse makes a refusal with a formatted sentence.
func Refuse(code Code, format string, args ...any) *Refusal {
	return &Refusal{Code: code, Message: fmt.Sprintf(format, args...)}
}

func (r *Refusal) Error() string {
	if r.Err != nil {
		return r.Code.Word() + ": " + r.Message + ": " + r.Err.Error()
	}
	return r.Code.Word() + ": " + r.Message
}

func (r *Refusal) Unwrap() error { return r.Err }

// CodeOf returns the code of err: that of the refusal in it, or [Code_CODE_INTERNAL].
func CodeOf(err error) Code {
	if r, ok := errors.AsType[*Refusal](err); ok {
		return r.Code
	}
	return Code_CODE_INTERNAL
}

// AsRefusal returns the refusal in err, or wraps err as an internal one whose sentence tells the client nothing of the cause.
func AsRefusal(err error) *Refusal {
	if r, ok := errors.AsType[*Refusal](err); ok {
		return r
	}
	return &Refusal{Code: Code_CODE_INTERNAL, Message: "The server failed; its log says why. Try again from the last seq you saw.", Err: err}
}

// Word is the code as it stands in JSON, in metrics, in close reasons and in PROTOCOL.md: lower case, without a prefix.
func (c Code) Word() string {
	return strings.ToLower(strings.TrimPrefix(c.String(), "CODE_"))
}

// Rule is a code's row in PROTOCOL.md.
type Rule struct {
	// GRPC is the status code of gRPC (google.rpc.Code).
	GRPC uint32
	// Close is the WebSocket close code (RFC 6455, section 7.4) where the connection ends for it.
	Close int
	// Reconnect says whether coming again can help, and from where.
	Reconnect Reconnect
	// Retryable: the same publish, sent again with the same ids, may succeed.
	Retryable bool
}

// Rule returns the row of c. A code without a row is treated as internal.
func (c Code) Rule() Rule {
	if r, ok := rules[c]; ok {
		return r
	}
	return rules[Code_CODE_INTERNAL]
}

// closeTokenExpired is the close code of a connection whose token expired: of the private ones (RFC 6455, section 7.4.2) the one that looks like HTTP's 401.
const closeTokenExpired = 4401

// The numbers of the first column are those of google.rpc.Code, those of the second are RFC 6455's.
var rules = map[Code]Rule{ //nolint:gochecknoglobals // a table that nothing writes
	Code_CODE_INVALID_MESSAGE:      {GRPC: 3, Close: 1008, Reconnect: Reconnect_RECONNECT_NO},
	Code_CODE_UNKNOWN_TYPE:         {GRPC: 3, Close: 1008, Reconnect: Reconnect_RECONNECT_NO},
	Code_CODE_TOO_LARGE:            {GRPC: 8, Close: 1009, Reconnect: Reconnect_RECONNECT_NO},
	Code_CODE_UNSUPPORTED_PROTOCOL: {GRPC: 12, Close: 1002, Reconnect: Reconnect_RECONNECT_NO},
	Code_CODE_UNAUTHENTICATED:      {GRPC: 16, Close: 1008, Reconnect: Reconnect_RECONNECT_NO},
	Code_CODE_FORBIDDEN:            {GRPC: 7, Close: 1008, Reconnect: Reconnect_RECONNECT_NO},
	Code_CODE_SESSION_NOT_FOUND:    {GRPC: 5, Close: 1008, Reconnect: Reconnect_RECONNECT_NO},
	Code_CODE_ALREADY_EXISTS:       {GRPC: 6, Close: 1008, Reconnect: Reconnect_RECONNECT_NO},
	Code_CODE_SESSION_DELETED:      {GRPC: 5, Close: 1008, Reconnect: Reconnect_RECONNECT_BEGINNING},
	Code_CODE_SEQ_BEYOND_HEAD:      {GRPC: 11, Close: 1008, Reconnect: Reconnect_RECONNECT_BEGINNING},
	Code_CODE_EPOCH_MISMATCH:       {GRPC: 9, Close: 1008, Reconnect: Reconnect_RECONNECT_BEGINNING},
	Code_CODE_CONFLICT:             {GRPC: 10, Close: 1008, Reconnect: Reconnect_RECONNECT_SAME_CURSOR},
	Code_CODE_PRODUCER_GAP:         {GRPC: 9, Close: 1008, Reconnect: Reconnect_RECONNECT_SAME_CURSOR},
	Code_CODE_PRODUCER_FENCED:      {GRPC: 9, Close: 1008, Reconnect: Reconnect_RECONNECT_NO},
	Code_CODE_LIMIT_EXCEEDED:       {GRPC: 8, Close: 1008, Reconnect: Reconnect_RECONNECT_SAME_CURSOR},
	Code_CODE_UNAVAILABLE:          {GRPC: 14, Close: 1011, Reconnect: Reconnect_RECONNECT_SAME_CURSOR, Retryable: true},
	Code_CODE_STORAGE_FULL:         {GRPC: 8, Close: 1011, Reconnect: Reconnect_RECONNECT_SAME_CURSOR, Retryable: true},
	Code_CODE_GOING_AWAY:           {GRPC: 14, Close: 1012, Reconnect: Reconnect_RECONNECT_SAME_CURSOR, Retryable: true},
	Code_CODE_PEER_DEAD:            {GRPC: 14, Close: 1001, Reconnect: Reconnect_RECONNECT_SAME_CURSOR},
	Code_CODE_INTERNAL:             {GRPC: 13, Close: 1011, Reconnect: Reconnect_RECONNECT_SAME_CURSOR},
	Code_CODE_SESSION_ENDED:        {GRPC: 9, Close: 1008, Reconnect: Reconnect_RECONNECT_NO},
	Code_CODE_NOT_WAITING:          {GRPC: 9, Close: 1008, Reconnect: Reconnect_RECONNECT_NO},
	Code_CODE_INVALID_RESPONSE:     {GRPC: 3, Close: 1008, Reconnect: Reconnect_RECONNECT_NO},
	Code_CODE_INVALID_TRANSITION:   {GRPC: 9, Close: 1008, Reconnect: Reconnect_RECONNECT_NO},
	Code_CODE_RATE_EXCEEDED:        {GRPC: 8, Close: 1008, Reconnect: Reconnect_RECONNECT_SAME_CURSOR, Retryable: true},
	Code_CODE_TOKEN_EXPIRED:        {GRPC: 16, Close: closeTokenExpired, Reconnect: Reconnect_RECONNECT_SAME_CURSOR},
	Code_CODE_TOO_MANY_CONNECTIONS: {GRPC: 8, Close: 1008, Reconnect: Reconnect_RECONNECT_SAME_CURSOR},
	Code_CODE_TOO_MANY_SESSIONS:    {GRPC: 8, Close: 1008, Reconnect: Reconnect_RECONNECT_SAME_CURSOR},
	Code_CODE_ORIGIN_NOT_ALLOWED:   {GRPC: 7, Close: 1008, Reconnect: Reconnect_RECONNECT_NO},
	Code_CODE_ALREADY_ANSWERED:     {GRPC: 6, Close: 1008, Reconnect: Reconnect_RECONNECT_NO},
	Code_CODE_CANCELLED:            {GRPC: 1, Close: 1008, Reconnect: Reconnect_RECONNECT_NO},
	Code_CODE_WORK_LOST:            {GRPC: 9, Close: 1008, Reconnect: Reconnect_RECONNECT_NO},
	Code_CODE_WORK_NOT_FOUND:       {GRPC: 5, Close: 1008, Reconnect: Reconnect_RECONNECT_NO},
	Code_CODE_RUN_ENDED:            {GRPC: 9, Close: 1008, Reconnect: Reconnect_RECONNECT_NO},
}

// DurabilityWord is the class as configuration, logs and PROTOCOL.md name it: memory, os, fsync, replicated.
func DurabilityWord(d Durability) string {
	return strings.ToLower(strings.TrimPrefix(d.String(), "DURABILITY_"))
}

// ParseDurability is the reverse of [DurabilityWord]; unspecified where the word is not one of them.
func ParseDurability(word string) Durability {
	return Durability(Durability_value["DURABILITY_"+strings.ToUpper(word)])
}

// StatusWord is where a session stands as JSON, listings and PROTOCOL.md name it: open, running, waiting_for_input, completed, failed, cancelled. Empty for unspecified.
func StatusWord(s Status) string {
	if s == Status_STATUS_UNSPECIFIED {
		return ""
	}
	return strings.ToLower(strings.TrimPrefix(s.String(), "STATUS_"))
}

// Ended reports whether a session with this status has ended: it takes nothing more but system, and its status does not change again.
func Ended(s Status) bool {
	return s == Status_STATUS_COMPLETED || s == Status_STATUS_FAILED || s == Status_STATUS_CANCELLED
}
