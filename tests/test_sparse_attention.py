"The sparse attention section: controls, stability, dates, tables, and what it refuses."

import conftest
import numpy as np
import pandas as pd
import pytest
import torch
from torch.testing import assert_close

from spectral_nb.attention import slices as sl
from spectral_nb.attention import origins as so
from spectral_nb import sparse_attention as sa
from spectral_nb.attention import development as dv
from spectral_nb.attention import reading_heads as rh
from spectral_nb.attention import sparsity as sp
from spectral_nb.attention.sparsity_claims import claims
from spectral_nb.base.claims import claim_sentences
from spectral_nb.base.long_tables import long_table
from spectral_nb.models.records import model_info
from spectral_nb.attention.activations import capture
from spectral_nb.attention.pairs import firings
from spectral_nb.attention.selection import select_slices
from spectral_nb.attention.terms import slice_coordinates
from spectral_nb.models.architectures import ArchSpec
from spectral_nb.models.revisions import list_models
from spectral_nb.prompts.batches import PromptBatch


@pytest.fixture(scope="module")
def made():
    from spectral_nb.models.loading import from_hf

    store = {}

    def get(architecture):
        if architecture not in store:
            model = from_hf(conftest.tiny_hf(architecture), name=f"tiny-{architecture}")
            tokens = conftest.random_tokens(12, 16)
            n = torch.zeros(12, dtype=torch.long)
            batch = PromptBatch(
                "ioi",
                tokens,
                torch.ones_like(tokens, dtype=torch.bool),
                {"end": n + 15, "IO": n + 3},
                tokens[:, 3],
                tokens[:, 5],
                [""] * 12,
                0,
            )
            store[architecture] = model, batch, sl.measure_slices(model, batch)
        return store[architecture]

    return get


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "olmoe"])
def test_pair_table_against_plain_arithmetic(made, architecture):
    _, _, data = made(architecture)
    table = sl.pair_table(data)
    for n in range(0, len(table), max(1, len(table) // 20)):
        t = data.terms[n].double().numpy()
        row = table.iloc[n]
        assert row.score == pytest.approx(t.sum(), rel=1e-6)
        assert row.n_building == (t > 0).sum() and row.n_opposing == (t < 0).sum()
        assert row.mass_building - row.mass_opposing == pytest.approx(t.sum(), rel=1e-5)
        chosen = data.mask[n].numpy()
        assert row.n_slices == chosen.sum() and row.signal_ratio == pytest.approx(t[chosen].sum() / t.sum(), rel=1e-5)
        assert row.noise_ratio == pytest.approx(t[~chosen].sum() / t.sum(), abs=1e-6)
        assert row.signal_ratio >= 1 - 1e-9 and row.noise_ratio <= 1e-9
        up = np.sort(t[t > 0])[::-1]
        assert row.n_90 == int(np.argmax(up.cumsum() >= 0.9 * up.sum() * (1 - 1e-12))) + 1


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_random_bases_keep_the_scores(made, architecture):
    _, _, data = made(architecture)
    P = sl.random_bases(data.a.shape[1], 3, seed=1)
    eye = torch.eye(P.shape[1], dtype=P.dtype).expand_as(P)
    assert_close(P @ P.mT, eye, atol=1e-10, rtol=0)
    target = (data.sigma * data.b).double()
    for p in P:
        assert_close(((data.a.double() @ p) * (target @ p)).sum(1), data.terms.double().sum(1), rtol=1e-4, atol=1e-4)
    again = [sl.random_basis_counts(data, n_draws=2, seed=5)["paper"] for _ in range(2)]
    assert (again[0] == again[1]).all() and again[0].min() >= 1


def test_random_bases_see_planted_sparsity():
    "A score made of one direction needs one slice in the singular basis and more in nearly every random one."
    n, d = 40, 16
    a = torch.zeros(n, d)
    a[:, 2] = 3.0
    noise = torch.randn(n, d, generator=torch.Generator().manual_seed(0)) * 0.1
    pairs = sl.Pairs(range(n), [0] * n, [0] * n, [1] * n, [1] * n)
    data = sl.SliceData(
        None,
        pairs,
        a + noise,
        torch.ones(n, d),
        a + noise.flip(0),
        select_slices((a + noise) * (a + noise.flip(0))),
        "paper",
    )
    counts = sl.random_basis_counts(data, n_draws=10)["share:0.9"]
    assert counts.mean() > 4 and select_slices(data.terms, "share:0.9").sum(1).float().mean() < 1.5


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "olmoe"])
def test_shuffled_pairs_take_other_keys_at_the_same_offset(made, architecture):
    model, _, data = made(architecture)
    mixed = sl.shuffled(model, data, seed=3)
    assert_close(mixed.a, data.a)
    order = torch.arange(len(data))
    rng = np.random.default_rng(3)
    for _, _, at in sl._head_groups(data.pairs):
        order[at] = at[torch.as_tensor(sl.derangement(len(at), rng))]
        assert len(at) == 1 or (order[at] != at).all()
    keys = data.pairs[order]
    assert (keys.head == data.pairs.head).all() and (keys.layer == data.pairs.layer).all()
    _, _, b = slice_coordinates(model, data.acts, data.pairs, keys)
    assert_close(mixed.b, b)
    if ArchSpec.from_model(model).positions != "rotary":
        assert_close(mixed.b, data.b[order])


