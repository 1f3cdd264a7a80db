// The page: finds out which session and as whom, keeps a Link to it, and shows what comes.
import { Link } from './link.js'
import { Timeline, words } from './timeline.js'

const $ = id => document.getElementById(id)

const keep = sessionStorage
const over = ['completed', 'failed', 'cancelled']
const statusWords = { open: 'open', running: 'running', waiting_for_input: 'waiting for input', completed: 'completed', failed: 'failed', cancelled: 'cancelled' }
const speaks = { user: ['user', 'admin'], agent: ['agent', 'worker', 'admin'] } // roles that may; the server decides

const timeline = new Timeline($('timeline'), text => { announcing = text; later() })

let link = null
let claims = {} // of the token, for display
let status = ''
let stood = '' // the status when it was attached, as the server says
let kind = '' // of the session, where it was said
let run = '' // the one under way
let question = null // the open one: { seq, prompt, options }
let connection = { name: 'none' }
let missed = null // what the last resume brought
let lags = []
let announcing = ''
let following = true // the newest is in sight

// ---- Where to, and as whom

// The token comes behind the #, which browsers send to nobody, and leaves the address bar at once.
function readAddress () {
  const given = new URLSearchParams(location.hash.slice(1))
  if (given.has('token')) {
    keep.setItem('tidemark.token', given.get('token').trim())
    given.delete('token')
    history.replaceState(null, '', location.pathname + (given.size ? '#' + given : ''))
  }
  return given.get('session') ?? ''
}

const token = () => keep.getItem('tidemark.token') ?? ''

// claimsOf reads what a token says of its bearer. Only the server can tell whether it is true.
function claimsOf (token) {
  try {
    const json = atob(token.split('.')[1].replaceAll('-', '+').replaceAll('_', '/'))
    return JSON.parse(new TextDecoder().decode(Uint8Array.from(json, c => c.charCodeAt(0)))) ?? {}
  } catch {
    return {}
  }
}

const may = what => speaks[what].includes(claims.role)

function recent () {
  try {
    return JSON.parse(keep.getItem('tidemark.recent')) ?? []
  } catch {
    return []
  }
}

// showDoor asks for what is missing.
function showDoor (problem = '') {
  link?.close()
  link = null
  setConnection('none')
  claims = claimsOf(token())
  $('room').hidden = true
  $('door').hidden = false
  $('leave').hidden = true
  $('status').hidden = true
  $('title').textContent = 'Tidemark'
  document.title = 'Tidemark'
  show('door-problem', problem)
  if (!$('session').value) $('session').value = readAddress() || 'hello'
  $('recent').replaceChildren(...recent().map(name => new Option(name, name)))
  $('token').value = token()
  $('token-help').textContent = claims.sub ? `This one is ${claims.sub}'s, with the role ${claims.role}. It stays in this tab.` : 'tidemark dev prints two, and tidemark token makes more. It stays in this tab.'
  const first = !$('token').value || problem ? $('token') : $('session')
  first.focus()
}

function enter (session) {
  keep.setItem('tidemark.recent', JSON.stringify([session, ...recent().filter(name => name !== session)].slice(0, 20)))
  const address = '#' + new URLSearchParams({ session })
  if (location.hash !== address) history.pushState(null, '', location.pathname + address)
  claims = claimsOf(token())
  $('door').hidden = true
  $('room').hidden = false
  $('leave').hidden = false
  $('title').textContent = session
  document.title = session + ' · Tidemark'
  $('who').textContent = claims.sub ? `You are ${claims.sub}, with the role ${claims.role}.` : ''
  $('nothing-hint').textContent = may('agent') ? 'Speak as the agent below, or let one speak from a terminal:' : 'Say something, or let an agent speak from a terminal:'
  $('nothing-command').textContent = `echo 'Hello from the shell' | tidemark publish ${/^[\w./:@+-]+$/.test(session) ? session : "'" + session.replaceAll("'", "'\\''") + "'"}`
  $('agent').hidden = !may('agent')
  startOver()
  show('notice', '')
  link?.close()
  link = new Link(session, token(), hear)
  link.open()
}

// startOver forgets what was shown.
function startOver () {
  timeline.clear()
  status = stood = kind = run = ''
  question = null
  missed = null
  lags = []
  following = true
  $('lag').textContent = '–'
  $('progress').hidden = true
  later()
}

// ---- What the link says

const hear = {
  state (name, detail = {}) {
    const before = connection.name
    setConnection(name, detail)
    if (name === 'cut') announcing = 'The connection is cut.'
    if (name === 'lost' && before === 'open') announcing = 'The connection is lost.'
    if (name === 'finished') announcing = 'The session has ended.'
    if (name === 'token') showDoor(detail.why)
    later()
  },

  attached (data, behind) {
    if (behind !== null) {
      missed = behind
      announcing = `Connected again. ${behind} envelopes came meanwhile.`
    }
    stood = data.status
    if (link.head <= link.seq) arrived()
    later()
  },

  envelope (e, live) {
    if (live) {
      const lag = Math.max(0, Date.now() - Date.parse(e.timestamp))
      if (!isNaN(lag)) lags = [...lags.slice(-49), lag]
    }
    fold(e)
    timeline.add(e, live)
    if (e.seq === link.head) arrived()
    later()
  },

  truncated (data) { timeline.note(`What was before #${data.first_seq} is no longer kept.`) },

  restarted (why) {
    startOver()
    timeline.note(why)
  }
}

