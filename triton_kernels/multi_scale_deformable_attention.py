"""Multi-scale deformable attention in Triton: the launchers.

Contract: survfuse/ops/multi_scale_deformable_attention.py.
Oracle: survfuse/reference/multi_scale_deformable_attention.py.
Math: docs/math.md, "Multi-scale deformable attention".  Layout, traffic and registers:
docs/kernels.md.  The kernels are in multi_scale_deformable_attention_passes.py.

No autograd, no validation and no host synchronisation: shapes stay on the device. Everything has a
fixed order but the gradient of the value, unless torch is told to be deterministic.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from survfuse.deformable import Sampled, Samples, SamplingNeeds

from .multi_scale_deformable_attention_passes import deformable_bwd_kernel, deformable_fwd_kernel


class _Shape(NamedTuple):
    """How a kernel lays out its rows of d."""

    warps: int  # of a program
    # numbers of a row that a thread holds: 16 bytes of 16-bit values, of fp32 and of int64 sums
    per_thread: int
    # the same in rows that one warp would not hold so; what is more takes more warps
    most: int
    most_warps: int


_READ, _ADD, _COUNT = _Shape(2, 8, 8, 8), _Shape(1, 4, 8, 8), _Shape(1, 2, 1, 4)


def multi_scale_deformable_attention_forward(value: Tensor, samples: Samples) -> Sampled:
    """o_qh = sum_lp A_qhlp bilinear(V_hl, loc_qhlp).

    Args:
        value: [B, S, H, d] bf16, fp16 or fp32; any strides with a unit last one.
        samples: contiguous; levels that reach beyond S are not sampled there.

    Returns:
        out [B, Q, H * d] of the type of the value; lse [B, Q, H] fp32, or None.

    Cost: four rows of d per sample out of L2, everything else once from memory. One launch.
    """
    points, reference = samples.points, samples.reference
    out = value.new_empty((*points.shape[:2], value.shape[2] * value.shape[3]))
    lse = None if reference is None else points.new_empty(points.shape[:3])
    if points.numel() == 0:
        return Sampled(out.zero_(), None if lse is None else lse.fill_(-torch.inf))
    sizes, constants = _call(value, samples, _READ)
    # reads of several points at once; addresses that are read themselves fit no pipeline
    unroll = next(step for step in (4, 2, 1) if points.shape[4] % step == 0)
    deformable_fwd_kernel[(_programs(sizes, constants),)](
        value, *samples, out, lse, *sizes, **constants, UNROLL=unroll
    )
    return Sampled(out, lse)


def multi_scale_deformable_attention_backward(
    d_out: Tensor, lse: Tensor | None, value: Tensor, samples: Samples, needs: SamplingNeeds
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `multi_scale_deformable_attention_forward`.

    Args:
        d_out: [B, Q, H * d], contiguous.
        lse: of the forward; the softmax is formed again from the logits, which are read anyway.
        value, samples: as given to the forward.
        needs: which gradients to compute; the others are None.

    Returns:
        d_value [B, S, H, d], d_points, d_weights and d_reference in the shapes of their inputs, all
        fp32. Under torch.are_deterministic_algorithms_enabled() d_value is summed in 64-bit fixed
        point, whose unit follows from the largest product of a gradient and a weight; one that is
        not finite makes all of it NaN.

    Cost: four rows of d per sample out of L2, and as many added there in fp32 (int64), through one
    launch; those additions have no order in fp32.
    """
    points, reference = samples.points, samples.reference
    kind = torch.float32
    exact = torch.are_deterministic_algorithms_enabled()
    d_points = torch.empty_like(points) if needs.points else None
    d_weights = torch.empty_like(samples.weights, dtype=kind) if needs.weights else None
    d_value = d_parts = None
    if needs.value:
        d_value = torch.zeros(
            value.shape, dtype=torch.int64 if exact else kind, device=value.device
        )
    if needs.reference and reference is not None:
        # heads of a query belong to different programs
        d_parts = points.new_empty((*points.shape[:4], reference.shape[-1]))
    if points.numel() == 0:
        d_value = None if d_value is None else d_value.to(kind)
        d_reference = None if d_parts is None else torch.zeros_like(reference)
        return d_value, d_points, d_weights, d_reference
    per_unit = _units(d_out, lse, samples) if exact and needs.value else None
    sizes, constants = _call(value, samples, _ADD if per_unit is None else _COUNT)
    deformable_bwd_kernel[(_programs(sizes, constants),)](
        d_out,
        value,
        *samples,
        per_unit,
        d_value,
        d_points,
        d_weights,
        d_parts,
        *sizes[:3],
        points.shape[4],
        *sizes[3:],
        **constants,
    )
    if per_unit is not None:
        d_value = (d_value / per_unit).to(kind)
    d_reference = None if d_parts is None else d_parts.sum(2)
    return d_value, d_points, d_weights, d_reference


def _units(d_out: Tensor, lse: Tensor | None, samples: Samples) -> Tensor:
    """[1] fp64, a power of two: units of the fixed point in 1, so that no sum can overflow.

    A number of d_value is at most the sum of one corner of each sample of each query.
    """
    largest = _largest(d_out)
    if samples.reference is None:
        largest = largest * _largest(samples.weights)
    else:
        # weights of a softmax are at most 1, or NaN
        largest = torch.where(lse.isfinite().all(), largest, torch.nan)
    _, exponent = torch.frexp(largest)
    n_terms = samples.points.shape[1] * samples.points.shape[3] * samples.points.shape[4]
    # a bit for the sign, one for rounding
    bits = 62 - math.ceil(math.log2(n_terms))
    unit = torch.exp2((bits - exponent).to(torch.float64))
    return torch.where(largest.isfinite(), unit, torch.nan)


def _largest(tensor: Tensor) -> Tensor:
    """[1] fp64, the largest magnitude; NaN if there is one."""
    low, high = torch.aminmax(tensor)
    return torch.maximum(-low.double(), high.double()).reshape(1)


def _call(
    value: Tensor, samples: Samples, shape: _Shape
) -> tuple[tuple[int, ...], dict[str, object]]:
    """What both kernels take behind their tensors."""
    _, n_queries, heads, n_levels, n_points, _ = samples.points.shape
    strides = [value.stride(axis) if value.shape[axis] > 1 else 0 for axis in range(3)]
    # Triton by itself tells only multiples of 16, and heads of 24 would lose their wide loads
    unit = math.gcd(*strides, 16)
    sizes = (samples.points[..., 0, 0, 0].numel(), n_queries, value.shape[1])
    block_d = triton.next_power_of_2(value.shape[3])
    warps = min(max(shape.warps, block_d // (32 * shape.most)), shape.most_warps)
    constants = {
        "UNIT": unit,
        "HEADS": heads,
        "LEVELS": n_levels,
        "POINTS": n_points,
        "D": value.shape[3],
        "BOX": samples.reference is not None and samples.reference.shape[-1] == 4,
        "BLOCK_R": min(64, max(1, warps * 32 * shape.per_thread // block_d)),
        "BLOCK_D": block_d,
        "BLOCK_S": min(32, triton.next_power_of_2(n_levels * n_points)),
        "num_warps": warps,
        "num_stages": 1,
    }
    return (*sizes, *(stride // unit for stride in strides)), constants


def _programs(sizes: tuple[int, ...], constants: dict[str, object]) -> int:
    return triton.cdiv(sizes[0], constants["BLOCK_R"])
