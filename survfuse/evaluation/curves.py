"""Survival curves: what was observed (Kaplan-Meier, log-rank) and what a model predicts."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from survfuse.baseline_hazard import BaselineHazard, breslow_baseline
from survfuse.extras import require
from survfuse.outcomes import check_outcomes, check_times

__all__ = [
    "BaselineHazard",
    "KaplanMeier",
    "LogRank",
    "SurvivalCurves",
    "breslow_baseline",
    "cox_survival_curves",
    "kaplan_meier",
    "logrank_test",
    "nll_survival_curve",
    "nll_survival_curves",
]


class KaplanMeier(NamedTuple):
    """A Kaplan-Meier curve at its observed times, with pointwise bands and numbers at risk."""

    times: NDArray[np.float64]  # [U] increasing, every observed time
    survival: NDArray[np.float64]  # [U] from that time on
    low: NDArray[np.float64]  # [U] 1 before the first event, NaN once survival is 0
    high: NDArray[np.float64]  # [U]
    patients: NDArray[np.float64]  # [n] the sorted observed times behind the curve

    def at_risk(self, times: ArrayLike) -> NDArray[np.int64]:
        """Return how many patients are still under observation just before each time."""
        return self.patients.size - np.searchsorted(self.patients, np.asarray(times), side="left")


def kaplan_meier(time: ArrayLike, event: ArrayLike, *, level: float = 0.95) -> KaplanMeier:
    """Kaplan-Meier estimate with log-log bands (Greenwood's variance).

    Args:
        time: [n] time of the event or of censoring.
        event: [n] bool or 0/1, 1 = event seen. All censored is allowed: the curve stays at 1.
        level: coverage of the pointwise bands.

    Raises:
        ValueError: an input is not valid.
        ImportError: scipy is not installed.

    Source: Kaplan and Meier (1958), J. Am. Stat. Assoc. 53, 457-481; bands: Kalbfleisch and
    Prentice, The Statistical Analysis of Failure Time Data, section 1.4.
    """
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; it must lie between 0 and 1")
    times, events = check_outcomes(time, event, need_event=False)
    curve = require("scipy.stats", extra="train").ecdf(_censored_data(times, events)).sf
    with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
        # the band is 0/0 before the first event and after the last patient's
        warnings.simplefilter("ignore", RuntimeWarning)
        band = curve.confidence_interval(confidence_level=level, method="log-log")
    survival = np.asarray(curve.probabilities, dtype=np.float64)
    before = survival == 1.0
    low = np.where(before, 1.0, band.low.probabilities)
    high = np.where(before, 1.0, band.high.probabilities)
    return KaplanMeier(np.asarray(curve.quantiles, float), survival, low, high, np.sort(times))


class LogRank(NamedTuple):
    """A log-rank test of equal survival in all groups."""

    chi_square: float
    degrees: int
    pvalue: float


def logrank_test(groups: Sequence[tuple[ArrayLike, ArrayLike]]) -> LogRank:
    """Log-rank test between two or more groups.

    Two groups: scipy's test, its z squared. More: (O - E)' V^-1 (O - E) over all groups but the
    last, with the hypergeometric covariance, chi-square with k - 1 degrees of freedom.

    Args:
        groups: (time [n_k], event [n_k]) per group; event is bool or 0/1, 1 = event seen.

    Raises:
        ValueError: fewer than two groups, an input is not valid, or there is no event at all.
        ImportError: scipy is not installed.

    Source: Mantel (1966), Cancer Chemother. Rep. 50, 163-170.
    """
    if len(groups) < 2:
        raise ValueError(f"groups holds {len(groups)} group(s); a comparison needs at least two")
    checked = [
        check_outcomes(time, event, prefix=f"group {k} ", need_event=False)
        for k, (time, event) in enumerate(groups)
    ]
    if not any(events.any() for _, events in checked):
        raise ValueError("no group has an event; survival cannot be compared")
    stats = require("scipy.stats", extra="train")
    if len(checked) == 2:
        with np.errstate(divide="ignore", invalid="ignore"):
            result = stats.logrank(*(_censored_data(*outcome) for outcome in checked))
        if not np.isfinite(result.statistic):
            raise ValueError("nobody of one group is at risk at any event; nothing can be compared")
        return LogRank(float(result.statistic**2), 1, float(result.pvalue))
    statistic = _logrank_chi_square(checked)
    degrees = len(checked) - 1
    return LogRank(statistic, degrees, float(stats.chi2.sf(statistic, degrees)))


def _logrank_chi_square(groups: list[tuple[NDArray[np.float64], NDArray[np.bool_]]]) -> float:
    steps = np.unique(np.concatenate([time[event] for time, event in groups]))
    # [U, k]: events at each step, and patients whose time is at or after it
    deaths = np.stack(
        [np.bincount(np.searchsorted(steps, t[e]), minlength=steps.size) for t, e in groups], axis=1
    )
    at_risk = np.stack([(t[:, None] >= steps).sum(axis=0) for t, _ in groups], axis=1)
    total_deaths, total = deaths.sum(axis=1), at_risk.sum(axis=1)
    share = at_risk / total[:, None]
    excess = (deaths - total_deaths[:, None] * share).sum(axis=0)[:-1]
    scale = total_deaths * (total - total_deaths) / np.maximum(total - 1, 1)
    spread = np.einsum("u,ui,ij->ij", scale, share, np.eye(len(groups)))
    covariance = (spread - np.einsum("u,ui,uj->ij", scale, share, share))[:-1, :-1]
    try:
        return float(excess @ np.linalg.solve(covariance, excess))
    except np.linalg.LinAlgError:
        raise ValueError(
            "nobody of one group is at risk at any event; drop or merge that group"
        ) from None


def _censored_data(time: NDArray[np.float64], event: NDArray[np.bool_]):
    stats = require("scipy.stats", extra="train")
    return stats.CensoredData(uncensored=time[event], right=time[~event])


class SurvivalCurves(NamedTuple):
    """Predicted survival of n patients: values at knots, and what lies between them.

    S is 1 at time 0 and constant after the last knot.
    """

    times: NDArray[np.float64]  # [U] increasing, > 0
    log_survival: NDArray[np.float64]  # [n, U] at the knots
    between: Literal["step", "log-linear"]

    def at(self, times: ArrayLike) -> NDArray[np.float64]:
        """Return S(t), [n, G].

        Raises:
            ValueError: `times` is not 1-D, finite and >= 0.
        """
        grid = check_times(times, name="times")
        start = np.zeros((self.log_survival.shape[0], 1))
        values = np.concatenate([start, self.log_survival], axis=1)
        knots = np.concatenate([[0.0], self.times])
        if self.between == "step":
            # a knot at time 0 itself sorts after the start and wins
            return np.exp(values[:, np.searchsorted(knots, grid, side="right") - 1])
        right = np.clip(np.searchsorted(knots, grid, side="right"), 1, knots.size - 1)
        share = np.clip((grid - knots[right - 1]) / (knots[right] - knots[right - 1]), 0.0, 1.0)
        # where a knot is -inf, 0 * -inf must stay 0
        with np.errstate(invalid="ignore"):
            logs = np.where(share < 1, (1 - share) * values[:, right - 1], 0.0)
            logs = logs + np.where(share > 0, share * values[:, right], 0.0)
        return np.exp(logs)


def nll_survival_curves(logits: ArrayLike, edges: ArrayLike) -> SurvivalCurves:
    """Survival curves of a discrete hazards model: log-linear within bins.

    S at the end of bin k is prod_{l <= k} (1 - sigmoid(logit_l)); within a bin log S falls
    linearly; after the last finite edge S stays constant, because an open bin has no width.

    Args:
        logits: [n, K] hazard logits.
        edges: [K + 1] bin edges, increasing, the first 0, the last may be infinite.

    Raises:
        ValueError: shapes disagree, a logit is NaN, or the edges are not as said.
    """
    values = np.asarray(logits, dtype=np.float64)
    borders = np.asarray(edges, dtype=np.float64)
    if values.ndim != 2 or np.isnan(values).any():
        raise ValueError(
            f"logits has shape {values.shape}; it must be [patients, bins] and hold no NaN"
        )
    if borders.shape != (values.shape[1] + 1,):
        raise ValueError(
            f"edges has shape {borders.shape}; {values.shape[1]} bins have "
            f"{values.shape[1] + 1} edges"
        )
    interior = borders[:-1]
    if (
        borders[0] != 0
        or not np.isfinite(interior).all()
        or np.isnan(borders[-1])
        or (np.diff(borders) <= 0).any()
    ):
        raise ValueError(
            f"edges is {borders.tolist()}; it must start at 0 and increase strictly, and only the "
            "last edge may be infinite"
        )
    log_survival = np.cumsum(-np.logaddexp(0.0, values), axis=1)
    finite = np.isfinite(borders[1:])
    return SurvivalCurves(borders[1:][finite], log_survival[:, finite], "log-linear")


def nll_survival_curve(logits: ArrayLike, edges: ArrayLike, times: ArrayLike) -> NDArray:
    """Return S(times) [n, G] of a discrete hazards model; see `nll_survival_curves`."""
    return nll_survival_curves(logits, edges).at(times)


def cox_survival_curves(risk: ArrayLike, baseline: BaselineHazard) -> SurvivalCurves:
    """Survival curves of a Cox model: S(t) = exp(-H0(t) exp(risk)), steps at training events.

    Args:
        risk: [n] log-risk of the patients to predict.
        baseline: `breslow_baseline` of the training patients.
    """
    return SurvivalCurves(baseline.times, baseline.log_survival(risk), "step")
