// Package doctable reads the tables of a Markdown page, so that a test can compare what the page promises with what the code does. Tests alone import it.
package doctable

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
)

// Table is one table. Each row has as many cells as the head; cells are as they stand in the page, without the spaces around them, and with \| as the | that it means.
type Table struct {
	Head []string
	Rows [][]string
}

// Tables reads the tables under the heading "## section" of the page in a file, in their order. It is an error if there is no such section, if no table stands there, or if one is not whole: without the
// line of dashes under its head, or with a row of another number of cells.
func Tables(file, section string) ([]Table, error) {
	page, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("the page cannot be read: %w", err)
	}
	tables, err := read(string(page), section)
	if err != nil {
		return nil, fmt.Errorf("%s, section %q: %w", file, section, err)
	}
	return tables, nil
}

// Plain is a cell without its backquotes.
func Plain(cell string) string { return strings.ReplaceAll(cell, "`", "") }

func read(page, section string) ([]Table, error) {
	_, text, ok := strings.Cut("\n"+page, "\n## "+section+"\n")
	if !ok {
		return nil, errors.New("there is no such section")
	}
	text, _, _ = strings.Cut(text, "\n## ")
	var tables []Table
	var lines [][]string // of the table that is being read
	for line := range strings.SplitSeq(text+"\n", "\n") {
		if row := strings.TrimSpace(line); strings.HasPrefix(row, "|") {
			lines = append(lines, cells(row))
			continue
		}
		if lines == nil {
			continue
		}
		head := lines[0]
		if len(lines) < 2 || slices.ContainsFunc(lines[1], func(c string) bool { return strings.Trim(c, ":-") != "" || c == "" }) {
			return nil, fmt.Errorf("the table %q has no line of dashes under its head", head)
		}
		for _, row := range lines[1:] {
			if len(row) != len(head) {
				return nil, fmt.Errorf("the row %q has %d cells, the table's head %d", row, len(row), len(head))
			}
		}
		tables = append(tables, Table{head, lines[2:]})
		lines = nil
	}
	if tables == nil {
		return nil, errors.New("no table stands there")
	}
	return tables, nil
}

// cells splits a row at each | that is not escaped.
func cells(row string) []string {
	const escaped = "\x00" // what no page has
	row = strings.TrimSuffix(strings.TrimPrefix(strings.ReplaceAll(row, `\|`, escaped), "|"), "|")
	all := strings.Split(row, "|")
	for i, c := range all {
		all[i] = strings.ReplaceAll(strings.TrimSpace(c), escaped, "|")
	}
	return all
}
