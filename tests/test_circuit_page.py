"The circuit page: its numbers against the trace's, and its behaviour in a browser without a network."

import json
import re
import shutil
import subprocess
import time

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import horizontal_overflow

from spectral_nb.base.paths import repo_root
from spectral_nb.views.circuit_layout import layout
from spectral_nb.views.circuit_tables import circuit_data
from spectral_nb.views.circuits import circuit_page, main
from spectral_nb.models.planted_circuits import planted
from spectral_nb.prompts.batches import PromptBatch
from spectral_nb.tracing.graph_files import read_graph
from spectral_nb.tracing.graphs import trace_graph
from spectral_nb.tracing.recursion import trace

NASTY = "</script><img src=x onerror=document.title='broken'>"


class Words:
    "A tokenizer of 40 words, one of which is an attack."

    def convert_ids_to_tokens(self, ids):
        return [f"Ġ{self.decode([i])}" for i in ids]

    def decode(self, ids):
        return " ".join(NASTY if i == 7 else f"w{i}" for i in ids)


ROLES = {"name": 2, "verb": 5, "end": 9}
SAME = dict(
    q_pos=9, attention=0.8, q_role="end", model="made-up", revision="main", processing="folded", weights_hash="0"
)


def edge_row(rng, prompt: int, reader: tuple[int, int], upstream: tuple[int, int], role: str) -> dict:
    "One row of a trace; its numbers are drawn."
    source = role != "end"
    return dict(
        prompt=prompt,
        layer=reader[0],
        head=reader[1],
        k_pos=ROLES[role] if source else 2,
        token="source" if source else "destination",
        position=ROLES[role],
        upstream=f"L{upstream[0]}H{upstream[1]}",
        upstream_layer=upstream[0],
        upstream_head=upstream[1],
        contribution=float(rng.uniform(0.1, 3)),
        share=float(rng.uniform(0.05, 1)),
        n_slices=int(rng.integers(1, 6)),
        role=role,
        k_role=role if source else "name",
        **SAME,
    )


def made_up(
    n_edges: int, n_prompts: int = 6, n_layers: int = 8, n_heads: int = 8, seed: int = 0
) -> tuple[pd.DataFrame, PromptBatch]:
    "A trace with that many distinct edges, each in a random number of prompts, and its batch."
    rng = np.random.default_rng(seed)
    rows, seen = [], set()
    while len(seen) < n_edges:
        layer, head, up = int(rng.integers(1, n_layers)), int(rng.integers(n_heads)), int(rng.integers(n_heads))
        up_layer, role = int(rng.integers(layer)), str(rng.choice(list(ROLES)))
        if (key := (layer, head, up_layer, up, role)) in seen:
            continue
        seen.add(key)
        for prompt in rng.permutation(n_prompts)[: int(rng.integers(1, n_prompts + 1))]:
            rows.append(edge_row(rng, int(prompt), (layer, head), (up_layer, up), role))
    tokens = torch.arange(12).repeat(n_prompts, 1)
    batch = PromptBatch(
        "demo",
        tokens,
        torch.ones_like(tokens, dtype=torch.bool),
        {r: torch.full((n_prompts,), p) for r, p in ROLES.items()},
        None,
        None,
        ["x"] * n_prompts,
        0,
    )
    return pd.DataFrame(rows), batch


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    edges, batch = made_up(24, n_layers=4, n_heads=4)
    first = edges.iloc[0]
    effects = pd.DataFrame(
        [
            dict(
                upstream=first.upstream,
                layer=first.layer,
                head=first["head"],
                role=first.role,
                prompt=p,
                action="ablate",
                scope="local",
                slices="traced",
                effect=e,
            )
            for p, e in ((0, -1.0), (1, -2.0))
        ]
    )
    return edges, circuit_page(
        edges, batch, Words(), tmp_path_factory.mktemp("page") / "c.html", effects=effects, known_heads=[first.upstream]
    )


def expected(edges: pd.DataFrame) -> pd.DataFrame:
    "Count and share of every edge, straight from the rows."
    whole = edges.assign(whole=edges["contribution"] / edges["share"])
    table = whole.groupby(["upstream", "layer", "head", "role"]).agg(
        count=("prompt", "nunique"), total=("contribution", "sum"), whole=("whole", "sum")
    )
    return table.assign(share=table["total"] / table["whole"])


