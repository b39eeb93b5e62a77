"""`survfuse evaluate`: reports on runs, and paired comparisons between them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

_T = TypeVar("_T")


def evaluate_command(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Run folders, or folders with predictions.csv and predictions.json."),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write report or comparison files here.")
    ] = None,
    all_pairs: Annotated[
        bool, typer.Option("--all-pairs", help="Compare every pair, not only with the first run.")
    ] = False,
    resamples: Annotated[int, typer.Option(help="Bootstrap resamples of an interval.")] = 2000,
    level: Annotated[float, typer.Option(help="Coverage of an interval.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Seed of the resamples.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Report on one run, or compare several that were tested on the same patients.

    Needs no model and no GPU: everything is computed from the runs' predictions.

    \b
    One run: Harrell's and Uno's C, Brier score, AUC, log-rank test, each with what it rests on,
    and AUC, balanced accuracy, macro F1 and quadratic kappa of each of its class tasks:
        survfuse evaluate runs/kirp

    \b
    A model against baselines, paired by patient and fold, with Holm-adjusted p-values:
        survfuse evaluate runs/kirp runs/kirp/baselines/clinical_cox runs/other --out tables
    """
    settings = {"resamples": resamples, "level": level, "seed": seed}
    tasks = _check_runs(runs)
    survival = [run for run in runs if (run / "predictions.json").is_file()]
    text, found = [], {}
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    if survival:
        text.append(_survival(survival, out, all_pairs, settings, found))
    for task in tasks:
        text.append(_classes(task, runs, out, settings, found))
    if as_json:
        print(json.dumps(found, indent=2, allow_nan=False))
    else:
        print_markdown("\n".join(text))


def _survival(
    runs: Sequence[Path],
    out: Path | None,
    all_pairs: bool,
    settings: dict[str, Any],
    found: dict[str, Any],
) -> str:
    """Report on the survival task of one run, or compare that of several; Markdown."""
    from survfuse.evaluation.comparison import compare
    from survfuse.evaluation.model_comparison import models_markdown
    from survfuse.evaluation.predictions import Predictions
    from survfuse.evaluation.report import evaluate
    from survfuse.evaluation.report_files import (
        report_markdown,
        write_comparison,
        write_concordance_figure,
        write_kaplan_meier,
        write_report,
    )

    predictions = _named([Predictions.load(run) for run in runs], runs)
    reports = [evaluate(one, **settings) for one in predictions]
    found["reports"] = [report.as_dict() for report in reports]
    if len(predictions) == 1:
        if out is not None:
            write_report(reports[0], out)
            if not predictions[0].repeated:
                try:
                    write_kaplan_meier(predictions[0], out)
                except ValueError as error:
                    # the report stands without the figure
                    typer.echo(f"no Kaplan-Meier figure: {error}", err=True)
        return report_markdown(reports[0])
    comparison = compare(predictions, against_first=not all_pairs, **settings)
    found["comparison"] = comparison.as_dict()
    if out is not None:
        write_comparison(comparison, out)
        write_concordance_figure(reports, out)
    return models_markdown(reports, comparison)


def _classes(
    task: str,
    runs: Sequence[Path],
    out: Path | None,
    settings: dict[str, Any],
    found: dict[str, Any],
) -> str:
    """Report on a class task of one run, or tabulate that of the runs that have it; Markdown."""
    from survfuse.evaluation.class_predictions import ClassPredictions, class_tasks_in
    from survfuse.evaluation.class_report import (
        class_report_markdown,
        class_table,
        evaluate_classes,
        write_class_report,
    )

    having = [run for run in runs if task in class_tasks_in(run)]
    predictions = _named([ClassPredictions.load(run, task) for run in having], having)
    reports = [evaluate_classes(one, **settings) for one in predictions]
    found.setdefault("class_reports", {})[task] = [report.as_dict() for report in reports]
    if len(reports) == 1:
        if out is not None:
            write_class_report(reports[0], out)
        return class_report_markdown(reports[0])
    return f"# {task}\n\n{class_table(reports)}"


def _check_runs(runs: Sequence[Path]) -> list[str]:
    """The class tasks that any run has; raises for a folder without predictions."""
    from survfuse.evaluation.class_predictions import class_tasks_in

    tasks: dict[str, None] = {}
    for run in runs:
        if not run.is_dir():
            raise FileNotFoundError(f"there is no run folder {run}")
        own = class_tasks_in(run)
        if not own and not (run / "predictions.json").is_file():
            raise FileNotFoundError(
                f"{run} holds no predictions.json; is the run finished? "
                f"`survfuse train --resume {run}` goes on with one that is not"
            )
        tasks.update(dict.fromkeys(own))
    return list(tasks)


def _named(predictions: Sequence[_T], runs: Sequence[Path]) -> list[_T]:
    """Each with a name of its own; where two are named alike, their folders tell them apart."""
    names = [one.model for one in predictions]
    folders = [run.resolve().name for run in runs]
    if len(set(zip(names, folders))) < len(runs):
        folders = [str(run) for run in runs]
    return [
        dataclasses.replace(one, model=f"{one.model} ({folder})")
        if names.count(one.model) > 1
        else one
        for one, folder in zip(predictions, folders)
    ]


def print_markdown(text: str) -> None:
    """Rendered on a terminal, as it is into a file or pipe."""
    from rich.console import Console
    from rich.markdown import Markdown

    console = Console()
    if console.is_terminal:
        console.print(Markdown(text))
    else:
        print(text, end="")
