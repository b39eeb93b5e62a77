"""What every implementation of `cross_attention` is told, and what it returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from survfuse.ragged import Ragged


class Attended(NamedTuple):
    """What an attention returns with one result per query; its gradients come in this order."""

    out: Tensor  # [total, H, dv], dtype of the query
    lse: Tensor  # [total, H], fp32 (fp64 for fp64)


class Attention(NamedTuple):
    """Who attends to whom: all that is not differentiable, in the order of the registered ops."""

    query_starts: Tensor  # [B] int64, the first query row of each bag
    query_lengths: Tensor  # [B] int64
    query_total: int  # query rows of all bags
    query_max: int  # query rows of the bag that has most
    key_starts: Tensor  # [B]
    key_lengths: Tensor  # [B]
    key_total: int
    key_max: int
    scale: float  # of the dot products
    dropout_p: float = 0.0
    seed: Tensor | None = None  # [1] int64; None without dropout

    @property
    def query_ragged(self) -> Ragged:
        """The ranges of the queries."""
        return Ragged(*self[:4])

    @property
    def key_ragged(self) -> Ragged:
        """The ranges of the keys."""
        return Ragged(*self[4:8])


class AttentionNeeds(NamedTuple):
    """Which gradients of `cross_attention` are wanted."""

    query: bool
    key: bool
    value: bool
    bias: bool
