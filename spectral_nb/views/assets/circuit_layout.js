const STEP = 76, ROW = 44, GAP = 22, WRAP = 4;
function arranged(used) {
  const cells = new Map(), depth = new Map(), width = new Map(), at = [];
  for (const n of D.nodes) if (used.has(n.id)) {
    const key = n.role + '|' + n.layer;
    if (!cells.has(key)) cells.set(key, []);
    cells.get(key).push(n);
  }
  for (const c of cells.values()) {
    const {layer, role} = c[0];
    depth.set(layer, Math.max(depth.get(layer) || 0, Math.ceil(c.length / WRAP)));
    width.set(role, Math.max(width.get(role) || 0, Math.min(c.length, WRAP) * STEP));
  }
  let x = 0, y = 0;
  layers = [...depth.keys()].sort((a, b) => a - b).map(layer => {
    const bottom = y;
    y -= depth.get(layer) * ROW + 10;
    return {name: layer < 0 ? 'embedding' : 'layer ' + layer, layer, bottom, top: y};
  });
  roles = D.roles.filter(r => width.has(r.name)).map(r => {
    const left = x, wide = Math.max(width.get(r.name), 9 * r.name.length) + GAP;
    x += wide;
    return {name: r.name, left, x: left + wide / 2};
  });
  const base = new Map(layers.map(l => [l.layer, l.bottom])), middle = new Map(roles.map(r => [r.name, r.x]));
  for (const c of cells.values()) c.forEach((n, i) => {
    const row = Math.floor(i / WRAP), inRow = Math.min(WRAP, c.length - row * WRAP), place = i - row * WRAP;
    at.push({id: n.id, x: middle.get(n.role) + (place - (inRow - 1) / 2) * STEP, y: base.get(n.layer) - 5 - (row + 0.5) * ROW - 6 * (place % 2)});
  });
  [left, right, top_, bottom] = [0, Math.max(x, 200), y, 0];
  return at;
}
