"What edges do to attention weights, against patterns of the model's own changed passes in float64."

import numpy as np
import pytest
import torch
from conftest import random_tokens
from test_svt import firing_roots, toy_batch
from test_values import precise

from spectral_nb.attention.activations import capture
from spectral_nb.attention.components import through_norm
from spectral_nb.attention.pairs import Pairs, pair_scores
from spectral_nb.causal.changes import Changes, change_hooks
from spectral_nb.models.architectures import ArchSpec
from spectral_nb.models.heads import head_weights
from spectral_nb.tracing.options import TraceOptions
from spectral_nb.tracing.recursion import trace
from spectral_nb.tracing.upstream import all_outputs
from spectral_nb.tracing.weight_parts import _all_scored, _turned, score_parts
from spectral_nb.tracing.written import upstream_outputs, written_hooks

STEP = 1e-4


def traced(model, how: str):
    batch = toy_batch(random_tokens(2, 7), [7, 6])
    options = TraceOptions(threshold=0.15, values=True, components="all", weights=how)
    return batch, trace(model, batch, firing_roots(model, batch, options), options)


def own_weights(model, batch, edges, part: float) -> np.ndarray:
    "The weight of every edge's firing when `part` of what its component wrote is taken from its query (or key)."
    hooks = written_hooks(edges)
    _, cache = model.run_with_cache(batch.tokens, names_filter=list(hooks.values()))
    acts = capture(model, batch)
    outputs = upstream_outputs(model, acts, edges, {c: cache[h] for c, h in hooks.items()})
    prompt, layer, head, pos = (
        torch.tensor(edges[c].to_numpy()).long() for c in ("prompt", "layer", "head", "position")
    )
    vector = torch.stack(
        [through_norm(model, a, o, acts.ln_scale[a, b, t]) for a, b, t, o in zip(layer.tolist(), prompt, pos, outputs)]
    )
    vector = -part * vector
    read, found = torch.tensor((edges["token"] == "source").to_numpy()) + 1, np.zeros(len(edges))
    changes = Changes(torch.arange(len(edges)), layer, head, pos, vector, read)

    def keep(pattern, hook):
        here = edges["layer"].to_numpy() == hook.layer()
        q, k = (torch.tensor(edges[c].to_numpy()).long()[here] for c in ("q_pos", "k_pos"))
        found[here] = pattern[torch.arange(len(edges))[here], head[here], q, k].double().numpy()

    names = [f"blocks.{i}.attn.hook_pattern" for i in sorted(edges["layer"].unique())]
    hooks = [*change_hooks(model, changes), *((n, keep) for n in names)]
    with torch.no_grad():
        model.run_with_hooks(batch.tokens[prompt], fwd_hooks=hooks)
    return found


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "llama"])
def test_parts_of_weights_are_those_of_the_models_own_pattern(architecture):
    "The gradient against a central difference; integrated gradients sum to the change of the weight; values have none."
    model = precise(architecture, torch.float64, "folded")
    batch, edges = traced(model, "gradient")
    _, integrated = traced(model, "integrated")
    value = (edges["kind"] == "value").to_numpy()
    assert edges.loc[value, ["score_part", "weight_part"]].isna().all(axis=None) and value.any()
    edges, integrated = edges[~value].reset_index(drop=True), integrated[~value].reset_index(drop=True)
    assert set(edges["kind"]) == {"query", "key"} and (edges["upstream_head"] < 0).any()
    exact = dict(rtol=1e-6, atol=1e-9) if architecture != "llama" else dict(rtol=1e-3, atol=1e-6)  # its norm: float32
    slope = (own_weights(model, batch, edges, -STEP) - own_weights(model, batch, edges, STEP)) / (2 * STEP)
    np.testing.assert_allclose(edges["weight_part"], slope, rtol=1e-4, atol=1e-7 if architecture != "llama" else 1e-3)
    whole = own_weights(model, batch, edges, 0.0)
    np.testing.assert_allclose(edges["attention"], whole, **exact)
    without = own_weights(model, batch, edges, 1.0)
    np.testing.assert_allclose(integrated["weight_part"], whole - without, **exact)
    assert np.abs(whole - without).max() > 1e-3
    assert np.abs(integrated["weight_part"] - edges["weight_part"]).max() > 1e-5


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_parts_of_all_components_sum_to_the_score(architecture):
    "Through either side, with the bias of queries or keys; the weight's gradient through a key is A(1 - A) times it."
    model, tokens = precise(architecture, torch.float64, "folded"), random_tokens(2, 6)
    acts, outputs = capture(model, tokens), all_outputs(model, tokens, 1).outputs
    pairs = Pairs(*(torch.tensor(v) for v in ([0, 1, 1], [1, 1, 1], [0, 3, 2], [5, 4, 3], [2, 0, 3])))
    w, factor = head_weights(model, 1), ArchSpec.from_model(model).score_scale
    both = {which: _all_scored(model, acts, 1, which) for which in "qk"}
    at = {"q": pairs.q_pos, "k": pairs.k_pos}
    vector = {which: both[which][pairs.prompt, pairs.head, at[which]] for which in "qk"}
    for source, mine, other, bias in ((False, "q", "k", w.b_Q), (True, "k", "q", w.b_K)):
        token = pairs.prompt * 6 + at[mine]
        found = sum(score_parts(model, acts, pairs, o[token], source) for o in outputs)
        constant = _turned(model, 1, bias.double()[pairs.head], at[mine])
        found = found.gather(1, pairs.k_pos[:, None])[:, 0] + factor * (constant * vector[other]).sum(-1)
        torch.testing.assert_close(found, pair_scores(acts, pairs).double(), rtol=1e-4, atol=1e-5)
    batch, edges = traced(model, "gradient")
    key = edges[edges["kind"] == "key"]
    expected = key["score_part"] * key["attention"] * (1 - key["attention"])
    np.testing.assert_allclose(key["weight_part"], expected, rtol=1e-5, atol=1e-9)


@pytest.mark.filterwarnings("ignore:trace. processing='raw'")
@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "bloom"])
def test_soft_caps_sinks_and_slopes(name):
    "A cap bends the scores, a sink takes attention from the keys, ALiBi adds to scores what no component wrote."
    from families import tiny_family

    from spectral_nb.models.loading import from_hf

    processing = "raw" if name == "gpt_oss" else "folded"
    model = from_hf(tiny_family(name), name=name, processing=processing)
    batch, edges = traced(model, "integrated")
    edges = edges[edges["kind"] != "value"].reset_index(drop=True)
    change = own_weights(model, batch, edges, 0.0) - own_weights(model, batch, edges, 1.0)
    np.testing.assert_allclose(edges["weight_part"], change, rtol=1e-3, atol=2e-5)


def test_options_are_checked():
    with pytest.raises(ValueError, match="weights"):
        TraceOptions(weights="integral")
