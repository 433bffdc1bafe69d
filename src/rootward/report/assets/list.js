// The ranked documents as a table with controls, pages and CSV.
// --- drawing ---
function scoreBar(value, largest) {
  const share = known(value) && largest > 0 ? value / largest : 0;
  const width = `${(Math.abs(share) * 50).toFixed(2)}%`;
  return el(
    'span',
    { class: 'meter', 'aria-hidden': 'true' },
    el('span', {
      class: share < 0 ? 'meter-fill minus' : 'meter-fill plus',
      style: share < 0 ? { right: '50%', width } : { left: '50%', width },
    }),
  );
}
const excerpt = (text, length = 170) => {
  const flat = text
    .slice(0, 4 * length)
    .replace(/\s+/g, ' ')
    .trim();
  return flat.length > length ? `${flat.slice(0, length)}…` : flat;
};
function responseOf(i) {
  const held = DOCS.response[i];
  return typeof held === 'number' ? DOCS.text[i].slice(held) : held;
}
const promptOf = (i) => (typeof DOCS.response[i] === 'number' ? DOCS.text[i].slice(0, DOCS.response[i]) : DOCS.text[i]);
function tagsOf(i) {
  const tags = [];
  const planted = DOCS.planted && DOCS.planted[i];
  if (planted) tags.push(el('span', { class: 'tag tag-planted' }, '◆ planted'));
  for (const [key] of FACETS) {
    const value = DOCS.meta[i][key];
    if (value === undefined || value === null || value === '' || (planted && TOLD.planted_field.split('=')[0] === key))
      continue;
    tags.push(el('span', { class: 'tag' }, el('span', { class: 'tag-key' }, `${key} `), excerpt(String(value), 60)));
  }
  if (DOCS.truncated[i]) tags.push(el('span', { class: 'tag' }, '✂ truncated'));
  if (DOCS.copies[i] > 1) tags.push(el('span', { class: 'tag' }, `×${DOCS.copies[i]} copies`));
  return tags;
}
function rowOf(i, { score, rank, largest, format }) {
  const open = DOCS.ids[i] === state.doc;
  const link = el(
    'a',
    {
      href: hashOf({ ...state, doc: DOCS.ids[i] }),
      class: 'doc-link',
      'data-doc': DOCS.ids[i],
      'aria-current': open ? 'true' : null,
      dir: 'auto',
    },
    excerpt(promptOf(i)) || (responseOf(i) ? '' : `(no text) ${DOCS.ids[i]}`),
    responseOf(i) &&
      el(
        'span',
        { class: 'doc-response' },
        el('span', { class: 'arrow', 'aria-hidden': 'true' }, ' → '),
        excerpt(responseOf(i), 110),
      ),
  );
  return el(
    'tr',
    { class: open ? 'open' : null, 'data-doc': DOCS.ids[i] },
    el('td', { class: 'num rank' }, known(rank[i]) ? grouped(rank[i]) : '–'),
    el('td', { class: 'score' }, scoreBar(score[i], largest), el('span', { class: 'score-number' }, format(score[i]))),
    el('td', { class: 'doc' }, link, el('span', { class: 'tags' }, ...tagsOf(i))),
    el('td', { class: 'source wide' }, DOCS.source[i] || '–'),
    el('td', { class: 'num wide' }, grouped(DOCS.tokens[i])),
    el('td', { class: 'num wide' }, number(DOCS.loss[i])),
  );
}
const COLUMNS = [
  ['rank', 'Rank', 'num rank'],
  ['score', 'Score', 'score'],
  ['text', 'Document', 'doc'],
  ['source', 'Source', 'source wide'],
  ['tokens', 'Tokens', 'num wide'],
  ['loss', 'Loss', 'num wide'],
];
function headerCell([key, label, css]) {
  const on = state.sort === key;
  const next = on ? (direction() === 'desc' ? 'asc' : 'desc') : natural(key);
  const sort = () => {
    update({ sort: key, dir: next === natural(key) ? '' : next, page: '1' });
    byId(`sort-${key}`).focus();
  };
  return el(
    'th',
    { scope: 'col', class: css, 'aria-sort': on ? (direction() === 'desc' ? 'descending' : 'ascending') : null },
    el(
      'button',
      { type: 'button', id: `sort-${key}`, class: 'sort', on: { click: sort } },
      label,
      el('span', { class: 'sort-arrow', 'aria-hidden': 'true' }, on ? (direction() === 'desc' ? ' ↓' : ' ↑') : ''),
    ),
  );
}

