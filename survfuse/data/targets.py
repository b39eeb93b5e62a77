"""Classes of units beside their survival: a diagnosis, a subtype, an ordered grade."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from survfuse.data.names import shorten

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

UNKNOWN = -1


@dataclass(frozen=True, eq=False)
class ClassTarget:
    """The class of every unit of a cohort, unknown for any of them.

    Attributes:
        labels: [n] int64, position in `classes`; -1 where unknown.
        classes: names of at least two classes, in the order of the levels where they have one.
        ordinal: the classes are ordered levels, as grades are.

    Raises (when made):
        ValueError: a label is no class, or there are fewer than two classes or one twice.
    """

    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    ordinal: bool = False

    def __post_init__(self) -> None:
        classes = tuple(str(name) for name in self.classes)
        if len(classes) < 2 or len(set(classes)) < len(classes):
            raise ValueError(
                f"classes is {list(classes)}; it must hold at least two names, each once"
            )
        labels = np.array(self.labels)
        if labels.ndim != 1 or not (np.issubdtype(labels.dtype, np.integer) or labels.size == 0):
            raise ValueError(
                f"labels is {labels.dtype} of shape {labels.shape}; it must be a vector of integers"
            )
        labels = labels.astype(np.int64)
        wrong = (labels < UNKNOWN) | (labels >= len(classes))
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            raise ValueError(
                f"labels at row {row} is {labels[row]}; with {len(classes)} classes it must be "
                f"from 0 to {len(classes) - 1}, or -1 where unknown"
            )
        object.__setattr__(self, "classes", classes)
        object.__setattr__(self, "labels", labels)

    @classmethod
    def from_column(
        cls, values: ArrayLike, classes: Sequence[str] | None = None, ordinal: bool = False
    ) -> ClassTarget:
        """The target of a column of words or whole numbers; None, NaN and "" are unknown.

        Args:
            values: [n]; a pandas series lends its name and index to the errors.
            classes: the names there are, for levels from the lowest; None takes those that occur,
                sorted.
            ordinal: the classes are ordered levels.

        Raises:
            ValueError: a value is none of `classes`, a number is not whole, fewer than two classes
                occur, or levels are words whose order `classes` does not say.

        Example:
            >>> ClassTarget.from_column(["G3", None, "G2"], ("G2", "G3"), ordinal=True).labels
            array([ 1, -1,  0])
        """
        name = getattr(values, "name", None)
        name = name if isinstance(name, str) and name else "values"
        column = np.asarray(values, dtype=object)
        if column.ndim != 1:
            raise ValueError(f"{name} has shape {column.shape}; it must be a vector")
        words = [_word(value, f"{name} at {_row(values, row)}") for row, value in enumerate(column)]
        if classes is None:
            known = [
                value for value, word in zip(column.tolist(), words) if word is not None
            ]  # fmt: skip
            numbers = all(isinstance(value, Real) for value in known)
            if ordinal and not numbers:
                raise ValueError(
                    f"classes is None; the levels of {name} are words, so it must name them from "
                    f"the lowest: {shorten(sorted({w for w in words if w is not None}))}"
                )
            found = {word for word in words if word is not None}
            classes = sorted(found, key=int if numbers and _whole(found) else str)
            if len(classes) < 2:
                raise ValueError(
                    f"{name} holds the classes {shorten(classes)}; there must be at least two"
                )
        position = {str(word): i for i, word in enumerate(classes)}
        for row, word in enumerate(words):
            if word is not None and word not in position:
                raise ValueError(
                    f"{name} at {_row(values, row)} is {word!r}; it must be one of "
                    f"{shorten(classes)}, or missing where unknown"
                )
        labels = [UNKNOWN if word is None else position[word] for word in words]
        return cls(np.array(labels, dtype=np.int64), tuple(classes), ordinal)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def known(self) -> NDArray[np.bool_]:
        """[n] units whose class is known."""
        return self.labels >= 0

    def counts(self) -> dict[str, int]:
        """Units of every class, by name."""
        found = np.bincount(self.labels[self.known], minlength=len(self.classes))
        return {name: int(count) for name, count in zip(self.classes, found)}

    def subset(self, rows: NDArray[np.int64]) -> ClassTarget:
        """The units `rows`, in that order; the classes stay."""
        return ClassTarget(self.labels[rows], self.classes, self.ordinal)

    def with_classes(
        self,
        classes: Sequence[str],
        *,
        ordinal: bool = False,
        others: Literal["error", "unknown"] = "error",
    ) -> ClassTarget:
        """The same units in terms of other classes, matched by name.

        Args:
            classes: their names, in the new order.
            ordinal: they are ordered levels.
            others: units of a class that is not among them are an error, or unknown.

        Raises:
            ValueError: a unit's class is not among them, and `others` is "error".
        """
        position = {name: i for i, name in enumerate(classes)}
        lost = [name for name, n in self.counts().items() if n and name not in position]
        if lost and others == "error":
            raise ValueError(
                f"classes is {list(classes)}, but units are of {shorten(lost)}; it must name every "
                "class that occurs"
            )
        # the last entry is what -1 looks up
        new = np.array([position.get(name, UNKNOWN) for name in self.classes] + [UNKNOWN])
        return ClassTarget(new[self.labels], tuple(classes), ordinal)


def matching_targets(
    given: Mapping[str, ClassTarget], state: Mapping[str, Any], n: int
) -> dict[str, ClassTarget]:
    """The targets of a saved state, filled with what a cohort of n units knows of them.

    Args:
        given: the cohort's targets; those that the state does not have are left out.
        state: {name: {"classes": names, "ordinal": whether they are ordered}}.
        n: number of units.
    """
    found = {}
    for name, about in state.items():
        classes, ordinal = tuple(about["classes"]), about["ordinal"]
        if name in given:
            found[name] = given[name].with_classes(classes, ordinal=ordinal, others="unknown")
        else:
            found[name] = ClassTarget(np.full(n, UNKNOWN), classes, ordinal)
    return found


def check_targets(targets: Mapping[str, Any], n: int) -> None:
    """Raise unless `targets` maps names to targets of n units.

    Raises:
        TypeError: a target is no `ClassTarget`.
        ValueError: one has another length.
    """
    for name, target in targets.items():
        if not isinstance(target, ClassTarget):
            raise TypeError(
                f"targets[{name!r}] is {target!r}; it must be a ClassTarget "
                "(ClassTarget.from_column makes one of a column)"
            )
        if len(target) != n:
            raise ValueError(
                f"targets[{name!r}] has {len(target)} rows and time {n}; they must be the same"
            )


def _word(value: Any, where: str) -> str | None:
    """The name of a class, None where it is unknown."""
    if isinstance(value, (bool, np.bool_)):
        return str(bool(value))
    if isinstance(value, str):
        return value.strip() or None
    try:
        if value is None or bool(value != value):
            return None
    except TypeError:
        # pandas' NA: nothing is true of it
        return None
    if isinstance(value, Real) and not isinstance(value, Integral):
        if not float(value).is_integer():
            raise ValueError(f"{where} is {value}; a class must be a word or a whole number")
        return str(int(value))
    return str(value)


def _whole(words: set[str]) -> bool:
    return all(word.lstrip("-").isdigit() for word in words)


def _row(values: Any, row: int) -> str:
    index = getattr(values, "index", None)
    # lists have a method called index; only a pandas index names rows
    if index is None or callable(index):
        return f"row {row}"
    return f"row {row} ({index[row]})"
