"""The Breslow estimate of a proportional hazards model's cumulative baseline hazard."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from survfuse.outcomes import check_outcomes, check_risk, check_times


class BaselineHazard(NamedTuple):
    """A step function: the log of the cumulative hazard at log-risk 0."""

    times: NDArray[np.float64]  # [U] increasing event times of the training patients
    log_cumulative: NDArray[np.float64]  # [U] log H0 from that time on

    def log_survival(self, risk: ArrayLike) -> NDArray[np.float64]:
        """Return log S(t | risk) = -H0(t) exp(risk) at every step, [n, U]."""
        values = np.asarray(risk, dtype=np.float64)
        # a hazard past the largest number is infinite, and survival 0
        with np.errstate(over="ignore"):
            return -np.exp(self.log_cumulative[None, :] + values[:, None])

    def survival(self, risk: ArrayLike, times: ArrayLike) -> NDArray[np.float64]:
        """Return S(t | risk), [n, G].

        Args:
            risk: [n] log-risk, on the scale of the risks the baseline was estimated with.
            times: [G] times >= 0; S is 1 before the first step and constant after the last.

        Raises:
            ValueError: `times` is not 1-D, finite and >= 0.
        """
        grid = check_times(times, name="times")
        step = np.searchsorted(self.times, grid, side="right")
        padded = np.concatenate([[-np.inf], self.log_cumulative])[step]
        values = np.asarray(risk, dtype=np.float64)
        with np.errstate(over="ignore"):
            return np.exp(-np.exp(padded[None, :] + values[:, None]))


def breslow_baseline(risk: ArrayLike, *, time: ArrayLike, event: ArrayLike) -> BaselineHazard:
    """Estimate the cumulative baseline hazard from training patients.

    H0(t) = sum over event times u <= t of d_u / sum_{j: time_j >= u} exp(risk_j), kept in log
    space, so that log-risks of several hundred neither overflow nor vanish.

    Args:
        risk: [n] log-risk of the training patients.
        time: [n] time of the event or of censoring.
        event: [n] bool or 0/1, 1 = event seen.

    Raises:
        ValueError: shapes disagree, a value is not finite, or all patients are censored.

    Source: Breslow, discussion of Cox (1972), J. R. Stat. Soc. B 34, 216-217.
    """
    times, events = check_outcomes(time, event)
    risks = check_risk(risk, times.size)
    order = np.argsort(-times, kind="stable")
    log_at_risk = np.logaddexp.accumulate(risks[order])
    steps, deaths = np.unique(times[events], return_counts=True)
    # the last patient in descending order whose time is still >= the step
    last = np.searchsorted(-times[order], -steps, side="right") - 1
    increments = np.log(deaths) - log_at_risk[last]
    return BaselineHazard(steps, np.logaddexp.accumulate(increments))
