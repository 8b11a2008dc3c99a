"Drives public names with wrong arguments and counts what came of it: a clear error, an unclear one, or silence."

import importlib
import inspect
import os
import re
import signal
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stderr, redirect_stdout
from io import StringIO

import numpy as np
import pandas as pd
import torch

from spectral_nb.base.arguments import parameter_kinds
from spectral_nb.dev import house

CHOICES = set(
    "processing kind rule mode metric task side alternative words dtype by within capability match score".split()
)
CHOICES |= set(
    "device query_role role q_role k_role content key unlabeled name_of_task feature signal pick architecture".split()
)
WIDE = {"text", "title", "published", "label", "xlabel", "note", "unit", "claim"}  # any text is right


def public_functions() -> dict[str, object]:
    "{module.name: function or class} of all that is public and can be called."
    found = {}
    for name, homes in house.public_homes().items():
        for home in homes:
            value = getattr(importlib.import_module(f"spectral_nb.{home}".removesuffix(".__init__")), name)
            if callable(value) and not (isinstance(value, type) and not takes_arguments(value)):
                found[f"{home}.{name}"] = value
    return dict(sorted(found.items()))


def takes_arguments(value) -> bool:
    try:
        return bool(inspect.signature(value).parameters)
    except ValueError:
        return False


def same_by_other_means(value) -> Iterator[tuple[str, object]]:
    "The same array in forms that must give the same result, or be refused."
    if isinstance(value, torch.Tensor) and value.ndim:
        yield "numpy", value.detach().numpy()
        yield "strided", torch.stack([value, value], -1)[..., 0]
        if value.is_floating_point():
            yield "requires grad", value.clone().requires_grad_()
            yield "double", value.double()
    elif isinstance(value, np.ndarray) and value.ndim:
        yield "strided", np.stack([value, value], -1)[..., 0]
        yield "torch", torch.from_numpy(value.copy())
    elif isinstance(value, int) and not isinstance(value, bool):
        yield "numpy int", np.int64(value)


def bad_arrays(value) -> Iterator[tuple[str, object]]:
    array = value.detach().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    as_given = torch.from_numpy if isinstance(value, torch.Tensor) else np.asarray
    if array.dtype.kind == "f" and array.size:
        for label, number in (("nan", np.nan), ("inf", np.inf)):
            broken = array.copy()
            broken.flat[0] = number
            yield f"one {label}", as_given(broken)
        yield "complex", as_given(array.astype(complex))
        yield "truth values", as_given(array > 0)
    yield "no axis", as_given(np.zeros((), array.dtype))
    yield "texts", np.full(array.shape, "x", dtype=object)


ANYTHING = {"an object": object(), "1j": 1j, "bytes": b"x", "a class": int}
NOTHING = {"none": None}
TEXTS = {"a number": 3, "nan": float("nan"), "a list": [], "true": True, **ANYTHING, **NOTHING}
NUMBERS = {"text": "x", "digits": "3", "nan": float("nan"), "inf": float("inf"), "a list": [], "true": True}
NUMBERS |= {"a dict": {}, "minus infinity": -float("inf"), **ANYTHING, **NOTHING}
TRUTHS = {"'false'": "false", "2": 2, "a list": [], "nan": float("nan"), **ANYTHING, **NOTHING}
THINGS = {"text": "x", "a number": 3, "nan": float("nan"), "a list": [], "a dict": {}, **ANYTHING, **NOTHING}
HEADS = {"a number": 3, "1.5": 1.5, "nan": float("nan"), "'nine'": "nine", "far layer": "L99H0", "far head": [(0, 99)]}
HEADS |= {"negative": [(0, -1)], "twice": [(0, 0), (0, 0)], "halves": [(0.5, 0)], "[none]": [None], "a dict": {}}
CONTAINERS = {"[none]": [None], "[an object]": [object()], "[1j]": [1j], "[[]]": [[]]}
TABLES = {"empty": pd.DataFrame(), "other columns": pd.DataFrame({"zzz": [1.0]})}


def bad_values(name: str, kinds, default, example) -> Iterator[tuple[str, object]]:
    "What must be refused for a parameter, by what it takes."
    says = {k.says for k in kinds}
    found: dict[str, object] = {}
    if not kinds:
        found = {"an object": object()}
    elif says & {"text"} and "a path" not in says:
        found = dict(TEXTS) | ({"no such": "no such thing"} if name in CHOICES else {})
    elif "a whole number" in says:
        found = NUMBERS | {"1.5": 1.5, "very negative": -(10**6)}
    elif "a number" in says:
        found = dict(NUMBERS)
    elif "True or False" in says:
        found = dict(TRUTHS)
    elif any(s.startswith("an array") for s in says):
        found = {k: v for k, v in THINGS.items() if k not in ("a number",)} | dict(bad_arrays(example))
    elif any(s.startswith("heads") for s in says):
        found = ANYTHING | NOTHING | HEADS
    elif "DataFrame" in says:
        found = THINGS | TABLES
    elif says & {"a list", "a sequence", "a tuple", "a collection", "a iterable", "an iterable"}:
        found = THINGS | CONTAINERS
    else:
        found = dict(THINGS)
    for label, value in found.items():
        if value is None and (default is None or "None" in says or not kinds):
            continue
        if label == "a number" and says & {"a number", "a whole number"}:
            continue
        if any(k.fits(value) and k.then is None for k in kinds) and label not in (*TABLES, *HEADS, "no such"):
            continue  # it is of a kind that the signature allows
        yield label, value


