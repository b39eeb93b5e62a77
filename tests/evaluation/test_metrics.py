"""Brier score, AUC, censoring weights and truncation against scikit-survival and hand counts."""

from __future__ import annotations

import numpy as np
import pytest
from sksurv.metrics import brier_score as reference_brier
from sksurv.metrics import cumulative_dynamic_auc as reference_auc
from sksurv.metrics import integrated_brier_score as reference_ibs
from sksurv.nonparametric import CensoringDistributionEstimator, kaplan_meier_estimator
from sksurv.util import Surv

from survfuse.evaluation.censoring import (
    censoring_distribution,
    evaluation_times,
    product_limit,
    truncation_time,
)
from survfuse.evaluation.metrics import (
    brier_score,
    cumulative_dynamic_auc,
    integrated_brier_score,
)


def draw(seed, n=60, m=90):
    """Outcomes with many ties; the training follow-up covers the test times used."""
    rng = np.random.default_rng(seed)
    time, train_time = rng.integers(1, 30, n) / 2, rng.integers(1, 30, m) / 2
    event, train_event = rng.random(n) < 0.6, rng.random(m) < 0.6
    train_time[0], train_event[0] = 20.0, False
    time[0], event[0] = 14.5, False
    outcome = {
        "time": time, "event": event, "train_time": train_time, "train_event": train_event
    }  # fmt: skip
    grid = np.linspace(time[event].min(), 13.9, 9)
    return (
        rng,
        outcome,
        grid,
        Surv.from_arrays(train_event, train_time),
        Surv.from_arrays(event, time),
    )


@pytest.mark.parametrize("seed", range(20))
def test_brier_scores_equal_scikit_survival(seed):
    rng, outcome, grid, train, test = draw(seed)
    survival = rng.random((60, 9))
    ours = brier_score(survival, times=grid, **outcome)
    np.testing.assert_allclose(
        ours, reference_brier(train, test, survival, grid)[1], atol=1e-10, rtol=0
    )
    ibs = integrated_brier_score(survival, times=grid, **outcome)
    assert abs(ibs - reference_ibs(train, test, survival, grid)) < 1e-10


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("changing", [False, True])
def test_auc_equals_scikit_survival(seed, changing):
    rng, outcome, grid, train, test = draw(seed)
    risk = rng.normal(size=(60, 9) if changing else 60).round(1)
    ours = cumulative_dynamic_auc(risk, times=grid, **outcome)
    values, mean = reference_auc(train, test, risk, grid)
    np.testing.assert_allclose(ours.values, values, atol=1e-10, rtol=0)
    assert abs(ours.mean - mean) < 1e-10


def test_auc_at_one_time_is_its_own_mean():
    rng, outcome, grid, train, test = draw(1)
    risk = rng.normal(size=60)
    ours = cumulative_dynamic_auc(risk, times=grid[4], **outcome)
    assert ours.mean == ours.values[0]
    assert abs(ours.mean - reference_auc(train, test, risk, grid[4:5])[1]) < 1e-10


@pytest.mark.parametrize(("gap", "expected"), [(0.9e-8, 0.5), (1.1e-8, 1.0)])
def test_auc_ties_risks_within_the_tolerance(gap, expected):
    result = cumulative_dynamic_auc(
        [gap, 0.0], times=[1.5], time=[1, 2], event=[1, 0], train_time=[3, 4], train_event=[1, 1]
    )
    assert result.values[0] == expected


def test_brier_score_by_hand():
    # nobody in training is censored, so all weights are 1
    outcome = {
        "time": [1, 2, 3], "event": [1, 0, 1], "train_time": [5, 6], "train_event": [1, 1]
    }  # fmt: skip
    # at 2: row 0 died (.3^2), row 1 censored at 2 counts nothing, row 2 alive ((1 - .8)^2)
    scores = brier_score([[0.3], [0.5], [0.8]], times=[2.0], **outcome)
    np.testing.assert_allclose(scores, [(0.09 + 0.04) / 3], rtol=1e-15)


@pytest.mark.parametrize("seed", range(10))
def test_censoring_distribution_equals_scikit_survival(seed):
    _, outcome, grid, train, _ = draw(seed)
    ours = censoring_distribution(outcome["train_time"], outcome["train_event"])
    reference = CensoringDistributionEstimator().fit(train)
    np.testing.assert_allclose(ours.at(grid), reference.predict_proba(grid), atol=1e-14)
    times, survival = kaplan_meier_estimator(outcome["event"], outcome["time"])
    own = product_limit(outcome["time"], outcome["event"])
    np.testing.assert_array_equal(own.times, times)
    np.testing.assert_allclose(own.values, survival, atol=1e-14)


