"""`multi_scale_deformable_attention` by the native core.

Contract: survfuse/ops/multi_scale_deformable_attention.py.  Oracle: the same name under
survfuse/reference.  Math: docs/math.md, "Multi-scale deformable attention".
"""

from __future__ import annotations

import torch
from torch import Tensor

from survfuse.deformable import Sampled, Samples, SamplingNeeds
from survfuse.native import multi_scale_deformable_attention_cuda as on_gpu
from survfuse.native.core import CPU_ISAS, address, native_core
from survfuse.native.deformable_fields import deformable_fields


def multi_scale_deformable_attention_forward(
    value: Tensor, samples: Samples, *, isa: str = "auto"
) -> Sampled:
    """Out [B, Q, H * d] of the type of the value, and lse where the weights are logits."""
    if value.device.type == "cuda":
        return on_gpu.multi_scale_deformable_attention_forward(value, samples)
    out = value.new_empty((*samples.points.shape[:3], value.shape[3]))
    lse = None if samples.reference is None else torch.empty_like(samples.points[:, :, :, 0, 0, 0])
    arguments, alive = _arguments(value, samples, isa)
    arguments |= {"out": address(out), "lse": address(lse)}
    native_core().deformable_forward(arguments)
    del alive
    return Sampled(out.flatten(2), lse)


def multi_scale_deformable_attention_backward(
    d_out: Tensor,
    lse: Tensor | None,
    value: Tensor,
    samples: Samples,
    needs: SamplingNeeds,
    *,
    isa: str = "auto",
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of value, points, weights and reference; None where not needed.

    The softmax is taken again, so that lse is not read.
    """
    if value.device.type == "cuda":
        return on_gpu.multi_scale_deformable_attention_backward(d_out, lse, value, samples, needs)
    points, reference = samples.points, samples.reference
    d_value = points.new_zeros(value.shape) if needs.value else None
    d_points = torch.empty_like(points)
    d_weights = points.new_empty(samples.weights.shape)
    d_reference = None
    if needs.reference:
        d_reference = points.new_empty((*points.shape[:4], reference.shape[-1]))
    arguments, alive = _arguments(value, samples, isa)
    arguments |= {
        "d_out": address(d_out),
        "d_value": address(d_value),
        "d_points": address(d_points),
        "d_weights": address(d_weights),
        "d_reference": address(d_reference),
    }
    native_core().deformable_backward(arguments)
    del alive
    return (
        d_value,
        d_points if needs.points else None,
        d_weights if needs.weights else None,
        None if d_reference is None else d_reference.sum(2),
    )


def _arguments(value: Tensor, samples: Samples, isa: str) -> tuple[dict, tuple]:
    """The launcher's fields, and what must live until it returns."""
    samples = samples._replace(weights=samples.weights.to(samples.points.dtype))
    threads = {"n_threads": torch.get_num_threads(), "isa": CPU_ISAS.index(isa)}
    return deformable_fields(value, samples) | threads, (value, samples)
