"Participation ratios, nulls, picks, seeds' statistics and the article's run."

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import random_tokens, tiny_hf, zoo_names

from spectral_nb.fingerprint.mechanism import codeword_readout, finder_scores, key_attention
from spectral_nb.fingerprint.ratios import as_array, false_positives, head_ratios, head_scores, ratio_trajectory
from spectral_nb.fingerprint.ratios import null_scores
from spectral_nb.fingerprint.weight_changes import ChangeProducts, rolling_gap, weighted_gap
from spectral_nb.attention.participation import (
    HeadGrams,
    elbow,
    fixed_content,
    pick_heads,
    rank_heads,
    read_outputs,
    shuffled_positions,
    transition_step,
)
from spectral_nb.pr_fingerprint import FingerprintConfig
from spectral_nb.attention.participation import head_participation, pr_integral, pr_rise, pr_spread
from spectral_nb.fingerprint.seed_stats import _auc, recurrence, seed_false_positives, start_prediction
from spectral_nb.fingerprint.seed_runs import ablation_conditions
from spectral_nb.fingerprint.seed_timing import replay_events
from spectral_nb.fingerprint.seeds import load_seed_tables, tables_dir
from spectral_nb.attention.spectra import participation_ratio
from spectral_nb.prompts.batches import PromptBatch

zoo = pytest.mark.skipif("story-gpt2-s42" not in zoo_names(), reason="the shipped models are absent")


def toy_batch(n=64, length=12, seed=0):
    tokens = random_tokens(n, length, seed)
    lengths = torch.tensor([length - i % 3 for i in range(n)])
    mask = torch.arange(length) < lengths[:, None]
    return PromptBatch(
        "toy",
        tokens * mask,
        mask,
        {"end": lengths - 1, "key": torch.full((n,), 3)},
        tokens[:, 3].clone(),
        None,
        [""] * n,
        0,
    )


def grams(x):
    return HeadGrams().add(torch.as_tensor(x)[:, None, None]).participation().item()


def test_known_spectra():
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.normal(size=(20, 6)))[0]
    assert grams(np.outer(rng.normal(size=20), rng.normal(size=6))) == pytest.approx(1, abs=1e-6)
    assert grams(q) == pytest.approx(6)
    s = np.array([3.0, 2, 1, 0, 0, 0])
    p = s[:3] ** 2 / 14
    assert grams(q * s) == pytest.approx(math.exp(-(p * np.log(p)).sum()))


def test_invariant_to_rotation_and_scale_but_not_to_centring():
    rng = np.random.default_rng(1)
    x, rotation = rng.normal(size=(50, 8)) * np.arange(1, 9), np.linalg.qr(rng.normal(size=(8, 8)))[0]
    assert grams(x) == pytest.approx(grams(x @ rotation)) == pytest.approx(grams(-7.5 * x))
    assert grams(x + 100) < 1.1 < grams(x)


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "llama", "qwen3", "olmo", "olmoe"])
@pytest.mark.parametrize("processing", ["raw", "folded"])
def test_streamed_equals_stored(tiny_model, architecture, processing):
    model, batch = tiny_model(architecture, processing), toy_batch()
    names = [f"blocks.{ly}.attn.hook_z" for ly in range(2)]
    with torch.no_grad():
        _, cache = model.run_with_cache(batch.tokens, names_filter=names)
    stored = torch.stack([cache[n][torch.arange(64), batch.positions["end"]] for n in names]).transpose(1, 2)
    for size in (7, 64):
        torch.testing.assert_close(
            head_participation(model, batch, batch_size=size), participation_ratio(stored), rtol=1e-4, atol=1e-4
        )


def test_padding_and_mode_do_not_matter(tiny_model):
    hf, batch = tiny_hf("llama").train(), toy_batch()
    other = dataclasses.replace(batch, tokens=torch.where(batch.attention_mask, batch.tokens, 9))
    torch.testing.assert_close(head_participation(hf, batch), head_participation(hf, other), rtol=1e-5, atol=1e-5)
    assert hf.training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: (b.subset(slice(0, 5)), {}), "fewer than the 8 needed"),
        (lambda b: (b, {"role": "kye"}), "did you mean 'key'"),
        (
            lambda b: (
                dataclasses.replace(b, positions={**b.positions, "key": torch.full((64,), -1)}),
                {"role": "key"},
            ),
            "64 of 64 prompts do not have it",
        ),
        (lambda b: (b, {"positions": b.lengths}), "outside their prompts"),
        (lambda b: (b, {"positions": b.lengths[:3] - 1}), "shape"),
    ],
)
def test_bad_reads_are_refused(tiny_model, change, message):
    batch, options = change(toy_batch())
    with pytest.raises(ValueError, match=message):
        head_participation(tiny_model("gpt2"), batch, **options)


