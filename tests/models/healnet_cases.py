"""A small HEALNet with one modality of every kind, and batches for it."""

from __future__ import annotations

from dataclasses import replace

import torch

from survfuse import Ragged
from survfuse.batch import ArrayBatch, BagBatch, GraphBatch, Modality, TableBatch
from survfuse.models import HEALNetConfig, ModalityConfig

LENGTHS = [6, 1, 4]
MODALITIES = {
    "genes": ModalityConfig("table", 7),
    "panel": ModalityConfig("table", 5, axes=1, table_tokens="features"),
    "slide": ModalityConfig("bag", 12, axes=1),
    "plain": ModalityConfig("bag", 8),
    "scan": ModalityConfig("array", 3, axes=2),
    "cells": ModalityConfig("graph", 6, walk_steps=3),
}


def small(**changes: object) -> HEALNetConfig:
    config = HEALNetConfig(
        MODALITIES, depth=2, n_latents=3, latent_dim=10, cross_heads=2, cross_head_dim=4
    )
    return replace(config, latent_heads=2, latent_head_dim=4, **changes)


def bag(width: int, lengths: list[int] = LENGTHS) -> BagBatch:
    ragged = Ragged.from_lengths(lengths)
    return BagBatch(torch.randn(ragged.total, width), ragged, ragged.lengths > 0)


def all_inputs() -> dict[str, Modality]:
    present = torch.ones(3, dtype=torch.bool)
    slide = bag(12)
    graph = bag(6)
    edges = torch.cat([torch.randint(0, 6, (2, 9)), torch.randint(7, 11, (2, 5))], 1)
    return {
        "genes": TableBatch(torch.randn(3, 7), present),
        "panel": TableBatch(torch.randn(3, 5), present),
        "slide": slide,
        "plain": bag(8),
        "scan": ArrayBatch(torch.randn(3, 4, 2, 3), present),
        "cells": GraphBatch(graph.features, graph.ragged, edges, present),
    }


def without(inputs: dict[str, Modality], name: str, samples: list[int]) -> dict[str, Modality]:
    """The modality `name` absent for `samples`, as a data loader says it."""
    batch = inputs[name]
    present = batch.present.clone()
    present[samples] = False
    if isinstance(batch, TableBatch | ArrayBatch):
        values = batch.values.clone()
        values[samples] = 0.0
        return {**inputs, name: type(batch)(values, present)}
    lengths = batch.ragged.lengths.clone()
    lengths[samples] = 0
    ragged = Ragged.from_ranges(batch.ragged.starts, lengths)
    return {**inputs, name: batch._replace(ragged=ragged, present=present)}


def one_sample(inputs: dict[str, Modality], b: int) -> dict[str, Modality]:
    found: dict[str, Modality] = {}
    for name, batch in inputs.items():
        if isinstance(batch, TableBatch | ArrayBatch):
            found[name] = type(batch)(batch.values[b : b + 1], batch.present[b : b + 1])
        else:
            ragged = batch.ragged.select([b])
            found[name] = batch._replace(ragged=ragged, present=batch.present[b : b + 1])
    return found


CONFIGS = {
    "paper": {},
    "untied": {"weight_sharing": "none"},
    "released": {
        "weight_sharing": "after_first",
        "depth": 3,
        "latent_blocks": 1,
        "latent_blocks_when_absent": True,
        "temperature": 0.5,
        "output_slope": 0.01,
        "activation": "gelu",
    },
    "blocks": {"latent_blocks": 2},
}
