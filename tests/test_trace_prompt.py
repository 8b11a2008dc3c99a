"One prompt, one call; the same from the shell; graphs pruned by flow."

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from sweep_toy import finished_runs, write_toy

from spectral_nb.models.loading import load_model
from spectral_nb.models.planted_circuits import planted
from spectral_nb.tracing.flow import trace_flow
from spectral_nb.tracing.graphs import communication_edges, trace_graph
from spectral_nb.tracing.one_prompt import silent_heads, trace_prompt
from spectral_nb.tracing.paths import in_words, strongest_paths
from spectral_nb.tracing.recursion import trace_tables
from spectral_nb.tracing.sentence import draw_sentence, path_links
from spectral_nb.views.circuit_tables import opening_share
from spectral_nb.views.trace_command import main

TEXT = "When Mary and John went to the shop , John gave a book to"


@pytest.fixture(scope="module")
def found():
    return trace_prompt(load_model("story-neox"), TEXT, " Mary", " John")


def test_the_drawing_shows_the_strongest_paths(found):
    links = path_links(found.paths(200), 12)
    assert 1 < len(links) <= 12 and (links.carried > 0).all()
    shown = {t.get_text() for t in draw_sentence(found, max_links=12).texts}
    assert shown == {*links.component, "Mary"}
    best = found.paths(1)[0]
    assert (best.steps[0].component, best.steps[0].position) in set(zip(links.component, links.position))
    told = links[links.read == "answer"].carried.sum()  # every path goes to the answer once
    assert 0 < told <= found.firings["weight"].sum() + 1e-6


def test_paths_add_up_to_the_roots_and_are_the_strongest(found):
    every = strongest_paths(found.flow, found.firings, n=10**6, smallest=0.0)
    assert sum(p.carried for p in every) == pytest.approx(found.firings["weight"].sum(), rel=1e-6)
    assert [p.carried for p in found.paths(3)] == pytest.approx([p.carried for p in every[:3]])
    roots = {f"L{layer}H{head}" for layer, head in found.roots}
    assert {p.steps[0].component for p in every} <= roots and found.firings["weight"].sum() > 0


def test_roots_are_not_given_by_hand(found):
    weights = found.firings[found.firings["root"].astype(bool)].groupby(["layer", "head"])["weight"].sum()
    assert set(weights.index) == set(found.roots) and (weights > 0).all()


def test_heads_that_are_left_out_are_named(found):
    "A head that does not fire is no root, however much it adds; the report says so."
    effect, fired = torch.tensor([[[0.5, 2.0], [3.0, 0.1]]]), torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    assert silent_heads(effect, fired) == (("L1H0", 3.0), ("L0H1", 2.0))
    assert silent_heads(effect, torch.ones(1, 2, 2)) == ()
    left_out = replace(found, silent=(("L1H0", 3.0), ("L0H1", 2.0)))
    assert "not traced: L1H0 +3.00, L0H1 +2.00 add more than any root" in str(left_out)
    assert "not traced" not in str(replace(found, silent=()))


def test_words_name_tokens_heads_and_what_is_read():
    p = planted("values", 1)
    edges, firings = trace_tables(p.model, p.batch, p.roots, values=True)
    paths = strongest_paths(trace_flow(edges, firings), firings, 100)
    said = [in_words(path, lambda prompt, position: f"t{position}", "X") for path in paths]
    end, source = int(p.batch.at("end")), int(p.batch.at("source"))
    first = f"L2H1 at t{end} looking at t{end} favours X"
    middle = f"{first} <- its value reads L1H2 at t{end} looking at t{source}"
    assert {first, middle, f"{middle} <- its value reads L0H1 at t{source} looking at t{source - 2}"} <= set(said)
    assert f"{middle} <- its key reads L0H0 at t{source} looking at t{source - 1}" in said and len(said) == 4


def test_graphs_are_pruned_by_flow():
    p = planted("values", 3)
    edges, firings = trace_tables(p.model, p.batch, p.roots, values=True)
    flow = trace_flow(edges, firings).edges
    whole, half = (trace_graph(flow, unlabeled="keep", flow=f) for f in (1.0, 0.5))
    assert len(communication_edges(whole)) == 3 and len(communication_edges(half)) == 1
    assert communication_edges(half)["reads"].tolist() == ["value"]
    assert communication_edges(half)["flow"].iat[0] == pytest.approx(flow["flow"].max() * 3, rel=0.1)
    with pytest.raises(ValueError, match="trace_flow"):
        trace_graph(edges, flow=0.8)


def test_a_page_opens_with_at_most_sixty_edges():
    assert opening_share([3.0, 1.0, 0.0]) == 0.8 and opening_share([0.0]) == 0.0
    assert opening_share(list(np.ones(600))) == pytest.approx(0.1)


def test_the_command(tmp_path, capsys):
    page = tmp_path / "c.html"
    given = [
        TEXT,
        "--model",
        "story-neox",
        "--answer",
        " Mary",
        "--wrong",
        " John",
        "--html",
        str(page),
        "--paths",
        "3",
    ]
    assert main(given) == 0
    out = capsys.readouterr().out
    assert "logit difference" in out and " 1. " in out and " 4. " not in out and page.stat().st_size > 1e5
    assert main([TEXT, "--model", "story-neox", "--answer", " Mary", "--wrong", " Mary"]) == 2
    assert "answer" in capsys.readouterr().err
    assert main([TEXT, "--model", "no-such-model", "--answer", " Mary"]) == 2
    assert "no-such-model" in capsys.readouterr().err


def test_without_a_rival(found):
    alone = trace_prompt(load_model("story-neox"), TEXT, " Mary")
    assert np.isnan(alone.logit_diff) and alone.firings["weight"].sum() > 0 and "over" not in str(alone).split("\n")[0]


def left_by_its_reader(command: list[str]) -> tuple[int, str]:
    "(exit code, errors) of a command whose reader has gone before it prints."
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    return process.wait(), process.stderr.read()


def test_a_reader_that_leaves_loses_no_page(tmp_path):
    "`spectral-trace ... --html page | head` writes the page."
    command = [sys.executable, "-m", "spectral_nb.views.trace_command", TEXT, "--model", "story-neox"]
    command += ["--answer", " Mary", "--wrong", " John", "--html", str(tmp_path / "page.html")]
    assert left_by_its_reader(command) == (0, "")
    assert (tmp_path / "page.html").stat().st_size > 10_000


def test_a_reader_that_leaves_loses_no_run(tmp_path):
    write_toy(tmp_path)
    (tmp_path / "toy.yaml").write_text("notebook: 90_toy\ngrid: {x: [1, 2]}\n")
    command = [sys.executable, "-m", "spectral_nb.sweeps", "run", str(tmp_path / "toy.yaml")]
    code, errors = left_by_its_reader([*command, "--executor", "serial", "--out", str(tmp_path / "out")])
    assert code == 0, errors
    assert len(finished_runs(tmp_path / "out")) == 2
