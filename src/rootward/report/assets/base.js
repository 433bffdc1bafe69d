// What every part uses: the data, elements made of text nodes only, numbers, colours, and the state in the address.
const DATA = JSON.parse(document.getElementById('data').textContent);
const { documents: DOCS, trace: TRACE, verdict: VERDICT, comparison: COMPARISON, run: RUN } = DATA;
const TOLD = TRACE || COMPARISON; // what knows the goal and the planted documents
const SIGN = TOLD && TOLD.goal === 'lower' ? -1 : 1;
const MEAN = '-1';

// Training text is untrusted. It only ever becomes a text node, after this: control characters get their visible
// picture, and marks that turn the direction of text get their number.
const CONTROL = /[\u0000-\u0008\u000b-\u001f\u007f]/g;
const BIDI = /[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]/g;
const clean = (text) =>
  String(text)
    .replace(CONTROL, (c) => (c === '\u007f' ? '\u2421' : String.fromCharCode(0x2400 + c.charCodeAt(0))))
    .replace(BIDI, (c) => `[U+${c.charCodeAt(0).toString(16).toUpperCase().padStart(4, '0')}]`);

const SVG_TAGS = new Set(['svg', 'circle', 'line', 'rect', 'path', 'text', 'g', 'title']);
function el(tag, props, ...children) {
  const node = SVG_TAGS.has(tag)
    ? document.createElementNS('http://www.w3.org/2000/svg', tag)
    : document.createElement(tag);
  for (const [key, value] of Object.entries(props || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key === 'on') for (const [name, listener] of Object.entries(value)) node.addEventListener(name, listener);
    else if (key === 'style') for (const [name, item] of Object.entries(value)) node.style.setProperty(name, item);
    else if (key === 'value') node.value = value;
    else node.setAttribute(key, value === true ? '' : clean(value));
  }
  node.append(
    ...children
      .flat(Infinity)
      .filter((child) => child !== null && child !== undefined && child !== false)
      .map((child) => (child instanceof Node ? child : document.createTextNode(clean(child)))),
  );
  return node;
}
const fill = (node, ...children) => {
  node.replaceChildren();
  node.append(...children.flat(Infinity).filter(Boolean));
  return node;
};
const byId = (id) => document.getElementById(id);
const hidden = (text) => el('span', { class: 'sr' }, text);

// --- numbers; the same rules as numbers.py ---
const known = (value) => value !== null && value !== undefined && Number.isFinite(value);
const minus = (text) => text.replace(/-/g, '\u2212');
const grouped = (value) => Math.round(value).toLocaleString('en-GB');
function number(value, digits = 3) {
  if (!known(value)) return '–';
  const size = Math.abs(value);
  if (size >= 1000) return minus(grouped(value));
  if (size > 0 && size < 0.001) return minus(value.toExponential(digits - 1));
  return minus(String(Number(value.toPrecision(digits))));
}
const signed = (value, digits = 3) => (known(value) && value > 0 ? '+' : '') + number(value, digits);
// For columns: the same number of places everywhere, so that the points align.
function columnFormat(largest) {
  if (!(largest > 0)) return (value) => signed(value);
  const places = Math.min(8, Math.max(0, 2 - Math.floor(Math.log10(largest))));
  if (places >= 7) return (value) => signed(value);
  return (value) =>
    !known(value)
      ? '–'
      : (value > 0 ? '+' : '') +
        minus(value.toLocaleString('en-GB', { minimumFractionDigits: places, maximumFractionDigits: places }));
}
const SHARES = new Set(['share', 'rate', 'fraction', 'proportion', 'probability']);
const isShare = (unit) => SHARES.has(unit.trim().toLowerCase().split(' ')[0]);
const percent = (value, places = 1) => `${minus(String(Number((100 * value).toFixed(places))))}\u00a0%`;
const quantity = (value, unit) => (!known(value) ? '–' : isShare(unit) ? percent(value) : number(value));
const change = (value, unit) =>
  !known(value) ? '–' : isShare(unit) ? `${value > 0 ? '+' : ''}${minus((100 * value).toFixed(1))}` : signed(value);
