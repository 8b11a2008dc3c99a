const nodes = new vis.DataSet(D.nodes.map(n => ({id: n.id, label: n.label, x: n.x, y: n.y, title: tip(placed(n), nodeFacts(n)), borderWidth: n.known ? 3 : 1,
  color: {background: '#fff', border: n.known ? '#009e73' : '#7d8797',
          highlight: {background: '#fff3d6', border: '#1c2430'}, hover: {background: '#f5f7fa', border: '#1c2430'}}})));
const edges = new vis.DataSet(D.edges.map(e => ({id: e.id, from: e.from, to: e.to, width: 0.8 + 6 * weightOf(e) / widest, title: tip(edgeName(e), edgeFacts(e)),
  color: {color: COLOR[kindOf(e)], highlight: '#1c2430', hover: COLOR[kindOf(e)], opacity: 0.4 + 0.5 * weightOf(e) / widest}})));
const network = new vis.Network($('graph'), {nodes, edges}, {
  physics: false, layout: {randomSeed: 1}, autoResize: false,
  nodes: {shape: 'box', margin: hasFlow ? 4 : 6, font: {size: hasFlow ? 18 : 15, color: '#1c2430'}, shapeProperties: {borderRadius: 9}},
  edges: {arrows: {to: {enabled: true, scaleFactor: 0.5}}, smooth: {enabled: true, type: 'curvedCW', roundness: 0.12}, selectionWidth: 1.5, hoverWidth: 1.2},
  interaction: {hover: true, tooltipDelay: 120, hideEdgesOnDrag: D.edges.length > 800}});
let [left, right, top_, bottom] = D.box, layers = D.layers, roles = D.roles;
network.on('beforeDrawing', c => {
  c.save();
  const seen = network.DOMtoCanvas({x: 4, y: 0}).x, inside = seen > left - 90;  // where the left is cut off, names stay in sight
  c.textAlign = inside ? 'left' : 'right'; c.font = '15px system-ui, sans-serif';
  layers.forEach((l, i) => {
    if (i % 2 === 0) { c.fillStyle = '#f5f7fa'; c.fillRect(left, l.top, right - left, l.bottom - l.top); }
    c.fillStyle = '#5c6675'; c.fillText(l.name, inside ? seen : left - 8, (l.top + l.bottom) / 2 + 5);
  });
  c.textAlign = 'center'; c.font = '600 16px system-ui, sans-serif'; c.strokeStyle = '#d9dee6'; c.lineWidth = 1; c.fillStyle = '#1c2430';
  roles.forEach(r => { c.beginPath(); c.moveTo(r.left, top_); c.lineTo(r.left, bottom); c.stroke(); c.fillText(r.name, r.x, bottom + 24); });
  c.restore();
});
function fit() {
  const width = right - left + 130, height = bottom - top_ + 70, box = $('graph'), w = box.clientWidth, least = hasFlow ? w < 500 ? 0.45 : 0.5 : 0;
  const wide = Math.max(Math.min(1.6, w / width), least), room = Math.max(380, (hasFlow ? 0.9 : 0.76) * innerHeight);
  const h = Math.round(Math.max(260, Math.min(wide * height, room))), scale = Math.max(Math.min(wide, h / height), least);
  box.style.height = h + 'px';
  network.setSize(w + 'px', h + 'px');
  const x = scale * width > w + 1 ? right + 12 - w / 2 / scale : (left + right) / 2 - 50;  // roots stand on the right
  network.moveTo({position: {x, y: (top_ + bottom) / 2 + 14}, scale});
  network.redraw();
}
