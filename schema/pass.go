package schema

import "encoding/base64"

// rule is what a field must satisfy, and how it is written.
type rule uint8

const (
	// required: the field is neither absent nor empty.
	required rule = 1 << iota
	// ident: at most MaxIDBytes.
	ident
	// producerIdent: at most MaxProducerIDBytes.
	producerIdent
	// object: the JSON text is an object.
	object
	// always: written even where it is empty.
	always
)

// op is what a pass does with the fields it goes over.
type op uint8

const (
	opWrite op = iota
	opRead
	opCheck
)

// pass goes over the fields of an envelope. It is one struct for all three ways, not an interface: the writer runs for every token, and a call through an
// interface would put it on the heap.
type pass struct {
	op op
	// err is the first thing found wrong, when reading and checking.
	err *Refusal
	at  place
	// exact: white space around free-form values is part of them. Found out by the writer, told to the reader.
	exact bool

	// The writer's.
	out []byte
	// more: a field was written in this object, so that a comma comes before the next.
	more bool

	// The reader's: the message, and the keys of it and of the inner object that is being read.
	in   []byte
	keys [2]keyList

	// The checker's: the size of what has no fixed size, at most.
	size int
}

// place is the object that a pass is in.
type place uint8

const (
	atTop place = iota
	inData
	inProducer
	inSource
)

var placeNames = [...]string{inData: "data", inProducer: "producer", inSource: "source"} //nolint:gochecknoglobals // a table that nothing writes

// path is a field's name in a sentence. Fields of data are called by their own name alone.
func (p *pass) path(name string) string {
	if p.at == atTop || p.at == inData {
		return name
	}
	return placeNames[p.at] + "." + name
}

// begin goes into the message v where it is there; the caller goes over its fields and calls end.
func begin[M any](p *pass, at place, v **M) bool {
	if p.op == opRead {
		if !p.enter(at) {
			return false
		}
		*v = new(M)
		return true
	}
	if *v == nil {
		return false
	}
	if p.op == opWrite {
		p.open(placeNames[at])
	}
	p.at = at
	return true
}

func (p *pass) end() {
	switch p.op {
	case opWrite:
		p.close()
	case opRead:
		p.leave()
	case opCheck: // nothing was opened
	}
	p.at = atTop
}

// open, close, key and base64 are the writer's.
func (p *pass) open(name string) {
	p.key(name)
	p.out = append(p.out, '{')
	p.more = false
}

func (p *pass) close() {
	p.out = append(p.out, '}')
	p.more = true
}

func (p *pass) key(name string) {
	if p.more {
		p.out = append(p.out, ',')
	}
	p.more = true
	p.out = append(p.out, '"')
	p.out = append(p.out, name...)
	p.out = append(p.out, '"', ':')
}

func (p *pass) base64(b []byte) {
	p.out = append(p.out, '"')
	p.out = base64.StdEncoding.AppendEncode(p.out, b)
	p.out = append(p.out, '"')
}

// refuse keeps the first thing that is wrong.
func (p *pass) refuse(format string, args ...any) {
	if p.err == nil {
		p.err = Refuse(Code_CODE_INVALID_MESSAGE, format, args...)
	}
}

func (p *pass) missing(name string) { p.refuse("Missing required field '%s'", p.path(name)) }

func (p *pass) wrongType(name, what string) { p.refuse("Field '%s' must be %s.", p.path(name), what) }

func (p *pass) loneSurrogate(name string) {
	p.refuse("Field '%s' holds half of a surrogate pair, which is no character.", p.path(name))
}

// grows counts bytes that an encoded envelope has, with the most that a tag and a length take before them.
func (p *pass) grows(bytes int) { p.size += bytes + 6 }
