"The house rules: layering, notebook tags, sizes, the lazy top level, and that a papermill override really changes a result."

import ast
import json
import os
import re
import subprocess
import sys

import nbformat
import pytest

from spectral_nb.base.paths import repo_root

ROOT = repo_root()
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
SECTIONS = [p for p in NOTEBOOKS if re.match(r"1[0-4]_", p.name)]


def module_of(notebook) -> str | None:
    for cell in nbformat.read(notebook, 4).cells:
        if m := re.search(r"^#\|\s*default_exp\s+(\S+)", cell.source, re.M):
            return m[1]
    return None


ORDER = {module_of(p): i for i, p in enumerate(NOTEBOOKS) if module_of(p)}
SECTION_MODULES = {module_of(p) for p in SECTIONS}


def imported_modules(path) -> set[str]:
    "Modules of this package that a file imports, also inside functions; the lazy top level has none."
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            found |= {node.module.split(".")[0]} if node.module else {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("spectral_nb."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("spectral_nb.")}
    return found


@pytest.mark.parametrize("module", sorted(ORDER))
def test_a_module_imports_only_lower_ones(module):
    for other in imported_modules(ROOT / "spectral_nb" / f"{module}.py"):
        assert other in ORDER, f"{module} imports {other}, which no notebook exports"
        assert ORDER[other] < ORDER[module], f"{module} imports {other}, whose notebook comes later"
        assert not (module in SECTION_MODULES and other in SECTION_MODULES), f"section {module} imports section {other}"


def test_layering_sees_an_upward_import(tmp_path):
    "The rule above can fail: relative, absolute and nested imports are all seen."
    file = tmp_path / "x.py"
    file.write_text(
        "from .svt import trace\nimport spectral_nb.sweeps.command\ndef f():\n    from spectral_nb.causal.ablation import wilson\n"
    )
    assert imported_modules(file) == {"svt", "sweeps", "causal"}


def test_every_module_comes_from_a_notebook():
    written = {p.stem for p in (ROOT / "spectral_nb").glob("*.py")} - {"_modidx"}
    assert written == set(ORDER)


@pytest.mark.parametrize("module", sorted(ORDER))
def test_modules_and_functions_stay_short(module):
    text = (ROOT / "spectral_nb" / f"{module}.py").read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < 40, f"{node.name} has more than 40 lines"


@pytest.mark.parametrize("notebook", SECTIONS, ids=lambda p: p.stem)
def test_section_has_one_parameters_cell_of_literals(notebook):
    cells = [c for c in nbformat.read(notebook, 4).cells if "parameters" in c.metadata.get("tags", [])]
    assert len(cells) == 1
    assert "#|" not in cells[0].source
    for node in ast.parse(cells[0].source).body:
        assert isinstance(node, (ast.Assign, ast.AnnAssign)), ast.unparse(node)
        ast.literal_eval(node.value)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_committed_outputs_hold_no_error_and_stay_light(notebook):
    nb = nbformat.read(notebook, 4)
    assert not [o for c in nb.cells for o in c.get("outputs", []) if o.output_type == "error"]
    assert notebook.stat().st_size < 1.5e6
    if notebook in SECTIONS:
        assert any(o.get("data", {}).get("image/png") for c in nb.cells for o in c.get("outputs", [])), (
            "committed without figures"
        )
    assert not re.search(r"/(?:root|home|work)/", json.dumps(nb)), "an absolute path of one machine"


def test_the_tag_survives_cleaning(tmp_path):
    source = SECTIONS[0]
    copy = tmp_path / "nbs" / source.name
    copy.parent.mkdir()
    copy.write_bytes(source.read_bytes())
    (tmp_path / "settings.ini").write_bytes((ROOT / "settings.ini").read_bytes())
    subprocess.run(
        [sys.executable, "-c", f"from nbdev.clean import nbdev_clean; nbdev_clean({str(copy)!r})"],
        check=True,
        cwd=tmp_path,
    )
    assert [c for c in nbformat.read(copy, 4).cells if c.metadata.get("tags") == ["parameters"]]


def test_a_papermill_override_changes_the_result(tmp_path):
    "The injected cell comes after the defaults, so the value given on the command line is the one that is used."
    import papermill

    nb = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    )
    source = next(c for c in nbformat.read(SECTIONS[0], 4).cells if "parameters" in c.metadata.get("tags", []))
    nb.cells = [source, nbformat.v4.new_code_cell("print(seed)")]
    nbformat.write(nb, tmp_path / "in.ipynb")
    for value in (3, 4):
        out = papermill.execute_notebook(
            str(tmp_path / "in.ipynb"), str(tmp_path / "out.ipynb"), parameters={"seed": value}, progress_bar=False
        )
        assert out.cells[-1].outputs[0].text.strip() == str(value)


