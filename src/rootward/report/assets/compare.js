// Which method? Every method's LDS against retraining on random subsets, with its cost, damping and agreement.
const places = (value) => minus(value.toFixed(2).replace(/^-(0\.00)$/, '$1'));
const between = (interval) => `${places(interval.low)} to ${places(interval.high)}`;
function ranged(interval) {
  if (!interval) return '–';
  return [places(interval.value), interval.n > 1 && el('span', { class: 'dim' }, ` [${between(interval)}]`)];
}
function small(interval) {
  if (!interval) return '–';
  const range = ` [${number(interval.low)} to ${number(interval.high)}]`;
  return [number(interval.value), interval.n > 1 && el('span', { class: 'dim' }, range)];
}
const kindOf = (m) => (m.method === 'random' ? 'random' : m.baseline ? 'baseline' : 'method');

function ldsScale(methods) {
  const values = methods.flatMap((m) => [m.lds.low, m.lds.high, m.null.low, m.null.high]);
  if (COMPARISON.ceiling) values.push(COMPARISON.ceiling.value);
  const low = Math.min(...values, 0);
  const high = Math.max(...values, 0);
  const room = (high - low || 1) * 0.05;
  const span = high - low + 2 * room;
  return {
    ticks: ticksFor(low, high),
    share: (value) => (2 + (96 * (value - low + room)) / span).toFixed(3),
    at(value) {
      return `${this.share(value)}%`;
    },
  };
}

function ldsStrip(m, scale) {
  const svg = el('svg', {
    class: `strip strip-${kindOf(m)}`,
    width: '100%',
    height: '38',
    'aria-hidden': 'true',
    focusable: 'false',
  });
  const middle = 19;
  for (const tick of scale.ticks)
    svg.append(el('line', { class: 'grid', x1: scale.at(tick), x2: scale.at(tick), y1: 0, y2: 38 }));
  svg.append(el('line', { class: 'before', x1: scale.at(0), x2: scale.at(0), y1: 0, y2: 38 }));
  const width = `${(scale.share(m.null.high) - scale.share(m.null.low)).toFixed(3)}%`;
  svg.append(el('rect', { class: 'shuffled', x: scale.at(m.null.low), width, y: middle - 9, height: 18 }));
  if (COMPARISON.ceiling) {
    const x = scale.at(COMPARISON.ceiling.value);
    svg.append(el('line', { class: 'ceiling', x1: x, x2: x, y1: 0, y2: 38 }));
  }
  svg.append(
    el('line', { class: 'interval', x1: scale.at(m.lds.low), x2: scale.at(m.lds.high), y1: middle, y2: middle }),
    el('circle', { class: 'mean', cx: scale.at(m.lds.value), cy: middle, r: 6 }),
  );
  return svg;
}

const takenWord = () => (COMPARISON.few ? 'highest so far' : 'to take');
function ldsChart(methods) {
  const scale = ldsScale(methods);
  const taken = COMPARISON.recommended;
  const word = takenWord();
  const rows = methods.map((m) =>
    el(
      'div',
      { class: `arm${m.method === taken ? ' arm-main' : ''}` },
      el(
        'div',
        { class: 'arm-label' },
        el('span', { class: 'arm-name' }, m.method),
        el(
          'span',
          { class: 'arm-kind' },
          [m.method === taken && word, m.baseline && 'baseline', known(m.cost.ratio) && `${number(m.cost.ratio, 2)} passes`]
            .filter(Boolean)
            .join(' · '),
        ),
      ),
      ldsStrip(m, scale),
      el(
        'div',
        { class: 'arm-value' },
        el('strong', {}, places(m.lds.value)),
        el('span', { class: 'arm-range' }, between(m.lds)),
      ),
    ),
  );
  const axis = el(
    'svg',
    { width: '100%', height: '24', class: 'axis', 'aria-hidden': 'true', focusable: 'false' },
    ...scale.ticks.map((tick) => el('text', { x: scale.at(tick), y: 15, 'text-anchor': 'middle' }, number(tick))),
  );
  const key = (drawing, words) =>
    el('li', {}, el('svg', { width: 26, height: 16, 'aria-hidden': 'true', focusable: 'false' }, ...drawing), words);
  const said = methods.map((m) => `${m.method}: ${places(m.lds.value)}, ${between(m.lds)}`).join('; ');
  return el(
    'figure',
    { class: 'chart' },
    el(
      'figcaption',
      {},
      el('strong', {}, 'How well do scores predict retraining?'),
      ` Linear datamodeling score: ${plural(COMPARISON.subsets, 'subset')}, ${COMPARISON.queries === 1 ? 'one query' : `${grouped(COMPARISON.queries)} queries`}; 1 is perfect, 0 is chance`,
    ),
    el(
      'div',
      { role: 'img', 'aria-label': `Chart of the LDS with 95 % intervals. ${said}. The table below holds the numbers.` },
      ...rows,
      el('div', { class: 'arm arm-axis' }, el('div', {}), axis, el('div', {})),
    ),
    el(
      'ul',
      { class: 'legend' },
      key(
        [
          el('line', { class: 'interval', x1: 2, x2: 24, y1: 8, y2: 8 }),
          el('circle', { class: 'mean', cx: 13, cy: 8, r: 5 }),
        ],
        'LDS with 95 % interval',
      ),
      key([el('rect', { class: 'shuffled', x: 3, width: 20, y: 1, height: 14 })], 'the same scores, documents shuffled'),
      COMPARISON.ceiling &&
        key([el('line', { class: 'ceiling', x1: 13, x2: 13, y1: 0, y2: 16 })], 'noise ceiling: the most possible here'),
    ),
  );
}

