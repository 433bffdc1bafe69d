// Methods beside baselines, coverage and cost, what made the run, and how to read a score.
const WHOLE = { true: '✓ yes', false: '✗ no' };
const yesNo = (value) =>
  value === null || value === undefined ? '–' : el('span', { class: value ? 'yes' : 'no' }, WHOLE[value]);

function aurocBar(auroc) {
  if (!auroc) return el('span', { class: 'dim' }, 'not known');
  const at = (value) => `${(100 * Math.min(1, Math.max(0, value))).toFixed(2)}%`;
  return el(
    'span',
    { class: 'auroc' },
    el(
      'svg',
      { width: '100%', height: 16, 'aria-hidden': 'true', focusable: 'false' },
      el('line', { class: 'grid', x1: '0%', x2: '100%', y1: 8, y2: 8 }),
      el('line', { class: 'before', x1: '50%', x2: '50%', y1: 1, y2: 15 }),
      el('line', { class: 'interval', x1: at(auroc.low), x2: at(auroc.high), y1: 8, y2: 8 }),
      el('circle', { class: 'mean', cx: at(auroc.value), cy: 8, r: 4.5 }),
    ),
    el(
      'span',
      {},
      auroc.value.toFixed(3),
      el('span', { class: 'dim' }, ` [${auroc.low.toFixed(3)}, ${auroc.high.toFixed(3)}]`),
    ),
  );
}

function methodSentence(main) {
  if (DATA.reserve) {
    const [lead, rest] = DATA.reserve;
    return el('p', { class: 'notice notice-strong' }, el('strong', {}, lead), ` ${rest}`);
  }
  if (!TRACE.methods.some((m) => m.baseline))
    return el(
      'p',
      { class: 'notice' },
      'No baseline was run, so it is not known whether something simpler would do as well.',
    );
  if (main.beats_baselines)
    return el('p', { class: 'lead' }, `${main.label} does better than every baseline beside it.`);
  if (TRACE.methods.some((m) => m.auroc)) return null;
  return el(
    'p',
    { class: 'lead' },
    'No planted truth is known here, so methods can be compared with one another but not with the truth.',
  );
}

// A method's notes stay folded under its row, so that a row is one line tall.
function noteRow(m, columns) {
  return el(
    'tr',
    { class: 'note-row' },
    el(
      'td',
      { colspan: columns },
      el(
        'details',
        {},
        el('summary', {}, plural(m.notes.length, 'note'), hidden(` on ${m.label}`)),
        el('ul', {}, ...m.notes.map((note) => el('li', {}, note))),
      ),
    ),
  );
}

