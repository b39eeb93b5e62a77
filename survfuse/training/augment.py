"""Random changes to training batches that a model must not care about."""

from __future__ import annotations

from typing import NamedTuple

import torch

from survfuse.batch import BagBatch, Modality, TableBatch
from survfuse.ragged import Ragged
from survfuse.training.config import AugmentConfig


class Augmentation(NamedTuple):
    """Random changes to the modalities of training batches, drawn anew at every call.

    Random numbers come from torch's global generators, so that a resumed run draws what an
    undisturbed one would have. Arrays and graphs stay as they are.
    """

    settings: AugmentConfig

    def __call__(self, modality: Modality, *, blocks: int = 1) -> Modality:
        """The modality changed; see `survfuse.data.modalities.Change` for `blocks`."""
        settings = self.settings
        if isinstance(modality, TableBatch) and settings.table_dropout:
            # the remaining columns grow, so that sums over them keep their size
            values = torch.nn.functional.dropout(modality.values, settings.table_dropout)
            return modality._replace(values=values)
        if isinstance(modality, BagBatch):
            if settings.patch_dropout:
                modality = drop_patches(modality, settings.patch_dropout)
            if settings.slide_shift:
                modality = shift_slides(modality, settings.slide_shift, blocks=blocks)
        return modality


def drop_patches(batch: BagBatch, fraction: float) -> BagBatch:
    """Each bag without a random `fraction` of its patches; at least one of them stays."""
    ragged = batch.ragged
    bag, place, row = ragged.bags(), ragged.places(), ragged.rows()
    # in random order within each bag: bags ascend, and half of a draw never passes to the next
    draw = torch.rand(ragged.total, device=bag.device, dtype=torch.float64)
    order = (bag + 0.5 * draw).argsort()
    kept = (ragged.lengths * (1.0 - fraction)).ceil().long().clamp(min=1).minimum(ragged.lengths)
    chosen = order[place < kept[bag]].sort().values
    row = row[chosen]
    coords = None if batch.coords is None else batch.coords[row]
    ragged = Ragged.from_lengths(kept)
    return batch._replace(features=batch.features[row], ragged=ragged, coords=coords)


def shift_slides(batch: BagBatch, size: float, *, blocks: int = 1) -> BagBatch:
    """Every patch of a bag moved by one random vector, as another scanner or stain would.

    The vector moves each of `blocks` equal parts of the features; its size goes by the first.
    """
    ragged, features = batch.ragged, batch.features
    if ragged.total == 0:
        return batch
    row = ragged.rows()
    rows = features[row]
    # in units of the spread of each feature over the patches of the batch
    own = features.shape[1] // blocks
    spread = rows[:, :own].float().std(0, correction=0)
    shift = torch.randn(ragged.n_bags, own, device=features.device)
    shift = (size * shift * spread).to(features.dtype).repeat(1, blocks)
    coords = None if batch.coords is None else batch.coords[row]
    return batch._replace(
        features=rows + ragged.per_patch(shift), ragged=ragged.packed(), coords=coords
    )
