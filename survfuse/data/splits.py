"""Which rows train, validate and test: folds by patient, by site, published files, random rows.

A patient with several slides must not straddle a split. Every function here keeps patients whole
except `random_row_splits`, which reproduces a published protocol that does not; `leakage` says by
how much.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from survfuse.data.names import shorten
from survfuse.extras import require

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

MIN_INNER_EVENTS = 20


class Split(NamedTuple):
    """Rows of a cohort. A part may be empty, but not `train`."""

    train: NDArray[np.int64]
    validation: NDArray[np.int64]  # early stopping; empty: a fixed number of epochs
    test: NDArray[np.int64]  # what is reported


class CaseSplit(NamedTuple):
    """One published fold: names of cases (or of slides) as the file has them."""

    name: str
    train: tuple[str, ...]
    validation: tuple[str, ...]  # the column `val`
    test: tuple[str, ...]  # the column `test`; the 5-fold files of MCAT's family have none

    def rows(self, ids: Sequence[str], *, mismatch: Literal["error", "drop"] = "error") -> Split:
        """The rows of a cohort that this fold names.

        A file without a `test` column holds out its `val` cases for the reported number, so they
        become `test` here and `validation` is empty.

        Args:
            ids: [n] the cohort's patient ids (or its unit ids where the file names slides).
            mismatch: what to do with cases the cohort lacks and rows the file does not name:
                "error", or "drop" them.

        Raises:
            ValueError: the two sets differ (and `mismatch` is "error"), or no train row is left.
        """
        if mismatch not in ("error", "drop"):
            raise ValueError(f"mismatch is {mismatch!r}; it must be 'error' or 'drop'")
        row_ids = np.asarray(ids, dtype=str)
        named = set(self.train) | set(self.validation) | set(self.test)
        known = set(row_ids.tolist())
        if mismatch == "error":
            for missing, what in (
                (named - known, "names cases that the cohort lacks"),
                (known - named, "leaves out cases of the cohort"),
            ):
                if missing:
                    raise ValueError(
                        f"{self.name} {what}: {shorten(sorted(missing))}; "
                        "mismatch='drop' leaves them aside"
                    )
        train, validation, test = (
            np.flatnonzero(np.isin(row_ids, list(part)))
            for part in (self.train, self.validation, self.test)
        )
        if train.size == 0:
            raise ValueError(f"{self.name}: none of its train cases is in the cohort")
        if not self.test:
            validation, test = test, validation
        return Split(train, validation, test)


def check_no_overlap(
    train: Sequence[str],
    validation: Sequence[str],
    test: Sequence[str] = (),
    *,
    source: str = "split",
    what: str = "case",
) -> None:
    """Raise when a name is in two parts of a split.

    Raises:
        ValueError: names the first such case, in sorted order, and the two parts.
    """
    parts = {"train": set(train), "validation": set(validation), "test": set(test)}
    for first, second in (("train", "validation"), ("train", "test"), ("validation", "test")):
        both = sorted(parts[first] & parts[second])
        if both:
            more = f" ({len(both)} such {what}s)" if len(both) > 1 else ""
            raise ValueError(
                f"{source}: {what} {both[0]!r} is in both {first} and {second}{more}; "
                "it must be in one part only"
            )


def check_patients_whole(
    split: Split, patient_ids: Sequence[str], *, source: str = "split"
) -> None:
    """Raise when a patient has rows in two parts of `split`.

    Raises:
        ValueError: names the first such patient.
    """
    ids = np.asarray(patient_ids, dtype=str)
    check_no_overlap(*(ids[part].tolist() for part in split), source=source, what="patient")


def leakage(split: Split, patient_ids: Sequence[str]) -> float:
    """Share of test rows whose patient also has a row in train; NaN for an empty test part."""
    if len(split.test) == 0:
        return math.nan
    ids = np.asarray(patient_ids, dtype=str)
    return float(np.isin(ids[split.test], ids[split.train]).mean())


def read_splits(folder: str | os.PathLike[str]) -> list[CaseSplit]:
    """The folds `splits_0.csv`, `splits_1.csv`, ... of a folder, in the order of their numbers.

    Columns `train`, `val` and optionally `test` hold case ids (slide ids in CLAM's files), padded
    with empty cells.

    Args:
        folder: for example `splits/5foldcv/tcga_kirp` of MCAT, PORPOISE, CMTA or SurvPath.

    Raises:
        FileNotFoundError: the folder does not exist or holds no such file.
        ValueError: a column is missing, a part is empty, a case is in two parts.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"split folder {folder} does not exist")
    numbered = {
        int(match[1]): path
        for path in folder.iterdir()
        if (match := re.fullmatch(r"splits_(\d+)\.csv", path.name))
    }
    if not numbered:
        raise FileNotFoundError(f"{folder} holds no file splits_<number>.csv")
    return [_read_split(numbered[number]) for number in sorted(numbered)]


