"""Write reports and comparisons: JSON for programs, CSV for tables, Markdown and figures."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from survfuse.data.atomic import atomic_path
from survfuse.evaluation.comparison import Comparison
from survfuse.evaluation.figures import concordance_figure, kaplan_meier_figure, save_figure
from survfuse.evaluation.intervals import Interval
from survfuse.evaluation.predictions import Predictions
from survfuse.evaluation.report import FoldReport, Report, risk_groups

REPORT_COLUMNS = ("model", "protocol", "leaks", "fold", "metric", "value", "low", "high", "level")
COMPARISON_COLUMNS = (
    "model_a", "model_b", "difference", "low", "high", "level", "pvalue", "adjusted_pvalue",
    "method",
)  # fmt: skip


def write_report(report: Report, folder: str | os.PathLike[str]) -> None:
    """Write `report.json`, `report.csv` and `report.md` into an existing folder."""
    folder = Path(folder)
    _write(folder / "report.json", json.dumps(report.as_dict(), indent=2, allow_nan=False) + "\n")
    _write(folder / "report.csv", _csv([REPORT_COLUMNS, *report_rows(report)]))
    _write(folder / "report.md", report_markdown(report))


def write_comparison(comparison: Comparison, folder: str | os.PathLike[str]) -> None:
    """Write `comparison.json`, `comparison.csv` and `comparison.md` into an existing folder."""
    folder = Path(folder)
    values = json.dumps(comparison.as_dict(), indent=2, allow_nan=False) + "\n"
    rows = [
        (pair.model_a, pair.model_b, d.estimate, d.low, d.high, d.level, d.pvalue,
         pair.adjusted_pvalue, d.method)
        for pair in comparison.pairs
        for d in (pair.difference,)
    ]  # fmt: skip
    _write(folder / "comparison.json", values)
    _write(folder / "comparison.csv", _csv([COMPARISON_COLUMNS, *rows]))
    _write(folder / "comparison.md", comparison_markdown(comparison))


def write_kaplan_meier(
    predictions: Predictions,
    folder: str | os.PathLike[str],
    *,
    formats: Sequence[str] = ("png", "pdf"),
) -> list[Path]:
    """Write `kaplan_meier.<format>` of the two risk groups and return the paths.

    Raises:
        ValueError: there are no risk groups (see `risk_groups`), or a format is not png or pdf.
    """
    leaks = ", leaks" if predictions.leakage else ""
    figure = kaplan_meier_figure(
        risk_groups(predictions),
        title=f"{predictions.model} ({predictions.protocol}{leaks}), cut at training-median risk",
        time_unit=predictions.time_unit,
        endpoint=predictions.endpoint,
    )
    folder = Path(folder)
    return [save_figure(figure, folder / f"kaplan_meier.{kind}") for kind in formats]


def write_concordance_figure(
    reports: Sequence[Report],
    folder: str | os.PathLike[str],
    *,
    formats: Sequence[str] = ("png", "pdf"),
) -> list[Path]:
    """Write `concordance.<format>`, one line per report, and return the paths."""
    figure = concordance_figure([(report.model, report.concordance) for report in reports])
    folder = Path(folder)
    return [save_figure(figure, folder / f"concordance.{kind}") for kind in formats]


def report_rows(report: Report) -> list[tuple[Any, ...]]:
    """Return one row per fold and metric, in the order of REPORT_COLUMNS; fold "all" is pooled."""
    head = (report.model, report.protocol, "yes" if report.leakage else "no")
    rows: list[tuple[Any, ...]] = []
    for name, interval in (("harrell_c", report.concordance), ("uno_c", report.uno)):
        if interval is not None:
            bounds = (interval.estimate, interval.low, interval.high, interval.level)
            rows.append((*head, "all", name, *bounds))
    single = (
        ("harrell_c_mean_of_folds", report.mean_of_folds),
        ("harrell_c_sd_of_folds", report.sd_of_folds),
        ("integrated_brier", report.integrated_brier),
        ("mean_auc", report.mean_auc),
        ("logrank_p", None if report.logrank is None else report.logrank.pvalue),
        ("patients", report.n_patients),
        ("events", report.n_events),
    )
    rows += [(*head, "all", *pair, None, None, None) for pair in single if pair[1] is not None]
    for fold in report.folds:
        if (c := fold.concordance) is not None:
            rows.append((*head, fold.fold, "harrell_c", c.estimate, c.low, c.high, c.level))
        single = (
            ("uno_c", fold.uno),
            ("tau", fold.tau),
            ("events_before_tau", fold.events_before_tau),
            ("integrated_brier", fold.integrated_brier),
            ("mean_auc", fold.mean_auc),
            ("logrank_p", None if fold.logrank is None else fold.logrank.pvalue),
            ("patients", fold.n_patients),
            ("events", fold.n_events),
        )
        rows += [
            (*head, fold.fold, *pair, None, None, None) for pair in single if pair[1] is not None
        ]
    return rows


def report_markdown(report: Report) -> str:
    """Return the report as Markdown; what leaks comes before any number."""
    lines = [f"# {report.model}, {report.endpoint}", ""]
    if report.leakage:
        lines += [f"> **This protocol leaks ({report.protocol}).** {report.leakage}", ""]
    kind = "repeated splits" if report.repeated else "folds"
    lines += [
        f"Protocol `{report.protocol}`; {len(report.folds)} {kind}, {report.n_patients} patients, "
        f"{report.n_units} units, {report.n_events} patients with the event.",
        "",
        "| metric | value |",
        "|---|---|",
        f"| Harrell's C | {interval_text(report.concordance)} |",
        f"| mean of folds (sd) | {_number(report.mean_of_folds)} ({_number(report.sd_of_folds)}) |",
        f"| Uno's C | {'-' if report.uno is None else interval_text(report.uno)} |",
        f"| integrated Brier score | {_number(report.integrated_brier)} |",
        f"| time-dependent AUC | {_number(report.mean_auc)} |",
        f"| log-rank p | {'-' if report.logrank is None else f'{report.logrank.pvalue:.3g}'} |",
        "",
        "| fold | patients | events | train | C | Uno's C | tau | events before tau | IBS | AUC |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(_fold_line(fold) for fold in report.folds),
        "",
        f"Interval: {report.concordance.method}. tau in {report.time_unit}.",
        "",
        *(f"* {note}" for note in report.notes),
    ]
    return "\n".join(lines) + "\n"


def comparison_markdown(comparison: Comparison) -> str:
    """Return the comparison as Markdown."""
    lines = [
        "# Differences in Harrell's C",
        "",
        "| model | against | difference | p | p (Holm) |",
        "|---|---|---|---|---|",
    ]
    for pair in comparison.pairs:
        d = pair.difference
        lines.append(
            f"| {pair.model_a} | {pair.model_b} | {d.estimate:+.3f} [{d.low:+.3f}, {d.high:+.3f}] "
            f"| {d.pvalue:.3g} | {pair.adjusted_pvalue:.3g} |"
        )
    lines += ["", f"Method: {comparison.pairs[0].difference.method}.", ""]
    lines += [f"* {note}" for note in comparison.notes]
    return "\n".join(lines) + "\n"


def interval_text(interval: Interval) -> str:
    """Return "0.612 [0.540, 0.689]", or the estimate alone where there is no interval."""
    if interval.low is None:
        return f"{interval.estimate:.3f} (no interval)"
    return f"{interval.estimate:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def _fold_line(fold: FoldReport) -> str:
    cells = [
        fold.fold,
        str(fold.n_patients),
        str(fold.n_events),
        str(fold.n_train),
        "-" if fold.concordance is None else interval_text(fold.concordance),
        _number(fold.uno),
        "-" if fold.tau is None else f"{fold.tau:.1f}",
        "-" if fold.events_before_tau is None else str(fold.events_before_tau),
        _number(fold.integrated_brier),
        _number(fold.mean_auc),
    ]
    return f"| {' | '.join(cells)} |"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _csv(rows: Sequence[Sequence[Any]]) -> str:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(
        ["" if value is None else value for value in row] for row in rows
    )
    return stream.getvalue()


def _write(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
