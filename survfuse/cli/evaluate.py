"""`survfuse evaluate`: reports on runs, and paired comparisons between them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from survfuse.evaluation.predictions import Predictions


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
    One run: Harrell's and Uno's C, Brier score, AUC, log-rank test, each with what it rests on:
        survfuse evaluate runs/kirp

    \b
    A model against baselines, paired by patient and fold, with Holm-adjusted p-values:
        survfuse evaluate runs/kirp runs/kirp/baselines/clinical_cox runs/other --out tables
    """
    from survfuse.evaluation.comparison import compare
    from survfuse.evaluation.report import evaluate
    from survfuse.evaluation.report_files import (
        models_markdown,
        report_markdown,
        write_comparison,
        write_concordance_figure,
        write_kaplan_meier,
        write_report,
    )

    predictions = _named([_load(run) for run in runs], runs)
    settings = {"resamples": resamples, "level": level, "seed": seed}
    reports = [evaluate(one, **settings) for one in predictions]
    comparison = None
    if len(predictions) > 1:
        comparison = compare(predictions, against_first=not all_pairs, **settings)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        if comparison is None:
            write_report(reports[0], out)
            if not predictions[0].repeated:
                try:
                    write_kaplan_meier(predictions[0], out)
                except ValueError as error:
                    # the report stands without the figure
                    typer.echo(f"no Kaplan-Meier figure: {error}", err=True)
        else:
            write_comparison(comparison, out)
            write_concordance_figure(reports, out)
    if as_json:
        found = {"reports": [report.as_dict() for report in reports]}
        if comparison is not None:
            found["comparison"] = comparison.as_dict()
        print(json.dumps(found, indent=2, allow_nan=False))
        return
    if comparison is None:
        print_markdown(report_markdown(reports[0]))
    else:
        print_markdown(models_markdown(reports, comparison))


def _load(run: Path) -> Predictions:
    from survfuse.evaluation.predictions import Predictions

    if not run.is_dir():
        raise FileNotFoundError(f"there is no run folder {run}")
    if not (run / "predictions.json").is_file():
        raise FileNotFoundError(
            f"{run} holds no predictions.json; is the run finished? "
            f"`survfuse train --resume {run}` goes on with one that is not"
        )
    return Predictions.load(run)


def _named(predictions: Sequence[Predictions], runs: Sequence[Path]) -> list[Predictions]:
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
