"""Specification of `merge_attention`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from survfuse.reference.pool_bag import _logsumexp


def merge_attention(
    outs: Sequence[Tensor] | Tensor, lses: Sequence[Tensor] | Tensor
) -> tuple[Tensor, Tensor]:
    """Results over disjoint key sets as one; see `survfuse.ops.merge_attention`."""
    outs = outs if isinstance(outs, Tensor) else torch.stack(list(outs))
    lses = lses if isinstance(lses, Tensor) else torch.stack(list(lses))
    kind = torch.promote_types(outs.dtype, lses.dtype)
    logits = lses.to(kind).movedim(0, -1).flatten(0, -2)  # [rows, parts]
    nothing = (logits == -torch.inf).all(-1, keepdim=True)
    # not exp(L_j - L): the sum of such shares is off by the rounding of a large L
    share = torch.where(nothing, 0.0, torch.where(nothing, 0.0, logits).softmax(-1))
    share = share.T.reshape(lses.shape)[..., None]
    absent = (lses == -torch.inf)[..., None]
    out = (share * torch.where(absent, 0.0, outs.to(kind))).sum(0)
    lse = _logsumexp(logits).reshape(lses.shape[1:])
    return out.to(outs.dtype), lse.to(lses.dtype)
