"Ablation, matched random sets, exact statistics."

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, D_VOCAB, random_tokens, tiny_hf

from spectral_nb.attention.activations import capture
from spectral_nb.base.claims import claims_table
from spectral_nb.base.intervals import Interval, bootstrap_ci, exact_p, permutation_p, wilson
from spectral_nb.causal.ablation import ablate_heads, ablated_values, reference_outputs
from spectral_nb.causal.head_effects import single_heads
from spectral_nb.causal.matched_sets import matched_random
from spectral_nb.causal.metrics import evaluate, metric_values
from spectral_nb.causal.set_tests import ablation_test, set_verdict
from spectral_nb.models.loading import from_hf
from spectral_nb.prompts.batches import PromptBatch


def toy_batch(n=24, length=10, pad=3, seed=0):
    "Random prompts, some of them shorter, with answers."
    tokens = random_tokens(n, length, seed)
    lengths = torch.tensor([length - i % (pad + 1) for i in range(n)])
    mask = torch.arange(length) < lengths[:, None]
    return PromptBatch(
        "toy", tokens * mask, mask, {"end": lengths - 1}, torch.arange(n) + 1, torch.arange(n) + 2, [""] * n, 0
    )


def logits_of(model, tokens):
    with torch.no_grad():
        return model(tokens)


@pytest.mark.parametrize("processing", ["raw", "folded"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_zeroing_equals_subtracting_what_the_heads_write(tiny_model, architecture, processing):
    model, tokens = tiny_model(architecture, processing), random_tokens()
    base = logits_of(model, tokens)
    for layer in range(2):
        name = f"blocks.{layer}.attn.hook_z"
        with torch.no_grad():
            _, cache = model.run_with_cache(tokens, names_filter=[name])
        W_O = model.blocks[layer].attn.W_O
        written = sum(cache[name][:, :, h] @ W_O[h] for h in (0, 2))
        with model.hooks(fwd_hooks=[(f"blocks.{layer}.hook_attn_out", lambda out, hook, w=written: out - w)]):
            expected = logits_of(model, tokens)
        with ablate_heads(model, [(layer, 0), (layer, 2)]):
            found = logits_of(model, tokens)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-4)
        assert (found - base).abs().max() > 1e-3
        assert torch.equal(logits_of(model, tokens), base)


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "llama"])
def test_zero_of_the_raw_weights_from_folded_ones(tiny_model, architecture):
    "Folding leaves a zeroed head its value bias; `zero_raw` does not, and is the plain zero of raw weights."
    raw, folded = (tiny_model(architecture, processing) for processing in ("raw", "folded"))
    heads, tokens = [(0, 1), (1, 0), (1, 3)], random_tokens()

    def without(model, mode):
        with ablate_heads(model, heads, mode):
            return logits_of(model, tokens).log_softmax(-1)

    expected = without(raw, "zero")
    torch.testing.assert_close(without(folded, "zero_raw"), expected, atol=2e-5, rtol=2e-4)
    torch.testing.assert_close(without(raw, "zero_raw"), expected)
    biased = architecture != "llama"
    assert ((without(folded, "zero") - expected).abs().max() > 0.1) == biased


def test_a_batch_that_does_not_fit_is_refused_before_it_is_run(tiny_model):
    model, batch = tiny_model("gpt2"), toy_batch()
    outside = [
        (dict(tokens=batch.tokens + D_VOCAB), "tokens .padding included.: row 0"),
        (dict(answer=batch.answer + D_VOCAB), "answer .padding included.: row 0"),
    ]
    for change, message in outside:
        for use in (evaluate, capture):
            with pytest.raises(ValueError, match=message):
                use(model, replace(batch, **change))


def test_model_is_restored_bit_for_bit_also_after_an_exception(tiny_model):
    model, tokens = tiny_model("gpt2"), random_tokens()
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    calls, base = [], logits_of(model, tokens)
    own = model.blocks[0].attn.hook_z
    with model.hooks(fwd_hooks=[("blocks.0.attn.hook_z", lambda z, hook: calls.append(1))]):
        with pytest.raises(KeyboardInterrupt), ablate_heads(model, "L0H1 L1H0"):
            raise KeyboardInterrupt
        logits_of(model, tokens)
    assert calls == [1], "a hook that the caller had set must survive"
    assert torch.equal(logits_of(model, tokens), base)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert own is model.blocks[0].attn.hook_z


