"What once broke a sweep: one test a fault."

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import nbformat
import numpy as np
import pandas as pd
import psutil
import pytest
from sweep_toy import finish, finished_runs, noted, start_sweep, wait_for, write_toy

import spectral_nb.sweeps.schedule as schedule
from spectral_nb.sweeps import clean_sweep, load_results, load_spec, run_sweep, sweep_status
from spectral_nb.sweeps import command
from spectral_nb.sweeps.command import main
from spectral_nb.sweeps.plan import RunRequest, plan_runs
from spectral_nb.sweeps.run import RunKilled, execute_run


@pytest.fixture
def toy(tmp_path):
    "A function that makes the mapping of a sweep of the toy notebook."
    write_toy(tmp_path)

    def sweep(**keys):
        return {"notebook": str(tmp_path / "90_toy.ipynb"), "out": str(tmp_path / "out"), **keys}

    return sweep


def request_of(sweep: dict) -> RunRequest:
    return plan_runs(load_spec(sweep))[0]


def add_cell(folder, source: str, place: int = 2) -> None:
    "A cell behind the parameters cell of the toy notebook (or at another place)."
    notebook = nbformat.read(folder / "90_toy.ipynb", 4)
    notebook.cells.insert(place, nbformat.v4.new_code_cell(source))
    nbformat.write(notebook, folder / "90_toy.ipynb")


def add_column(folder, expression: str) -> None:
    "The toy's table gets a column."
    add_cell(
        folder,
        f"t = table.append_column('extra', pyarrow.array({expression}))\n"
        "pyarrow.parquet.write_table(t, os.path.join(out_dir, 'table.parquet'))",
        place=99,
    )


# Code that changes


def test_a_notebook_that_is_edited_runs_as_it_was_planned(toy, tmp_path):
    request = request_of(toy())
    source = (tmp_path / "90_toy.ipynb").read_text()
    (tmp_path / "90_toy.ipynb").write_text(source.replace("x * x", "x * 999"))
    assert execute_run(request)["status"] == "done"
    table = pd.read_parquet(request.folder / "table.parquet")
    assert table.set_index("metric").value["square"] == 1
    assert request_of(toy()).run_id != request.run_id


def test_a_notebook_edited_while_its_sweep_runs_mixes_nothing(toy, tmp_path):
    "The first run edits the notebook: all runs are those that were planned, and none counts for the new code."
    path = str(tmp_path / "90_toy.ipynb")
    add_cell(tmp_path, f"p = {path!r}\ntext = open(p).read()\nopen(p, 'w').write(text.replace('x * x', 'x * 999'))")
    sweep = toy(grid={"x": [1, 2, 3]})
    assert run_sweep(sweep, executor="serial", progress="none").ok
    results = load_results(tmp_path / "out").query("metric == 'square'")
    assert list(results.sort_values("x").value) == [1, 4, 9]
    assert list(sweep_status(sweep).status) == ["pending"] * 3


def test_a_module_that_is_edited_meanwhile_leaves_no_record(toy, tmp_path):
    (tmp_path / "helper.py").write_text("y = 1\n")
    add_cell(tmp_path, "import helper; open(helper.__file__, 'a').write('z = 2\\n')")
    request = request_of(toy())
    record = execute_run(request)
    assert record["status"] == "changed" and "run the sweep again" in record["error"]
    assert not (request.folder / "run.json").exists()
    assert execute_run(request)["status"] == "changed"  # before it starts, too


def test_a_helper_beside_the_notebook_comes_first(toy, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "helper.py").write_text("y = 'wrong'\n")
    (tmp_path / "helper.py").write_text("y = 'right'\n")
    add_cell(tmp_path, "import helper; assert helper.y == 'right'")
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(elsewhere), os.environ.get("PYTHONPATH", "")]))
    assert execute_run(request_of(toy()))["status"] == "done"


def test_another_kernelspec_does_not_matter(toy, tmp_path):
    notebook = nbformat.read(tmp_path / "90_toy.ipynb", 4)
    notebook.metadata["kernelspec"] = {"name": "some-env", "display_name": "some env", "language": "python"}
    nbformat.write(notebook, tmp_path / "90_toy.ipynb")
    add_cell(tmp_path, f"import sys; assert sys.executable == {sys.executable!r}")
    assert execute_run(request_of(toy()))["status"] == "done"


# Results


def test_two_sweeps_in_one_folder_keep_apart(toy):
    one = run_sweep(toy(name="one", grid={"x": [1]}), executor="serial", progress="none")
    two = run_sweep(toy(name="two", grid={"x": [2]}), executor="serial", progress="none")
    assert set(one.results().x) == {1} and set(two.results().x) == {2}


