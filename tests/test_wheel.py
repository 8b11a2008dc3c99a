"The wheel: built, installed into an empty folder, it holds every module and file and works from another folder."

import os
import shutil
import subprocess
import sys

import pandas as pd
import pytest

from spectral_nb.base.paths import data_dir, repo_root
from spectral_nb.dev.house import modules

ROOT = repo_root()
NEEDED = ("settings.ini", "setup.py", "MANIFEST.in", "README.md", "LICENSE")


def run(arguments, folder, **environment) -> subprocess.CompletedProcess:
    "A process in `folder` that does not see this checkout."
    cleared = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith("SPECTRAL_NB")}
    return subprocess.run(arguments, cwd=folder, env=cleared | environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    "Folder with the wheel's contents and its console scripts, nothing else."
    source, wheels, target = (tmp_path_factory.mktemp(n) for n in ("source", "wheels", "installed"))
    for name in NEEDED:
        shutil.copy(ROOT / name, source / name)
    shutil.copytree(ROOT / "spectral_nb", source / "spectral_nb", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    built = run([*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(wheels), "."], source)
    assert built.returncode == 0, built.stderr[-3000:]
    (wheel,) = wheels.glob("*.whl")
    put = run([*pip, "install", "-q", "--no-deps", "--target", str(target), str(wheel)], wheels)
    assert put.returncode == 0, put.stderr[-3000:]
    return target


def test_the_wheel_holds_every_module_and_asset(installed):
    packed = {p.relative_to(installed).as_posix() for p in (installed / "spectral_nb").rglob("*") if p.is_file()}
    kept = {p.relative_to(ROOT).as_posix() for p in (ROOT / "spectral_nb").rglob("*") if p.is_file()}
    kept = {name for name in kept if "__pycache__" not in name}
    assert kept - packed == set()
    assert {f"spectral_nb/{name.replace('.', '/')}.py" for name in modules()} <= packed


def test_every_module_of_the_wheel_can_be_imported(installed, tmp_path):
    names = [f"spectral_nb.{m}".removesuffix(".__init__") for m in modules() if not m.endswith("__main__")]
    code = (
        "import importlib, sys\n"
        f"found = [importlib.import_module(name) for name in {names!r}]\n"
        f"outside = [m.__name__ for m in found if not m.__file__.startswith({str(installed)!r})]\n"
        "assert not outside, outside\n"
        "import spectral_nb\n"
        "for name in spectral_nb.__all__: getattr(spectral_nb, name)\n"
        "print(len(found))"
    )
    done = run([sys.executable, "-W", "ignore", "-c", code], tmp_path, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) == len(names)


def test_spectral_norms_of_the_wheel_works_from_another_folder(installed, tmp_path):
    command = [str(installed / "bin" / "spectral-norms"), "--model", "story-gpt2-s42", "--tasks", "ioi", "sva"]
    environment = dict(PYTHONPATH=str(installed), SPECTRAL_NB_DATA=str(data_dir()), PYTHONWARNINGS="ignore")
    done = run([*command, "--out", str(tmp_path / "out.parquet")], tmp_path, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "ioi" in done.stdout and "sva" in done.stdout
    written = [p.name for p in tmp_path.rglob("*") if p.is_file()]
    assert written == ["out.parquet"], "only what was asked for is written"
    assert {"ioi", "sva"} <= set(pd.read_parquet(tmp_path / "out.parquet").task.dropna())
