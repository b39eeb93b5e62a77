"""Training on every kind of modality, and where training or watching it cannot go on."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from training_cases import given_split, small_cohort, small_config

from survfuse.data.bags import Bags
from survfuse.data.modalities import ArrayModality, GraphModality
from survfuse.training import fit
from survfuse.training.loop import TrainingError
from survfuse.training.protocols import leaks
from survfuse.training.task_losses import c_index


def test_arrays_and_graphs_train(tmp_path: Path) -> None:
    cohort = small_cohort()
    n = len(cohort)
    present = np.arange(n) % 4 > 0
    nodes = Bags(torch.randn(3 * n, 4), [3] * n, [f"g{i}" for i in range(n)])
    edges = tuple(torch.tensor([[0, 1], [1, 0]]) for _ in range(n))
    cohort = dataclasses.replace(
        cohort,
        modalities={
            "scan": ArrayModality(torch.randn(n, 3, 2, 2), present),
            "cells": GraphModality(nodes, edges, np.where(present, np.arange(n), -1)),
        },
    )
    settings = {"modalities": {"cells": {"walk_steps": 2}}}
    config = small_config()
    for name, model in (
        ("healnet", {**config.model.settings, **settings}),
        ("mean_pool", {}),
    ):
        chosen = small_config()
        chosen = dataclasses.replace(
            chosen, model=dataclasses.replace(chosen.model, name=name, settings=model)
        )
        result = fit(chosen, tmp_path / name, cohort=cohort, split=given_split())
        assert np.isfinite([record["train_loss"] for record in result.metrics]).all()
        assert 0 <= result.report.concordance.estimate <= 1


def test_weights_that_are_no_numbers_name_the_fold(tmp_path: Path) -> None:
    config = small_config(
        model={"name": "mean_pool", "settings": {}},
        optimizer={"lr": 1e30},
        training={"batch_size": 60, "epochs": 2},
    )
    with pytest.raises(TrainingError, match=r"^seed 1, fold 0, epoch 1: the logits of"):
        fit(config, tmp_path / "run", cohort=small_cohort(), split=given_split())


def test_concordance_of_rows_without_a_pair_is_nan() -> None:
    cohort = small_cohort()
    last = np.argsort(cohort.time)
    rows = last[: np.flatnonzero(cohort.event[last])[0] + 1]
    # one event, and nobody was followed beyond it
    assert np.isnan(c_index(np.zeros(len(rows)), cohort, rows))
    assert c_index(np.zeros(len(cohort)), cohort, np.arange(len(cohort))) == 0.5


def test_statistics_of_all_rows_are_a_leak_for_clipping_and_scaling_too() -> None:
    (filled,) = leaks(small_config(protocol={"fill": "all"}))
    assert filled.endswith("and tables are clipped and scaled by statistics of them")
    (bare,) = leaks(small_config(protocol={"fill": "all", "scale": False, "clip": None}))
    assert bare.endswith("test rows included")
