"""`pool_bag`: softmax pooling of ragged bags that are both keys and values.

Oracle: survfuse/reference/pool_bag.py.  Math: docs/math.md, "Pooling".
"""

from __future__ import annotations

import functools
import importlib

import torch
from torch import Tensor

from survfuse import reference
from survfuse.ops.backends import select_backend
from survfuse.ops.checks import check_bag, check_bias, check_dropout, check_tensor
from survfuse.ops.flops import flop_formula
from survfuse.ragged import Ragged, as_packed
from survfuse.reference.dropout import draw_seed
from survfuse.reference.pool_bag import PooledBag

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
        RuntimeError: a named backend cannot serve the call; double backward (use
            backend="reference").

    Precision: fp32 (fp64) sums; error against fp64 at most twice that of plain torch in the type of
    the bag.
    Determinism: bitwise, always.
    Cost: reads the bag once forward and once backward (written once more if it is trained);
    4 N D R and 6 N D R operations (10 N D R if trained).
    vmap: not supported; batch through `ragged`.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> pool_bag(torch.zeros(1, 1, 2), x).pooled
        tensor([[[0.5000, 0.5000]]])
    """
    packed, bias, ragged = check_pooling(rows, bag, bias, ragged, stats)
    check_dropout(dropout_p)
    if backend == "reference":
        check_ranges_eagerly(packed, ragged)
        return reference.pool_bag(
            rows,
            packed,
            bias=bias,
            ragged=ragged,
            scale=scale,
            normalize_eps=normalize_eps,
            stats=stats,
            dropout_p=dropout_p,
        )
    mean, rstd = (None, None) if stats is None or normalize_eps is None else stats
    pooled, lse, weight_sum = _forward(
        rows,
        packed,
        bias,
        ragged.starts,
        ragged.lengths,
        ragged.total,
        ragged.max_length,
        scale,
        normalize_eps is not None,
        0.0 if normalize_eps is None else normalize_eps,
        mean,
        rstd,
        dropout_p,
        draw_seed(bag.device) if dropout_p > 0 else None,
        backend or "",
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
    if stats is not None:
        if not isinstance(stats, tuple) or len(stats) != 2:
            found = f"a tuple of {len(stats)}" if isinstance(stats, tuple) else type(stats).__name__
            raise TypeError(f"stats is {found}; it must be a tuple of two tensors, (mean, rstd)")
        for name, tensor in zip(("stats mean", "stats rstd"), stats, strict=True):
            check_tensor(name, tensor, shape=(packed.shape[0],), device=bag.device)
    return packed, bias, ragged


def check_ranges(bag: Tensor, starts: Tensor, lengths: Tensor, total: int, max_length: int) -> None:
    """On the CPU, raise unless every bag lies within the matrix; kernels on a device clamp."""
    if bag.device.type == "cpu":
        Ragged(starts, lengths, total, max_length).check(bag.shape[0])


def check_ranges_eagerly(bag: Tensor, ragged: Ragged) -> None:
    """The same where no op stands between; a graph being compiled cannot look at values."""
    if not torch.compiler.is_compiling():
        check_ranges(bag, *ragged)


def without_autocast(function):
    """Autocast would round the fp32 products inside an implementation to 16 bits."""

    @functools.wraps(function)
    def wrapped(*arguments):
        with torch.autocast(arguments[0].device.type, enabled=False):
            return function(*arguments)

    return wrapped


_SIZES = "Tensor starts, Tensor lengths, SymInt total, SymInt max_length"
_OPTIONS = (
    "float scale, bool normalize, float eps, Tensor? mean, Tensor? rstd, "
    "float dropout_p, Tensor? seed, str backend"
)


def _implementation(backend: str, bag: Tensor, n_rows: int):
    chosen = select_backend(backend or None, device=bag.device, dtype=bag.dtype, n_rows=n_rows)
    return importlib.import_module(_MODULES[chosen.backend])


@torch.library.custom_op(
    "survfuse::pool_bag",
    mutates_args=(),
    schema=f"(Tensor rows, Tensor bag, Tensor? bias, {_SIZES}, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor)",
)
@without_autocast
def _forward(
    rows,
    bag,
    bias,
    starts,
    lengths,
    total,
    max_length,
    scale,
    normalize,
    eps,
    mean,
    rstd,
    dropout_p,
    seed,
    backend,
):
    check_ranges(bag, starts, lengths, total, max_length)
    module = _implementation(backend, bag, rows.shape[1])
    return module.pool_bag_forward(
        rows,
        unit_stride(bag),
        bias,
        starts,
        lengths,
        total,
        max_length,
        scale=scale,
        normalize=normalize,
        eps=eps,
        mean=mean,
        rstd=rstd,
        dropout_p=dropout_p,
        seed=seed,
    )


@_forward.register_fake
def _(rows, bag, *rest):
    kind = torch.float64 if bag.dtype == torch.float64 else torch.float32
    shape = rows.shape[:2]
    return (
        bag.new_empty(rows.shape, dtype=kind),
        bag.new_empty(shape, dtype=kind),
        bag.new_empty(shape, dtype=kind),
    )


@torch.library.custom_op(
    "survfuse::pool_bag_backward",
    mutates_args=(),
    schema="(Tensor d_pooled, Tensor d_lse, Tensor d_weight_sum, Tensor rows, Tensor bag, "
    f"Tensor? bias, {_SIZES}, {_OPTIONS}, Tensor pooled, Tensor lse, Tensor weight_sum, "
    "bool needs_rows, bool needs_bag, bool needs_bias) -> (Tensor, Tensor, Tensor)",
)
@without_autocast
def _backward(
    d_pooled,
    d_lse,
    d_weight_sum,
    rows,
    bag,
    bias,
    starts,
    lengths,
    total,
    max_length,
    scale,
    normalize,
    eps,
    mean,
    rstd,
    dropout_p,
    seed,
    backend,
    pooled,
    lse,
    weight_sum,
    needs_rows,
    needs_bag,
    needs_bias,
):
    module = _implementation(backend, bag, rows.shape[1])
    gradients = module.pool_bag_backward(
        d_pooled,
        d_lse,
        d_weight_sum,
        rows,
        unit_stride(bag),
        bias,
        starts,
        lengths,
        total,
        max_length,
        scale=scale,
        normalize=normalize,
        eps=eps,
        mean=mean,
        rstd=rstd,
        dropout_p=dropout_p,
        seed=seed,
        pooled=pooled,
        lse=lse,
        weight_sum=weight_sum,
        needs_rows=needs_rows,
        needs_bag=needs_bag,
        needs_bias=needs_bias,
    )
    # an op returns a fixed number of tensors: an empty one stands for "not needed"
    types = (rows.dtype, bag.dtype, bag.dtype if bias is None else bias.dtype)
    return tuple(
        bag.new_empty(0, dtype=kind) if gradient is None else gradient.to(kind)
        for gradient, kind in zip(gradients, types, strict=True)
    )


@_backward.register_fake
def _(d_pooled, d_lse, d_weight_sum, rows, bag, bias, *rest):
    needs_rows, needs_bag, needs_bias = rest[-3:]
    bias_type = bag.dtype if bias is None else bias.dtype
    return (
        rows.new_empty(rows.shape if needs_rows else (0,)),
        bag.new_empty(bag.shape if needs_bag else (0,)),
        bag.new_empty(bag.shape[:1] if needs_bias else (0,), dtype=bias_type),
    )


def _save(ctx, inputs, output):
    (rows, bag, bias, starts, lengths, total, max_length, *options) = inputs
    scale, normalize, eps, mean, rstd, dropout_p, seed, backend = options
    ctx.save_for_backward(rows, bag, bias, starts, lengths, mean, rstd, seed, *output)
    ctx.sizes = (total, max_length)
    ctx.options = (scale, normalize, eps, dropout_p, backend)


def _differentiate(ctx, d_pooled, d_lse, d_weight_sum):
    rows, bag, bias, starts, lengths, mean, rstd, seed, *output = ctx.saved_tensors
    scale, normalize, eps, dropout_p, backend = ctx.options
    needs = ctx.needs_input_grad[:3]
    gradients = _backward(
        d_pooled,
        d_lse,
        d_weight_sum,
        rows,
        bag,
        bias,
        starts,
        lengths,
        *ctx.sizes,
        scale,
        normalize,
        eps,
        mean,
        rstd,
        dropout_p,
        seed,
        backend,
        *output,
        *needs,
    )
    return *(g if need else None for g, need in zip(gradients, needs, strict=True)), *(None,) * 12


def _no_double_backward(ctx, *gradients):
    raise RuntimeError(
        'pool_bag has no double backward on this backend; backend="reference" has one'
    )


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_no_double_backward)


@flop_formula(torch.ops.survfuse.pool_bag)
def _forward_flops(rows_shape, bag_shape, bias, starts, lengths, total, *rest, **_) -> int:
    return 4 * total * rows_shape[1] * rows_shape[2]


@flop_formula(torch.ops.survfuse.pool_bag_backward)
def _backward_flops(dz, dlse, dws, rows_shape, bag_shape, bias, starts, lengths, total, *rest, **_):
    needs_bag = rest[-2]
    return (10 if needs_bag else 6) * total * rows_shape[1] * rows_shape[2]


def unit_stride(bag: Tensor) -> Tensor:
    """The bag with a unit last stride: as it is, or a copy."""
    return bag if bag.stride(-1) == 1 else bag.contiguous()