@contextmanager
def time_limit(seconds: float):
    def ring(*_):
        raise TimeoutError("still working")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Fresh:
    "An argument that a call uses up: made anew for each."

    def __init__(self, make):
        self.make = make


def call(function, arguments: dict, limit_s: float = 30.0):
    "The result; a context manager is entered and left, a generator read."
    arguments = {k: v.make() if isinstance(v, Fresh) else v for k, v in arguments.items()}
    positional = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.POSITIONAL_ONLY]
    rest = {k: v for k, v in arguments.items() if k not in positional}
    quiet = warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO())
    with quiet[0], quiet[1], quiet[2], time_limit(limit_s):
        warnings.simplefilter("ignore")
        result = function(*(arguments[k] for k in positional if k in arguments), **rest)
        if isinstance(result, AbstractContextManager) and hasattr(result, "gen"):
            with result:
                return None
        return list(result) if inspect.isgenerator(result) else result


def words_for(name: str) -> str:
    "A message may name an argument by the singular, or by one side of `a_or_b`."
    parts = [name, *name.split("_or_"), *(["sweep"] if name in ("source", "spec") else [])]
    return "|".join(re.escape(w) for p in parts for w in {p, p.removesuffix("s"), p.replace("_", " ")})


CLEAR = (ValueError, TypeError, KeyError, IndexError, FileNotFoundError, NotImplementedError, OSError)


def outcome(function, arguments: dict, name: str, limit_s: float = 5.0) -> str:
    "`clear`, `unclear: ...` or `silent`."
    try:
        call(function, arguments, limit_s)
    except TimeoutError:
        return "silent"
    except SystemExit:
        return "clear"
    except Exception as e:
        named = re.search(rf"\b({words_for(name)})\b", str(e))
        return "clear" if isinstance(e, CLEAR) and named else f"unclear: {type(e).__name__}: {str(e)[:90]}"
    return "silent"


def equal(a, b) -> bool:
    "Whether two results are the same up to rounding."
    if isinstance(a, (torch.Tensor, np.ndarray)) and isinstance(b, (torch.Tensor, np.ndarray)):
        a, b = (np.asarray(x.detach() if isinstance(x, torch.Tensor) else x) for x in (a, b))
        if a.shape != b.shape:
            return False
        return a.dtype.kind not in "fciub" or np.allclose(a, b, rtol=1e-3, atol=1e-4, equal_nan=True)
    if isinstance(a, pd.DataFrame) and isinstance(b, pd.DataFrame):
        if list(a.columns) != list(b.columns) or len(a) != len(b):
            return False
        return all(equal(a[c].to_numpy(), b[c].to_numpy()) for c in a if a[c].dtype.kind in "fiub")
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, float) and isinstance(b, float):
        return bool(np.isclose(a, b, rtol=1e-3, atol=1e-4, equal_nan=True))
    return True  # other objects: that no error came is all that is asked here


def drive(title: str, function, arguments: dict, heavy: bool) -> Iterator[tuple[str, str, str]]:
    "(argument, value, outcome) of every bad value, and of the same values in other forms."
    base = None if heavy else call(function, arguments)
    kinds = parameter_kinds(function if not isinstance(function, type) else function.__init__)
    for name, p in inspect.signature(function).parameters.items():
        if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL):
            continue
        example = arguments.get(name, p.default)
        example = example.make() if isinstance(example, Fresh) else example
        for label, value in bad_values(name, kinds.get(name, []), p.default, example):
            yield name, label, outcome(function, arguments | {name: value}, name, 1.0 if heavy else 5.0)
        for label, value in () if heavy else same_by_other_means(example):
            try:
                right = equal(call(function, arguments | {name: value}), base)
                yield name, label, "right" if right else "silent"
            except Exception as e:
                named = isinstance(e, CLEAR) and re.search(rf"\b({words_for(name)})\b", str(e))
                yield name, label, "clear" if named else f"unclear: {type(e).__name__}: {str(e)[:90]}"


def in_folder(path):
    os.chdir(path)
