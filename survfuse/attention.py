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


class BlockSide(NamedTuple):
    """One side of `block_attention`: what it asks with, and what it is asked for."""

    query: Tensor | None = None  # [B, G, H, d], or packed [T, H, d]; None if no block asks for it
    key: Tensor | None = None  # the same rows; None if no block attends to this side
    value: Tensor | None = None  # [..., H, dv]
    bias: Tensor | None = None  # of the keys, [B, G] or [T]; -inf excludes
    ragged: Ragged | None = None  # the ranges of a packed side


class BlockAttended(NamedTuple):
    """What `block_attention` returns; None for a side that no block serves."""

    tokens_out: Tensor | None  # [B, G, H, dv]
    tokens_lse: Tensor | None  # [B, G, H]
    tokens_mass: Tensor | None  # [B, G, H, 2], of each row's weight: on the tokens, on the bag
    bag_out: Tensor | None  # [total, H, dv]
    bag_lse: Tensor | None  # [total, H]
    bag_mass: Tensor | None  # [total, H, 2]


# in the order in which they draw their masks
BLOCKS = ("tokens->tokens", "tokens->bag", "bag->tokens", "bag->bag")
