"Singular vector tracing against a literal recursion of Algorithm 1, and the graphs made of traces."

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import random_tokens, tiny_hf

from spectral_nb.base.checks import head_name
from spectral_nb.models.architectures import ArchSpec
from spectral_nb.models.heads import apply_rotation, head_weights, rotation
from spectral_nb.models.planted_circuits import PLANTED, planted
from spectral_nb.prompts.batches import PromptBatch
from spectral_nb.tracing.drawing import draw_graph
from spectral_nb.tracing.graph_files import read_graph, write_graph
from spectral_nb.tracing.graph_scores import graph_heads, known_heads, precision_recall, skeleton
from spectral_nb.tracing.graphs import communication_edges, filter_graph, trace_graph
from spectral_nb.tracing.options import TraceOptions
from spectral_nb.tracing.recursion import trace, trace_tables
from spectral_nb.tracing.roots import find_roots, logit_attribution
from spectral_nb.tracing.upstream import all_outputs, contributions

ROLES = ("end", "third")


def toy_batch(tokens, lengths=None) -> PromptBatch:
    "Random tokens as a task with two roles."
    n, width = tokens.shape
    lengths = torch.full((n,), width) if lengths is None else torch.tensor(lengths)
    return PromptBatch(
        task="toy",
        tokens=tokens,
        attention_mask=torch.arange(width) < lengths[:, None],
        positions={"end": lengths - 1, "third": torch.full((n,), 2)},
        answer=torch.ones(n, dtype=torch.long),
        wrong=torch.full((n,), 2),
        text=["toy"] * n,
        pad_token_id=0,
    )


def peaked(architecture: str, n_layers: int = 2, seed: int = 0):
    "A random model whose queries and keys are large, so that many heads fire."
    from spectral_nb.models.loading import from_hf

    hf = tiny_hf(
        architecture, seed, **(dict(n_layer=n_layers) if architecture == "gpt2" else dict(num_hidden_layers=n_layers))
    )
    with torch.no_grad():
        for name, p in hf.named_parameters():
            if p.ndim == 2 and any(part in name for part in ("c_attn", "query_key_value", "q_proj", "k_proj")):
                p.mul_(8 if "c_attn" in name else 3)
    return from_hf(hf, name=f"peaked-{architecture}")


