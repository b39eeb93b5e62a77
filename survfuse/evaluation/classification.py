"""Metrics of predicted classes and levels, pooled over folds, with bootstrap intervals.

The class that a model names is the one of highest probability. AUC compares units within a fold
only, because probabilities of different folds come from different models; the other metrics are of
the confusion matrix summed over folds. docs/statistics.md, "Classes and levels".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from survfuse.evaluation.intervals import FEWEST_EVENTS, Interval, check_settings
from survfuse.extras import require

_CELLS_PER_BLOCK = 1 << 22
METRICS = ("auc", "balanced_accuracy", "macro_f1", "quadratic_kappa")


class ClassedUnits(NamedTuple):
    """The test units of one fold whose class is known."""

    label: NDArray[np.int64]  # [n] class
    probabilities: NDArray[np.float64]  # [n, K]
    patient: Sequence[str]  # [n]


def class_aucs(label: ArrayLike, probabilities: ArrayLike) -> NDArray[np.float64]:
    """Area under the ROC curve of each class against the rest, [K]; of two classes the second's.

    P(p_i > p_j) for i of the class and j of another, ties counted one half.

    Returns:
        [K], or [1] for two classes; NaN for a class that no unit or every unit is of.
    """
    labels, values = np.asarray(label), np.asarray(probabilities)
    roc_auc_score = require("sklearn.metrics", extra="train").roc_auc_score
    found = []
    for k in _scored_classes(values.shape[1]):
        own = labels == k
        defined = own.any() and not own.all()
        found.append(roc_auc_score(own, values[:, k]) if defined else np.nan)
    return np.array(found, dtype=np.float64)


def macro_auc(label: ArrayLike, probabilities: ArrayLike) -> float:
    """Mean of `class_aucs` over the classes that have one; NaN where none has.

    Args:
        label: [n] classes.
        probabilities: [n, K].

    Example:
        >>> macro_auc([0, 0, 1], [[0.9, 0.1], [0.4, 0.6], [0.2, 0.8]])
        1.0
    """
    return _mean(class_aucs(label, probabilities))


def balanced_accuracy(label: ArrayLike, probabilities: ArrayLike) -> float:
    """Mean over the classes that occur of the share of their units that are named right."""
    labels, named = _named(label, probabilities)
    if labels.size == 0:
        return float("nan")
    recall_score = require("sklearn.metrics", extra="train").recall_score
    # over classes that occur, as balanced_accuracy_score, which warns of the others
    return float(recall_score(labels, named, labels=np.unique(labels), average="macro"))


def macro_f1(label: ArrayLike, probabilities: ArrayLike) -> float:
    """Mean over the classes that occur of F1 = 2 TP / (2 TP + FP + FN)."""
    labels, named = _named(label, probabilities)
    if labels.size == 0:
        return float("nan")
    f1_score = require("sklearn.metrics", extra="train").f1_score
    occur = np.unique(labels)
    return float(f1_score(labels, named, labels=occur, average="macro", zero_division=0.0))


def quadratic_kappa(label: ArrayLike, probabilities: ArrayLike) -> float:
    """Cohen's kappa of ordered levels, a disagreement weighing its squared distance.

    NaN where all units are of one level: there is nothing to agree on beyond chance.

    Source: Cohen (1968), Psychol. Bull. 70, 213-220.
    """
    labels, named = _named(label, probabilities)
    if np.unique(labels).size < 2:
        return float("nan")
    cohen_kappa_score = require("sklearn.metrics", extra="train").cohen_kappa_score
    levels = np.arange(np.shape(probabilities)[1])
    return float(cohen_kappa_score(labels, named, labels=levels, weights="quadratic"))


def confusion_of(folds: Sequence[ClassedUnits]) -> NDArray[np.int64]:
    """[K, K] units by true class (row) and named class (column), summed over folds."""
    ones = [np.ones((1, len(fold.label))) for fold in folds]
    return _confusions(folds, ones)[0].round().astype(np.int64)


def pooled_metrics(folds: Sequence[ClassedUnits], *, ordinal: bool) -> dict[str, float]:
    """Every metric over all folds, NaN where it is not defined.

    AUC: of each class, the folds' AUC weighted by their pairs, then the mean over classes; the
    others of all units together. `quadratic_kappa` for levels only.
    """
    label = np.concatenate([fold.label for fold in folds])
    values = np.concatenate([fold.probabilities for fold in folds])
    n_classes = values.shape[1]
    agreeing = np.zeros(len(_scored_classes(n_classes)))
    pairs = np.zeros_like(agreeing)
    for fold in folds:
        own = np.array([(fold.label == k).sum() for k in _scored_classes(n_classes)])
        weight = own * (len(fold.label) - own)
        aucs = class_aucs(fold.label, fold.probabilities)
        agreeing += np.where(weight > 0, aucs, 0.0) * weight
        pairs += weight
    found = {
        "auc": _mean(_ratio(agreeing, pairs)),
        "balanced_accuracy": balanced_accuracy(label, values),
        "macro_f1": macro_f1(label, values),
    }
    if ordinal:
        found["quadratic_kappa"] = quadratic_kappa(label, values)
    return found


def metric_intervals(
    folds: Sequence[ClassedUnits],
    *,
    ordinal: bool,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
    minimum_patients: int = FEWEST_EVENTS,
) -> dict[str, Interval | None]:
    """Every metric with a percentile bootstrap interval, None where it is not defined.

    Within each fold the patients of each class are resampled apart, so every resample has the
    fold's numbers of patients of each class. All units of a patient are drawn together; the class
    of a patient's first unit decides.

    Args:
        folds: one per test fold.
        ordinal: the classes are ordered levels.
        resamples: number of bootstrap resamples, at least 100.
        level: coverage.
        seed: of the resampling.
        minimum_patients: with fewer tested patients of a class that occurs, no interval is given.

    Raises:
        ValueError: a setting is not valid.

    Cost: resamples x units^2 multiplications per fold and class (2000 x 114^2: under 0.1 s).
    """
    check_settings(resamples, level)
    estimates = pooled_metrics(folds, ordinal=ordinal)
    method = f"percentile bootstrap of patients within folds, stratified by class, B = {resamples}"
    rarest = min(patients_by_class(folds).values())
    if rarest < minimum_patients:
        note = f"No interval: {rarest} patients of the rarest class are fewer than "
        note += f"{minimum_patients}."
        return {
            name: None if np.isnan(value) else Interval(value, None, None, level, method, note)
            for name, value in estimates.items()
        }
    counts = _resample_counts(folds, resamples, seed)
    values = _resampled(folds, counts, ordinal=ordinal)
    tail = 100 * (1 - level) / 2
    found: dict[str, Interval | None] = {}
    for name, estimate in estimates.items():
        if np.isnan(estimate):
            found[name] = None
            continue
        low, high = np.nanpercentile(values[name], [tail, 100 - tail])
        found[name] = Interval(estimate, float(low), float(high), level, method, "")
    return found


def patients_by_class(folds: Sequence[ClassedUnits]) -> dict[int, int]:
    """Tested patients of every class that occurs, a patient counted once per fold."""
    found: dict[int, int] = {}
    for fold in folds:
        for k in _patients(fold)[1]:
            found[int(k)] = found.get(int(k), 0) + 1
    return dict(sorted(found.items()))


def _resampled(
    folds: Sequence[ClassedUnits], counts: list[NDArray[np.float64]], *, ordinal: bool
) -> dict[str, NDArray[np.float64]]:
    """Every metric of every resample, [R] each; `counts` [R, n] per fold."""
    confusion = _confusions(folds, counts)
    right = np.einsum("rkk->rk", confusion)
    true, named = confusion.sum(axis=2), confusion.sum(axis=1)
    found = {
        "auc": _resampled_auc(folds, counts),
        "balanced_accuracy": np.nanmean(_ratio(right, true), axis=1),
        # classes that do not occur have no F1, as if they had no row
        "macro_f1": np.nanmean(np.where(true > 0, _ratio(2 * right, true + named), np.nan), axis=1),
    }
    if ordinal:
        levels = np.arange(confusion.shape[1])
        distance = (levels[:, None] - levels) ** 2
        chance = np.einsum("ri,rj->rij", true, named) / true.sum(axis=1)[:, None, None]
        observed = (confusion * distance).sum(axis=(1, 2))
        found["quadratic_kappa"] = 1 - _ratio(observed, (chance * distance).sum(axis=(1, 2)))
    return found


def _resampled_auc(
    folds: Sequence[ClassedUnits], counts: list[NDArray[np.float64]]
) -> NDArray[np.float64]:
    aucs = []
    for k in _scored_classes(folds[0].probabilities.shape[1]):
        agreeing, pairs = np.zeros(len(counts[0])), np.zeros(len(counts[0]))
        for fold, drawn in zip(folds, counts):
            own = fold.label == k
            score, others = fold.probabilities[own, k], fold.probabilities[~own, k]
            mine, theirs = drawn[:, own], drawn[:, ~own]
            pairs += mine.sum(axis=1) * theirs.sum(axis=1)
            step = max(1, _CELLS_PER_BLOCK // max(1, score.size, len(drawn)))
            for first in range(0, others.size, step):
                block = others[first : first + step]
                above = (score[:, None] > block) + 0.5 * (score[:, None] == block)
                agreeing += np.einsum("rj,rj->r", mine @ above, theirs[:, first : first + step])
        aucs.append(_ratio(agreeing, pairs))
    columns = np.stack(aucs, axis=1)
    # classes without a pair, in every resample alike, are left out
    defined = ~np.isnan(columns).all(axis=0)
    if not defined.any():
        return columns[:, 0]
    return np.nanmean(columns[:, defined], axis=1)


def _confusions(
    folds: Sequence[ClassedUnits], counts: list[NDArray[np.float64]]
) -> NDArray[np.float64]:
    """[R, K, K] summed over folds."""
    n_classes = folds[0].probabilities.shape[1]
    total = np.zeros((len(counts[0]), n_classes**2))
    for fold, drawn in zip(folds, counts):
        labels, named = _named(fold.label, fold.probabilities)
        total += drawn @ np.eye(n_classes**2)[labels * n_classes + named]
    return total.reshape(-1, n_classes, n_classes)


def _resample_counts(
    folds: Sequence[ClassedUnits], resamples: int, seed: int
) -> list[NDArray[np.float64]]:
    """How often each unit is drawn, [R, n] per fold; depends on patients and classes only."""
    generator = np.random.default_rng(seed)
    drawn = []
    for fold in folds:
        patient, strata = _patients(fold)
        counts = np.zeros((resamples, strata.size))
        for stratum in np.unique(strata):
            members = np.flatnonzero(strata == stratum)
            even = np.full(members.size, 1 / members.size)
            counts[:, members] = generator.multinomial(members.size, even, size=resamples)
        drawn.append(counts[:, patient])
    return drawn


def _patients(fold: ClassedUnits) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The patient of every unit [n], and the class of every patient's first unit."""
    _, first, patient = np.unique(np.asarray(fold.patient), return_index=True, return_inverse=True)
    return patient, fold.label[first]


def _named(label: ArrayLike, probabilities: ArrayLike) -> tuple[NDArray, NDArray]:
    """True and named classes, [n] each; of equal probabilities the first class is named."""
    values = np.asarray(probabilities)
    return np.asarray(label, dtype=np.int64), values.argmax(axis=1).astype(np.int64)


def _scored_classes(n_classes: int) -> range:
    """Of two classes one curve says it all."""
    return range(1, 2) if n_classes == 2 else range(n_classes)


def _ratio(above: NDArray[np.float64], below: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(above, below, out=np.full(np.shape(above), np.nan), where=below > 0)


def _mean(values: NDArray[np.float64]) -> float:
    """The mean of what is known, NaN of nothing."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")
