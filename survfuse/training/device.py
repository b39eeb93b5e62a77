"""Which device a run computes on."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from survfuse.training.config_files import ConfigError

if TYPE_CHECKING:
    from survfuse.data.cohort import Cohort


def pick_device(name: str) -> torch.device:
    """The device that "auto", "cpu", "cuda" or "cuda:1" means on this machine.

    Raises:
        ConfigError: it is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f'training.device is "{name}"; it must be auto, cpu or cuda') from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f'training.device is "{name}", but torch sees no CUDA device; '
            "`survfuse doctor` says why"
        )
    return device


def bags_to_device(cohort: Cohort, device: torch.device) -> Cohort:
    """The cohort with its bags on a CUDA device where they take less than half its free memory.

    A minibatch of bags that lie on the device copies nothing.
    """
    from survfuse.data.bags import Bags
    from survfuse.data.modalities import BagModality

    if device.type != "cuda":
        return cohort
    moved = dict(cohort.modalities)
    for name, source in cohort.modalities.items():
        if isinstance(source, BagModality) and isinstance(source.bags, Bags):
            features = source.bags.features
            size = features.numel() * features.element_size()
            if size < torch.cuda.mem_get_info(device)[0] // 2:
                moved[name] = dataclasses.replace(source, bags=source.bags.to(device))
    return dataclasses.replace(cohort, modalities=moved)
