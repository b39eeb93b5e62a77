"""Train one model on one split: batches, steps, early stopping, checkpoints.

Nothing here knows where a cohort comes from or what a protocol is; `survfuse.training.fit` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from survfuse.batch import Batch
from survfuse.training.augment import Augmentation
from survfuse.training.checkpoint import (
    EarlyStopping,
    Progress,
    load_checkpoint,
    save_checkpoint,
)
from survfuse.training.config import TrainConfig
from survfuse.training.loop_coordination import LoopCoordination
from survfuse.training.run_folder import FoldFolder, MetricsLog
from survfuse.training.schedule import apply_schedule, make_optimizer
from survfuse.training.seeds import epoch_order, random_state, restore_random_state
from survfuse.training.task_losses import TaskLosses, c_index, risk_of, scores, watched_name
from survfuse.training.tasks import survival_task, tasks_of

if TYPE_CHECKING:
    from survfuse.data.prepared import PreparedCohort


class TrainingError(RuntimeError):
    """Training cannot go on; the message names where and who."""


@dataclass
class FoldTask:
    """One model, one split, and where its files go.

    Attributes:
        model: on `device` already, its weights drawn.
        prepared: the cohort with everything fitted that is fitted before training.
        train, validation: rows of the cohort; `validation` may be empty.
        seed: orders the batches.
        labels: what identifies the fold in metrics records, for example {"seed": 1, "fold": 0}.
        log: receives a record per epoch.
        on_epoch: called with every record, to show progress.
    """

    config: TrainConfig
    model: torch.nn.Module
    prepared: PreparedCohort
    train: np.ndarray
    validation: np.ndarray
    seed: int
    labels: dict[str, int]
    device: torch.device
    folder: FoldFolder
    log: MetricsLog
    on_epoch: Callable[[dict[str, Any]], None]


@dataclass
class FoldResult:
    """How training ended; the model of the task holds the weights to evaluate."""

    epochs: int
    best_epoch: int | None
    evaluated: str  # "best" or "last"
    validation: float | None  # the watched metric of these weights; None without validation rows


def higher_is_better(config: TrainConfig) -> bool:
    """Whether the watched metric grows as a model improves."""
    return config.training.metric != "loss"


def train_fold(task: FoldTask) -> FoldResult:
    """Train `task.model`, from its checkpoint if there is one.

    Raises:
        TrainingError: the loss is not finite.
    """
    config = task.config
    stopping = EarlyStopping(
        # without validation rows there is nothing to watch: a fixed number of epochs
        config.training.patience if len(task.validation) else None,
        higher_is_better=higher_is_better(config),
    )
    state = _LoopState(task, stopping)
    if task.folder.checkpoint.is_file():
        state.restore(load_checkpoint(task.folder.checkpoint))
    progress = state.progress
    while not progress.finished:
        _train_epoch(state)
        record = _end_of_epoch(state)
        stop = False
        if len(task.validation):
            watched = record["validation_" + watched_name(config.training.metric, config)]
            stop = stopping.update(watched, progress.epoch, task.model)
        task.log.append(record)
        progress.finished = stop or progress.epoch >= config.training.epochs
        if not progress.finished:
            progress.epoch += 1
        progress.begin_epoch()
        state.save()
        task.on_epoch(record)
    use_best = config.protocol.weights == "best" and stopping.weights is not None
    if use_best:
        task.model.load_state_dict(stopping.weights)
    return FoldResult(
        epochs=progress.epoch,
        best_epoch=stopping.best_epoch if stopping.weights is not None else None,
        evaluated="best" if use_best else "last",
        validation=stopping.best if use_best else stopping.last,
    )


class _LoopState:
    """What changes while a fold trains, and how it is saved and restored."""

    def __init__(self, task: FoldTask, stopping: EarlyStopping):
        settings = task.config.training
        self.task = task
        self.stopping = stopping
        self.progress = Progress()
        self.coordination: LoopCoordination | None = None
        if task.config.coordination.mode != "none":
            self.coordination = LoopCoordination(task.config, task.model)
        self.optimizer = make_optimizer(list(task.model.parameters()), task.config.optimizer)
        self.losses = TaskLosses(task.config, task.prepared, task.train, task.device)
        self.n_batches = -(-len(task.train) // settings.batch_size)
        self.steps_per_epoch = -(-self.n_batches // settings.accumulate)
        self.total_steps = self.steps_per_epoch * settings.epochs

    def save(self) -> None:
        self.progress.metrics_bytes = self.task.log.n_bytes
        save_checkpoint(
            self.task.folder.checkpoint,
            {
                "model": self.task.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "stopping": self.stopping.state(),
                "progress": self.progress.state(),
                "random": random_state(),
                "coordination": self.coordination and self.coordination.state_dict(),
            },
        )

    def restore(self, content: dict[str, Any]) -> None:
        self.task.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.stopping.restore(content["stopping"])
        self.progress = Progress.from_state(content["progress"])
        restore_random_state(content["random"])
        if self.coordination is not None:
            self.coordination.load_state_dict(content["coordination"])


def _train_epoch(state: _LoopState) -> None:
    """The rest of the epoch that `state.progress` stands in."""
    task, progress, settings = state.task, state.progress, state.task.config.training
    order = task.train[epoch_order(len(task.train), seed=task.seed, epoch=progress.epoch)]
    batches = [
        order[i : i + settings.batch_size] for i in range(0, len(order), settings.batch_size)
    ]
    task.model.train()
    while progress.batch < len(batches):
        window = batches[progress.batch : progress.batch + settings.accumulate]
        _step(state, window)
        every = settings.checkpoint_steps
        if every and progress.step % every == 0 and progress.batch < len(batches):
            state.save()


def _step(state: _LoopState, window: list[np.ndarray]) -> None:
    """One optimiser step over the batches of `window`, each weighted by its share of the rows.

    So accumulated batches give the gradient of one large batch where the loss is a mean over
    patients. (The Cox loss is not: its risk sets stay within a batch.)
    """
    task, progress, config = state.task, state.progress, state.task.config
    apply_schedule(
        state.optimizer,
        progress.step,
        total_steps=state.total_steps,
        settings=config.optimizer,
        schedule=config.schedule,
    )
    state.optimizer.zero_grad(set_to_none=True)
    n_rows = sum(len(rows) for rows in window)
    change = Augmentation(config.training.augment)
    for rows in window:
        batch = task.prepared.batch(rows, device=task.device, change=change)
        logits, auxiliary = forward(task.model, batch, config, task.device)
        losses = state.losses.of_batch(logits, batch)
        _record_batch(state, rows, losses, logits)
        share = len(rows) / n_rows
        total = share * (state.losses.total(losses) + auxiliary)
        if rows is window[-1] and config.loss.l1:
            norms = sum(parameter.abs().sum() for parameter in task.model.parameters())
            total = total + config.loss.l1 * norms
        total.backward()
        if state.coordination is not None:
            state.coordination.observe(batch)
        progress.batch += 1
    if state.coordination is not None:
        state.coordination.coordinate()
    if config.training.clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(task.model.parameters(), config.training.clip_norm)
    state.optimizer.step()
    progress.step += 1


def _record_batch(
    state: _LoopState,
    rows: np.ndarray,
    losses: dict[str, Tensor],
    logits: dict[str, Tensor],
) -> None:
    """Add a batch to the sums of its epoch; raise where its loss is not finite."""
    config, progress = state.task.config, state.progress
    # one wait for the device, however many tasks
    values = torch.stack([loss.detach() for loss in losses.values()]).tolist()
    for (name, n_rows), value in zip(state.losses.rows_of(rows).items(), values):
        if not np.isfinite(value):
            raise _not_finite(state, rows, value, name)
        progress.add(name, value, n_rows)
    survival = survival_task(config)
    if survival is not None:
        progress.risks.append(risk_of(logits[survival].detach(), config).float().cpu())


def _end_of_epoch(state: _LoopState) -> dict[str, Any]:
    """The metrics record of the epoch that just ended."""
    task, progress, config = state.task, state.progress, state.task.config
    cohort = task.prepared.cohort
    order = task.train[epoch_order(len(task.train), seed=task.seed, epoch=progress.epoch)]
    record: dict[str, Any] = {
        **task.labels,
        "epoch": progress.epoch,
        "step": progress.step,
        "lr": state.optimizer.param_groups[0]["lr"],
        **_recorded("train", progress.mean_losses(), state.losses),
    }
    if state.coordination is not None:
        record |= state.coordination.epoch_record()
    if progress.risks:
        risks = torch.cat(progress.risks).double().numpy()
        record["train_c_index"] = c_index(risks, cohort, order)
    if len(task.validation):
        try:
            logits = predict_logits(task.model, task.prepared, task.validation, config, task.device)
        except TrainingError as error:
            raise TrainingError(f"{_where(task)}, epoch {progress.epoch}: {error}") from None
        outcomes = _outcomes(task.prepared, task.validation)
        losses = state.losses.of_batch(logits, outcomes)
        means = {
            # without a row whose class is known there is no mean
            name: float(losses[name]) if n_rows else float("nan")
            for name, n_rows in state.losses.rows_of(task.validation).items()
        }
        record.update(_recorded("validation", means, state.losses))
        for name, value in scores(logits, config, cohort, task.validation).items():
            record[f"validation_{name}"] = value
    return record


def _recorded(part: str, means: dict[str, float], losses: TaskLosses) -> dict[str, float]:
    """The loss of a part of the rows, and of several tasks the loss of each."""
    found = {f"{part}_loss": losses.recorded(means)}
    if len(means) > 1:
        found.update({f"{part}_{name}_loss": value for name, value in means.items()})
    return found


def forward(
    model: torch.nn.Module, batch: Batch, config: TrainConfig, device: torch.device
) -> tuple[dict[str, Tensor], Tensor]:
    """Logits [B, out] of every task in fp32 and the sum of the model's further losses."""
    with torch.autocast(
        device.type, dtype=torch.bfloat16, enabled=config.training.precision == "bf16"
    ):
        output = model(batch.inputs)
    auxiliary = sum(output.auxiliary.values(), torch.zeros((), device=device))
    return {name: output.logits[name].float() for name in tasks_of(config)}, auxiliary


