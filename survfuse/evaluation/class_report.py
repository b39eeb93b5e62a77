"""The report of a class task: every metric with what it rests on, or why it is missing."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from survfuse.data.atomic import atomic_path
from survfuse.evaluation.class_predictions import ClassFold, ClassPredictions
from survfuse.evaluation.classification import (
    METRICS,
    ClassedUnits,
    confusion_of,
    metric_intervals,
    patients_by_class,
    pooled_metrics,
)
from survfuse.evaluation.intervals import (
    FEWEST_EVENTS,
    TRAINING_VARIANCE_NOTE,
    Interval,
    check_settings,
    corrected_t,
)
from survfuse.evaluation.report import REPEATED_NOTE
from survfuse.evaluation.report_files import interval_text

TITLES = {
    "auc": "AUC",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "quadratic_kappa": "quadratic kappa",
}


@dataclass(frozen=True)
class ClassFoldReport:
    """One test fold. None: not defined; the report's notes say why."""

    fold: str
    n_units: int  # with a known class
    n_patients: int
    n_train: int  # patients with a known class
    auc: float | None = None
    balanced_accuracy: float | None = None
    macro_f1: float | None = None
    quadratic_kappa: float | None = None


@dataclass(frozen=True)
class ClassReport:
    """One class task of one model. None: not defined, `notes` says why.

    Attributes:
        n_patients, n_units: tested, with a known class; n_unknown: units without one, left out.
        patients: tested patients of each class that occurs.
        auc: of two classes the plain one, of more the mean over classes against the rest.
        quadratic_kappa: of levels; None for classes without an order.
        confusion: units by true class (row) and named class (column).
    """

    model: str
    task: str
    protocol: str
    leakage: str
    classes: tuple[str, ...]
    ordinal: bool
    n_patients: int
    n_units: int
    n_unknown: int
    patients: dict[str, int]
    repeated: bool
    auc: Interval | None
    balanced_accuracy: Interval | None
    macro_f1: Interval | None
    quadratic_kappa: Interval | None
    confusion: tuple[tuple[int, ...], ...]
    folds: tuple[ClassFoldReport, ...]
    notes: tuple[str, ...] = field(default=())

    def as_dict(self) -> dict[str, Any]:
        """Return plain dictionaries, lists, numbers and None."""
        values = asdict(self)
        for name in METRICS:
            interval = getattr(self, name)
            values[name] = None if interval is None else interval._asdict()
        return json.loads(json.dumps(values, allow_nan=False))


def evaluate_classes(
    predictions: ClassPredictions,
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
    minimum_patients: int = FEWEST_EVENTS,
) -> ClassReport:
    """Evaluate one class task of one model, on the tested units whose class is known.

    k folds: metrics pooled over folds with a patient bootstrap within folds. Repeated splits (a
    patient is tested more than once): means over splits with a corrected t.

    Args:
        predictions: what the model predicted.
        resamples, level, seed, minimum_patients: of the intervals, see `metric_intervals`.

    Raises:
        TypeError: `predictions` is something else.
        ValueError: a setting is not valid, or no tested unit has a known class.
        ImportError: scikit-learn is not installed.
    """
    if not isinstance(predictions, ClassPredictions):
        raise TypeError(
            f"predictions is {predictions!r}; it must be ClassPredictions: "
            "ClassPredictions.load(folder, task) reads those of a run"
        )
    check_settings(resamples, level)
    units = [_units(fold) for fold in predictions.folds]
    tested = [fold for fold in units if len(fold.label)]
    if not tested:
        raise ValueError(
            f"{predictions.model}, task {predictions.task}: no tested unit has a known class"
        )
    ordinal, classes = predictions.ordinal, predictions.classes
    single = [pooled_metrics([fold], ordinal=ordinal) if len(fold.label) else {} for fold in units]
    if predictions.repeated:
        found = _over_splits(predictions, [one for one in single if one], level)
    else:
        found = metric_intervals(
            tested,
            ordinal=ordinal,
            resamples=resamples,
            level=level,
            seed=seed,
            minimum_patients=minimum_patients,
        )
    n_units = len({name for fold in predictions.folds for name in fold.test.known().unit_ids})
    every = {name for fold in predictions.folds for name in fold.test.unit_ids}
    return ClassReport(
        model=predictions.model,
        task=predictions.task,
        protocol=predictions.protocol,
        leakage=predictions.leakage,
        classes=classes,
        ordinal=ordinal,
        n_patients=len({name for fold in tested for name in fold.patient}),
        n_units=n_units,
        n_unknown=len(every) - n_units,
        patients=_patients(tested, classes),
        repeated=predictions.repeated,
        **{name: found.get(name) for name in METRICS},
        confusion=tuple(tuple(row) for row in confusion_of(tested).tolist()),
        folds=tuple(
            _fold_report(fold, own, values)
            for fold, own, values in zip(predictions.folds, units, single)
        ),
        notes=_notes(predictions, tested, found),
    )


