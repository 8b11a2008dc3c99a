"The report of a sweep: made from tables alone, and executed for real once."

import threading

import nbformat
import papermill
import pytest
from sweep_toy import write_toy

from spectral_nb.base.files import read_json, write_json
from spectral_nb.sweeps import load_results
from spectral_nb.sweeps.command import main
from spectral_nb.views.sweep_report import plot_claims, plot_cost, plot_panel, plot_sweep, sweep_claims
from spectral_nb.views.sweep_tables import example_sweep, panel_table, panels, read_sweep


@pytest.fixture
def sweep(tmp_path):
    return read_sweep(example_sweep(tmp_path))


def test_figures(sweep):
    assert len(plot_cost(sweep).axes) == 2
    claims = plot_claims(sweep_claims(sweep)).axes[0]
    assert [t.get_text() for t in claims.get_xticklabels()] == ["16", "32"] and plot_claims(
        sweep_claims(sweep).iloc[:0]
    ) is None
    figure = plot_sweep(sweep)
    assert [ax.get_title() for ax in figure.axes] == ["stream · rate", "stream · gain"]
    assert [line.get_label() for line in figure.axes[1].lines] == ["16", "32"]


def test_published_value_is_drawn(sweep):
    ax = plot_panel(sweep, "rate", panels(sweep)["stream · rate"])
    assert any(list(line.get_ydata()) == [1.2, 1.2] for line in ax.lines) and ax.texts[0].get_text() == "made up: 1.2"
    assert not plot_panel(sweep, "gain", panels(sweep)["stream · gain"]).texts


def test_intervals_and_ranges(sweep):
    rate = panel_table(panels(sweep)["stream · rate"], "width", None)
    assert list(rate.low) == [1 + 16 / 120, 1 + 32 / 120]  # the table's own interval
    gain = panel_table(panels(sweep)["stream · gain"], "layer", None)  # over two widths: mean and range
    assert list(gain.loc[gain.layer == 3, ["low", "value", "high"]].iloc[0]) == [1.75, 2.125, 2.5]


def test_x_and_metrics_can_be_chosen(sweep):
    figure = plot_sweep(sweep, metrics=["gain"], x="width")
    assert figure.axes[0].get_xlabel() == "width" and len(figure.axes) == 1
    with pytest.raises(KeyError, match="gain"):
        plot_sweep(sweep, metrics=["gein"])
    with pytest.raises(ValueError, match="x='depht' is not known"):
        plot_sweep(sweep, x="depht")
    with pytest.raises(FileNotFoundError):
        read_sweep(sweep.folder / "none")


def test_report_command(tmp_path, capsys):
    write_toy(tmp_path)
    file, out = tmp_path / "toy.yaml", tmp_path / "out"
    file.write_text("notebook: 90_toy\ngrid: {x: [1, 2]}\n")
    assert main(["report", str(file), "--out", str(out)]) == 2  # nothing has finished
    assert main(["run", str(file), "--out", str(out), "--executor", "serial", "--quiet"]) == 0
    assert main(["report", str(file), "--out", str(out)]) == 0
    page = (out / "report.html").read_text()
    assert "2 done" in page and "example_sweep" not in page and "made-up" not in page
    assert (
        page.count("data:image/png") >= 2 and "cdnjs" not in page.split("<body")[1]
    )  # the cost and the metrics of this sweep
    assert (out / "report" / "metrics.png").is_file() and nbformat.read(out / "report" / "notebook.ipynb", 4)
    assert set(load_results(out).x) == {1, 2}  # the report is not taken for a run
    told = read_json(out / "sweep.json")
    write_json({**told, "published": [{"metric": "square", "value": 4, "label": "known"}]}, out / "sweep.json")
    assert main(["report", str(out)]) == 0 and "report.html" in capsys.readouterr().out


def test_reports_of_two_sweeps_at_once(tmp_path, capsys, monkeypatch):
    "Both reports have the run id `report`; in threads of one process each keeps its kernel."
    both, execute = threading.Barrier(2, timeout=100), papermill.execute_notebook

    def execute_together(*args, **options):
        both.wait()
        return execute(*args, **options)

    write_toy(tmp_path)
    for name in "ab":
        (tmp_path / f"{name}.yaml").write_text(f"notebook: 90_toy\nparameters: {{x: {ord(name)}}}\n")
    files, out = [str(tmp_path / f"{name}.yaml") for name in "ab"], ["--out", str(tmp_path / "out")]
    assert main(["run", *files, *out, "--executor", "serial", "--quiet"]) == 0
    monkeypatch.setattr(papermill, "execute_notebook", execute_together)
    assert main(["report", *files, *out, "--workers", "2"]) == 0, capsys.readouterr().err
    assert all((tmp_path / "out" / name / "report.html").is_file() for name in "ab")


def test_a_formula_in_a_parameter_is_text(tmp_path):
    write_toy(tmp_path)
    file, out = tmp_path / "toy.yaml", tmp_path / "out"
    file.write_text("notebook: 90_toy\ngrid: {mode: ['$\\\\frac{$', '$x$']}\n")
    assert main(["run", str(file), "--out", str(out), "--executor", "serial", "--quiet"]) == 0
    sweep = read_sweep(out)
    for figure in (plot_cost(sweep), plot_sweep(sweep)):
        figure.canvas.draw()
