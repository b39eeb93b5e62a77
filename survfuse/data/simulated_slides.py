"""Simulated slides: a tumour, rare aggressive patches, and lymphoid aggregates near it or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from survfuse.batch import BagBatch
from survfuse.data.bags import Bags, empty_rows
from survfuse.ragged import Ragged

STROMA, TUMOUR, AGGRESSIVE, LYMPHOID = range(4)
PATCH_SIZE = 256  # level-0 pixels
FIELD_SIGMA = 5.0  # cells
TUMOUR_SHARE = 0.4
N_AGGREGATES = 8
NEAR, FAR = 3, 6  # cells between an aggregate's centre and the nearest tumour, Chebyshev
TYPE_STRENGTH, SLIDE_NOISE = 4.0, 0.3
_CHUNK = 8192


@dataclass(frozen=True, eq=False)
class SlideMaps:
    """Patch types of slides on square grids, every cell of which is a patch.

    Attributes:
        types: per slide [side * side] int8, row by row: 0 stroma, 1 tumour, 2 aggressive tumour,
            3 lymphoid.
        n_aggressive: [n] patches of type 2.
        near_share: [n] realised share of the aggregates within 3 cells of tumour.
    """

    types: tuple[NDArray[np.int8], ...]
    n_aggressive: NDArray[np.int64]
    near_share: NDArray[np.float64]

    @property
    def n_patches(self) -> NDArray[np.int64]:
        """[n] patches of each slide."""
        return np.array([types.size for types in self.types], dtype=np.int64)


def simulate_slide_maps(
    sides: NDArray[np.int64],
    *,
    aggressive_log_rate: NDArray[np.float64],
    near_probability: NDArray[np.float64],
    seed: int,
) -> SlideMaps:
    """Draw the patch types of slides.

    Tumour is a smooth Gaussian field above its 60 % quantile. Of its patches,
    max(1, Poisson(n_tumour * exp(aggressive_log_rate))) are aggressive. Eight aggregates of 3 x 3
    lymphoid patches lie outside the tumour, the centre of each with `near_probability` 2 or 3
    cells from it, else at least 6. They never overlap, so their number of patches tells nothing;
    only their place does. Where no such cell is free the farthest class that has one is taken.

    Args:
        sides: [n] side of each grid, in cells; at least 12.
        aggressive_log_rate: [n].
        near_probability: [n].
        seed: slide i depends on (seed, i) and its own arguments only.
    """
    n = len(sides)
    types: list[NDArray[np.int8]] = [np.empty(0, dtype=np.int8)] * n
    n_aggressive, near_share = np.zeros(n, dtype=np.int64), np.zeros(n)
    # slides of one size are drawn together; a long slide is a block of its own
    for side in np.unique(sides):
        rows = np.flatnonzero(sides == side)
        block = max(1, 2_000_000 // int(side) ** 2)
        for begin in range(0, rows.size, block):
            part = rows[begin : begin + block]
            maps, near = _draw(
                int(side), part, aggressive_log_rate[part], near_probability[part], seed
            )
            for row, cells in zip(part, maps):
                types[row] = cells
            n_aggressive[part] = (maps == AGGRESSIVE).sum(1)
            near_share[part] = near
    return SlideMaps(tuple(types), n_aggressive, near_share)


def _draw(
    side: int,
    rows: NDArray[np.int64],
    log_rate: NDArray[np.float64],
    near_probability: NDArray[np.float64],
    seed: int,
) -> tuple[NDArray[np.int8], NDArray[np.float64]]:
    """Types [n, side * side] and the realised near share [n] of slides of one size."""
    n = rows.size
    noise = np.empty((n, side, side), dtype=np.float32)
    priority = np.empty((2, n, side, side), dtype=np.float32)
    wants_near = np.empty((n, N_AGGREGATES), dtype=bool)
    counts = np.empty(n, dtype=np.int64)
    n_tumour = round(TUMOUR_SHARE * side * side)
    for i, row in enumerate(rows):
        rng = np.random.default_rng((seed, int(row), 0))
        rng.standard_normal(dtype=np.float32, out=noise[i])
        rng.random(dtype=np.float32, out=priority[0, i])
        rng.random(dtype=np.float32, out=priority[1, i])
        wants_near[i] = rng.random(N_AGGREGATES) < near_probability[i]
        counts[i] = np.clip(rng.poisson(n_tumour * np.exp(log_rate[i])), 1, n_tumour)
    smooth = _smoothing(side)
    field = (smooth @ noise @ smooth.T).reshape(n, -1)
    # exactly the share, where a quantile would depend on how it interpolates
    order = np.argpartition(-field, n_tumour, axis=1)[:, :n_tumour]
    tumour = np.zeros((n, side * side), dtype=bool)
    np.put_along_axis(tumour, order, True, axis=1)
    types = tumour.astype(np.int8)
    weight = np.where(tumour, priority[0].reshape(n, -1), -1.0)
    for i in range(n):
        types[i, np.argpartition(-weight[i], counts[i] - 1)[: counts[i]]] = AGGRESSIVE
    near = _place_aggregates(types, tumour.reshape(n, side, side), wants_near, priority[1])
    return types, near


def _place_aggregates(
    types: NDArray[np.int8],
    tumour: NDArray[np.bool_],
    wants_near: NDArray[np.bool_],
    priority: NDArray[np.float32],
) -> NDArray[np.float64]:
    """Write lymphoid cells into `types`; the share of aggregates that lie near, [n]."""
    n, side, _ = tumour.shape
    # 0: 3 x 3 cells there would touch tumour; 1: near; 2: between; 3: far
    distance = np.full(tumour.shape, 3, dtype=np.int8)
    for level, radius in ((2, FAR - 1), (1, NEAR), (0, 1)):
        distance[_dilate(tumour, radius)] = level
    free = distance > 0
    free[:, [0, -1]] = False
    free[:, :, [0, -1]] = False
    slides = np.arange(n)
    grid = types.reshape(n, side, side)
    near = np.zeros(n)
    for k in range(N_AGGREGATES):
        # the wanted class first, then the farther before the nearer; ties by random priority
        rank = np.where(distance == np.where(wants_near[:, k], 1, 3)[:, None, None], 4, distance)
        score = np.where(free, rank + priority, -1.0).reshape(n, -1)
        best = score.argmax(1)
        y, x = best // side, best % side
        if (score[slides, best] < 0).any():
            raise ValueError(f"sides: a slide of {side} x {side} cells has no room for aggregates")
        near += distance[slides, y, x] == 1
        for dy in range(-2, 3):
            for dx in range(-2, 3):
                yy, xx = np.clip(y + dy, 0, side - 1), np.clip(x + dx, 0, side - 1)
                free[slides, yy, xx] = False
                if abs(dy) <= 1 and abs(dx) <= 1:
                    grid[slides, yy, xx] = LYMPHOID
    return near / N_AGGREGATES


def _smoothing(side: int) -> NDArray[np.float32]:
    """[side, side] Gaussian weights with rows of norm 1, so that the field has one variance."""
    cells = np.arange(side)
    weights = np.exp(-((cells[:, None] - cells) ** 2) / (2 * FIELD_SIGMA**2))
    return (weights / np.linalg.norm(weights, axis=1, keepdims=True)).astype(np.float32)


def _dilate(mask: NDArray[np.bool_], radius: int) -> NDArray[np.bool_]:
    """Cells within `radius` of a set cell, the larger of the two axis distances."""
    for axis in (1, 2):
        out = mask.copy()
        for shift in range(1, radius + 1):
            low = [slice(None)] * 3
            high = [slice(None)] * 3
            low[axis], high[axis] = slice(None, -shift), slice(shift, None)
            out[tuple(low)] |= mask[tuple(high)]
            out[tuple(high)] |= mask[tuple(low)]
        mask = out
    return mask


class SimulatedBags:
    """Patch features of simulated slides, made when asked for and then the same every time.

    `x = 4 u_type + slide noise + N(0, I)` with orthonormal u, and slide noise N(0, .3^2 I) shared
    by a slide's patches. Holds one byte per patch; `materialise` turns it into `Bags`.

    Args:
        maps: patch types of the slides.
        names: one per slide.
        width: features per patch, D, at least 4.
        seed: slide i depends on (seed, i) only.
        dtype: of the features.
    """

    def __init__(
        self,
        maps: SlideMaps,
        names: Sequence[str],
        *,
        width: int,
        seed: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if width < 4:
            raise ValueError(f"width is {width}; four patch types need at least 4 features")
        if len(names) != len(maps.types):
            raise ValueError(f"there are {len(maps.types)} slides and {len(names)} names")
        self.maps = maps
        self.names = [str(name) for name in names]
        self.width = width
        self.dtype = dtype
        self.lengths = torch.from_numpy(maps.n_patches)
        self._seed = seed
        frame = np.random.default_rng((seed, 2**31)).standard_normal((width, 4))
        self._means = (TYPE_STRENGTH * np.linalg.qr(frame)[0].T).astype(np.float32)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Tensor:
        """The features of one slide, `[N, D]`, newly made."""
        out = empty_rows(int(self.lengths[index]), self.width, dtype=self.dtype)
        self._fill(out, index)
        return out

    def coords_of(self, index: int) -> Tensor:
        """Level-0 pixel (x, y) of each patch's corner, `[N, 2]`."""
        n = int(self.lengths[index])
        cells = torch.arange(n)
        side = round(n**0.5)
        return torch.stack([cells % side, cells // side], dim=1).float() * PATCH_SIZE

    def batch(
        self, groups: Sequence[Sequence[int]], *, device: torch.device | str | None = None
    ) -> BagBatch:
        """The bags of `groups`, newly made: as `Bags.batch`, which see."""
        lengths = [sum(int(self.lengths[i]) for i in group) for group in groups]
        features = empty_rows(sum(lengths), self.width, dtype=self.dtype)
        flat = [i for group in groups for i in group]
        begin = 0
        for i in flat:
            end = begin + int(self.lengths[i])
            self._fill(features[begin:end], i)
            begin = end
        coords = torch.cat([self.coords_of(i) for i in flat]) if flat else torch.empty(0, 2)
        present = torch.tensor([bool(group) for group in groups], dtype=torch.bool)
        batch = BagBatch(features, Ragged.from_lengths(lengths, device="cpu"), present, coords)
        return batch if device is None else batch.to(device)

    def materialise(self) -> Bags:
        """All slides in one matrix in memory."""
        features = empty_rows(int(self.lengths.sum()), self.width, dtype=self.dtype)
        for i, rows in enumerate(features.split(self.lengths.tolist())):
            self._fill(rows, i)
        coords = torch.cat([self.coords_of(i) for i in range(len(self))])
        sizes = {"patch_size_level0": [float(PATCH_SIZE)] * len(self)}
        return Bags(features, self.lengths, self.names, coords=coords, attributes=sizes)

    def _fill(self, out: Tensor, index: int) -> None:
        types = self.maps.types[index]
        rng = np.random.default_rng((self._seed, index, 1))
        slide = SLIDE_NOISE * rng.standard_normal(self.width, dtype=np.float32)
        means = self._means + slide
        # in pieces: a long slide in fp32 would take twice its memory again
        for begin in range(0, types.size, _CHUNK):
            kinds = types[begin : begin + _CHUNK]
            rows = rng.standard_normal((kinds.size, self.width), dtype=np.float32)
            rows += means[kinds]
            out[begin : begin + _CHUNK].copy_(torch.from_numpy(rows))
