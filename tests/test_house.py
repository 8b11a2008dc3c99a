"The house rules: layers, homes of names, sizes, notebook tags, a lazy top level, overrides that change a result."

import ast
import base64
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys

import nbformat
import pytest

from spectral_nb.base.paths import repo_root
from spectral_nb.base.plots import WIDTH
from spectral_nb.base import sources as walk
from spectral_nb.dev import house

ROOT = repo_root()
NOTEBOOKS = house.notebooks()
SECTIONS = [p for name, p in NOTEBOOKS.items() if re.match(r"1\d_", name)]
MODULES = walk.modules()
INITS = {m for m in MODULES if m.split(".")[-1] == "__init__"}
REPEATED = {"measure", "run"}  # every section has its own


def package_of(module: str) -> str:
    return module.split(".")[0]


def import_faults(module: str, source: str, known=MODULES) -> list[str]:
    "What a module imports against the layers; a package's `__init__` may name its own modules, the top level all."
    faults, mine = [], package_of(module)
    for other in sorted(walk.imported_modules(source, module, known)):
        theirs = package_of(other)
        if theirs == mine or theirs == "__init__" or module == "__init__":
            continue
        if theirs in house.ALIASES:
            faults.append(f"{module} imports the alias {other}: take the name from its home")
        elif module not in house.ALIASES and house.layer_of(theirs) >= house.layer_of(mine):
            faults.append(f"{module} imports {other}, which stands in no lower layer")
    return faults


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_lower_layers(module):
    assert import_faults(module, MODULES[module].read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "from ..svt import measure",  # relative
        "import spectral_nb.sweeps.command",  # absolute
        "def f():\n    from spectral_nb.tracing.graphs import trace_graph",  # nested
        "from ..causal import ablate_heads",  # lazy, through the package
        "from .. import load_results",  # lazy, through the top level
        "from spectral_nb.spectra import factored_svd",  # through an old name
    ],
)
def test_the_rule_of_layers_can_fail(source):
    assert import_faults("prompts.tasks", source)
    assert not import_faults("prompts.tasks", "from ..base.paths import data_dir\nfrom .batches import PromptBatch")


def test_a_section_imports_no_other_section():
    assert import_faults("svt", "from .norm_growth import measure")
    assert house.layer_of("svt") == house.layer_of("norm_growth")


def cycle(graph: dict[str, set[str]]) -> list[str]:
    "A path of imports that returns to its start, or nothing."
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node not in done:
            for other in sorted(graph.get(node, ())):
                if found := visit(other, [*path, node]):
                    return found
            done.add(node)
        return []

    return next((found for start in sorted(graph) if (found := visit(start, []))), [])


def test_no_cycle_of_imports():
    inside = {m: walk.imported_modules(MODULES[m].read_text(), m, MODULES) - INITS for m in set(MODULES) - INITS}
    assert cycle(inside) == []
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_every_module_comes_from_the_notebook_of_its_path():
    made = {name: m for name, p in NOTEBOOKS.items() if (m := house.exported_module(p))}
    assert {name: house.expected_module(name) for name in made} == made
    assert sorted(made.values()) == sorted(MODULES), "a module without notebook, or a notebook without module"
    for name, module in made.items():
        stated = re.search(r"File to edit: (\S+)\.$", MODULES[module].read_text(), re.M)[1]
        assert (MODULES[module].parent / stated).resolve() == NOTEBOOKS[name].resolve()


def functions(tree: ast.AST):
    return [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]


def size_faults(text: str) -> list[str]:
    "Modules over 300 lines, lines over 120 characters, functions over 40 lines or 8 arguments."
    lines = text.splitlines()
    faults = [f"{len(lines)} lines"] if len(lines) > 300 else []
    faults += [f"line {i} has {len(line)} characters" for i, line in enumerate(lines, 1) if len(line) > 120]
    for node in functions(ast.parse(text)):
        length, a = node.end_lineno - node.lineno + 1, node.args
        given = [x.arg for x in a.posonlyargs + a.args + a.kwonlyargs if x.arg not in ("self", "cls")]
        if length > 40:
            faults.append(f"{node.name} has {length} lines")
        if len(given) > 8:
            faults.append(f"{node.name} has {len(given)} arguments")
    return faults


@pytest.mark.parametrize("module", sorted(MODULES))
def test_modules_functions_and_lines_stay_short(module):
    assert size_faults(MODULES[module].read_text()) == []


