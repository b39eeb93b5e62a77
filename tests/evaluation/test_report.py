"""Predictions on disk, reports, comparisons and their files."""

from __future__ import annotations

import csv
import dataclasses
import json

import numpy as np
import pytest

from survfuse.evaluation import (
    FoldPredictions,
    PatientTable,
    Predictions,
    compare,
    concordance_index,
    evaluate,
)
from survfuse.evaluation.censoring import evaluation_times, truncation_time
from survfuse.evaluation.intervals import TRAINING_VARIANCE_NOTE, corrected_t, pooled_concordance
from survfuse.evaluation.metrics import (
    cumulative_dynamic_auc,
    integrated_brier_score,
    uno_concordance,
)
from survfuse.evaluation.protocols import LEAKAGE, leakage_note
from survfuse.evaluation.report import REPEATED_NOTE, bootstrap_fold, risk_groups
from survfuse.evaluation.report_files import (
    COMPARISON_COLUMNS,
    REPORT_COLUMNS,
    write_comparison,
    write_concordance_figure,
    write_kaplan_meier,
    write_report,
)

N = 150
EDGES = [0.0, 5.0, 12.0, 25.0, np.inf]


def outcomes(n=N):
    rng = np.random.default_rng(0)
    truth = rng.normal(size=n)
    time = rng.exponential(np.exp(-truth)) * 20
    censoring = rng.exponential(40, n)
    names = [f"TCGA-{k:04d}" for k in range(n)]
    return truth, np.minimum(time, censoring), time <= censoring, np.array(names)


def make_run(
    model="model", head="nll", *, noise=0.5, seed=1, protocol="honest", repeated=False, train=True
):
    truth, time, event, names = outcomes()
    rng = np.random.default_rng(seed)
    folds = []
    for k in range(5):
        if repeated:
            tested = np.random.default_rng(100 + k).permutation(N) < 30
        else:
            tested = np.arange(N) % 5 == k
        risk = truth + noise * rng.normal(size=N)
        logits = np.stack([risk - 2, risk - 1, risk, risk], axis=1)

        def table(rows, risk, logits=None):
            own = None if logits is None else logits[rows]
            return PatientTable(
                names[rows], names[rows], time[rows], event[rows],
                None if risk is None else risk[rows], own,
            )  # fmt: skip

        folds.append(
            FoldPredictions(
                str(k),
                table(tested, risk, logits if head == "nll" else None),
                table(~tested, risk if train else None),
                EDGES if head == "nll" else None,
            )
        )
    return Predictions(model, head, protocol, folds)


@pytest.fixture(scope="module")
def run():
    return make_run()


@pytest.fixture(scope="module")
def report(run):
    return evaluate(run, resamples=300)


def test_report_holds_each_metric_of_each_fold(run, report):
    for fold, own in zip(run.folds, report.folds, strict=True):
        test, train = fold.test, fold.train
        outcome = {
            "time": test.time, "event": test.event,
            "train_time": train.time, "train_event": train.event,
        }  # fmt: skip
        expected = concordance_index(test.risk, time=test.time, event=test.event)
        assert own.concordance.estimate == pytest.approx(expected, abs=1e-14)
        tau = truncation_time(**outcome)
        assert (own.tau, own.events_before_tau) == tau[:2]
        assert own.uno == uno_concordance(test.risk, tau=tau.tau, **outcome).index
        grid = evaluation_times(time=test.time, event=test.event, tau=tau.tau)
        auc = cumulative_dynamic_auc(test.risk, times=grid, **outcome)
        assert own.mean_auc == auc.mean
        survival = run.curves(fold).at(grid)
        assert own.integrated_brier == integrated_brier_score(survival, times=grid, **outcome)
        assert (own.n_patients, own.n_train) == (30, 120)
        assert own.n_events == test.event.sum()
        assert own.logrank is not None