let VIEW = [];
function drawList() {
  VIEW = selection();
  const pages = Math.max(1, Math.ceil(VIEW.length / PAGE));
  const page = Math.min(pages, Math.max(1, Number(state.page) || 1));
  const scores = current();
  fill(byId('doc-head'), COLUMNS.map(headerCell));
  fill(
    byId('doc-rows'),
    VIEW.slice((page - 1) * PAGE, page * PAGE).map((i) => rowOf(i, scores)),
  );
  const method = LABELS.get(state.method);
  fill(
    byId('doc-caption'),
    document.createTextNode(
      clean(
        `Scores by ${methodLabel(state.method)}, ${queryName(scores.single ? state.q : MEAN)}${method ? `; unit: ${method.unit}` : ''}`,
      ),
    ),
  );
  fill(
    byId('doc-count'),
    el(
      'span',
      {},
      el('strong', {}, grouped(VIEW.length)),
      ` of ${plural(COUNT, 'document')}${DOCS.sampled ? ` on this page (${grouped(DOCS.total)} in all)` : ''}`,
    ),
  );
  byId('doc-none').hidden = VIEW.length > 0;
  const go = (to) => () => {
    update({ page: String(to) });
    byId('doc-table').scrollIntoView({ block: 'start' });
  };
  fill(
    byId('doc-pages'),
    pages > 1 && [
      el('button', { type: 'button', disabled: page === 1, on: { click: go(page - 1) } }, '← Previous'),
      el('span', { class: 'dim' }, `Page ${page} of ${pages}`),
      el('button', { type: 'button', disabled: page === pages, on: { click: go(page + 1) } }, 'Next →'),
    ],
  );
}
function markOpen() {
  for (const row of byId('doc-rows').children) {
    const open = row.dataset.doc === state.doc;
    row.classList.toggle('open', open);
    const link = row.querySelector('a');
    if (open) link.setAttribute('aria-current', 'true');
    else link.removeAttribute('aria-current');
    link.setAttribute('href', hashOf({ ...state, doc: row.dataset.doc }));
  }
}

// --- controls ---
const labelled = (label, control, css = '') => el('label', { class: `field ${css}` }, el('span', {}, label), control);
function choice(label, id, options, key, css) {
  const select = el(
    'select',
    { id, on: { change: (event) => update({ [key]: event.target.value, page: '1' }) } },
    ...options.map(([value, text]) => el('option', { value }, text)),
  );
  return labelled(label, select, css);
}
function viewButtons() {
  const button = (view, label, title) =>
    el(
      'button',
      {
        type: 'button',
        class: 'segment',
        'data-view': view,
        title,
        on: { click: () => update({ view, sort: 'score', dir: '', page: '1' }) },
      },
      label,
    );
  const measured = SIGN < 0 ? 'lower' : 'raise';
  const other = measured === 'raise' ? 'lower' : 'raise';
  return el(
    'div',
    { class: 'segments', role: 'group', 'aria-label': 'Which documents' },
    button('', 'Proponents', `training more on them would ${measured} the measurement`),
    button('opp', 'Opponents', `training more on them would ${other} it`),
    button('all', 'All', 'every document'),
  );
}
function controls() {
  const methods = DATA.scores.map((entry) => [
    entry.method,
    methodLabel(entry.method) + (LABELS.get(entry.method)?.baseline ? ' (baseline)' : ''),
  ]);
  const queries = [
    [MEAN, 'Mean over all queries'],
    ...(TRACE
      ? TRACE.queries.map((query, i) => [String(i), excerpt(`${i + 1}. ${query.prompt || query.name}`, 70)])
      : []),
  ];
  const search = el('input', {
    type: 'search',
    id: 'search',
    placeholder: 'words in text, source, tags',
    autocomplete: 'off',
    on: { input: (event) => update({ s: event.target.value, page: '1' }, false) },
  });
  const bound = (id, key, label) =>
    labelled(
      label,
      el('input', {
        type: 'number',
        id,
        step: 'any',
        on: { input: (event) => update({ [key]: event.target.value, page: '1' }, false) },
      }),
      'field-small',
    );
  const facet = ([key, counts]) =>
    labelled(
      key,
      el(
        'select',
        {
          'data-facet': key,
          on: { change: (event) => update({ filters: { ...state.filters, [key]: event.target.value }, page: '1' }) },
        },
        el('option', { value: '' }, 'any'),
        ...[...counts]
          .sort((a, b) => b[1] - a[1])
          .map(([value, n]) => el('option', { value }, `${excerpt(value, 40)} (${n})`)),
      ),
      'field-facet',
    );
  return [
    el(
      'div',
      { class: 'controls' },
      FIRST_METHOD && viewButtons(),
      labelled('Search', search, 'field-search'),
      methods.length > 1 && choice('Method', 'method', methods, 'method'),
      Object.keys(DATA.queries).length > 0 && choice('Query', 'query', queries, 'q', 'field-query'),
    ),
    el(
      'div',
      { class: 'controls controls-second' },
      ...FACETS.map(facet),
      el('span', { class: 'range' }, bound('min', 'min', 'Score from'), bound('max', 'max', 'to')),
      el(
        'span',
        { class: 'controls-end' },
        el(
          'button',
          {
            type: 'button',
            id: 'reset',
            on: { click: () => update({ ...DEFAULTS, doc: state.doc, theme: state.theme, filters: {} }) },
          },
          'Reset',
        ),
        el('button', { type: 'button', id: 'csv', on: { click: csv } }, 'Download CSV'),
      ),
    ),
  ];
}
// Why a method has no scores for single queries here.
function meanOnly(method) {
  if (DATA.queries_kept !== 'all')
    return 'To keep the page small, this method’s scores for single queries are not on it; scores.parquet holds those there are.';
  if (LABELS.get(method)?.baseline) return 'This baseline gives one ranking for all queries.';
  return 'This method scored the mean of the queries (option queries = "each": scores for each one).';
}
function syncControls() {
  for (const button of document.querySelectorAll('[data-view]'))
    button.setAttribute('aria-pressed', String(button.dataset.view === state.view));
  for (const [id, key] of [
    ['search', 's'],
    ['min', 'min'],
    ['max', 'max'],
    ['method', 'method'],
    ['query', 'q'],
  ]) {
    const control = byId(id);
    if (control && control.value !== state[key]) control.value = state[key];
  }
  for (const select of document.querySelectorAll('[data-facet]'))
    select.value = state.filters[select.dataset.facet] || '';
  const query = byId('query');
  if (!query) return;
  query.disabled = !DATA.queries[state.method];
  // on the label too: not every browser shows the title of a control that is disabled
  query.title = query.disabled ? meanOnly(state.method) : '';
  query.closest('label').title = query.title;
}

