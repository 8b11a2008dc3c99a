"What a trace and a survey hold at once: score maps are counted while they live, nothing here measures time."

import gc

import pytest
import torch

from spectral_nb.dev.timing import random_gpt2, random_prompts
from spectral_nb.survey.classes import capability_survey
from spectral_nb.tracing import recursion

LENGTH, HEADS, LAYERS = 48, 2, 6


@pytest.fixture(scope="module")
def model():
    return random_gpt2(LAYERS, HEADS, 8, n_ctx=LENGTH, d_vocab=40, sharpness=4.0)


@pytest.fixture(scope="module")
def batch():
    return random_prompts(2, LENGTH, 40)


def most_alive(model, call) -> int:
    "The largest number of maps [prompt, head, q_pos, k_pos] that hold memory of their own when a layer ends."
    counts, shape = [], (2, HEADS, LENGTH, LENGTH)

    def count(value, hook):
        maps = [t for t in gc.get_objects() if type(t) is torch.Tensor and tuple(t.shape) == shape]
        counts.append(len({t.data_ptr() for t in maps}))

    names = [f"blocks.{layer}.hook_resid_post" for layer in range(LAYERS)]
    with model.hooks(fwd_hooks=[(name, count) for name in names]):
        call()
    assert counts  # a pass was seen
    return max(counts)


def test_a_whole_capture_is_seen_by_the_count(model, batch):
    from spectral_nb.attention.activations import capture

    assert most_alive(model, lambda: capture(model, batch)) >= 2 * (LAYERS - 1)
    for block in model.blocks:
        block.attn._pattern = None  # what TransformerLens keeps of a pass that is not ours


def test_trace_and_survey_hold_the_maps_of_one_layer(model, batch):
    roots = [(LAYERS - 1, h) for h in range(HEADS)]
    assert most_alive(model, lambda: recursion.trace(model, batch, roots)) <= 2  # scores, and after the softmax
    assert most_alive(model, lambda: capability_survey(model, batch, batch_size=2)) <= 2


def test_a_trace_whose_outputs_do_not_fit_is_the_same(model, batch, monkeypatch):
    roots = [(LAYERS - 1, h) for h in range(HEADS)]
    whole = recursion.trace(model, batch, roots)
    monkeypatch.setattr(recursion, "_ROOM", 1 << 14)
    parts = recursion.trace(model, batch, roots)
    keys = ["prompt", "layer", "head", "q_pos", "k_pos", "token", "upstream"]
    whole, parts = (t.sort_values(keys, ignore_index=True) for t in (whole, parts))
    assert len(whole) and whole[keys].astype(str).equals(parts[keys].astype(str))
    assert (whole.contribution - parts.contribution).abs().max() < 1e-4 * whole.contribution.abs().max()
