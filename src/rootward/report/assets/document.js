// One opened document: what it says, how much each token adds, its scores by every method and query.
const TEXT_SHOWN = 1200;

function openDocument(id, push = true, focus = true) {
  update({ doc: id }, push);
  if (focus && id) byId('doc-title')?.focus({ preventScroll: matchMedia('(min-width: 1100px)').matches });
}
function closeDocument() {
  const id = state.doc;
  update({ doc: '' });
  const link = [...document.querySelectorAll('a.doc-link')].find((a) => a.dataset.doc === id);
  if (link) link.focus();
}
function stepDocument(by) {
  const place = VIEW.indexOf(INDEX.get(state.doc));
  const next = VIEW[place < 0 ? 0 : place + by];
  if (next === undefined) return;
  const page = String(Math.floor(VIEW.indexOf(next) / PAGE) + 1);
  update({ doc: DOCS.ids[next], page }, false);
}

// --- the heatmap ---
const visibleToken = (token) => token.replace(/\n/g, '↵\n').replace(/\t/g, '⇥\t') || '∅';
function heatmap(entry) {
  const largest = entry.scores.reduce((most, score) => Math.max(most, Math.abs(score)), 0) || 1;
  const format = columnFormat(largest);
  const readout = el(
    'p',
    { class: 'readout', 'aria-live': 'polite' },
    'Point at a token, or use the arrow keys, for its number.',
  );
  const spans = entry.tokens.map((token, i) => {
    const { back, front } = scoreColours(entry.scores[i] / largest);
    return el(
      'span',
      {
        class: entry.trained[i] ? 'token trained' : 'token',
        'data-i': String(i),
        title: `${format(entry.scores[i])}${entry.trained[i] ? ' · trained' : ''}`,
        style: { 'background-color': back, color: front },
      },
      visibleToken(token),
    );
  });
  let at = -1;
  const say = (i) => {
    if (at >= 0) spans[at].classList.remove('at');
    at = i;
    spans[i].classList.add('at');
    fill(
      readout,
      el('span', { class: 'readout-number' }, format(entry.scores[i])),
      el('span', {}, ' token '),
      el('code', {}, visibleToken(entry.tokens[i]).trim().slice(0, 80) || '␠'),
      el(
        'span',
        { class: 'dim' },
        ` ${i + 1} of ${entry.length}, ${entry.trained[i] ? 'trained: the model was taught to write it' : 'context: read, not taught'}`,
      ),
    );
  };
  const keys = (event) => {
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: spans.length - 1 }[event.key];
    if (to === undefined || !spans.length) return;
    event.preventDefault();
    say(Math.max(0, Math.min(spans.length - 1, to)));
  };
  const box = el(
    'div',
    {
      class: 'tokens',
      dir: 'auto',
      tabindex: '0',
      role: 'group',
      'aria-label': `Text with ${entry.tokens.length} tokens coloured by score; left and right arrow keys read the numbers`,
      on: {
        keydown: keys,
        focus: () => at < 0 && spans.length && say(0),
        mouseover: (event) => event.target.dataset.i && say(Number(event.target.dataset.i)),
      },
    },
    ...spans,
  );
  const strongest = entry.scores
    .map((score, i) => i)
    .sort((a, b) => Math.abs(entry.scores[b]) - Math.abs(entry.scores[a]))
    .slice(0, 12);
  const table = el(
    'table',
    { class: 'plain numbers' },
    el('caption', {}, 'The tokens with the largest scores'),
    el(
      'thead',
      {},
      el(
        'tr',
        {},
        el('th', { scope: 'col' }, 'Token'),
        el('th', { scope: 'col', class: 'num' }, 'Place'),
        el('th', { scope: 'col' }, 'Role'),
        el('th', { scope: 'col', class: 'num' }, 'Score'),
      ),
    ),
    el(
      'tbody',
      {},
      ...strongest.map((i) =>
        el(
          'tr',
          {},
          el('td', {}, el('code', {}, visibleToken(entry.tokens[i]).slice(0, 60))),
          el('td', { class: 'num' }, String(i + 1)),
          el('td', {}, entry.trained[i] ? 'trained' : 'context'),
          el('td', { class: 'num' }, format(entry.scores[i])),
        ),
      ),
    ),
  );
  return [
    el(
      'div',
      { class: 'scale', 'aria-hidden': 'true' },
      el('span', {}, `${format(-largest)} lowers`),
      gradient(),
      el('span', {}, `raises ${format(largest)}`),
    ),
    box,
    readout,
    el('details', { class: 'fold' }, el('summary', {}, 'Strongest tokens as a table'), table),
  ];
}
function gradient() {
  const cells = [];
  for (let i = -10; i <= 10; i += 1)
    cells.push(el('span', { style: { 'background-color': scoreColours(i / 10).back } }));
  return el('span', { class: 'gradient' }, ...cells);
}
function sumSentence(entry, i, format) {
  const { score, single } = scoresOf(TRACE.main_method, String(entry.query));
  const wanted = String(entry.query) === MEAN || single ? score[i] : null;
  const whole =
    entry.length > entry.tokens.length
      ? ` (the first ${grouped(entry.tokens.length)} of ${grouped(entry.length)} tokens are shown, the sum is over all)`
      : '';
  const found = `The ${grouped(entry.length)} tokens add up to ${format(entry.sum)}${whole}`;
  if (!known(wanted)) return `${found}.`;
  const same = Math.abs(entry.sum - wanted) <= 0.01 * Math.max(Math.abs(wanted), 1e-12) + 1e-9;
  return same
    ? `${found}, the score of the document.`
    : `${found}; the score of the document is ${format(wanted)}. They differ, so read the colours with care.`;
}
function heatmapPart(i) {
  const entries = DATA.tokens[DOCS.ids[i]] || [];
  if (!entries.length) return [];
  const entry =
    entries.find((item) => String(item.query) === state.q) ||
    entries.find((item) => String(item.query) === MEAN) ||
    entries[0];
  const { format } = scoresOf(TRACE.main_method, String(entry.query));
  return [
    el('h4', {}, 'What each token adds'),
    ...heatmap(entry),
    el(
      'p',
      { class: 'small' },
      el('strong', {}, sumSentence(entry, i, format)),
      ` By ${methodLabel(TRACE.main_method)}, ${queryName(String(entry.query))}.`,
    ),
    el(
      'p',
      { class: 'dim small' },
      el('span', { class: 'trained-key' }, 'Underlined'),
      ' tokens were trained on. A number belongs to a position: it holds what the gradient at that position does, which includes the effect of the tokens that come after it.',
    ),
  ];
}

