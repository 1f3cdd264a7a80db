// Timeline shows envelopes. What sessions carry is text to it, never markup: everything goes through textContent.

// The oldest items go when there are more.
const maxItems = 2000

// el makes an element.
function el (tag, props = {}, ...children) {
  const node = document.createElement(tag)
  for (const [name, value] of Object.entries(props)) {
    if (name === 'class') node.className = value
    else if (name in node) node[name] = value
    else node.setAttribute(name, value)
  }
  node.append(...children)
  return node
}

// words is any JSON as people read it.
export const words = value => typeof value === 'string' ? value : JSON.stringify(value, null, 2) ?? ''

const empty = value => value === undefined || value === null || (typeof value === 'object' && Object.keys(value).length === 0)

const runWords = { open: 'is open', running: 'is running', waiting_for_input: 'waits for an answer', completed: 'is completed', failed: 'has failed', cancelled: 'was cancelled' }

export class Timeline {
  #list
  #announce
  #items = [] // of { node, forget }
  #messages = new Map() // by message_id
  #calls = new Map() // by call_id
  #question = null // the item of the open question

  // announce is told what somebody who does not see the page should hear.
  constructor (list, announce) {
    this.#list = list
    this.#announce = announce
  }

  clear () {
    this.#list.replaceChildren()
    this.#items = []
    this.#messages.clear()
    this.#calls.clear()
    this.#question = null
  }

  get length () { return this.#items.length }

  // note adds a line that is no envelope.
  note (text) { this.#append(el('li', { class: 'note' }, text)) }

  add (e, live) {
    const d = e.data ?? {}
    const say = live ? this.#announce : () => {}
    switch (e.type) {
      case 'token': {
        const m = this.#message(e, d.message_id)
        if (d.channel === 'reasoning') {
          if (!m.thinking) {
            m.thinking = el('p', { class: 'text' }, document.createTextNode(''))
            m.thinkingBox = el('details', { class: 'thinking', open: live }, el('summary', {}, 'Thinking'), m.thinking)
            m.body.before(m.thinkingBox)
          }
          m.thinking.firstChild.appendData(d.text)
        } else {
          // Once it speaks, what it thought steps back.
          if (m.thinkingBox && !m.body.firstChild.data) m.thinkingBox.open = false
          m.body.firstChild.appendData(d.text)
        }
        this.#reach(m, e)
        break
      }
      case 'message_completed': {
        const m = this.#message(e, d.message_id)
        if (d.text && !m.body.firstChild.data) m.body.firstChild.data = d.text
        m.node.classList.remove('writing')
        if (d.finish_reason && d.finish_reason !== 'stop') m.node.append(el('p', { class: 'small' }, 'It ended with: ' + d.finish_reason))
        if (m.thinkingBox && m.body.firstChild.data) m.thinkingBox.open = false
        this.#reach(m, e)
        say('The agent: ' + m.body.firstChild.data.slice(0, 500))
        break
      }
      case 'agent_message':
        this.#bubble(e, 'agent', d.message, d.metadata)
        say('The agent: ' + d.message)
        break
      case 'user_message':
        this.#bubble(e, 'user', d.message, d.context)
        say(`${e.source?.subject ?? 'Somebody'}: ${d.message}`)
        break
      case 'tool_call': {
        const c = this.#call(e, d.call_id, d.name)
        if (d.arguments !== undefined) c.input.textContent = words(d.arguments)
        if (d.arguments_delta) c.input.append(d.arguments_delta)
        c.input.hidden = !c.input.textContent
        this.#reach(c, e)
        break
      }
      case 'tool_result': {
        const c = this.#call(e, d.call_id)
        c.node.classList.remove('writing')
        c.node.classList.toggle('failed', Boolean(d.error))
        c.state.textContent = d.error ? 'failed' : 'done'
        c.output.textContent = d.error || words(d.result)
        c.output.hidden = !c.output.textContent
        this.#reach(c, e)
        break
      }
      case 'workflow_waiting_for_input': {
        const asked = this.#card(e, 'question', 'Question', el('p', { class: 'text' }, d.prompt))
        if (d.options?.length) asked.append(el('p', { class: 'small' }, d.options.join(' · ')))
        this.#question?.classList.remove('writing')
        this.#question = asked
        asked.classList.add('writing')
        say('The agent asks: ' + d.prompt + (d.options?.length ? ' Answers: ' + d.options.join(', ') : ''))
        break
      }
      case 'user_input':
        this.#question?.classList.remove('writing')
        this.#question = null
        this.#bubble(e, 'user', words(d.response), d.metadata, 'answered')
        say(`${e.source?.subject ?? 'Somebody'} answered: ${words(d.response)}`)
        break
      case 'workflow_progress': // has a place of its own
        break
      case 'system':
        this.#note(e, d.message)
        say(d.message)
        break
      case 'session_created':
        this.#note(e, 'The session was created' + (d.kind ? ` as a ${d.kind}.` : '.'))
        break
      case 'start_run':
        this.#note(e, `Run ${d.run_id} begins.`)
        break
      case 'run_status': {
        const text = `${d.run_id ? 'Run ' + d.run_id : 'The run'} ${runWords[d.status] ?? d.status}` + (d.reason ? `: ${d.reason}` : '.')
        this.#note(e, text)
        say(text)
        break
      }
      case 'cancel':
        this.#note(e, (e.source?.subject ?? 'Somebody') + ' asks to stop ' + (d.run_id ? `run ${d.run_id}` : d.request_id ? `request ${d.request_id}` : 'everything') + (d.reason ? `: ${d.reason}` : '.'))
        break
      case 'error':
      case 'chat_error': {
        const card = this.#card(e, 'failed', d.recoverable === false ? 'Error, the run has failed' : 'Error', el('p', { class: 'text' }, d.error))
        if (d.details) card.append(el('p', { class: 'small text' }, d.details))
        say('Error: ' + d.error)
        break
      }
      case 'work_failed': {
        const text = `${d.group} gave up #${e.reply_to} after ${d.attempts ?? 0} attempts: ${d.reason}`
        this.#card(e, 'failed', 'Given up', el('p', { class: 'text' }, text))
        say(text)
        break
      }
      default:
        this.#card(e, 'other', d.type ?? e.type, el('pre', { tabIndex: 0 }, words(d)))
    }
  }

  #append (node, forget = () => {}) {
    this.#items.push({ node, forget })
    this.#list.append(node)
    if (this.#items.length > maxItems) {
      const old = this.#items.shift()
      old.node.remove()
      old.forget()
    }
    return node
  }

  // head says who, when and where.
  #head (e, who, more = '') {
    const seq = el('span', { class: 'seq' }, '#' + e.seq)
    const at = new Date(e.timestamp)
    const when = isNaN(at) ? '' : el('time', { dateTime: e.timestamp }, at.toLocaleTimeString([], { hour: '2-digit', minute: '2-digit', second: '2-digit' }))
    return [el('p', { class: 'head' }, el('strong', {}, who), more ? ' ' + more : '', ' ', when, ' ', seq), seq]
  }

