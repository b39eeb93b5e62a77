"""Class metrics against scikit-learn and hand counts, their bootstrap, files and reports."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from sklearn import metrics as oracle

from survfuse.evaluation import ClassFold, ClassPredictions, ClassTable, evaluate_classes
from survfuse.evaluation.class_predictions import class_tasks_in
from survfuse.evaluation.class_report import (
    class_report_markdown,
    class_table,
    write_class_report,
)
from survfuse.evaluation.classification import (
    ClassedUnits,
    _resampled,
    balanced_accuracy,
    class_aucs,
    macro_auc,
    macro_f1,
    metric_intervals,
    patients_by_class,
    pooled_metrics,
    quadratic_kappa,
)


def table(
    n: int,
    n_classes: int = 3,
    *,
    seed: int = 0,
    skill: float = 1.0,
    prefix: str = "P",
    unknown: int = 0,
) -> ClassTable:
    """Patients of random classes whose probabilities lean towards the true one, some rounded."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, n_classes, n)
    score = rng.normal(size=(n, n_classes)) + skill * np.eye(n_classes)[label]
    # ties
    score = np.round(score, 1)
    probabilities = np.exp(score) / np.exp(score).sum(axis=1, keepdims=True)
    label[:unknown] = -1
    names = [f"{prefix}{seed}-{i}" for i in range(n)]
    return ClassTable(names, names, label, probabilities)


def predictions(n_folds: int = 3, n: int = 60, **changes: object) -> ClassPredictions:
    folds = [
        ClassFold(f"f{k}", table(n, seed=k, unknown=4), table(20, seed=k, prefix="T"))
        for k in range(n_folds)
    ]
    values = {"task": "grade", "model": "m", "protocol": "honest", "classes": ("a", "b", "c")}
    return ClassPredictions(**{**values, "folds": folds, "ordinal": True, **changes})


def units(of: ClassTable) -> ClassedUnits:
    of = of.known()
    return ClassedUnits(of.label, of.probabilities, of.patient_ids)


@pytest.mark.parametrize("n_classes", [2, 3, 5])
@pytest.mark.parametrize("seed", [0, 1])
def test_metrics_equal_scikit_learn(n_classes: int, seed: int) -> None:
    whole = table(80, n_classes, seed=seed)
    label, values = whole.label, whole.probabilities
    named = values.argmax(axis=1)
    area = (
        oracle.roc_auc_score(label, values[:, 1])
        if n_classes == 2
        else oracle.roc_auc_score(label, values, multi_class="ovr", average="macro")
    )
    assert macro_auc(label, values) == pytest.approx(area)
    assert balanced_accuracy(label, values) == pytest.approx(
        oracle.balanced_accuracy_score(label, named)
    )
    assert macro_f1(label, values) == pytest.approx(oracle.f1_score(label, named, average="macro"))
    kappa = oracle.cohen_kappa_score(label, named, weights="quadratic")
    assert quadratic_kappa(label, values) == pytest.approx(kappa)


def test_kappa_and_auc_by_hand() -> None:
    label, named = np.array([0, 0, 1, 2]), np.array([0, 2, 2, 2])
    chance = np.mean([(a - b) ** 2 for a in label for b in named])
    observed = np.mean((label - named) ** 2)
    found = quadratic_kappa(label, np.eye(3)[named])
    assert found == pytest.approx(1 - observed / chance)
    values = np.array([[0.5, 0.5], [0.5, 0.5], [0.2, 0.8]])
    # of two pairs one is tied
    assert macro_auc([0, 1, 1], values) == pytest.approx(0.75)


@pytest.mark.parametrize("n_classes", [2, 4])
def test_a_resample_that_takes_everybody_once_is_the_estimate(n_classes: int) -> None:
    folds = [units(table(n, n_classes, seed=n)) for n in (31, 50, 7)]
    ones = [np.ones((2, len(fold.label))) for fold in folds]
    resampled = _resampled(folds, ones, ordinal=True)
    for name, value in pooled_metrics(folds, ordinal=True).items():
        np.testing.assert_allclose(resampled[name], value, rtol=1e-12)