def class_report_markdown(report: ClassReport) -> str:
    """Return the report as Markdown; what leaks comes before any number."""
    lines = [f"# {report.model}, {report.task}", ""]
    if report.leakage:
        lines += [f"> **This protocol leaks ({report.protocol}).** {report.leakage}", ""]
    names = metrics_of(report)
    kind = "repeated splits" if report.repeated else "folds"
    counts = ", ".join(f"{n} {name}" for name, n in report.patients.items())
    chance = f"balanced accuracy {1 / max(1, len(report.patients)):.3f}"
    lines += [
        f"Protocol `{report.protocol}`; {len(report.folds)} {kind}, {report.n_patients} patients, "
        f"{report.n_units} units ({counts}); {report.n_unknown} units of unknown class left out.",
        "",
        "| metric | value |",
        "|---|---|",
        *(f"| {TITLES[name]} | {_interval(getattr(report, name))} |" for name in names),
        "",
        f"By chance: AUC 0.500, {chance}{', kappa 0' if report.ordinal else ''}.",
        "",
        f"| true, named | {' | '.join(report.classes)} |",
        f"|---|{'---|' * len(report.classes)}",
        *(
            f"| {name} | {' | '.join(str(n) for n in row)} |"
            for name, row in zip(report.classes, report.confusion)
        ),
        "",
        f"| fold | patients | train | {' | '.join(TITLES[name] for name in names)} |",
        f"|---|---|---|{'---|' * len(names)}",
        *(_fold_line(fold, names) for fold in report.folds),
        "",
    ]
    intervals = [getattr(report, name) for name in names]
    method = next((one.method for one in intervals if one and one.low is not None), None)
    if method is not None:
        lines += [f"Interval: {method}.", ""]
    lines += [f"* {note}" for note in report.notes]
    return "\n".join(lines) + "\n"


def write_class_report(
    report: ClassReport, folder: str | os.PathLike[str], *, name: str | None = None
) -> None:
    """Write `<name>.json` and `<name>.md` into an existing folder; by default report_<task>."""
    stem = f"report_{report.task}" if name is None else name
    text = json.dumps(report.as_dict(), indent=2, allow_nan=False) + "\n"
    for suffix, content in (("json", text), ("md", class_report_markdown(report))):
        with atomic_path(Path(folder) / f"{stem}.{suffix}") as temporary:
            temporary.write_text(content, encoding="utf-8")


