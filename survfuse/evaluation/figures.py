"""Figures: Kaplan-Meier by risk group, and the concordance of several models.

Figures are built on matplotlib's object interface: no pyplot, no global backend or style is
touched, and a figure is freed like any other object.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from survfuse.data.atomic import atomic_path
from survfuse.evaluation.curves import kaplan_meier, logrank_test
from survfuse.evaluation.intervals import Interval
from survfuse.extras import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# colour-blind safe (Okabe and Ito), risk increasing
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def kaplan_meier_figure(
    groups: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    title: str = "",
    time_unit: str = "months",
    endpoint: str = "survival",
    level: float = 0.95,
) -> Figure:
    """Kaplan-Meier curves of risk groups with bands, numbers at risk and the log-rank p-value.

    Args:
        groups: label -> (time [n], event [n]), lowest risk first; event 1 = seen. 2 to 6 groups.
        title: above the axes.
        time_unit: of the time axis.
        endpoint: what survival is of, for the vertical axis.
        level: coverage of the bands.

    Raises:
        ValueError: fewer than two or more than six groups, or an outcome is not valid.
        ImportError: matplotlib or scipy is not installed.
    """
    if not 2 <= len(groups) <= len(_COLOURS):
        raise ValueError(f"groups holds {len(groups)} group(s); it must be 2 to {len(_COLOURS)}")
    curves = {
        label: kaplan_meier(time, event, level=level) for label, (time, event) in groups.items()
    }
    test = logrank_test(list(groups.values()))
    figure = require("matplotlib.figure", extra="train").Figure(
        figsize=(6.0, 4.0 + 0.25 * len(groups)), layout="constrained"
    )
    axes, table = figure.subplots(
        2, 1, sharex=True, gridspec_kw={"height_ratios": [4.0, 0.35 * len(groups) + 0.15]}
    )
    for (label, curve), colour in zip(curves.items(), _COLOURS):
        times = np.concatenate([[0.0], curve.times])
        low, high, survival = (
            np.concatenate([[1.0], values]) for values in (curve.low, curve.high, curve.survival)
        )
        axes.step(times, survival, where="post", color=colour, label=label, linewidth=1.6)
        axes.fill_between(times, low, high, step="post", color=colour, alpha=0.15, linewidth=0)
        censored = curve.times[_has_censoring(*groups[label], curve.times)]
        heights = survival[np.searchsorted(curve.times, censored) + 1]
        axes.plot(censored, heights, "|", color=colour, markersize=5, linewidth=0)
    axes.set_ylim(0.0, 1.02)
    axes.set_ylabel(f"{endpoint} probability")
    axes.set_title(title, fontsize=11)
    axes.legend(
        loc="upper right",
        frameon=False,
        fontsize=9,
        title=f"log-rank {_p_text(test.pvalue)}",
        title_fontsize=9,
        alignment="right",
    )
    last = max(curve.times[-1] for curve in curves.values())
    axes.set_xlim(0.0, last * 1.02 if last > 0 else 1.0)
    _number_at_risk(axes, table, curves, time_unit)
    return figure


def _number_at_risk(axes, table, curves, time_unit: str) -> None:
    low, high = axes.get_xlim()
    ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
    table.set_ylim(len(curves) - 0.5, -0.5)
    table.set_yticks(range(len(curves)), list(curves), fontsize=8)
    table.set_title("number at risk", fontsize=8, loc="left")
    for row, (curve, colour) in enumerate(zip(curves.values(), _COLOURS)):
        for tick, count in zip(ticks, curve.at_risk(ticks)):
            table.text(tick, row, str(count), ha="center", va="center", fontsize=8, color=colour)
    for side in table.spines.values():
        side.set_visible(False)
    # the first count is centred on the axis: keep the labels clear of it
    table.tick_params(axis="y", length=0, pad=18)
    table.set_xlabel(f"time ({time_unit})")


def concordance_figure(
    rows: Sequence[tuple[str, Interval]], *, title: str = "", reference: float | None = 0.5
) -> Figure:
    """C-index of several models with intervals, one line each, first on top.

    Args:
        rows: (label, interval) per model; a model without an interval is a point.
        title: above the axes.
        reference: where a dashed line is drawn, for example 0.5; None for none.

    Raises:
        ValueError: `rows` is empty.
        ImportError: matplotlib is not installed.
    """
    if not rows:
        raise ValueError("rows is empty; at least one model is needed")
    figure = require("matplotlib.figure", extra="train").Figure(
        figsize=(6.0, 1.2 + 0.35 * len(rows)), layout="constrained"
    )
    axes = figure.subplots()
    for row, (_, interval) in enumerate(rows):
        if interval.low is not None:
            axes.plot([interval.low, interval.high], [row, row], color="#444444", linewidth=1.4)
        axes.plot(interval.estimate, row, "o", color=_COLOURS[0], markersize=5)
        axes.annotate(
            _interval_text(interval),
            (1.0, row),
            xycoords=("axes fraction", "data"),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    if reference is not None:
        axes.axvline(reference, color="#999999", linestyle="--", linewidth=1.0, zorder=0)
    axes.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=9)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("concordance index")
    axes.set_title(title, fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str], *, dpi: int = 150) -> Path:
    """Write `figure` to a .png or .pdf file, whole or not at all; the same figure, the same bytes.

    Raises:
        ValueError: the suffix is neither.
        FileNotFoundError: the folder does not exist.
    """
    path = Path(path)
    # without these keys the file would hold the date or the library's version
    metadata = {
        ".png": {"Software": None},
        ".pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    }
    if path.suffix not in metadata:
        raise ValueError(f"{path.name} ends in {path.suffix!r}; a figure is saved as .png or .pdf")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=dpi, metadata=metadata[path.suffix])
    return path


def _has_censoring(time: ArrayLike, event: ArrayLike, times: np.ndarray) -> np.ndarray:
    return np.isin(times, np.asarray(time, np.float64)[~np.asarray(event).astype(bool)])


def _p_text(pvalue: float) -> str:
    return "p < 0.001" if pvalue < 0.001 else f"p = {pvalue:.3f}"


def _interval_text(interval: Interval) -> str:
    if interval.low is None:
        return f"{interval.estimate:.3f}"
    return f"{interval.estimate:.3f} [{interval.low:.3f}, {interval.high:.3f}]"
