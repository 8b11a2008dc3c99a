"Three prompts of one's own through every section, from a file whose content is part of a run's identity."

import json

import pandas as pd
import pytest

from spectral_nb import cross_architecture, norm_growth, pr_fingerprint, sparse_attention
from spectral_nb.base.runs import run_id

PROMPTS = [
    dict(
        prompt="When {IO:Mary} and {S1:John} went to the shop , {S2:John} gave a book to", answer=" Mary", wrong=" John"
    ),
    dict(prompt="When {IO:Anna} and {S1:Tom} went to the park , {S2:Tom} gave a ball to", answer=" Anna", wrong=" Tom"),
    dict(
        prompt="When {S1:Tom} and {IO:Mary} went to the school , {S2:Tom} gave a ball to", answer=" Mary", wrong=" Tom"
    ),
]
MODEL = "story-gpt2-s42"


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> str:
    "The file `mine.jsonl`."
    file = tmp_path_factory.mktemp("own") / "mine.jsonl"
    file.write_text("\n".join(map(json.dumps, PROMPTS)))
    return str(file)


def check_table(table: pd.DataFrame) -> None:
    assert len(table) and set(table.model) == {MODEL}
    assert table.value.notna().any()


def test_norm_growth(own):
    cfg = norm_growth.NormGrowthConfig(MODEL, prompts=own, circuit_tasks="", n_random=8)
    table = norm_growth.run(cfg)
    check_table(table)
    assert (table[table.metric == "norm_mean"].value > 0).all()


def test_sparse_attention(own):
    table = sparse_attention.run(sparse_attention.SparseAttentionConfig(MODEL, prompts=own, n_draws=2))
    check_table(table)
    assert set(table.task) == {"mine"} and (table[table.metric == "accuracy"].value.between(0, 1)).all()


def test_pr_fingerprint(own, tmp_path):
    sizes = dict(revision="step1040", n_draws=2)
    with pytest.raises(ValueError, match="mark the content as .key:...}; roles there: IO, S1, S2"):
        pr_fingerprint.measure(pr_fingerprint.FingerprintConfig(MODEL, prompts=own, **sizes))
    file = tmp_path / "keys.jsonl"
    file.write_text("\n".join(json.dumps(p).replace("IO:", "key:") for p in PROMPTS))
    cfg = pr_fingerprint.FingerprintConfig(MODEL, prompts=str(file), **sizes)
    found = pr_fingerprint.measure(cfg)
    check_table(pr_fingerprint.run(cfg))
    assert found.picks and "readout" not in found.heads


def test_cross_architecture(own):
    sizes = dict(n_prompts=8, n_ablation=8, length=24, n_draws=2, max_revisions=2)
    [found] = cross_architecture.measure(cross_architecture.CrossArchitectureConfig(MODEL, prompts=own, **sizes))
    assert len(found.surveys["own"]) == 12 and found.surveys["own"].attrs["n_prompts"] == 3


def test_a_run_is_named_by_the_content_of_its_files(own, tmp_path):
    file = tmp_path / "other.jsonl"
    file.write_text("a")
    first = run_id("section", {"prompts": str(file)}, "w", "c")
    assert first == run_id("section", {"prompts": str(file), "out_dir": "x"}, "w", "c")
    file.write_text("b")
    assert first != run_id("section", {"prompts": str(file)}, "w", "c")
