// The page of `tidemark dev` in headless Chromium: a person reads what an agent streams, answers by keyboard, cuts the connection and loses it, and gets every envelope once. It asks no other host for anything.
import assert from 'node:assert/strict'
import { mkdirSync, mkdtempSync } from 'node:fs'
import { rm } from 'node:fs/promises'
import net from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { chromium } from 'playwright-core'
import WebSocket from 'ws'

const { TOKEN, USER_TOKEN, EDGE_HTTP, EDGE_GRPC, CHROMIUM, SHOTS } = process.env
const unique = process.hrtime.bigint()
const phone = { width: 360, height: 740 }
const desk = { width: 1280, height: 800 }
// For each wait, in milliseconds: the machine does much else.
const patience = 90000

const profile = mkdtempSync(join(tmpdir(), 'tidemark-page-'))
const browser = await chromium.launchPersistentContext(profile, {
  executablePath: CHROMIUM,
  args: ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync'],
  viewport: desk,
  reducedMotion: 'reduce'
})
const wrong = []

// An agent on the session socket.
async function agent (session) {
  const ws = new WebSocket(`ws://${EDGE_HTTP}/ws?${new URLSearchParams({ sessionName: session })}`, { headers: { authorization: `Bearer ${TOKEN}` } })
  const got = []
  const waiting = []
  ws.on('message', text => {
    const said = JSON.parse(text)
    got.push(said)
    for (const w of [...waiting]) w()
  })
  await new Promise((resolve, reject) => ws.on('open', resolve).on('error', reject))
  return {
    got,
    say: (type, data) => ws.send(JSON.stringify({ type, data })),
    // Waits for what was or will be said.
    hear: (matches, what) => new Promise((resolve, reject) => {
      const late = setTimeout(() => reject(new Error(`the agent did not hear ${what}: ${JSON.stringify(got.slice(-5))}`)), patience)
      const look = () => {
        const found = got.find(matches)
        if (!found) return
        clearTimeout(late)
        waiting.splice(waiting.indexOf(look), 1)
        resolve(found)
      }
      waiting.push(look)
      look()
    }),
    close: () => ws.close()
  }
}

// A tab that may ask its own host alone, and has nothing to complain about.
async function tab ({ token, session, size = desk, scheme = 'light', host = EDGE_HTTP, calm = true, between }) {
  const page = await browser.newPage()
  if (between) await page.routeWebSocket('**/ws?*', between)
  page.setDefaultTimeout(patience)
  await page.setViewportSize(size)
  await page.emulateMedia({ colorScheme: scheme, reducedMotion: 'reduce' })
  page.sockets = 0
  page.on('request', r => { if (new URL(r.url()).host !== host) wrong.push(`a request to ${r.url()}`) })
  page.on('websocket', ws => {
    page.sockets++
    if (new URL(ws.url()).host !== host || ws.url().includes('token')) wrong.push(`a socket to ${ws.url()}`)
  })
  // What is said of the connection, each once, also where it is said for a moment only.
  await page.addInitScript(() => {
    window.saidOfConnection = []
    let last = ''
    new MutationObserver(() => {
      const said = document.getElementById('connection')?.textContent ?? ''
      if (said.split(' ')[0] !== last.split(' ')[0]) window.saidOfConnection.push(said)
      last = said
    }).observe(document, { subtree: true, childList: true, characterData: true })
  })
  page.on('pageerror', e => wrong.push(`an error in the page: ${e.stack}`))
  // Of an upgrade that is refused Chromium says so by itself, and of a network that is gone.
  const expected = m => host !== EDGE_HTTP && /net::ERR_(CONNECTION|EMPTY|SOCKET)_/.test(m.text())
  if (calm) page.on('console', m => { if (['error', 'warning'].includes(m.type()) && !expected(m)) wrong.push(`the console says: ${m.text()}`) })
  await page.goto(`http://${host}/#${new URLSearchParams({ token, session })}`)
  return page
}

const textOf = (page, selector) => page.locator(selector).innerText()
const until = (page, selector, text) => page.waitForFunction(([s, t]) => document.querySelector(s).textContent.includes(t), [selector, text])
const connected = page => until(page, '#connection', 'Connected')
// Waits until this has been said of the connection, and forgets all that was said until then.
const saidOfConnection = (page, text) => page.waitForFunction(t => {
  const at = window.saidOfConnection.findIndex(said => said.includes(t))
  return at >= 0 && window.saidOfConnection.splice(0, at + 1)
}, text)

