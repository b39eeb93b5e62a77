"""A small AMMASurv with two tables, and a batch with every kind of absence."""

from __future__ import annotations

from dataclasses import replace

import torch

from survfuse import Ragged
from survfuse.batch import BagBatch, Modality, TableBatch
from survfuse.models.ammasurv import AMMASurv
from survfuse.models.ammasurv_config import AMMASurvConfig

MODALITIES = {
    "rna": ("table", 6, {"a": (0, 1), "b": (2, 3, 5), "c": (1, 4)}),
    "slide": ("bag", 12),
    "cnv": ("table", 4),
}
LENGTHS = [7, 0, 9, 1, 0]
HAS_RNA = [True, True, True, False, False]
HAS_CNV = [True, False, False, False, False]


def small(**changes: object) -> AMMASurvConfig:
    config = AMMASurvConfig(MODALITIES, dim=8, heads=2, head_dim=4, gene_hidden=(5,), pool_hidden=3)
    return replace(config, **{"landmarks": 4, **changes})


def lively(config: AMMASurvConfig) -> AMMASurv:
    """In fp64, with importances and gates that are not 0."""
    model = AMMASurv(config).double().eval()
    for name, parameter in model.named_parameters():
        if "importance" in name or "gate_" in name:
            torch.nn.init.normal_(parameter)
        if name.endswith(("query.weight", "key.weight")):
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def batch(lengths: list[int] = LENGTHS) -> dict[str, Modality]:
    """Samples with everything, without slide, without cnv, slide alone, nothing."""
    ragged = Ragged.from_lengths(lengths)
    n = len(lengths)
    rna, cnv = torch.tensor(HAS_RNA[:n]), torch.tensor(HAS_CNV[:n])
    return {
        "rna": TableBatch(torch.randn(n, 6).double(), rna),
        "slide": BagBatch(torch.randn(ragged.total, 12).double(), ragged, ragged.lengths > 0),
        "cnv": TableBatch(torch.randn(n, 4).double(), cnv),
    }


def one(inputs: dict[str, Modality], b: int) -> dict[str, Modality]:
    slide = inputs["slide"]
    found: dict[str, Modality] = {
        name: TableBatch(inputs[name].values[b : b + 1], inputs[name].present[b : b + 1])
        for name in ("rna", "cnv")
    }
    ragged, present = slide.ragged.select([b]), slide.present[b : b + 1]
    found["slide"] = slide._replace(ragged=ragged, present=present)
    return found
