"""What the models of a run look at, patient by patient, as one tidy table."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from survfuse.batch import BagBatch, GraphBatch, Modality, TableBatch
from survfuse.data.names import unknown_name
from survfuse.extras import require
from survfuse.models.base import Score, evaluating
from survfuse.training.class_losses import class_probabilities, level_probabilities
from survfuse.training.config import TrainConfig
from survfuse.training.config_files import load_config
from survfuse.training.device import pick_device
from survfuse.training.fold_models import FoldModel, fold_models
from survfuse.training.predictions import load_any
from survfuse.training.run_folder import RunFolder, RunFolderError, read_json
from survfuse.training.sources import load_cohort
from survfuse.training.task_losses import risk_of
from survfuse.training.tasks import survival_task, tasks_of

if TYPE_CHECKING:
    import pandas as pd

    from survfuse.data.cohort import Cohort

WHAT = ("attention", "modality_effect", "gradient", "gates")
COLUMNS = (
    "seed", "fold", "unit_id", "kind", "modality", "group", "item", "x", "y", "value",
)  # fmt: skip
TOP = 50


class _View(NamedTuple):
    """One batch of one model."""

    fold: FoldModel
    rows: np.ndarray  # [B] rows of the cohort
    inputs: dict[str, Modality]
    task: str
    scores: dict[str, Score]  # by group: what of the task is explained
    top: int


def explain(
    folder: str | os.PathLike[str],
    *,
    cohort: Cohort | None = None,
    what: Sequence[str] = ("attention", "modality_effect"),
    patients: Sequence[str] | None = None,
    top: int = TOP,
    task: str | None = None,
    device: str = "auto",
) -> pd.DataFrame:
    """What every model of a finished run looks at, for the patients it was tested on.

    Kinds of rows, by `what`:

    * "attention": "attention", the share of the look of each token group (`patch_attention` of the
      model) that falls on a patch; and "patch_map", by branch, of models with `patch_maps`.
    * "modality_effect": change of the score that the modality causes, with it minus without.
    * "gradient": "gradient_x_input" per column of every table, of the score.
    * "gates": what a model with `modality_importance` says of its modalities, kinds by its names.

    The score is the risk; of a task of levels the expected level, counted from 0; of classes the
    probability of each, with its name as the group.

    Args:
        folder: a run of a neural model.
        cohort: scored in place of the run's own cohort, all rows by every model; needed where the
            run was given its cohort from Python.
        what: any of "attention", "modality_effect", "gradient", "gates".
        patients: these alone; None takes all.
        top: patches of each patient and group with the largest weights; 0 takes all.
        task: what effects and gradients are of; None takes survival, else the run's first task.
        device: where to compute.

    Returns:
        A frame with the columns seed, fold, unit_id, kind, modality, group, item, x, y, value:
        `item` is the number of the patch in the patient's bag, or the table's column; x and y are
        level-0 pixels, NaN where unknown. The same call gives the same frame.

    Raises:
        ValueError: an unknown kind, patient or task, or a negative `top`.
        RunFolderError: the run is not finished, has no weights, or needs its cohort.
    """
    pd = require("pandas", extra="train")
    parts = explain_parts(
        folder, cohort=cohort, what=what, patients=patients, top=top, task=task, device=device
    )
    frames = [frame for frame in parts if len(frame)]
    if not frames:
        return pd.DataFrame(columns=list(COLUMNS))
    return pd.concat(frames, ignore_index=True)


def explain_parts(
    folder: str | os.PathLike[str],
    *,
    cohort: Cohort | None = None,
    what: Sequence[str] = ("attention", "modality_effect"),
    patients: Sequence[str] | None = None,
    top: int = TOP,
    task: str | None = None,
    device: str = "auto",
) -> Iterator[pd.DataFrame]:
    """`explain`, a frame for each batch, so that the whole table never lies in memory."""
    for kind in what:
        if kind not in WHAT:
            raise ValueError(unknown_name("what", kind, WHAT))
    if top < 0:
        raise ValueError(f"top is {top}; it must be at least 0")
    run = RunFolder(folder)
    if not run.exists:
        raise RunFolderError(f"{run.path} holds no run")
    config = load_config(run.config)
    task = _task(config, task)
    own = cohort is None
    if cohort is None:
        cohort = _own_cohort(run, config)
    wanted = None if patients is None else _known(patients, cohort)
    where = pick_device(device)
    for fold in fold_models(run, config, cohort, where):
        scores = _scores(config, task, fold)
        rows = _test_rows(fold, cohort) if own else np.arange(len(cohort))
        if wanted is not None:
            rows = rows[[cohort.patient_ids[row] in wanted for row in rows]]
        for start in range(0, len(rows), config.training.batch_size):
            chunk = rows[start : start + config.training.batch_size]
            inputs = fold.prepared.batch(chunk, device=where).inputs
            yield _frame(_View(fold, chunk, inputs, task, scores, top), what)


def _own_cohort(run: RunFolder, config: TrainConfig) -> Cohort:
    if run.environment.is_file() and read_json(run.environment)["cohort"].get("given"):
        raise RunFolderError(
            f"{run.path} was trained on a cohort given from Python and needs it again: "
            f"survfuse.training.explain({str(run.path)!r}, cohort=...)"
        )
    return load_cohort(config).cohort


def _known(patients: Sequence[str], cohort: Cohort) -> set[str]:
    names = set(cohort.patient_ids)
    for patient in patients:
        if patient not in names:
            raise ValueError(unknown_name("patient", patient, sorted(names), where=cohort.name))
    return set(patients)


def _test_rows(fold: FoldModel, cohort: Cohort) -> np.ndarray:
    tested = load_any(fold.files.path).folds[0].test.unit_ids
    row_of = {unit: row for row, unit in enumerate(cohort.unit_ids)}
    missing = [unit for unit in tested if unit not in row_of]
    if missing:
        raise RunFolderError(
            f"{fold.files.path} tested {missing[0]}, who is not in {cohort.name}: the data changed"
        )
    return np.array([row_of[unit] for unit in tested], dtype=np.int64)


def _task(config: TrainConfig, task: str | None) -> str:
    tasks = tasks_of(config)
    if task is None:
        return survival_task(config) or next(iter(tasks))
    if task not in tasks:
        raise ValueError(unknown_name("task", task, tasks))
    return task


def _scores(config: TrainConfig, task: str, fold: FoldModel) -> dict[str, Score]:
    """What of a task is explained, by group: logits [B, out] to [B] each."""
    kind = tasks_of(config)[task].kind
    if kind == "survival":
        return {"": lambda logits: risk_of(logits.float(), config)}
    if kind == "ordinal":
        return {"": _expected_level}
    names = fold.prepared.cohort.targets[task].classes
    return {name: partial(_probability, k) for k, name in enumerate(names)}


def _expected_level(logits: Tensor) -> Tensor:
    probabilities = level_probabilities(logits)
    levels = torch.arange(probabilities.shape[1], device=logits.device, dtype=probabilities.dtype)
    return (probabilities * levels).sum(1)


def _probability(k: int, logits: Tensor) -> Tensor:
    return class_probabilities(logits)[:, k]


def _frame(view: _View, what: Sequence[str]) -> pd.DataFrame:
    pd = require("pandas", extra="train")
    makers: dict[str, Callable[[_View], Iterator[dict[str, Any]]]] = {
        "attention": _attention,
        "modality_effect": _effects,
        "gradient": _gradients,
        "gates": _gates,
    }
    with evaluating(view.fold.model):
        parts = [pd.DataFrame(part) for kind in what for part in makers[kind](view)]
    parts = [part for part in parts if len(part)]
    if not parts:
        return pd.DataFrame(columns=list(COLUMNS))
    frame = pd.concat(parts, ignore_index=True)
    frame.insert(0, "seed", view.fold.seed)
    frame.insert(1, "fold", view.fold.fold)
    return frame[list(COLUMNS)]


def _attention(view: _View) -> Iterator[dict[str, Any]]:
    model = view.fold.model
    with torch.no_grad():
        yield from _patches(view, "attention", model.patch_attention(view.inputs))
        if hasattr(model, "patch_maps"):
            yield from _patches(view, "patch_map", model.patch_maps(view.inputs))


def _patches(
    view: _View, kind: str, found: Mapping[str, Mapping[str, Tensor]]
) -> Iterator[dict[str, Any]]:
    """The largest weights of each sample and group."""
    for name, groups in found.items():
        batch = view.inputs[name]
        lengths, starts = batch.ragged.lengths.tolist(), batch.ragged.starts.tolist()
        for group, weights in groups.items():
            for sample, part in enumerate(weights.float().cpu().split(lengths)):
                if not len(part) or not bool(batch.present[sample]):
                    continue
                # stable: of equal weights the first patch comes first, every time
                order = part.argsort(descending=True, stable=True)[: view.top or None]
                x, y = _places(batch, starts[sample], order)
                yield _part(
                    view, [sample] * len(order), kind, name, group,
                    item=order.tolist(), x=x, y=y, value=part[order].tolist(),
                )  # fmt: skip


def _places(batch: Modality, start: int, order: Tensor) -> tuple[Any, Any]:
    coords = batch.coords if isinstance(batch, BagBatch) else None
    if coords is None:
        return np.nan, np.nan
    found = coords[order.to(coords.device) + start].cpu()
    return found[:, 0].tolist(), found[:, 1].tolist()


def _effects(view: _View) -> Iterator[dict[str, Any]]:
    for group, score in view.scores.items():
        effects = view.fold.model.modality_effect(view.inputs, score=score, task=view.task)
        yield from _per_modality(view, "modality_effect", effects, group)


def _gates(view: _View) -> Iterator[dict[str, Any]]:
    model = view.fold.model
    if hasattr(model, "modality_importance"):
        with torch.no_grad():
            for kind, importance in model.modality_importance(view.inputs).items():
                yield from _per_modality(view, kind, importance)


def _per_modality(
    view: _View, kind: str, values: Mapping[str, Tensor], group: str = ""
) -> Iterator[dict[str, Any]]:
    """A row for each sample that has the modality."""
    for name, value in values.items():
        present = torch.ones(len(value), dtype=torch.bool)
        if name in view.inputs:
            present = _present(view.inputs[name])
        samples = present.nonzero()[:, 0].tolist()
        numbers = value.detach().float().cpu()[present].tolist()
        yield _part(view, samples, kind, name, group, item="", value=numbers)


def _gradients(view: _View) -> Iterator[dict[str, Any]]:
    model, prepared = view.fold.model, view.fold.prepared
    for name, batch in view.inputs.items():
        if not isinstance(batch, TableBatch):
            continue
        columns = list(prepared.features(name))
        for group, score in view.scores.items():
            found = model.gradient_importance(view.inputs, name, score=score, task=view.task).cpu()
            for sample in _present(batch).nonzero()[:, 0].tolist():
                yield _part(
                    view, [sample] * len(columns), "gradient_x_input", name, group,
                    item=columns, value=found[sample].tolist(),
                )  # fmt: skip


def _present(batch: Modality) -> Tensor:
    present = batch.present
    if isinstance(batch, (BagBatch, GraphBatch)):
        present = present & (batch.ragged.lengths > 0)
    return present.cpu()


def _part(
    view: _View,
    samples: Sequence[int],
    kind: str,
    modality: str,
    group: str,
    *,
    item: Any,
    value: Sequence[float],
    x: Any = np.nan,
    y: Any = np.nan,
) -> dict[str, Any]:
    units = view.fold.prepared.cohort.unit_ids
    return {
        "unit_id": [units[view.rows[sample]] for sample in samples],
        "kind": kind,
        "modality": modality,
        "group": str(group),
        "item": item,
        "x": x,
        "y": y,
        "value": value,
    }
