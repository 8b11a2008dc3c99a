"Attribution patching against finite differences and exact ablation; faithfulness by hand."

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES
from scipy.stats import spearmanr
from test_causal import toy_batch

from spectral_nb.attention.activations import capture
from spectral_nb.attention.components import centred, read_gain
from spectral_nb.causal.ablation import ablate_heads, reference_outputs
from spectral_nb.causal.attribution import attribute_heads
from spectral_nb.causal.edge_attribution import attribute_edges
from spectral_nb.causal.edge_cuts import cut_edges
from spectral_nb.causal.head_effects import single_heads
from spectral_nb.causal.metrics import evaluate
from spectral_nb.causal.set_tests import ablation_test
from spectral_nb.causal.rankings import SIZES, faithfulness
from spectral_nb.models.architectures import ArchSpec
from spectral_nb.models.heads import as_written, head_weights


def gated_metric(model, batch, reference, layer, head, level, metric):
    "Mean metric with one head's output moved from its mean to itself by `level`."

    def gate(z, hook):
        mean = reference.mean[layer, head].to(z)
        return z.index_copy(2, torch.tensor([head]), (mean + level * (z[:, :, head] - mean))[:, :, None])

    with model.hooks(fwd_hooks=[(f"blocks.{layer}.attn.hook_z", gate)]):
        return evaluate(model, batch, metric).mean()


