"Values of a trace: exact sums on every architecture, the literal recursion, and what a target means."

import dataclasses

import conftest
import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, random_tokens
from test_svt import Literal, firing_roots, peaked, toy_batch

from spectral_nb.attention.activations import capture
from spectral_nb.attention.pairs import Pairs, valid_pairs
from spectral_nb.models.architectures import ArchSpec
from spectral_nb.models.heads import head_weights
from spectral_nb.tracing.options import TraceOptions
from spectral_nb.tracing.recursion import trace, trace_tables
from spectral_nb.tracing.roots import find_roots, logit_attribution
from spectral_nb.tracing.targets import end_directions
from spectral_nb.tracing.upstream import all_outputs, contributions
from spectral_nb.tracing.values import value_readings

DOUBLE = [a for a in ARCHITECTURES if a != "olmoe"]  # torch has no experts in float64


def precise(architecture: str, dtype, processing: str):
    "A random model in the given precision, biases and gains far from trivial."
    from spectral_nb.models.loading import from_hf

    return from_hf(conftest.tiny_hf(architecture).to(dtype), name=f"tiny-{architecture}", processing=processing)


@pytest.mark.parametrize("processing", ["raw", "folded"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_contributions_add_up_to_the_output(architecture, processing):
    "Over sources, slices and components (with b_V), for every head and token, along random directions."
    dtype = torch.float64 if architecture in DOUBLE else torch.float32
    model, tokens = precise(architecture, dtype, processing), random_tokens(3, 9)
    acts, layer, d = capture(model, tokens), 1, ArchSpec.from_model(model).d_model
    assert acts.x.dtype == dtype
    everything, w = all_outputs(model, tokens, layer), head_weights(model, layer)
    prompt, q, k = valid_pairs(acts).nonzero().unbind(1)
    own_norm = architecture in ("gpt2", "gpt_neox")  # the others' norms work in float32 whatever the model's precision
    limit = 1e-12 if own_norm else 1e-6 if dtype == torch.float64 else 1e-4
    for head in range(w.W_Q.shape[0]):
        direction = torch.randn(3, 9, d, dtype=dtype, generator=torch.Generator().manual_seed(head))
        pairs = Pairs(prompt, torch.full_like(prompt, layer), torch.full_like(prompt, head), q, k)
        read = value_readings(model, acts, pairs, direction[prompt, q], rule="all")
        c = contributions(everything.outputs, prompt * 9 + k, read.vectors)
        zero = torch.zeros(3, 9, dtype=dtype)
        found = zero.index_put((prompt, q), c.sum(-1) + read.bias, accumulate=True)
        signal = zero.index_put((prompt, q), read.signal, accumulate=True)
        expected = (acts.z[layer, :, :, head] @ w.W_O[head].to(dtype) * direction).sum(-1)
        scale = zero.index_put((prompt, q), c.abs().sum(-1), accumulate=True)
        assert ((found - expected).abs() <= limit * scale).all()
        assert ((signal - expected).abs() <= (1e-12 if dtype == torch.float64 else limit) * scale).all()
    if ArchSpec.from_model(model).qkv_bias and processing == "raw":  # folding moves b_V to b_O
        assert read.bias.abs().max() > 1e-3


class Values(Literal):
    "The recursion with values by its definition: directions and flow node by node, dense SVDs, loops."

    def start(self, weights, directions, q_pos):
        "Roots: {(layer, head)}, the direction of each prompt."
        self.flow, self.along, self.found = {}, {}, {}
        done, top = set(), max(layer for layer, _ in weights)
        nodes = {(b, *head, int(q_pos[b])): None for b in range(len(self.lengths)) for head in weights}
        for layer in range(top, -1, -1):
            for node in sorted({*nodes, *self.flow}):
                if node[1] == layer and node not in done:
                    done.add(node)
                    self.node(node, directions[node[0]] if node in nodes else None)
        return self.found

    def output(self, b, layer, head, t):
        return self.value("attn.hook_z", layer)[b, t, head] @ self.weights[layer].W_O[head].double().numpy()

    def node(self, node, root):
        b, layer, head, i = node
        fired = [j for j in range(i + 1) if self.fires(b, layer, head, i, j)]
        attention = self.value("attn.hook_pattern", layer)[b, head, i]
        flow, d = self.flow.get(node, 0.0), self.along.get(node, 0.0)
        if root is not None and (effect := self.output(*node) @ root) > 0:
            flow, d = flow + effect, d + root
        for j in fired:
            importance = flow * attention[j] / attention[fired].sum()
            self.firing((b, layer, head, i, j), importance, d)

    def sides(self, firing, d):
        "(kind, token, vector in the stream that a component's output is multiplied with)."
        b, layer, head, i, j = firing
        slices, U, S, V = self.slices(b, layer, head, i, j)
        for kind, t, vectors, which in (("query", i, U, "q"), ("key", j, V, "k")):
            r = sum(np.sqrt(S[k]) * sign * vectors[:-1, k] for k, sign in slices)
            yield kind, t, r / self.norm_scale(which, b, layer, head, t) / self.value("ln1.hook_scale", layer)[b, t, 0]
        if np.ndim(d):
            yield "value", j, self.value_vector(firing, d)

    def value_vector(self, firing, d):
        b, layer, head, i, j = firing
        w = self.weights[layer]
        W_V = np.vstack([w.W_V[head].double().numpy(), w.b_V[head].double().numpy()[None]])
        U, S, Vh = np.linalg.svd(W_V @ w.W_O[head].double().numpy())
        x = np.append(self.value("ln1.hook_out", layer)[b, j], 1.0)
        terms = [x @ U[:, k] * S[k] * (Vh[k] @ d) for k in range(self.spec.d_head)]
        total, running, r = sum(terms), 0.0, np.zeros(len(x))
        sign = 1.0 if total >= 0 else -1.0
        for k in sorted(range(len(terms)), key=lambda k: -sign * terms[k]):
            r, running = r + U[:, k] * S[k] * (Vh[k] @ d), running + sign * terms[k]
            if running > sign * total:
                break
        r = r[:-1] * self.value("attn.hook_pattern", layer)[b, head, i, j]
        return r / self.value("ln1.hook_scale", layer)[b, j, 0]

    def firing(self, firing, importance, d):
        b, layer, head, i, j = firing
        for kind, t, r in self.sides(firing, d):
            r = r - r.mean() if "layernorm" in self.spec.norm else r
            heads = [(a, h) for a in range(layer) for h in range(self.spec.n_heads)]
            values = {up: self.output(b, *up, t) @ r for up in heads}
            total, running = sum(values.values()), 0.0
            for up, value in sorted(values.items(), key=lambda item: -item[1]):
                if total <= 0 or running >= self.share * total:
                    break
                running += value
                flow = importance / 3 * value / total
                self.found[(*firing, kind, *up)] = value, flow
                node = (b, *up, t)
                self.flow[node] = self.flow.get(node, 0.0) + flow
                self.along[node] = self.along.get(node, 0.0) + r * flow / value


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_values_are_the_literal_recursion(architecture):
    model, batch = peaked(architecture, 3, seed=1), toy_batch(random_tokens(5, 10), [10, 10, 7, 9, 10])
    threshold = 0.25 if ArchSpec.from_model(model).qk_norm else 0.4  # a norm on queries makes attention flat
    options = TraceOptions(threshold=threshold, values=True)
    roots = firing_roots(model, batch, options)
    directions = end_directions(model, batch).double().numpy()
    expected = Values(model, batch, threshold, 0.7).start({r: 1 for r in roots}, directions, batch.positions["end"])
    edges, firings = trace_tables(model, batch, roots, options)
    columns = ["prompt", "layer", "head", "q_pos", "k_pos", "kind", "upstream_layer", "upstream_head"]
    found = {tuple(row[:8]): row[8] for row in edges[[*columns, "contribution"]].itertuples(index=False, name=None)}
    assert len(found) == len(edges) and found.keys() == expected.keys()
    assert (edges["kind"] == "value").sum() > 3 and (edges.loc[edges["kind"] == "value", "layer"] < 2).any()
    for kind in ("query", "key", "value"):
        scale = max(abs(v) for key, (v, _) in expected.items() if key[5] == kind)
        assert max(abs(found[k] - v) for k, (v, _) in expected.items() if k[5] == kind) < 1e-4 * scale
    by_node = {}
    for key, (_, flow) in expected.items():
        node = (key[0], key[6], key[7], key[3] if key[5] == "query" else key[4])
        by_node[node] = by_node.get(node, 0.0) + flow
    got = firings[~firings["root"].astype(bool)].groupby(["prompt", "layer", "head", "q_pos"])["importance"].sum()
    assert len(got) and all(value == pytest.approx(by_node[node], rel=1e-3, abs=1e-7) for node, value in got.items())


def test_several_sources_of_a_head_are_edges_of_their_own():
    model, batch = peaked("gpt2", 3, seed=1), toy_batch(random_tokens(5, 10))
    options = TraceOptions(threshold=0.2, values=True)
    edges = trace(model, batch, firing_roots(model, batch, options), options)
    value = edges[edges["kind"] == "value"]
    sources = value.groupby(["prompt", "layer", "head", "q_pos"])["k_pos"].nunique()
    assert sources.max() > 1 and (value["position"] == value["k_pos"]).all()


def test_values_change_no_edge_of_queries_and_keys_that_was_there():
    model, batch = peaked("llama", 3, seed=1), toy_batch(random_tokens(5, 10))
    options = TraceOptions(threshold=0.3)
    roots = firing_roots(model, batch, options)
    keys = ["prompt", "layer", "head", "q_pos", "k_pos", "kind", "upstream"]
    without, with_values = (
        trace(model, batch, roots, dataclasses.replace(options, values=v)).astype({"upstream": str, "kind": str})
        for v in (False, True)
    )
    both = without.merge(with_values, on=keys)
    assert len(both) == len(without) < len(with_values)
    np.testing.assert_allclose(both["contribution_x"], both["contribution_y"], rtol=1e-4)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_targets_are_gradients_of_what_they_name(architecture):
    "By finite differences of the model's own logits, the final norm's scale held fixed."
    model, batch = peaked(architecture, 2), toy_batch(random_tokens(3, 8))
    rows = torch.arange(3)
    with torch.no_grad():
        logits = model(batch.tokens)[rows, batch.at("end")].double()
        _, cache = model.run_with_cache(batch.tokens)
        scale, x = (cache[f"ln_final.hook_{n}"][rows, batch.at("end")].double() for n in ("scale", "out"))
    tokens = torch.tensor([[3, 4, 5], [1, 1, 1], [9, 2, 3]])
    step = torch.randn(3, x.shape[1], dtype=torch.float64) * 1e-4
    centred = step - step.mean(-1, keepdim=True) if "layernorm" in ArchSpec.from_model(model).norm else step
    moved = logits + centred / scale.reshape(-1, 1) @ model.W_U.double()

    def odds(value, inside):
        return (value.softmax(-1) * inside).sum(-1).logit()

    def masked(ids):
        return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, ids, True)

    likely = logits.softmax(-1).sort(-1, descending=True)
    n = (likely.values.cumsum(-1) < 0.6).sum(-1) + 1
    top = masked(likely.indices) & (
        logits >= likely.values.log().gather(-1, n[:, None] - 1) + logits.logsumexp(-1)[:, None] - 1e-9
    )
    masses = {"answer": masked(batch.answer[:, None]), "top_p:0.6": top, "tokens": masked(tokens)}
    for name, inside in masses.items():
        target = tokens if name == "tokens" else name
        predicted = (end_directions(model, batch, target).double() * step).sum(-1)
        change = odds(moved, inside) - odds(logits, inside)
        torch.testing.assert_close(predicted, change, rtol=2e-2, atol=2e-6)
    predicted = (end_directions(model, batch).double() * step).sum(-1)
    gap = (moved - logits)[rows, batch.answer] - (moved - logits)[rows, batch.wrong]
    torch.testing.assert_close(predicted, gap, rtol=1e-3, atol=1e-7)


def test_roots_by_any_target():
    model, batch = peaked("gpt2", 3, seed=1), toy_batch(random_tokens(6, 10))
    W_U = model.W_U.detach()
    given = (W_U[:, batch.answer] - W_U[:, batch.wrong]).T
    options = TraceOptions(threshold=0.3)
    by_name, by_tensor = (
        logit_attribution(model, batch, dataclasses.replace(options, target=t, batch_size=4))
        for t in ("logit_diff", given)
    )
    np.testing.assert_allclose(by_name["effect"], by_tensor["effect"], rtol=1e-4, atol=1e-6)
    same = dataclasses.replace(options, target=batch.answer[:, None], batch_size=4)
    answers = logit_attribution(model, batch, same)["effect"]
    np.testing.assert_allclose(
        answers, logit_attribution(model, batch, dataclasses.replace(options, target="answer"))["effect"], rtol=1e-4
    )
    nameless = dataclasses.replace(batch, answer=None, wrong=None)
    with pytest.raises(ValueError, match="no answer and wrong"):
        find_roots(model, nameless, options)
    likely = dataclasses.replace(options, target="top_p:0.5")
    roots = find_roots(model, nameless, likely, min_fires=0.0)
    edges = trace(model, nameless, roots, likely, values=True)
    assert len(edges)
    for bad in ("top_p:2", "logits", "top_p:x"):
        with pytest.raises(ValueError, match="top_p"):
            TraceOptions(target=bad)
    with pytest.raises(ValueError, match="tokens outside"):
        logit_attribution(model, batch, dataclasses.replace(options, target=torch.tensor([999])))
