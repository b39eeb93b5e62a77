"""Harrell's and Uno's concordance, in n log n.

A pair (i, j) is comparable when i had the event and j was still under observation afterwards:
time_j > time_i, or time_j == time_i with j censored. It is concordant when risk_i > risk_j, tied
when the risks differ by at most 1e-8, which counts one half. docs/statistics.md, "Concordance".
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from survfuse.evaluation.censoring import censoring_distribution, truncation_time
from survfuse.outcomes import check_outcomes, check_risk

TIED_RISK = 1e-8


class ConcordancePairs(NamedTuple):
    """Counts of the comparable pairs."""

    concordant: int
    discordant: int
    tied_risk: int
    tied_time: int  # comparable pairs of an event and a censoring at the same time

    @property
    def comparable(self) -> int:
        return self.concordant + self.discordant + self.tied_risk

    @property
    def index(self) -> float:
        return (self.concordant + 0.5 * self.tied_risk) / self.comparable


class _EventCounts(NamedTuple):
    """Per event row, how its comparable partners compare."""

    rows: NDArray[np.int64]  # [E] rows with an event
    comparable: NDArray[np.int64]  # [E]
    concordant: NDArray[np.int64]  # [E]
    tied: NDArray[np.int64]  # [E]
    tied_time: NDArray[np.int64]  # [E]


def follow_up_order(time: NDArray[np.float64], event: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return [n] ranks such that event i and row j are comparable exactly when rank_j > rank_i.

    Equal times share a rank among events and a later one among censored rows.
    """
    _, rank = np.unique(time, return_inverse=True)
    return 2 * rank + ~event


def concordance_pairs(risk: ArrayLike, *, time: ArrayLike, event: ArrayLike) -> ConcordancePairs:
    """Count the comparable pairs by agreement of risk and time.

    Args:
        risk: [n] predicted risk, higher = earlier event.
        time: [n] time of the event or of censoring.
        event: [n] bool or 0/1, 1 = event seen.

    Raises:
        ValueError: shapes disagree, a value is not finite, a time is negative, all patients are
            censored, or no pair is comparable.

    Cost: n log n time, n memory.
    """
    times, events = check_outcomes(time, event)
    risks = check_risk(risk, times.size)
    counts = _count_pairs(risks, times, events)
    comparable = int(counts.comparable.sum())
    if comparable == 0:
        raise ValueError(
            "no pair of patients is comparable: nobody was followed beyond the first event"
        )
    concordant, tied = int(counts.concordant.sum()), int(counts.tied.sum())
    return ConcordancePairs(
        concordant, comparable - concordant - tied, tied, int(counts.tied_time.sum())
    )


def concordance_index(risk: ArrayLike, *, time: ArrayLike, event: ArrayLike) -> float:
    """Harrell's C: (concordant + tied / 2) / comparable pairs.

    Args:
        risk: [n] predicted risk, higher = earlier event.
        time: [n] time of the event or of censoring.
        event: [n] bool or 0/1, 1 = event seen.

    Raises:
        ValueError: as `concordance_pairs`.

    Source: Harrell, Lee and Mark (1996), Stat. Med. 15, 361-387.

    Example:
        >>> concordance_index([3.0, 1.0, 2.0], time=[1, 2, 3], event=[1, 1, 0])
        0.6666666666666666
    """
    return concordance_pairs(risk, time=time, event=event).index


class UnoConcordance(NamedTuple):
    """Uno's C with what it rests on."""

    index: float
    tau: float
    events_before: int  # test events with time < tau


def uno_weights(
    *,
    time: ArrayLike,
    event: ArrayLike,
    train_time: ArrayLike,
    train_event: ArrayLike,
    tau: float,
) -> NDArray[np.float64]:
    """Return [n]: 1 / G_train(time)^2 for events before `tau`, else 0.

    Raises:
        ValueError: an input is not valid, or G_train is 0 or unknown at an event before tau.
    """
    times, events = check_outcomes(time, event)
    used = events & (times < tau)
    probability = censoring_distribution(train_time, train_event).at(times[used])
    if (probability <= 0).any():
        raise ValueError(
            f"no training patient is uncensored at {times[used][probability <= 0].min():g}, an "
            f"event time before tau = {tau:g}; use a smaller tau"
        )
    weights = np.zeros(times.size)
    weights[used] = 1.0 / np.square(probability)
    return weights


