"""Planted heads score as what they are; the streamed survey equals a direct computation from whole patterns."""

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OlmoeConfig, OlmoeForCausalLM

from spectral_nb.models.loading import from_hf
from spectral_nb.prompts.batches import PromptBatch
from spectral_nb.attention.spectra import participation_ratio
from spectral_nb.survey.classes import by_kv_group, capability_survey, class_stability, classify
from spectral_nb.survey.experts import expert_participation
from spectral_nb.survey.streaming import attention_rows
from spectral_nb.survey.targets import CLASSES, POSITION_CLASSES, class_weights, earlier_occurrence

N_CTX, N_WORDS, D_HEAD = 48, 30, 64


def blank_gpt2(d: int):
    "A GPT-2 of zeros, but for its norms' gains and for one-hots of token and position in the residual."
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=N_WORDS, n_positions=N_CTX, n_embd=d, n_layer=2, n_head=6, bos_token_id=0, eos_token_id=0)
    )
    for p in model.parameters():
        p.data.zero_()
    h = model.transformer
    h.wte.weight.data[:, :N_WORDS] = torch.eye(N_WORDS)
    h.wpe.weight.data[:, N_WORDS : N_WORDS + N_CTX] = torch.eye(N_CTX)
    for norm in (h.ln_f, *(n for block in h.h for n in (block.ln_1, block.ln_2))):
        norm.weight.data.fill_(1)
    return model


def shift(k: int) -> torch.Tensor:
    "Row p holds a one at p - k."
    return torch.diag(torch.ones(N_CTX - k), -k)


def planted_gpt2(gains=None):
    """A GPT-2 whose heads are built by hand: the residual holds one-hots of token, position and previous token.

    Layer 0: H0 previous token, H1 self, H2 first token, H3 local, H4 duplicate token, H5 nothing.
    Layer 1: H0 induction."""
    d, token, pos, prev = 6 * D_HEAD, 0, N_WORDS, N_WORDS + N_CTX
    model = blank_gpt2(d)
    h = model.transformer

    def plant(layer, head, query, key, value=None, out=None):
        gain = (gains or {}).get((layer, head), 2.0)
        attn, s = h.h[layer].attn, slice(head * D_HEAD, (head + 1) * D_HEAD)
        attn.c_attn.weight.data[:, :d][:, s], attn.c_attn.weight.data[:, d : 2 * d][:, s] = gain * query, gain * key
        if value is not None:
            attn.c_attn.weight.data[:, 2 * d :][:, s], attn.c_proj.weight.data[s] = value, out

    def block(start, matrix):
        full = torch.zeros(d, D_HEAD)
        full[start : start + matrix.shape[0], : matrix.shape[1]] = matrix
        return full

    words, places = torch.eye(N_WORDS), torch.eye(N_CTX)
    first = torch.zeros(N_CTX, N_CTX)
    first[:, 0] = 1
    copy = torch.zeros(D_HEAD, d)
    copy[:N_WORDS, prev : prev + N_WORDS] = torch.eye(N_WORDS)
    plant(0, 0, block(pos, shift(1)), block(pos, places), block(token, words), copy)
    plant(0, 1, block(pos, shift(0)), block(pos, places))
    plant(0, 2, block(pos, first), block(pos, places))
    plant(0, 3, block(pos, sum(shift(k) for k in (2, 3, 4, 5))), block(pos, places))
    # duplicate: the same word, but not itself: the second half of the head's space pushes the own position away
    both_q, both_k = torch.zeros(d, D_HEAD), torch.zeros(d, D_HEAD)
    both_q[token : token + N_WORDS, :N_WORDS] = both_k[token : token + N_WORDS, :N_WORDS] = words
    half = D_HEAD - N_WORDS
    code = torch.nn.functional.normalize(torch.randn(N_CTX, half, generator=torch.Generator().manual_seed(0)), dim=1)
    both_q[pos : pos + N_CTX, N_WORDS:], both_k[pos : pos + N_CTX, N_WORDS:] = -1.5 * code, 1.5 * code
    plant(0, 4, both_q, both_k)
    plant(1, 0, block(token, words), block(prev, words))
    return model.eval()


