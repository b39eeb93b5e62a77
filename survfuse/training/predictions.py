"""What models predict, as the tables that evaluation reads and as frames."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from survfuse.evaluation.class_predictions import (
    ClassFold,
    ClassPredictions,
    ClassTable,
    class_tasks_in,
)
from survfuse.evaluation.predictions import FoldPredictions, PatientTable, Predictions
from survfuse.extras import require
from survfuse.training.config import TrainConfig
from survfuse.training.config_files import load_config
from survfuse.training.device import pick_device
from survfuse.training.fold_models import fold_models
from survfuse.training.folds import FoldPlan
from survfuse.training.loop import predict_logits
from survfuse.training.model import NEURAL
from survfuse.training.protocols import leaks
from survfuse.training.run_folder import RunFolder, RunFolderError
from survfuse.training.task_losses import probabilities_of, risk_of
from survfuse.training.tasks import class_tasks, survival_task

if TYPE_CHECKING:
    import pandas as pd

    from survfuse.data.cohort import Cohort
    from survfuse.data.prepared import PreparedCohort


def fold_name(seed: int, fold: int) -> str:
    """The name of one model of a run in tables and reports."""
    return f"seed{seed}-fold{fold}"


def unit_table(
    prepared: PreparedCohort,
    rows: np.ndarray,
    risk: np.ndarray,
    logits: np.ndarray | None = None,
) -> PatientTable:
    """The rows of a cohort with what was predicted for them."""
    cohort = prepared.cohort
    return PatientTable(
        unit_ids=[cohort.unit_ids[row] for row in rows],
        patient_ids=[cohort.patient_ids[row] for row in rows],
        time=cohort.time[rows],
        event=cohort.event[rows],
        risk=risk,
        logits=logits,
    )


class Scored(NamedTuple):
    """Rows of a cohort with what was predicted for them."""

    survival: PatientTable | None  # None for a run without a survival task
    classes: dict[str, ClassTable]  # by task


def score_rows(
    model: torch.nn.Module,
    config: TrainConfig,
    prepared: PreparedCohort,
    rows: np.ndarray,
    device: torch.device,
) -> Scored:
    """Predict rows of a prepared cohort with a neural model; hazards come with their logits."""
    logits = predict_logits(model, prepared, rows, config, device)
    survival, name = None, survival_task(config)
    if name is not None:
        risk = risk_of(logits[name], config).double().numpy()
        hazards = logits[name].double().numpy() if config.loss.name == "nll" else None
        survival = unit_table(prepared, rows, risk, hazards)
    cohort = prepared.cohort
    classes = {
        name: ClassTable(
            unit_ids=[cohort.unit_ids[row] for row in rows],
            patient_ids=[cohort.patient_ids[row] for row in rows],
            label=cohort.targets[name].labels[rows],
            probabilities=probabilities_of(logits[name], task.kind),
        )
        for name, task in class_tasks(config).items()
    }
    return Scored(survival, classes)


def make_predictions(config: TrainConfig, folds: Sequence[FoldPredictions]) -> Predictions:
    """Folds as evaluation reads them, with what the protocol leaks."""
    head = "nll" if config.model.name in NEURAL and config.loss.name == "nll" else "cox"
    return Predictions(
        model=config.label,
        head=head,
        protocol=config.protocol.name,
        folds=folds,
        endpoint=ENDPOINTS[config.data.endpoint],
        leakage=_leakage(config),
    )


def make_class_predictions(
    config: TrainConfig, cohort: Cohort, task: str, folds: Sequence[ClassFold]
) -> ClassPredictions:
    """Folds of a class task as evaluation reads them, with what the protocol leaks."""
    target = cohort.targets[task]
    return ClassPredictions(
        task=task,
        model=config.label,
        protocol=config.protocol.name,
        classes=target.classes,
        folds=folds,
        ordinal=target.ordinal,
        leakage=_leakage(config),
    )


def gather_predictions(
    config: TrainConfig, folder: RunFolder, cohort: Cohort, plans: Sequence[FoldPlan]
) -> tuple[Predictions | None, dict[str, ClassPredictions]]:
    """Join the predictions of all finished folds and write them into the run folder.

    Returns:
        Those of survival, None for a run without, and those of every class task.
    """
    paths = [folder.fold(plan.seed, plan.fold).path for plan in plans]
    survival = None
    if survival_task(config) is not None:
        survival = make_predictions(config, [Predictions.load(path).folds[0] for path in paths])
        survival.save(folder.path)
    classes = {}
    for task in class_tasks(config):
        folds = [ClassPredictions.load(path, task).folds[0] for path in paths]
        classes[task] = make_class_predictions(config, cohort, task, folds)
        classes[task].save(folder.path)
    return survival, classes


def load_any(folder: str | os.PathLike[str]) -> Predictions | ClassPredictions:
    """Predictions of survival, or of a class task for a run without: who was tested on what."""
    tasks = class_tasks_in(folder)
    if tasks and not (Path(folder) / "predictions.json").is_file():
        return ClassPredictions.load(folder, tasks[0])
    return Predictions.load(folder)


def _leakage(config: TrainConfig) -> str:
    return " ".join(f"{sentence[0].upper()}{sentence[1:]}." for sentence in leaks(config))


ENDPOINTS = {
    "OS": "overall survival",
    "DSS": "disease-specific survival",
    "DFI": "disease-free interval",
    "PFI": "progression-free interval",
}


def predict(
    folder: str | os.PathLike[str], cohort: Cohort, *, device: str = "auto"
) -> pd.DataFrame:
    """Score a cohort with every model of a finished run.

    Preprocessing is what each fold fitted on its own training rows.

    Args:
        folder: a run of a neural model.
        cohort: has the modalities the models were trained on, matched by name and column; a
            modality may be absent.
        device: where to compute.

    Returns:
        A frame with one row per seed, fold and row of the cohort: seed, fold, unit_id, patient_id,
        time, event (NaN where the outcome is not known), risk and the logits; of a class task the
        probability of every class, `<task>_<class>`.

    Raises:
        TypeError: `cohort` is no cohort.
        RunFolderError: the run is not finished or has no weights.
        ValueError: the cohort lacks a column that the models need.
    """
    pd = require("pandas", extra="train")
    from survfuse.data.cohort import Cohort

    if not isinstance(cohort, Cohort):
        raise TypeError(f"cohort is {cohort!r}; it must be a survfuse.data.Cohort")

    run = RunFolder(folder)
    if not run.exists:
        raise RunFolderError(f"{run.path} holds no run")
    config = load_config(run.config)
    where = pick_device(device)
    unknown = np.isnan(cohort.time)
    parts = []
    for fold in fold_models(run, config, cohort, where):
        logits = predict_logits(fold.model, fold.prepared, np.arange(len(cohort)), config, where)
        frame = pd.DataFrame(
            {
                "seed": fold.seed,
                "fold": fold.fold,
                "unit_id": cohort.unit_ids,
                "patient_id": cohort.patient_ids,
                "time": cohort.time,
                # a bool cannot say that it is not known
                "event": np.where(unknown, np.nan, cohort.event) if unknown.any() else cohort.event,
            }
        )
        survival = survival_task(config)
        if survival is not None:
            frame["risk"] = risk_of(logits[survival], config).double().numpy()
            hazards = logits[survival].double().numpy().T if config.loss.name == "nll" else []
            for k, column in enumerate(hazards):
                frame[f"logit_{k}"] = column
        for task, about in class_tasks(config).items():
            names = fold.prepared.cohort.targets[task].classes
            for name, column in zip(names, probabilities_of(logits[task], about.kind).T):
                frame[f"{task}_{name}"] = column
        parts.append(frame)
    return pd.concat(parts, ignore_index=True)
