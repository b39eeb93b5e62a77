"""Small models of one bag and gene groups, and batches for them."""

from __future__ import annotations

from dataclasses import replace

import torch

from survfuse import Ragged
from survfuse.batch import BagBatch, Modality, TableBatch
from survfuse.models.base import FusionModel
from survfuse.models.cmta import CMTA
from survfuse.models.mcat import MCAT
from survfuse.models.motcat import MOTCat
from survfuse.models.survpath import SurvPath

LENGTHS = [9, 1, 6]
MODALITIES = {
    "rna": ("table", 6, {"a": (0, 1), "b": (1, 2, 3)}),
    "slide": ("bag", 12),
    "cnv": ("table", 3),
}
_ENCODERS = {"gene_widths": (10,), "encoder_heads": 2, "dim": 16}
_MCAT = {**_ENCODERS, "encoder_hidden": 12, "bilinear_scale": 4}
# what makes a preset small; pieces are shorter than a bag
SMALL = {
    MCAT: {**_MCAT, "piece_rows": 4},
    MOTCat: {**_MCAT, "piece_rows": 4, "micro_batch": 4},
    SurvPath: {"gene_widths": (10,), "dim": 16, "inner_dim": 8, "hidden": 8, "piece_rows": 4},
    CMTA: {**_ENCODERS, "patch_widths": (10,), "landmarks": 4, "bilinear_scale": 4},
}
VARIANTS = {
    "mcat": (MCAT, {}),
    "mcat bilinear": (MCAT, {"fusion": "bilinear", "recompute": True, "attention_heads": 2}),
    "motcat": (MOTCat, {}),
    "survpath": (SurvPath, {}),
    "survpath apart": (SurvPath, {"shared_qkv": False, "heads": 2, "recompute": "all"}),
    "cmta": (CMTA, {}),
    "cmta bilinear": (CMTA, {"fusion": "bilinear", "recompute": True, "alignment": "cosine"}),
}
# of parameters that stand for what is missing
STAND_INS = ("genes.stand_in", "missing_patches")


def small(cls: type[FusionModel], preset: str = "paper", **changes: object) -> FusionModel:
    torch.manual_seed(0)
    modalities = changes.pop("modalities", MODALITIES)
    return cls.from_preset(preset, modalities=modalities, **{**SMALL[cls], **changes})


def without_dropout(model: FusionModel) -> FusionModel:
    """A model in training mode that drops nothing."""
    rates = [name for name in vars(model.config) if name.endswith("dropout")]
    other = type(model)(replace(model.config, **dict.fromkeys(rates, 0.0)))
    other.load_state_dict(model.state_dict())
    return other


def all_inputs() -> dict[str, Modality]:
    torch.manual_seed(1)
    ragged = Ragged.from_ranges([4, 0, 15], LENGTHS)
    present = torch.ones(3, dtype=torch.bool)
    return {
        "rna": TableBatch(torch.randn(3, 6), present),
        "slide": BagBatch(torch.randn(22, 12), ragged, present),
        "cnv": TableBatch(torch.randn(3, 3), present),
    }
