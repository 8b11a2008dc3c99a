"`make real`: its sweeps, the tables that it keeps, and what the sections show of them."

import re
from dataclasses import fields
from pathlib import Path

import pandas as pd
import pytest

from spectral_nb import cross_architecture, norm_growth, pr_fingerprint, sparse_attention, svt, which_signal
from spectral_nb.base.files import write_table
from spectral_nb.base.paths import repo_root
from spectral_nb.base.real_model import REAL_MODEL, real_file, real_part
from spectral_nb.dev import real_results
from spectral_nb.fingerprint.kept import kept_ratios
from spectral_nb.survey.kept import kept_surveys
from spectral_nb.sweeps.notebook import parameters_cell, read_notebook
from spectral_nb.sweeps.spec import expand, load_spec

SECTIONS = ("norm_growth", "sparse_attention", "svt", "pr_fingerprint", "cross_architecture", "which_signal")
NOTEBOOKS = {p.stem.split("_", 1)[1]: p for p in sorted((repo_root() / "nbs").glob("1[0-5]_*.ipynb"))}
CONFIGS = {
    "norm_growth": norm_growth.NormGrowthConfig,
    "sparse_attention": sparse_attention.SparseAttentionConfig,
    "svt": svt.SvtConfig,
    "pr_fingerprint": pr_fingerprint.FingerprintConfig,
    "cross_architecture": cross_architecture.CrossArchitectureConfig,
    "which_signal": which_signal.WhichSignalConfig,
}


@pytest.mark.parametrize("section", CONFIGS)
def test_the_parameters_of_a_notebook_are_the_defaults_of_its_config(section):
    cell = parameters_cell(read_notebook(NOTEBOOKS[section]))[0]
    given = {f.name: f.default for f in fields(CONFIGS[section])}
    assert {k: p.default for k, p in cell.items() if k in given} == given


@pytest.mark.parametrize("section", SECTIONS)
def test_each_section_has_a_sweep_of_one_run_on_the_real_model(section):
    spec = load_spec(repo_root() / "nbs" / "sweeps" / f"real_{section}.yaml")
    [run] = expand(spec)
    assert spec.section == section and run["model_name"] == REAL_MODEL


def test_sweeps_of_one_section_are_put_together(tmp_path, monkeypatch):
    "A second sweep of section 6 replaces its own tasks' rows and leaves the others; other sections are replaced whole."
    monkeypatch.setattr(real_results, "real_file", lambda section, part="": tmp_path / f"{section}{part}.parquet")
    write_table(pd.DataFrame(dict(task=["ioi", "sva"], metric=[1.0, 2.0])), tmp_path / "which_signalcurves.parquet")
    new = pd.DataFrame(dict(task=["sva", "sva"], metric=[3.0, 4.0]))
    both = real_results.with_others("which_signal", "curves", new)
    assert both.values.tolist() == [["ioi", 1.0], ["sva", 3.0], ["sva", 4.0]]
    claims = pd.DataFrame(dict(task=["ioi", "ioi"], claim=["a", "b"], effect=[1.0, 2.0]))
    write_table(claims, tmp_path / "which_signal.parquet")
    both = real_results.with_others("which_signal", "", claims.tail(1).assign(effect=3.0))
    assert both.effect.tolist() == [1.0, 3.0]
    write_table(claims, tmp_path / "svt.parquet")
    assert len(real_results.with_others("svt", "", claims.tail(1))) == 1


def test_make_real_runs_them_and_keeps_the_tables():
    made = (repo_root() / "Makefile").read_text()
    assert "real_*.yaml" in made and "spectral_nb.dev.real_results data/runs/real" in made
    assert re.search(r"^real: .*## ", made, re.M)


def kept() -> list[str]:
    return [s for s in SECTIONS if real_file(s).is_file()]


@pytest.mark.parametrize("section", kept())
def test_kept_claims_are_whole(section):
    claims, table = real_part(section), real_part(section, "table")
    assert len(claims) and set(claims.verdict) <= {"yes", "no", "undecided"}
    assert claims[["claim", "effect", "unit", "rule"]].notna().all().all()
    assert set(table.model.dropna()) == {REAL_MODEL}


def test_what_the_figures_read_is_there():
    if "cross_architecture" in kept():
        [m] = kept_surveys()
        assert set(m.surveys) == {"synthetic", "natural"} and len(m.classed) == m.pr[..., 0].size
        assert m.baseline["synthetic"]["loss"] > 0
    if "pr_fingerprint" in kept():
        ratios, picks = kept_ratios()
        assert ratios["pr"].shape == (30, 9) and picks
    assert kept_surveys(but=REAL_MODEL) == [] and kept_ratios(but=REAL_MODEL) is None


def test_the_times_of_the_runs_are_kept():
    if not (path := Path(real_file("runs"))).is_file():
        pytest.skip("make real was not run")
    runs = pd.read_parquet(path)
    assert (runs.model == REAL_MODEL).all() and runs.sweep.is_unique and runs.notna().all(axis=None)


def test_ratios_are_of_raw_weights():
    "Folding moves value biases out of the heads' outputs and changes their ratio by up to 31 %."
    for section in ("pr_fingerprint", "cross_architecture"):
        assert CONFIGS[section]().processing == "raw"
    for file in ("survey_pythia", "survey_1b"):
        for run in expand(load_spec(repo_root() / "nbs" / "sweeps" / f"{file}.yaml")):
            assert run.get("processing", "raw") == "raw"
