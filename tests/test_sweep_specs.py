"Random specifications of sweeps: sound ones mean the same as text, damaged ones are refused by the name of the field."

import copy
import datetime
import math

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sweep_toy import write_toy

from spectral_nb.sweeps import load_spec
from spectral_nb.sweeps.plan import plan_runs
from spectral_nb.sweeps.spec import expand

PARAMETERS = 'x: int = 1\nwait = 0.0\nmode = "ok"\nseed: int = 0\nout_dir = ""\n'
quick = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with the toy notebook and a file for the sweep."
    folder = tmp_path_factory.mktemp("specs")
    write_toy(folder, PARAMETERS)
    return folder


class Quoted(yaml.SafeDumper):
    "YAML in which every text is quoted: without quotes, 1e3 and no are none."


Quoted.add_representer(str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"'))

# Values that the toy's parameters allow
numbers = st.floats(-1e6, 1e6).map(lambda v: v + 0.0)
texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=12) | st.sampled_from(
    ["no", "1e3", "5:41", "~", ""]
)
values = {"x": st.integers(-(2**53), 2**53), "wait": numbers, "mode": texts}
some = st.fixed_dictionaries({}, optional=values)
axes = {k: st.lists(v, min_size=1, max_size=3, unique_by=repr) for k, v in values.items()}
positive = st.floats(1e-3, 1e6) | st.integers(1, 10**6)
counts = st.integers(0, 64)
limits = dict(timeout_s=positive, memory_gb=positive, threads=counts, gpu=counts, retries=counts)
facts = st.fixed_dictionaries({"metric": st.text("abc", min_size=1), "value": numbers})
plain = "abcdefghijklmnopqrstuvwxyz0123456789"
names = st.text(plain, min_size=1, max_size=20) | st.sampled_from(["a.b", "A_1", "x+y", "7-"])


def lists(strategy):
    return st.lists(strategy, max_size=2)


optional = dict(
    name=names,
    section=st.text(plain, min_size=1, max_size=8),
    title=st.text("abc $'\"{}\\", max_size=20),
    parameters=some,
    grid=lists(st.fixed_dictionaries({}, optional=axes)),
    points=lists(some),
    seeds=st.lists(st.integers(0, 99), max_size=3, unique=True),
    resources=st.fixed_dictionaries({}, optional=limits),
    published=lists(facts),
)
specs = st.fixed_dictionaries({"notebook": st.just("90_toy.ipynb")}, optional=optional)


def in_place(spec: dict, place) -> dict:
    return spec | {"notebook": str(place / spec["notebook"]), "out": str(place / "out")}


@quick
@given(spec=specs)
@example(spec={"notebook": "90_toy.ipynb", "parameters": {"mode": "m" * 400}})
@example(spec={"notebook": "90_toy.ipynb", "parameters": {"mode": "é" * 200 + " ../x"}})
@example(spec={"notebook": "90_toy.ipynb", "parameters": {"mode": "\0"}})
def test_a_sound_sweep_means_the_same_as_text(spec, place):
    spec = in_place(spec, place)
    (place / "sweep.yaml").write_text(
        yaml.dump(spec, Dumper=Quoted, allow_unicode=True, sort_keys=False), encoding="utf-8"
    )
    given_, read = load_spec(spec), load_spec(place / "sweep.yaml")
    runs = [[(r.run_id, r.parameters) for r in plan_runs(s)] for s in (given_, read)]
    assert runs[0] == runs[1]
    asked = {repr(sorted(({"x": 1, "wait": 0.0, "mode": "ok", "seed": 0} | run).items())) for run in expand(given_)}
    assert len(runs[0]) == len(asked) == len({run_id for run_id, _ in runs[0]})
    for key in ("section", "title", "parameters", "resources", "published", "grid", "points", "seeds"):
        assert getattr(given_, key) == getattr(read, key)
    assert read.name == spec.get("name", "sweep")


odd = st.sampled_from(
    [None, True, -1, 0, 1.5, 2**70, math.nan, math.inf, "", "odd", "../x", [], [[]], {}, {"odd": 1}, [None], [1, 1]]
    + [{"x": []}, {"x": [1]}, [{"x": 1}], [{"x": []}], datetime.date(2026, 1, 1), (1, 2), b"odd", {3: 4}, {None: 1}]
)