def test_report_pools_folds(run, report):
    folds = [bootstrap_fold(fold) for fold in run.folds]
    assert report.concordance.estimate == pooled_concordance(folds)
    assert report.concordance.low < report.concordance.estimate < report.concordance.high
    assert report.mean_of_folds == pytest.approx(
        np.mean([fold.concordance.estimate for fold in report.folds])
    )
    assert report.integrated_brier == pytest.approx(
        np.mean([fold.integrated_brier for fold in report.folds])
    )
    weights = [fold.events_before_tau for fold in report.folds]
    assert report.mean_auc == pytest.approx(
        np.average([fold.mean_auc for fold in report.folds], weights=weights)
    )
    assert 0.05 < report.integrated_brier < 0.25
    assert abs(report.uno.estimate - report.concordance.estimate) < 0.05
    assert (report.n_patients, report.repeated) == (N, False)
    assert report.notes == (TRAINING_VARIANCE_NOTE,)


def test_a_cox_head_uses_the_training_baseline():
    run = make_run(head="cox")
    report = evaluate(run, resamples=100)
    assert 0.05 < report.integrated_brier < 0.25
    bare = evaluate(make_run(head="cox", train=False), resamples=100)
    assert bare.integrated_brier is None
    assert any("a Cox model's baseline needs the training risks" in note for note in bare.notes)
    assert bare.logrank is None
    assert any("no training risks were given" in note for note in bare.notes)


def test_a_bare_risk_has_no_brier_score():
    report = evaluate(make_run(head="risk"), resamples=100)
    assert report.integrated_brier is None
    assert any("gives a risk but no survival curve" in note for note in report.notes)
    assert report.mean_auc is not None


def test_risk_groups_are_cut_at_the_training_median(run):
    groups = risk_groups(run)
    low, high = groups["low risk"], groups["high risk"]
    assert low[0].size + high[0].size == N
    expected = sum(int((fold.test.risk > np.median(fold.train.risk)).sum()) for fold in run.folds)
    assert high[0].size == expected
    assert high[1].mean() > low[1].mean()


def test_repeated_splits_get_the_corrected_t():
    run = make_run(repeated=True)
    report = evaluate(run, resamples=100)
    values = [fold.concordance.estimate for fold in report.folds]
    expected = corrected_t(values, n_train=120, n_test=30)
    assert report.repeated
    assert report.concordance[:3] == (expected.mean, expected.low, expected.high)
    assert REPEATED_NOTE in report.notes
    assert "Nadeau-Bengio" in report.concordance.method
    assert report.logrank is None
    assert any("count them twice" in note for note in report.notes)


def test_a_fold_too_small_says_so_and_the_others_count():
    run = make_run()
    first = run.folds[0]
    silent = dataclasses.replace(first.test, event=np.zeros(30, bool))
    run = dataclasses.replace(run, folds=(dataclasses.replace(first, test=silent), *run.folds[1:]))
    report = evaluate(run, resamples=100)
    assert report.folds[0].concordance is None
    assert report.folds[0].uno is None
    assert any(note.startswith("fold 0: no C: ") for note in report.notes)
    assert report.concordance.low is not None
    few = dataclasses.replace(first.test, event=first.test.event & (np.arange(30) < 8))
    run = dataclasses.replace(run, folds=(dataclasses.replace(first, test=few),))
    alone = evaluate(run, resamples=100)
    assert alone.concordance.low is None
    assert "fewer than 10" in alone.notes[0]
    none = dataclasses.replace(run, folds=(dataclasses.replace(first, test=silent),))
    with pytest.raises(ValueError, match="model: no fold can be scored"):
        evaluate(none)


@pytest.mark.parametrize("protocol", ["healnet", "mcat", "survpath"])
def test_a_leaking_protocol_says_so_in_every_file(tmp_path, protocol):
    report = evaluate(make_run(protocol=protocol), resamples=100)
    write_report(report, tmp_path)
    assert LEAKAGE[protocol] in (tmp_path / "report.md").read_text()
    assert json.loads((tmp_path / "report.json").read_text())["leakage"] == LEAKAGE[protocol]
    with (tmp_path / "report.csv").open(newline="") as stream:
        assert {row["leaks"] for row in csv.DictReader(stream)} == {"yes"}


