"""Cox regression against scikit-survival, optimality conditions and hand counts."""

from __future__ import annotations

import numpy as np
import pytest
from sksurv.linear_model import CoxnetSurvivalAnalysis, CoxPHSurvivalAnalysis
from sksurv.util import Surv

from survfuse.evaluation.concordance import concordance_index
from survfuse.models.cox import CoxRegression
from survfuse.models.partial_likelihood import PartialLikelihood


def cohort(seed, n=120, p=5, rounded=True):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(n, p)) * rng.uniform(0.5, 20, p) + rng.normal(size=p)
    standard = (values - values.mean(0)) / values.std(0)
    time = rng.exponential(np.exp(-standard[:, 0] + 0.5 * standard[:, 1])) * 10
    censoring = rng.exponential(20, n)
    event = time <= censoring
    time = np.minimum(time, censoring)
    return values, np.ceil(time) if rounded else time, event


def brute_force(risk, time, event, ties):
    total = 0.0
    for moment in np.unique(time[event]):
        at_risk, tied = np.exp(risk[time >= moment]).sum(), risk[(time == moment) & event]
        for place in range(tied.size):
            fraction = place / tied.size if ties == "efron" else 0.0
            total += np.log(at_risk - fraction * np.exp(tied).sum())
        total -= tied.sum()
    return total


@pytest.mark.parametrize("ties", ["efron", "breslow"])
@pytest.mark.parametrize("seed", range(5))
def test_likelihood_equals_brute_force_and_its_derivatives_agree(ties, seed):
    _, time, event = cohort(seed, n=30)
    likelihood = PartialLikelihood(time, event, ties=ties)
    rng = np.random.default_rng(seed)
    risk = rng.normal(size=30)
    value, gradient = likelihood.value_and_gradient(risk)
    assert value == pytest.approx(brute_force(risk, time, event, ties), rel=1e-13)
    assert likelihood.value(risk) == value
    step, direction = 1e-5, rng.normal(size=30)
    up, down = (likelihood.value_and_gradient(risk + sign * step * direction) for sign in (1, -1))
    assert gradient @ direction == pytest.approx((up[0] - down[0]) / (2 * step), rel=1e-6)
    curvature = likelihood.curvature(risk, np.eye(30))
    np.testing.assert_allclose(curvature @ direction, (up[1] - down[1]) / (2 * step), atol=1e-7)


def test_likelihood_of_risks_of_hundreds_is_finite():
    likelihood = PartialLikelihood([3, 2, 1, 3], [1, 1, 1, 1], ties="breslow")
    value, gradient = likelihood.value_and_gradient(np.array([100.0, -800.0, 800.0, 0.0]))
    assert value == pytest.approx(900 + 100)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("ties", ["efron", "breslow"])
@pytest.mark.parametrize("seed", range(3))
def test_unpenalised_fit_equals_scikit_survival(ties, seed):
    values, time, event = cohort(seed)
    model = CoxRegression(ties=ties).fit(values, time=time, event=event)
    reference = CoxPHSurvivalAnalysis(ties=ties, tol=1e-13, n_iter=200)
    reference.fit(values, Surv.from_arrays(event, time))
    np.testing.assert_allclose(model.coefficients, reference.coef_, rtol=1e-8, atol=1e-12)
    centred = (values - values.mean(0)) @ reference.coef_
    np.testing.assert_allclose(model.risk(values), centred, rtol=1e-8, atol=1e-10)


def test_survival_equals_scikit_survival():
    values, time, event = cohort(3)
    model = CoxRegression(ties="breslow").fit(values, time=time, event=event)
    reference = CoxPHSurvivalAnalysis(ties="breslow", tol=1e-13, n_iter=200)
    reference.fit(values, Surv.from_arrays(event, time))
    grid = np.linspace(time.min(), time.max(), 15)
    expected = np.array([curve(grid) for curve in reference.predict_survival_function(values)])
    np.testing.assert_allclose(model.survival(values, grid), expected, atol=1e-8)


@pytest.mark.parametrize(("n", "p"), [(120, 5), (30, 80)])
def test_ridge_meets_the_optimality_condition(n, p):
    values, time, event = cohort(4, n=n, p=p)
    strength = 0.05
    model = CoxRegression(strength=strength).fit(values, time=time, event=event)
    standard = (values - model.mean) / model.scale
    b = model.coefficients * model.scale
    _, slope = PartialLikelihood(time, event).value_and_gradient(standard @ b)
    np.testing.assert_allclose(standard.T @ slope / n + strength * b, 0, atol=1e-9)
    assert np.abs(b).max() > 0.05


