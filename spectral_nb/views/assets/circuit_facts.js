const D = JSON.parse(document.getElementById('data').textContent);
const $ = id => document.getElementById(id);
const COLOR = {source: '#0072b2', destination: '#d55e00', both: '#cc79a7', query: '#d55e00', key: '#0072b2', value: '#009e73'};
const READS = {source: 'source token', destination: 'destination token', both: 'either token'};
const KIND = {source: 'key token', destination: 'query token', both: 'several', query: 'read as query', key: 'read as key', value: 'read as value'};
const kindOf = e => e.reads && COLOR[e.reads] ? e.reads : e.reads ? 'both' : e.token;
const hasFlow = D.meta.flow > 0, weightOf = e => hasFlow ? Math.max(e.flow, 0) : e.count;
const byId = new Map(D.edges.map(e => [e.id, e])), nodeById = new Map(D.nodes.map(n => [n.id, n])), rowOf = new Map();
const most = Math.max(1, ...D.edges.map(e => e.count)), widest = hasFlow ? Math.max(...D.edges.map(weightOf)) : most;

function make(tag, text, cls) {
  const e = document.createElement(tag);
  if (text !== undefined) e.textContent = text;
  if (cls) e.className = cls;
  return e;
}
function num(x) {
  if (x === null || x === undefined) return '\u2013';
  return Number.isInteger(x) ? String(x) : Math.abs(x) >= 100 ? x.toFixed(0) : Math.abs(x) >= 0.001 ? x.toPrecision(3) : x.toExponential(1);
}
function facts(pairs) {
  const d = make('dl');
  for (const [k, v] of pairs) d.append(make('dt', k), make('dd', typeof v === 'string' ? v : num(v)));
  return d;
}
function cells(row, values) { for (const v of values) row.append(make('td', num(v))); return row; }
const edgeName = e => e.up + ' \u2192 ' + e.down;
const placed = n => n.label + (n.role ? ' at ' + n.role : '');
function edgeFacts(e) {
  return facts([...(hasFlow ? [['flow', e.flow], ['read as', e.reads.replaceAll('+', ', ')]] : []), ['reads', READS[e.token] + (e.role ? ', ' + e.role : '')], ['head attends', e.q_role + ' \u2192 ' + e.k_role],
    ['prompts', e.count + ' of ' + D.meta.n_prompts], ['contribution, mean', e.mean], ['contribution, total', e.total],
    ['share of what the reader reads there', e.share], ['slices, mean', e.slices], ...Object.entries(e.effects || {})]);
}
function nodeFacts(n) {
  return facts([['layer', n.layer < 0 ? 'before layer 0' : n.layer], ['token', n.role], ['traced firings', n.firings], ['known as', n.known || '\u2013']]);
}
function tip(title, list) { const d = make('div'); d.append(make('strong', title), list); return d; }
