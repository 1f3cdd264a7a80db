package broker

import (
	"context"
	"encoding/json"
	"errors"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"tidemark/schema"
)

// reader reads what is stored: frames, pages and the registry, by direct gets on a connection of its own, where a large answer delays no acknowledgement. It holds nothing of a session. All
// its methods may be called concurrently.
//
// Errors are refusals, the context's, or errGone. A refusal is unavailable where NATS does not answer, which passes, and internal where what is stored cannot be read, which does not.
type reader struct {
	// Static after construction.
	nc      *connection
	streams int
	// gets holds a permit for each request in flight.
	gets chan struct{}

	tokens atomic.Pointer[tokenSealer] // nil until the first listing
}

const (
	// maxGets bounds the requests in flight on the connection, and with them what their answers hold in memory.
	maxGets = 64
	// getTimeout is how long one request may take.
	getTimeout = 5 * time.Second
	// goneRetry is how long the leader is given to store a frame that it should have.
	goneRetry = 5 * time.Millisecond
)

// errGone says that a frame or page that was there once is not any more: retention or a deletion took it.
var errGone = errors.New("broker: retention took it")

// errCodeNoMessage: the leader has no such message (nats-server, server/errors.json).
const errCodeNoMessage jetstream.ErrorCode = 10037

func isGone(err error) bool { return errors.Is(err, errGone) }

func newReader(nc *connection, streams int) *reader {
	return &reader{nc: nc, streams: streams, gets: make(chan struct{}, maxGets)}
}

// stored is a message as a stream has it.
type stored struct {
	subject string
	seq     uint64
	header  nats.Header
	data    []byte
}

func (r *reader) logOf(ln lane) string  { return logStreamName(streamOf(ln.slice, r.streams)) }
func (r *reader) pageOf(ln lane) string { return pageStreamName(streamOf(ln.slice, r.streams)) }

// headFrame is the session's last frame, as some replica has it; nil where there is none.
func (r *reader) headFrame(ctx context.Context, ln lane) (*frame, error) {
	m, err := r.last(ctx, r.logOf(ln), ln.logSubject())
	if m == nil || err != nil {
		return nil, err
	}
	return frameOf(m, ln)
}

// headFrameFromLeader is the session's last frame as the stream's leader has it, for whoever was told by a lost race that there is a newer one.
func (r *reader) headFrameFromLeader(ctx context.Context, ln lane) (*frame, error) {
	m, err := r.lastFromLeader(ctx, r.logOf(ln), ln.logSubject())
	if m == nil || err != nil {
		return nil, err
	}
	return frameOf(m, ln)
}

// frameAt is the session's frame with this stream sequence, of which somebody knows that it was stored. The error is errGone where retention took it.
func (r *reader) frameAt(ctx context.Context, ln lane, streamSeq uint64) (*frame, error) {
	stream := r.logOf(ln)
	m, err := r.at(ctx, stream, streamSeq)
	for try := 0; m == nil && err == nil; try++ {
		// A replica that lags may not have it yet, a leader that has just been elected neither.
		if try == 2 {
			return nil, errGone
		}
		if try > 0 && !sleep(ctx, goneRetry) {
			return nil, ctx.Err()
		}
		m, err = r.fromLeader(ctx, stream, `{"seq":`+strconv.FormatUint(streamSeq, 10)+`}`)
	}
	if err != nil {
		return nil, err
	}
	return frameOf(m, ln)
}

func frameOf(m *stored, ln lane) (*frame, error) {
	if m.subject != ln.logSubject() {
		return nil, schema.Refuse(schema.Code_CODE_INTERNAL, "The log is damaged: message %d was said to be a frame of session %s, and is not.", m.seq, ln.name)
	}
	f, err := parseFrame(m.data)
	if err != nil {
		return nil, err
	}
	f.StreamSeq = m.seq
	return f, nil
}

// at is the message with this sequence, from some replica; nil where that has none.
func (r *reader) at(ctx context.Context, stream string, seq uint64) (*stored, error) {
	return r.direct(ctx, "$JS.API.DIRECT.GET."+stream, `{"seq":`+strconv.FormatUint(seq, 10)+`}`)
}

