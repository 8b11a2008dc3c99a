"The control of the slices: removal against a changed forward pass, rankings against dot products by hand."

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import random_tokens
from test_svt import peaked, toy_batch

from spectral_nb.attention.activations import capture
from spectral_nb.attention.pairs import firings
from spectral_nb.attention.terms import slice_coordinates, slice_vectors
from spectral_nb.models.architectures import ArchSpec
from spectral_nb.tracing.control import (
    ControlOptions,
    by_prompt,
    control_summary,
    drawn,
    important,
    rankings,
    removed,
    slice_control,
    spread_readers,
)
from spectral_nb.tracing.upstream import head_outputs

ARCHITECTURES = ("gpt2", "gpt_neox", "llama")


def measured(architecture: str, layer: int = 2):
    "A peaked model, its activations, some firings of a layer and all outputs upstream."
    model = peaked(architecture, n_layers=3)
    batch = toy_batch(random_tokens(3, 9), [9, 7, 9])
    acts = capture(model, batch, logits=False)
    pairs = firings(acts, batch, 0.2)
    pairs = pairs[(pairs.layer == layer) & (pairs.q_pos != pairs.k_pos)]
    outputs = head_outputs(model, acts, layer).outputs
    return model, batch, acts, pairs[torch.arange(len(pairs))[:: max(1, len(pairs) // 5)]], outputs


def score_without(model, batch, pair, position, output):
    "The score in a pass whose stream before the layer lacks `output` at one token."
    prompt, layer, head, q_pos, k_pos = (int(t) for t in pair)

    def take(stream, hook):
        stream = stream.clone()
        stream[prompt, position] -= output
        return stream

    kept = {}

    def keep(scores, hook):
        kept["score"] = scores[prompt, head, q_pos, k_pos].item()

    names = [(f"blocks.{layer}.hook_resid_pre", take), (f"blocks.{layer}.attn.hook_attn_scores", keep)]
    with torch.no_grad():
        model.run_with_hooks(batch.tokens, fwd_hooks=names)
    return kept["score"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_removal_is_that_of_a_changed_pass(architecture):
    model, batch, acts, pairs, outputs = measured(architecture)
    assert len(pairs) >= 3
    found = removed(model, acts, pairs, slice_coordinates(model, acts, pairs), outputs)
    zero = torch.zeros(outputs.shape[-1])
    for n in range(len(pairs)):
        pair = [t[n] for t in pairs.tensors()]
        for side, position in enumerate((int(pairs.q_pos[n]), int(pairs.k_pos[n]))):
            before = score_without(model, batch, pair, position, zero)
            for component in range(0, len(outputs), 3):
                output = outputs[component, int(pairs.prompt[n]) * acts.x.shape[2] + position]
                fall = before - score_without(model, batch, pair, position, output)
                assert abs(float(found.recomputed[side, n, component]) - fall) < 2e-4 * max(1.0, abs(before), abs(fall))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rankings_are_dot_products_with_singular_vectors(architecture):
    model, _, acts, pairs, outputs = measured(architecture)
    found, truth = rankings(model, acts, pairs, outputs, ControlOptions(n_draws=2), torch.Generator().manual_seed(0))
    u, v, sigma = slice_vectors(model, acts, pairs)
    a, _, b = slice_coordinates(model, acts, pairs)
    spec = ArchSpec.from_model(model)
    assert list(found) == ["signal", "all", "random", "frozen"] and len(found["random"]) == 2
    for n in range(len(pairs)):
        prompt, layer = int(pairs.prompt[n]), int(pairs.layer[n])
        for side, (w, position, other) in enumerate(((u, pairs.q_pos[n], b), (v, pairs.k_pos[n], a))):
            o = outputs[:, prompt * acts.x.shape[2] + int(position)]
            o = o - o.mean(-1, keepdim=True) if "layernorm" in spec.norm else o
            along = o @ w[n, :-1] / acts.ln_scale[acts.index(layer), prompt, position]
            every = (along * sigma[n].sqrt()).sum(-1)
            torch.testing.assert_close(found["all"][0][side, n], every, atol=1e-4, rtol=1e-3)
            sign = torch.where(a[n] < 0, -1.0, 1.0)  # the vectors are oriented, the coordinates are not
            exact = spec.score_scale * (along * sigma[n] * other[n] * sign).sum(-1)
            torch.testing.assert_close(truth.frozen[side, n], exact, atol=1e-4, rtol=1e-3)


def test_random_sets_have_the_size_of_the_signal_set():
    mask, usable = torch.rand(200, 12) < 0.3, torch.rand(200, 12) < 0.9
    mask &= usable
    random = drawn(mask, usable, torch.Generator().manual_seed(1))
    assert (random.sum(1) == mask.sum(1)).all() and not (random & ~usable).any()
    assert (random != mask).any() and 0.2 < (random & mask).sum() / mask.sum() < 0.5


def test_a_ranking_by_the_truth_is_perfect_and_shares_are_met():
    fall = np.array([0.1, 2.0, -3.0, 1.0, 0.4])
    assert important(fall, 0.7).tolist() == [False, True, False, True, False]
    assert important(fall, 1.0).sum() == 4 and not important(-np.abs(fall), 0.7).any()


def test_the_table_of_a_model_and_its_summary():
    model, batch, acts, _, _ = measured("gpt2")
    p = firings(acts, batch, 0.2)
    table = pd.DataFrame({k: v for k, v in p.columns().items() if k != "name"})
    options = ControlOptions(batch_size=2, n_draws=3)
    found = slice_control(model, batch, table, options)
    assert set(found["ranking"]) == {"signal", "all", "random", "frozen"} and found["auc"].between(0, 1).all()
    assert (found["layer"] > 0).all() and (found["q_pos"] != found["k_pos"]).all()
    one = slice_control(model, batch, table, ControlOptions(batch_size=64, n_draws=3))
    keys = ["prompt", "layer", "head", "q_pos", "k_pos", "token", "ranking"]
    both = found.merge(one, on=keys, suffixes=("", "_one"))
    same = both[both["ranking"] != "random"]
    assert len(both) == len(found) == len(one) and np.allclose(same["auc"], same["auc_one"], atol=1e-6)
    summary = control_summary(found)
    mean = by_prompt(found, "auc")["signal"].mean()
    last = summary[(summary["reader"] == "all readers") & (summary["ranking"] == "signal")].iloc[0]
    assert last["auc"] == pytest.approx(mean) and last["auc_low"] <= mean <= last["auc_high"]
    readers = spread_readers(table, 3, 2)
    assert [layer for layer, _ in readers] == [1, 2]


def test_models_that_the_removal_does_not_fit_are_refused():
    model = peaked("olmoe", n_layers=2)
    with pytest.raises(ValueError, match="norms queries and keys"):
        slice_control(model, None, pd.DataFrame())
    with pytest.raises(ValueError, match="share"):
        ControlOptions(share=1.5)
