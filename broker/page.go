package broker

import (
	"context"
	"errors"
	"fmt"
	"sort"

	"github.com/klauspost/compress/s2"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"tidemark/schema"
)

// page is what is stored of one slot of a session: up to 256 envelopes and the session's state behind them (DESIGN section 3). It is immutable.
//
// A slot of ordinary size is one message. Where its envelopes take more than partBytes, part 0 holds none of them and the parts 1 … n hold them all:
//
//	part 0: state, frames, parts = n+1   written last, and overwritten as the slot grows
//	part 1 … n-1: full                   never written again
//	part n: the rest                     overwritten as it grows; may be ahead of what part 0 says
type page struct {
	slot  uint64
	part  int
	epoch string
	// first is the seq of the first envelope, count how many there are: of the slot in part 0, of the part in others.
	first uint64
	count int
	// through is the stream sequence of the frame that holds the last envelope.
	through uint64
	parts   int
	// state is the session behind the last envelope; nil in other parts than 0.
	state *schema.SessionState
	// region holds the envelopes; empty in part 0 where there are other parts.
	region []byte
	frames []frameMark
	// rev is the page's stream sequence: what the next write of it must name.
	rev uint64
}

// frameMark is where a frame is in the log.
type frameMark struct {
	streamSeq uint64
	// first is the seq of the frame's first envelope, which may lie in the slot before.
	first uint64
	// time is the frame's, in microseconds since 1970.
	time int64
}

const (
	// partBytes is what the envelopes of one page message take before compression, unless a single one takes more. It is part of what is on disk only in that pages of another size are
	// written anew when they are written again.
	partBytes = 256 << 10
	// maxPartBytes bounds what a page may claim to hold: the largest envelope, and what an edge adds to it.
	maxPartBytes = schema.MaxEnvelopeBytes + 64<<10
	// maxPageParts is the most parts that a slot can have: one for each envelope, and part 0.
	maxPageParts = schema.PageEnvelopes + 1
)

func (p *page) last() uint64 { return p.first + uint64(p.count) - 1 }

// full: the slot will not get more envelopes.
func (p *page) full() bool { return p.last() == (p.slot+1)*schema.PageEnvelopes }

// encodePage makes the message of a page or part. The same page always makes the same bytes.
func encodePage(p *page) ([]byte, error) {
	m := &schema.Page{
		Epoch: p.epoch, FirstSeq: p.first, Count: uint32(p.count), Through: p.through, State: p.state, Parts: uint32(p.parts),
		Envelopes: p.region, Compression: schema.Compression_COMPRESSION_NONE, RawSize: uint32(len(p.region)),
	}
	if packed := s2.Encode(nil, p.region); len(packed) < len(p.region) {
		m.Envelopes, m.Compression = packed, schema.Compression_COMPRESSION_S2
	}
	var before frameMark
	for _, f := range p.frames {
		m.Frames = append(m.Frames, int64(f.streamSeq-before.streamSeq), int64(f.first-before.first), f.time-before.time)
		before = f
	}
	return proto.MarshalOptions{Deterministic: true}.Marshal(m)
}