def test_numbers_are_those_of_the_trace():
    edges, batch = made_up(60)
    data, table, graph = circuit_data(edges, batch, Words()), expected(edges), trace_graph(edges)
    assert len(data["edges"]) == len(table) == 60
    for e in data["edges"]:
        layer, head = map(int, re.fullmatch(r"L(\d+)H(\d+)", e["down"]).groups())
        row = table.loc[e["up"], layer, head, e["role"]]
        assert (e["count"], round(e["share"], 9)) == (row["count"], round(row["share"], 9))
        assert graph[e["up"]][f"{e['down']}@{e['role']}"]["count"] == e["count"]
        assert sum(r[4] for r in e["rows"]) == pytest.approx(e["total"])  # all prompts fit
    for prompt, values in data["totals"].items():
        assert values.sum() == pytest.approx(edges.loc[edges["prompt"] == prompt, "contribution"].sum())


def test_a_real_trace_of_planted_circuits():
    "The planted edges and nothing else, each in all prompts, with the tokens that were traced."
    for name in ("induction", "inhibition"):
        p = planted(name, 5)
        edges = trace(p.model, p.batch, p.roots)
        data = circuit_data(edges, p.batch, None)
        assert {(e["up"], e["down"], e["token"]) for e in data["edges"]} == {
            (f"L{u[0]}H{u[1]}", f"L{d[0]}H{d[1]}", t) for u, d, t in p.edges
        }
        assert {e["count"] for e in data["edges"]} == {5}


def test_prompts_are_limited_to_the_largest():
    edges, batch = made_up(10, n_prompts=9)
    for e in circuit_data(edges, batch, Words(), max_prompts=2)["edges"]:
        down = "L" + edges["layer"].astype(str) + "H" + edges["head"].astype(str)
        rows = edges[(edges["upstream"] == e["up"]) & (edges["role"] == e["role"]) & (down == e["down"])]
        assert {r[0] for r in e["rows"]} == set(rows.nlargest(2, "contribution")["prompt"])


def test_nodes_never_overlap():
    for n in (1, 4, 5, 12):
        names = [(f"L{ly}H{h}", role) for ly in range(3) for h in range(n) for role in ("a", "b")]
        at = np.array(list(layout(names, {c: int(c[1]) for c, _ in names}, ["a", "b"])["at"].values()))
        apart = np.abs(at[:, None] - at[None])
        assert ((apart[..., 0] >= 60) | (apart[..., 1] >= 36))[~np.eye(len(at), dtype=bool)].all()


def test_refusals_leave_no_file(tmp_path):
    edges, batch = made_up(5)
    for change, words in (
        (dict(edges=edges[:0]), "nothing to show"),
        (dict(edges=edges.drop(columns="role")), "role"),
        (dict(batch=batch.subset([0])), "batch that was traced"),
        (dict(effects=pd.DataFrame({"x": [1]})), "effects"),
        (dict(path=tmp_path / "a.txt"), "html"),
        (dict(known_heads=["L1"]), "L1"),
    ):
        arguments = dict(edges=edges, batch=batch, tokenizer=Words(), path=tmp_path / "a.html") | change
        with pytest.raises(ValueError, match=words):
            circuit_page(**arguments)
    assert not list(tmp_path.iterdir())


ASSETS = sorted((repo_root() / "spectral_nb" / "views" / "assets").iterdir())


@pytest.mark.parametrize("script", [p for p in ASSETS if p.suffix == ".js"], ids=lambda p: p.name)
def test_scripts_parse(script, tmp_path):
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed: the syntax of the scripts is not checked")
    assert subprocess.run([node, "--check", script], capture_output=True, text=True).stderr == ""
    broken = tmp_path / "broken.js"
    broken.write_text(script.read_text() + "\nfunction (")
    assert subprocess.run([node, "--check", broken], capture_output=True).returncode != 0  # the check can fail


def test_every_asset_is_used_and_packed():
    notebooks = "".join(p.read_text() for p in (repo_root() / "nbs").rglob("*.ipynb"))
    suffixes = {p.suffix for p in ASSETS}
    assert ASSETS and all(p.name in notebooks for p in ASSETS)
    manifest = (repo_root() / "MANIFEST.in").read_text()
    assert all("recursive-include spectral_nb" in manifest and f"*{s}" in manifest for s in suffixes)


