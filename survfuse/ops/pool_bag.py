"""`pool_bag`: softmax pooling of ragged bags that are both keys and values.

Oracle: survfuse/reference/pool_bag.py.  Math: docs/math.md, "Pooling".
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from survfuse import reference
from survfuse.ops.backends import check_backend, select_backend
from survfuse.ops.checks import check_bag, check_bias, check_dropout, check_stats, check_tensor
from survfuse.ops.flops import flop_formula
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
from survfuse.pooling import Needs, PooledBag, Pooling, accumulation_type
from survfuse.ragged import Ragged, as_packed
from survfuse.reference.dropout import draw_seed

_MODULES = {
    "tiled": "survfuse.tiled.pool_bag",
    "native": "survfuse.native.pool_bag",
    "triton": "survfuse.triton_kernels.pool_bag",
}


def pool_bag(
    rows: Tensor,
    bag: Tensor,
    *,
    bias: Tensor | None = None,
    ragged: Ragged | None = None,
    scale: float = 1.0,
    normalize_eps: float | None = None,
    stats: tuple[Tensor, Tensor] | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> PooledBag:
    r"""Attention of R rows over a bag that is its own keys and values, in one read of the bag.

    .. math:: z_r = \sum_i \mathrm{softmax}_i(\mathrm{scale}\; a_r \cdot x_i + bias_i)\, x_i

    Args:
        rows: [B, R, D] the rows a: queries with the key projection absorbed. May be fp32 over a
            16-bit bag.
        bag: [T, D] packed, or dense [B, N, D]; bf16, fp16, fp32, or fp64 on the CPU. Any row
            stride; a last stride other than 1 is copied.
        bias: [T] added to every row's logit of that patch. -inf excludes the patch, which may then
            hold anything, NaN included.
        ragged: the range of rows of each bag; None is one bag (or a dense `bag`). Rows in no bag
            are never read.
        scale: factor of the dot product.
        normalize_eps: if given, each patch is first layer-normalised (no affine part) with this
            epsilon.
        stats: (mean [T], rstd [T]) of a frozen bag, to spare their computation; used with
            `normalize_eps` only.
        dropout_p: each weight is dropped with this probability, the rest scaled by 1 / (1 - p).
        backend: None, "reference", "tiled", "triton" or "native".

    Returns:
        pooled [B, R, D] and weight_sum [B, R] (1 without dropout) of the type of `rows`, and lse
        [B, R], the logsumexp of the logits before dropout, fp32 (fp64 for fp64). All are
        differentiable in rows, bag and bias. A bag of no rows, or with every bias -inf, gives
        zeros, lse -inf, and zero gradients.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device; it is named.
        RuntimeError: a named backend cannot serve the call; double backward, forward mode,
            derivatives of torch.func (use backend="reference").

    Precision: fp32 (fp64) sums; error against fp64 at most twice that of plain torch in the type of
    the bag.
    Determinism: bitwise, always.
    Cost: reads the bag once forward and once backward (written once more if it is trained);
    4 N D R and 6 N D R operations (10 N D R if trained).
    vmap: by the fallback of torch, one call per sample; batch through `ragged`.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> pool_bag(torch.zeros(1, 1, 2), x).pooled
        tensor([[[0.5000, 0.5000]]])
    """
    packed, bias, ragged = check_pooling(rows, bag, bias, ragged, stats)
    check_dropout(dropout_p)
    check_backend(backend)
    seed = draw_seed(bag.device) if dropout_p > 0 and backend != "reference" else None
    pooling = make_pooling(ragged, scale, normalize_eps, stats, dropout_p, seed)
    if backend == "reference":
        check_ranges_eagerly(packed, ragged)
        return call_reference(
            reference.pool_bag,
            rows,
            packed,
            bias=bias,
            ragged=ragged,
            scale=scale,
            normalize_eps=normalize_eps,
            stats=stats,
            dropout_p=dropout_p,
        )
    pooled, lse, weight_sum = call_op(
        "pool_bag", _forward, rows, packed, bias, *pooling, backend or ""
    )
    return PooledBag(pooled.to(rows.dtype), lse, weight_sum.to(rows.dtype))


def check_pooling(
    rows: Tensor,
    bag: Tensor,
    bias: Tensor | None,
    ragged: Ragged | None,
    stats: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor | None, Ragged]:
    """The packed bag, bias as [T] and the ranges, after every check on shapes and devices."""
    check_bag(bag)
    check_tensor("rows", rows, shape=("B", "R", bag.shape[-1]), device=bag.device)
    if bias is not None:
        bias = check_bias(bias, bag)
    packed, ragged = as_packed(bag, ragged, rows.shape[0])
    check_stats(stats, packed)
    return packed, bias, ragged


_INPUTS = (
    f"Tensor rows, Tensor bag, Tensor? bias, {POOLING_SCHEMA}, "
    "float dropout_p, Tensor? seed, str backend"
)
_RESULTS = "Tensor pooled, Tensor lse, Tensor weight_sum"
_D_RESULTS = "Tensor d_pooled, Tensor d_lse, Tensor d_weight_sum"


def _implementation(backend: str, bag: Tensor, n_rows: int):
    chosen = select_backend(backend or None, device=bag.device, dtype=bag.dtype, n_rows=n_rows)
    return importlib.import_module(_MODULES[chosen.backend])


@torch.library.custom_op(
    "survfuse::pool_bag", mutates_args=(), schema=f"({_INPUTS}) -> (Tensor, Tensor, Tensor)"
)
@without_autocast
def _forward(rows, bag, bias, *options):
    *pooling, backend = options
    pooling = Pooling(*pooling)
    check_ranges(bag, pooling.ragged)
    module = _implementation(backend, bag, rows.shape[1])
    return module.pool_bag_forward(rows, unit_stride(bag), bias, pooling)


@_forward.register_fake
def _(rows, bag, *rest):
    kind = accumulation_type(bag.dtype)
    shapes = (rows.shape, rows.shape[:2], rows.shape[:2])
    return tuple(bag.new_empty(shape, dtype=kind) for shape in shapes)


@torch.library.custom_op(
    "survfuse::pool_bag_backward",
    mutates_args=(),
    schema=f"({_D_RESULTS}, {_RESULTS}, {_INPUTS}, "
    "bool needs_rows, bool needs_bag, bool needs_bias) -> (Tensor, Tensor, Tensor)",
)
@without_autocast
def _backward(*arguments):
    d_results, results = PooledBag(*arguments[:3]), PooledBag(*arguments[3:6])
    rows, bag, bias, *pooling, backend = arguments[6:-3]
    module = _implementation(backend, bag, rows.shape[1])
    gradients = module.pool_bag_backward(
        d_results, results, rows, unit_stride(bag), bias, Pooling(*pooling), Needs(*arguments[-3:])
    )
    return gradients_like(gradients, (rows, bag, bias))


@_backward.register_fake
def _(*arguments):
    return fake_gradients(arguments[6:9], arguments[-3:])


def _save(ctx, inputs, output):
    save_call(ctx, inputs, output)


def _differentiate(ctx, *d_results):
    results, inputs = saved_call(ctx)
    needs = ctx.needs_input_grad[:3]
    return to_autograd(
        call_op("pool_bag", _backward, *d_results, *results, *inputs, *needs), needs, len(inputs)
    )


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(no_double_backward("pool_bag"))


@flop_formula(torch.ops.survfuse.pool_bag)
def _forward_flops(rows_shape, bag_shape, bias, starts, lengths, total, *rest, **_) -> int:
    return 4 * total * rows_shape[1] * rows_shape[2]


@flop_formula(torch.ops.survfuse.pool_bag_backward)
def _backward_flops(*arguments, **_) -> int:
    rows_shape, total, needs_bag = arguments[6], arguments[11], arguments[-2]
    return (10 if needs_bag else 6) * total * rows_shape[1] * rows_shape[2]
