"""Figures: contents, files, and no trace in matplotlib's global state."""

from __future__ import annotations

import doctest
import importlib
import subprocess
import sys

import numpy as np
import pytest

from survfuse.evaluation.curves import logrank_test
from survfuse.evaluation.figures import concordance_figure, kaplan_meier_figure, save_figure
from survfuse.evaluation.intervals import Interval

GROUPS = {
    "low risk": ([5, 8, 12, 20, 30], [0, 1, 0, 1, 0]),
    "high risk": ([1, 2, 3, 9, 11], [1, 1, 1, 0, 1]),
}


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_kaplan_meier_figure_shows_curves_p_and_numbers_at_risk():
    figure = kaplan_meier_figure(GROUPS, title="BLCA", endpoint="overall survival")
    axes, table = figure.axes
    legend = axes.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == list(GROUPS)
    pvalue = logrank_test(list(GROUPS.values())).pvalue
    assert legend.get_title().get_text() == f"log-rank p = {pvalue:.3f}"
    assert axes.get_ylabel() == "overall survival probability"
    assert table.get_xlabel() == "time (months)"
    # at time 0 all five of each group are at risk
    assert texts(table)[0] == "5"
    high = axes.lines[2]
    np.testing.assert_allclose(high.get_ydata(), [1, 0.8, 0.6, 0.4, 0.4, 0], atol=1e-12)
    np.testing.assert_array_equal(axes.lines[1].get_xdata(), [5, 12, 30])


def test_tiny_p_values_are_not_printed_as_zero():
    groups = {"a": (np.arange(1, 60), np.ones(59)), "b": (np.arange(100, 160), np.ones(60))}
    axes = kaplan_meier_figure(groups).axes[0]
    assert axes.get_legend().get_title().get_text() == "log-rank p < 0.001"


def test_concordance_figure_shows_missing_intervals_as_points():
    rows = [
        ("full", Interval(0.7, 0.6, 0.8, 0.95, "", "")),
        ("clinical", Interval(0.6, None, None, 0.95, "", "")),
    ]
    axes = concordance_figure(rows, title="KIRP").axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["full", "clinical"]
    assert texts(axes) == ["0.700 [0.600, 0.800]", "0.600"]
    # one bar, two points, one reference line
    assert len(axes.lines) == 4
    assert len(concordance_figure(rows, reference=None).axes[0].lines) == 3


@pytest.mark.parametrize("suffix", [".png", ".pdf"])
def test_the_same_figure_gives_the_same_bytes(tmp_path, suffix):
    paths = [
        save_figure(kaplan_meier_figure(GROUPS), tmp_path / f"{name}{suffix}") for name in "ab"
    ]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_figure_errors(tmp_path):
    with pytest.raises(ValueError, match=r"groups holds 1 group\(s\); it must be 2 to 6"):
        kaplan_meier_figure({"a": ([1], [1])})
    with pytest.raises(ValueError, match="rows is empty"):
        concordance_figure([])
    figure = kaplan_meier_figure(GROUPS)
    with pytest.raises(ValueError, match=r"figure\.svg ends in '\.svg'; a figure is saved as"):
        save_figure(figure, tmp_path / "figure.svg")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        save_figure(figure, tmp_path / "nowhere" / "figure.png")
    assert list(tmp_path.iterdir()) == []


def test_evaluation_imports_no_heavy_library_and_figures_no_pyplot():
    code = (
        "import sys; import survfuse.evaluation, survfuse.models.cox\n"
        "heavy = {'scipy', 'matplotlib', 'pandas', 'sksurv'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "from survfuse.evaluation.figures import kaplan_meier_figure\n"
        f"kaplan_meier_figure({GROUPS!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("module", ["concordance", "intervals"])
def test_examples_in_docstrings(module):
    result = doctest.testmod(importlib.import_module(f"survfuse.evaluation.{module}"))
    assert result.attempted > 0
    assert result.failed == 0