def test_top_level_is_lazy_and_complete():
    code = (
        "import sys, spectral_nb; assert not {'torch', 'transformer_lens', 'pandas'} & set(sys.modules); print('lazy')"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "lazy"
    import spectral_nb

    for name in spectral_nb._HOME:
        value = getattr(spectral_nb, name)
        assert (value.__doc__ or "").strip(), f"{name} has no docstring"
    with pytest.raises(AttributeError, match="no attribute 'load_modle'"):
        getattr(spectral_nb, "load_modle" + "")


def test_data_is_small_and_tracked_files_name_no_machine():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not files:
        pytest.skip("not a git checkout")
    assert sum((ROOT / f).stat().st_size for f in files if f.startswith("data/") and (ROOT / f).exists()) < 45e6
    assert not [f for f in files if f.endswith((".pkl", ".pickle", ".pt"))]


@pytest.mark.parametrize("notebook", [*SECTIONS, ROOT / "nbs" / "index.ipynb"], ids=lambda p: p.stem)
def test_committed_outputs_were_made_by_this_code(notebook):
    from spectral_nb.dev.render import code_stamp, committed_stamp

    assert committed_stamp(notebook) == code_stamp(notebook), (
        f"run `make render` (or python -m spectral_nb.dev.render {notebook.stem}) and commit the result"
    )


def test_readme_is_made_from_the_index(tmp_path):
    from spectral_nb.dev.render import write_readme

    made = write_readme(readme=tmp_path / "README.md").read_text()
    assert made == (ROOT / "README.md").read_text(), "README.md is not what nbs/index.ipynb gives: run `make render`"


def jupyter(code: str, folder, **env) -> subprocess.CompletedProcess:
    "`code` as a cell of JupyterLab runs it, in `folder`."
    environment = (
        {k: v for k, v in os.environ.items() if k not in ("IN_TEST", "SPECTRAL_NB_PROGRESS")}
        | {"JPY_SESSION_NAME": "a.ipynb"}
        | env
    )
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )


def test_the_last_cell_exports_in_jupyterlab_and_only_in_the_repository(tmp_path):
    code = "from spectral_nb.base.progress import nbdev_export; nbdev_export()"
    assert jupyter(code, tmp_path).returncode == 0 and not list(tmp_path.iterdir())  # a notebook copied elsewhere
    settings = re.sub("(lib_path|lib_name) = spectral_nb", r"\1 = toy", (repo_root() / "settings.ini").read_text())
    (tmp_path / "settings.ini").write_text(settings)
    (tmp_path / "nbs").mkdir()
    cells = [nbformat.v4.new_code_cell(s) for s in ("#| default_exp made", "#| export\ndef answer(): return 42")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "nbs" / "00_made.ipynb")
    done = jupyter(code, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "return 42" in (tmp_path / "toy" / "made.py").read_text()


def test_progress_bars_in_jupyterlab():
    slow = "import time; from spectral_nb.base.progress import progress\nfor _ in progress(range(4), desc='slow'): time.sleep(0.3)"
    seen = jupyter(slow, repo_root())
    assert (
        "slow: 100%" in seen.stdout and "4/4" in seen.stdout and not seen.stderr
    )  # on stderr JupyterLab would paint it red
    assert jupyter(slow.replace("0.3", "0.01"), repo_root()).stdout == ""
    assert jupyter(slow, repo_root(), SPECTRAL_NB_PROGRESS="0").stdout == ""
