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
from survfuse.training.checkpoint import (
    is_better,
    load_checkpoint,
    load_weights,
    save_tensors,
)
from survfuse.training.config import TrainConfig
from survfuse.training.folds import FoldPlan
from survfuse.training.linear import development_rows, fit_cox
from survfuse.training.loop import FoldTask, higher_is_better, train_fold
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
            # killed after the fold was marked as done, before its temporary files were gone
            files.remove_temporary()
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
        model, details, kept = _train(config, folder, prepared, plan, device, progress, kept)
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


def _train(
    config: TrainConfig,
    folder: RunFolder,
    prepared: PreparedCohort,
    plan: FoldPlan,
    device: torch.device,
    progress: Progress,
    kept: int,
) -> tuple[torch.nn.Module, dict[str, Any], int]:
    """The trained model of a fold, the best of its restarts, with its weights saved.

    Returns the model, how its training ended, and the length of the metrics log.
    """
    files, restarts = folder.fold(plan.seed, plan.fold), config.training.restarts
    if restarts == 1:
        model, details, kept = _train_once(
            config, folder, files, prepared, plan, device, progress, kept
        )
        save_tensors(files.weights, model.state_dict())
        return model, details, kept
    records = []
    for number in range(restarts):
        part = files.restart(number)
        if part.done is None:
            part.create()
            model, details, kept = _train_once(
                config, folder, part, prepared, plan, device, progress, kept, restart=number
            )
            save_tensors(part.weights, model.state_dict())
            part.finish({**details, "metrics_bytes": kept})
        records.append(part.done)
        kept = max(kept, records[-1]["metrics_bytes"])
    best = _best(config, [record["validation"] for record in records])
    model = build_model(config, prepared).to(device)
    load_weights(files.restart(best).weights, model)
    save_tensors(files.weights, model.state_dict())
    details = {name: value for name, value in records[best].items() if name != "metrics_bytes"}
    details |= {"restart": best, "validations": [record["validation"] for record in records]}
    progress({"kind": "restart", "number": best + 1, "of": restarts})
    return model, details, kept


def _best(config: TrainConfig, values: list[float | None]) -> int:
    """The number of the best value; the first if none is a number."""
    rising, best = higher_is_better(config), 0
    for number, value in enumerate(values):
        if is_better(value, values[best], rising=rising):
            best = number
    return best


def _train_once(
    config: TrainConfig,
    folder: RunFolder,
    files: FoldFolder,
    prepared: PreparedCohort,
    plan: FoldPlan,
    device: torch.device,
    progress: Progress,
    kept: int,
    restart: int | None = None,
) -> tuple[torch.nn.Module, dict[str, Any], int]:
    """One training from freshly drawn weights; its files are `files`."""
    seed = fold_seed(plan.seed, plan.fold, restart or 0)
    labels = {"seed": plan.seed, "fold": plan.fold}
    if restart is not None:
        labels["restart"] = restart
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
            labels=labels,
            device=device,
            folder=files,
            log=log,
            on_epoch=lambda record: progress({"kind": "epoch", **record}),
        )
        details = dataclasses.asdict(train_fold(task))
        return model, details, log.n_bytes


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
