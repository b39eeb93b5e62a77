"""The trained models of a run, with the preprocessing that was frozen with each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch

from survfuse.training.checkpoint import load_weights
from survfuse.training.config import TrainConfig
from survfuse.training.model import build_model
from survfuse.training.run_folder import FoldFolder, RunFolder, RunFolderError, read_json

if TYPE_CHECKING:
    from survfuse.data.cohort import Cohort
    from survfuse.data.prepared import PreparedCohort


class FoldModel(NamedTuple):
    """One model of a run, in evaluation mode, and a cohort as it reads it."""

    seed: int
    fold: int
    files: FoldFolder
    model: torch.nn.Module
    prepared: PreparedCohort


def load_fold(
    files: FoldFolder, config: TrainConfig, cohort: Cohort, device: torch.device
) -> FoldModel:
    """The model of one finished fold for a cohort it may never have seen.

    Raises:
        RunFolderError: the fold is not finished, or its model has no weights.
        ValueError: the cohort lacks a column that the model needs, or all its modalities.
    """
    from survfuse.data.prepared import PreparedCohort

    record = files.done
    if record is None:
        raise RunFolderError(f"{files.path} holds no finished model; resume the run")
    if not files.weights.is_file():
        raise RunFolderError(
            f"{files.weights} is missing; a run of a neural model has it, and one that lost it "
            "must be trained into a new folder"
        )
    state = read_json(files.preprocessing)
    if not set(state["channels"]) & set(cohort.modalities):
        raise ValueError(
            f"{cohort.name} has the modalities {', '.join(cohort.modalities)}; the model reads "
            f"{', '.join(state['channels'])}, and it must have one of them"
        )
    prepared = PreparedCohort.from_state(cohort, state)
    model = build_model(config, prepared).to(device).eval()
    load_weights(files.weights, model)
    return FoldModel(record["seed"], record["fold"], files, model, prepared)


def fold_models(
    run: RunFolder, config: TrainConfig, cohort: Cohort, device: torch.device
) -> Iterator[FoldModel]:
    """Every model of a run in the order of seeds and folds, one after the other in memory.

    Raises:
        RunFolderError: no fold was begun, or one is not finished or has no weights.
        ValueError: the cohort lacks a column that the models need.
    """
    folds = run.folds()
    if not folds:
        raise RunFolderError(f"{run.path} holds no finished fold; resume the run")
    for files in folds:
        yield load_fold(files, config, cohort, device)
