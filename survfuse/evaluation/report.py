"""From predictions to a report: every metric with what it rests on, or why it is missing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import numpy as np

from survfuse.evaluation.censoring import evaluation_times, truncation_time
from survfuse.evaluation.concordance import uno_concordance, uno_weights
from survfuse.evaluation.curves import LogRank, logrank_test
from survfuse.evaluation.intervals import (
    FEWEST_EVENTS,
    Fold,
    Interval,
    check_settings,
    concordance_interval,
    corrected_t,
)
from survfuse.evaluation.metrics import cumulative_dynamic_auc, integrated_brier_score
from survfuse.evaluation.predictions import FoldPredictions, Predictions

_T = TypeVar("_T")
REPEATED_NOTE = (
    "Patients are tested in several splits: the interval is the Nadeau-Bengio corrected t over "
    "splits; a bootstrap of pooled patients would count them several times."
)


@dataclass(frozen=True)
class FoldReport:
    """One test fold. None: could not be computed; `notes` says why."""

    fold: str
    n_units: int
    n_patients: int
    n_events: int  # patients with the event
    n_train: int  # patients
    concordance: Interval | None = None
    tau: float | None = None
    events_before_tau: int | None = None
    uno: float | None = None
    integrated_brier: float | None = None
    mean_auc: float | None = None
    logrank: LogRank | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """One model under one protocol. None: could not be computed; `notes` says why."""

    model: str
    protocol: str
    leakage: str
    endpoint: str
    time_unit: str
    n_patients: int
    n_units: int
    n_events: int
    repeated: bool
    concordance: Interval
    mean_of_folds: float
    sd_of_folds: float | None
    uno: Interval | None
    integrated_brier: float | None
    mean_auc: float | None
    logrank: LogRank | None
    folds: tuple[FoldReport, ...]
    notes: tuple[str, ...] = field(default=())

    def as_dict(self) -> dict[str, Any]:
        """Return plain dictionaries, lists, numbers and None."""
        values = asdict(self)
        values["logrank"] = None if self.logrank is None else self.logrank._asdict()
        for name in ("concordance", "uno"):
            interval = getattr(self, name)
            values[name] = None if interval is None else interval._asdict()
        for fold, own in zip(self.folds, values["folds"]):
            own["concordance"] = None if fold.concordance is None else fold.concordance._asdict()
            own["logrank"] = None if fold.logrank is None else fold.logrank._asdict()
            own["notes"] = list(fold.notes)
        values["folds"] = list(values["folds"])
        values["notes"] = list(self.notes)
        return values


def evaluate(
    predictions: Predictions,
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
    minimum_events: int = FEWEST_EVENTS,
) -> Report:
    """Evaluate one model.

    k folds: Harrell's and Uno's C pool pairs within folds, with a stratified patient bootstrap.
    Repeated splits (a patient is tested more than once): means over splits with a corrected t.
    Integrated Brier score: mean over folds weighted by patients; AUC: by events before tau.

    Args:
        predictions: what the model predicted.
        resamples, level, seed, minimum_events: of the intervals, see `concordance_interval`.

    Raises:
        TypeError: `predictions` is something else.
        ValueError: a setting is not valid, or no fold holds a comparable pair of patients.
        ImportError: scipy is not installed.

    Cost: about 0.1 s for 400 patients and 2000 resamples.
    """
    if not isinstance(predictions, Predictions):
        raise TypeError(
            f"predictions is {predictions!r}; it must be Predictions: Predictions.load(folder) "
            "reads those of a run"
        )
    check_settings(resamples, level)
    settings: dict[str, Any] = {
        "resamples": resamples,
        "level": level,
        "seed": seed,
        "minimum_events": minimum_events,
    }
    folds = [_evaluate_fold(predictions, fold, settings) for fold in predictions.folds]
    scored = [fold for fold in folds if fold.concordance is not None]
    if not scored:
        raise ValueError(
            f"{predictions.model}: no fold can be scored: "
            + "; ".join(note for fold in folds for note in fold.notes)
        )
    values = np.array([fold.concordance.estimate for fold in scored])
    concordance = _summary(
        predictions, values, [bootstrap_fold(fold) for fold in predictions.folds], settings
    )
    uno = _uno_summary(predictions, folds, settings)
    logrank, logrank_note = _pooled_logrank(predictions)
    units = {name for fold in predictions.folds for name in fold.test.unit_ids}
    events = {
        name: bool(seen)
        for fold in predictions.folds
        for name, seen in zip(fold.test.patient_ids, fold.test.event)
    }
    return Report(
        model=predictions.model,
        protocol=predictions.protocol,
        leakage=predictions.leakage,
        endpoint=predictions.endpoint,
        time_unit=predictions.time_unit,
        n_patients=len(events),
        n_units=len(units),
        n_events=sum(events.values()),
        repeated=predictions.repeated,
        concordance=concordance,
        mean_of_folds=float(values.mean()),
        sd_of_folds=float(values.std(ddof=1)) if values.size > 1 else None,
        uno=uno,
        integrated_brier=_weighted_mean(
            [(fold.integrated_brier, fold.n_patients) for fold in folds]
        ),
        mean_auc=_weighted_mean([(fold.mean_auc, fold.events_before_tau) for fold in folds]),
        logrank=logrank,
        folds=tuple(folds),
        notes=_notes(predictions, folds, concordance, logrank_note),
    )


def bootstrap_fold(fold: FoldPredictions, *, tau: float | None = None) -> Fold:
    """Return a fold's test units for the bootstrap; with `tau`, weighted for Uno's C."""
    test, train = fold.test, fold.train
    weight = None
    if tau is not None:
        weight = uno_weights(
            time=test.time, event=test.event, train_time=train.time, train_event=train.event,
            tau=tau,
        )  # fmt: skip
    return Fold(test.risk, test.time, test.event, np.array(test.patient_ids), weight)


def risk_groups(
    predictions: Predictions,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return label -> (time, event) of low- and high-risk test patients, pooled over folds.

    High risk is above the median risk of the fold's training patients; a patient's risk is the
    mean over the patient's units.

    Raises:
        ValueError: a fold has no training risks, patients are tested in several folds, or one
            group is empty.
    """
    if predictions.repeated:
        raise ValueError(
            "patients are tested in several splits; pooled risk groups would count them twice"
        )
    parts = [_split_by_median(fold) for fold in predictions.folds]
    groups = {}
    for label, wanted in (("low risk", False), ("high risk", True)):
        time = np.concatenate([time[high == wanted] for time, _, high in parts])
        event = np.concatenate([event[high == wanted] for _, event, high in parts])
        if time.size == 0:
            raise ValueError(
                f"no test patient is in the {label} group when cut at the training median"
            )
        groups[label] = (time, event)
    return groups