@pytest.mark.parametrize("l1_ratio", [1.0, 0.5, 0.1])
@pytest.mark.parametrize(("n", "p"), [(120, 5), (40, 100)])
def test_elastic_net_meets_the_optimality_conditions(l1_ratio, n, p):
    values, time, event = cohort(5, n=n, p=p)
    strength = 0.05 / l1_ratio
    model = CoxRegression(strength=strength, l1_ratio=l1_ratio)
    model.fit(values, time=time, event=event)
    standard = (values - model.mean) / model.scale
    b = model.coefficients * model.scale
    _, slope = PartialLikelihood(time, event).value_and_gradient(standard @ b)
    gradient = standard.T @ slope / n + strength * (1 - l1_ratio) * b
    l1 = strength * l1_ratio
    assert (np.abs(gradient) <= l1 + 1e-7).all()
    np.testing.assert_allclose(gradient[b != 0], -l1 * np.sign(b[b != 0]), atol=1e-7)
    assert 0 < (b != 0).sum() < p


def test_elastic_net_equals_scikit_survival():
    # continuous times: scikit-survival's solver knows no Efron ties
    values, time, event = cohort(6, rounded=False)
    standard = (values - values.mean(0)) / values.std(0)
    strengths = [0.1, 0.02]
    reference = CoxnetSurvivalAnalysis(
        l1_ratio=0.5, alphas=strengths, tol=1e-14, max_iter=1_000_000
    ).fit(standard, Surv.from_arrays(event, time))
    for k, strength in enumerate(strengths):
        model = CoxRegression(strength=strength, l1_ratio=0.5)
        model.fit(values, time=time, event=event)
        np.testing.assert_allclose(
            model.coefficients * model.scale, reference.coef_[:, k], atol=1e-6
        )


@pytest.mark.parametrize("l1_ratio", [0.0, 0.5])
def test_cross_validation_chooses_a_strength_that_predicts(l1_ratio):
    values, time, event = cohort(7, n=240, p=60)
    train, test = slice(0, 160), slice(160, 240)
    model = CoxRegression(strength=None, l1_ratio=l1_ratio, n_strengths=20)
    model.fit(values[train], time=time[train], event=event[train])
    assert model.strength_ == model.search.strengths[model.search.chosen]
    assert model.search.scores[model.search.chosen] == model.search.scores.max()
    assert model.search.chosen > 0
    assert (np.diff(model.search.strengths) < 0).all()
    fitted = concordance_index(model.risk(values[test]), time=time[test], event=event[test])
    assert fitted > 0.65
    again = CoxRegression(strength=None, l1_ratio=l1_ratio, n_strengths=20)
    again.fit(values[train], time=time[train], event=event[train])
    np.testing.assert_array_equal(again.coefficients, model.coefficients)


def test_more_columns_than_patients_by_far():
    rng = np.random.default_rng(8)
    n, p = 260, 1500
    factors = rng.normal(size=(n, 15))
    values = factors @ rng.normal(size=(15, p)) * 0.5 + rng.normal(size=(n, p))
    time = rng.exponential(np.exp(-factors[:, 0]))
    event = rng.random(n) < 0.5
    model = CoxRegression(strength=None, l1_ratio=0.5, n_strengths=15)
    model.fit(values, time=time, event=event)
    used = int((model.coefficients != 0).sum())
    assert 0 < used < 200
    assert concordance_index(model.risk(values), time=time, event=event) > 0.6


def test_the_path_starts_where_every_coefficient_is_zero():
    values, time, event = cohort(12, p=30)
    search = CoxRegression(strength=None, l1_ratio=0.5, n_strengths=5)
    search.fit(values, time=time, event=event)
    top = search.search.strengths[0]
    at_top = CoxRegression(strength=top * 1.0001, l1_ratio=0.5)
    below = CoxRegression(strength=top * 0.99, l1_ratio=0.5)
    assert (at_top.fit(values, time=time, event=event).coefficients == 0).all()
    assert (below.fit(values, time=time, event=event).coefficients != 0).sum() == 1


def test_inner_folds_keep_patients_together_and_spread_events():
    from survfuse.models.cox import _patient_folds

    event = np.repeat(np.arange(30) < 9, 2)
    patient = np.repeat([f"p{k}" for k in range(30)], 2)
    fold = _patient_folds(event, patient, 3, seed=0)
    assert (fold[::2] == fold[1::2]).all()
    assert [int(event[fold == k].sum()) for k in range(3)] == [6, 6, 6]
    assert [int((fold == k).sum()) for k in range(3)] == [20, 20, 20]
    assert (fold != _patient_folds(event, patient, 3, seed=1)).any()