// --- CSV: a cell that a spreadsheet would run as a formula gets an apostrophe ---
function csvCell(value) {
  if (typeof value === 'number') return String(value);
  const text = String(value ?? '').replace(/\u0000/g, '\u2400');
  return `"${(/^[=+\-@\t\r]/.test(text) ? `'${text}` : text).replace(/"/g, '""')}"`;
}
function csv() {
  const { score, rank } = current();
  const fields = [...new Set(DOCS.meta.flatMap((meta) => Object.keys(meta)))];
  const lines = [
    [
      'rank',
      'score',
      'method',
      'query',
      'id',
      'source',
      'tokens',
      'loss',
      ...fields.map((key) => `meta.${key}`),
      'text',
      'response',
    ],
  ];
  for (const i of VIEW)
    lines.push([
      rank[i],
      score[i],
      state.method,
      state.q === MEAN ? 'mean' : state.q,
      DOCS.ids[i],
      DOCS.source[i],
      DOCS.tokens[i],
      DOCS.loss[i],
      ...fields.map((key) => DOCS.meta[i][key]),
      DOCS.text[i],
      responseOf(i),
    ]);
  download(
    `${RUN.name.replace(/[^\w.-]+/g, '-')}-${state.method.replace(/[^\w.-]+/g, '-')}.csv`,
    `\ufeff${lines.map((line) => line.map(csvCell).join(',')).join('\r\n')}\r\n`,
    'text/csv',
  );
}

function drawDocuments() {
  if (!COUNT) return;
  const verified =
    VERDICT &&
    (VERDICT.holds
      ? 'As a group the documents taken out were verified by retraining; the score of one document alone is an estimate.'
      : 'Retraining did not confirm the documents at the top as a group; the score of one document is an estimate.');
  const table = el(
    'table',
    { id: 'doc-table', class: 'documents' },
    el('caption', { id: 'doc-caption' }),
    el('thead', {}, el('tr', { id: 'doc-head' })),
    el('tbody', { id: 'doc-rows' }),
  );
  const box = el(
    'div',
    { class: 'list' },
    el(
      'div',
      { class: 'list-line' },
      el('p', { id: 'doc-count', class: 'count', role: 'status' }),
      el(
        'p',
        { class: 'hint dim small' },
        el('kbd', {}, 'j'),
        ' ',
        el('kbd', {}, 'k'),
        ' move  ',
        el('kbd', {}, 'Enter'),
        ' open  ',
        el('kbd', {}, '/'),
        ' search',
      ),
    ),
    table,
    el('p', { id: 'doc-none', class: 'empty', hidden: true }, 'No document fits these filters.'),
    el('nav', { id: 'doc-pages', class: 'pages', 'aria-label': 'Pages of documents' }),
  );
  table.addEventListener('click', (event) => {
    const row = event.target.closest('tr[data-doc]');
    if (!row || event.ctrlKey || event.metaKey || event.shiftKey || String(getSelection())) return;
    event.preventDefault();
    openDocument(row.dataset.doc);
  });
  show(
    'documents',
    el(
      'p',
      { class: 'lead' },
      verified ||
        (COMPARISON && !TRACE
          ? `Each score is an estimate of what the document does to the measurement. How good the estimates of a method are is said above; ${COMPARISON.left_out ? `${grouped(COMPARISON.left_out.length)} documents were left out one by one, the others were not tested alone` : 'no single document was tested'}.`
          : 'Each score is an estimate of what the document does to the measurement. Nothing was retrained to test it.'),
    ),
    ...DATA.limits.map((limit) => el('p', { class: 'notice small' }, limit)),
    ...controls(),
    el(
      'div',
      { class: 'split', id: 'split' },
      box,
      el('aside', { id: 'doc', class: 'doc-panel', 'aria-labelledby': 'doc-title', hidden: true }),
    ),
  );
  listeners.push((next, previous) => {
    const same =
      hashOf({ ...next, doc: '', theme: '' }) ===
      hashOf({ ...previous, doc: '', theme: '', filters: previous.filters || {} });
    syncControls();
    if (same && VIEW.length) markOpen();
    else drawList();
  });
}
