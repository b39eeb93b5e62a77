"""Fewer patches, or patches in other places: what a model's use of them is measured against."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from survfuse.batch import BagBatch
from survfuse.data.bags import empty_rows
from survfuse.data.modalities import BagModality, BagSource
from survfuse.ragged import Ragged

if TYPE_CHECKING:
    from survfuse.data.cohort import Cohort

_KEEP, _SHUFFLE = 0, 1


class PatchSubset:
    """Bags of which each keeps a fixed random part of its patches.

    Which patches are kept depends on the seed and the bag's name alone, so a bag has the same ones
    in every cohort, batch and epoch. Nothing is copied before a batch is asked for, and then only
    what it holds.

    Args:
        bags: the whole bags.
        fraction: share of each bag's patches that are kept, in (0, 1]; at least one of a bag that
            has any, in their order.
        shuffle_coords: deal the coordinates of the patches that are kept out anew among them, a
            negative control for models that read them.
        seed: of both draws.

    Raises:
        ValueError: `fraction` is out of range.
    """

    def __init__(
        self,
        bags: BagSource,
        *,
        fraction: float = 1.0,
        shuffle_coords: bool = False,
        seed: int = 0,
    ) -> None:
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction is {fraction}; it must be above 0 and at most 1")
        self.bags = bags
        self.fraction = fraction
        self.shuffle_coords = shuffle_coords
        self.seed = seed
        self.names = list(bags.names)
        whole = bags.lengths
        kept = (whole.double() * fraction).round().long().clamp(min=1)
        self.lengths = torch.where(whole > 0, kept, 0)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def width(self) -> int:
        """Features per patch, D."""
        return self.bags.width

    def batch(
        self, groups: Sequence[Sequence[int]], *, device: torch.device | str | None = None
    ) -> BagBatch:
        """A minibatch, as `Bags.batch`; the rows that are kept, and no other, are copied.

        With `fraction` 1 only coordinates are.
        """
        if self.fraction == 1:
            return self._shuffled(self.bags.batch(groups, device=device), groups)
        flat = [int(i) for group in groups for i in group]
        found = self.bags.batch([[i] for i in flat])
        starts = found.ragged.starts.tolist()
        chosen = [self.kept(i) + start for i, start in zip(flat, starts)]
        rows = torch.cat(chosen) if chosen else torch.empty(0, dtype=torch.int64)
        rows = rows.to(found.features.device)
        lengths = [sum(int(self.lengths[i]) for i in group) for group in groups]
        source = found.features
        features = empty_rows(len(rows), self.width, dtype=source.dtype, device=source.device)
        torch.index_select(source, 0, rows, out=features)
        coords = None if found.coords is None else found.coords[rows]
        present = torch.tensor([n > 0 for n in lengths], dtype=torch.bool)
        ragged = Ragged.from_lengths(lengths, device="cpu")
        device = source.device if device is None else device
        return self._shuffled(BagBatch(features, ragged, present, coords), groups).to(device)

    def kept(self, index: int) -> Tensor:
        """The rows of one bag that are kept, rising, [n]."""
        n = int(self.bags.lengths[index])
        order = self._generator(index, _KEEP).permutation(n)[: int(self.lengths[index])]
        return torch.from_numpy(np.sort(order))

    def _shuffled(self, batch: BagBatch, groups: Sequence[Sequence[int]]) -> BagBatch:
        if not self.shuffle_coords or batch.coords is None:
            return batch
        # the stored coordinates stay as they are: the batch may hold them and not a copy
        coords = batch.coords.clone()
        for begin, group in zip(batch.ragged.starts.tolist(), groups):
            for i in group:
                n = int(self.lengths[i])
                order = torch.from_numpy(self._generator(int(i), _SHUFFLE).permutation(n))
                part = slice(begin, begin + n)
                coords[part] = batch.coords[part][order.to(coords.device)]
                begin += n
        return batch._replace(coords=coords)

    def _generator(self, index: int, stream: int) -> np.random.Generator:
        name = zlib.crc32(self.names[index].encode())
        return np.random.default_rng((self.seed, stream, name))


def with_patch_subset(
    cohort: Cohort, *, fraction: float = 1.0, shuffle_coords: bool = False, seed: int = 0
) -> Cohort:
    """The cohort with `PatchSubset` of all its bags, and a note that says so.

    Raises:
        ValueError: `fraction` is out of range, or there are no bags.
    """
    bags = {n: s for n, s in cohort.modalities.items() if isinstance(s, BagModality)}
    if not bags:
        raise ValueError(f"{cohort.name} has no bags to take patches of")
    changed = dict(cohort.modalities)
    for name, source in bags.items():
        subset = PatchSubset(
            source.bags, fraction=fraction, shuffle_coords=shuffle_coords, seed=seed
        )
        changed[name] = dataclasses.replace(source, bags=subset)
    notes = []
    if fraction < 1:
        notes.append(f"every bag is a fixed random {100 * fraction:g} % of its patches")
    if shuffle_coords:
        notes.append(
            "coordinates are dealt out anew among the patches of each bag: a negative control, "
            "from which no model can read where anything lies"
        )
    return dataclasses.replace(cohort, modalities=changed, notes=(*cohort.notes, *notes))
