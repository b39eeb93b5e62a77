"""What predictions of outcomes and of classes share: folds, and how these lie on disk.

On disk they are `<name>.csv`, one row per unit, fold and part, and beside it `<name>.json`, what
they are of. Numbers are written so that reading gives back the same bits.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from survfuse.data.atomic import atomic_path
from survfuse.evaluation.protocols import leakage_note

_FORMAT = 1
_COLUMNS = ("fold", "part", "unit_id", "patient_id")
_PARTS = ("train", "test")


@dataclass(frozen=True)
class Fold:
    """One fold; `test` and `train` are tables with `unit_ids` and `patient_ids`."""

    fold: str
    test: Any
    train: Any

    def __post_init__(self) -> None:
        object.__setattr__(self, "fold", str(self.fold))

    def straddling(self) -> list[str]:
        """Return the patients that are in training and in test, sorted."""
        return sorted(set(self.test.patient_ids) & set(self.train.patient_ids))


class FoldedPredictions:
    """What dataclasses with all folds of one model under one protocol have in common."""

    protocol: str
    folds: Sequence[Fold]
    leakage: str | None

    def _check_folds(self) -> None:
        """Fill in `leakage`; raise unless the folds are unique and leak no more than it says."""
        object.__setattr__(self, "folds", tuple(self.folds))
        if self.leakage is None:
            object.__setattr__(self, "leakage", leakage_note(self.protocol))
        if not self.folds:
            raise ValueError("folds is empty; at least one fold is needed")
        names = [fold.fold for fold in self.folds]
        if len(set(names)) < len(names):
            raise ValueError(f"folds holds a name twice: {', '.join(names)}")
        for fold in self.folds:
            both = fold.straddling()
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


def row_names(
    unit_ids: Sequence[str], patient_ids: Sequence[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Both as tuples of strings, the units unique."""
    units = tuple(str(name) for name in unit_ids)
    if len(set(units)) < len(units):
        twice = next(name for name in units if units.count(name) > 1)
        raise ValueError(f"unit_ids holds {twice!r} more than once")
    return units, tuple(str(name) for name in patient_ids)


def write_folds(
    path: Path,
    folds: Sequence[Fold],
    columns: Sequence[str],
    cells: Callable[[Any, int], Sequence[Any]],
    *,
    about: Mapping[str, Any],
) -> None:
    """Write the CSV `path`, and `about` as JSON beside it.

    Args:
        cells: of a table and the number of a row, what is in its `columns`.
    """
    with atomic_path(path) as temporary, temporary.open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow([*_COLUMNS, *columns])
        for fold in folds:
            for part in _PARTS:
                table = getattr(fold, part)
                writer.writerows(
                    [fold.fold, part, unit, patient, *cells(table, row)]
                    for row, (unit, patient) in enumerate(zip(table.unit_ids, table.patient_ids))
                )
    about = {"format": _FORMAT, **about}
    with atomic_path(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(about, indent=2, allow_nan=False) + "\n")


def read_folds(
    path: Path,
    columns: Sequence[str],
    make_table: Callable[[Sequence[str], Sequence[str], Sequence[list[str]]], Any],
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Read what `write_folds` wrote.

    Args:
        columns: the first of them; there may be more.
        make_table: of units, patients, and the cells of each row.

    Returns:
        `about`; by fold, the tables "test" and "train".

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not what was written; the message names file and line.
    """
    about = _read_about(path.with_suffix(".json"))
    folds: dict[str, dict[str, Any]] = {}
    for (fold, part), rows in _read_rows(path, (*_COLUMNS, *columns)).items():
        units, patients, cells = zip(*((row[2], row[3], row[4:]) for row in rows))
        try:
            folds.setdefault(fold, {})[part] = make_table(units, patients, cells)
        except ValueError as error:
            raise ValueError(f"{path}, fold {fold}, {part} rows: {error}") from None
    for fold, tables in folds.items():
        missing = [part for part in _PARTS if part not in tables]
        if missing:
            raise ValueError(f"{path}: fold {fold} has no {missing[0]}")
    return about, folds


def _read_about(path: Path) -> dict[str, Any]:
    try:
        about = json.loads(path.read_text())
        version = about["format"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a predictions file: {error}") from None
    if version != _FORMAT:
        raise ValueError(f"{path} has format {version}; this version reads format {_FORMAT}")
    del about["format"]
    return about


def _read_rows(path: Path, columns: tuple[str, ...]) -> dict[tuple[str, str], list[list[str]]]:
    """Rows by fold and part, in the order of the file."""
    with path.open(newline="") as stream:
        reader = csv.reader(stream)
        header = next(reader, [])
        if tuple(header[: len(columns)]) != columns:
            raise ValueError(f"{path} does not start with the columns {', '.join(columns)}")
        parts: dict[tuple[str, str], list[list[str]]] = {}
        for row in reader:
            if len(row) != len(header) or row[1] not in _PARTS:
                raise ValueError(f"{path}, line {reader.line_num}: not a row of predictions")
            parts.setdefault((row[0], row[1]), []).append(row)
    return parts
