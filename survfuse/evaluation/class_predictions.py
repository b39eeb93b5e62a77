"""What a run leaves behind of a class task: probabilities and labels per fold, no model.

On disk it is `predictions_<task>.csv` (one row per unit, fold and part) and
`predictions_<task>.json` (task, classes, model, protocol). Numbers are written so that reading
gives back the same bits.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from survfuse.data.atomic import atomic_path
from survfuse.evaluation.protocols import leakage_note

_FORMAT = 1
_COLUMNS = ("fold", "part", "unit_id", "patient_id", "label")


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
        units = tuple(str(name) for name in self.unit_ids)
        patients = tuple(str(name) for name in self.patient_ids)
        label = np.asarray(self.label, dtype=np.int64)
        probabilities = np.asarray(self.probabilities, dtype=np.float64)
        for name, ids in (("unit_ids", units), ("patient_ids", patients)):
            if label.shape != (len(ids),):
                raise ValueError(
                    f"{name} holds {len(ids)} names and label has shape {label.shape}; "
                    "they must be the same"
                )
        if len(set(units)) < len(units):
            twice = next(name for name in units if units.count(name) > 1)
            raise ValueError(f"unit_ids holds {twice!r} more than once")
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
class ClassFold:
    """One fold: units the model was not fitted on, and those that it was."""

    fold: str
    test: ClassTable
    train: ClassTable

    def __post_init__(self) -> None:
        object.__setattr__(self, "fold", str(self.fold))


@dataclass(frozen=True)
class ClassPredictions:
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
        object.__setattr__(self, "folds", tuple(self.folds))
        if self.leakage is None:
            object.__setattr__(self, "leakage", leakage_note(self.protocol))
        if not self.folds:
            raise ValueError("folds is empty; at least one fold is needed")
        names = [fold.fold for fold in self.folds]
        if len(set(names)) < len(names):
            raise ValueError(f"folds holds a name twice: {', '.join(names)}")
        for fold in self.folds:
            for part, table in (("test", fold.test), ("train", fold.train)):
                if table.probabilities.shape[1] != len(self.classes):
                    raise ValueError(
                        f"fold {fold.fold}: the {part} table has "
                        f"{table.probabilities.shape[1]} classes; it must have "
                        f"{len(self.classes)}: {', '.join(self.classes)}"
                    )
            both = sorted(set(fold.test.patient_ids) & set(fold.train.patient_ids))
            if both and not self.leakage:
                raise ValueError(
                    f"fold {fold.fold}: {len(both)} patients are in training and test (first: "
                    f"{both[0]}), but protocol {self.protocol!r} says that nothing leaks"
                )

    @property
    def repeated(self) -> bool:
        """Whether a patient is tested in more than one fold (repeated splits, not k folds)."""
        patients = [name for fold in self.folds for name in set(fold.test.patient_ids)]
        return len(set(patients)) < len(patients)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `predictions_<task>.csv` and `predictions_<task>.json` into an existing folder."""
        path = Path(folder) / f"predictions_{self.task}.csv"
        with atomic_path(path) as temporary, temporary.open("w", newline="") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow([*_COLUMNS, *(f"prob_{k}" for k in range(len(self.classes)))])
            for fold in self.folds:
                for part, table in (("train", fold.train), ("test", fold.test)):
                    writer.writerows(
                        [fold.fold, part, unit, patient, int(label), *map(repr, own.tolist())]
                        for unit, patient, label, own in zip(
                            table.unit_ids, table.patient_ids, table.label, table.probabilities
                        )
                    )
        about = {
            "format": _FORMAT,
            "task": self.task,
            "model": self.model,
            "protocol": self.protocol,
            "leakage": self.leakage,
            "classes": list(self.classes),
            "ordinal": self.ordinal,
        }
        with atomic_path(path.with_suffix(".json")) as temporary:
            temporary.write_text(json.dumps(about, indent=2, allow_nan=False) + "\n")

    @classmethod
    def load(cls, folder: str | os.PathLike[str], task: str) -> ClassPredictions:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is not what `save` writes; the message names file and line.
        """
        path = Path(folder) / f"predictions_{task}.json"
        try:
            about = json.loads(path.read_text())
            version = about.pop("format")
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a predictions file: {error}") from None
        if version != _FORMAT:
            raise ValueError(f"{path} has format {version}; this version reads format {_FORMAT}")
        path = path.with_suffix(".csv")
        tables = _read_tables(path)
        folds = []
        for name in dict.fromkeys(fold for fold, _ in tables):
            missing = [part for part in ("train", "test") if (name, part) not in tables]
            if missing:
                raise ValueError(f"{path}: fold {name} has no {missing[0]}")
            folds.append(ClassFold(name, tables[name, "test"], tables[name, "train"]))
        return cls(folds=folds, **about)


def class_tasks_in(folder: str | os.PathLike[str]) -> list[str]:
    """Names of the class tasks whose predictions lie in a folder, sorted."""
    found = Path(folder).glob("predictions_*.json")
    return sorted(path.stem.removeprefix("predictions_") for path in found)


def _read_tables(path: Path) -> dict[tuple[str, str], ClassTable]:
    with path.open(newline="") as stream:
        reader = csv.reader(stream)
        header = next(reader, [])
        if tuple(header[: len(_COLUMNS)]) != _COLUMNS:
            raise ValueError(f"{path} does not start with the columns {', '.join(_COLUMNS)}")
        parts: dict[tuple[str, str], list[list[str]]] = {}
        for row in reader:
            if len(row) != len(header) or row[1] not in ("train", "test"):
                raise ValueError(f"{path}, line {reader.line_num}: not a row of predictions")
            parts.setdefault((row[0], row[1]), []).append(row)
    tables = {}
    for key, rows in parts.items():
        try:
            tables[key] = ClassTable(
                unit_ids=[row[2] for row in rows],
                patient_ids=[row[3] for row in rows],
                label=[int(row[4]) for row in rows],
                probabilities=[[float(value) for value in row[5:]] for row in rows],
            )
        except ValueError as error:
            raise ValueError(f"{path}, fold {key[0]}, {key[1]} rows: {error}") from None
    return tables