def test_nested_ablations_add_up(tiny_model):
    model, tokens = tiny_model("llama"), random_tokens()
    with ablate_heads(model, "L0H1"), ablate_heads(model, "L0H2"):
        nested = logits_of(model, tokens)
    with ablate_heads(model, "L0H1 L0H2"):
        together = logits_of(model, tokens)
    assert torch.equal(nested, together)


def test_mean_ablation_uses_real_tokens_only(tiny_model):
    model, batch = tiny_model("gpt2"), toy_batch()
    reference = reference_outputs(model, batch, batch_size=7)
    with torch.no_grad():
        _, cache = model.run_with_cache(batch.tokens, names_filter=["blocks.1.attn.hook_z"])
    torch.testing.assert_close(reference.mean[1], cache["blocks.1.attn.hook_z"][batch.attention_mask].mean(0))
    seen = []
    with (
        ablate_heads(model, "L1H2", "mean", reference),
        model.hooks(fwd_hooks=[("blocks.1.attn.hook_z", lambda z, hook: seen.append(z.clone()))]),
    ):
        logits_of(model, batch.tokens)
    torch.testing.assert_close(seen[0][:, :, 2], reference.mean[1, 2].expand_as(seen[0][:, :, 2]))


def test_resampling_takes_one_donor_for_all_heads_and_repeats(tiny_model):
    model, batch = tiny_model("gpt2"), toy_batch()
    values = [
        ablated_values(model, batch, "L0H0 L1H1", "logit_diff", mode="resample", reference=batch, seed=s)
        for s in (1, 1, 2)
    ]
    assert np.array_equal(values[0], values[1]) and not np.array_equal(values[0], values[2])
    # resampling all heads of layer 0 and 1 from a reference of one prompt makes attention the same everywhere
    one = batch.subset([0])
    heads = [(ly, h) for ly in range(2) for h in range(4)]
    with ablate_heads(model, heads, "resample", one), torch.no_grad():
        _, cache = model.run_with_cache(batch.tokens[:, :4], names_filter=["blocks.0.hook_attn_out"])
    out = cache["blocks.0.hook_attn_out"]
    torch.testing.assert_close(out, out[:1].expand_as(out))


@pytest.mark.parametrize(
    ("heads", "mode", "message"),
    [
        ("L0H1 L0H1", "zero", "more than once"),
        ("L5H0", "zero", "L5H0"),
        ("L0H4", "zero", "L0H4"),
        ("L0H1", "zer", "did you mean 'zero'"),
        ("L0H1", "mean", "reference"),
        ("x", "zero", "L9H6"),
    ],
)
def test_bad_ablations_are_refused_and_leave_nothing(tiny_model, heads, mode, message):
    model, tokens = tiny_model("gpt2"), random_tokens()
    base = logits_of(model, tokens)
    with pytest.raises(ValueError, match=message), ablate_heads(model, heads, mode):
        pass
    assert torch.equal(logits_of(model, tokens), base)


