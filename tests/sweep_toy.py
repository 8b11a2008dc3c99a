"A notebook that imports next to nothing, writes down when it starts and ends, and can misbehave on request."

import os
import subprocess
import sys
import time
from pathlib import Path

import nbformat

from spectral_nb.sweeps.records import read_record

PARAMETERS = 'x: int = 1\nwait = 0.0\nmode = "ok"\nlog = ""\nout_dir = ""\n'
START = """
import os, signal, sys, time
def note(word):
    with open(log + ".txt", "a") as stream: stream.write(f"{word} {x} {os.getpid()} {time.time()}\\n")
if log: note("start")
"""
BEHAVE = """
time.sleep(wait)
if mode == "raise": raise RuntimeError(f"x={x} is not liked")
if mode == "raise unless mended" and not os.path.exists(log + ".mended"): raise RuntimeError("not mended")
if mode == "forever":
    while True: time.sleep(0.05)
if mode == "memory":
    kept = []
    while True:
        kept.append(bytearray(b"1") * 20_000_000)
        time.sleep(0.02)
if mode == "shot once" and not os.path.exists(log + ".shot"):
    open(log + ".shot", "w").close()
    os.kill(os.getpid(), signal.SIGKILL)
if mode == "shot": os.kill(os.getpid(), signal.SIGKILL)
"""
TABLE = """
if mode != "no table":
    facts = {"square": x * x, "threads": int(os.environ.get("OMP_NUM_THREADS", 0))}
    import pyarrow, pyarrow.parquet
    table = pyarrow.table({"metric": list(facts), "value": list(facts.values())})
    pyarrow.parquet.write_table(table, os.path.join(out_dir, "table.parquet"))
if log: note("end")
"""


def write_toy(folder: Path, parameters: str = PARAMETERS) -> Path:
    "The notebook `90_toy.ipynb` in `folder`."
    named = nbformat.v4.new_code_cell("#| default_exp toy")
    tagged = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "python3"}}
    path = folder / "90_toy.ipynb"
    nbformat.write(
        nbformat.v4.new_notebook(
            cells=[named, tagged, *map(nbformat.v4.new_code_cell, (START, BEHAVE, TABLE))], metadata=kernel
        ),
        path,
    )
    return path


def noted(log: Path) -> list[tuple[str, int, int, float]]:
    "(start or end, x, process id, time) of every line that the runs wrote; `log` itself is no file, so no input."
    file = log.with_name(log.name + ".txt")
    lines = [line.split() for line in file.read_text().splitlines()] if file.exists() else []
    return [(word, int(x), int(pid), float(when)) for word, x, pid, when in lines]


def start_sweep(*arguments, **options) -> subprocess.Popen:
    "`spectral-sweep` with these arguments, as the leader of a process group of its own."
    return subprocess.Popen(
        [sys.executable, "-m", "spectral_nb.sweeps", *map(str, arguments)],
        start_new_session=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **options,
    )


def finish(process: subprocess.Popen, timeout: float = 240) -> tuple[int, str]:
    "Exit code and everything the process said."
    try:
        said, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        raise
    return process.returncode, said


def wait_for(condition, timeout: float = 120) -> None:
    "Wait until `condition()` holds."
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("waited in vain")
        time.sleep(0.05)


def finished_runs(out: Path) -> dict[str, bytes]:
    "The records of the finished runs by run id, as they are on the disk."
    names = [p.parent.name for p in out.glob("*/run.json")]
    done = [n for n in names if (r := read_record(out, n)) and r["status"] == "done"]
    return {n: (out / n / "run.json").read_bytes() for n in done}
