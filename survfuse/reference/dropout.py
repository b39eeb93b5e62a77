"""The dropout mask every backend draws: Philox 4x32-10 on (seed, bag, row, position in bag).

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. The counter is
(position, row, bag, 0), the key the two halves of the 64-bit seed, and the first of the four output
words decides. A mask is a function of its place, so forward, backward, recomputation under
checkpoint and every tiling of the bag see the same one.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def draw_seed(device: torch.device) -> Tensor:
    """A 64-bit seed [1] drawn by the device's own generator: no host value, no synchronisation."""
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)


def keep_threshold(dropout_p: float) -> int:
    """A word below this is dropped."""
    return min(round(dropout_p * 2**32), _LOW)


def keep_mask(seed: Tensor, bag: Tensor | int, rows: Tensor, positions: Tensor, p: float) -> Tensor:
    """True where a weight is kept.

    Args:
        seed: [1] int64.
        bag: index of the bag in the batch: a number, or [N, 1] int64 beside `positions`.
        rows: [R] int64 query rows.
        positions: [N] int64 positions in the bag.
        p: the probability of being dropped.

    Returns:
        [R, N] bool for a number `bag`.
    """
    c0, c1 = torch.broadcast_tensors(positions[None, :], rows[:, None])
    c2 = torch.as_tensor(bag, device=c0.device, dtype=torch.int64).expand_as(c0)
    return _philox_word(seed, c0, c1, c2) >= keep_threshold(p)


def _philox_word(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor) -> Tensor:
    c3 = torch.zeros_like(c0)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    # torch has no unsigned 64-bit product: two products of 32 by 16 bits stay below 2^48
    upper, lower = a * (b >> 16), a * (b & 0xFFFF)
    middle = upper + (lower >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (lower & 0xFFFF)
