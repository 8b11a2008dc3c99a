"Which signal finds the circuit: circuits alone, counterfactuals, the rankings on planted circuits, areas by hand."

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ARCHITECTURES
from test_causal import toy_batch

from spectral_nb.causal.ablation import ablated_values, reference_outputs
from spectral_nb.causal.attribution import attribute_heads
from spectral_nb.causal.circuit_runs import circuit_values, run_headless
from spectral_nb.causal.edge_cuts import EDGE
from spectral_nb.causal.metrics import evaluate, read_hooks, read_tensor
from spectral_nb.models.planted_circuits import PLANTED, planted
from spectral_nb.prompts.counterfactuals import counterfactual
from spectral_nb.prompts.grammar import story_tokenizer
from spectral_nb.prompts.tasks import make_batch
from spectral_nb.signals.curves import Judge, areas, over_batches
from spectral_nb.signals.edge_comparison import edge_rankings, judged_edges, summed_edges
from spectral_nb.signals.findings import agreements, edge_claims, edge_table, shown_agreements, wins_table
from spectral_nb.signals.registry import SIGNALS, ordered, rank_by
from spectral_nb.signals.screens import Screen, counted

CIRCUITS = ([], [(1, 1)], [(0, 1)], [(0, 0), (0, 3), (1, 2)])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_circuit_alone_is_the_model_with_all_else_ablated(tiny_model, architecture):
    model, batch = tiny_model(architecture), toy_batch(8)
    reference, every = reference_outputs(model, batch), list(np.ndindex(2, 4))
    headless = run_headless(model, batch, list(reference.mean))
    for circuit, alone in zip(CIRCUITS, circuit_values(model, headless, CIRCUITS)):
        rest = [h for h in every if h not in circuit]
        whole = ablated_values(model, batch, rest, "logit_diff", mode="mean", reference=reference)
        np.testing.assert_allclose(alone, whole, atol=1e-4)
        np.testing.assert_allclose(circuit_values(model, headless, [circuit])[0], alone, atol=1e-5)
    assert circuit_values(model, headless, []).shape == (0, 8)
    (whole,) = circuit_values(model, headless, [every])
    np.testing.assert_allclose(whole, evaluate(model, batch, "logit_diff"), atol=1e-4)


def test_a_circuit_with_outputs_of_other_prompts(tiny_model):
    "Stand-ins of every prompt and token: the hook puts them where whole passes have them."
    model, batch, other = tiny_model("llama"), toy_batch(8), toy_batch(8, seed=5)
    z = reference_outputs(model, other).z
    headless = run_headless(model, batch, list(z))
    for circuit, alone in zip(CIRCUITS, circuit_values(model, headless, CIRCUITS)):

        def replace(value, hook, layer):
            out = z[layer].clone()
            mine = [h for a, h in circuit if a == layer]
            out[:, :, mine] = value[:, :, mine]
            return out

        hooks = [(f"blocks.{a}.attn.hook_z", lambda v, hook, a=a: replace(v, hook, a)) for a in range(2)]
        with model.hooks(fwd_hooks=hooks):
            whole = evaluate(model, batch, "logit_diff")
        np.testing.assert_allclose(alone, whole, atol=1e-4)


@pytest.mark.parametrize("task", ["ioi", "sva", "retrieval", "induction"])
def test_counterfactuals_change_what_decides_and_nothing_else(task):
    batch = make_batch(task, story_tokenizer(), 40, seed=2)
    other, roles = counterfactual(batch, 1), {"ioi": ("IO", "S1", "S2"), "sva": ("subject",), "retrieval": ("key",)}
    changed = batch.tokens != other.tokens
    expected = torch.zeros_like(changed)
    for role in roles.get(task, ("B1",)):
        expected[torch.arange(40), batch.at(role)] = True
    assert torch.equal(changed, expected)
    if task == "ioi":
        names = torch.stack([other.tokens[torch.arange(40), other.at(r)] for r in roles["ioi"]], 1)
        assert all(len(set(row)) == 3 for row in names.tolist())
    with pytest.raises(ValueError, match="batch.task"):
        counterfactual(make_batch("text", story_tokenizer(), 4))


@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.parametrize("signal", ["exact", "atp_ig", "flow_qkv"])
def test_planted_heads_come_first(name, signal):
    "The ceiling: a ranking that does not find a circuit set by hand is wrong."
    p = planted(name, 24)
    wanted = set(p.heads) - set(p.distractors)
    scores, _ = rank_by(signal, Screen(p.model, p.batch))
    assert set(ordered(scores)[: len(wanted)]) == wanted
    (curve,) = Judge(Screen(p.model, planted(name, 16, seed=1).batch)).curves([scores], (len(wanted) / scores.size,))
    assert curve.f.tolist()[0] == 0 and curve.f.tolist()[-1] == 1
    assert curve[curve.n_heads == len(wanted)].f.item() == pytest.approx(1, abs=0.05)


