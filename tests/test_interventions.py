"Interventions on traced edges, against one forward pass for each edge and kind."

from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import random_tokens, tiny_hf
from test_svt import firing_roots, peaked, toy_batch

from spectral_nb.causal.changed_runs import run_changed
from spectral_nb.causal.changes import Changes
from spectral_nb.causal.reached import replaced_forwards
from spectral_nb.attention.activations import capture
from spectral_nb.attention.components import component_outputs
from spectral_nb.attention.pairs import Pairs
from spectral_nb.attention.terms import slice_terms, slice_vectors
from spectral_nb.tracing.interventions import edge_interventions
from spectral_nb.tracing.projections import INTERVENTIONS, ONE_SIDED
from spectral_nb.tracing.projections import edge_vectors, random_slices
from spectral_nb.tracing.signal_vectors import edge_signals
from spectral_nb.tracing.sets import additivity, edge_sets, set_interventions
from spectral_nb.models.architectures import ArchSpec
from spectral_nb.models.heads import head_weights
from spectral_nb.models.loading import from_hf
from spectral_nb.models.planted_circuits import planted
from spectral_nb.tracing.options import TraceOptions
from spectral_nb.tracing.recursion import trace


def expanded(architecture: str):
    "A peaked model; grouped heads are written out, so that every query head has keys and values of its own."
    if architecture != "llama":
        return peaked(architecture)
    hf = tiny_hf("llama", num_key_value_heads=2)
    wide = tiny_hf("llama", num_key_value_heads=4)
    state = hf.state_dict()
    for name, p in state.items():
        if "k_proj" in name or "v_proj" in name:
            state[name] = p.view(2, 8, 32).repeat_interleave(2, 0).reshape(32, 32)
        if "q_proj" in name or "k_proj" in name:
            state[name] = state[name] * 3
    wide.load_state_dict(state)
    grouped = tiny_hf("llama", num_key_value_heads=2)
    grouped.load_state_dict({n: p * 3 if "q_proj" in n or "k_proj" in n else p for n, p in hf.state_dict().items()})
    return from_hf(grouped), from_hf(wide)


def traced(model, n: int = 4, length: int = 9):
    batch = toy_batch(random_tokens(n, length), [length, length - 2, length, length - 1])
    options = TraceOptions(threshold=0.35)
    return batch, trace(model, batch, firing_roots(model, batch, options), options)


