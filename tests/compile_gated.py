"""The calls of gated attention pooling that compile_triton.py compiles."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from compile_calls import TYPES, Launch, recording
from survfuse.triton_kernels import (
    gated_attention_pool,
    gated_attention_pool_passes,
    pool_bag_passes,
)
from survfuse.triton_kernels.pool_bag_shapes import Limits

from survfuse.pooling import Gate, GatedBag, GatedNeeds, Pooling


@dataclass(frozen=True)
class Case:
    """One call of the launchers, frozen and trained."""

    dtype: torch.dtype
    n_pools: int
    n_hidden: int
    width: int
    options: bool = False  # biases of parameters and patches, and dropout
    padding: int = 0  # columns between the bag's rows

    def __str__(self) -> str:
        flags = "all" if self.options else "plain"
        width = f"{self.width}+{self.padding}" if self.padding else self.width
        return f"{TYPES[self.dtype]} K={self.n_pools} L={self.n_hidden} D={width} {flags}"


def record(case: Case, limits: Limits) -> list[Launch]:
    """Every launch of a forward, and of the gradients of a frozen and of a trained bag."""
    modules = (pool_bag_passes, gated_attention_pool_passes)
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(recording(module, case, limits)) for module in modules]
        launch(case)
    return [one for launches in found for one in launches]


def launch(case: Case) -> None:
    """Forward, and the gradients of a frozen and of a trained bag."""
    n_bags, length = 4, 1000
    n_stored = n_bags * length
    bag = torch.empty((n_stored, case.width + case.padding), dtype=case.dtype)
    bag = bag[:, : case.width]
    n_hidden, n_pools = case.n_hidden, case.n_pools
    shapes = ((n_hidden, case.width), (n_hidden,)) * 2 + ((n_pools, n_hidden), (n_pools,))
    gate = [torch.empty(shape) for shape in shapes]
    if not case.options:
        gate[1::2] = [None] * 3
    pooling = Pooling(
        *(torch.arange(n_bags) * length, torch.full((n_bags,), length)),
        total=n_stored,
        max_length=length,
        scale=1.0,
        normalize=False,
        eps=0.0,
        mean=None,
        rstd=None,
        dropout_p=0.25 if case.options else 0.0,
        seed=torch.zeros(1, dtype=torch.int64) if case.options else None,
    )
    bias = torch.zeros(n_stored) if case.options else None
    arguments = (bag, Gate(*gate), bias, pooling)
    results = gated_attention_pool.gated_attention_pool_forward(*arguments)
    gradients = GatedBag(*map(torch.empty_like, results))
    for trained in (False, True):
        needs = GatedNeeds(trained, *(tensor is not None for tensor in gate), trained)
        if bias is None:
            needs = needs._replace(bias=False)
        gated_attention_pool.gated_attention_pool_backward(gradients, results, *arguments, needs)


def cases(target: str, quick: bool) -> list[Case]:
    """Every type, widths and hidden sizes that change a launch shape, with and without options.

    Targets other than sm_90 take the calls with all options.
    """
    every_type = target == "sm_90"
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    if quick:
        return [Case(bf16, 1, 256, 1024, True), Case(fp32, 1, 256, 1024)]
    shapes = [(1, 256, 1024, 0), (1, 384, 1536, 0), (4, 128, 512, 0), (2, 64, 384, 0)]
    shapes += [(20, 256, 1029, 3), (1, 100, 1029, 0), (40, 256, 768, 0), (1, 512, 2560, 0)]
    return [
        Case(dtype, n_pools, n_hidden, width, options, padding)
        for dtype in ((bf16, fp16, fp32) if every_type else (bf16, fp32))
        for n_pools, n_hidden, width, padding in shapes
        for options in ((False, True) if every_type else (True,))
    ]
