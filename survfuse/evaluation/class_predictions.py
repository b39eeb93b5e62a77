"""What a run leaves behind of a class task: probabilities and labels per fold, no model.

On disk it is `predictions_<task>.csv` (one row per unit, fold and part) and
`predictions_<task>.json` (task, classes, model, protocol). Numbers are written so that reading
gives back the same bits.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from survfuse.evaluation.folds import Fold, FoldedPredictions, read_folds, row_names, write_folds

# behind the names of fold, part, unit and patient, and before the probabilities
_COLUMNS = ("label",)


@dataclass(frozen=True)
class ClassTable:
    """Units (patients, or slides of patients) with their class and its predicted probabilities.

    Args:
        unit_ids: [n] unique names of the rows.
        patient_ids: [n] the patient of each row.
        label: [n] class, -1 where unknown.
        probabilities: [n, K], finite; the rows sum to 1.

    Raises:
        ValueError: a shape, a value or a name is not valid.
    """

    unit_ids: Sequence[str]
    patient_ids: Sequence[str]
    label: ArrayLike
    probabilities: ArrayLike

    def __post_init__(self) -> None:
        units, patients = row_names(self.unit_ids, self.patient_ids)
        label = np.asarray(self.label, dtype=np.int64)
        probabilities = np.asarray(self.probabilities, dtype=np.float64)
        for name, ids in (("unit_ids", units), ("patient_ids", patients)):
            if label.shape != (len(ids),):
                raise ValueError(
                    f"{name} holds {len(ids)} names and label has shape {label.shape}; "
                    "they must be the same"
                )
        if probabilities.ndim != 2 or len(probabilities) != label.size:
            raise ValueError(
                f"probabilities has shape {probabilities.shape}; it must be ({label.size}, classes)"
            )
        if not (np.abs(probabilities.sum(axis=1) - 1) < 1e-6).all() or (probabilities < 0).any():
            raise ValueError("probabilities must be at least 0, and every row must sum to 1")
        wrong = (label < -1) | (label >= probabilities.shape[1])
        if wrong.any():
            raise ValueError(
                f"label holds {label[wrong][0]}; with {probabilities.shape[1]} classes it must be "
                f"from 0 to {probabilities.shape[1] - 1}, or -1 where unknown"
            )
        for name, value in zip(self.__dataclass_fields__, (units, patients, label, probabilities)):
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self.unit_ids)

    def known(self) -> ClassTable:
        """The units whose class is known."""
        rows = np.flatnonzero(self.label >= 0)
        return ClassTable(
            [self.unit_ids[row] for row in rows],
            [self.patient_ids[row] for row in rows],
            self.label[rows],
            self.probabilities[rows],
        )


@dataclass(frozen=True)
class ClassFold(Fold):
    """One fold: units the model was not fitted on, and those that it was."""

    test: ClassTable
    train: ClassTable


@dataclass(frozen=True)
class ClassPredictions(FoldedPredictions):
    """All folds of one class task of one model under one protocol.

    Args:
        task: its name, part of the names of its files.
        model: name used in reports.
        protocol: a name of `protocols.LEAKAGE`, or another with `leakage`.
        classes: names, in the order of the levels where they have one.
        folds: at least one, names unique.
        ordinal: the classes are ordered levels.
        leakage: what leaks, "" for nothing; None takes the protocol's note.

    Raises:
        ValueError: a setting is not valid, a fold has another number of classes, or the protocol
            says that nothing leaks while a patient is in training and test of one fold.
    """

    task: str
    model: str
    protocol: str
    classes: Sequence[str]
    folds: Sequence[ClassFold]
    ordinal: bool = False
    leakage: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(self.classes))
        self._check_folds()
        for fold in self.folds:
            for part, table in (("test", fold.test), ("train", fold.train)):
                if table.probabilities.shape[1] != len(self.classes):
                    raise ValueError(
                        f"fold {fold.fold}: the {part} table has "
                        f"{table.probabilities.shape[1]} classes; it must have "
                        f"{len(self.classes)}: {', '.join(self.classes)}"
                    )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `predictions_<task>.csv` and `predictions_<task>.json` into an existing folder."""

        def cells(table: ClassTable, row: int) -> list[str]:
            probabilities = table.probabilities[row].tolist()
            return [str(int(table.label[row])), *map(repr, probabilities)]

        about = {
            "task": self.task,
            "model": self.model,
            "protocol": self.protocol,
            "leakage": self.leakage,
            "classes": list(self.classes),
            "ordinal": self.ordinal,
        }
        columns = [*_COLUMNS, *(f"prob_{k}" for k in range(len(self.classes)))]
        path = Path(folder) / f"predictions_{self.task}.csv"
        write_folds(path, self.folds, columns, cells, about=about)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], task: str) -> ClassPredictions:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is not what `save` writes; the message names file and line.
        """
        path = Path(folder) / f"predictions_{task}.csv"
        about, tables = read_folds(path, _COLUMNS, _table)
        folds = [ClassFold(name, **parts) for name, parts in tables.items()]
        return cls(folds=folds, **about)


def class_tasks_in(folder: str | os.PathLike[str]) -> list[str]:
    """Names of the class tasks whose predictions lie in a folder, sorted."""
    found = Path(folder).glob("predictions_*.json")
    return sorted(path.stem.removeprefix("predictions_") for path in found)


def _table(units: Sequence[str], patients: Sequence[str], cells: Sequence[list[str]]) -> ClassTable:
    return ClassTable(
        unit_ids=units,
        patient_ids=patients,
        label=[int(row[0]) for row in cells],
        probabilities=[[float(value) for value in row[1:]] for row in cells],
    )
