package edgews

import (
	"fmt"
	"sync"
	"testing"

	"github.com/coder/websocket"

	"tidemark/schema"
)

// TestOneAnswerWins: of many people who answer a question at once exactly one does, whoever it is; everybody else is told and stays, and all see the same.
func TestOneAnswerWins(t *testing.T) {
	bubble(t, nil, func(w *world) {
		const people, questions = 8, 20
		agent := w.session("sessionName=s&lastSeq=latest")
		agent.wantType("attached")
		var all []*client
		for i := range people {
			c := w.ui(as(t, fmt.Sprint("user-", i), schema.Role_ROLE_USER), "sessionName=s&lastSeq=latest")
			c.wantType("attached")
			all = append(all, c)
		}
		for q := range questions {
			agent.sendText(fmt.Sprintf(`{"type":"workflow_waiting_for_input","data":{"prompt":"%d","options":["0","1","2","3","4","5","6","7"]}}`, q))
			var ready, done sync.WaitGroup
			won, seen := make([]bool, people), make([]any, people)
			ready.Add(people)
			for i, c := range all {
				done.Go(func() {
					for c.nextSkipping("attached")["type"] != "workflow_waiting_for_input" {
					}
					ready.Done()
					ready.Wait()
					if err := c.c.Write(w.Context(), websocket.MessageText, fmt.Appendf(nil, `{"type":"user_input","data":{"response":"%d"}}`, i)); err != nil {
						t.Error(err)
						return
					}
					answered := false
					for !answered || seen[i] == nil {
						m := c.nextJSON()
						data, _ := m["data"].(map[string]any)
						switch {
						case m["seq"] != nil:
							seen[i] = data["response"]
						case m["type"] == "published":
							won[i], answered = true, true
						case m["type"] == "error" && data["code"] == "not_waiting" && data["id"] != nil:
							answered = true
						default:
							t.Errorf("got %v", m)
							return
						}
					}
				})
			}
			done.Wait()
			winner := -1
			for i := range people {
				if won[i] && winner >= 0 {
					t.Errorf("question %d: %d and %d have both answered it", q, winner, i)
				}
				if won[i] {
					winner = i
				}
				if seen[i] != seen[0] {
					t.Errorf("question %d: one saw %v, another %v", q, seen[0], seen[i])
				}
			}
			if winner < 0 || seen[0] != fmt.Sprint(winner) {
				t.Fatalf("question %d: %d answered, and everybody saw %v", q, winner, seen[0])
			}
			for m := agent.nextJSON(); m["type"] != "user_input"; m = agent.nextJSON() {
			}
		}
	})
}

// TestReplacedProgressIsAnswered: every publish is answered with its own id, also the one whose place a newer took.
func TestReplacedProgressIsAnswered(t *testing.T) {
	bubble(t, nil, func(w *world) {
		c := w.session("sessionName=s")
		c.wantType("attached")
		id := func(i int) string { return fmt.Sprintf("01JBV0000000000000000000%02d", i) }
		for i := range 5 {
			c.sendText(`{"type":"workflow_progress","id":"` + id(i) + `","data":{"step":"s","message":"m"}}`)
		}
		want := map[string]string{id(0): "1 false", id(1): "2 true", id(2): "2 true", id(3): "2 true", id(4): "2 false"}
		for len(want) > 0 {
			m := c.nextSkipping("attached")
			data := m["data"].(map[string]any)
			if m["type"] != "published" {
				if m["type"] != "workflow_progress" || m["id"] != id(0) && m["id"] != id(4) {
					t.Errorf("got %v", m)
				}
				continue
			}
			if got := fmt.Sprintf("%v %v", data["seq"], data["replaced"] == true); got != want[data["id"].(string)] {
				t.Errorf("%v, want %q", m, want[data["id"].(string)])
			}
			delete(want, data["id"].(string))
		}
	})
}
