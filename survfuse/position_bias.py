"""What every implementation of `position_biased_attention` is told."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from torch import Tensor

from survfuse.ragged import Ragged


class PositionBias(NamedTuple):
    """The bias of each pair of query and key: an MLP of their offset, or a table of its values.

    For the MLP, `parameters` is one vector: the weight [out, in] and the bias [out] of each layer,
    one layer behind the other. Hidden layers are padded with zeros to one width.
    """

    parameters: Tensor  # the MLP as a vector; the table [O, n, n], by x and y, x first
    reach: Tensor | None  # [2], the table covers signed logs of -reach to reach; None: the MLP
    depth: int  # hidden layers of the MLP; 0 with a table
    width: int  # of each hidden layer: 16, 32, 64, or any greater power of two; 0 with a table

    def layers(self, n_out: int) -> list[tuple[Tensor, Tensor]]:
        """The (weight [out, in], bias [out]) of each layer of the MLP."""
        sizes = [2, *[self.width] * self.depth, n_out]
        pairs, at = [], 0
        for size_in, size_out in itertools.pairwise(sizes):
            weight = self.parameters[at : at + size_out * size_in].view(size_out, size_in)
            at += size_out * size_in
            pairs.append((weight, self.parameters[at : at + size_out]))
            at += size_out
        return pairs


class PositionedAttention(NamedTuple):
    """Which queries attend to which bag's keys, in the order of the registered ops."""

    starts: Tensor  # [B] int64, the first query row of each bag
    lengths: Tensor  # [B] int64
    total: int  # query rows of all bags
    max_length: int  # query rows of the bag that has most
    scale: float  # of the dot products
    dropout_p: float = 0.0
    seed: Tensor | None = None  # [1] int64; None without dropout

    @property
    def ragged(self) -> Ragged:
        """The ranges of the queries."""
        return Ragged(*self[:4])


class PositionedNeeds(NamedTuple):
    """Which gradients of `position_biased_attention` are wanted."""

    query: bool
    key: bool
    value: bool
    query_pos: bool
    key_pos: bool
    bias: bool  # of its parameters
