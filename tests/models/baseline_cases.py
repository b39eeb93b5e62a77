"""Small models of every plain baseline, and the modalities they are given."""

from __future__ import annotations

from typing import Any

from healnet_cases import MODALITIES, all_inputs

from survfuse.batch import Modality
from survfuse.models import FusionModel
from survfuse.models.registry import model_class
from survfuse.models.settings import ModalityConfig

_SETTINGS: dict[str, dict[str, Any]] = {
    "snn": {"widths": (8, 6)},
    "abmil": {"dim": 8, "hidden": 4},
    "transmil": {"dim": 8, "heads": 2, "head_dim": 4, "landmarks": 3, "residual_kernel": 3},
    "late_fusion": {
        "dim": 6,
        "rank": 5,
        "hidden": 5,
        "patch_dim": 9,
        "attention_hidden": 3,
        "table_widths": (5,),
    },
    "multimodn": {
        "state_dim": 5,
        "encoder_widths": (6,),
        "decoder_widths": (4,),
        "patch_dim": 7,
        "attention_hidden": 3,
    },
    "perceiver": {
        "n_latents": 3,
        "latent_dim": 6,
        "cross_heads": 2,
        "cross_head_dim": 3,
        "latent_heads": 2,
        "latent_head_dim": 3,
        "token_dim": 5,
        "code_dim": 2,
    },
}
_TABLES = {"genes": MODALITIES["genes"], "more": ModalityConfig("table", 5)}
_FEWER = {name: MODALITIES[name] for name in ("genes", "slide", "scan", "cells")}

# name of a case -> model, modalities, settings beside the small sizes
CASES: dict[str, tuple[str, dict[str, ModalityConfig], dict[str, Any]]] = {
    "snn": ("snn", _TABLES, {}),
    "abmil": ("abmil", {"plain": MODALITIES["plain"]}, {}),
    "abmil of a graph": ("abmil", {"cells": MODALITIES["cells"]}, {}),
    "transmil": ("transmil", {"plain": MODALITIES["plain"]}, {}),
    "transmil with positions": ("transmil", {"slide": MODALITIES["slide"]}, {}),
    "concat": ("late_fusion", MODALITIES, {"fusion": "concat"}),
    "add": ("late_fusion", MODALITIES, {"fusion": "add"}),
    "bilinear": ("late_fusion", MODALITIES, {"fusion": "bilinear", "gated": False}),
    "kronecker": ("late_fusion", _FEWER, {"fusion": "kronecker"}),
    "no skip": ("late_fusion", _FEWER, {"fusion": "bilinear", "skip": False}),
    "multimodn": ("multimodn", MODALITIES, {"state_change": 0.1}),
    "multimodn, attention": ("multimodn", MODALITIES, {"pool": "attention"}),
    "perceiver": ("perceiver", MODALITIES, {}),
    "perceiver, zero": ("perceiver", _FEWER, {"padding": "zero", "weight_sharing": "none"}),
}


def build(case: str, **changes: Any) -> FusionModel:
    """The model of a case, with `changes` of its settings."""
    name, modalities, settings = CASES[case]
    settings = {**_SETTINGS[name], **settings, **changes}
    return model_class(name).from_preset("paper", modalities=modalities, **settings)


def inputs_of(case: str) -> dict[str, Modality]:
    """Three samples of the modalities of a case, all present."""
    given = all_inputs()
    given["more"] = given["panel"]
    return {name: given[name] for name in CASES[case][1]}
