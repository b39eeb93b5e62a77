"""Score patients a run has never seen, where their outcome is known and where it is not."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from survfuse.evaluation.intervals import Fold, Interval, concordance_interval
from survfuse.training.predictions import fold_name, load_any

if TYPE_CHECKING:
    import pandas as pd

ENSEMBLE = "mean of all models"
# columns of a frame of predictions that are not predicted
ABOUT = ("seed", "fold", "unit_id", "patient_id", "time", "event")


class ExternalScores(NamedTuple):
    """What `survfuse.training.predict` gave, by patient."""

    # one row per patient: patient_id, time, event, models, and means of risk and probabilities
    patients: pd.DataFrame
    # by model of the run, and of the mean; empty without outcomes or a survival task
    concordance: dict[str, Interval]
    n_known: int  # patients whose outcome is known


def external_scores(
    frame: pd.DataFrame, *, resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> ExternalScores:
    """Means of every patient over models and rows, and C where outcomes are known.

    Models that were trained on the same loss give risks on scales that are alike, not the same;
    their mean is taken as it is. Probabilities of classes are averaged alike.

    Args:
        frame: of `survfuse.training.predict`.
        resamples, level, seed: of the intervals, see `concordance_interval`.

    Returns:
        The patients in order of appearance; C of each model and of the mean over the patients of
        known outcome, {} where they hold no comparable pair or the models predict no survival.
    """
    predicted = [c for c in frame.columns if c not in ABOUT and not re.fullmatch(r"logit_\d+", c)]
    about = {"time": ("time", "first"), "event": ("event", "first")}
    means = {column: (column, "mean") for column in predicted}
    by_model = frame.groupby(["seed", "fold", "patient_id"], sort=False).agg(**about, **means)
    by_model = by_model.reset_index()
    patients = by_model.groupby("patient_id", sort=False).agg(
        **about, **means, models=("seed", "size")
    )
    patients = patients.reset_index()
    n_known = int(patients["time"].notna().sum())
    if "risk" not in predicted:
        return ExternalScores(patients, {}, n_known)
    tables = {fold_name(*key): part for key, part in by_model.groupby(["seed", "fold"], sort=False)}
    if len(tables) > 1:
        tables[ENSEMBLE] = patients
    settings = {"resamples": resamples, "level": level, "seed": seed}
    found = {}
    for name, table in tables.items():
        fold = _known(table)
        if _comparable(fold):
            found[name] = concordance_interval([fold], **settings)
    return ExternalScores(patients, found, n_known)


def trained_on(folder: str | os.PathLike[str], patients: set[str]) -> set[str]:
    """Which of the patients bear the name of one that the run learned from."""
    seen: set[str] = set()
    for fold in load_any(folder).folds:
        seen |= set(fold.train.patient_ids)
    return patients & seen


def _known(table: pd.DataFrame) -> Fold:
    known = table[table["time"].notna()]
    return Fold(
        known["risk"].to_numpy(dtype=float),
        known["time"].to_numpy(dtype=float),
        known["event"].to_numpy(dtype=float) == 1,
        known["patient_id"].to_numpy(dtype=str),
    )


def _comparable(fold: Fold) -> bool:
    """Whether somebody outlived a patient with the event."""
    return bool(fold.event.any()) and bool(
        (np.asarray(fold.time) > np.asarray(fold.time)[fold.event].min()).any()
    )