// --- the text ---
function longText(text, css, label) {
  const box = el(
    'div',
    { class: `text ${css}`, dir: 'auto' },
    text.length > TEXT_SHOWN ? `${text.slice(0, TEXT_SHOWN)}…` : text,
  );
  if (text.length <= TEXT_SHOWN) return box;
  const button = el(
    'button',
    {
      type: 'button',
      'aria-expanded': 'false',
      on: {
        click: () => {
          fill(box, document.createTextNode(clean(text)));
          button.remove();
          box.tabIndex = -1;
          box.focus();
        },
      },
    },
    `Show all ${grouped(text.length)} characters of the ${label}`,
  );
  return [box, button];
}
function textPart(i) {
  const response = responseOf(i);
  const cut = DOCS.characters[i] > DOCS.text_limit;
  const prompt = promptOf(i);
  return [
    prompt && longText(prompt, 'text-prompt', response ? 'prompt' : 'text'),
    response && [el('p', { class: 'text-label' }, 'Response'), longText(response, 'text-response', 'response')],
    cut &&
      el(
        'p',
        { class: 'notice small' },
        `This page holds the first ${grouped(DOCS.text_limit)} of ${grouped(DOCS.characters[i])} characters; documents.parquet holds all.`,
      ),
  ];
}

function methodsPart(i) {
  const rows = DATA.scores.map((entry) =>
    el(
      'tr',
      { class: entry.method === state.method ? 'here' : null },
      el('th', { scope: 'row' }, methodLabel(entry.method)),
      el('td', { class: 'num' }, signed(entry.mean[i])),
      el('td', { class: 'num' }, known(entry.rank[i]) ? `${grouped(entry.rank[i])} of ${grouped(entry.scored)}` : '–'),
    ),
  );
  return [
    el('h4', {}, 'By each method'),
    el(
      'table',
      { class: 'plain numbers' },
      el(
        'thead',
        {},
        el(
          'tr',
          {},
          el('th', { scope: 'col' }, 'Method'),
          el('th', { scope: 'col', class: 'num' }, 'Mean score'),
          el('th', { scope: 'col', class: 'num' }, 'Rank'),
        ),
      ),
      el('tbody', {}, ...rows),
    ),
  ];
}
function queriesPart(i) {
  const queries = DATA.queries[state.method];
  if (!queries || !TRACE) return [];
  const all = Object.keys(queries)
    .map((query) => [query, scoresOf(state.method, query).score[i]])
    .filter(([, value]) => known(value))
    .sort((a, b) => b[1] - a[1]);
  if (all.length < 2) return [];
  const picked = all.length > 6 ? [...all.slice(0, 3), ...all.slice(-3)] : all;
  const largest = Math.max(...all.map(([, value]) => Math.abs(value)));
  const format = columnFormat(largest);
  return [
    el('h4', {}, `By query: raised and lowered most, of ${all.length}`),
    el(
      'ul',
      { class: 'by-query' },
      ...picked.map(([query, value]) =>
        el(
          'li',
          {},
          el(
            'button',
            { type: 'button', class: 'link', dir: 'auto', on: { click: () => update({ q: query, page: '1' }) } },
            excerpt(TRACE.queries[Number(query)]?.prompt || queryName(query), 110),
          ),
          scoreBar(value, largest),
          el('span', { class: 'score-number' }, format(value)),
        ),
      ),
    ),
  ];
}
function factsPart(i) {
  const pairs = [
    ['Source', DOCS.source[i] || '–'],
    [
      'Tokens',
      `${grouped(DOCS.tokens[i])}, ${grouped(DOCS.trained[i])} trained${DOCS.truncated[i] ? ', truncated' : ''}`,
    ],
    ['Loss', number(DOCS.loss[i], 4)],
    ...(DOCS.copies[i] > 1 ? [['Copies', `${DOCS.copies[i]} equal documents share this id`]] : []),
    ...Object.entries(DOCS.meta[i]).map(([key, value]) => [key, value === null || value === '' ? '–' : String(value)]),
    ['Id', DOCS.ids[i]],
  ];
  return el(
    'dl',
    { class: 'facts' },
    ...pairs.flatMap(([key, value]) => [el('dt', {}, key), el('dd', { dir: 'auto' }, value)]),
  );
}

