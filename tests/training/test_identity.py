"""A run goes on only with the data, folds and device it began with."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from training_cases import given_split, small_cohort, small_config

from survfuse.data.bags import Bags
from survfuse.data.cohort import Cohort
from survfuse.data.modalities import ArrayModality, GraphModality, TableModality
from survfuse.training import ConfigError, fit, resume
from survfuse.training.config_files import load_config, parse_config
from survfuse.training.identity import fingerprint
from survfuse.training.run_folder import RunFolderError


def other_time(cohort: Cohort) -> Cohort:
    return dataclasses.replace(cohort, time=cohort.time + 1)


def other_event(cohort: Cohort) -> Cohort:
    return dataclasses.replace(cohort, event=~cohort.event)


def other_age(cohort: Cohort) -> Cohort:
    covariates = cohort.covariates.copy()
    covariates.iloc[3, 0] += 1
    return dataclasses.replace(cohort, covariates=covariates)


def other_value(cohort: Cohort) -> Cohort:
    genes = cohort.modalities["genes"]
    values = genes.values.copy()
    values[7, 2] += 1
    return cohort.with_modality("genes", TableModality(values, genes.features))


def other_names(cohort: Cohort) -> Cohort:
    genes = cohort.modalities["genes"]
    return cohort.with_modality("genes", TableModality(genes.values, genes.features[::-1]))


def other_scan(cohort: Cohort) -> Cohort:
    scan = cohort.modalities["scan"]
    return cohort.with_modality("scan", ArrayModality(scan.values + 1, scan.present))


def other_edges(cohort: Cohort) -> Cohort:
    cells = cohort.modalities["cells"]
    edges = (cells.edges[0].flip(0), *cells.edges[1:])
    return cohort.with_modality("cells", GraphModality(cells.nodes, edges, cells.graph_of))


@pytest.mark.parametrize(
    "change",
    [other_time, other_event, other_age, other_value, other_names, other_scan, other_edges],
)
def test_everything_small_is_in_the_fingerprint(change) -> None:
    cohort = small_cohort()
    n = len(cohort)
    scan = ArrayModality(torch.ones(n, 2, 1, dtype=torch.bfloat16), np.ones(n, dtype=bool))
    nodes = Bags(torch.ones(2 * n, 1), [2] * n, list(cohort.unit_ids))
    cells = GraphModality(nodes, tuple(torch.tensor([[0], [1]]) for _ in range(n)), np.arange(n))
    cohort = cohort.with_modality("scan", scan).with_modality("cells", cells)
    assert fingerprint(cohort) == fingerprint(dataclasses.replace(cohort))
    assert fingerprint(cohort) != fingerprint(change(cohort))


def test_other_folds_and_devices_are_refused(tmp_path: Path) -> None:
    folder, cohort, split = tmp_path / "run", small_cohort(), given_split()
    fit(small_config(), folder, cohort=cohort, split=split)
    # what was trained on would be tested on
    swapped = split._replace(train=split.test, test=split.train)
    with pytest.raises(RunFolderError, match=r"^the folds of the run in .* changed"):
        resume(folder, cohort=cohort, split=swapped)
    path = folder / "environment.json"
    began = json.loads(path.read_text())
    path.write_text(json.dumps({**began, "device": "cuda:0"}))
    with pytest.raises(RunFolderError, match="began on cuda:0 and would go on on cpu"):
        resume(folder, cohort=cohort, split=split)


def test_a_baseline_begun_on_resuming_has_the_threads_of_the_run(tmp_path: Path) -> None:
    config = small_config(evaluation={"baselines": ["mean_pool"]}, training={"epochs": 1})

    class Stop(Exception):
        pass

    def stop(event: dict) -> None:
        if event["kind"] == "baseline":
            raise Stop

    folder, given = tmp_path / "run", {"cohort": small_cohort(), "split": given_split()}
    with pytest.raises(Stop):
        fit(config, folder, **given, progress=stop)
    path = folder / "environment.json"
    path.write_text(path.read_text().replace('"threads": 1', '"threads": 2'))
    resume(folder, **given)
    inner = json.loads((folder / "baselines/mean_pool/environment.json").read_text())
    assert inner["threads"] == 2


def test_relative_paths_are_of_the_working_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = parse_config({**small_config().to_dict(), "data": {"folder": "data"}})
    given = {"cohort": small_cohort(), "split": given_split()}
    fit(config, "run", **given)
    assert load_config("run/config.yaml").data.folder == str(tmp_path / "data")
    fit(config, "run", **given, resume=True)


def test_what_a_baseline_lacks_is_said_before_the_training(tmp_path: Path) -> None:
    bare = small_cohort()
    bare = dataclasses.replace(bare, covariates=bare.covariates[[]])
    config = small_config(evaluation={"baselines": ["clinical_cox"]})
    with pytest.raises(ConfigError, match="neither of the covariates age and is_female"):
        fit(config, tmp_path / "run", cohort=bare, split=given_split())
    config = small_config(evaluation={"baselines": ["elastic_net_cox"]})
    slides = small_cohort().only(["slides"])
    with pytest.raises(ConfigError, match="elastic_net_cox, but the cohort has no table"):
        fit(config, tmp_path / "run", cohort=slides, split=given_split())
    assert not (tmp_path / "run").exists()


def test_settings_of_modalities_are_checked(tmp_path: Path) -> None:
    given = {"cohort": small_cohort(), "split": given_split()}
    for modalities, message in (
        ({"slides": {"axs": 0}}, r"modalities\.slides: unknown setting 'axs'.*'axes'"),
        ({"slide": {"axes": 0}}, r"modalities\.slide: unknown modality 'slide'.*'slides'"),
    ):
        config = small_config(model={"settings": {"modalities": modalities}})
        with pytest.raises(ConfigError, match=message):
            fit(config, tmp_path / "run", **given)
    # a choice of modalities keeps the settings of the others
    chosen = small_config(data={"modalities": ["genes"]})
    assert fit(chosen, tmp_path / "run", **given).metrics


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"training": {"seeds": [-1]}}, "a seed must be at least 0"),
        ({"protocol": {"fold_seed": -2}}, "a seed must be at least 0"),
        ({"loss": {"name": "cox", "alpha": 0.5}}, "it belongs to the nll loss"),
        (
            {
                "loss": {"name": "cox"},
                "training": {"batch_size": 1},
                "model": {"name": "mean_pool"},
            },
            "the Cox loss compares patients of one batch",
        ),
    ],
)
def test_values_that_would_train_nothing_or_cannot_be_resumed(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(values)