@pytest.fixture(scope="module")
def planted():
    return from_hf(planted_gpt2(), processing="raw")


def prompts(tokens, positions):
    return PromptBatch(
        "made", tokens, torch.ones_like(tokens, dtype=torch.bool), positions, None, None, [""] * len(tokens), 0
    )


def bigrams(n=24, length=N_CTX, n_words=N_WORDS, seed=0):
    "Prompts with `A B` once, `A` again at the end, and roles."
    rng = np.random.default_rng(seed)
    tokens = np.zeros((n, length), dtype=np.int64)
    at = rng.integers(6, length // 2, size=n)
    for i in range(n):
        a, b = rng.choice(n_words, size=2, replace=False)
        tokens[i] = rng.choice(np.setdiff1d(np.arange(n_words), [a, b]), size=length)
        tokens[i, at[i]], tokens[i, at[i] + 1], tokens[i, -1] = a, b, a
    at = torch.as_tensor(at)
    return prompts(torch.as_tensor(tokens), {"end": torch.full((n,), length - 1), "A1": at, "B1": at + 1})


@pytest.fixture(scope="module")
def batch():
    return bigrams()


def test_all_six_planted_heads(planted, batch):
    table = capability_survey(planted, batch).set_index(["layer", "head"])
    expected = {
        (0, 0): "previous_token",
        (0, 1): "self",
        (0, 2): "first_token",
        (0, 3): "local",
        (0, 4): "duplicate_token",
        (1, 0): "induction",
    }
    for head, name in expected.items():
        assert table.loc[head, "class"] == name, (head, table.loc[head, list(CLASSES)])
        others = [c for c in CLASSES if c != name]
        assert table.loc[head, name] > 5 * table.loc[head, others].max()
    assert (
        table.loc[(0, 5), "class"] == "unclassified"
        and abs(table.loc[(0, 5), list(CLASSES)].astype(float) - 1).max() < 1e-4
    )


def test_classes_do_not_depend_on_named_roles(planted, batch):
    "Without roles the repeated token is found in the tokens."
    bare = prompts(batch.tokens, {"end": batch.positions["end"]})
    a, b = capability_survey(planted, batch), capability_survey(planted, bare)
    assert (a["class"] == b["class"]).all()
    assert np.allclose(a["attention_induction"], b["attention_induction"])


def test_survey_against_whole_patterns(planted, batch):
    "Every score by loops over the stored patterns, with all other positions, so that nothing is random."
    table = capability_survey(planted, batch, n_random=N_CTX)
    with torch.inference_mode():
        _, cache = planted.run_with_cache(batch.tokens)
    q = N_CTX - 1
    for row in table.itertuples():
        pattern = cache["pattern", row.layer][:, row.head]
        sums, base = dict.fromkeys(CLASSES, 0.0), 0.0
        for i in range(len(batch)):
            dup = int(batch.positions["A1"][i])
            where = {
                "induction": [dup + 1],
                "previous_token": [q - 1],
                "duplicate_token": [dup],
                "first_token": [0],
                "self": [q],
                "local": [q - 2, q - 3, q - 4, q - 5],
            }
            other = sorted(set(range(q + 1)) - {p for ps in where.values() for p in ps})
            for name, ps in where.items():
                sums[name] += float(pattern[i, q, ps].double().mean())
            base += float(pattern[i, q, other].double().mean())
        for name in CLASSES:
            assert getattr(row, name) == pytest.approx(sums[name] / max(base, 1e-8 * len(batch)), rel=1e-4), (
                row.layer,
                row.head,
                name,
            )


def test_rows_are_those_of_the_pattern(planted, batch):
    query = torch.stack([batch.positions["end"], batch.positions["end"] // 2], dim=1)
    with torch.inference_mode():
        _, cache = planted.run_with_cache(batch.tokens)
    for part, rows in attention_rows(planted, batch.tokens, query, batch_size=7):
        for layer in range(2):
            direct = cache["pattern", layer][part][torch.arange(len(rows[layer]))[:, None], :, query[part]].transpose(
                1, 2
            )
            assert torch.allclose(rows[layer], direct, atol=1e-6)


def test_interval_covers_the_ratio_of_the_whole(planted):
    "Of the 95 % intervals of small batches, about 95 % hold the score of a large batch."
    torch.manual_seed(3)
    config = GPT2Config(
        vocab_size=N_WORDS,
        n_positions=N_CTX,
        n_embd=32,
        n_layer=1,
        n_head=4,
        initializer_range=0.15,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = from_hf(GPT2LMHeadModel(config).eval())
    truth = capability_survey(model, bigrams(1500, seed=1), batch_size=500)
    hits = [
        ((t["induction_low"] <= truth["induction"]) & (truth["induction"] <= t["induction_high"])).mean()
        for t in (capability_survey(model, bigrams(200, seed=100 + s), batch_size=200) for s in range(25))
    ]
    assert 0.88 < np.mean(hits)


def test_memory_does_not_grow_with_the_prompts(planted):
    "What a pass keeps is the rows of one slice: the largest tensor alive holds no more than one slice's pattern."
    sizes = []
    for _, rows in attention_rows(planted, bigrams(40).tokens, torch.full((40, 1), N_CTX - 1), batch_size=4):
        sizes.append(sum(r.numel() for r in rows))
    assert len(sizes) == 10 and set(sizes) == {2 * 4 * 6 * N_CTX}


def test_half_precision_rows_give_spurious_maxima_and_this_code_does_not():
    """The previous-token head gives others 2.5e-8, the self head 3.4e-8: float16 rounds the first to 0, the second up.

    From float16 rows the first head's score is whatever floor was set for the divisor; from float32 rows it is not."""
    gains = {(0, 0): 0.8526, (0, 1): 0.845}
    batch = bigrams(3)
    exact = capability_survey(from_hf(planted_gpt2(gains), processing="raw"), batch)
    half_model = from_hf(planted_gpt2(gains).half(), processing="raw")
    ours = capability_survey(half_model, batch)
    with torch.inference_mode():
        _, cache = half_model.run_with_cache(batch.tokens, names_filter="blocks.0.attn.hook_pattern")
    rows = cache["pattern", 0][:, :2, -1].half().float()
    q = N_CTX - 1
    other = [p for p in range(1, q - 5) if p not in (0,)]
    divisor = rows[:, :, other].mean(dim=(0, 2))
    assert divisor[0] == 0 and divisor[1] > 0
    naive = torch.stack([rows[:, 0, q - 1].mean(), rows[:, 1, q].mean()]) / divisor.clamp_min(1e-8)
    true = np.array([exact["previous_token"][0], exact["self"][1]])
    found = np.array([ours["previous_token"][0], ours["self"][1]])
    assert true[0] < 2 * true[1] and naive[0] > 5 * naive[1] and naive[0] > 2 * true[0]
    assert np.abs(np.log(found / true)).max() < 0.05
    assert torch.isinf(rows[:, 0, q - 1].mean() / divisor[0])  # and unbounded without the floor


def test_threshold_rule():
    names, best, second = classify(np.array([[1, 2, 3, 29, 5, np.nan], [40, 2, 30, 1, 1, 1.0]]), threshold=30)
    assert (
        list(names) == ["unclassified", "induction"]
        and list(best) == [29, 40]
        and list(second) == ["self", "duplicate_token"]
    )
    assert classify(np.array([[30.0, 0, 0, 0, 0, 0]]), 30)[0][0] == "induction"  # at the threshold counts


def test_absent_positions_are_left_out():
    q = torch.tensor([1, 0, 9])
    w = class_weights(q, torch.tensor([-1, -1, 3]), torch.tensor([-1, -1, 4]), 10)
    exists = (w.sum(-1) > 0).tolist()
    assert (
        exists[0] == [False, True, False, True, True, False]
        and exists[1] == [False, False, False, True, True, False]
        and all(exists[2])
    )
    assert earlier_occurrence(torch.tensor([[4, 4, 4, 7]]), torch.tensor([2])).tolist() == [1]


def test_stability_over_positions(planted, batch):
    table = class_stability(planted, batch, [12, 24, 36, 47]).set_index(["layer", "head"])
    for head, name in zip(((0, 0), (0, 2), (0, 1), (0, 3)), POSITION_CLASSES):
        assert table.loc[head, "stable"] and table.loc[head, "classified"] and table.loc[head, "at_24"] == name
    assert not table.loc[(0, 5), "classified"]


def test_grouped_query_heads():
    config = LlamaConfig(
        vocab_size=N_WORDS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=N_CTX,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    table = capability_survey(from_hf(LlamaForCausalLM(config).eval()), bigrams(8))
    assert table["kv_head"].tolist() == [0, 0, 0, 0, 1, 1, 1, 1] * 2
    grouped = by_kv_group(table)
    assert len(grouped) == 4 and (grouped["n_query_heads"] == 4).all()
    assert grouped.loc[0, "induction"] == table.loc[:3, "induction"].max()


def test_expert_outputs_sum_to_the_block():
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=N_WORDS,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=N_CTX,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.3,
    )
    model, batch = from_hf(OlmoeForCausalLM(config).eval()), bigrams(40)
    table = expert_participation(model, batch)
    assert len(table) == 8 and (table.groupby("layer")["n_routed"].sum() == 2 * len(batch)).all()
    with torch.inference_mode():
        _, cache = model.run_with_cache(batch.tokens)
    from spectral_nb.survey.experts import _routed_outputs

    for layer in range(2):
        x = cache[f"blocks.{layer}.mlp.hook_in"][:, -1]
        inner = model.blocks[layer].mlp.original_component
        gate = getattr(inner.gate, "original_component", inner.gate)
        _, _, index = gate(x)
        total = torch.zeros_like(x)
        with torch.inference_mode():
            for e, out in _routed_outputs(model.blocks[layer], x):
                total[torch.where(index == e)[0]] += out
                row = table[(table["layer"] == layer) & (table["expert"] == e)].iloc[0]
                assert row["n_routed"] == len(out)
                assert row["participation_ratio"] == pytest.approx(float(participation_ratio(out.double())), rel=1e-6)
        assert torch.allclose(total, cache[f"blocks.{layer}.hook_mlp_out"][:, -1], atol=1e-5)


def test_refusals(planted, batch):
    with pytest.raises(ValueError, match="threshold"):
        capability_survey(planted, batch, threshold=-1)
    with pytest.raises(ValueError, match="has 60 tokens, the model reads 48"):
        capability_survey(planted, bigrams(2, length=60))
    with pytest.raises(ValueError, match="below the model's d_vocab=30"):
        capability_survey(planted, bigrams(2, n_words=300))
    with pytest.raises(ValueError, match="query_role='subject'"):
        capability_survey(planted, batch, query_role="subject")
    with pytest.raises(ValueError, match="absent"):
        absent = {"end": torch.full((len(batch),), 3), "gone": torch.full((len(batch),), -1)}
        capability_survey(planted, prompts(batch.tokens, absent), query_role="gone")
    with pytest.raises(ValueError, match="positions"):
        class_stability(planted, batch, [3])
    with pytest.raises(ValueError, match="no experts"):
        expert_participation(planted, batch)


def test_names_the_layer_that_is_not_finite():
    model = from_hf(planted_gpt2(), processing="raw")
    model.blocks[1].attn.q.original_component.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="non-finite values in layer 1"):
        capability_survey(model, bigrams(4))


@pytest.mark.parametrize("batch_size", [1, 7, 30])
def test_batch_size_changes_nothing(planted, batch_size):
    batch = bigrams(30)
    whole, parts = (capability_survey(planted, batch, batch_size=b) for b in (None, batch_size))
    numbers = list(whole.select_dtypes("number"))
    np.testing.assert_allclose(whole[numbers], parts[numbers], rtol=1e-4, atol=1e-6)
    assert whole["class"].tolist() == parts["class"].tolist()
    whole, parts = (class_stability(planted, batch, [20, N_CTX - 1], batch_size=b) for b in (None, batch_size))
    numbers = list(whole.select_dtypes("number"))
    np.testing.assert_allclose(whole[numbers], parts[numbers], rtol=1e-4, atol=1e-6)