def patient_folds(
    patient_ids: Sequence[str], event: ArrayLike, *, n_folds: int = 5, seed: int = 0
) -> list[Split]:
    """k folds of whole patients with equal shares of events.

    Args:
        patient_ids: [n] the patient of each row.
        event: [n] True where the event was seen.
        n_folds: number of folds; each is the test part once.
        seed: of the permutation.

    Returns:
        `n_folds` splits with an empty `validation`; see `with_inner_validation`.

    Raises:
        ValueError: there are fewer patients than folds, or a patient's rows disagree on `event`.
    """
    patients = _Patients.of(patient_ids, event)
    _check_n_folds(n_folds, patients.n, "patients")
    rng = np.random.default_rng(seed)
    fold_of = np.empty(patients.n, dtype=np.int64)
    dealt = 0
    # the second stratum is dealt on from where the first ended, which keeps the sizes equal
    for stratum in (True, False):
        members = rng.permutation(np.flatnonzero(patients.event == stratum))
        fold_of[members] = (dealt + np.arange(members.size)) % n_folds
        dealt += members.size
    return _splits_of(fold_of[patients.of_row], n_folds)


def site_preserving_folds(
    patient_ids: Sequence[str],
    sites: Sequence[str],
    event: ArrayLike,
    *,
    n_folds: int = 5,
    seed: int = 0,
) -> list[Split]:
    """k folds of whole sites, balanced in events and patients.

    Slides carry the signature of the site that prepared them, and sites differ in outcome; a model
    tested on sites it was trained on can use that. Sites go, largest first, to the fold where they
    leave the squared loads of events and of patients smallest.

    Args:
        patient_ids: [n] the patient of each row.
        sites: [n] the site of each row, for TCGA the tissue source site code.
        event: [n] True where the event was seen.
        n_folds: number of folds; each is the test part once.
        seed: decides between equal sites.

    Raises:
        ValueError: fewer sites than folds, a patient of two sites, or rows that disagree on event.

    Source: Howard et al., Nature Communications 2021, preserved-site cross-validation (there solved
    as a quadratic program).
    """
    patients = _Patients.of(patient_ids, event)
    site_of = patients.one_value(sites, "site")
    names, index = np.unique(site_of, return_inverse=True)
    _check_n_folds(n_folds, names.size, "sites")
    size = np.bincount(index) / patients.n
    n_events = np.bincount(index, weights=patients.event)
    size_and_events = np.stack([size, n_events / max(n_events.sum(), 1)], axis=1)
    shuffled = np.random.default_rng(seed).permutation(names.size)
    order = shuffled[np.argsort(-size_and_events[shuffled].sum(1), kind="stable")]
    load = np.zeros((n_folds, 2))
    fold_of_site = np.empty(names.size, dtype=np.int64)
    for site in order:
        grown = (load + size_and_events[site]) ** 2 - load**2
        fold = int(np.argmin(grown.sum(1)))
        load[fold] += size_and_events[site]
        fold_of_site[site] = fold
    return _splits_of(fold_of_site[index][patients.of_row], n_folds)


def with_inner_validation(
    split: Split,
    patient_ids: Sequence[str],
    event: ArrayLike,
    *,
    fraction: float = 0.2,
    min_events: int = MIN_INNER_EVENTS,
    seed: int = 0,
) -> Split:
    """Move patients from train to validation for early stopping, if enough events come with them.

    Fewer than `min_events` events make a validation loss that is mostly noise. Then the split comes
    back with `validation` empty, and training runs a fixed number of epochs.

    Args:
        split: its `validation` must be empty.
        patient_ids, event: [n], of all rows of the cohort.
        fraction: share of the training patients that move, stratified by event.
        min_events: patients with an event that validation must hold.
        seed: of the permutation.

    Raises:
        ValueError: `split.validation` is not empty, or `fraction` is not between 0 and 1.
    """
    if len(split.validation):
        raise ValueError(f"split.validation has {len(split.validation)} rows; it must be empty")
    if not 0 < fraction < 1:
        raise ValueError(f"fraction is {fraction}; it must lie between 0 and 1")
    train = np.asarray(split.train)
    ids = np.asarray(patient_ids, dtype=str)[train]
    patients = _Patients.of(ids, np.asarray(event)[train])
    rng = np.random.default_rng(seed)
    moved = np.zeros(patients.n, dtype=bool)
    for stratum in (True, False):
        members = rng.permutation(np.flatnonzero(patients.event == stratum))
        moved[members[: round(fraction * members.size)]] = True
    if int((moved & patients.event).sum()) < min_events:
        return split._replace(validation=np.empty(0, dtype=np.int64))
    moved_rows = moved[patients.of_row]
    return split._replace(train=train[~moved_rows], validation=train[moved_rows])