@pytest.fixture(scope="module")
def two_done(tmp_path_factory):
    "A folder with the toy and its sweep of two runs, done; to be copied."
    folder = tmp_path_factory.mktemp("done")
    sweep = {"notebook": str(write_toy(folder)), "out": str(folder / "out"), "grid": {"x": [1, 2]}}
    assert run_sweep(sweep, executor="serial", progress="none").ok
    return folder


@pytest.mark.parametrize("damage", ["cut", "empty", "other"])
def test_a_damaged_table_is_named_and_run_again(damage, two_done, toy, tmp_path, capfd):
    shutil.copytree(two_done, tmp_path, dirs_exist_ok=True)
    sweep = toy(grid={"x": [1, 2]})
    before = sweep_status(sweep)
    assert list(before.status) == ["done", "done"]
    table = tmp_path / "out" / before.run_id[0] / "table.parquet"
    table.write_bytes({"cut": table.read_bytes()[:-20], "empty": b"", "other": b"no table"}[damage])
    status = sweep_status(sweep)
    assert list(status.status) == ["damaged", "done"] and str(table) in status.error[0]
    assert set(load_results(tmp_path / "out").x) >= {2}
    again = run_sweep(sweep, executor="serial", progress="lines")
    assert again.ok and again.reused == 1 and "damaged: x=1: set aside" in capfd.readouterr().err
    assert len(clean_sweep(sweep)) == 1  # what was set aside


def test_types_that_differ_between_runs_are_reconciled(toy, tmp_path):
    add_column(tmp_path, "[2**53 + 1, 1] if x == 1 else [0.5, 1.5] if x == 2 else [1, 2]")
    assert run_sweep(toy(grid={"x": [1, 2, 3]}), executor="serial", progress="none").ok
    results = load_results(tmp_path / "out")
    assert results.extra.dtype == np.float64 and results.extra[0] == 2.0**53
    write_toy(tmp_path)
    add_column(tmp_path, '["a", "b"] if x == 1 else [[1], [2]]')
    assert run_sweep(toy(grid={"x": [1, 2]}, out=str(tmp_path / "b")), executor="serial", progress="none").ok
    assert list(load_results(tmp_path / "b").extra) == ["a", "b", "[1]", "[2]"]


def test_a_record_of_another_kind_is_none(toy):
    request = request_of(toy())
    request.folder.mkdir(parents=True)
    for text in ("[]", "3", "null", '{"a', '{"status": 3}'):
        (request.folder / "run.json").write_text(text)
        assert list(sweep_status(toy()).status) == ["pending"]
    assert execute_run(request)["status"] == "done"


def test_a_huge_error_is_cut(toy, tmp_path):
    add_cell(tmp_path, 'raise ValueError("y" * 5_000_000)')
    request = request_of(toy())
    record = execute_run(request)
    assert record["status"] == "failed" and record["error"].startswith("ValueError: yyy")
    assert len(json.dumps(record)) < 20_000 and (request.folder / "run.json").stat().st_size < 20_000


# Limits and ends


def test_the_time_limit_stops_an_import(toy, tmp_path):
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(600)\n")
    add_cell(tmp_path, "import slow")
    record = execute_run(request_of(toy(resources={"timeout_s": 5})))
    assert record["status"] == "timeout"


def test_a_detached_child_does_not_outlive_its_run(toy, tmp_path):
    add_cell(
        tmp_path,
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)\n"
        f"open({str(tmp_path / 'child')!r}, 'w').write(str(child.pid))",
    )
    assert execute_run(request_of(toy()))["status"] == "done"
    child = int((tmp_path / "child").read_text())
    wait_for(lambda: not psutil.pid_exists(child), timeout=20)  # the system has buried it, too


def test_a_killed_kernel_is_told_from_a_failure(toy):
    with pytest.raises(RunKilled):
        execute_run(request_of(toy(parameters={"mode": "shot"})))


