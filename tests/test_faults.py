"What broke under attack, one test a fault: a wrong model or batch is refused by every function that runs a model."

import tempfile
from dataclasses import replace

import pytest
import torch
from conftest import tiny_hf

from spectral_nb.attention import capture, component_outputs, head_participation, measure_slices, pr_integral
from spectral_nb.causal import (
    ablation_test,
    attribute_heads,
    evaluate,
    faithfulness,
    reference_outputs,
    run_changed,
    single_heads,
)
from spectral_nb.causal.changes import Changes
from spectral_nb.fingerprint import codeword_readout, head_ratios, key_attention
from spectral_nb.models.loading import from_hf, load_model
from spectral_nb.norms import find_circuit, measure_stream
from spectral_nb.norms.theories import theory_responses
from spectral_nb.prompts.tasks import make_batch
from spectral_nb.survey import capability_survey, expert_participation, removal_curve, screen_ablation
from spectral_nb.tracing import edge_interventions, find_roots, logit_attribution, set_interventions, trace
from spectral_nb.training import SpectralMonitor, evaluate_tasks
from spectral_nb.views import attention_page

HEADS = [(0, 0), (1, 1)]
ALL_HEADS = [(layer, head) for layer in range(3) for head in range(4)]


class Sound:
    "A shipped model, a batch, and what is made of them while the model is sound."

    def __init__(self, name: str):
        self.model = load_model(name)
        self.batch = make_batch("retrieval", self.model, 20, seed=1)
        self.edges = trace(self.model, self.batch.subset(slice(0, 4))).head(2) if name != "story-olmoe" else None
        self.stream = measure_stream(self.model, self.batch)


def change_of_one() -> Changes:
    one = torch.tensor([0])
    return Changes(one, one, one, one, torch.ones(1, 64))


# Every public function that runs a model over prompts
RUN = {
    "capture": lambda s, batch: capture(s.model, batch),
    "capture without logits": lambda s, batch: capture(s.model, batch, logits=False),
    "component_outputs": lambda s, batch: component_outputs(s.model, batch, 2),
    "head_participation": lambda s, batch: head_participation(s.model, batch),
    "measure_slices": lambda s, batch: measure_slices(s.model, batch),
    "evaluate": lambda s, batch: evaluate(s.model, batch),
    "evaluate accuracy": lambda s, batch: evaluate(s.model, batch, "accuracy"),
    "ablation_test": lambda s, batch: ablation_test(s.model, batch, HEADS, n_draws=1),
    "single_heads": lambda s, batch: single_heads(s.model, batch, heads=HEADS),
    "attribute_heads": lambda s, batch: attribute_heads(s.model, batch, mode="zero"),
    "faithfulness": lambda s, batch: faithfulness(s.model, batch, ALL_HEADS, mode="zero", sizes=[0.5]),
    "reference_outputs": lambda s, batch: reference_outputs(s.model, batch),
    "run_changed": lambda s, batch: run_changed(s.model, batch, torch.tensor([0]), change_of_one()),
    "codeword_readout": lambda s, batch: codeword_readout(s.model, batch, batch),
    "head_ratios": lambda s, batch: head_ratios(s.model, batch),
    "key_attention": lambda s, batch: key_attention(s.model, batch),
    "measure_stream": lambda s, batch: measure_stream(s.model, batch),
    "theory_responses": lambda s, batch: theory_responses(s.model, batch, s.stream, n_random=4),
    "capability_survey": lambda s, batch: capability_survey(s.model, batch, n_random=4, n_null=4),
    "removal_curve": lambda s, batch: removal_curve(s.model, batch, survey_table(), max_heads=2),
    "screen_ablation": lambda s, batch: screen_ablation(s.model, batch, HEADS, n_draws=1),
    "trace": lambda s, batch: trace(s.model, batch, [(2, 0)]),
    "find_roots": lambda s, batch: find_roots(s.model, batch),
    "logit_attribution": lambda s, batch: logit_attribution(s.model, batch),
    "edge_interventions": lambda s, batch: edge_interventions(s.model, batch, s.edges),
    "set_interventions": lambda s, batch: set_interventions(s.model, batch, s.edges, {"one": set_of(s.edges)}),
    "SpectralMonitor": lambda s, batch: SpectralMonitor(batch).measure(s.model),
    "attention_page": lambda s, batch: attention_page(
        s.model, batch, [(2, 0)], f"{tempfile.gettempdir()}/unwritten.html"
    ),
}
WITHOUT_BATCH = {
    "find_circuit": lambda s: find_circuit(s.model, "retrieval", 8),
    "evaluate_tasks": lambda s: evaluate_tasks(s.model, s.model.tokenizer, 4, tasks=("retrieval",)),
}


