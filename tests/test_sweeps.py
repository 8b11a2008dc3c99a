"Sweeps with real papermill runs: grids, failures, limits, results, bad input, the console command."

import datetime
import math
import subprocess
import sys

import nbformat
import numpy as np
import pandas as pd
import pytest
from sweep_toy import PARAMETERS, noted, write_toy

from spectral_nb.base.paths import repo_root
from spectral_nb.base.sources import code_stamp
from spectral_nb.sweeps import (
    clean_sweep,
    collect_sweep,
    load_results,
    load_spec,
    run_sweep,
    run_sweeps,
    sweep_plan,
    sweep_status,
)
from spectral_nb.sweeps.command import main
from spectral_nb.sweeps.plan import named_content, model_hashes
from spectral_nb.sweeps.machine import threads_per_worker
from spectral_nb.sweeps.records import lock_file, lock_path, read_record


@pytest.fixture
def toy(tmp_path):
    "A function that makes the mapping of a sweep of the toy notebook."
    write_toy(tmp_path)

    def sweep(**keys):
        return {"notebook": str(tmp_path / "90_toy.ipynb"), "out": str(tmp_path / "out"), **keys}

    return sweep


def test_grid_of_eight_over_two_workers(toy, tmp_path, capfd):
    log = tmp_path / "log"
    sweep = toy(grid={"x": list(range(8))}, parameters={"log": str(log), "wait": 0.2})
    outcome = run_sweep(sweep, workers=2)
    assert outcome.ok and list(outcome.runs.x) == list(range(8))
    results = load_results(tmp_path / "out")
    assert list(results.query("metric == 'square'").value) == [x * x for x in range(8)]
    assert set(results.query("metric == 'threads'").value) == {threads_per_worker(2)}
    assert {"run_id", "section", "weights_hash", "code_version", "seconds", "peak_memory_mb", "torch_version"} <= set(
        results.columns
    )
    assert (results.peak_memory_mb > 20).all() and (results.section == "toy").all()
    moments = sorted((when, 1 if word == "start" else -1) for word, _, _, when in noted(log))
    assert np.cumsum([step for _, step in moments]).max() == 2  # two at a time, never three
    said = capfd.readouterr().err.splitlines()
    assert (
        len(said) == 9
        and said[0].startswith("dashboard  http://")
        and said[-1].startswith("[8/8] done")
        and "8 done, 0 running, 0 failed" in said[-1]
    )
    assert run_sweep(sweep, workers=2, progress="none").reused == 8  # and nothing runs again
    assert len(noted(log)) == 16
    for folder in outcome.runs.folder:
        assert nbformat.read(f"{folder}/notebook.ipynb", 4).metadata.papermill.exception is None


