package broker

import (
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"tidemark/schema"
)

// mergeTokens merges adjacent tokens of one message and channel into one envelope that carries the seqs of its first and its last (DESIGN section 5, egress coalescing). What stands
// alone goes through as it is stored.
func mergeTokens(views []View) []View {
	var out []View
	var m merger
	for _, v := range views {
		for seq, raw := range v.Each() {
			if m.extend(seq, raw) {
				continue
			}
			out = m.flush(out)
			m.begin(v, seq, raw)
		}
	}
	return m.flush(out)
}

// merger gathers one run of tokens.
type merger struct {
	// at is the run's first envelope, still in its block; nil where there is no run.
	at View
	// env is the run, decoded; nil for an envelope that is no token.
	env   *schema.Envelope
	first uint64
	text  []byte
}

func (m *merger) begin(v View, seq uint64, raw []byte) {
	*m = merger{at: View{v.Block, seq, seq}, first: seq}
	if e, err := schema.Scan(raw); err == nil && e.Kind == schema.KindToken {
		env := new(schema.Envelope)
		if proto.Unmarshal(raw, env) == nil {
			m.env, m.text = env, []byte(env.GetToken().GetText())
		}
	}
}

// extend takes the envelope into the run, if it goes on with the same message.
func (m *merger) extend(seq uint64, raw []byte) bool {
	if m.env == nil {
		return false
	}
	e, err := schema.Scan(raw)
	if err != nil || e.Kind != schema.KindToken || string(e.RequestID) != m.env.GetRequestId() || seq != m.env.GetSeq()+1 {
		return false
	}
	next := new(schema.Envelope)
	if proto.Unmarshal(raw, next) != nil {
		return false
	}
	a, b := m.env.GetToken(), next.GetToken()
	if a.GetMessageId() != b.GetMessageId() || a.GetChannel() != b.GetChannel() || !proto.Equal(m.env.GetSource(), next.GetSource()) {
		return false
	}
	m.text = append(m.text, b.GetText()...)
	// The merged envelope is the last one with the text of all.
	next.GetToken().Text = ""
	m.env = next
	return true
}

func (m *merger) flush(out []View) []View {
	if m.at.Block == nil {
		return out
	}
	if m.env == nil || m.env.GetSeq() == m.first {
		return append(out, m.at)
	}
	m.env.FirstSeq = new(m.first)
	m.env.GetToken().Text = string(m.text)
	raw, err := proto.Marshal(m.env)
	if err != nil {
		panic("broker: a merged envelope cannot be encoded: " + err.Error()) //nolint:forbidigo // invariant: what was decoded can be encoded, and UTF-8 joined is UTF-8
	}
	region := protowire.AppendBytes(protowire.AppendTag(nil, frameEnvelopes, protowire.BytesType), raw)
	b := &Block{Epoch: m.at.Epoch, First: m.env.GetSeq(), Count: 1, Region: region, Time: m.at.Time}
	return append(out, b.All())
}
