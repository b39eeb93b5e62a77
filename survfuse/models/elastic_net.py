"""Solvers of the penalised partial likelihood: Newton for ridge, proximal gradient with an active
set for the elastic net.

Both minimise  value(X b) / n + strength (l1_ratio |b|_1 + (1 - l1_ratio) / 2 |b|^2).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from survfuse.models.partial_likelihood import PartialLikelihood

_NEWTON_STEPS = 100
_HISTORY = 6
# log-risks this far apart mean a coefficient on its way to infinity
_SEPARATED = 30.0
_NO_MINIMUM = (
    "the Cox fit has no finite minimum: columns are collinear, or one separates the events from "
    "the rest; use strength > 0"
)


def ridge_path(
    likelihood: PartialLikelihood,
    columns: NDArray[np.float64],
    strengths: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Return [S, p] coefficients by damped Newton steps, each started from the one before.

    With more columns than patients the problem is solved in the patients' row space, where the
    solution lies whenever strength > 0.

    Raises:
        ValueError: no finite minimum was found.
    """
    n, p = columns.shape
    path = np.empty((strengths.size, p))
    basis = None
    if p > n:
        if (strengths == 0).any():
            raise ValueError(
                f"values has {p} columns for {n} patients; without a penalty the coefficients are "
                "not determined: use strength > 0"
            )
        left, singular, basis = np.linalg.svd(columns, full_matrices=False)
        columns = left * singular
    solution = np.zeros(columns.shape[1])
    for s, strength in enumerate(strengths):
        solution = _newton(likelihood, columns, strength, solution)
        path[s] = solution if basis is None else basis.T @ solution
    return path


def _newton(
    likelihood: PartialLikelihood,
    columns: NDArray[np.float64],
    strength: float,
    start: NDArray[np.float64],
) -> NDArray[np.float64]:
    n, p = columns.shape
    # a constant (standardised: zero) column has no curvature; leave it at 0
    used = np.flatnonzero(np.abs(columns).max(axis=0) > 0)
    columns = columns[:, used]
    if strength == 0 and np.linalg.matrix_rank(columns) < used.size:
        raise ValueError(_NO_MINIMUM)
    b = start[used]
    value, slope = likelihood.value_and_gradient(columns @ b)
    objective = value / n + 0.5 * strength * float(b @ b)
    for _ in range(_NEWTON_STEPS):
        gradient = columns.T @ slope / n + strength * b
        hessian = likelihood.curvature(columns @ b, columns) / n
        hessian[np.diag_indices_from(hessian)] += strength
        try:
            step = np.linalg.solve(hessian, gradient)
        except np.linalg.LinAlgError:
            raise ValueError(_NO_MINIMUM) from None
        decrement = float(gradient @ step)
        if not np.isfinite(decrement) or decrement < -1e-12:
            raise ValueError(_NO_MINIMUM)
        length = 1.0
        while True:
            trial = b - length * step
            value, slope = likelihood.value_and_gradient(columns @ trial)
            new = value / n + 0.5 * strength * float(trial @ trial)
            if new <= objective - 1e-4 * length * decrement + 1e-15 * abs(objective):
                break
            length /= 2
            if length < 1e-10:
                # rounding: no step along a descent direction lowers the value any more
                trial, new = b, objective
                break
        b, objective = trial, new
        if decrement < 1e-18 or length < 1e-10:
            if strength == 0 and np.abs(columns @ b).max() > _SEPARATED:
                break
            solution = np.zeros(p)
            solution[used] = b
            return solution
    raise ValueError(_NO_MINIMUM)


def largest_strength(
    likelihood: PartialLikelihood, columns: NDArray[np.float64], l1_ratio: float
) -> float:
    """Return the smallest strength at which every coefficient is 0."""
    _, slope = likelihood.value_and_gradient(np.zeros(likelihood.n_patients))
    return float(np.abs(columns.T @ slope).max() / likelihood.n_patients / l1_ratio)


def elastic_net_path(
    likelihood: PartialLikelihood,
    columns: NDArray[np.float64],
    strengths: NDArray[np.float64],
    *,
    l1_ratio: float,
    tolerance: float,
    max_iterations: int,
) -> NDArray[np.float64]:
    """Return [S, p] coefficients along decreasing strengths, each started from the one before.

    Columns enter the active set by the sequential strong rule (Tibshirani et al. 2012, J. R. Stat.
    Soc. B 74, 245-266) and by every violation of the optimality conditions found afterwards.

    Args:
        tolerance: largest violation of the optimality conditions, relative to the l1 strength.

    Raises:
        ValueError: a fit did not converge in `max_iterations` steps.
    """
    n, p = columns.shape
    coefficients = np.zeros(p)
    _, slope = likelihood.value_and_gradient(np.zeros(n))
    gradient = columns.T @ slope / n
    before = float(np.abs(gradient).max())
    path = np.empty((strengths.size, p))
    for s, strength in enumerate(strengths):
        l1, l2 = strength * l1_ratio, strength * (1 - l1_ratio)
        limit = tolerance * max(l1, 1e-12)
        active = (coefficients != 0) | (np.abs(gradient) >= 2 * l1 - before)
        while True:
            rows = np.flatnonzero(active)
            if rows.size:
                solved = _proximal_gradient(
                    likelihood, columns[:, rows], coefficients[rows], l1, l2, limit, max_iterations
                )
                coefficients = np.zeros(p)
                coefficients[rows] = solved
            _, slope = likelihood.value_and_gradient(columns @ coefficients)
            gradient = columns.T @ slope / n
            missed = ~active & (np.abs(gradient) > l1 + limit)
            if not missed.any():
                break
            active |= missed
        path[s] = coefficients
        before = l1
    return path


def _proximal_gradient(
    likelihood: PartialLikelihood,
    columns: NDArray[np.float64],
    start: NDArray[np.float64],
    l1: float,
    l2: float,
    limit: float,
    max_iterations: int,
) -> NDArray[np.float64]:
    """Minimise over the given columns with spectral steps and a non-monotone line search.

    Source: Wright, Nowak and Figueiredo (2009), IEEE Trans. Signal Process. 57, 2479-2493.
    """
    n = columns.shape[0]

    def smooth(b: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        value, slope = likelihood.value_and_gradient(columns @ b)
        return value / n + 0.5 * l2 * float(b @ b), columns.T @ slope / n + l2 * b

    b = start
    value, gradient = smooth(b)
    recent = [value + l1 * float(np.abs(b).sum())]
    curvature = 1.0
    for _ in range(max_iterations):
        if np.abs(b - _soft_threshold(b - gradient, l1)).max() <= limit:
            return b
        while True:
            trial = _soft_threshold(b - gradient / curvature, l1 / curvature)
            move = trial - b
            length = float(move @ move)
            trial_value, trial_gradient = smooth(trial)
            objective = trial_value + l1 * float(np.abs(trial).sum())
            slack = 1e-14 * abs(recent[-1])
            if objective <= max(recent) - 1e-4 * curvature * length + slack or curvature > 1e12:
                break
            curvature *= 2
        bend = float(move @ (trial_gradient - gradient))
        b, gradient = trial, trial_gradient
        recent = [*recent, objective][-_HISTORY:]
        curvature = min(max(bend / length, 1e-10), 1e10) if length > 0 and bend > 0 else 1.0
    raise ValueError(
        f"the elastic net did not converge in {max_iterations} steps; use a larger strength, or "
        "raise max_iterations"
    )


def _soft_threshold(values: NDArray[np.float64], amount: float) -> NDArray[np.float64]:
    return np.sign(values) * np.maximum(np.abs(values) - amount, 0.0)
