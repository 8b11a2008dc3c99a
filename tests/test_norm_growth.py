"Norm growth against brute force: plain Hugging Face passes with hooks, full matrix products, exhaustive permutations."

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ARCHITECTURES, random_tokens, tiny_hf, zoo_names
from hypothesis import given, settings
from hypothesis import strategies as st

from spectral_nb.norms import circuit_norms
from spectral_nb.norms import stream as residuals
from spectral_nb.norms import weight_files as streamed_norms
from spectral_nb.norms import claims, command, growth_rates, stored, stream_tables
from spectral_nb.norms import theories as weight_theories
from spectral_nb.base.long_tables import LONG_FIRST
from spectral_nb.base.paths import repo_root
from spectral_nb.models.heads import head_weights
from spectral_nb.models.loading import from_hf, load_model
from spectral_nb.norm_growth import NormGrowthConfig, r_norm, run, weight_norms
from spectral_nb.norms.circuits import CIRCUIT_TASKS
from spectral_nb.norms.growth_rates import growth, log_norms
from spectral_nb.norms.stream import measure_stream, position_classes
from spectral_nb.norms.weights import norm_matrix

BLOCKS = {"gpt2": ("transformer.h", "attn"), "gpt_neox": ("gpt_neox.layers", "attention")}
KEY = ["layer", "head", "expert", "matrix", "metric"]


def make_batch(tokens, lengths=None):
    mask = torch.ones_like(tokens).bool()
    if lengths is not None:
        mask = torch.arange(tokens.shape[1]) < torch.tensor(lengths)[:, None]
    return SimpleNamespace(tokens=tokens, attention_mask=mask)


def plain_stream(hf, architecture, tokens):
    "resid_pre, resid_post, attn_out, mlp_out by layer from forward hooks on the plain Hugging Face model."
    path, attention = BLOCKS.get(architecture, ("model.layers", "self_attn"))
    seen = {p: [] for p in ("resid_pre", "resid_post", "attn_out", "mlp_out")}

    def first(out):
        return out[0] if isinstance(out, tuple) else out

    handles = []
    for block in hf.get_submodule(path):
        handles += [
            block.register_forward_pre_hook(
                lambda m, a, k: seen["resid_pre"].append(a[0] if a else k["hidden_states"]), with_kwargs=True
            ),
            block.register_forward_hook(lambda m, a, out: seen["resid_post"].append(first(out))),
            block.get_submodule(attention).register_forward_hook(lambda m, a, out: seen["attn_out"].append(first(out))),
            block.mlp.register_forward_hook(lambda m, a, out: seen["mlp_out"].append(first(out))),
        ]
    with torch.no_grad():
        hf(tokens)
    for h in handles:
        h.remove()
    return {p: torch.stack(v) for p, v in seen.items()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_stream_norms_equal_a_plain_pass_with_hooks(architecture, tiny_model):
    tokens = random_tokens(5, 9)
    expected = plain_stream(tiny_hf(architecture), architecture, tokens)
    stream = measure_stream(tiny_model(architecture, "raw"), make_batch(tokens), batch_size=2)
    for point, vectors in expected.items():
        np.testing.assert_allclose(stream.norm[point], vectors.norm(dim=-1), rtol=2e-5)
        np.testing.assert_allclose(stream.std[point], vectors.std(dim=-1, correction=0), rtol=2e-5)
    r, a, m = (expected[p] for p in ("resid_pre", "attn_out", "mlp_out"))
    np.testing.assert_allclose(stream.cosine["attn_out"], torch.cosine_similarity(r, a, dim=-1), atol=2e-5)
    beside = r if architecture == "gpt_neox" else r + a
    np.testing.assert_allclose(stream.cosine["mlp_out"], torch.cosine_similarity(beside, m, dim=-1), atol=2e-5)
    n = [v.norm(dim=-1) for v in (r, a, m)]
    crossed = (r * a + r * m + a * m).sum(-1) / (n[0] * n[1] + n[0] * n[2] + n[1] * n[2])
    np.testing.assert_allclose(stream.alignment, crossed, atol=1e-4)
    assert stream_tables.bound_table(stream).violations.sum() == 0


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "olmo"])
def test_folding_centres_the_stream_and_nothing_else(architecture, tiny_model):
    tokens = random_tokens(3, 8)
    raw = plain_stream(tiny_hf(architecture), architecture, tokens)["resid_post"]
    folded = measure_stream(tiny_model(architecture), make_batch(tokens))
    np.testing.assert_allclose(folded.norm["resid_post"], (raw - raw.mean(-1, keepdim=True)).norm(dim=-1), rtol=1e-4)
    np.testing.assert_allclose(folded.std["resid_post"], raw.std(dim=-1, correction=0), rtol=1e-4)


