const D = JSON.parse(document.getElementById('data').textContent);
function draw(id) {
  const v = D[id], element = document.getElementById(id);
  if (element.dataset.drawn) return;
  element.dataset.drawn = 'yes';
  CircuitsVis.render(id, CircuitsVis.AttentionHeads, v);
}
for (const id of Object.keys(D)) {
  const details = document.getElementById(id).closest('details');
  if (details) details.addEventListener('toggle', () => { if (details.open) draw(id); }); else draw(id);
}
