"""Withhold modalities from rows of a cohort, to see what a model does without them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from survfuse.data.modalities import ArrayModality, BagModality, Source, TableModality

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from survfuse.data.cohort import Cohort


def withhold_rows(cohort: Cohort, without: Mapping[str, NDArray[np.bool_]]) -> Cohort:
    """The cohort as if rows lacked modalities. No bag is copied.

    Args:
        cohort: any.
        without: by modality [n], True where it is withheld.

    Raises:
        ValueError: there is no such modality, or a mask has another length.
    """
    changed = dict(cohort.modalities)
    for name, rows in without.items():
        rows = np.asarray(rows)
        source = cohort.modality(name)
        if rows.shape != (len(cohort),) or rows.dtype != np.bool_:
            raise ValueError(
                f"without[{name!r}] is {rows.dtype} of shape {rows.shape}; "
                f"it must be bool [{len(cohort)}]"
            )
        changed[name] = _without(source, rows)
    return dataclasses.replace(cohort, modalities=changed)


def _without(source: Source, rows: NDArray[np.bool_]) -> Source:
    if isinstance(source, TableModality):
        values = np.where(rows[:, None], np.nan, source.values)
        return dataclasses.replace(source, values=values)
    if isinstance(source, BagModality):
        groups = tuple(() if gone else group for gone, group in zip(rows, source.groups))
        return dataclasses.replace(source, groups=groups)
    if isinstance(source, ArrayModality):
        return dataclasses.replace(source, present=source.present & ~rows)
    return dataclasses.replace(source, graph_of=np.where(rows, -1, source.graph_of))
