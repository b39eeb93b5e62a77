"""Metrics of survival models in fp64: concordance, Brier score, time-dependent AUC.

Definitions, conventions and sources: docs/statistics.md. Concordance lives in
survfuse/evaluation/concordance.py, censoring weights and truncation in censoring.py; both are
offered here as well.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from survfuse.evaluation.censoring import (
    StepFunction,
    Truncation,
    censoring_distribution,
    check_evaluation_times,
    evaluation_times,
    product_limit,
    truncation_time,
)
from survfuse.evaluation.concordance import (
    TIED_RISK,
    ConcordancePairs,
    UnoConcordance,
    concordance_index,
    concordance_pairs,
    uno_concordance,
)
from survfuse.outcomes import check_outcomes, check_risk

__all__ = [
    "ConcordancePairs",
    "DynamicAuc",
    "Truncation",
    "UnoConcordance",
    "brier_score",
    "concordance_index",
    "concordance_pairs",
    "cumulative_dynamic_auc",
    "evaluation_times",
    "integrated_brier_score",
    "truncation_time",
    "uno_concordance",
]


def brier_score(
    survival: ArrayLike,
    *,
    times: ArrayLike,
    time: ArrayLike,
    event: ArrayLike,
    train_time: ArrayLike,
    train_event: ArrayLike,
) -> NDArray[np.float64]:
    """Censoring-weighted squared error of predicted survival at each time.

    BS(t) = mean_i [ S_i(t)^2 1(time_i <= t, event_i) / G(time_i)
                     + (1 - S_i(t))^2 1(time_i > t) / G(t) ]

    Args:
        survival: [n, G] predicted survival probabilities at `times`.
        times: [G] increasing, from the first test event to before the last follow-up.
        time, event: [n] test outcomes; event is bool or 0/1, 1 = event seen.
        train_time, train_event: [m] training outcomes, for the censoring distribution G.

    Returns:
        [G] scores; lower is better, a constant 1/2 scores about 1/4.

    Raises:
        ValueError: an input is not valid, or G is 0 or unknown at a time it is needed at.

    Source: Graf et al. (1999), Stat. Med. 18, 2529-2545.
    """
    test_time, test_event = check_outcomes(time, event)
    grid = check_evaluation_times(times, test_time, test_event)
    predicted = _check_survival(survival, (test_time.size, grid.size))
    censoring = censoring_distribution(train_time, train_event)
    at_event = _event_probability(censoring, test_time, test_event, grid[-1])
    at_grid = _positive(censoring.at(grid), grid)
    died = test_event[:, None] & (test_time[:, None] <= grid)
    alive = test_time[:, None] > grid
    errors = np.where(died, np.square(predicted) / at_event[:, None], 0.0)
    errors += np.where(alive, np.square(1.0 - predicted) / at_grid, 0.0)
    return errors.mean(axis=0)


def integrated_brier_score(
    survival: ArrayLike,
    *,
    times: ArrayLike,
    time: ArrayLike,
    event: ArrayLike,
    train_time: ArrayLike,
    train_event: ArrayLike,
) -> float:
    """Brier score averaged over [times[0], times[-1]] by the trapezoidal rule.

    Arguments, errors and source as `brier_score`; at least two times.
    """
    grid = np.atleast_1d(np.asarray(times, dtype=np.float64))
    if grid.size < 2:
        raise ValueError(f"times holds {grid.size} entries; an integral needs at least 2")
    scores = brier_score(
        survival,
        times=grid,
        time=time,
        event=event,
        train_time=train_time,
        train_event=train_event,
    )
    widths = np.diff(grid)
    return float(((scores[1:] + scores[:-1]) / 2 * widths).sum() / widths.sum())


class DynamicAuc(NamedTuple):
    """Cumulative/dynamic AUC."""

    values: NDArray[np.float64]  # [G] at each time
    mean: float  # averaged over the drop of the test patients' Kaplan-Meier curve


def cumulative_dynamic_auc(
    risk: ArrayLike,
    *,
    times: ArrayLike,
    time: ArrayLike,
    event: ArrayLike,
    train_time: ArrayLike,
    train_event: ArrayLike,
) -> DynamicAuc:
    """Area under the ROC curve of "event by t" against "event-free at t", per time.

    AUC(t) = sum_{i case, j control} w_i [r_i > r_j] / (sum_i w_i * n_controls), w_i = 1/G(time_i);
    a case has an event at or before t, a control is followed beyond t. Risks whose neighbours in
    sorted order differ by at most 1e-8 are one threshold and count one half.

    Args:
        risk: [n], or [n, G] for risks that change with time; higher = earlier event.
        times: [G] increasing, from the first test event to before the last follow-up.
        time, event: [n] test outcomes; event is bool or 0/1, 1 = event seen.
        train_time, train_event: [m] training outcomes, for the censoring distribution G.

    Raises:
        ValueError: an input is not valid, or G is 0 or unknown at an event it is needed at.

    Source: Uno et al. (2007), J. Am. Stat. Assoc. 102, 527-537; mean: Lambert and Chevret (2016),
    Stat. Methods Med. Res. 25, 2088-2102.
    """
    test_time, test_event = check_outcomes(time, event)
    grid = check_evaluation_times(times, test_time, test_event)
    risks = np.asarray(risk)
    if risks.ndim == 2:
        if risks.shape != (test_time.size, grid.size):
            raise ValueError(
                f"risk has shape {risks.shape}; it must be ({test_time.size},) or "
                f"({test_time.size}, {grid.size})"
            )
        columns = [check_risk(risks[:, k], test_time.size) for k in range(grid.size)]
    else:
        columns = [check_risk(risks, test_time.size)] * grid.size
    censoring = censoring_distribution(train_time, train_event)
    weights = 1.0 / _event_probability(censoring, test_time, test_event, grid[-1])
    values = np.empty(grid.size)
    order = groups = None
    for k, moment in enumerate(grid):
        if order is None or risks.ndim == 2:
            order = np.argsort(columns[k], kind="stable")
            gaps = np.diff(columns[k][order]) > TIED_RISK
            groups = np.concatenate([[0], np.flatnonzero(gaps) + 1])
        case = np.where(test_event & (test_time <= moment), weights, 0.0)[order]
        control = (test_time > moment)[order].astype(np.float64)
        values[k] = _area(np.add.reduceat(case, groups), np.add.reduceat(control, groups))
    return DynamicAuc(values, _mean_auc(values, grid, test_time, test_event))


def _area(case: NDArray[np.float64], control: NDArray[np.float64]) -> float:
    """Area from weights of cases and controls per threshold, risk increasing."""
    lower_controls = np.cumsum(control) - control
    return float(case @ (lower_controls + 0.5 * control) / (case.sum() * control.sum()))


def _mean_auc(
    values: NDArray[np.float64],
    grid: NDArray[np.float64],
    time: NDArray[np.float64],
    event: NDArray[np.bool_],
) -> float:
    if grid.size == 1:
        return float(values[0])
    alive = product_limit(time, event).at(grid)
    drops = -np.diff(np.concatenate([[1.0], alive]))
    return float(values @ drops / (1.0 - alive[-1]))


def _check_survival(survival: ArrayLike, shape: tuple[int, int]) -> NDArray[np.float64]:
    predicted = np.asarray(survival, dtype=np.float64)
    if predicted.shape != shape:
        raise ValueError(
            f"survival has shape {predicted.shape}; it must be {shape}: test patients by times"
        )
    if not (np.isfinite(predicted) & (predicted >= 0) & (predicted <= 1)).all():
        raise ValueError("survival must hold probabilities between 0 and 1")
    return predicted


def _event_probability(
    censoring: StepFunction, time: NDArray[np.float64], event: NDArray[np.bool_], last: float
) -> NDArray[np.float64]:
    """G at the event times up to `last`, 1 elsewhere (where no weight is used)."""
    used = event & (time <= last)
    probability = np.ones(time.size)
    probability[used] = _positive(censoring.at(time[used]), time[used])
    return probability


def _positive(probability: NDArray[np.float64], at: NDArray[np.float64]) -> NDArray[np.float64]:
    if (probability <= 0).any():
        raise ValueError(
            f"no training patient is uncensored at {at[probability <= 0].min():g}, so its weight "
            "is infinite; stop times earlier (truncation_time says where)"
        )
    return probability