// decodePage reads a page's or part's message.
func decodePage(data []byte, slot uint64, part int, rev uint64) (*page, error) {
	var m schema.Page
	if err := proto.Unmarshal(data, &m); err != nil {
		return nil, badPage(err)
	}
	p := &page{
		slot: slot, part: part, epoch: m.GetEpoch(), first: m.GetFirstSeq(), count: int(m.GetCount()), through: m.GetThrough(), parts: int(m.GetParts()),
		state: m.GetState(), region: m.GetEnvelopes(), rev: rev,
	}
	switch {
	case p.epoch == "" || p.count == 0 || p.first == 0 || slotOf(p.first) != slot || slotOf(p.last()) != slot:
		return nil, badPage(fmt.Errorf("slot %d cannot hold %d envelopes from seq %d of epoch %q", slot, p.count, p.first, p.epoch))
	case m.GetRawSize() > maxPartBytes:
		return nil, badPage(fmt.Errorf("its envelopes are said to take %d bytes", m.GetRawSize()))
	case part == 0 && (p.state.GetHeadSeq() != p.last() || p.parts < 1 || p.parts > maxPageParts || len(m.GetFrames())%3 != 0):
		return nil, badPage(errors.New("its first part contradicts itself"))
	}
	switch m.GetCompression() {
	case schema.Compression_COMPRESSION_NONE:
	case schema.Compression_COMPRESSION_S2:
		if n, err := s2.DecodedLen(p.region); err != nil || n != int(m.GetRawSize()) {
			return nil, badPage(fmt.Errorf("its envelopes decompress to %d bytes, not to %d: %w", n, m.GetRawSize(), err))
		}
		var err error
		if p.region, err = s2.Decode(nil, p.region); err != nil {
			return nil, badPage(err)
		}
	default:
		return nil, badPage(fmt.Errorf("compression %d is not known", m.GetCompression()))
	}
	if part > 0 || p.parts == 1 {
		if n, err := countRecords(p.region); err != nil || n != p.count {
			return nil, badPage(fmt.Errorf("it says %d envelopes and holds %d: %w", p.count, n, err))
		}
	}
	var at frameMark
	for i := 0; part == 0 && i < len(m.GetFrames()); i += 3 {
		at.streamSeq += uint64(m.GetFrames()[i])
		at.first += uint64(m.GetFrames()[i+1])
		at.time += m.GetFrames()[i+2]
		p.frames = append(p.frames, at)
	}
	return p, nil
}

// countRecords counts the records of a region and checks that they are well-formed.
func countRecords(region []byte) (int, error) {
	n := 0
	for b := region; len(b) > 0; n++ {
		num, typ, size := protowire.ConsumeField(b)
		if size < 0 {
			return n, protowire.ParseError(size)
		}
		if num != frameEnvelopes || typ != protowire.BytesType {
			return n, fmt.Errorf("field %d among the envelopes", num)
		}
		b = b[size:]
	}
	return n, nil
}

func badPage(err error) error {
	return &schema.Refusal{Code: schema.Code_CODE_INTERNAL, Message: "A stored page cannot be read; `tidemark broker --rebuild-pages` makes it anew.", Err: err}
}

// damaged reports whether the error says that what is stored cannot be read, rather than that it could not be had.
func damaged(err error) bool {
	refusal, ok := errors.AsType[*schema.Refusal](err)
	return ok && refusal.Code == schema.Code_CODE_INTERNAL
}

// block is the page's envelopes, up to seq `to`.
func (p *page) block(to uint64) View {
	b := &Block{Epoch: p.epoch, First: p.first, Count: p.count, Region: p.region}
	return View{b, p.first, min(p.last(), to)}
}

// page is the page of a slot, as some replica has it; nil where there is none.
func (r *reader) page(ctx context.Context, ln lane, slot uint64) (*page, error) {
	m, err := r.last(ctx, r.pageOf(ln), ln.pageSubject(slot, 0))
	if m == nil || err != nil {
		return nil, err
	}
	return decodePage(m.data, slot, 0, m.seq)
}

// pageFromLeader is the page of a slot as the stream's leader has it.
func (r *reader) pageFromLeader(ctx context.Context, ln lane, slot uint64) (*page, error) {
	m, err := r.lastFromLeader(ctx, r.pageOf(ln), ln.pageSubject(slot, 0))
	if m == nil || err != nil {
		return nil, err
	}
	return decodePage(m.data, slot, 0, m.seq)
}

// pages are the pages of the slots from … to, fetched at once; nil where there is none, where it is of another history, or where it cannot be read: the log has the envelopes then.
func (r *reader) pages(ctx context.Context, ln lane, epoch string, from, to uint64) ([]*page, error) {
	pages := make([]*page, to-from+1)
	err := together(len(pages), func(i int) (err error) {
		pages[i], err = r.pageIn(ctx, ln, epoch, from+uint64(i))
		return err
	})
	return pages, err
}

