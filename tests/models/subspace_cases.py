"""A small subspace fusion, batches of sparse slides, and what is absent from them."""

from __future__ import annotations

from dataclasses import replace

import torch

from survfuse import Ragged
from survfuse.batch import BagBatch, Modality, TableBatch
from survfuse.models import ModalityConfig, SubspaceFusionConfig

GROUPS = {"tumor": (0, 2, 4), "microenvironment": (1, 3, 5, 6)}
MODALITIES = {
    "genes": ModalityConfig("table", 7, groups=GROUPS),
    "slides": ModalityConfig("bag", 9),
}
LENGTHS = [40, 1, 23]

CONFIGS = {
    "paper": {},
    "gated": {"pool": "attention", "pool_width": 5},
    "genes ask": {"pool": "genes", "pool_heads": 2, "pool_temperature": 0.5},
    "genes ask maps": {"pool": "genes", "layout": "fixed", "map_side": 6},
    "table": {"bias": "table", "table_size": 16, "downsample": 3, "offset_scale": 1.5},
    "square": {"layout": "square"},
    "fixed": {"layout": "fixed", "map_side": 6},
    "released": {
        "layout": "fixed",
        "map_side": 9,
        "released": True,
        "consistency": "released",
    },
    "without": {"consistency": "none", "offset_groups": 1, "corners": "renormalise"},
}


def small(**changes: object) -> SubspaceFusionConfig:
    config = SubspaceFusionConfig(
        MODALITIES, dim=16, gene_widths=(6,), heads=2, dim_head=4, patch_size=256.0
    )
    return replace(config, **changes)


def slides(
    lengths: list[int] = LENGTHS, width: int = 9, dtype: torch.dtype = torch.float32
) -> BagBatch:
    """Bags at random cells of a map of 9 x 8."""
    ragged = Ragged.from_lengths(lengths)
    cells = [torch.randperm(72)[:n] for n in lengths]
    coords = torch.cat([torch.stack([c % 9, c // 9], 1) for c in cells]) * 256.0
    features = torch.randn(ragged.total, width, dtype=dtype)
    return BagBatch(features, ragged, ragged.lengths > 0, coords)


def batch(lengths: list[int] = LENGTHS, dtype: torch.dtype = torch.float32) -> dict[str, Modality]:
    n = len(lengths)
    genes = TableBatch(torch.randn(n, 7, dtype=dtype), torch.ones(n, dtype=torch.bool))
    return {"genes": genes, "slides": slides(lengths, dtype=dtype)}


def without(inputs: dict[str, Modality], name: str, samples: list[int]) -> dict[str, Modality]:
    """The modality absent for `samples`; what is stored there is NaN."""
    found = inputs[name]
    present = found.present.clone()
    present[samples] = False
    if isinstance(found, TableBatch):
        values = found.values.clone()
        values[samples] = torch.nan
        return {**inputs, name: TableBatch(values, present)}
    lengths, features = found.ragged.lengths.clone(), found.features.clone()
    for b in samples:
        first = int(found.ragged.starts[b])
        features[first : first + int(lengths[b])] = torch.nan
    lengths[samples] = 0
    ragged = Ragged.from_ranges(found.ragged.starts, lengths)
    return {**inputs, name: found._replace(features=features, ragged=ragged, present=present)}


def one_sample(inputs: dict[str, Modality], b: int) -> dict[str, Modality]:
    table, bag = inputs["genes"], inputs["slides"]
    return {
        "genes": TableBatch(table.values[b : b + 1], table.present[b : b + 1]),
        "slides": bag._replace(ragged=bag.ragged.select([b]), present=bag.present[b : b + 1]),
    }