function ldsTable(methods) {
  const removed = COMPARISON.removed_documents;
  const columns = [
    ['Method', null],
    ['LDS [95 %]', (m) => ranged(m.lds)],
    ['Behind the best [95 %]', (m) => ranged(m.behind_best)],
    ['Beats random', (m) => yesNo(m.beats_random)],
    ['Times one plain pass', (m) => (known(m.cost.ratio) ? `${number(m.cost.ratio)}×` : '–')],
    ['Time', (m) => duration(m.cost.seconds)],
    ['Peak memory', (m) => (known(m.cost.peak_memory_mb) ? megabytes(m.cost.peak_memory_mb) : '–')],
    methods.some((m) => m.curve.length) && [
      'Setting taken',
      (m) => (known(m.setting) ? `${m.option} ${number(m.setting)}` : '–'),
    ],
    known(removed) && [
      `Without its top ${grouped(removed)} (${COMPARISON.unit})`,
      (m) => ranged(m.method === 'random' ? COMPARISON.removed_at_random : m.removal),
    ],
    known(removed) && ['Less as many random ones', (m) => ranged(m.beyond_random)],
    methods.some((m) => m.auroc) && ['Finds planted (AUROC)', (m) => ranged(m.auroc)],
  ].filter(Boolean);
  const rows = methods.map((m) =>
    el(
      'tr',
      { class: m.method === COMPARISON.recommended ? 'here' : null },
      el(
        'th',
        { scope: 'row' },
        m.method,
        ' ',
        m.method === COMPARISON.recommended
          ? el('span', { class: 'tag tag-main' }, takenWord())
          : COMPARISON.as_good.includes(m.method)
            ? el('span', { class: 'tag' }, 'not told from it, cheaper')
            : null,
        el('span', { class: 'row-note' }, m.label),
      ),
      ...columns.slice(1).map(([, write]) => el('td', { class: 'num' }, write(m))),
    ),
  );
  return el(
    'table',
    { class: 'plain numbers methods' },
    el('caption', {}, 'Every method against the same retrainings, the highest LDS first'),
    el(
      'thead',
      {},
      el('tr', {}, ...columns.map(([head], i) => el('th', { scope: 'col', class: i ? 'num' : null }, head))),
    ),
    el('tbody', {}, ...rows),
  );
}

function settingTable(methods) {
  const tuned = methods.filter((m) => m.curve.length);
  if (!tuned.length) return null;
  const values = [...new Set(tuned.flatMap((m) => m.curve.map((point) => point.setting)))].sort((a, b) => a - b);
  const cell = (m, value) => {
    const point = m.curve.find((p) => p.setting === value);
    if (!point) return el('td', { class: 'num dim' }, '–');
    const text = `${places(point.tuning.value)} → ${places(point.reported.value)}`;
    return el('td', { class: 'num' }, value === m.setting ? el('strong', {}, '◆ ', text) : text);
  };
  return [
    el('h3', {}, 'How much does the setting matter?'),
    tableBox(
      'LDS by setting',
      el(
        'table',
        { class: 'plain numbers' },
        el(
          'caption',
          {},
          'LDS where the setting was chosen → LDS on the queries and subsets that are reported; ◆ the one chosen',
        ),
        el(
          'thead',
          {},
          el(
            'tr',
            {},
            el('th', { scope: 'col' }, 'Method'),
            ...values.map((v) => el('th', { scope: 'col', class: 'num' }, number(v))),
          ),
        ),
        el(
          'tbody',
          {},
          ...tuned.map((m) => el('tr', {}, el('th', { scope: 'row' }, `${m.method}: ${m.option}`), ...values.map((v) => cell(m, v)))),
        ),
      ),
    ),
  ];
}