const changeUnit = (unit) => (isShare(unit) ? 'points' : unit);
function duration(seconds) {
  if (!known(seconds)) return '–';
  if (seconds < 1) return `${seconds.toFixed(2)}\u00a0s`;
  if (seconds < 90) return `${seconds < 10 ? seconds.toFixed(1) : Math.round(seconds)}\u00a0s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 90 ? `${minutes}\u00a0min` : `${Math.floor(minutes / 60)}\u00a0h ${minutes % 60}\u00a0min`;
}
const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);
const plural = (n, word) => `${grouped(n)} ${word}${n === 1 ? '' : 's'}`;

// --- signed colour: blue raises, orange lowers; letters are black or white, whichever contrasts more (at least 4.5) ---
const PALETTE = {
  light: { zero: [255, 255, 255], plus: [33, 102, 172], minus: [196, 86, 0] },
  dark: { zero: [28, 31, 37], plus: [106, 176, 243], minus: [255, 152, 67] },
};
const isDark = () =>
  document.documentElement.dataset.theme === 'dark' ||
  (!document.documentElement.dataset.theme && matchMedia('(prefers-color-scheme: dark)').matches);
const channel = (c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4);
const luminance = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
function scoreColours(share) {
  const palette = PALETTE[isDark() ? 'dark' : 'light'];
  const end = share >= 0 ? palette.plus : palette.minus;
  const amount = Math.min(1, Math.abs(share)) ** 0.85;
  const back = palette.zero.map((c, i) => Math.round(c + (end[i] - c) * amount));
  const level = luminance(back);
  const front = (level + 0.05) / 0.05 >= 1.05 / (level + 0.05) ? '#000000' : '#ffffff';
  return { back: `rgb(${back.join(', ')})`, front };
}

// --- state: everything that the reader chose is in the hash of the address ---
const FIRST_METHOD = DATA.scores.length ? DATA.scores[0].method : ''; // the main method, where it has scores
const DEFAULTS = {
  doc: '',
  q: MEAN,
  method: FIRST_METHOD,
  view: '',
  s: '',
  sort: 'score',
  dir: '',
  page: '1',
  min: '',
  max: '',
  theme: '',
};
let state = {};
function readState() {
  const params = new URLSearchParams(location.hash.includes('=') ? location.hash.slice(1) : '');
  const next = { ...DEFAULTS, filters: {} };
  for (const [key, value] of params) {
    if (key.startsWith('f.')) next.filters[key.slice(2)] = value;
    else if (key in DEFAULTS) next[key] = value;
  }
  return next;
}
function hashOf(wanted) {
  const params = new URLSearchParams();
  for (const key of Object.keys(DEFAULTS)) if (wanted[key] !== DEFAULTS[key]) params.set(key, wanted[key]);
  for (const [key, value] of Object.entries(wanted.filters)) if (value !== '') params.set(`f.${key}`, value);
  return `#${params}`;
}
const listeners = [];
// `push` makes a step that the back button undoes; typing replaces instead.
function update(changes, push = true) {
  const previous = state;
  state = { ...state, ...changes };
  const hash = hashOf(state);
  if (hash !== hashOf(previous))
    history[push ? 'pushState' : 'replaceState'](null, '', hash === '#' ? location.pathname + location.search : hash);
  for (const listener of listeners) listener(state, previous);
}
function restore() {
  const previous = state;
  state = readState();
  for (const listener of listeners) listener(state, previous);
}

function show(id, ...content) {
  const section = byId(id);
  section.hidden = false;
  section.append(...content.flat(Infinity).filter(Boolean));
  return section;
}
// A table in a box that scrolls sideways where the window is narrow; the box can be scrolled by keyboard.
function tableBox(label, table) {
  return el('div', { class: 'table-box', tabindex: '0', role: 'region', 'aria-label': label }, table);
}
function download(name, text, type) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  const link = el('a', { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}
