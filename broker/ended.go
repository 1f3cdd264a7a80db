package broker

import (
	"slices"

	"google.golang.org/protobuf/proto"

	"tidemark/schema"
)

// Which runs of a chat have ended, so that each does so once. A workflow has one run and ends with it; nothing comes behind. It is part of the lifecycle, and as pure (docs/adr/0009).

// maxEnded is how many ended runs a session remembers; at most 210 bytes each (I8).
const maxEnded = 64

// endedRun is a run that has ended, and how. run is empty where it had no name.
type endedRun struct {
	run    string
	status schema.Status
	// byError: an error ended it that is not recoverable. A run_status that says the same of it is no second end.
	byError bool
}

// decideStatus says why nothing like that is to be said of a run: it has ended. Tidemark's own verdict is about a run that is under way, or comes too late: whoever gave it may have been frozen meanwhile.
func (l *lifecycle) decideStatus(id schema.SessionID, e *schema.Accepted) *schema.Refusal {
	var m schema.RunStatus
	if proto.Unmarshal(e.Payload, &m) != nil {
		return nil
	}
	run, ends := m.GetRunId(), schema.Ended(m.GetStatus())
	if m.GetStatus() == schema.Status_STATUS_OPEN {
		return schema.Refuse(schema.Code_CODE_INVALID_TRANSITION,
			"A run of session %s cannot be open: it is running, waiting_for_input, completed, failed or cancelled; a chat is open when its run has ended.", id)
	}
	if l.under() && run == l.run {
		return nil
	}
	s := saidIn(e).scan()
	if ends && s.Role() == schema.Role_ROLE_SYSTEM {
		return schema.Refuse(schema.Code_CODE_INVALID_TRANSITION, "The run %q of session %s is not under way any more; there is nothing to end.", run, id)
	}
	if run != "" {
		if i := l.endOf(run); i >= 0 && (!l.ended[i].byError || m.GetStatus() != schema.Status_STATUS_FAILED) {
			return refuseEnded(id, l.ended[i])
		}
		return nil
	}
	// Of a run without a name that Tidemark ended, or of one that its agent does not name, this is the agent's own end, too late. It would close the chat.
	if ends && !l.under() && l.overruled != (endedRun{}) && attends(s.Role(), e.Kind, e.Payload) {
		return refuseEnded(id, l.overruled)
	}
	return nil
}

func refuseEnded(id schema.SessionID, r endedRun) *schema.Refusal {
	if r.run == "" {
		return schema.Refuse(schema.Code_CODE_RUN_ENDED, "The run of session %s has ended (%s) and does so once; start another run to go on.", id, schema.StatusWord(r.status))
	}
	return schema.Refuse(schema.Code_CODE_RUN_ENDED, "The run %q of session %s has ended (%s) and does so once; start it again, or another run, to go on.", r.run, id, schema.StatusWord(r.status))
}

// endOf finds the end of a run; -1 for none.
func (l *lifecycle) endOf(run string) int {
	return slices.IndexFunc(l.ended, func(r endedRun) bool { return r.run == run })
}

// rememberEnd keeps the end of a chat's run as the last one.
func (l *lifecycle) rememberEnd(r endedRun) {
	if r.run == "" || l.kind != schema.SessionKind_SESSION_KIND_CHAT {
		return
	}
	l.forgetEnd(r.run)
	l.ended = append(slices.Clone(l.ended[max(0, len(l.ended)+1-maxEnded):]), r)
}

// forgetEnd notes that a run begins, perhaps anew.
func (l *lifecycle) forgetEnd(run string) {
	i := l.endOf(run)
	switch {
	case i < 0:
	case len(l.ended) == 1:
		l.ended = nil
	default:
		l.ended = slices.Delete(slices.Clone(l.ended), i, i+1)
	}
}