class Literal:
    "Algorithm 1 by its definition: float64, dense SVDs, a loop for each pair, slice and head, recursion."

    def __init__(self, model, batch, threshold=0.5, share=0.7):
        self.spec, self.threshold, self.share = ArchSpec.from_model(model), threshold, share
        self.model, self.lengths = model, batch.lengths.tolist()
        with torch.no_grad():
            _, self.cache = model.run_with_cache(batch.tokens)
        self.weights = [head_weights(model, layer) for layer in range(self.spec.n_layers)]
        self.svd, self.values, self.seen, self.edges = {}, {}, set(), {}

    def value(self, name, layer):
        if (name, layer) not in self.values:
            self.values[name, layer] = self.cache[f"blocks.{layer}.{name}"].double().numpy()
        return self.values[name, layer]

    def omega(self, layer, head, offset):
        key = (layer, head, offset if self.spec.positions == "rotary" else 0)
        if key not in self.svd:
            w, d = self.weights[layer], self.spec.d_head
            Q = np.vstack([w.W_Q[head].double().numpy(), w.b_Q[head].double().numpy()[None]])
            K = np.vstack([w.W_K[head].double().numpy(), w.b_K[head].double().numpy()[None]])
            if w.q_gain is not None:
                Q, K = Q * w.q_gain[head].double().numpy(), K * w.k_gain[head].double().numpy()
            turn = rotation(self.model, torch.tensor([abs(offset)]))
            R = np.eye(d)
            if turn is not None:
                R = apply_rotation(torch.eye(d), *turn).numpy().astype(float)  # rows: R e_m, so R.T in matrix form
                R = R.T if offset >= 0 else R
            U, S, Vh = np.linalg.svd(Q @ R @ K.T)
            self.svd[key] = U[:, :d], S[:d], Vh[:d].T
        return self.svd[key]

    def norm_scale(self, which, b, layer, head, t):
        if not self.spec.qk_norm:
            return 1.0
        scale = self.value(f"attn.{which}_norm.hook_scale", layer)
        if self.spec.qk_norm == "full":
            return scale[b, t, 0]
        return scale[b, head // (self.spec.n_heads // scale.shape[1]), t, 0]

    def inputs(self, layer):
        return self.value("ln1.hook_out", layer)

    def slices(self, b, layer, head, i, j):
        U, S, V = self.omega(layer, head, j - i)
        x = self.inputs(layer)[b]
        xi, xj = np.append(x[i], 1.0), np.append(x[j], 1.0)
        terms = [xi @ U[:, k] * S[k] * (V[:, k] @ xj) for k in range(len(S))]
        total = sum(terms)
        scale = self.norm_scale("q", b, layer, head, i) * self.norm_scale("k", b, layer, head, j)
        expected = self.value("attn.hook_attn_scores", layer)[b, head, i, j] / self.spec.score_scale
        assert abs(total / scale - expected) < 1e-3 * max(1.0, abs(expected))
        chosen, running = [], 0.0
        for k in sorted(range(len(S)), key=lambda k: -terms[k]):
            chosen.append(k)
            running += terms[k]
            if running > total:
                break
        return [(k, 1.0 if xi @ U[:, k] >= 0 else -1.0) for k in chosen], U, S, V

    def contribution(self, place, which, up, slices, vectors, S):
        (b, layer, head, t), (up_layer, up_head) = place, up
        o = self.value("attn.hook_z", up_layer)[b, t, up_head] @ self.weights[up_layer].W_O[up_head].double().numpy()
        if "layernorm" in self.spec.norm:
            o = o - o.mean()
        value = 0.0
        for k, sign in slices:
            value += np.sqrt(S[k]) * sign * (vectors[:-1, k] @ o)
        return value / self.value("ln1.hook_scale", layer)[b, t, 0] / self.norm_scale(which, b, layer, head, t)

    def fires(self, b, layer, head, i, j):
        return (
            j != 0
            and self.value("attn.hook_pattern", layer)[b, head, i, j] >= self.threshold
            and self.value("attn.hook_attn_scores", layer)[b, head, i, j] > 0
        )

    def visit(self, b, layer, head, i, j):
        if (b, layer, head, i, j) in self.seen:
            return
        self.seen.add((b, layer, head, i, j))
        slices, U, S, V = self.slices(b, layer, head, i, j)
        for token, t, vectors in (("destination", i, U), ("source", j, V)):
            found = {
                (ul, uh): self.contribution(
                    (b, layer, head, t), "q" if token == "destination" else "k", (ul, uh), slices, vectors, S
                )
                for ul in range(layer)
                for uh in range(self.spec.n_heads)
            }
            total, running = sum(found.values()), 0.0
            if total <= 0:
                continue
            for up, value in sorted(found.items(), key=lambda item: -item[1]):
                if running >= self.share * total:
                    break
                running += value
                self.edges[b, layer, head, i, j, token, *up] = value
                for source in range(t + 1):
                    if self.fires(b, *up, t, source):
                        self.visit(b, *up, t, source)

    def run(self, roots, q_pos):
        for b in range(len(self.lengths)):
            for layer, head in roots:
                for j in range(int(q_pos[b]) + 1):
                    if self.fires(b, layer, head, int(q_pos[b]), j):
                        self.visit(b, layer, head, int(q_pos[b]), j)
        return self.edges


def as_dict(edges: pd.DataFrame) -> dict:
    columns = ["prompt", "layer", "head", "q_pos", "k_pos", "token", "upstream_layer", "upstream_head"]
    return {
        key: value
        for *key, value in edges[[*columns, "contribution"]].itertuples(index=False, name=None)
        for key in [tuple(key)]
    }


def firing_roots(model, batch, options) -> list:
    "Heads of the last layer that fire at the end of some prompt."
    table = logit_attribution(model, batch, options)
    top = table[(table["layer"] == model.cfg.n_layers - 1) & (table["fires"] > 0)]
    return list(zip(top["layer"], top["head"]))


def compare(model, batch, options, roots=None):
    roots = roots or firing_roots(model, batch, options)
    assert roots
    expected = Literal(model, batch, options.threshold, options.share).run(roots, batch.positions[options.q_role])
    edges = trace(model, batch, roots, options)
    found = as_dict(edges)
    assert len(found) == len(edges) > 0  # every place is visited once
    assert found.keys() == expected.keys()
    scale = max(abs(v) for v in expected.values())
    assert max(abs(found[k] - expected[k]) for k in expected) < 1e-4 * scale
    return edges


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "llama", "qwen3", "olmo", "olmoe"])
def test_trace_is_the_literal_recursion(architecture):
    model = peaked(architecture, 3, seed=1)
    batch = toy_batch(random_tokens(6, 10), [10, 10, 7, 9, 10, 5])
    edges = compare(model, batch, TraceOptions(threshold=0.4))
    assert (edges["layer"] < 2).any()  # the recursion went down


