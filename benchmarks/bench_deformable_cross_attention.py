"""Deformable cross-attention at the sizes of Subspace fusion, and on a whole sparse slide.

The baseline forms the MLP of positions for all pairs, as the public code does. On the sparse slide
that code has no counterpart: it would attend from and to a dense map, tissue or not. It races there
only where that fits into memory, and its result is another one.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from survfuse.layers import DeformableCrossAttention
from survfuse.ops import GridIndex, grid_index

from .plain_deformable import PlainDeformableCrossAttention

CORE, SMOKE = pytest.mark.core, pytest.mark.smoke
DIM, STRIDE = 128, 4
OP = "deformable_cross_attention"


@pytest.mark.parametrize("mode", ["forward", "both"])
@pytest.mark.parametrize(
    ("size", "n_bags"),
    [
        pytest.param(12, 2, marks=SMOKE),
        pytest.param(50, 1, marks=CORE),
        (50, 8),
        (100, 1),
    ],
    ids=str,
)
def bench_dense(measure, device: str, size: int, n_bags: int, mode: str) -> None:
    shape = (size, size)
    query, context = _tokens(device, n_bags, size * size)
    ways, left_out = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        layer, suffix = _layer(device, dtype, released=True), _suffix(dtype)
        table = _layer(device, dtype, released=True, bias="table")
        plain = PlainDeformableCrossAttention(layer)
        inputs = tuple(tensor.detach().to(dtype).requires_grad_() for tensor in (query, context))
        ways |= {
            f"survfuse{suffix}": _way(lambda m=layer, i=inputs: m(*i, shape=shape), layer, inputs),
            f"survfuse, table{suffix}": _way(
                lambda m=table, i=inputs: m(*i, shape=shape), table, inputs
            ),
        }
        if _fits(plain, shape, n_bags, device, left_out, f"plain torch{suffix}"):
            ways[f"plain torch{suffix}"] = _way(
                lambda m=plain, i=inputs: (m(*i, shape),), layer, inputs
            )
    _race(measure, ways, left_out, mode, f"B={n_bags} {size}x{size}", 3 * query.nbytes)


@pytest.mark.parametrize("mode", ["forward", "both"])
@pytest.mark.parametrize("size", [pytest.param(24, marks=SMOKE), 300])
def bench_sparse(measure, device: str, size: int, mode: str) -> None:
    grid, n_patches = _slide(size, device)
    query, context = _tokens(device, 1, n_patches)
    ways, left_out = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        inputs = tuple(t[0].detach().to(dtype).requires_grad_() for t in (query, context))
        for name, bias in (("survfuse", "exact"), ("survfuse, table", "table")):
            layer = _layer(device, dtype, bias=bias)
            ways[name + _suffix(dtype)] = _way(
                lambda m=layer, i=inputs: m(*i, grid=grid), layer, inputs
            )
    layer = _layer(device, torch.float32, released=True)
    plain = PlainDeformableCrossAttention(layer)
    name = "plain torch, dense slide"
    if _fits(plain, (size, size), 1, device, left_out, name):
        dense = _tokens(device, 1, size * size)
        ways[name] = _way(lambda: (plain(*dense, (size, size)),), layer, dense)
    label = f"sparse {size}x{size}, 30 % tissue"
    _race(measure, ways, left_out, mode, label, 3 * query.nbytes, apart=(name,))


def _layer(device: str, dtype: torch.dtype, **options) -> DeformableCrossAttention:
    torch.manual_seed(0)
    return DeformableCrossAttention(DIM, downsample=STRIDE, **options).to(device, dtype)


def _suffix(dtype: torch.dtype) -> str:
    return "" if dtype == torch.float32 else ", bf16"


def _tokens(device: str, n_bags: int, n_tokens: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return tuple(
        torch.randn(n_bags, n_tokens, DIM, generator=g).to(device).requires_grad_()
        for _ in range(2)
    )


def _slide(size: int, device: str) -> tuple[GridIndex, int]:
    """A slide of size x size cells, of which smooth pieces, 30 % in all, are tissue."""
    g = torch.Generator().manual_seed(2)
    coarse = torch.randn(1, 1, 7, 7, generator=g)
    field = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic")[0, 0]
    y, x = (field > field.flatten().quantile(0.7)).nonzero().unbind(1)
    return grid_index(torch.stack([x, y], 1).to(device), patch_size=1), len(x)


def _fits(plain, shape, n_bags: int, device: str, left_out: dict, name: str) -> bool:
    """Whether what the plain module holds fits into the memory of the device."""
    needed = plain.bytes_needed(shape, n_bags, STRIDE)
    if device == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    if needed > memory:
        left_out[name] = (True, f"the MLP of all pairs needs {needed / 1e9:.0f} GB")
    return needed <= memory


def _way(call, layer, inputs):
    return call, [*inputs, *layer.parameters()]


def _race(measure, ways, left_out, mode: str, label: str, n_bytes: int, apart=()) -> None:
    def run(call, leaves) -> object:
        if mode == "forward":
            with torch.no_grad():
                return call()
        return torch.autograd.grad(call()[0].float().square().sum(), leaves)

    def check() -> None:
        with torch.no_grad():
            outputs = {n: call()[0].float() for n, (call, _) in ways.items() if n not in apart}
        exact = outputs.get("plain torch", outputs["survfuse"])
        for name, tokens in outputs.items():
            error = (tokens - exact).norm() / exact.norm()
            limit = 5e-2 if "bf16" in name else 1e-2 if "table" in name else 1e-4
            assert error < limit, f"{name}: {error:.2e}"

    measure(
        OP,
        mode,
        label,
        torch.float32,
        {name: (lambda w=way: run(*w)) for name, way in ways.items()},
        baseline="plain torch",
        # queries and context read and tokens written, and their gradients the other way
        gbytes=1e-9 * n_bytes * (1 if mode == "forward" else 3),
        gflop={},
        check=check,
        left_out=left_out,
    )
