"""Other packages' multi-scale deformable attention, where somebody has them."""

from __future__ import annotations

import torch
from torch import Tensor

from .original_deformable import library_for, original_deformable_attention


def others(value: Tensor, shapes, locations: Tensor, weights: Tensor):
    """Ways of other packages by name, and why an absent one takes no part."""
    ways, left_out = {}, {}
    sizes = torch.tensor(shapes, device=value.device)
    try:
        from transformers.models.deformable_detr import modeling_deformable_detr as theirs

        attention = theirs.MultiScaleDeformableAttention()
        if value.device.type == "cpu" and value.dtype != torch.float32:
            left_out["transformers (python)"] = (True, "its grid_sample takes no 16 bits on a CPU")
        else:
            # its grid_sample wants one type of all
            ways["transformers (python)"] = lambda: attention(
                value, sizes, list(shapes), None, locations.to(value.dtype), weights, 64
            )
    except (ImportError, AttributeError) as error:
        left_out["transformers (python)"] = (False, f"not installed: {error}")
    try:
        from mmcv.ops import MultiScaleDeformableAttnFunction

        areas = sizes.prod(-1)
        starts = areas.cumsum(0) - areas
        if value.device.type == "cpu" or value.dtype == torch.bfloat16:
            left_out["mmcv (CUDA)"] = (True, "it takes fp16, fp32 and fp64 on a GPU")
        else:
            ways["mmcv (CUDA)"] = lambda: MultiScaleDeformableAttnFunction.apply(
                value, sizes, starts, locations, weights, 64
            )
    except ImportError as error:
        left_out["mmcv (CUDA)"] = (False, f"not installed: {error}")
    if value.device.type == "cuda":
        try:
            library_for(value.device)
            ways["original layout (CUDA)"] = lambda: original_deformable_attention(
                value, sizes, locations, weights
            )
        except RuntimeError as error:
            left_out["original layout (CUDA)"] = (False, str(error))
    return ways, left_out
