"""`multi_scale_deformable_attention` by the native core.

Contract: survfuse/ops/multi_scale_deformable_attention.py.  Oracle: the same name under
survfuse/reference.  Math: docs/math.md, "Multi-scale deformable attention".
"""

from __future__ import annotations

import torch
from torch import Tensor

from survfuse.deformable import Sampled, Samples, SamplingNeeds
from survfuse.native.core import CPU_ISAS, ELEMENT_TYPES, address, native_core


def multi_scale_deformable_attention_forward(
    value: Tensor, samples: Samples, *, isa: str = "auto"
) -> Sampled:
    """Out [B, Q, H * d] of the type of the value, and lse where the weights are logits."""
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
    """Gradients of value, points, weights and reference; None where not needed."""
    points, reference = samples.points, samples.reference
    d_value = points.new_zeros(value.shape) if needs.value else None
    d_points = torch.empty_like(points)
    d_weights = points.new_empty(samples.weights.shape)
    d_reference = None
    if needs.reference:
        d_reference = points.new_empty((*points.shape[:4], reference.shape[-1]))
    arguments, alive = _arguments(value, samples, isa)
    arguments |= {
        "lse": address(lse),
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
    weights = samples.weights.to(samples.points.dtype)
    reference = samples.reference
    _, n_queries, _, n_levels, n_points, _ = samples.points.shape
    n_batches, n_rows, n_heads, dim = value.shape
    batch_stride, row_stride, head_stride, _ = value.stride()
    fields = {
        "value": address(value),
        "value_type": ELEMENT_TYPES[value.dtype],
        "batch_stride": batch_stride,
        "row_stride": row_stride,
        "head_stride": head_stride,
        "shapes": address(samples.shapes),
        "points": address(samples.points),
        "weights": address(weights),
        "weight_type": ELEMENT_TYPES[weights.dtype],
        "reference": address(reference),
        "reference_dim": 0 if reference is None else reference.shape[-1],
        "n_batches": n_batches,
        "n_queries": n_queries,
        "n_rows": n_rows,
        "n_heads": n_heads,
        "dim": dim,
        "n_levels": n_levels,
        "n_points": n_points,
        "n_threads": torch.get_num_threads(),
        "isa": CPU_ISAS.index(isa),
        "stream": 0,
    }
    return fields, (value, samples, weights)