def set_of(edges) -> list:
    first = edges.iloc[0]
    return [(str(first.upstream), f"L{first.layer}H{first['head']}", str(first.role))]


def survey_table():
    import pandas as pd

    return pd.DataFrame(ALL_HEADS, columns=["layer", "head"]).assign(induction=range(12))


@pytest.fixture(scope="module")
def gpt2():
    return Sound("story-gpt2-s42")


@pytest.fixture(scope="module")
def neox():
    return Sound("story-neox")


@pytest.fixture
def broken(gpt2):
    "The same with one NaN in a weight, put there after loading."
    weight = gpt2.model.blocks[1].mlp.out.weight
    kept = weight.data[3, 4].item()
    weight.data[3, 4] = float("nan")
    yield gpt2
    weight.data[3, 4] = kept


@pytest.mark.parametrize("name", RUN)
def test_fault_1_one_nan_in_a_weight_is_refused_with_the_layer(name, broken):
    refusal = "edges: traced on weights" if name.endswith("interventions") else "layer [12]"  # of other weights, too
    with pytest.raises(ValueError, match=refusal):
        RUN[name](broken, broken.batch)


@pytest.mark.parametrize("name", WITHOUT_BATCH)
def test_fault_1_without_a_batch(name, broken):
    with pytest.raises(ValueError, match="layer [12]"):
        WITHOUT_BATCH[name](broken)


def test_fault_1_experts():
    model = load_model("story-olmoe")
    batch = make_batch("retrieval", model, 4, seed=1)
    expert_participation(model, batch)
    for name, p in model.named_parameters():
        if ".1." in name and "mlp" in name:
            p.data.view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match="layer [12]"):
        expert_participation(model, batch)


def test_fault_1_float16_overflow_is_refused():
    hf = tiny_hf("gpt2")
    with torch.no_grad():
        for part in (hf.transformer.h[0].mlp.c_fc, hf.transformer.h[0].mlp.c_proj):
            part.weight.mul_(6e4 / part.weight.abs().max())
    model = from_hf(hf.half(), processing="raw")
    tokens = torch.randint(1, 90, (2, 8), generator=torch.Generator().manual_seed(0))
    for logits in (True, False):
        with pytest.raises(ValueError, match="layer [01]"):
            capture(model, tokens, logits=logits)


@pytest.mark.parametrize("name", [n for n in RUN if n != "edge_interventions" and n != "set_interventions"])
@pytest.mark.parametrize("which", ["gpt2", "neox"])
def test_fault_2_prompts_longer_than_the_context_are_refused(name, which, request):
    sound = request.getfixturevalue(which)
    n_ctx = sound.model.cfg.n_ctx
    shape = len(sound.batch), n_ctx + 3
    tokens = torch.randint(10, 90, shape, generator=torch.Generator().manual_seed(0))
    end = torch.full((shape[0],), n_ctx + 2)
    positions = {"key": end - 5, "query": end, "end": end}
    words = [""] * shape[0]
    long = replace(
        sound.batch, tokens=tokens, attention_mask=tokens > 0, positions=positions, text=words, pad_token_id=0
    )
    with pytest.raises(ValueError, match=f"{n_ctx + 3} tokens"):
        RUN[name](sound, long)


@pytest.mark.parametrize("name", RUN)
def test_fault_2_ids_beyond_the_vocabulary_are_refused(name, gpt2):
    tokens = gpt2.batch.tokens.clone()
    tokens[3, 1] = gpt2.model.cfg.d_vocab + 5
    with pytest.raises(ValueError, match="vocab"):
        RUN[name](gpt2, replace(gpt2.batch, tokens=tokens))


def test_fault_2_a_checkpoint_without_tokens_is_refused():
    with pytest.raises(ValueError, match="tokens has values that are not finite"):
        pr_integral([1.0, 2.0, 3.0, 4.0], [0, 1, float("nan"), 3])


def test_fault_6_half_and_double_models_are_traced(tmp_path):
    for dtype in ("float64", "float16", "bfloat16"):
        model = load_model("story-gpt2-s42", dtype=dtype)
        batch = make_batch("retrieval", model, 6, seed=1)
        assert len(trace(model, batch)) and component_outputs(model, batch, 2).values.isfinite().all()
        assert head_participation(model, make_batch("retrieval", model, 20, seed=1)).isfinite().all()
        assert evaluate(model, batch).shape == (6,)
