// Link keeps one session's socket open, as any client of GET /ws does: it resumes behind the last envelope it has, counts what would be lost or come twice, and sends again what was not acknowledged.

// Between attempts, in milliseconds: 1, 2, 4 … 30 s, a fifth more or less, so that the clients of an edge that was lost do not all come at once.
const firstWait = 1000
const longestWait = 30000
// How long a cut lasts before the link comes back.
const cutWait = 1500
// Bounds of what waits to be sent, and of what is sent and not yet acknowledged.
const maxOutbox = 2000
const maxSent = 64

// What refusals mean for a client that comes again; PROTOCOL.md has the table. All others: come again from the same place.
const fromTheBeginning = ['session_deleted', 'seq_beyond_head', 'epoch_mismatch']
const askForToken = ['unauthenticated', 'token_expired']
const giveUp = ['invalid_message', 'unknown_type', 'too_large', 'unsupported_protocol', 'forbidden', 'session_not_found', 'origin_not_allowed']

const digits = '0123456789ABCDEFGHJKMNPQRSTVWXYZ'

// ulid is a new id for an envelope. The server knows a retry by it.
function ulid () {
  let id = ''
  for (let t = Date.now(), i = 0; i < 10; i++, t = Math.floor(t / 32)) id = digits[t % 32] + id
  for (const b of crypto.getRandomValues(new Uint8Array(16))) id += digits[b % 32]
  return id
}

export class Link {
  #ws = null
  #timer = 0
  #attempt = 0
  #attached = false
  #refusal = null // the last error frame that was not about an envelope
  #over = false // closed for good
  #quiet = false // the next attachment is not counted as a reconnect
  #outbox = []
  #sent = 0 // so many of the outbox are on their way
  #retry = 0 // the timer after which what was refused for now is sent again; 0 where nothing was

  epoch = ''
  seq = 0
  head = 0 // of the session, when it was attached
  attachments = 0
  reconnects = 0
  repeated = 0
  lost = 0

  // hear is told everything: state(name, detail), attached(data, behind), envelope(e, live), truncated(data), restarted(why).
  constructor (session, token, hear) {
    this.session = session
    this.token = token
    this.hear = hear
  }

