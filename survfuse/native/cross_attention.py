"""`cross_attention` on the CPU by the native core (csrc/cpu/cross_attention.cpp).

Contract: survfuse/ops/cross_attention.py.  Oracle: survfuse/reference/cross_attention.py.
Math: docs/math.md, "Attention with keys given".
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from survfuse.attention import Attended, Attention, AttentionNeeds
from survfuse.native.core import (
    CPU_ISAS,
    ELEMENT_TYPES,
    address,
    coverage,
    native_core,
    rounds_products,
    row_type,
    workspace,
)
from survfuse.pooling import accumulation_type
from survfuse.tiled.cross_attention import mean_gradient


def cross_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    attention: Attention,
    *,
    isa: str = "auto",
) -> Attended:
    """Out of the accumulation type (few queries) or that of the query's rows; lse of the first."""
    kind = accumulation_type(key.dtype)
    few = few_queries(attention)
    shape = (attention.query_total, query.shape[1])
    # a bag without keys is no work: its results stand here already
    make = torch.zeros if few else torch.empty
    out = make((*shape, value.shape[2]), dtype=kind if few else row_type(query.dtype, kind))
    lse = torch.full(shape, -torch.inf, dtype=kind)
    arguments = common_arguments(query, key, value, bias, attention, few, isa)
    arguments.set(out=address(out), out_type=ELEMENT_TYPES[out.dtype], lse=address(lse))
    native_core().cross_attention_forward(arguments.values)
    return Attended(out, lse)


def cross_attention_backward(
    d_results: Attended,
    results: Attended,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    attention: Attention,
    needs: AttentionNeeds,
    *,
    isa: str = "auto",
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """d_query, d_key, d_value as their inputs, and d_bias [Tk]; None where not needed."""
    kind = accumulation_type(key.dtype)
    few = few_queries(attention)
    # wide results of few queries; what long queries were given stays in its type
    d_out = d_results.out.to(kind if few else row_type(query.dtype, kind)).contiguous()
    mean = None
    if few:
        # rounded as the kernel's products round it: the two must cancel
        rounded = d_out.to(key.dtype) if rounds_products(key.dtype, isa) else d_out
        mean = mean_gradient(rounded, results.out).to(kind)
    arguments = common_arguments(query, key, value, bias, attention, few, isa)
    likes = {"query": query, "key": key, "value": value, "bias": bias}
    long = ("key", "value") if few else ("query",)
    side = attention.key_ragged if few else attention.query_ragged
    gradients, options = make_gradients(likes, needs, long, side, kind)
    run_backward(arguments, d_results.lse, results.lse, d_out, mean, gradients, options)
    return tuple(
        None if gradient is None else gradient.to(like.dtype)
        for gradient, like in zip(gradients.values(), likes.values(), strict=True)
    )


def few_queries(attention: Attention) -> bool:
    """Whether the keys are the long side, which is cut; else the queries are."""
    return attention.query_total <= attention.key_total


class Arguments:
    """A launcher's arguments, and the tensors whose addresses are among them."""

    def __init__(self) -> None:
        self.values: dict = {}
        self._alive: list[Tensor | None] = []

    def set(self, **values) -> None:
        self.values |= values

    def keep(self, tensor: Tensor | None) -> int:
        """The address of a tensor that must outlive the call."""
        self._alive.append(tensor)
        return address(tensor)

    def rows(self, tensor: Tensor, *, shared: bool = False) -> tuple[int, int, int, int]:
        """[T, H, d] as the launcher takes it; `shared`: [T, d], the same for every head."""
        stride = 0 if shared else tensor.stride(1)
        return self.keep(tensor), ELEMENT_TYPES[tensor.dtype], tensor.stride(0), stride


class Norm(NamedTuple):
    """How long queries are normalised first."""

    eps: float
    mean: Tensor | None
    rstd: Tensor | None


def common_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    attention: Attention,
    few: bool,
    isa: str,
    norm: Norm | None = None,
) -> Arguments:
    """What both directions take, the workspace included. query [T, d]: the same for every head."""
    kind = accumulation_type(key.dtype)
    a = Arguments()
    shared = query.dim() == 2
    query = query.to(kind if few else row_type(query.dtype, kind))
    bias = None if bias is None else bias.to(kind).contiguous()
    mean, rstd = (
        None if tensor is None else tensor.to(kind).contiguous()
        for tensor in (norm[1:] if norm else (None, None))
    )
    a.set(
        query=a.rows(query, shared=shared),
        key=a.rows(key),
        value=a.rows(value),
        bias=a.keep(bias),
        bias_row_stride=0 if bias is None else bias.stride(0),
        bias_head_stride=0 if bias is None or bias.dim() == 1 else bias.stride(1),
        query_starts=a.keep(attention.query_starts.contiguous()),
        query_lengths=a.keep(attention.query_lengths.contiguous()),
        key_starts=a.keep(attention.key_starts.contiguous()),
        key_lengths=a.keep(attention.key_lengths.contiguous()),
        n_bags=attention.key_lengths.shape[0],
        n_heads=key.shape[1],
        dim=key.shape[2],
        value_dim=value.shape[2],
        few_queries=few,
        scale=attention.scale,
        normalize=norm is not None,
        eps=0.0 if norm is None else norm.eps,
        mean=a.keep(mean),
        rstd=a.keep(rstd),
        dropout_p=0.0 if attention.seed is None else attention.dropout_p,
        seed=0 if attention.seed is None else int(attention.seed),
        workspace=0,
        n_threads=torch.get_num_threads(),
        isa=CPU_ISAS.index(isa),
    )
    a.set(workspace=a.keep(workspace(native_core().cross_attention_workspace(a.values))))
    return a


def make_gradients(likes, needs, long, side, kind) -> tuple[dict[str, Tensor | None], dict]:
    """Memory for the gradients by name, and what the launcher is told of it.

    Those of the short side are added up, in the type of accumulation. Those of the long side are
    written once, in the type of their inputs, unless its bags share rows.
    """
    n_rows = likes[long[0]].shape[0]
    overlapping, covering = coverage(side.starts, side.lengths, n_rows)
    d_long_type = kind if overlapping else row_type(likes[long[0]].dtype, kind)
    gradients = {}
    for (name, like), need in zip(likes.items(), needs, strict=True):
        of_long = name in long or (name == "bias" and "key" in long)
        make = torch.empty if of_long and covering else torch.zeros
        dtype = d_long_type if name in long else kind
        gradients[name] = make(like.shape, dtype=dtype) if need else None
    return gradients, {"d_long_type": ELEMENT_TYPES[d_long_type], "overlapping": overlapping}


def run_backward(arguments, d_lse, lse, d_out, mean, gradients, options) -> None:
    a = arguments
    kind = lse.dtype
    a.set(
        lse=a.keep(lse.contiguous()),
        mean_gradient=a.keep(None if mean is None else mean.contiguous()),
        d_out=a.rows(d_out),
        d_lse=a.keep(d_lse.to(kind).contiguous()),
        **{f"d_{name}": address(gradient) for name, gradient in gradients.items()},
        **options,
    )
    native_core().cross_attention_backward(a.values)