def test_trace_on_a_trained_model(stories260k):
    from spectral_nb.base.paths import reference_dir

    text = (reference_dir() / "stories260k/stories.txt").read_text().split("\n")
    stories = [line for line in text if len(line) > 60][:4]
    ids = [stories260k.tokenizer(s)["input_ids"][:24] for s in stories]
    compare(stories260k, toy_batch(torch.tensor(ids)), TraceOptions(threshold=0.4))


@pytest.mark.parametrize("name", PLANTED)
def test_planted_circuits_are_returned_exactly(name):
    p = planted(name, 6, seed=3)
    edges, firing = trace_tables(p.model, p.batch, p.roots, values=True)
    reads = np.where(edges["kind"] == "value", "value", edges["token"].astype(str))
    pairs = zip(edges["upstream_layer"], edges["upstream_head"], edges["layer"], edges["head"], reads)
    found = {((a, b), (c, d), read) for a, b, c, d, read in pairs}
    assert found == p.edges and len(edges) == 6 * len(p.edges)
    if name != "values":  # looking at values adds nothing where no head moves what a head wrote
        assert len(trace(p.model, p.batch, p.roots)) == len(edges)
    circuit = [pair for pair in p.heads if pair not in p.distractors]
    score = precision_recall(trace_graph(edges, unlabeled="keep"), circuit)
    assert score["precision"] == score["recall"] == 1.0
    assert not graph_heads(trace_graph(edges, unlabeled="keep")) & set(p.distractors)
    assert (firing.groupby(["prompt", "layer", "head", "q_pos", "k_pos"]).size() == 1).all()
    assert find_roots(p.model, p.batch) == p.roots


@pytest.mark.parametrize("name", ["inhibition", "rotary"])
def test_the_distractor_writes_most(name):
    "What a tracer by size would report."
    p = planted(name, 4)
    top = p.roots[0][0]
    found = all_outputs(p.model, p.batch, top)
    heads = found.head >= 0
    size = found.outputs.norm(dim=-1).mean(1)[torch.tensor(heads)]
    largest = int(size.argmax())
    assert (int(found.layer[heads][largest]), int(found.head[heads][largest])) in p.distractors


def test_all_components_sum_to_the_signal(tiny_model):
    "Contributions of heads, MLPs, embeddings and biases, with the appended 1, are the signal: 1e-4."
    from spectral_nb.attention.activations import capture
    from spectral_nb.attention.pairs import firings
    from spectral_nb.tracing.reading import reading_vectors

    for architecture in ("gpt2", "gpt_neox", "llama", "olmoe"):
        model = tiny_model(architecture)
        acts = capture(model, random_tokens(3, 9))
        pairs = firings(acts, None, 0.2)
        pairs = pairs[pairs.layer == 1]
        read = reading_vectors(model, acts, pairs)
        everything = all_outputs(model, random_tokens(3, 9), 1)
        positions = torch.stack([pairs.q_pos, pairs.k_pos])
        total = (
            contributions(everything.outputs, (pairs.prompt * 9 + positions).flatten(), read.vectors.flatten(0, 1))
            .sum(-1)
            .view(2, -1)
        )
        scale = torch.stack([acts.ln_scale[1, pairs.prompt, pos] for pos in positions])
        bias = read.bias * scale
        if acts.q_scale is not None:  # bias is over both norms, the appended 1 of x over the second alone
            assert (read.signal - total).abs().max() < 1e-4 * read.signal.abs().max()
        elif architecture in ("llama",):
            assert (read.signal - total).abs().max() < 1e-4 * read.signal.abs().max()
        else:
            assert (read.signal - total - bias).abs().max() < 1e-4 * read.signal.abs().max()