def test_the_command(tmp_path, capsys):
    from spectral_nb.models.revisions import list_models

    if "story-gpt2-s42" not in list_models():
        pytest.skip("story-gpt2-s42 is not shipped")
    assert (
        main(
            [
                "--model",
                "story-gpt2-s42",
                "--task",
                "retrieval",
                "--prompts",
                "6",
                "--interventions",
                "--out",
                str(tmp_path / "p.html"),
            ]
        )
        == 0
    )
    assert "6 prompts" in capsys.readouterr().out
    data = json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', (tmp_path / "p.html").read_text(), re.S)[1])
    assert data["meta"]["model"] == "story-gpt2-s42" and len(data["edges"][0]["effects"]) == 4


def test_opens_offline_without_errors(small, open_page):
    b = open_page(small[1])
    assert b.get_log("browser") == []
    assert (
        b.execute_script(
            "return performance.getEntriesByType('resource').filter(r => !r.name.startsWith('data:')).length"
        )
        == 0
    )
    assert b.title == "Circuit of made-up, demo"  # the attack in a token did not run
    assert b.execute_script("return circuit.visible().length") == 24
    assert not b.find_elements("css selector", "img")


def slide(b, name: str, value) -> None:
    b.execute_script(
        "const e = document.getElementById(arguments[0]); e.value = arguments[1]; e.dispatchEvent(new Event('input'))",
        name,
        value,
    )


@pytest.mark.parametrize("count,share", [(1, 0.0), (3, 0.0), (1, 0.4), (4, 0.3), (6, 1.0)])
def test_sliders_filter(small, open_page, count, share):
    b, table = open_page(small[1]), expected(small[0])
    slide(b, "count", count)
    slide(b, "share", share)
    kept = table[(table["count"] >= count) & (table["share"].map(lambda s: float(f"{s:.5g}")) >= share - 1e-9)]
    assert b.execute_script("return circuit.visible().length") == len(kept)
    assert b.execute_script("return circuit.edges.get().filter(e => !e.hidden).length") == len(kept)
    assert b.find_element("id", "status").text.startswith(f"{len(kept)} of 24 edges")
    shown = set(b.execute_script("return circuit.nodes.get().filter(n => !n.hidden).map(n => n.label)"))
    assert shown == set(kept.reset_index()["upstream"]) | {f"L{ly}H{h}" for _, ly, h, _ in kept.index}


def test_click_on_an_edge_shows_its_prompts(small, open_page):
    from selenium.webdriver.common.action_chains import ActionChains

    b = open_page(small[1])
    b.execute_script(
        "circuit.edges.update(circuit.edges.getIds().filter(i => i !== 'e0').map(id => ({id, hidden: true})))"
    )
    b.execute_script("circuit.network.redraw()")
    x, y = b.execute_script(
        "const p = circuit.network.body.edges.e0.edgeType.getPoint(0.5);"
        "const d = circuit.network.canvasToDOM(p); return [d.x, d.y]"
    )
    graph = b.find_element("id", "graph")
    ActionChains(b).move_to_element_with_offset(
        graph, x - graph.size["width"] / 2, y - graph.size["height"] / 2
    ).click().perform()
    wait_for(lambda: b.find_elements("css selector", "#panel .prompt"))
    edge = b.execute_script("return circuit.data.edges[0]")
    assert b.find_element("css selector", "#panel h2").text == f"{edge['up']} → {edge['down']}"
    assert len(b.find_elements("css selector", "#panel .prompt")) == edge["count"]
    coloured = b.execute_script("""
        const tokens = p => [...p.querySelectorAll('.tok')].map((t, i) => [i, +t.dataset.value, t.style.background]);
        return [...document.querySelectorAll('#panel .prompt')].map(p => tokens(p).filter(t => t[1]));""")
    assert sorted(round(t[0][1], 3) for t in coloured) == sorted(round(r[4], 3) for r in edge["rows"])
    assert all(t[0][2].startswith("rgba(230, 159, 0") and t[0][0] == r[3] for t, r in zip(coloured, edge["rows"]))
    assert NASTY in b.find_element("css selector", "#panel .prompt").text
    b.execute_script("const s = document.getElementById('by'); s.value = 'all'; s.dispatchEvent(new Event('change'))")
    everywhere = b.execute_script("""
        const sum = p => [...p.querySelectorAll('.tok')].reduce((s, t) => s + +t.dataset.value, 0);
        return [...document.querySelectorAll('#panel .prompt')].map(sum);""")
    by_prompt = small[0].groupby("prompt")["contribution"].sum()
    assert sorted(everywhere) == pytest.approx(sorted(by_prompt.loc[sorted({r[0] for r in edge["rows"]})]), rel=1e-3)


def wait_for(condition, seconds: float = 10):
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > end:
            raise TimeoutError("waited in vain")
        time.sleep(0.05)
    return value


