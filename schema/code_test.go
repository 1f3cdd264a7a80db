package schema

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
)

// Every code has a row, and every row a code; the numbers are such as gRPC and RFC 6455 know.
func TestEveryCodeHasARule(t *testing.T) {
	t.Parallel()
	for number, name := range Code_name {
		code := Code(number)
		_, ok := rules[code]
		if want := code != Code_CODE_UNSPECIFIED; ok != want {
			t.Errorf("%s: has a row is %v", name, ok)
		}
	}
	for code, rule := range rules {
		if _, ok := Code_name[int32(code)]; !ok {
			t.Errorf("a row for the code %d, which does not exist", code)
		}
		if rule.GRPC < 1 || rule.GRPC > 16 {
			t.Errorf("%v: gRPC status %d", code, rule.GRPC)
		}
		if !slices.Contains([]int{1000, 1001, 1002, 1003, 1007, 1008, 1009, 1011, 1012, 1013, closeTokenExpired}, rule.Close) {
			t.Errorf("%v: close code %d", code, rule.Close)
		}
		if rule.Reconnect == Reconnect_RECONNECT_UNSPECIFIED {
			t.Errorf("%v: does not say whether to come again", code)
		}
		if rule.Retryable && rule.Reconnect != Reconnect_RECONNECT_SAME_CURSOR {
			t.Errorf("%v: the publish may be sent again, but the connection may not come again", code)
		}
		if rule != code.Rule() {
			t.Errorf("%v: Rule returns another row", code)
		}
	}
	if Code(9999).Rule() != rules[Code_CODE_INTERNAL] {
		t.Error("a code without a row is not treated as internal")
	}
}

// Words are labels of metrics, close reasons and rows of a table: lower case, unlike each other.
func TestCodeWords(t *testing.T) {
	t.Parallel()
	seen := make(map[string]bool)
	for number := range Code_name {
		word := Code(number).Word()
		if word == "" || strings.Trim(word, "abcdefghijklmnopqrstuvwxyz_") != "" || seen[word] {
			t.Errorf("the word of %v is %q", Code(number), word)
		}
		seen[word] = true
	}
	if got := Code_CODE_INVALID_MESSAGE.Word(); got != "invalid_message" {
		t.Errorf("got %s", got)
	}
}

func TestAsRefusal(t *testing.T) {
	t.Parallel()
	cause := errors.New("disk 7 is on fire")
	if r := AsRefusal(cause); r.Code != Code_CODE_INTERNAL || strings.Contains(r.Message, "fire") || !errors.Is(r, cause) {
		t.Errorf("got %v", r)
	}
	refusal := Refuse(Code_CODE_CONFLICT, "The head is %d.", 7)
	wrapped := fmt.Errorf("append: %w", refusal)
	if AsRefusal(wrapped) != refusal || CodeOf(wrapped) != Code_CODE_CONFLICT || CodeOf(cause) != Code_CODE_INTERNAL {
		t.Error("the refusal in an error was not found")
	}
	if got := refusal.Error(); got != "conflict: The head is 7." {
		t.Errorf("got %s", got)
	}
}

// The word is that of the JSON form, and what has ended is what the lifecycle calls so.
func TestStatusWords(t *testing.T) {
	t.Parallel()
	ended := []string{"completed", "failed", "cancelled"}
	for number := range Status_name {
		status := Status(number)
		word := StatusWord(status)
		if word != statusWords[number] {
			t.Errorf("the word of %v is %q", status, word)
		}
		if Ended(status) != slices.Contains(ended, word) {
			t.Errorf("%v has ended is %v", status, Ended(status))
		}
	}
}
