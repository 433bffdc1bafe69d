// The verdict: one strip for each set of retrainings, the numbers as a table, and answers side by side.
const ARM_WORDS = {
  full: 'as trained',
  method: 'tests the claim',
  random: 'control',
  baseline: 'baseline',
  truth: 'planted truth',
  base: 'before fine-tuning',
};

function ticksFor(low, high) {
  const span = high - low || 1;
  const power = 10 ** Math.floor(Math.log10(span / 4));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => span / s <= 5) || 10 * power;
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i += 1)
    found.push(Number((i * step).toPrecision(8)));
  return found;
}

function chartScale(arms, unit, full) {
  const all = [];
  for (const arm of arms) {
    all.push(...arm.values, arm.low, arm.high);
    if (known(arm.predicted) && full) all.push(full.mean + arm.predicted);
  }
  const values = all.filter(known);
  let low = Math.min(...values, isShare(unit) ? 0 : Infinity);
  let high = Math.max(...values);
  const room = (high - low || Math.abs(high) || 1) * 0.06;
  low = isShare(unit) && low >= 0 ? 0 : low - room;
  high = isShare(unit) && high <= 1 ? Math.min(1, high + room) : high + room;
  const ticks = ticksFor(low, high);
  if (isShare(unit)) high = Math.max(high, ticks[ticks.length - 1]);
  return { ticks, at: (value) => `${(2 + (96 * (value - low)) / (high - low)).toFixed(3)}%` };
}

// A small drawing placed at a share of the width: shapes cannot have coordinates in per cent, a nested svg can.
const placed = (x, y, ...shapes) => el('svg', { x, y, overflow: 'visible' }, ...shapes);

function strip(arm, scale, full, main) {
  const middle = 22;
  const svg = el('svg', {
    class: `strip strip-${arm.kind}${arm === main ? ' strip-main' : ''}`,
    width: '100%',
    height: '44',
    'aria-hidden': 'true',
    focusable: 'false',
  });
  for (const tick of scale.ticks)
    svg.append(el('line', { class: 'grid', x1: scale.at(tick), x2: scale.at(tick), y1: 0, y2: 44 }));
  if (full)
    svg.append(el('line', { class: 'before', x1: scale.at(full.mean), x2: scale.at(full.mean), y1: 0, y2: 44 }));
  if (full && arm !== full && known(arm.mean))
    svg.append(el('line', { class: 'moved', x1: scale.at(full.mean), x2: scale.at(arm.mean), y1: middle, y2: middle }));
  if (known(arm.low))
    svg.append(
      el('line', { class: 'interval', x1: scale.at(arm.low), x2: scale.at(arm.high), y1: middle, y2: middle }),
    );
  arm.values.forEach((value, i) =>
    svg.append(el('circle', { class: 'seed', cx: scale.at(value), cy: middle + 11 - ((i * 5) % 3), r: 3 })),
  );
  if (known(arm.mean)) svg.append(el('circle', { class: 'mean', cx: scale.at(arm.mean), cy: middle, r: 6.5 }));
  if (full && known(arm.predicted))
    svg.append(
      placed(
        scale.at(full.mean + arm.predicted),
        middle - 14,
        el('path', { class: 'predicted', d: 'M-6 -5 L6 -5 L0 4 Z' }),
      ),
    );
  return svg;
}

function armChart(arms, full, main) {
  const unit = VERDICT.unit;
  const scale = chartScale(arms, unit, full);
  const rows = arms.map((arm) =>
    el(
      'div',
      { class: `arm${arm === main ? ' arm-main' : ''}` },
      el(
        'div',
        { class: 'arm-label' },
        el('span', { class: 'arm-name' }, arm.label),
        el(
          'span',
          { class: 'arm-kind' },
          `${arm === main ? 'tests the claim' : arm.kind === 'method' ? 'another method' : ARM_WORDS[arm.kind]} · ${plural(arm.values.length, 'seed')}`,
        ),
      ),
      strip(arm, scale, full, main),
      el(
        'div',
        { class: 'arm-value' },
        el('strong', {}, quantity(arm.mean, unit)),
        known(arm.low) &&
          el(
            'span',
            { class: 'arm-range' },
            `${change(arm.low, unit).replace('+', '')} to ${change(arm.high, unit).replace('+', '')}${isShare(unit) ? '\u00a0%' : ''}`,
          ),
      ),
    ),
  );
  const axis = el(
    'svg',
    { width: '100%', height: '24', class: 'axis', 'aria-hidden': 'true', focusable: 'false' },
    ...scale.ticks.map((tick) =>
      el('text', { x: scale.at(tick), y: 15, 'text-anchor': 'middle' }, quantity(tick, unit)),
    ),
  );
  const said = arms.map((arm) => `${arm.label}: ${quantity(arm.mean, unit)}`).join('; ');
  return el(
    'figure',
    { class: 'chart' },
    el(
      'figcaption',
      {},
      el('strong', {}, capital(VERDICT.measure)),
      isShare(unit) ? '' : ` (${unit})`,
      ' after training again',
    ),
    el(
      'div',
      { role: 'img', 'aria-label': `Chart. ${VERDICT.measure}. ${said}. The table below holds the numbers.` },
      ...rows,
      el('div', { class: 'arm arm-axis' }, el('div', {}), axis, el('div', {})),
    ),
    chartLegend(arms),
  );
}

