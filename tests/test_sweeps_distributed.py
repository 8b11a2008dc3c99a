"The same sweep on a `distributed` cluster: a scheduler and two workers as processes of their own, on loopback."

import json
import signal
import subprocess
import sys

import psutil
import pytest
from sweep_toy import finish, finished_runs, noted, start_sweep, wait_for, write_toy

import spectral_nb.sweeps.schedule as schedule
from spectral_nb.sweeps import load_results
from spectral_nb.sweeps import command
from spectral_nb.sweeps.command import main


@pytest.fixture
def cluster(tmp_path):
    "(address of the scheduler, the two worker processes)"
    file, quiet = tmp_path / "scheduler.json", dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    dask = [sys.executable, "-m", "dask"]
    common = ["--no-dashboard"]
    processes = [
        subprocess.Popen(
            [*dask, "scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(file), *common], **quiet
        )
    ]
    try:
        wait_for(lambda: file.is_file() and file.read_text().strip().endswith("}"))
        worker = [
            *dask,
            "worker",
            "--scheduler-file",
            str(file),
            "--nthreads",
            "1",
            "--no-nanny",
            "--host",
            "127.0.0.1",
            "--local-directory",
            str(tmp_path / "space"),
            "--death-timeout",
            "60",
            *common,
        ]
        processes += [subprocess.Popen(worker, **quiet) for _ in range(2)]
        yield json.loads(file.read_text())["address"], processes[1:]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def toy_file(folder, n: int, wait: float):
    write_toy(folder)
    (folder / "toy.yaml").write_text(
        f"notebook: 90_toy\ngrid: {{x: {list(range(n))}}}\nparameters: {{wait: {wait}, log: {folder / 'log'}}}\n"
    )
    return folder / "toy.yaml", folder / "out", folder / "log"


def test_a_killed_worker_loses_nothing(cluster, tmp_path):
    address, workers = cluster
    file, out, log = toy_file(tmp_path, 5, 0.7)
    sweep = start_sweep(file, "--scheduler", address, "--out", out)
    wait_for(lambda: {word for word, *_ in noted(log)} == {"start", "end"} and len(noted(log)) % 2)
    kernels = {pid for word, _, pid, _ in noted(log) if word == "start" and psutil.pid_exists(pid)}
    before = finished_runs(out)
    workers[0].send_signal(signal.SIGKILL)
    code, said = finish(sweep)
    assert code == 0 and "5 runs: 5 done" in said, said
    for name, record in before.items():
        assert (out / name / "run.json").read_bytes() == record
    assert sorted(load_results(out).query("metric == 'square'").value) == [x * x for x in range(5)]
    wait_for(lambda: not any(psutil.pid_exists(p) for p in kernels), timeout=10)
    assert workers[1].poll() is None  # the other worker, and the cluster, live on


def test_local_cluster_means_workers(tmp_path, monkeypatch):
    "`--local-cluster N` is `--workers N`, which other tests run for real."
    seen = []
    monkeypatch.setattr(command, "run_sweeps", lambda files, workers, **more: seen.append((files, workers, more)) or [])
    for option in ("--local-cluster", "--workers"):
        assert main(["toy.yaml", option, "3", "--quiet"]) == 0
    assert seen[0] == seen[1] and seen[0][:2] == (["toy.yaml"], 3)


def test_cluster_that_is_not_there(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(schedule, "ANSWER_S", 1)
    file, out, log = toy_file(tmp_path, 1, 0.0)
    assert main([str(file), "--scheduler", "tcp://127.0.0.1:9", "--out", str(out)]) == 2
    assert "cannot be reached" in capsys.readouterr().err and not noted(log)
