"Flow from the roots of a trace, against a literal recursion, and what it must add up to."

import numpy as np
import pytest
from conftest import random_tokens
from test_svt import firing_roots, peaked, toy_batch

from spectral_nb.models.planted_circuits import PLANTED, planted
from spectral_nb.tracing.flow import trace_flow
from spectral_nb.tracing.options import TraceOptions
from spectral_nb.tracing.recursion import trace_tables


def literal(edges, firings, weights, parts=(0.5, 0.5, 0.0)):
    "Every path from a root, one after the other: importance of (prompt, layer, head, q_pos, k_pos), flow by edge row."
    at, flow, importance = {}, np.zeros(len(edges)), {}
    for f in firings.itertuples():
        at.setdefault((f.prompt, f.layer, f.head, f.q_pos), []).append((f.k_pos, f.attention))
    rows, part = {}, dict(zip(("query", "key", "value"), parts))
    for n, e in enumerate(edges.itertuples()):
        rows.setdefault((e.prompt, e.layer, e.head, e.q_pos, e.k_pos), []).append((n, e))

    def visit(firing, amount):
        importance[firing] = importance.get(firing, 0.0) + amount
        for n, e in rows.get(firing, []):
            flow[n] += amount * part[e.kind] * e.share
            node = (e.prompt, e.upstream_layer, e.upstream_head, e.position)
            total = sum(a for _, a in at.get(node, []))
            for k, a in at.get(node, []):
                visit((*node, k), amount * part[e.kind] * e.share * a / total)

    for f, w in zip(firings.itertuples(), weights):
        if f.root:
            visit((f.prompt, f.layer, f.head, f.q_pos, f.k_pos), w)
    return flow, importance


@pytest.mark.parametrize("components", ["heads", "all"])
@pytest.mark.parametrize("threshold", [0.2, 0.4])
def test_flow_is_the_literal_recursion_and_nothing_is_lost(threshold, components):
    model = peaked("gpt2", 3, seed=1)
    batch = toy_batch(random_tokens(4, 9), [9, 9, 7, 8])
    options = TraceOptions(threshold=threshold, components=components)
    edges, firings = trace_tables(model, batch, firing_roots(model, batch, options), options)
    for weights in (np.ones(len(firings)), np.random.default_rng(0).random(len(firings))):
        flow = trace_flow(edges, firings.assign(weight=weights))
        expected, importance = literal(edges, firings, weights)
        np.testing.assert_allclose(flow.edges["flow"], expected, rtol=1e-6, atol=1e-12)
        found = flow.firings.set_index(["prompt", "layer", "head", "q_pos", "k_pos"])["importance"]
        assert all(abs(found[key] - value) < 1e-9 for key, value in importance.items())
        root = weights[firings["root"].to_numpy(bool)].sum()
        assert flow.ends.sum() == pytest.approx(root)
        assert flow.ends["not followed"] == pytest.approx(flow.firings["kept"].sum())
        assert flow.unfired >= -1e-9  # kept is negative where others push against the significant heads
    out = flow.edges.groupby(["prompt", "layer", "head", "q_pos", "k_pos"])["flow"].sum()
    halves = flow.edges.groupby(["prompt", "layer", "head", "q_pos", "k_pos"])["share"].sum() / 2
    np.testing.assert_allclose(out, halves * found[out.index], rtol=1e-5)
    assert (edges["layer"] < 2).any() and flow.edges["flow"].max() > 0.1


@pytest.mark.parametrize("components", ["heads", "all"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_flow_through_three_sides_is_the_literal_recursion(architecture, components):
    model = peaked(architecture, 3, seed=1)
    batch = toy_batch(random_tokens(4, 9), [9, 9, 7, 8])
    options = TraceOptions(threshold=0.2, components=components, values=True)
    edges, firings = trace_tables(model, batch, firing_roots(model, batch, options), options)
    flow = trace_flow(edges, firings)
    assert set(edges["kind"]) == {"query", "key", "value"} and (edges["layer"] < 2).any()
    expected, importance = literal(edges, firings, firings["weight"], (1 / 3, 1 / 3, 1 / 3))
    np.testing.assert_allclose(flow.edges["flow"], expected, rtol=1e-5, atol=1e-9)
    found = flow.firings.set_index(["prompt", "layer", "head", "q_pos", "k_pos"])["importance"]
    assert all(abs(found[key] - value) < 1e-5 * max(1, abs(value)) for key, value in importance.items())
    np.testing.assert_allclose(firings["importance"], flow.firings["importance"], rtol=1e-4, atol=1e-7)
    assert flow.ends.sum() == pytest.approx(firings["weight"].sum())
    if components == "all":
        assert flow.ends["embeddings"] > 0 and flow.ends["MLPs"] > 0
    else:
        assert flow.ends[["embeddings", "biases", "MLPs"]].sum() == 0


@pytest.mark.parametrize("name", [n for n in PLANTED if n != "values"])
def test_planted_circuits_get_all_the_flow(name):
    p = planted(name, 3)
    edges, firings = trace_tables(p.model, p.batch, p.roots)
    flow = trace_flow(edges, firings)
    circuit = {pair for pair in p.heads if pair not in p.distractors}
    assert set(zip(flow.heads["layer"], flow.heads["head"])) == circuit
    by_heads = trace_flow(edges, p.roots)
    np.testing.assert_allclose(by_heads.edges["flow"], flow.edges["flow"])


def test_a_path_through_values_gets_a_third_at_each_step():
    p = planted("values", 3)
    edges, firings = trace_tables(p.model, p.batch, p.roots, values=True)
    flow = trace_flow(edges, firings)
    effect = flow.heads.set_index(["layer", "head"])["effect"] / firings["weight"].sum() * 3
    expected = {(2, 1): 1, (1, 2): 1 / 3, (0, 0): 1 / 9, (0, 1): 1 / 9}
    assert effect.to_dict() == {k: pytest.approx(v, rel=1e-4) for k, v in expected.items()}
    halves = trace_flow(edges, firings, value_part=0.5).heads.set_index(["layer", "head"])["effect"]
    assert halves[0, 1] == pytest.approx(halves[2, 1] / 4) and halves[0, 0] == pytest.approx(halves[2, 1] / 8)


def test_bad_input():
    p = planted("inhibition", 2)
    edges, firings = trace_tables(p.model, p.batch, p.roots)
    for bad in (edges.drop(columns="share"), edges.drop(columns="attention")):
        with pytest.raises(ValueError, match="share|attention"):
            trace_flow(bad, firings)
    with pytest.raises(ValueError, match="roots"):
        trace_flow(edges, firings.assign(root=False))
    with pytest.raises(ValueError, match="lacks"):
        trace_flow(edges, firings[firings["root"].astype(bool)])
