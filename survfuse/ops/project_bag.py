"""`project_bag`: rows of a ragged bag, normalised if wanted, times a weight, tile by tile.

What attention with K, V or Q formed stands on: layer normalisation, gathering of ranges and the
zeroing of excluded rows never make a copy of the bag. Internal: callers have checked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from survfuse.ops.flops import flop_formula
from survfuse.ops.registration import (
    POOLING_SCHEMA,
    call_op,
    check_ranges,
    fake_gradients,
    gradients_like,
    make_pooling,
    no_double_backward,
    save_call,
    saved_call,
    to_autograd,
    unit_stride,
    without_autocast,
)
from survfuse.pooling import Pooling, accumulation_type
from survfuse.ragged import Ragged
from survfuse.tiled.project_bag import project_bag_backward, project_bag_forward


def project_bag(
    bag: Tensor,
    weight: Tensor,
    shift: Tensor | None,
    *,
    ragged: Ragged,
    bias: Tensor | None = None,
    normalize_eps: float | None = None,
) -> Tensor:
    """W x_i + b for every patch of every bag, packed in batch order.

    Args:
        bag: [T, D].
        weight: [E, D].
        shift: [E], or None.
        ragged: the ranges.
        bias: [T]; a row where it is -inf may hold anything and counts as zeros. No gradient flows
            to it here.
        normalize_eps: if given, rows are layer-normalised first, without an affine part.

    Returns:
        [total, E] of the type of the bag, as plain torch would have it.
    """
    pooling = make_pooling(ragged, 1.0, normalize_eps, None)
    bias = None if bias is None else bias.detach()
    return call_op("project_bag", _forward, bag, weight, shift, bias, *pooling[:9])


def form_heads(
    weight: Tensor,
    shift: Tensor | None,
    *,
    bag: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float | None,
    bias: Tensor | None,
    ragged: Ragged,
) -> Tensor:
    """W (normalised x_i) + b per head, packed [total, H, e] in batch order.

    Args:
        weight: [H, e, D].
        shift: [H, e], or None.
        bag: [T, D]; rows with `bias` -inf count as zeros.
        norm_weight, norm_bias: [D] or None; they go into weight and shift.
        norm_eps: None where nothing is normalised.
        bias: [T] or None.
        ragged: the ranges.
    """
    kind = accumulation_type(bag.dtype)
    heads = weight.shape[:2]
    flat = weight.flatten(0, 1).to(kind)
    flat_shift = None if shift is None else shift.reshape(-1).to(kind)
    if norm_bias is not None:
        projected = flat @ norm_bias.to(kind)
        flat_shift = projected if flat_shift is None else flat_shift + projected
    if norm_weight is not None:
        flat = flat * norm_weight.to(kind)
    rows = project_bag(bag, flat, flat_shift, ragged=ragged, bias=bias, normalize_eps=norm_eps)
    return rows.unflatten(1, heads)


def packed_rows(ragged: Ragged, n_stored: int) -> Tensor:
    """[total] int64: the stored row of each packed one, clamped to those there are."""
    return ragged.rows().clamp(0, max(n_stored - 1, 0))


_INPUTS = f"Tensor bag, Tensor weight, Tensor? shift, Tensor? bias, {POOLING_SCHEMA}"


@torch.library.custom_op("survfuse::project_bag", mutates_args=(), schema=f"({_INPUTS}) -> Tensor")
@without_autocast
def _forward(bag, weight, shift, bias, *options):
    pooling = Pooling(*options)
    check_ranges(bag, pooling.ragged)
    return project_bag_forward(unit_stride(bag), weight, shift, bias, pooling)


@_forward.register_fake
def _(bag, weight, shift, bias, starts, lengths, total, *rest):
    return bag.new_empty((total, weight.shape[0]))


@torch.library.custom_op(
    "survfuse::project_bag_backward",
    mutates_args=(),
    schema=f"(Tensor d_out, {_INPUTS}, bool needs_bag, bool needs_weight, bool needs_shift) "
    "-> (Tensor, Tensor, Tensor)",
)
@without_autocast
def _backward(d_out, bag, weight, shift, bias, *options):
    gradients = project_bag_backward(
        d_out, unit_stride(bag), weight, bias, Pooling(*options[:-3]), options[-3:]
    )
    return gradients_like(gradients, (bag, weight, shift))


@_backward.register_fake
def _(d_out, bag, weight, shift, bias, *options):
    return fake_gradients((bag, weight, shift), options[-3:])


def _save(ctx, inputs, output):
    save_call(ctx, inputs)


def _differentiate(ctx, d_out):
    _, inputs = saved_call(ctx)
    needs = ctx.needs_input_grad[:3]
    return to_autograd(
        call_op("project_bag", _backward, d_out, *inputs, *needs), needs, len(inputs)
    )


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(no_double_backward("project_bag"))


@flop_formula(torch.ops.survfuse.project_bag)
def _forward_flops(bag, weight, shift, bias, starts, lengths, total, *rest, **_) -> int:
    return 2 * total * weight[0] * weight[1]


@flop_formula(torch.ops.survfuse.project_bag_backward)
def _backward_flops(d_out, bag, weight, shift, bias, starts, lengths, total, *rest, **_) -> int:
    n_products = int(rest[-3]) + int(rest[-2])
    return n_products * 2 * total * weight[0] * weight[1]
