package broker

import (
	"bytes"
	"slices"
	"testing"

	"google.golang.org/protobuf/proto"

	"tidemark/schema"
)

// samplePage holds n envelopes from seq first.
func samplePage(t testing.TB, first uint64, n int) *page {
	t.Helper()
	p := &page{slot: slotOf(first), epoch: "E", first: first, count: n, through: 900, parts: 1, state: &schema.SessionState{Epoch: "E", HeadSeq: first + uint64(n) - 1, HeadFrame: 900}}
	for i, a := range accepted(t, n) {
		p.region = a.AppendRecord(p.region, first+uint64(i))
	}
	p.frames = []frameMark{{streamSeq: 800, first: first - min(first-1, 3), time: 1_700_000_000_000_000}, {streamSeq: 900, first: first + 2, time: 1_699_999_999_999_000}}
	return p
}

func TestPageRoundTrip(t *testing.T) {
	for _, p := range []*page{samplePage(t, 1, 1), samplePage(t, 257, 256), samplePage(t, 500, 4)} {
		data, err := encodePage(p)
		if err != nil {
			t.Fatal(err)
		}
		again, err := encodePage(p)
		if err != nil || !bytes.Equal(data, again) {
			t.Fatalf("the same page has other bytes, %v", err)
		}
		if len(data) > len(p.region) && p.count > 10 {
			t.Errorf("%d bytes of envelopes take %d", len(p.region), len(data))
		}
		q, err := decodePage(data, p.slot, 0, 7)
		if err != nil {
			t.Fatal(err)
		}
		if q.epoch != p.epoch || q.first != p.first || q.count != p.count || q.through != p.through || q.parts != 1 || q.rev != 7 ||
			!bytes.Equal(q.region, p.region) || !slices.Equal(q.frames, p.frames) || !proto.Equal(q.state, p.state) {
			t.Errorf("%+v came back as %+v", p, q)
		}
	}
}

// FuzzPage reads what is no page: it is refused or read, and never read past its end.
func FuzzPage(f *testing.F) {
	for _, n := range []int{1, 30, 256} {
		data, err := encodePage(samplePage(f, 257, n))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data, uint64(1), 0)
		f.Add(data[:len(data)/2], uint64(1), 0)
		f.Add(data, uint64(1), 1)
	}
	f.Fuzz(func(t *testing.T, data []byte, slot uint64, part int) {
		if slot > 1<<50 || part < 0 {
			return
		}
		p, err := decodePage(data, slot, part, 1)
		if err != nil {
			if schema.CodeOf(err) != schema.Code_CODE_INTERNAL {
				t.Errorf("refused with %v", err)
			}
			return
		}
		if part == 0 && p.parts > 1 {
			return
		}
		n := 0
		for seq := range p.block(p.last()).Each() {
			n++
			if slotOf(seq) != slot {
				t.Errorf("seq %d is not of slot %d", seq, slot)
			}
		}
		if n != p.count {
			t.Errorf("it holds %d envelopes and says %d", n, p.count)
		}
	})
}
