"""`pool_weights`: the softmax weights of `pool_bag`, streamed.

Oracle: survfuse/reference/pool_bag.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from survfuse import reference
from survfuse.ops.backends import check_backend
from survfuse.ops.checks import check_reduce, check_tensor
from survfuse.ops.flops import flop_formula
from survfuse.ops.pool_bag import check_pooling
from survfuse.ops.registration import (
    POOLING_SCHEMA,
    call_op,
    call_reference,
    check_ranges,
    check_ranges_eagerly,
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
from survfuse.tiled.pool_weights import pool_weights_backward, pool_weights_forward


def pool_weights(
    rows: Tensor,
    bag: Tensor,
    lse: Tensor,
    *,
    bias: Tensor | None = None,
    ragged: Ragged | None = None,
    scale: float = 1.0,
    normalize_eps: float | None = None,
    stats: tuple[Tensor, Tensor] | None = None,
    reduce: str | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""The weights each row gives to each patch, without ever holding more than is returned.

    .. math:: p_{ir} = \exp(\mathrm{scale}\; a_r \cdot x_i + bias_i - lse_r)

    Args:
        rows, bag, bias, ragged, scale, normalize_eps, stats: those of the `pool_bag` call.
        lse: [B, R] what that call returned; or [B, Lq, H] with Lq * H = R, row r being query
            r // H, head r % H.
        reduce: None; "rows", the mean over all rows; "heads", the mean over H.
        backend: None, "reference" or "tiled".

    Returns:
        The weights before dropout, packed per (bag, patch) in batch order: [total, R] (or
        [total, Lq, H]); [total] for "rows"; [total, Lq] for "heads". fp32 (fp64 for fp64);
        differentiable in rows, bag, lse and bias.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device; it is named.

    Determinism: bitwise.
    Cost: reads the bag once forward and once backward; 2 N D R and 4 N D R operations.
    vmap: by the fallback of torch, one call per sample; batch through `ragged`.

    Example:
        >>> x = torch.eye(2)
        >>> rows = torch.zeros(1, 1, 2)
        >>> pool_weights(rows, x, torch.full((1, 1), 2.0).log(), reduce="rows")
        tensor([0.5000, 0.5000])
    """
    packed, bias, ragged = check_pooling(rows, bag, bias, ragged, stats)
    check_reduce(reduce)
    n_bags, n_rows = rows.shape[:2]
    if n_rows == 0:
        raise ValueError(f"rows has shape {tuple(rows.shape)}; it must hold at least one row")
    if isinstance(lse, Tensor) and lse.dim() == 3:
        check_tensor("lse", lse, shape=(n_bags, "Lq", "H"), device=bag.device)
        if lse.shape[1] * lse.shape[2] != n_rows:
            raise ValueError(
                f"lse has shape {tuple(lse.shape)}; Lq * H must be the {n_rows} rows of `rows`"
            )
    else:
        check_tensor("lse", lse, shape=(n_bags, n_rows), device=bag.device)
        if reduce == "heads":
            raise ValueError(
                f'reduce="heads" needs lse as [B, Lq, H]; its shape is {tuple(lse.shape)}'
            )
    check_weights_backend(backend)
    pooling = make_pooling(ragged, scale, normalize_eps, stats)
    if backend == "reference":
        check_ranges_eagerly(packed, ragged)
        return call_reference(
            reference.pool_weights,
            rows,
            packed,
            lse,
            bias=bias,
            ragged=ragged,
            scale=scale,
            normalize_eps=normalize_eps,
            stats=stats,
            reduce=reduce,
        )
    group = {None: 1, "rows": n_rows, "heads": lse.shape[-1]}[reduce]
    weights = call_op(
        "pool_weights",
        _forward,
        rows,
        packed,
        lse.reshape(n_bags, n_rows),
        bias,
        *pooling[:9],
        group,
    )
    if reduce == "rows":
        return weights.reshape(ragged.total)
    return weights.reshape(ragged.total, *lse.shape[1 : 3 if reduce is None else 2])


def check_weights_backend(backend: str | None, op: str = "pool_weights") -> None:
    """Raise unless `backend` implements the weights of an op."""
    check_backend(backend)
    if backend in ("native", "triton"):
        raise RuntimeError(
            f"backend={backend!r} cannot serve this call: only None, "
            f'"reference" and "tiled" implement {op}'
        )


_INPUTS = f"Tensor rows, Tensor bag, Tensor lse, Tensor? bias, {POOLING_SCHEMA}, SymInt group"


@torch.library.custom_op("survfuse::pool_weights", mutates_args=(), schema=f"({_INPUTS}) -> Tensor")
@without_autocast
def _forward(rows, bag, lse, bias, *options):
    *pooling, group = options
    pooling = Pooling(*pooling)
    check_ranges(bag, pooling.ragged)
    return pool_weights_forward(rows, unit_stride(bag), lse, bias, pooling, group)


@_forward.register_fake
def _(rows, bag, lse, bias, starts, lengths, total, *rest):
    return bag.new_empty((total, rows.shape[1] // rest[-1]), dtype=accumulation_type(bag.dtype))


@torch.library.custom_op(
    "survfuse::pool_weights_backward",
    mutates_args=(),
    schema=f"(Tensor d_weights, {_INPUTS}, bool needs_rows, bool needs_bag, bool needs_lse, "
    "bool needs_bias) -> (Tensor, Tensor, Tensor, Tensor)",
)
@without_autocast
def _backward(d_weights, rows, bag, lse, bias, *options):
    *pooling, group = options[:-4]
    gradients = pool_weights_backward(
        d_weights, rows, unit_stride(bag), lse, bias, Pooling(*pooling), group, options[-4:]
    )
    return gradients_like(gradients, (rows, bag, lse, bias))


@_backward.register_fake
def _(d_weights, rows, bag, lse, bias, *options):
    return fake_gradients((rows, bag, lse, bias), options[-4:])


def _save(ctx, inputs, output):
    save_call(ctx, inputs)


def _differentiate(ctx, d_weights):
    _, inputs = saved_call(ctx)
    needs = ctx.needs_input_grad[:4]
    return to_autograd(
        call_op("pool_weights", _backward, d_weights, *inputs, *needs), needs, len(inputs)
    )


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(no_double_backward("pool_weights"))


@flop_formula(torch.ops.survfuse.pool_weights)
def _forward_flops(rows_shape, bag_shape, lse, bias, starts, lengths, total, *rest, **_) -> int:
    return 2 * total * rows_shape[1] * rows_shape[2]


@flop_formula(torch.ops.survfuse.pool_weights_backward)
def _backward_flops(dw, rows_shape, bag_shape, lse, bias, starts, lengths, total, *rest, **_):
    return 4 * total * rows_shape[1] * rows_shape[2]