def _split_by_median(fold: FoldPredictions) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if fold.train.risk is None:
        raise ValueError(
            f"fold {fold.fold}: no training risks were given, so risk groups have no cut"
        )
    _, _, train_risk = fold.train.per_patient()
    time, event, risk = fold.test.per_patient()
    return time, event, risk > np.median(train_risk)


def _evaluate_fold(
    predictions: Predictions, fold: FoldPredictions, settings: dict[str, Any]
) -> FoldReport:
    test, train = fold.test, fold.train
    notes: list[str] = []

    def attempt(name: str, compute: Callable[[], _T]) -> _T | None:
        # the tables were checked when they were made: what fails here is a fold too small
        try:
            return compute()
        except ValueError as error:
            notes.append(f"fold {fold.fold}: no {name}: {error}")
            return None

    outcome = {
        "time": test.time, "event": test.event,
        "train_time": train.time, "train_event": train.event,
    }  # fmt: skip
    values: dict[str, Any] = {
        "concordance": attempt(
            "C", lambda: concordance_interval([bootstrap_fold(fold)], **settings)
        )
    }
    truncation = attempt("truncation time", lambda: truncation_time(**outcome))
    if truncation is not None:
        values["tau"], values["events_before_tau"] = truncation.tau, truncation.events_before
        uno = attempt("Uno's C", lambda: uno_concordance(test.risk, tau=truncation.tau, **outcome))
        values["uno"] = None if uno is None else uno.index
        grid = attempt(
            "Brier score and AUC",
            lambda: evaluation_times(time=test.time, event=test.event, tau=truncation.tau),
        )
        if grid is not None:
            auc = attempt("AUC", lambda: cumulative_dynamic_auc(test.risk, times=grid, **outcome))
            values["mean_auc"] = None if auc is None else auc.mean
            curves = predictions.curves(fold)
            if curves is not None:
                values["integrated_brier"] = attempt(
                    "Brier score",
                    lambda: integrated_brier_score(curves.at(grid), times=grid, **outcome),
                )
    if train.risk is not None:
        values["logrank"] = attempt("log-rank test", lambda: _fold_logrank(fold))
    events = {name for name, seen in zip(test.patient_ids, test.event) if seen}
    return FoldReport(
        fold=fold.fold,
        n_units=len(test),
        n_patients=len(set(test.patient_ids)),
        n_events=len(events),
        n_train=len(set(train.patient_ids)),
        notes=tuple(notes),
        **values,
    )


