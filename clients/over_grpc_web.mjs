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

// Appends with a producer's sequence: the same request, sent again after a lost answer, is stored once.
async function publish () {
  const service = client(CUT_GRPC)
  const written = []
  let again = 0
  // As many as it takes to have one of them cut.
  for (let i = 0; i < appends || again === 0; i++) {
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
        again++
        await sleep(20)
      }
    }
    await sleep(10)
  }
  await client(EDGE_GRPC).append({ session, envelopes: [{ payload: { case: 'messageCompleted', value: { messageId: 'm1' } } }] }, { headers })
  return [written, again]
}

// Follows to the end of the message, over as many streams as it takes.
async function follow (host) {
  const got = []
  let epoch = ''
  let streams = 0
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
            streams++
            break
          case 'events':
            epoch = frame.value.epoch || epoch
            for (const e of frame.value.envelopes) {
              assert.equal(e.seq, BigInt(got.length + 1))
              got.push(e)
              if (e.payload.case === 'messageCompleted') return [got, streams]
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

const [[written, again], [calm], [got, streams]] = await Promise.all([publish(), follow(EDGE_GRPC), follow(CUT_GRPC)])
assert.deepEqual(got, calm, 'who was cut got something else')
assert.deepEqual(got.slice(0, -1).map(e => e.payload.value.text), written)
assert(streams > 2, `hardly anything was cut: ${streams} streams`)
await assert.rejects(client(EDGE_GRPC).getSession({ session }, { headers: { origin } }), e => e.code === Code.Unauthenticated)
console.log(`${got.length} envelopes, ${again} appends sent again, read over ${streams} streams, are those of an undisturbed client`)