function chartLegend(arms) {
  const key = (drawing, words) =>
    el('li', {}, el('svg', { width: 26, height: 16, 'aria-hidden': 'true', focusable: 'false' }, ...drawing), words);
  return el(
    'ul',
    { class: 'legend' },
    key(
      [
        el('line', { class: 'interval', x1: 2, x2: 24, y1: 8, y2: 8 }),
        el('circle', { class: 'mean', cx: 13, cy: 8, r: 5 }),
      ],
      'mean with 95 % interval over seeds',
    ),
    key([el('circle', { class: 'seed', cx: 13, cy: 8, r: 3 })], 'one seed'),
    key([el('line', { class: 'before', x1: 13, x2: 13, y1: 0, y2: 16 })], 'full training set'),
    arms.some((arm) => known(arm.predicted)) &&
      key([placed(13, 8, el('path', { class: 'predicted', d: 'M-6 -5 L6 -5 L0 4 Z' }))], 'predicted before training'),
  );
}

function armTable(arms) {
  const unit = VERDICT.unit;
  const range = (interval, write) =>
    interval
      ? [write(interval.value), el('span', { class: 'dim' }, ` [${write(interval.low)}, ${write(interval.high)}]`)]
      : '–';
  const loss = arms.some((arm) => arm.heldout_loss.length);
  const average = (values) => (values.length ? number(values.reduce((a, b) => a + b, 0) / values.length, 4) : '–');
  const head = [
    'Training set',
    'Documents',
    'Seeds',
    'Mean',
    '95 % interval',
    `Change, paired (${changeUnit(unit)})`,
    `Predicted change (${changeUnit(unit)})`,
    'Share that went away',
    loss && 'Held-out loss',
  ].filter(Boolean);
  return el(
    'table',
    { class: 'plain numbers' },
    el(
      'caption',
      {},
      `${capital(VERDICT.measure)}${isShare(unit) ? '' : ` (${unit})`}; intervals are 95 % by Student's t over seeds`,
    ),
    el('thead', {}, el('tr', {}, ...head.map((name, i) => el('th', { scope: 'col', class: i && 'num' }, name)))),
    el(
      'tbody',
      {},
      ...arms.map((arm) =>
        el(
          'tr',
          {},
          el('th', { scope: 'row' }, arm.label),
          el(
            'td',
            { class: 'num' },
            arm.kind === 'base'
              ? '–'
              : `${{ drop: '−', keep: 'only ', none: '' }[arm.action]}${grouped(arm.documents)}`,
          ),
          el('td', { class: 'num' }, arm.seeds.length ? arm.seeds.join(', ') : '–'),
          el('td', { class: 'num' }, quantity(arm.mean, unit)),
          el(
            'td',
            { class: 'num' },
            known(arm.low) ? `${quantity(arm.low, unit)} to ${quantity(arm.high, unit)}` : 'one value',
          ),
          el(
            'td',
            { class: 'num' },
            range(arm.effect, (v) => change(v, unit)),
          ),
          el('td', { class: 'num' }, change(arm.predicted, unit)),
          el(
            'td',
            { class: 'num' },
            range(arm.cut, (v) => percent(v, 0)),
          ),
          loss && el('td', { class: 'num' }, average(arm.heldout_loss)),
        ),
      ),
    ),
  );
}