// fold follows where the session stands, as far as envelopes say.
function fold (e) {
  const d = e.data ?? {}
  switch (e.type) {
    case 'session_created':
      kind = d.kind || 'chat'
      break
    case 'start_run':
      run = d.run_id
      status = 'running'
      break
    case 'workflow_waiting_for_input':
      question = { seq: e.seq, ...d }
      status = 'waiting_for_input'
      break
    case 'user_input':
      question = null
      status = 'running'
      break
    case 'workflow_progress': {
      $('progress').hidden = false
      $('progress-step').textContent = d.step
      $('progress-message').textContent = d.message
      const bar = $('progress-bar')
      if (d.progress === undefined) bar.removeAttribute('value')
      else bar.value = d.progress
      break
    }
    case 'error':
      if (d.recoverable === false) end('failed', e)
      break
    case 'run_status':
      if (d.run_id && run && d.run_id !== run) break
      if (over.includes(d.status)) end(d.status, e)
      else if (d.status === 'waiting_for_input') {
        status = d.status
        question ??= { seq: e.seq, prompt: d.reason || 'The agent waits for an answer.' }
      } else status = d.status
      break
  }
}

// end is the end of a run: of the session too, unless that is a chat.
function end (how, e) {
  const chat = kind === 'chat' && (run || e.data.run_id)
  run = ''
  question = null
  $('progress').hidden = true
  status = chat ? 'open' : how
  // Whether the session has ended with it is the server's to say.
  if (!chat && e.seq > link.head) link.ask()
}

// arrived: everything has come that was there when it was attached. If that was the end, there is nothing to stay connected for.
function arrived () {
  if (stood) status = stood
  if (status !== 'waiting_for_input') question = null
  if (!over.includes(status)) return
  link.close()
  hear.state('finished')
}

// ---- What is seen

function show (id, text) {
  $(id).textContent = text
  $(id).hidden = !text
}

function setConnection (name, detail = {}) {
  connection = { name, ...detail }
  $('waterline').dataset.state = name
}

let planned = false

// later shows, once for all that comes before the next frame.
function later () {
  if (planned) return
  planned = true
  requestAnimationFrame(() => {
    planned = false
    render()
  })
}

function render () {
  if (!link || $('room').hidden) return
  const { name, until, why } = connection
  const seconds = Math.max(0, Math.ceil((until - Date.now()) / 1000))
  $('connection').textContent = {
    connecting: 'Connecting …',
    open: 'Connected',
    cut: `Cut. Back in ${seconds} s`,
    lost: `Lost. Trying again in ${seconds} s`,
    finished: 'Finished: nothing more will come',
    stopped: 'Stopped'
  }[name] ?? ''
  $('connection').title = why ?? ''
  $('connection').dataset.state = name
  show('status', statusWords[status] ?? (link.attachments ? 'open' : ''))
  $('status').dataset.status = status
  $('seq').textContent = link.seq
  $('seq').title = link.epoch ? 'of the history ' + link.epoch : ''
  if (lags.length) {
    const middle = lags.toSorted((a, b) => a - b)[lags.length >> 1]
    $('lag').textContent = middle < 1000 ? `${middle} ms` : `${(middle / 1000).toFixed(1)} s`
    $('lag').title = `from the envelope's time to its arrival here; the middle one of ${lags.length}`
  }
  $('reconnects').textContent = link.reconnects
  $('flaws').textContent = `${link.lost}, ${link.repeated}`
  show('resumed', missed === null ? '' : missed ? `Resumed: ${missed} came meanwhile, each once.` : 'Resumed: nothing had come meanwhile.')
  const waits = name === 'cut' || name === 'lost'
  swap($('cut'), $('now'), waits)
  if (name === 'finished' || name === 'stopped') $('cut').hidden = true
  if (name === 'stopped') show('notice', why)
  $('nothing').hidden = timeline.length > 0
  const ended = ['finished', 'stopped'].includes(name)
  $('compose').hidden = !may('user') || ended
  $('stop').hidden = status !== 'running' && status !== 'waiting_for_input'
  for (const b of $('agent').querySelectorAll('button')) b.disabled = ended
  renderQuestion(ended)
  if (announcing) {
    $('announcer').textContent = announcing
    announcing = ''
  }
  if (following && timeline.length) $('said').scrollTop = $('said').scrollHeight
  $('newest').hidden = following
}

// swap shows one of two buttons in the same place, and leaves the focus there.
function swap (first, second, other) {
  const [shown, gone] = other ? [second, first] : [first, second]
  const focused = document.activeElement === gone
  shown.hidden = false
  gone.hidden = true
  if (focused) shown.focus()
}

