// A whole workflow from Node, with the package ws: an agent and a UI, each a process that has nothing but a WebSocket and JSON, over a wire that is cut at random and once is gone for a while.
import assert from 'node:assert/strict'
import { spawn } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { setTimeout as sleep } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import WebSocket from 'ws'

const { TOKEN, USER_TOKEN, OTHER_TOKEN, BRIEF_TOKEN, EDGE_HTTP, CUT_HTTP, LONGEST } = process.env
// How much shorter than in life the pauses between connections are.
const factor = Number(process.env.BACKOFF_FACTOR)
const digits = '0123456789ABCDEFGHJKMNPQRSTVWXYZ'
const ulid = () => '0' + Array.from(randomBytes(25), b => digits[b % 32]).join('')
const pick = list => list[Math.floor(Math.random() * list.length)]
const terminal = ['completed', 'failed', 'cancelled']
// What ends a client for good; after everything else it comes again with the cursor it has.
const fatal = ['invalid_message', 'unknown_type', 'forbidden', 'unauthenticated', 'epoch_mismatch', 'seq_beyond_head', 'too_large']

const address = (host, session, token, query = {}) => {
  const said = Object.entries({ sessionName: session, token, ...query }).filter(([, v]) => v)
  return `ws://${host}/ws?${new URLSearchParams(said)}`
}

// Follows a session and publishes to it over as many connections as it takes.
class Client {
  got = []
  epoch = ''
  connections = 0
  unanswered = new Map() // by id, in the order in which they were sent
  pauses = [] // before each connection, as they would be in life, in seconds
  replaced = 0
  waiting = []

  constructor (host, session, token) {
    Object.assign(this, { host, session, token })
  }

  // Until the session has ended. It waits 1, 2, 4 … 30 s between connections that do not come about.
  async run () {
    for (let failures = 0; ; failures++) {
      const before = this.connections
      if (await this.connect()) return
      if (this.connections > before) failures = 0
      const pause = Math.min(30, 2 ** failures)
      this.pauses.push(pause)
      await sleep(pause * 1000 * factor)
    }
  }

  // One connection; true where the session ended on it.
  connect () {
    return new Promise((resolve, reject) => {
      const ws = new WebSocket(address(this.host, this.session, this.token, { lastSeq: this.got.length, epoch: this.epoch }))
      let over = false
      let first = true
      ws.on('error', () => {}) // the end follows
      ws.on('close', () => {
        this.ws = undefined
        resolve(over)
      })
      ws.on('message', text => {
        if (over) return
        try {
          const said = JSON.parse(text)
          if (first && said.type === 'attached') {
            this.connections++
            assert.equal(said.data.after_seq, this.got.length)
            this.epoch = said.data.epoch || this.epoch
            this.ws = ws
            for (const envelope of this.unanswered.values()) ws.send(JSON.stringify(envelope))
          } else {
            over = this.hear(said)
          }
          first = false
          this.look()
          if (over) ws.close()
        } catch (wrong) {
          reject(wrong)
          ws.terminate()
        }
      })
    })
  }

  // Takes in what the edge says; true where that was the end.
  hear (said) {
    const { type, data, seq } = said
    if (seq) {
      assert.equal(seq, this.got.length + 1)
      this.got.push(said)
      this.envelope(type, data)
      return type === 'run_status' && terminal.includes(data.status)
    }
    if (type === 'published') {
      assert.equal(data.durability, 'fsync')
      this.replaced += data.replaced ? 1 : 0
      this.answered(data.id, '')
    } else if (type === 'attached') {
      // The session was empty, and has begun.
      assert(this.got.length === 0 && data.epoch, JSON.stringify(said))
      this.epoch = data.epoch
    } else if (type === 'error' && data.id) {
      if (!data.retryable) this.answered(data.id, data.code)
    } else if (type === 'error') {
      assert(!fatal.includes(data.code), JSON.stringify(said))
    } else {
      assert.equal(type, 'going_away')
    }
    return false
  }

  envelope () {}

  answered (id) {
    this.unanswered.delete(id)
  }

  // Publishes one envelope; it is sent again on each new connection until it is answered.
  say (type, data) {
    const envelope = { type, id: ulid(), data }
    this.unanswered.set(envelope.id, envelope)
    if (this.ws) this.ws.send(JSON.stringify(envelope), () => {})
  }

  until (yes) {
    return new Promise(resolve => {
      this.waiting.push({ yes, resolve })
      this.look()
    })
  }

  look () {
    this.waiting = this.waiting.filter(({ yes, resolve }) => !yes() || resolve())
  }
}

// Says what an agent says, and goes on once its question is answered.
class Agent extends Client {
  envelope (type, data) {
    if (type === 'user_input') this.answer = data.response
  }

