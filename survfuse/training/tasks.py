"""What a run predicts: which tasks it has, where their classes come from, how many logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from survfuse.extras import require
from survfuse.training.config import TaskConfig, TrainConfig

if TYPE_CHECKING:
    from survfuse.data.cohort import Cohort
    from survfuse.data.prepared import PreparedCohort
    from survfuse.data.splits import Split
    from survfuse.data.targets import ClassTarget

# models that are fitted, not trained by the loop, and know survival only
LINEAR = ("clinical_cox", "elastic_net_cox")


def tasks_of(config: TrainConfig) -> dict[str, TaskConfig]:
    """Every task of a run by name; survival where the configuration names none."""
    return dict(config.tasks) or {"survival": TaskConfig("survival")}


def survival_task(config: TrainConfig) -> str | None:
    """The name of the survival task, None for a run without one."""
    return next((name for name, task in tasks_of(config).items() if task.kind == "survival"), None)


def class_tasks(config: TrainConfig) -> dict[str, TaskConfig]:
    """The tasks that predict classes or levels."""
    return {name: task for name, task in tasks_of(config).items() if task.kind != "survival"}


def with_targets(config: TrainConfig, cohort: Cohort) -> Cohort:
    """The cohort with one target for each class task, under the task's name, and no other.

    Raises:
        ConfigError: the cohort has neither a target nor a covariate of the name, or it holds
            something else than classes.
    """
    targets = {name: _target(name, task, cohort) for name, task in class_tasks(config).items()}
    return cohort._replace(targets=targets)


def _target(name: str, task: TaskConfig, cohort: Cohort) -> ClassTarget:
    from survfuse.data.names import unknown_name
    from survfuse.data.targets import ClassTarget
    from survfuse.training.config_files import ConfigError

    wanted, ordinal = task.target or name, task.kind == "ordinal"
    columns = cohort.covariates.columns
    try:
        if wanted in cohort.targets:
            target = cohort.targets[wanted]
            # an order is the target's own, or said here
            if ordinal and not target.ordinal and not task.classes:
                raise ValueError(
                    "classes is empty, and the target's classes have no order; it must name them "
                    "from the lowest level"
                )
            target = target.with_classes(task.classes or target.classes, ordinal=ordinal)
        elif wanted in columns:
            target = ClassTarget.from_column(
                cohort.covariates[wanted], task.classes or None, ordinal
            )
        else:
            valid = [*cohort.targets, *columns]
            raise ConfigError(
                f"tasks.{name}.target: "
                + unknown_name("target or covariate", wanted, valid, where=cohort.name)
            )
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"tasks.{name}: {error}") from None
    if not isinstance(task.class_weights, str) and len(task.class_weights) != len(target.classes):
        raise ConfigError(
            f"tasks.{name}.class_weights holds {len(task.class_weights)} numbers; it must hold one "
            f"for each of the classes {', '.join(target.classes)}"
        )
    return target


def check_known(config: TrainConfig, cohort: Cohort, splits: Sequence[Split]) -> None:
    """Raise unless every class task has something to learn in each split and to be tested on.

    Raises:
        ConfigError: the training rows of a split are of fewer than two classes, or no test row's
            class is known.
        ImportError: scikit-learn is not installed, which their metrics need.
    """
    from survfuse.training.config_files import ConfigError

    if class_tasks(config):
        require("sklearn.metrics", extra="train")
    for name in class_tasks(config):
        target = cohort.targets[name]
        for number, split in enumerate(splits):
            counts = target.subset(np.asarray(split.train)).counts()
            found = [one for one, n in counts.items() if n]
            if len(found) < 2:
                raise ConfigError(
                    f"tasks.{name}: the training rows of split {number} are of "
                    f"{' and '.join(found) or 'no known class'}; they must be of at least two"
                )
        if not any(target.known[split.test].any() for split in splits):
            raise ConfigError(f"tasks.{name}: the class of every test row is unknown")


def outputs_of(config: TrainConfig, prepared: PreparedCohort) -> dict[str, int]:
    """Number of logits of every task.

    Survival: the time bins, or 1 of Cox; classes: one each; levels: one fewer than there are.
    """
    outputs = {}
    for name, task in tasks_of(config).items():
        if task.kind == "survival":
            outputs[name] = 1 if config.loss.name == "cox" else prepared.n_bins
        else:
            n_classes = len(prepared.cohort.targets[name].classes)
            outputs[name] = n_classes - (task.kind == "ordinal")
    return outputs


def watched_outcome(config: TrainConfig, cohort: Cohort) -> np.ndarray:
    """[n] rows that make an inner validation set worth watching.

    Those with the event; without a survival task, those of patients whose class in the first task
    is known.
    """
    if survival_task(config) is not None:
        return np.asarray(cohort.event)
    known = cohort.targets[next(iter(class_tasks(config)))].known
    patients = np.asarray(cohort.patient_ids)
    return np.isin(patients, patients[known])


def survival_only(config: TrainConfig) -> TrainConfig:
    """The configuration without its class tasks, for a model that knows survival only."""
    tasks = {name: task for name, task in config.tasks.items() if task.kind == "survival"}
    metric = "loss" if config.training.metric in class_tasks(config) else config.training.metric
    training = dataclasses.replace(config.training, metric=metric)
    return dataclasses.replace(config, tasks=tasks, training=training)
