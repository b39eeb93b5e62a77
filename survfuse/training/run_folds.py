"""Train and test the model of every seed and fold, skipping what is done already."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from survfuse.data.splits import Split
from survfuse.evaluation.class_predictions import ClassFold
from survfuse.evaluation.predictions import FoldPredictions
from survfuse.training.checkpoint import load_checkpoint, save_tensors
from survfuse.training.config import TrainConfig
from survfuse.training.folds import FoldPlan
from survfuse.training.linear import development_rows, fit_cox
from survfuse.training.loop import FoldTask, train_fold
from survfuse.training.model import NEURAL, build_model
from survfuse.training.predictions import (
    Scored,
    fold_name,
    make_class_predictions,
    make_predictions,
    score_rows,
    unit_table,
)
from survfuse.training.run_folder import FoldFolder, MetricsLog, RunFolder, write_json
from survfuse.training.seeds import fold_seed, seed_everything
from survfuse.training.tasks import survival_task

if TYPE_CHECKING:
    from survfuse.data.cohort import Cohort
    from survfuse.data.prepared import PreparedCohort

Progress = Callable[[dict[str, Any]], None]


def run_folds(
    config: TrainConfig,
    folder: RunFolder,
    cohort: Cohort,
    plans: list[FoldPlan],
    device: torch.device,
    progress: Progress,
) -> None:
    """Bring every fold of a run to its end.

    Args:
        config: the run.
        folder: where its files go; finished folds are found there and kept.
        cohort: with the modalities the model is given.
        plans: the folds in the order in which they are trained.
        device: where models live.
        progress: told of every fold and epoch.
    """
    # metrics of finished folds; what a killed fold added behind them is cut and redone
    kept = 0
    for number, plan in enumerate(plans):
        files = folder.fold(plan.seed, plan.fold)
        record = files.done
        if record is not None:
            # killed after the fold was marked as done, before its checkpoint was gone
            files.checkpoint.unlink(missing_ok=True)
            kept = max(kept, record["metrics_bytes"])
            continue
        files.create()
        progress(
            {
                "kind": "fold",
                "name": config.label,
                "number": number + 1,
                "of": len(plans),
                "seed": plan.seed,
                "fold": plan.fold,
                "epochs": config.training.epochs,
            }
        )
        kept = _run_fold(config, folder, cohort, plan, device, progress, kept)


def prepare(config: TrainConfig, cohort: Cohort, split: Split) -> PreparedCohort:
    """The cohort with everything fitted that the protocol fits, on the rows it names."""
    protocol = config.protocol
    everybody = np.arange(len(cohort))
    return cohort.prepare(
        split.train if protocol.fill == "train" else everybody,
        # without a survival task no event is needed
        n_bins=None if survival_task(config) is None else protocol.n_bins,
        bin_rows=split.train if protocol.bins == "train" else everybody,
        clip=protocol.clip,
        scale="standard" if protocol.scale else "none",
    )


def _run_fold(
    config: TrainConfig,
    folder: RunFolder,
    cohort: Cohort,
    plan: FoldPlan,
    device: torch.device,
    progress: Progress,
    kept: int,
) -> int:
    """Train and test one model; returns the length of the metrics log from now on."""
    files = folder.fold(plan.seed, plan.fold)
    prepared = prepare(config, cohort, plan.split)
    write_json(files.preprocessing, prepared.state)
    development = development_rows(config, plan.split)
    if config.model.name in NEURAL:
        seed = fold_seed(plan.seed, plan.fold)
        seed_everything(seed)
        model = build_model(config, prepared).to(device)
        with _metrics_log(folder, files, kept) as log:
            task = FoldTask(
                config=config,
                model=model,
                prepared=prepared,
                train=np.asarray(plan.split.train),
                validation=np.asarray(plan.split.validation),
                seed=seed,
                labels={"seed": plan.seed, "fold": plan.fold},
                device=device,
                folder=files,
                log=log,
                on_epoch=lambda record: progress({"kind": "epoch", **record}),
            )
            details = dataclasses.asdict(train_fold(task))
            kept = log.n_bytes
        save_tensors(files.weights, model.state_dict())
        scored = [
            score_rows(model, config, prepared, np.asarray(rows), device)
            for rows in (plan.split.test, development)
        ]
    else:
        risk, details = fit_cox(config, cohort, prepared, development, plan.seed)
        scored = [
            Scored(unit_table(prepared, rows, risk[rows]), {})
            for rows in (plan.split.test, development)
        ]
    _save(config, prepared, fold_name(plan.seed, plan.fold), *scored, files)
    files.finish(
        {
            "seed": plan.seed,
            "fold": plan.fold,
            "train_rows": len(plan.split.train),
            "validation_rows": len(plan.split.validation),
            "test_rows": len(plan.split.test),
            "metrics_bytes": kept,
            **details,
        }
    )
    return kept


def _save(
    config: TrainConfig,
    prepared: PreparedCohort,
    name: str,
    test: Scored,
    train: Scored,
    files: FoldFolder,
) -> None:
    """Write the predictions of a fold, one pair of files for each task."""
    if test.survival is not None:
        edges = prepared.edges if test.survival.logits is not None else None
        fold = FoldPredictions(name, test.survival, train.survival, edges)
        make_predictions(config, [fold]).save(files.path)
    for task, table in test.classes.items():
        fold = ClassFold(name, table, train.classes[task])
        make_class_predictions(config, prepared.cohort, task, [fold]).save(files.path)


@contextmanager
def _metrics_log(folder: RunFolder, files: FoldFolder, kept: int) -> Iterator[MetricsLog]:
    if files.checkpoint.is_file():
        kept = load_checkpoint(files.checkpoint)["progress"]["metrics_bytes"]
    log = MetricsLog(folder.metrics, keep_bytes=kept)
    try:
        yield log
    finally:
        log.close()
