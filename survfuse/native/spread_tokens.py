"""`spread_tokens` on the CPU: the launchers of `cross_attention`, all heads sharing their queries.

Contract: survfuse/ops/spread_tokens.py.  Oracle: survfuse/reference/spread_tokens.py.
Math: docs/math.md, "Spreading tokens over a bag".
"""

from __future__ import annotations

import torch
from torch import Tensor

from survfuse.attention import Attended, Attention
from survfuse.native.core import ELEMENT_TYPES, address, native_core, rounds_products, row_type
from survfuse.native.cross_attention import (
    Arguments,
    Norm,
    common_arguments,
    make_gradients,
    run_backward,
)
from survfuse.pooling import Pooling, SpreadNeeds, accumulation_type


def spread_tokens_forward(
    keys: Tensor,
    values: Tensor,
    bag: Tensor,
    key_bias: Tensor | None,
    pooling: Pooling,
    *,
    isa: str = "auto",
) -> Attended:
    """Out of the type of the values, as rows are written; lse of that of accumulation."""
    heads, kind = keys.shape[1], accumulation_type(bag.dtype)
    out = torch.empty((pooling.total, heads, values.shape[3]), dtype=row_type(values.dtype, kind))
    lse = torch.empty((pooling.total, heads), dtype=kind)
    arguments = _arguments(keys, values, bag, key_bias, pooling, isa)[0]
    arguments.set(out=address(out), out_type=ELEMENT_TYPES[out.dtype], lse=address(lse))
    native_core().cross_attention_forward(arguments.values)
    return Attended(out, lse)


def spread_tokens_backward(
    d_results: Attended,
    lse: Tensor,
    keys: Tensor,
    values: Tensor,
    bag: Tensor,
    key_bias: Tensor | None,
    pooling: Pooling,
    needs: SpreadNeeds,
    *,
    isa: str = "auto",
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """d_keys, d_values, d_bag [T, D] of the bag's type, d_key_bias; None where not needed."""
    kind = accumulation_type(bag.dtype)
    arguments, packed_keys, packed_values, bias = _arguments(
        keys, values, bag, key_bias, pooling, isa
    )
    likes = {"query": bag, "key": packed_keys, "value": packed_values, "bias": bias}
    order = (needs.bag, needs.keys, needs.values, needs.key_bias)
    gradients, options = make_gradients(likes, order, ("query",), pooling.ragged, kind)
    d_out = d_results.out.to(row_type(values.dtype, kind)).contiguous()
    run_backward(arguments, d_results.lse, lse, d_out, None, gradients, options)
    d_keys, d_values, d_bias = (
        None
        if gradients[name] is None
        else gradients[name].unflatten(0, (keys.shape[0], keys.shape[2])).transpose(1, 2)
        for name in ("key", "value", "bias")
    )
    d_bag = gradients["query"]
    return d_keys, d_values, None if d_bag is None else d_bag.to(bag.dtype), d_bias


def _arguments(
    keys: Tensor,
    values: Tensor,
    bag: Tensor,
    key_bias: Tensor | None,
    pooling: Pooling,
    isa: str,
) -> tuple[Arguments, Tensor, Tensor, Tensor | None]:
    """The launcher's arguments; keys [B * Lk, H, D], values and bias as packed rows."""
    kind = accumulation_type(bag.dtype)
    n_bags, _, n_keys, _ = keys.shape
    # of the bag's type where the kernel multiplies pairs of it, else of that of accumulation
    multiplied = bag.dtype if rounds_products(bag.dtype, isa) else kind
    packed_keys, packed_values = (
        tensor.to(multiplied).transpose(1, 2).flatten(0, 1).contiguous()
        for tensor in (keys, values)
    )
    bias = None if key_bias is None else key_bias.to(kind).transpose(1, 2).flatten(0, 1)
    starts = torch.arange(n_bags) * n_keys
    attention = Attention(
        *pooling.ragged,
        starts,
        torch.full_like(starts, n_keys),
        n_bags * n_keys,
        n_keys,
        pooling.scale,
        pooling.dropout_p,
        pooling.seed,
    )
    norm = Norm(pooling.eps, pooling.mean, pooling.rstd) if pooling.normalize else None
    bias = None if bias is None else bias.contiguous()
    arguments = common_arguments(bag, packed_keys, packed_values, bias, attention, False, isa, norm)
    return arguments, packed_keys, packed_values, bias
