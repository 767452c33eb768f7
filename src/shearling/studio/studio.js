'use strict';

const form = document.getElementById('form');
const fields = form.elements;
const [askButton, stopButton, status, error] =
  ['ask', 'stop', 'status', 'error'].map((id) => document.getElementById(id));
const NUMBERS = ['max_new_tokens', 'temperature', 'top_p', 'seed'];
const CHECKS = ['chat', 'together'];
const ENDS = { end: 'Ended after', length: 'Cut off at', stopped: 'Stopped after' };
const LONGEST_LINK = 4000; // characters of a prompt that still goes into the address

let models = []; // what the server says of each
let cards = []; // {article, answer, ended, figures} in the same order
let speeds = []; // tokens/s of this run, where known
let running = null; // {number, asked} while models answer

const megabytes = (bytes) =>
  bytes < 999.5e6 ? `${(bytes / 1e6).toFixed(0)} MB` : `${(bytes / 1e9).toFixed(2)} GB`;
const seconds = (s) => (s < 0.9995 ? `${(s * 1000).toFixed(0)} ms` : `${s.toFixed(2)} s`);
const millions = (n) => (n < 999.95e6
  ? `${(n / 1e6).toFixed(n < 0.95e6 ? 3 : 1)} M` : `${(n / 1e9).toFixed(2)} B`);
const many = (n, noun) => `${n.toLocaleString('en')} ${noun}${n === 1 ? '' : 's'}`;

/** A share as a signed percentage, with a true minus. */
function percent(share) {
  const value = (100 * share).toFixed(1);
  return `${share < 0 ? '−' : '+'}${value.replace('-', '')} %`;
}

function figure(card, name, text, note = '', worse = false) {
  const small = document.createElement('small');
  small.textContent = note;
  small.classList.toggle('worse', worse);
  card.figures[name].replaceChildren(text, small);
}

function build(model, index) {
  const article = document.getElementById('model').content.cloneNode(true).firstElementChild;
  const heading = article.querySelector('h2');
  heading.id = `model-${index}`;
  heading.textContent = model.name;
  article.setAttribute('aria-labelledby', heading.id);
  const size = article.querySelector('.size');
  size.append(`${millions(model.parameters)} parameters`);
  if (index > 0 && model.parameters !== models[0].parameters) {
    const change = document.createElement('b');
    change.textContent = percent(model.parameters / models[0].parameters - 1);
    size.append(', ', change);
  }
  if (!model.chat) size.append(', no chat template');
  const answer = article.querySelector('.answer');
  answer.setAttribute('aria-label', `Answer of ${model.name}`);
  const figures = {};
  for (const place of article.querySelectorAll('[data-figure]')) {
    figures[place.dataset.figure] = place;
  }
  const card = { article, answer, ended: article.querySelector('.ended'), figures };
  const saved = model.weight_bytes / models[0].weight_bytes - 1;
  figure(card, 'speed', '–');
  figure(card, 'first', '–');
  figure(card, 'weights', megabytes(model.weight_bytes), index && saved ? percent(saved) : '');
  figure(card, 'process', megabytes(model.resident_bytes));
  document.getElementById('models').append(article);
  return card;
}

/** A model's tokens/s, and every ratio that hangs on it. */
function showSpeed(index, rate) {
  speeds[index] = rate;
  speeds.forEach((speed, i) => {
    const ratio = i > 0 && speeds[0] ? speed / speeds[0] : null;
    const note = ratio === null ? '' : `× ${ratio.toFixed(2)}`;
    figure(cards[i], 'speed', speed.toFixed(1), note, ratio !== null && ratio < 0.995);
  });
}

/** What the models do, for each event of a run. */
const on = {
  run(event) { running.number = event.run; },
  start(event) {
    const card = cards[event.model];
    card.article.setAttribute('aria-busy', 'true');
    card.ended.textContent = 'Reads the prompt …';
    card.answer.replaceChildren();
    if (!event.chat) { // a continuation is read together with what it continues
      const asked = document.createElement('span');
      asked.className = 'asked';
      asked.textContent = running.asked.prompt;
      card.answer.append(asked);
    }
    card.text = card.answer.appendChild(document.createTextNode(''));
    say();
  },
  text(event) {
    const card = cards[event.model];
    card.text.appendData(event.text);
    if (card.first === undefined) {
      card.first = event.seconds;
      card.tokens = event.tokens;
      figure(card, 'first', seconds(event.seconds));
    } else if (event.seconds > card.first) {
      showSpeed(event.model, (event.tokens - card.tokens) / (event.seconds - card.first));
    }
    card.ended.textContent = many(event.tokens, 'token');
  },
  done(event) {
    const card = cards[event.model];
    card.text.data = event.text;
    if (event.first_seconds !== null) figure(card, 'first', seconds(event.first_seconds));
    if (event.tokens_per_s !== null) showSpeed(event.model, event.tokens_per_s);
    figure(card, 'process', megabytes(event.resident_bytes));
    card.ended.textContent = event.tokens === 0 && event.ended === 'end'
      ? 'Ended at once, without a word'
      : `${ENDS[event.ended]} ${many(event.tokens, 'token')}`;
    card.ended.append(` · prompt: ${many(event.prompt_tokens, 'token')}`);
    card.article.removeAttribute('aria-busy');
    card.over = true;
    say();
  },
  failed(event) {
    const card = cards[event.model];
    card.ended.textContent = event.message;
    card.ended.classList.add('failed');
    card.article.removeAttribute('aria-busy');
    card.over = true;
    say();
  },
  over() { running.complete = true; },
};

