"""Splits: whole patients, whole sites, published files, and how much random rows leak."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from survfuse.data.splits import (
    CaseSplit,
    Split,
    check_no_overlap,
    check_patients_whole,
    leakage,
    patient_folds,
    random_row_splits,
    read_splits,
    site_preserving_folds,
    with_inner_validation,
)

NONE = np.empty(0, dtype=np.int64)


@pytest.fixture
def slides() -> pd.DataFrame:
    """120 patients with one to three slides, 40 events, 12 sites of unequal size."""
    rng = np.random.default_rng(0)
    patients = pd.DataFrame(
        {
            "patient": [f"P{i:03d}" for i in range(120)],
            "event": np.arange(120) < 40,
            "site": rng.choice(12, 120, p=np.arange(1, 13) / 78).astype(str),
        }
    ).sample(frac=1, random_state=1)
    return patients.loc[patients.index.repeat(rng.integers(1, 4, 120))].reset_index(drop=True)


def folds_of(kind: str, slides: pd.DataFrame, seed: int = 0) -> list[Split]:
    if kind == "patient":
        return patient_folds(slides["patient"], slides["event"], n_folds=5, seed=seed)
    return site_preserving_folds(
        slides["patient"], slides["site"], slides["event"], n_folds=5, seed=seed
    )


@pytest.mark.parametrize("kind", ["patient", "site"])
def test_every_row_is_tested_once_and_no_patient_straddles(slides, kind):
    folds = folds_of(kind, slides)
    tested = np.concatenate([fold.test for fold in folds])
    assert np.sort(tested).tolist() == list(range(len(slides)))
    for fold in folds:
        check_patients_whole(fold, slides["patient"])
        assert np.sort(np.r_[fold.train, fold.test]).tolist() == list(range(len(slides)))
        assert fold.validation.size == 0
        assert leakage(fold, slides["patient"]) == 0


def test_patient_folds_share_the_events_evenly(slides):
    for fold in folds_of("patient", slides):
        test = slides.iloc[fold.test].drop_duplicates("patient")
        assert (len(test), test["event"].sum()) == (24, 8)


def test_sites_stay_whole_and_are_balanced(slides):
    folds = folds_of("site", slides)
    events = []
    for fold in folds:
        train, test = slides.iloc[fold.train], slides.iloc[fold.test]
        assert not set(train["site"]) & set(test["site"])
        events.append(test.drop_duplicates("patient")["event"].sum())
    # the largest site has a sixth of everything
    assert max(events) <= 12
    assert min(events) >= 5


@pytest.mark.parametrize("kind", ["patient", "site"])
def test_folds_depend_on_the_seed_and_on_nothing_else(slides, kind):
    first, again, other = folds_of(kind, slides), folds_of(kind, slides), folds_of(kind, slides, 1)
    assert all(np.array_equal(a.test, b.test) for a, b in zip(first, again))
    if kind == "patient":
        assert any(not np.array_equal(a.test, b.test) for a, b in zip(first, other))
        # the order of the rows decides nothing about which patients go together
        order = np.random.default_rng(3).permutation(len(slides))
        shuffled = folds_of(kind, slides.iloc[order].reset_index(drop=True))
        patients = slides["patient"].to_numpy()
        for a, b in zip(first, shuffled):
            assert set(patients[a.test]) == set(patients[order][b.test])


def test_folds_refuse_what_cannot_be_split(slides):
    with pytest.raises(ValueError, match=r"n_folds is 200; with 120 patients"):
        patient_folds(slides["patient"], slides["event"], n_folds=200)
    with pytest.raises(ValueError, match=r"n_folds is 1; with 12 sites"):
        site_preserving_folds(slides["patient"], slides["site"], slides["event"], n_folds=1)
    with pytest.raises(ValueError, match=r"patient 'a' has event True in one row and False"):
        patient_folds(["a", "a", "b"], [True, False, True], n_folds=2)
    with pytest.raises(ValueError, match=r"patient 'a' has site X in one row and Y in another"):
        site_preserving_folds(["a", "a", "b"], ["X", "Y", "X"], [1, 1, 0], n_folds=2)
    with pytest.raises(ValueError, match=r"patient_ids has 2 rows and event 1"):
        patient_folds(["a", "b"], [1], n_folds=2)


def test_inner_validation_needs_twenty_events(slides):
    fold = folds_of("patient", slides)[0]
    args = (fold, slides["patient"], slides["event"])
    # 32 events train: a fifth of them is 6
    assert with_inner_validation(*args).validation.size == 0
    assert with_inner_validation(*args).train.tolist() == fold.train.tolist()
    # half are more than twenty patients, and fewer events
    assert with_inner_validation(*args, fraction=0.5).validation.size == 0
    inner = with_inner_validation(*args, fraction=0.65)
    moved = slides.iloc[inner.validation].drop_duplicates("patient")
    assert moved["event"].sum() == 21
    check_patients_whole(inner, slides["patient"])
    assert np.sort(np.r_[inner.train, inner.validation]).tolist() == fold.train.tolist()
    assert inner.test.tolist() == fold.test.tolist()


def test_inner_validation_refuses_a_second_one_and_wrong_fractions(slides):
    fold = folds_of("patient", slides)[0]
    args = (slides["patient"], slides["event"])
    with pytest.raises(ValueError, match=r"validation has 1 rows; it must be empty"):
        with_inner_validation(fold._replace(validation=np.array([0])), *args)
    with pytest.raises(ValueError, match=r"fraction is 1.5"):
        with_inner_validation(fold, *args, fraction=1.5)


def test_random_rows_are_what_torch_random_split_draws():
    for n in (284, 437, 1022):
        for seed, split in zip((1, 2, 3), random_row_splits(n, seeds=(1, 2, 3))):
            torch.manual_seed(seed)
            parts = torch.utils.data.random_split(range(n), [0.7, 0.15, 0.15])
            assert [list(p.indices) for p in parts] == [part.tolist() for part in split]


def test_random_rows_refuse_wrong_fractions():
    with pytest.raises(ValueError, match=r"sum to 1"):
        random_row_splits(10, fractions=(0.5, 0.2, 0.2))
    with pytest.raises(ValueError, match=r"leave one empty"):
        random_row_splits(2)


@pytest.mark.parametrize(
    ("cohort", "share"), [("blca", 0.181), ("brca", 0.088), ("kirp", 0.107), ("ucec", 0.143)]
)
def test_random_slide_rows_leak_patients(shared_data, cohort, share):
    path = shared_data / "tcga_omics" / f"tcga_{cohort}_all_clean.csv.zip"
    cases = pd.read_csv(path, usecols=["case_id"])["case_id"]
    splits = random_row_splits(len(cases), seeds=range(100))
    assert np.mean([leakage(split, cases) for split in splits]) == pytest.approx(share, abs=0.01)


def test_leakage_of_an_empty_test_part_is_nan():
    assert np.isnan(leakage(Split(np.array([0]), NONE, NONE), ["a"]))


def test_published_folds_cover_the_cohort_without_overlap(shared_data):
    path = shared_data / "tcga_omics" / "tcga_kirp_all_clean.csv.zip"
    cases = pd.read_csv(path, usecols=["case_id"])["case_id"]
    folds = read_splits(shared_data / "splits" / "tcga_kirp")
    assert [fold.name for fold in folds] == [f"splits_{k}" for k in range(5)]
    tested = []
    for fold in folds:
        rows = fold.rows(cases)
        check_patients_whole(rows, cases)
        assert rows.train.size + rows.test.size == len(cases)
        assert rows.validation.size == 0
        tested += rows.test.tolist()
    assert sorted(tested) == list(range(len(cases)))


def write_split(folder, text: str, number: int = 0) -> None:
    (folder / f"splits_{number}.csv").write_text(text)


def test_read_splits_orders_folds_by_number_and_drops_padding(tmp_path):
    for number in (10, 2):
        write_split(tmp_path, f",train,val\n0,a{number},c\n1,b,\n", number)
    write_split(tmp_path, ",train,val,test\n0,a,b,c\n1,d,,\n", 1)
    (tmp_path / "splits_0_bool.csv").write_text("not a split")
    folds = read_splits(tmp_path)
    assert [fold.name for fold in folds] == ["splits_1", "splits_2", "splits_10"]
    assert folds[1] == CaseSplit("splits_2", ("a2", "b"), ("c",), ())
    with_test = folds[0].rows(["a", "b", "c", "d", "d"])
    assert [part.tolist() for part in with_test] == [[0, 3, 4], [1], [2]]


def test_a_case_in_train_and_validation_is_named_with_its_file(tmp_path):
    write_split(tmp_path, ",train,val\n0,TCGA-A,TCGA-B\n1,TCGA-B,\n")
    with pytest.raises(
        ValueError, match=r"splits_0\.csv: case 'TCGA-B' is in both train and validation"
    ):
        read_splits(tmp_path)
    with pytest.raises(ValueError, match=r"split: slide 'x' is in both validation and test \(2"):
        check_no_overlap(["a"], ["x", "y"], ["y", "x"], what="slide")
    split = Split(np.array([0]), NONE, np.array([1]))
    with pytest.raises(ValueError, match=r"fold 3: patient 'p' is in both train and test"):
        check_patients_whole(split, ["p", "p"], source="fold 3")


def test_read_splits_refuses_missing_folders_files_and_columns(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"split folder .*nowhere does not exist"):
        read_splits(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no file splits_<number>.csv"):
        read_splits(tmp_path)
    write_split(tmp_path, ",train,valid\n0,a,b\n")
    with pytest.raises(ValueError, match=r"must have 'val'"):
        read_splits(tmp_path)
    write_split(tmp_path, ",train,val\n0,a,\n")
    with pytest.raises(ValueError, match=r"column 'val' is empty"):
        read_splits(tmp_path)


def test_a_published_fold_that_does_not_fit_the_cohort_is_an_error_unless_dropped():
    fold = CaseSplit("splits_0", ("a", "b"), ("c",), ())
    with pytest.raises(ValueError, match=r"splits_0 names cases that the cohort lacks: 'b'"):
        fold.rows(["a", "c"])
    with pytest.raises(ValueError, match=r"splits_0 leaves out cases of the cohort: 'd'"):
        fold.rows(["a", "b", "c", "d"])
    assert [p.tolist() for p in fold.rows(["a", "c", "d"], mismatch=r"drop")] == [[0], [], [1]]
    with pytest.raises(ValueError, match=r"none of its train cases"):
        fold.rows(["c"], mismatch=r"drop")
    with pytest.raises(ValueError, match=r"mismatch is 'ignore'"):
        fold.rows(["a"], mismatch=r"ignore")
