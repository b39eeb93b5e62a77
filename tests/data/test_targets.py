"""Classes of a cohort's units: columns, subsets, batches, saved states; TCGA's gliomas."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from survfuse.batch import Batch
from survfuse.data import ClassTarget, Cohort
from survfuse.data.cohort_files import read_cohort
from survfuse.data.glioma import glioma_diagnosis, glioma_grade
from survfuse.data.modalities import TableModality
from survfuse.data.prepared import PreparedCohort
from survfuse.training.identity import fingerprint


def cohort(**changes: object) -> Cohort:
    names = tuple(f"P{i}" for i in range(6))
    whole = Cohort(
        unit_ids=names,
        patient_ids=names,
        time=np.arange(1.0, 7.0),
        event=[1, 0, 1, 1, 0, 1],
        covariates=pd.DataFrame({"age": np.arange(6.0)}, index=names),
        modalities={"genes": TableModality(np.random.default_rng().random((6, 2)), ("A", "B"))},
        targets={"grade": ClassTarget([0, 1, -1, 1, 0, 2], ("G2", "G3", "G4"), True)},
    )
    return dataclasses.replace(whole, **changes)


@pytest.mark.parametrize(
    ("values", "classes", "labels"),
    [
        (["b", None, "a", "", float("nan"), " b "], ("a", "b"), [1, -1, 0, -1, -1, 1]),
        ([10, 9, 2], ("2", "9", "10"), [2, 1, 0]),
        ([1.0, float("nan"), 0.0], ("0", "1"), [1, -1, 0]),
        ([True, False], ("False", "True"), [1, 0]),
        (pd.Series(["x", pd.NA, "y"], dtype="string"), ("x", "y"), [0, -1, 1]),
        (pd.Series(["x", None, "y"], dtype="category"), ("x", "y"), [0, -1, 1]),
    ],
)
def test_a_column_becomes_classes(values, classes, labels) -> None:
    target = ClassTarget.from_column(values)
    assert target.classes == classes
    assert target.labels.tolist() == labels
    assert target.labels.dtype == np.int64
    assert target.known.tolist() == [label >= 0 for label in labels]


def test_levels_are_in_the_order_they_are_given() -> None:
    target = ClassTarget.from_column(["high", "low", None], ("low", "mid", "high"), ordinal=True)
    assert target.labels.tolist() == [2, 0, -1]
    assert target.counts() == {"low": 1, "mid": 0, "high": 1}
    assert ClassTarget.from_column([3, 1, 2], ordinal=True).classes == ("1", "2", "3")


def test_wrong_columns_are_named_with_their_row() -> None:
    series = pd.Series(["a", "c"], index=["P0", "P1"], name="subtype")
    with pytest.raises(ValueError, match=r"^subtype at row 1 \(P1\) is 'c'; .* 'a', 'b'"):
        ClassTarget.from_column(series, ("a", "b"))
    with pytest.raises(ValueError, match=r"^values at row 1 is 2\.5; .* whole number"):
        ClassTarget.from_column([1, 2.5])
    with pytest.raises(ValueError, match=r"classes is None; .* from the lowest: 'high', 'low'"):
        ClassTarget.from_column(["low", "high"], ordinal=True)
    with pytest.raises(ValueError, match="values holds the classes 'a'; there must be at least tw"):
        ClassTarget.from_column(["a", "a", None])
    with pytest.raises(ValueError, match=r"has shape \(1, 2\); it must be a vector"):
        ClassTarget.from_column([["a", "b"]])


def test_wrong_labels_and_classes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"labels at row 1 is 2; with 2 classes .* 0 to 1, or -1"):
        ClassTarget([0, 2], ("a", "b"))
    with pytest.raises(ValueError, match="labels is float64"):
        ClassTarget([0.5], ("a", "b"))
    for classes in (("a",), ("a", "a")):
        with pytest.raises(ValueError, match=r"^classes is .* at least two names, each once"):
            ClassTarget([0], classes)
    with pytest.raises(TypeError, match=r"targets\['grade'\] is 3; it must be a ClassTarget"):
        cohort(targets={"grade": 3})
    with pytest.raises(ValueError, match=r"targets\['grade'\] has 1 rows and time 6"):
        cohort(targets={"grade": ClassTarget([0], ("a", "b"))})


def test_other_classes_are_matched_by_name() -> None:
    target = ClassTarget([0, 1, -1], ("a", "b"))
    assert target.with_classes(("c", "b", "a")).labels.tolist() == [2, 1, -1]
    with pytest.raises(ValueError, match=r"but units are of 'b'; it must name every"):
        target.with_classes(("a", "c"))
    assert target.with_classes(("a", "c"), others="unknown").labels.tolist() == [0, -1, -1]


def test_targets_follow_a_cohort() -> None:
    whole = cohort()
    part = whole.subset([5, 2])
    assert part.targets["grade"].labels.tolist() == [2, -1]
    assert whole.only(["genes"]).targets["grade"].labels.tolist() == [0, 1, -1, 1, 0, 2]
    assert json.loads(json.dumps(whole.summary()))["targets"] == {
        "grade": {"classes": {"G2": 2, "G3": 2, "G4": 1}, "unknown": 1}
    }
    other = ClassTarget([0, 1, -1, 1, 0, 1], ("G2", "G3", "G4"), True)
    prints = [
        fingerprint(cohort(modalities=whole.modalities, targets=targets))
        for targets in (whole.targets, {"grade": other}, {})
    ]
    assert len({*prints, fingerprint(whole)}) == 3


def test_batches_hold_targets_and_batches_without_any_still_work() -> None:
    prepared = cohort().prepare([0, 1, 2, 3], n_bins=2)
    batch = prepared.batch([5, 2, 0]).to("cpu")
    assert batch.targets["grade"].tolist() == [2, -1, 0]
    assert batch.targets["grade"].dtype == torch.int64
    plain = Batch({}, *batch[1:5])
    assert plain.to("cpu").targets == {}


def test_a_cohort_without_events_prepares_where_nothing_reads_time_bins() -> None:
    censored = cohort(event=np.zeros(6, dtype=bool))
    with pytest.raises(ValueError, match="censored"):
        censored.prepare(None)
    prepared = censored.prepare(None, n_bins=None)
    assert prepared.n_bins == 1
    again = PreparedCohort.from_state(censored, json.loads(json.dumps(prepared.state)))
    assert again.labels.tolist() == [0] * 6


def test_a_saved_state_knows_the_classes() -> None:
    whole = cohort()
    state = json.loads(json.dumps(whole.prepare(None, n_bins=2).state))
    new = cohort(modalities=whole.modalities, targets={})
    target = PreparedCohort.from_state(new, state).cohort.targets["grade"]
    assert (target.classes, target.ordinal) == (("G2", "G3", "G4"), True)
    assert not target.known.any()
    # a class that the models were not trained on is unknown
    other = ClassTarget.from_column(["G1", "G3", "G2", None, "G3", "G3"])
    new = dataclasses.replace(new, targets={"grade": other, "more": other})
    found = PreparedCohort.from_state(new, state).cohort.targets
    assert found["grade"].labels.tolist() == [-1, 1, 0, -1, 1, 1]
    assert list(found) == ["grade"]
    del state["targets"]
    assert PreparedCohort.from_state(whole, state).cohort.targets == {}


def test_gliomas(shared_data: Path, tcga_cdr: Path) -> None:
    table = shared_data / "tcga_omics/tcga_gbmlgg_all_clean.csv.zip"
    gliomas = read_cohort(table, tables="merged", exclude=["IDH1", "CDKN2B"])
    assert glioma_diagnosis(gliomas).counts() == {
        "astrocytoma": 179,
        "oligoastrocytoma": 128,
        "oligodendroglioma": 172,
        "glioblastoma": 90,
    }
    features = gliomas.modalities["omics"].features
    assert not [name for name in features if name.split("_")[0] in ("IDH1", "CDKN2B")]
    assert "CDKN2A_cnv" in features
    assert gliomas.notes == ("3 columns of 2 excluded genes were left out",)
    with pytest.raises(ValueError, match=r"unknown gene 'IDH11'.*did you mean 'IDH1'"):
        read_cohort(table, exclude=["IDH11"])
    grade = glioma_grade(gliomas, tcga_cdr)
    assert grade.counts() == {"G2": 229, "G3": 249, "G4": 90}
    assert gliomas.unit_ids[int(np.flatnonzero(~grade.known)[0])].startswith("TCGA-")


def test_a_code_that_is_no_gliomas_is_named() -> None:
    plain = cohort()
    with pytest.raises(ValueError, match="no covariate oncotree_code"):
        glioma_diagnosis(plain)
    codes = plain.covariates.assign(oncotree_code=["GBM", "ODG", None, "LUAD", "GBM", "ODG"])
    with pytest.raises(ValueError, match="oncotree_code of cohort holds 'LUAD'; it must be one of"):
        glioma_diagnosis(dataclasses.replace(plain, covariates=codes))


def test_grades_of_a_table_in_brackets_are_unknown(tmp_path: Path) -> None:
    plain = cohort()
    codes = plain.covariates.assign(oncotree_code=["GBM", "ODG", "ODG", "ASTR", "AASTR", None])
    gliomas = dataclasses.replace(plain, covariates=codes)
    frame = pd.DataFrame(
        {
            "bcr_patient_barcode": ["P0", "P1", "P2", "P3"],
            "histological_grade": ["[Not Available]", "G2", "[Discrepancy]", "G3"],
        }
    )
    frame.to_csv(tmp_path / "cdr.csv", index=False)
    assert glioma_grade(gliomas, tmp_path / "cdr.csv").labels.tolist() == [2, 0, -1, 1, -1, -1]
    frame.drop(columns="histological_grade").to_csv(tmp_path / "cdr.csv", index=False)
    with pytest.raises(ValueError, match="lacks the columns 'histological_grade'"):
        glioma_grade(gliomas, tmp_path / "cdr.csv")