// Everybody can use it: every control has a name, what has the focus is seen to have it, and nothing sticks out to the side.
async function usable (page, when) {
  const problems = await page.evaluate(() => {
    const seen = n => n.checkVisibility({ visibilityProperty: true })
    const name = n => n.getAttribute('aria-label') || n.labels?.[0]?.textContent || document.getElementById(n.getAttribute('aria-labelledby')?.split(' ')[0])?.textContent || (n.matches('button, summary') && n.textContent)
    const found = []
    for (const n of document.querySelectorAll('button, input, textarea, select, progress, summary, [tabindex], dialog')) if (seen(n) && !name(n)?.trim()) found.push(`no name: ${n.outerHTML.slice(0, 80)}`)
    for (const n of document.querySelectorAll('img')) if (!n.hasAttribute('alt')) found.push('an image without alt')
    for (const n of document.querySelectorAll('button, input:not([type=checkbox]), textarea')) {
      const { width, height } = n.getBoundingClientRect()
      if (seen(n) && (width < 24 || height < 24)) found.push(`too small to touch: ${n.id || n.textContent}`)
    }
    const ids = [...document.querySelectorAll('[id]')].map(n => n.id)
    if (new Set(ids).size < ids.length) found.push('an id stands twice')
    if (!document.documentElement.lang || !document.title) found.push('no language or title')
    if ([...document.querySelectorAll('main')].filter(seen).length !== 1 || document.querySelectorAll('h1').length !== 1) found.push('not one main and one h1')
    const root = document.documentElement
    if (root.scrollWidth > root.clientWidth || document.body.scrollWidth > root.clientWidth) found.push(`${root.scrollWidth} px wide on ${root.clientWidth}`)
    // Text against the nearest ground behind it, as WCAG counts.
    const light = c => {
      const [r, g, b] = c.match(/[\d.]+/g).map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
      return 0.2126 * r + 0.7152 * g + 0.0722 * b
    }
    for (const n of document.querySelectorAll('body *')) {
      if (!seen(n) || n.closest('button:disabled, .unseen') || ![...n.childNodes].some(c => c.nodeType === 3 && c.data.trim())) continue
      let ground = n
      while (ground && /, 0\)$|transparent/.test(getComputedStyle(ground).backgroundColor)) ground = ground.parentElement
      const [a, b] = [light(getComputedStyle(n).color), light(getComputedStyle(ground ?? document.body).backgroundColor)].sort((x, y) => y - x)
      if ((a + 0.05) / (b + 0.05) < 4.5) found.push(`hard to read (${((a + 0.05) / (b + 0.05)).toFixed(1)}): ${n.textContent.slice(0, 40)}`)
    }
    return found
  })
  assert.deepEqual(problems, [], when)
}

// Looks at one state in every size and scheme.
async function look (page, name) {
  for (const [size, where] of [[desk, 'desk'], [phone, 'phone']]) {
    for (const scheme of ['light', 'dark']) {
      await page.setViewportSize(size)
      await page.emulateMedia({ colorScheme: scheme, reducedMotion: 'reduce' })
      await usable(page, `${name}, ${where}, ${scheme}`)
      if (SHOTS) {
        mkdirSync(SHOTS, { recursive: true })
        await page.screenshot({ path: join(SHOTS, `${name}-${where}-${scheme}.png`) })
      }
    }
  }
  await page.setViewportSize(desk)
}

// Goes from control to control with Tab until one has this name.
async function tabTo (page, name) {
  for (let i = 0; i < 40; i++) {
    await page.keyboard.press('Tab')
    const [text, ring] = await page.evaluate(() => {
      const n = document.activeElement
      return [n.textContent || n.labels?.[0]?.textContent || n.id, getComputedStyle(n).outlineStyle]
    })
    assert.notEqual(ring, 'none', `nothing shows that ${text} has the focus`)
    if (text.trim() === name) return
  }
  throw new Error(`${name} cannot be reached by keyboard`)
}

const tides = ['ebb ', 'flood ', 'Wattenmeer ', '潮 ', '🌊 ', '<b>not bold</b> ', '"\\\n']
const pieces = n => Array.from({ length: n }, (_, i) => tides[i % tides.length] + i + ' ')

async function stream (a, id, texts, pause) {
  for (const text of texts) {
    a.say('token', { message_id: id, text })
    await sleep(pause)
  }
}