def test_tables_against_numpy_and_classes_kept_apart(tiny_model):
    tokens, lengths = random_tokens(4, 10), [10, 7, 3, 2]
    stream = measure_stream(tiny_model("gpt2"), make_batch(tokens, lengths))
    classes = position_classes(make_batch(tokens, lengths).attention_mask)
    assert [(classes == c).sum() for c in (1, 2)] == [4, 40 - sum(lengths)]
    table = stream_tables.norm_table(stream)
    for index, name in enumerate(residuals.POSITION_CLASSES):
        values = stream.norm["mlp_out"][1][classes == index]
        part = (
            table[
                (table.point == "mlp_out")
                & (table.layer == 1)
                & (table.quantity == "norm")
                & (table.position_class == name)
            ]
            .set_index("metric")
            .value
        )
        assert part["mean"] == pytest.approx(values.mean(), rel=1e-5)
        assert part["q95"] == pytest.approx(np.quantile(values, 0.95), rel=1e-5)
    histogram = stream_tables.norm_histogram(stream, "stream", 13)
    assert histogram[histogram.layer == 2].groupby("position_class")["count"].sum().to_dict() == dict(
        bos=4, other=sum(lengths) - 4, padding=40 - sum(lengths)
    )
    assert stream_tables.prompt_norms(stream, 2).groupby("layer").size().tolist() == [3, 3, 3]
    by_prompt = [np.log(stream.of("stream")[:, i][:, classes[i] == 0]).mean(1) for i in range(4)]
    np.testing.assert_allclose(log_norms(stream), np.stack(by_prompt, 1), rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(rate=st.floats(0.5, 3), scale=st.floats(1e-3, 1e3), n=st.integers(2, 12), seed=st.integers(0, 99))
def test_growth_finds_the_rate_whatever_the_scale(rate, scale, n, seed):
    each = np.random.default_rng(seed).normal(0, 0.3, 6)
    g = growth(np.log(scale) + each + np.log(rate) * np.arange(n + 1)[:, None])
    assert g.rate.estimate == pytest.approx(rate) and g.slope.estimate == pytest.approx(np.log(rate), abs=1e-9)
    assert g.shape == ("undetermined" if n < 2 else "exponential")


def test_growth_interval_covers_the_truth():
    rng, inside = np.random.default_rng(0), 0
    for trial in range(100):
        slopes = rng.normal(0.2, 0.05, 40)
        g = growth(slopes * np.arange(4)[:, None], seed=trial)
        inside += g.rate.low <= np.exp(0.2) <= g.rate.high
    assert 86 <= inside <= 100


def test_bad_input_is_refused_by_name(tiny_model):
    stream = measure_stream(tiny_model("gpt2"), make_batch(random_tokens(2, 6)))
    for layers, word in (
        ("1:1", "empty"),
        ("2:0", "reversed"),
        ("0:7", "out of range"),
        ("a:b", "form"),
        ((1, 0), "reversed"),
    ):
        with pytest.raises(ValueError, match=word):
            growth(log_norms(stream), layers)
    with pytest.raises(ValueError, match=r"prompts \[1\] hold nothing but BOS"):
        measure_stream(tiny_model("gpt2"), make_batch(random_tokens(2, 6), [6, 1]))
    with pytest.raises(ValueError, match="run in parallel"):
        residuals.model_points(tiny_model("gpt_neox"), ["resid_mid"])
    with pytest.raises(ValueError, match="resid_mid"):
        measure_stream(tiny_model("gpt_neox"), make_batch(random_tokens())).of("resid_mid")
    with pytest.raises(ValueError, match="L5H0 does not exist: the model has 2 layers of 4 heads"):
        r_norm(np.ones((2, 4)), [(5, 0)])
    with pytest.raises(ValueError, match="holds all 8 heads"):
        r_norm(np.ones((2, 4)), list(itertools.product(range(2), range(4))))
    broken = tiny_model("gpt2")
    broken.blocks[1].mlp.out.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="layer 1"):
        measure_stream(broken, make_batch(random_tokens()))


