"""The section end to end on tiny models with revisions, its tables and claims, and the published p-value."""

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from spectral_nb.prompts.bigrams import natural_bigrams, repeated_bigram, synthetic_bigrams
from spectral_nb.base.paths import reference_dir
from spectral_nb.base.long_tables import LONG_FIRST
from spectral_nb.cross_architecture import CrossArchitectureConfig
from spectral_nb.prompts.grammar import lexicon, story_tokenizer
from spectral_nb.base.intervals import exact_p, wilson
from spectral_nb.causal.metrics import evaluate
from spectral_nb.models.loading import from_hf
from spectral_nb.survey.batches import usable_revisions
from spectral_nb.survey.findings import model_agreement, survey_claims, unasked
from spectral_nb.survey.model_survey import head_sets, survey_model, survey_models, survey_table
from spectral_nb.survey.rankings import (
    conserved_fraction,
    head_emergence,
    precision_at_k,
    ranking_table,
    strongest_head,
    with_classes,
)
from spectral_nb.fingerprint.removals import control_sets
from spectral_nb.survey.screens import removal_curve, screen_ablation, screen_heads
from spectral_nb.survey.sinks import bos_drivers, bos_floor, newcombe
from spectral_nb.survey.targets import CLASSES


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Three revisions of a tiny GPT-2 with the story tokenizer."
    root = tmp_path_factory.mktemp("tiny")
    config = GPT2Config(vocab_size=512, n_positions=32, n_embd=16, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    for step in (10, 100, 1000):
        torch.manual_seed(step)
        model = GPT2LMHeadModel(config)
        for p in model.parameters():
            p.data += 0.02 * torch.randn_like(p)
        model.save_pretrained(root / f"step{step}-tokens{step}M")
    GPT2LMHeadModel.from_pretrained(root / "step1000-tokens1000M").save_pretrained(root)
    story_tokenizer(32).save_pretrained(root)
    (root / "text.txt").write_text(
        "\n\n".join(["Tom took the red ball . Then Tom saw the park . Then Tom took the red ball again ."] * 60)
    )
    return root


@pytest.fixture(scope="module")
def cfg(folder):
    return CrossArchitectureConfig(
        model_name=str(folder), n_prompts=20, n_ablation=10, n_draws=4, text=str(folder / "text.txt")
    )


@pytest.fixture(scope="module")
def surveyed(folder, cfg):
    return survey_model(str(folder), cfg)


def test_end_to_end(surveyed):
    m = surveyed
    assert set(m.surveys) == {"synthetic", "natural"} and all(len(t) == 8 for t in m.surveys.values())
    assert (
        m.pr.shape == (2, 4, 3) and m.tokens == [10**7, 10**8, 10**9] and (m.pr >= 1).all() and (m.pr <= 4 + 1e-9).all()
    )
    assert sorted(m.classed["rank"]) == list(range(1, 9))
    assert len(m.curve) == 5 and m.info.processing == "raw" and m.pr_shuffled.shape == (2, 4)


def test_long_table(surveyed):
    table = survey_table([surveyed])
    assert list(table.columns[: len(LONG_FIRST)]) == list(LONG_FIRST)
    assert set(CLASSES) <= set(table["metric"]) and (table["metric"] == "participation_ratio").sum() == 24
    assert table["processing"].unique().tolist() == ["raw"]
    wide = table[(table["metric"] == "induction") & (table["batch"] == "synthetic")].set_index(["layer", "head"])[
        "value"
    ]
    direct = surveyed.surveys["synthetic"].set_index(["layer", "head"])["induction"]
    assert np.allclose(wide.loc[direct.index], direct)


def test_claims_are_asked_only_where_they_can_be(surveyed):
    table = survey_claims([surveyed])
    assert not table["claim"].str.contains("screened").any() and "none passes the screen" in unasked(surveyed)[0]
    assert set(table["rule"]) == {"differs", "equals"} and set(table["verdict"]) <= {"yes", "no", "undecided"}
    numbers = table[["effect", "ci_low", "ci_high"]]
    assert numbers.notna().all().all() and (table["ci_low"] <= table["effect"]).all()
    shown = model_agreement(pd.concat([table, table.assign(model="twin")]), surveyed.name)
    assert (
        len(shown) == len(table)
        and (shown[[f"others: {v}" for v in ("yes", "no", "undecided")]].sum(axis=1) == 1).all()
    )


def test_one_checkpoint_is_normal(folder, tmp_path, recwarn):
    "A model without checkpoints: ranked by its PR, no NaN in a table, no claim of an integral, no warning."
    import shutil
    import warnings

    alone = shutil.copytree(folder, tmp_path / "alone", ignore=shutil.ignore_patterns("step*"))
    one = CrossArchitectureConfig(
        model_name=str(alone), n_prompts=20, n_ablation=10, n_draws=4, text=str(folder / "text.txt")
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        m = survey_model(str(alone), one)
    assert m.pr.shape == (2, 4, 1) and m.tokens is None and m.ranked_by == "PR"
    assert list(m.classed["final"]) == sorted(m.pr.ravel(), reverse=True) and "integral" not in m.classed
    assert survey_table([m])["value"].notna().all() and "spread, integral and emergence need checkpoints" in unasked(m)
    assert not survey_claims([m])["claim"].str.contains("integral").any()


def test_faulty_revision_is_left_out(folder, cfg, tmp_path):
    import shutil

    copy = shutil.copytree(folder, tmp_path / "copy")
    shutil.copy(copy / "step1000-tokens1000M" / "model.safetensors", copy / "step10-tokens10M" / "model.safetensors")
    table = usable_revisions(str(copy), cfg)
    assert table["used"].tolist() == [False, True, True] and "duplicate of step1000" in table["fault"][0]


def test_revisions_out_of_order_or_without_tokens(folder, tmp_path):
    with pytest.raises(ValueError, match="out of order"):
        usable_revisions(
            str(folder), CrossArchitectureConfig(model_name="x", revisions="step100-tokens100M step10-tokens10M")
        )
    import shutil

    for step in (10, 100):
        shutil.copytree(folder / f"step{step}-tokens{step}M", tmp_path / f"step{step}")
    with pytest.raises(ValueError, match="without a token count"):
        usable_revisions(str(tmp_path), CrossArchitectureConfig(model_name="x", revisions="step10 step100"))


def test_missing_models():
    skipped = {}
    with pytest.raises(FileNotFoundError, match="story-nothing"):
        survey_models(CrossArchitectureConfig(model_name="story-nothing"), skipped)
    assert list(skipped) == ["story-nothing"]


def test_bad_config():
    for change, match in (
        (dict(model_name=" "), "names no model"),
        (dict(threshold=-1.0), "threshold"),
        (dict(vocabulary="x"), "range such as"),
        (dict(screen_threshold=-1.0), "screen_threshold"),
        (dict(n_draws=0), "n_draws"),
        (dict(processing="cooked"), "processing"),
        (dict(length=9), "at least 16"),
        (dict(n_prompts=3), "at least 8"),
    ):
        with pytest.raises(ValueError, match=match):
            CrossArchitectureConfig(**change)
    for change, match in ((dict(n_prompts=20.5), "n_prompts"), (dict(prepend_bos="false"), "prepend_bos")):
        with pytest.raises(TypeError, match=match):
            CrossArchitectureConfig(**change)


def random_model(n_layers=2, n_heads=4, n_ctx=32):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=60,
        n_positions=n_ctx,
        n_embd=8 * n_heads,
        n_layer=n_layers,
        n_head=n_heads,
        bos_token_id=0,
        eos_token_id=0,
    )
    return from_hf(GPT2LMHeadModel(config).eval())


def test_synthetic_batch():
    tokenizer = story_tokenizer()
    batch = synthetic_bigrams(tokenizer, 50, length=40)
    rows, at = torch.arange(50), batch.positions["A1"]
    a, b = batch.tokens[rows, at], batch.tokens[rows, at + 1]
    assert (
        (batch.tokens[:, 0] == tokenizer.bos_token_id).all()
        and (batch.tokens[:, -1] == a).all()
        and (batch.answer == b).all()
    )
    assert ((batch.tokens == a[:, None]).sum(1) == 2).all() and ((batch.tokens == b[:, None]).sum(1) == 1).all()
    assert (at >= 5).all() and (at < 20).all()
    codes = set(tokenizer.convert_tokens_to_ids(list(lexicon().split("codewords", "known"))))
    assert set(batch.tokens[:, 1:].flatten().tolist()) <= codes
    every = synthetic_bigrams(tokenizer, 50, length=40, vocabulary="all", prepend_bos=False)
    assert not set(every.tokens.flatten().tolist()) <= codes and not (every.tokens == tokenizer.bos_token_id).any()
    assert set(
        synthetic_bigrams(tokenizer, 9, length=40, vocabulary=range(100, 200)).tokens[:, 1:].flatten().tolist()
    ) <= set(range(100, 200))


def test_synthetic_batch_refusals():
    tokenizer, model = story_tokenizer(), random_model()
    with pytest.raises(ValueError, match="longest possible for this model is 32"):
        synthetic_bigrams(model, 4, length=64, vocabulary=range(1, 90))
    with pytest.raises(ValueError, match="largest allowed is 511"):
        synthetic_bigrams(tokenizer, 4, vocabulary=range(100, 10_000))
    with pytest.raises(ValueError, match="at least 8"):
        synthetic_bigrams(tokenizer, 4, vocabulary=[5, 6, 7])
    with pytest.raises(ValueError, match="n_prompts"):
        synthetic_bigrams(tokenizer, 0)


def test_natural_batch_against_a_search(folder):
    text = (folder / "text.txt").read_text()
    batch = natural_bigrams(story_tokenizer(64), text, 30, length=30, min_gap=5)
    for tokens, first, end, answer in zip(
        batch.tokens.tolist(), batch.positions["A1"].tolist(), batch.positions["end"].tolist(), batch.answer.tolist()
    ):
        assert (
            tokens[first] == tokens[end]
            and tokens[first + 1] == tokens[end + 1] == answer
            and end - first >= 5
            and first >= 1
        )
    every = natural_bigrams(story_tokenizer(64), text, 30, length=30, min_gap=5, repeated=False)
    ends = torch.arange(len(every)), every.positions["end"]
    assert (every.tokens[ends] == every.tokens[ends[0], every.positions["A1"]]).all()


def test_text_without_repeated_bigrams():
    ids = np.arange(2, 200)
    assert repeated_bigram(ids, np.random.default_rng(0)) is None
    words = [w for w in lexicon().words[2:] if w.isalpha()][:120]
    with pytest.raises(ValueError, match="none of its .* holds a bigram that recurs"):
        natural_bigrams(story_tokenizer(), " ".join(words), 5, length=40)
    with pytest.raises(ValueError, match="unknown to this tokenizer"):
        natural_bigrams(story_tokenizer(), "xyzzy plugh " * 100, 5, length=40)


@pytest.mark.skipif(reference_dir() is None, reason="no reference data beside this checkout")
def test_published_draws_through_the_p_value():
    rows = pd.read_csv(reference_dir() / "published" / "matched_random_pythia_1b.csv").set_index("condition")["top1"]
    base = rows["baseline"]
    draws = [base - v for k, v in rows.items() if "draw" in k]
    assert len(draws) == 9 and exact_p(base - rows["induction screen >= 10"], draws) == pytest.approx(0.1)
    assert exact_p(base - 0.0405, draws) == pytest.approx(
        0.3
    )  # a set without effect: the two draws that do harm are ahead of it
    assert min(draws) < -0.3 and max(draws) > 0.03  # one draw would have shown anything


@pytest.mark.skipif(reference_dir() is None, reason="no reference data beside this checkout")
def test_published_bos_shares_through_the_drivers():
    table = pd.read_csv(reference_dir() / "published" / "bos_fraction.csv").rename(
        columns={"heads": "n_heads", "bos_synthetic": "share"}
    )
    drivers = bos_drivers(table.assign(scale=["160m", "410m", "1b", "1b", "1b"])).set_index("driver")
    assert drivers.loc["data", "difference"] == pytest.approx(0.242, abs=0.005) and drivers.loc["data", "ci_low"] > 0.1
    assert drivers.loc["architecture", "difference"] == pytest.approx(0.101, abs=0.005)
    assert (
        drivers.loc["scale", "ci_low"] < 0
    ).sum() == 2  # of the three steps in scale only 160M to 410M is beyond its interval


def test_ranking_precision_and_fraction():
    pr = np.ones((2, 3, 4))
    pr[0, 1], pr[1, 2], pr[1, 0] = [1, 6, 6, 6], [1, 1, 1, 8], [1, 2, 2, 2]
    ranking = ranking_table(pr, [1e6, 1e7, 1e8, 1e9])
    assert list(zip(ranking["layer"], ranking["head"]))[:2] == [(0, 1), (1, 2)] and ranking["spread"].idxmax() == 1
    classes = ["self", "induction", "unclassified", "first_token", "unclassified", "unclassified"]
    survey = pd.DataFrame({"layer": [0, 0, 0, 1, 1, 1], "head": [0, 1, 2] * 2, "class": classes, "selectivity": 1.0})
    for i, c in enumerate(CLASSES):
        survey[c] = np.arange(6) * 1.0 + i
    c = with_classes(ranking, survey)
    assert precision_at_k(c, [1, 2, 3])["precision"].tolist() == [1, 0.5, pytest.approx(2 / 3)]
    assert conserved_fraction(c, 3)["fraction"] == pytest.approx(2 / 6) and conserved_fraction(c, 3, without_bos=True)[
        "fraction"
    ] == pytest.approx(1 / 6)
    best = strongest_head(c)
    assert best["head"] == "L1H2" and best["rank_integral"] == 2 and best["rank_spread"] == 1
    when = head_emergence(pr, [1e6, 1e7, 1e8, 1e9], c, level=2).set_index(["layer", "head"])["tokens"]
    assert when[0, 1] == 1e7 and when[1, 2] == 1e9 and np.isnan(when[0, 0])
    with pytest.raises(ValueError, match="not of the same model"):
        with_classes(ranking, survey.iloc[:4])


def test_floor_and_shares():
    survey = pd.DataFrame(
        {"layer": np.repeat(range(6), 8), "head": list(range(8)) * 6, "class": ["self"] * 16 + ["first_token"] * 32}
    )
    floor = bos_floor(survey)
    assert floor["holds"] and floor["p_fewer"] < 1e-6 and floor["exceptions"] == ""
    survey.loc[3, "class"] = "first_token"
    assert bos_floor(survey)["exceptions"] == "L0H3" and not bos_floor(survey)["holds"]
    gap = newcombe(wilson(200, 256), wilson(174, 256))
    assert gap.estimate == pytest.approx(-26 / 256) and gap.low == pytest.approx(-0.177, abs=0.005) and gap.high < -0.02


def test_control_sets_come_from_the_layers_first():
    model = random_model(3, 4)
    sets = control_sets([(1, 0), (1, 1)], 20, 0, model.cfg)
    assert sets[0] == ("draw", [(1, 2), (1, 3)]) and len(sets) == 20 and len({frozenset(h) for _, h in sets}) == 20
    assert all(c == "draw elsewhere" and not {(1, 0), (1, 1)} & set(h) for c, h in sets[1:])
    wide = control_sets([(1, 0)], 20, 0, random_model(2, 32, 32).cfg)
    assert len(wide) == 20 and {c for c, _ in wide} == {"draw"} and {h[0][0] for _, h in wide} == {1}


def test_screen_ablation_against_the_plain_test():
    from spectral_nb.causal.set_tests import ablation_test

    model = random_model(2, 4)
    batch, heads = synthetic_bigrams(model, 24, vocabulary="all"), [(0, 1), (1, 3)]
    ours = screen_ablation(model, batch, heads, n_draws=6, seed=3)
    near = [h for c, h in control_sets(heads, 6, 3, model.cfg)]
    for metric, name in (("accuracy", "top1"), ("answer_logprob", "loss")):
        plain = ablation_test(model, batch, heads, metric, draws=near, seed=3)
        row = ours[(ours["condition"] == "set") & (ours["metric"] == name)].iloc[0]
        assert (
            row["effect"] == pytest.approx(plain.effect.estimate, abs=1e-5)
            and row["p"] == pytest.approx(plain.p)
            and row["rank"] == plain.rank
        )
    with pytest.raises(ValueError, match="the screen found none"):
        screen_ablation(model, batch, [])


def test_screen_and_sets(surveyed):
    survey = surveyed.surveys["synthetic"]
    assert screen_heads(survey, threshold=0) and screen_heads(survey, threshold=1e6) == []
    assert set(head_sets(surveyed)) <= {"null", "ranking"}
    curve = removal_curve(random_model(), synthetic_bigrams(random_model(), 12, vocabulary="all"), survey, max_heads=2)
    assert curve["m"].tolist() == [0, 1, 2] and curve["top1"][1] == curve["alone_top1"][1]


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "llama", "qwen3", "olmo", "olmoe"])
@pytest.mark.parametrize("processing", ["raw", "folded"])
def test_removal_from_a_layer_equals_whole_passes(tiny_model, architecture, processing):
    "Logits at one position from the first changed layer, against passes of the whole model with all logits."
    from test_pr_fingerprint import toy_batch

    from spectral_nb.causal.ablation import ablated_values
    from spectral_nb.fingerprint.removals import removal_values

    model, batch = tiny_model(architecture, processing), toy_batch()
    sets = [[(0, 1)], [(1, 2)], [(0, 0), (1, 3)]]
    base, values = removal_values(model, batch, sets)
    for heads, found in zip([[], *sets], [base, *values]):
        whole = (
            ablated_values(model, batch, heads, "answer_logprob") if heads else evaluate(model, batch, "answer_logprob")
        )
        np.testing.assert_allclose(-found[:, 2], whole, atol=2e-5)
    assert all("forward" not in module.__dict__ for module in model.modules())  # all restored


def test_a_small_accuracy_is_judged_by_the_log_probability():
    "Three per cent of top-1 cannot show a loss."
    from spectral_nb.survey.model_survey import ModelSurvey

    table = pd.DataFrame(
        {"set": "screen", "measured_on": "synthetic", "metric": m, "condition": c, "effect": e}
        for m in ("top1", "loss")
        for c, e in (("set", 1.0), ("draw", 0.5))
    )
    low, high = (ModelSurvey("m", {}, [], ablation=table, baseline={"synthetic": {"top1": b}}) for b in (0.03, 0.6))
    assert low.test("screen", "synthetic")[0]["metric"] == "loss" and high.metric("synthetic") == "top1"