function renderQuestion (ended) {
  const card = $('ask')
  if (!question || ended) {
    if (card.contains(document.activeElement)) $('said').focus({ preventScroll: true })
    card.hidden = true
    card.dataset.seq = ''
    return
  }
  if (card.dataset.seq === String(question.seq)) return
  card.dataset.seq = question.seq
  card.hidden = false
  $('ask-prompt').textContent = question.prompt
  $('ask-context').hidden = !question.context
  $('ask-context').lastElementChild.textContent = words(question.context)
  const options = question.options ?? []
  $('ask-options').replaceChildren(...options.map(option => {
    const b = document.createElement('button')
    b.type = 'button'
    b.textContent = option
    b.onclick = () => respond(option)
    return b
  }))
  $('ask-form').hidden = options.length > 0 || !may('user')
  $('ask-text').value = ''
  show('ask-problem', may('user') ? '' : 'A user has to answer; this token is no user\'s.')
  for (const b of $('ask-options').children) b.disabled = !may('user')
}

// ---- What is said from here

// send publishes, and shows what the server refuses.
function send (type, data, refused = r => show('notice', `Not stored: ${r.details}`)) {
  show('notice', '')
  if (!link.send(type, data, refusal => refusal && refused(refusal))) show('notice', 'Too much waits to be sent; let the connection come back first.')
}

function respond (response) {
  show('ask-problem', '')
  following = true
  send('user_input', { response }, r => show(question ? 'ask-problem' : 'notice', r.details))
}

$('enter').onsubmit = event => {
  event.preventDefault()
  const session = $('session').value
  if (!session) return show('door-problem', 'A session needs a name.')
  if (!$('token').value.trim()) return show('door-problem', 'Without a token nobody comes in.')
  keep.setItem('tidemark.token', $('token').value.trim())
  enter(session)
  $('said').focus({ preventScroll: true })
}

$('fresh').onclick = () => {
  $('session').value = 'look-' + [...crypto.getRandomValues(new Uint8Array(3))].map(b => b.toString(16).padStart(2, '0')).join('')
}

$('leave').onclick = () => {
  history.pushState(null, '', location.pathname)
  showDoor()
}

$('cut').onclick = () => link.cut()
$('now').onclick = () => link.now()

$('compose').onsubmit = event => {
  event.preventDefault()
  const message = $('message').value.trim()
  if (!message) return
  send('user_message', { message })
  $('message').value = ''
  following = true
  later()
}

// Enter sends, Shift+Enter begins a line; while an input method composes, Enter is its own.
$('message').onkeydown = event => {
  if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) {
    event.preventDefault()
    $('compose').requestSubmit()
  }
}

$('stop').onclick = () => send('cancel', { session: true })

$('ask-form').onsubmit = event => {
  event.preventDefault()
  if ($('ask-text').value) respond($('ask-text').value)
}

$('stream').onsubmit = event => {
  event.preventDefault()
  const pieces = $('stream-text').value.match(/\s*\S+/g) ?? []
  const id = 'm-' + Date.now().toString(36)
  const told = link
  const tokens = pieces.map(text => ({ message_id: id, text }))
  if ($('stream-think').checked) tokens.unshift(...'Let me think about how to put this.'.match(/\s*\S+/g).map(text => ({ message_id: id, channel: 'reasoning', text })))
  following = true
  const next = () => {
    if (told !== link) return
    if (tokens.length === 0) return send('message_completed', { message_id: id, finish_reason: 'stop' })
    send('token', tokens.shift())
    setTimeout(next, 60)
  }
  next()
}

$('question').onsubmit = event => {
  event.preventDefault()
  const options = $('question-options').value.split(',').map(o => o.trim()).filter(Boolean)
  if ($('question-text').value) send('workflow_waiting_for_input', { prompt: $('question-text').value, ...(options.length && { options }) })
}

$('complete').onclick = () => send('run_status', { status: 'completed' })

// Whoever scrolls up from the newest stays there. A room that changes its size is not somebody who scrolls.
let scrolled = { top: 0, width: 0, height: 0 }
new ResizeObserver(later).observe($('said'))

$('said').onscroll = () => {
  const room = $('said')
  const now = { top: room.scrollTop, width: room.clientWidth, height: room.clientHeight }
  const before = scrolled
  scrolled = now
  if (now.width !== before.width || now.height !== before.height) return
  const was = following
  if (room.scrollHeight - now.top - now.height < 48) following = true
  else if (now.top < before.top) following = false
  if (was !== following) later()
}

$('newest').onclick = () => {
  following = true
  $('said').focus({ preventScroll: true })
  later()
}

addEventListener('online', () => link?.now())

addEventListener('hashchange', start)
addEventListener('popstate', start)

// The countdown of a wait.
setInterval(() => { if (connection.name === 'cut' || connection.name === 'lost') later() }, 250)

function start () {
  const session = readAddress()
  if (session && token()) {
    if (link?.session === session && link.token === token()) return
    $('session').value = session
    enter(session)
  } else {
    $('session').value = session || $('session').value
    showDoor()
  }
}

start()