  answered (id, code) {
    assert.equal(code, '', 'the agent is refused')
    super.answered(id)
  }

  async tokens (n) {
    for (let i = 0; i < n; i++) {
      if (i % 50 === 0) {
        // Faster than once a second: of these only the last must be stored.
        for (let k = 1; k <= 5; k++) this.say('workflow_progress', { step: 'writing', message: `part ${i / 50}, ${k} of 5`, progress: i / n })
      }
      this.say('token', { message_id: 'm1', text: pick(['ebb ', 'flood ', 'Wattenmeer ', '潮 ', '🌊 ', '"\\\n ']) })
      await this.until(() => this.unanswered.size < 10)
      await sleep(2)
    }
    await this.until(() => this.unanswered.size === 0)
  }

  async work () {
    const following = this.run()
    this.say('start_run', { run_id: 'r1', input: { question: 'What is the tide doing?' } })
    await this.tokens(250)
    this.say('workflow_waiting_for_input', { prompt: 'Go on?', options: ['approve', 'reject'], context: { written: 250 } })
    await this.until(() => this.answer !== undefined)
    assert.equal(this.answer, 'approve')
    await this.tokens(150)
    this.say('message_completed', { message_id: 'm1', finish_reason: 'stop' })
    await this.until(() => this.unanswered.size === 0)
    this.say('run_status', { run_id: 'r1', status: 'completed' })
    await following
    return { connections: this.connections, replaced: this.replaced }
  }
}

// Watches, and approves: at first it says what is no option, and at last it answers once more.
class UI extends Client {
  tries = ['maybe', 'approve', 'approve']
  codes = []

  envelope (type, data) {
    if (type !== 'workflow_waiting_for_input') return
    assert.deepEqual(data.options, ['approve', 'reject'])
    this.say('user_input', { response: this.tries.shift() })
  }

  answered (id, code) {
    if (this.unanswered.has(id)) {
      this.codes.push(code)
      if (this.tries.length > 0) this.say('user_input', { response: this.tries.shift() })
    }
    super.answered(id)
  }

  async work () {
    await this.run()
    this.pauses.forEach((pause, i) => assert(pause === 1 || pause === Math.min(30, 2 * this.pauses[i - 1]), `${this.pauses}`))
    return { connections: this.connections, pauses: this.pauses, codes: this.codes, got: this.got }
  }
}

// Runs a part in a process of its own, and returns what it has seen.
function part (role, session) {
  return new Promise((resolve, reject) => {
    const p = spawn(process.execPath, [fileURLToPath(import.meta.url), role, session], { stdio: ['ignore', 'pipe', 'inherit'] })
    const said = []
    p.stdout.on('data', b => said.push(b))
    p.on('error', reject)
    p.on('close', code => code === 0 ? resolve(JSON.parse(Buffer.concat(said))) : reject(new Error(`the ${role} failed`)))
  })
}

// What the edge answers instead of an upgrade.
function turnedAway (session, token) {
  return new Promise((resolve, reject) => {
    const ws = new WebSocket(address(EDGE_HTTP, session, token))
    ws.on('error', reject)
    ws.on('open', () => reject(new Error('it was let in')))
    ws.on('unexpected-response', async (_, res) => {
      let text = ''
      for await (const chunk of res) text += chunk
      const body = JSON.parse(text)
      assert(body.error === 'Unauthorized' && body.details, text)
      resolve([res.statusCode, body.code])
      ws.terminate()
    })
  })
}

// A connection on the wire that nobody cuts, of which each message is waited for.
class Talk {
  said = []

  constructor (session, token, query) {
    const ws = this.ws = new WebSocket(address(EDGE_HTTP, session, token, query))
    this.opened = new Promise((resolve, reject) => ws.on('open', resolve).on('error', reject))
    this.ended = new Promise(resolve => ws.on('close', (code, reason) => resolve([code, reason.toString().split(':')[0]])))
    ws.on('message', text => {
      this.said.push(JSON.parse(text))
      this.heard?.()
    })
  }

  send (type, data) {
    this.ws.send(JSON.stringify({ type, data }), () => {})
  }

  async next () {
    while (this.said.length === 0) await new Promise(resolve => { this.heard = resolve })
    return this.said.shift()
  }

  async until (type) {
    for (;;) {
      const said = await this.next()
      if (said.type === type) return said.data
    }
  }

  // How the edge ends it: the last error it says before, the close code and the reason's first word.
  async closed () {
    const end = await this.ended
    const last = this.said.filter(s => s.type === 'error' && !s.seq).at(-1)
    return [last?.data.code ?? '', ...end]
  }
}

