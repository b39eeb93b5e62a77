"""Which rows each fold trains on, watches and tests, as the protocol says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from survfuse.data.splits import (
    Split,
    check_patients_whole,
    patient_folds,
    random_row_splits,
    read_splits,
    site_preserving_folds,
    with_inner_validation,
)
from survfuse.training.config import TrainConfig
from survfuse.training.tasks import watched_outcome

if TYPE_CHECKING:
    from survfuse.data.cohort import Cohort


class FoldPlan(NamedTuple):
    """One model to be trained: its seed, its fold and its rows."""

    seed: int
    fold: int
    split: Split


def plan_folds(config: TrainConfig, cohort: Cohort, given: Split | None) -> list[FoldPlan]:
    """Every model of a run, seeds outermost.

    Args:
        config: protocol, seeds and where published splits lie.
        cohort: the rows.
        given: the split that came with the cohort, if its source brings one.

    Raises:
        ValueError: the protocol asks for a split that the cohort cannot give, or a patient
            straddles a split of a protocol that promises whole patients.
        FileNotFoundError: no published split files.
    """
    plans = []
    shared = None if config.protocol.split == "rows" else _folds(config, cohort, given)
    for seed in config.training.seeds:
        # a random row split is drawn anew for every seed; everything else stays fixed
        folds = random_row_splits(len(cohort), seeds=[seed]) if shared is None else shared
        for fold, split in enumerate(folds):
            watched = _with_validation(config, cohort, split, fold)
            _check(config, cohort, watched, fold)
            plans.append(FoldPlan(seed, fold, watched))
    return plans


def _folds(config: TrainConfig, cohort: Cohort, given: Split | None) -> list[Split]:
    protocol = config.protocol
    if protocol.split == "given":
        if given is None:
            raise ValueError(
                f'protocol.split is "given", but data.source {config.data.source} brings no split; '
                'use "published", "patients", "sites" or "rows"'
            )
        return [given]
    if protocol.split == "published":
        folds = read_splits(published_folder(config))
        try:
            return [fold.rows(cohort.patient_ids, mismatch=protocol.mismatch) for fold in folds]
        except ValueError as error:
            if protocol.mismatch == "drop":
                raise
            # the only thing that can be wrong here; its message names the argument in Python
            raise ValueError(f"{error}; in a configuration: protocol.mismatch: drop") from None
    if protocol.split == "sites":
        if "site" not in cohort.covariates.columns:
            raise ValueError('protocol.split is "sites", but the cohort has no covariate site')
        return site_preserving_folds(
            cohort.patient_ids,
            [str(site) for site in cohort.covariates["site"]],
            cohort.event,
            n_folds=protocol.n_folds,
            seed=protocol.fold_seed,
        )
    return patient_folds(
        cohort.patient_ids, cohort.event, n_folds=protocol.n_folds, seed=protocol.fold_seed
    )


def published_folder(config: TrainConfig) -> Path:
    """Where the published split files of the cohort lie below `data.folder`."""
    if config.data.folder is None:
        raise ValueError("data.folder is not set; published splits are read from <folder>/splits")
    folder = Path(config.data.folder)
    if config.data.source == "survpath":
        return folder / "survpath" / f"splits_tcga_{config.data.cohort}"
    return folder / "splits" / f"tcga_{config.data.cohort}"


def _with_validation(config: TrainConfig, cohort: Cohort, split: Split, fold: int) -> Split:
    protocol = config.protocol
    nobody = np.empty(0, dtype=np.int64)
    worth = watched_outcome(config, cohort)
    if protocol.validation == "split":
        if len(split.validation) == 0:
            raise ValueError(
                'protocol.validation is "split", but the split names no validation rows; '
                'use "inner" or "none"'
            )
        return split
    inner = int(worth[split.validation].sum())
    if protocol.validation == "inner" and inner >= protocol.min_inner_events:
        return split
    everybody = np.sort(np.concatenate([split.train, split.validation]).astype(np.int64))
    if protocol.validation == "test":
        return Split(everybody, split.test, split.test)
    if protocol.validation == "none" or len(split.validation):
        return Split(everybody, nobody, split.test)
    return with_inner_validation(
        Split(everybody, nobody, split.test),
        cohort.patient_ids,
        worth,
        fraction=protocol.inner_fraction,
        min_events=protocol.min_inner_events,
        seed=protocol.fold_seed + fold,
    )


def _check(config: TrainConfig, cohort: Cohort, split: Split, fold: int) -> None:
    if config.protocol.split == "rows":
        return
    parts = split
    if config.protocol.validation == "test":
        parts = split._replace(validation=split.validation[:0])
    check_patients_whole(parts, cohort.patient_ids, source=f"fold {fold}")