// What stands in the message of the agent that comes last.
const lastMessage = page => page.locator('.message.agent > .text').last().evaluate(n => n.textContent)

async function aWorkflow () {
  const session = `page ${unique}`
  const wire = await openWire()
  const page = await tab({ token: USER_TOKEN, session, host: wire.address })
  await connected(page)
  assert(!page.url().includes('token') && page.url().includes('session='), `the token stays in the address bar: ${page.url()}`)
  assert.equal(await page.evaluate(() => sessionStorage.getItem('tidemark.token')), USER_TOKEN)
  assert.equal(await page.locator('#agent').isVisible(), false, 'a user is shown what only agents may do')
  await look(page, '1-empty')

  const a = await agent(session)
  // A person speaks.
  await page.locator('#message').fill('When is high water?')
  await page.locator('#message').press('Enter')
  await a.hear(e => e.type === 'user_message' && e.data.message === 'When is high water?', 'the question')

  // The agent thinks, calls a tool, and answers.
  a.say('workflow_progress', { step: 'Tables', message: 'reading the tide tables', progress: 0.4 })
  for (const text of ['The user asks ', 'about Büsum, ', 'I think.']) a.say('token', { message_id: 'm1', channel: 'reasoning', text })
  a.say('tool_call', { call_id: 'c1', name: 'tide_table', arguments: { place: 'Büsum', day: '2026-11-22' }, done: true })
  a.say('tool_result', { call_id: 'c1', result: { high: ['04:12', '16:38'], low: ['10:20', '22:51'] } })
  const words = pieces(40)
  for (const text of words) a.say('token', { message_id: 'm1', text })
  await page.waitForFunction(t => document.querySelector('.message.agent > .text')?.textContent === t, words.join(''))
  assert.equal(await page.locator('.thinking p').evaluate(n => n.textContent), 'The user asks about Büsum, I think.')
  assert.match(await textOf(page, '.tool .output'), /16:38/)
  assert.equal(await page.locator('progress').getAttribute('value').then(Number), 0.4)
  assert.equal(await page.locator('b').count(), 0, 'text became markup')
  await look(page, '2-streaming')
  a.say('message_completed', { message_id: 'm1', finish_reason: 'stop' })

  // It asks, and is answered with the keyboard alone.
  a.say('workflow_waiting_for_input', { prompt: 'Shall I book the boat for 16:00?', options: ['yes', 'no', 'ask me later'], context: { price: '48 €', seats: 4 } })
  await until(page, '#ask-prompt', 'Shall I book')
  await until(page, '#announcer', 'Shall I book')
  assert.equal(await textOf(page, '#status'), 'waiting for input')
  await look(page, '3-prompt')
  await page.locator('#said').focus()
  await tabTo(page, 'no')
  await page.keyboard.press('Enter')
  await a.hear(e => e.type === 'user_input' && e.data.response === 'no', 'the choice')
  await page.locator('#ask').waitFor({ state: 'hidden' })
  a.say('workflow_waiting_for_input', { prompt: 'When, then?' })
  await until(page, '#ask-prompt', 'When, then?')
  await page.locator('#said').focus()
  await tabTo(page, 'Your answer')
  await page.keyboard.type('at low water')
  await page.keyboard.press('Enter')
  await a.hear(e => e.type === 'user_input' && e.data.response === 'at low water', 'the answer')

  // The connection is cut in the middle of a message, and does not come back before some of it was missed, nor need all of it be said by then.
  const more = pieces(150)
  const streaming = stream(a, 'm2', more.slice(0, 80), 15)
  await page.waitForFunction(() => [...document.querySelectorAll('.message.agent > .text')].at(-1).textContent.includes('30 '))
  wire.goAway()
  await page.locator('#cut').click()
  await saidOfConnection(page, 'Cut')
  await streaming
  a.say('token', { message_id: 'm2', text: more[80] })
  await a.hear(e => e.seq && e.data.text === more[80] && e.data.message_id === 'm2', 'what the page misses')
  const theRest = stream(a, 'm2', more.slice(81), 15)
  wire.comeBack()
  await look(page, '4-cut')
  await saidOfConnection(page, 'Connected')
  await theRest
  a.say('message_completed', { message_id: 'm2', finish_reason: 'stop' })
  await page.waitForFunction(t => [...document.querySelectorAll('.message.agent > .text')].at(-1).textContent === t, more.join(''))
  assert.equal(await textOf(page, '#flaws'), '0, 0')
  assert.equal(await textOf(page, '#reconnects'), '1')
  assert.match(await textOf(page, '#resumed'), /[1-9]\d* came meanwhile, each once/)
  assert.match(await textOf(page, '#lag'), /^[\d.]+ m?s$/)

  // It ends, and the page stays away from then on.
  a.say('run_status', { status: 'completed', reason: 'the boat is booked' })
  await until(page, '#connection', 'Finished')
  assert.equal(await textOf(page, '#status'), 'completed')
  const sockets = page.sockets
  await look(page, '5-finished')
  assert.equal(await page.locator('#compose').isVisible(), false)
  const seq = Math.max(...a.got.map(e => e.seq ?? 0))
  assert.equal(await textOf(page, '#seq'), String(seq))

  // Who comes later reads the same, to its end.
  await page.reload()
  await until(page, '#connection', 'Finished')
  assert.equal(await lastMessage(page), more.join(''))
  assert.equal(await textOf(page, '#seq'), String(seq))
  assert.equal(page.sockets, sockets + 1, 'it came again to a session that has ended')
  a.close()
  await page.close()
  wire.close()
  return seq
}