def one_by_one(model, batch, edges, action, scope, slices="traced"):
    "Logit difference of every edge row by a pass of its own, local changes made at the hooks of q, k and v."
    acts, spec, values = capture(model, batch), ArchSpec.from_model(model), []
    vectors = edge_vectors(model, acts, edges)[slices][0]
    sign = 1.0 if action == "boost" else -1.0
    for row, h in zip(edges.itertuples(), vectors):
        t, layer = row.position, row.layer
        if scope == "global":

            def change(x, hook):
                return x.index_put((torch.tensor([0]), torch.tensor([t])), sign * h, accumulate=True)

            hooks = [(f"blocks.{row.upstream_layer}.hook_attn_out", change)]
        else:
            w = head_weights(model, layer)
            delta = (h - h.mean() if "layernorm" in spec.norm else h) / acts.ln_scale[layer, row.prompt, t]

            def at_input(x, hook, W):
                x = x.clone()
                x.view(*x.shape[:2], -1, spec.d_head)[0, t, row.head] += sign * delta @ W
                return x

            hooks = [
                (f"blocks.{layer}.attn.hook_{n}", lambda x, hook, W=W[row.head]: at_input(x, hook, W))
                for n, W in zip("qkv", (w.W_Q, w.W_K, w.W_V))
                if scope == "local" or n == scope[0]
            ]
        with torch.no_grad():
            logits = model.run_with_hooks(batch.tokens[row.prompt : row.prompt + 1], fwd_hooks=hooks)
        end = batch.positions["end"][row.prompt]
        values.append((logits[0, end, batch.answer[row.prompt]] - logits[0, end, batch.wrong[row.prompt]]).item())
    return np.array(values)


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "olmo", "llama"])
def test_interventions_equal_one_pass_per_edge(architecture):
    model = expanded(architecture)
    model, single = model if isinstance(model, tuple) else (model, model)
    batch, edges = traced(model)
    assert len(edges) > 5
    table = edge_interventions(model, batch, edges, batch_size=16)
    for action, scope, slices in INTERVENTIONS:
        if slices == "random":
            continue
        mine = table[(table["action"] == action) & (table["scope"] == scope) & (table["slices"] == slices)]
        mine = mine.set_index(["prompt", "layer", "head", "q_pos", "k_pos", "token", "upstream"])["metric_after"]
        other = one_by_one(single, batch, edges, action, scope)
        index = list(
            edges[["prompt", "layer", "head", "q_pos", "k_pos", "token", "upstream"]].itertuples(index=False, name=None)
        )
        np.testing.assert_allclose(mine.loc[index].to_numpy(), other, atol=2e-4)
        assert np.abs(other - table["metric_before"].iloc[0]).max() > 1e-3


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "llama"])
def test_one_sided_interventions_equal_one_pass_per_edge(architecture):
    model = expanded(architecture)
    model, single = model if isinstance(model, tuple) else (model, model)
    batch, edges = traced(model)
    kinds = [k for k in ONE_SIDED if k[2] == "traced" and k[1] != "side"]
    table = edge_interventions(model, batch, edges, kinds=kinds, batch_size=16)
    keys = ["prompt", "layer", "head", "q_pos", "k_pos", "token", "upstream"]
    index = list(edges[keys].itertuples(index=False, name=None))
    for action, scope, _ in kinds:
        mine = table[(table["action"] == action) & (table["scope"] == scope)].set_index(keys)
        other = one_by_one(single, batch, edges, action, scope)
        np.testing.assert_allclose(mine.loc[index, "metric_after"].to_numpy(), other, atol=2e-4)
        side = (edges["token"] == ("source" if scope == "query" else "destination")).to_numpy()
        apart = side & (edges["q_pos"] != edges["k_pos"]).to_numpy()
        moved = mine.loc[index, "score_effect"].abs().to_numpy()
        assert moved[apart].max(initial=0.0) < 1e-4 < moved[~side].max()  # a key at the destination scores nothing


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen3", "olmoe"])
def test_local_score_change_is_bilinear(architecture):
    "A change of one of two different tokens moves the score by its own product with the other token."
    model = peaked(architecture)
    batch, edges = traced(model)
    edges = edges[edges["q_pos"] != edges["k_pos"]].reset_index(drop=True)
    table = edge_interventions(model, batch, edges, kinds=[("ablate", "local", "traced")])
    acts, spec = capture(model, batch), ArchSpec.from_model(model)
    pairs = Pairs(*(torch.tensor(edges[c].to_numpy()) for c in ("prompt", "layer", "head", "q_pos", "k_pos")))
    u, v, sigma = slice_vectors(model, acts, pairs)
    terms = slice_terms(model, acts, pairs)
    h = edge_vectors(model, acts, edges)["traced"][0]
    layer, prompt, pos = (torch.tensor(edges[c].to_numpy()).long() for c in ("layer", "prompt", "position"))
    delta = (h - h.mean(-1, keepdim=True) if "layernorm" in spec.norm else h) / acts.ln_scale[layer, prompt, pos][
        :, None
    ]
    source = torch.tensor((edges["token"] == "source").to_numpy())
    here, there = torch.where(source[:, None, None], v, u), torch.where(source[:, None, None], u, v)
    x = acts.x[layer, prompt, torch.where(source, pairs.q_pos, pairs.k_pos)]
    change = (
        torch.einsum("nds,nd->ns", here[:, :-1], delta)
        * sigma
        * (torch.einsum("nds,nd->ns", there[:, :-1], x) + there[:, -1])
    )
    if acts.q_scale is not None:
        scales = (
            acts.q_scale[layer, prompt, pairs.q_pos, pairs.head] * acts.k_scale[layer, prompt, pairs.k_pos, pairs.head]
        )
        change = change / scales[:, None]
    expected = -change.sum(-1) / spec.d_head**0.5
    got = table.set_index(["prompt", "layer", "head", "q_pos", "k_pos", "token", "upstream"])["score_effect"]
    index = list(
        edges[["prompt", "layer", "head", "q_pos", "k_pos", "token", "upstream"]].itertuples(index=False, name=None)
    )
    np.testing.assert_allclose(
        got.loc[index].to_numpy(), expected.numpy(), atol=2e-3 * max(1.0, terms.abs().max().item() / spec.d_head**0.5)
    )


