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
from survfuse.training.loop import predict_logits, risk_of
from survfuse.training.model import NEURAL, build_model
from survfuse.training.protocols import leaks
from survfuse.training.run_folder import RunFolder, RunFolderError, read_json

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
        time, event, risk and the logits.

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
        table = score_rows(model, config, prepared, rows, where)
        frame = pd.DataFrame(
            {
                "seed": record["seed"],
                "fold": record["fold"],
                "unit_id": table.unit_ids,
                "patient_id": table.patient_ids,
                "time": table.time,
                "event": table.event,
                "risk": table.risk,
            }
        )
        if table.logits is not None:
            for k, column in enumerate(table.logits.T):
                frame[f"logit_{k}"] = column
        parts.append(frame)
    if not parts:
        raise RunFolderError(f"{run.path} holds no finished fold; resume the run")
    return pd.concat(parts, ignore_index=True)
