"""`cross_attention_weights`: the softmax weights of `cross_attention`, streamed.

Oracle: survfuse/reference/cross_attention.py.  Math: docs/math.md, "Weights".
"""

from __future__ import annotations

import torch
from torch import Tensor

from survfuse import reference
from survfuse.attention import Attention
from survfuse.ops.checks import check_reduce, check_scale, check_tensor
from survfuse.ops.cross_attention import RANGES_SCHEMA, check_sides, pairs
from survfuse.ops.flops import flop_formula
from survfuse.ops.pool_weights import check_weights_backend
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
from survfuse.ragged import Ragged
from survfuse.tiled.cross_attention_weights import (
    cross_attention_weights_backward,
    cross_attention_weights_forward,
    result_shape,
)


def cross_attention_weights(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    *,
    bias: Tensor | None = None,
    query_ragged: Ragged | None = None,
    key_ragged: Ragged | None = None,
    scale: float | None = None,
    reduce: str | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""The weights each query gives to each key, without ever holding more than is returned.

    .. math:: p_{qhi} = \exp(\mathrm{scale}\; q_{qh} \cdot k_{ih} + bias_i - lse_{qh})

    Args:
        query, key, bias, query_ragged, key_ragged, scale: those of the `cross_attention_with_lse`
            call.
        lse: what that call returned: [B, Lq, H], or [total, H] for packed queries. That of a merge
            gives the weights within all keys that were merged.
        reduce: None; "heads", the mean over heads; "rows", the mean over a bag's queries and heads.
        backend: None, "reference" or "tiled".

    Returns:
        The weights before dropout, fp32 (fp64 for fp64), differentiable in query, key, lse and
        bias. The long side leads, packed per (bag, row) in batch order:

        * dense queries: [total, Lq, H], or [total, Lq] for "heads", where total counts keys;
        * packed queries over dense keys: [total, H, Lk], or [total, Lk], where it counts queries;
        * "rows": [total] per key of packed keys, [B, Lk] for dense ones. A bag without queries
          gives 0.

        With queries and keys both packed only "rows" is served: all else is queries x keys.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device; it is named.
        RuntimeError: a backend that does not have it; double backward, forward mode,
            derivatives of torch.func (use backend="reference").

    Precision: fp32 (fp64) sums, as `cross_attention`.
    Determinism: bitwise.
    Cost: for n pairs of query and key 2 n H d operations forward, and 2 n H d more for each of
    query and key that needs a gradient, the weights being computed anew.
    vmap: by the fallback of torch, one call per sample; batch through the ranges.

    Example:
        >>> query, key = torch.zeros(1, 6, 1, 8), torch.randn(4, 1, 8)
        >>> lse = torch.full((1, 6, 1), 4.0).log()
        >>> cross_attention_weights(query, key, lse, reduce="rows")
        tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    packed, keys, _, key_bias, query_ragged, key_ragged = check_sides(
        query, key, None, bias, query_ragged, key_ragged
    )
    check_reduce(reduce)
    if scale is not None:
        check_scale(scale)
    check_weights_backend(backend, "cross_attention_weights")
    heads = query.shape[-2]
    rows = query.shape[:-1] if query.dim() == 4 else (query_ragged.total, heads)
    check_tensor("lse", lse, shape=tuple(rows), device=key.device, beside="the key")
    dense_queries, dense_keys = query.dim() == 4, key.dim() == 4
    if reduce != "rows" and not (dense_queries or dense_keys):
        raise ValueError(
            f'reduce is {reduce!r}; queries and keys that are both packed take "rows" only, '
            "since every other result has as many entries as there are pairs of query and key"
        )
    if backend == "reference":
        check_ranges_eagerly(packed, query_ragged, "query_ragged")
        check_ranges_eagerly(keys, key_ragged, "key_ragged")
        return call_reference(
            reference.cross_attention_weights,
            query,
            key,
            lse,
            bias=key_bias,
            query_ragged=None if dense_queries else query_ragged,
            key_ragged=None if dense_keys else key_ragged,
            scale=scale,
            reduce=reduce,
        )
    if not dense_queries:
        keys = keys.to(query.dtype)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    ranges = (*query_ragged, *key_ragged, scale)
    layout = "mean" if reduce == "rows" else "key" if dense_queries else "query"
    lse = lse.reshape(-1, heads)
    weights = call_op(
        "cross_attention_weights",
        _forward,
        packed,
        keys,
        lse,
        key_bias,
        *ranges,
        layout,
        reduce == "heads",
    )
    if layout == "mean":
        return weights.reshape(key.shape[:2]) if dense_keys else weights
    kept = () if reduce == "heads" else (heads,)
    if layout == "key":
        return weights.reshape(key_ragged.total, query.shape[1], *kept)
    return weights.reshape(query_ragged.total, *kept, key.shape[1])


_INPUTS = (
    f"Tensor query, Tensor key, Tensor lse, Tensor? bias, {RANGES_SCHEMA}, "
    "str layout, bool mean_heads"
)


@torch.library.custom_op(
    "survfuse::cross_attention_weights", mutates_args=(), schema=f"({_INPUTS}) -> Tensor"
)
@without_autocast
def _forward(query, key, lse, bias, *options):
    *ranges, layout, mean_heads = options
    attention = Attention(*ranges)
    check_ranges(query, attention.query_ragged, "query_ragged")
    check_ranges(key, attention.key_ragged, "key_ragged")
    query, key = unit_stride(query), unit_stride(key)
    return cross_attention_weights_forward(query, key, lse, bias, attention, layout, mean_heads)


@_forward.register_fake
def _(query, key, lse, bias, *options):
    *ranges, layout, mean_heads = options
    shape = result_shape(query.shape[1], Attention(*ranges), layout, mean_heads)
    return key.new_empty(shape, dtype=accumulation_type(key.dtype))


@torch.library.custom_op(
    "survfuse::cross_attention_weights_backward",
    mutates_args=(),
    schema=f"(Tensor d_weights, {_INPUTS}, bool needs_query, bool needs_key, bool needs_lse, "
    "bool needs_bias) -> (Tensor, Tensor, Tensor, Tensor)",
)
@without_autocast
def _backward(d_weights, query, key, lse, bias, *options):
    *ranges, layout, mean_heads = options[:-4]
    query, key = unit_stride(query), unit_stride(key)
    gradients = cross_attention_weights_backward(
        d_weights, query, key, lse, bias, Attention(*ranges), layout, mean_heads, options[-4:]
    )
    return gradients_like(gradients, (query, key, lse, bias))


@_backward.register_fake
def _(d_weights, query, key, lse, bias, *options):
    return fake_gradients((query, key, lse, bias), options[-4:])


def _save(ctx, inputs, output):
    save_call(ctx, inputs)


def _differentiate(ctx, d_weights):
    _, inputs = saved_call(ctx)
    needs = ctx.needs_input_grad[:4]
    return to_autograd(
        call_op("cross_attention_weights", _backward, d_weights, *inputs, *needs),
        needs,
        len(inputs),
    )


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(no_double_backward("cross_attention_weights"))


@flop_formula(torch.ops.survfuse.cross_attention_weights)
def _forward_flops(
    query, key, lse, bias, qs, ql, q_total, q_max, ks, kl, k_total, k_max, *_, **__
) -> int:
    return 2 * pairs(q_total, q_max, k_total, k_max) * query[1] * query[2]


@flop_formula(torch.ops.survfuse.cross_attention_weights_backward)
def _backward_flops(*arguments, **_) -> int:
    query, (needs_query, needs_key) = arguments[1], arguments[-4:-2]
    n_pairs = pairs(*(arguments[i] for i in (7, 8, 11, 12)))
    return 2 * n_pairs * query[1] * query[2] * (1 + needs_query + needs_key)
