"""What every implementation of `multi_scale_deformable_attention` is told, and what it returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Sampled(NamedTuple):
    """What an implementation returns."""

    out: Tensor  # [B, Q, H * d], dtype of the value
    # [B, Q, H] logsumexp of the logits, fp32 (fp64 for fp64); None where weights were given. It is
    # finite where they are: backwards take the softmax again
    lse: Tensor | None


class Samples(NamedTuple):
    """Where each query looks, and how much each look weighs; all floats but `weights` are fp32.

    Without `reference`, `points` are (x, y) in [0, 1] of a level and `weights` sum to 1. With it,
    `points` are offsets from it: in pixels of the level beside (x, y), in halves of the box's
    sides over P beside (x, y, width, height); and `weights` are logits of a softmax over (L, P).
    """

    shapes: Tensor  # [L, 2] int64, (height, width) of each level
    points: Tensor  # [B, Q, H, L, P, 2], fp64 beside an fp64 value
    weights: Tensor  # [B, Q, H, L, P], any floating type
    reference: Tensor | None  # [B, Q, L, 2 or 4], the type of `points`


class SamplingNeeds(NamedTuple):
    """Which gradients of `multi_scale_deformable_attention` are wanted."""

    value: bool
    points: bool
    weights: bool
    reference: bool