def test_workers_may_read_a_notebook_at_the_same_time():
    "CPython 3.11 mixes up two parses at once; here every collection of garbage lets another thread in."
    code = """
import gc, json, sys
from concurrent.futures import ThreadPoolExecutor
from spectral_nb.base.sources import _imports
from spectral_nb.sweeps.notebook import parameters_cell, read_notebook
notebook = read_notebook(sys.argv[1])
cells = [c["source"] for c in notebook["cells"] if c["cell_type"] == "code"]
sys.setswitchinterval(1e-6)
gc.callbacks.append(lambda *_: sum(range(50)))
gc.set_threshold(50, 2, 2)
read = lambda _: str([_imports.__wrapped__(c) for c in cells])
parameters = lambda _: str([parameters_cell(notebook) for _ in range(10)])
with ThreadPoolExecutor(8) as pool:
    print(len(set(pool.map(read, range(40)))), len(set(pool.map(parameters, range(40)))))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(repo_root() / "nbs" / "12_svt.ipynb")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout == "1 1\n", done.stderr[-1000:]


def test_failures_limits_and_retry(toy, tmp_path):
    "One raises, one never ends, one exhausts its memory, one writes nothing, one is shot; the good one is done."
    log, out = tmp_path / "log", tmp_path / "all" / "rest"
    modes = ["ok", "raise", "memory", "no table", "shot", "shot once", "raise unless mended"]
    sweep = toy(
        name="rest",
        points=[{"x": i, "mode": mode} for i, mode in enumerate(modes)],
        parameters={"log": str(log)},
        resources={"memory_gb": 0.4},
    )
    endless = toy(name="endless", points=[{"mode": "forever"}], resources={"timeout_s": 15})
    outcome, ended = run_sweeps([sweep, endless], workers=2, out=tmp_path / "all", progress="none")
    runs = pd.concat([outcome.runs, ended.runs]).set_index("mode")
    assert runs.status.to_dict() == {
        "ok": "done",
        "raise": "failed",
        "forever": "timeout",
        "memory": "memory",
        "no table": "failed",
        "shot": "killed",
        "shot once": "done",
        "raise unless mended": "failed",
    }
    assert runs.error["raise"] == "RuntimeError: x=1 is not liked" and "limit of 15 s" in runs.error["forever"]
    assert "its limit is 0.4 GB" in runs.error["memory"] and "no table.parquet" in runs.error["no table"]
    record = read_record(out, runs.run_id["raise"])
    assert record["parameters"]["mode"] == "raise" and "x=1 is not liked" in record["traceback"][-1]
    for mode in ("raise", "forever", "memory"):  # the notebook up to the failing cell
        cells = [c for c in nbformat.read(f"{runs.folder[mode]}/notebook.ipynb", 4).cells if c.cell_type == "code"]
        assert any(c.execution_count for c in cells) and cells[-1].execution_count is None
    assert "raise unless mended" not in set(load_results(out)["mode"])
    assert "run these again with --retry-failed" in outcome.summary()

    (tmp_path / "log.mended").touch()
    before = noted(log)
    sweep |= {"out": str(out), "points": [p for p in sweep["points"] if p["mode"].startswith(("ok", "raise"))]}
    assert not run_sweep(sweep, progress="none").ok and noted(log) == before  # failed runs rest
    again = run_sweep(sweep, retry_failed=True, executor="serial", progress="none").runs.set_index("mode")
    assert again.status.to_dict() == {"ok": "done", "raise": "failed", "raise unless mended": "done"}
    assert {x for _, x, _, _ in noted(log)[len(before) :]} == {1, 6}  # the failed ones alone


def test_executors(toy, tmp_path):
    "One thread of this process, or a cluster object that somebody else has made and keeps."
    from distributed import LocalCluster

    sweep = toy(grid={"x": [1, 2]})
    assert run_sweep({**sweep, "out": str(tmp_path / "a")}, executor="serial", progress="none").ok
    with LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None) as cluster:
        assert run_sweep({**sweep, "out": str(tmp_path / "b")}, scheduler=cluster, progress="none").ok
        assert cluster.status.name == "running"  # a given cluster is not shut down


def test_serial_limits(toy):
    sweep = toy(points=[{"mode": "forever"}], resources={"timeout_s": 3})
    assert list(run_sweep(sweep, executor="serial", progress="none").runs.status) == ["timeout"]


def test_runs_take_turns_on_the_gpu(toy, tmp_path, monkeypatch):
    "Three workers, one GPU: its lock is held by one run at a time, also where workers are threads."
    from distributed import LocalCluster

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    log = tmp_path / "log"
    sweep = toy(grid={"x": [1, 2, 3]}, parameters={"log": str(log), "wait": 0.3}, resources={"gpu": 1})
    with LocalCluster(n_workers=1, threads_per_worker=3, processes=False, dashboard_address=None) as cluster:
        assert run_sweep(sweep, scheduler=cluster, progress="none").ok
    assert [word for word, *_ in noted(log)] == ["start", "end"] * 3


def test_several_sweeps_share_a_pool(toy, tmp_path):
    sweeps = [toy(name=name, grid={"x": [i]}) for i, name in enumerate("ab")]
    outcomes = run_sweeps(sweeps, executor="serial", out=tmp_path / "all", progress="none")
    assert [o.folder for o in outcomes] == [tmp_path / "all" / "a", tmp_path / "all" / "b"]
    assert all(o.ok for o in outcomes)


def test_results_grow_with_the_sweep(toy, tmp_path):
    run_sweep(toy(grid={"x": [1]}), executor="serial", progress="none")
    outcome = run_sweep(toy(grid={"x": [1, 2]}, seeds=None), executor="serial", progress="none")
    assert outcome.reused == 1 and sorted(set(load_results(tmp_path / "out").x)) == [1, 2]
    (tmp_path / "out" / "results.parquet").unlink()
    assert sorted(set(load_results(tmp_path / "out").x)) == [1, 2]  # joined afresh
    assert collect_sweep(toy(grid={"x": [2]})).reused == 1
    assert set(load_results(tmp_path / "out").x) == {2}


def test_half_written_is_not_read(toy, tmp_path):
    outcome = run_sweep(toy(grid={"x": [1, 2]}), executor="serial", progress="none")
    one, two = (tmp_path / "out" / r for r in outcome.runs.run_id)
    (one / "run.json").write_text((one / "run.json").read_text()[:40])
    (two / "table.parquet").unlink()
    assert list(sweep_status(toy(grid={"x": [1, 2]})).status) == ["pending", "pending"]
    with pytest.raises(FileNotFoundError):
        collect_sweep(toy(grid={"x": [1, 2]})).results()
    assert run_sweep(toy(grid={"x": [1, 2]}), executor="serial", progress="none").ok


def test_plan_status_clean(toy, tmp_path, capsys):
    sweep = toy(points=[{"x": 1}, {"x": 2, "mode": "raise"}])
    assert list(sweep_plan(sweep).status) == ["pending", "pending"]
    run_sweep(sweep, executor="serial", progress="none")
    table = sweep_plan(sweep)
    assert (
        list(table.status) == ["done", "failed"] and table.peak_gb[0] > 0 and list(table.columns[:2]) == ["x", "mode"]
    )
    lock = lock_file(lock_path(tmp_path / "out", table.run_id[1]))
    assert sweep_status(sweep).status[1] == "failed" and clean_sweep(sweep) == []  # somebody works on it
    assert lock is not None
    __import__("os").close(lock)
    assert [p.name for p in clean_sweep(sweep)] == [table.run_id[1]]
    assert clean_sweep(toy(points=[{"x": 9}])) == [] and len(clean_sweep(toy(points=[{"x": 9}]), stale=True)) == 1


def test_console(toy, tmp_path, capsys):
    file = tmp_path / "toy.yaml"
    file.write_text("notebook: 90_toy\nparameters: {wait: 1e-2}\ngrid: {x: [1, 2]}\n")
    out = ["--out", str(tmp_path / "console")]
    assert main([str(file), *out, "--executor", "serial", "--quiet"]) == 0  # with workers: test_sweeps_kills
    said = capsys.readouterr().out
    assert "2 runs: 2 done (0 done before)" in said and "results.parquet" in said and "notebook.ipynb" in said
    for command in ("plan", "status", "collect", "clean"):
        assert main([command, str(file), *out]) == 0
        assert capsys.readouterr().out
    file.write_text("notebook: 90_toy\npoints: [{x: 1}, {x: 3, mode: raise}]\n")
    assert main(["run", str(file), *out, "--quiet", "--executor", "serial"]) == 1
    assert "failed: RuntimeError: x=3 is not liked" in capsys.readouterr().out
    assert main([str(tmp_path / "none.yaml")]) == 2 and "does not exist" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--help"])


BAD = {
    "unknown name": ({"grid": {"wiat": [1.0]}}, ValueError, "did you mean 'wait'"),
    "wrong type": ({"grid": {"x": ["one"]}}, ValueError, "x must be a whole number, got 'one' (str)"),
    "truth for number": ({"parameters": {"x": True}}, ValueError, "x must be a whole number, got True (bool)"),
    "fraction for whole": ({"parameters": {"x": 1.5}}, ValueError, "x must be a whole number, got 1.5 (float)"),
    "not a number": ({"parameters": {"wait": math.nan}}, ValueError, "JSON cannot carry nan"),
    "date": ({"parameters": {"mode": datetime.date(2026, 1, 1)}}, ValueError, "JSON cannot carry"),
    "array": ({"grid": {"x": [np.int64(1)]}}, ValueError, "of type int64"),
    "empty axis": ({"grid": {"x": []}}, ValueError, "grid.x must be a non-empty list"),
    "axis twice": ({"grid": {"x": [1, 1]}}, ValueError, "more than once"),
    "bare axis": ({"grid": {"x": 1}}, ValueError, "grid.x must be a non-empty list"),
    "grid of text": ({"grid": "x"}, ValueError, "grid must be a list of dict"),
    "unknown key": ({"gird": {}}, ValueError, "did you mean 'grid'"),
    "seeds": ({"seeds": ["a"]}, ValueError, "seeds must be a list of int"),
    "no seed parameter": ({"seeds": [1]}, ValueError, "parameter='seed' is not known"),
    "out_dir": ({"parameters": {"out_dir": "x"}}, ValueError, "out_dir is set by the sweep"),
    "resource": ({"resources": {"memory": 1}}, ValueError, "did you mean 'memory_gb'"),
    "resource value": ({"resources": {"timeout_s": 0}}, ValueError, "resources.timeout_s=0 must be"),
    "name": ({"name": "a/b"}, ValueError, "name='a/b' must be fit for a folder"),
    "missing notebook": ({"notebook": "no_such"}, FileNotFoundError, "notebook='no_such' is not known"),
    "no parameters cell": ({"notebook": "index"}, ValueError, "0 cells tagged 'parameters'"),
    "unknown executor": ({}, ValueError, "executor='nowhere' is not known"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_anything_runs(case, toy, tmp_path):
    keys, error, message = BAD[case]
    with pytest.raises(error, match=".*") as caught:
        run_sweep(toy(**keys), executor="nowhere" if case == "unknown executor" else "local")
    assert message in str(caught.value)
    assert not list(tmp_path.glob("out/*/*"))


def test_bad_files(tmp_path):
    write_toy(tmp_path)
    file = tmp_path / "toy.yaml"
    for text, message in {
        "notebook: 90_toy\ngrid: {x: [1], x: [2]}": "given more than once",
        "- a": "must hold a mapping",
        "notebook: [": "toy.yaml",
        "grid: {x: [1]}": "key notebook is missing",
        "notebook: 90_toy\nparameters: {wait: '1e-3'}": "write 0.001",
    }.items():
        file.write_text(text)
        with pytest.raises(ValueError, match=".*") as caught:
            load_spec(file)
        assert message in str(caught.value)
    with pytest.raises(FileNotFoundError, match="none.yaml"):
        load_spec(tmp_path / "none.yaml")


def test_bad_notebooks(tmp_path):
    write_toy(tmp_path, "x = 1\n")
    with pytest.raises(ValueError, match="has no parameter out_dir"):
        load_spec({"notebook": str(tmp_path / "90_toy.ipynb")})
    write_toy(tmp_path, "x = len('a')\n")
    with pytest.raises(ValueError, match="the default of 'x' is not a literal"):
        load_spec({"notebook": str(tmp_path / "90_toy.ipynb")})
    (tmp_path / "90_toy.ipynb").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        load_spec({"notebook": str(tmp_path / "90_toy.ipynb")})


def test_unwritable_folder_is_refused(toy, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file/out' cannot be written"):
        run_sweep(toy(out=str(tmp_path / "file" / "out")))
    assert main([str(tmp_path / "none.yaml"), "--out", "/proc/none"]) == 2


def test_all_problems_come_at_once(toy):
    with pytest.raises(ValueError) as caught:
        load_spec(toy(grid={"a": [1], "x": [1.5]}, parameters={"wait": "b"}))
    assert all(p in str(caught.value) for p in ("parameter='a'", "got 1.5", "wait must be a number, got 'b'"))


def test_model_names_are_checked_before_anything_runs(tmp_path):
    write_toy(tmp_path, PARAMETERS + 'model_name: str = "story-gpt2-s42"\nrevision: str = ""\n')
    sweep = {
        "notebook": str(tmp_path / "90_toy.ipynb"),
        "out": str(tmp_path / "out"),
        "grid": {"model_name": ["story-gpt2-s41"]},
    }
    with pytest.raises((ValueError, FileNotFoundError), match="story-gpt2-s41"):
        run_sweep(sweep)
    assert not list(tmp_path.glob("out/*/*"))


def test_identity_of_a_run(toy, tmp_path):
    def ids(**keys):
        return list(sweep_plan(toy(**keys)).run_id)

    assert ids(grid={"x": [1]}) == ids(points=[{"x": 1, "wait": 0.0}])  # a default given is the default
    assert ids(grid={"x": [1]}) != ids(grid={"x": [2]})
    assert len(ids(grid={"x": [1, 2]}, points=[{"x": 2}])) == 2  # the same run twice is one run
    assert ids(section="other") != ids()
    found = [ids(grid={"x": [1]})]
    for cell, tags in (("import helper", []), ("# a comment", []), ("limit = 3", [])):
        notebook = nbformat.read(tmp_path / "90_toy.ipynb", 4)
        notebook.cells.append(nbformat.v4.new_code_cell(cell))
        nbformat.write(notebook, tmp_path / "90_toy.ipynb")
        found.append(ids(grid={"x": [1]}))
    (tmp_path / "helper.py").write_text("y = 1\n")
    found.append(ids(grid={"x": [1]}))
    (tmp_path / "helper.py").write_text("y = 2\n")
    found.append(ids(grid={"x": [1]}))
    assert len({str(x) for x in found}) == 6


def test_a_module_of_a_subpackage_counts(tmp_path):
    package = tmp_path / "spectral_nb"
    (package / "deep").mkdir(parents=True)
    (package / "top.py").write_text("from .deep.inner import f\n")
    (package / "deep" / "inner.py").write_text("def f(): return 1\n")
    before = code_stamp(["from spectral_nb.top import f"], package=package)
    (package / "deep" / "inner.py").write_text("def f(): return 2\n")
    assert code_stamp(["from spectral_nb.top import f"], package=package) != before


def test_code_in_the_parameters_cell_counts(tmp_path):
    ids = []
    for more in ("", "print(1)\n", "print(2)\n"):
        write_toy(tmp_path, PARAMETERS + more)
        ids += list(sweep_plan({"notebook": str(tmp_path / "90_toy.ipynb"), "out": str(tmp_path / "out")}).run_id)
    assert len(set(ids)) == 3


def test_files_and_models_count_by_content_under_any_name(tmp_path):
    "A text, a local model's tokenizer, a shipped model: whichever parameter names them."
    model = tmp_path / "own model"
    model.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (model / name).write_text(name)
    (tmp_path / "lines.txt").write_text("one")
    given = dict(texts="lines.txt", teacher=str(model), pupils=["story-gpt2-s42"], n=3)
    found = named_content(given, tmp_path)
    assert set(found) == {"lines.txt", str(model), "story-gpt2-s42"}
    for file in (tmp_path / "lines.txt", model / "tokenizer.json"):
        file.write_text("changed in content")
        assert named_content(given, tmp_path) != found
        found = named_content(given, tmp_path)
    assert len(model_hashes(given, {"teacher": (), "pupils": ()}, tmp_path)) == 2
    with pytest.raises((ValueError, FileNotFoundError), match="step0"):
        model_hashes(dict(m="story-gpt2-s42", r="stpe0"), {"m": ("r",)}, tmp_path)


def test_what_a_run_reads_is_in_its_id(tmp_path):
    "A text beside the notebook, the tokenizer of a local model: under whatever name the parameters give it."
    model = tmp_path / "model"
    model.mkdir()
    files = [tmp_path / "lines.txt", model / "tokenizer.json", model / "model.safetensors", model / "config.json"]
    for file in files:
        file.write_text("{}")
    write_toy(tmp_path, PARAMETERS + f'texts = "lines.txt"\nteachers = ["{model}"]\n')
    sweep = {"notebook": str(tmp_path / "90_toy.ipynb"), "out": str(tmp_path / "out")}
    ids = list(sweep_plan(sweep).run_id)
    for file in files:
        assert list(sweep_plan(sweep).run_id) == ids[-1:]
        file.write_text('{"changed": 1}')
        ids += list(sweep_plan(sweep).run_id)
    assert len(set(ids)) == 5


def test_threads_do_not_oversubscribe():
    for workers in (1, 2, 3, 8):
        assert workers * threads_per_worker(workers) <= max(workers, threads_per_worker(1))


@pytest.mark.parametrize("file", sorted((repo_root() / "nbs" / "sweeps").rglob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_sweeps_are_valid(file):
    assert load_spec(file).name == file.stem
