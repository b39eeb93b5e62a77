"""Multi-scale deformable attention, as obvious as it can be said. Math: docs/math.md."""

from __future__ import annotations

import torch
from torch import Tensor


def multi_scale_deformable_attention(
    value: Tensor,
    spatial_shapes: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """The weighted sum of bilinear samples of every level.

    Args:
        value: [B, S, H, d], the levels' pixels one behind another, row by row.
        spatial_shapes: [L, 2] (height, width).
        sampling_locations: [B, Q, H, L, P, 2] (x, y); (0, 0) is the upper left corner of a level's
            first pixel, (1, 1) the lower right one of its last.
        attention_weights: [B, Q, H, L, P].

    Returns:
        [B, Q, H * d].
    """
    n_batches, n_rows, heads, dim = value.shape
    kind = torch.float64 if value.dtype == torch.float64 else torch.float32
    batch = torch.arange(n_batches, device=value.device)[:, None, None, None]
    head = torch.arange(heads, device=value.device)[:, None]
    # a row of zeros, read wherever a corner lies outside
    padded = torch.cat([value.to(kind), value.new_zeros(n_batches, 1, heads, dim, dtype=kind)], 1)
    out = value.new_zeros(*attention_weights.shape[:3], dim, dtype=kind)
    start = 0
    for level, (height, width) in enumerate(spatial_shapes.tolist()):
        size = sampling_locations.new_tensor([width, height])
        # pixel centres lie at whole numbers
        pixel = sampling_locations[:, :, :, level] * size - 0.5
        inside = ((pixel > -1) & (pixel < size)).all(-1)
        corner = torch.where(inside[..., None], pixel, 0.0).floor().to(torch.int64)
        fraction = torch.where(inside[..., None], pixel, 0.0) - corner
        for dy in (0, 1):
            for dx in (0, 1):
                x, y = corner[..., 0] + dx, corner[..., 1] + dy
                held = inside & (x >= 0) & (x < width) & (y >= 0) & (y < height)
                row = torch.where(held, start + y * width + x, n_rows)
                share = torch.ones_like(fraction[..., 0])
                share = share * (fraction[..., 0] if dx else 1 - fraction[..., 0])
                share = share * (fraction[..., 1] if dy else 1 - fraction[..., 1])
                weight = share * attention_weights[:, :, :, level].to(kind)
                sample = padded[batch, row, head]
                out = out + torch.where(held[..., None], weight[..., None] * sample, 0.0).sum(3)
        start += height * width
    return out.flatten(2).to(value.dtype)


def multi_scale_deformable_attention_from_offsets(
    value: Tensor,
    spatial_shapes: Tensor,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """The same with the softmax and the arithmetic of the locations inside.

    Args:
        value, spatial_shapes: as above.
        reference_points: [B, Q, L, 2] (x, y), or [B, Q, L, 4] (x, y, width, height) of a box.
        sampling_offsets: [B, Q, H, L, P, 2], in pixels of the level; beside a box in its
            half sides over P.
        attention_logits: [B, Q, H, L, P], or [B, Q, H, L * P].

    Returns:
        [B, Q, H * d].
    """
    n_levels, n_points = sampling_offsets.shape[3:5]
    logits = attention_logits.to(sampling_offsets.dtype).reshape(sampling_offsets.shape[:-1])
    weights = logits.flatten(3).softmax(-1).unflatten(3, (n_levels, n_points))
    centre = reference_points[:, :, None, :, None, :2]
    if reference_points.shape[-1] == 2:
        # a level without pixels is not sampled, wherever its points lie
        step = 1 / spatial_shapes.flip(-1).clamp(min=1).to(sampling_offsets.dtype)[:, None]
    else:
        step = reference_points[:, :, None, :, None, 2:] * (0.5 / n_points)
    # what is no number lies outside and has no gradient
    known = (centre + sampling_offsets * step).isfinite().detach()
    offsets, step = torch.where(known, sampling_offsets, 0.0), torch.where(known, step, 0.0)
    locations = torch.where(known, centre + offsets * step, torch.nan)
    return multi_scale_deformable_attention(value, spatial_shapes, locations, weights)
