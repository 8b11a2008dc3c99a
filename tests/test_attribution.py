"Attribution patching against finite differences and exact ablation; faithfulness by hand."

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES
from test_causal import toy_batch

from spectral_nb.causal.ablation import ablate_heads, reference_outputs
from spectral_nb.causal.attribution import attribute_heads
from spectral_nb.causal.head_effects import single_heads
from spectral_nb.causal.metrics import evaluate
from spectral_nb.causal.rankings import SIZES, faithfulness


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