@pytest.mark.parametrize("l1_ratio", [0.0, 0.5])
def test_constant_columns_get_no_coefficient(l1_ratio):
    values, time, event = cohort(9)
    values = np.column_stack([values, np.full(len(time), 0.1), np.zeros(len(time))])
    model = CoxRegression(strength=0.01, l1_ratio=l1_ratio).fit(values, time=time, event=event)
    assert (model.coefficients[-2:] == 0).all()
    assert np.abs(model.coefficients[:2]).min() > 0
    # a value never seen in training changes nothing
    moved = values.copy()
    moved[:, -1] = 5.0
    np.testing.assert_array_equal(model.risk(moved), model.risk(values))


def test_standardisation_makes_units_irrelevant():
    values, time, event = cohort(10)
    scaled = values * [1, 100, 1e-4, 7, 1] + [0, 3, 0, 0, 1000]
    for settings in ({"strength": 0.1}, {"strength": 0.05, "l1_ratio": 0.5}):
        one = CoxRegression(**settings).fit(values, time=time, event=event)
        other = CoxRegression(**settings).fit(scaled, time=time, event=event)
        np.testing.assert_allclose(one.risk(values), other.risk(scaled), atol=1e-6)


def test_input_errors_are_named():
    values, time, event = cohort(0)
    holed = values.copy()
    holed[3, 2] = np.nan
    for arguments, message in [
        ((holed, time, event), r"values must be finite; row 3, column 2 is nan"),
        ((values[:5], time, event), r"values has shape \(5, 5\)"),
        ((values[:, 0], time, event), r"values has shape \(120,\)"),
        ((values.astype(str), time, event), "values has dtype .*; it must hold numbers"),
        ((values, -time, event), "time must not be negative"),
        ((values, time * np.nan, event), "time must be finite"),
        ((values, time, event & False), "event holds no event: all 120 patients are censored"),
    ]:
        with pytest.raises(ValueError, match=message):
            CoxRegression().fit(arguments[0], time=arguments[1], event=arguments[2])
    model = CoxRegression()
    with pytest.raises(ValueError, match="this CoxRegression is not fitted"):
        model.risk(values)
    model.fit(values, time=time, event=event)
    with pytest.raises(ValueError, match="values has 4 columns; the model was fitted on 5"):
        model.risk(values[:, :4])
    with pytest.raises(ValueError, match=r"patient has shape \(3,\)"):
        CoxRegression(strength=None, l1_ratio=1.0).fit(
            values, time=time, event=event, patient=["a", "b", "c"]
        )
    few = event & (np.cumsum(event) <= 3)
    with pytest.raises(ValueError, match="3 patients have the event"):
        CoxRegression(strength=None, l1_ratio=1.0).fit(values, time=time, event=few)
    with pytest.raises(ValueError, match="no column of values varies with the outcome"):
        CoxRegression(strength=None).fit(np.ones((120, 2)), time=time, event=event)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strength": -1.0}, r"strength is -1\.0"),
        ({"strength": np.nan}, "strength is nan"),
        ({"l1_ratio": 2.0}, r"l1_ratio is 2\.0; it must lie in \[0, 1\]"),
        ({"ties": "exact"}, "ties is 'exact'"),
        ({"n_strengths": 1}, "n_strengths is 1; it must be at least 2"),
        ({"n_folds": 1}, "n_folds is 1; it must be at least 2"),
    ],
)
def test_setting_errors_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        CoxRegression(**settings)
    if "ties" in settings:
        with pytest.raises(ValueError, match=message):
            PartialLikelihood([1, 2], [1, 0], ties="exact")


def test_fits_without_a_minimum_are_refused():
    values, time, event = cohort(1)
    with pytest.raises(ValueError, match="120 patients; without a penalty the coefficients"):
        CoxRegression().fit(np.random.default_rng(0).normal(size=(120, 130)), time=time,
                            event=event)  # fmt: skip
    twice = np.column_stack([values, values[:, 0] + values[:, 1]])
    with pytest.raises(ValueError, match="no finite minimum: columns are collinear"):
        CoxRegression().fit(twice, time=time, event=event)
    # whoever has the higher value has the earlier event: the coefficient grows without end
    order = np.arange(1.0, 41.0)
    with pytest.raises(ValueError, match="no finite minimum"):
        CoxRegression().fit(-order[:, None], time=order, event=np.ones(40))
    with pytest.raises(ValueError, match="did not converge in 2 steps"):
        CoxRegression(strength=0.01, l1_ratio=0.5, max_iterations=2).fit(
            values, time=time, event=event
        )
