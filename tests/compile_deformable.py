"""The calls of multi-scale deformable attention that compile_triton.py compiles."""

from __future__ import annotations

from dataclasses import dataclass
from unittest import mock

import torch
from compile_calls import TYPES, Launch, recording
from survfuse.triton_kernels import multi_scale_deformable_attention
from survfuse.triton_kernels.pool_bag_shapes import Limits

from survfuse.deformable import Samples, SamplingNeeds


@dataclass(frozen=True)
class Case:
    """One call of the launchers; the backward with every gradient and with that of the value."""

    dtype: torch.dtype
    dim: int
    sides: int = 0  # of the reference points: 0 has none, 2 has points, 4 has boxes
    n_levels: int = 4
    n_points: int = 4
    heads: int = 8
    narrow_weights: bool = False  # in the type of the value
    deterministic: bool = False

    def __str__(self) -> str:
        form = {0: "locations", 2: "offsets", 4: "boxes"}[self.sides]
        sizes = f"L={self.n_levels} P={self.n_points} H={self.heads} d={self.dim}"
        flags = "+narrow" * self.narrow_weights + "+deterministic" * self.deterministic
        return f"{TYPES[self.dtype]} {sizes} {form}{flags}"


def record(case: Case, limits: Limits) -> list[Launch]:
    """Every launch of a forward, and of the gradients."""
    n_batches, n_queries, shapes = 2, 1000, torch.tensor([[2, 3]] * case.n_levels)
    value = torch.empty(n_batches, 6 * case.n_levels, case.heads, case.dim, dtype=case.dtype)
    weights = torch.zeros(n_batches, n_queries, case.heads, case.n_levels, case.n_points)
    points = torch.zeros(*weights.shape, 2)
    reference = None
    if case.sides:
        reference = torch.zeros(n_batches, n_queries, case.n_levels, case.sides)
    if case.narrow_weights:
        weights = weights.to(case.dtype)
    samples = Samples(shapes, points, weights, reference)
    module = multi_scale_deformable_attention
    with (
        recording(module, case, limits) as launches,
        mock.patch.object(
            torch, "are_deterministic_algorithms_enabled", return_value=case.deterministic
        ),
    ):
        out, lse = module.multi_scale_deformable_attention_forward(value, samples)
        for every in (True, False):
            needs = SamplingNeeds(True, every, every, every)
            d_out = torch.zeros_like(out)
            module.multi_scale_deformable_attention_backward(d_out, lse, value, samples, needs)
    return launches


def cases(target: str, quick: bool) -> list[Case]:
    """Every type and form at head sizes of every kind; sums in fixed point."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    if quick:
        return [Case(bf16, 32), Case(fp32, 100, 4, n_points=3, deterministic=True)]
    listed = [
        Case(dtype, dim, sides)
        for dtype in (bf16, fp16, fp32)
        for dim in (8, 32, 64, 100, 256)
        for sides in ((0, 4) if dim == 32 else (4,))
    ]
    listed += [
        Case(bf16, 32, 2, narrow_weights=True),
        Case(bf16, 32, 0, deterministic=True),
        Case(fp32, 100, 4, deterministic=True),
        Case(fp16, 256, 4, deterministic=True),
        Case(bf16, 37, 4, n_levels=3, n_points=30, heads=6, narrow_weights=True),
        Case(fp32, 1, 0, n_levels=1, n_points=1, heads=1),
    ]
    if target != "sm_90":
        return [case for case in listed if case.sides == 4 and case.dtype != fp16]
    return listed