def random_row_splits(
    n_rows: int,
    *,
    seeds: Sequence[int] = (1, 2, 3, 4, 5),
    fractions: tuple[float, float, float] = (0.7, 0.15, 0.15),
) -> list[Split]:
    """Random splits over *rows*: the `healnet` protocol. Patients with several slides leak.

    The same permutation and part sizes as `torch.manual_seed(seed)` followed by
    `torch.utils.data.random_split`, which is what HEALNet's released loop calls. It takes the
    second part for early stopping and reports the third.

    Args:
        n_rows: slide rows of the table.
        seeds: one split each.
        fractions: of train, validation and test; they must sum to 1.

    Raises:
        ValueError: the fractions do not sum to 1, or a part would be empty.

    Source: Hemker et al., HEALNet, NeurIPS 2024, and its released code.
    """
    import torch

    if abs(sum(fractions) - 1) > 1e-9 or min(fractions) <= 0:
        raise ValueError(f"fractions is {fractions}; they must be positive and sum to 1")
    sizes = [math.floor(n_rows * fraction) for fraction in fractions]
    for extra in range(n_rows - sum(sizes)):
        sizes[extra % 3] += 1
    if min(sizes) == 0:
        raise ValueError(f"n_rows is {n_rows}; parts of {sizes} rows leave one empty")
    splits = []
    for seed in seeds:
        order = torch.randperm(n_rows, generator=torch.Generator().manual_seed(int(seed))).numpy()
        splits.append(Split(*np.split(order, np.cumsum(sizes)[:2])))
    return splits


class _Patients(NamedTuple):
    """Rows gathered to patients."""

    n: int
    of_row: NDArray[np.int64]  # [rows] the patient's number
    first_row: NDArray[np.int64]  # [n]
    event: NDArray[np.bool_]  # [n]
    ids: NDArray[np.str_]  # [n]

    @classmethod
    def of(cls, patient_ids: Sequence[str], event: ArrayLike) -> _Patients:
        ids, first, of_row = np.unique(
            np.asarray(patient_ids, dtype=str), return_index=True, return_inverse=True
        )
        events = np.asarray(event, dtype=bool)
        if events.shape != of_row.shape:
            raise ValueError(
                f"patient_ids has {of_row.size} rows and event {events.size}; "
                "they must have the same number"
            )
        patients = cls(ids.size, of_row, first, events[first], ids)
        patients.one_value(events, "event")
        return patients

    def one_value(self, values: ArrayLike, name: str) -> NDArray:
        """The value of each patient, [n]; an error where a patient's rows disagree."""
        array = np.asarray(values)
        if array.shape != self.of_row.shape:
            raise ValueError(
                f"{name} has shape {array.shape}; it must have one value for each of "
                f"{self.of_row.size} rows"
            )
        value = array[self.first_row]
        wrong = array != value[self.of_row]
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            patient = self.of_row[row]
            raise ValueError(
                f"patient {str(self.ids[patient])!r} has {name} {value[patient]!s} in one row and "
                f"{array[row]!s} in another; it must have one"
            )
        return value


def _splits_of(fold_of_row: NDArray[np.int64], n_folds: int) -> list[Split]:
    empty = np.empty(0, dtype=np.int64)
    return [
        Split(np.flatnonzero(fold_of_row != fold), empty, np.flatnonzero(fold_of_row == fold))
        for fold in range(n_folds)
    ]


def _check_n_folds(n_folds: int, available: int, what: str) -> None:
    if not 2 <= n_folds <= available:
        raise ValueError(
            f"n_folds is {n_folds}; with {available} {what} it must lie between 2 and {available}"
        )


def _read_split(path: Path) -> CaseSplit:
    pd = require("pandas", extra="train")
    frame = pd.read_csv(path, dtype=str)
    for column in ("train", "val"):
        if column not in frame.columns:
            raise ValueError(
                f"{path} has the columns {shorten(list(frame.columns))}; it must have {column!r}"
            )
    parts = {
        part: tuple(frame[part].dropna()) if part in frame.columns else ()
        for part in ("train", "val", "test")
    }
    for column in ("train", "val"):
        if not parts[column]:
            raise ValueError(f"{path}: the column {column!r} is empty")
    check_no_overlap(*parts.values(), source=str(path))
    return CaseSplit(path.stem, parts["train"], parts["val"], parts["test"])