function drawMethods() {
  if (!TRACE || !TRACE.methods.length) return;
  const main = LABELS.get(TRACE.main_method) || TRACE.methods[0];
  const order = [...TRACE.methods].sort(
    (a, b) => (b === main) - (a === main) || a.baseline - b.baseline || (b.auroc?.value ?? 0) - (a.auroc?.value ?? 0),
  );
  const truth = TRACE.methods.some((m) => m.auroc);
  const heads = [
    'Method',
    truth && 'AUROC (line: chance)',
    truth && 'Planted in the top',
    'Agreement with main',
    'Beats baselines',
    'Cost',
    'Times one plain pass',
    'Unit',
  ].filter(Boolean);
  const rows = order.flatMap((m) => [
    el(
      'tr',
      { class: [m === main && 'here', m.notes.length && 'has-notes'].filter(Boolean).join(' ') || null },
      el(
        'th',
        { scope: 'row' },
        m.label,
        ' ',
        m === main
          ? el('span', { class: 'tag tag-main' }, 'main')
          : m.baseline
            ? el('span', { class: 'tag' }, 'baseline')
            : null,
      ),
      truth && el('td', {}, aurocBar(m.auroc)),
      truth && el('td', { class: 'num' }, known(m.precision_at_planted) ? percent(m.precision_at_planted, 0) : '–'),
      el(
        'td',
        { class: 'num' },
        m === main ? '1' : known(m.spearman_with_main) ? minus(m.spearman_with_main.toFixed(2)) : '–',
      ),
      el('td', {}, m.baseline ? '–' : yesNo(m.beats_baselines)),
      el('td', { class: 'num' }, duration(m.cost.seconds)),
      el('td', { class: 'num' }, known(m.cost.ratio) ? `${number(m.cost.ratio)}×` : '–'),
      el('td', { class: 'dim unit' }, m.unit),
    ),
    m.notes.length > 0 && noteRow(m, heads.length),
  ]);
  show(
    'methods',
    methodSentence(main),
    tableBox(
      'Table of methods',
      el(
        'table',
        { class: 'plain numbers methods' },
        el('caption', {}, 'Every method on the same queries and documents'),
        el(
          'thead',
          {},
          el(
            'tr',
            {},
            ...heads.map((head, i) =>
              el('th', { scope: 'col', class: i && !/AUROC|Beats|Unit/.test(head) ? 'num' : null }, head),
            ),
          ),
        ),
        el('tbody', {}, ...rows),
      ),
    ),
    el(
      'p',
      { class: 'dim small' },
      truth &&
        'AUROC is the chance that a planted document stands above another one; 0.5 is chance. “Planted in the top” is the share of planted documents among as many from the top as were planted. ',
      'Agreement is Spearman’s rank correlation with the main method over all documents.',
    ),
  );
}

// --- coverage and cost ---
function share(label, part, whole, words) {
  const value = whole ? part / whole : 0;
  return el(
    'div',
    { class: 'share' },
    el('p', { class: 'share-line' }, el('span', {}, label), el('strong', {}, whole ? percent(value) : '–')),
    el(
      'div',
      { class: 'share-bar', 'aria-hidden': 'true' },
      el('span', { style: { width: `${Math.min(100, 100 * value)}%` } }),
    ),
    el('p', { class: 'dim small' }, words),
  );
}
function coverage() {
  const c = RUN.coverage;
  if (!c) return [el('p', { class: 'dim' }, 'No coverage was recorded.')];
  const reasons = Object.entries(c.dropped).map(([why, n]) => `${grouped(n)} ${why}`);
  const uncovered = Object.entries(c.uncovered).map(([name, n]) => `${name} (${grouped(n)})`);
  return [
    el(
      'div',
      { class: 'shares' },
      share(
        'Parameters seen',
        c.covered,
        c.parameters,
        `${grouped(c.covered)} of ${grouped(c.parameters)}${uncovered.length ? `; not seen: ${uncovered.join(', ')}` : ''}`,
      ),
      share(
        'Documents used',
        c.used,
        c.documents,
        `${grouped(c.used)} of ${grouped(c.documents)}; ${reasons.length ? `dropped: ${reasons.join(', ')}` : 'none dropped'}; ${grouped(c.truncated)} truncated; ${grouped(c.duplicates)} duplicates`,
      ),
      share(
        'Tokens trained on',
        c.trained_tokens,
        c.tokens,
        `${grouped(c.trained_tokens)} of ${grouped(c.tokens)}; the rest is context`,
      ),
    ),
  ];
}
const megabytes = (value) => (value >= 1024 ? `${number(value / 1024)} GB` : `${number(value)} MB`);
function facts(pairs) {
  const kept = pairs.filter(([, value]) => value !== null && value !== undefined && value !== '' && value !== false);
  return el('dl', { class: 'facts' }, ...kept.flatMap(([key, value]) => [el('dt', {}, key), el('dd', {}, value)]));
}
const listing = (object, write = String) => Object.entries(object).map(([key, value]) => [key, write(value)]);
function block(title, ...content) {
  return el('div', { class: 'block' }, el('h3', {}, title), ...content);
}

