"Every supported family against Hugging Face, itself and literal definitions; the refused ones with what is wrong."

import copy
import logging
import os
from functools import cached_property

import numpy as np
import pytest
import torch
import transformers as tf
from conftest import random_tokens
from families import FAMILIES as CONFIGS
from families import tiny_family
from test_svt import Literal, as_dict, firing_roots, toy_batch

from spectral_nb.attention.activations import capture
from spectral_nb.attention.components import component_outputs, through_norm
from spectral_nb.attention.pairs import pair_scores, pairs_where, valid_pairs
from spectral_nb.attention.terms import slice_terms
from spectral_nb.models.architectures import ArchSpec
from spectral_nb.base.files import read_table
from spectral_nb.models.families import FAMILIES, SUPPORTED
from spectral_nb.models.family_table import FAULTS, family_table_path
from spectral_nb.models.heads import apply_rotation, head_weights, rotation
from spectral_nb.models.loading import from_hf, load_model
from spectral_nb.models.positions import alibi_slopes
from spectral_nb.norms.weight_files import weight_norms
from spectral_nb.norms.weights import model_weight_norms
from spectral_nb.tracing.interventions import edge_interventions
from spectral_nb.tracing.options import TraceOptions
from spectral_nb.tracing.projections import edge_vectors
from spectral_nb.tracing.recursion import trace

REFUSED = {"falcon": "grouped", "falcon-alibi": "twice", "gpt_bigcode-heads": "each query head"}
NAMES = [name for name in CONFIGS if name not in REFUSED]
ERRORS: dict[tuple[str, str], float] = {}  # (family, check) -> largest error, for the table
N_LAYERS, LENGTH = 3, 10


def note(name: str, check: str, error, limit: float) -> None:
    "Keep an error for the table; it must be below the limit."
    error = float(error)
    ERRORS[name, check] = max(error, ERRORS.get((name, check), 0.0))
    assert error < limit, f"{name}: {check} off by {error:.1e}"


class Case:
    "A family's tiny model: saved, loaded, run once."

    def __init__(self, name: str, folder):
        self.name, self.folder = name, folder / name
        self.hf = tiny_family(name)
        self.hf.save_pretrained(self.folder)
        self.processing = "raw" if FAMILIES[self.hf.config.model_type].unfolded else "folded"
        self.model = load_model(self.folder, processing=self.processing)
        self.spec = ArchSpec.from_model(self.model)
        self.tokens = random_tokens(4, LENGTH)
        self.lengths = [LENGTH, LENGTH - 2, LENGTH, LENGTH - 1]
        self.batch = toy_batch(self.tokens, self.lengths)

    @cached_property
    def reference(self):
        with torch.no_grad():
            return self.hf(self.tokens, output_attentions=True)

    @cached_property
    def cache(self):
        with torch.no_grad():
            return self.model.run_with_cache(self.tokens)[1]

    @cached_property
    def acts(self):
        return capture(self.model, self.tokens)

    @cached_property
    def edges(self):
        options = TraceOptions(threshold=0.35)
        return trace(self.model, self.batch, firing_roots(self.model, self.batch, options), options)

    def sinks(self, layer: int, head: int):
        "The logit that a head's softmax holds beside the keys, None for most families."
        attn = self.model.blocks[layer].attn.original_component
        return attn.sinks[head].double() if hasattr(attn, "sinks") else None


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    logging.getLogger().setLevel(logging.ERROR)
    made, folder = {}, tmp_path_factory.mktemp("families")
    return lambda name: made.setdefault(name, None) or made.update({name: Case(name, folder)}) or made[name]


def literal_head(case: Case, layer: int, head: int, x, scales):
    "(scores, pattern, z) of one head for inputs [pos d_model], in float64 and by the definition."
    w, spec, x = head_weights(case.model, layer), case.spec, x.double()
    sides = []
    for W, b, gain, scale in ((w.W_Q, w.b_Q, w.q_gain, scales[0]), (w.W_K, w.b_K, w.k_gain, scales[1])):
        v = x @ W[head].double() + b[head].double()
        v = v - v.mean(-1, keepdim=True) if spec.qk_norm == "heads" else v
        v = v if gain is None else v * gain[head].double() / scale.double()[:, None]
        if (turn := rotation(case.model, torch.arange(len(x)), layer)) is not None:
            v = apply_rotation(v, *(t.double() for t in turn), spec.rotary_interleaved)
        sides.append(v)
    scores, n = sides[0] @ sides[1].T * spec.score_scale, len(x)
    logits = scores.clone()
    if spec.positions == "alibi":
        logits += alibi_slopes(spec.n_heads)[head].double() * (torch.arange(n) - torch.arange(n)[:, None])
    if spec.soft_cap:
        logits = spec.soft_cap * torch.tanh(logits / spec.soft_cap)
    for i in range(n):
        for j in range(n):
            if j > i or (spec.window(layer) is not None and j <= i - spec.window(layer)):
                logits[i, j] = -torch.inf
    weights = logits.exp()
    sink = case.sinks(layer, head)
    pattern = weights / (weights.sum(-1, keepdim=True) + (0.0 if sink is None else sink.exp()))
    return scores, pattern, pattern @ (x @ w.W_V[head].double() + w.b_V[head].double())


