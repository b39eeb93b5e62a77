"""What a model is given and what it gives back: one named tuple per kind of modality.

A batch is a dictionary from modality name to one of these. Every modality says by `present` which
samples have it, so that any modality may be missing for any sample.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from survfuse.ragged import Ragged


class BagBatch(NamedTuple):
    """One bag of patch features per sample, packed."""

    features: Tensor  # [T, D]; may hold rows of other samples, which are never read
    # one range per sample, length 0 where the bag is absent. Rows of a bag that `present` alone
    # denies have no say; away from the CPU they must be finite, as they are multiplied there
    ragged: Ragged
    present: Tensor  # [B] bool
    coords: Tensor | None = None  # [T, 2] level-0 pixels of each patch's corner

    def to(self, device: torch.device | str) -> BagBatch:
        coords = None if self.coords is None else self.coords.to(device)
        return BagBatch(
            self.features.to(device), self.ragged.to(device), self.present.to(device), coords
        )


class TableBatch(NamedTuple):
    """One row of numbers per sample."""

    values: Tensor  # [B, F]; zeros where absent
    present: Tensor  # [B] bool

    def to(self, device: torch.device | str) -> TableBatch:
        return TableBatch(self.values.to(device), self.present.to(device))


class ArrayBatch(NamedTuple):
    """One array with spatial axes per sample, channels last."""

    values: Tensor  # [B, *axes, C]; zeros where absent
    present: Tensor  # [B] bool

    def to(self, device: torch.device | str) -> ArrayBatch:
        return ArrayBatch(self.values.to(device), self.present.to(device))


class GraphBatch(NamedTuple):
    """One graph per sample: packed node features and edges between packed rows."""

    features: Tensor  # [T, D]
    ragged: Ragged  # one range of nodes per sample
    edges: Tensor  # [2, E] int64, rows of `features`
    present: Tensor  # [B] bool

    def to(self, device: torch.device | str) -> GraphBatch:
        return GraphBatch(
            self.features.to(device),
            self.ragged.to(device),
            self.edges.to(device),
            self.present.to(device),
        )


Modality = BagBatch | TableBatch | ArrayBatch | GraphBatch


class ModelOutput(NamedTuple):
    """What every model returns."""

    # by task [B, out]: hazard logits, a Cox log-risk, class logits, continuation logits of levels
    logits: dict[str, Tensor]
    embeddings: dict[str, Tensor]
    auxiliary: dict[str, Tensor]  # further losses by name, already weighted


class Batch(NamedTuple):
    """A minibatch of a cohort."""

    inputs: dict[str, Modality]
    time: Tensor  # [B] float32, months
    event: Tensor  # [B] bool, True where the event was seen
    label: Tensor  # [B] int64, time bin, -1 where unknown
    rows: Tensor  # [B] int64, rows of the cohort
    # by name [B] int64, a class, -1 where unknown; never written to
    targets: dict[str, Tensor] = {}  # noqa: RUF012

    def to(self, device: torch.device | str) -> Batch:
        inputs = {name: modality.to(device) for name, modality in self.inputs.items()}
        outcomes = (tensor.to(device) for tensor in self[1:5])
        targets = {name: label.to(device) for name, label in self.targets.items()}
        return Batch(inputs, *outcomes, targets)
