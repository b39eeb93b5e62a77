"""Launch shapes of `spread_tokens`. Reasons and the register table: docs/kernels.md."""

from __future__ import annotations

from .pool_bag_shapes import Limits, Problem, next_power

TILES = 4  # tiles of a piece, which repay its partial of d_values


def blocks(
    problem: Problem, limits: Limits, *, heads: int, keys: int, value_dim: int
) -> dict[str, int]:
    """Blocks of the forward and of the sums over patches; `problem` is that of the bag."""
    half = problem.half
    roomy = half and problem.aligned and limits.shared_bytes > 100_000
    most = 64 if roomy else 32
    block_l = max(16, min(next_power(keys), most))
    block_v = min(max(16, next_power(value_dim)), 64 if roomy else 32)
    return {
        # a multiple of the tiles of the product with the bag, which follows
        "BLOCK_N": 64 if half else 32,
        "BLOCK_H": min(next_power(heads), most // block_l),
        "BLOCK_L": block_l,
        "BLOCK_K": 64 if roomy else 32 if half else 16,
        "BLOCK_V": block_v,
        "num_warps": 8,
        "num_stages": 3 if roomy else 2 if half else 1,
    }


def trained_blocks(problem: Problem, shape: dict[str, int]) -> dict[str, int]:
    """Blocks of spread_tokens_bag_kernel."""
    widest = 256 if problem.half else 128
    return {
        **shape,
        "BLOCK_N": 32,
        "BLOCK_D": min(widest, max(16, next_power(problem.width))),
        "num_stages": min(2, shape["num_stages"]),
    }
