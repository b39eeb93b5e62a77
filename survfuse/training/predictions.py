"""What models predict, as the tables that evaluation reads and as frames."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from survfuse.evaluation.class_predictions import ClassFold, ClassPredictions, ClassTable
from survfuse.evaluation.predictions import FoldPredictions, PatientTable, Predictions
from survfuse.extras import require
from survfuse.training.config import TrainConfig
from survfuse.training.config_files import load_config
from survfuse.training.device import pick_device
from survfuse.training.folds import FoldPlan
from survfuse.training.loop import predict_logits
from survfuse.training.model import NEURAL, build_model
from survfuse.training.protocols import leaks
from survfuse.training.run_folder import RunFolder, RunFolderError, read_json
from survfuse.training.task_losses import probabilities_of, risk_of
from survfuse.training.tasks import class_tasks, survival_task

if TYPE_CHECKING:
    import pandas as pd

    from survfuse.data.cohort import Cohort, PreparedCohort


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
        time, event, risk and the logits; of a class task the probability of every class,
        `<task>_<class>`.

    Raises:
        TypeError: `cohort` is no cohort.
        RunFolderError: the run is not finished or has no weights.
        ValueError: the cohort lacks a column that the models need.
    """
    pd = require("pandas", extra="train")
    from survfuse.data.cohort import Cohort, PreparedCohort

    if not isinstance(cohort, Cohort):
        raise TypeError(f"cohort is {cohort!r}; it must be a survfuse.data.Cohort")

    run = RunFolder(folder)
    if not run.exists:
        raise RunFolderError(f"{run.path} holds no run")
    config = load_config(run.config)
    where = pick_device(device)
    rows = np.arange(len(cohort))
    parts = []
    for files in run.folds():
        record = files.done
        if record is None or not files.weights.is_file():
            raise RunFolderError(f"{files.path} holds no finished neural model; resume the run")
        prepared = PreparedCohort.from_state(cohort, read_json(files.preprocessing))
        model = build_model(config, prepared).to(where)
        model.load_state_dict(torch.load(files.weights, map_location=where, weights_only=True))
        scored = score_rows(model, config, prepared, rows, where)
        frame = pd.DataFrame(
            {
                "seed": record["seed"],
                "fold": record["fold"],
                "unit_id": cohort.unit_ids,
                "patient_id": cohort.patient_ids,
                "time": cohort.time,
                "event": cohort.event,
            }
        )
        if scored.survival is not None:
            frame["risk"] = scored.survival.risk
            hazards = scored.survival.logits
            for k, column in enumerate([] if hazards is None else hazards.T):
                frame[f"logit_{k}"] = column
        for task, table in scored.classes.items():
            names = prepared.cohort.targets[task].classes
            for name, column in zip(names, table.probabilities.T):
                frame[f"{task}_{name}"] = column
        parts.append(frame)
    if not parts:
        raise RunFolderError(f"{run.path} holds no finished fold; resume the run")
    return pd.concat(parts, ignore_index=True)