def test_jaccard_and_stability():
    a = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    assert_close(sl.jaccard(a, a), torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64))
    mask = torch.tensor([[1, 0, 0]] * 4 + [[0, 1, 1]] * 4, dtype=torch.bool)
    pairs = sl.Pairs(list(range(4)) * 2, [0] * 8, [0] * 4 + [1] * 4, [2] * 8, [1] * 8)
    data = sl.SliceData(None, pairs, *[torch.ones(8, 3)] * 3, mask, "paper")
    table = sl.stability(data)
    assert table.within.tolist() == [1, 1] and table.across.tolist() == [0, 0]
    one = sl.SliceData(None, pairs[:1], *[torch.ones(1, 3)] * 3, mask[:1], "paper")
    assert len(sl.stability(one)) == 0  # one prompt cannot be compared


def test_non_firings_do_not_fire_and_are_as_many(made):
    _, _, data = made("gpt2")
    quiet = sl.non_firings(data.acts, data.pairs, 0.5, seed=1)
    assert (data.acts.pattern[quiet.layer, quiet.prompt, quiet.head, quiet.q_pos, quiet.k_pos] < 0.5).all()
    assert (quiet.k_pos > 0).all() and (quiet.k_pos <= quiet.q_pos).all()

    def counts(p):
        return torch.stack([p.layer, p.head], 1).unique(dim=0, return_counts=True)

    for a, b in zip(counts(quiet), counts(data.pairs), strict=True):
        assert (a <= b).all()


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "olmoe", "gpt_neox"])
def test_upstream_contributions_against_equation_8(made, architecture):
    "One pair at a time from the oriented singular vectors."
    from spectral_nb.attention.components import component_outputs
    from spectral_nb.attention.terms import slice_vectors

    model, batch, data = made(architecture)
    _, values = so.upstream_contributions(model, batch, data, 1)
    at = (data.pairs.layer == 1).nonzero().squeeze(1)
    parts = component_outputs(model, batch, 1)
    for n, row in list(enumerate(at.tolist()))[:10]:
        pair = data.pairs[[row]]
        u, v, sigma = (x[0] for x in slice_vectors(model, data.acts, pair))
        for side, (vectors, pos) in enumerate(((u, pair.q_pos), (v, pair.k_pos))):
            b, t = int(pair.prompt), int(pos)
            o = parts.values[:, b, t]
            if "layernorm" in ArchSpec.from_model(model).norm:
                o = o - o.mean(-1, keepdim=True)
            projected = (o / data.acts.ln_scale[1, b, t]) @ vectors[:-1] * sigma.sqrt()
            assert_close(values[0, side, n], projected[:, data.mask[row]].sum(1), rtol=1e-3, atol=1e-3)
            assert_close(values[1, side, n], projected.sum(1), rtol=1e-3, atol=1e-3)


