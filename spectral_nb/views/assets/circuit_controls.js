const state = new Map(D.edges.map(e => [e.id, true]));
let carry = 0, allFlow = 0, last = '';
const upTo = new Map();  // edge -> share of the flow that is shown before it
for (const e of D.edges) allFlow += weightOf(e);
for (const e of D.edges) { upTo.set(e.id, carry / allFlow); carry += weightOf(e); }  // the strongest first
const shown = e => (!hasFlow || (upTo.get(e.id) < +$('flow').value - 1e-6 && weightOf(e) > 0)) && e.count >= +$('count').value && (e.share === null || e.share >= +$('share').value - 1e-9);
function apply() {
  $('count-value').value = $('count').value;
  $('share-value').value = Math.round(100 * $('share').value) + ' %';
  $('flow-value').value = Math.round(100 * $('flow').value) + ' %';
  const used = new Set(), changed = [];
  for (const e of D.edges) {
    const on = shown(e);
    if (on) used.add(e.from).add(e.to);
    if (on !== state.get(e.id)) { state.set(e.id, on); changed.push({id: e.id, hidden: !on}); rowOf.get(e.id).hidden = !on; }
  }
  if (changed.length) { edges.update(changed); nodes.update(D.nodes.map(n => ({id: n.id, hidden: !used.has(n.id)}))); }
  const n = [...state.values()].filter(Boolean).length, components = new Set(D.nodes.filter(d => used.has(d.id)).map(d => d.label)).size;
  const carried = D.edges.filter(e => state.get(e.id)).reduce((s, e) => s + weightOf(e), 0);
  $('status').textContent = n + ' of ' + D.edges.length + ' edges, ' + components + ' components' +
    (hasFlow ? ', which carry ' + Math.round(100 * carried / allFlow) + ' % of the flow' : '');
  const now = [...used].sort().join();
  if (hasFlow && now !== last) { last = now; nodes.update(arranged(used)); fit(); }
}
let chosen = null;
function showEdge(id) {
  const e = byId.get(id), views = e.rows.length ? promptViews(e) : [];
  if (chosen !== null) rowOf.get(chosen).className = '';
  rowOf.get(chosen = id).className = 'chosen';
  const what = $('by').value === 'all' ? 'all traced edges' : 'this edge';
  const note = views.length ? views.length + ' of ' + e.count + ' prompts, the largest contributions first. Orange: contribution of ' + what +
    ' through that token. Underlined: where the head attends from (orange) and to (blue).' : 'This graph was saved without its prompts.';
  $('panel').replaceChildren(make('h2', edgeName(e)), edgeFacts(e), make('p', note, 'note'), ...views);
  $('panel').scrollTop = 0;
}
function edgeRow(e, values) {
  const row = make('tr'), cell = make('td'), button = make('button', edgeName(e) + (e.role ? ' (' + e.role + ')' : ''));
  button.type = 'button';
  button.onclick = () => choose(e.id);
  cell.append(button);
  row.append(cell);
  return cells(row, values);
}
function showNode(id) {
  const n = nodeById.get(id), table = make('table');
  for (const e of D.edges) if ((e.from === id || e.to === id) && state.get(e.id)) table.append(edgeRow(e, [e.count, e.mean]));
  $('panel').replaceChildren(make('h2', placed(n)), nodeFacts(n), table);
}
function choose(id) { network.selectEdges([id]); showEdge(id); }
network.on('click', p => { if (p.nodes.length) showNode(p.nodes[0]); else if (p.edges.length) showEdge(p.edges[0]); });
for (const e of D.edges) { const row = edgeRow(e, [e.count, e.mean, e.share, e.slices]); rowOf.set(e.id, row); $('list').append(row); }
for (const id of ['title', 'note', 'foot']) $(id).textContent = D.meta[id];
$('ring').hidden = !D.nodes.some(n => n.known);
for (const k of Object.keys(KIND)) if (D.edges.some(e => kindOf(e) === k)) {
  const mark = make('span'), line = make('i');
  line.style.background = COLOR[k];
  mark.append(line, KIND[k]);
  $('kinds').append(mark, ' ');
}
$('flow-bar').hidden = !hasFlow;
if (hasFlow) { $('flow').step = 'any'; $('flow').value = innerWidth < 500 && D.edges.length > 24 ? Math.min(D.meta.flow, upTo.get(D.edges[24].id)) : D.meta.flow; $('width').textContent = 'width: flow'; }
$('count').max = most;
for (const id of ['count', 'share', 'flow']) $(id).addEventListener('input', apply);
$('by').addEventListener('change', () => { if (chosen !== null) showEdge(chosen); });
$('fit').onclick = fit;
addEventListener('resize', fit);
apply();
fit();
window.circuit = {data: D, nodes, edges, network, choose, visible: () => D.edges.filter(e => state.get(e.id)).map(e => e.id)};
