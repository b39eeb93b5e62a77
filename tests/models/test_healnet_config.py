"""HEALNet's configuration: presets, round trip, errors."""

from __future__ import annotations

import json

import pytest
import torch

from survfuse import Ragged
from survfuse.batch import BagBatch, TableBatch
from survfuse.models import HEALNet, HEALNetConfig, ModalityConfig

MODALITIES = {
    "genes": ModalityConfig("table", 7),
    "panel": ModalityConfig("table", 5, axes=1, table_tokens="features"),
}
PRESENT = torch.tensor([True, True])
GENES = TableBatch(torch.linspace(-1, 1, 14).reshape(2, 7), PRESENT)
SLIDE = BagBatch(torch.linspace(-1, 1, 60).reshape(5, 12), Ragged.from_lengths([3, 2]), PRESENT)


def test_presets_and_their_round_trip() -> None:
    modalities = {"genes": ("table", 7), "slide": ("bag", 12), "cells": ("graph", 6)}
    paper = HEALNetConfig.from_preset("paper", modalities=modalities)
    assert (paper.n_latents, paper.latent_dim) == (25, 119)
    assert (paper.cross_heads, paper.cross_head_dim) == (8, 64)
    assert (paper.depth, paper.weight_sharing) == (2, "all_layers")
    assert paper.outputs == {"survival": 4}
    assert (paper.token_width("genes"), paper.token_width("slide")) == (7, 17)
    released = HEALNetConfig.from_preset("released:kirp", modalities=modalities)
    assert (released.depth, released.n_latents, released.latent_dim) == (5, 17, 62)
    assert (released.temperature, released.output_slope, released.cross_heads) == (0.5, 0.01, 1)
    assert released.token_width("genes") == 12
    for config in (paper, released):
        assert HEALNetConfig(**json.loads(json.dumps(config.to_dict()))) == config
        model, copy = HEALNet(config), HEALNet(config)
        copy.load_state_dict(model.state_dict())
        inputs = {"genes": GENES, "slide": SLIDE}
        assert torch.equal(
            model.eval()(inputs).logits["survival"], copy.eval()(inputs).logits["survival"]
        )
    assert len(HEALNet(paper).layers) == 1
    assert HEALNet(paper).latents.min() >= 0.0
    assert HEALNet(released).latents.min() < 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "image"}, "kind is 'image'; it must be one of"),
        ({"channels": 0}, "channels is 0; it must be an integer of at least 1"),
        ({"axes": 3}, "axes is 3 on a bag; it must be from 0 to 2"),
        ({"kind": "array"}, "axes is 0 on a array; it must be at least 1"),
        ({"kind": "table", "table_tokens": "two"}, "table_tokens is 'two'"),
        ({"kind": "table", "table_tokens": "features"}, "axes is 0 with table_tokens 'features'"),
        ({"table_tokens": "features"}, "only tables take it"),
        ({"walk_steps": 2}, "walk_steps is 2 on a bag"),
        ({"groups": {"a": (0,)}}, "groups are given on a bag"),
        ({"kind": "table", "groups": {"a": (4,)}}, r"groups\['a'\] holds column 4"),
        ({"kind": "table", "groups": {"a": ()}}, r"groups\['a'\] is empty"),
        ({"kind": "table", "groups": ["a"]}, r"groups is \['a'\]; it must map names"),
    ],
    ids=str,
)
def test_wrong_modalities_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModalityConfig(**{"kind": "bag", "channels": 4, **arguments})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modalities": {}}, "must map at least one name"),
        ({"modalities": {"": MODALITIES["genes"]}}, "must be a non-empty string"),
        (
            {"modalities": {"genes": "table"}},
            "modality 'genes' is 'table'; it must be a ModalityConfig",
        ),
        ({"modalities": {"genes": {"kind": "table", "width": 3}}}, "unknown field 'width'"),
        ({"depth": 0}, "depth is 0; it must be an integer of at least 1"),
        ({"depth": 2.0}, r"depth is 2\.0; it must be an integer"),
        ({"outputs": {"survival": 0}}, r"outputs\['survival'\] is 0; it must be an integer"),
        ({"outputs": 4}, "outputs is 4; it must map names of tasks"),
        ({"outputs": {"a.b": 4}}, "outputs has the task 'a.b'"),
        ({"weight_sharing": "tied"}, "weight_sharing is 'tied'; it must be one of"),
        ({"activation": "relu"}, "activation is 'relu'"),
        ({"latent_init": "zeros"}, "latent_init is 'zeros'"),
        ({"absorb": True}, "absorb is True"),
        ({"attention_dropout": 1.0}, r"attention_dropout is 1\.0; it must be in \[0, 1\)"),
        ({"ff_dropout": -0.1}, "ff_dropout is -0.1"),
        ({"attention_dropout": ".1"}, r"attention_dropout is '\.1'; it must be a number"),
        ({"ff_dropout": None}, "ff_dropout is None; it must be a number"),
        ({"temperature": "1"}, "temperature is '1'; it must be a number"),
        ({"output_slope": "x"}, "output_slope is 'x'; it must be a number"),
        ({"fourier": "no"}, "fourier is 'no'; it must be True or False"),
        ({"backend": "natve"}, r"backend is 'natve'; it must be None or one of \('reference'"),
        ({"temperature": 0.0}, r"temperature is 0\.0; it must be greater than 0"),
        ({"fourier": False}, "fourier is False and modality 'panel'"),
    ],
    ids=str,
)
def test_wrong_configurations_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HEALNetConfig(**{"modalities": MODALITIES, **changes})


def test_wrong_presets_are_refused() -> None:
    modalities = {"genes": ("table", 7)}
    with pytest.raises(ValueError, match="name is 'best'"):
        HEALNetConfig.from_preset("best", modalities=modalities)
    with pytest.raises(ValueError, match="name is 'released:luad'; it must be one of"):
        HEALNetConfig.from_preset("released:luad", modalities=modalities)
    for wrong in (8, ("bag", 8, {}, 1), "bag", ("bag",)):
        with pytest.raises(
            ValueError, match=r"modality 's' is .*; it must be .*\(kind, channels\)"
        ):
            HEALNetConfig.from_preset("paper", modalities={"s": wrong})
    with pytest.raises(ValueError, match=r"modalities is \['s'\]; it must map"):
        HEALNetConfig.from_preset("paper", modalities=["s"])
    with pytest.raises(TypeError, match="config is dict; it must be a HEALNetConfig"):
        HEALNet({"modalities": MODALITIES})
    with pytest.raises(ValueError, match="does not say how many spatial axes"):
        HEALNetConfig.from_preset("paper", modalities={"scan": ("array", 3)})