def _fold_logrank(fold: FoldPredictions) -> LogRank:
    time, event, high = _split_by_median(fold)
    if high.all() or not high.any():
        raise ValueError("all test patients are on one side of the training median")
    return logrank_test([(time[~high], event[~high]), (time[high], event[high])])


def _pooled_logrank(predictions: Predictions) -> tuple[LogRank | None, str]:
    try:
        return logrank_test(list(risk_groups(predictions).values())), ""
    except ValueError as error:
        return None, f"No pooled log-rank test: {error}."


def _uno_summary(
    predictions: Predictions, folds: Sequence[FoldReport], settings: dict[str, Any]
) -> Interval | None:
    scored = [
        (report.uno, bootstrap_fold(fold, tau=report.tau))
        for fold, report in zip(predictions.folds, folds)
        if report.uno is not None
    ]
    if not scored:
        return None
    values = np.array([value for value, _ in scored])
    return _summary(predictions, values, [fold for _, fold in scored], settings)


def _summary(
    predictions: Predictions,
    values: np.ndarray,
    folds: list[Fold],
    settings: dict[str, Any],
) -> Interval:
    """Return the pooled index of k folds, or the mean over repeated splits."""
    if not predictions.repeated:
        return concordance_interval(folds, **settings)
    level, mean = settings["level"], float(values.mean())
    method = f"mean over {values.size} splits, Nadeau-Bengio corrected t"
    if values.size < 2:
        return Interval(mean, None, None, level, method, "No interval: a single split was scored.")
    n_train, n_test = split_sizes(predictions)
    result = corrected_t(values, n_train=n_train, n_test=n_test, level=level)
    return Interval(mean, result.low, result.high, level, method, REPEATED_NOTE)


def split_sizes(predictions: Predictions) -> tuple[float, float]:
    """Return the mean numbers of training and test patients per fold."""
    train = [len(set(fold.train.patient_ids)) for fold in predictions.folds]
    test = [len(set(fold.test.patient_ids)) for fold in predictions.folds]
    return float(np.mean(train)), float(np.mean(test))


def _weighted_mean(pairs: Sequence[tuple[float | None, float | None]]) -> float | None:
    known = [(value, weight) for value, weight in pairs if value is not None and weight]
    if not known:
        return None
    values, weights = np.array(known, dtype=np.float64).T
    return float(values @ weights / weights.sum())


def _notes(
    predictions: Predictions,
    folds: Sequence[FoldReport],
    concordance: Interval,
    logrank_note: str,
) -> tuple[str, ...]:
    notes = []
    both = {name for fold in predictions.folds for name in fold.straddling()}
    if both:
        notes.append(f"{len(both)} patients are in training and test of the same split.")
    notes.append(concordance.note)
    if any(fold.n_units > fold.n_patients for fold in folds):
        notes.append(
            "C, Uno's C, Brier score and AUC compare units (slides), several of which may be one "
            "patient's; resampling, risk groups and the log-rank test take patients."
        )
    if predictions.head == "risk":
        notes.append("No Brier score: this model gives a risk but no survival curve.")
    if predictions.head == "cox" and any(f.train.risk is None for f in predictions.folds):
        notes.append("No Brier score: a Cox model's baseline needs the training risks.")
    if logrank_note:
        notes.append(logrank_note)
    return (*notes, *(note for fold in folds for note in fold.notes))
