"""What `survfuse train` and `survfuse demo` print while a run goes on and at its end."""

from __future__ import annotations

import math
import sys
import time
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from survfuse.training.config import TrainConfig
    from survfuse.training.run import RunResult


class Display:
    """Progress of a run: bars on a terminal, one line per model elsewhere.

    Args:
        quiet: print nothing.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._console = Console(stderr=True)
        self._quiet = quiet
        self._live = not quiet and self._console.is_terminal
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
        )
        self._task: Any = None
        self._fold: dict[str, Any] = {}
        self._last: dict[str, Any] = {}
        self._restart = ""
        self._began = time.monotonic()

    def __enter__(self) -> Display:
        if self._live:
            self._bars.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._end_of_fold()
        if self._live:
            self._bars.stop()

    def __call__(self, event: dict[str, Any]) -> None:
        """Take in an event of `survfuse.training.fit`."""
        if self._quiet:
            return
        if event["kind"] == "fold":
            self._end_of_fold()
            self._fold, self._last, self._began = event, {}, time.monotonic()
            self._restart = ""
            if self._live:
                self._task = self._bars.add_task(self._title(), total=event["epochs"], note="")
        elif event["kind"] == "epoch":
            self._last = event
            if self._live and self._task is not None:
                self._bars.update(self._task, completed=event["epoch"], note=_epoch_note(event))

        elif event["kind"] == "restart":
            self._restart = f"kept training {event['number']} of {event['of']}"

    def _end_of_fold(self) -> None:
        """Leave one line per model behind, so that 20 seeds stay readable."""
        if not self._fold or self._quiet:
            return
        seconds = time.monotonic() - self._began
        # of several trainings the last is rarely the one that counts
        note = self._restart or (_epoch_note(self._last) if self._last else "fitted")
        epochs = f"{self._last['epoch']} epochs, " if self._last else ""
        if self._live and self._task is not None:
            self._bars.remove_task(self._task)
        self._console.print(
            f"{self._title()}: {epochs}{seconds:.1f} s, {note}", markup=False, highlight=False
        )
        self._fold, self._task = {}, None

    def _title(self) -> str:
        fold = self._fold
        place = f"({fold['number']}/{fold['of']})"
        return f"{fold['name']}, seed {fold['seed']} fold {fold['fold']} {place}"


def _epoch_note(record: dict[str, Any]) -> str:
    parts = [f"loss {record['train_loss']:.3f}"]
    if "validation_loss" in record:
        parts.append(f"validation loss {record['validation_loss']:.3f}")
    for key, value in record.items():
        name = key.removeprefix("validation_")
        if name == key or name.endswith("loss") or math.isnan(value):
            continue
        parts.append(f"{'C' if name == 'c_index' else name.replace('_', ' ')} {value:.3f}")
    return ", ".join(parts)


def print_result(result: RunResult) -> None:
    """The run and its baselines with intervals, differences, leaks, and where the files are."""
    console = Console()
    if result.predictions is not None:
        console.print(_survival_table(result))
    for task in result.class_reports:
        console.print(_class_table(result, task))
    if result.report.leakage:
        console.print(f"This protocol leaks: {result.report.leakage}", markup=False)
    reports = [result.report, *result.class_reports.values()]
    for note in dict.fromkeys(note for report in reports for note in report.notes):
        console.print(f"* {note}", markup=False, highlight=False)
    console.print(f"everything is in {result.folder}", markup=False, highlight=False)


def _survival_table(result: RunResult) -> Table:
    """Concordance and Brier score of the run and of those baselines that predict survival."""
    from survfuse.evaluation.report_files import interval_text

    reports = [result.report, *(baseline.report for baseline in result.baselines.values())]
    table = Table(title=f"{result.report.endpoint}, protocol {result.report.protocol}")
    table.add_column("model")
    table.add_column("C-index [95 %]" if result.report.concordance.level == 0.95 else "C-index")
    if result.oracles:
        table.add_column("of the oracle's")
    table.add_column("Brier")
    if result.comparison:
        table.add_column("run minus this")
    pairs = result.comparison.pairs if result.comparison else ()
    differences = {pair.model_b: pair.difference for pair in pairs}
    for report in reports:
        cells = [report.model, interval_text(report.concordance)]
        if result.oracles:
            from survfuse.training.report import oracle_score

            score = oracle_score(report.concordance.estimate, result.oracles["full"])
            cells.append(f"{100 * score:.0f} %")
        cells.append("-" if report.integrated_brier is None else f"{report.integrated_brier:.3f}")
        if result.comparison:
            found = differences.get(report.model)
            cells.append(
                ""
                if found is None
                else f"{found.estimate:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
            )
        table.add_row(*(cell.replace("[", r"\[") for cell in cells))
    if result.oracles:
        blanks = [""] * (len(table.columns) - 3)
        table.add_row("oracle", f"{result.oracles['full']:.3f}", "100 %", *blanks)
    return table


def _class_table(result: RunResult, task: str) -> Table:
    """The metrics of a class task of the run and of those baselines that have it."""
    from survfuse.evaluation.class_report import TITLES, metrics_of
    from survfuse.evaluation.report_files import interval_text

    runs = [result, *result.baselines.values()]
    reports = [run.class_reports[task] for run in runs if task in run.class_reports]
    table = Table(title=f"{task}, protocol {reports[0].protocol}")
    names = metrics_of(reports[0])
    for column in ("model", *(TITLES[name] for name in names)):
        table.add_column(column)
    for report in reports:
        found = [getattr(report, name) for name in names]
        cells = ["-" if one is None else interval_text(one).replace("[", r"\[") for one in found]
        table.add_row(report.model.replace("[", r"\["), *cells)
    return table


def print_plan(config: TrainConfig) -> None:
    """What a configuration would run: cohort, folds, events, leaks."""
    import numpy as np

    from survfuse.training.model import NEURAL, build_model
    from survfuse.training.protocols import leaks, quirks
    from survfuse.training.run import plan_run
    from survfuse.training.sources import load_cohort
    from survfuse.training.tasks import survival_task

    loaded = load_cohort(config)
    run = plan_run(config, loaded)
    cohort = loaded.cohort
    about = cohort.summary()
    out = sys.stdout
    print(
        f"cohort {about['name']}: {about['units']} rows, {about['patients']} patients, "
        f"{about['events']} rows with the event, median time {about['median_time']:.1f} months",
        file=out,
    )
    for name, modality in about["modalities"].items():
        print(
            f"  {name}: {modality['kind']}, {modality['channels']} channels, "
            f"present in {modality['present']} rows",
            file=out,
        )
    print(f"protocol {config.protocol.name}: {len(run.folds)} models", file=out)
    for plan in run.folds:
        parts = (
            f"{name} {len(rows)} ({int(np.asarray(cohort.event)[rows].sum())} events)"
            for name, rows in zip(("train", "validation", "test"), plan.split)
        )
        print(f"  seed {plan.seed} fold {plan.fold}: {', '.join(parts)}", file=out)
    for name, target in cohort.targets.items():
        counts = ", ".join(f"{n} {one}" for one, n in target.counts().items())
        print(f"  task {name}: {counts}, {int((~target.known).sum())} rows unknown", file=out)
    if survival_task(config) is not None:
        edges = ", ".join(f"{edge:.1f}" for edge in run.first.edges[1:-1])
        print(f"time bins of the first model end at {edges} months", file=out)
    if config.model.name in NEURAL:
        model = build_model(config, run.first)
        n_parameters = sum(parameter.numel() for parameter in model.parameters())
        print(f"model {config.model.name}: {n_parameters:,} parameters", file=out)
    for sentence in leaks(config):
        print(f"leaks: {sentence}", file=out)
    for sentence in [*cohort.notes, *quirks(config)]:
        print(f"note: {sentence}", file=out)
