"""Learning rate as a function of the step, without state of its own.

A pure function of the step number needs nothing in a checkpoint and cannot drift on resume.
"""

from __future__ import annotations

import math

import torch

from survfuse.training.config import OptimizerConfig, ScheduleConfig

# defaults of torch.optim.lr_scheduler.OneCycleLR, which the released HEALNet uses
_RISE, _DIV, _FINAL_DIV, _BASE_MOMENTUM, _MAX_MOMENTUM = 0.3, 25.0, 1e4, 0.85, 0.95


def learning_rate(
    step: int, *, total_steps: int, optimizer: OptimizerConfig, schedule: ScheduleConfig
) -> tuple[float, float | None]:
    """Learning rate and, for "onecycle", the first beta of step `step`.

    Args:
        step: optimiser steps taken so far, from 0 to total_steps - 1.
        total_steps: optimiser steps if no epoch is cut by early stopping.
        optimizer: gives the base learning rate.
        schedule: gives the shape.

    Returns:
        (lr, beta): beta is None where the schedule leaves the optimiser's own.
    """
    if schedule.name == "onecycle":
        return _onecycle(step, total_steps, schedule.max_lr or optimizer.lr)
    warmup = min(schedule.warmup_steps, total_steps)
    if step < warmup:
        return optimizer.lr * (step + 1) / warmup, None
    if schedule.name == "constant":
        return optimizer.lr, None
    progress = (step - warmup) / max(total_steps - warmup, 1)
    share = schedule.final_fraction + (1 - schedule.final_fraction) * _cosine(1.0, 0.0, progress)
    return optimizer.lr * share, None


def apply_schedule(
    optimizer: torch.optim.Optimizer,
    step: int,
    *,
    total_steps: int,
    settings: OptimizerConfig,
    schedule: ScheduleConfig,
) -> float:
    """Set the optimiser's learning rate (and beta) for `step`; returns the learning rate."""
    lr, beta = learning_rate(step, total_steps=total_steps, optimizer=settings, schedule=schedule)
    for group in optimizer.param_groups:
        group["lr"] = lr
        if beta is not None:
            group["betas"] = (beta, *group["betas"][1:])
    return lr


def _onecycle(step: int, total_steps: int, peak: float) -> tuple[float, float]:
    start = peak / _DIV
    top = float(_RISE * total_steps) - 1
    if step <= top:
        progress = step / top if top > 0 else 1.0
        return _cosine(start, peak, progress), _cosine(_MAX_MOMENTUM, _BASE_MOMENTUM, progress)
    progress = (step - top) / (total_steps - 1 - top)
    end = start / _FINAL_DIV
    return _cosine(peak, end, progress), _cosine(_BASE_MOMENTUM, _MAX_MOMENTUM, progress)


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * progress))


def make_optimizer(
    parameters: list[torch.nn.Parameter], settings: OptimizerConfig
) -> torch.optim.Optimizer:
    """The optimiser a configuration names."""
    kinds = {
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
        "radam": torch.optim.RAdam,
    }
    return kinds[settings.name](
        parameters,
        lr=settings.lr,
        betas=tuple(settings.betas),
        weight_decay=settings.weight_decay,
    )
