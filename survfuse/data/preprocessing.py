"""Impute, clip and scale a table with the statistics of its training rows."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from survfuse.data.labels import row_indices
from survfuse.data.names import shorten

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

DEFAULT_CLIP = 5.0
# a normal distribution's quartiles lie this many standard deviations apart
_NORMAL_IQR = 1.3489795003921634


@dataclass(frozen=True, eq=False)
class TablePreprocessor:
    """`x -> (clip(impute(x)) - center) / scale`, every number fitted on training rows only.

    Clipping comes first because expression z-scores of TCGA reach 36,893: one such value would
    flatten every other patient in a standard deviation.

    Attributes:
        features: names of the columns it was fitted on, [F].
        selected: columns it keeps, [F'] indices into `features`.
        fill: [F'] what replaces NaN.
        low, high: [F'] clipping limits, infinite where there is none.
        center, scale: [F'].

    Example:
        >>> fitted = TablePreprocessor.fit([[0.0], [2.0], [np.nan]], features=["x"], clip=None)
        >>> fitted.transform([[np.nan], [2.0]]).tolist()
        [[0.0], [1.0]]
    """

    features: tuple[str, ...]
    selected: NDArray[np.int64]
    fill: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    center: NDArray[np.float64]
    scale: NDArray[np.float64]

    @classmethod
    def fit(
        cls,
        values: ArrayLike,
        *,
        features: Sequence[str],
        rows: ArrayLike | None = None,
        impute: Literal["mean", "median", "zero"] = "mean",
        clip: float | None = DEFAULT_CLIP,
        scale: Literal["standard", "none"] = "standard",
        select: int | None = None,
    ) -> TablePreprocessor:
        """Statistics of the training rows.

        Args:
            values: [n, F], NaN where unknown.
            features: F names.
            rows: the training rows, indices or a mask [n]; None takes all. Rows without any known
                value are left out.
            impute: what replaces NaN: the training mean or median after clipping, or zero.
            clip: limits at the training median plus and minus `clip` robust standard deviations
                (interquartile range / 1.349). Where that range is 0, as for mutations and silent
                genes, the unit is the median distance of the values that differ from the median:
                a 0/1 column keeps both values, and an outlier does not set its own limit. None
                clips nothing.
            scale: "standard" gives training mean 0 and variance 1 (a constant column becomes 0);
                "none" leaves the values.
            select: keep the so many columns of largest training variance after clipping.

        Raises:
            ValueError: no training row holds a value, a value is infinite, an argument is unknown.
        """
        table = _matrix(values, features)
        _check_options(impute, clip, scale, select, len(features))
        train = table[row_indices(rows, table.shape[0], "rows")]
        train = train[~np.isnan(train).all(axis=1)] if train.shape[1] else train
        if train.shape[0] == 0:
            raise ValueError("rows: none of the training rows holds a value; there must be one")
        low, high = _limits(train, clip)
        fill = _fill(np.clip(train, low, high), impute)
        filled = np.clip(np.where(np.isnan(train), fill, train), low, high)
        variance = filled.var(axis=0)
        selected = np.arange(len(features))
        if select is not None and select < len(features):
            # a stable sort, so that ties are settled by column order
            selected = np.sort(np.argsort(-variance, kind="stable")[:select])
        center, spread = np.zeros(len(features)), np.ones(len(features))
        if scale == "standard":
            center = filled.mean(axis=0)
            deviation = np.sqrt(variance)
            # a constant column has rounding for a deviation
            constant = deviation <= 1e-12 * np.maximum(1.0, np.abs(center))
            spread = np.where(constant, 1.0, deviation)
        return cls(
            tuple(str(name) for name in features),
            selected,
            *(part[selected] for part in (fill, low, high, center, spread)),
        )

    @classmethod
    def raw(cls, values: ArrayLike, *, features: Sequence[str]) -> TablePreprocessor:
        """HEALNet's released treatment: NaN becomes the mean over *all* rows, nothing else."""
        return cls.fit(values, features=features, impute="mean", clip=None, scale="none")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the columns that `transform` returns, [F']."""
        return tuple(self.features[i] for i in self.selected)

    def transform(self, values: ArrayLike) -> NDArray[np.float32]:
        """Apply the frozen statistics.

        Args:
            values: [n, F] in the order of `features`.

        Returns:
            [n, F'] float32.

        Raises:
            ValueError: the width differs from `features`, or a value is infinite.
        """
        table = _matrix(values, self.features)[:, self.selected]
        filled = np.where(np.isnan(table), self.fill, table)
        return ((np.clip(filled, self.low, self.high) - self.center) / self.scale).astype(
            np.float32
        )

    def state(self) -> dict[str, Any]:
        """Everything it holds, as JSON can write it; infinite limits become None."""
        numbers = {
            name: [None if np.isinf(value) else value for value in getattr(self, name).tolist()]
            for name in ("fill", "low", "high", "center", "scale")
        }
        return {
            "features": list(self.features),
            "selected": self.selected.tolist(),
            **numbers,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> TablePreprocessor:
        """The preprocessor that `state()` described, to the last bit."""
        infinite = {"low": -np.inf, "high": np.inf}
        numbers = {
            name: np.array(
                [infinite[name] if value is None else value for value in state[name]]
                if name in infinite
                else state[name],
                dtype=np.float64,
            )
            for name in ("fill", "low", "high", "center", "scale")
        }
        selected = np.array(state["selected"], dtype=np.int64)
        return cls(tuple(state["features"]), selected, **numbers)


def _matrix(values: ArrayLike, features: Sequence[str]) -> NDArray[np.float64]:
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or table.shape[1] != len(features):
        raise ValueError(
            f"values has shape {table.shape}; it must be [rows, {len(features)}], "
            "one column per feature"
        )
    infinite = np.isinf(table)
    if infinite.any():
        row, column = (int(i) for i in np.argwhere(infinite)[0])
        raise ValueError(
            f"values is infinite at row {row}, feature {str(features[column])!r}; "
            "it must be finite, or NaN where unknown"
        )
    return table


def _check_options(
    impute: str, clip: float | None, scale: str, select: int | None, n_features: int
) -> None:
    for name, value, valid in (
        ("impute", impute, ("mean", "median", "zero")),
        ("scale", scale, ("standard", "none")),
    ):
        if value not in valid:
            raise ValueError(f"{name} is {value!r}; it must be one of {shorten(valid)}")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip is {clip}; it must be positive, or None")
    if select is not None and select < 1:
        raise ValueError(f"select is {select}; it must be at least 1, or None")
    if n_features == 0:
        raise ValueError("features is empty; a table needs at least one column")


def _limits(
    train: NDArray[np.float64], clip: float | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    n_features = train.shape[1]
    if clip is None:
        return np.full(n_features, -np.inf), np.full(n_features, np.inf)
    known = ~np.isnan(train).all(axis=0)
    middle, deviation = np.zeros(n_features), np.zeros(n_features)
    lower, middle[known], upper = np.nanpercentile(train[:, known], [25, 50, 75], axis=0)
    robust = (upper - lower) / _NORMAL_IQR
    distance = np.abs(train[:, known] - middle[known])
    distance[~(distance > 0)] = np.nan
    with warnings.catch_warnings():
        # a constant column has no such value
        warnings.simplefilter("ignore", RuntimeWarning)
        typical = np.nan_to_num(np.nanmedian(distance, axis=0))
    deviation[known] = np.where(robust > 0, robust, typical)
    # a column that is constant or unknown in training sets no limit on other rows
    width = np.where(deviation > 0, clip * deviation, np.inf)
    return middle - width, middle + width


def _fill(train: NDArray[np.float64], impute: str) -> NDArray[np.float64]:
    fill = np.zeros(train.shape[1])
    if impute == "zero":
        return fill
    known = ~np.isnan(train).all(axis=0)
    average = np.nanmean if impute == "mean" else np.nanmedian
    fill[known] = average(train[:, known], axis=0)
    return fill