function agreementTable(methods) {
  const cell = (value) =>
    el('td', { class: value < 0 ? 'num minus' : 'num', style: { '--share': Math.abs(value).toFixed(3) } }, places(value));
  return [
    el('h3', {}, 'Do they say the same?'),
    tableBox(
      'Agreement of the methods',
      el(
        'table',
        { class: 'plain numbers agreement' },
        el(
          'caption',
          {},
          'Spearman’s correlation of two methods’ scores over the documents, mean over queries. Agreeing is not being right.',
        ),
        el(
          'thead',
          {},
          el(
            'tr',
            {},
            el('th', { scope: 'col' }, 'Method'),
            ...methods.map((m, i) => el('th', { scope: 'col', class: 'num' }, String(i + 1), hidden(` ${m.method}`))),
          ),
        ),
        el(
          'tbody',
          {},
          ...methods.map((m, i) =>
            el('tr', {}, el('th', { scope: 'row' }, `${i + 1}. ${m.method}`), ...COMPARISON.agreement[i].map(cell)),
          ),
        ),
      ),
    ),
  ];
}

function singleTable(methods) {
  const { left_out: left, left_out_at_random: drawn, loo_ceiling: ceiling, patched_documents: patched } = COMPARISON;
  if (!left && !known(patched)) return null;
  const columns = [
    left && ['Leave-one-out, Spearman [95 %]', (m) => ranged(m.loo)],
    left && ['Shuffled', (m) => (m.loo_null ? `< ${places(m.loo_null.high)}` : '–')],
    left && ['Leave-one-out, Pearson [95 %]', (m) => ranged(m.loo_pearson)],
    known(patched) && [
      `One step on its top ${grouped(patched)} (${COMPARISON.unit})`,
      (m) => small(m.method === 'random' ? COMPARISON.patched_at_random : m.tail_patch),
    ],
    known(patched) && ['Less as many random ones', (m) => small(m.tail_patch_beyond_random)],
  ].filter(Boolean);
  const words = (text) => el('p', { class: 'dim small' }, text);
  return [
    el('h3', {}, 'What do single documents do?'),
    tableBox(
      'Methods against what single documents do',
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
            ...columns.map(([head]) => el('th', { scope: 'col', class: 'num' }, head)),
          ),
        ),
        el(
          'tbody',
          {},
          ...methods.map((m) =>
            el(
              'tr',
              {},
              el('th', { scope: 'row' }, m.method),
              ...columns.map(([, write]) => el('td', { class: 'num' }, write(m))),
            ),
          ),
        ),
      ),
    ),
    left &&
      words(
        `Leave-one-out: correlation of the change that a method’s scores predict with the one measured after training without a document, over ${grouped(left.length)} documents (${grouped(drawn)} drawn at random, ${grouped(left.length - drawn)} from both ends of the rankings), mean over queries; chance is 0${ceiling ? `, the noise ceiling ${places(ceiling.value)}` : ''}.`,
      ),
    known(patched) &&
      words(
        `One step: mean change of the measurement towards its goal after a single training step on one of a query’s top ${grouped(patched)} documents (tail patch); for random, on one of as many random documents. ${known(COMPARISON.patched_lr) ? `The step is ${COMPARISON.patched_optimiser}’s, with learning rate ${number(COMPARISON.patched_lr)}, from the final model. ` : ''}It says what a document does now, not what it did in training.`,
      ),
  ];
}

function drawComparison() {
  if (!COMPARISON) return;
  const methods = COMPARISON.methods;
  const tuning = COMPARISON.tuning_queries
    ? ` Other queries (${grouped(COMPARISON.tuning_queries)})${COMPARISON.tuning_subsets ? ` and subsets (${grouped(COMPARISON.tuning_subsets)})` : ''} made the choices.`
    : '';
  show(
    'comparison',
    COMPARISON.few &&
      el(
        'p',
        { class: 'notice notice-strong' },
        el('strong', {}, 'Too few subsets. '),
        `With ${grouped(COMPARISON.subsets)} an LDS is mostly noise; take 60 or more before anything is decided.`,
      ),
    el('p', { class: 'lead', dir: 'auto' }, COMPARISON.summary),
    ldsChart(methods),
    tableBox('Methods and what they cost', ldsTable(methods)),
    el(
      'p',
      { class: 'dim small' },
      `The LDS is Spearman’s correlation, over subsets, of the sum of a method’s scores of the documents in a subset with what training on it gave; mean over queries.${tuning} A plain pass is one forward and backward pass over all documents; peak memory is the whole process’s while the method ran.`,
    ),
    singleTable(methods),
    settingTable(methods),
    agreementTable(methods),
    COMPARISON.notes.length > 0 &&
      el('ul', { class: 'notes' }, ...COMPARISON.notes.map((note) => el('li', {}, note))),
  );
}
