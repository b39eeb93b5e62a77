"""Launch shapes of `spread_tokens`. Reasons and the register table: docs/kernels.md."""

from __future__ import annotations

import torch

from .pool_bag_shapes import Limits, Problem, next_power

TILES = 4  # tiles of a piece, which repay its partial of d_values


def blocks(
    problem: Problem,
    limits: Limits,
    *,
    heads: int,
    keys: int,
    value_dim: int,
    crowded: bool,
    backward: bool,
) -> dict[str, int]:
    """Blocks of the forward and of the sums over patches; `problem` is that of the bag.

    `crowded`: a mask of dropout or keys to round, which cost registers.
    """
    half = problem.half
    roomy = half and problem.aligned and limits.shared_bytes > 100_000
    # keys of a block over all its heads: the backward holds two tiles of them and d_values
    most = 64 if roomy and not backward else 16 if half and not roomy and backward else 32
    longest = 16 if backward and not half else most
    crowded = crowded or problem.dtype == torch.float16
    block_l = max(16, min(next_power(keys), longest))
    values = 32 if not roomy or (backward and crowded) else 64
    if problem.dtype == torch.float16 and not roomy and backward:
        values = 16
    block_h = min(next_power(heads), most // block_l)
    return {
        # a multiple of the tiles of the product with the bag, which follows
        "BLOCK_N": 64 if half and problem.aligned else 32,
        "BLOCK_H": block_h,
        "BLOCK_L": block_l,
        "BLOCK_K": 64 if roomy else 32 if half else 16,
        "BLOCK_V": min(max(16, next_power(value_dim)), values),
        "num_warps": 8 if half or backward or block_h * block_l > 16 else 4,
        "num_stages": 3 if roomy else 2 if half else 1,
    }


def trained_blocks(problem: Problem, shape: dict[str, int], *, crowded: bool) -> dict[str, int]:
    """Blocks of spread_tokens_bag_kernel."""
    tight = crowded or problem.normalize or not problem.aligned
    widest = 256 if problem.half and not tight else 128
    return {
        **shape,
        "num_warps": 8,
        "BLOCK_N": 16 if crowded and problem.normalize and problem.half else 32,
        "BLOCK_D": min(widest, max(16, next_power(problem.width))),
        "num_stages": min(2, shape["num_stages"]),
    }