def test_curves_end_at_0_and_1_and_areas_are_trapezoids(tiny_model):
    model, batch = tiny_model("gpt2"), toy_batch(12)
    (curve,) = Judge(Screen(model, batch)).curves([np.arange(8.0).reshape(2, 4)], (0.25, 0.5))
    assert curve.f.iloc[0] == 0 and curve.f.iloc[-1] == 1 and curve.n_heads.tolist() == [0, 2, 4, 8]
    found = areas(curve.assign(ranking="x"))
    assert found.cpr.item() == pytest.approx(np.trapezoid(curve.f, [0, 0.25, 0.5, 1]))
    assert found.cmd.item() == pytest.approx(np.trapezoid(np.abs(1 - curve.f), [0, 0.25, 0.5, 1]))


def test_the_interval_over_batches_is_students():
    low, high = over_batches([0.0, 1.0]).low, over_batches([0.0, 1.0]).high
    assert (low, high) == pytest.approx((0.5 - 12.706 / 2, 0.5 + 12.706 / 2), rel=1e-3)
    assert np.isinf(over_batches([1.0]).low)


def test_every_signal_gives_every_head_a_number():
    p = planted("inhibition", 12)
    for name, signal in SIGNALS.items():
        if name not in ("selectivity",):  # its place of the answer is a role of the four tasks
            scores, cost = rank_by(name, Screen(p.model, p.batch, first=p.model))
            assert scores.shape == (3, p.model.cfg.n_heads) and np.isfinite(scores).all()
            assert (cost.backward > 0) == ("gradient" in signal.needs)
    with pytest.raises(ValueError, match="first checkpoint"):
        rank_by("participation_rise", Screen(p.model, p.batch))


def test_passes_are_counted(tiny_model):
    model, batch = tiny_model("gpt2"), toy_batch(6)
    with counted(model, len(batch)) as cost:
        evaluate(model, batch, "logit_diff")
        evaluate(model, batch.subset(slice(0, 3)), "logit_diff")
    assert cost.forward == 1.5 and cost.backward == 0


def test_integrated_gradients_are_captums(tiny_model):
    "The same gates handed to captum as inputs, from 0 (all replaced) to 1, at the midpoints of as many steps."
    attr = pytest.importorskip("captum.attr")
    model, batch = tiny_model("llama"), toy_batch(4)
    mean = reference_outputs(model, batch).mean

    def metric(gates):
        def gate(z, hook, layer):
            return mean[layer] + gates[:, layer, None, :, None] * (z - mean[layer])

        hooks = [(f"blocks.{i}.attn.hook_z", lambda z, hook, i=i: gate(z, hook, i)) for i in range(2)]
        part = batch.subset(torch.arange(len(gates)) % len(batch))
        with model.hooks(fwd_hooks=[*hooks, *read_hooks(part, "logit_diff")]):
            return read_tensor(model(part.tokens), part, "logit_diff")

    integrated = attr.IntegratedGradients(metric, multiply_by_inputs=False)
    theirs = integrated.attribute(torch.ones(4, 2, 4), torch.zeros(4, 2, 4), n_steps=8, method="riemann_middle")
    ours = attribute_heads(model, batch, "atp-ig", steps=8)["effect"].to_numpy().reshape(2, 4)
    np.testing.assert_allclose(ours, theirs.detach().mean(0), atol=1e-5)


def test_a_table_of_areas_keeps_its_keys():
    curves = pd.DataFrame(dict(task="a", ranking=["x", "x", "y", "y"], share=[0, 1] * 2, n_heads=0, metric=0.0, f=1.0))
    assert areas(curves)[["task", "ranking"]].to_numpy().tolist() == [["a", "x"], ["a", "y"]]


def test_a_screened_circuit_is_the_exact_one_among_the_heads_that_were_tried(monkeypatch):
    "Only the heads with the largest estimates are ablated; what is found there is what exact ablation finds there."
    from spectral_nb.models.loading import load_model
    from spectral_nb.norms import circuits

    model = load_model("story-gpt2-s42")
    exact = circuits.find_circuit(model, "retrieval", 32, exact=True)
    assert exact.heads and exact.source == "ablation" and np.isfinite(exact.effects).all()
    for n in (5, 24):  # the second covers every head
        monkeypatch.setattr(circuits, "SCREENED", n)
        screened = circuits.find_circuit(model, "retrieval", 32, exact=False)
        tried = np.isfinite(screened.effects)
        assert tried.sum() == min(n, 12) and f"{n} screened" in screened.source
        assert set(screened.heads) == {h for h in exact.heads if tried[h]}
        np.testing.assert_allclose(screened.effects[tried], exact.effects[tried], atol=1e-4)
    assert screened.heads == exact.heads