def test_a_resample_equals_scikit_learn_with_its_multiplicities() -> None:
    fold = units(table(40, 3))
    counts = np.random.default_rng(1).multinomial(40, np.full(40, 1 / 40), size=3).astype(float)
    found = _resampled([fold], [counts], ordinal=True)
    named = fold.probabilities.argmax(axis=1)
    for row, weight in enumerate(counts):
        weighted = {"sample_weight": weight}
        areas = [
            oracle.roc_auc_score(fold.label == k, fold.probabilities[:, k], **weighted)
            for k in range(3)
        ]
        assert found["auc"][row] == pytest.approx(np.mean(areas))
        assert found["balanced_accuracy"][row] == pytest.approx(
            oracle.balanced_accuracy_score(fold.label, named, **weighted)
        )
        f1 = oracle.f1_score(fold.label, named, average="macro", **weighted)
        assert found["macro_f1"][row] == pytest.approx(f1)
        kappa = oracle.cohen_kappa_score(fold.label, named, weights="quadratic", **weighted)
        assert found["quadratic_kappa"][row] == pytest.approx(kappa)


def test_auc_never_compares_units_of_two_folds() -> None:
    one = units(table(40, 2, seed=0))
    # in steps of 1/64, so that halving is exact and ties stay ties
    own = np.round(64 * one.probabilities[:, 1]) / 64
    one = ClassedUnits(one.label, np.stack([1 - own, own], axis=1), one.patient)
    # the second fold's model is always surer of class 1: by itself as good as before
    surer = 0.5 * (1 + own)
    shifted = ClassedUnits(one.label, np.stack([1 - surer, surer], axis=1), one.patient)
    two = pooled_metrics([one, shifted], ordinal=False)["auc"]
    assert two == pytest.approx(macro_auc(one.label, one.probabilities))


def test_intervals_hold_the_estimate_and_repeat() -> None:
    folds = [units(table(60, 3, seed=k)) for k in range(2)]
    found = metric_intervals(folds, ordinal=True, resamples=300)
    again = metric_intervals(folds, ordinal=True, resamples=300)
    other = metric_intervals(folds, ordinal=True, resamples=300, seed=1)
    for name, interval in found.items():
        assert interval.low < interval.estimate < interval.high
        assert interval == again[name]
        assert interval.low != other[name].low
    assert list(metric_intervals(folds, ordinal=False, resamples=100))[-1] == "macro_f1"


def test_all_units_of_a_patient_are_drawn_together() -> None:
    fold = units(table(40, 2))
    doubled = ClassedUnits(
        np.tile(fold.label, 2), np.tile(fold.probabilities, (2, 1)), [*fold.patient, *fold.patient]
    )
    assert patients_by_class([doubled]) == patients_by_class([fold])
    single = metric_intervals([fold], ordinal=False, resamples=200)
    twice = metric_intervals([doubled], ordinal=False, resamples=200)
    for name in single:
        assert twice[name].low == pytest.approx(single[name].low)
        assert twice[name].high == pytest.approx(single[name].high)


def test_too_few_patients_of_a_class_give_no_interval() -> None:
    fold = units(table(12, 3))
    found = metric_intervals([fold], ordinal=True, resamples=100)
    assert all(one.low is None for one in found.values())
    assert "of the rarest class are fewer than 10" in found["auc"].note


