package recording

import (
	_ "embed" // for the recording below
	"strings"
)

// tide was written for this repository: a question about the tides, with reasoning, a tool's call and its result, and an answer with code, emoji and
// characters beyond ASCII. Its lines carry their times.
//
//go:embed tide.chunks.txt
var tide string

// Own returns the recording that Tidemark carries with it, for the demo and for tests: about eight seconds, of the format [ChatCompletions]. Every call returns a new one.
func Own(c Config) (*Recording, error) {
	return Read(strings.NewReader(tide), c)
}