def test_components_all_reports_embeddings():
    model, batch = peaked("gpt2"), toy_batch(random_tokens(4, 8))
    options = TraceOptions(threshold=0.2, components="all")
    edges = trace(model, batch, firing_roots(model, batch, options), options)
    assert {"embed", "pos_embed", "L0.mlp"} & set(edges["upstream"])
    assert (edges.loc[edges["upstream"] == "embed", "upstream_layer"] == -1).all()
    trace_graph(edges, unlabeled="keep")


def test_batching_and_padding_change_nothing():
    model, batch = peaked("gpt2", 3), toy_batch(random_tokens(7, 12), [12, 5, 9, 12, 4, 7, 11])
    options = TraceOptions(threshold=0.25)
    roots = firing_roots(model, batch, options)
    whole = trace(model, batch, roots, options)
    parts = trace(model, batch, roots, options, batch_size=2)
    keys = ["prompt", "layer", "head", "q_pos", "k_pos", "token", "upstream"]
    assert (
        whole[keys].astype(str).equals(parts[keys].astype(str)) and whole["prompt"].is_monotonic_increasing
    )  # the order too
    np.testing.assert_allclose(whole["contribution"], parts["contribution"], rtol=1e-3, atol=1e-4)
    assert (whole["q_pos"].to_numpy() < batch.lengths.numpy()[whole["prompt"]]).all()


def test_gathering_or_not_is_the_same(monkeypatch):
    o, w, t = torch.randn(7, 11, 5), torch.randn(40, 5), torch.randint(0, 11, (40,))
    gathered = contributions(o, t, w)
    torch.testing.assert_close(gathered, torch.stack([o[:, i] @ v for i, v in zip(t.tolist(), w, strict=True)]))
    monkeypatch.setattr("spectral_nb.tracing.upstream._GATHER", 0)
    torch.testing.assert_close(contributions(o, t, w), gathered)


def test_homogeneous_adds_one_constant_to_every_head():
    model, batch = peaked("gpt2"), toy_batch(random_tokens(4, 8))
    options = TraceOptions(threshold=0.2, share=1.0)
    roots = firing_roots(model, batch, options)
    keys = ["prompt", "layer", "head", "q_pos", "k_pos", "token", "upstream"]
    plain, ones = (
        trace(model, batch, roots, options, homogeneous=h).set_index(keys)["contribution"] for h in (False, True)
    )
    both = plain.to_frame("a").join(ones.to_frame("b"), how="inner")
    shift = (both["b"] - both["a"]).groupby(level=[0, 1, 2, 3, 4, 5], observed=True)
    assert (shift.max() - shift.min()).max() < 1e-4 and shift.mean().abs().max() > 1e-3


def test_bad_input(tiny_model):
    model, batch = tiny_model("gpt2"), toy_batch(random_tokens(3, 6))
    with pytest.raises(ValueError, match="L7H0|layer"):
        trace(model, batch, "L7H0")
    with pytest.raises(ValueError, match="fires in 0 of 3 prompts"):
        trace(model, batch, "L1H0", threshold=1.0)
    with pytest.raises(ValueError, match="verb"):
        trace(model, batch, "L1H0", q_role="verb")
    with pytest.raises(ValueError, match="verb"):
        trace(model, batch, "L1H0", k_role="verb")
    with pytest.raises(ValueError, match="roots"):
        trace(model, batch, [])
    with pytest.raises(ValueError, match="share"):
        TraceOptions(share=2.0)
    with pytest.raises(TypeError):
        trace(model, batch, "L1H0", treshold=0.4)


