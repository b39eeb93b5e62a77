"""`multi_scale_deformable_attention`: a DETR encoder's sizes, against `grid_sample` and others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from survfuse import ops

from .peers_deformable import others

CORE = pytest.mark.core
# levels of a DETR encoder over an 800 x 1333 image, and of one with a tenth of its queries
ENCODER = ((100, 167), (50, 84), (25, 42), (13, 21))
TENTH = ((32, 52), (16, 26), (8, 13), (4, 7))
# batch, levels, heads, width of a head, points
SHAPES = [
    pytest.param((1, TENTH, 8, 32, 4), marks=CORE, id="tenth of an encoder"),
    pytest.param((1, ENCODER, 8, 32, 4), marks=CORE, id="encoder"),
    pytest.param((4, TENTH, 8, 64, 4), id="4 x tenth, heads of 64"),
    pytest.param((1, ((5, 4), (3, 2)), 2, 8, 2), marks=pytest.mark.smoke, id="tiny"),
]


def plain(value: Tensor, shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """`grid_sample` on every level, all samples held, then weighted."""
    n_batches, _, heads, dim = value.shape
    n_queries, n_levels, n_points = weights.shape[1], *weights.shape[3:]
    sampled = []
    for level, pixels in enumerate(value.split([h * w for h, w in shapes], 1)):
        maps = pixels.permute(0, 2, 3, 1).reshape(n_batches * heads, dim, *shapes[level])
        grid = (2 * locations[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1)
        sampled.append(grid_sample(maps, grid.to(maps.dtype), align_corners=False))
    shares = weights.transpose(1, 2).reshape(-1, 1, n_queries, n_levels * n_points)
    out = (torch.stack(sampled, -2).flatten(-2) * shares.to(value.dtype)).sum(-1)
    return out.view(n_batches, heads * dim, n_queries).transpose(1, 2).contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["forward", "both"])
@pytest.mark.parametrize("shape", SHAPES)
def bench_multi_scale_deformable_attention(measure, device: str, shape, mode: str, dtype) -> None:
    n_batches, shapes, heads, dim, n_points = shape
    n_rows, n_levels = sum(h * w for h, w in shapes), len(shapes)
    torch.manual_seed(0)
    value = torch.randn(n_batches, n_rows, heads, dim, device=device).to(dtype).requires_grad_()
    # an encoder's queries are the pixels, which look around themselves
    centres = torch.cat([_centres(height, width, device) for height, width in shapes])
    offsets = torch.randn(n_batches, n_rows, heads, n_levels, n_points, 2, device=device)
    sizes = torch.tensor(shapes, device=device).flip(-1)[:, None]
    locations = centres[:, None, None, None] + 4 * offsets / sizes
    locations.requires_grad_()
    weights = torch.rand(offsets.shape[:-1], device=device).flatten(3).softmax(-1)
    weights = weights.unflatten(3, (n_levels, n_points)).to(dtype).requires_grad_()
    upstream = torch.randn(n_batches, n_rows, heads * dim, device=device).to(dtype)
    inputs = (value, locations, weights)

    def ours(backend: str | None = None) -> Tensor:
        return ops.multi_scale_deformable_attention(
            value, shapes, locations, weights, backend=backend
        )

    ways = {"survfuse": ours, "plain torch": lambda: plain(value, shapes, locations, weights)}
    if device == "cuda":
        ways |= {"survfuse triton": lambda: ours("triton"), "survfuse tiled": lambda: ours("tiled")}
    if device == "cpu" and dtype == torch.bfloat16:
        # its grid_sample takes the locations in 16 bits, and is right nowhere near a pixel
        ways["plain torch"] = lambda: plain(value.float(), shapes, locations, weights).to(dtype)
    theirs, left_out = others(value, shapes, locations, weights)
    ways |= theirs

    def run(way) -> object:
        if mode == "forward":
            with torch.no_grad():
                return way()
        return torch.autograd.grad(way(), inputs, upstream)

    def run_deterministically(way) -> object:
        torch.use_deterministic_algorithms(True)
        try:
            return run(way)
        finally:
            torch.use_deterministic_algorithms(False)

    def check() -> None:
        with torch.no_grad():
            exact = plain(value.float(), shapes, locations, weights.float())
            error = (ours() - exact).norm() / exact.norm()
        assert error < (2e-2 if dtype == torch.bfloat16 else 1e-4), f"relative error {error:.2e}"

    contenders = {name: (lambda w=way: run(w)) for name, way in ways.items()}
    if device == "cuda" and mode == "both":
        # sums in fixed point; on the CPU there is no other mode
        for name in ("survfuse", "survfuse triton"):
            way = ways[name]
            contenders[f"{name}, deterministic"] = lambda w=way: run_deterministically(w)
    samples = locations.numel() // 2
    once = value.nbytes + locations.nbytes + weights.nbytes + upstream.nbytes
    gflop = 8e-9 * samples * dim * (1 if mode == "forward" else 3)
    # four pixels of each sample; backward reads them, and reads and writes their fp32 gradients
    gathered = 4 * samples * dim * (value.element_size() * (1 if mode == "forward" else 2))
    if mode == "both":
        gathered += 4 * samples * dim * 8
    measure(
        "multi_scale_deformable_attention",
        mode,
        f"B={n_batches} Q={n_rows} L={n_levels} P={n_points} H={heads} d={dim}",
        dtype,
        contenders,
        baseline="plain torch",
        gbytes=1e-9 * once * (1 if mode == "forward" else 3),
        gflop=dict.fromkeys(contenders, gflop),
        moved={"survfuse": 1e-9 * gathered},
        check=check,
        left_out=left_out,
    )


def _centres(height: int, width: int, device: str) -> Tensor:
    """[height * width, 2] (x, y) of the pixels' centres in units of the level."""
    y = (torch.arange(height, device=device) + 0.5) / height
    x = (torch.arange(width, device=device) + 0.5) / width
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)
