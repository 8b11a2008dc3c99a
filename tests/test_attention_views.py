"Attention views: slices add up to the scores in every architecture, and the page shows both views without a network."

import json
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, horizontal_overflow, random_tokens

from spectral_nb.attention.activations import capture
from spectral_nb.views.attention import attention_page, main, plot_pattern, plot_slice_terms, rank_slices, slice_maps
from spectral_nb.prompts.batches import PromptBatch


def some_prompts(n: int = 3, length: int = 9) -> PromptBatch:
    tokens = random_tokens(n, length)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, length - 3 :] = False
    return PromptBatch("demo", tokens, mask, {"end": mask.sum(1) - 1}, None, None, ["x"] * n, 0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_slices_add_up_to_the_scores(tiny_model, architecture):
    model, batch = tiny_model(architecture), some_prompts()
    acts = capture(model, batch)
    for prompt, layer, head in ((0, 1, 3), (1, 0, 2)):
        n = int(batch.lengths[prompt])
        maps = slice_maps(model, acts, layer, head, prompt)
        scores = acts.scores[layer, prompt, head, :n, :n].tril()
        assert maps.shape[1:] == (n, n)
        assert (maps.triu(1) == 0).all()
        assert (maps.sum(0) - scores).abs().max() < 1e-3 * scores.abs().max()


def test_rank_is_by_what_a_slice_adds_where_the_head_attends():
    maps = torch.zeros(3, 3, 3)
    maps[0, 1, 0], maps[1, 2, 1], maps[2, 2, 1] = 100.0, 1.0, -5.0  # slice 0 only moves attention to the first token
    pattern = torch.tensor([[1.0, 0, 0], [0.9, 0.1, 0], [0.1, 0.8, 0.1]])
    assert rank_slices(maps, pattern)[0] == 1 and rank_slices(maps, pattern)[-1] == 2


def test_page_holds_patterns_and_slices(tiny_model, tmp_path):
    model, batch = tiny_model("llama"), some_prompts()
    page = attention_page(model, batch, "L1H0 L0H2", tmp_path / "a.html", prompts=[1], n_slices=3)
    data = json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', page.read_text(), re.S)[1])
    assert list(data) == ["p0", "p0L1H0", "p0L0H2"]
    assert len(data["p0"]["tokens"]) == 6  # the padding is left out
    acts = capture(model, batch)
    assert np.allclose(data["p0"]["attention"][0], acts.pattern[1, 1, 0, :6, :6], atol=1e-3)
    assert np.allclose(data["p0L1H0"]["attention"][0], acts.scores[1, 1, 0, :6, :6].tril(), rtol=1e-2, atol=1e-2)
    assert data["p0L1H0"]["attentionHeadNames"][0] == "score" and len(data["p0L1H0"]["attention"]) == 4


@pytest.mark.parametrize(
    "change,words",
    [
        (dict(heads="L9H0"), "L9H0"),
        (dict(heads=[]), "heads"),
        (dict(prompts=[7]), "prompts"),
        (dict(prompts=[]), "prompts"),
        (dict(n_slices=99), "n_slices"),
        (dict(path="a.txt"), "html"),
    ],
)
def test_refusals_leave_no_file(tiny_model, tmp_path, change, words):
    arguments = dict(heads="L1H0", path="a.html", prompts=[0]) | change
    with pytest.raises(ValueError, match=words):
        attention_page(
            tiny_model("gpt2"), some_prompts(), arguments.pop("heads"), tmp_path / arguments.pop("path"), **arguments
        )
    assert not list(tmp_path.iterdir())


def test_plots_return_their_axes():
    ax = plot_pattern(np.tri(3) / 3, ["a", "b", "c"])
    assert [t.get_text() for t in ax.get_xticklabels()] == ["a", "b", "c"]
    ax = plot_slice_terms([5.0, 1.0, -2.0])  # the total is 4: 1 and -2 cancel, 5 alone exceeds it
    assert "1 of 3 slices" in ax.get_legend().get_texts()[-1].get_text()
    plt.close("all")


def test_browser_draws_both_views(tiny_model, tmp_path, open_page):
    from test_circuit_page import wait_for

    page = attention_page(
        tiny_model("gpt2"), some_prompts(), "L1H0 L0H2", tmp_path / "a.html", prompts=[0, 1], n_slices=3
    )
    b = open_page(page)
    wait_for(lambda: len(b.find_elements("css selector", "#p0 canvas, #p0 svg, #p0 img")) >= 2)
    assert not b.find_elements("css selector", "#p0L1H0 canvas")  # drawn when opened
    b.find_element("css selector", "summary").click()
    wait_for(lambda: b.find_elements("css selector", "#p0L1H0 canvas"))
    assert re.search(r"sv\d", b.find_element("id", "p0L1H0").text)
    assert b.get_log("browser") == []
    assert (
        b.execute_script(
            "return performance.getEntriesByType('resource').filter(r => r.name.startsWith('http')).length"
        )
        == 0
    )
    b = open_page(page, 390, 800)
    wait_for(lambda: b.find_elements("css selector", "#p0 canvas"))
    assert horizontal_overflow(b) == []


def test_the_command(tmp_path, capsys):
    from spectral_nb.models.revisions import list_models

    if "story-gpt2-s42" not in list_models():
        pytest.skip("story-gpt2-s42 is not shipped")
    assert (
        main(["--model", "story-gpt2-s42", "--heads", "L1H0", "--prompts", "1", "--out", str(tmp_path / "v.html")]) == 0
    )
    assert (tmp_path / "v.html").stat().st_size > 1e6 and "v.html" in capsys.readouterr().out


def test_token_labels_are_literal_text():
    "Two dollar signs in one label would be a formula; matplotlib parses it only when it draws."
    tokens = [" $5", "$x_{$", " a$b$c", "%", "\\frac"]
    ax = plot_pattern(np.tri(5) / 5, tokens)
    ax.figure.canvas.draw()
    assert [t.get_text().replace("\\$", "$") for t in ax.get_xticklabels()] == [t.strip() for t in tokens]
