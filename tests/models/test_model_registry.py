"""Every registered model has its names, its row in the documentation and a configuration file."""

from __future__ import annotations

import dataclasses
import importlib
import re
from pathlib import Path

import pytest
from contract_cases import MODEL_CASES

import survfuse.models
from survfuse.models import MODELS, FusionModel, ModalityConfig, model_class
from survfuse.training import load_config
from survfuse.training.config import BASELINES, ModelConfig

ROOT = Path(__file__).resolve().parents[2]
TABLE = [
    line
    for line in (ROOT / "docs/models.md").read_text().splitlines()
    if re.match(r"\| (\[`|`)\w+`", line)
]


def test_every_model_is_under_contract() -> None:
    assert list(MODEL_CASES) == list(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_a_name_leads_to_the_class_and_its_configuration(name: str) -> None:
    module, cls = MODELS[name]
    model = model_class(name)
    assert model is getattr(importlib.import_module(module), cls)
    assert issubclass(model, FusionModel)
    assert model is not FusionModel
    config = model.config_class
    assert dataclasses.is_dataclass(config)
    assert config.__dataclass_params__.frozen
    assert config.__name__ == f"{cls}Config"
    assert len(config.PRESETS) > 0
    for public in (cls, config.__name__):
        assert public in survfuse.models.__all__
        assert getattr(survfuse.models, public) in (model, config)


@pytest.mark.parametrize("name", MODELS)
def test_every_preset_builds_and_an_unknown_one_is_named(name: str) -> None:
    config = model_class(name).config_class
    modalities = MODEL_CASES[name].modalities
    for preset in config.PRESETS:
        made = config.from_preset(preset, modalities=modalities, outputs={"grade": 3})
        assert made.outputs == {"grade": 3}
        assert list(made.modalities) == list(modalities)
        default = config.from_preset(preset, modalities=modalities)
        assert default.outputs == {"survival": 4}
    with pytest.raises(ValueError, match="name is 'none such'; it must be one of"):
        config.from_preset("none such", modalities=modalities)
    if hasattr(made, "backend"):
        with pytest.raises(ValueError, match="backend is 'none such'"):
            dataclasses.replace(made, backend="none such")


def test_the_configuration_of_a_run_knows_exactly_these() -> None:
    others = {"clinical_cox", "elastic_net_cox", "unimodal_by_patient"}
    assert set(BASELINES) - others == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_the_documentation_has_a_row(name: str) -> None:
    rows = [line for line in TABLE if re.match(rf"\| (\[`|`){name}`", line)]
    assert len(rows) == 1
    for preset in model_class(name).config_class.PRESETS:
        # the presets of a cohort stand as one
        assert f"`{preset}`" in rows[0] or preset.startswith("released:")


@pytest.mark.parametrize("name", MODELS)
def test_there_is_a_configuration_file(name: str) -> None:
    path = ROOT / f"configs/{name}.yaml"
    if not path.is_file() and name in ("healnet", "ammasurv", "subspace_fusion"):
        pytest.skip(f"{path.name} is not written yet")
    config = load_config(path)
    assert config.model.name == name
    fields = {field.name for field in dataclasses.fields(model_class(name).config_class)}
    assert set(config.model.settings) <= fields
    assert dataclasses.asdict(ModelConfig())["name"] in MODELS


def test_a_table_needs_a_column() -> None:
    with pytest.raises(ValueError, match="channels is 0; it must be an integer of at least 1"):
        ModalityConfig("table", 0)
    for name, case in MODEL_CASES.items():
        wrong = {key: (item.kind, 0) for key, item in case.modalities.items()}
        with pytest.raises(ValueError, match="channels is 0"):
            model_class(name).from_preset(case_preset(name), modalities=wrong)


def case_preset(name: str) -> str:
    return next(iter(model_class(name).config_class.PRESETS))
