"""`multi_scale_deformable_attention` on NVIDIA GPUs by the native core (csrc/cuda).

Contract: survfuse/ops/multi_scale_deformable_attention.py.  Oracle: the same name under
survfuse/reference.  Math: docs/math.md, "Multi-scale deformable attention".
"""

from __future__ import annotations

import torch
from torch import Tensor

from survfuse.deformable import Sampled, Samples, SamplingNeeds
from survfuse.native.core import address, launch_on_device
from survfuse.native.deformable_fields import deformable_fields

# a launcher's words are as wide, and its strides no longer than 32 bits
_ALIGNMENT = 16
_LONGEST_STRIDE = 2**31 - 1
# bits of a fixed-point sum: 63 without the sign, one to spare for roundings
_FIXED_BITS = 62
_LARGEST_EXPONENT = 126


def multi_scale_deformable_attention_forward(value: Tensor, samples: Samples) -> Sampled:
    """The result, and in the form with a reference lse."""
    arguments, alive = _arguments(value, samples)
    n_batches, n_queries, heads = samples.points.shape[:3]
    out = value.new_empty((n_batches, n_queries, heads * value.shape[3]))
    lse = None
    if samples.reference is not None:
        lse = samples.points.new_empty((n_batches, n_queries, heads))
    arguments |= {"out": address(out), "lse": address(lse)}
    launch_on_device("deformable_forward_cuda", arguments, value.device)
    del alive
    return Sampled(out, lse)


def multi_scale_deformable_attention_backward(
    d_out: Tensor, lse: Tensor | None, value: Tensor, samples: Samples, needs: SamplingNeeds
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """d_value, d_points, d_weights, d_reference in fp32; None where not needed.

    lse only tells whether weights are finite, where sums are in fixed point.
    """
    arguments, alive = _arguments(value, samples)
    d_out = _aligned(d_out)
    points = samples.points
    d_value = fixed = scale = None
    if needs.value and torch.are_deterministic_algorithms_enabled():
        d_value = points.new_empty(value.shape)
        fixed = torch.zeros(value.shape, dtype=torch.int64, device=value.device)
        scale = _fixed_scale(d_out, lse, samples)
    elif needs.value:
        d_value = points.new_zeros(value.shape)
    d_points = torch.empty_like(points) if needs.points else None
    d_weights = points.new_empty(samples.weights.shape) if needs.weights else None
    d_reference = None
    if needs.reference:
        # a level without points keeps its zeros
        shape = (*points.shape[:4], samples.reference.shape[-1])
        d_reference = points.new_zeros(shape)
    arguments |= {
        "d_out": address(d_out),
        "d_value": address(d_value),
        "d_points": address(d_points),
        "d_weights": address(d_weights),
        "d_reference": address(d_reference),
        "fixed_d_value": address(fixed),
        "fixed_scale": address(scale),
    }
    launch_on_device("deformable_backward_cuda", arguments, value.device)
    del alive
    return d_value, d_points, d_weights, None if d_reference is None else d_reference.sum(2)


def _fixed_scale(d_out: Tensor, lse: Tensor | None, samples: Samples) -> Tensor:
    """[2] fp32 on the device: powers of two whose product makes contributions whole numbers.

    The largest contribution times as many as a pixel can get stays within 62 bits. NaN where
    something that is summed may not be finite: the sums then are NaN, everywhere.
    """
    n_queries, n_points = samples.points.shape[1], samples.points.shape[4]
    if d_out.numel() == 0 or samples.weights.numel() == 0:
        return torch.ones(2, device=d_out.device)
    bound = _largest(d_out)
    if samples.reference is None:
        bound = bound * _largest(samples.weights)
    else:
        # weights of a softmax are at most 1, or NaN where lse is not finite
        bound = bound + (lse - lse).sum()
    exponent = _FIXED_BITS - (n_queries * n_points).bit_length() - torch.frexp(bound).exponent
    # a normal number of fp32 each: smaller contributions than these resolve do not exist
    exponent = exponent.clamp(-2 * _LARGEST_EXPONENT, 2 * _LARGEST_EXPONENT)
    half = exponent // 2
    bits = (torch.stack([half, exponent - half]).to(torch.int32) + 127) << 23
    # an infinite product of finite numbers is as bad as an infinite one
    return torch.where(bound.float().isfinite(), bits.view(torch.float32), torch.nan)


def _largest(tensor: Tensor) -> Tensor:
    low, high = tensor.aminmax()
    return torch.maximum(low.abs(), high.abs()).double()


def _aligned(tensor: Tensor) -> Tensor:
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()


def _arguments(value: Tensor, samples: Samples) -> tuple[dict, list]:
    """The launcher's fields, and the tensors that must outlive the call."""
    if max(value.stride()) > _LONGEST_STRIDE:
        value = value.contiguous()
    weights = samples.weights
    samples = samples._replace(
        points=_aligned(samples.points),
        weights=weights.float() if weights.dtype == torch.float64 else weights,
    )
    return deformable_fields(value, samples), [value, samples]
