"""Calls of the Triton launchers of pool_bag and their oracle, for the tests beside this file."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from torch import Tensor

from survfuse import Ragged
from survfuse.pooling import Needs, PooledBag, Pooling
from survfuse.reference import pool_bag as reference

launchers = pytest.importorskip("survfuse.triton_kernels.pool_bag")

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
SEED = 0x1234_5678_9ABC_DEF0
NAMES = ("pooled", "lse", "weight_sum", "d_rows", "d_bag", "d_bias")


@dataclass
class Call:
    """Arguments of the launchers."""

    rows: Tensor
    bag: Tensor
    bias: Tensor | None
    ragged: Ragged
    normalize: bool = False
    stats: tuple[Tensor, Tensor] | None = None
    dropout_p: float = 0.0
    scale: float = 0.3

    @property
    def inputs(self) -> tuple:
        mean, rstd = self.stats if self.stats is not None else (None, None)
        draw = seed() if self.dropout_p else None
        options = (self.scale, self.normalize, 1e-5, mean, rstd, self.dropout_p, draw)
        return self.rows, self.bag, self.bias, Pooling(*self.ragged, *options)

    def forward(self) -> PooledBag:
        return launchers.pool_bag_forward(*self.inputs)

    def backward(self, results: PooledBag, gradients: tuple[Tensor, ...], **needs: bool):
        """`needs`: which of rows, bag and bias have their gradient computed; by default all."""
        needed = Needs(rows=True, bag=True, bias=self.bias is not None)._replace(**needs)
        return launchers.pool_bag_backward(PooledBag(*gradients), results, *self.inputs, needed)


def seed() -> Tensor:
    return torch.tensor([SEED], device=DEVICE)


def make_call(
    ranges: list[tuple[int, int]],
    *,
    n_rows: int = 3,
    width: int = 40,
    n_stored: int | None = None,
    excluded: tuple[int, ...] = (),
    bias: bool = True,
    mean: float = 0.0,
    spread: float = 1.0,
    given: bool = False,
    **options,
) -> Call:
    """Random arguments; rows in no bag and excluded rows hold NaN."""
    generator = torch.Generator().manual_seed(7)
    starts, lengths = zip(*ranges, strict=True)
    n_stored = n_stored or max(s + n for s, n in ranges) + 2
    bag = mean + spread * torch.randn(n_stored, width, generator=generator)
    rows = torch.randn(len(ranges), n_rows, width, generator=generator) / max(spread, 1e-3)
    row_bias = torch.randn(n_stored, generator=generator)
    inside = torch.zeros(n_stored, dtype=torch.bool)
    for start, length in ranges:
        inside[start : start + length] = True
    inside[list(excluded)] = False
    row_bias[list(excluded)] = -torch.inf
    stats = None
    if given:
        exact = bag.double()
        rstd = (exact.var(-1, unbiased=False) + 1e-5).rsqrt()
        stats = tuple(
            torch.where(inside, s.float(), torch.nan).to(DEVICE) for s in (exact.mean(-1), rstd)
        )
    bag[~inside] = torch.nan
    return Call(
        rows.to(DEVICE),
        bag.to(DEVICE),
        row_bias.to(DEVICE) if bias or excluded else None,
        Ragged.from_ranges(starts, lengths, device=DEVICE),
        stats=stats,
        **options,
    )


def oracle(call: Call, dtype: torch.dtype, gradients: tuple[Tensor, ...]) -> list[Tensor]:
    """Results and gradients by the reference and autograd."""
    leaves = [
        None if t is None else t.detach().cpu().to(dtype).requires_grad_()
        for t in (call.rows, call.bag, call.bias)
    ]
    rows, bag, bias = leaves
    module = importlib.import_module("survfuse.reference.pool_bag")
    with mock.patch.object(module, "draw_seed", return_value=seed().cpu()):
        results = reference(
            rows,
            bag,
            bias=bias,
            ragged=call.ragged.to("cpu"),
            scale=call.scale,
            normalize_eps=1e-5 if call.normalize else None,
            stats=None if call.stats is None else tuple(s.cpu().to(dtype) for s in call.stats),
            dropout_p=call.dropout_p,
        )
    loss = sum(
        (torch.where(result.isinf(), 0.0, result) * gradient.cpu().to(dtype)).sum()
        for result, gradient in zip(results, gradients, strict=True)
    )
    wanted = [leaf for leaf in leaves if leaf is not None]
    if not loss.requires_grad:
        return [*results, *(torch.zeros_like(leaf) for leaf in wanted)]
    found = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
    return [*(result.detach() for result in results), *found]
