"""Which rows are trained on, watched and tested under each protocol."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from training_cases import given_split, small_cohort, small_config

from survfuse.data.cohort import Cohort
from survfuse.data.splits import Split
from survfuse.training.folds import FoldPlan, plan_folds


def plans(cohort: Cohort, given: Split | None = None, **protocol: object) -> list[FoldPlan]:
    return plan_folds(small_config(protocol=protocol), cohort, given)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(np.sort(a), np.sort(b))


def test_patient_folds_test_everybody_once_per_seed() -> None:
    cohort = small_cohort()
    config = small_config(
        protocol={"split": "patients", "n_folds": 4, "validation": "none"},
        training={"seeds": [3, 4]},
    )
    found = plan_folds(config, cohort, None)
    assert [(plan.seed, plan.fold) for plan in found] == [(s, f) for s in (3, 4) for f in range(4)]
    tested = np.concatenate([plan.split.test for plan in found[:4]])
    assert same(tested, np.arange(60))
    # another seed draws other weights, not other folds
    assert all(same(a.split.test, b.split.test) for a, b in zip(found[:4], found[4:]))


def test_row_splits_are_drawn_anew_for_every_seed() -> None:
    config = small_config(protocol={"split": "rows"}, training={"seeds": [1, 2]})
    first, second = plan_folds(config, small_cohort(), None)
    assert not same(first.split.test, second.split.test)
    assert [len(part) for part in first.split] == [42, 9, 9]


def test_an_inner_set_with_too_few_events_is_trained_on() -> None:
    cohort, split = small_cohort(), given_split()
    events = int(cohort.event[split.validation].sum())
    enough, too_few = (
        plans(cohort, split, validation="inner", min_inner_events=minimum)[0].split
        for minimum in (events, events + 1)
    )
    assert same(enough.validation, split.validation)
    assert len(too_few.validation) == 0
    assert same(too_few.train, np.concatenate([split.train, split.validation]))


def test_an_inner_set_is_cut_from_the_training_patients_only() -> None:
    cohort = small_cohort()
    found = plans(
        cohort, split="patients", validation="inner", min_inner_events=2, inner_fraction=0.2
    )
    for plan in found:
        assert cohort.event[plan.split.validation].sum() >= 2
        assert same(np.concatenate(plan.split), np.arange(60))


def test_validation_can_be_the_test_rows_or_nobody() -> None:
    cohort, split = small_cohort(), given_split()
    watched = plans(cohort, split, validation="test")[0].split
    assert same(watched.validation, split.test)
    assert len(watched.train) == 50
    assert len(plans(cohort, split, validation="none")[0].split.train) == 50


def test_what_a_source_cannot_give_is_an_error() -> None:
    cohort = small_cohort()
    with pytest.raises(ValueError, match="brings no split"):
        plans(cohort, None, split="given")
    with pytest.raises(ValueError, match="names no validation rows"):
        plans(cohort, None, split="patients", validation="split")
    with pytest.raises(ValueError, match="no covariate site"):
        plans(cohort, None, split="sites", validation="none")
    with pytest.raises(ValueError, match=r"data\.folder is not set"):
        plans(cohort, None, split="published", validation="none")


def test_a_patient_on_both_sides_is_an_error() -> None:
    cohort = small_cohort()
    twins = dataclasses.replace(
        cohort,
        patient_ids=(*cohort.patient_ids[:59], cohort.patient_ids[0]),
        time=np.append(cohort.time[:59], cohort.time[0]),
        event=np.append(cohort.event[:59], cohort.event[0]),
    )
    with pytest.raises(ValueError, match="P-000"):
        plans(twins, given_split())


def test_published_folds_are_read_below_the_data_folder(tmp_path: Path) -> None:
    folder = tmp_path / "splits" / "tcga_abcd"
    folder.mkdir(parents=True)
    cohort = small_cohort(6)
    for fold in range(2):
        train = [name for i, name in enumerate(cohort.patient_ids) if i % 2 != fold]
        test = [name for i, name in enumerate(cohort.patient_ids) if i % 2 == fold]
        lines = [f"{i},{a},{b}" for i, (a, b) in enumerate(zip(train, test))]
        (folder / f"splits_{fold}.csv").write_text("\n".join([",train,val", *lines]) + "\n")
    config = small_config(
        data={"folder": str(tmp_path), "cohort": "abcd"},
        protocol={"split": "published", "validation": "none"},
    )
    found = plan_folds(config, cohort, None)
    assert [plan.split.test.tolist() for plan in found] == [[0, 2, 4], [1, 3, 5]]
    # one patient has no outcome and is in the files only, another is new
    other = dataclasses.replace(cohort, patient_ids=("P-NEW", *cohort.patient_ids[1:]))
    with pytest.raises(ValueError, match=r"'P-000'; .*protocol\.mismatch: drop"):
        plan_folds(config, other, None)
    protocol = dataclasses.replace(config.protocol, mismatch="drop")
    found = plan_folds(dataclasses.replace(config, protocol=protocol), other, None)
    assert [plan.split.test.tolist() for plan in found] == [[2, 4], [1, 3, 5]]