// last is the last message of a subject, from some replica; nil where that has none.
func (r *reader) last(ctx context.Context, stream, subject string) (*stored, error) {
	return r.direct(ctx, "$JS.API.DIRECT.GET."+stream+"."+subject, "")
}

func (r *reader) lastFromLeader(ctx context.Context, stream, subject string) (*stored, error) {
	return r.fromLeader(ctx, stream, `{"last_by_subj":`+strconv.Quote(subject)+`}`)
}

func (r *reader) direct(ctx context.Context, api, body string) (*stored, error) {
	m, err := r.request(ctx, api, body)
	if err != nil {
		return nil, err
	}
	switch status := m.Header.Get("Status"); status {
	case "":
		return storedOf(m)
	case "404":
		return nil, nil
	default:
		return nil, schema.Refuse(schema.Code_CODE_INTERNAL, "NATS refused a read with status %s %s.", status, m.Header.Get("Description"))
	}
}

// storedOf reads a direct get's answer: the message, with where it is in headers (ADR-31 of NATS).
func storedOf(m *nats.Msg) (*stored, error) {
	seq, err := strconv.ParseUint(m.Header.Get("Nats-Sequence"), 10, 64)
	if err != nil {
		return nil, &schema.Refusal{Code: schema.Code_CODE_INTERNAL, Message: "NATS answered a read without saying where the message is.", Err: err}
	}
	return &stored{subject: m.Header.Get("Nats-Subject"), seq: seq, header: m.Header, data: m.Data}, nil
}

// fromLeader asks the stream's leader; nil where it has no such message.
func (r *reader) fromLeader(ctx context.Context, stream, body string) (*stored, error) {
	m, err := r.request(ctx, "$JS.API.STREAM.MSG.GET."+stream, body)
	if err != nil {
		return nil, err
	}
	var reply struct {
		Error   *jetstream.APIError `json:"error"`
		Message *struct {
			Subject string `json:"subject"`
			Seq     uint64 `json:"seq"`
			Header  []byte `json:"hdrs"`
			Data    []byte `json:"data"`
		} `json:"message"`
	}
	if err := json.Unmarshal(m.Data, &reply); err != nil {
		return nil, &schema.Refusal{Code: schema.Code_CODE_INTERNAL, Message: "NATS answered a read with what is not JSON.", Err: err}
	}
	switch {
	case reply.Error != nil && reply.Error.ErrorCode == errCodeNoMessage:
		return nil, nil
	case reply.Error != nil:
		return nil, unreadable(reply.Error)
	case reply.Message == nil:
		return nil, schema.Refuse(schema.Code_CODE_INTERNAL, "NATS answered a read with neither a message nor an error.")
	}
	s := &stored{subject: reply.Message.Subject, seq: reply.Message.Seq, data: reply.Message.Data}
	if len(reply.Message.Header) > 0 {
		if s.header, err = nats.DecodeHeadersMsg(reply.Message.Header); err != nil {
			return nil, &schema.Refusal{Code: schema.Code_CODE_INTERNAL, Message: "A stored message has headers that cannot be read.", Err: err}
		}
	}
	return s, nil
}

// request makes one request when there is a permit for it.
func (r *reader) request(ctx context.Context, api, body string) (*nats.Msg, error) {
	select {
	case r.gets <- struct{}{}:
		defer func() { <-r.gets }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	limited, cancel := context.WithTimeout(ctx, getTimeout)
	defer cancel()
	m, err := r.nc.roundTrip(limited, &nats.Msg{Subject: api, Data: []byte(body)})
	if err == nil {
		return m, nil
	}
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	return nil, unreadable(err)
}

func unreadable(err error) error {
	return &schema.Refusal{Code: schema.Code_CODE_UNAVAILABLE, Message: "The log cannot be read just now; try again in a moment.", Err: err}
}

// together runs fn for 0 to n-1, as many at once as the reader has permits for, and returns the first error by number. One that fails does not stop the others, which end by themselves.
func together(n int, fn func(i int) error) error {
	errs := make([]error, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { errs[i] = fn(i) })
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// sleep waits; false where ctx ended first.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
