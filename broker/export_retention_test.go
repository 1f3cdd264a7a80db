package broker

import (
	"context"
	"log/slog"

	"github.com/nats-io/nats.go/jetstream"

	"tidemark/schema"
)

// TruncateSession takes away the session's frames that end before seq first, as retention does, and the pages that do, and returns the oldest seq that is left, which is
// the first of a page where there is one.
func TruncateSession(ctx context.Context, s Server, id schema.SessionID, first uint64) (uint64, error) {
	conn, err := s.connect(slog.New(slog.DiscardHandler), "truncate")
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	js, err := jetstream.New(conn.Conn)
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
		if !f.Deleted && f.Last() >= first || msg.Sequence == last.Sequence {
			if err := stream.Purge(ctx, jetstream.WithPurgeSubject(ln.logSubject()), jetstream.WithPurgeSequence(msg.Sequence)); err != nil {
				return 0, err
			}
			return truncatePages(ctx, js, newReader(conn, streams), ln, f)
		}
		seq = msg.Sequence
	}
}

// truncatePages takes away the session's pages before the one that the frame begins in, and returns the oldest seq that is left, in that page or in the frame.
func truncatePages(ctx context.Context, js jetstream.JetStream, r *reader, ln lane, oldest *frame) (uint64, error) {
	stream, err := js.Stream(ctx, r.pageOf(ln))
	if err != nil {
		return 0, err
	}
	slot := slotOf(oldest.First)
	for gone := range slot {
		for _, subject := range []string{ln.pageSubject(gone, 0), ln.pageSubject(gone, 0) + ".>"} {
			if err := stream.Purge(ctx, jetstream.WithPurgeSubject(subject)); err != nil {
				return 0, err
			}
		}
	}
	p, err := r.pageIn(ctx, ln, oldest.Epoch, slot)
	if p == nil || err != nil {
		return oldest.First, err
	}
	return min(p.first, oldest.First), nil
}

// ExpireSession takes away all frames and pages of the session, as retention does with one that nobody wrote to for long.
func ExpireSession(ctx context.Context, s Server, id schema.SessionID) error {
	conn, err := s.connect(slog.New(slog.DiscardHandler), "expire")
	if err != nil {
		return err
	}
	defer conn.Close()
	js, err := jetstream.New(conn.Conn)
	if err != nil {
		return err
	}
	streams, _, err := discover(ctx, js)
	if err != nil {
		return err
	}
	ln := laneOf(id)
	for name, subject := range map[string]string{logStreamName(streamOf(ln.slice, streams)): ln.logSubject(), pageStreamName(streamOf(ln.slice, streams)): ln.pagesSubject()} {
		stream, err := js.Stream(ctx, name)
		if err != nil {
			return err
		}
		if err := stream.Purge(ctx, jetstream.WithPurgeSubject(subject)); err != nil {
			return err
		}
	}
	return nil
}
