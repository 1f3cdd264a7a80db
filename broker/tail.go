package broker

import (
	"slices"
	"sort"
	"sync"

	"tidemark/schema"
)

// tail is the recent past of one log stream, in memory: a ring of frames in the order of the stream, bounded in bytes, with an index by session. It is live delivery, the replay cache and the
// appenders' view of other edges' frames in one (DESIGN section 5).
type tail struct {
	// Static after construction.
	limit int // of size

	mu    sync.Mutex
	ring  []*frame // oldest first
	size  int      // what the ring holds, in bytes, with the forms that followers had made
	lanes map[string]*tailLane
	last  uint64 // stream sequence of the newest frame seen
}

// tailLane is a session in the tail. It exists while the ring holds frames of it, a tombstone among them, or somebody follows it. Guarded by tail.mu.
//
//	before      frames
//	 ----------|===|=====|==|   all of one history: epoch
//	 read from  taken from
//	 the log    here
type tailLane struct {
	subject string
	// known: the fields below say all there is to say. Otherwise nobody has asked the log yet.
	known bool
	// epoch is empty where the session has no envelope, or none since it was deleted.
	epoch  string
	before uint64
	frames []*frame // oldest first, consecutive
	// grave is the tombstone that ended the history before, while the ring holds it: appenders learn from it that their state is void.
	grave *frame
	// followers are to be woken when there is more.
	followers map[*tailFollower]struct{}
	// folded is how far the session's state was last folded, for [JetStreamLog.Session].
	folded *state
}

// tailFollower is one follower's place in the tail: the source that it reads from.
type tailFollower struct {
	log  *JetStreamLog
	tail *tail
	at   *tailLane
	id   schema.SessionID
	lane lane
	wake func()
}

// frameCost is what the ring spends on a frame beside its bytes.
const frameCost = 256

func newTail(limit int) *tail { return &tail{limit: limit, lanes: make(map[string]*tailLane)} }

// add takes in the stream's next frame, and wakes the session's followers. It reports whether the frame continues what is known of its session, as every frame must.
func (t *tail) add(f *frame) bool {
	t.mu.Lock()
	l := t.lane(f.subject)
	t.last = f.StreamSeq
	sound := true
	switch {
	case f.Deleted:
		l.begin("", 0)
	case !l.known || l.epoch != f.Epoch:
		l.begin(f.Epoch, f.First-1)
	case f.First != l.head()+1:
		l.begin(f.Epoch, f.First-1)
		sound = false
	}
	if f.Deleted {
		l.grave = f
	} else {
		l.frames = append(l.frames, f)
	}
	f.cost = len(f.Region) + frameCost
	f.grown = func(n int) { t.grow(f, n) }
	t.ring = append(t.ring, f)
	t.size += f.cost
	t.trim()
	wakes := l.wakes(nil)
	t.mu.Unlock()
	for _, wake := range wakes {
		wake()
	}
	return sound
}

// lane finds a session's lane, or makes one that is not known.
func (t *tail) lane(subject string) *tailLane {
	l := t.lanes[subject]
	if l == nil {
		l = &tailLane{subject: subject}
		t.lanes[subject] = l
	}
	return l
}

// begin forgets what came before and starts a history, or a part of one, behind seq `before`.
func (l *tailLane) begin(epoch string, before uint64) {
	l.known, l.epoch, l.before, l.frames, l.folded = true, epoch, before, nil, nil
}

// head is the last seq.
func (l *tailLane) head() uint64 {
	if n := len(l.frames); n > 0 {
		return l.frames[n-1].Last()
	}
	return l.before
}

func (l *tailLane) wakes(to []func()) []func() {
	for f := range l.followers {
		to = append(to, f.wake)
	}
	return to
}

// grow counts a form that a follower had made of a frame.
func (t *tail) grow(f *frame, n int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if f.cost > 0 {
		f.cost += n
		t.size += n
		t.trim()
	}
}

// trim takes the oldest frames out until the ring is within its bound. The newest stays.
func (t *tail) trim() {
	for t.size > t.limit && len(t.ring) > 1 {
		f := t.ring[0]
		t.ring[0] = nil
		t.ring = t.ring[1:]
		t.size -= f.cost
		f.cost = 0
		l := t.lanes[f.subject]
		if l == nil {
			continue
		}
		if len(l.frames) > 0 && l.frames[0] == f {
			l.frames[0] = nil
			l.frames = l.frames[1:]
			l.before = f.Last()
		}
		if l.grave == f {
			l.grave = nil
		}
		t.forget(l)
	}
}

// forget drops a lane that has neither frames nor followers.
func (t *tail) forget(l *tailLane) {
	if len(l.frames) == 0 && l.grave == nil && len(l.followers) == 0 {
		delete(t.lanes, l.subject)
	}
}