def paths_of(value, path=()) -> list[tuple]:
    "The place of every key and item."
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [p for k, v in items for p in [(*path, k), *paths_of(v, (*path, k))]]


@st.composite
def damaged(draw):
    "(a sound sweep with one thing wrong or odd, where)"
    spec = copy.deepcopy(draw(specs))
    at = draw(st.sampled_from(paths_of(spec)))
    parent = spec
    for key in at[:-1]:
        parent = parent[key]
    what = draw(st.sampled_from(["replace", "rename", "drop"]))
    if what == "replace" or isinstance(parent, list):
        parent[at[-1]] = draw(odd)
    elif what == "rename":
        new = draw(st.sampled_from(["odd", "", 3, None, "Name", "gird", True]))
        parent[new] = parent.pop(at[-1])
        at = (*at[:-1], new, at[-1])
    else:
        del parent[at[-1]]
    return spec, at


@settings(quick, max_examples=250)
@given(case=damaged())
@example(case=({"notebook": "90_toy.ipynb", "grid": [{"x": [{}]}]}, ("grid", 0, "x")))
@example(case=({"notebook": 3}, ("notebook",)))
@example(case=({"notebook": "\0"}, ("notebook",)))
@example(case=({"notebook": "n" * 400}, ("notebook",)))
@example(case=({"notebook": "90_toy.ipynb", "out": 3}, ("out",)))
@example(case=({"notebook": "90_toy.ipynb", "out": "a\0"}, ("out",)))
@example(case=({"notebook": "90_toy.ipynb", "models": {3: []}}, ("models",)))
@example(case=({"notebook": "90_toy.ipynb", "models": {"x": {}}}, ("models",)))
def test_a_damaged_sweep_is_refused_by_name(case, place):
    "Or is sound all the same; nothing but ValueError, TypeError or FileNotFoundError, which say where."
    spec, at = case
    if isinstance(spec.get("notebook"), str) and spec["notebook"].startswith("90"):
        spec = {**spec, "notebook": str(place / spec["notebook"])}
    try:
        plan_runs(load_spec({"out": str(place / "out"), **spec}))
    except (ValueError, FileNotFoundError) as e:
        said = str(e)
        assert any(str(key) in said for key in at if not isinstance(key, int)), (at, said)
        assert len(said) < 5000 and "Traceback" not in said


def dumped(spec: dict) -> str:
    return yaml.dump({**spec, "notebook": "90_toy.ipynb"}, Dumper=Quoted)


@settings(quick, max_examples=150)
@given(
    spec=specs,
    at=st.integers(0, 10**6),
    cut=st.integers(0, 30),
    new=st.text("[]{}:,-&*!|>'\"#%@`? \t\nab1.", max_size=8),
)
@example(spec={}, at=0, cut=0, new="[" * 5000)
@example(spec={}, at=0, cut=0, new="{a: " * 5000)
@example(spec={}, at=0, cut=0, new="grid: &a [*a]\n")
@example(spec={}, at=0, cut=0, new="grid: &a {x: *a}\n")
@example(spec={}, at=0, cut=0, new="? [1]\n: 2\n")
@example(spec={}, at=0, cut=0, new="!!python/object/apply:os.system ['touch evil']\n")
@example(spec={}, at=0, cut=0, new="parameters: !!binary AAAA\n")
@example(spec={}, at=0, cut=0, new="parameters: !!set {x}\n")
@example(spec={}, at=0, cut=0, new="parameters: {x: 2026-99-99}\n")
@example(spec={}, at=0, cut=0, new="parameters: {x: !!int a}\n")
@example(spec={}, at=0, cut=0, new="parameters: {x: " + "9" * 5000 + "}\n")
def test_damaged_text_is_refused_with_the_file(spec, at, cut, new, place):
    text = dumped(spec)
    at %= len(text) + 1
    (place / "text.yaml").write_text(text[:at] + new + text[at + cut :])
    try:
        plan_runs(load_spec(place / "text.yaml", out=place / "out"))
    except FileNotFoundError as e:
        assert "notebook" in str(e)
    except ValueError as e:
        assert "text.yaml" in str(e), e
    assert not (place / "evil").exists()


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"notebook: \xe9", b"", b"\0", b"3", b"null"])
def test_what_is_no_text_is_refused_with_the_file(content, place):
    (place / "bytes.yaml").write_bytes(content)
    with pytest.raises(ValueError, match="bytes.yaml"):
        load_spec(place / "bytes.yaml")