UP = ["prompt", "layer", "head", "q_pos", "k_pos", "kind", "upstream"]


def with_values(model, n: int = 2, length: int = 7):
    "A batch and edges of all kinds, from heads and from everything else."
    batch = toy_batch(random_tokens(n, length), [length, length - 2])
    options = TraceOptions(threshold=0.35, share=0.9, values=True, components="all")
    edges = trace(model, batch, firing_roots(model, batch, options), options)
    kinds = (
        edges["upstream"].astype(str).str.replace(r"^L\d+", "", regex=True).where(edges["upstream_head"] < 0, "head")
    )
    groups = edges.groupby([edges["kind"].astype(str), kinds])  # a few rows of every kind and component
    return batch, edges.loc[groups.head(2).index].reset_index(drop=True)


def dense_signal(model, batch, row) -> torch.Tensor:
    "What a value edge carries, from the dense product of the weights."
    w = head_weights(model, row.layer)
    U, _, _ = torch.linalg.svd(torch.cat([w.W_V[row.head], w.b_V[row.head][None]]) @ w.W_O[row.head])
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(row.value_slices), np.uint8)).astype(bool)
    U = U[:-1, : len(bits)][:, torch.tensor(bits)]
    found = component_outputs(model, batch, row.layer)
    return U @ (U.T @ found.values[found.labels.index(row.upstream), row.prompt, row.position])


def whole_pass(model, batch, row, h, action: str, scope: str) -> float:
    "Logit difference of one pass, the upstream component's or the reader's values changed by a hook."
    sign, t = 1.0 if action == "boost" else -1.0, row.position
    up = row.upstream_layer
    if scope == "global":
        hook = "attn_out" if row.upstream_head >= 0 or row.upstream.endswith("bias") else "mlp_out"
        name = "hook_embed" if row.upstream == "embed" else f"blocks.{up}.hook_{hook}"
        name = "hook_pos_embed" if row.upstream == "pos_embed" else name

        def change(x, hook):
            if len(x) > 1 or x.shape[1] <= t:
                return x
            return x.index_put((torch.tensor([0]), torch.tensor([t])), sign * h, accumulate=True)

        hooks = [(name, change)]
    else:
        spec, w = ArchSpec.from_model(model), head_weights(model, row.layer)
        scale = capture(model, batch).ln_scale[row.layer, row.prompt, t]
        delta = (h - h.mean() if "layernorm" in spec.norm else h) / scale
        pattern = capture(model, batch).pattern[row.layer, row.prompt, row.head]
        W = {"query": w.W_Q, "key": w.W_K, "value": w.W_V}[row.kind][row.head]

        def at_side(x, hook):
            x = x.clone()
            x.view(*x.shape[:2], -1, spec.d_head)[0, t, row.head] += sign * delta @ W
            return x

        def at_output(z, hook):  # of a head that shares its values with others: through its own attention alone
            z = z.clone()
            z[0, :, row.head] += sign * pattern[: z.shape[1], t, None] * (delta @ W)
            return z

        block = f"blocks.{row.layer}.attn.hook_"
        shared = spec.n_key_value_heads < spec.n_heads
        hooks = [(block + "z", at_output)] if row.kind == "value" and shared else [(block + row.kind[0], at_side)]
    with torch.no_grad():
        logits = model.run_with_hooks(batch.tokens[row.prompt : row.prompt + 1], fwd_hooks=hooks)
    end = logits[0, batch.positions["end"][row.prompt]]
    return (end[batch.answer[row.prompt]] - end[batch.wrong[row.prompt]]).item()


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "llama"])
def test_edges_of_values_and_of_other_components_equal_whole_passes(architecture):
    "Learned positions; parallel attention and MLP; grouped heads with rotary positions and RMSNorm."
    model = peaked(architecture)
    batch, edges = with_values(model)
    others = set(edges.loc[edges["upstream_head"] < 0, "upstream"].astype(str))
    assert others >= {"embed", "L0.mlp"} and set(edges["kind"]) == {"query", "key", "value"}
    shared = architecture == "llama"
    kinds = [("ablate", "global", "traced"), ("boost", "side", "traced"), ("boost", "local", "traced")]
    table = edge_interventions(model, batch, edges, kinds=kinds, batch_size=7).astype({"kind": str, "upstream": str})
    signals = edge_signals(model, batch, edges, batch_size=2)
    for h, row in zip(signals, edges.astype({"kind": str, "upstream": str}).itertuples()):
        if row.kind == "value":
            torch.testing.assert_close(h, dense_signal(model, batch, row), atol=1e-4, rtol=1e-4)
        mine = table[(table[UP] == [getattr(row, c) for c in UP]).all(axis=1)].set_index("scope")["metric_after"]
        got = [whole_pass(model, batch, row, h, "ablate", "global")]
        assert mine["global"] == pytest.approx(got[0], abs=2e-4)
        if not shared or row.kind != "key":  # a shared key cannot be changed for one head by a hook at the keys
            assert mine["side"] == pytest.approx(whole_pass(model, batch, row, h, "boost", "side"), abs=2e-4)
        if row.kind == "value":
            assert mine["local"] == pytest.approx(mine["side"], abs=1e-6)
    for scope in ("global", "side"):
        moved = table[table["scope"] == scope].groupby("kind")["effect"].apply(lambda e: e.abs().max())
        assert (moved > 1e-3).all()


