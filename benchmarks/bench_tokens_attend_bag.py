"""Few tokens attend to a long bag: absorbed kernels against K and V formed by plain torch.

Baseline: two linear layers and `scaled_dot_product_attention`, which is what a user writes today.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from survfuse import ops

CORE = pytest.mark.core
# queries, heads, head size, rows, features
SHAPES = [
    pytest.param((6, 1, 256, 100_000, 1024), marks=CORE, id="6x1x256 - 100k x 1024"),
    pytest.param((6, 1, 256, 10_000, 1024), id="6x1x256 - 10k x 1024"),
    pytest.param((1, 16, 64, 100_000, 1024), marks=CORE, id="1x16x64 - 100k x 1024"),
    pytest.param((25, 8, 64, 100_000, 1024), marks=CORE, id="25x8x64 - 100k x 1024"),
    pytest.param((6, 1, 256, 100_000, 1536), id="6x1x256 - 100k x 1536"),
    pytest.param((6, 1, 256, 1_000_000, 1024), marks=CORE, id="6x1x256 - 1M x 1024"),
]


class Problem:
    """Inputs of one shape, and the ways to compute it."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
        self.queries, self.heads, self.head_dim, self.rows, self.dim = shape
        self.dtype = dtype
        torch.manual_seed(0)
        width = self.heads * self.head_dim
        self.bag = torch.randn(self.rows, self.dim, device=device).to(dtype)
        parameters = (
            torch.randn(1, self.queries, self.heads, self.head_dim, device=device),
            torch.randn(width, self.dim, device=device) * self.dim**-0.5,
            torch.randn(width, self.dim, device=device) * self.dim**-0.5,
        )
        self.query, self.w_k, self.w_v = (p.to(dtype).requires_grad_() for p in parameters)
        self.upstream = torch.randn(1, self.queries, width, device=device).to(dtype)

    def ours(self, **options) -> torch.Tensor:
        w_k, w_v = (w.unflatten(0, (self.heads, self.head_dim)) for w in (self.w_k, self.w_v))
        return ops.tokens_attend_bag(self.query, self.bag, w_k, w_v, **options).flatten(2)

    def formed(self) -> torch.Tensor:
        """Linear layers and scaled_dot_product_attention."""
        shape = (1, self.rows, self.heads, self.head_dim)
        key = linear(self.bag, self.w_k).view(shape).transpose(1, 2)
        value = linear(self.bag, self.w_v).view(shape).transpose(1, 2)
        out = scaled_dot_product_attention(self.query.transpose(1, 2), key, value)
        return out.transpose(1, 2).flatten(2)

    def absorbed_plain(self) -> torch.Tensor:
        """The same algebra in three torch expressions: what absorption alone gives."""
        w_k, w_v = (w.unflatten(0, (self.heads, self.head_dim)) for w in (self.w_k, self.w_v))
        rows = torch.einsum("bqhe,hed->bqhd", self.query, w_k).flatten(1, 2)[0]
        weights = (rows @ self.bag.T * self.head_dim**-0.5).softmax(-1)
        pooled = (weights @ self.bag).unflatten(0, (self.queries, self.heads))
        return torch.einsum("qhd,hed->qhe", pooled, w_v).flatten(1)[None]

    def gradients(self, out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(out, (self.query, self.w_k, self.w_v), self.upstream)

    def check(self) -> None:
        exact = Problem.exact(self)
        tolerance = 2e-2 if self.dtype == torch.bfloat16 else 1e-4
        for way in (self.ours, self.formed, self.absorbed_plain):
            error = (way().double() - exact).norm() / exact.norm()
            assert error < tolerance, f"{way.__name__}: relative error {error:.2e}"

    def exact(self) -> torch.Tensor:
        """fp64, over blocks of the bag."""
        with torch.no_grad():
            query, w_k, w_v = (t.double() for t in (self.query, self.w_k, self.w_v))
            shape = (-1, self.heads, self.head_dim)
            logits, values = [], []
            for block in self.bag.split(50_000):
                key = linear(block.double(), w_k).view(shape)
                logits.append(torch.einsum("bqhe,nhe->bqhn", query, key))
                values.append(linear(block.double(), w_v).view(shape))
            weights = (torch.cat(logits, -1) * self.head_dim**-0.5).softmax(-1)
            return torch.einsum("bqhn,nhe->bqhe", weights, torch.cat(values)).flatten(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["forward", "both"])
@pytest.mark.parametrize("shape", SHAPES)
def bench_tokens_attend_bag(measure, device: str, shape, mode: str, dtype: torch.dtype) -> None:
    if device == "cpu" and shape[3] > 200_000:
        pytest.skip("a bag this long is for GPUs")
    problem = Problem(shape, dtype, device)
    ways = {
        "survfuse": problem.ours,
        "survfuse tiled": lambda: problem.ours(backend="tiled"),
        "plain torch, absorbed": problem.absorbed_plain,
        "Linear + SDPA": problem.formed,
    }

    def forward(way):
        with torch.no_grad():
            return way()

    contenders = {
        name: (lambda w=way: forward(w))
        if mode == "forward"
        else (lambda w=way: problem.gradients(w()))
        for name, way in ways.items()
    }
    queries, heads, head_dim, rows, dim = shape
    passes = 1 if mode == "forward" else 2.5  # backward: scores again, their gradient, d_rows
    absorbed = 4e-9 * rows * dim * queries * heads * passes
    formed = 1e-9 * rows * heads * head_dim * (4 * dim + 4 * queries)
    formed *= 1 if mode == "forward" else 2  # the frozen bag needs no gradient, the weights do
    measure(
        "tokens_attend_bag",
        mode,
        f"q={queries} h={heads} d={head_dim} N={rows} D={dim}",
        dtype,
        contenders,
        baseline="Linear + SDPA",
        gbytes=1e-9 * problem.bag.nbytes * (1 if mode == "forward" else 2),
        gflop=dict.fromkeys(ways, absorbed) | {"Linear + SDPA": formed},
        check=problem.check,
    )
