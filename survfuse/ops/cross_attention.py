"""`cross_attention`: attention with keys and values given, either side ragged and of any length.

Oracle: survfuse/reference/cross_attention.py.  Math: docs/math.md, "Attention with keys given".
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from survfuse import reference
from survfuse.attention import Attended, Attention, AttentionNeeds
from survfuse.ops.backends import Selection, check_backend, select_backend
from survfuse.ops.checks import check_dropout, check_scale, check_tensor
from survfuse.ops.flops import flop_formula
from survfuse.ops.registration import (
    call_op,
    call_reference,
    check_ranges,
    check_ranges_eagerly,
    fake_gradients,
    gradients_like,
    no_double_backward,
    save_call,
    saved_call,
    to_autograd,
    unit_stride,
    without_autocast,
)
from survfuse.pooling import accumulation_type
from survfuse.ragged import Ragged, as_packed_heads
from survfuse.reference.dropout import draw_seed

_MODULES = {
    "tiled": "survfuse.tiled.cross_attention",
    "native": "survfuse.native.cross_attention",
    "triton": "survfuse.triton_kernels.cross_attention",
}
# a tile of a wider head does not stay in the registers of a program
_MAX_TRITON_HEAD = 256


def cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: Tensor | None = None,
    query_ragged: Ragged | None = None,
    key_ragged: Ragged | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    r"""Multi-head attention with keys and values given, made for sides of very unequal length.

    .. math:: o_{qh} = \sum_i \mathrm{softmax}_i(\mathrm{scale}\; q_{qh} \cdot k_{ih} + bias_i)\,
              v_{ih}

    Few queries over a long bag of keys split the keys, in the backward too; a long bag of queries
    over few keys splits the queries. Nothing of size queries x keys is ever held.

    Args:
        query: [B, Lq, H, d]; or packed [Tq, H, d] with `query_ragged`, one bag if that is None.
            It may be fp32 beside 16-bit keys: dense queries are then multiplied in the type of the
            keys, packed ones in their own.
        key: [B, Lk, H, d]; or packed [Tk, H, d] with `key_ragged`, one bag if that is None. bf16,
            fp16, fp32, or fp64 on the CPU; any strides, the last one other than 1 is copied.
        value: as key, [..., H, dv], of the type of `key`.
        bias: [B, Lk], or [Tk] for packed keys, added to the logits of that key; -inf excludes the
            key, which may then hold anything, NaN included.
        query_ragged, key_ragged: the range of rows of each bag on a packed side. Rows in no bag
            are never read.
        scale: by default d ** -0.5.
        dropout_p: each weight is dropped with this probability, the rest scaled by 1 / (1 - p).
        backend: None, "reference", "tiled", "triton" or "native".

    Returns:
        [B, Lq, H, dv], or [total, H, dv] for packed queries, packed per (bag, query) in batch
        order; of the type of `query`. Where a bag has no keys, or all are excluded: zeros, and zero
        gradients.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device; it is named.
        RuntimeError: a named backend cannot serve the call; double backward, forward mode,
            derivatives of torch.func (use backend="reference").

    Precision: fp32 (fp64) sums; error against fp64 at most twice that of plain torch in the type of
    the keys.
    Determinism: bitwise, always.
    Cost: for n pairs of query and key 2 n H (d + dv) operations forward and 2 n H (3 d + 2 dv)
    backward. With few queries K and V are read once forward and once backward, and their gradients
    written once; with few keys the same holds of the queries.
    vmap: by the fallback of torch, one call per sample; batch through the ranges.

    Example:
        >>> query, key = torch.zeros(1, 6, 1, 8), torch.randn(1000, 1, 8)
        >>> cross_attention(query, key, torch.randn(1000, 1, 4)).shape
        torch.Size([1, 6, 1, 4])
    """
    return cross_attention_with_lse(
        query,
        key,
        value,
        bias=bias,
        query_ragged=query_ragged,
        key_ragged=key_ragged,
        scale=scale,
        dropout_p=dropout_p,
        backend=backend,
    )[0]


def cross_attention_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: Tensor | None = None,
    query_ragged: Ragged | None = None,
    key_ragged: Ragged | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """As `cross_attention`, and the logsumexp of the logits before dropout.

    Returns:
        out, and lse: the shape of out without its last dimension, fp32 (fp64 for fp64); -inf where
        a bag has no keys. Both are differentiable, so that results over several key sets can be
        merged (`merge_attention`).
    """
    sides = check_sides(query, key, value, bias, query_ragged, key_ragged)
    packed, keys, values, key_bias, query_ragged, key_ragged = sides
    if scale is not None:
        check_scale(scale)
    check_dropout(dropout_p)
    check_backend(backend)
    if backend == "reference":
        check_ranges_eagerly(packed, query_ragged, "query_ragged")
        check_ranges_eagerly(keys, key_ragged, "key_ragged")
        return call_reference(
            reference.cross_attention_with_lse,
            query,
            keys,
            values,
            bias=key_bias,
            query_ragged=None if query.dim() == 4 else query_ragged,
            key_ragged=key_ragged,
            scale=scale,
            dropout_p=dropout_p,
        )
    if query.dim() == 3:
        keys, values = keys.to(query.dtype), values.to(query.dtype)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    seed = draw_seed(key.device) if dropout_p > 0 else None
    attention = Attention(*query_ragged, *key_ragged, scale, dropout_p, seed)
    dense = query.dim() == 4
    out, lse = call_op(
        "cross_attention",
        _forward,
        packed,
        keys,
        values,
        key_bias,
        *attention,
        dense,
        backend or "",
    )
    if dense:
        return out.to(query.dtype).unflatten(0, query.shape[:2]), lse.unflatten(0, query.shape[:2])
    return out, lse


def check_sides(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    bias: Tensor | None,
    query_ragged: Ragged | None,
    key_ragged: Ragged | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Ragged, Ragged]:
    """Both sides packed, bias as [Tk], and the ranges, after every check on shapes and devices."""
    for name, tensor in (("query", query), ("key", key)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is {type(tensor).__name__}; it must be a tensor")
    letters, beside = ("B", "L", "H", "d"), {"device": key.device, "beside": "the key"}
    check_tensor("query", query, shape=letters[-max(query.dim(), 3) :], **beside)
    heads, head_dim = query.shape[-2:]
    if head_dim == 0:
        raise ValueError(f"query has shape {tuple(query.shape)}; its heads need at least 1 channel")
    rows = ("B", "Lk") if key.dim() == 4 else ("Tk",)
    check_tensor("key", key, shape=(*rows, heads, head_dim), **beside)
    if value is not None:
        check_tensor("value", value, shape=(*key.shape[:-1], "dv"), **beside)
        if value.dtype != key.dtype:
            raise TypeError(f"value is {value.dtype} and key {key.dtype}; they must have one type")
    if bias is not None:
        check_tensor("bias", bias, shape=tuple(key.shape[:-2]), **beside)
        bias = bias.reshape(-1)
    keys, key_ragged = as_packed_heads("key", key, key_ragged)
    packed, query_ragged = as_packed_heads("query", query, query_ragged, key_ragged.n_bags)
    values = None if value is None else value.reshape(-1, *value.shape[-2:])
    return packed, keys, values, bias, query_ragged, key_ragged


RANGES_SCHEMA = (
    "Tensor query_starts, Tensor query_lengths, SymInt query_total, SymInt query_max, "
    "Tensor key_starts, Tensor key_lengths, SymInt key_total, SymInt key_max, float scale"
)
_INPUTS = (
    f"Tensor query, Tensor key, Tensor value, Tensor? bias, {RANGES_SCHEMA}, "
    # wide: out keeps the type of accumulation. It costs nothing where queries are few, and the
    # backward, which takes the mean gradient of the weights from out, loses no digit to rounding
    "float dropout_p, Tensor? seed, bool wide, str backend"
)


def choose_for_heads(
    stored: Tensor, head_dim: int, value_dim: int, backend: str | None
) -> Selection:
    """The backend that serves heads of this size in the type and on the device of `stored`.

    Raises:
        RuntimeError: the named one cannot; the message says why.
    """
    chosen = select_backend(backend, device=stored.device, dtype=stored.dtype, n_rows=1)
    if chosen.backend != "triton" or max(head_dim, value_dim) <= _MAX_TRITON_HEAD:
        return chosen
    obstacle = f"heads have {max(head_dim, value_dim)} channels, Triton's hold {_MAX_TRITON_HEAD}"
    if backend == "triton":
        raise RuntimeError(f"backend='triton' cannot serve this call: {obstacle}")
    return Selection("tiled", obstacle)


def _implementation(backend: str, key: Tensor, value: Tensor):
    chosen = choose_for_heads(key, key.shape[-1], value.shape[-1], backend or None)
    return importlib.import_module(_MODULES[chosen.backend])


@torch.library.custom_op(
    "survfuse::cross_attention", mutates_args=(), schema=f"({_INPUTS}) -> (Tensor, Tensor)"
)
@without_autocast
def _forward(query, key, value, bias, *options):
    *attention, wide, backend = options
    attention = Attention(*attention)
    check_ranges(query, attention.query_ragged, "query_ragged")
    check_ranges(key, attention.key_ragged, "key_ragged")
    query, key, value = (unit_stride(tensor) for tensor in (query, key, value))
    module = _implementation(backend, key, value)
    out, lse = module.cross_attention_forward(query, key, value, bias, attention)
    return out.to(lse.dtype if wide else query.dtype), lse


@_forward.register_fake
def _(query, key, value, bias, query_starts, query_lengths, query_total, *rest):
    shape = (query_total, query.shape[1])
    lse = query.new_empty(shape, dtype=accumulation_type(key.dtype))
    kind = lse.dtype if rest[-2] else query.dtype
    return query.new_empty((*shape, value.shape[2]), dtype=kind), lse


@torch.library.custom_op(
    "survfuse::cross_attention_backward",
    mutates_args=(),
    schema=f"(Tensor d_out, Tensor d_lse, Tensor out, Tensor lse, {_INPUTS}, bool needs_query, "
    "bool needs_key, bool needs_value, bool needs_bias) -> (Tensor, Tensor, Tensor, Tensor)",
)
@without_autocast
def _backward(*arguments):
    d_results, results = Attended(*arguments[:2]), Attended(*arguments[2:4])
    query, key, value, bias, *attention, _, backend = arguments[4:-4]
    query, key, value = (unit_stride(tensor) for tensor in (query, key, value))
    gradients = _implementation(backend, key, value).cross_attention_backward(
        d_results,
        results,
        query,
        key,
        value,
        bias,
        Attention(*attention),
        AttentionNeeds(*arguments[-4:]),
    )
    return gradients_like(gradients, (query, key, value, bias))


@_backward.register_fake
def _(*arguments):
    return fake_gradients(arguments[4:8], arguments[-4:])


def _save(ctx, inputs, output):
    save_call(ctx, inputs, output)


def _differentiate(ctx, *d_results):
    results, inputs = saved_call(ctx)
    needs = ctx.needs_input_grad[:4]
    return to_autograd(
        call_op("cross_attention", _backward, *d_results, *results, *inputs, *needs),
        needs,
        len(inputs),
    )


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(no_double_backward("cross_attention"))


def pairs(query_total: int, query_max: int, key_total: int, key_max: int) -> int:
    """Pairs of query and key that share a bag, as far as host integers tell: an upper bound."""
    return min(query_total * key_max, key_total * query_max)


@flop_formula(torch.ops.survfuse.cross_attention)
def _forward_flops(
    query, key, value, bias, qs, ql, q_total, q_max, ks, kl, k_total, k_max, *_, **__
):
    return 2 * pairs(q_total, q_max, k_total, k_max) * query[1] * (query[2] + value[2])


@flop_formula(torch.ops.survfuse.cross_attention_backward)
def _backward_flops(*arguments, **_) -> int:
    query, value = arguments[4], arguments[6]
    n_pairs = pairs(*(arguments[i] for i in (10, 11, 14, 15)))
    return 2 * n_pairs * query[1] * (3 * query[2] + 2 * value[2])
