"""Walk over bags tile by tile: views on the CPU, gathered batches elsewhere."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from survfuse.native.core import native_core
from survfuse.ragged import Ragged

_CPU_TILE_BYTES = 4 << 20  # a tile is read three times, so it should stay in the cache
_DEVICE_TILE_BYTES = 64 << 20
_MIN_ROWS, _MAX_ROWS = 128, 8192


class Tile(NamedTuple):
    """Rows of one bag (CPU), or as many rows of every bag (other devices)."""

    bags: slice  # which bags of the batch
    rows: slice | Tensor  # where their rows lie: a slice, or [B, n] indices
    valid: Tensor | None  # [B, n] bool, None where all are
    position: int  # of the first row within its bag
    packed: slice | Tensor  # where the per-patch results of these rows go, like `rows`

    def take(self, tensor: Tensor) -> Tensor:
        """The rows of `tensor` [T, ...], as [B, n, ...]."""
        return tensor[self.rows][None] if isinstance(self.rows, slice) else tensor[self.rows]


def tiles(ragged: Ragged, bag: Tensor, *, max_rows: int | None = None) -> Iterator[list[Tile]]:
    """The tiles of one group of bags after the other, of at most `max_rows` rows.

    On the CPU a group is one bag and its rows are views. On other devices the ranges are unknown to
    the host, and reading them would make it wait: all bags are one group, walked in lockstep, rows
    behind a bag's end are masked and rows behind the matrix' end clamped.
    """
    starts, lengths, _, max_length = ragged
    row_bytes = math.prod(bag.shape[1:]) * bag.element_size()
    max_rows = min(_MAX_ROWS, max_rows or _MAX_ROWS)
    if _known_to_host(starts):
        step = min(max(_CPU_TILE_BYTES // max(row_bytes, 1), _MIN_ROWS), max_rows)
        packed = 0
        for b, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
            group = []
            for at in range(0, length, step):
                n = min(step, length - at)
                rows = slice(start + at, start + at + n)
                out = slice(packed + at, packed + at + n)
                group.append(Tile(slice(b, b + 1), rows, None, at, out))
            packed += length
            yield group
        return
    n_bags = starts.shape[0]
    step = min(max(_DEVICE_TILE_BYTES // max(row_bytes * n_bags, 1), _MIN_ROWS), max_rows)
    first = lengths.cumsum(0) - lengths
    group = []
    for at in range(0, max_length, step):
        offset = at + torch.arange(min(step, max_length - at), device=starts.device)
        valid = offset < lengths[:, None]
        inside = torch.where(valid, offset, 0)
        rows = (starts[:, None] + inside).clamp(0, bag.shape[0] - 1)
        out = first[:, None] + inside
        group.append(Tile(slice(None), rows, valid, at, out))
    yield group


def _known_to_host(starts: Tensor) -> bool:
    return starts.device.type == "cpu"


def operand_type(bag: Tensor, *, centred: bool) -> torch.dtype:
    """The type in which tiles are multiplied: that of the bag where the sum still comes out wide.

    torch's 16-bit products on the CPU round their result to 16 bits. That costs little only where
    rows are centred (a mean far from zero would swallow what the softmax and its gradient are made
    of), and pays only where the processor multiplies matrices of bf16.
    """
    if bag.dtype in (torch.float32, torch.float64) or bag.device.type == "cuda":
        return bag.dtype
    if bag.dtype == torch.bfloat16 and centred and multiplies_bf16():
        return bag.dtype
    return torch.float32


@functools.cache
def multiplies_bf16() -> bool:
    """Whether this processor has matrix units for bf16 (AMX)."""
    core = native_core()
    return core is not None and bool(core.machine_info()["amx_bf16"])


def product(left: Tensor, right: Tensor) -> Tensor:
    """left [B, m, k] @ right [B, k, n]; fp32 (fp64 for fp64) whatever it multiplies."""
    if left.shape[0] == 1:
        left, right = left[0], right[0]
        return _wide(torch.mm, left, right)[None]
    return _wide(torch.bmm, left, right)


def _wide(multiply, left: Tensor, right: Tensor) -> Tensor:
    if left.dtype in (torch.float32, torch.float64):
        return multiply(left, right)
    if left.device.type == "cuda":
        return multiply(left, right, out_dtype=torch.float32)
    # sums in fp32 and rounds its result once: see operand_type
    return multiply(left, right).float()
