package broker

import (
	"fmt"
	"testing"

	"pgregory.net/rapid"

	"tidemark/schema"
)

// Whatever calls and results come, and however often the session is taken over: of each call, and of each time that it is made anew, the first result is taken, and no other; and none of one that was cancelled. The model knows calls
// by their names alone, so all results name a request.
func TestEachCallHasOneResult(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		l := newLife(schema.SessionKind_SESSION_KIND_CHAT)
		type name struct{ request, call string }
		fates := map[name]schema.CallFate{}
		lost := map[name]bool{} // taken, of a call that the session never saw
		names := []name{{"q", "c"}, {"q", "d"}, {"p", "c"}, {"o", "c"}}
		want := func(n name) string {
			switch fates[n] {
			case schema.CallFate_CALL_FATE_OPEN:
				return ""
			case schema.CallFate_CALL_FATE_ANSWERED:
				return "already_answered"
			case schema.CallFate_CALL_FATE_CANCELLED:
				return "cancelled"
			}
			known := false
			for other, fate := range fates {
				if other.call != n.call {
					continue
				}
				known = true
				if fate == schema.CallFate_CALL_FATE_OPEN {
					known = false
					break
				}
			}
			if known {
				return "either" // of the call that something became of last
			}
			if lost[n] {
				return "already_answered"
			}
			return ""
		}
		for range rapid.IntRange(1, 40).Draw(rt, "steps") {
			n := rapid.SampledFrom(names).Draw(rt, "name")
			switch rapid.IntRange(0, 7).Draw(rt, "what") {
			case 0:
				// A restored session is the same.
				l = l.restored()
			case 1:
				l.do(t, "cancel")
				for n, fate := range fates {
					if fate == schema.CallFate_CALL_FATE_OPEN {
						fates[n] = schema.CallFate_CALL_FATE_CANCELLED
					}
				}
			case 2, 3, 4:
				if errs := l.append(t, l.say(t, fmt.Sprintf("as agent for %s call %s", n.request, n.call))); errs[0] != nil {
					rt.Fatal(errs)
				}
				fates[n] = schema.CallFate_CALL_FATE_OPEN
			default:
				err := l.append(t, l.say(t, fmt.Sprintf("as worker for %s result %s", n.request, n.call)))[0]
				got := ""
				if err != nil {
					got = schema.CodeOf(err).Word()
				}
				if w := want(n); got != w && (w != "either" || got == "") {
					rt.Fatalf("the result of %v was answered %q, want %q; it stands at %s", n, got, w, l)
				}
				switch {
				case err != nil:
				case fates[n] == schema.CallFate_CALL_FATE_UNSPECIFIED:
					lost[n] = true
				default:
					fates[n] = schema.CallFate_CALL_FATE_ANSWERED
				}
			}
		}
	})
}

// However many calls there are, a session remembers so many: the newest that wait, and the newest that do not.
func TestI8_CallsAreForgotten(t *testing.T) {
	l := newLife(schema.SessionKind_SESSION_KIND_CHAT)
	for i := range 2 * maxOpenCalls {
		l.do(t, fmt.Sprint("as agent call a", i))
		l.do(t, fmt.Sprint("as worker result a", i))
	}
	for i := range maxOpenCalls + 10 {
		l.do(t, fmt.Sprint("as agent call b", i))
	}
	if got := l.restored().String(); got != fmt.Sprintf("chat open, calls %d open, calls %d answered", maxOpenCalls, maxSettledCalls) {
		t.Fatalf("it remembers %s", got)
	}
	result := func(call, want string) {
		t.Helper()
		got := ""
		if err := l.append(t, l.say(t, "as worker result "+call))[0]; err != nil {
			got = schema.CodeOf(err).Word()
		}
		if got != want {
			t.Errorf("the result of %s was answered %q, want %q", call, got, want)
		}
	}
	result(fmt.Sprint("a", maxOpenCalls), "already_answered")
	result("a0", "") // as of a call that it never saw
	l.do(t, "cancel")
	if n := len(l.st.calls); n != maxSettledCalls {
		t.Errorf("it remembers %d calls, want %d", n, maxSettledCalls)
	}
	result("b0", "")
	for _, call := range []int{10, maxOpenCalls + 9} {
		result(fmt.Sprint("b", call), "cancelled")
	}
}
