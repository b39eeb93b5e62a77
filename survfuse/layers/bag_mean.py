"""The mean of the rows of every bag."""

from __future__ import annotations

import torch
from torch import Tensor

from survfuse.ops import pool_bag
from survfuse.ops.checks import check_bag
from survfuse.ops.registration import check_ranges
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
    check_bag(bag)
    bag, ragged = as_packed(bag, ragged)
    kind = accumulation_type(bag.dtype)
    if backend is None and _is_one_bag(bag, ragged):
        # torch's own sum is the quickest
        check_ranges(bag, ragged)
        return bag.sum(0, keepdim=True, dtype=kind) / max(1, ragged.total)
    # a zero query gives every row the same weight
    query = bag.new_zeros(ragged.n_bags, 1, bag.shape[1], dtype=kind)
    return pool_bag(query, bag, ragged=ragged, backend=backend).pooled[:, 0]


def _is_one_bag(bag: Tensor, ragged: Ragged) -> bool:
    """Whether a single bag fills the matrix; a graph being compiled is not to depend on that."""
    compiling = torch.compiler.is_compiling()
    return not compiling and ragged.n_bags == 1 and ragged.total == bag.shape[0]