def test_the_rule_of_sizes_can_fail():
    body = "\n".join(["    x = 1"] * 40)
    arguments = ", ".join(f"a{i}" for i in range(9))
    assert size_faults(f"def f():\n{body}\n") == ["f has 41 lines"]
    assert size_faults(f"def f({arguments}): pass\n") == ["f has 9 arguments"]
    assert size_faults("x = 1\n" * 301) == ["301 lines"]
    assert size_faults(f"x = '{'a' * 120}'\n") == ["line 1 has 126 characters"]


def package_exports(module: str) -> list[str]:
    return importlib.import_module(f"spectral_nb.{module}".removesuffix(".__init__")).__all__


@pytest.mark.parametrize("init", sorted(INITS - {"__init__"}))
def test_a_package_exports_what_its_modules_export(init):
    package = package_of(init)
    stated = [n for m in MODULES if package_of(m) == package and m != init for n in house.declared_all(MODULES[m])]
    assert sorted(package_exports(init)) == sorted(stated)


def test_a_public_name_has_one_home():
    several = {n: homes for n, homes in house.public_homes().items() if len(homes) > 1 and n not in REPEATED}
    assert several == {}


def test_at_most_200_public_names_each_with_a_docstring():
    homes = house.public_homes()
    assert sum(len(h) for n, h in homes.items() if n not in REPEATED) <= 200
    bare = []
    for name, modules in homes.items():
        for module in modules:
            value = getattr(importlib.import_module(f"spectral_nb.{module}".removesuffix(".__init__")), name)
            written = (getattr(value, "__doc__", None) or "").strip()
            if not written or written == (type(value).__doc__ or "").strip() or written.startswith(f"{name}("):
                bare.append(f"{module}.{name}")  # none, or the one that a constant or a dataclass gets from Python
    assert bare == []


TIMED = {"ratio", "seconds", "elapsed", "perf_counter", "monotonic", "wall", "duration", "times", "took"}