  #bubble (e, kind, text, more, did) {
    const [head] = this.#head(e, e.source?.subject ?? kind, did)
    const node = el('li', { class: 'message ' + kind }, head, el('p', { class: 'text' }, text))
    if (!empty(more)) node.append(el('details', {}, el('summary', {}, 'More'), el('pre', { tabIndex: 0 }, words(more))))
    this.#append(node)
  }

  #card (e, kind, title, ...children) {
    const [head] = this.#head(e, title)
    return this.#append(el('li', { class: 'card ' + kind }, head, ...children))
  }

  #note (e, text) {
    this.#append(el('li', { class: 'note' }, text, ' ', el('span', { class: 'seq' }, '#' + e.seq)))
  }

  // message finds the item that a message's tokens gather in.
  #message (e, id) {
    let m = this.#messages.get(id)
    if (m) return m
    const [head, seq] = this.#head(e, e.source?.subject ?? 'agent')
    const body = el('p', { class: 'text' }, document.createTextNode(''))
    m = { node: el('li', { class: 'message agent writing' }, head, body), body, seq, first: e.seq }
    this.#messages.set(id, m)
    this.#append(m.node, () => this.#messages.delete(id))
    return m
  }

  // call finds the card of a tool call.
  #call (e, id, name) {
    let c = this.#calls.get(id)
    if (!c) {
      const title = el('code', {}, name || id)
      const [head, seq] = this.#head(e, title)
      const state = el('span', { class: 'chip' }, 'running')
      head.append(' ', state)
      const input = el('pre', { tabIndex: 0, hidden: true })
      input.setAttribute('aria-label', 'Arguments')
      const output = el('pre', { tabIndex: 0, hidden: true, class: 'output' })
      output.setAttribute('aria-label', 'Result')
      c = { node: el('li', { class: 'card tool writing' }, head, input, output), title, state, input, output, seq, first: e.seq }
      this.#calls.set(id, c)
      this.#append(c.node, () => this.#calls.delete(id))
    }
    if (name) c.title.textContent = name
    return c
  }

  // reach says up to which seq an item holds envelopes.
  #reach (item, e) {
    if (e.seq > item.first) item.seq.textContent = `#${item.first}–${e.seq}`
  }
}
