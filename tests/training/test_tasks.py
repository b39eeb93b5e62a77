"""Several tasks at once: their configuration, sums, records, predictions and reports."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_cases import given_split, small_cohort, small_config

from survfuse.data.cohort import Cohort
from survfuse.data.targets import ClassTarget
from survfuse.evaluation.class_report import ClassReport
from survfuse.training import ConfigError, RunResult, fit, parse_config, predict, resume
from survfuse.training.config import TaskConfig, TrainConfig
from survfuse.training.model import build_model
from survfuse.training.run_folder import RunFolderError
from survfuse.training.task_losses import TaskLosses
from survfuse.training.tasks import with_targets

SURVIVAL = {"survival": {"kind": "survival"}}
CLASSES = {
    "grade": {"kind": "ordinal", "weight": 0.5},
    "dx": {"kind": "classes", "target": "kind", "class_weights": "inverse"},
}
PLAIN: dict[str, Any] = {"model": {"name": "mean_pool", "settings": {"dropout": 0.0}}}


def cohort(n: int = 60, **changes: Any) -> Cohort:
    """The second gene makes the grade, the third the kind; some grades are unknown."""
    whole = small_cohort(n, missing=True)
    genes = np.nan_to_num(whole.modalities["genes"].values)
    label = np.digitize(genes[:, 1], [-0.5, 0.5])
    label[::7] = -1
    kind = np.where(genes[:, 2] > 0, "b", "a")
    return dataclasses.replace(
        whole,
        targets={"grade": ClassTarget(label, ("G1", "G2", "G3"), True)},
        covariates=whole.covariates.assign(kind=kind),
        **changes,
    )


def run(config: TrainConfig, out: Path, whole: Cohort | None = None, **more: Any) -> RunResult:
    whole = cohort() if whole is None else whole
    return fit(config, out, cohort=whole, split=given_split(len(whole)), **more)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"tasks": {"d": {"kind": "clases"}}}, r"tasks\.d\.kind is 'clases'; it must be 'survival"),
        ({"tasks": {"d": {}}}, r"tasks\.d\.kind is not set"),
        ({"tasks": {"d": {"kind": "classes", "taget": "x"}}}, r"did you mean tasks\.d\.target\?"),
        ({"tasks": {"loss": {"kind": "classes"}}}, 'tasks holds the name "loss"'),
        ({"tasks": {"a b": {"kind": "classes"}}}, 'tasks holds the name "a b"'),
        ({"tasks": {"d": {"kind": "classes", "weight": 0}}}, r"tasks\.d\.weight is 0\.0"),
        ({"tasks": {"d": {"kind": "classes", "classes": ["a"]}}}, r"tasks\.d\.classes is \['a'\]"),
        ({"tasks": {"d": {"kind": "survival", "target": "x"}}}, r"tasks\.d\.target is 'x'"),
        (
            {"tasks": {"a": {"kind": "survival"}, "b": {"kind": "survival"}}},
            r"tasks holds 2 of kind survival \(a, b\)",
        ),
        (
            {"tasks": {"d": {"kind": "classes", "class_weights": "invers"}}},
            r'tasks\.d\.class_weights is "invers"',
        ),
        (
            {"tasks": {"d": {"kind": "classes", "class_weights": [0, -1]}}},
            r"tasks\.d\.class_weights is \[0\.0, -1\.0\]",
        ),
        (
            {"tasks": {"d": {"kind": "classes", "classes": ["a", "b"], "class_weights": [1]}}},
            r"tasks\.d\.class_weights holds 1 numbers",
        ),
        (
            {"training": {"metric": "dx"}},
            'training.metric is "dx"; it must be one of loss, c_index',
        ),
        (
            {"tasks": CLASSES, "training": {"metric": "c_index"}},
            'metric is "c_index"; it must be one of loss, grade, dx',
        ),
        (
            {"tasks": CLASSES, "model": {"name": "clinical_cox"}},
            'model.name is "clinical_cox", which knows survival only',
        ),
        (
            {"tasks": CLASSES, "evaluation": {"baselines": ["elastic_net_cox"]}},
            'holds "elastic_net_cox", which knows survival only, but tasks has none',
        ),
        (
            {"tasks": CLASSES, "evaluation": {"baselines": ["unimodal_by_patient"]}},
            'holds "unimodal_by_patient", which knows survival only, but tasks has none',
        ),
        (
            {"tasks": CLASSES, "evaluation": {"missing": ["half"]}},
            r"evaluation\.missing is set, which compares risks, but tasks has none",
        ),
    ],
)
def test_wrong_tasks_are_named(sections: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_config(sections)


def test_tasks_of_another_type_are_refused() -> None:
    with pytest.raises(TypeError, match=r"tasks\.d is 'classes'; it must be a TaskConfig"):
        TrainConfig(tasks={"d": "classes"})
    with pytest.raises(TypeError, match="tasks is 3; it must map names"):
        TrainConfig(tasks=3)
    assert TrainConfig().to_dict()["tasks"] == {}
    config = TrainConfig(tasks={"d": TaskConfig("classes", class_weights=(1.0, 2.0))})
    assert parse_config(config.to_dict()) == config


def test_targets_that_do_not_fit_are_named(tmp_path: Path) -> None:
    for task, said in (
        ({"kind": "classes", "target": "grad"}, r"tasks\.x\.target: .* did you mean 'grade'"),
        ({"kind": "classes", "target": "age"}, r"tasks\.x: age at row 0 \(P-000\) is .* whole num"),
        ({"kind": "ordinal", "target": "kind"}, r"tasks\.x: classes is None; the levels of kind"),
        (
            {"kind": "classes", "target": "kind", "classes": ["a", "c"]},
            r"kind at row \d+ \(P-\d+\) is 'b'; it must be one of 'a', 'c'",
        ),
        (
            {"kind": "classes", "target": "kind", "class_weights": [1, 2, 3]},
            r"class_weights holds 3 numbers; it must hold one for each of the classes a, b",
        ),
        (
            {"kind": "ordinal", "target": "plain"},
            r"tasks\.x: classes is empty, and the target's classes have no order",
        ),
    ):
        whole = cohort()
        plain = ClassTarget(np.arange(60) % 2, ("u", "v"))
        whole = dataclasses.replace(whole, targets={**whole.targets, "plain": plain})
        with pytest.raises(ConfigError, match=said):
            run(small_config(tasks={"x": task}), tmp_path / "run", whole)
    unknown = ClassTarget(np.full(60, -1), ("u", "v"))
    late = ClassTarget(np.where(np.arange(60) < 50, np.arange(60) % 2, -1), ("u", "v"))
    for target, said in (
        (unknown, "training rows of split 0 are of no known class"),
        (late, "the class of every test row is unknown"),
    ):
        whole = dataclasses.replace(cohort(), targets={"x": target})
        with pytest.raises(ConfigError, match=said):
            run(small_config(tasks={"x": {"kind": "classes"}}), tmp_path / "run", whole)
    assert not (tmp_path / "run").exists()


def test_a_model_has_the_logits_that_its_tasks_need() -> None:
    for loss, bins in (("nll", 3), ("cox", 1)):
        config = small_config(**PLAIN, tasks={**SURVIVAL, **CLASSES}, loss={"name": loss})
        prepared = with_targets(config, cohort()).prepare(None, n_bins=3)
        model = build_model(config, prepared)
        logits = model(prepared.batch([0, 1]).inputs).logits
        shapes = {name: tuple(values.shape) for name, values in logits.items()}
        assert shapes == {"survival": (2, bins), "grade": (2, 2), "dx": (2, 2)}


def test_the_losses_of_a_batch_add_up_with_their_weights() -> None:
    config = small_config(
        **PLAIN, tasks={**SURVIVAL, **CLASSES}, loss={"survival_divisor": 4.0, "alpha": 0.3}
    )
    prepared = with_targets(config, cohort()).prepare(None, n_bins=3)
    losses = TaskLosses(config, prepared, np.arange(40))
    batch = prepared.batch(np.arange(14))
    logits = {"survival": torch.randn(14, 3), "grade": torch.randn(14, 2), "dx": torch.randn(14, 2)}
    found = losses.of_batch(logits, batch)
    assert losses.rows_of(np.arange(14)) == {"survival": 14, "grade": 12, "dx": 14}
    total = found["survival"] / 4 + 0.5 * found["grade"] + found["dx"]
    torch.testing.assert_close(losses.total(found), total)
    means = {name: float(value) for name, value in found.items()}
    assert losses.recorded(means) == pytest.approx(float(total))
    # of a single task the loss itself, as ever
    assert losses.recorded({"survival": 2.0}) == 2.0
    assert losses.recorded({**means, "grade": float("nan")}) == pytest.approx(
        means["survival"] / 4 + means["dx"]
    )


def test_three_tasks_leave_everything_behind(tmp_path: Path) -> None:
    config = small_config(
        tasks={**SURVIVAL, **CLASSES},
        evaluation={"baselines": ["mean_pool", "clinical_cox", "only:genes"]},
    )
    whole = cohort()
    result = run(config, tmp_path / "run", whole)
    folder = tmp_path / "run"
    for name in ("predictions.csv", "predictions_dx.csv", "report_dx.md", "report_grade.json"):
        assert (folder / name).is_file(), name
    assert list(result.class_reports) == ["grade", "dx"]
    assert result.report.concordance.estimate >= 0
    assert {pair.model_b for pair in result.comparison.pairs} == set(config.evaluation.baselines)
    # the same tasks, but for regression, which knows survival only
    assert list(result.baselines["mean_pool"].class_reports) == ["grade", "dx"]
    assert list(result.baselines["only:genes"].class_reports) == ["grade", "dx"]
    assert result.baselines["clinical_cox"].class_reports == {}
    record = result.metrics[-1]
    parts = {part: record[f"validation_{part}_loss"] for part in ("survival", "grade", "dx")}
    assert record["validation_loss"] == pytest.approx(
        parts["survival"] + 0.5 * parts["grade"] + parts["dx"]
    )
    for name in ("train_grade_loss", "validation_c_index", "validation_dx_auc"):
        assert record[name] >= 0
    assert -1 <= record["validation_grade_kappa"] <= 1
    with (folder / "predictions_grade.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    expected = dict(zip(whole.unit_ids, whole.targets["grade"].labels))
    assert {row["part"] for row in rows} == {"train", "test"}
    assert all(int(row["label"]) == expected[row["unit_id"]] for row in rows)
    assert list(rows[0]) == [
        *("fold", "part", "unit_id", "patient_id", "label"),
        *("prob_0", "prob_1", "prob_2"),
    ]
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["cohort"]["targets"]["grade"]["unknown"] == 9
    # a cohort whose classes nobody knows is scored all the same, with the same probabilities
    frame = predict(folder, dataclasses.replace(whole, targets={}), device="cpu")
    by_unit = frame.set_index("unit_id")
    for row in rows[:5]:
        assert by_unit.loc[row["unit_id"], "grade_G2"] == pytest.approx(float(row["prob_1"]))
    assert {"risk", "logit_0", "dx_a", "dx_b"} <= set(frame.columns)


def test_classes_are_learned_without_survival_and_without_an_event(tmp_path: Path) -> None:
    whole = cohort(300, event=np.zeros(300, dtype=bool))
    config = small_config(
        **PLAIN,
        data={"modalities": ["genes"]},
        tasks=CLASSES,
        protocol={"validation": "inner", "min_inner_events": 5, "split": "given"},
        training={"epochs": 15, "metric": "grade", "batch_size": 25},
        optimizer={"lr": 0.02},
    )
    split = given_split(300)
    split = split._replace(train=np.arange(250), validation=split.validation[:0])
    result = fit(config, tmp_path / "run", cohort=whole, split=split)
    assert result.predictions is None
    assert result.comparison is None
    assert isinstance(result.report, ClassReport)
    assert result.report == result.class_reports["grade"]
    assert result.class_reports["grade"].quadratic_kappa.estimate > 0.4
    assert result.class_reports["dx"].auc.estimate > 0.75
    folder = tmp_path / "run"
    assert not (folder / "predictions.csv").exists()
    assert (folder / "report.md").read_bytes() == (folder / "report_grade.md").read_bytes()
    assert "train_c_index" not in result.metrics[0]
    watched = [record["validation_grade_kappa"] for record in result.metrics]
    done = json.loads((folder / "folds/seed1-fold0/done.json").read_text())
    assert done["best_epoch"] == 1 + int(np.argmax(watched))
    assert done["validation_rows"] > 0
    frame = predict(folder, whole.subset([1, 2]), device="cpu")
    assert "risk" not in frame.columns
    assert frame[["dx_a", "dx_b"]].sum(axis=1).tolist() == pytest.approx([1, 1])


@pytest.mark.parametrize("loss", ["nll", "cox"])
def test_a_batch_in_which_all_are_censored_and_no_class_is_known_trains(
    tmp_path: Path, loss: str
) -> None:
    whole, split = cohort(), given_split()
    event, label = whole.event.copy(), whole.targets["grade"].labels.copy()
    # one event and three labels: most batches of two have neither
    event[split.train] = False
    event[0] = True
    label[split.train] = -1
    label[:3] = [0, 1, 2]
    whole = dataclasses.replace(
        whole, event=event, targets={"grade": ClassTarget(label, ("G1", "G2", "G3"), True)}
    )
    config = small_config(
        **PLAIN,
        tasks={**SURVIVAL, **CLASSES},
        loss={"name": loss},
        protocol={"validation": "split", "n_bins": 2, "bins": "all"},
        training={"batch_size": 2, "epochs": 1},
    )
    result = run(config, tmp_path / "run", whole)
    values = [v for k, v in result.metrics[0].items() if k.endswith("_loss")]
    assert np.isfinite(values).all()
    weights = torch.load(tmp_path / "run/folds/seed1-fold0/weights.pt", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_one_task_of_survival_is_the_run_without_tasks(tmp_path: Path) -> None:
    plain = run(small_config(), tmp_path / "a")
    named = run(small_config(tasks=SURVIVAL), tmp_path / "b")
    assert plain.metrics == named.metrics
    files = [tmp_path / name / "predictions.csv" for name in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_resumed_run_of_several_tasks_is_bit_identical(tmp_path: Path) -> None:
    config = small_config(
        tasks={**SURVIVAL, **CLASSES},
        training={"batch_size": 4, "checkpoint_steps": 2, "epochs": 3, "metric": "dx"},
    )
    whole = run(config, tmp_path / "whole")

    def interrupt(event: dict) -> None:
        if event["kind"] == "epoch" and event["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "cut", progress=interrupt)
    resumed = resume(tmp_path / "cut", cohort=cohort(), split=given_split())
    assert resumed.metrics == whole.metrics
    for name in ("metrics.jsonl", "predictions_dx.csv", "report_grade.json", "report.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    other = cohort()
    labels = other.targets["grade"].labels.copy()
    labels[1] = (labels[1] + 1) % 3
    other = dataclasses.replace(
        other, targets={"grade": ClassTarget(labels, ("G1", "G2", "G3"), True)}
    )
    with pytest.raises(RunFolderError, match=r"the data of the run in .* changed"):
        resume(tmp_path / "cut", cohort=other, split=given_split())


def test_evaluate_prints_and_writes_class_tasks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from survfuse.cli import main

    def call(*arguments: object) -> str:
        with pytest.raises(SystemExit) as caught:
            main(["evaluate", *map(str, arguments), "--resamples", "100"])
        assert caught.value.code == 0
        return capsys.readouterr().out

    config = small_config(**PLAIN, tasks={**SURVIVAL, **CLASSES}, training={"epochs": 1})
    run(config, tmp_path / "a")
    run(small_config(**PLAIN, tasks=CLASSES, training={"epochs": 1}), tmp_path / "b")
    out = tmp_path / "out"
    shown = call(tmp_path / "a", "--out", out)
    assert "Harrell's C" in shown
    assert "| quadratic kappa |" in shown
    names = {path.name for path in out.iterdir()}
    assert {"report.json", "report_dx.md", "report_grade.json"} <= names
    found = json.loads(call(tmp_path / "a", tmp_path / "b", "--json"))
    assert len(found["reports"]) == 1
    assert {task: len(both) for task, both in found["class_reports"].items()} == {
        "dx": 2,
        "grade": 2,
    }
    assert "Harrell" not in call(tmp_path / "b")