def test_hover_says_contribution_slices_firings_and_effects(small, open_page):
    from selenium.webdriver.common.action_chains import ActionChains

    b, first = open_page(small[1]), small[0].iloc[0]
    edge = b.execute_script("return circuit.data.edges.find(e => Object.keys(e.effects).length)")
    assert (edge["up"], edge["effects"]) == (first.upstream, {"ablate local, traced slices": -1.5})
    text = b.execute_script("return circuit.edges.get(arguments[0]).title.textContent", edge["id"])
    for words in (
        "contribution, mean",
        "share",
        "slices, mean",
        "ablate local, traced slices-1.50",
        f"{edge['count']} of 6",
    ):
        assert words in text
    x, y = b.execute_script(
        "const n = circuit.data.nodes.find(n => n.known);"
        "const d = circuit.network.canvasToDOM({x: n.x, y: n.y}); return [d.x, d.y]"
    )
    graph = b.find_element("id", "graph")
    ActionChains(b).move_to_element_with_offset(
        graph, x - graph.size["width"] / 2 + 3, y - graph.size["height"] / 2
    ).pause(0.3).move_by_offset(1, 1).perform()
    shown = wait_for(
        lambda: [
            e.text
            for e in b.find_elements("css selector", "div.vis-tooltip")
            if e.value_of_css_property("visibility") == "visible"
        ]
    )
    assert "traced firings" in shown[0] and first.upstream in shown[0] and "known" in shown[0]


def test_five_hundred_edges_stay_responsive(tmp_path, open_page):
    edges, batch = made_up(500, n_prompts=12, n_layers=12, n_heads=12)
    page = circuit_page(edges, batch, Words(), tmp_path / "big.html")
    assert page.stat().st_size < 3e6
    b = open_page(page)
    assert b.execute_script("return circuit.visible().length") == 500
    times = b.execute_async_script("""
        const done = arguments[0], slider = document.getElementById('count'), times = [];
        let value = 1;
        (function step() {
          if (++value > 11) { done(times); return; }
          const start = performance.now();
          circuit.network.once('afterDrawing', () => { times.push(performance.now() - start); setTimeout(step, 0); });
          slider.value = value; slider.dispatchEvent(new Event('input'));
        })();""")
    print(f"500 edges: slider to picture {np.median(times):.0f} ms (median of {len(times)}), worst {max(times):.0f} ms")
    b.execute_script("circuit.choose('e0')")
    assert b.get_log("browser") == []


@pytest.mark.parametrize("width", [1280, 390])
def test_no_horizontal_overflow(small, open_page, width):
    b = open_page(small[1], width, 850)
    b.execute_script("circuit.choose('e0')")
    assert horizontal_overflow(b) == []


def test_the_authors_graph_has_no_prompts(reference, tmp_path, open_page):
    graph = read_graph(reference / "ioi_gpt2_small/svt_graph_p256.graphml")
    b = open_page(
        circuit_page(
            graph, None, None, tmp_path / "ioi.html", known_heads=reference / "published/ioi_circuit_gpt2_small.json"
        )
    )
    assert b.get_log("browser") == []
    assert b.execute_script("return circuit.visible().length") == 533
    b.execute_script("circuit.choose('e0')")
    assert "saved without its prompts" in b.find_element("id", "panel").text


def test_a_page_with_flow_opens_pruned_and_widens(tmp_path, open_page):
    from spectral_nb.tracing.flow import trace_flow
    from spectral_nb.tracing.recursion import trace_tables

    p = planted("values", 4)
    edges, firings = trace_tables(p.model, p.batch, p.roots, values=True)
    page = circuit_page(trace_flow(edges, firings).edges, p.batch, None, tmp_path / "flow.html")
    b = open_page(page)
    n, opened = b.execute_script("return [circuit.data.edges.length, circuit.visible()]")
    flows = b.execute_script("return circuit.data.edges.map(e => e.flow)")
    assert flows == sorted(flows, reverse=True) and len(opened) < n
    shown = sum(flows[: len(opened)]) / sum(flows)
    assert shown >= 0.8 - 1e-6 and f"carry {round(100 * shown)} % of the flow" in b.find_element("id", "status").text
    slide(b, "flow", 1)
    assert b.execute_script("return circuit.visible().length") == n
    slide(b, "flow", 0.05)
    assert b.execute_script("return circuit.visible()") == ["e0"]
    assert "read as value" in b.find_element("id", "kinds").text
