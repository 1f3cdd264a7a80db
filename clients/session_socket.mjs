// The session socket from Node, with the package ws: publishes a workflow over a wire that is cut at random, follows it over that wire, and compares with who follows it undisturbed.
import assert from 'node:assert/strict'
import { randomBytes } from 'node:crypto'
import { setTimeout as sleep } from 'node:timers/promises'
import WebSocket from 'ws'

const { TOKEN, EDGE_HTTP, CUT_HTTP } = process.env
const session = `workflow of Node ${process.hrtime.bigint()}`
const digits = '0123456789ABCDEFGHJKMNPQRSTVWXYZ'
const ulid = () => '0' + Array.from(randomBytes(25), b => digits[b % 32]).join('')
const pick = list => list[Math.floor(Math.random() * list.length)]

// Everything a workflow says: 400 tokens, a tool, a question, its answer, the end.
function * workflow () {
  yield ['start_run', { run_id: 'r1', input: { question: 'What is the tide doing?' } }]
  yield ['tool_call', { call_id: 'c1', name: 'tide', arguments: { place: 'Büsum' }, done: true }]
  yield ['tool_result', { call_id: 'c1', result: [{ high: '04:12' }, null, 1.5] }]
  for (let i = 0; i < 400; i++) {
    if (i % 100 === 0) yield ['workflow_progress', { step: `part ${i / 100}`, message: 'writing', progress: i / 400 }]
    yield ['token', { message_id: 'm1', text: pick(['ebb ', 'flood ', 'Wattenmeer ', '潮 ', '🌊 ', '"\\\n ']) }]
  }
  yield ['message_completed', { message_id: 'm1', finish_reason: 'stop' }]
  yield ['workflow_waiting_for_input', { prompt: 'Go on?', options: ['yes', 'no'] }]
  yield ['user_input', { response: 'yes' }]
  yield ['run_status', { run_id: 'r1', status: 'completed' }]
}

// Opens the session socket and calls heard with everything it says, until that returns true or the connection ends; says whether the former.
function converse (host, query, opened, heard) {
  return new Promise((resolve, reject) => {
    const ws = new WebSocket(`ws://${host}/ws?${new URLSearchParams({ sessionName: session, token: TOKEN, ...query })}`)
    let done = false
    ws.on('error', () => {}) // the end follows
    ws.on('close', (code, reason) => resolve(done ? 'done' : code === 1000 ? String(reason) : 'lost'))
    ws.on('open', () => opened(ws))
    ws.on('message', text => {
      if (done) return
      try {
        done = heard(JSON.parse(text), ws)
        if (done) ws.close()
      } catch (wrong) {
        reject(wrong)
        ws.terminate()
      }
    })
  })
}

// Sends what is not acknowledged again on each new connection; its id keeps it from being stored twice.
async function publish (messages) {
  const waiting = messages.map(([type, data]) => ({ type, id: ulid(), data }))
  let connections = 0
  for (let over = false; !over; await sleep(20)) {
    let sent = 0
    const more = ws => {
      for (; sent < Math.min(waiting.length, 2); sent++) ws.send(JSON.stringify(waiting[sent]))
    }
    const opened = ws => {
      connections++
      more(ws)
    }
    const end = await converse(CUT_HTTP, { lastSeq: 'latest' }, opened, (said, ws) => {
      assert(said.type !== 'error' || said.data.retryable, JSON.stringify(said))
      if (said.type !== 'published') return false
      assert.equal(said.data.id, waiting[0].id)
      assert.equal(said.data.durability, 'fsync')
      waiting.shift()
      sent--
      setTimeout(more, 5, ws)
      return waiting.length === 0
    })
    over = end === 'done' || end === 'completed'
    if (end === 'completed') {
      // The session takes nothing more. What of ours it had taken, and could not tell us any more, is among what is replayed.
      const [all] = await follow(CUT_HTTP, 'run_status')
      const stored = new Set(all.map(e => e.id))
      assert(waiting.every(({ id }) => stored.has(id)), `the session has ended without ${JSON.stringify(waiting)}`)
    }
  }
  return connections
}

// Follows up to the envelope of that type.
async function follow (host, until) {
  const got = []
  let epoch; let connections = 0
  for (let over = false; !over; await sleep(20)) {
    assert(connections === 0 || host !== EDGE_HTTP, 'the wire that nobody cuts was cut')
    const query = { ...(got.length > 0 && { lastSeq: got.length }), ...(epoch && { epoch }) }
    over = await converse(host, query, () => connections++, said => {
      if (said.seq) {
        assert.equal(said.seq, got.length + 1)
        got.push(said)
      } else if (said.type === 'attached') {
        assert.equal(said.data.after_seq ?? 0, got.length)
        epoch = said.data.epoch || epoch
      } else {
        assert(said.type === 'going_away' || said.data.retryable, JSON.stringify(said))
      }
      return said.type === until
    }) === 'done'
  }
  return [got, connections]
}

const text = envelopes => envelopes.filter(e => e.type === 'token').map(e => e.data.text).join('')

const messages = [...workflow()]
const [published, [calm], [got, connections]] = await Promise.all([publish(messages), follow(EDGE_HTTP, 'run_status'), follow(CUT_HTTP, 'run_status')])
assert.deepEqual(got, calm, 'who was cut got something else')
assert.deepEqual(got.map(e => e.type), messages.map(([type]) => type))
assert.equal(text(got), messages.filter(([type]) => type === 'token').map(([, data]) => data.text).join(''))
assert.deepEqual(got[2].data.result, [{ high: '04:12' }, null, 1.5])
assert(published > 2 && connections > 2, `hardly anything was cut: ${published} and ${connections} connections`)
console.log(`${got.length} envelopes published over ${published} connections, and read over ${connections}, are those of an undisturbed client`)
