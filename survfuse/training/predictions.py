"""What models predict, as the tables that evaluation reads and as frames."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from survfuse.evaluation.predictions import FoldPredictions, PatientTable, Predictions
from survfuse.extras import require
from survfuse.training.config import TrainConfig
from survfuse.training.config_files import load_config
from survfuse.training.device import pick_device
from survfuse.training.fold_models import fold_models
from survfuse.training.loop import predict_logits, risk_of
from survfuse.training.model import NEURAL
from survfuse.training.protocols import leaks
from survfuse.training.run_folder import RunFolder, RunFolderError

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


def score_rows(
    model: torch.nn.Module,
    config: TrainConfig,
    prepared: PreparedCohort,
    rows: np.ndarray,
    device: torch.device,
) -> PatientTable:
    """Predict rows of a prepared cohort with a neural model; hazards come with their logits."""
    logits = predict_logits(model, prepared, rows, config, device)
    risk = risk_of(logits, config).double().numpy()
    hazards = logits.double().numpy() if config.loss.name == "nll" else None
    return unit_table(prepared, rows, risk, hazards)


def make_predictions(config: TrainConfig, folds: Sequence[FoldPredictions]) -> Predictions:
    """Folds as evaluation reads them, with what the protocol leaks."""
    head = "nll" if config.model.name in NEURAL and config.loss.name == "nll" else "cox"
    return Predictions(
        model=config.label,
        head=head,
        protocol=config.protocol.name,
        folds=folds,
        endpoint=ENDPOINTS[config.data.endpoint],
        leakage=" ".join(f"{sentence[0].upper()}{sentence[1:]}." for sentence in leaks(config)),
    )


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
        time, event (NaN where the outcome is not known), risk and the logits.

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
        rows = np.arange(len(cohort))
        logits = predict_logits(fold.model, fold.prepared, rows, config, where)
        frame = pd.DataFrame(
            {
                "seed": fold.seed,
                "fold": fold.fold,
                "unit_id": cohort.unit_ids,
                "patient_id": cohort.patient_ids,
                "time": cohort.time,
                # a bool cannot say that it is not known
                "event": np.where(unknown, np.nan, cohort.event) if unknown.any() else cohort.event,
                "risk": risk_of(logits, config).double().numpy(),
            }
        )
        if config.loss.name == "nll":
            for k, column in enumerate(logits.double().numpy().T):
                frame[f"logit_{k}"] = column
        parts.append(frame)
    return pd.concat(parts, ignore_index=True)
