"""The report of a run: metrics with intervals, baselines beside it, oracles, figures."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from survfuse.evaluation.class_predictions import ClassPredictions
from survfuse.evaluation.class_report import ClassReport, evaluate_classes, write_class_report
from survfuse.evaluation.comparison import Comparison, compare
from survfuse.evaluation.intervals import Fold, pooled_concordance
from survfuse.evaluation.predictions import Predictions
from survfuse.evaluation.report import Report, evaluate
from survfuse.evaluation.report_files import (
    write_comparison,
    write_concordance_figure,
    write_kaplan_meier,
)
from survfuse.evaluation.report_files import write_report as write_report_files
from survfuse.training.config import TrainConfig
from survfuse.training.folds import FoldPlan
from survfuse.training.protocols import quirks
from survfuse.training.run_folder import RunFolder, write_json
from survfuse.training.tasks import survival_task

if TYPE_CHECKING:
    from survfuse.data.cohort import Cohort


def write_reports(
    folder: RunFolder,
    config: TrainConfig,
    cohort: Cohort,
    predictions: Predictions,
    *,
    oracles: Mapping[str, float] | None = None,
    baselines: Mapping[str, Report] | None = None,
    baseline_predictions: Mapping[str, Predictions] | None = None,
) -> tuple[Report, Comparison | None]:
    """Evaluate a run, compare it with its baselines and write everything into its folder.

    Args:
        folder: where the files go.
        config: number of resamples, level, figures.
        cohort: its notes are repeated in the report.
        predictions: of the run.
        oracles: C of the best possible risks on the test rows, for simulated cohorts.
        baselines, baseline_predictions: reports and predictions of the baselines, by name.

    Returns:
        The report, and the comparison with the baselines (None without any).

    Raises:
        ValueError: no fold holds a comparable pair of patients.
    """
    settings = config.evaluation
    report = evaluate(
        predictions, resamples=settings.bootstrap, level=settings.level, seed=settings.seed
    )
    notes = [*cohort.notes, *quirks(config)]
    if oracles:
        score = oracle_score(report.concordance.estimate, oracles["full"])
        write_json(folder.path / "oracle.json", {"concordance": dict(oracles), "score": score})
        notes.append(
            f"The best possible risk reaches C {oracles['full']:.3f} on these rows; "
            f"(C - .5) / (best - .5) is {score:.2f}."
        )
    if config.notes:
        notes.append(config.notes)
    report = dataclasses.replace(report, notes=(*notes, *report.notes))
    write_report_files(report, folder.path)
    comparison = None
    if baseline_predictions:
        runs = [predictions, *baseline_predictions.values()]
        comparison = compare(
            runs,
            against_first=True,
            resamples=settings.bootstrap,
            level=settings.level,
            seed=settings.seed,
        )
        write_comparison(comparison, folder.path)
    if settings.figures:
        _figures(folder, predictions, [report, *(baselines or {}).values()])
    return report, comparison


def write_class_reports(
    folder: RunFolder,
    config: TrainConfig,
    cohort: Cohort,
    predictions: Mapping[str, ClassPredictions],
) -> dict[str, ClassReport]:
    """Evaluate every class task of a run and write `report_<task>.json` and `.md`.

    A run without a survival task has its first class task's as `report.json` and `.md` too.

    Args:
        folder: where the files go.
        config: number of resamples, level.
        cohort: its notes are repeated in the reports.
        predictions: of the run, by task.

    Returns:
        The reports by task, in the order of the configuration.
    """
    settings, found = config.evaluation, {}
    notes = [*cohort.notes, *quirks(config), *([config.notes] if config.notes else [])]
    for task, own in predictions.items():
        report = evaluate_classes(
            own, resamples=settings.bootstrap, level=settings.level, seed=settings.seed
        )
        found[task] = dataclasses.replace(report, notes=(*notes, *report.notes))
        write_class_report(found[task], folder.path)
    if found and survival_task(config) is None:
        write_class_report(next(iter(found.values())), folder.path, name="report")
    return found


def oracle_concordance(
    cohort: Cohort, plans: list[FoldPlan], risks: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """C of the best risk under each kind of ignorance, on the test rows of all folds."""
    found = {}
    for name, risk in risks.items():
        folds = [
            Fold(risk[rows], cohort.time[rows], cohort.event[rows])
            for rows in (plan.split.test for plan in plans)
        ]
        found[name] = pooled_concordance(folds)
    return found


def oracle_score(concordance: float, oracle: float) -> float:
    """Share of what can be known that a model knows: 0 for chance, 1 for the oracle."""
    return (concordance - 0.5) / (oracle - 0.5)


def _figures(folder: RunFolder, predictions: Predictions, reports: list[Report]) -> None:
    folder.figures.mkdir(exist_ok=True)
    # a long title beside the axes would leave no room for them
    labelled = [
        dataclasses.replace(report, model=textwrap.fill(report.model, 28)) for report in reports
    ]
    write_concordance_figure(labelled, folder.figures)
    try:
        write_kaplan_meier(predictions, folder.figures)
    except ValueError as error:
        # repeated splits and one-sided risks have no two groups; say so where the figure would be
        reason: dict[str, Any] = {"kaplan_meier": str(error)}
        write_json(folder.figures / "missing.json", reason)
