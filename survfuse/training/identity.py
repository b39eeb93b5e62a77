"""What makes two runs the same run: hashes of the cohort and of the folds."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from survfuse.training.folds import FoldPlan

if TYPE_CHECKING:
    from survfuse.data.cohort import Cohort


def fingerprint(cohort: Cohort) -> str:
    """A hash of who is in a cohort, their outcomes, covariates and classes, and what is known.

    Of bags and nodes only the lengths are hashed: reading every patch of a large store would take
    minutes.
    """
    digest = hashlib.sha256()
    for words in (cohort.unit_ids, cohort.patient_ids, map(str, cohort.covariates.columns)):
        digest.update("\n".join(words).encode())
    # as text: a column may hold words
    digest.update(cohort.covariates.to_csv(index=False).encode())
    arrays = [cohort.time, cohort.event]
    for name, source in cohort.modalities.items():
        digest.update(f"{name} {source.kind} {source.channels}".encode())
        digest.update("\n".join(getattr(source, "features", ())).encode())
        groups = source.groups if source.kind == "table" else {}
        for group, columns in groups.items():
            digest.update(f"{group}: {' '.join(columns)}".encode())
        arrays.append(source.present)
        for attribute in ("values", "n_patches", "graph_of"):
            if (values := getattr(source, attribute, None)) is not None:
                arrays.append(values)
        if source.kind == "graph":
            arrays += [source.nodes.lengths, *source.edges]
    for name, target in cohort.targets.items():
        digest.update("\n".join((name, str(target.ordinal), *target.classes)).encode())
        arrays.append(target.labels)
    _add(digest, arrays)
    return digest.hexdigest()


def fingerprint_folds(folds: Sequence[FoldPlan]) -> str:
    """A hash of the rows of every part of every fold."""
    digest = hashlib.sha256()
    for plan in folds:
        digest.update(f"{plan.seed} {plan.fold}".encode())
        parts = (plan.split.train, plan.split.validation, plan.split.test)
        _add(digest, (np.asarray(part, dtype=np.int64) for part in parts))
    return digest.hexdigest()


def _add(digest, arrays: Iterable[np.ndarray | torch.Tensor]) -> None:
    for array in arrays:
        if isinstance(array, torch.Tensor):
            # numpy has no bfloat16
            array = array.detach().cpu().contiguous().view(torch.uint8).numpy()
        digest.update(f"{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
