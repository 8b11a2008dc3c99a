"Wrong arguments of public functions: each is refused by name, or its result is right."

import os
from collections import Counter

import pytest
import yaml
from drive import drive, public_functions
from examples import Examples

from spectral_nb.sweeps import run_sweep
from spectral_nb.sweeps.command import main

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
# A task's name is free where a batch is made by hand; roles belong to a task, which options do not know.
ACCEPTED |= {f"{place}(task=no such)" for place in ("prompts.batches.PromptBatch", "prompts.own_prompts.from_prompts")}
ACCEPTED |= {f"tracing.options.TraceOptions({role}=no such)" for role in ("q_role", "k_role")}
# No nulls, no excluded heads, no token counts, no interventions: nothing is a right answer there.
ACCEPTED |= {
    "cross_architecture.measure(skipped=a dict)",
    "which_signal.measure(skipped=a dict)",
    "fingerprint.ratios.head_ratios(nulls=a dict)",
    "fingerprint.ratios.head_ratios(nulls=a list)",
    "fingerprint.ratios.ratio_trajectory(nulls=a dict)",
    "fingerprint.ratios.ratio_trajectory(nulls=a list)",
    "models.integrity.check_revisions(tokens=a dict)",
    "survey.screens.screen_ablation(exclude=a list)",
    "tracing.drawing.draw_graph(roles=a list)",
    "tracing.sets.set_interventions(sets=a dict)",
    "views.circuits.circuit_page(effects=empty)",
    "views.circuits.circuit_page(known_heads=a dict)",
    "training.loop.train(callbacks=a dict)",
    "causal.rankings.faithfulness(sizes=a list)",  # 0 and 1 are always among them
    "causal.set_tests.ablation_test(draws=a dict)",  # without draws the verdict is "untested"
    "causal.set_tests.ablation_test(draws=a list)",
    "training.loop.train(callbacks=a list)",
    # a graph does not say how many layers and heads its model has
    "tracing.graph_scores.precision_recall(heads=far layer)",
    "tracing.graph_scores.precision_recall(heads=far head)",
    "tracing.drawing.draw_graph(known=far layer)",
    "tracing.drawing.draw_graph(known=far head)",
    "tracing.drawing.draw_graph(known=a dict)",
    "views.circuits.circuit_page(known_heads=far layer)",
    "views.circuits.circuit_page(known_heads=far head)",
}
# Results that the library itself makes: nobody is asked to call these with arguments of their own.
NOT_DRIVEN = {
    "causal.ablation.HeadReference",
    "causal.rankings.Faithfulness",
    "causal.set_tests.AblationResult",
    "models.architectures.ArchSpec",
    "models.heads.HeadWeights",
    "models.planted_circuits.Planted",
    "models.records.ModelInfo",
    "norms.circuits.Circuit",
    "norms.growth_rates.Growth",
    "norms.stream.StreamNorms",
    "sweeps.spec.SweepSpec",
    "tracing.flow.Flow",
    "tracing.one_prompt.PromptTrace",
    "tracing.reading.Readings",
    "training.monitor.TransitionEvent",
    "attention.activations.Activations",
    "attention.components.Components",
    "attention.omega.OmegaSVD",
    "attention.pairs.Pairs",
    "attention.slices.SliceData",
}
SECTIONS = ("norm_growth", "sparse_attention", "svt", "pr_fingerprint", "cross_architecture", "which_signal")
DRIVEN = (
    *"base prompts models attention causal training norms tracing fingerprint survey sweeps views".split(),
    *SECTIONS,
)


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
    assert counts["clear"] > 100
    assert not faults, f"{len(faults)} wrong arguments pass silently or end in an error that does not name them"


MISSPELT = {
    "role": ("12_svt", dict(k_role=["IOO"]), "k_role='IOO' is not known; did you mean 'IO'"),
    "task": ("12_svt", dict(task=["iio"]), "task='iio' is not known; did you mean 'ioi'"),
    "rule": ("12_svt", dict(rule=["papr"]), "rule is 'papr'; allowed: 'paper'"),
    "roots": ("12_svt", dict(roots=["L1H"]), "roots: head='L1H' is not of the form"),
    "revision": ("12_svt", dict(revision=["stpe0"]), "revision='stpe0' is not known; did you mean 'step0'"),
    "circuit_tasks": ("10_norm_growth", dict(circuit_tasks=["ioi retreival"]), "did you mean 'retrieval'"),
    "layers": ("10_norm_growth", dict(layers=["al"]), "layers='al' is neither 'all' nor"),
    "tasks": ("11_sparse_attention", dict(tasks=["ioi retrival"]), "did you mean 'retrieval'"),
    "processing": ("11_sparse_attention", dict(processing=["fold"]), "did you mean 'folded'"),
    "score": ("13_pr_fingerprint", dict(score=["spraed"]), "did you mean 'spread'"),
    "revisions": ("14_cross_architecture", dict(revisions=["stpe0"]), "did you mean 'step0'"),
    "dtype": ("14_cross_architecture", dict(dtype=["float31"]), "did you mean 'float32'"),
}


@pytest.mark.parametrize("case", MISSPELT)
def test_a_misspelt_value_is_refused_before_a_sweep_runs(case, tmp_path, capsys):
    "Allowed values are those of the section's own config; the nearest is named, and nothing is written."
    notebook, grid, message = MISSPELT[case]
    spec = dict(notebook=notebook, grid=[dict(model_name=["story-neox"], **grid)])
    with pytest.raises(ValueError) as caught:
        run_sweep(spec, out=tmp_path / "out")
    assert message in str(caught.value) and not (tmp_path / "out").exists()
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(spec))
    assert main(["plan", str(tmp_path / "sweep.yaml"), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
