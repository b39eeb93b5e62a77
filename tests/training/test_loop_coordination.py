"""The loop coordinates the gradients of a model with two branches, and of no other."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn
from training_cases import given_split, small_cohort, small_config

from survfuse.batch import ModelOutput
from survfuse.models.base import FusionModel
from survfuse.models.heads import TaskHeads
from survfuse.models.mean_pool import MeanPoolConfig
from survfuse.models.registry import MODELS
from survfuse.training import ConfigError, fit, load_config, resume
from survfuse.training.baselines import baseline_config
from survfuse.training.config import CoordinationConfig, TrainConfig
from survfuse.training.config_files import dump_config
from survfuse.training.loop_coordination import LoopCoordination


class TwoBranches(FusionModel):
    """Genes read twice, the second time without the first three."""

    config_class: ClassVar[type] = MeanPoolConfig
    branches = ("tumor", "microenvironment")

    def __init__(self, config: MeanPoolConfig) -> None:
        super().__init__()
        self.config, channels = config, config.modalities["genes"].channels
        self.encoders = nn.ModuleList([nn.Linear(channels, 4), nn.Linear(channels - 3, 4)])
        self.dropout = nn.Dropout(config.dropout)
        self.readout = TaskHeads(8, config.outputs)

    def forward(self, inputs) -> ModelOutput:
        genes = inputs["genes"].values
        tumor, micro = self.encoders[0](genes), self.encoders[1](genes[:, 3:])
        tumor, micro = self.dropout(tumor.tanh()), self.dropout(micro.tanh())
        logits = self.readout(torch.cat([tumor, micro], 1))
        return ModelOutput(logits, {"tumor": tumor, "microenvironment": micro}, {})

    def patch_attention(self, inputs) -> dict:
        return {}


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    # in the place of a model that a configuration may name
    monkeypatch.setitem(MODELS, "subspace_fusion", (__name__, "TwoBranches"))


def config(mode: str = "projection", **sections: dict[str, Any]) -> TrainConfig:
    sections = {
        "model": {"name": "subspace_fusion", "settings": {"dropout": 0.2}},
        "coordination": {"mode": mode},
        **sections,
    }
    return small_config(**sections)


def run(config: TrainConfig, out: Path, **more: Any):
    return fit(config, out, cohort=small_cohort(missing=True), split=given_split(), **more)


@pytest.mark.parametrize("loss", ["nll", "cox"])
def test_modes_train_differently_and_tell_what_they_did(tmp_path: Path, loss: str) -> None:
    found = {}
    for mode in ("none", "projection", "released"):
        result = run(config(mode, loss={"name": loss}), tmp_path / mode)
        found[mode] = np.asarray(result.predictions.folds[0].test.risk)
        names = [key for key in result.metrics[0] if key.startswith("coordination")]
        if mode == "none":
            assert not names
            continue
        assert names == [
            f"coordination_{n}" for n in ("conflicts", "modified", "strength", "skipped")
        ]
        total = {name: sum(record[name] for record in result.metrics) for name in names}
        assert 0 < total["coordination_modified"] <= total["coordination_conflicts"]
        assert 0 < total["coordination_strength"] < 2 * len(result.metrics)
        for record in result.metrics:
            assert 0 <= record["coordination_skipped"] <= 5
    assert len({risk.tobytes() for risk in found.values()}) == 3


def test_resumed_in_mid_epoch_is_bit_identical(tmp_path: Path) -> None:
    training = {"epochs": 2, "batch_size": 4, "accumulate": 2, "checkpoint_steps": 1}
    settings = config("released", training=training)
    whole = run(settings, tmp_path / "whole")
    steps = 0
    coordinate = LoopCoordination.coordinate

    def interrupted(self: LoopCoordination) -> None:
        nonlocal steps
        steps += 1
        if steps == 4:
            raise KeyboardInterrupt
        coordinate(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoopCoordination, "coordinate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(settings, tmp_path / "cut")
    resume(tmp_path / "cut", cohort=small_cohort(missing=True), split=given_split())
    assert whole.metrics[0]["coordination_conflicts"] > 0
    for name in ("metrics.jsonl", "predictions.csv", "folds/seed1-fold0/weights.pt"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_accumulation_coordinates_like_one_large_batch(tmp_path: Path) -> None:
    sure = {"name": "subspace_fusion", "settings": {"dropout": 0.0}}
    found = []
    for name, size, accumulate in (("many", 5, 4), ("one", 20, 1)):
        training = {"batch_size": size, "accumulate": accumulate, "clip_norm": None}
        result = run(config(model=sure, training=training), tmp_path / name)
        found.append(result.metrics)
    for many, one in zip(*found, strict=True):
        assert many["coordination_conflicts"] == one["coordination_conflicts"]
        assert many["coordination_modified"] == one["coordination_modified"]
        assert many["train_loss"] == pytest.approx(one["train_loss"], rel=1e-4)


def test_samples_that_lack_a_modality_are_not_scored() -> None:
    settings = config("projection")
    prepared = small_cohort(missing=True).prepare(None, n_bins=3)
    model = TwoBranches(MeanPoolConfig({"genes": ("table", 6)}, {"survival": 3}))
    loop = LoopCoordination(settings, model)
    # of the first ten patients two lack genes and two slides
    batch = prepared.batch(range(10))
    model(batch.inputs)
    loop.observe(batch)
    (rows,) = loop.coordination._window["survival"]
    present = [batch.inputs[name].present for name in ("genes", "slides")]
    assert torch.equal(rows[:, 4] > 0, present[0] & present[1])
    assert int(rows[:, 4].sum()) == 6


@pytest.mark.parametrize("name", ["mean_pool", "healnet", "clinical_cox"])
def test_models_without_two_branches_are_refused_before_training(tmp_path: Path, name: str) -> None:
    message = f'coordination.mode is "projection", but model.name "{name}" has no two branches'
    with pytest.raises(ConfigError, match=message):
        run(config(model={"name": name, "settings": {}}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_branches_may_be_modules_by_name() -> None:
    model = nn.Module()
    model.readout = TaskHeads(8, {"survival": 3})
    model.branches = nn.ModuleDict({"tumor": nn.Identity(), "immune": nn.Identity()})
    assert LoopCoordination(config(), model).branches == ("tumor", "immune")
    # two modules in a list have no names
    model.branches = nn.ModuleList([nn.Identity(), nn.Identity()])
    with pytest.raises(ConfigError, match="has no two branches"):
        LoopCoordination(config(), model)


@pytest.mark.parametrize("wrong", ["norm", "odd", "other task"])
def test_a_readout_that_is_not_of_two_branches_is_refused(wrong: str) -> None:
    model = TwoBranches(MeanPoolConfig({"genes": ("table", 6)}, {"survival": 3}))
    if wrong == "norm":
        model.readout = TaskHeads(8, {"survival": 3}, norm=True)
    else:
        width, task = (7, "survival") if wrong == "odd" else (8, "grade")
        model.readout = TaskHeads(width, {task: 3})
    with pytest.raises(ConfigError, match="has no two branches"):
        LoopCoordination(config(), model)


def test_baselines_of_another_model_are_not_coordinated(tmp_path: Path) -> None:
    settings = config(evaluation={"baselines": ["mean_pool", "clinical_cox", "only:genes"]})
    for name in settings.evaluation.baselines:
        mode = baseline_config(settings, name, ["genes", "slides"]).coordination.mode
        assert mode == ("projection" if name == "only:genes" else "none")
    dump_config(settings, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml").coordination == settings.coordination


def test_the_mode_is_checked() -> None:
    with pytest.raises(ConfigError, match=r"coordination\.mode is 'pcgrad'; it must be 'none', "):
        config("pcgrad")
    assert TrainConfig().coordination == CoordinationConfig("none")
    assert dataclasses.asdict(TrainConfig())["coordination"] == {"mode": "none"}