def test_non_finite_activations_name_the_layer(tiny_model):
    model = tiny_model("gpt2")
    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_z", lambda z, hook: z * float("inf"))]):
        with pytest.raises(ValueError, match="layer 1"):
            head_participation(model, toy_batch())


def test_outputs_are_those_of_the_read_position(tiny_model):
    model, batch = tiny_model("gpt2", "raw"), toy_batch()
    z = read_outputs(model, batch.tokens, batch.positions["end"])
    alone = read_outputs(model, batch.tokens[:1, : batch.lengths[0]], batch.lengths[:1] - 1)
    torch.testing.assert_close(z[:1], alone, rtol=1e-4, atol=1e-5)


def test_shuffled_positions_are_real_and_not_the_first():
    batch = toy_batch(600)
    at = torch.stack([shuffled_positions(batch, s) for s in range(20)])
    assert (at >= 1).all() and (at < batch.lengths).all() and {1, 11} <= set(at.unique().tolist())
    assert torch.equal(shuffled_positions(batch, 3), at[3])


def test_fixing_the_content_collapses_a_head_that_copies_it(tiny_model):
    "A head whose output is the value at the key has one direction when the key is the same everywhere."
    model, batch = tiny_model("gpt2", "raw"), toy_batch()

    def copy(z, hook):
        return z[:, 3:4].expand_as(z).clone()  # z at the key, everywhere

    def look_at_itself(pattern, hook):
        return torch.eye(pattern.shape[-1]).expand_as(pattern)

    with model.hooks(fwd_hooks=[("blocks.0.attn.hook_pattern", look_at_itself), ("blocks.0.attn.hook_z", copy)]):
        ratios = head_ratios(model, batch, nulls=["fixed"])
    assert ratios["pr_fixed"][0].max() < 1.0001 and ratios["pr"][0].min() > 2
    assert torch.equal(fixed_content(batch).tokens[:, 3].unique(), batch.tokens[:1, 3])


def test_trajectory_numbers_by_hand():
    pr, tokens = np.array([1.0, 2.0, 4.0, 3.0]), np.array([0, 10, 100, 1000])
    assert pr_spread(pr) == 3 and pr_rise(pr) == 2
    assert pr_integral(pr, tokens) == pytest.approx(math.log(10) * (0.5 * (1 + 3) + 0.5 * (3 + 2)))
    assert pr_integral(np.stack([pr, pr]), torch.tensor(tokens)).shape == (2,)
    assert pr_integral([0.5, 0.5], [1, 2]) == 0  # below one counts as nothing
    assert transition_step([5.0, 1.0, 3.0, 2.0], [0, 10, 20, 30]) == 15
    assert np.isnan(transition_step([3.0, 2.0, 1.0], [0, 1, 2]))
    for bad in ([1, 1, 2, 3], [-1, 0, 1, 2], [1, 2, 3]):
        with pytest.raises(ValueError, match="tokens"):
            pr_integral(pr, bad)


def test_heads_and_nulls_are_integrated_over_the_same_tokens():
    "A null that moves as the head does gets the head's score; step 0, which has seen nothing, is in neither."
    made = [(s, 100 * s, 0, h, m, 1 + h + 0.1 * s) for s in (0, 1, 10, 100) for h in (0, 1) for m in ("pr", "pr_fixed")]
    table = pd.DataFrame(made, columns=["step", "tokens", "layer", "head", "metric", "value"])
    scores, nulls = head_scores(table), null_scores(table, "integral")
    np.testing.assert_allclose(scores["integral"], nulls["fixed content"])
    np.testing.assert_allclose(scores["integral"], pr_integral(as_array(table)[0], [0, 100, 1000, 10_000]))
    np.testing.assert_allclose(scores["integral"], head_scores(table.drop(columns="tokens"))["integral"])
    shares = seed_false_positives(table.assign(seed=1), "integral").set_index("null").share
    assert shares["fixed content"] == 0.5 and set(shares.index) == {"fixed content", "untrained"}
    with pytest.raises(ValueError, match="two token counts"):
        head_scores(pd.concat([table, table.assign(tokens=table.tokens + 1)]))