// reset forgets everything: the stream is not the one that was followed before. Followers read the log to learn what became of their sessions.
func (t *tail) reset() {
	t.mu.Lock()
	var wakes []func()
	for _, l := range t.lanes {
		l.begin("", 0)
		l.known, l.grave = false, nil
		wakes = l.wakes(wakes)
		t.forget(l)
	}
	t.ring, t.last, t.size = nil, 0, 0
	t.mu.Unlock()
	for _, wake := range wakes {
		wake()
	}
}

// position is the stream sequence of the newest frame seen.
func (t *tail) position() uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.last
}

// passed notes that the tail will bring nothing up to a stream sequence: it begins behind it.
func (t *tail) passed(seq uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.last = max(t.last, seq)
}

// open registers a follower of the session. From here on the lane says what it does not hold.
func (t *tail) open(f *tailFollower, subject string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	l := t.lane(subject)
	if l.followers == nil {
		l.followers = make(map[*tailFollower]struct{})
	}
	l.followers[f] = struct{}{}
	f.tail, f.at = t, l
}

func (f *tailFollower) close() {
	f.tail.mu.Lock()
	defer f.tail.mu.Unlock()
	delete(f.at.followers, f)
	f.tail.forget(f.at)
}

// learn tells the lane of a session, of which the tail has nothing, what the log says its head is; nil for no frame at all. A frame that came in meanwhile knows better.
func (t *tail) learn(l *tailLane, head *frame) {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case l.known:
	case head == nil || head.Deleted:
		l.begin("", 0)
	case head.StreamSeq > t.last:
		// The tail has not come so far: it will bring this frame, and before it perhaps others of the session, or the end of the history before. Until then nothing is known.
	default:
		l.begin(head.Epoch, head.Last())
	}
}

// expire notes that the log has nothing more of the session, if the lane still stands as it did at g, where it held no frame.
func (t *tail) expire(l *tailLane, g glance) {
	t.mu.Lock()
	var wakes []func()
	if l.known && l.epoch == g.epoch && l.before == g.before && len(l.frames) == 0 {
		l.begin("", 0)
		wakes = l.wakes(nil)
	}
	t.mu.Unlock()
	for _, wake := range wakes {
		wake()
	}
}

// glance is what a lane knows of its session at one moment.
type glance struct {
	known  bool
	epoch  string
	head   uint64
	before uint64
	frames []*frame
	folded *state
}

func (t *tail) glance(l *tailLane) glance {
	t.mu.Lock()
	defer t.mu.Unlock()
	return glance{l.known, l.epoch, l.head(), l.before, slices.Clone(l.frames), l.folded}
}

// take implements source.
func (f *tailFollower) take(c Cursor, limit int) ([]View, error) {
	f.tail.mu.Lock()
	defer f.tail.mu.Unlock()
	l := f.at
	switch {
	case !l.known:
		return nil, ErrBehind
	case c.Epoch == "" && l.epoch == "":
		return nil, nil
	case c.Epoch != "" && c.Epoch != l.epoch:
		return nil, sessionDeleted(f.id)
	case c.Seq < l.before:
		return nil, ErrBehind
	}
	var views []View
	i := sort.Search(len(l.frames), func(i int) bool { return l.frames[i].Last() > c.Seq })
	for _, b := range l.frames[i:] {
		v := b.After(c.Seq).Limit(limit)
		views = append(views, v)
		c.Seq = v.To
		if limit -= len(v.Records()); limit <= 0 || v.To < b.Last() {
			break
		}
	}
	return views, nil
}

func sessionDeleted(id schema.SessionID) error {
	return schema.Refuse(schema.Code_CODE_SESSION_DELETED, "Session %s was deleted; what is published to it now begins another history.", id)
}

// framesBehind returns the session's frames here that are behind a stream sequence.
func (t *tail) framesBehind(subject string, streamSeq uint64) []*frame {
	t.mu.Lock()
	defer t.mu.Unlock()
	l := t.lanes[subject]
	if l == nil || len(l.frames) == 0 || l.frames[len(l.frames)-1].StreamSeq <= streamSeq {
		return nil
	}
	i := sort.Search(len(l.frames), func(i int) bool { return l.frames[i].StreamSeq > streamSeq })
	return slices.Clone(l.frames[i:])
}

// knowsBetter reports whether the session has another history, or a later head, than a state of it says. What the tail does not know it does not say.
func (t *tail) knowsBetter(subject string, st *state) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	l := t.lanes[subject]
	return l != nil && l.known && t.last >= st.frame && (l.epoch != st.epoch || l.head() > st.head)
}

// frameAt returns the session's frame with this stream sequence, if it is here.
func (t *tail) frameAt(subject string, streamSeq uint64) *frame {
	if frames := t.framesBehind(subject, streamSeq-1); len(frames) > 0 && frames[0].StreamSeq == streamSeq {
		return frames[0]
	}
	return nil
}