BAD = {
    "endless": ({"resources": {"timeout_s": float("inf")}}, "must be a finite number"),
    "no memory": ({"resources": {"memory_gb": float("nan")}}, "must be a finite number"),
    "no number published": ({"published": [{"metric": "square"}]}, "must have a metric and a number"),
    "nan published": ({"published": [{"metric": "square", "value": float("nan")}]}, "JSON cannot carry nan"),
    "infinite published": ({"published": [{"metric": "square", "value": 1, "low": -float("inf")}]}, "carry -inf"),
    "parent": ({"name": ".."}, "name='..' must be fit for a folder"),
    "hidden": ({"name": ".git"}, "must be fit for a folder"),
    "models": ({"models": [3]}, "models must name parameters"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused_before_anything_runs(case, toy, tmp_path):
    keys, message = BAD[case]
    with pytest.raises(ValueError) as caught:
        run_sweep(toy(**keys))
    assert message in str(caught.value) and not (tmp_path / "out").exists()


def test_a_misspelt_value_is_refused_with_the_nearest(tmp_path):
    write_toy(tmp_path, 'x: int = 1\nwait = 0.0\nmode: Literal["ok", "raise"] = "ok"\nlog = ""\nout_dir = ""\n')
    with pytest.raises(ValueError, match="did you mean 'raise'"):
        run_sweep({"notebook": str(tmp_path / "90_toy.ipynb"), "parameters": {"mode": "rase"}})


@pytest.mark.parametrize("address", ["nonsense", "tcp://", "tcp://host", "tcp://host:port", "here:1:2", "http://h:1"])
def test_a_malformed_address_is_refused_at_once(address, toy, tmp_path, capsys):
    (tmp_path / "toy.yaml").write_text("notebook: 90_toy\n")
    assert main([str(tmp_path / "toy.yaml"), "--scheduler", address, "--out", str(tmp_path / "out")]) == 2
    assert "allowed is tcp://HOST:PORT" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_no_worker_left_ends_the_sweep(toy, tmp_path, monkeypatch):
    from distributed import LocalCluster

    monkeypatch.setattr(schedule, "PATIENCE_S", 1.0)
    with LocalCluster(n_workers=0, processes=False, dashboard_address=None) as cluster:
        with pytest.raises(RuntimeError, match="no worker is left at .*; finished runs are kept"):
            run_sweep(toy(), scheduler=cluster, progress="none")


def test_the_advised_command_works_after_a_full_disk(toy, tmp_path, monkeypatch):
    "The record could not be written, so that the run is not known as failed: --retry-failed does it all the same."
    import spectral_nb.sweeps.run as run

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(run, "write_json", full)
        outcome = run_sweep(toy(), executor="serial", progress="none")
    assert not outcome.ok and "No space left" in outcome.summary() and "--retry-failed" in outcome.summary()
    assert run_sweep(toy(), retry_failed=True, executor="serial", progress="none").ok


def test_two_signals_in_a_row_stop_a_sweep(toy, tmp_path):
    (tmp_path / "toy.yaml").write_text(
        f"notebook: 90_toy\ngrid: {{x: [1, 2]}}\nparameters: {{wait: 600.0, log: {tmp_path / 'log'}}}\n"
    )
    sweep = start_sweep(tmp_path / "toy.yaml", "--workers", 2, "--out", tmp_path / "out")
    wait_for(lambda: len(noted(tmp_path / "log")) == 2)
    sweep.send_signal(signal.SIGTERM)
    time.sleep(0.01)
    sweep.send_signal(signal.SIGTERM)
    code, said = finish(sweep, timeout=120)
    assert code == 130 and "interrupted" in said and "Traceback" not in said, said
    wait_for(lambda: not any(psutil.pid_exists(pid) for _, _, pid, _ in noted(tmp_path / "log")), timeout=20)


def test_a_second_signal_leaves_the_end_alone(monkeypatch):
    "It comes while the first one's exception cleans up."
    ended = []

    def stopped_twice(*_, **__):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            ended.append("cleaned up")

    monkeypatch.setattr(command, "run_sweeps", stopped_twice)
    assert main(["toy.yaml"]) == 130 and ended == ["cleaned up"]


def test_a_signal_whose_exception_was_lost_ends_the_sweep(toy, monkeypatch):
    "It rose inside a callback, which swallowed it: what the signal noted is looked at, too."
    from distributed import LocalCluster

    monkeypatch.setattr(schedule, "PATIENCE_S", 1.0)
    schedule.STOP.set()
    try:
        with LocalCluster(n_workers=0, processes=False, dashboard_address=None) as cluster:
            with pytest.raises(KeyboardInterrupt):
                run_sweep(toy(), scheduler=cluster, progress="none")
    finally:
        schedule.STOP.clear()


# The command


def test_the_package_is_a_command():
    done = subprocess.run([sys.executable, "-m", "spectral_nb.sweeps", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "spectral-sweep" in done.stdout
    with pytest.raises(SystemExit) as refused:
        main([])
    assert refused.value.code == 2


@pytest.mark.parametrize("option", ["--local-cluster", "--workers"])
def test_no_worker_at_all_is_refused(option, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path / "toy.yaml"), option, "0"])
    assert "no whole number above 0" in capsys.readouterr().err


def test_a_script_without_a_guard_works(toy, tmp_path):
    "Worker processes do not run the caller's script again."
    (tmp_path / "script.py").write_text(
        f"from spectral_nb.sweeps import run_sweep\nprint('once')\nassert run_sweep({toy()!r}, progress='none').ok\n"
    )
    done = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout == "once\n", done.stderr


def test_braces_in_a_folder_are_kept(toy, tmp_path):
    request = request_of(toy(out=str(tmp_path / "{x}")))
    assert execute_run(request)["status"] == "done"
    assert finished_runs(tmp_path / "{x}")