def test_metrics_by_hand():
    logits = torch.zeros(2, 3, 4)
    logits[0, 1] = torch.tensor([0.0, 3.0, 1.0, 0.0])
    logits[1, 2] = torch.tensor([5.0, 1.0, 2.0, 0.0])
    tokens = torch.tensor([[0, 1, 0], [0, 2, 3]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    batch = PromptBatch(
        "toy", tokens, mask, {"end": torch.tensor([1, 2])}, torch.tensor([1, 1]), torch.tensor([2, 3]), ["", ""], 0
    )
    assert metric_values(logits, batch, "logit_diff").tolist() == [2, 1]
    assert metric_values(logits, batch, "accuracy").tolist() == [1, 0]
    assert metric_values(logits, batch, "accuracy_vs_rival").tolist() == [1, 1]
    expected = [3 - math.log(2 + math.e**3 + math.e), 1 - math.log(math.e**5 + math.e + math.e**2 + 1)]
    np.testing.assert_allclose(metric_values(logits, batch, "answer_logprob"), expected, rtol=1e-6)
    np.testing.assert_allclose(metric_values(logits, batch, "loss"), [math.log(4), math.log(4)], rtol=1e-6)
    assert metric_values(logits, batch, lambda x, b: x[:, 0, 0] + 1).tolist() == [1, 1]
    with pytest.raises(ValueError, match="did you mean"):
        metric_values(logits, batch, "accurcy")


def test_padding_does_not_change_a_metric(tiny_model):
    model, batch = tiny_model("llama"), toy_batch()
    other = PromptBatch(
        "toy",
        torch.where(batch.attention_mask, batch.tokens, 5),
        batch.attention_mask,
        batch.positions,
        batch.answer,
        batch.wrong,
        batch.text,
        5,
    )
    for metric in ("logit_diff", "loss"):
        np.testing.assert_allclose(
            evaluate(model, batch, metric), evaluate(model, other, metric, batch_size=5), atol=1e-5
        )


def test_matched_sets_have_the_same_layers_and_avoid_the_picks():
    heads, exclude = [(0, 1), (2, 3), (2, 5)], [(2, 0)]
    draws = matched_random(heads, 40, 7, n_heads=8, exclude=exclude)
    assert len({tuple(sorted(d)) for d in draws}) == 40
    for draw in draws:
        assert [ly for ly, _ in draw] == [0, 2, 2] and not set(draw) & {*heads, *exclude}
    assert draws == matched_random(heads, 40, 7, n_heads=8, exclude=exclude)
    assert draws != matched_random(heads, 40, 8, n_heads=8, exclude=exclude)


def test_too_many_matched_draws_says_how_many_there_are_and_uses_all():
    with pytest.warns(UserWarning, match="only 9 matched sets exist"):
        draws = matched_random([(0, 0), (1, 1), (1, 2)], 100, 0, n_heads=5, exclude=[(0, 4)])
    every = {((0, a), *pair) for a in (1, 2, 3) for pair in itertools.combinations([(1, 0), (1, 3), (1, 4)], 2)}
    assert len(draws) == 9 and {tuple(d) for d in draws} == every


def test_matched_sets_are_uniform():
    counts = {}
    for seed in range(600):
        (draw,) = matched_random([(0, 0), (0, 1)], 1, seed, n_heads=6)
        counts[tuple(draw)] = counts.get(tuple(draw), 0) + 1
    assert len(counts) == math.comb(4, 2) and min(counts.values()) > 60


def test_a_whole_layer_has_no_matched_set():
    with pytest.warns(UserWarning, match="only 0 matched sets"):
        assert matched_random("L0H0 L0H1 L0H2", 5, 0, n_heads=4) == []
    assert len(matched_random("L0H0 L0H1 L0H2", 5, 0, n_heads=4, n_layers=3, match="model")) == 5


def test_huge_spaces_are_sampled_without_listing_them():
    heads = [(ly, h) for ly in range(40) for h in range(16)]
    draws = matched_random(heads, 3, 0, n_heads=64)
    assert len(draws) == 3 and all(len(set(d)) == 640 for d in draws)


def test_ablation_test_is_consistent(tiny_model):
    model, batch = tiny_model("gpt2"), toy_batch()
    result = ablation_test(model, batch, "L1H0", "logit_diff", n_draws=3, seed=1)
    base, without = evaluate(model, batch, "logit_diff"), ablated_values(model, batch, "L1H0", "logit_diff")
    assert result.effect.estimate == pytest.approx((base - without).mean())
    assert {h for ((_, h),) in result.draws} == {1, 2, 3} and {ly for ((ly, _),) in result.draws} == {1}
    assert result.p == pytest.approx(result.rank / 4) == exact_p(result.effect.estimate, result.draw_effects)
    table = result.table()
    assert (
        table.condition.tolist() == ["baseline", "set", "draw", "draw", "draw", "layers"]
        and result.row()["n_draws"] == 3
    )
    loss = ablation_test(model, batch, "L1H0", "loss", draws=[[(1, 1)]])
    assert loss.effect.estimate == pytest.approx(
        (ablated_values(model, batch, "L1H0", "loss") - evaluate(model, batch, "loss")).mean()
    )


def test_single_heads_find_the_only_head_that_writes():
    hf, batch = tiny_hf("gpt2"), toy_batch()
    with torch.no_grad():
        for layer, block in enumerate(hf.transformer.h):
            rows = block.attn.c_proj.weight.view(4, 8, 32)
            rows[[h for h in range(4) if (layer, h) != (1, 2)]] = 0
    table = single_heads(from_hf(hf), batch, "logit_diff").set_index(["layer", "head"]).effect
    assert len(table) == 8 and abs(table[1, 2]) > 1e-3 and table.drop((1, 2)).abs().max() < 1e-5


def sharing_batch():
    "Prompts of several lengths that begin alike, two of them the same throughout."
    batch = toy_batch(10, 9, 4)
    tokens = batch.tokens.clone()
    tokens[1:6, :4] = tokens[0, :4]
    tokens[5] = tokens[0]
    mask = batch.attention_mask.clone()
    mask[5] = mask[0]
    return PromptBatch(
        "toy", tokens * mask, mask, {"end": mask.sum(1) - 1}, batch.answer, batch.wrong, batch.text, batch.pad_token_id
    )


def end_margin(logits, batch):
    "A function as metric that gets the logits at `end` alone."
    assert logits.ndim == 2
    return logits[:, 0] - logits[:, 1]


end_margin.reads = "end"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_single_heads_are_whole_passes(tiny_model, architecture):
    "Every head, mode and kind of metric, prompts that begin alike, and batches of several parts."
    model, batch = tiny_model(architecture), sharing_batch()
    for mode, metric in (
        ("zero", "logit_diff"),
        ("mean", "answer_logprob"),
        ("resample", "logit_diff"),
        ("zero", "loss"),
        ("mean", end_margin),
        ("zero", lambda logits, part: logits[:, 2, 5]),
    ):
        table = single_heads(model, batch, metric, mode=mode, reference=batch, seed=3)
        assert len(table) == 8
        for row in table.itertuples():
            head = [(row.layer, row.head)]
            whole = ablated_values(model, batch, head, metric, mode=mode, reference=batch, seed=3)
            expected = (evaluate(model, batch, metric) - whole).mean() * (-1 if metric == "loss" else 1)
            assert row.effect == pytest.approx(expected, abs=2e-5, rel=1e-4), (mode, row)
        assert table.effect.abs().max() > 1e-3
    one, many = (single_heads(model, batch, "logit_diff", batch_size=size) for size in (100, 3))
    np.testing.assert_allclose(one, many, atol=1e-5)


def test_single_heads_compute_less_and_leave_the_model_alone(tiny_model):
    model, batch = tiny_model("llama"), sharing_batch()
    before, rows = logits_of(model, batch.tokens), []
    counter = model.blocks[1].mlp.gate.register_forward_hook(
        lambda m, args, out: rows.append(out.shape[0] * out.shape[1])
    )
    table = single_heads(model, batch, "logit_diff", "L1H0 L1H1")
    counter.remove()
    assert sum(rows) <= 2 * batch.tokens.numel() + 2 * len(batch)  # two whole passes, then the last tokens alone
    assert not any("forward" in m.__dict__ for m in model.modules()) and torch.equal(
        before, logits_of(model, batch.tokens)
    )
    inside = {}
    with ablate_heads(model, "L0H2"):
        inside = single_heads(model, batch, "logit_diff", "L1H0").effect[0]
        with ablate_heads(model, "L1H0"):
            both = evaluate(model, batch, "logit_diff")
        one = evaluate(model, batch, "logit_diff")
    assert inside == pytest.approx((one - both).mean(), abs=1e-5) and len(table) == 2

    def broken(logits, part):
        raise KeyboardInterrupt

    broken.reads = "end"
    with pytest.raises(KeyboardInterrupt):
        from spectral_nb.causal.head_runs import head_values

        head_values(model, batch, [(1, 0)], broken, "zero", None, 0)
    assert torch.equal(before, logits_of(model, batch.tokens))


def test_evaluate_unembeds_what_it_reads(tiny_model):
    model, batch, seen = tiny_model("gpt2"), toy_batch(), []
    counter = model.unembed.register_forward_hook(lambda m, args, out: seen.append(out.shape[1]))
    for metric, positions in (("logit_diff", 1), ("accuracy", 1), (end_margin, 1), ("loss", batch.tokens.shape[1])):
        seen.clear()
        values = evaluate(model, batch, metric)
        assert max(seen) == positions
        if isinstance(metric, str):
            np.testing.assert_allclose(values, metric_values(logits_of(model, batch.tokens), batch, metric), atol=1e-5)
    counter.remove()


def test_exact_p_counts_ranks():
    rng = np.random.default_rng(0)
    for _ in range(20):
        draws, effect = rng.integers(0, 5, 9).astype(float), float(rng.integers(0, 5))
        assert exact_p(effect, draws) == (1 + sum(d >= effect for d in draws)) / 10
        assert exact_p(effect, draws, "less") == (1 + sum(d <= effect for d in draws)) / 10
    assert exact_p(1.0, []) == 1.0
    with pytest.raises(ValueError, match="finite"):
        exact_p(float("nan"), [1.0])


def test_permutation_p_equals_enumeration():
    a, b = [3.0, 5.0, 4.0], [1.0, 4.0, 2.0, 2.5]
    pooled, observed = a + b, np.mean(a) - np.mean(b)
    splits = [set(c) for c in itertools.combinations(range(7), 3)]
    difference = [
        np.mean([pooled[i] for i in s]) - np.mean([pooled[i] for i in range(7) if i not in s]) for s in splits
    ]
    expected = np.mean(np.array(difference) >= observed - 1e-12)
    assert permutation_p(a, b) == pytest.approx(expected)
    x, y = [2.0, 1.0, 4.0, 3.0], [1.0, 1.5, 2.0, 0.5]
    signs = itertools.product([1, -1], repeat=4)
    gaps = [np.mean(np.array(s) * (np.array(x) - np.array(y))) for s in signs]
    assert permutation_p(x, y, paired=True) == pytest.approx(
        np.mean(np.array(gaps) >= np.mean(np.array(x) - np.array(y)) - 1e-12)
    )


def test_intervals_cover_at_their_level():
    rng, hits = np.random.default_rng(0), [0, 0]
    for i in range(200):
        x = rng.normal(size=60)
        ci = bootstrap_ci(x, n_resamples=300, seed=i)
        hits[0] += ci.low <= 0 <= ci.high
        share = wilson(int((rng.random(30) < 0.1).sum()), 30)
        hits[1] += share.low <= 0.1 <= share.high
    assert all(180 <= h <= 200 for h in hits)


def test_grouped_bootstrap_treats_a_seed_as_one_observation():
    seeds = np.repeat(range(5), 20)
    values = seeds.astype(float)
    ci, naive = bootstrap_ci(values, groups=seeds), bootstrap_ci(values)
    assert ci.estimate == naive.estimate == 2 and ci.high - ci.low > 2 * (naive.high - naive.low)
    assert math.isinf(bootstrap_ci([1.0, 2.0], groups=[3, 3]).high)
    with pytest.raises(ValueError, match="groups"):
        bootstrap_ci([1.0, 2.0], groups=[1])
    with pytest.raises(ValueError, match="level"):
        bootstrap_ci([1.0, 2.0], level=95)


def test_claims_table_refuses_unknown_columns():
    table = claims_table([{"claim": "a", "effect": Interval(1, 0, 2), "holds": None, "n": 4}])
    assert table.ci_high[0] == 2 and table.holds.isna()[0] and table.n[0] == 4
    with pytest.raises(ValueError, match="effct"):
        claims_table([{"claim": "a", "effct": 1, "holds": True, "effect": 0}])


def test_verdict_needs_controls_and_an_interval():
    assert set_verdict(Interval(1, 0.9, 1.1), []) == "untested"
    assert set_verdict(Interval(1, -0.1, 2.1), [0.0] * 30) == "null"
    assert set_verdict(Interval(0.4, 0.3, 0.5), [0.3, 0.1, 0.0]) == "secondary"
    assert set_verdict(Interval(0.4, 0.3, 0.5), [0.5, 0.1, 0.0], selective=True) == "correlate"


@pytest.mark.parametrize("metric", ["logit_diff", "accuracy"])
def test_non_finite_models_are_refused_with_the_layer(tiny_model, metric):
    "Accuracy too: the first of a row of NaN is word 0, which would be a wrong answer without a word."
    model, batch = tiny_model("gpt2"), toy_batch()
    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_z", lambda z, hook: z * float("nan"))]):
        for measured in (evaluate, single_heads):
            with pytest.raises(ValueError, match="layer 1"):
                measured(model, batch, metric)
        with pytest.raises(ValueError, match="layer 1"):
            ablation_test(model, batch, "L0H0", metric, n_draws=1)
    with torch.no_grad():
        model.blocks[0].mlp.out.weight[3, 4] = float("nan")
    with pytest.raises(ValueError, match="layer 0"):
        evaluate(model, batch, metric)
    assert D_VOCAB > batch.tokens.max()
