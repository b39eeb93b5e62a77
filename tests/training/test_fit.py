"""Whole runs on a small cohort, and the arithmetic of the loop."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_cases import given_split, small_cohort, small_config

from survfuse.data.cohort import Cohort
from survfuse.data.modalities import TableModality
from survfuse.evaluation.predictions import Predictions
from survfuse.training import ConfigError, RunResult, fit, predict, resume
from survfuse.training.config import TrainConfig
from survfuse.training.loop import TrainingError
from survfuse.training.run_folder import RunFolderError, read_metrics


def run(config: TrainConfig, out: Path, cohort: Cohort | None = None, **more: Any) -> RunResult:
    return fit(config, out, cohort=cohort or small_cohort(), split=given_split(), **more)


def weights(folder: Path, fold: str = "seed1-fold0") -> dict[str, torch.Tensor]:
    return torch.load(folder / "folds" / fold / "weights.pt", weights_only=True)


def test_a_run_leaves_everything_behind(tmp_path: Path) -> None:
    config = small_config(
        evaluation={"baselines": ["clinical_cox", "mean_pool", "only:genes"], "figures": True},
        training={"seeds": [1]},
    )
    events: list[dict[str, Any]] = []
    result = run(config, tmp_path / "run", progress=events.append)
    folder = tmp_path / "run"
    for name in (
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "metrics.csv",
        "predictions.csv",
        "predictions.json",
        "report.md",
        "report.json",
        "comparison.md",
        "figures/concordance.png",
        "folds/seed1-fold0/weights.pt",
        "folds/seed1-fold0/preprocessing.json",
        "baselines/mean_pool/report.md",
        "baselines/only-genes/folds/seed1-fold0/weights.pt",
        "baselines/clinical_cox/predictions.csv",
    ):
        assert (folder / name).is_file(), name
    # a finished fold needs no optimiser state any more
    assert not (folder / "folds/seed1-fold0/checkpoint.pt").exists()
    assert not list(folder.rglob("*.partial"))
    records = read_metrics(folder / "metrics.jsonl")
    assert [record["epoch"] for record in records] == [1, 2, 3]
    assert (folder / "metrics.csv").read_text().count("\n") == 4
    assert [e["kind"] for e in events[:4]] == ["fold", "epoch", "epoch", "epoch"]
    assert sum(e["kind"] == "baseline" for e in events) == 3
    assert {pair.model_b for pair in result.comparison.pairs} == set(config.evaluation.baselines)
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert environment["cohort"]["patients"] == 60
    # the baselines were tested on the same patients
    tested = set(result.predictions.folds[0].test.unit_ids)
    for baseline in result.baselines.values():
        assert set(baseline.predictions.folds[0].test.unit_ids) == tested


def test_a_model_learns_what_is_there(tmp_path: Path) -> None:
    config = small_config(
        data={"modalities": ["genes"]},
        model={"name": "mean_pool", "settings": {"dropout": 0.0}},
        training={"epochs": 30},
    )
    cohort = small_cohort(300)
    result = fit(config, tmp_path / "run", cohort=cohort, split=given_split(300))
    assert result.report.concordance.estimate > 0.65
    assert result.metrics[-1]["train_loss"] < result.metrics[0]["train_loss"]


def test_the_same_seed_is_the_same_run_and_another_is_not(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(small_config(training={"seeds": [seed]}), tmp_path / name)
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    c = weights(tmp_path / "c", "seed2-fold0")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)
    metrics = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in "ab"]
    assert metrics[0] == metrics[1]


DETERMINED = {"name": "mean_pool", "settings": {"dropout": 0.0}}


def test_accumulated_batches_step_like_one_large_batch(tmp_path: Path) -> None:
    # 40 training rows in batches of 6 leave windows of 18, 18 and 4 rows: the last one steps too
    for name, size, accumulate in (("many", 6, 3), ("one", 18, 1)):
        config = small_config(
            model=DETERMINED,
            loss={"l1": 1e-3, "survival_divisor": 2.0},
            training={"batch_size": size, "accumulate": accumulate},
        )
        run(config, tmp_path / name)
    many, one = weights(tmp_path / "many"), weights(tmp_path / "one")
    for name in one:
        torch.testing.assert_close(many[name], one[name], rtol=1e-5, atol=1e-6)
    records = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("many", "one")]
    assert [record["step"] for record in records[0]] == [3, 6, 9]
    for a, b in zip(*records):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5)
        assert a["train_c_index"] == pytest.approx(b["train_c_index"], abs=1e-9)


def test_best_weights_are_the_best_epochs_and_last_are_the_last(tmp_path: Path) -> None:
    # so large a rate that the watched loss rises at once
    common = {"model": DETERMINED, "optimizer": {"lr": 0.3}}
    one = run(small_config(**common, training={"epochs": 1}), tmp_path / "one")
    assert one.metrics[0]["epoch"] == 1
    for choice in ("best", "last"):
        config = small_config(
            **common,
            protocol={"weights": choice, "validation": "split"},
            training={"epochs": 9, "patience": 2},
        )
        result = run(config, tmp_path / choice)
        losses = [record["validation_loss"] for record in result.metrics]
        done = json.loads((tmp_path / choice / "folds/seed1-fold0/done.json").read_text())
        assert done["evaluated"] == choice
        assert done["best_epoch"] == 1 + int(np.argmin(losses))
        assert len(losses) == min(9, done["best_epoch"] + 2)
    best, last, first = (weights(tmp_path / name) for name in ("best", "last", "one"))
    assert any(not torch.equal(best[name], last[name]) for name in best)
    if done["best_epoch"] == 1:
        assert all(torch.equal(best[name], first[name]) for name in best)


@pytest.mark.parametrize(("metric", "choose"), [("loss", np.argmin), ("c_index", np.argmax)])
def test_the_best_restart_is_kept(tmp_path: Path, metric: str, choose) -> None:
    common = {"model": DETERMINED, "protocol": {"validation": "split", "weights": "last"}}
    training = {"epochs": 3, "patience": None, "metric": metric}
    several = run(
        small_config(**common, training={**training, "restarts": 3}), tmp_path / "several"
    )
    last = [record for record in several.metrics if record["epoch"] == 3]
    assert [record["restart"] for record in last] == [0, 1, 2]
    found = [record[f"validation_{metric}"] for record in last]
    assert len(set(found)) > 1
    done = json.loads((tmp_path / "several/folds/seed1-fold0/done.json").read_text())
    assert done["validations"] == pytest.approx(found)
    assert done["restart"] == int(choose(found))
    assert done["validation"] == pytest.approx(found[done["restart"]])
    # the first of them is what a run without restarts trains
    one = run(small_config(**common, training=training), tmp_path / "one")
    assert one.metrics[-1][f"validation_{metric}"] == pytest.approx(found[0])
    same = weights(tmp_path / "several"), weights(tmp_path / "one")
    assert all(torch.equal(same[0][k], same[1][k]) for k in same[1]) == (done["restart"] == 0)
    assert not list((tmp_path / "several").rglob("restart*"))


def test_restarts_need_something_to_choose_by(tmp_path: Path) -> None:
    # too few events for validation rows of the protocol's own
    few = {"split": "patients", "n_folds": 2, "validation": "inner", "min_inner_events": 500}
    with pytest.raises(ValueError, match="restarts is 2, but fold 0 has no validation rows"):
        run(small_config(protocol=few, training={"restarts": 2}), tmp_path / "run")
    assert not (tmp_path / "run" / "config.yaml").exists()
    with pytest.raises(ValueError, match=r'restarts is 2 and protocol\.validation "none"'):
        small_config(protocol={"validation": "none"}, training={"restarts": 2})


def test_without_validation_rows_all_epochs_run(tmp_path: Path) -> None:
    config = small_config(
        model=DETERMINED,
        optimizer={"lr": 0.3},
        protocol={"validation": "none"},
        training={"epochs": 4, "patience": 1},
    )
    result = run(config, tmp_path / "run")
    assert len(result.metrics) == 4
    assert "validation_loss" not in result.metrics[0]


@pytest.mark.parametrize("loss", ["nll", "cox"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_losses_and_precisions_train_with_missing_modalities(
    tmp_path: Path, loss: str, precision: str
) -> None:
    config = small_config(
        loss={"name": loss}, training={"precision": precision, "epochs": 2, "batch_size": 16}
    )
    result = run(config, tmp_path / "run", small_cohort(missing=True))
    assert all(np.isfinite(record["train_loss"]) for record in result.metrics)
    assert result.predictions.head == loss
    assert result.report.integrated_brier is not None
    assert all(w.dtype == torch.float32 for w in weights(tmp_path / "run").values())


def test_a_nan_names_epoch_batch_and_patients(tmp_path: Path) -> None:
    cohort = small_cohort()
    features = cohort.modalities["slides"].bags.features
    features[:5] = float("nan")
    with pytest.raises(TrainingError) as caught:
        run(small_config(), tmp_path / "run", cohort)
    message = str(caught.value)
    assert "seed 1, fold 0, epoch 1, batch" in message
    assert "P-000" in message


def test_predict_gives_back_what_the_run_predicted(tmp_path: Path) -> None:
    cohort = small_cohort()
    result = run(small_config(), tmp_path / "run", cohort)
    fold = result.predictions.folds[0]
    frame = predict(tmp_path / "run", cohort, device="cpu").set_index("unit_id")
    assert len(frame) == 60
    found = frame.loc[list(fold.test.unit_ids)]
    np.testing.assert_allclose(found["risk"], fold.test.risk, atol=1e-6)
    np.testing.assert_allclose(found["logit_1"], fold.test.logits[:, 1], atol=1e-6)
    # a cohort that lacks a modality altogether, and one whose columns come in another order
    genes = cohort.modalities["genes"]
    turned = TableModality(genes.values[:, ::-1], genes.features[::-1])
    other = dataclasses.replace(cohort, modalities={**cohort.modalities, "genes": turned})
    again = predict(tmp_path / "run", other, device="cpu").set_index("unit_id")
    np.testing.assert_allclose(again["risk"], frame["risk"], atol=1e-6)
    assert np.isfinite(predict(tmp_path / "run", cohort.only(["genes"]))["risk"]).all()


def test_preprocessing_sees_training_rows_only(tmp_path: Path) -> None:
    cohort, split = small_cohort(), given_split()
    genes = cohort.modalities["genes"]
    changed = genes.values.copy()
    changed[split.test] *= 100
    time = cohort.time.copy()
    time[split.test] *= 3
    other = dataclasses.replace(
        cohort,
        time=time,
        modalities={**cohort.modalities, "genes": TableModality(changed, genes.features)},
    )
    for name, one in (("a", cohort), ("b", other)):
        run(small_config(), tmp_path / name, one)
    states = [
        (tmp_path / name / "folds/seed1-fold0/preprocessing.json").read_text() for name in "ab"
    ]
    assert states[0] == states[1]
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_folder_with_a_run_is_not_overwritten(tmp_path: Path) -> None:
    run(small_config(), tmp_path / "run")
    with pytest.raises(RunFolderError, match="holds a run already"):
        run(small_config(), tmp_path / "run")
    with pytest.raises(RunFolderError, match="holds no run"):
        resume(tmp_path / "other")


def test_a_finished_run_resumes_to_itself(tmp_path: Path) -> None:
    config = small_config()
    run(config, tmp_path / "run")
    before = (tmp_path / "run/report.json").read_bytes()
    trained: list[dict[str, Any]] = []
    result = resume(
        tmp_path / "run", cohort=small_cohort(), split=given_split(), progress=trained.append
    )
    assert trained == []
    assert (tmp_path / "run/report.json").read_bytes() == before
    assert result.config == config


def test_a_resumed_run_computes_with_the_threads_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(small_config(training={"epochs": 1}), tmp_path / "run")
    path = tmp_path / "run/environment.json"
    path.write_text(path.read_text().replace('"threads": 1', '"threads": 2'))
    (tmp_path / "run/folds/seed1-fold0/done.json").unlink()
    used: list[int] = []
    resume(
        tmp_path / "run",
        cohort=small_cohort(),
        split=given_split(),
        progress=lambda event: used.append(torch.get_num_threads()),
    )
    assert set(used) == {2}
    assert torch.get_num_threads() == 1


def test_resuming_with_other_data_or_settings_is_refused(tmp_path: Path) -> None:
    run(small_config(), tmp_path / "run")
    with pytest.raises(RunFolderError, match="changed since it began"):
        resume(tmp_path / "run", cohort=small_cohort(seed=1), split=given_split())
    other = small_config(optimizer={"lr": 0.5})
    with pytest.raises(RunFolderError, match=r"optimizer\.lr is 0\.5, it was 0\.01"):
        run(other, tmp_path / "run", resume=True)
    # down to the one value that differs
    other = small_config(data={"simulation": {"n_train": 5}})
    with pytest.raises(RunFolderError, match=r"data\.simulation\.n_train is 5, it was None$"):
        run(other, tmp_path / "run", resume=True)
    other = small_config(model={"settings": {"depth": None}})
    with pytest.raises(RunFolderError, match=r"model\.settings\.\w+ is None, it was"):
        run(other, tmp_path / "run", resume=True)


def test_a_run_on_a_cohort_from_python_says_that_it_needs_it_again(tmp_path: Path) -> None:
    config = small_config(evaluation={"baselines": ["mean_pool"]})
    with pytest.raises(ConfigError, match=r'protocol\.split is "given": pass split='):
        fit(config, tmp_path / "run", cohort=small_cohort())
    run(config, tmp_path / "run")
    folder = tmp_path / "run"
    assert "# the cohort was given from Python" in (folder / "config.yaml").read_text()
    for path in (folder, folder / "baselines/mean_pool"):
        assert json.loads((path / "environment.json").read_text())["cohort"]["given"] is True
        with pytest.raises(
            RunFolderError, match=r"given from Python .*resume\(.*, cohort=\.\.\.\)"
        ):
            resume(path)
    assert resume(folder, cohort=small_cohort(), split=given_split()).config == config


def test_arguments_of_another_kind_are_named(tmp_path: Path) -> None:
    for config in ("demo.yaml", {"model": {}}):
        with pytest.raises(TypeError, match=r"^config is .*load_config\(path\).*parse_config"):
            fit(config, tmp_path / "run")
    with pytest.raises(TypeError, match=r"^cohort is 'x'; .*Cohort"):
        fit(small_config(), tmp_path / "run", cohort="x")
    with pytest.raises(TypeError, match=r"^cohort is 'x'; .*Cohort"):
        predict(tmp_path / "run", "x")


def test_a_report_names_the_model_that_ran(tmp_path: Path) -> None:
    config = small_config(model={"name": "mean_pool", "settings": {}})
    result = run(dataclasses.replace(config, title="HEALNet, a study"), tmp_path / "run")
    assert result.report.model == "HEALNet, a study (mean_pool)"
    assert "HEALNet, a study (mean_pool)" in (tmp_path / "run/report.md").read_text()


def test_wrong_model_settings_and_baselines_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.settings\.deph .*did you mean"):
        run(small_config(model={"settings": {"deph": 2}}), tmp_path / "a")
    with pytest.raises(ConfigError, match=r"follows from the tasks"):
        run(small_config(model={"settings": {"outputs": {"survival": 2}}}), tmp_path / "b")
    with pytest.raises(ConfigError, match="the modalities are genes, slides"):
        run(small_config(evaluation={"baselines": ["only:rna"]}), tmp_path / "c")
    with pytest.raises(ConfigError, match="no CUDA device"):
        run(small_config(training={"device": "cuda:0"}), tmp_path / "d")
    # nothing was begun
    assert not list(tmp_path.glob("*/config.yaml"))


def test_two_folds_of_two_seeds_pool_and_repeat(tmp_path: Path) -> None:
    config = small_config(
        protocol={"split": "patients", "n_folds": 2, "validation": "none"},
        training={"seeds": [1, 2], "epochs": 1},
        model={"name": "elastic_net_cox", "settings": {"strength": 0.1}},
    )
    result = fit(config, tmp_path / "run", cohort=small_cohort())
    names = [fold.fold for fold in result.predictions.folds]
    assert names == ["seed1-fold0", "seed1-fold1", "seed2-fold0", "seed2-fold1"]
    assert result.report.repeated
    assert Predictions.load(tmp_path / "run").folds[2].fold == "seed2-fold0"
    assert not (tmp_path / "run/metrics.csv").exists()
