"""What no single field's type can rule out in a configuration; like it, without pydantic."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from survfuse.training.config import (
    BASELINES,
    GROUPS,
    UNIMODAL,
    ModelConfig,
    TaskConfig,
    TrainConfig,
)
from survfuse.training.tasks import LINEAR, class_tasks, survival_task


def check(config: TrainConfig) -> None:
    """Raise on values that no single field's type can rule out.

    Raises:
        TypeError: a section is not its dataclass.
        ValueError: names the field by its dotted path, what it was and what it must be.
    """
    _check_sections(config)
    _check_numbers(config)
    data, protocol, model = config.data, config.protocol, config.model
    _check_preset(model)
    _check_coordination(config)
    _check_tasks(config)
    compares = survival_task(config) is not None and model.name not in LINEAR
    if data.source in ("tcga_omics", "survpath") and not data.cohort:
        raise ValueError(
            f"data.cohort is not set; data.source {data.source} needs one, for example kirp"
        )
    if protocol.split == "rows" and protocol.validation == "inner":
        raise ValueError(
            'protocol.validation is "inner" with protocol.split "rows"; '
            'a random row split brings its own validation rows: use "split", "test" or "none"'
        )
    if config.loss.name == "cox" and config.loss.class_weights != "none":
        raise ValueError(
            f'loss.class_weights is "{config.loss.class_weights}"; '
            'the Cox loss has no time bins, so it must be "none"'
        )
    if config.loss.name == "cox" and config.training.batch_size < 2 and compares:
        raise ValueError(
            "training.batch_size is 1; the Cox loss compares patients of one batch, "
            "so it must be at least 2 (or use loss.name nll)"
        )
    if config.loss.name == "cox" and config.loss.alpha:
        raise ValueError(
            f"loss.alpha is {config.loss.alpha}; it belongs to the nll loss, the Cox loss has none"
        )
    _check_patches_and_groups(config)
    _check_baselines(config.evaluation.baselines)
    _check_single_models(config.evaluation.single_models)
    _check_missing(config)
    if not config.training.seeds:
        raise ValueError("training.seeds is empty; it must hold at least one integer")
    if min(*config.training.seeds, config.protocol.fold_seed) < 0:
        raise ValueError(
            f"training.seeds is {list(config.training.seeds)} and protocol.fold_seed "
            f"{config.protocol.fold_seed}; a seed must be at least 0"
        )
    if config.training.restarts > 1 and config.protocol.validation == "none":
        raise ValueError(
            f'training.restarts is {config.training.restarts} and protocol.validation "none"; '
            "without validation rows nothing tells which restart to keep: it must be 1"
        )
    if len(set(config.training.seeds)) != len(config.training.seeds):
        raise ValueError(f"training.seeds is {list(config.training.seeds)}; seeds must differ")


def _check_sections(config: Any, prefix: str = "") -> None:
    for item in fields(config):
        kind, value = item.default_factory, getattr(config, item.name)
        if not is_dataclass(kind):
            continue
        if not isinstance(value, kind):
            raise TypeError(
                f"{prefix}{item.name} is {value!r}; it must be a {kind.__name__} "
                "(parse_config takes plain dictionaries)"
            )
        _check_sections(value, f"{prefix}{item.name}.")


def _check_patches_and_groups(config: TrainConfig) -> None:
    groups, patches = config.data.groups, config.data.patches
    if groups is not None and groups not in GROUPS and not groups.endswith(".csv"):
        raise ValueError(
            f'data.groups is "{groups}"; it must be null, one of {", ".join(GROUPS)}, or the path '
            "of a .csv file"
        )
    if not 0 < patches.fraction <= 1:
        raise ValueError(f"data.patches.fraction is {patches.fraction}; it must be in (0, 1]")
    if patches.seed < 0:
        raise ValueError(f"data.patches.seed is {patches.seed}; it must be at least 0")


def _check_baselines(baselines: tuple[str, ...]) -> None:
    for name in baselines:
        model, _, preset = name.partition(":")
        if model == "only" and preset:
            continue
        if model not in BASELINES or (preset and model == UNIMODAL):
            raise ValueError(
                f'evaluation.baselines holds "{name}"; it must be one of {", ".join(BASELINES)} '
                "(a model also as <name>:<preset>) or only:<modality>"
            )
        try:
            _check_preset(ModelConfig(name=model, preset=preset or None))
        except ValueError as error:
            raise ValueError(f'evaluation.baselines holds "{name}": {error}') from None
    if len(set(baselines)) != len(baselines):
        raise ValueError(f"evaluation.baselines is {list(baselines)}; they must differ")


def _check_single_models(models: Mapping[str, ModelConfig]) -> None:
    for name, model in models.items():
        try:
            _check_preset(model)
        except ValueError as error:
            raise ValueError(f"evaluation.single_models.{name}: {error}") from None


def _check_missing(config: TrainConfig) -> None:
    designs = config.evaluation.missing
    for name in designs:
        if name != "half" and not (name.startswith("only:") and name.partition(":")[2]):
            raise ValueError(
                f'evaluation.missing holds "{name}"; it must be "half", only:<modality> or '
                "only:<modality>+<modality>"
            )
    if designs and config.model.name in LINEAR:
        raise ValueError(
            "evaluation.missing is set, but a Cox regression has no way to go without a modality; "
            "it must be empty"
        )
    if designs and survival_task(config) is None:
        raise ValueError(
            "evaluation.missing is set, which compares risks, but tasks has none of kind survival; "
            "it must be empty"
        )
    if len(set(designs)) != len(designs):
        raise ValueError(f"evaluation.missing is {list(designs)}; they must differ")


def _check_tasks(config: TrainConfig) -> None:
    if not isinstance(config.tasks, dict):
        raise TypeError(f"tasks is {config.tasks!r}; it must map names of tasks to TaskConfig")
    for name, task in config.tasks.items():
        _check_task(name, task)
    several = [name for name, task in config.tasks.items() if task.kind == "survival"]
    if len(several) > 1:
        raise ValueError(
            f"tasks holds {len(several)} of kind survival ({', '.join(several)}); "
            "a cohort has one endpoint, so it must be one at most"
        )
    has_survival, classes = survival_task(config) is not None, class_tasks(config)
    if config.model.name in LINEAR and (classes or not has_survival):
        raise ValueError(
            f'model.name is "{config.model.name}", which knows survival only; tasks must be empty'
        )
    for name in config.evaluation.baselines:
        if name in (*LINEAR, UNIMODAL) and not has_survival:
            raise ValueError(
                f'evaluation.baselines holds "{name}", which knows survival only, but tasks has '
                "none of that kind"
            )
    watched = ["loss", *(["c_index"] if has_survival else []), *classes]
    if config.training.metric not in watched:
        raise ValueError(
            f'training.metric is "{config.training.metric}"; it must be one of {", ".join(watched)}'
        )


def _check_task(name: str, task: TaskConfig) -> None:
    where = f"tasks.{name}"
    # the name is part of names of files, columns and modules
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", str(name)) or name in ("loss", "c_index"):
        raise ValueError(
            f'tasks holds the name "{name}"; it must be letters, digits, _ and -, begin with a '
            "letter, and be neither loss nor c_index"
        )
    if not isinstance(task, TaskConfig):
        raise TypeError(
            f"{where} is {task!r}; it must be a TaskConfig (parse_config takes plain dictionaries)"
        )
    if not task.weight > 0:
        raise ValueError(f"{where}.weight is {task.weight}; it must be above 0")
    if task.kind == "survival":
        for field in ("target", "classes", "class_weights"):
            value = getattr(task, field)
            if value not in (None, (), "none"):
                raise ValueError(
                    f"{where}.{field} is {value!r}; survival is the cohort's time and event, "
                    "so it cannot be set"
                )
        return
    if task.classes and (len(set(task.classes)) < len(task.classes) or len(task.classes) < 2):
        raise ValueError(
            f"{where}.classes is {list(task.classes)}; it must hold at least two names, each once"
        )
    weights = task.class_weights
    if isinstance(weights, str):
        if weights not in ("none", "inverse", "inverse_root"):
            raise ValueError(
                f'{where}.class_weights is "{weights}"; it must be "none", "inverse", '
                '"inverse_root" or a number for each class'
            )
    elif not all(one >= 0 for one in weights) or not any(weights):
        raise ValueError(
            f"{where}.class_weights is {list(weights)}; it must hold numbers of at least 0, "
            "not all of them 0"
        )
    elif task.classes and len(weights) != len(task.classes):
        raise ValueError(
            f"{where}.class_weights holds {len(weights)} numbers; it must hold one for each of "
            f"{len(task.classes)} classes"
        )


def _check_preset(model: ModelConfig) -> None:
    if model.preset is None:
        return
    from survfuse.models.registry import MODELS, model_class

    if model.name not in MODELS:
        raise ValueError(
            f'model.preset is "{model.preset}", but model.name "{model.name}" has no presets; '
            "it must be null"
        )
    known = model_class(model.name).config_class.PRESETS
    if model.preset.lower() not in known:
        raise ValueError(
            f'model.preset is "{model.preset}"; it must be null or one of {", ".join(known)}'
        )


def _check_coordination(config: TrainConfig) -> None:
    """Of models without a network; the others are asked once they are built."""
    from survfuse.models.registry import MODELS

    if config.coordination.mode != "none" and config.model.name not in MODELS:
        raise ValueError(
            f'coordination.mode is "{config.coordination.mode}", but model.name '
            f'"{config.model.name}" has no two branches; it must be "none"'
        )


def _check_numbers(config: TrainConfig) -> None:
    loss, training, simulation = config.loss, config.training, config.data.simulation
    at_least = [
        ("data.patches.neighbourhood", config.data.patches.neighbourhood, 0),
        ("protocol.n_folds", config.protocol.n_folds, 2),
        ("protocol.n_bins", config.protocol.n_bins, 2),
        ("protocol.min_inner_events", config.protocol.min_inner_events, 1),
        ("training.epochs", training.epochs, 1),
        ("training.restarts", training.restarts, 1),
        ("training.batch_size", training.batch_size, 1),
        ("training.accumulate", training.accumulate, 1),
        ("training.patience", training.patience, 1),
        ("training.threads", training.threads, 1),
        ("training.checkpoint_steps", training.checkpoint_steps, 1),
        ("schedule.warmup_steps", config.schedule.warmup_steps, 0),
        ("optimizer.weight_decay", config.optimizer.weight_decay, 0.0),
        ("loss.l1", loss.l1, 0.0),
        ("evaluation.bootstrap", config.evaluation.bootstrap, 100),
        ("data.simulation.n_train", simulation.n_train, 1),
        ("data.simulation.n_inner", simulation.n_inner, 0),
        ("data.simulation.n_test", simulation.n_test, 1),
        ("data.simulation.width", simulation.width, 4),
        ("data.simulation.min_patches", simulation.min_patches, 1024),
        ("data.simulation.max_patches", simulation.max_patches, 1024),
    ]
    for path, value, low in at_least:
        if value is not None and not value >= low:
            raise ValueError(f"{path} is {value}; it must be at least {low}")
    positive = [
        ("optimizer.lr", config.optimizer.lr),
        ("schedule.max_lr", config.schedule.max_lr),
        ("loss.survival_divisor", loss.survival_divisor),
        ("training.clip_norm", training.clip_norm),
        ("protocol.clip", config.protocol.clip),
    ]
    for path, value in positive:
        if value is not None and not value > 0:
            raise ValueError(f"{path} is {value}; it must be above 0")
    if len(config.optimizer.betas) != 2 or not all(0 <= b < 1 for b in config.optimizer.betas):
        raise ValueError(
            f"optimizer.betas is {list(config.optimizer.betas)}; it must be two numbers in [0, 1)"
        )
    if not 0 <= config.schedule.final_fraction <= 1:
        raise ValueError(
            f"schedule.final_fraction is {config.schedule.final_fraction}; it must be in [0, 1]"
        )
    if not 0 <= loss.alpha <= 1:
        raise ValueError(f"loss.alpha is {loss.alpha}; it must be in [0, 1]")
    for name in ("table_dropout", "patch_dropout"):
        value = getattr(training.augment, name)
        if not 0 <= value < 1:
            raise ValueError(f"training.augment.{name} is {value}; it must be in [0, 1)")
    if not training.augment.slide_shift >= 0:
        raise ValueError(
            f"training.augment.slide_shift is {training.augment.slide_shift}; it must be at least 0"
        )
    if not 0 < config.protocol.inner_fraction < 1:
        raise ValueError(
            f"protocol.inner_fraction is {config.protocol.inner_fraction}; it must be in (0, 1)"
        )
    if not 0 < config.evaluation.level < 1:
        raise ValueError(f"evaluation.level is {config.evaluation.level}; it must be in (0, 1)")
    shares = (simulation.complete, simulation.omics_only, simulation.slide_only)
    if min(shares) < 0 or abs(sum(shares) - 1) > 1e-9:
        raise ValueError(
            f"data.simulation.complete, omics_only and slide_only are {shares}; "
            "they must be at least 0 and sum to 1"
        )
