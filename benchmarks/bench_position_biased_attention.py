"""`position_biased_attention`: grids of queries and deformed keys, against plain torch.

Plain torch holds the hidden layers of every pair, as the published model does.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from survfuse import ops

from . import work

HEADS, HEAD_DIM, WIDTHS = 8, 64, (32, 32)
GROUPS = HEADS
# bytes of hidden layers that plain torch is asked to hold on a CPU
MOST_CPU_BYTES = 4e9


class Shape(NamedTuple):
    """Queries on a square of that side, or so many anywhere; keys likewise."""

    queries: int
    keys: int
    n_bags: int

    def __str__(self) -> str:
        return f"B={self.n_bags} q={self.queries} k={self.keys} h={HEADS} d={HEAD_DIM} g={GROUPS}"

    @property
    def pairs(self) -> int:
        return self.n_bags * self.queries * self.keys

    @property
    def hidden_bytes(self) -> float:
        """Of both hidden layers of all pairs, before and behind their ReLU."""
        return 4.0 * self.pairs * GROUPS * 2 * sum(WIDTHS)


SQUARES = [
    pytest.param(Shape(2500, 144, 1), marks=pytest.mark.core, id="50x50 to 12x12"),
    pytest.param(Shape(2500, 144, 8), id="8 bags of 50x50 to 12x12"),
    pytest.param(Shape(10_000, 625, 1), id="100x100 to 25x25"),
    pytest.param(Shape(49, 9, 2), marks=pytest.mark.smoke, id="smoke"),
]
SLIDE = Shape(100_000, 6000, 1)


class Inputs(NamedTuple):
    """Arguments of the op."""

    query: Tensor
    key: Tensor
    value: Tensor
    query_pos: Tensor
    key_pos: Tensor
    mlp: tuple

    @property
    def leaves(self) -> list[Tensor]:
        return [*self[:5], *(tensor for layer in self.mlp for tensor in layer)]


def make_inputs(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
    """Positions from -1 to 1, keys moved off their grid by as much as the published model may."""
    torch.manual_seed(0)
    rows = (shape.queries, shape.keys, shape.keys)
    features = [torch.randn(shape.n_bags, n, HEADS, HEAD_DIM, device=device) for n in rows]
    query_pos = _square(shape.queries, device).expand(shape.n_bags, -1, -1).contiguous()
    key_pos = _square(shape.keys, device).expand(shape.n_bags, GROUPS, -1, -1)
    key_pos = key_pos + 0.3 * torch.randn(key_pos.shape, device=device)
    sizes = (2, *WIDTHS, HEADS // GROUPS)
    mlp = [
        (torch.randn(out, n, device=device) * n**-0.5, 0.1 * torch.randn(out, device=device))
        for n, out in itertools.pairwise(sizes)
    ]
    inputs = Inputs(*(x.to(dtype) for x in features), query_pos, key_pos, tuple(mlp))
    for tensor in inputs.leaves:
        tensor.requires_grad_()
    return inputs


def _square(n: int, device: str) -> Tensor:
    side = round(n**0.5)
    if side * side != n:
        return 2 * torch.rand(n, 2, device=device) - 1
    axis = torch.linspace(-1, 1, side, device=device)
    return torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)


def plain(query: Tensor, key: Tensor, value: Tensor, query_pos: Tensor, key_pos: Tensor, mlp):
    """Everything formed."""
    offset = query_pos[:, None, :, None] - key_pos[:, :, None]
    x = torch.sign(offset) * torch.log(offset.abs() + 1)
    for weight, shift in mlp[:-1]:
        x = torch.relu(linear(x, weight, shift))
    bias = linear(x, *mlp[-1]).permute(0, 1, 4, 2, 3).flatten(1, 2)
    logits = torch.einsum("bihd,bjhd->bhij", query, key) * HEAD_DIM**-0.5 + bias.to(query.dtype)
    return torch.einsum("bhij,bjhd->bihd", logits.softmax(-1), value)


def operations(shape: Shape, mode: str) -> dict[str, float]:
    """Of each way; a fused backward computes logits and hidden layers again."""
    per_product = 2.0 * shape.pairs * HEADS * HEAD_DIM
    sizes = (2, *WIDTHS, HEADS // GROUPS)
    layers = 2.0 * shape.pairs * GROUPS * sum(a * b for a, b in itertools.pairwise(sizes))
    table = 8.0 * shape.pairs * HEADS
    products, again = (2, 0) if mode == "forward" else (6, 1)
    passes = 1 if mode == "forward" else 3
    attended = per_product * (products + again)
    return {
        "survfuse": attended + layers * (passes + again),
        "survfuse tiled": attended + layers * (passes + again),
        "survfuse table": attended + table * (passes + again),
        "plain torch": per_product * products + layers * passes,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["forward", "both"])
@pytest.mark.parametrize("shape", SQUARES)
def bench_position_biased_attention(measure, device: str, shape, mode: str, dtype) -> None:
    inputs = make_inputs(shape, dtype, device)
    ways = {
        "survfuse": lambda: ops.position_biased_attention(*inputs),
        "survfuse table": lambda: ops.position_biased_attention(*inputs, bias="table"),
        "plain torch": lambda: plain(*inputs),
    }
    left_out = {}
    if device == "cuda":
        ways["survfuse tiled"] = lambda: ops.position_biased_attention(*inputs, backend="tiled")
    elif shape.hidden_bytes > MOST_CPU_BYTES:
        del ways["plain torch"]
        size = 1e-9 * shape.hidden_bytes
        left_out["plain torch"] = (True, f"would hold {size:.0f} GB of hidden layers")
    _race(measure, shape, mode, inputs, ways, left_out)


@pytest.mark.parametrize("mode", ["forward"])
def bench_position_biased_attention_of_a_slide(measure, device: str, mode: str) -> None:
    if device == "cpu":
        pytest.skip("5e9 pairs of position and key are for GPUs")
    inputs = make_inputs(SLIDE, torch.bfloat16, device)
    ways = {"survfuse table": lambda: ops.position_biased_attention(*inputs, bias="table")}
    size = 1e-9 * SLIDE.hidden_bytes
    left_out = {"plain torch": (True, f"would hold {size:.0f} GB of hidden layers")}
    _race(measure, SLIDE, mode, inputs, ways, left_out)


def _race(measure, shape: Shape, mode: str, inputs: Inputs, ways: dict, left_out: dict) -> None:
    upstream = torch.randn_like(inputs.query)

    def run(way) -> object:
        if mode == "forward":
            with torch.no_grad():
                return way()
        return torch.autograd.grad(way(), inputs.leaves, upstream)

    def check() -> None:
        """The first queries of each bag: the reference holds everything."""
        narrow = inputs._replace(
            query=inputs.query[:, :50].detach(), query_pos=inputs.query_pos[:, :50].detach()
        )
        wide = narrow._replace(**{n: getattr(narrow, n).float() for n in ("query", "key", "value")})
        few = torch.finfo(inputs.query.dtype).bits < 32
        with torch.no_grad():
            exact = ops.position_biased_attention(*wide, backend="reference")
            for options, most in (({}, 1e-4), ({"bias": "table"}, 1e-2)):
                got = ops.position_biased_attention(*narrow, **options)
                error = (got - exact).norm() / exact.norm()
                assert error < (2e-2 if few else most), f"relative error {error:.2e}"

    dtype = inputs.query.dtype
    tq, tk = shape.n_bags * shape.queries, shape.n_bags * shape.keys
    least = work.attention(shape.pairs, tq, tk, HEADS, HEAD_DIM, HEAD_DIM, dtype.itemsize)
    measure(
        "position_biased_attention",
        mode,
        str(shape),
        dtype,
        {name: (lambda w=way: run(w)) for name, way in ways.items()},
        baseline="plain torch",
        gbytes=1e-9 * work.of_mode(least, mode).n_bytes,
        gflop={name: 1e-9 * operations(shape, mode)[name] for name in ways},
        check=check,
        left_out=left_out,
    )
