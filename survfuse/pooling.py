"""What every implementation of the pooling operations is told, and what it returns."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from survfuse.ragged import Ragged


class PooledBag(NamedTuple):
    """What `pool_bag` returns; its gradients come in the same order."""

    pooled: Tensor  # [B, R, D], dtype of rows
    lse: Tensor  # [B, R], fp32 (fp64 for fp64)
    weight_sum: Tensor  # [B, R], dtype of rows


class Pooling(NamedTuple):
    """How bags are pooled: all that is not differentiable, in the order of the registered ops."""

    starts: Tensor  # [B] int64, the first row of each bag
    lengths: Tensor  # [B] int64
    total: int  # rows of all bags
    max_length: int  # rows of the longest
    scale: float  # of the dot products
    normalize: bool  # rows are layer-normalised first, without an affine part
    eps: float  # of the normalisation
    mean: Tensor | None  # [T] statistics of the bag's rows, or None: computed on the fly
    rstd: Tensor | None  # [T]
    dropout_p: float = 0.0
    seed: Tensor | None = None  # [1] int64; None without dropout

    @property
    def ragged(self) -> Ragged:
        """The ranges alone."""
        return Ragged(*self[:4])


class Needs(NamedTuple):
    """Which gradients of `pool_bag` are wanted."""

    rows: bool
    bag: bool
    bias: bool


class SpreadNeeds(NamedTuple):
    """Which gradients of `spread_tokens` are wanted."""

    keys: bool
    values: bool
    bag: bool
    key_bias: bool


class Gate(NamedTuple):
    """The parameters of gated attention: L hidden units, K pools."""

    w_tanh: Tensor  # [L, D]
    b_tanh: Tensor | None  # [L]
    w_gate: Tensor  # [L, D]
    b_gate: Tensor | None  # [L]
    w_score: Tensor  # [K, L]
    b_score: Tensor | None  # [K]


class GatedBag(NamedTuple):
    """What `gated_attention_pool` returns; its gradients come in the same order."""

    pooled: Tensor  # [B, K, D], dtype of w_score
    lse: Tensor  # [B, K], fp32 (fp64 for fp64)


class GatedNeeds(NamedTuple):
    """Which gradients of a gated operation are wanted."""

    bag: bool
    w_tanh: bool
    b_tanh: bool
    w_gate: bool
    b_gate: bool
    w_score: bool
    b_score: bool
    bias: bool

    @property
    def hidden(self) -> bool:
        """Whether any needs the gradient of the hidden layer."""
        return self.bag or self.w_tanh or self.b_tanh or self.w_gate or self.b_gate


def accumulation_type(dtype: torch.dtype) -> torch.dtype:
    """The type of sums and of lse: fp64 for fp64, fp32 for every other."""
    return torch.float64 if dtype == torch.float64 else torch.float32
