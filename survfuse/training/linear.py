"""Cox baselines: age and sex, and an elastic net over every table column."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from survfuse.data.splits import Split
from survfuse.training.config import TrainConfig
from survfuse.training.config_files import ConfigError

if TYPE_CHECKING:
    from survfuse.data.cohort import Cohort
    from survfuse.data.prepared import PreparedCohort
    from survfuse.models.cox import CoxRegression

CLINICAL = ("age", "is_female")


def development_rows(config: TrainConfig, split: Split) -> np.ndarray:
    """Training rows and those a neural model watches to stop early.

    Cox regression, which watches none, learns from all of them, so it has seen the same patients as
    the model it is compared with; censoring weights, truncation and risk groups of both come from
    them too. Where a protocol watches the test rows, only the training rows are taken.
    """
    if config.protocol.validation == "test":
        return np.asarray(split.train)
    return np.sort(np.concatenate([split.train, split.validation]).astype(np.int64))


def fit_cox(
    config: TrainConfig, cohort: Cohort, prepared: PreparedCohort, train: np.ndarray, seed: int
) -> tuple[np.ndarray, dict[str, Any]]:
    """Fit a Cox baseline and score all rows.

    Args:
        config: `model.name` is "clinical_cox" or "elastic_net_cox"; `model.settings` are arguments
            of `survfuse.models.CoxRegression`.
        cohort: gives the clinical covariates.
        prepared: gives the table columns, imputed, clipped and scaled as the protocol says.
        train: rows to fit on, see `development_rows`.
        seed: of the inner folds that choose the strength of the penalty.

    Returns:
        risk [n] of all rows, higher = earlier event; and what was fitted, as JSON can hold it.

    Raises:
        ConfigError: a setting is wrong, or the cohort lacks what the baseline needs.
    """
    if config.model.name == "clinical_cox":
        values, names = _clinical(cohort, train)
        settings = {"strength": 0.0, **config.model.settings}
    else:
        # with ten columns to a patient a mostly quadratic penalty keeps groups of genes together;
        # a half-and-half one often keeps none
        values, names = _columns(prepared)
        settings = {"strength": None, "l1_ratio": 0.1, **config.model.settings}
    patients = np.asarray(cohort.patient_ids)
    model = _make(settings, seed)
    model.fit(
        values[train],
        time=cohort.time[train],
        event=cohort.event[train],
        patient=patients[train],
    )
    nonzero = np.flatnonzero(model.coefficients)
    return model.risk(values), {
        "strength": model.strength_,
        "columns": len(names),
        "coefficients": {names[i]: float(model.coefficients[i]) for i in nonzero},
    }


def check_linear(config: TrainConfig, prepared: PreparedCohort) -> None:
    """Raise unless a Cox baseline has its columns, and settings that are arguments of it.

    Raises:
        ConfigError: says what is missing or wrong.
    """
    check_settings(config.model.settings)
    if config.model.name == "clinical_cox":
        _clinical_names(prepared.cohort)
    elif not any(kind == "table" for kind, _ in prepared.channels().values()):
        raise ConfigError("model.name is elastic_net_cox, but the cohort has no table")


def check_settings(settings: dict[str, Any]) -> None:
    """Raise unless `settings` are arguments of a Cox regression.

    Raises:
        ConfigError: names the first that is not, or what its value must be.
    """
    known = ("strength", "l1_ratio", "ties", "n_strengths", "n_folds", "max_iterations")
    for name in settings:
        if name not in known:
            raise ConfigError(
                f"model.settings.{name} is not a setting; valid names here: {', '.join(known)}"
            )
    try:
        _make(settings, seed=0)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model.settings: {error}") from None


def _make(settings: dict[str, Any], seed: int) -> CoxRegression:
    from survfuse.models.cox import CoxRegression

    return CoxRegression(seed=seed, **settings)


def _clinical(cohort: Cohort, train: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Age and sex; unknown values become the training mean."""
    names = _clinical_names(cohort)
    values = cohort.covariate_matrix(names)
    with warnings.catch_warnings():
        # a column unknown in every training row has no mean; it becomes 0 below
        warnings.simplefilter("ignore", RuntimeWarning)
        mean = np.nanmean(values[train], axis=0)
    filled = np.where(np.isnan(values), np.nan_to_num(mean), values)
    # a constant column (one sex only) has nothing to say and no finite coefficient of its own
    varies = np.ptp(filled[train], axis=0) > 0
    if not varies.any():
        raise ConfigError(f"{' and '.join(names)} are constant in the training rows")
    return filled[:, varies], [name for name, keep in zip(names, varies) if keep]


def _clinical_names(cohort: Cohort) -> list[str]:
    names = [name for name in CLINICAL if name in cohort.covariates.columns]
    if not names:
        raise ConfigError(
            "model.name is clinical_cox, but the cohort has neither of the covariates "
            f"{' and '.join(CLINICAL)}"
        )
    return names


def _columns(prepared: PreparedCohort) -> tuple[np.ndarray, list[str]]:
    """Every table column as the models see it; rows of an absent table are at the mean, 0."""
    parts, names = [], []
    for name, (kind, _) in prepared.channels().items():
        if kind == "table":
            parts.append(prepared.table(name).values.numpy().astype(np.float64))
            names += list(prepared.features(name))
    return np.concatenate(parts, axis=1), names