// pageIn is the page of a slot, nil where it is of no use to a reader of this history.
func (r *reader) pageIn(ctx context.Context, ln lane, epoch string, slot uint64) (*page, error) {
	p, err := r.page(ctx, ln, slot)
	if damaged(err) {
		return nil, nil
	}
	if p == nil || err != nil || p.epoch != epoch {
		return nil, err
	}
	return p, nil
}

// part is a part of a slot; nil where it is not there or of no use.
func (r *reader) part(ctx context.Context, ln lane, of *page, part int) (*page, error) {
	m, err := r.last(ctx, r.pageOf(ln), ln.pageSubject(of.slot, part))
	if m == nil || err != nil {
		return nil, err
	}
	p, err := decodePage(m.data, of.slot, part, m.seq)
	if err != nil || p.epoch != of.epoch || p.first > of.last() {
		// What cannot be used is as if it were not there: the log has the envelopes.
		return nil, nil //nolint:nilerr // see above
	}
	return p, nil
}

// views are the page's envelopes from seq `from` on, about limit bytes, as far as its parts are there.
func (r *reader) views(ctx context.Context, ln lane, p *page, from uint64, limit int) ([]View, error) {
	if p.parts == 1 {
		return []View{p.block(p.last()).After(from - 1).Limit(limit)}, nil
	}
	// The last part that begins at or before from.
	var found *page
	var failed error
	n := sort.Search(p.parts-1, func(i int) bool {
		if failed != nil {
			return true
		}
		q, err := r.part(ctx, ln, p, i+1)
		if err != nil || q == nil {
			failed = err
			return true
		}
		if q.first <= from {
			found = q
			return false
		}
		return true
	})
	if failed != nil {
		return nil, failed
	}
	var views []View
	for found != nil && found.last() >= from && limit > 0 {
		v := found.block(p.last())
		v.From = from
		v = v.Limit(limit)
		views = append(views, v)
		limit -= len(v.Records())
		from = v.To + 1
		if from > p.last() || n+1 >= p.parts || limit <= 0 {
			break
		}
		n++
		var err error
		if found, err = r.part(ctx, ln, p, n); err != nil {
			return nil, err
		}
		if found != nil && found.first != from {
			break
		}
	}
	return views, nil
}

// newestPage is the page with the session's last envelopes, at or before seq `head`; nil where the session has none.
func (r *reader) newestPage(ctx context.Context, ln lane, epoch string, head uint64) (*page, error) {
	top := slotOf(head)
	recent, err := r.pages(ctx, ln, epoch, top-min(top, 1), top)
	if err != nil {
		return nil, err
	}
	for i := len(recent) - 1; i >= 0; i-- {
		if recent[i] != nil {
			return recent[i], nil
		}
	}
	// The projection is behind. Leap back to where it has been, then find how far it came from there.
	missing := top - min(top, 1)
	for leap := uint64(1); missing > 0; leap *= 2 {
		slot := missing - min(missing, leap)
		p, err := r.pageIn(ctx, ln, epoch, slot)
		if err != nil {
			return nil, err
		}
		if p == nil {
			missing = slot
			continue
		}
		for missing-p.slot > 1 {
			q, err := r.pageIn(ctx, ln, epoch, p.slot+(missing-p.slot)/2)
			if err != nil {
				return nil, err
			}
			if q != nil {
				p = q
			} else {
				missing = p.slot + (missing-p.slot)/2
			}
		}
		return p, nil
	}
	return nil, nil
}

// firstPage is the first page of the session in the slots from … to; nil where there is none. Pages go as they came, the oldest first, so that it can be searched for.
func (r *reader) firstPage(ctx context.Context, ln lane, epoch string, from, to uint64) (*page, error) {
	var found *page
	for from <= to {
		slot := from + (to-from)/2
		p, err := r.pageIn(ctx, ln, epoch, slot)
		if err != nil {
			return nil, err
		}
		if p == nil {
			from = slot + 1
			continue
		}
		found = p
		if slot == from {
			break
		}
		to = slot - 1
	}
	return found, nil
}

// markOf is the frame's place, as a page keeps it.
func markOf(f *frame) frameMark { return frameMark{f.StreamSeq, f.First, f.Time.UnixMicro()} }
