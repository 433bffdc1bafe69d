// Which documents are chosen and in which order: scores, fields to filter by, the selection.
const COUNT = DOCS.ids.length;
const PAGE = 25;
const INDEX = new Map(DOCS.ids.map((id, i) => [id, i]));
const LABELS = new Map(TOLD ? TOLD.methods.map((m) => [m.method, m]) : []);
const methodLabel = (name) => (LABELS.has(name) ? LABELS.get(name).label : name);

// --- scores ---
function half(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return NaN;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}
function unpack({ scale, data }) {
  const bytes = atob(data);
  return Array.from(
    { length: bytes.length / 2 },
    (_, i) => half(bytes.charCodeAt(2 * i) | (bytes.charCodeAt(2 * i + 1) << 8)) * scale,
  );
}
const unpacked = new Map();
function scoresOf(method, query) {
  const key = `${method}\n${query}`;
  if (!unpacked.has(key)) {
    const mean = DATA.scores.find((entry) => entry.method === method);
    const single = query !== MEAN && DATA.queries[method] && DATA.queries[method][query];
    const score = single ? unpack(single) : mean ? mean.mean : new Array(COUNT).fill(null);
    let rank = mean ? mean.rank : new Array(COUNT).fill(null);
    if (single) {
      rank = new Array(COUNT).fill(null);
      score
        .map((value, i) => i)
        .filter((i) => known(score[i]))
        .sort((a, b) => SIGN * (score[b] - score[a]))
        .forEach((i, place) => {
          rank[i] = place + 1;
        });
    }
    const largest = score.reduce((most, value) => (known(value) ? Math.max(most, Math.abs(value)) : most), 0);
    unpacked.set(key, {
      score,
      rank,
      largest,
      format: columnFormat(largest),
      single: Boolean(single),
      scored: single || !mean ? COUNT : mean.scored,
    });
  }
  return unpacked.get(key);
}
const current = () => scoresOf(state.method, state.q);
const queryName = (query) => {
  if (query === MEAN) return 'mean over all queries';
  const known_ = TRACE && TRACE.queries[Number(query)];
  return known_ ? `${known_.name || `query ${query}`}` : `query ${query}`;
};

// --- fields of the documents' meta that can be filtered by ---
function facetsOf() {
  const values = new Map();
  DOCS.meta.forEach((meta) =>
    Object.entries(meta).forEach(([key, value]) => {
      if (!values.has(key)) values.set(key, new Map());
      values.get(key).set(String(value), (values.get(key).get(String(value)) || 0) + 1);
    }),
  );
  const planted = TOLD && TOLD.planted_field ? TOLD.planted_field.split('=')[0] : '';
  const few = ([, counts]) => counts.size > 1 && counts.size <= 40 && counts.size < COUNT / 2;
  const wide = ([, counts]) => [...counts.values()].reduce((a, b) => a + b, 0) >= COUNT / 20;
  return [...values]
    .filter((field) => few(field) && wide(field))
    .sort(([a, x], [b, y]) => (b === planted) - (a === planted) || x.size - y.size)
    .slice(0, 4);
}
const FACETS = facetsOf();
const HAYSTACK = DOCS.ids.map((id, i) =>
  `${id}\n${DOCS.source[i]}\n${DOCS.text[i]}\n${typeof DOCS.response[i] === 'string' ? DOCS.response[i] : ''}\n${Object.values(DOCS.meta[i]).join('\n')}`.toLowerCase(),
);

function selection() {
  const { score, rank } = current();
  const words = state.s.toLowerCase().split(/\s+/).filter(Boolean);
  const low = state.min === '' ? -Infinity : Number(state.min);
  const high = state.max === '' ? Infinity : Number(state.max);
  const chosen = [];
  for (let i = 0; i < COUNT; i += 1) {
    const value = score[i];
    if (FIRST_METHOD && state.view === '' && !(SIGN * value > 0)) continue;
    if (FIRST_METHOD && state.view === 'opp' && !(SIGN * value < 0)) continue;
    if ((low > -Infinity || high < Infinity) && !(value >= low && value <= high)) continue;
    if (!Object.entries(state.filters).every(([key, wanted]) => wanted === '' || String(DOCS.meta[i][key]) === wanted))
      continue;
    if (words.length && !words.every((word) => HAYSTACK[i].includes(word))) continue;
    chosen.push(i);
  }
  const keys = { score, rank, source: DOCS.source, tokens: DOCS.tokens, loss: DOCS.loss, text: DOCS.text };
  const key = keys[state.sort] || score;
  const down = direction() === 'desc' ? -1 : 1;
  const order = (a, b) => {
    const x = key[a],
      y = key[b];
    if (typeof x === 'string') return down * x.localeCompare(y, undefined, { numeric: true });
    if (known(x) !== known(y)) return known(x) ? -1 : 1; // what has no value goes last whichever way the list is sorted
    return down * (x - y) || (rank[a] || 0) - (rank[b] || 0);
  };
  return chosen.sort(order);
}
function natural(sort) {
  if (sort === 'score') return (state.view === 'opp' ? -SIGN : SIGN) > 0 ? 'desc' : 'asc';
  return sort === 'loss' || sort === 'tokens' ? 'desc' : 'asc';
}
const direction = () => state.dir || natural(state.sort);
