"Names in figures are literal text: a `$` in a file's, a model's or a task's name is drawn, and begins no formula."

import io

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from spectral_nb.attention import figures as attention
from spectral_nb.base import labels, plots
from spectral_nb.fingerprint import figures as fingerprint
from spectral_nb.norms import figures as norms
from spectral_nb.survey import figures as survey
from spectral_nb.survey.model_survey import ModelSurvey
from spectral_nb.survey.targets import CLASSES
from spectral_nb.tracing import figures as tracing

ODD = "cost $x_{$ a$b$c"


def drawn(fig) -> str:
    "All text of a figure as it is drawn; an unbalanced formula raises."
    fig = getattr(fig, "figure", fig)
    fig.savefig(io.BytesIO(), format="svg")
    texts = [t.get_text() for t in fig.findobj(lambda a: hasattr(a, "get_text"))]
    return "\n".join(texts).replace("\\$", "$")


def long_rows(metric: str, values, **more) -> pd.DataFrame:
    return pd.DataFrame([dict(metric=metric, value=v, layer=i, **more) for i, v in enumerate(values)])


def growth_table() -> pd.DataFrame:
    rows = [
        long_rows("norm_mean", [1, 2], quantity=p, position_class=c) for p in ("resid_pre",) for c in ("other", "bos")
    ]
    rows += [long_rows("norm_mean", [2, 4], quantity=p, position_class="other") for p in ("resid_post", "attn_out")]
    rows += [long_rows("norm_mean", [2, 4], quantity="mlp_out", position_class="other")]
    return pd.concat([*rows, long_rows("norm_mean", [2, 4], quantity="resid_post", position_class="bos")])


def surveyed() -> list[ModelSurvey]:
    table = pd.DataFrame({"layer": [0, 0, 1, 1], "head": [0, 1, 0, 1], "class": [*CLASSES[:3], "unclassified"]})
    made = ModelSurvey(ODD, {"synthetic": table}, [(0, 0)])
    made.classed = table.assign(rank=[1, 2, 3, 4], final=[4.0, 3, 2, 1])
    return [made]


FIGURES = {
    "terms": lambda: attention.terms_figure({ODD: (np.array([3.0, -1]), np.array([True, False]))}),
    "sizes": lambda: attention.size_figure({ODD: np.array([1, 2, 2])}, 8),
    "upstream": lambda: attention.upstream_figure([ODD, "L0H1", "L0H2"], np.array([[1.0, 2, 3], [3, 4, 5]]), "any"),
    "magnitude": lambda: attention.magnitude_figure(np.array([0.1, 0.9]), np.array([True, False]), "answer", ODD),
    "stream": lambda: norms.stream_figure({ODD: growth_table()}),
    "classes": lambda: survey.plot_class_shares(surveyed()),
    "rankings": lambda: survey.plot_rankings(surveyed()),
    "bos": lambda: survey.plot_bos_layers(surveyed()),
    "verdicts": lambda: survey.plot_verdicts(
        pd.DataFrame({"claim": ["c", "c"], "model": [ODD, "other"], "verdict": ["yes", "no"]})
    ),
    "signal": lambda: fingerprint.signal_figure(
        pd.DataFrame(
            [dict(metric=m, step=s, layer=0, head=0, value=1.0) for m in ("pr", "pr_fixed") for s in (0, 1)]
            + [dict(metric="accuracy", step=s, layer=-1, head=-1, value=0.5) for s in (0, 1)]
        ),
        [(0, 0)],
        ODD,
    ),
    "graphs": lambda: tracing.graph_figure(__import__("networkx").DiGraph(), ODD),
    "hue": lambda: plots.plot_lines(pd.DataFrame({"x": [1, 2], "y": [1, 2], "by": ODD}), "x", "y", hue="by"),
    "bars": lambda: plots.plot_bars(pd.DataFrame({"x": [ODD], "y": [1.0]}), "x", "y"),
    "intervals": lambda: plots.plot_intervals(
        pd.DataFrame({"a": [ODD], "e": [1.0], "l": [0.0], "h": [2.0]}), "a", "e", "l", "h"
    ),
    "points": lambda: plots.plot_scatter(pd.DataFrame({"x": [1], "y": [1], "n": [ODD]}), "x", "y", label="n"),
}


@pytest.mark.parametrize("name", FIGURES)
def test_names_are_literal_text(name):
    assert ODD in drawn(FIGURES[name]())


def test_literal():
    assert labels.literal("a$b") == r"a\$b" == labels.literal(labels.literal("a$b"))
    assert labels.literal(["$", 3]) == [r"\$", "3"] and labels.literal(3) == "3"


@pytest.mark.parametrize("name", FIGURES)
def test_a_phone_can_show_it(name):
    "As wide as a phone shows at eight points or more, names of ticks included."
    fig = FIGURES[name]().figure  # of axes, or a figure itself
    fig.draw_without_rendering()
    texts = [t for t in fig.findobj(lambda a: hasattr(a, "get_fontsize")) if t.get_text() and t.get_visible()]
    assert texts and min(t.get_fontsize() for t in texts) >= 8
    assert fig.get_size_inches()[0] <= plots.WIDTH
    plt.close("all")