def uno_concordance(
    risk: ArrayLike,
    *,
    time: ArrayLike,
    event: ArrayLike,
    train_time: ArrayLike,
    train_event: ArrayLike,
    tau: float | None = None,
) -> UnoConcordance:
    """Uno's C: pairs weighted by 1 / G(time_i)^2, events from `tau` on left out.

    Its limit does not depend on how the test patients happen to be censored.

    Args:
        risk: [n] predicted risk of the test patients, higher = earlier event.
        time, event: [n] test outcomes; event is bool or 0/1, 1 = event seen.
        train_time, train_event: [m] training outcomes, for the censoring distribution G.
        tau: truncation time; None takes `truncation_time`'s.

    Raises:
        ValueError: an input is not valid, G is 0 or unknown at an event before tau, or no pair is
            comparable.

    Source: Uno et al. (2011), Stat. Med. 30, 1105-1117.
    """
    times, events = check_outcomes(time, event)
    risks = check_risk(risk, times.size)
    if tau is None:
        tau = truncation_time(
            time=times, event=events, train_time=train_time, train_event=train_event
        ).tau
    weights = uno_weights(
        time=times, event=events, train_time=train_time, train_event=train_event, tau=tau
    )
    counts = _count_pairs(risks, times, events)
    row_weights = weights[counts.rows]
    total = float(row_weights @ counts.comparable)
    if total == 0:
        raise ValueError(f"no pair of patients is comparable before tau = {tau:g}")
    agreeing = float(row_weights @ (counts.concordant + 0.5 * counts.tied))
    return UnoConcordance(agreeing / total, float(tau), int((weights > 0).sum()))


def _count_pairs(
    risk: NDArray[np.float64], time: NDArray[np.float64], event: NDArray[np.bool_]
) -> _EventCounts:
    """Count every event's partners through ranks of risk in follow-up order."""
    follow_up = follow_up_order(time, event)
    order = np.argsort(follow_up, kind="stable")
    follow_up_sorted = follow_up[order]
    rows = np.flatnonzero(event)
    starts = np.searchsorted(follow_up_sorted, follow_up[rows], side="right")
    after_time = np.searchsorted(follow_up_sorted, follow_up[rows] + 1, side="right")

    levels, rank = np.unique(risk, return_inverse=True)
    lower, upper = _tied_range(levels)
    ranks_sorted = rank[order]
    below = _count_below(ranks_sorted, starts, lower[rank[rows]], levels.size)
    up_to = _count_below(ranks_sorted, starts, upper[rank[rows]], levels.size)
    return _EventCounts(rows, time.size - starts, below, up_to - below, after_time - starts)


def _tied_range(levels: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return for every level the half-open range of levels that differ by at most TIED_RISK.

    searchsorted compares with level -+ TIED_RISK, which is rounded; the difference of two close
    floats is exact, so the borders are moved to what the difference says.
    """
    n = levels.size
    lower = np.searchsorted(levels, levels - TIED_RISK, side="left")
    upper = np.searchsorted(levels, levels + TIED_RISK, side="right")
    while (move := levels - levels[lower] > TIED_RISK).any():
        lower = lower + move
    while (move := (lower > 0) & (levels - levels[np.maximum(lower - 1, 0)] <= TIED_RISK)).any():
        lower = lower - move
    while (move := levels[upper - 1] - levels > TIED_RISK).any():
        upper = upper - move
    while (move := (upper < n) & (levels[np.minimum(upper, n - 1)] - levels <= TIED_RISK)).any():
        upper = upper + move
    return lower, upper


def _count_below(
    values: NDArray[np.int64],
    starts: NDArray[np.int64],
    bounds: NDArray[np.int64],
    n_levels: int,
) -> NDArray[np.int64]:
    """Return for every query the number of positions p >= start with values[p] < bound.

    A wavelet matrix, one bit per pass from the highest: values are split stably into zeros and
    ones, and each query follows the bits of its bound.

    Args:
        values: [n] in [0, n_levels).
        starts: [q] in [0, n].
        bounds: [q] in [0, n_levels].
    """
    left, right = starts, np.full_like(starts, values.size)
    found = np.zeros_like(starts)
    for bit in reversed(range(int(n_levels).bit_length())):
        is_one = (values >> bit) & 1 == 1
        zeros_before = np.concatenate([[0], np.cumsum(~is_one)])
        zeros_left, zeros_right = zeros_before[left], zeros_before[right]
        go_right = (bounds >> bit) & 1 == 1
        found = found + np.where(go_right, zeros_right - zeros_left, 0)
        n_zeros = zeros_before[-1]
        left = np.where(go_right, n_zeros + left - zeros_left, zeros_left)
        right = np.where(go_right, n_zeros + right - zeros_right, zeros_right)
        values = np.concatenate([values[~is_one], values[is_one]])
    return found