@pytest.mark.parametrize("name", ["induction", "values"])
def test_the_planted_edges_come_first_and_cost_most(name):
    "Every ranking of edges but the random one puts the planted edges first; a random one costs nothing."
    p = planted(name, 16)
    found, group = (
        edge_rankings(Screen(p.model, p.batch), steps=2),
        p.model.cfg.n_heads // (p.model.cfg.n_key_value_heads or p.model.cfg.n_heads),
    )
    kinds = {"source": "key", "destination": "query", "value": "value"}
    expected = {(*up, a, h if kinds[k] == "query" else h // group, kinds[k]) for up, (a, h), k in p.edges}
    for ranking in ("flow", "contribution", "atp", "atp_ig"):
        first = found[ranking].head(len(expected))
        assert set(first[EDGE].itertuples(index=False, name=None)) == expected, ranking
    judged = judged_edges(p.model, [p.batch, p.batch], {k: t.head(1) for k, t in found.items()}, "mean", 0)
    harm = judged[judged.batch == 0].set_index("ranking").harm
    assert harm["flow"] > 1 and harm["flow"] == pytest.approx(harm["atp_ig"]) and abs(harm["random"]) < 0.01
    claims = edge_claims(judged.assign(name="planted", task=name, replacement="mean"))
    assert claims.verdict.iloc[-1] == "yes"


def test_edges_into_grouped_heads_are_one_edge():
    "Traced edges into keys of one group add up; into queries they do not; components that are no heads are left out."
    columns = ["upstream_layer", "upstream_head", "layer", "head", "kind", "flow"]
    rows = [(0, 1, 1, 4, "key", 1.0), (0, 1, 1, 5, "key", 2.0), (0, 1, 1, 4, "query", 4.0), (0, -1, 1, 4, "key", 9.0)]
    table = summed_edges(pd.DataFrame(rows, columns=columns), "flow", 3).set_index(["kind", "head"]).score
    assert table.to_dict() == {("key", 1): 3.0, ("query", 4): 4.0}


def test_difference_of_edges_is_over_batches():
    rows = [dict(ranking=r, batch=b, harm=h) for b in range(2) for r, h in (("flow", 2.0 + b), ("random", 1.0))]
    table = edge_table(pd.DataFrame(rows).assign(name="m", task="t", replacement="mean")).set_index("ranking")
    assert table.harm.to_dict() == {"flow": 2.5, "random": 1.0} and table.ci_low["flow"] < 2 < table.ci_high["flow"]


def by_hand() -> SimpleNamespace:
    "A comparison on two tasks: areas of three batches, scores of four heads; attribution was not run on the second."
    areas = [
        ("flow_qkv", (0.8, 0.9, 1.0)),
        ("atp", (0.5, 0.5, 0.5)),
        ("atp_ig", (0.9, 0.9, 0.9)),
        ("random", (0.1, 0.2, 0.3)),
    ]
    rows = [
        dict(task=task, replacement="mean", ranking=name, batch=b, cpr=v, cmd=1 - v)
        for task in ("one", "two")
        for name, values in areas
        for b, v in enumerate(values)
        if task == "one" or not name.startswith("atp")
    ]
    scores = dict(exact=(4, 3, 2, 1), atp=(4, 3, 1, 2), atp_ig=(1, 2, 3, 4), flow_qkv=(0, 0, 0, 1))
    heads = [
        dict(task="one", replacement="mean", ranking=name, layer=i // 2, head=i % 2, score=float(v))
        for name, values in scores.items()
        for i, v in enumerate(values)
    ]
    curves = pd.DataFrame(rows)[["task", "replacement"]]
    return SimpleNamespace(
        info=SimpleNamespace(name="made"), curves=curves, areas=pd.DataFrame(rows), scores=pd.DataFrame(heads)
    )


def test_the_table_of_wins_pairs_batches_and_leaves_out_what_was_not_run():
    table = wins_table([by_hand()]).set_index("task")
    assert table.loc["one", ["flow", "atp", "atp_ig", "random"]].tolist() == [0.9, 0.5, 0.9, 0.2]
    half = 4.302653 * 0.1 / 3**0.5  # Student's t of two degrees of freedom, deviation 0.1
    assert table.loc["one", "CPR: flow less atp"] == f"0.40 [{0.4 - half:.2f}, {0.4 + half:.2f}]"
    assert table.loc["one", "CPR: flow less atp_ig"] == f"0.00 [{-half:.2f}, {half:.2f}]"
    assert table.loc["one", "CMD: flow less atp_ig"] == f"0.00 [{-half:.2f}, {half:.2f}]"
    assert table.loc["two", "flow"] == 0.9 and table.loc["two", "atp":"atp_ig"].isna().all()
    assert table.loc["two", "CPR: flow less atp"] is np.nan
    assert wins_table([by_hand()], "counterfactual").empty


def test_agreements_are_rank_correlations_over_heads_and_shared_first_heads():
    table = agreements([by_hand()]).set_index("one")
    assert table.index.tolist() == ["atp", "atp_ig", "flow_qkv"] and set(table["task"]) == {"one"}
    assert table["spearman"].tolist() == pytest.approx([1 - 6 * 2 / (4 * 15), -1, -0.7745967])
    assert table["k"].tolist() == [2] * 3 and table["overlap"].tolist()[:2] == [2, 0]
    assert (table["ci_low"] <= table["spearman"]).all() and (
        table["spearman"] <= table["ci_high"]
    ).all()  # some constant
    shown = shown_agreements(table.reset_index())
    assert shown.shape == (1, 3) and shown.iloc[0, 0].startswith("0.80 [") and shown.iloc[0, 0].endswith("2 of 2")
