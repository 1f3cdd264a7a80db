package recording

import (
	"time"
	"unicode/utf8"

	"tidemark/schema"
)

// TokensPerSecond is the pace of a recording without times: what a hosted model of today writes, so that a demo looks like the real thing. A piece of text takes the time of
// its tokens (four characters each, as a rule of thumb), half as long again or half as long: the variation comes from a fixed sequence, so that a recording always plays the
// same. Providers' own time stamps have a resolution of a second at best and are not used.
const TokensPerSecond = 80

const (
	// firstTokenAfter is how long a model reads before it writes.
	firstTokenAfter = 320 * time.Millisecond
	// toolTakes is how long a tool works.
	toolTakes = 600 * time.Millisecond
	// mostAtOnce bounds the pause before one piece of text, however long it is: providers that send whole paragraphs do not type them.
	mostAtOnce = 250 * time.Millisecond
)

// pace makes up believable times. Its zero value is ready.
type pace struct {
	n       uint64
	writing bool
}

// after says how long after the envelope before it e comes.
func (p *pace) after(e *schema.Envelope) time.Duration {
	var base time.Duration
	switch e.Kind() {
	case schema.KindToken:
		base = p.text(e.GetToken().GetText())
	case schema.KindToolCall:
		base = p.text(e.GetToolCall().GetArgumentsDelta() + e.GetToolCall().GetArgumentsJson())
	case schema.KindToolResult:
		base = toolTakes
	case schema.KindMessageCompleted, schema.KindChatError:
		p.writing = false
	default:
		// What comes with something else comes at once.
	}
	return p.vary(base)
}

func (p *pace) text(s string) time.Duration {
	if !p.writing {
		p.writing = true
		return firstTokenAfter
	}
	tokens := max(1, utf8.RuneCountInString(s)/4)
	return min(mostAtOnce, time.Duration(tokens)*time.Second/TokensPerSecond)
}

// vary returns d times 0.5 to 1.5, by the next number of SplitMix64 (Steele, Lea, Flood 2014) from seed 0.
func (p *pace) vary(d time.Duration) time.Duration {
	p.n += 0x9e3779b97f4a7c15
	z := p.n
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	z ^= z >> 31
	return d/2 + d*time.Duration(z>>44)>>20
}