@torch.no_grad()
def predict_logits(
    model: torch.nn.Module,
    prepared: PreparedCohort,
    rows: np.ndarray,
    config: TrainConfig,
    device: torch.device,
) -> dict[str, Tensor]:
    """Logits [n, out] of `rows` by task, in evaluation mode, on the CPU. Draws no random number.

    Raises:
        TrainingError: a logit is NaN or infinite, as after a last step that went too far.
    """
    was_training = model.training
    model.eval()
    parts = []
    for chunk in _chunks(rows, config.training.batch_size):
        logits, _ = forward(model, prepared.batch(chunk, device=device), config, device)
        parts.append({name: values.cpu() for name, values in logits.items()})
    model.train(was_training)
    joined = {name: torch.cat([part[name] for part in parts]) for name in tasks_of(config)}
    for name, values in joined.items():
        wrong = ~values.isfinite().all(-1)
        if bool(wrong.any()):
            row = int(rows[int(wrong.nonzero()[0])])
            of = f" of task {name}" if len(joined) > 1 else ""
            raise TrainingError(
                f"the logits{of} of patient {prepared.cohort.patient_ids[row]} are NaN or "
                "infinite; look for NaN or very large numbers in the features, or lower "
                "optimizer.lr"
            )
    return joined


def _chunks(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _outcomes(prepared: PreparedCohort, rows: np.ndarray) -> Batch:
    """A batch of outcomes without inputs."""
    cohort = prepared.cohort
    return Batch(
        {},
        torch.from_numpy(np.asarray(cohort.time)[rows]).float(),
        torch.from_numpy(np.asarray(cohort.event)[rows]),
        torch.from_numpy(np.asarray(prepared.labels)[rows]),
        torch.from_numpy(np.asarray(rows)),
        {name: torch.from_numpy(target.labels[rows]) for name, target in cohort.targets.items()},
    )


def _where(task: FoldTask) -> str:
    return ", ".join(f"{name} {number}" for name, number in task.labels.items())


def _not_finite(state: _LoopState, rows: np.ndarray, value: float, name: str) -> TrainingError:
    task, progress = state.task, state.progress
    patients = [str(task.prepared.cohort.patient_ids[row]) for row in rows]
    shown = ", ".join(patients[:8]) + (
        f" and {len(patients) - 8} more" if len(patients) > 8 else ""
    )
    of = f" of task {name}" if len(state.losses.tasks) > 1 else ""
    return TrainingError(
        f"the loss{of} is {value} at {_where(task)}, epoch {progress.epoch}, batch "
        f"{progress.batch + 1} of {state.n_batches}; patients of the batch: {shown}. Look for NaN "
        "or very large numbers in their features, or lower optimizer.lr; the last checkpoint holds "
        "the weights before"
    )