def class_table(reports: Sequence[ClassReport]) -> str:
    """Return reports of one task as the rows of a Markdown table."""
    names = [name for name in METRICS if any(name in metrics_of(report) for report in reports)]
    lines = [
        f"| model | protocol | {' | '.join(TITLES[name] for name in names)} |",
        f"|---|---|{'---|' * len(names)}",
    ]
    for report in reports:
        protocol = f"{report.protocol}, leaks" if report.leakage else report.protocol
        cells = [_interval(getattr(report, name)) for name in names]
        lines.append(f"| {report.model} | {protocol} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def metrics_of(report: ClassReport) -> tuple[str, ...]:
    """The metrics that a report's kind of task has."""
    return METRICS if report.ordinal else METRICS[:-1]


def _units(fold: ClassFold) -> ClassedUnits:
    known = fold.test.known()
    return ClassedUnits(known.label, known.probabilities, known.patient_ids)


def _patients(tested: list[ClassedUnits], classes: Sequence[str]) -> dict[str, int]:
    """Patients of every class that occurs, each once, in however many folds."""
    of = {name: k for fold in tested for name, k in zip(fold.patient, fold.label.tolist())}
    counts = np.bincount(list(of.values()), minlength=len(classes))
    return {name: int(n) for name, n in zip(classes, counts) if n}


def _fold_report(fold: ClassFold, units: ClassedUnits, values: dict[str, float]) -> ClassFoldReport:
    return ClassFoldReport(
        fold=fold.fold,
        n_units=len(units.label),
        n_patients=len(set(units.patient)),
        n_train=len(set(fold.train.known().patient_ids)),
        **{name: None if np.isnan(value) else value for name, value in values.items()},
    )


def _over_splits(
    predictions: ClassPredictions, single: list[dict[str, float]], level: float
) -> dict[str, Interval | None]:
    """The mean of each metric over repeated splits with the Nadeau-Bengio interval."""
    n_train = float(np.mean([len(set(f.train.known().patient_ids)) for f in predictions.folds]))
    n_test = float(np.mean([len(set(f.test.known().patient_ids)) for f in predictions.folds]))
    found: dict[str, Interval | None] = {}
    for name in single[0]:
        values = np.array([one[name] for one in single if not np.isnan(one[name])])
        if values.size == 0:
            found[name] = None
            continue
        mean = float(values.mean())
        method = f"mean over {values.size} splits, Nadeau-Bengio corrected t"
        if values.size < 2:
            note = "No interval: a single split was scored."
            found[name] = Interval(mean, None, None, level, method, note)
            continue
        t = corrected_t(values, n_train=n_train, n_test=n_test, level=level)
        found[name] = Interval(mean, t.low, t.high, level, method, REPEATED_NOTE)
    return found


def _notes(
    predictions: ClassPredictions,
    tested: list[ClassedUnits],
    found: dict[str, Interval | None],
) -> tuple[str, ...]:
    notes = [interval.note for interval in found.values() if interval is not None and interval.note]
    if not predictions.repeated and not notes:
        notes.append(TRAINING_VARIANCE_NOTE)
    occur = set(patients_by_class(tested))
    without = [name for k, name in enumerate(predictions.classes) if k not in occur]
    if without:
        notes.append(
            f"No tested patient is of {', '.join(without)}: the means over classes leave it out."
        )
    for name, interval in found.items():
        if interval is None:
            notes.append(f"No {TITLES[name]}: all tested patients of a fold are of one class.")
    for fold in predictions.folds:
        label = fold.test.known().label
        if np.unique(label).size < 2:
            what = "one class only" if label.size else "no known class"
            notes.append(f"fold {fold.fold}: its patients are of {what}.")
    if any(len(set(fold.patient)) < len(fold.label) for fold in tested):
        notes.append(
            "Metrics count units (slides), several of which may be one patient's; resampling takes "
            "patients."
        )
    if predictions.repeated:
        notes.append("The confusion table counts a patient once for every split that tests it.")
    return tuple(dict.fromkeys(notes))


def _fold_line(fold: ClassFoldReport, names: Sequence[str]) -> str:
    values = [getattr(fold, name) for name in names]
    cells = [fold.fold, str(fold.n_patients), str(fold.n_train)]
    cells += ["-" if value is None else f"{value:.3f}" for value in values]
    return f"| {' | '.join(cells)} |"


def _interval(interval: Interval | None) -> str:
    return "-" if interval is None else interval_text(interval)