// A chat outlives its runs: the page learns from the server what has ended.
async function aChat () {
  const session = `chat ${unique}`
  const append = async payload => {
    const answer = await fetch(`http://${EDGE_GRPC}/tidemark.v1.SessionService/Append`, {
      method: 'POST', headers: { authorization: `Bearer ${TOKEN}`, 'content-type': 'application/json' }, body: JSON.stringify({ session, envelopes: [payload] })
    })
    assert.equal(answer.status, 200, await answer.text())
  }
  await append({ startRun: { runId: 'r1' } })
  const page = await tab({ token: USER_TOKEN, session })
  await until(page, '#status', 'running')
  await append({ runStatus: { runId: 'r1', status: 'STATUS_COMPLETED' } })
  await until(page, '#status', 'open')
  await append({ startRun: { runId: 'r2' } })
  await until(page, '#status', 'running')
  await append({ error: { error: 'The tide gauge is under water.', recoverable: false } })
  await until(page, '#status', 'open')
  assert.equal(await textOf(page, '#reconnects'), '0', 'what it asks the server counts as a loss')
  await connected(page)
  await append({ runStatus: { status: 'STATUS_COMPLETED' } })
  await until(page, '#connection', 'Finished')
  assert.equal(await textOf(page, '#status'), 'completed')
  assert.equal(await textOf(page, '#flaws'), '0, 0')
  await page.close()
}

// An agent's page, on a phone at night.
async function asAgent () {
  const session = `agent's page ${unique}`
  const [page, user] = await Promise.all([tab({ token: TOKEN, session, size: phone, scheme: 'dark' }), tab({ token: USER_TOKEN, session })])
  await Promise.all([connected(page), connected(user)])
  assert.equal(await page.locator('#compose').isVisible(), false)
  await page.locator('#agent summary').click()
  await look(page, '6-agent')
  await page.setViewportSize(phone)
  await page.locator('#stream-think').check()
  await page.locator('#stream button[type=submit]').click()
  const said = await page.locator('#stream-text').inputValue()
  for (const p of [page, user]) await p.waitForFunction(t => document.querySelector('.message.agent > .text')?.textContent === t && !document.querySelector('.writing'), said)
  await page.locator('#question button[type=submit]').click()
  await user.locator('#ask-options button', { hasText: 'yes' }).click()
  await page.waitForFunction(() => document.querySelector('.message.user > .text')?.textContent === 'yes')
  await page.locator('#complete').click()
  await Promise.all([until(page, '#connection', 'Finished'), until(user, '#connection', 'Finished')])
  await Promise.all([page.close(), user.close()])
}

// A wire to the edge that can break, as networks do: without a goodbye. While it is away it makes no connection, and those that are there go on.
async function openWire () {
  const [host, port] = EDGE_HTTP.split(':')
  const ends = new Set()
  let away = false
  const server = net.createServer(near => {
    if (away) return near.resetAndDestroy()
    const far = net.connect(port, host)
    for (const [from, to] of [[near, far], [far, near]]) {
      ends.add(from)
      from.pipe(to)
      from.on('error', () => {}) // the end follows
      from.on('close', () => {
        ends.delete(from)
        to.destroy()
      })
    }
  })
  await new Promise(resolve => server.listen(0, '127.0.0.1', resolve))
  return {
    address: `127.0.0.1:${server.address().port}`,
    cut: () => ends.forEach(end => end.resetAndDestroy()),
    goAway: () => { away = true },
    comeBack: () => { away = false },
    close: () => {
      server.close()
      ends.forEach(end => end.destroy())
    }
  }
}