@pytest.mark.parametrize("metric", ["logit_diff", "loss"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_atp_is_the_derivative(tiny_model, architecture, metric):
    "The slope of the metric where a head's output moves towards its mean, by central differences."
    model, batch = tiny_model(architecture), toy_batch(8)
    reference, step = reference_outputs(model, batch), 0.01
    table = attribute_heads(model, batch, "atp", metric, batch_size=3).set_index(["layer", "head"]).effect
    heads = ((1, 0), (1, 1), (1, 3))  # experts are chosen: the metric jumps where a choice changes after layer 0
    for layer, head in heads if architecture == "olmoe" else ((0, 0), (0, 1), *heads):
        up, down = (gated_metric(model, batch, reference, layer, head, 1 + d, metric) for d in (step, -step))
        slope = (up - down) / (2 * step) * (-1 if metric == "loss" else 1)
        assert table[layer, head] == pytest.approx(slope, rel=0.03, abs=5e-5)
    assert table.abs().max() > 1e-3


def test_integrated_attributions_add_up(tiny_model):
    "With many steps they sum to what ablating all heads costs, to the error of the midpoint rule."
    model, batch = tiny_model("gpt2"), toy_batch(8)
    every = [(layer, head) for layer in range(2) for head in range(4)]
    with ablate_heads(model, every, "mean", batch):
        lost = (evaluate(model, batch, "logit_diff"),)
    lost = (evaluate(model, batch, "logit_diff") - lost[0]).mean()
    errors = [abs(attribute_heads(model, batch, "atp-ig", steps=steps)["effect"].sum() - lost) for steps in (1, 4, 64)]
    assert errors[2] < 0.02 * abs(lost) and errors[2] < errors[0]


def test_exact_is_single_heads(tiny_model):
    model, batch = tiny_model("llama"), toy_batch(8)
    one = attribute_heads(model, batch, "exact", "accuracy")
    other = single_heads(model, batch, "accuracy", mode="mean", reference=batch)
    np.testing.assert_allclose(one["effect"], other["effect"])
    atp = attribute_heads(model, batch)
    assert (atp["ci_low"] <= atp["effect"]).all() and list(atp) == list(one)


def test_faithfulness_ends_and_areas(tiny_model):
    model, batch = tiny_model("gpt2"), toy_batch(12)
    ranking = attribute_heads(model, batch, "exact")
    result = faithfulness(model, batch, ranking)
    table = result.table.set_index("share")
    assert table.f[0.0] == 0 and table.f[1.0] == 1
    assert list(table.index) == sorted(SIZES) and table.n_heads.tolist() == [round(8 * s) for s in SIZES]
    order = list(ranking.sort_values("effect", ascending=False)[["layer", "head"]].itertuples(index=False, name=None))
    with ablate_heads(model, order[4:], "mean", batch):
        half = evaluate(model, batch, "logit_diff").mean()
    assert table.metric[0.5] == pytest.approx(half)
    assert result.cpr.estimate == pytest.approx(np.trapezoid(table.f, table.index))
    assert result.cmd.estimate == pytest.approx(np.trapezoid(np.abs(1 - table.f), table.index))
    assert faithfulness(model, batch, order).cpr.estimate == pytest.approx(result.cpr.estimate)
    with pytest.raises(ValueError, match="missing are L1H3|more"):
        faithfulness(model, batch, order[:-1])
    with pytest.raises(ValueError, match="effect"):
        faithfulness(model, batch, ranking.drop(columns="effect"))
    with pytest.raises(ValueError, match="method"):
        attribute_heads(model, batch, "gradient")


def kept_scales(model, batch, layer):
    "Hooks that keep the scales of a layer's QK-norm, where it has one, as the unchanged pass has them."
    names = [f"blocks.{layer}.attn.{side}_norm.hook_scale" for side in "qk"]
    _, cache = model.run_with_cache(batch.tokens, names_filter=lambda n: n in names)
    return [(name, lambda scale, hook: cache[hook.name]) for name in names if name in cache]


def edge_cut(model, batch, reference, edge, by, scales=False):
    """Mean logit difference where a reader's query, key or value loses `by` of what an upstream head adds to it.

    With `scales`, what a QK-norm divides by stays as it was."""
    up_layer, up, layer, reader, kind = edge
    acts, w = capture(model, batch, logits=False), head_weights(model, layer)
    delta = (acts.z[up_layer] - reference.mean[up_layer])[:, :, up] @ head_weights(model, up_layer).W_O[up]
    after = None if acts.out_scale is None else acts.out_scale[up_layer]
    delta = as_written(model, up_layer, delta, after)
    delta = delta - delta.mean(-1, keepdim=True) if centred(ArchSpec.from_model(model)) else delta
    read = delta * read_gain(model, layer) / acts.ln_scale[layer].unsqueeze(-1)

    def cut(x, hook):
        W = getattr(w, f"W_{kind[0].upper()}")
        x = x.clone()
        x[:, :, reader] -= by * (read @ W[reader * (len(W) // x.shape[2])])
        return x

    kept = kept_scales(model, batch, layer) if scales else []
    with model.hooks(fwd_hooks=[(f"blocks.{layer}.attn.hook_{kind[0]}", cut), *kept]):
        return evaluate(model, batch, "logit_diff").mean()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_attribution_of_edges_is_the_derivative_of_cutting_them(tiny_model, architecture):
    model, batch = tiny_model(architecture), toy_batch(8)
    reference, step = reference_outputs(model, batch), 0.02
    table = attribute_edges(model, batch, batch_size=3)
    assert set(table.upstream_layer) == {0} and set(table.layer) == {1} and set(table.kind) == {"query", "key", "value"}
    for kind, edges in table.groupby("kind"):
        for e in edges.sort_values("effect", key=abs, ascending=False).head(3).itertuples():
            edge = (e.upstream_layer, e.upstream_head, e.layer, e.head, kind)
            down, up = (edge_cut(model, batch, reference, edge, by) for by in (step, -step))
            assert e.effect == pytest.approx((up - down) / (2 * step), rel=0.05, abs=2e-5), (kind, edge)


def test_edges_that_attribution_puts_first_cost_most(tiny_model):
    "Exact removal of a sample of edges of each kind orders them as attribution does, in a small random model."
    model, batch = tiny_model("gpt2"), toy_batch(12)
    reference, base = reference_outputs(model, batch), evaluate(model, batch, "logit_diff").mean()
    for method in ("atp", "atp-ig"):
        table = attribute_edges(model, batch, method)
        cost = [
            base - edge_cut(model, batch, reference, (e.upstream_layer, e.upstream_head, e.layer, e.head, e.kind), 1.0)
            for e in table.itertuples()
        ]
        assert spearmanr(table.effect, cost).statistic > 0.8


def test_edges_refuse_what_is_not_known(tiny_model):
    with pytest.raises(ValueError, match="method"):
        attribute_edges(tiny_model("gpt2"), toy_batch(4), "exact")


def swapped(model, batch, counter, heads):
    "Logit difference of every prompt with the outputs of `heads` taken from its own counterfactual, by plain hooks."
    names = [f"blocks.{layer}.attn.hook_z" for layer in range(model.cfg.n_layers)]
    _, cache = model.run_with_cache(counter.tokens, names_filter=lambda n: n in names)

    def swap(z, hook):
        mine = [h for layer, h in heads if f"blocks.{layer}.attn.hook_z" == hook.name]
        z = z.clone()
        z[:, :, mine] = cache[hook.name][:, :, mine]
        return z

    with model.hooks(fwd_hooks=[(name, swap) for name in names]):
        return evaluate(model, batch, "logit_diff")


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_counterfactuals_of_ones_own_replace_heads_prompt_by_prompt(tiny_model, architecture):
    "Every entry point, whatever the size of its batches, against plain hooks; other lengths and numbers are refused."
    model, batch = tiny_model(architecture), toy_batch(9)
    tokens = batch.tokens.clone()
    tokens[:, 2] = tokens[torch.arange(9).roll(1), 2]
    counter, base = replace(batch, tokens=tokens), evaluate(model, batch, "logit_diff")
    how = dict(mode="counterfactual", reference=counter)
    every = [(layer, head) for layer in range(2) for head in range(4)]
    alone = {h: (base - swapped(model, batch, counter, [h])).mean() for h in every}
    for size in (2, 256):
        table = single_heads(model, batch, "logit_diff", batch_size=size, **how).set_index(["layer", "head"]).effect
        assert table.to_dict() == pytest.approx(alone, abs=1e-5)
    assert np.ptp(list(alone.values())) > 1e-4
    exact = attribute_heads(model, batch, "exact", **how)
    np.testing.assert_allclose(exact["effect"], list(alone.values()), atol=1e-5)
    lost = (base - swapped(model, batch, counter, every)).mean()
    integrated = attribute_heads(model, batch, "atp-ig", steps=64, batch_size=4, **how)
    assert integrated["effect"].sum() == pytest.approx(lost, rel=0.03, abs=1e-4)
    assert faithfulness(model, batch, every, **how).table.metric[0] == pytest.approx((base.mean() - lost), abs=1e-5)
    result = ablation_test(model, batch, every[:2], "logit_diff", n_draws=1, **how)
    assert result.ablated.estimate == pytest.approx(swapped(model, batch, counter, every[:2]).mean(), abs=1e-5)
    edges = attribute_edges(model, batch, batch_size=2, **how)
    np.testing.assert_allclose(edges["effect"], attribute_edges(model, batch, **how)["effect"], atol=1e-5)
    with pytest.raises(ValueError, match="reference: has 4 prompts for 9"):
        attribute_heads(model, batch, mode="counterfactual", reference=counter.subset(slice(0, 4)))
    with pytest.raises(ValueError, match="reference: has 9 prompts of up to .* this pass 3 of"):
        with ablate_heads(model, every, "counterfactual", counter):
            evaluate(model, batch.subset(slice(0, 3)))
    with pytest.raises(ValueError, match="batch.task"):
        faithfulness(model, batch, every, mode="counterfactual")


@pytest.mark.parametrize("processing, architecture", [("raw", "gpt2"), *(("folded", a) for a in ARCHITECTURES)])
def test_cut_edges_are_whole_passes_without_them(tiny_model, processing, architecture):
    "Query, key and value edges against a hook at the side itself; batches of any size."
    model, batch = tiny_model(architecture, processing), toy_batch(6)
    reference, base = reference_outputs(model, batch), evaluate(model, batch, "logit_diff").mean()
    every = attribute_edges(model, batch)
    edges = every.groupby("kind").head(2)
    table = cut_edges(model, batch, edges, batch_size=4, reference=reference)
    for e in table.itertuples():
        edge = (e.upstream_layer, e.upstream_head, e.layer, e.head, e.kind)
        assert e.effect == pytest.approx(base - edge_cut(model, batch, reference, edge, 1.0, scales=True), abs=2e-5)
    assert table.effect.abs().max() > 1e-4 and (table.ci_low <= table.effect).all()
    with pytest.raises(ValueError, match="edges: layer 1 to 1"):
        cut_edges(model, batch, edges.assign(upstream_layer=1))
    with pytest.raises(ValueError, match="edges.kind"):
        cut_edges(model, batch, edges.assign(kind="keys"))
    with pytest.raises(ValueError, match="edges: is empty"):
        cut_edges(model, batch, edges.head(0))
