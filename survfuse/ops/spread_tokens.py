"""`spread_tokens`: every patch of a ragged bag attends to a few keys as wide as itself.

Oracle: survfuse/reference/spread_tokens.py.  Math: docs/math.md, "Spreading tokens over a bag".
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from survfuse import reference
from survfuse.attention import Attended
from survfuse.ops.backends import check_backend, select_backend
from survfuse.ops.checks import check_bag, check_dropout, check_stats, check_tensor
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
from survfuse.pooling import Pooling, SpreadNeeds, accumulation_type
from survfuse.ragged import Ragged, as_packed
from survfuse.reference.dropout import draw_seed

_MODULES = {
    "tiled": "survfuse.tiled.spread_tokens",
    "native": "survfuse.native.spread_tokens",
    "triton": "survfuse.triton_kernels.spread_tokens",
}


def spread_tokens(
    keys: Tensor,
    values: Tensor,
    bag: Tensor,
    *,
    key_bias: Tensor | None = None,
    ragged: Ragged | None = None,
    scale: float = 1.0,
    normalize_eps: float | None = None,
    stats: tuple[Tensor, Tensor] | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Attended:
    r"""Attention of each patch over a few keys, in one read of the bag: `pool_bag` mirrored.

    .. math:: o_{ih} = \sum_j \mathrm{softmax}_j(\mathrm{scale}\; x_i \cdot k_{hj} + bias_{hj})\,
              v_{hj}

    Args:
        keys: [B, H, Lk, D]: keys with the query projection absorbed. May be fp32 over a 16-bit bag.
        values: [B, H, Lk, dv], of the type of `keys` or of the bag.
        bag: [T, D] packed, or dense [B, N, D]; bf16, fp16, fp32, or fp64 on the CPU. Any row
            stride; a last stride other than 1 is copied.
        key_bias: [B, H, Lk] added to the logits of that key; -inf excludes the key, which may then
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
        out [total, H, dv] of the type of `values`, packed per (bag, patch) in batch order, and lse
        [total, H], the logsumexp of the logits before dropout, fp32 (fp64 for fp64). Both are
        differentiable in keys, values, bag and key_bias. Where a bag's keys are all excluded, or
        there are none: zeros, lse -inf, and zero gradients.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device; it is named.
        RuntimeError: a named backend cannot serve the call; double backward, forward mode,
            derivatives of torch.func (use backend="reference").

    Precision: fp32 (fp64) sums; error against fp64 at most twice that of plain torch in the type of
    the bag.
    Determinism: bitwise, always.
    Cost: reads the bag once forward and once backward and writes out (and the bag's gradient, if it
    is trained) once; 2 N R (D + dv) and 4 N R (D + dv) operations for R = H Lk (2 N R D more if the
    bag is trained).
    vmap: by the fallback of torch, one call per sample; batch through `ragged`.

    Example:
        >>> keys, values = torch.zeros(1, 1, 2, 3), torch.tensor([[[[1.0], [3.0]]]])
        >>> spread_tokens(keys, values, torch.randn(1, 3)).out
        tensor([[[2.]]])
    """
    check_bag(bag)
    check_tensor("keys", keys, shape=("B", "H", "Lk", bag.shape[-1]), device=bag.device)
    check_tensor("values", values, shape=(*keys.shape[:3], "dv"), device=bag.device)
    if values.dtype not in (keys.dtype, bag.dtype):
        raise TypeError(
            f"values is {values.dtype}; it must have the type of keys, {keys.dtype}, or of the "
            f"bag, {bag.dtype}"
        )
    if key_bias is not None:
        check_tensor("key_bias", key_bias, shape=tuple(keys.shape[:3]), device=bag.device)
    packed, ragged = as_packed(bag, ragged, keys.shape[0])
    check_stats(stats, packed)
    check_dropout(dropout_p)
    check_backend(backend)
    if backend == "reference":
        check_ranges_eagerly(packed, ragged)
        return call_reference(
            reference.spread_tokens,
            keys,
            values,
            packed,
            key_bias=key_bias,
            ragged=ragged,
            scale=scale,
            normalize_eps=normalize_eps,
            stats=stats,
            dropout_p=dropout_p,
        )
    if key_bias is not None:
        # few as they are, they are zeroed here once for every backend
        included = (key_bias != -torch.inf)[..., None]
        keys, values = torch.where(included, keys, 0.0), torch.where(included, values, 0.0)
    seed = draw_seed(bag.device) if dropout_p > 0 else None
    pooling = make_pooling(ragged, scale, normalize_eps, stats, dropout_p, seed)
    return Attended(
        *call_op("spread_tokens", _forward, keys, values, packed, key_bias, *pooling, backend or "")
    )


_INPUTS = (
    f"Tensor keys, Tensor values, Tensor bag, Tensor? key_bias, {POOLING_SCHEMA}, "
    "float dropout_p, Tensor? seed, str backend"
)


def _implementation(backend: str, bag: Tensor, n_rows: int):
    chosen = select_backend(backend or None, device=bag.device, dtype=bag.dtype, n_rows=n_rows)
    return importlib.import_module(_MODULES[chosen.backend])


@torch.library.custom_op(
    "survfuse::spread_tokens", mutates_args=(), schema=f"({_INPUTS}) -> (Tensor, Tensor)"
)
@without_autocast
def _forward(keys, values, bag, key_bias, *options):
    *pooling, backend = options
    pooling = Pooling(*pooling)
    check_ranges(bag, pooling.ragged)
    module = _implementation(backend, bag, keys.shape[1] * keys.shape[2])
    out, lse = module.spread_tokens_forward(keys, values, unit_stride(bag), key_bias, pooling)
    return out.to(values.dtype), lse


@_forward.register_fake
def _(keys, values, bag, key_bias, starts, lengths, total, *rest):
    lse = bag.new_empty((total, keys.shape[1]), dtype=accumulation_type(bag.dtype))
    return values.new_empty((total, keys.shape[1], values.shape[3])), lse


@torch.library.custom_op(
    "survfuse::spread_tokens_backward",
    mutates_args=(),
    schema=f"(Tensor d_out, Tensor d_lse, Tensor lse, {_INPUTS}, bool needs_keys, "
    "bool needs_values, bool needs_bag, bool needs_bias) -> (Tensor, Tensor, Tensor, Tensor)",
)
@without_autocast
def _backward(*arguments):
    d_out, d_lse, lse, keys, values, bag, key_bias, *pooling, backend = arguments[:-4]
    module = _implementation(backend, bag, keys.shape[1] * keys.shape[2])
    gradients = module.spread_tokens_backward(
        Attended(d_out, d_lse),
        lse,
        keys,
        values,
        unit_stride(bag),
        key_bias,
        Pooling(*pooling),
        SpreadNeeds(*arguments[-4:]),
    )
    return gradients_like(gradients, (keys, values, bag, key_bias))


@_backward.register_fake
def _(*arguments):
    return fake_gradients(arguments[3:7], arguments[-4:])


def _save(ctx, inputs, output):
    # the weights of a patch are recomputed whole, so out is not needed
    save_call(ctx, inputs, output[1:])


def _differentiate(ctx, *d_results):
    (lse,), inputs = saved_call(ctx)
    needs = ctx.needs_input_grad[:4]
    return to_autograd(
        call_op("spread_tokens", _backward, *d_results, lse, *inputs, *needs), needs, len(inputs)
    )


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(no_double_backward("spread_tokens"))


@flop_formula(torch.ops.survfuse.spread_tokens)
def _forward_flops(keys, values, bag, key_bias, starts, lengths, total, *rest, **_) -> int:
    return 2 * total * keys[1] * keys[2] * (keys[3] + values[3])


@flop_formula(torch.ops.survfuse.spread_tokens_backward)
def _backward_flops(*arguments, **_) -> int:
    keys, values, total, needs_bag = arguments[3], arguments[4], arguments[9], arguments[-2]
    width = (3 if needs_bag else 2) * keys[3] + 2 * values[3]
    return 2 * total * keys[1] * keys[2] * width
