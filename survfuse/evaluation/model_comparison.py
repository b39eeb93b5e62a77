"""Several models in one table: survival with paired differences, class tasks beside it."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from survfuse.data.atomic import atomic_path
from survfuse.evaluation.class_report import ClassReport, class_table, metrics_of
from survfuse.evaluation.comparison import Comparison
from survfuse.evaluation.report import Report
from survfuse.evaluation.report_files import comparison_markdown, interval_text

COLUMNS = (
    "model", "minus", "metric", "value", "low", "high", "level", "pvalue", "adjusted_pvalue",
    "method",
)  # fmt: skip


def write_model_comparison(
    folder: str | os.PathLike[str],
    reports: Sequence[Report],
    comparison: Comparison | None,
    classes: Mapping[str, Sequence[ClassReport]] | None = None,
    *,
    notes: Sequence[str] = (),
) -> None:
    """Write `compare.json`, `compare.csv` and `compare.md`: every model, and the differences.

    Args:
        folder: where they go; it exists.
        reports, comparison: of survival; none and None for models that do not predict it.
        classes: reports of every class task. There are no paired differences of these.
        notes: what is said of all models, where there is no comparison to say it.
    """
    classes = classes or {}
    folder = Path(folder)
    found = {
        "reports": [report.as_dict() for report in reports],
        "comparison": None if comparison is None else comparison.as_dict(),
        "class_reports": {
            task: [report.as_dict() for report in every] for task, every in classes.items()
        },
        "notes": list(notes),
    }
    with atomic_path(folder / "compare.json") as temporary:
        temporary.write_text(json.dumps(found, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    with (
        atomic_path(folder / "compare.csv") as temporary,
        temporary.open("w", encoding="utf-8", newline="") as stream,
    ):
        rows = [COLUMNS, *_rows(reports, comparison, classes)]
        csv.writer(stream, lineterminator="\n").writerows(
            ["" if value is None else value for value in row] for row in rows
        )
    with atomic_path(folder / "compare.md") as temporary:
        text = models_markdown(reports, comparison, classes, notes=notes)
        temporary.write_text(text, encoding="utf-8")


def models_markdown(
    reports: Sequence[Report],
    comparison: Comparison | None,
    classes: Mapping[str, Sequence[ClassReport]] | None = None,
    *,
    notes: Sequence[str] = (),
) -> str:
    """Return a table of several models, that of their differences, and one of each class task."""
    parts = []
    if reports:
        parts.append(reports_markdown(reports))
    if comparison is not None:
        parts.append(comparison_markdown(comparison))
    parts += [f"# {task}\n\n{class_table(every)}" for task, every in (classes or {}).items()]
    if notes:
        parts.append("".join(f"* {note}\n" for note in notes))
    return "\n".join(parts)


def reports_markdown(reports: Sequence[Report]) -> str:
    """Return one line per model."""
    lines = ["| model | protocol | Harrell's C | Uno's C | IBS |", "|---|---|---|---|---|"]
    for report in reports:
        uno = "-" if report.uno is None else interval_text(report.uno)
        brier = "-" if report.integrated_brier is None else f"{report.integrated_brier:.3f}"
        protocol = f"{report.protocol}, leaks" if report.leakage else report.protocol
        harrell = interval_text(report.concordance)
        lines.append(f"| {report.model} | {protocol} | {harrell} | {uno} | {brier} |")
    return "\n".join(lines) + "\n"


def _rows(
    reports: Sequence[Report],
    comparison: Comparison | None,
    classes: Mapping[str, Sequence[ClassReport]],
) -> list[tuple[Any, ...]]:
    """One row per model and metric, and per difference, in the order of `COLUMNS`."""
    found = [
        (report.model, name, interval)
        for report in reports
        for name, interval in (("harrell_c", report.concordance), ("uno_c", report.uno))
    ]
    found += [
        (report.model, f"{task}_{name}", getattr(report, name))
        for task, every in classes.items()
        for report in every
        for name in metrics_of(report)
    ]
    rows: list[tuple[Any, ...]] = [
        (model, None, name, c.estimate, c.low, c.high, c.level, None, None, c.method)
        for model, name, c in found
        if c is not None
    ]
    rows += [
        (pair.model_a, pair.model_b, "harrell_c", d.estimate, d.low, d.high, d.level, d.pvalue,
         pair.adjusted_pvalue, d.method)
        for pair in (() if comparison is None else comparison.pairs)
        for d in (pair.difference,)
    ]  # fmt: skip
    return rows