def test_elbow_and_ranks():
    scores = np.full((4, 8), 0.5) + np.linspace(0, 0.1, 32).reshape(4, 8)
    scores[[1, 2, 3], [5, 0, 7]] = [9, 8, 8.5]
    assert pick_heads(scores) == [(1, 5), (3, 7), (2, 0)] and elbow(scores)[0] == 3
    table = rank_heads(scores)
    assert (
        table.share.is_monotonic_increasing
        and table.share.iloc[-1] == pytest.approx(1)
        and table["rank"].tolist() == list(range(1, 33))
    )
    assert false_positives(scores, scores + 1) == (3, 32) and false_positives(np.ones((2, 2)), scores) == (0, 32)
    with pytest.raises(ValueError, match="finite"):
        elbow([1.0, float("nan")])
    with pytest.raises(ValueError, match="two"):
        elbow([1.0])


def test_selectivity_of_a_planted_head(tiny_model):
    model, batch = tiny_model("gpt2"), toy_batch()

    def plant(pattern, hook):
        pattern = torch.zeros_like(pattern)
        pattern[..., 0], pattern[..., 3] = 0.1, 0.9
        return pattern

    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", plant)]):
        found = key_attention(model, batch)
    expected = 0.9 / np.mean([0.1 / q for q in batch.positions["end"].tolist()])
    np.testing.assert_allclose(found["attention"][1], 0.9, rtol=1e-5)
    np.testing.assert_allclose(found["selectivity"][1], expected, rtol=1e-4)


def test_readout_generalises_only_where_the_code_is_linear(tiny_model, monkeypatch):
    "One head writes a linear image of the answer's unembedding, the others noise; no test answer occurs in training."
    import spectral_nb.fingerprint.mechanism as fingerprint

    model, batch, noise = tiny_model("gpt2", "raw"), toy_batch(400), torch.Generator().manual_seed(0)
    train = dataclasses.replace(batch, answer=torch.arange(400) % 40 + 1)
    test = dataclasses.replace(batch, answer=torch.arange(400) % 20 + 45)
    project = torch.randn(32, 8, generator=noise).double()

    def outputs(model, prompts, role):
        z = torch.randn(400, 2, 4, 8, generator=noise).double()
        z[:, 1, 2] = model.W_U[:, prompts.answer].T.double() @ project
        return z

    monkeypatch.setattr(fingerprint, "_outputs", outputs)
    hits, chance = codeword_readout(model, train, test)
    # 8 of 32 dimensions of an isotropic unembedding: far above chance, not perfect; noise stays at chance (sd 0.011)
    assert chance == 1 / 20 and hits[1, 2] > 4 * chance and np.delete(hits.ravel(), 6).max() < 2.4 * chance


def test_weighted_gap_of_known_changes():
    assert weighted_gap(np.diag([4.0, 2.0, 1.0])) == pytest.approx(2)
    assert weighted_gap(np.ones((3, 5))) > 1e5 and weighted_gap(np.zeros((3, 5))) == pytest.approx(1)
    parameters = torch.from_numpy(np.random.default_rng(0).normal(size=(8, 1, 2, 30)).cumsum(0))
    changes, larger = ChangeProducts(window=3), ChangeProducts(window=3)
    for at in parameters:
        changes.add(at, at.flatten())
        larger.add(5 * at, 5 * at.flatten())
    gap = rolling_gap(changes.table())  # [two heads and the whole model, checkpoint]
    assert np.isnan(gap[:, :3]).all() and gap.shape == (3, 8)
    assert gap[1, 5] == pytest.approx(weighted_gap(np.diff(parameters[2:6, 0, 1].numpy(), axis=0)))
    assert gap[2, 7] == pytest.approx(weighted_gap(np.diff(parameters[4:].flatten(1).numpy(), axis=0)))
    np.testing.assert_allclose(rolling_gap(larger.table())[:, 3:], gap[:, 3:])
    with pytest.raises(ValueError, match="two"):
        weighted_gap(np.ones((1, 4)))


