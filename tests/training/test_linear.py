"""Cox baselines: which rows they may learn from."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from training_cases import given_split, small_cohort, small_config

from survfuse.training.linear import development_rows, fit_cox
from survfuse.training.run_folds import prepare


def clinical(**protocol: str):
    return small_config(model={"name": "clinical_cox", "settings": {}}, protocol=protocol)


def test_rows_that_early_stopping_watches_are_learned_from_unless_they_are_the_test_rows() -> None:
    split = given_split()
    both = sorted([*split.train, *split.validation])
    assert development_rows(clinical(), split).tolist() == both
    watched = split._replace(validation=split.test)
    test_rows = set(split.test.tolist())
    assert not test_rows & set(development_rows(clinical(validation="test"), watched).tolist())


def test_nothing_of_the_test_rows_reaches_the_baseline() -> None:
    """Other test patients, same model: unknown ages are filled with the training mean."""
    split, config = given_split(), clinical()
    cohort = small_cohort()
    covariates = cohort.covariates.copy()
    covariates.iloc[[0, 5], 0] = np.nan
    changed = covariates.copy()
    changed.iloc[split.test, 0] += 1000.0
    time, event = cohort.time.copy(), cohort.event.copy()
    time[split.test] *= 3.0
    risks = []
    for frame, times in ((covariates, cohort.time), (changed, time)):
        one = dataclasses.replace(cohort, covariates=frame, time=times, event=event)
        rows = development_rows(config, split)
        risk, details = fit_cox(config, one, prepare(config, one, split), rows, 1)
        risks.append((risk[rows], details))
    np.testing.assert_array_equal(risks[0][0], risks[1][0])
    assert risks[0][1] == risks[1][1]


def test_patients_stay_whole_in_the_inner_folds(monkeypatch: pytest.MonkeyPatch) -> None:
    from survfuse.models.cox import CoxRegression

    seen = {}
    fit = CoxRegression.fit

    def spy(self, *arguments, **options):
        seen.update(options)
        return fit(self, *arguments, **options)

    monkeypatch.setattr(CoxRegression, "fit", spy)
    cohort = small_cohort()
    twins = tuple(f"p{i // 2}" for i in range(len(cohort)))
    cohort = dataclasses.replace(cohort, patient_ids=twins)
    config = small_config(model={"name": "elastic_net_cox", "settings": {}})
    split = given_split()
    rows = development_rows(config, split)
    fit_cox(config, cohort, prepare(config, cohort, split), rows, 1)
    assert list(seen["patient"]) == [twins[row] for row in rows]
