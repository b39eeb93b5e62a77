"""Kaplan-Meier, log-rank and predicted curves against scikit-survival and hand counts."""

from __future__ import annotations

import numpy as np
import pytest
from sksurv.compare import compare_survival
from sksurv.linear_model import CoxPHSurvivalAnalysis
from sksurv.nonparametric import kaplan_meier_estimator
from sksurv.util import Surv

from survfuse.evaluation.curves import (
    breslow_baseline,
    cox_survival_curves,
    kaplan_meier,
    logrank_test,
    nll_survival_curve,
    nll_survival_curves,
)


def outcomes(seed, n=80):
    rng = np.random.default_rng(seed)
    event = rng.random(n) < 0.5
    event[0] = True
    return rng, rng.integers(1, 25, n) / 2, event


@pytest.mark.parametrize("seed", range(5))
def test_kaplan_meier_equals_scikit_survival(seed):
    _, time, event = outcomes(seed)
    curve = kaplan_meier(time, event)
    times, survival, (low, high) = kaplan_meier_estimator(event, time, conf_type="log-log")
    np.testing.assert_array_equal(curve.times, times)
    np.testing.assert_allclose(curve.survival, survival, atol=1e-12)
    inside = (survival < 1) & (survival > 0)
    np.testing.assert_allclose(curve.low[inside], low[inside], atol=1e-10)
    np.testing.assert_allclose(curve.high[inside], high[inside], atol=1e-10)


def test_kaplan_meier_band_is_one_before_the_first_event():
    curve = kaplan_meier([1, 2, 3, 4], [0, 1, 0, 1])
    np.testing.assert_allclose(curve.survival, [1, 2 / 3, 2 / 3, 0])
    assert (curve.low[0], curve.high[0]) == (1.0, 1.0)
    assert np.isnan(curve.low[-1])
    np.testing.assert_array_equal(curve.at_risk([0, 1, 1.5, 4, 5]), [4, 4, 3, 1, 0])


def test_kaplan_meier_of_censored_patients_stays_at_one():
    curve = kaplan_meier([1, 2, 2], [0, 0, 0])
    assert (curve.survival == 1).all()
    assert (curve.low == 1).all()


@pytest.mark.parametrize("n_groups", [2, 3, 4])
def test_logrank_equals_scikit_survival(n_groups):
    rng, time, event = outcomes(7)
    group = rng.integers(0, n_groups, time.size)
    result = logrank_test([(time[group == k], event[group == k]) for k in range(n_groups)])
    chi_square, pvalue = compare_survival(Surv.from_arrays(event, time), group)
    assert abs(result.chi_square - chi_square) < 1e-10
    assert abs(result.pvalue - pvalue) < 1e-10
    assert result.degrees == n_groups - 1


def test_two_groups_agree_with_the_chi_square_for_more():
    from survfuse.evaluation.curves import _logrank_chi_square

    rng, time, event = outcomes(8)
    high = rng.random(time.size) < 0.4
    groups = [(time[high], event[high]), (time[~high], event[~high])]
    assert abs(logrank_test(groups).chi_square - _logrank_chi_square(groups)) < 1e-10


def test_logrank_errors():
    good = ([1, 2], [1, 0])
    with pytest.raises(ValueError, match=r"groups holds 1 group\(s\)"):
        logrank_test([good])
    with pytest.raises(ValueError, match="no group has an event"):
        logrank_test([([1, 2], [0, 0]), ([3], [0])])
    with pytest.raises(ValueError, match="group 1 time is empty"):
        logrank_test([good, ([], [])])
    with pytest.raises(ValueError, match="one group is at risk at any event"):
        logrank_test([([5, 6], [1, 0]), ([1, 2], [0, 0])])
    with pytest.raises(ValueError, match="one group is at risk at any event"):
        logrank_test([([5, 6], [1, 0]), ([1, 2], [0, 0]), ([7, 8], [1, 0])])
    with pytest.raises(ValueError, match=r"level is 1\.0"):
        kaplan_meier([1], [1], level=1.0)