function drawDocument() {
  const panel = byId('doc');
  const i = INDEX.get(state.doc);
  byId('split').classList.toggle('has-doc', state.doc !== '');
  panel.hidden = state.doc === '';
  if (panel.hidden) {
    panel.replaceChildren();
    return;
  }
  const close = el(
    'button',
    { type: 'button', class: 'quiet', 'aria-label': 'Close the document', on: { click: closeDocument } },
    '✕',
  );
  if (i === undefined) {
    fill(
      panel,
      el('div', { class: 'doc-top' }, el('h3', { id: 'doc-title', tabindex: '-1' }, 'No such document'), close),
      el('p', {}, `No document on this page has the id ${state.doc}. It may have been left out of the page's sample.`),
    );
    return;
  }
  const { score, rank, scored, format, largest, single } = current();
  const step = (label, by, name) =>
    el('button', { type: 'button', class: 'quiet', 'aria-label': name, on: { click: () => stepDocument(by) } }, label);
  const among = single && DOCS.sampled ? `${grouped(COUNT)} shown` : grouped(scored);
  const opened = [...panel.querySelectorAll('details')].map((fold) => fold.open);
  fill(
    panel,
    el(
      'div',
      { class: 'doc-top' },
      el(
        'h3',
        { id: 'doc-title', tabindex: '-1' },
        known(rank[i]) ? `Rank ${grouped(rank[i])}` : 'Not ranked',
        el('span', { class: 'dim' }, known(rank[i]) ? ` of ${among}` : ''),
      ),
      el('span', { class: 'doc-tools' }, step('↑', -1, 'Previous document'), step('↓', 1, 'Next document'), close),
    ),
    el(
      'p',
      { class: 'doc-score' },
      el('span', { class: `doc-score-number ${score[i] < 0 ? 'minus' : 'plus'}` }, format(score[i])),
      scoreBar(score[i], largest),
      el(
        'span',
        { class: 'dim small' },
        !known(score[i])
          ? 'no score'
          : score[i] > 0
            ? 'raises the measurement'
            : score[i] < 0
              ? 'lowers the measurement'
              : 'no effect',
      ),
    ),
    el('p', { class: 'tags' }, ...tagsOf(i)),
    el('div', { class: 'doc-text' }, textPart(i)),
    heatmapPart(i),
    queriesPart(i),
    methodsPart(i),
    el('h4', {}, 'About the document'),
    factsPart(i),
  );
  [...panel.querySelectorAll('details')].forEach((fold, n) => {
    if (opened[n]) fold.open = true;
  });
}
