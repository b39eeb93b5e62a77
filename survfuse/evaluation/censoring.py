"""The censoring distribution of the training patients, and the times a model is judged at."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from survfuse.outcomes import check_outcomes, check_times

# G is a product of many ratios; an exact .2 may come out one rounding below
_ROUNDING = 1e-12


class StepFunction(NamedTuple):
    """A right-continuous product-limit estimate: 1 before `times[0]`, `values[k]` from times[k]."""

    times: NDArray[np.float64]  # [U] increasing
    values: NDArray[np.float64]  # [U]

    def at(self, times: ArrayLike) -> NDArray[np.float64]:
        """Return the estimate at `times`, same shape.

        Raises:
            ValueError: a time lies after the last observed one and the estimate is not 0 there, so
                that it is undefined.
        """
        wanted = np.asarray(times, dtype=np.float64)
        beyond = wanted > self.times[-1]
        if beyond.any() and self.values[-1] > 0:
            raise ValueError(
                f"the distribution is known up to {self.times[-1]:g} only, but is asked for at "
                f"{wanted[beyond].max():g}; use a smaller truncation time (tau)"
            )
        padded = np.concatenate([[1.0], self.values])
        return padded[np.searchsorted(self.times, wanted, side="right")]


def product_limit(time: NDArray[np.float64], event: NDArray[np.bool_]) -> StepFunction:
    """Kaplan-Meier estimate of P(T > t) from checked outcomes; [n] each."""
    times, position = np.unique(time, return_inverse=True)
    leaving = np.bincount(position)
    deaths = np.bincount(position, weights=event)
    at_risk = time.size - np.concatenate([[0], np.cumsum(leaving)[:-1]])
    return StepFunction(times, np.cumprod(1.0 - deaths / at_risk))


def censoring_distribution(train_time: ArrayLike, train_event: ArrayLike) -> StepFunction:
    """Kaplan-Meier estimate of G(t) = P(censoring time > t) from training patients.

    Where events and censorings share a time, the events come first: a patient with an event at t
    is no longer at risk of being censored at t.

    Args:
        train_time: [m] time of the event or of censoring.
        train_event: [m] bool or 0/1, 1 = event seen.

    Raises:
        ValueError: shapes disagree or a value is not valid.
    """
    time, event = check_outcomes(train_time, train_event, prefix="train_", need_event=False)
    times, position = np.unique(time, return_inverse=True)
    leaving = np.bincount(position)
    censored = np.bincount(position, weights=~event)
    at_risk = time.size - np.concatenate([[0], np.cumsum(leaving)[:-1]])
    at_risk = at_risk - (leaving - censored)
    hazard = np.divide(censored, at_risk, out=np.zeros_like(censored), where=censored > 0)
    return StepFunction(times, np.cumprod(1.0 - hazard))


class Truncation(NamedTuple):
    """The time up to which a test set is judged, with what lies before it."""

    tau: float
    events_before: int  # test events with time < tau
    events: int  # all test events


def truncation_time(
    *,
    time: ArrayLike,
    event: ArrayLike,
    train_time: ArrayLike,
    train_event: ArrayLike,
    minimum: float = 0.2,
) -> Truncation:
    """Return tau: the last observed training time with G_train >= `minimum`, at most max(time).

    Beyond it, inverse censoring weights exceed 1 / `minimum` and a few patients would decide.

    Args:
        time, event: [n] test outcomes; event is bool or 0/1, 1 = event seen.
        train_time, train_event: [m] training outcomes, for the censoring distribution.
        minimum: in (0, 1).

    Raises:
        ValueError: an input is not valid, or G is below `minimum` from the first time on.
    """
    if not 0 < minimum < 1:
        raise ValueError(f"minimum is {minimum}; it must lie between 0 and 1")
    times, events = check_outcomes(time, event, need_event=False)
    censoring = censoring_distribution(train_time, train_event)
    kept = np.flatnonzero(censoring.values >= minimum - _ROUNDING)
    if kept.size == 0:
        raise ValueError(
            f"the training patients' censoring distribution is {censoring.values[0]:.3g} already "
            f"at the first time, below minimum {minimum}; no truncation time exists"
        )
    tau = float(min(censoring.times[kept[-1]], times.max()))
    return Truncation(tau, int((events & (times < tau)).sum()), int(events.sum()))


def evaluation_times(
    *, time: ArrayLike, event: ArrayLike, tau: float, n_times: int = 100
) -> NDArray[np.float64]:
    """Return [n_times] equally spaced times for the Brier score and the AUC.

    They run from the 10th to the 90th percentile of the test event times before `tau`.

    Args:
        time, event: [n] test outcomes; event is bool or 0/1, 1 = event seen.
        tau: the truncation time, from `truncation_time`.
        n_times: at least 2.

    Raises:
        ValueError: an input is not valid, or fewer than two different event times lie before tau.
    """
    if n_times < 2:
        raise ValueError(f"n_times is {n_times}; it must be at least 2")
    times, events = check_outcomes(time, event, need_event=False)
    before = times[events & (times < tau)]
    if np.unique(before).size < 2:
        raise ValueError(
            f"{before.size} test events lie before tau = {tau:g}; at least two different event "
            "times are needed to place evaluation times"
        )
    first, last = np.percentile(before, [10, 90])
    return np.linspace(first, last, n_times)


def check_evaluation_times(
    times: ArrayLike, time: NDArray[np.float64], event: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Return `times` [G] checked: increasing, each with an event at or before and someone after.

    Raises:
        ValueError: they are not.
    """
    grid = check_times(np.atleast_1d(np.asarray(times)), name="times")
    if (np.diff(grid) <= 0).any():
        raise ValueError("times must increase strictly")
    first, last = time[event].min(), time.max()
    if grid[0] < first or grid[-1] >= last:
        raise ValueError(
            f"times run from {grid[0]:g} to {grid[-1]:g}; they must lie in [{first:g}, {last:g}), "
            "from the first test event to before the last follow-up"
        )
    return grid