def test_nll_curve_is_log_linear_within_bins_and_constant_after_the_last_edge():
    # hazards 1/2, 1/2, 1/2: S is 1, 1/2, 1/4 at 0, 2, 6; the open bin keeps 1/4
    curve = nll_survival_curve(np.zeros((1, 3)), [0, 2, 6, np.inf], [0, 1, 2, 4, 6, 1000])
    expected = [1, 0.5**0.5, 0.5, 0.5**1.5, 0.25, 0.25]
    np.testing.assert_allclose(curve, [expected], rtol=1e-14)


def test_nll_curve_with_a_finite_last_edge_falls_to_it():
    curve = nll_survival_curve(np.zeros((1, 2)), [0, 2, 6], [4, 6, 7])
    np.testing.assert_allclose(curve, [[0.5**1.5, 0.25, 0.25]], rtol=1e-14)


def test_nll_curve_keeps_huge_logits_exact():
    curve = nll_survival_curve([[800.0, 0.0], [-800.0, 0.0], [np.inf, 0.0]], [0, 1, 2], [0, 0.5, 1])
    np.testing.assert_allclose(curve[0], [1, np.exp(-400), 0], atol=1e-300)
    np.testing.assert_array_equal(curve[1], [1, 1, 1])
    np.testing.assert_array_equal(curve[2], [1, 0, 0])


@pytest.mark.parametrize(
    ("logits", "edges", "message"),
    [
        (np.zeros(3), [0, 1, 2, 3], r"logits has shape \(3,\)"),
        (np.full((1, 2), np.nan), [0, 1, 2], "hold no NaN"),
        (np.zeros((1, 2)), [0, 1], "2 bins have 3 edges"),
        (np.zeros((1, 2)), [1, 2, 3], "must start at 0"),
        (np.zeros((1, 2)), [0, 2, 2], "increase strictly"),
        (np.zeros((1, 2)), [0, np.inf, np.inf], "only the last edge may be infinite"),
        (np.zeros((1, 2)), [0, 1, np.nan], "only the last edge may be infinite"),
    ],
)
def test_nll_curve_errors(logits, edges, message):
    with pytest.raises(ValueError, match=message):
        nll_survival_curves(logits, edges)


def test_curve_times_are_checked():
    with pytest.raises(ValueError, match="times must not be negative"):
        nll_survival_curve(np.zeros((1, 2)), [0, 1, 2], [-1.0])


@pytest.mark.parametrize("seed", range(3))
def test_cox_curves_equal_scikit_survival(seed):
    rng, time, event = outcomes(seed)
    values = rng.normal(size=(time.size, 2))
    model = CoxPHSurvivalAnalysis(ties="breslow").fit(values, Surv.from_arrays(event, time))
    risk = values @ model.coef_
    baseline = breslow_baseline(risk, time=time, event=event)
    grid = np.linspace(time[event].min(), time[event].max(), 20)
    expected = np.array([curve(grid) for curve in model.predict_survival_function(values)])
    np.testing.assert_allclose(cox_survival_curves(risk, baseline).at(grid), expected, atol=1e-10)
    np.testing.assert_allclose(baseline.survival(risk, grid), expected, atol=1e-10)


def test_breslow_by_hand_with_a_tie_and_a_censoring_at_the_event_time():
    # at 1: two events among four at risk; at 3: one event among one
    baseline = breslow_baseline([0, 0, 0, 0], time=[1, 1, 1, 3], event=[1, 1, 0, 1])
    np.testing.assert_array_equal(baseline.times, [1, 3])
    np.testing.assert_allclose(np.exp(baseline.log_cumulative), [0.5, 1.5], rtol=1e-15)
    np.testing.assert_allclose(
        baseline.survival([0.0], [0.5, 1.0, 2.0, 9.0]), np.exp([[0, -0.5, -0.5, -1.5]])
    )


def test_breslow_survives_extreme_risks_and_ignores_a_shift():
    time, event = [1, 2, 3], [1, 1, 1]
    near = breslow_baseline([0, 1, 2], time=time, event=event)
    far = breslow_baseline([900, 901, 902], time=time, event=event)
    np.testing.assert_allclose(
        far.survival([900, 901, 902], [1, 2, 3]), near.survival([0, 1, 2], [1, 2, 3])
    )
    with pytest.raises(ValueError, match="event holds no event"):
        breslow_baseline([0, 1, 2], time=time, event=[0, 0, 0])