def test_an_empty_trace_is_an_empty_graph(tmp_path):
    p = planted("induction", 3)
    edges = trace(p.model, p.batch, "L0H1")  # a head of the lowest layer has nothing upstream
    graph = trace_graph(edges)
    assert len(edges) == 0 and len(graph) == 0 and len(skeleton(graph)) == 0
    assert len(read_graph(write_graph(graph, tmp_path / "empty.graphml"))) == 0
    assert np.isnan(precision_recall(graph, "L0H1")["precision"])


def test_edges_survive_parquet(tmp_path):
    from spectral_nb.base.files import read_table, write_table

    p = planted("inhibition", 4)
    edges = trace(p.model, p.batch, p.roots)
    again = read_table(write_table(edges, tmp_path / "edges.parquet"))
    assert sorted(trace_graph(again).edges) == sorted(trace_graph(edges).edges)


def test_graph_counts_prompts():
    p = planted("inhibition", 5)
    graph = trace_graph(trace(p.model, p.batch, p.roots))
    table = communication_edges(graph).set_index("upstream")
    assert table.loc["L1H0", ["downstream", "role", "count", "token"]].tolist() == ["L2H1", "end", 5, "destination"]
    assert table.loc["L0H1", ["downstream", "role", "count", "token"]].tolist() == ["L1H0", "S2", 5, "source"]
    assert graph.graph["weights_hash"] and graph.nodes["L2H1"]["n_firings"] == 5
    assert len(filter_graph(graph, 6)) == 0
    assert draw_graph(graph, known=["L2H1"]).texts


def test_authors_graph(reference):
    graph = read_graph(reference / "ioi_gpt2_small/svt_graph_p256.graphml")
    assert (len(graph), graph.number_of_edges()) == (173, 612)
    known = known_heads(reference / "published/ioi_circuit_gpt2_small.json")
    assert len(known) == 26 and known[9, 9] == "name_mover"
    edge = graph[head_name(0, 1)]["L3H0@S1"]
    assert edge["count"] == 237 and abs(edge["weight"] - 1.4057421867857502) < 1e-12 and edge["token"] == "source"
    assert len(graph_heads(skeleton(graph, 170))) == 22


def gpt2_tokenizer(reference, folder):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    files = reference / "gpt2_tokenizer"
    bpe = Tokenizer(models.BPE.from_file(str(files / "vocab.json"), str(files / "merges.txt")))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<|endoftext|>", eos_token="<|endoftext|>").save_pretrained(
        folder
    )
    return AutoTokenizer.from_pretrained(folder)


def test_the_papers_experiment_but_for_the_weights(reference, tmp_path):
    "GPT-2's tokenizer, its 12 layers of 12 heads, the paper's roots and prompts, in a narrow random model."
    from transformers import GPT2Config, GPT2LMHeadModel

    from spectral_nb.models.loading import from_hf
    from spectral_nb.svt import SvtConfig, measure
    from spectral_nb.tracing.experiment import traced_parts
    from spectral_nb.tracing.published import IOI_CIRCUIT, beside_published

    torch.manual_seed(0)
    hf = GPT2LMHeadModel(GPT2Config(n_embd=48, n_layer=12, n_head=12, n_positions=64))
    with torch.no_grad():
        for block in hf.transformer.h:
            block.attn.c_attn.weight[:, :96] *= 14
    model = from_hf(hf, gpt2_tokenizer(reference, tmp_path), name="gpt2")
    cfg = SvtConfig("gpt2", n_prompts=24, threshold=0.02, min_count=1, n_edges=3, n_intervened=4, homogeneous=True)
    _, found = measure(cfg, model)
    batch = found.batch
    assert (batch.tokens[:, 0] != model.tokenizer.bos_token_id).all() and {"IO", "S1", "S2", "end"} <= set(
        batch.positions
    )
    assert set(found.roots) <= {(9, 6), (9, 9), (10, 0)} and len(found.edges)
    roots = found.firings[found.firings["root"]]
    assert (roots["k_pos"].to_numpy() == batch.at("IO").numpy()[roots["prompt"]]).all()
    table = beside_published(skeleton(found.graph, 1), found.firings, found.interventions, IOI_CIRCUIT)
    possible = table.set_index("quantity").loc["possible", ["ours", "published"]].tolist()
    assert possible == ["16", "16"] and sum(map(len, IOI_CIRCUIT.values())) == 16
    metrics = set(pd.concat(traced_parts(found))["metric"])
    assert {"edge_count", "edge_flow", "ablate_local_traced_effect", "median_slices", "control_auc"} <= metrics


