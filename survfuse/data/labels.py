"""Survival outcomes: the polarity of `event`, checks of times, and discrete time bins.

Everywhere in survfuse `event` is True where the event was seen. Released TCGA tables carry
`censorship`, 1 where it was *not* seen; they are converted here, once, at the boundary.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

DAYS_PER_MONTH = 365.25 / 12


def event_from_censorship(
    censorship: ArrayLike, *, name: str | None = None, unit_ids: Sequence[str] | None = None
) -> NDArray[np.bool_]:
    """`event` (True = seen) from `censorship` (1 = not seen).

    Args:
        censorship: [n] of 0 and 1 or of bool.
        name: what to call the column in an error; by default the name of a pandas series.
        unit_ids: [n] names of the rows for an error; by default the index of a pandas series.

    Raises:
        ValueError: a value is neither 0 nor 1; names the column and the row.

    Example:
        >>> event_from_censorship([1, 0]).tolist()
        [False, True]
    """
    return ~_binary(censorship, name or _series_name(censorship, "censorship"), unit_ids)


def censorship_from_event(
    event: ArrayLike, *, name: str | None = None, unit_ids: Sequence[str] | None = None
) -> NDArray[np.int64]:
    """`censorship` (1 = event not seen) from `event` (1 = seen), to write other tools' tables.

    Raises:
        ValueError: a value is neither 0 nor 1; names the column and the row.
    """
    seen = _binary(event, name or _series_name(event, "event"), unit_ids)
    return (~seen).astype(np.int64)


def check_survival(
    time: ArrayLike,
    event: ArrayLike,
    *,
    time_name: str | None = None,
    event_name: str | None = None,
    unit_ids: Sequence[str] | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Times and events as arrays, or an error that names the first wrong row.

    Args:
        time: [n] time to the event or to the last visit, any one unit, at least 0.
        event: [n] 1 or True where the event was seen, 0 or False where censored.
        time_name, event_name: column names for errors; by default those of pandas series.
        unit_ids: [n] names of the rows for errors; by default the index of a pandas series.

    Returns:
        time as float64 and event as bool, both [n].

    Raises:
        ValueError: a time is NaN, infinite or negative; an event is neither 0 nor 1; the two
            lengths differ; there is no row.
    """
    time_name = time_name or _series_name(time, "time")
    event_name = event_name or _series_name(event, "event")
    unit_ids = _row_names(time, unit_ids)
    try:
        # a copy: pandas hands out read-only views, which torch refuses
        times = np.array(time, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{time_name} holds something that is not a number: {error}") from None
    if times.ndim != 1:
        raise ValueError(f"{time_name} has shape {times.shape}; it must be a vector")
    if times.size == 0:
        raise ValueError(f"{time_name} is empty; it must hold at least one row")
    for wrong, word in (
        (np.isnan(times), "a survival time must be known"),
        (np.isinf(times), "a survival time must be finite"),
        (times < 0, "a survival time must be at least 0"),
    ):
        if wrong.any():
            raise ValueError(f"{time_name} {_at(times, wrong, unit_ids)}; {word}")
    events = _binary(event, event_name, unit_ids)
    if events.shape != times.shape:
        raise ValueError(
            f"{time_name} has {times.size} rows and {event_name} {events.size}; "
            "they must have the same number"
        )
    return times, events


def check_known_survival(
    time: ArrayLike, event: ArrayLike, *, unit_ids: Sequence[str] | None = None
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """As `check_survival`, but a time may be NaN, an unknown outcome; its event becomes False.

    Raises:
        ValueError: a known outcome is not valid, or there is no row.
    """
    times = np.array(time, dtype=np.float64)
    unknown = np.isnan(times)
    if times.ndim != 1 or not unknown.any():
        return check_survival(time, event, unit_ids=unit_ids)
    # an unknown event may be written as NaN; whatever stands there is not read
    events = np.where(unknown, 0.0, np.array(event, dtype=np.float64))
    _, seen = check_survival(np.where(unknown, 0.0, times), events, unit_ids=unit_ids)
    return times, seen


def discretize_survival(
    time: ArrayLike,
    *,
    event: ArrayLike,
    n_bins: int = 4,
    fit_on: ArrayLike | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Time bins whose interior edges are quantiles of the uncensored times.

    Bin k is `[edges[k], edges[k + 1])`; the outer edges are 0 and infinity. The censored rows are
    put into the same bins. Edges that coincide are merged, with a warning, so that there may be
    fewer than `n_bins` bins.

    Args:
        time: [n] times, at least 0. A pandas series lends its name and index to the errors.
        event: [n] 1 or True where the event was seen.
        n_bins: number of bins, at least 2.
        fit_on: rows whose uncensored times set the edges: indices, or a boolean mask [n].
            None takes all rows, which lets the test rows into the edges: the `healnet` protocol.

    Returns:
        labels [n] int64 in 0 .. bins - 1, and edges [bins + 1] float64, first 0 and last infinity.

    Raises:
        ValueError: a time is NaN, infinite or negative; an event is neither 0 nor 1; every row of
            `fit_on` is censored; `n_bins` is below 2.

    Source: Zadeh and Schmid 2021 for the loss the bins serve; the quantile rule as released by
    Chen et al. (MCAT, 2021), there with the outer edges at the extremes of all times.

    Example:
        >>> labels, edges = discretize_survival([1.0, 2, 3, 4, 9], event=[1, 1, 1, 1, 0])
        >>> labels.tolist(), edges.tolist()
        ([0, 1, 2, 3, 3], [0.0, 1.75, 2.5, 3.25, inf])
    """
    if isinstance(n_bins, bool) or not isinstance(n_bins, Integral) or n_bins < 2:
        raise ValueError(f"n_bins is {n_bins!r}; it must be an integer of at least 2")
    times, events = check_survival(time, event)
    rows = row_indices(fit_on, times.size, "fit_on")
    seen = times[rows][events[rows]]
    if seen.size == 0:
        which = "every row" if fit_on is None else f"each of the {rows.size} rows of fit_on"
        name = _series_name(event, "event")
        raise ValueError(
            f"{name}: {which} is censored; time bins need at least one row with event 1 "
            "(is this column a censorship, where 1 means censored?)"
        )
    interior = np.quantile(seen, np.arange(1, n_bins) / n_bins)
    edges = np.unique(np.concatenate([[0.0], interior, [np.inf]]))
    if edges.size != n_bins + 1:
        warnings.warn(
            f"n_bins is {n_bins}, but quantiles of the {seen.size} uncensored times coincide: "
            f"merged to {edges.size - 1} bins",
            UserWarning,
            stacklevel=2,
        )
    return assign_bins(times, edges), edges


def assign_bins(time: ArrayLike, edges: ArrayLike) -> NDArray[np.int64]:
    """The bin `[edges[k], edges[k + 1])` of each time.

    Args:
        time: [n] times at or above the first edge.
        edges: [bins + 1] increasing, first 0 and last infinity, as `discretize_survival` gives.

    Raises:
        ValueError: `edges` does not increase from 0 to infinity.
    """
    edges = np.asarray(edges, dtype=np.float64)
    if edges.ndim != 1 or edges.size < 2 or edges[0] != 0 or not np.isposinf(edges[-1]):
        raise ValueError(f"edges is {edges.tolist()}; it must start at 0 and end at infinity")
    if not (np.diff(edges) > 0).all():
        raise ValueError(f"edges is {edges.tolist()}; it must increase")
    return np.searchsorted(edges[1:-1], np.asarray(time, dtype=np.float64), side="right")


def row_indices(rows: ArrayLike | None, n: int, name: str) -> NDArray[np.int64]:
    """Row numbers from None (all rows), a boolean mask [n] or indices.

    Raises:
        ValueError: the mask has another length, or an index is outside 0 .. n - 1.
    """
    if rows is None:
        return np.arange(n)
    array = np.asarray(rows)
    if array.size == 0:
        array = array.reshape(-1).astype(np.int64) if array.dtype != np.bool_ else array
    if array.dtype == np.bool_:
        if array.shape != (n,):
            raise ValueError(f"{name} is a mask of shape {array.shape}; it must be [{n}]")
        return np.flatnonzero(array)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"{name} is {array.dtype} of shape {array.shape}; it must be row numbers or a mask"
        )
    outside = (array < 0) | (array >= n)
    if outside.any():
        raise ValueError(f"{name} holds {int(array[outside][0])}; rows are 0 to {n - 1}")
    return array.astype(np.int64)


def _binary(values: ArrayLike, name: str, unit_ids: Sequence[str] | None) -> NDArray[np.bool_]:
    """Values 0 and 1 as bool, or an error that names the first other value."""
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"{name} has shape {array.shape}; it must be a vector")
    if array.dtype == np.bool_:
        return array.copy()
    try:
        numbers = array.astype(np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name} holds {str(array[0])!r}; it must hold 0 and 1 only") from None
    wrong = (numbers != 0) & (numbers != 1)
    if wrong.any():
        raise ValueError(
            f"{name} {_at(numbers, wrong, _row_names(values, unit_ids))}; it must be 0 or 1"
        )
    return numbers == 1


def _at(values: NDArray[Any], wrong: NDArray[np.bool_], unit_ids: Sequence[str] | None) -> str:
    row = int(np.flatnonzero(wrong)[0])
    unit = "" if unit_ids is None else f" ({unit_ids[row]})"
    return f"at row {row}{unit} is {values[row]:g}"


def _series_name(values: Any, default: str) -> str:
    name = getattr(values, "name", None)
    return str(name) if isinstance(name, str) and name else default


def _row_names(values: Any, unit_ids: Sequence[str] | None) -> Sequence[str] | None:
    if unit_ids is not None:
        return unit_ids
    index = getattr(values, "index", None)
    # lists have a method called index; only a pandas index names rows
    if index is None or callable(index):
        return None
    return [str(label) for label in index]
