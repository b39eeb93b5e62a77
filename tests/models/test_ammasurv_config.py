"""AMMASurv: presets, ablation, refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
from ammasurv_cases import MODALITIES, batch, small

from survfuse.models.ammasurv import AMMASurv
from survfuse.models.ammasurv_config import ABLATION, AMMASurvConfig
from survfuse.models.settings import ModalityConfig


def test_presets_and_round_trips() -> None:
    for name, blocks in {
        "paper": ("pp", "gp", "gg"),
        "symmetric": ("pp", "pg", "gp", "gg"),
        "genes_to_patches": ("gp", "gg"),
    }.items():
        config = AMMASurvConfig.from_preset(name, modalities=MODALITIES)
        assert config.layer_blocks == (blocks, blocks)
        assert AMMASurvConfig(**config.to_dict()) == config
    layered = replace(config, blocks=[["gg", "pp"], ["gp"]])
    assert layered.layer_blocks == (("pp", "gg"), ("gp",))
    assert AMMASurvConfig(**layered.to_dict()) == layered
    assert replace(config, depth=3).layer_blocks == (("gp", "gg"),) * 3
    assert replace(config, blocks=[]).layer_blocks == ((), ())
    assert len(set(ABLATION.values())) == len(ABLATION)
    # a side that no block serves has no parameters in a layer
    bare = AMMASurv(replace(config, blocks=("gg",)))
    assert not list(bare.layers[0].patches.parameters())


WRONG = [
    ({"blocks": "pp"}, "blocks is 'pp'; it must hold some of"),
    ({"blocks": ["pp", "px"]}, "it must hold some of"),
    ({"blocks": ["pp", "pp"]}, "it must hold some of"),
    ({"blocks": [["pp"], "gg"]}, "it must hold some of"),
    ({"blocks": [["pp"]]}, "blocks holds 1 layers and depth is 2; they must be equal"),
    ({"patch_attention_kind": "flash"}, "patch_attention_kind is 'flash'"),
    ({"gene_temperature": 0.0}, "gene_temperature is 0.0; it must be greater than 0"),
    ({"gate": "none"}, "gate is 'none'"),
    ({"gate_activation": "relu"}, "gate_activation is 'relu'"),
    ({"gene_hidden": 5}, "gene_hidden is 5; it must hold integers"),
    ({"gene_hidden": [0]}, r"gene_hidden is \[0\]; it must hold integers"),
    ({"landmarks": 0}, "landmarks is 0"),
    ({"ff_dropout": 1.0}, "ff_dropout is 1.0"),
    ({"checkpoint": 1}, "checkpoint is 1; it must be True or False"),
    ({"modalities": {"slide": ("bag", 4)}}, "one bag and at least one table"),
    ({"modalities": {"rna": ("table", 4)}}, "one bag and at least one table"),
    ({"modalities": {"x": ("bag", 4), "y": ("bag", 4), "z": ("table", 2)}}, "one bag and at least"),
    (
        {"modalities": {"x": ("bag", 4), "y": ModalityConfig("table", 2, axes=1)}},
        "modality 'y' encodes the columns of a table",
    ),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_wrong_settings_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="name is 'best'; it must be one of"):
        AMMASurvConfig.from_preset("best", modalities=MODALITIES)
    with pytest.raises(TypeError, match="config is dict; it must be an AMMASurvConfig"):
        AMMASurv({})
    with pytest.raises(ValueError, match="inputs has the modality 'x'; the model knows"):
        AMMASurv(small())({"x": batch()["rna"]})