def test_section_on_planted_weights():
    from spectral_nb.tracing.edge_statements import edge_claims
    from spectral_nb.tracing.experiment import TestPlan, experiment, traced_parts, untraced

    p = planted("inhibition", 6)
    found = experiment(p.model, p.batch, p.roots, TraceOptions(values=True), TestPlan(n_edges=9, n_intervened=6))
    assert (found.effects["n"] == 6).all() and found.effects["edge"].nunique() >= 2
    looked = found.edges[found.edges["kind"].astype(str) != "value"]
    assert sorted(graph_heads(skeleton(trace_graph(looked), 6))) == [(0, 1), (1, 0), (2, 1)]
    claims = edge_claims(found)
    assert len(claims) <= 8 and claims.set_index("rule").loc["identity", "verdict"] == "yes"
    empty = untraced(p.batch, found.options, found.plan, "none")
    assert sum(map(len, traced_parts(empty))) == 0 and len(edge_claims(empty)) == 0


def test_section_on_own_prompts(tmp_path):
    from spectral_nb.models.loading import load_model
    from spectral_nb.svt import SvtConfig, measure

    rows = [
        "When {IO:Mary} and {S1:John} went to the shop , {S2:John} gave a book to, Mary, John",
        "When {S1:Tom} and {IO:Anna} went to the park , {S2:Tom} gave a ball to, Anna, Tom",
    ]
    lines = ["prompt,answer,wrong"]
    for row in rows:
        prompt, answer, wrong = row.rsplit(",", 2)
        lines.append(f'"{prompt}","{answer}","{wrong}"')
    (tmp_path / "own.csv").write_text("\n".join(lines))
    model = load_model("story-gpt2-s42")
    _, found = measure(SvtConfig("story-gpt2-s42", prompts=str(tmp_path / "own.csv"), threshold=0.3, n_edges=3), model)
    assert len(found.batch) == 2 and found.plan.min_count == 2
    assert len(found.edges) or found.reason


def test_a_trace_of_raw_weights_says_that_it_is_another_circuit():
    import warnings

    from spectral_nb.models.loading import load_model
    from spectral_nb.prompts.tasks import make_batch

    circuits = {}
    for processing in ("raw", "folded"):
        model = load_model("story-gpt2-s42", processing=processing)
        batch = make_batch("ioi", model, 8)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            circuits[processing] = trace(model, batch, find_roots(model, batch))
        said = [str(w.message) for w in caught if "another circuit" in str(w.message)]
        assert bool(said) == (processing == "raw")
    keys = ["prompt", "layer", "head", "q_pos", "k_pos", "token", "upstream"]
    raw, folded = (set(e[keys].astype(str).itertuples(index=False, name=None)) for e in circuits.values())
    assert raw != folded


def test_contract_names_and_config():
    import inspect

    from spectral_nb import svt

    for name in ("trace", "trace_graph", "precision_recall", "edge_interventions", "measure", "run"):
        assert callable(getattr(svt, name))
    assert list(inspect.signature(svt.trace).parameters)[:3] == ["model", "batch", "roots"]
    assert list(inspect.signature(svt.trace_graph).parameters)[:2] == ["edges", "min_count"]
    assert list(inspect.signature(svt.edge_interventions).parameters)[:3] == ["model", "batch", "edges"]
    assert (
        svt.SvtConfig("gpt2").resolved().min_count == 65
        and svt.SvtConfig("gpt2", task="retrieval").resolved().n_prompts == 96
        and svt.SvtConfig("gpt2", homogeneous=True).options().homogeneous
    )
    for bad in (dict(task="chess"), dict(share=2.0), dict(n_edges=0), dict(processing="raw"), dict(rule="best")):
        with pytest.raises(ValueError):
            svt.SvtConfig(**bad)
    with pytest.raises(TypeError):
        svt.SvtConfig(roots=["L1H0"])
