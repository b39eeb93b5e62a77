"""Each setting does what its name says: a run with it differs from one without."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from training_cases import given_split, small_cohort, small_config

from survfuse.batch import ModelOutput
from survfuse.data.bags import Bags
from survfuse.data.cohort import Cohort
from survfuse.data.modalities import BagModality
from survfuse.training import ConfigError, RunResult, fit, predict
from survfuse.training.config import TrainConfig
from survfuse.training.loop import forward
from survfuse.training.losses import nll_loss
from survfuse.training.protocols import leaks, quirks
from survfuse.training.report import oracle_score
from survfuse.training.run_folder import RunFolderError

PLAIN: dict[str, Any] = {"model": {"name": "mean_pool", "settings": {}}}


def run(config: TrainConfig, out: Path, cohort: Cohort | None = None) -> RunResult:
    return fit(config, out, cohort=cohort or small_cohort(), split=given_split())


def risks(result: RunResult) -> np.ndarray:
    return np.asarray(result.predictions.folds[0].test.risk)


@pytest.mark.parametrize(
    ("base", "changed"),
    [
        ({}, {"training": {"clip_norm": 1e-4}}),
        ({}, {"training": {"precision": "bf16"}}),
        ({}, {"training": {"seeds": [2]}}),
        ({}, {"loss": {"class_weights": "inverse"}}),
        ({}, {"loss": {"alpha": 0.5}}),
        ({}, {"loss": {"survival_divisor": 4.0, "l1": 0.01}}),
        ({"loss": {"name": "cox"}}, {"loss": {"name": "cox", "ties": "breslow"}}),
        ({}, {"optimizer": {"weight_decay": 0.5}}),
    ],
    ids=lambda values: json.dumps(values),
)
def test_a_setting_changes_the_model(tmp_path: Path, base: dict, changed: dict) -> None:
    cohort = small_cohort()
    # months, so that times tie
    cohort = dataclasses.replace(cohort, time=np.ceil(cohort.time / 12))
    found = [
        risks(run(small_config(**{**PLAIN, **sections}), tmp_path / name, cohort))
        for name, sections in (("base", base), ("same", base), ("changed", changed))
    ]
    np.testing.assert_array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])


@pytest.mark.parametrize(("metric", "best"), [("loss", np.argmin), ("c_index", np.argmax)])
def test_early_stopping_watches_the_metric(tmp_path: Path, metric: str, best) -> None:
    training = {"metric": metric, "epochs": 12, "patience": 12, "batch_size": 40}
    config = small_config(**PLAIN, training=training, optimizer={"lr": 0.2})
    result = run(config, tmp_path / "run")
    watched = [record[f"validation_{metric}"] for record in result.metrics]
    done = json.loads((tmp_path / "run/folds/seed1-fold0/done.json").read_text())
    assert len(set(watched)) > 3
    assert done["best_epoch"] == 1 + int(best(watched))


def test_the_validation_loss_has_the_class_weights(tmp_path: Path) -> None:
    config = small_config(
        **PLAIN,
        loss={"class_weights": "inverse"},
        training={"epochs": 1},
        protocol={"validation": "split", "weights": "last", "n_bins": 3},
    )
    cohort, split = small_cohort(), given_split()
    result = fit(config, tmp_path / "run", cohort=cohort, split=split)
    frame = predict(tmp_path / "run", cohort, device="cpu").iloc[split.validation]
    logits = torch.from_numpy(frame[["logit_0", "logit_1", "logit_2"]].to_numpy())
    event = torch.from_numpy(np.asarray(cohort.event)[split.validation])
    prepared = cohort.prepare(split.train, n_bins=3)
    labels = torch.from_numpy(np.asarray(prepared.labels)[split.validation])
    inverse = 1.0 / np.bincount(np.asarray(prepared.labels)[split.train], minlength=3)
    losses = [
        float(
            nll_loss(
                logits,
                labels,
                event,
                alpha=config.loss.alpha,
                class_weights=weights,
            )
        )
        for weights in (torch.from_numpy(inverse / inverse.sum()), None)
    ]
    watched = result.metrics[0]["validation_loss"]
    assert watched == pytest.approx(losses[0], rel=1e-5)
    assert watched != pytest.approx(losses[1], rel=1e-3)


def other_slides(cohort: Cohort) -> Cohort:
    source = cohort.modalities["slides"]
    names, lengths = source.bags.names, source.n_patches.tolist()
    return cohort.with_modality(
        "slides", BagModality(Bags(source.bags.features + 1.0, lengths, names), source.groups)
    )


def test_a_choice_of_modalities_is_all_that_a_model_sees(tmp_path: Path) -> None:
    cohort = small_cohort()
    config = small_config(data={"modalities": ["genes"]})
    one = run(config, tmp_path / "a", cohort)
    two = run(config, tmp_path / "b", other_slides(cohort))
    np.testing.assert_array_equal(risks(one), risks(two))
    beside = small_config(evaluation={"baselines": ["only:genes"]})
    alone = run(beside, tmp_path / "c", cohort).baselines["only:genes"]
    np.testing.assert_array_equal(risks(alone), risks(one))


def test_further_losses_of_a_model_are_learned_from() -> None:
    class Model(nn.Module):
        def forward(self, inputs: object) -> ModelOutput:
            parts: dict[str, Tensor] = {"a": torch.tensor(0.25), "b": torch.tensor(0.5)}
            return ModelOutput({"survival": torch.zeros(2, 3)}, {}, parts)

    prepared = small_cohort().prepare(None, n_bins=3)
    _, auxiliary = forward(Model(), prepared.batch([0, 1]), small_config(), torch.device("cpu"))
    assert float(auxiliary) == 0.75


@pytest.mark.parametrize("fixed", ["kind", "channels", "groups"])
def test_what_follows_from_the_data_cannot_be_set(tmp_path: Path, fixed: str) -> None:
    settings = {"modalities": {"genes": {fixed: 3}}}
    with pytest.raises(ConfigError, match=rf"genes\.{fixed} cannot be set"):
        run(small_config(model={"settings": settings}), tmp_path / "run")


def test_settings_of_a_cox_baseline_are_checked(tmp_path: Path) -> None:
    model = {"name": "elastic_net_cox", "settings": {"penalti": 3}}
    with pytest.raises(ConfigError, match=r"model\.settings\.penalti is not a setting"):
        run(small_config(model=model), tmp_path / "run")


def test_predicting_with_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    cohort = small_cohort()
    run(small_config(**PLAIN), tmp_path / "run", cohort)
    (tmp_path / "run/folds/seed1-fold0/done.json").unlink()
    with pytest.raises(RunFolderError, match="no finished model; resume the run"):
        predict(tmp_path / "run", cohort)


def test_watching_the_test_rows_is_a_leak_and_odd_recipes_are_named() -> None:
    assert leaks(small_config(protocol={"validation": "test"})) == [
        "the rows that early stopping watches are the test rows"
    ]
    odd = small_config(
        protocol={"weights": "last", "scale": False},
        loss={"survival_divisor": 16.0},
        training={"patience": 3},
    )
    stop, divided, bare = quirks(odd)
    assert "the weights of the last epoch are evaluated" in stop
    assert "L1 acts 16 times as strong" in divided
    assert bare.startswith("tables enter as they are")
    assert quirks(small_config()) == []


def test_the_score_beside_the_oracle() -> None:
    assert oracle_score(0.65, 0.8) == pytest.approx(0.5)
    assert oracle_score(0.5, 0.8) == 0.0
