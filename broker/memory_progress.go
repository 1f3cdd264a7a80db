package broker

import (
	"time"

	"tidemark/schema"
)

// wait lets a submission wait that may, if its time has not come: alone, or in the place of the one that waits already. False where it is to be submitted at once. Called with mu held.
func (l *MemoryLog) wait(id schema.SessionID, s *Submission, said *saying) bool {
	m := l.sessions[id]
	if !s.mayWait || m == nil || m.placeOf(&s.Envelopes[0]) != 0 {
		return false
	}
	alone := m.waiting == nil
	if !alone {
		s, _ = replace(m.waiting, s)
	}
	now := time.Now()
	s.delay(m.progressed, now)
	if alone && s.due {
		return false
	}
	m.waiting = s
	switch {
	case s.due:
		l.storeWaiting(id, said)
	case alone:
		time.AfterFunc(m.progressed.Add(progressEvery).Sub(now), func() { l.endWait(id, m) })
	}
	return true
}

// endWait stores the session's progress that waits, if its second has passed.
func (l *MemoryLog) endWait(id schema.SessionID, m *memorySession) {
	var said saying
	l.mu.Lock()
	if l.sessions[id] == m && time.Since(m.progressed) >= progressEvery {
		l.storeWaiting(id, &said)
	}
	l.mu.Unlock()
	said.out()
}

// storeWaiting stores the progress that waits in the session, if any does. Called with mu held.
func (l *MemoryLog) storeWaiting(id schema.SessionID, said *saying) {
	if m := l.sessions[id]; m != nil && m.waiting != nil {
		s := m.waiting
		m.waiting = nil
		l.submit(id, s, said)
	}
}

// saying gathers what is to be said once the lock is released.
type saying struct{ calls []func() }

func (s *saying) wake(call func()) { s.calls = append(s.calls, call) }

func (s *saying) answer(sub *Submission, r Receipt, err error) {
	s.calls = append(s.calls, func() { sub.finish(r, err) })
}

func (s *saying) out() {
	for _, call := range s.calls {
		call()
	}
}
