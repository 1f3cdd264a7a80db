// gRPC-Web as browsers speak it, over HTTP/1.1, with connect-web and code generated from the definitions: appends and follows over a wire that is cut at random, and compares with who follows undisturbed.
import assert from 'node:assert/strict'
import http from 'node:http'
import { setTimeout as sleep } from 'node:timers/promises'
import { Code, ConnectError, createClient } from '@connectrpc/connect'
import { createGrpcWebTransport } from '@connectrpc/connect-web'
import { SessionService } from './generated/tidemark/v1/service_pb.js'
import { Durability } from './generated/tidemark/v1/wire_pb.js'

const { TOKEN, EDGE_GRPC, CUT_GRPC } = process.env
const origin = 'https://app.example.com'
const session = `gRPC-Web from Node ${process.hrtime.bigint()}`
const headers = { authorization: `Bearer ${TOKEN}`, origin }
// At least.
const appends = 150
// So often the connection of who follows must be cut, and that of who appends once: it is appended until they were, for as many milliseconds as this.
const cuts = 2
const patience = 90000
// What a cut wire looks like to somebody who speaks HTTP through fetch.
const lost = [Code.Unavailable, Code.Unknown, Code.Internal, Code.Aborted, Code.DataLoss, Code.DeadlineExceeded, Code.Canceled]

const client = (host, headersSeen) => createClient(SessionService, createGrpcWebTransport({
  baseUrl: `http://${host}`,
  useBinaryFormat: true,
  fetch: async (url, init) => {
    const res = await fetch(url, init)
    headersSeen?.(res.headers)
    return res
  }
}))

const wasCut = ({ again, streams }) => again > 0 && streams > cuts

// Appends with a producer's sequence: the same request, sent again after a lost answer, is stored once.
async function publish (counts) {
  const service = client(CUT_GRPC)
  const written = []
  const began = performance.now()
  for (let i = 0; i < appends || (!wasCut(counts) && performance.now() - began < patience); i++) {
    const seq = BigInt(i + 1)
    const text = `${['ebb', 'flood', '潮', '🌊'][i % 4]} ${i}\n`
    written.push(text)
    const envelopes = [{ producer: { id: 'web', epoch: 1n, seq }, payload: { case: 'token', value: { messageId: 'm1', text } } }]
    for (;;) {
      try {
        const answer = await service.append({ session, envelopes }, { headers, timeoutMs: 3000 })
        assert.equal(answer.firstSeq, seq)
        assert.equal(answer.durability, Durability.FSYNC)
        break
      } catch (e) {
        assert(e instanceof ConnectError && lost.includes(e.code), e)
        counts.again++
        await sleep(20)
      }
    }
    await sleep(10)
  }
  await client(EDGE_GRPC).append({ session, envelopes: [{ payload: { case: 'messageCompleted', value: { messageId: 'm1' } } }] }, { headers })
  return written
}

// Follows to the end of the message, over as many streams as it takes.
async function follow (host, counts) {
  const got = []
  let epoch = ''
  let allowed
  const service = client(host, h => { allowed = h.get('access-control-allow-origin') })
  for (;; await sleep(20)) {
    // Leaving the loop alone would leave the stream open.
    const over = new AbortController()
    // Fetch does not always notice that a connection is gone: who hears nothing for long comes again.
    const silence = setTimeout(() => over.abort(), 3000)
    try {
      const start = { case: 'afterSeq', value: BigInt(got.length) }
      for await (const { frame } of service.follow({ session, start, epoch }, { headers, signal: over.signal })) {
        silence.refresh()
        switch (frame.case) {
          case 'attached':
            assert.equal(frame.value.afterSeq, BigInt(got.length))
            assert.equal(allowed, origin, 'a browser would not show the answer to the page')
            epoch = frame.value.epoch || epoch
            counts.streams++
            break
          case 'events':
            epoch = frame.value.epoch || epoch
            for (const e of frame.value.envelopes) {
              assert.equal(e.seq, BigInt(got.length + 1))
              got.push(e)
              if (e.payload.case === 'messageCompleted') return got
            }
            break
          default:
            assert(['caughtUp', 'goingAway'].includes(frame.case), frame.case)
        }
      }
    } catch (e) {
      assert(e instanceof ConnectError && lost.includes(e.code), e)
      assert(host !== EDGE_GRPC || e.code === Code.Canceled, `the wire that nobody cuts was cut: ${e}`)
    } finally {
      clearTimeout(silence)
      over.abort()
    }
  }
}

// What a browser asks before it lets a page call another host.
const preflight = await new Promise((resolve, reject) => {
  http.request(`http://${EDGE_GRPC}/tidemark.v1.SessionService/Follow`, {
    method: 'OPTIONS',
    headers: { origin, 'access-control-request-method': 'POST', 'access-control-request-headers': 'authorization,content-type,x-grpc-web,x-user-agent' }
  }, resolve).on('error', reject).end()
})
preflight.resume()
assert.equal(preflight.headers['access-control-allow-origin'], origin)
for (const name of ['authorization', 'content-type', 'x-grpc-web', 'x-user-agent']) assert(preflight.headers['access-control-allow-headers']?.toLowerCase().includes(name), name)

const counts = { again: 0, streams: 0 }
const [written, calm, got] = await Promise.all([publish(counts), follow(EDGE_GRPC, { streams: 0 }), follow(CUT_GRPC, counts)])
assert.deepEqual(got, calm, 'who was cut got something else')
assert.deepEqual(got.slice(0, -1).map(e => e.payload.value.text), written)
assert(wasCut(counts), `hardly anything was cut: ${JSON.stringify(counts)}`)
await assert.rejects(client(EDGE_GRPC).getSession({ session }, { headers: { origin } }), e => e.code === Code.Unauthenticated)
console.log(`${got.length} envelopes, ${counts.again} appends sent again, read over ${counts.streams} streams, are those of an undisturbed client`)