def test_what_is_not_defined_is_none_and_said() -> None:
    fold = predictions().folds[0]
    of_one = dataclasses.replace(fold.test, label=np.where(fold.test.label >= 0, 1, -1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = evaluate_classes(
            predictions(folds=[dataclasses.replace(fold, test=of_one)]), resamples=100
        )
    assert report.auc is None
    assert report.quadratic_kappa is None
    assert report.balanced_accuracy is not None
    text = " ".join(report.notes)
    assert "No AUC: all tested patients of a fold are of one class" in text
    assert "No quadratic kappa" in text
    assert "No tested patient is of a, c" in text
    assert "| AUC | - |" in class_report_markdown(report)
    assert json.loads(json.dumps(report.as_dict(), allow_nan=False))["auc"] is None


def test_a_class_that_one_fold_lacks_is_scored_in_the_others() -> None:
    folds = [units(table(60, 3, seed=k)) for k in range(2)]
    without = folds[1].label != 2
    folds[1] = ClassedUnits(
        folds[1].label[without],
        folds[1].probabilities[without],
        list(np.array(folds[1].patient)[without]),
    )
    assert np.isnan(class_aucs(folds[1].label, folds[1].probabilities)).tolist() == [0, 0, 1]
    own = class_aucs(folds[0].label, folds[0].probabilities)[2]
    pairs = [(f.label == 2).sum() * (f.label != 2).sum() for f in folds]
    assert pairs[1] == 0
    found = pooled_metrics(folds, ordinal=False)["auc"]
    rest = [
        np.average(
            [class_aucs(f.label, f.probabilities)[k] for f in folds],
            weights=[(f.label == k).sum() * (f.label != k).sum() for f in folds],
        )
        for k in (0, 1)
    ]
    assert found == pytest.approx(np.mean([*rest, own]))


def test_a_report_says_what_it_rests_on(tmp_path: Path) -> None:
    report = evaluate_classes(predictions(), resamples=100)
    assert (report.n_patients, report.n_units, report.n_unknown) == (168, 168, 12)
    assert sum(report.patients.values()) == 168
    assert np.sum(report.confusion) == 168
    assert [fold.n_patients for fold in report.folds] == [56, 56, 56]
    assert "the variance from training" in " ".join(report.notes)
    write_class_report(report, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "report_grade.json",
        "report_grade.md",
    ]
    text = (tmp_path / "report_grade.md").read_text()
    assert "12 units of unknown class left out" in text
    assert "| quadratic kappa |" in text
    plain = evaluate_classes(predictions(ordinal=False), resamples=100)
    assert plain.quadratic_kappa is None
    assert "kappa" not in class_report_markdown(plain)
    assert class_table([report, plain]).count("\n") == 4


def test_repeated_splits_get_the_corrected_t() -> None:
    folds = predictions().folds
    again = [dataclasses.replace(fold, fold=f"again-{fold.fold}") for fold in folds]
    report = evaluate_classes(predictions(folds=[*folds, *again]), resamples=100)
    assert report.repeated
    assert report.n_patients == 168
    assert "corrected t" in report.auc.method
    assert report.auc.low < report.auc.estimate < report.auc.high
    assert any("counts a patient once for every split" in note for note in report.notes)


def test_predictions_come_back_with_the_same_bits(tmp_path: Path) -> None:
    before = predictions()
    before.save(tmp_path)
    assert class_tasks_in(tmp_path) == ["grade"]
    after = ClassPredictions.load(tmp_path, "grade")
    assert (after.classes, after.ordinal, after.leakage) == (before.classes, True, "")
    for old, new in zip(before.folds, after.folds):
        for part in ("test", "train"):
            mine, theirs = getattr(old, part), getattr(new, part)
            assert mine.unit_ids == theirs.unit_ids
            np.testing.assert_array_equal(mine.label, theirs.label)
            np.testing.assert_array_equal(mine.probabilities, theirs.probabilities)
    path = tmp_path / "predictions_grade.csv"
    path.write_text(path.read_text().replace(",train,", ",both,", 1))
    with pytest.raises(ValueError, match="line 2: not a row of predictions"):
        ClassPredictions.load(tmp_path, "grade")
    (tmp_path / "predictions_grade.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a predictions file"):
        ClassPredictions.load(tmp_path, "grade")


def test_wrong_tables_are_refused() -> None:
    good = table(4)
    for change, said in (
        ({"label": [0, 1, 2]}, "unit_ids holds 4 names and label has shape"),
        ({"label": [0, 1, 2, 3]}, "label holds 3; with 3 classes"),
        ({"probabilities": np.full((4, 3), 0.5)}, "every row must sum to 1"),
        ({"probabilities": np.full((4, 3), np.nan)}, "every row must sum to 1"),
        ({"probabilities": np.full((3, 3), 1 / 3)}, r"it must be \(4, classes\)"),
        ({"unit_ids": ["a", "a", "b", "c"]}, "unit_ids holds 'a' more than once"),
    ):
        with pytest.raises(ValueError, match=said):
            dataclasses.replace(good, **change)
    with pytest.raises(ValueError, match="the test table has 3 classes; it must have 2"):
        predictions(classes=("a", "b"))
    fold = predictions().folds[0]
    both = dataclasses.replace(fold, train=fold.test)
    with pytest.raises(ValueError, match="60 patients are in training and test"):
        predictions(folds=[both])
    assert predictions(folds=[both], leakage="all of it").leakage
    with pytest.raises(TypeError, match="it must be ClassPredictions"):
        evaluate_classes(fold)
    nobody = dataclasses.replace(fold.test, label=np.full(60, -1))
    with pytest.raises(ValueError, match="no tested unit has a known class"):
        evaluate_classes(predictions(folds=[dataclasses.replace(fold, test=nobody)]))
