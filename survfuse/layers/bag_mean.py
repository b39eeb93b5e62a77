"""The mean of the rows of every bag."""

from __future__ import annotations

from torch import Tensor

from survfuse.ops import pool_bag
from survfuse.pooling import accumulation_type
from survfuse.ragged import Ragged, as_packed


def bag_mean(bag: Tensor, ragged: Ragged | None = None, *, backend: str | None = None) -> Tensor:
    """The mean of the rows of every bag, summed in fp32 (fp64).

    Args:
        bag: [T, D] packed, described by `ragged`; or dense [B, N, D].
        ragged: the ranges of a packed bag.
        backend: of `survfuse.ops.pool_bag`.

    Returns:
        [B, D] fp32 (fp64 for fp64); zeros for a bag without rows.

    Example:
        >>> import torch
        >>> bag_mean(torch.tensor([[1.0], [3.0], [5.0]]), Ragged.from_lengths([2, 0, 1])).tolist()
        [[2.0], [0.0], [5.0]]
    """
    bag, ragged = as_packed(bag, ragged)
    # a zero query gives every row the same weight
    query = bag.new_zeros(ragged.n_bags, 1, bag.shape[1], dtype=accumulation_type(bag.dtype))
    return pool_bag(query, bag, ragged=ragged, backend=backend).pooled[:, 0]