def test_finder_scores():
    found = finder_scores([(0, 0), (0, 1)], [(0, 1), (2, 2), (2, 3)])
    assert found["precision"] == 0.5 and found["recall"] == pytest.approx(1 / 3)


def test_recurrence_by_enumeration():
    result = recurrence({1: [(0, 0)], 2: [(0, 0)], 3: [(0, 1)]}, 1, 2, n_draws=4000)
    assert result["overlap"] == pytest.approx(1 / 3) and result["expected"] == pytest.approx(0.5, abs=0.02)
    assert result["p"] > 0.9  # the least overlap that three picks of two heads can have
    with pytest.raises(ValueError, match="two seeds"):
        recurrence({1: [(0, 0)]}, 1, 2)


def test_auc_equals_counting_pairs():
    value, label = np.array([0.1, 0.4, 0.35, 0.8, 0.4]), np.array([False, False, True, True, True])
    pairs = [(a > b) + 0.5 * (a == b) for a in value[label] for b in value[~label]]
    assert _auc(value, label) == pytest.approx(np.mean(pairs))
    both = np.stack([label, ~label, np.ones(5, bool)])
    assert _auc(value, both) == pytest.approx([np.mean(pairs), 1 - np.mean(pairs), np.nan], nan_ok=True)


def test_start_prediction_of_noise_is_not_significant():
    rng = np.random.default_rng(3)
    heads = pd.DataFrame(
        [(s, h // 4, h % 4, rng.normal(), h % 5 == 0) for s in range(10) for h in range(12)],
        columns=["seed", "layer", "head", "start_top", "pick_spread"],
    )
    for within in ("seed", "layer"):
        assert start_prediction(heads, "start_top", within=within, n_draws=200)["p"] > 0.05


def test_ablation_conditions_leave_the_own_picks_out_of_the_controls():
    picks = {"spread": {1: [(0, 0), (1, 2)], 2: [(0, 1)]}, "rise": {1: [], 2: []}}
    conditions = ablation_conditions(1, picks, 3, 4)
    matched = [set(h) for c, h in conditions if c == "matched layer"]
    assert len(matched) == 9 and all(not h & {(0, 0), (1, 2)} for h in matched)
    assert sum(c == "matched model" for c, _ in conditions) == 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": "sprad"}, "did you mean 'spread'"),
        ({"n_prompts": 1}, "n_prompts"),
        ({"processing": "fold"}, "did you mean 'folded'"),
        ({"model_name": ""}, "model_name"),
        ({"n_ablation": 2}, "n_ablation"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        FingerprintConfig(**change)


def test_committed_tables_are_complete():
    if not tables_dir().is_dir():
        pytest.skip("tables are absent")
    tables = load_seed_tables()
    seeds = set(tables["heads"].seed)
    assert (
        len(seeds) == 12
        and {42, 271, 149} <= seeds
        and set(tables["trajectory"].seed) == seeds == set(tables["ablation"].seed)
    )
    assert len(tables["heads"]) == 12 * 12 and tables["trajectory"].value.notna().all()
    base = tables["ablation"].query("condition == 'baseline' and step == 1600")
    assert (base.accuracy > 0.9).all()
    events = replay_events(tables["trajectory"], {})
    assert set(events.seed) == seeds and not events.picked.any()


def test_tables_of_the_large_seeds_are_complete():
    if not tables_dir().is_dir():
        pytest.skip("tables are absent")
    tables = load_seed_tables(family="story-8x16")
    assert set(tables) == {"trajectory", "heads", "ablation", "gaps", "without"}
    seeds = set(tables["heads"].seed)
    assert len(seeds) == 6 and len(tables["heads"]) == 6 * 128
    assert tables["trajectory"].value.notna().all() and set(tables["trajectory"].seed) == seeds
    accuracy = tables["trajectory"].query("metric == 'accuracy'")
    assert (accuracy.groupby("seed").value.last() > 0.9).all()
    rise = accuracy.query("0.1 < value < 0.9").groupby("seed").size()
    assert rise.min() >= 10 and rise.mean() >= 17  # a cadence that can tell what comes first
    control = tables["without"].query("metric == 'accuracy'")
    assert control.seed.nunique() == 3 and control.value.max() < 0.1
    with pytest.raises(ValueError, match="story-gpt2"):
        load_seed_tables(family="story-gpt3")


@zoo
def test_trajectory_of_a_shipped_model():
    from spectral_nb.prompts.grammar import story_tokenizer
    from spectral_nb.models.revisions import list_revisions
    from spectral_nb.prompts.lookup_tasks import retrieval

    revisions = list_revisions("story-gpt2-s42")
    batch = retrieval(story_tokenizer(), 80, seed=5)
    table = ratio_trajectory("story-gpt2-s42", [revisions[0], revisions[-1]], batch, nulls=["fixed"])
    pr, steps = as_array(table)
    fixed = as_array(table, "pr_fixed")[0]
    assert steps[0] == 0 and pr[..., 0].max() < 1.5 and pr[..., -1].max() > 4
    best = np.unravel_index((pr - fixed)[..., -1].argmax(), pr.shape[:2])
    assert fixed[(*best, -1)] < 2  # what it carries is the codeword
    assert set(table.processing) == {"raw"} and table.tokens.max() > 0
    with pytest.raises(ValueError, match="revision"):
        ratio_trajectory("story-gpt2-s42", ["step7"], batch)


@pytest.fixture(scope="module")
def lone_model(tmp_path_factory):
    "A folder with one model and no checkpoints."
    from spectral_nb.prompts.grammar import story_tokenizer

    folder = tmp_path_factory.mktemp("lone")
    hf = tiny_hf("gpt2")
    torch.manual_seed(1)
    config = type(hf.config)(
        vocab_size=512, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
    type(hf)(config).save_pretrained(folder)
    story_tokenizer().save_pretrained(folder)
    return folder


def test_one_checkpoint_is_normal(lone_model):
    "No trajectory: content PR picks, nothing is NaN, no warning, and a score that needs checkpoints is refused."
    import warnings

    from spectral_nb.fingerprint.findings import fingerprint_claims
    from spectral_nb.pr_fingerprint import measure
    from spectral_nb.fingerprint.one_model import fingerprint_table

    small = dict(model_name=str(lone_model), n_prompts=40, n_ablation=12, n_draws=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        m = measure(FingerprintConfig(**small))
    assert m.one_checkpoint and m.score == "content" and list(m.scores) == ["content"] and m.nulls == {}
    np.testing.assert_allclose(m.scores["content"], m.final["pr"] - m.final["pr_fixed"])
    assert m.judged_by == "answer loss"  # an untrained model is at the floor of accuracy
    assert fingerprint_table(m).value.notna().all() and set(m.ablation["mode"]) == {"zero", "mean", "resample"}
    said = fingerprint_claims(m)
    assert len(said) == 4 and said[["effect", "ci_low", "ci_high"]].notna().all().all()
    with pytest.raises(ValueError, match="needs checkpoints"):
        measure(FingerprintConfig(score="spread", **small))


def test_settings_of_the_wrong_type_are_refused():
    for change, match in (({"seed": "0"}, "seed"), ({"n_draws": True}, "n_draws"), ({"prompts": 3}, "prompts")):
        with pytest.raises(TypeError, match=match):
            FingerprintConfig(**change)


def test_the_headline_says_what_the_tables_say():
    "Numbers of the first sentence of the article, from the committed tables."
    import json
    import re

    from spectral_nb.base.paths import repo_root

    if not tables_dir().is_dir():
        pytest.skip("tables are absent")
    cells = json.loads((repo_root() / "nbs/13_pr_fingerprint.ipynb").read_text())["cells"]
    headline = next(line for line in cells[1]["source"] if line.startswith(">"))
    tables = load_seed_tables(family="story-8x16")
    last, heads = tables["ablation"].query("step == step.max()"), tables["heads"]
    base = last[last.condition == "baseline"].set_index("seed").accuracy
    own, random = (
        base - last[last.condition == c].groupby("seed").accuracy.mean() for c in ("own spread", "matched model")
    )
    assert [f"{x:.2f}" for x in (own.mean(), random.mean())] == re.findall(r"0\.\d\d", headline)
    unneeded = 1 - (heads[heads.pick_spread].accuracy_ci_low > 0).mean()
    assert 0.75 < unneeded < 0.85 and "four of five can each go" in headline