def test_auc_and_its_interval():
    rng = np.random.default_rng(0)
    positive, negative = rng.normal(1, 1, 300), rng.normal(0, 1, 400)
    brute = np.mean([(p > negative).mean() for p in positive])
    assert so.auc(positive, negative) == pytest.approx(brute)
    values, target = np.concatenate([positive, negative]), np.arange(700) < 300
    area = so.grouped_auc(values, target, np.arange(700) % 35, n_resamples=200)
    assert area.low < area.estimate < area.high and area.estimate == pytest.approx(brute)
    with pytest.raises(ValueError, match="both sides"):
        so.auc(positive, np.array([]))


def test_dates():
    table = pd.DataFrame(
        dict(tokens=[0, 10, 20, 30], revision=list("abcd"), overlap=[0.1, 0.6, 0.3, 0.9], accuracy=[0, 0, 0, 1.0])
    )
    assert so.date(table, "overlap", 0.5) == dict(tokens=30, before=20, revision="d")
    assert so.date(table, "overlap", 0.2) == dict(tokens=10, before=0, revision="b")
    assert np.isnan(so.date(table, "overlap", 0.95)["tokens"])
    overlaps = table.assign(label="ioi L1H0", overlap=[0.1, 0.6, 0.7, 1.0])
    dated = dv.dates(table.assign(task="ioi"), overlaps)
    assert dated["head"].tolist() == ["L1H0"]
    assert dated.lead.tolist() == [20] and dated.low.tolist() == [10] and dated.high.tolist() == [30]


def test_consensus_needs_a_share_and_a_number():
    mask = torch.tensor([[1, 1, 0]] * 3 + [[1, 0, 0]] * 3, dtype=torch.bool)
    data = sl.SliceData(
        None, sl.Pairs(range(6), [0] * 6, [0] * 6, [2] * 6, [1] * 6), *[torch.ones(6, 3)] * 3, mask, "paper"
    )
    assert so.consensus_slices(data, 0, 0) == [0, 1]
    assert so.consensus_slices(data, 0, 0, share=0.6) == [0]
    assert so.consensus_slices(data, 0, 0, min_firings=7) == []
    assert so.consensus_slices(data, 1, 0) == []


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_task_from_end_to_end(made, architecture):
    model, batch, _ = made(architecture)
    m = sp.measure_task(model, batch, sp.SliceOptions(n_draws=2))
    assert m.table.untrained_slices.isna().all() and (m.table.random_slices >= 1).all()
    table = long_table(sp.task_numbers(m), model_info(model))
    assert {"model", "revision", "tokens", "processing", "task", "layer", "head", "metric", "value"} <= set(
        table.columns
    )
    assert {"n_opposing", "mass_opposing", "mass_building", "jaccard_within"} <= set(table.metric)
    assert not table.duplicated(["task", "layer", "head", "metric"]).any()
    found = claims(model, [m])
    assert 5 <= len(found) <= 8 and set(found.rule) <= {"differs", "equals", "identity"}
    assert set(found.verdict) <= {"yes", "no", "undecided"} and (found.unit != "").all()
    bounded = found[found.rule != "identity"]
    assert (bounded.ci_low <= bounded.effect).all() and (bounded.effect <= bounded.ci_high).all()
    assert found[found.rule == "identity"].verdict.tolist() == ["yes"]
    text = claim_sentences(found)
    assert text.count("\n") == len(found) - 1 and all(f"{e:.3g}" in text for e in found.effect)


def test_a_task_without_firings_is_an_empty_row_not_an_error(made):
    model, batch, _ = made("gpt2")
    m = sp.measure_task(model, batch, sp.SliceOptions(threshold=1.0, n_draws=2))
    assert len(m.data) == 0 and "n_slices" in m.table.columns and len(m.table) == 0
    table = long_table(sp.task_numbers(m), model_info(model))
    assert table[table.metric == "n_firings"].value.tolist() == [0]
    assert rh.reading_head(m) is None and len(claims(model, [m])) == 0
    assert len(sp.control_table([m])) == 0