async function talk (...args) {
  const t = new Talk(...args)
  await t.opened
  return t
}

// How refusals are told, on sessions of their own.
async function manners (session) {
  for (const wrong of ['', 'nonsense', TOKEN.slice(0, -2)]) assert.deepEqual(await turnedAway(session, wrong), [401, 'unauthenticated'])
  assert.deepEqual(await turnedAway(session, OTHER_TOKEN), [403, 'forbidden'])

  // Nobody has asked: said, and nothing more.
  let t = await talk(`${session} quiet`, USER_TOKEN)
  for (let i = 0; i < 2; i++) {
    t.send('user_input', { response: 'yes' })
    assert.equal((await t.until('error')).code, 'not_waiting')
  }
  t.send('user_message', { message: 'hello' })
  assert.equal((await t.until('published')).seq, 1)
  // A type that is not a user's, a field that is missing, too much at once.
  t.send('token', { message_id: 'm', text: 'x' })
  assert.deepEqual(await t.closed(), ['forbidden', 1008, 'forbidden'])
  t = await talk(`${session} quiet`, USER_TOKEN)
  t.send('user_input', {})
  assert.deepEqual(await t.closed(), ['invalid_message', 1008, 'invalid_message'])
  t = await talk(`${session} quiet`, USER_TOKEN)
  for (let i = 0; i < 200; i++) t.send('user_message', { message: `${i}` })
  assert.deepEqual(await t.closed(), ['rate_exceeded', 1008, 'rate_exceeded'])
}

// A token that ends on a live connection ends it; a new one before that does not.
async function expiry (session) {
  const [lasting, ending] = await Promise.all([talk(`${session} brief`, BRIEF_TOKEN), talk(`${session} brief`, BRIEF_TOKEN)])
  lasting.send('refresh', { token: USER_TOKEN })
  assert((await lasting.until('refreshed')).expires)
  assert.deepEqual(await ending.closed(), ['token_expired', 4401, 'token_expired'])
  lasting.send('user_message', { message: 'still here' })
  await lasting.until('published')
  // Whoever closes is answered.
  lasting.ws.close(1000, 'done')
  assert.deepEqual(await lasting.closed(), ['', 1000, 'done'])
  assert.deepEqual(await turnedAway(session, BRIEF_TOKEN), [401, 'unauthenticated'])
}

const text = envelopes => envelopes.filter(e => e.type === 'token').map(e => e.data.text).join('')

async function main () {
  const session = `a workflow in Node ${process.hrtime.bigint()}`
  const calm = new Client(EDGE_HTTP, session, TOKEN)
  const [agent, ui] = await Promise.all([part('agent', session), part('ui', session), calm.run(), manners(session), expiry(session)])
  const got = ui.got
  assert(calm.connections === 1 && calm.pauses.length === 0, 'the wire that nobody cuts was cut')
  assert(text(got) === text(calm.got) && text(got) !== '', 'who was cut read another text')
  assert.deepEqual(got, calm.got, 'who was cut got something else')
  assert.equal(got.filter(e => e.type === 'token').length, 400)
  assert.equal(got.filter(e => e.type === 'user_input').length, 1)
  assert.deepEqual(ui.codes.slice(0, 2), ['invalid_response', ''])
  assert(ui.codes.slice(2).every(code => ['not_waiting', 'session_ended'].includes(code)), `${ui.codes}`)
  assert(ui.pauses.join(' ').includes(LONGEST), `it never waited longer and longer: ${ui.pauses}`)
  const progress = got.filter(e => e.type === 'workflow_progress').map(e => e.data.message)
  assert(agent.replaced > 0 && progress.length < 40, `progress is stored as often as it is sent: ${progress}`)
  assert.deepEqual(progress.filter(m => m.includes('5 of 5')), [0, 1, 2, 3, 4, 0, 1, 2].map(n => `part ${n}, 5 of 5`))
  // Who comes late to a session that has ended gets what is missing, and the end.
  const late = await talk(session, USER_TOKEN, { lastSeq: got.length - 1, epoch: calm.epoch })
  assert.equal((await late.until('attached')).status, 'completed')
  assert.deepEqual(await late.next(), got.at(-1))
  assert.deepEqual(await late.closed(), ['', 1000, 'completed'])
  console.log(`${got.length} envelopes over ${agent.connections} connections of the agent and ${ui.connections} of the UI are those of an undisturbed client; the UI waited ${ui.pauses.length} times, and at most ${Math.max(...ui.pauses)} s`)
}

const [role, session] = process.argv.slice(2)
if (role) console.log(JSON.stringify(await new (role === 'agent' ? Agent : UI)(CUT_HTTP, session, role === 'agent' ? TOKEN : USER_TOKEN).work()))
else await main()