# weights


def full_norms(model) -> dict:
    "Norms of the full d_model x d_model products in float64."
    found = {}
    for layer in range(model.cfg.n_layers):
        w = head_weights(model, layer)
        for head in range(model.cfg.n_heads):
            q, k = w.W_Q[head].double(), w.W_K[head].double()
            if w.q_gain is not None:
                q, k = q * w.q_gain[head].double(), k * w.k_gain[head].double()
            for name, product in (("W_OV", w.W_V[head].double() @ w.W_O[head].double()), ("W_QK", q @ k.mT)):
                found[layer, head, name, "frobenius"] = torch.linalg.matrix_norm(product).item()
                found[layer, head, name, "spectral"] = torch.linalg.matrix_norm(product, 2).item()
    return found


@pytest.mark.parametrize("processing", ["folded", "raw"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_streamed_norms_equal_loaded_ones_and_full_products(architecture, processing, tmp_path):
    tiny_hf(architecture).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model = load_model(tmp_path, processing=processing)
    streamed, loaded = (
        t.fillna({"head": -1, "expert": -1}).set_index(KEY).value.sort_index()
        for t in (weight_norms(tmp_path, processing=processing), weight_norms(model))
    )
    assert streamed.index.equals(loaded.index)
    np.testing.assert_allclose(streamed, loaded, rtol=1e-5, atol=1e-7)
    for (layer, head, name, metric), value in full_norms(model).items():
        assert streamed[layer, head, -1, name, metric] == pytest.approx(value, rel=1e-4)


def test_raw_mlp_norms_are_those_of_the_files_tensors(tmp_path):
    hf = tiny_hf("olmoe")
    hf.save_pretrained(tmp_path)
    table = weight_norms(tmp_path, processing="raw")
    experts = hf.model.layers[1].mlp.experts
    for expert in range(4):
        part = table[(table.layer == 1) & (table.expert == expert)].set_index("matrix").value
        assert part["W_out"] == pytest.approx(experts.down_proj[expert].norm().item(), rel=1e-6)
        assert part["W_gate"] ** 2 + part["W_in"] ** 2 == pytest.approx(
            experts.gate_up_proj[expert].norm().item() ** 2, rel=1e-5
        )
    assert table[(table.matrix == "router") & (table.layer == 0)].value.item() == pytest.approx(
        hf.model.layers[0].mlp.gate.weight.norm().item(), rel=1e-6
    )


def test_streaming_holds_one_matrix_of_the_mlp_and_one_layer_of_attention(tmp_path, monkeypatch):
    "Tensors read from the files and still alive, counted at every read."
    import weakref

    tiny_hf("llama", num_hidden_layers=4).save_pretrained(tmp_path)
    alive, peaks, get = [], [], streamed_norms.TensorFiles.get

    def counted(self, name):
        tensor = get(self, name)
        alive.append((name, weakref.ref(tensor)))
        peaks.append([n for n, ref in alive if ref() is not None])
        return tensor

    monkeypatch.setattr(streamed_norms.TensorFiles, "get", counted)
    weight_norms(tmp_path)
    assert len(alive) >= 36
    assert all(len({n.split(".")[2] for n in names}) == 1 for names in peaks)
    assert all(sum(".mlp." in n for n in names) <= 2 for names in peaks)  # the one just read and the one being dropped


def test_incomplete_or_foreign_checkpoints_are_refused(tmp_path):
    tiny_hf("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shard = sorted(set(index["weight_map"].values()))[0]
    (tmp_path / shard).unlink()
    with pytest.raises(FileNotFoundError, match=shard):
        weight_norms(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        weight_norms(tmp_path)
    with pytest.raises(ValueError, match="processing"):
        weight_norms(tmp_path, processing="folder")
    with pytest.raises(FileNotFoundError):
        weight_norms("story-gpt9")


def test_gaussian_attention_response_is_the_sum_of_the_full_products(tiny_model):
    model, x = tiny_model("llama"), weight_theories.random_inputs(6, 32)
    w = head_weights(model, 1)
    total = sum(w.W_V[h].double() @ w.W_O[h].double() for h in range(4))
    normalised = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    np.testing.assert_allclose(
        weight_theories.attention_response(model, 1, x), (normalised @ total).norm(dim=-1), rtol=1e-4
    )


@pytest.mark.parametrize("processing", ["folded", "raw"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_real_inputs_give_the_models_own_mlp_outputs(architecture, processing, tiny_model):
    model, batch = tiny_model(architecture, processing), make_batch(random_tokens(4, 9), [9, 9, 5, 2])
    stream = measure_stream(model, batch)
    responses = weight_theories.theory_responses(model, batch, stream, n_random=5)
    assert responses["mlp_out", "real"].shape == (2, 4) and responses["active", "gaussian"].shape == (2, 5)
    for layer, prompt in itertools.product(range(2), range(4)):
        assert np.isclose(
            stream.norm["mlp_out"][layer, prompt][stream.classes[prompt] == 0],
            responses["mlp_out", "real"][layer, prompt],
            rtol=1e-3,
        ).any()
    assert all((0 <= v).all() and (v <= 1).all() for (q, _), v in responses.items() if q == "active")


def test_active_share_of_experts_against_a_loop(tiny_model):
    model, x = tiny_model("olmoe", "raw"), torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    mlp, normalised = tiny_hf("olmoe").model.layers[0].mlp, tiny_hf("olmoe").model.layers[0].post_attention_layernorm(x)
    chosen = (normalised @ mlp.gate.weight.mT).topk(2).indices
    expected = [
        torch.cat([mlp.experts.gate_up_proj[e][:24] @ v for e in row]).gt(0).float().mean().item()
        for v, row in zip(normalised, chosen)
    ]
    np.testing.assert_allclose(weight_theories.mlp_response(model, 0, x)[1], expected, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 8), d=st.integers(1, 12), seed=st.integers(0, 999))
def test_footnote_5_is_exact_on_a_design_of_the_sphere(rows, d, seed):
    W = torch.randn(rows, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert weight_theories.mean_square(W, weight_theories.sphere_points(d)) == pytest.approx(
        W.square().sum().item(), rel=1e-5
    )


def test_planted_theories_are_told_apart():
    "Weights that double by layer, and weights that are equal while inputs turn towards their strong direction."
    torch.manual_seed(0)
    W, x = torch.diag(torch.tensor([10.0] + [1.0] * 63)), weight_theories.random_inputs(200, 64)
    turned = [torch.cat([x[:, :1] * (1 + layer), x[:, 1:]], 1) for layer in range(4)]
    turned = [v / v.norm(dim=-1, keepdim=True) * 8 for v in turned]
    by_weights = {
        ("mlp_out", s): np.stack([(2**layer * x @ W).norm(dim=-1) for layer in range(4)]) for s in ("real", "gaussian")
    }
    by_inputs = {
        ("mlp_out", "real"): np.stack([(v @ W).norm(dim=-1) for v in turned]),
        ("mlp_out", "gaussian"): np.stack([(x @ W).norm(dim=-1)] * 4),
    }
    assert weight_theories.theory_table(by_weights).theory.dropna().item() == "weights"
    assert weight_theories.theory_table(by_inputs).theory.dropna().item() == "inputs"


# circuits


def test_r_norm_p_value_against_all_subsets():
    norms, heads = np.random.default_rng(3).gamma(4, size=(3, 3)), [(0, 1), (2, 2)]
    value = r_norm(norms, heads)
    cells = list(itertools.product(range(3), range(3)))
    ratios = [r_norm(norms, list(c)) for c in itertools.combinations(cells, 2)]
    exact = np.mean([r >= value - 1e-12 for r in ratios])
    within = np.mean([r_norm(norms, [(0, a), (2, b)]) >= value - 1e-12 for a in range(3) for b in range(3)])
    found = circuit_norms.r_norm_test(norms, heads, n_draws=20_000)
    assert found.p == pytest.approx(exact, abs=0.02) and found.p_layer == pytest.approx(within, abs=0.02)
    assert r_norm(torch.tensor(norms), heads) == pytest.approx(value) and r_norm(
        norms.tolist(), heads
    ) == pytest.approx(value)


def test_rank_correlation_against_scipy():
    from scipy import stats

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=20), rng.integers(0, 5, 20)
    rho, p = circuit_norms.rank_correlation(x, y)
    expected = stats.spearmanr(x, y, alternative="greater")
    assert rho.estimate == pytest.approx(expected.statistic) and p == pytest.approx(expected.pvalue, abs=0.03)
    with pytest.raises(ValueError, match="effects"):
        circuit_norms.rank_correlation(x, y[:5])


@pytest.mark.parametrize("file", ["gpt2_small", "pythia_160m"])
def test_real_singular_values_through_the_same_functions(file, reference):
    norms = np.load(reference / "qk_singular_values" / f"{file}.npz")["S"][:, :, 0]
    circuit = stored.stored_circuits("gpt2")["ioi"]
    published = json.loads((reference / "published" / "ioi_circuit_gpt2_small.json").read_text())["roles"]
    assert {k: sorted(v) for k, v in circuit.roles.items()} == {k: sorted(map(tuple, v)) for k, v in published.items()}
    inside = np.zeros((12, 12), bool)
    for layer, head in circuit.heads:
        inside[layer, head] = True
    assert inside.sum() == 26
    assert r_norm(norms, circuit.heads) == pytest.approx(norms[inside].mean() / norms[~inside].mean())
    path = circuit_norms.layer_means(norms, circuit.heads)
    for layer in range(12):
        assert path.n_circuit[layer] == inside[layer].sum()
        if inside[layer].any():
            assert path.circuit[layer] == pytest.approx(norms[layer, inside[layer]].mean())
    bands = circuit_norms.reading_bands(norms, circuit.heads).set_index("pattern")
    assert bands.holds["peak"] and not bands.holds["flat"] and pd.isna(bands.holds["aligned"])
    if file == "gpt2_small":
        assert r_norm(norms, circuit.heads) == pytest.approx(1.167, abs=5e-4)


def test_stored_circuits_belong_to_their_weights(tmp_path):
    names = zoo_names()
    if not names:
        pytest.skip("no shipped models")
    record = dict(format=1, model=names[0], checkpoint="0" * 16, command="spectral-norms ...", circuits={})
    (tmp_path / f"{names[0]}.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="holds circuits of checkpoint 0000"):
        stored.stored_circuits(names[0], folder=tmp_path)
    for path in stored.circuits_dir().glob("story-*.json"):
        found = stored.stored_circuits(path.stem)
        assert set(found) == set(CIRCUIT_TASKS)
        for circuit in found.values():
            assert all(circuit.effects[h] > 0 for h in circuit.heads)


def test_command_writes_every_head_and_refuses_with_2(tmp_path, capsys, monkeypatch):
    if "story-gpt2-s42" not in zoo_names():
        pytest.skip("story-gpt2-s42 is not shipped")
    out = tmp_path / "heads.parquet"
    assert command.main(["--model", "story-gpt2-s42", "--heads", "L1H0 L1H1", "--out", str(out)]) == 0
    shown, table = capsys.readouterr().out, pd.read_parquet(out)
    assert "r_norm" in shown and "W_OV circuit" in shown
    assert table.in_circuit.sum() == 2 and {"W_OV", "W_QK", "layer", "head"} <= set(table)
    norms = np.stack(
        [
            [torch.linalg.matrix_norm(w.W_V[h].double() @ w.W_O[h].double(), 2) for h in range(4)]
            for w in (head_weights(load_model("story-gpt2-s42"), layer) for layer in range(3))
        ]
    )
    np.testing.assert_allclose(table.W_OV, norms.ravel(), rtol=1e-4)
    monkeypatch.chdir(tmp_path)
    assert command.main(["--model", "story-gpt2-s42", "--heads", "L1H0 L1H1"]) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["heads.parquet"], "only what was asked for is written"
    assert capsys.readouterr().out == shown.removesuffix(f"\nheads: {out}\n")
    assert command.main(["--model", "story-gpt2-s42", "--heads", "L9H9"]) == 2
    assert "L9H9 does not exist" in capsys.readouterr().err
    assert command.main(["--model", "story-gpt2-s42", "--tasks", "iio"]) == 2
    assert "ioi" in capsys.readouterr().err


# the section


def test_run_on_the_real_trained_model(reference):
    model = str(reference / "stories260k")
    texts = str(reference / "stories260k" / "stories.txt")
    table = run(NormGrowthConfig(model, texts=texts, n_prompts=24, circuit_tasks="ioi"))
    assert list(table.columns)[:8] == list(LONG_FIRST) and table.processing.unique().tolist() == ["folded"]
    rate = table[(table.quantity == "stream") & (table.metric == "growth_rate")].iloc[0]
    assert 1.3 < rate.ci_low < rate.value < rate.ci_high < 1.6
    assert table[table.metric == "violations"].value.sum() == 0
    assert len(table[(table.quantity == "W_QK") & (table.metric == "spectral")]) == 40
    raw = run(NormGrowthConfig(model, texts=texts, n_prompts=24, circuit_tasks="", processing="raw", layers="1:4"))
    assert raw.processing.unique().tolist() == ["raw"]
    assert raw[(raw.quantity == "stream") & (raw.metric == "growth_rate")].value.item() < rate.value
    with pytest.raises(ValueError, match="layers"):
        run(NormGrowthConfig(model, texts=texts, n_prompts=24, layers="3:9"))


def test_notebook_parameters_are_those_of_the_config():
    from spectral_nb.sweeps.notebook import notebook_parameters

    names = set(notebook_parameters(repo_root() / "nbs" / "10_norm_growth.ipynb"))
    assert names == set(NormGrowthConfig.__dataclass_fields__) | {"n_checkpoints", "out_dir"}


def test_claims_hold_by_their_rules(tiny_model, monkeypatch):
    "A stream that grows in a straight line holds both growth claims; one that shrinks holds neither."
    logs = np.log([[1.0], [2], [4], [8]]) + np.random.default_rng(0).normal(0, 0.01, (1, 30))
    for sign, holds in ((1, True), (-1, False)):
        norm = np.exp(sign * logs).astype(np.float32)[:, :, None].repeat(2, 2)
        zero, write = np.zeros_like(norm[1:]), np.abs(np.diff(norm, axis=0))
        points = dict(resid_pre=norm[:-1], resid_post=norm[1:], attn_out=write, mlp_out=zero + 1e-6)
        stream = residuals.StreamNorms(points, points, dict(attn_out=zero, mlp_out=zero), zero, np.array([[1, 0]] * 30))
        m = SimpleNamespace(stream=stream, seed=0, growth=growth_rates.growth_table(stream))
        rows = {r["claim"].split(":")[0]: r["verdict"] for r in claims._stream_claims(m)}
        assert rows["The stream's norm grows"] == ("yes" if holds else "no")
        assert rows["Growth is exponential"] == "yes"
        assert rows["Outputs add to the stream as if they were independent of it"] == "yes"


def test_split_experiment_repeats_bit_for_bit(tmp_path):
    from spectral_nb.norms.split_heads import heads_experiment

    quick = dict(n_layers=2, d_model=16, d_mlp=24, batch_size=4, n_prompts=4)
    a, b = (
        heads_experiment(2, seeds=(1,), head_counts=(2, 4), out=tmp_path / f"{i}.parquet", **quick) for i in range(2)
    )
    pd.testing.assert_frame_equal(a, b)
    assert a.rate[0] != a.rate[1]


def test_hand_made_bridge_is_measured_too():
    model = from_hf(tiny_hf("gpt2"), name="mine", processing="raw")
    assert norm_matrix(weight_norms(model), "W_OV", "frobenius").shape == (2, 4)
