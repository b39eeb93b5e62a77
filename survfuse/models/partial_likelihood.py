"""Cox's partial likelihood in numpy fp64: value, gradient and curvature over log-risks.

The torch loss of training is survfuse/training/losses.py; this one serves the linear baselines,
which need second derivatives and thousands of cheap evaluations on a few hundred patients.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from survfuse.outcomes import check_outcomes

Ties = Literal["efron", "breslow"]


class PartialLikelihood:
    """Negative log partial likelihood of fixed outcomes, as a function of the log-risks.

    Each event contributes log(A - f D) - risk_i: A sums exp(risk) over everybody with
    time >= time_i, D over the d events at that time; f = 0 (Breslow) or l / d for the l-th of them
    (Efron).

    Args:
        time: [n] time of the event or of censoring.
        event: [n] bool or 0/1, 1 = event seen; at least one.
        ties: "efron" or "breslow".

    Raises:
        ValueError: an input is not valid.
    """

    def __init__(self, time: ArrayLike, event: ArrayLike, *, ties: Ties = "efron") -> None:
        if ties not in ("efron", "breslow"):
            raise ValueError(f"ties is {ties!r}; it must be 'efron' or 'breslow'")
        times, events = check_outcomes(time, event)
        # by descending time a risk set is a prefix
        self._order = np.argsort(-times, kind="stable")
        self._inverse = np.argsort(self._order, kind="stable")
        since = -times[self._order]
        self._event = events[self._order]
        self._rows = np.flatnonzero(self._event)
        self._last = np.searchsorted(since, since[self._rows], side="right") - 1
        # events at one time are neighbours in self._rows: where each such run starts, and its index
        starts = np.flatnonzero(np.diff(self._last, prepend=-1))
        sizes = np.diff(starts, append=self._rows.size)
        self._run_starts = starts
        self._run = np.repeat(np.arange(starts.size), sizes)
        place = np.arange(self._rows.size) - starts[self._run]
        self._fraction = place / sizes[self._run] if ties == "efron" else np.zeros(place.size)
        self._tied = bool(self._fraction.any())
        # the first event, by descending time, whose risk set holds each patient
        self._first_event = np.searchsorted(self._last, np.arange(times.size), side="left")
        self.n_patients = times.size
        self.n_events = self._rows.size

    def value(self, log_risk: NDArray[np.float64]) -> float:
        """Return the negative log partial likelihood, not divided by anything."""
        eta = log_risk[self._order]
        log_total, _ = self._log_totals(eta)
        return float(log_total.sum() - eta[self._rows].sum())

    def value_and_gradient(
        self, log_risk: NDArray[np.float64]
    ) -> tuple[float, NDArray[np.float64]]:
        """Return the value and its gradient with respect to the log-risks, [n]."""
        eta = log_risk[self._order]
        log_total, log_at_risk = self._log_totals(eta)
        value = float(log_total.sum() - eta[self._rows].sum())
        expected = self._expected_events(eta, log_total, log_at_risk)
        return value, (expected - self._event)[self._inverse]

    def curvature(
        self, log_risk: NDArray[np.float64], values: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Return values' H values, [p, p], H the second derivative over the log-risks.

        Args:
            log_risk: [n].
            values: [n, p].
        """
        eta, x = log_risk[self._order], values[self._order]
        log_total, log_at_risk = self._log_totals(eta)
        expected = self._expected_events(eta, log_total, log_at_risk)
        shift = eta.max()
        weighted = np.exp(eta - shift)[:, None] * x
        sums = np.cumsum(weighted, axis=0)[self._last]
        if self._tied:
            tied = np.add.reduceat(weighted[self._rows], self._run_starts, axis=0)
            sums = sums - self._fraction[:, None] * tied[self._run]
        # a risk set far below the largest risk has vanished from the sums as well
        means = sums * np.exp(np.minimum(shift - log_total, 700.0))[:, None]
        return (x.T * expected) @ x - means.T @ means

    def _log_totals(
        self, eta: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return log(A - f D) and log A per event."""
        log_at_risk = np.logaddexp.accumulate(eta)[self._last]
        if not self._tied:
            return log_at_risk, log_at_risk
        share = np.add.reduceat(np.exp(eta[self._rows] - log_at_risk), self._run_starts)
        return log_at_risk + np.log1p(-self._fraction * share[self._run]), log_at_risk

    def _expected_events(
        self,
        eta: NDArray[np.float64],
        log_total: NDArray[np.float64],
        log_at_risk: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        """Return per patient exp(eta) times the hazard accumulated until the patient's time."""
        hazard = np.logaddexp.accumulate(-log_total[::-1])[::-1]
        padded = np.concatenate([hazard, [-np.inf]])
        expected = np.exp(eta + padded[self._first_event])
        if self._tied:
            # an event is in D as well, and is taken out of it by its fraction
            removed = self._fraction * np.exp(log_at_risk - log_total)
            per_run = np.add.reduceat(removed, self._run_starts)[self._run]
            expected[self._rows] -= per_run * np.exp(eta[self._rows] - log_at_risk)
        return expected
