package broker

import (
	"iter"
	"sort"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
)

// Block is consecutive envelopes of one session as they are stored: a frame of the log, or a page. It is immutable and shared by all who read it.
type Block struct {
	Epoch string
	// First is the seq of the first envelope; the others follow without a gap.
	First uint64
	Count int
	// Region holds the envelopes as records of field 15, as in Frame and in Events: one behind the other, each with its tag and length.
	Region []byte
	// Time is when the block's frame was written; zero for a page.
	Time time.Time

	offsets atomic.Pointer[[]int]
	forms   [Forms]atomic.Pointer[[][]byte]
	// grown, where not nil, is told how many bytes the cached forms take, so that the tail counts them.
	grown func(bytes int)
}

// Form numbers the encodings of an envelope that are made once for each block and shared by all followers, beside the stored one.
type Form int

// The forms that transports ask for.
const (
	// FormJSON is the session socket's JSON form of each envelope.
	FormJSON Form = iota
	// FormProtoJSON is protobuf's JSON form of each envelope.
	FormProtoJSON
	// Forms is how many there are.
	Forms
)

// Last is the seq of the last envelope.
func (b *Block) Last() uint64 { return b.First + uint64(b.Count) - 1 }

// index returns where each record begins, and the end of the last.
func (b *Block) index() []int {
	if p := b.offsets.Load(); p != nil {
		return *p
	}
	offsets := make([]int, 0, b.Count+1)
	at := 0
	for at < len(b.Region) {
		offsets = append(offsets, at)
		at += recordLen(b.Region[at:])
	}
	offsets = append(offsets, at)
	b.offsets.Store(&offsets)
	return offsets
}

// recordLen is the length of the record at the start of b, tag and length included. The region was checked when it was parsed.
func recordLen(b []byte) int {
	_, _, n := protowire.ConsumeTag(b)
	_, m := protowire.ConsumeBytes(b[n:])
	return n + m
}

// View is a part of a block: the envelopes from seq From to seq To, both included.
type View struct {
	*Block
	From, To uint64
}

// All is the whole block.
func (b *Block) All() View { return View{b, b.First, b.Last()} }

// After is the part of the block behind seq; empty where there is none.
func (b *Block) After(seq uint64) View { return View{b, max(b.First, seq+1), b.Last()} }

// Len is how many envelopes the view holds.
func (v View) Len() int {
	if v.To < v.From {
		return 0
	}
	return int(v.To - v.From + 1)
}

// Limit cuts the view so that its records take at most size bytes, but keeps at least one envelope.
func (v View) Limit(size int) View {
	if v.Len() <= 1 || len(v.Region) <= size {
		return v
	}
	at := v.index()
	i := int(v.From - v.First)
	// The first n for which the records i … i+n take more than size.
	n := sort.Search(v.Len(), func(n int) bool { return at[i+n+1]-at[i] > size })
	v.To = v.From + uint64(max(n, 1)) - 1
	return v
}

// Records are the view's bytes: its envelopes as records of field 15.
func (v View) Records() []byte {
	if v.From == v.First && v.To == v.Last() {
		return v.Region
	}
	if v.Len() == 0 {
		return nil
	}
	at := v.index()
	return v.Region[at[v.From-v.First]:at[v.To-v.First+1]]
}

// Each yields the seq and the encoded form of each envelope of the view.
func (v View) Each() iter.Seq2[uint64, []byte] {
	return func(yield func(uint64, []byte) bool) {
		rest := v.Records()
		for seq := v.From; seq <= v.To; seq++ {
			_, _, n := protowire.ConsumeTag(rest)
			body, m := protowire.ConsumeBytes(rest[n:])
			if !yield(seq, body) {
				return
			}
			rest = rest[n+m:]
		}
	}
}

// Encoded returns the view's envelopes in the form that encode makes of their stored bytes. It is made once for each block, at the first call for that form, and must
// not be changed.
func (v View) Encoded(f Form, encode func(envelope []byte) []byte) [][]byte {
	p := v.forms[f].Load()
	if p == nil {
		texts := make([][]byte, 0, v.Count)
		size := 0
		for _, body := range v.All().Each() {
			text := encode(body)
			size += len(text) + 24
			texts = append(texts, text)
		}
		p = &texts
		// Two may do the work at once; one of the results is kept.
		if v.forms[f].CompareAndSwap(nil, p) {
			if v.grown != nil {
				v.grown(size)
			}
		} else {
			p = v.forms[f].Load()
		}
	}
	return (*p)[v.From-v.First : v.To-v.First+1]
}

// recordBody is the envelope in a record.
func recordBody(record []byte) []byte {
	_, _, n := protowire.ConsumeTag(record)
	body, _ := protowire.ConsumeBytes(record[n:])
	return body
}