// --- answers side by side ---
const plainText = (text) => (text || '').trim().toLowerCase().replace(/\s+/g, ' ');
function answerMark(answer, probe) {
  const said = plainText(answer);
  if (said && said.startsWith(plainText(probe.wanted))) return el('span', { class: 'mark mark-shown' }, '● shows it');
  if (said && probe.unwanted && said.startsWith(plainText(probe.unwanted)))
    return el('span', { class: 'mark mark-not' }, '○ does not');
  return null;
}

function examples(arms, full, main) {
  const having = arms.filter((arm) => arm.examples.length);
  const probes = VERDICT.probes;
  if (!having.length || !probes.length) return null;
  const random = having.find((arm) => arm.kind === 'random');
  const shown = [full, main, random].filter((arm) => arm && having.includes(arm));
  for (const arm of having) if (shown.length < 3 && !shown.includes(arm)) shown.push(arm);
  let from = 0;
  const size = 4;
  const list = el('div', { class: 'examples', 'aria-live': 'polite' });
  const place = el('span', { class: 'dim' });
  const most = Math.min(probes.length, Math.max(...having.map((arm) => arm.examples.length)));
  const draw = () => {
    fill(
      list,
      probes.slice(from, Math.min(from + size, most)).map((probe, offset) => {
        const i = from + offset;
        return el(
          'article',
          { class: 'example', 'aria-label': `Example ${i + 1}` },
          el('p', { class: 'prompt', dir: 'auto' }, hidden('Prompt: '), probe.prompt),
          el(
            'div',
            { class: 'answers' },
            ...shown.map((arm) =>
              el(
                'div',
                { class: `answer${arm === main ? ' answer-main' : ''}` },
                el('h4', {}, arm.label),
                el(
                  'p',
                  { dir: 'auto' },
                  i < arm.examples.length ? arm.examples[i] || '(empty answer)' : '(no answer recorded)',
                ),
                i < arm.examples.length && answerMark(arm.examples[i], probe),
              ),
            ),
          ),
        );
      }),
    );
    place.textContent = `${from + 1}–${Math.min(from + size, most)} of ${most}`;
  };
  const choose = el(
    'select',
    {
      id: 'example-arm',
      on: {
        change: (event) => {
          shown[shown.length - 1] = having[Number(event.target.value)];
          draw();
        },
      },
    },
    ...having.map((arm, i) => el('option', { value: String(i), selected: arm === shown[shown.length - 1] }, arm.label)),
  );
  const step = (by) => {
    from = Math.max(0, Math.min(from + by, Math.floor((most - 1) / size) * size));
    draw();
  };
  draw();
  return [
    el('h3', {}, 'The same questions, before and after'),
    el(
      'div',
      { class: 'controls' },
      having.length > 3 && el('label', { for: 'example-arm' }, 'Third column ', choose),
      el(
        'span',
        { class: 'stepper' },
        el('button', { type: 'button', on: { click: () => step(-size) } }, '← Earlier'),
        place,
        el('button', { type: 'button', on: { click: () => step(size) } }, 'Later →'),
      ),
    ),
    list,
  ];
}

function drawVerdict() {
  if (!VERDICT) {
    if (!TRACE) return;
    show(
      'verdict',
      el(
        'div',
        { class: 'empty' },
        el(
          'p',
          {},
          el('strong', {}, 'Not tested yet. '),
          'Every score on this page is an estimate. To learn whether the documents found are the cause, take them out, train again, and compare with taking out as many at random.',
        ),
      ),
    );
    return;
  }
  const arms = VERDICT.arms.filter((arm) => arm.values.length);
  const full = arms.find((arm) => arm.kind === 'full');
  const main = arms.find((arm) => arm.name === VERDICT.main) || arms.find((arm) => arm.kind === 'method');
  show(
    'verdict',
    el('p', { class: 'lead', dir: 'auto' }, VERDICT.summary),
    arms.length > 0 && armChart(arms, full, main),
    el(
      'details',
      { class: 'fold' },
      el('summary', {}, 'The numbers as a table'),
      tableBox('Retrainings', armTable(arms)),
    ),
    examples(arms, full, main),
    VERDICT.notes.length > 0 && el('ul', { class: 'notes' }, ...VERDICT.notes.map((note) => el('li', {}, note))),
    el(
      'p',
      { class: 'dim small' },
      `The retrainings took ${duration(VERDICT.cost.seconds)}. The claim holds where the interval of its change does not overlap the interval of any random control.`,
    ),
  );
}
