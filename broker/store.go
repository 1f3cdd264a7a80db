package broker

import (
	"context"
	"encoding/json"
	"errors"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"tidemark/schema"
)

// storeTimeout is how long a PubAck may take before the frame is sent again, with the same fence.
const storeTimeout = 2 * time.Second

// errLostRace: the fence was refused; another frame is the session's last.
var errLostRace = errors.New("broker: another frame came first")

// Error codes of JetStream (nats-server, server/errors.json).
const (
	errCodeInsufficientResources jetstream.ErrorCode = 10023
	errCodeMemoryExceeded        jetstream.ErrorCode = 10028
	errCodeStorageExceeded       jetstream.ErrorCode = 10047
	errCodeStreamStoreFailed     jetstream.ErrorCode = 10077
	errCodeMaxPayload            jetstream.ErrorCode = 10054
	errCodeWrongLastSequence     jetstream.ErrorCode = 10071
	// errCodeInFlight: in a cluster, an earlier message of the subject is still on its way through Raft (NATS.md, section 4).
	errCodeInFlight jetstream.ErrorCode = 10164
)

// store publishes a frame of the appender's session on top of the last one that it knows, and returns its stream sequence once it is stored (I1, I6). It goes on trying, with the same fence, while NATS is away, until ctx ends: the fence
// makes a second copy impossible (I3). The error is errLostRace, or a refusal: storage_full, too_large, unavailable; after unavailable the frame may or may not be stored.
//
// The headers are Nats-Expected-Last-Subject-Sequence and, for a tombstone, Nats-Rollup: sub.
func (l *JetStreamLog) store(ctx context.Context, a *appender, data []byte, tombstone bool) (uint64, error) {
	msg := &nats.Msg{Subject: a.subject, Data: data, Header: nats.Header{
		jetstream.ExpectedLastSubjSeqHeader: {strconv.FormatUint(a.st.frame, 10)},
	}}
	if tombstone {
		msg.Header.Set(jetstream.MsgRollup, jetstream.MsgRollupSubject)
	}
	var retry backoff
	for {
		seq, err := l.request(ctx, msg)
		if err == nil {
			return seq, nil
		}
		if api, ok := errors.AsType[*jetstream.APIError](err); ok {
			switch api.ErrorCode {
			case errCodeWrongLastSequence:
				return 0, errLostRace
			case errCodeInsufficientResources, errCodeMemoryExceeded, errCodeStorageExceeded, errCodeStreamStoreFailed:
				r := schema.Refuse(schema.Code_CODE_STORAGE_FULL,
					"The log's storage is full; nothing more of session %s is stored. Remove sessions or raise the limit, then try again.", a.id)
				r.Err = err
				return 0, r
			case errCodeMaxPayload:
				return 0, schema.Refuse(schema.Code_CODE_TOO_LARGE, "The publish to session %s is larger than the log's messages may be; publish less at once.", a.id)
			case errCodeInFlight:
				// Passes by itself in a moment.
			}
		}
		l.metrics.storeRetries.Inc()
		if !retry.wait(ctx, err) {
			return 0, l.unavailable(a.id, err)
		}
	}
}

// request is one attempt to store.
func (l *JetStreamLog) request(ctx context.Context, msg *nats.Msg) (uint64, error) {
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	reply, err := l.conn.roundTrip(ctx, msg)
	if err != nil {
		return 0, err
	}
	// {"stream":"LOG_00","seq":7} or {"error":{…}}
	var ack struct {
		Error *jetstream.APIError `json:"error"`
		Seq   uint64              `json:"seq"`
	}
	if err := json.Unmarshal(reply.Data, &ack); err != nil {
		return 0, err
	}
	if ack.Error != nil {
		return 0, ack.Error
	}
	if ack.Seq == 0 {
		return 0, errors.New("broker: an acknowledgement without a sequence")
	}
	return ack.Seq, nil
}

// empty removes all of a session's frames but the last, which the next fence names.
func (l *JetStreamLog) empty(ctx context.Context, ln lane) error {
	s, err := l.js.Stream(ctx, l.reader.logOf(ln))
	if err == nil {
		err = s.Purge(ctx, jetstream.WithPurgeSubject(ln.logSubject()), jetstream.WithPurgeKeep(1))
	}
	if err != nil {
		return &schema.Refusal{Code: schema.Code_CODE_STORAGE_FULL, Message: "The log's storage is full, and the session could not be removed.", Err: err}
	}
	return nil
}