def test_value_edges_score_nothing_and_have_a_control_of_their_own():
    model = peaked("llama")
    batch, edges = with_values(model)
    value = edges[edges["kind"] == "value"]
    table = edge_interventions(model, batch, value, kinds=[k for k in INTERVENTIONS if k[1] == "local"])
    assert table["score_effect"].abs().max() < 1e-4
    traced, random = (table[table["slices"] == s].reset_index(drop=True) for s in ("traced", "random"))
    assert (random["n_slices"] <= traced["n_slices"]).all() and (traced["n_slices"] == traced["n_slices"]).all()
    bits = [bin(int(s, 16)).count("1") for s in value["value_slices"]]
    assert traced["n_slices"][: len(value)].tolist() == bits
    with pytest.raises(ValueError, match="'side' is what each edge is of"):
        edge_interventions(model, batch, value, kinds=[("boost", "key", "random")])
    with pytest.raises(ValueError, match="have no value_slices"):
        edge_interventions(model, batch, value.drop(columns="value_slices"))
    with pytest.raises(ValueError, match="no set of 8 slices"):
        edge_interventions(model, batch, value.assign(value_slices="zz"))


def test_a_planted_value_path_is_causal_alone_and_in_sets():
    p = planted("values", 6)
    edges = trace(p.model, p.batch, p.roots, values=True)
    table = edge_interventions(p.model, p.batch, edges, seed=1)
    mine = table[(table["kind"] == "value") & (table["action"] == "ablate")]
    effect = mine.groupby(["upstream", "scope", "slices"], observed=True)["effect"].mean()
    assert {u for u, *_ in effect.index} == {"L0H1", "L1H2"}
    assert (effect.xs("traced", level="slices") < -1).all() and (effect.xs("random", level="slices").abs() < 0.1).all()
    sets = edge_sets(edges)
    assert sets["serial L0H1 > L1H2 > L2H1@end (value, value)"][1] == ("L1H2", "L2H1", "end", "value")
    both = set_interventions(p.model, p.batch, edges, sets, kinds=[("ablate", "local", "traced")])
    alone = both[both["member"] == "L1H2 > L2H1 > end > value"].set_index(["set", "prompt"])["effect"]
    one = mine[(mine["upstream"] == "L1H2") & (mine["scope"] == "local") & (mine["slices"] == "traced")]
    one = one.set_index("prompt")["effect"]
    for name, g in alone.groupby(level="set"):
        np.testing.assert_allclose(
            g.droplevel("set").sort_index(), one.loc[sorted(g.droplevel("set").index)], atol=1e-5
        )
    assert len(alone)


