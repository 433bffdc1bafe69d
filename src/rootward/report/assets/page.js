// Start: draw every part, follow the address, keys, theme.
const THEMES = ['system', 'light', 'dark'];
function storedTheme() {
  try {
    return localStorage.getItem('rootward-theme') || 'system';
  } catch {
    return 'system';
  } // a file may have no storage
}
let theme = 'system';
function setTheme(next, keep) {
  theme = THEMES.includes(next) ? next : 'system';
  if (theme === 'system') delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  byId('theme-button').textContent = `Theme: ${theme}`;
  if (keep)
    try {
      localStorage.setItem('rootward-theme', theme);
    } catch {
      /* the choice lasts for this view only */
    }
  if (byId('doc')) drawDocument(); // the heatmap's colours depend on the theme
}

const KEYS = [
  ['j / k', 'next / previous document'],
  ['Enter', 'open the document'],
  ['Esc', 'close the document, or leave the search'],
  ['/', 'search'],
  ['p / o / a', 'proponents / opponents / all'],
  ['← / →', 'in a heatmap: token by token'],
  ['t', 'change the theme'],
  ['?', 'this help'],
];
function drawHelp() {
  const dialog = byId('help');
  fill(
    dialog,
    el('h2', { id: 'help-title' }, 'Keyboard'),
    el(
      'dl',
      { class: 'keys' },
      ...KEYS.map(([key, words]) => el('div', {}, el('dt', {}, el('kbd', {}, key)), el('dd', {}, words))),
    ),
    el(
      'p',
      { class: 'dim small' },
      'What you see is in the address: copy it to share a document, a filter or a method.',
    ),
    el('form', { method: 'dialog' }, el('button', {}, 'Close')),
  );
  byId('help-button').addEventListener('click', () => dialog.showModal());
}

function moveRow(by) {
  const links = [...document.querySelectorAll('a.doc-link')];
  if (!links.length) return;
  if (state.doc && matchMedia('(min-width: 1100px)').matches) {
    stepDocument(by);
    const open = document.querySelector('a.doc-link[aria-current]');
    if (open) open.focus({ preventScroll: true });
    open?.closest('tr').scrollIntoView({ block: 'nearest' });
    return;
  }
  const at = links.indexOf(document.activeElement);
  const to = links[at < 0 ? (by > 0 ? 0 : links.length - 1) : at + by];
  if (to) {
    to.focus();
    to.closest('tr').scrollIntoView({ block: 'nearest' });
  }
}
function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || byId('help').open) return;
  const typing = event.target.closest?.('input, select, textarea');
  if (event.key === 'Escape') {
    if (typing) event.target.blur();
    else if (state.doc) closeDocument();
    return;
  }
  if (typing) return;
  const view = (name) => () => COUNT && update({ view: name, sort: 'score', dir: '', page: '1' });
  const actions = {
    j: () => moveRow(1),
    k: () => moveRow(-1),
    '/': () => byId('search')?.focus(),
    '?': () => byId('help').showModal(),
    p: view(''),
    o: view('opp'),
    a: view('all'),
    t: () => byId('theme-button').click(),
  };
  if (!Object.hasOwn(actions, event.key)) return;
  event.preventDefault();
  actions[event.key]();
}

state = readState();
drawVerdict();
drawComparison();
drawDocuments();
drawMethods();
drawRecord();
drawReading();
drawHelp();
if (COUNT)
  listeners.push((next, previous) => {
    const keys = ['doc', 'q', 'method', 'view', 's'];
    if (keys.some((key) => next[key] !== previous[key])) drawDocument();
  });
listeners.push((next) => {
  if (next.theme && next.theme !== theme) setTheme(next.theme, false);
});
setTheme(state.theme || storedTheme(), false);
byId('theme-button').addEventListener('click', () => {
  setTheme(THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length], true);
  if (state.theme) update({ theme: '' }, false);
});
for (const link of document.querySelectorAll('[data-section]')) {
  const target = byId(link.dataset.section);
  if (target.hidden) {
    link.closest('li')?.remove();
    continue;
  }
  link.addEventListener('click', (event) => {
    // the hash holds the state, so sections are reached by scrolling
    event.preventDefault();
    target.scrollIntoView({ block: 'start' });
    (target.querySelector('h2[tabindex]') || target).focus({ preventScroll: true });
  });
}
document.addEventListener('keydown', onKey);
addEventListener('popstate', restore); // back, forward, and an edited hash
restore();
if (state.doc && COUNT)
  byId(matchMedia('(min-width: 1100px)').matches ? 'split' : 'doc').scrollIntoView({
    block: 'start',
    behavior: 'instant',
  });
const section = location.hash.slice(1);
if (!section.includes('=') && byId(section)) byId(section).scrollIntoView({ block: 'start', behavior: 'instant' });
document.documentElement.dataset.ready = 'true';
