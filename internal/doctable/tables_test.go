package doctable

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

const page = "# Page\n\n| none | of these |\n|---|---|\n\n## One\n\nText.\n\n| a | `b` |\n|---|:-:|\n| 1 | x\\|y |\n|  | `z` |\n\nMore | text.\n\n| c |\n|---|\n## Two\n\nNo table.\n## Three\n| d |\n|---|\n| last |"

func TestTables(t *testing.T) {
	file := filepath.Join(t.TempDir(), "page.md")
	if err := os.WriteFile(file, []byte(page), 0o600); err != nil {
		t.Fatal(err)
	}
	for section, want := range map[string][]Table{
		"One":   {{[]string{"a", "`b`"}, [][]string{{"1", "x|y"}, {"", "`z`"}}}, {[]string{"c"}, [][]string{}}},
		"Three": {{[]string{"d"}, [][]string{{"last"}}}},
	} {
		if got, err := Tables(file, section); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %q, %v", section, got, err)
		}
	}
	if got := Plain("one of `a`, `b`"); got != "one of a, b" {
		t.Error(got)
	}
}

func TestTablesThatAreNotThere(t *testing.T) {
	for text, want := range map[string]string{
		page:                              "no table stands there",
		"## Twos\n| a |\n|---|\n":         "no such section",
		"## Two\n| a |\n| 1 |\n":          "no line of dashes",
		"## Two\n| a |\n":                 "no line of dashes",
		"## Two\n| a |\n|---|\n| 1 | 2 |": "has 2 cells",
		"## Two\n| a | b |\n|---|\n":      "has 1 cells",
	} {
		if got, err := read(text, "Two"); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %q, %v", text, got, err)
		}
	}
	if _, err := Tables(filepath.Join(t.TempDir(), "none.md"), "Two"); err == nil {
		t.Error("a page that is not there is read")
	}
}
