"""Bags, stores, readers of other tools' files, omics tables, labels, splits, simulation.

Names load on first use, so that reading bags needs no pandas and omics no h5py.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from survfuse.data.bags import Bags
    from survfuse.data.cohort import Cohort
    from survfuse.data.cohort_files import read_cohort
    from survfuse.data.labels import discretize_survival
    from survfuse.data.omics import OmicsTable
    from survfuse.data.packing import pack
    from survfuse.data.readers import read_bag
    from survfuse.data.simulate import simulate_cohort
    from survfuse.data.store import BagStore
    from survfuse.data.targets import ClassTarget

_HOMES = {
    "BagStore": "store",
    "Bags": "bags",
    "ClassTarget": "targets",
    "Cohort": "cohort",
    "OmicsTable": "omics",
    "discretize_survival": "labels",
    "pack": "packing",
    "read_bag": "readers",
    "read_cohort": "cohort_files",
    "simulate_cohort": "simulate",
}
__all__ = [
    "BagStore",
    "Bags",
    "ClassTarget",
    "Cohort",
    "OmicsTable",
    "discretize_survival",
    "pack",
    "read_bag",
    "read_cohort",
    "simulate_cohort",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
