function tint(value, top) {
  const a = top > 0 ? Math.min(1, Math.abs(value) / top) : 0;
  return a === 0 ? '' : (value > 0 ? 'rgba(230,159,0,' : 'rgba(86,180,233,') + (0.15 + 0.75 * a).toFixed(3) + ')';
}
const size = rows => rows.reduce((s, r) => s + r[4], 0);              // a row: prompt, q_pos, k_pos, position, contribution, share, slices, attention
function promptView(id, rows, values, top) {
  const box = make('div', undefined, 'prompt'), q = new Set(rows.map(r => r[1])), k = new Set(rows.map(r => r[2])), first = rows[0];
  const said = ['contribution ' + num(size(rows)), 'share ' + num(first[5]), 'attention ' + num(first[7]), num(first[6]) + ' slices'];
  box.append(make('small', 'prompt ' + id + ': ' + said.filter(s => !s.includes('\u2013')).join(', ')));
  D.prompts[id].forEach((text, t) => {
    if (text.startsWith(' ') && t) box.append(' ');
    const s = make('span', text.trim() || '\u23ce', 'tok' + (q.has(t) ? ' q' : '') + (k.has(t) ? ' k' : '')), value = values[t] || 0;
    s.style.background = tint(value, top);
    s.dataset.value = value;
    s.title = 'token ' + t + (value ? ', contribution ' + num(value) : '') + (q.has(t) ? ', destination' : '') + (k.has(t) ? ', source' : '');
    box.append(s);
  });
  return box;
}
function promptViews(e) {
  const rowsOf = {}, all = $('by').value === 'all';
  for (const r of e.rows) (rowsOf[r[0]] = rowsOf[r[0]] || []).push(r);
  const found = Object.entries(rowsOf).map(([id, rows]) => {
    const values = {};
    if (all) D.totals[id].forEach((x, t) => { values[t] = x; });
    else for (const r of rows) values[r[3]] = (values[r[3]] || 0) + r[4];
    return [id, rows, values];
  });
  const top = Math.max(0, ...found.flatMap(f => Object.values(f[2]).map(Math.abs)));
  return found.sort((a, b) => size(b[1]) - size(a[1])).map(f => promptView(f[0], f[1], f[2], top));
}
