"Wrong arguments of public functions: each is refused by name, or its result is right."

import os
from collections import Counter

import pytest
from drive import drive, public_functions
from examples import Examples

# What is right although it looks wrong: tables, lists and dicts that may be empty, any columns, notes of any kind.
ACCEPTED = {
    "base.claims.claims_table(rows=a list)",
    "base.claims.claims_table(rows=a dict)",
    "base.claims.identity(published=an object)",
    "base.claims.differs(published=an object)",
    "base.claims.equals(published=an object)",
    "base.files.write_table(table=empty)",
    "base.files.write_table(table=other columns)",
    "base.long_tables.long_table(parts=a list)",
    "base.long_tables.long_table(parts=a dict)",
    "base.runs.run_folder(params=a dict)",
    "base.runs.run_id(params=a dict)",
    "base.runs.save_run(params=a dict)",
    "base.runs.save_run(table=empty)",
    "base.runs.save_run(table=other columns)",
    "base.runs.save_run(figures=a dict)",
    "base.runs.save_run(extra_tables=a dict)",
    # a model's size is not given: any layer and head can be parsed
    "base.checks.parse_heads(heads=far layer)",
    "base.checks.parse_heads(heads=far head)",
}
# An interval's bound may be infinite or absent
ACCEPTED |= {
    f"base.intervals.Interval({field}={value})"
    for field in ("estimate", "low", "high")
    for value in ("nan", "inf", "minus infinity")
}
# Results that the library itself makes: nobody is asked to call these with arguments of their own.
NOT_DRIVEN = {
    "attention.activations.Activations",
    "attention.components.Components",
    "attention.omega.OmegaSVD",
    "attention.pairs.Pairs",
    "attention.slices.SliceData",
}
DRIVEN = ("base", "attention")


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    folder, before = tmp_path_factory.mktemp("driven"), os.getcwd()
    os.chdir(folder)
    yield Examples(folder)
    os.chdir(before)


@pytest.mark.parametrize("package", DRIVEN)
def test_wrong_arguments_are_refused_by_name(package, examples):
    counts, faults = Counter(), []
    for title, function in public_functions().items():
        if title.split(".")[0] != package or title in NOT_DRIVEN:
            continue
        arguments, heavy = examples.arguments(title, function)
        for name, label, outcome in drive(title, function, arguments, heavy):
            place = f"{title}({name}={label})"
            kind = "accepted" if place in ACCEPTED and outcome == "silent" else outcome.split(":")[0]
            counts[kind] += 1
            faults += [place] if kind in ("silent", "unclear") else []
    print(package, dict(counts))
    assert counts["clear"] > 300
    assert not faults, f"{len(faults)} wrong arguments pass silently or end in an error that does not name them"