  open () {
    clearTimeout(this.#timer)
    this.#forget()
    if (!/^[\w.~+/=-]+$/.test(this.token)) return this.#end('token', 'This is no token: a token is one word of letters, digits, dots, dashes and underscores.')
    this.#attached = false
    this.#refusal = null
    this.#sent = 0
    this.hear.state('connecting')
    const query = new URLSearchParams({ sessionName: this.session })
    if (this.seq > 0) query.set('lastSeq', this.seq)
    if (this.seq > 0 && this.epoch) query.set('epoch', this.epoch)
    // The token goes in a subprotocol, and so not into the address.
    const ws = new WebSocket(`${location.protocol.replace('http', 'ws')}//${location.host}/ws?${query}`, ['bearer.' + this.token])
    this.#ws = ws
    let opened = false
    ws.onopen = () => { opened = true }
    ws.onmessage = event => this.#heard(JSON.parse(event.data))
    ws.onclose = event => {
      this.#forget()
      if (opened) this.#closed(event.code, event.reason)
      else this.#refused()
    }
  }

  // cut loses the connection without a word, as a tunnel does, and comes back after a moment.
  cut () {
    if (!this.#ws) return
    this.#forget()
    this.#wait('cut', cutWait)
  }

  // now ends a wait.
  now () {
    if (!this.#ws && this.#timer) this.open()
  }

  // ask attaches anew to learn where the session stands.
  ask () {
    if (!this.#attached) return
    this.#quiet = true
    this.open()
  }

  // close ends the link for good.
  close () {
    this.#over = true
    clearTimeout(this.#timer)
    this.#timer = 0
    this.#forget()
    this.#outbox = []
  }

  // send puts an envelope into the outbox; settled is called once, with a refusal where it was not stored. False: there is no room.
  send (type, data, settled = () => {}) {
    if (this.#outbox.length >= maxOutbox) return false
    this.#outbox.push({ message: { type, id: ulid(), data }, settled })
    this.#flush()
    return true
  }

  #forget () {
    clearTimeout(this.#retry)
    this.#retry = 0
    const ws = this.#ws
    this.#ws = null
    this.#attached = false
    if (!ws) return
    ws.onopen = ws.onmessage = ws.onclose = null
    ws.close()
  }

  #flush () {
    if (!this.#attached) return
    for (; this.#sent < Math.min(this.#outbox.length, maxSent); this.#sent++) this.#ws.send(JSON.stringify(this.#outbox[this.#sent].message))
  }

  // settle takes an envelope out of the outbox.
  #settle (id, refusal) {
    const i = this.#outbox.findIndex(o => o.message.id === id)
    if (i < 0) return false
    const [{ settled }] = this.#outbox.splice(i, 1)
    if (i < this.#sent) this.#sent--
    settled(refusal)
    this.#flush()
    return true
  }

  #heard (frame) {
    if (frame.seq !== undefined) {
      if (frame.seq <= this.seq) {
        this.repeated++
        return
      }
      this.lost += frame.seq - this.seq - 1
      this.seq = frame.seq
      this.hear.envelope(frame, frame.seq > this.head)
      return
    }
    const data = frame.data ?? {}
    switch (frame.type) {
      case 'attached': {
        const again = this.#attached // the session was empty, and has begun
        this.epoch = data.epoch || this.epoch
        this.#attached = true
        this.#attempt = 0
        if (!again) {
          this.head = data.head_seq
          this.attachments++
          if (this.attachments > 1 && !this.#quiet) this.reconnects++
          this.hear.state('open')
          this.hear.attached(data, this.attachments > 1 && !this.#quiet ? Math.max(0, data.head_seq - this.seq) : null)
          this.#quiet = false
        }
        this.#flush()
        break
      }
      case 'truncated':
        this.seq = data.first_seq - 1
        this.hear.truncated(data)
        break
      case 'published':
        this.#settle(data.id, null)
        break
      case 'error':
        if (data.id && data.retryable && this.#outbox.some(o => o.message.id === data.id)) {
          // It, and what went with it, is sent again as it is: once, however many of them were refused.
          this.#retry ||= setTimeout(() => { this.#retry = 0; this.#sent = 0; this.#flush() }, firstWait)
        } else if (!data.id || !this.#settle(data.id, data)) {
          this.#refusal = data
        }
        break
    }
  }

  #closed (code, reason) {
    const word = this.#refusal?.code || reason.split(':')[0]
    const why = this.#refusal?.details || reason.slice(word.length + 2) || `the connection was closed with ${code}`
    if (code === 1000) this.#end('finished', word)
    else if (code === 4401 || askForToken.includes(word)) this.#end('token', why)
    else if (giveUp.includes(word)) this.#end('stopped', why)
    else if (fromTheBeginning.includes(word)) {
      this.seq = 0
      this.epoch = ''
      this.hear.restarted(why)
      this.#again(why)
    } else this.#again(why)
  }

  // refused asks why the upgrade failed, which browsers do not say.
  async #refused () {
    let status = 0
    let why = ''
    try {
      const answer = await fetch('/page/access?' + new URLSearchParams({ sessionName: this.session }), {
        headers: { Authorization: 'Bearer ' + this.token }, cache: 'no-store', signal: AbortSignal.timeout(5000)
      })
      status = answer.status
      if (status !== 204) why = (await answer.json()).details
    } catch {} // the server is away
    if (this.#over) return
    if (status === 401) this.#end('token', why)
    else if (status === 400 || status === 403) this.#end('stopped', why)
    else this.#again(why || 'the server cannot be reached')
  }

  #again (why) {
    const wait = Math.min(longestWait, firstWait * 2 ** this.#attempt++) * (0.8 + 0.4 * Math.random())
    this.#wait('lost', wait, why)
  }

  #wait (name, wait, why) {
    clearTimeout(this.#timer)
    this.#timer = setTimeout(() => { this.#timer = 0; this.open() }, wait)
    this.hear.state(name, { until: Date.now() + wait, why })
  }

  #end (name, why) {
    this.close()
    this.hear.state(name, { why })
  }
}