def test_planted_edges_are_causal_and_random_slices_are_not():
    for name in ("induction", "inhibition", "grouped"):
        p = planted(name, 5)
        edges = trace(p.model, p.batch, p.roots)
        table = pd.concat([edge_interventions(p.model, p.batch, edges, seed=seed) for seed in range(4)])
        effect = table.groupby(["upstream", "token", "action", "scope", "slices"], observed=True)["effect"].mean()
        assert (effect.xs("ablate", level="action").xs("traced", level="slices") < -1).all()
        assert (effect.xs("random", level="slices").abs() < 0.3).all()


def test_batch_size_changes_nothing():
    model = peaked("gpt2")
    batch, edges = traced(model)
    "Nor does the order of the rows, or which other edges there are: random slices belong to the edge and the seed."
    keys = ["prompt", "layer", "head", "q_pos", "k_pos", "token", "upstream", "action", "scope", "slices"]

    def effects(edges, **how):
        table = edge_interventions(model, batch, edges, **how)
        return table.assign(upstream=table["upstream"].astype(str), token=table["token"].astype(str)).set_index(keys)[
            "effect"
        ]

    one = effects(edges, batch_size=500).sort_index()
    assert one.xs("random", level="slices").abs().max() > 1e-3
    for other in (effects(edges, batch_size=2), effects(edges[::-1]), effects(edges.sample(frac=1, random_state=1))):
        np.testing.assert_allclose(one, other.sort_index(), atol=1e-4)
    some = effects(edges[edges["prompt"] == edges["prompt"].max()]).sort_index()
    np.testing.assert_allclose(some, one.loc[some.index], atol=1e-4)
    seeds = [effects(edges, seed=s, kinds=[("ablate", "local", "random")]).to_numpy() for s in (0, 1)]
    assert np.abs(seeds[0] - seeds[1]).max() > 1e-4


def several_changes(n_layers: int) -> Changes:
    "Several changes in a run, at the ends, and none in run 4."
    last = n_layers - 1
    run, layer, head, position = (
        torch.tensor(v)
        for v in ([0, 1, 1, 2, 3, 5, 5], [0, 1, last, last, 1, 0, 1], [-1, -1, 2, 1, 0, -1, 3], [3, 2, 4, 5, 6, 0, 1])
    )
    return Changes(run, layer, head, position, torch.randn(7, 32))


