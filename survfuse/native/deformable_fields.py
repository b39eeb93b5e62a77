"""The fields that the launchers of multi-scale deformable attention share."""

from __future__ import annotations

from torch import Tensor

from survfuse.deformable import Samples
from survfuse.native.core import ELEMENT_TYPES, address


def deformable_fields(value: Tensor, samples: Samples) -> dict:
    """What `DeformableParams` (csrc) says of the tensors; they must outlive the call."""
    reference = samples.reference
    _, n_queries, _, n_levels, n_points, _ = samples.points.shape
    n_batches, n_rows, n_heads, dim = value.shape
    batch_stride, row_stride, head_stride, _ = value.stride()
    return {
        "value": address(value),
        "value_type": ELEMENT_TYPES[value.dtype],
        "batch_stride": batch_stride,
        "row_stride": row_stride,
        "head_stride": head_stride,
        "shapes": address(samples.shapes),
        "points": address(samples.points),
        "weights": address(samples.weights),
        "weight_type": ELEMENT_TYPES[samples.weights.dtype],
        "reference": address(reference),
        "reference_dim": 0 if reference is None else reference.shape[-1],
        "n_batches": n_batches,
        "n_queries": n_queries,
        "n_rows": n_rows,
        "n_heads": n_heads,
        "dim": dim,
        "n_levels": n_levels,
        "n_points": n_points,
        "n_threads": 0,
        "isa": 0,
        "stream": 0,
    }