function say() {
  const busy = models.filter((_, i) => cards[i].article.hasAttribute('aria-busy'));
  if (running.stopped || !busy.length) return;
  const names = busy.map((model) => model.name).join(' and ');
  status.textContent = `${names} ${busy.length > 1 ? 'are' : 'is'} answering …`;
}

function fail(sentence) {
  error.textContent = sentence;
  error.hidden = false;
}

function settings() {
  const asked = { prompt: fields.prompt.value };
  for (const name of NUMBERS) {
    const value = fields[name].valueAsNumber;
    if (Number.isNaN(value)) {
      fields[name].focus();
      throw new Error(`${fields[name].parentElement.textContent.trim()} must be a number.`);
    }
    asked[name] = value;
  }
  for (const name of CHECKS) asked[name] = fields[name].checked;
  return asked;
}

/** Put the prompt and what differs from the defaults into the address. */
function remember(asked) {
  const query = new URLSearchParams();
  if (asked.prompt.length <= LONGEST_LINK) query.set('prompt', asked.prompt);
  for (const name of NUMBERS) query.set(name, asked[name]);
  for (const name of CHECKS) query.set(name, asked[name] ? 1 : 0);
  history.replaceState(null, '', `?${query}`);
}

function recall() {
  const query = new URLSearchParams(location.search);
  for (const name of ['prompt', ...NUMBERS]) if (query.has(name)) fields[name].value = query.get(name);
  for (const name of CHECKS) {
    if (query.has(name)) fields[name].checked = !['0', 'false', ''].includes(query.get(name));
  }
  return query.get('go') === '1';
}

function clear() {
  error.hidden = true;
  speeds = [];
  cards.forEach((card, i) => {
    card.answer.replaceChildren();
    card.ended.textContent = 'Waits for its turn';
    card.ended.classList.remove('failed');
    card.first = card.tokens = undefined;
    card.over = false;
    figure(card, 'speed', '–');
    figure(card, 'first', '–');
    figure(card, 'process', megabytes(models[i].resident_bytes));
  });
}

async function post(path, body) {
  const response = await fetch(path, {
    method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify(body),
  });
  if (!response.ok) {
    const answer = await response.json().catch(() => ({}));
    throw new Error(answer.error || `The studio answered with ${response.status}.`);
  }
  return response;
}

/** One JSON object a line, as they arrive. */
async function* lines(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split('\n');
    rest = parts.pop();
    for (const part of parts) yield JSON.parse(part);
  }
}

async function ask() {
  if (running) return;
  let asked;
  try { asked = settings(); } catch (problem) { fail(problem.message); return; }
  if (!asked.prompt) { fail('Write a prompt first.'); fields.prompt.focus(); return; }
  running = { asked, number: null, complete: false, stopped: false };
  clear();
  remember(asked);
  askButton.disabled = true;
  stopButton.hidden = false;
  status.textContent = 'Asking …';
  try {
    for await (const event of lines(await post('api/run', asked))) on[event.type](event);
    if (!running.complete) throw new Error('The studio ended before the answers were complete.');
    status.textContent = running.stopped ? 'Stopped.' : 'Done.';
  } catch (problem) {
    fail(problem instanceof TypeError
      ? 'The studio does not answer; start it again and reload this page.' : problem.message);
    status.textContent = '';
  }
  for (const card of cards) {
    card.article.removeAttribute('aria-busy');
    if (!card.over) card.ended.textContent = running.stopped ? 'Stopped' : 'Not answered';
  }
  running = null;
  askButton.disabled = false;
  if (document.activeElement === stopButton) askButton.focus();
  stopButton.hidden = true;
}

async function stop() {
  if (!running || running.number === null) return;
  running.stopped = true;
  status.textContent = 'Stopping …';
  try { await post('api/stop', { run: running.number }); } catch (problem) { fail(problem.message); }
}

async function start() {
  let found;
  try { found = await (await fetch('api/models')).json(); } catch {
    fail('The studio does not answer; start it again and reload this page.');
    status.textContent = '';
    return;
  }
  models = found.models;
  cards = models.map(build);
  document.title = `${models.map((model) => model.name).join(' · ')} – shearling studio`;
  fields.chat.checked = models.some((model) => model.chat);
  document.getElementById('chat-label').hidden = !fields.chat.checked;
  fields.together.checked = found.together;
  document.getElementById('together-label').hidden = models.length < 2;
  const go = recall();
  askButton.disabled = false;
  status.textContent = models.length > 1
    ? `${models.length} models are ready; in turns their speeds are fair.` : 'The model is ready.';
  if (go) ask();
}

form.addEventListener('submit', (event) => { event.preventDefault(); ask(); });
stopButton.addEventListener('click', stop);
document.addEventListener('keydown', (event) => {
  if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) ask();
  if (event.key === 'Escape') stop();
});
start();