@pytest.mark.parametrize(
    "bad, message",
    [
        (dict(tasks="ioi retreival"), "retrieval"),
        (dict(tasks=" "), "tasks"),
        (dict(rule="share:2"), "rule"),
        (dict(processing="fold"), "folded"),
        (dict(threshold=-0.1), "threshold"),
        (dict(n_prompts=1), "n_prompts"),
        (dict(n_draws=0), "n_draws"),
    ],
)
def test_bad_configuration_is_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        sa.SparseAttentionConfig(**bad)


def test_wrong_types_are_refused():
    with pytest.raises(TypeError, match="tasks"):
        sa.SparseAttentionConfig(tasks=3)
    with pytest.raises(TypeError, match="n_prompts"):
        sa.SparseAttentionConfig(n_prompts="many")


def test_contract_names():
    assert sa.select_slices is select_slices
    assert set(sa.__all__) == {"SparseAttentionConfig", "measure", "run"}
    assert sa.select_slices(np.array([[5.0, 3, -1, -2, -2]])).sum() == 1


@pytest.mark.skipif("story-gpt2-s42" not in list_models(), reason="the shipped model is absent")
def test_run_on_the_shipped_model_is_repeatable():
    cfg = sa.SparseAttentionConfig(tasks="retrieval", n_prompts=16, n_draws=2)
    table = sa.run(cfg)
    pd.testing.assert_frame_equal(table, sa.run(cfg))
    assert set(table.model) == {"story-gpt2-s42"} and set(table.processing) == {"folded"}
    assert table[table.metric == "untrained_slices"].value.notna().all()


def test_development_is_empty_without_checkpoints(reference):
    name = str(reference / "stories260k")
    numbers, overlaps = dv.development(name, [], lambda model: [], lambda model, batch: 0.0)
    assert len(numbers) == 0 and len(overlaps) == 0


def test_firings_are_those_of_the_definition(made):
    model, batch, _ = made("gpt2")
    acts = capture(model, batch)
    found = set(zip(*(t.tolist() for t in firings(acts, batch).tensors()), strict=True))
    for layer in range(2):
        for b in range(3):
            for h in range(4):
                for i in range(16):
                    for j in range(1, i + 1):
                        fires = acts.pattern[layer, b, h, i, j] >= 0.5 and acts.scores[layer, b, h, i, j] > 0
                        assert fires == ((b, layer, h, i, j) in found)


def test_largest_steps_are_those_of_the_table():
    table = pd.DataFrame(dict(task="ioi", tokens=[0, 1e6, 2e6, 3e6], n_slices=[3.0, 2.5, 4.0, 4.2]))
    (line,) = dv.largest_steps(table)
    assert "from 2.50 to 4.00 slices between 1.0 and 2.0 million" in line
    assert dv.largest_steps(table.head(1)) == []


def test_the_article_shows_results_early():
    "Within the first ten cells, after at most 60 lines of exported code, there is a figure of results."
    import nbformat

    from spectral_nb.base.paths import repo_root

    cells = nbformat.read(repo_root() / "nbs" / "11_sparse_attention.ipynb", 4).cells
    first = next(i for i, c in enumerate(cells) if "figures.show(" in c.source)
    assert first < 10
    exported = [c.source for c in cells[:first] if c.source.startswith("#| export")]
    assert sum(len([x for x in s.splitlines() if x.strip()]) for s in exported) <= 60


def test_more_than_64_heads_get_fewer_prompts(made):
    model, _, _ = made("gpt2")
    assert sp.default_prompts(model) == 128

    class Many:
        original_model = type("Hf", (), {"config": conftest.tiny_hf("gpt2", n_layer=30, n_head=4).config})()

    assert sp.default_prompts(Many()) == 32