def test_an_honest_report_has_no_leakage_banner(tmp_path, report):
    write_report(report, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "leaks" not in text
    assert TRAINING_VARIANCE_NOTE in text
    with (tmp_path / "report.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert tuple(rows[0]) == REPORT_COLUMNS
    pooled = next(row for row in rows if row["fold"] == "all" and row["metric"] == "harrell_c")
    assert float(pooled["value"]) == report.concordance.estimate
    assert float(pooled["low"]) == report.concordance.low
    assert {row["fold"] for row in rows} == {"all", "0", "1", "2", "3", "4"}
    values = json.loads((tmp_path / "report.json").read_text())
    assert values == report.as_dict()
    assert values["folds"][2]["uno"] == report.folds[2].uno


def test_straddling_patients_contradict_honesty(run):
    fold = run.folds[0]
    mixed = dataclasses.replace(fold, train=dataclasses.replace(fold.test, logits=None))
    with pytest.raises(ValueError, match=r"fold 0: 30 patients are in training and test \(first"):
        Predictions("model", "nll", "honest", [mixed])
    leaky = Predictions("model", "nll", "healnet", [mixed])
    report = evaluate(leaky, resamples=100)
    assert "30 patients are in training and test of the same split." in report.notes


def test_slides_of_a_patient_are_one_patient():
    _, time, event, names = outcomes(60)
    twice = np.repeat(np.arange(60), 2)
    rng = np.random.default_rng(0)
    units = [f"{names[k]}-{s}" for k, s in zip(twice, [0, 1] * 60)]
    test = PatientTable(units, names[twice], time[twice], event[twice], rng.normal(size=120))
    train = PatientTable(["a", "b"], ["a", "b"], [50.0, 200.0], [1, 0], [0.0, 0.1])
    run = Predictions("model", "risk", "honest", [FoldPredictions("0", test, train)])
    report = evaluate(run, resamples=100)
    assert (report.n_units, report.n_patients) == (120, 60)
    assert report.n_events == event.sum()
    assert any("several of which may be one patient's" in note for note in report.notes)
    assert sum(time.size for time, _ in risk_groups(run).values()) == 60
    _, _, mean = test.per_patient()
    assert mean[0] == pytest.approx(test.risk[:2].mean())


@pytest.mark.parametrize("head", ["nll", "cox", "risk"])
def test_predictions_come_back_bit_for_bit(tmp_path, head):
    run = make_run(head=head, train=head != "risk")
    run.save(tmp_path)
    back = Predictions.load(tmp_path)
    assert (back.model, back.head, back.protocol) == (run.model, run.head, run.protocol)
    for ours, theirs in zip(run.folds, back.folds, strict=True):
        np.testing.assert_array_equal(ours.test.risk, theirs.test.risk)
        np.testing.assert_array_equal(ours.test.time, theirs.test.time)
        assert ours.test.unit_ids == theirs.test.unit_ids
        assert (ours.train.risk is None) == (theirs.train.risk is None)
    assert evaluate(back, resamples=100).as_dict() == evaluate(run, resamples=100).as_dict()


def test_broken_files_are_named(tmp_path, run):
    run.save(tmp_path)
    table, about = tmp_path / "predictions.csv", tmp_path / "predictions.json"
    text = table.read_text()
    table.write_text(text + "0,test,unit\n")
    with pytest.raises(ValueError, match=r"predictions\.csv, line 752: not a row of predictions"):
        Predictions.load(tmp_path)
    table.write_text("a,b\n")
    with pytest.raises(ValueError, match=r"does not start with the columns fold, part"):
        Predictions.load(tmp_path)
    lines = text.splitlines()
    broken = lines[1].split(",")
    broken[4] = "nan"
    table.write_text("\n".join([lines[0], ",".join(broken), *lines[2:]]))
    with pytest.raises(ValueError, match=r"fold 0, train rows: time must be finite; row 0 is nan"):
        Predictions.load(tmp_path)
    table.write_text("\n".join(line for line in lines if not line.startswith("3,train")))
    with pytest.raises(ValueError, match="fold 3 has no train"):
        Predictions.load(tmp_path)
    about.write_text(about.read_text().replace('"format": 1', '"format": 9'))
    with pytest.raises(ValueError, match="has format 9; this version reads format 1"):
        Predictions.load(tmp_path)
    about.write_text("{")
    with pytest.raises(ValueError, match="is not a predictions file"):
        Predictions.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        Predictions.load(tmp_path / "nowhere")


def test_table_errors_are_named():
    good = {"unit_ids": ["a", "b"], "patient_ids": ["p", "q"], "time": [1, 2], "event": [1, 0]}
    for change, message in [
        ({"time": [1, np.nan]}, "time must be finite; row 1 is nan"),
        ({"time": [1, -1]}, r"time must not be negative; row 1 is -1\.0"),
        ({"unit_ids": ["a"]}, "unit_ids holds 1 names; it must hold 2"),
        ({"unit_ids": ["a", "a"]}, "unit_ids holds 'a' more than once"),
        ({"patient_ids": ["p", "p"]}, "patient 'p' has rows with different time or event"),
        ({"risk": [1.0, np.inf]}, "risk must be finite; row 1 is inf"),
        ({"logits": np.zeros((3, 2))}, r"logits has shape \(3, 2\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            PatientTable(**{**good, **change})
    with pytest.raises(ValueError, match="this table holds no risk"):
        PatientTable(**good).per_patient()


def test_prediction_errors_are_named(run):
    fold = run.folds[0]
    with pytest.raises(ValueError, match="fold 0: the test table holds no risk"):
        dataclasses.replace(fold, test=dataclasses.replace(fold.test, risk=None))
    with pytest.raises(ValueError, match="fold 0: give both test logits and edges, or neither"):
        dataclasses.replace(fold, edges=None)
    with pytest.raises(ValueError, match="4 bins have 5 edges"):
        dataclasses.replace(fold, edges=[0.0, 1.0])
    with pytest.raises(ValueError, match="head is 'mse'; it must be 'nll', 'cox' or 'risk'"):
        dataclasses.replace(run, head="mse")
    with pytest.raises(ValueError, match="folds is empty"):
        dataclasses.replace(run, folds=[])
    with pytest.raises(ValueError, match="folds holds a name twice: 0, 0"):
        dataclasses.replace(run, folds=[fold, fold])
    bare = dataclasses.replace(fold, test=dataclasses.replace(fold.test, logits=None), edges=None)
    with pytest.raises(ValueError, match="fold 0: an NLL head needs test logits and edges"):
        dataclasses.replace(run, folds=[bare])
    with pytest.raises(ValueError, match="did you mean 'honest'"):
        leakage_note("honst")
    with pytest.raises(ValueError, match="protocol 'mine' is not known; known are honest"):
        Predictions("model", "nll", "mine", run.folds)
    assert Predictions("model", "nll", "mine", run.folds, leakage="").leakage == ""
    with pytest.raises(ValueError, match="resamples is 5"):
        evaluate(run, resamples=5)
    with pytest.raises(TypeError, match="predictions is 'runs/x'; it must be Predictions"):
        evaluate("runs/x")


def test_comparison_is_paired_and_holm_adjusted(tmp_path):
    runs = [make_run("good"), make_run("same"), make_run("worse", noise=6.0, head="risk")]
    comparison = compare(runs, resamples=500)
    assert [(pair.model_a, pair.model_b) for pair in comparison.pairs] == [
        ("good", "same"), ("good", "worse"), ("same", "worse")
    ]  # fmt: skip
    equal, better, _ = comparison.pairs
    assert (equal.difference.estimate, equal.difference.pvalue) == (0.0, 1.0)
    assert better.difference.low > 0
    assert better.adjusted_pvalue == pytest.approx(3 * better.difference.pvalue)
    write_comparison(comparison, tmp_path)
    with (tmp_path / "comparison.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert tuple(rows[0]) == COMPARISON_COLUMNS
    assert float(rows[1]["difference"]) == better.difference.estimate
    assert json.loads((tmp_path / "comparison.json").read_text()) == comparison.as_dict()
    assert TRAINING_VARIANCE_NOTE in (tmp_path / "comparison.md").read_text()
    first = compare(runs, against_first=True, resamples=500)
    assert len(first.pairs) == 2
    assert first.pairs[1].adjusted_pvalue < better.adjusted_pvalue


def test_a_comparison_of_few_events_says_so():
    run = make_run("a")
    assert not any("too few" in note for note in compare([run, make_run("b")], resamples=100).notes)
    few = []
    for name in ("a", "b"):
        folds = []
        for fold in run.folds:
            event = fold.test.event & (fold.test.time.argsort().argsort() < 2)
            folds.append(
                dataclasses.replace(fold, test=dataclasses.replace(fold.test, event=event))
            )
        few.append(dataclasses.replace(run, model=name, folds=folds))
    events = sum(int(fold.test.event.sum()) for fold in few[0].folds)
    assert 0 < events < 10
    notes = compare(few, resamples=100).notes
    assert any(note.startswith(f"{events} patients with an event are fewer") for note in notes)


def test_comparison_matches_units_by_name():
    run = make_run("first")
    folds = []
    for fold in reversed(run.folds):
        order = np.random.default_rng(0).permutation(len(fold.test))
        table = PatientTable(
            np.array(fold.test.unit_ids)[order], np.array(fold.test.patient_ids)[order],
            fold.test.time[order], fold.test.event[order], fold.test.risk[order],
        )  # fmt: skip
        folds.append(FoldPredictions(fold.fold, table, fold.train))
    shuffled = Predictions("shuffled", "risk", "mcat", folds)
    comparison = compare([run, shuffled], resamples=100)
    assert comparison.pairs[0].difference[:3] == (0.0, 0.0, 0.0)
    assert any(note.startswith("LEAKAGE (shuffled, mcat): ") for note in comparison.notes)


def test_repeated_splits_are_compared_by_the_corrected_t():
    runs = [make_run("a", repeated=True), make_run("b", repeated=True, noise=3.0, seed=2)]
    comparison = compare(runs)
    values = [
        concordance_index(x.test.risk, time=x.test.time, event=x.test.event)
        - concordance_index(y.test.risk, time=y.test.time, event=y.test.event)
        for x, y in zip(runs[0].folds, runs[1].folds)
    ]
    expected = corrected_t(values, n_train=120, n_test=30)
    assert comparison.pairs[0].difference[:3] == (expected.mean, expected.low, expected.high)
    assert REPEATED_NOTE in comparison.notes


def test_comparison_errors_are_named():
    run = make_run("a")
    with pytest.raises(ValueError, match=r"runs holds 1 model\(s\)"):
        compare([run])
    with pytest.raises(ValueError, match="two runs are named 'a'"):
        compare([run, run])
    other = make_run("b")
    with pytest.raises(ValueError, match="a paired comparison needs the same folds"):
        compare([run, dataclasses.replace(other, folds=other.folds[:3])])
    swapped = [
        dataclasses.replace(other.folds[1], fold="0"),
        dataclasses.replace(other.folds[0], fold="1"),
        *other.folds[2:],
    ]
    with pytest.raises(ValueError, match="fold 0: a and b were tested on different units: 60"):
        compare([run, dataclasses.replace(other, folds=swapped)])
    fold = other.folds[0]
    later = dataclasses.replace(fold, test=dataclasses.replace(fold.test, time=fold.test.time + 1))
    with pytest.raises(ValueError, match="fold 0: a and b differ in patient, time or event of"):
        compare([run, dataclasses.replace(other, folds=[later, *other.folds[1:]])])


def test_figures_are_written(tmp_path, run, report):
    paths = write_kaplan_meier(run, tmp_path) + write_concordance_figure([report], tmp_path)
    assert [path.name for path in paths] == [
        "kaplan_meier.png", "kaplan_meier.pdf", "concordance.png", "concordance.pdf"
    ]  # fmt: skip
    heads = [path.read_bytes()[:4] for path in paths]
    assert heads == [b"\x89PNG", b"%PDF", b"\x89PNG", b"%PDF"]
    with pytest.raises(ValueError, match="pooled risk groups would count them twice"):
        write_kaplan_meier(make_run(repeated=True), tmp_path)
