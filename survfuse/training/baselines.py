"""What a run is compared with: other models on its folds, and what single modalities add up to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from survfuse.evaluation.predictions import FoldPredictions, PatientTable, Predictions
from survfuse.training.config import UNIMODAL, CoordinationConfig, ModelConfig, TrainConfig
from survfuse.training.config_files import ConfigError
from survfuse.training.tasks import LINEAR, survival_only, survival_task

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from survfuse.data.cohort import Cohort


def baseline_config(config: TrainConfig, name: str, modalities: list[str]) -> TrainConfig:
    """The configuration of a baseline: the same data, protocol and seeds, another model.

    Args:
        config: the run it is compared with.
        name: one of `survfuse.training.config.BASELINES`, a model also as "<name>:<preset>", or
            "only:<modality>".
        modalities: those the cohort has.

    Raises:
        ConfigError: "only:<modality>" names another.
    """
    kind, _, rest = name.partition(":")
    if kind == "only":
        if rest not in modalities:
            raise ConfigError(
                f'evaluation.baselines holds "{name}"; the modalities are {", ".join(modalities)}'
            )
        data = dataclasses.replace(config.data, modalities=(rest,))
        single = config.evaluation.single_models.get(rest)
        if single is not None:
            config = other_model(config, single)
        config = dataclasses.replace(config, data=data)
    else:
        config = other_model(config, ModelConfig(name=kind, preset=rest or None))
    return dataclasses.replace(
        config,
        evaluation=dataclasses.replace(
            config.evaluation, baselines=(), single_models={}, missing=(), figures=False
        ),
        title=name,
    )


def other_model(config: TrainConfig, model: ModelConfig) -> TrainConfig:
    """The configuration with another model: whatever belongs to the run's own model goes.

    Raises:
        ConfigError: the model knows survival only, and the configuration has no such task.
    """
    evaluation = config.evaluation
    if model.name in LINEAR:
        if survival_task(config) is None:
            raise ConfigError(f"{model.name} knows survival only, but tasks has none of that kind")
        config = survival_only(config)
        evaluation = dataclasses.replace(evaluation, missing=())
    return dataclasses.replace(
        config, model=model, coordination=CoordinationConfig(), evaluation=evaluation
    )


def baseline_configs(config: TrainConfig, modalities: list[str]) -> dict[str, TrainConfig]:
    """Every baseline that is trained, by name; those "unimodal_by_patient" is made of come along.

    Raises:
        ConfigError: a baseline does not fit the modalities, or would have the name of the run; a
            single model is of no modality, or of none that is asked for.
    """
    names = list(config.evaluation.baselines)
    for name in config.evaluation.single_models:
        if name not in modalities:
            raise ConfigError(
                f'evaluation.single_models holds "{name}"; the modalities are '
                f"{', '.join(modalities)}"
            )
        if UNIMODAL not in names and f"only:{name}" not in names:
            raise ConfigError(
                f'evaluation.single_models holds "{name}", but evaluation.baselines holds neither '
                f'"only:{name}" nor "{UNIMODAL}"'
            )
    if UNIMODAL in names:
        if len(modalities) < 2:
            raise ConfigError(
                f'evaluation.baselines holds "{UNIMODAL}", but the only modality is '
                f"{modalities[0]}; it needs two"
            )
        names += [only for m in modalities if (only := f"only:{m}") not in names]
        names.remove(UNIMODAL)
    found = {name: baseline_config(config, name, modalities) for name in names}
    for name, baseline in found.items():
        if baseline.label == config.label:
            raise ConfigError(
                f'evaluation.baselines holds "{name}", the name of the run itself; give the run a '
                "title of its own"
            )
    return found


def unimodal_by_patient(
    singles: Mapping[str, Predictions], cohort: Cohort, *, model: str = UNIMODAL
) -> Predictions:
    """The comparator under missing modalities: every patient by what the patient has.

    A single-modality model's risk becomes its rank among that model's training risks of rows that
    have the modality, in [0, 1], ties counting one half; a row's risk is the mean rank over the
    modalities it has, so a row with one has the rank by that one. The mean needs no choice between
    the models of a row that has several, which no early-stopping set would be there to make in
    every protocol. A row without any is put in the middle.

    Args:
        singles: predictions of the model of each modality, of the same folds and rows.
        cohort: says which row has what; it holds every row of `singles`.
        model: name of the comparator.
    """
    row_of = {unit: row for row, unit in enumerate(cohort.unit_ids)}
    first = next(iter(singles.values()))
    folds = []
    for k, fold in enumerate(first.folds):
        parts = {name: single.folds[k] for name, single in singles.items()}
        train, test = (
            _by_patient(parts, cohort, row_of, part, getattr(fold, part))
            for part in ("train", "test")
        )
        folds.append(FoldPredictions(fold.fold, test, train))
    return dataclasses.replace(first, model=model, head="risk", folds=folds)


def _by_patient(
    parts: Mapping[str, FoldPredictions],
    cohort: Cohort,
    row_of: Mapping[str, int],
    part: str,
    table: PatientTable,
) -> PatientTable:
    total, count = np.zeros(len(table)), np.zeros(len(table))
    for name, fold in parts.items():
        present = cohort.present(name)
        known = present[_rows(row_of, fold.train.unit_ids)]
        there = present[_rows(row_of, table.unit_ids)]
        rank = training_rank(_risks(getattr(fold, part), table), fold.train.risk[known])
        total += np.where(there, rank, 0.0)
        count += there
    risk = np.where(count > 0, total / np.maximum(count, 1), 0.5)
    return dataclasses.replace(table, risk=risk, logits=None)


def training_rank(risk: NDArray[np.float64], training: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share of the training risks below each risk, ties counting one half; .5 without any.

    Example:
        >>> training_rank(np.array([0.0, 1.0, 5.0]), np.array([1.0, 2.0])).tolist()
        [0.0, 0.25, 1.0]
    """
    if training.size == 0:
        return np.full(risk.shape, 0.5)
    ordered = np.sort(training)
    below = np.searchsorted(ordered, risk, side="left")
    return (below + np.searchsorted(ordered, risk, side="right")) / (2 * training.size)


def _rows(row_of: Mapping[str, int], units: Sequence[str]) -> NDArray[np.int64]:
    return np.array([row_of[unit] for unit in units], dtype=np.int64)


def _risks(own: PatientTable, wanted: PatientTable) -> NDArray[np.float64]:
    """Risks of one table in the order of another."""
    position = {unit: k for k, unit in enumerate(own.unit_ids)}
    return own.risk[_rows(position, wanted.unit_ids)]
