"""`pool_bag` alone: one long bag and ragged batches, frozen and trained, against plain torch."""

from __future__ import annotations

import pytest
import torch

from survfuse import Ragged, ops

CORE = pytest.mark.core
# rows of queries, lengths of bags, features
SHAPES = [
    pytest.param((6, (100_000,), 1024), marks=CORE, id="6 - 100k x 1024"),
    pytest.param((16, (100_000,), 1024), id="16 - 100k x 1024"),
    pytest.param((64, (100_000,), 1024), id="64 - 100k x 1024"),
    pytest.param((200, (100_000,), 1029), id="200 - 100k x 1029"),
    pytest.param((6, (2000, 9000, 31_000, 15_000) * 4, 768), marks=CORE, id="6 - 16 bags x 768"),
    pytest.param((6, (40_000,), 2560), id="6 - 40k x 2560"),
]
MODES = ["forward", "frozen", "trained"]


@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalised"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES)
def bench_pool_bag(measure, device: str, shape, mode: str, dtype, normalize: bool) -> None:
    n_rows, lengths, dim = shape
    torch.manual_seed(0)
    bag = torch.randn(sum(lengths), dim, device=device).to(dtype)
    bag.requires_grad_(mode == "trained")
    rows = torch.randn(len(lengths), n_rows, dim, device=device) * dim**-0.5
    rows.requires_grad_()
    upstream = torch.randn_like(rows)
    ragged = Ragged.from_lengths(lengths, device=device)
    eps = 1e-5 if normalize else None
    inputs = (rows, bag) if mode == "trained" else (rows,)

    def ours(backend: str | None = None) -> torch.Tensor:
        return ops.pool_bag(rows, bag, ragged=ragged, normalize_eps=eps, backend=backend).pooled

    def plain() -> torch.Tensor:
        outs = []
        for b, x in enumerate(bag.split(lengths)):
            x = torch.nn.functional.layer_norm(x, (dim,), eps=eps) if normalize else x
            outs.append((rows[b].to(dtype) @ x.T).softmax(-1) @ x)
        return torch.stack(outs).to(rows.dtype)

    def run(way) -> object:
        if mode == "forward":
            with torch.no_grad():
                return way()
        return torch.autograd.grad(way(), inputs, upstream)

    def check() -> None:
        with torch.no_grad():
            exact = ops.pool_bag(
                rows, bag.float(), ragged=ragged, normalize_eps=eps, backend="reference"
            ).pooled
            error = (ours() - exact).norm() / exact.norm()
        assert error < (2e-2 if dtype == torch.bfloat16 else 1e-4), f"relative error {error:.2e}"

    ways = {"survfuse": ours, "survfuse tiled": lambda: ours("tiled"), "plain torch": plain}
    passes = {"forward": 1.0, "frozen": 2.5, "trained": 3.5}[mode]
    reads = {"forward": 1, "frozen": 2, "trained": 3}[mode]
    measure(
        "pool_bag" + (", normalised" if normalize else ""),
        {"forward": "forward", "frozen": "both", "trained": "both, trained"}[mode],
        f"R={n_rows} B={len(lengths)} T={sum(lengths)} D={dim}",
        dtype,
        {name: (lambda w=way: run(w)) for name, way in ways.items()},
        baseline="plain torch",
        gbytes=1e-9 * bag.nbytes * reads,
        gflop=dict.fromkeys(ways, 4e-9 * sum(lengths) * dim * n_rows * passes),
        check=check,
    )
