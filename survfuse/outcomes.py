"""Checks of survival outcomes and risks, made once where they enter.

`event` is 1 or True where the event was seen, 0 or False where the patient was censored. A higher
`risk` means an earlier event. Nothing in survfuse guesses either.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def check_times(time: ArrayLike, *, name: str = "time") -> NDArray[np.float64]:
    """Return `time` as fp64 [n] after checking that it is 1-D, not empty, finite and >= 0.

    Raises:
        ValueError: it is not; the message names the argument, the first bad row and its value.
    """
    values = np.asarray(time)
    if values.ndim != 1:
        raise ValueError(f"{name} has shape {values.shape}; it must be 1-D, one entry per patient")
    if values.size == 0:
        raise ValueError(f"{name} is empty; it must hold at least one patient")
    if values.dtype == bool or not np.issubdtype(values.dtype, np.number):
        raise ValueError(f"{name} has dtype {values.dtype}; it must hold numbers")
    values = values.astype(np.float64)
    _reject(~np.isfinite(values), values, f"{name} must be finite")
    _reject(values < 0, values, f"{name} must not be negative")
    return values


def check_outcomes(
    time: ArrayLike, event: ArrayLike, *, prefix: str = "", need_event: bool = True
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return (time fp64 [n], event bool [n]) after checking both.

    Args:
        time: [n] time of the event or of censoring, any unit, finite and >= 0.
        event: [n] bool or 0/1; 1 = the event was seen, 0 = censored.
        prefix: put before the argument names in messages, for example "train_".
        need_event: refuse outcomes that are all censored.

    Raises:
        ValueError: a check failed.
    """
    times = check_times(time, name=f"{prefix}time")
    flags = np.asarray(event)
    if flags.shape != times.shape:
        raise ValueError(
            f"{prefix}event has shape {flags.shape} but {prefix}time has shape {times.shape}; "
            "they must be the same"
        )
    if flags.dtype != bool:
        if not np.issubdtype(flags.dtype, np.number):
            raise ValueError(
                f"{prefix}event has dtype {flags.dtype}; it must be bool or 0/1 (1 = event seen)"
            )
        _reject(
            ~np.isin(flags, (0, 1)), flags, f"{prefix}event must be bool or 0/1 (1 = event seen)"
        )
        flags = flags.astype(bool)
    if need_event and not flags.any():
        raise ValueError(
            f"{prefix}event holds no event: all {times.size} patients are censored; "
            "at least one event (1 = event seen) is needed"
        )
    return times, flags


def check_risk(risk: ArrayLike, n: int, *, name: str = "risk") -> NDArray[np.float64]:
    """Return `risk` as fp64 [n] after checking its length and that it is finite.

    Raises:
        ValueError: it is not.
    """
    values = np.asarray(risk)
    if values.shape != (n,):
        raise ValueError(f"{name} has shape {values.shape}; it must be ({n},), one per patient")
    if values.dtype == bool or not np.issubdtype(values.dtype, np.number):
        raise ValueError(f"{name} has dtype {values.dtype}; it must hold numbers")
    values = values.astype(np.float64)
    _reject(~np.isfinite(values), values, f"{name} must be finite")
    return values


def _reject(bad: NDArray[np.bool_], values: NDArray, rule: str) -> None:
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise ValueError(f"{rule}; row {row} is {values[row]} ({int(bad.sum())} such rows)")
