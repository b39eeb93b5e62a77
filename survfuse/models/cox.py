"""Linear Cox regression, ridge or elastic net: the baselines every model is held against.

numpy fp64, no torch. Columns are standardised inside, with the training patients' statistics.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from survfuse.baseline_hazard import BaselineHazard, breslow_baseline
from survfuse.models.elastic_net import elastic_net_path, largest_strength, ridge_path
from survfuse.models.partial_likelihood import PartialLikelihood, Ties
from survfuse.outcomes import check_outcomes


class StrengthSearch(NamedTuple):
    """What the inner cross-validation saw."""

    strengths: NDArray[np.float64]  # [S] decreasing
    scores: NDArray[np.float64]  # [S] cross-validated log partial likelihood, higher is better
    chosen: int


class CoxRegression:
    """Cox regression: risk = sum_k coefficient_k (x_k - mean_k), penalised.

    Minimises, over coefficients b of the standardised columns,

        -log PL(b) / n + strength (l1_ratio |b|_1 + (1 - l1_ratio) / 2 |b|_2^2)

    Args:
        strength: of the penalty; 0 for none; None to choose it by inner cross-validation: the
            largest cross-validated partial likelihood along a path of `n_strengths` values.
        l1_ratio: 0 = ridge (Newton), otherwise elastic net (proximal gradient on an active set).
        ties: "efron" or "breslow".
        n_strengths: length of the path, down to 5 % of the smallest strength that zeroes every
            coefficient (1 % with more patients than columns).
        n_folds: of the inner cross-validation; patients never straddle a fold.
        seed: of the inner folds.
        max_iterations: of one fit, before it is given up as not converging.

    Attributes, after `fit`: `coefficients` [p] per unit of the column, `mean` [p], `scale` [p],
    `strength_` (the one used), `search` (StrengthSearch or None), `baseline` (BaselineHazard).

    Raises:
        ValueError: a setting is not valid.

    Source: Simon et al. (2011), J. Stat. Softw. 39(5); cross-validated partial likelihood:
    Verweij and van Houwelingen (1993), Stat. Med. 12, 2305-2314.
    """

    def __init__(
        self,
        *,
        strength: float | None = 0.0,
        l1_ratio: float = 0.0,
        ties: Ties = "efron",
        n_strengths: int = 50,
        n_folds: int = 5,
        seed: int = 0,
        max_iterations: int = 5000,
    ) -> None:
        if strength is not None and not (np.isfinite(strength) and strength >= 0):
            raise ValueError(f"strength is {strength}; it must be None or a finite number >= 0")
        if not 0 <= l1_ratio <= 1:
            raise ValueError(f"l1_ratio is {l1_ratio}; it must lie in [0, 1]")
        if n_strengths < 2:
            raise ValueError(f"n_strengths is {n_strengths}; it must be at least 2")
        if n_folds < 2:
            raise ValueError(f"n_folds is {n_folds}; it must be at least 2")
        if ties not in ("efron", "breslow"):
            raise ValueError(f"ties is {ties!r}; it must be 'efron' or 'breslow'")
        self.strength = strength
        self.l1_ratio = l1_ratio
        self.ties: Ties = ties
        self.n_strengths = n_strengths
        self.n_folds = n_folds
        self.seed = seed
        self.max_iterations = max_iterations
        self.search: StrengthSearch | None = None

    def fit(
        self,
        values: ArrayLike,
        *,
        time: ArrayLike,
        event: ArrayLike,
        patient: ArrayLike | None = None,
    ) -> CoxRegression:
        """Fit on training patients and return self.

        Args:
            values: [n, p] finite numbers; impute before. A constant column gets coefficient 0.
            time: [n] time of the event or of censoring.
            event: [n] bool or 0/1, 1 = event seen.
            patient: [n] ids that keep a patient's rows in one inner fold; None: one row each.

        Raises:
            ValueError: an input is not valid, or the fit does not converge (without penalty, a
                column that separates the events from the rest has no finite coefficient).
        """
        times, events = check_outcomes(time, event)
        columns = _check_values(values, times.size)
        self.mean = columns.mean(axis=0)
        spread = columns.std(axis=0)
        # a constant column has a spread of rounding errors only
        constant = spread <= 1e-12 * np.maximum(np.abs(self.mean), 1e-300)
        self.scale = np.where(constant, np.inf, spread)
        standard = (columns - self.mean) / self.scale
        likelihood = PartialLikelihood(times, events, ties=self.ties)
        self.search = None
        if self.strength is None:
            self.search = self._search(standard, times, events, patient)
            strengths = self.search.strengths[: self.search.chosen + 1]
        else:
            strengths = np.array([self.strength])
        solution = self._solve(likelihood, standard, strengths, tolerance=1e-8)[-1]
        self.strength_ = float(strengths[-1])
        self.coefficients = solution / self.scale
        self.baseline: BaselineHazard = breslow_baseline(
            standard @ solution, time=times, event=events
        )
        return self

    def risk(self, values: ArrayLike) -> NDArray[np.float64]:
        """Return the log-risk [n] of patients `values` [n, p]; higher = earlier event.

        Raises:
            ValueError: not fitted, or `values` is not valid.
        """
        if not hasattr(self, "coefficients"):
            raise ValueError("this CoxRegression is not fitted; call fit first")
        columns = np.asarray(values)
        columns = _check_values(values, columns.shape[0] if columns.ndim else 0)
        if columns.shape[1] != self.coefficients.size:
            raise ValueError(
                f"values has {columns.shape[1]} columns; the model was fitted on "
                f"{self.coefficients.size}"
            )
        return (columns - self.mean) @ self.coefficients

    def survival(self, values: ArrayLike, times: ArrayLike) -> NDArray[np.float64]:
        """Return S(times) [n, G] through the Breslow baseline of the training patients."""
        return self.baseline.survival(self.risk(values), times)

    def _solve(
        self,
        likelihood: PartialLikelihood,
        standard: NDArray[np.float64],
        strengths: NDArray[np.float64],
        *,
        tolerance: float,
    ) -> NDArray[np.float64]:
        """Return the coefficients [S, p] of the standardised columns along `strengths`."""
        if self.l1_ratio == 0:
            return ridge_path(likelihood, standard, strengths)
        return elastic_net_path(
            likelihood,
            standard,
            strengths,
            l1_ratio=self.l1_ratio,
            tolerance=tolerance,
            max_iterations=self.max_iterations,
        )

    def _search(
        self,
        standard: NDArray[np.float64],
        time: NDArray[np.float64],
        event: NDArray[np.bool_],
        patient: ArrayLike | None,
    ) -> StrengthSearch:
        """Score every strength by log PL(all) - log PL(training part), summed over folds."""
        likelihood = PartialLikelihood(time, event, ties=self.ties)
        # pure ridge never zeroes a coefficient; a path for a small l1 ratio brackets it
        top = largest_strength(likelihood, standard, max(self.l1_ratio, 1e-2))
        if top == 0:
            raise ValueError("no column of values varies with the outcome; nothing can be fitted")
        depth = 0.05 if standard.shape[1] > standard.shape[0] else 0.01
        strengths = top * np.geomspace(1.0, depth, self.n_strengths)
        if self.l1_ratio == 0:
            strengths = top * np.geomspace(1.0, 1e-4, self.n_strengths)
        scores = np.zeros(strengths.size)
        fold = _patient_folds(event, patient, self.n_folds, self.seed)
        for k in range(self.n_folds):
            rows = fold != k
            part = PartialLikelihood(time[rows], event[rows], ties=self.ties)
            centre = standard[rows].mean(axis=0)
            spread = standard[rows].std(axis=0)
            spread[spread < 1e-9] = np.inf
            inner = (standard - centre) / spread
            path = self._solve(part, inner[rows], strengths, tolerance=1e-5)
            for s, coefficients in enumerate(path):
                risk = inner @ coefficients
                scores[s] += part.value(risk[rows]) - likelihood.value(risk)
        return StrengthSearch(strengths, scores, int(np.argmax(scores)))


def _patient_folds(
    event: NDArray[np.bool_], patient: ArrayLike | None, n_folds: int, seed: int
) -> NDArray[np.int64]:
    """Return the fold [n] of every row: patients shuffled, dealt out with events first."""
    ids = np.arange(event.size) if patient is None else np.asarray(patient)
    if ids.shape != event.shape:
        raise ValueError(f"patient has shape {ids.shape}; it must be ({event.size},)")
    _, first, position = np.unique(ids, return_index=True, return_inverse=True)
    patient_event = event[first]
    if patient_event.sum() < n_folds:
        raise ValueError(
            f"{int(patient_event.sum())} patients have the event; choosing strength by "
            f"cross-validation in {n_folds} folds needs at least one in each"
        )
    shuffled = np.random.default_rng(seed).permutation(first.size)
    dealt = shuffled[np.argsort(~patient_event[shuffled], kind="stable")]
    fold = np.empty(first.size, dtype=np.int64)
    fold[dealt] = np.arange(first.size) % n_folds
    return fold[position]


def _check_values(values: ArrayLike, n: int) -> NDArray[np.float64]:
    columns = np.asarray(values)
    if columns.ndim != 2 or columns.shape[0] != n or columns.shape[1] == 0:
        raise ValueError(
            f"values has shape {columns.shape}; it must be [patients, columns] with one row per "
            "patient and at least one column"
        )
    if columns.dtype != bool and not np.issubdtype(columns.dtype, np.number):
        raise ValueError(f"values has dtype {columns.dtype}; it must hold numbers")
    columns = columns.astype(np.float64)
    bad = ~np.isfinite(columns)
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise ValueError(
            f"values must be finite; row {row}, column {column} is {columns[row, column]} "
            f"({int(bad.sum())} such entries); impute them first"
        )
    return columns
