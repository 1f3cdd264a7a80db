package broker

import (
	"context"
	"log/slog"

	"github.com/nats-io/nats.go/jetstream"

	"tidemark/schema"
)

// TruncateSession takes away the session's frames that end before seq first, as retention does, and returns the oldest seq that is left; 0 where there is none. Pages are left as they are.
func TruncateSession(ctx context.Context, s Server, id schema.SessionID, first uint64) (uint64, error) {
	conn, err := s.connect(slog.New(slog.DiscardHandler), "truncate")
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	js, err := jetstream.New(conn)
	if err != nil {
		return 0, err
	}
	streams, _, err := discover(ctx, js)
	if err != nil {
		return 0, err
	}
	ln := laneOf(id)
	stream, err := js.Stream(ctx, logStreamName(streamOf(ln.slice, streams)))
	if err != nil {
		return 0, err
	}
	last, err := stream.GetLastMsgForSubject(ctx, ln.logSubject())
	if err != nil {
		return 0, err
	}
	for seq := uint64(1); ; seq++ {
		msg, err := stream.GetMsg(ctx, seq, jetstream.WithGetMsgSubject(ln.logSubject()))
		if err != nil {
			return 0, err
		}
		f, err := parseFrame(msg.Data)
		if err != nil {
			return 0, err
		}
		if f.Last() >= first || msg.Sequence == last.Sequence {
			return f.First, stream.Purge(ctx, jetstream.WithPurgeSubject(ln.logSubject()), jetstream.WithPurgeSequence(msg.Sequence))
		}
		seq = msg.Sequence
	}
}