def test_no_censoring_gives_weight_one():
    ours = censoring_distribution([1, 2, 3], [1, 1, 1])
    np.testing.assert_array_equal(ours.at([0.5, 1, 3]), [1, 1, 1])


def test_truncation_is_the_last_training_time_with_enough_left():
    train = {"train_time": np.arange(1, 11), "train_event": np.zeros(10, int)}
    # G is .2 at 8 and .1 at 9, up to rounding
    result = truncation_time(time=[3, 8, 9, 30], event=[1, 1, 1, 0], **train)
    assert result == (8.0, 1, 3)
    # at most the last test time, whose own event is not before it
    assert truncation_time(time=[1, 4], event=[1, 1], **train) == (4.0, 1, 2)
    assert truncation_time(time=[50], event=[1], minimum=0.55, **train).tau == 4.0


def test_truncation_errors():
    with pytest.raises(ValueError, match=r"minimum is 1\.5; it must lie between 0 and 1"):
        truncation_time(time=[1], event=[1], train_time=[1], train_event=[1], minimum=1.5)
    with pytest.raises(ValueError, match="no truncation time exists"):
        truncation_time(time=[1], event=[1], train_time=[2, 2, 3], train_event=[0, 0, 1],
                        minimum=0.5)  # fmt: skip


def test_evaluation_times_span_the_middle_of_the_events_before_tau():
    time, event = np.arange(1.0, 22.0), np.ones(21, bool)
    event[::7] = False
    grid = evaluation_times(time=time, event=event, tau=12.0, n_times=5)
    before = time[event & (time < 12)]
    np.testing.assert_allclose(grid[[0, -1]], np.percentile(before, [10, 90]))
    np.testing.assert_allclose(np.diff(grid), np.diff(grid)[0])
    with pytest.raises(ValueError, match="n_times is 1; it must be at least 2"):
        evaluation_times(time=time, event=event, tau=12.0, n_times=1)
    with pytest.raises(ValueError, match=r"1 test events lie before tau = 2\.5"):
        evaluation_times(time=time, event=event, tau=2.5)


GOOD = {
    "time": [1, 2, 3, 4], "event": [1, 1, 0, 0], "train_time": [1, 2, 5], "train_event": [1, 0, 1]
}  # fmt: skip


@pytest.mark.parametrize(
    ("survival", "times", "message"),
    [
        (np.full((4, 1), 0.5), [0.5], r"times run from 0\.5 to 0\.5; they must lie in \[1, 4\)"),
        (np.full((4, 1), 0.5), [4.0], r"they must lie in \[1, 4\)"),
        (np.full((4, 2), 0.5), [3.0, 2.0], "times must increase strictly"),
        (np.full((4, 1), 0.5), [np.nan], "times must be finite"),
        (np.full((4, 1), 1.5), [2.0], "survival must hold probabilities"),
        (np.full((4, 1), np.nan), [2.0], "survival must hold probabilities"),
        (np.full((4, 2), 0.5), [2.0], r"survival has shape \(4, 2\); it must be \(4, 1\)"),
    ],
)
def test_brier_errors(survival, times, message):
    with pytest.raises(ValueError, match=message):
        brier_score(survival, times=times, **GOOD)


def test_further_metric_errors():
    with pytest.raises(ValueError, match="times holds 1 entries; an integral needs at least 2"):
        integrated_brier_score(np.full((4, 1), 0.5), times=[2.0], **GOOD)
    with pytest.raises(ValueError, match=r"risk has shape \(4, 3\); it must be \(4,\) or \(4, 1\)"):
        cumulative_dynamic_auc(np.zeros((4, 3)), times=[2.0], **GOOD)
    with pytest.raises(ValueError, match="risk must be finite; row 2"):
        cumulative_dynamic_auc([0, 0, np.nan, 0], times=[2.0], **GOOD)
    zero = {**GOOD, "train_time": [1, 2], "train_event": [1, 0]}
    with pytest.raises(ValueError, match="no training patient is uncensored at 2"):
        brier_score(np.full((4, 1), 0.5), times=[2.5], **zero)
    with pytest.raises(ValueError, match="event holds no event"):
        brier_score(np.full((4, 1), 0.5), times=[2.5], **{**GOOD, "event": [0, 0, 0, 0]})