def scales_of(case: Case, layer: int, prompt: int, head: int):
    "What the norms on a head's queries and keys divide by at every token."
    if case.acts.q_scale is None:
        return None, None
    return tuple(s[layer, prompt, :, head] for s in (case.acts.q_scale, case.acts.k_scale))


@pytest.mark.parametrize("name", NAMES)
def test_log_probabilities_and_attention_are_those_of_hugging_face(case, name):
    c = case(name)
    logits = c.model(c.tokens)
    error = (logits.log_softmax(-1) - c.reference.logits.log_softmax(-1)).abs().max()
    note(name, "log-probabilities", error, 2e-5)
    for layer in range(N_LAYERS):
        theirs = c.reference.attentions[layer]
        note(name, "attention", (c.acts.pattern[layer] - theirs).abs().max(), 2e-5)
        assert theirs.std() > 0.05  # far from uniform


@pytest.mark.parametrize("name", NAMES)
def test_every_head_is_its_definition(case, name):
    "Scores, pattern and output of every head, from weights alone; the pattern against Hugging Face's."
    c = case(name)
    for layer, head in np.ndindex(N_LAYERS, c.spec.n_heads):
        scores, pattern, z = literal_head(c, layer, head, c.acts.x[layer, 0], scales_of(c, layer, 0, head))
        seen = valid_pairs(c.acts, layer)[0]
        size = scores[seen].abs().max()
        note(name, "scores", (c.acts.scores[layer, 0, head] - scores)[seen].abs().max() / size, 1e-5)
        note(name, "attention", (c.reference.attentions[layer][0, head] - pattern).abs().max(), 2e-5)
        note(name, "head outputs", (c.acts.z[layer, 0, :, head] - z).abs().max() / z.abs().max(), 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_slices_sum_to_the_scores(case, name):
    c = case(name)
    pairs = pairs_where(c.acts, torch.ones_like(c.acts.pattern, dtype=torch.bool))
    assert set(pairs.layer.tolist()) == {0, 1, 2}
    terms, scores = slice_terms(c.model, c.acts, pairs), pair_scores(c.acts, pairs) / c.spec.score_scale
    note(name, "slices", ((terms.sum(1) - scores).abs() / terms.abs().sum(1)).max(), 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_components_sum_to_the_stream_and_to_what_heads_read(case, name):
    c = case(name)
    for layer in range(N_LAYERS + 1):
        parts = component_outputs(c.model, c.tokens, layer)
        end = f"blocks.{layer}.hook_resid_pre" if layer < N_LAYERS else f"blocks.{layer - 1}.hook_resid_post"
        stream = c.cache[end]
        note(name, "components", (parts.values.sum(0) - stream).abs().max() / stream.abs().max(), 1e-5)
        if layer < N_LAYERS:
            read = through_norm(c.model, layer, parts.values, c.acts.ln_scale[layer]).sum(0)
            bias = dict(c.model.blocks[layer].ln1.named_parameters()) if c.spec.norm_before else {}
            x = c.acts.x[layer] - bias.get("_original_component.bias", torch.zeros(1))
            note(name, "read inputs", (read - x).abs().max() / x.abs().max(), 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_values_through_the_pattern_sum_to_what_attention_wrote(case, name):
    "Pattern times value inputs through W_V and W_O, written, summed over heads and source tokens."
    c = case(name)
    for layer in range(N_LAYERS):
        parts = component_outputs(c.model, c.tokens, layer + 1)
        heads = [i for i, label in enumerate(parts.labels) if label.startswith(f"L{layer}H")]
        w = head_weights(c.model, layer)
        values = torch.einsum("bjm,hmd->bhjd", c.acts.x[layer], w.W_V) + w.b_V[:, None]
        z = torch.einsum("bhij,bhjd->bihd", c.acts.pattern[layer], values)
        out = torch.einsum("bihd,hdm->bim", z, w.W_O) + w.b_O
        if c.spec.norm_after:
            norm = c.model.blocks[layer].ln1_post.original_component
            gain = norm.weight + 1.0 if c.spec.gains_from_one else norm.weight
            out = out / c.acts.out_scale[layer][..., None] * gain
        out = out * c.spec.write_scale
        mine = parts.values[heads].sum(0) + parts.values[parts.labels.index(f"L{layer}.bias")]
        note(name, "value sums", (mine - out).abs().max() / out.abs().max(), 1e-5)


class General(Literal):
    "Algorithm 1 with what a family adds to scores, norms and outputs."

    def omega(self, layer, head, offset):
        key = (layer, head, offset if self.spec.rotates(layer) else 0)
        if key not in self.svd:
            w, d = self.weights[layer], self.spec.d_head
            Q, K = (torch.cat([W[head], b[head][None]]).double() for W, b in ((w.W_Q, w.b_Q), (w.W_K, w.b_K)))
            if self.spec.qk_norm == "heads":
                Q, K = Q - Q.mean(1, keepdim=True), K - K.mean(1, keepdim=True)
            if w.q_gain is not None:
                Q, K = Q * w.q_gain[head].double(), K * w.k_gain[head].double()
            R = torch.eye(d, dtype=torch.float64)
            if (turn := rotation(self.model, torch.tensor([abs(offset)]), layer)) is not None:
                R = apply_rotation(R, *(t.double() for t in turn), self.spec.rotary_interleaved)
                R = R.T if offset >= 0 else R
            U, S, Vh = np.linalg.svd((Q @ R @ K.T).numpy())
            r = min(d, len(S))
            self.svd[key] = U[:, :r], S[:r], Vh[:r].T
        return self.svd[key]

    def norm_scale(self, which, b, layer, head, t):
        if self.spec.qk_norm != "heads":
            return super().norm_scale(which, b, layer, head, t)
        w = self.weights[layer]
        W, bias = (w.W_Q, w.b_Q) if which == "q" else (w.W_K, w.b_K)
        q = self.inputs(layer)[b, t] @ W[head].double().numpy() + bias[head].double().numpy()
        return np.sqrt(q.var() + self.model.original_model.config.layer_norm_eps)

    def inputs(self, layer):
        return self.value("ln1.hook_out" if self.spec.norm_before else "hook_resid_pre", layer)

    def gain(self, norm):
        weight = getattr(norm.original_component, "weight", None)
        if weight is None:
            return 1.0
        return weight.double().numpy() + (1.0 if self.spec.gains_from_one else 0.0)

    def contribution(self, place, which, up, slices, vectors, S):
        (b, layer, head, t), (up_layer, up_head) = place, up
        o = self.value("attn.hook_z", up_layer)[b, t, up_head] @ self.weights[up_layer].W_O[up_head].double().numpy()
        if self.spec.norm_after:
            block = self.model.blocks[up_layer]
            o = o * self.gain(block.ln1_post) / self.value("ln1_post.hook_scale", up_layer)[b, t, 0]
        o = o * self.spec.write_scale
        if self.spec.norm_before:
            o = o - o.mean() if "layernorm" in self.spec.norm else o
            o = o * self.gain(self.model.blocks[layer].ln1) / self.value("ln1.hook_scale", layer)[b, t, 0]
        value = sum(np.sqrt(S[k]) * sign * (vectors[:-1, k] @ o) for k, sign in slices)
        return value / self.norm_scale(which, b, layer, head, t)


@pytest.mark.parametrize("name", NAMES)
def test_trace_is_the_literal_recursion(case, name):
    c, options = case(name), TraceOptions(threshold=0.35)
    roots = firing_roots(c.model, c.batch, options)
    expected = General(c.model, c.batch, 0.35, options.share).run(roots, c.batch.positions["end"])
    found = as_dict(c.edges)
    assert len(found) == len(c.edges) > 5 and found.keys() == expected.keys()
    size = max(abs(v) for v in expected.values())
    note(name, "trace", max(abs(found[k] - expected[k]) for k in expected) / size, 1e-4)


def whole_pass(c: Case, row, h, action: str, scope: str) -> float:
    "Logit difference of one edge by a pass of its own, the change made in the stream or in one head's output."
    sign, layer, t, b = (1.0 if action == "boost" else -1.0), row.layer, row.position, row.prompt
    if scope == "global":  # what comes after attention, and the stream itself

        def add(value, hook):
            return value.index_put((torch.tensor([0]), torch.tensor([t])), sign * h, accumulate=True)

        places = ["hook_resid_post"] if c.spec.parallel_blocks else ["hook_resid_mid", "hook_resid_post"]
        hooks = [(f"blocks.{row.upstream_layer}.{place}", add) for place in places]
    else:
        x = c.acts.x[layer, b].double().clone()
        centred = c.spec.norm_before and "layernorm" in c.spec.norm
        x[t] += sign * (h - h.mean() if centred else h).double() / c.acts.ln_scale[layer, b, t]
        z = literal_head(c, layer, row.head, x, scales_of(c, layer, b, row.head))[2]

        def put(value, hook):
            value = value.clone()
            value[0, :, row.head] = z[: value.shape[1]].to(value)
            return value

        hooks = [(f"blocks.{layer}.attn.hook_z", put)]
    with torch.no_grad():
        logits = c.model.run_with_hooks(c.tokens[b : b + 1], fwd_hooks=hooks)
    end = c.batch.positions["end"][b]
    return (logits[0, end, c.batch.answer[b]] - logits[0, end, c.batch.wrong[b]]).item()


@pytest.mark.parametrize("name", NAMES)
def test_interventions_equal_whole_passes(case, name):
    c = case(name)
    if c.processing == "raw":
        with pytest.raises(ValueError, match="folded"):
            edge_interventions(c.model, c.batch, c.edges)
        return
    edges = c.edges.iloc[:: max(1, len(c.edges) // 4)].head(5).reset_index(drop=True)
    kinds = [(a, s, "traced") for a in ("ablate", "boost") for s in ("global", "local")]
    table = edge_interventions(c.model, c.batch, edges, kinds=kinds, batch_size=16)
    h, keys = (
        edge_vectors(c.model, c.acts, edges)["traced"][0],
        ["layer", "head", "q_pos", "k_pos", "token", "upstream"],
    )
    table, moved = table.set_index(["action", "scope", "prompt", *keys]), 0.0
    for row, vector in zip(edges.itertuples(), h):
        for action, scope, _ in kinds:
            mine = table.loc[(action, scope, row.prompt, *(getattr(row, k) for k in keys))]
            whole = whole_pass(c, row, vector, action, scope)
            note(name, "interventions", abs(mine["metric_after"] - whole), 2e-4)
            moved = max(moved, abs(whole - mine["metric_before"]))
    assert moved > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_streamed_norms_equal_loaded_ones(case, name):
    c = case(name)
    for processing in dict.fromkeys((c.processing, "raw")):
        model = c.model if processing == c.processing else from_hf(copy.deepcopy(c.hf), processing=processing)
        keys = ["layer", "head", "expert", "matrix", "metric"]
        streamed = weight_norms(c.folder, processing=processing).set_index(keys).value.sort_index()
        loaded = model_weight_norms(model).set_index(keys).value.sort_index()
        assert streamed.index.equals(loaded.index)
        note(name, "norms", (streamed - loaded).abs().max() / loaded.max(), 1e-5)


def test_every_family_of_the_table_is_checked():
    assert {CONFIGS[name]().model_type for name in NAMES} == set(SUPPORTED)


CHECKS = {  # what every family is checked for; a model that is used raw has no interventions
    "log-probabilities",
    "attention",
    "scores",
    "head outputs",
    "slices",
    "components",
    "read inputs",
    "value sums",
    "trace",
    "interventions",
    "norms",
}


@pytest.mark.skipif("FAMILIES_TABLE" in os.environ, reason="make families writes the table when all tests are done")
def test_the_committed_table_holds_every_family_and_check():
    "`make families` writes it; an error in it is within the limits of the tests here."
    table = read_table(family_table_path())
    assert set(table.family) == set(SUPPORTED) and set(table.model) == set(NAMES)
    assert table.error.max() < 2e-4
    for name, checks in table.groupby("model").check:
        raw = FAMILIES[CONFIGS[name]().model_type].unfolded
        assert set(checks) == CHECKS - ({"interventions"} if raw else set()), name


def test_every_refusal_of_a_fault_elsewhere_names_its_reproduction():
    for refusal in FAULTS:
        assert refusal.shown_by in globals(), refusal
        assert refusal.family in SUPPORTED
    assert {f.family for f in FAULTS} >= {CONFIGS[name]().model_type for name in REFUSED}


def test_the_tiny_models_have_what_is_claimed(case):
    "Windows that mask, bases that differ, layers that do not rotate, caps and biases: read from the configuration."
    gemma3, smollm3, bloom = (case(name).spec for name in ("gemma3", "smollm3", "bloom"))
    assert gemma3.windows == (4, None, 4) and gemma3.rotary_bases == (100.0, 5000.0, 100.0)
    turns = [rotation(case("gemma3").model, torch.tensor([3]), layer)[0] for layer in (0, 1)]
    assert not torch.allclose(*turns)
    assert [smollm3.rotates(layer) for layer in range(3)] == [True, False, True]
    assert (bloom.positions, case("gemma2").spec.soft_cap, case("gpt_oss").spec.sinks) == ("alibi", 5.0, True)
    far = case("gemma3").acts.pattern[0, :, :, 9, :6]
    assert far.abs().max() == 0.0 and case("gemma3").acts.pattern[1, :, :, 9, :6].max() > 0.0


def plain_bridge(hf):
    "TransformerLens' own bridge, nothing replaced."
    from spectral_nb.models.hf_models import placeholder_tokenizer
    from spectral_nb.models.loading import _boot

    return _boot(hf, placeholder_tokenizer(hf.config.vocab_size), "tiny").eval()


def log_probs(model, tokens):
    with torch.no_grad():
        out = model(tokens)
    return getattr(out, "logits", out).log_softmax(-1)


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_their_reason(name):
    with pytest.raises(ValueError, match=REFUSED[name]):
        ArchSpec.from_config(CONFIGS[name]())


def test_transformer_lens_splits_grouped_falcons_wrongly():
    with pytest.raises(RuntimeError, match="split_with_sizes"):
        plain_bridge(tiny_family("falcon"))


def test_transformer_lens_has_no_reader_for_gpt_bigcode_with_all_heads():
    with pytest.raises(AssertionError, match="multi_query=True"):
        plain_bridge(tiny_family("gpt_bigcode-heads"))


@pytest.mark.parametrize("name, agrees", [("falcon-7b", True), ("falcon-alibi", False)])
def test_transformers_adds_the_bias_of_falcon_twice(name, agrees):
    "Its eager attention and its fused one are the same without ALiBi, and not with it."
    hf, tokens = tiny_family(name), random_tokens(2, 12)
    fused = tf.AutoModelForCausalLM.from_config(copy.deepcopy(hf.config), attn_implementation="sdpa").eval()
    fused.load_state_dict(hf.state_dict())
    error = (log_probs(hf, tokens) - log_probs(fused, tokens)).abs().max()
    assert error < 1e-5 if agrees else error > 1e-2


def test_transformer_lens_folds_gpt_oss_wrongly():
    hf, tokens = tiny_family("gpt_oss"), random_tokens(2, 12)
    right, bridge = log_probs(hf, tokens), plain_bridge(copy.deepcopy(hf))
    assert (log_probs(bridge, tokens) - right).abs().max() < 1e-5
    bridge.enable_compatibility_mode(disable_warnings=True)
    assert (log_probs(bridge, tokens) - right).abs().max() > 1e-2
    with pytest.raises(ValueError, match="experts.*processing='raw'"):
        from_hf(hf)


def test_transformer_lens_starts_bloom_at_a_layer_wrongly():
    "Why partial passes put the stream in by a hook."
    bridge, tokens = plain_bridge(tiny_family("bloom")), random_tokens(2, 8)
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(tokens)
        assert (bridge(cache["blocks.1.hook_resid_pre"], start_at_layer=1) - logits).abs().max() > 0.1


def test_an_unknown_family_is_told_what_was_recognised():
    with pytest.raises(ValueError, match="recognised: .*rotary positions.*; not recognised: .*logit_scale"):
        ArchSpec.from_config(tf.Cohere2Config())


@pytest.fixture(scope="module", autouse=True)
def table_of_errors():
    "Write what was checked, where FAMILIES_TABLE names a file (`make families`)."
    yield
    if path := os.environ.get("FAMILIES_TABLE"):
        from spectral_nb.models.family_table import write_family_table

        write_family_table(path, ERRORS, {name: CONFIGS[name]().model_type for name in NAMES})