def names_in(node: ast.AST) -> set[str]:
    "Names, attributes, keys and called functions of an expression; `time.time` counts as a clock."
    found = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    found |= {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
    found |= {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return found | ({"perf_counter"} if "time.time()" in ast.unparse(node) else set())


def timed_assertions(source: str) -> list[str]:
    "Assertions that order a measured time; `# fake clock` or `# any clock` in their line says that none is measured."
    try:
        tree, lines = ast.parse(source), source.splitlines()
    except SyntaxError:  # a cell with a magic
        return []
    found = []
    for node in ast.walk(tree):
        compared = [n for n in ast.walk(node) if isinstance(n, ast.Compare)] if isinstance(node, ast.Assert) else []
        compared = [n for n in compared if any(isinstance(o, (ast.Lt, ast.Gt, ast.LtE, ast.GtE)) for o in n.ops)]
        sets = (ast.Set, ast.SetComp)  # `<=` between sets is no order of numbers
        compared = [n for n in compared if not any(isinstance(e, sets) for e in ast.walk(n))]
        close = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "test_close"
        if any(names_in(n) & TIMED for n in ([node] if close else compared)):
            text = "\n".join(lines[node.lineno - 1 : node.end_lineno])
            found += [] if "# fake clock" in text or "# any clock" in text else [ast.unparse(node)]
    return found


def test_no_timed_assertion():
    sources = {str(p.relative_to(ROOT)): [p.read_text()] for p in (ROOT / "tests").glob("*.py")}
    for name, path in NOTEBOOKS.items():
        sources[name] = [c.source for c in nbformat.read(path, 4).cells if c.cell_type == "code"]
    found = {name: t for name, texts in sources.items() if (t := [x for s in texts for x in timed_assertions(s)])}
    assert found == {}


def test_the_rule_of_timed_assertions_can_fail():
    assert timed_assertions('assert 3 < row["ratio"] < 9')
    assert timed_assertions("def f():\n    assert time.perf_counter() - start < 5")
    assert not timed_assertions('assert row["ratio"] > 0  # fake clock') and not timed_assertions("assert n_rows > 3")


@pytest.mark.parametrize("notebook", SECTIONS, ids=lambda p: p.stem)
def test_section_has_one_parameters_cell_of_literals(notebook):
    cells = [c for c in nbformat.read(notebook, 4).cells if "parameters" in c.metadata.get("tags", [])]
    assert len(cells) == 1
    assert "#|" not in cells[0].source
    for node in ast.parse(cells[0].source).body:
        assert isinstance(node, (ast.Assign, ast.AnnAssign)), ast.unparse(node)
        ast.literal_eval(node.value)


@pytest.mark.parametrize("name", sorted(NOTEBOOKS))
def test_committed_outputs_hold_no_error_and_stay_light(name):
    notebook = NOTEBOOKS[name]
    nb = nbformat.read(notebook, 4)
    assert not [o for c in nb.cells for o in c.get("outputs", []) if o.output_type == "error"]
    assert notebook.stat().st_size < 1.5e6
    if notebook in SECTIONS:
        assert any(o.get("data", {}).get("image/png") for c in nb.cells for o in c.get("outputs", [])), (
            "committed without figures"
        )
    assert not re.search(r"/(?:root|home|work)/", json.dumps(nb)), "an absolute path of one machine"


@pytest.mark.parametrize("notebook", SECTIONS, ids=lambda p: p.stem)
def test_no_figure_of_an_article_is_wider_than_a_phone_shows(notebook):
    "`base.plots.WIDTH` inches: wider ones lose their smallest words at 390 pixels."
    from PIL import Image

    outputs = [o for c in nbformat.read(notebook, 4).cells for o in c.get("outputs", [])]
    shown = [base64.b64decode(o.data["image/png"]) for o in outputs if "image/png" in o.get("data", {})]
    widths = [(i.size[0] / i.info["dpi"][0]) for i in map(Image.open, map(io.BytesIO, shown))]
    assert widths and max(widths) <= WIDTH + 0.3, widths  # saved with a margin


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

    assert set(spectral_nb.__all__) >= {"load_model", "trace", "factored_svd", "run_sweep", "sweeps"}
    for name in spectral_nb.__all__:
        value = getattr(spectral_nb, name)
        assert (value.__doc__ or "").strip(), f"{name} has no docstring"
    with pytest.raises(AttributeError, match="attribute load_modle"):
        getattr(spectral_nb, "load_modle" + "")


def test_data_is_small_and_tracked_files_name_no_machine():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not files:
        pytest.skip("not a git checkout")
    sizes = {f: (ROOT / f).stat().st_size for f in files if f.startswith("data/") and (ROOT / f).exists()}
    large = sum(size for f, size in sizes.items() if "story-8x16" in f)  # one model of the source's size, apart
    assert sum(sizes.values()) - large < 45e6 and large < 30e6
    assert not [f for f in files if f.endswith((".pkl", ".pickle", ".pt"))]


@pytest.mark.parametrize("notebook", [*SECTIONS, ROOT / "nbs" / "index.ipynb"], ids=lambda p: p.stem)
def test_committed_outputs_were_made_by_this_code(notebook):
    from spectral_nb.dev.render import code_stamp, committed_stamp

    assert committed_stamp(notebook) == code_stamp(notebook), (
        f"run `make render` (or python -m spectral_nb.dev.render {notebook.stem}) and commit the result"
    )


def package_copy(tmp_path, change: str | None):
    "A copy of the package with its own folder of notebooks; one line is appended to the module that `change` names."
    shutil.copytree(ROOT / "spectral_nb", tmp_path / "spectral_nb", ignore=shutil.ignore_patterns("__pycache__"))
    if change:
        file = tmp_path / "spectral_nb" / change
        file.write_text(file.read_text() + "\nchanged = True\n")
    return tmp_path


@pytest.mark.parametrize("module", ["attention/omega.py", "base/runs.py", "norm_growth.py"])
def test_a_change_in_a_subpackage_makes_other_runs(module, tmp_path):
    code = "from spectral_nb.base.runs import code_version, run_id; print(code_version(), run_id('svt', {'seed': 0}))"
    made = []
    for change in (None, module):
        folder = package_copy(tmp_path / str(change is None), change)
        environment = os.environ | {"PYTHONPATH": str(folder)}
        done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        made.append(done.stdout.split())
    assert made[0][0] != made[1][0] and made[0][1] != made[1][1]


@pytest.mark.parametrize("notebook", SECTIONS, ids=lambda p: p.stem)
def test_a_change_in_a_subpackage_changes_the_stamp_of_the_section(notebook, tmp_path):
    from spectral_nb.dev.render import code_stamp

    before = code_stamp(notebook, package_copy(tmp_path / "a", None) / "spectral_nb")
    assert code_stamp(notebook, package_copy(tmp_path / "b", "base/checks.py") / "spectral_nb") != before
    assert code_stamp(notebook, package_copy(tmp_path / "c", "dev/website.py") / "spectral_nb") == before


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
    slow = "import time; from spectral_nb.base.progress import progress\n"
    slow += "for _ in progress(range(4), desc='slow'): time.sleep(0.3)"
    seen = jupyter(slow, repo_root())
    assert "slow: 100%" in seen.stdout and "4/4" in seen.stdout
    assert not seen.stderr  # there JupyterLab would paint it red
    assert jupyter(slow.replace("0.3", "0.01"), repo_root()).stdout == ""
    assert jupyter(slow, repo_root(), SPECTRAL_NB_PROGRESS="0").stdout == ""