// The connection is lost, without anybody pressing a button.
async function overABadWire () {
  const session = `lost page ${unique}`
  const wire = await openWire()
  const a = await agent(session)
  const page = await tab({ token: USER_TOKEN, session, host: wire.address })
  await connected(page)
  const texts = pieces(60)
  for (const losses of [1, 2]) {
    // It stays away until the loss was shown, however seldom the page comes to draw.
    wire.goAway()
    wire.cut()
    for (const text of texts.slice(30 * losses - 30, 30 * losses)) a.say('token', { message_id: 'm1', text })
    await saidOfConnection(page, 'Lost')
    wire.comeBack()
    await saidOfConnection(page, 'Connected')
    await page.waitForFunction(t => document.querySelector('.message.agent > .text')?.textContent === t, texts.slice(0, 30 * losses).join(''))
    assert.equal(await textOf(page, '#reconnects'), String(losses))
  }
  assert.equal(await textOf(page, '#flaws'), '0, 0')
  a.close()
  await page.close()
  wire.close()
}

// What is refused for now is sent again after a moment: once, however much of it there is.
async function refusedForNow () {
  const sent = new Map() // how often, by id
  const page = await tab({
    token: TOKEN, session: `refused page ${unique}`,
    between: near => {
      const far = near.connectToServer()
      near.onMessage(text => {
        const { id } = JSON.parse(text)
        sent.set(id, (sent.get(id) ?? 0) + 1)
        if (sent.get(id) > 1) far.send(text)
        else near.send(JSON.stringify({ type: 'error', data: { error: 'Unavailable', details: 'NATS is away.', code: 'unavailable', retryable: true, id } }))
      })
    }
  })
  await connected(page)
  await page.locator('#agent summary').click()
  // All of it at once, as fast as it can be typed; the moment lasts until all of it was refused, also on a machine that does much else.
  const said = 'ebb and flood '.repeat(10).trim()
  await page.locator('#stream-text').fill(said)
  await page.evaluate(() => { const at = setTimeout; window.setTimeout = (f, wait) => at(f, { 60: 0, 1000: 5000 }[wait] ?? wait) })
  await page.locator('#stream button[type=submit]').click()
  await page.waitForFunction(t => document.querySelector('.message.agent > .text')?.textContent === t && !document.querySelector('.writing'), said)
  assert.ok(sent.size > 30 && Math.max(...sent.values()) === 2, `each is sent twice: ${[...sent.values()]}`)
  assert.equal(await textOf(page, '#flaws'), '0, 0')
  await page.close()
}

// Whom it does not let in, it asks for another token.
async function theDoor () {
  const forged = TOKEN.slice(0, -12) + 'AAAAAAAAAAAA'
  const page = await tab({ token: forged, session: `door ${unique}`, calm: false })
  await page.locator('#door-problem').waitFor()
  assert.match(await textOf(page, '#door-problem'), /token/i)
  assert.equal(await page.evaluate(() => document.activeElement.id), 'token')
  await look(page, '7-door')
  await page.locator('#token').fill(USER_TOKEN)
  await page.keyboard.press('Enter')
  await connected(page)
  await page.locator('#leave').click()
  await page.locator('#door').waitFor()
  await page.close()
}

// What the browser is told about the page.
async function headers () {
  for (const path of ['/', '/page/app.js', '/page/style.css']) {
    const answer = await fetch(`http://${EDGE_HTTP}${path}`)
    assert.equal(answer.status, 200, path)
    assert.match(answer.headers.get('content-security-policy'), /^default-src 'none'; script-src 'self';.*frame-ancestors 'none'/, path)
    assert.equal(answer.headers.get('x-content-type-options'), 'nosniff', path)
    assert.equal(answer.headers.get('referrer-policy'), 'no-referrer', path)
  }
}

try {
  await headers()
  const seq = await aWorkflow()
  await aChat()
  await asAgent()
  await theDoor()
  await overABadWire()
  await refusedForNow()
  assert.deepEqual(wrong, [])
  console.log(`${seq} envelopes read, a question answered by keyboard, a cut and two losses survived, each envelope once; no other host was asked`)
} finally {
  await browser.close()
  await rm(profile, { recursive: true, force: true })
}