def noting_logits(seen: list, logits, part):
    "A metric of all real logits, which are noted by prompt."
    real = part.attention_mask.bool().to(logits.device)
    seen.append(
        {(tuple(t.tolist()), n): x[m] for n, (t, x, m) in enumerate(zip(part.tokens, logits, real, strict=True))}
    )
    return (logits.logsumexp(-1) * real).sum(-1).cpu().numpy()


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "olmo", "llama", "qwen3", "olmoe"])
def test_computing_only_what_a_change_reaches_is_the_whole_pass(architecture):
    "Every logit, so that any metric is right, and the watched scores; several changes in a run, at the ends, and none."
    model = peaked(architecture)
    batch, n_layers = toy_batch(random_tokens(3, 7), [7, 5, 6]), ArchSpec.from_model(model).n_layers
    names = [*(f"blocks.{layer}.hook_resid_pre" for layer in range(n_layers)), f"blocks.{n_layers - 1}.hook_resid_post"]
    _, cache = model.run_with_cache(batch.tokens)
    streams = torch.stack([cache[name] for name in names])
    changes = several_changes(n_layers)
    prompt = torch.tensor([0, 1, 2, 0, 1, 2])  # run 4 changes nothing
    watch = torch.tensor([[n_layers - 1, 0, 4, 2]] * 5 + [[1, 0, 0, 0]])
    seen, rows = [], []
    every_logit = partial(noting_logits, seen)
    counter = model.blocks[1].mlp.hook_in.register_forward_hook(
        lambda module, args, x: rows.append(x.shape[0] * x.shape[1])
    )
    whole, n_whole = run_changed(model, batch, prompt, changes, watch=watch, metric=every_logit), sum(rows)
    logits, seen[:], rows[:] = list(seen), [], []
    late = run_changed(model, batch, prompt, changes, watch=watch, streams=streams, metric=every_logit)
    counter.remove()
    assert 0 < sum(rows) < 0.7 * n_whole
    for a, b in zip(whole, late, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    for a, b in zip(logits, seen, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(a[key], b[key], atol=1e-5, rtol=1e-5)
    assert whole[0].std() > 0
    plain_logits = model(batch.tokens)
    torch.testing.assert_close(plain_logits, model.run_with_hooks(batch.tokens))  # nothing is left behind
    assert not any("forward" in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("architecture", ["gpt2", "olmoe"])
def test_a_failed_run_leaves_the_model_as_it_was(architecture):
    model = peaked(architecture)
    batch, before = toy_batch(random_tokens(2, 6)), None
    streams = torch.zeros(ArchSpec.from_model(model).n_layers + 1, 2, 6, 32)
    before = model(batch.tokens)

    def broken(logits, part):
        raise RuntimeError("broken metric")

    wrong = Changes(torch.tensor([0]), torch.tensor([1]), torch.tensor([-1]), torch.tensor([3]), torch.zeros(1, 31))
    with pytest.raises((RuntimeError, ValueError)):
        run_changed(model, batch, torch.tensor([0]), wrong, streams=streams)
    with pytest.raises(RuntimeError, match="broken metric"):
        run_changed(model, batch, torch.tensor([0]), wrong.select(torch.tensor([False])), metric=broken)
    assert not any("forward" in m.__dict__ for m in model.modules())
    torch.testing.assert_close(model(batch.tokens), before)


def test_no_change_changes_nothing():
    model = peaked("llama")
    batch = toy_batch(random_tokens(3, 7))
    zero = Changes(
        torch.tensor([0, 1]), torch.tensor([0, 1]), torch.tensor([-1, 2]), torch.tensor([3, 4]), torch.zeros(2, 32)
    )
    watch = torch.tensor([[1, 0, 5, 2]] * 3)
    after, score = run_changed(model, batch, torch.arange(3), zero, watch=watch)
    acts = capture(model, batch)
    np.testing.assert_allclose(score, acts.scores[1, torch.arange(3), 0, 5, 2].numpy(), atol=1e-5)
    plain, _ = run_changed(model, batch, torch.arange(3), zero.select(torch.zeros(2, dtype=torch.bool)))
    np.testing.assert_allclose(after, plain, atol=1e-5)


def test_random_slices():
    mask = torch.tensor([[True, False, False, False, False], [True, True, True, True, False]])
    drawn = random_slices(mask, torch.ones_like(mask), torch.rand(2, 5))
    assert drawn.sum(-1).tolist() == [1, 1] and not (drawn & mask).any()
    assert drawn[1].tolist() == [False] * 4 + [True]


def test_sets_alone_and_together():
    p = planted("grouped", 6)
    edges = trace(p.model, p.batch, p.roots)
    sets = edge_sets(edges)
    assert set(sets["parallel L1H2@source"]) == {("L0H0", "L1H2", "source"), ("L0H1", "L1H2", "source")}
    table = set_interventions(p.model, p.batch, edges, sets, batch_size=8)
    alone = edge_interventions(p.model, p.batch, edges, kinds=[("ablate", "local", "traced")])
    mine = table[
        (table["action"] == "ablate") & (table["scope"] == "local") & (table["member"] == "L0H1 > L1H2 > source")
    ].set_index("prompt")["effect"]
    theirs = alone[alone["upstream"] == "L0H1"].set_index("prompt")["effect"]
    np.testing.assert_allclose(mine.sort_index(), theirs.sort_index(), atol=1e-4)
    result = additivity(table)
    assert (result["n"] == 6).all() and {"together", "separate", "ratio", "correlation"} <= set(result)


def test_bad_input():
    p = planted("induction", 2)
    edges = trace(p.model, p.batch, p.roots)
    with pytest.raises(ValueError, match="feedbeef"):
        edge_interventions(p.model, p.batch, edges.assign(weights_hash="feedbeef"))
    with pytest.raises(ValueError, match="kinds"):
        edge_interventions(p.model, p.batch, edges, kinds=[("remove", "global", "traced")])
    with pytest.raises(ValueError, match="token"):
        edge_interventions(p.model, p.batch, edges.drop(columns="token"))
    for other in ("L0.mpl", "pos_embd", "L9.mlp"):
        with pytest.raises(ValueError, match=f"{other} are no components"):
            edge_interventions(p.model, p.batch, edges.assign(upstream=other, upstream_head=-1))
    with pytest.raises(ValueError, match="L1.mlp stands in layer 1, not 0"):
        edge_interventions(p.model, p.batch, edges.assign(upstream="L1.mlp", upstream_head=-1, upstream_layer=0))
    with pytest.raises(ValueError, match="kind that does not read"):
        edge_interventions(p.model, p.batch, edges.assign(kind="query"))
    assert len(edge_interventions(p.model, p.batch, edges[:0])) == 0
    for size in (-1, 0):
        with pytest.raises(ValueError, match="batch_size"):
            edge_interventions(p.model, p.batch, edges, batch_size=size)
    with pytest.raises(ValueError, match="acausal"):
        edge_interventions(p.model, p.batch, edges.assign(k_pos=edges["q_pos"] + 0, q_pos=edges["k_pos"]))
    with pytest.raises(ValueError, match="acausal"):
        edge_interventions(p.model, p.batch, edges.assign(upstream_layer=edges["layer"]))
    with pytest.raises(ValueError, match="position"):
        edge_interventions(p.model, p.batch, edges.assign(position=0))
    with pytest.raises(ValueError, match="does not have"):
        edge_interventions(p.model, p.batch.subset([0]), edges)
    turned = p.batch.subset([1, 0])
    if not torch.equal(turned.tokens, p.batch.tokens):
        moved = edges.assign(attention=0.3)
        with pytest.raises(ValueError, match="another batch"):
            edge_interventions(p.model, p.batch, moved)
    raw = from_hf(tiny_hf("gpt2"), processing="raw")
    with pytest.raises(ValueError, match="folded"):
        edge_interventions(raw, p.batch, edges)


def test_edges_traced_before_a_change_in_place_are_refused():
    "A change through `.data` leaves the model's record as it was: the weights themselves are looked at."
    p = planted("induction", 2)
    edges = trace(p.model, p.batch, p.roots)
    weight = next(p.model.blocks[0].mlp.parameters())
    weight.data.add_(1e-3)
    with pytest.raises(ValueError, match="traced on weights"):
        edge_interventions(p.model, p.batch, edges)
    weight.data.sub_(1e-3)


@pytest.mark.parametrize("architecture", ["gpt2", "olmoe"])
def test_an_exception_inside_or_while_entering_restores_every_forward(architecture):
    "Also where blocks are nested, and where the last of the modules cannot be had."
    model = peaked(architecture)
    batch = toy_batch(random_tokens(2, 6))
    before, first = model(batch.tokens), model.blocks[0].mlp

    def broken(*args, **kwargs):
        raise RuntimeError("broken forward")

    with (
        pytest.raises(RuntimeError, match="broken forward"),
        replaced_forwards([(b.mlp, broken) for b in model.blocks]),
    ):
        model(batch.tokens)

    def some():
        yield first, broken
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), replaced_forwards(some()):
        raise AssertionError("never entered")
    with replaced_forwards([(first, zero_forward)]):
        with pytest.raises(RuntimeError), replaced_forwards([(first, broken)]):
            model(batch.tokens)
        assert first.__dict__["forward"] is zero_forward, "the enclosing block's forward must come back"
    assert not any("forward" in m.__dict__ for m in model.modules())
    torch.testing.assert_close(model(batch.tokens), before)


def zero_forward(x, *args, **kwargs):
    return torch.zeros_like(x)
