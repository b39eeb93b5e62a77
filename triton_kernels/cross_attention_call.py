"""What the kernels of one call of `cross_attention` share, as they take it."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from survfuse.attention import Attention

from . import pool_bag_shapes
from .cross_attention_shapes import Problem
from .pool_bag_call import products_precision


class Call(NamedTuple):
    """What every kernel of one call shares."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    attention: Attention
    threshold: int
    keep_scale: float
    # of query, key and value: the largest power of two up to 16 that divides both strides. Triton
    # by itself tells only multiples of 16, and heads of 24 would lose their wide loads
    units: tuple[int, int, int]

    @property
    def problem(self) -> Problem:
        """What launch shapes depend on."""
        a, (heads, value_dim) = self.attention, self.value.shape[1:]
        stored = (self.key, self.value)
        return Problem(
            dtype=self.key.dtype,
            n_bags=a.key_lengths.shape[0],
            query_total=a.query_total,
            query_max=a.query_max,
            key_total=a.key_total,
            key_max=a.key_max,
            n_queries=self.query.shape[0],
            n_keys=self.key.shape[0],
            heads=heads,
            head_dim=self.key.shape[2],
            value_dim=value_dim,
            aligned=all(
                unit * t.element_size() >= 16 and t.data_ptr() % 16 == 0
                for unit, t in zip(self.units[1:], stored)
            ),
            dropout=a.seed is not None,
            bias=self.bias is not None,
            wide_query=self.query.dtype.itemsize > self.key.dtype.itemsize,
        )

    @property
    def limits(self) -> pool_bag_shapes.Limits:
        """Of the device."""
        return pool_bag_shapes.device_limits(self.key.device)

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        """What every kernel reads, in its order."""
        a = self.attention
        ranges = (a.query_starts, a.query_lengths, a.key_starts, a.key_lengths)
        return self.query, self.key, self.value, self.bias, a.seed, *ranges

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Bags, stored queries, stored keys."""
        return self.attention.key_lengths.shape[0], self.query.shape[0], self.key.shape[0]

    @property
    def strides(self) -> tuple[int, ...]:
        """Of a row and of a head of query, key and value, in their units."""
        stored = (self.query, self.key, self.value)
        return tuple(s // unit for t, unit in zip(stored, self.units) for s in _strides(t))

    @property
    def constants(self) -> dict[str, object]:
        """What those kernels are compiled for, beside their blocks."""
        return {
            "QUERY_UNIT": self.units[0],
            "KEY_UNIT": self.units[1],
            "VALUE_UNIT": self.units[2],
            "HEADS": self.key.shape[1],
            "D": self.key.shape[2],
            "DV": self.value.shape[2],
            "PRECISION": products_precision(),
        }


def make_call(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, attention: Attention
) -> Call:
    """What the launchers are given, as their kernels take it."""
    p = attention.dropout_p
    return Call(
        query=query,
        key=key,
        value=value,
        bias=bias,
        attention=attention._replace(seed=attention.seed if p > 0 else None),
        # as survfuse/reference/dropout.py; p = 1 drops all: no weight is left to scale
        threshold=min(round(p * 2**32), 2**32 - 1),
        keep_scale=1.0 / (1.0 - p) if p < 1 else 0.0,
        units=tuple(math.gcd(*_strides(t), 16) for t in (query, key, value)),
    )


def _strides(tensor: Tensor) -> tuple[int, int]:
    """Of rows and heads; where there is one, its stride is never used and may be anything."""
    return tuple(tensor.stride(axis) if tensor.shape[axis] > 1 else 0 for axis in (0, 1))
