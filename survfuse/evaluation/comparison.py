"""Compare several models on the same test patients."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from survfuse.evaluation.concordance import concordance_index
from survfuse.evaluation.intervals import (
    FEWEST_EVENTS,
    TRAINING_VARIANCE_NOTE,
    Difference,
    Fold,
    check_settings,
    corrected_t,
    holm,
    paired_difference,
    patient_events,
)
from survfuse.evaluation.predictions import FoldPredictions, Predictions
from survfuse.evaluation.report import REPEATED_NOTE, split_sizes


@dataclass(frozen=True)
class ModelPair:
    """Concordance of model a minus that of model b."""

    model_a: str
    model_b: str
    difference: Difference
    adjusted_pvalue: float  # Holm, over all pairs of the comparison


@dataclass(frozen=True)
class Comparison:
    """All pairs of several models, or every model against the first."""

    models: tuple[str, ...]
    pairs: tuple[ModelPair, ...]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return plain dictionaries, lists and numbers."""
        return {
            "models": list(self.models),
            "pairs": [
                {
                    "model_a": pair.model_a,
                    "model_b": pair.model_b,
                    **pair.difference._asdict(),
                    "adjusted_pvalue": pair.adjusted_pvalue,
                }
                for pair in self.pairs
            ],
            "notes": list(self.notes),
        }


def compare(
    runs: Sequence[Predictions],
    *,
    against_first: bool = False,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Compare Harrell's C between models that were tested on the same units in the same folds.

    k folds: paired bootstrap of patients. Repeated splits: corrected t over the splits'
    differences. Rows may come in any order; they are matched by fold and unit.

    Args:
        runs: at least two, with different model names.
        against_first: only pairs with the first run, for one candidate against baselines.
        resamples, level, seed: of the bootstrap, see `paired_difference`.

    Raises:
        ValueError: fewer than two runs, a name twice, a setting that is not valid, or two runs
            that differ in folds, units, patients or outcomes.
        ImportError: scipy is not installed (repeated splits).
    """
    check_settings(resamples, level)
    if len(runs) < 2:
        raise ValueError(f"runs holds {len(runs)} model(s); a comparison needs at least two")
    names = [run.model for run in runs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two runs are named {twice!r}; give each model its own name")
    aligned = [_aligned(runs[0], run) for run in runs]
    indices = list(itertools.combinations(range(len(runs)), 2))
    if against_first:
        indices = [pair for pair in indices if pair[0] == 0]
    if runs[0].repeated:
        sizes = split_sizes(runs[0])
        found = [_over_splits(aligned[a], aligned[b], sizes, level) for a, b in indices]
        note = REPEATED_NOTE
    else:
        found = [
            paired_difference(aligned[a], aligned[b], resamples=resamples, level=level, seed=seed)
            for a, b in indices
        ]
        note = TRAINING_VARIANCE_NOTE
    adjusted = holm([difference.pvalue for difference in found])
    notes = [note, f"p-values are Holm-adjusted over {len(indices)} comparisons."]
    events = patient_events(aligned[0])
    if events < FEWEST_EVENTS:
        notes.append(
            f"{events} patients with an event are fewer than {FEWEST_EVENTS}: too few for the "
            "intervals and p-values of differences to mean much."
        )
    for run in runs:
        if run.leakage:
            notes.append(f"LEAKAGE ({run.model}, {run.protocol}): {run.leakage}")
    pairs = tuple(
        ModelPair(names[a], names[b], difference, float(pvalue))
        for (a, b), difference, pvalue in zip(indices, found, adjusted)
    )
    return Comparison(tuple(names), pairs, tuple(notes))


def _over_splits(
    folds_a: list[Fold], folds_b: list[Fold], sizes: tuple[float, float], level: float
) -> Difference:
    values = [
        concordance_index(a.risk, time=a.time, event=a.event)
        - concordance_index(b.risk, time=b.time, event=b.event)
        for a, b in zip(folds_a, folds_b)
    ]
    result = corrected_t(values, n_train=sizes[0], n_test=sizes[1], level=level)
    method = f"Nadeau-Bengio corrected t over {len(values)} splits"
    return Difference(result.mean, result.low, result.high, result.pvalue, level, method)


def _aligned(first: Predictions, run: Predictions) -> list[Fold]:
    """Return the run's test folds in the first run's order of folds and units."""
    own = {fold.fold: fold for fold in run.folds}
    wanted = [fold.fold for fold in first.folds]
    if set(own) != set(wanted):
        raise ValueError(
            f"{first.model} has the folds {', '.join(wanted)}, {run.model} has "
            f"{', '.join(own)}; a paired comparison needs the same folds"
        )
    return [_aligned_fold(first.model, fold, run.model, own[fold.fold]) for fold in first.folds]


def _aligned_fold(model_a: str, a: FoldPredictions, model_b: str, b: FoldPredictions) -> Fold:
    where = f"fold {a.fold}: {model_a} and {model_b}"
    position = {name: k for k, name in enumerate(b.test.unit_ids)}
    differing = sorted(set(a.test.unit_ids) ^ set(position))
    if differing:
        raise ValueError(
            f"{where} were tested on different units: {len(differing)} are in one of them only "
            f"(first: {differing[0]})"
        )
    rows = np.array([position[name] for name in a.test.unit_ids])
    patients = np.array(b.test.patient_ids)[rows]
    same = (
        (b.test.time[rows] == a.test.time)
        & (b.test.event[rows] == a.test.event)
        & (patients == np.array(a.test.patient_ids))
    )
    if not same.all():
        unit = a.test.unit_ids[int(np.flatnonzero(~same)[0])]
        raise ValueError(f"{where} differ in patient, time or event of {unit}")
    return Fold(b.test.risk[rows], a.test.time, a.test.event, patients)
