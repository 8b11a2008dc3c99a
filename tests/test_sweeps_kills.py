"Sweeps that are killed, that meet each other, or that lose their folder."

import os
import random
import signal
import time

import dask
import distributed  # noqa: F401  its defaults, before one of them is set
import psutil
from sweep_toy import finish, finished_runs, noted, start_sweep, wait_for, write_toy

from spectral_nb.sweeps import load_results, run_sweep
from spectral_nb.sweeps.schedule import open_client


def sweep_file(folder, n: int, wait: float, **keys):
    "A sweep of `n` toy runs; returns its file, its folder and the runs' log."
    write_toy(folder)
    log, file = folder / "log", folder / "toy.yaml"
    lines = ["notebook: 90_toy", f"grid: {{x: {list(range(n))}}}", f"parameters: {{wait: {wait}, log: {log}}}"]
    file.write_text("\n".join([*lines, *(f"{k}: {v}" for k, v in keys.items())]) + "\n")
    return file, folder / "out", log


def never_at_once(log) -> bool:
    "Was no run executed twice at a time? A killed execution is taken to live until its successor starts."
    started: dict[int, int] = {}
    for word, x, pid, _ in noted(log):
        if word == "start":
            if x in started and psutil.pid_exists(started[x]):
                return False
            started[x] = pid
        elif started.get(x) != pid:
            return False  # somebody else has started it in the meantime
    return True


def test_ten_kills_lose_nothing_and_repeat_nothing(tmp_path):
    "kill -9 of the whole process group at a random moment, ten times; what was finished stays exactly as it was."
    file, out, log = sweep_file(tmp_path, 16, 0.3)
    draw, done = random.Random(8), {}
    for _ in range(10):
        before = len(noted(log))
        sweep = start_sweep(file, "--workers", 2, "--out", out)
        if draw.random() < 0.8:
            wait_for(lambda: sweep.poll() is not None or len(noted(log)) > before)  # else: while it starts
        time.sleep(draw.uniform(0.0, 1.0))
        assert sweep.poll() is None, "nothing is left to kill"
        os.killpg(sweep.pid, signal.SIGKILL)
        sweep.communicate()
        after = finished_runs(out)
        assert done.items() <= after.items(), "a finished run was lost or done again"
        done = after
    code, said = finish(start_sweep(file, "--workers", 2, "--out", out))
    assert code == 0, said
    after = finished_runs(out)
    assert done.items() <= after.items() and len(after) == 16
    assert never_at_once(log)
    ends = [x for word, x, *_ in noted(log) if word == "end"]
    assert sorted(set(ends)) == list(range(16))
    assert sorted(load_results(out).query("metric == 'square'").x) == list(range(16))
    assert not [p for p in out.rglob(".*.parquet")], "a half-written file is left"


def test_killed_process_of_a_run_is_replaced(tmp_path):
    "A run's own process dies: the run is done again at once, the kernel that is left over does not get in its way."
    file, out, log = sweep_file(tmp_path, 2, 1.5)
    sweep = start_sweep(file, "--workers", 1, "--out", out)
    wait_for(lambda: noted(log))
    psutil.Process(noted(log)[0][2]).parent().kill()
    code, said = finish(sweep)
    assert code == 0 and "again: x=0" in said, said
    assert never_at_once(log) and len(finished_runs(out)) == 2


def test_silent_worker_of_this_machine_is_not_replaced():
    "A worker that gets no processor time for long keeps its run: it is starved, not dead."
    with dask.config.set({"distributed.scheduler.worker-ttl": "1s"}), open_client(1) as client:
        (pid,) = client.run(os.getpid).values()
        os.kill(pid, signal.SIGSTOP)
        time.sleep(8)  # Dask gives a worker ten of its heartbeats, five seconds
        os.kill(pid, signal.SIGCONT)
        assert client.submit(os.getpid).result(timeout=30) == pid


def test_interrupted_sweep_stops_its_runs(tmp_path):
    file, out, log = sweep_file(tmp_path, 4, 60.0)
    sweep = start_sweep(file, "--workers", 2, "--out", out)
    wait_for(lambda: len(noted(log)) == 2)
    sweep.send_signal(signal.SIGTERM)
    code, said = finish(sweep, timeout=60)
    assert code == 130 and "interrupted" in said
    wait_for(lambda: not any(psutil.pid_exists(pid) for _, _, pid, _ in noted(log)), timeout=10)


def test_two_sweeps_at_once_share_the_work(tmp_path):
    file, out, log = sweep_file(tmp_path, 4, 0.7)
    both = [start_sweep(file, "--workers", 1, "--out", out) for _ in range(2)]
    for code, said in [finish(s) for s in both]:
        assert code == 0 and "4 runs: 4 done" in said, said
    assert sorted(x for word, x, *_ in noted(log) if word == "end") == list(range(4))  # each once
    assert never_at_once(log) and len(load_results(out)) == 8


def test_folder_that_becomes_unwritable(tmp_path):
    "In the middle of the sweep a file takes the folder's place: the rest fails, is reported, and nothing raises."
    file, out, log = sweep_file(tmp_path, 4, 0.5)
    sweep = start_sweep(file, "--workers", 1, "--out", out)
    wait_for(lambda: len(finished_runs(out)) == 1)
    out.rename(tmp_path / "gone")
    out.touch()
    code, said = finish(sweep)
    assert code == 1 and "Traceback" not in said, said
    assert "cannot be used" in said and "the tables cannot be written" in said
    out.unlink()
    (tmp_path / "gone").rename(out)
    outcome = run_sweep(file, out=out, executor="serial", progress="none")
    assert outcome.ok or "--retry-failed" in outcome.summary()
    assert len(finished_runs(out)) + len(outcome.failed) == 4
