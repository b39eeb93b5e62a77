"""`gated_attention_pool`: a long bag, ragged batches, frozen and trained, against plain torch."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from survfuse import Ragged, ops

CORE = pytest.mark.core
# pools, hidden units, lengths of bags, features
SHAPES = [
    pytest.param((1, 256, (100_000,), 1024), marks=CORE, id="1 x 256 - 100k x 1024"),
    pytest.param((4, 256, (100_000,), 1024), id="4 x 256 - 100k x 1024"),
    pytest.param((1, 384, (40_000,), 1536), id="1 x 384 - 40k x 1536"),
    pytest.param((1, 128, (2000, 9000, 31_000, 15_000) * 2, 768), id="1 x 128 - 8 bags x 768"),
]
MODES = ["forward", "frozen", "trained"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES)
def bench_gated_attention_pool(measure, device: str, shape, mode: str, dtype) -> None:
    n_pools, n_hidden, lengths, dim = shape
    torch.manual_seed(0)
    bag = torch.randn(sum(lengths), dim, device=device).to(dtype)
    bag.requires_grad_(mode == "trained")
    sizes = ((n_hidden, dim), (n_hidden,), (n_hidden, dim), (n_hidden,), (n_pools, n_hidden))
    gate = [torch.randn(size, device=device) * size[-1] ** -0.5 for size in (*sizes, (n_pools,))]
    gate = [tensor.to(dtype).requires_grad_() for tensor in gate]
    upstream = torch.randn(len(lengths), n_pools, dim, device=device).to(dtype)
    ragged = Ragged.from_lengths(lengths, device=device)
    inputs = (*gate, bag) if mode == "trained" else gate

    def ours(backend: str | None = None) -> torch.Tensor:
        return ops.gated_attention_pool(bag, *gate, ragged=ragged, backend=backend).pooled

    def plain() -> torch.Tensor:
        w_tanh, b_tanh, w_gate, b_gate, w_score, b_score = gate
        gated = torch.tanh(linear(bag, w_tanh, b_tanh)) * torch.sigmoid(linear(bag, w_gate, b_gate))
        logits = linear(gated, w_score, b_score)
        parts = zip(logits.split(lengths), bag.split(lengths), strict=True)
        return torch.stack([s.T.softmax(-1) @ x for s, x in parts])

    def run(way) -> object:
        if mode == "forward":
            with torch.no_grad():
                return way()
        return torch.autograd.grad(way(), inputs, upstream)

    def check() -> None:
        with torch.no_grad():
            wide = (tensor.float() for tensor in (bag, *gate))
            exact = ops.gated_attention_pool(*wide, ragged=ragged, backend="reference").pooled
            error = (ours() - exact).norm() / exact.norm()
        assert error < (2e-2 if dtype == torch.bfloat16 else 1e-4), f"relative error {error:.2e}"

    ways = {"survfuse": ours, "plain torch": plain}
    if device == "cuda":
        ways["survfuse tiled"] = lambda: ours("tiled")
    reads = {"forward": 1, "frozen": 2, "trained": 3}[mode]
    # products with both weights: plain torch holds the hidden layer, we compute it again
    products = {"forward": (1, 1), "frozen": (3, 2), "trained": (4, 3)}[mode]
    unit = 4e-9 * sum(lengths) * dim * n_hidden
    measure(
        "gated_attention_pool",
        {"forward": "forward", "frozen": "both", "trained": "both, trained"}[mode],
        f"K={n_pools} L={n_hidden} B={len(lengths)} T={sum(lengths)} D={dim}",
        dtype,
        {name: (lambda w=way: run(w)) for name, way in ways.items()},
        baseline="plain torch",
        gbytes=1e-9 * bag.nbytes * reads,
        gflop={name: unit * products[name == "plain torch"] for name in ways},
        check=check,
    )