function drawRecord() {
  const cost = RUN.cost;
  const copy = el(
    'button',
    {
      type: 'button',
      class: 'quiet',
      on: {
        click: async () => {
          try {
            await navigator.clipboard.writeText(RUN.command);
            copy.textContent = 'Copied';
          } catch {
            copy.textContent = 'Select the text to copy it';
          }
        },
      },
    },
    'Copy',
  );
  show(
    'record',
    RUN.error && el('p', { class: 'notice notice-strong' }, el('strong', {}, `The run is ${RUN.status}. `), RUN.error),
    RUN.warnings.length > 0 &&
      el(
        'div',
        { class: 'notice' },
        el('strong', {}, plural(RUN.warnings.length, 'warning')),
        el('ul', {}, ...RUN.warnings.map((warning) => el('li', {}, warning))),
      ),
    ...coverage(),
    RUN.command && el('div', { class: 'command' }, el('code', {}, RUN.command), copy),
    el(
      'div',
      { class: 'blocks' },
      block(
        'Run',
        facts([
          ['Name', RUN.name],
          ['Kind', RUN.kind],
          ['Status', RUN.status],
          ['Started', RUN.started.replace('T', ' ').replace('Z', ' UTC')],
          ['Took', known(RUN.seconds) && duration(RUN.seconds)],
          ['Seeds', RUN.seeds.join(', ')],
          ['Folder', RUN.folder],
          ['Key', el('code', {}, RUN.key)],
        ]),
      ),
      cost &&
        block(
          'Cost',
          facts([
            ['Time', duration(cost.seconds)],
            ['Times one plain pass', known(cost.ratio) && `${number(cost.ratio)}×`],
            ['Peak memory', known(cost.peak_memory_mb) && megabytes(cost.peak_memory_mb)],
            ['On disk', megabytes(cost.disk_mb)],
            ['Retrainings', VERDICT && duration(VERDICT.cost.seconds)],
          ]),
        ),
      Object.keys(RUN.timings).length > 0 && block('Where the time went', facts(listing(RUN.timings, duration))),
      block('Versions', facts(listing(RUN.versions))),
      block('Machine', facts(listing(RUN.machine))),
      Object.keys(RUN.inputs).length > 0 &&
        block('Inputs (hashes)', facts(listing(RUN.inputs, (hash) => el('code', {}, hash)))),
    ),
    el(
      'details',
      { class: 'fold' },
      el('summary', {}, 'Resolved configuration'),
      el('pre', { class: 'config', tabindex: '0', 'aria-label': 'Resolved configuration' }, RUN.config),
    ),
  );
  byId('foot').textContent =
    `Made by Rootward ${RUN.versions.rootward || ''} on ${DATA.generated.replace('T', ' ').replace('Z', ' UTC')}. This file is whole: it loads nothing from the network.`;
}

function drawReading() {
  if (!TRACE) return;
  const aim = TRACE.goal === 'lower' ? 'lower' : 'raise';
  const items = [
    [
      'Sign',
      `Above zero (blue): training more on the document would raise the measurement. Below zero (orange): it would lower it. The behaviour asked about goes with a ${aim === 'raise' ? 'higher' : 'lower'} measurement, so proponents ${aim} it.`,
    ],
    ['Measurement', `${TRACE.measurement}, in ${TRACE.unit}.`],
    [
      'Unit',
      `${LABELS.get(TRACE.main_method)?.unit || TRACE.unit} for the main method. Methods have different units: compare their ranks, not their numbers.`,
    ],
    [
      'What it cannot say',
      `A score is a linear estimate around the trained model. It does not say what happens when many documents go at once, does not add up over near-duplicates that stand in for one another, and is blind to parameters that were not covered. A high score is no proof of a cause: ${VERDICT ? 'the retraining at the top of this page is the test' : 'only training again without the document tests it'}.`,
    ],
    [
      'Intervals',
      'An interval over seeds says how much the result moves when the training is repeated with other random numbers. It does not cover other data, other probes or another model.',
    ],
  ];
  show(
    'reading',
    el(
      'dl',
      { class: 'reading' },
      ...items.map(([term, words]) => el('div', {}, el('dt', {}, term), el('dd', {}, words))),
    ),
  );
}
