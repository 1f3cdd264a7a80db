package demo

import (
	"fmt"
	"io"
	"strings"
	"sync"

	"golang.org/x/text/width"
)

// columns prints what several clients receive beside each other, line by line, as it arrives. A client that is cut off leaves its column waiting, and fills it when it is back. Its methods may be called
// concurrently.
type columns struct {
	// Static after construction.
	w     io.Writer
	width int // of a column, in terminal cells

	mu    sync.Mutex
	lines [][]string // of each column, not yet printed
	open  []string   // of each column, the line that is being filled
	err   error
}

func newColumns(w io.Writer, n, width int) *columns {
	return &columns{w: w, width: width, lines: make([][]string, n), open: make([]string, n)}
}

// text adds what a client received to its column.
func (c *columns) text(column int, s string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, r := range s {
		switch {
		case r == '\n':
			c.breakLine(column)
		case r < ' ':
			c.open[column] += " "
		default:
			c.open[column] += string(r)
		}
		if cells(c.open[column]) > c.width {
			c.wrap(column)
		}
	}
	c.flush(false)
}

// wrap breaks a full line behind its last word, if that leaves a fair part of it.
func (c *columns) wrap(column int) {
	line := c.open[column]
	at := strings.LastIndexByte(line, ' ')
	if at < len(line)/2 {
		c.breakLine(column)
		return
	}
	c.lines[column] = append(c.lines[column], line[:at])
	c.open[column] = line[at+1:]
}

func (c *columns) breakLine(column int) {
	c.lines[column] = append(c.lines[column], c.open[column])
	c.open[column] = ""
}

// note prints a line across all columns.
func (c *columns) note(format string, args ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.print("  ── " + fmt.Sprintf(format, args...))
}

// end prints what is left.
func (c *columns) end() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := range c.open {
		if c.open[i] != "" {
			c.breakLine(i)
		}
	}
	c.flush(true)
	return c.err
}

// flush prints the lines that all columns have, or all there are.
func (c *columns) flush(all bool) {
	for {
		some, every := false, true
		for _, l := range c.lines {
			some = some || len(l) > 0
			every = every && len(l) > 0
		}
		if !some || !every && !all {
			return
		}
		var row strings.Builder
		row.WriteString("  ")
		for i := range c.lines {
			cell := ""
			if len(c.lines[i]) > 0 {
				cell, c.lines[i] = c.lines[i][0], c.lines[i][1:]
			}
			if i > 0 {
				row.WriteString(" │ ")
			}
			row.WriteString(cell)
			if i < len(c.lines)-1 {
				row.WriteString(strings.Repeat(" ", max(0, c.width-cells(cell))))
			}
		}
		c.print(strings.TrimRight(row.String(), " "))
	}
}

func (c *columns) print(line string) {
	if _, err := fmt.Fprintln(c.w, line); err != nil && c.err == nil {
		c.err = err
	}
}

// cells is how many cells of a terminal the text takes: wide characters take two (Unicode, UAX 11).
func cells(s string) int {
	n := 0
	for _, r := range s {
		switch width.LookupRune(r).Kind() {
		case width.EastAsianWide, width.EastAsianFullwidth:
			n += 2
		default:
			n++
		}
	}
	return n
}
