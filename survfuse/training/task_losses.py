"""The losses of a run's tasks: each by its kind, their weighted sum, what is recorded of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from survfuse.batch import Batch
from survfuse.evaluation.classification import macro_auc, quadratic_kappa
from survfuse.evaluation.concordance import concordance_index
from survfuse.training.class_losses import (
    balancing_weights,
    class_loss,
    class_probabilities,
    level_probabilities,
    ordinal_loss,
)
from survfuse.training.config import TrainConfig
from survfuse.training.losses import class_weights_of, cox_loss, nll_loss, risk_from_hazards
from survfuse.training.tasks import survival_task, tasks_of

if TYPE_CHECKING:
    from survfuse.data.cohort import Cohort
    from survfuse.data.prepared import PreparedCohort


class TaskLosses:
    """The loss of every task of a run.

    Args:
        config: names the tasks.
        prepared: gives the labels that weights of bins and classes are counted from.
        train: training rows.
        device: where the batches are.
    """

    def __init__(
        self,
        config: TrainConfig,
        prepared: PreparedCohort,
        train: np.ndarray,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config = config
        self.tasks = tasks_of(config)
        # counted on the host, where nothing waits for a device
        self._known = {name: target.known for name, target in prepared.cohort.targets.items()}
        self.weights: dict[str, Tensor | None] = {}
        for name, task in self.tasks.items():
            if task.kind == "survival":
                weights = _bin_weights(config, prepared, train)
            else:
                target = prepared.cohort.targets[name]
                label = torch.from_numpy(target.labels[train])
                weights = balancing_weights(label, len(target.classes), task.class_weights)
            self.weights[name] = None if weights is None else weights.to(device)

    def of_batch(self, logits: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """The mean loss of every task over the rows whose outcome or class is known."""
        losses = {}
        for name, task in self.tasks.items():
            weights = self.weights[name]
            if weights is not None:
                weights = weights.to(logits[name].device)
            if task.kind == "survival":
                losses[name] = survival_loss(logits[name], batch, self.config, weights)
            else:
                loss = class_loss if task.kind == "classes" else ordinal_loss
                losses[name] = loss(logits[name], batch.targets[name], class_weights=weights)
        return losses

    def rows_of(self, rows: np.ndarray) -> dict[str, int]:
        """How many of the cohort's rows `rows` each task's mean is over."""
        return {
            name: int(self._known[name][rows].sum()) if name in self._known else len(rows)
            for name in self.tasks
        }

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """sum over tasks of weight * loss, survival divided by `loss.survival_divisor`."""
        return sum(self._scaled(name, loss) for name, loss in losses.items())

    def recorded(self, losses: dict[str, float]) -> float:
        """One number for records and early stopping: the loss of a single task, else the sum.

        A task whose mean is NaN, because none of the rows has a known class, is left out of it.
        """
        if len(losses) == 1:
            return next(iter(losses.values()))
        known = [self._scaled(name, loss) for name, loss in losses.items() if loss == loss]
        return float(sum(known)) if known else float("nan")

    def _scaled(self, name: str, loss: Any) -> Any:
        task = self.tasks[name]
        if task.kind == "survival":
            loss = loss / self.config.loss.survival_divisor
        return task.weight * loss


def survival_loss(
    logits: Tensor, batch: Batch, config: TrainConfig, weights: Tensor | None
) -> Tensor:
    """The mean survival loss of a batch, before `survival_divisor`."""
    if config.loss.name == "cox":
        return cox_loss(logits[:, 0], time=batch.time, event=batch.event, ties=config.loss.ties)
    return nll_loss(
        logits,
        batch.label,
        batch.event,
        alpha=config.loss.alpha,
        class_weights=weights,
    )


def risk_of(logits: Tensor, config: TrainConfig) -> Tensor:
    """Risk [B], higher = earlier event."""
    return logits[:, 0] if config.loss.name == "cox" else risk_from_hazards(logits)


def probabilities_of(logits: Tensor, kind: str) -> np.ndarray:
    """[n, K] probabilities of classes or levels, fp64."""
    read = class_probabilities if kind == "classes" else level_probabilities
    return read(logits.detach()).cpu().numpy()


def scores(
    logits: dict[str, Tensor], config: TrainConfig, cohort: Cohort, rows: np.ndarray
) -> dict[str, float]:
    """What early stopping may watch beside the loss, higher = better, by its name in records.

    "c_index"; "<task>_auc" of classes; "<task>_kappa" of levels. NaN where it is not defined.
    """
    found = {}
    for name, task in tasks_of(config).items():
        if task.kind == "survival":
            risk = risk_of(logits[name], config).double().numpy()
            found["c_index"] = c_index(risk, cohort, rows)
            continue
        label = cohort.targets[name].labels[rows]
        known = label >= 0
        probabilities = probabilities_of(logits[name], task.kind)[known]
        measure = macro_auc if task.kind == "classes" else quadratic_kappa
        found[watched_name(name, config)] = measure(label[known], probabilities)
    return found


def watched_name(metric: str, config: TrainConfig) -> str:
    """What `training.metric` is called in records, without "validation_" in front."""
    task = tasks_of(config).get(metric)
    if task is None or metric == survival_task(config):
        return metric
    return f"{metric}_auc" if task.kind == "classes" else f"{metric}_kappa"


def c_index(risk: np.ndarray, cohort: Cohort, rows: np.ndarray) -> float:
    """Harrell's C; NaN where no pair is comparable."""
    time = np.asarray(cohort.time)[rows]
    event = np.asarray(cohort.event)[rows]
    # a pair needs somebody who was followed beyond an event
    if not event.any() or not (time > time[event].min()).any():
        return float("nan")
    return float(concordance_index(risk, time=time, event=event))


def _bin_weights(config: TrainConfig, prepared: PreparedCohort, train: np.ndarray) -> Tensor | None:
    """Weights of the time bins from the training rows; None where none are asked for."""
    kind = config.loss.class_weights
    if kind == "none":
        return None
    label = torch.from_numpy(np.asarray(prepared.labels)[train])
    return class_weights_of(label, prepared.n_bins, kind=kind)
