"""Attention with keys and values given, either side ragged, in Triton: the launchers.

Contract: survfuse/ops/cross_attention.py.  Oracle: survfuse/reference/cross_attention.py.  Math:
docs/math.md, "Attention with keys given".  Layout, traffic and registers: docs/kernels.md.  Routes
are chosen by cross_attention_shapes: cross_attention_few.py reads keys and values once,
cross_attention_many.py and cross_attention_keys.py walk tiles of queries and of keys;
cross_attention_merge.py joins what was cut.

No autograd, no validation and no host synchronisation: routes and cuts come from host integers and
the number of processors. Every reduction has a fixed order, so results repeat to the bit.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.runtime import JITFunction

from survfuse.attention import Attended, Attention, AttentionNeeds

from . import cross_attention_shapes as shapes
from .cross_attention_call import Call, make_call
from .cross_attention_few import cross_attention_few_bwd_kernel, cross_attention_few_fwd_kernel
from .cross_attention_keys import cross_attention_bwd_key_kernel
from .cross_attention_many import cross_attention_bwd_query_kernel, cross_attention_many_fwd_kernel
from .cross_attention_merge import cross_attention_merge_kernel, cross_attention_sum_kernel


def cross_attention_forward(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, attention: Attention
) -> Attended:
    """o_qh = sum_i softmax_i(scale * q_qh . k_ih + bias_i) v_ih.

    Args:
        query: [Tq, H, d] fp32, or the type of the keys; any strides with a unit last one, as all.
        key: [Tk, H, d] fp32, bf16 or fp16. Rows in no bag and rows with bias -inf are never read.
        value: [Tk, H, dv] of the type of the keys.
        bias: [Tk], or None.
        attention: the rest; ranges are clamped to the stored rows.

    Returns:
        out [total, H, dv], fp32 where keys are split into slots, else of the type of the query; lse
        [total, H] fp32.

    Cost: up to 32 queries per bag: keys and values are read once. Beyond: once per block of 128
    queries (32 in fp32), out of L2. Workspace: under max(16 MB, 1 % of the batch's bytes).
    """
    total, (heads, value_dim) = attention.query_total, value.shape[1:]
    lse = torch.empty((total, heads), dtype=torch.float32, device=key.device)
    if min(attention.key_total, total, heads) == 0:
        out = torch.zeros((total, heads, value_dim), dtype=query.dtype, device=key.device)
        return Attended(out, lse.fill_(-torch.inf))
    call = make_call(query, key, value, bias, attention)
    problem, limits = call.problem, call.limits
    shape = shapes.few_shape(problem, limits, backward=False)
    cut = shape and shapes.few_forward_cut(problem, limits, shape)
    if cut is not None:
        return _forward_slots(call, cross_attention_few_fwd_kernel, shape, cut, lse)
    shape = shapes.forward_shape(problem, limits)
    cut = shapes.key_slots(problem, limits, shape, value_dim + 2)
    if cut is not None:
        return _forward_slots(call, cross_attention_many_fwd_kernel, shape, cut, lse)
    out = torch.empty((total, heads, value_dim), dtype=query.dtype, device=key.device)
    cross_attention_many_fwd_kernel[(shapes.query_tiles(problem, shape) * heads,)](
        *call.inputs,
        out,
        lse,
        None,
        *call.sizes,
        attention.query_max,
        0,
        call.threshold,
        attention.scale,
        call.keep_scale,
        *call.strides,
        **call.constants,
        **shape,
    )
    return Attended(out, lse)


def _forward_slots(
    call: Call, kernel: JITFunction, shape: dict[str, int], cut: shapes.Cut, lse: Tensor
) -> Attended:
    """The results by partials over slots of keys."""
    a = call.attention
    heads, value_dim = call.value.shape[1:]
    per_query = (cut.count, heads, a.query_max)
    part = lse.new_empty((*per_query, value_dim))
    largest, total = lse.new_empty(per_query), lse.new_empty(per_query)
    sizes = (*call.sizes, a.query_max, cut.rows)
    kernel[(cut.count * heads * -(-a.query_max // shape["BLOCK_Q"]),)](
        *call.inputs,
        *(part, largest, total),
        *sizes,
        call.threshold,
        a.scale,
        call.keep_scale,
        *call.strides,
        **call.constants,
        **shape,
    )
    out = lse.new_empty((a.query_total, heads, value_dim))
    blocks = max(1, -(-value_dim // shapes.SUM["BLOCK_C"]))
    cross_attention_merge_kernel[(a.query_total * heads * blocks,)](
        *(part, largest, total),
        *call.inputs[5:],
        out,
        lse,
        *sizes,
        call.keep_scale,
        HEADS=heads,
        DV=value_dim,
        **shapes.SUM,
    )
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
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `cross_attention_forward`, with the weights recomputed from `lse`.

    Args:
        d_results: gradients of both results.
        results: both results; out of the type of the query, or fp32.
        query, key, value, bias, attention: as given to the forward.
        needs: which gradients to compute; the others are None.

    Returns:
        d_query [Tq, H, d], d_key [Tk, H, d] and d_value [Tk, H, dv] of the types of their inputs;
        d_bias [Tk] fp32. Rows in no bag have gradient 0; where bags overlap theirs are summed in
        ascending order, with up to 32 queries per bag in the type of the keys.

    Cost: up to 32 queries per bag: keys and values are read once, their gradients written once.
    Beyond, they are read twice and each side once more per tile of the other, out of L2.
    """
    device = key.device
    gradients = (
        torch.empty(query.shape, dtype=query.dtype, device=device) if needs.query else None,
        torch.empty(key.shape, dtype=key.dtype, device=device) if needs.key else None,
        torch.empty(value.shape, dtype=value.dtype, device=device) if needs.value else None,
        torch.empty(bias.shape, dtype=torch.float32, device=device) if needs.bias else None,
    )
    if min(attention.key_total, attention.query_total, key.shape[1]) == 0:
        return tuple(None if g is None else g.zero_() for g in gradients)
    call = make_call(query, key, value, bias, attention)
    saved = tuple(t.contiguous() for t in (*results, *d_results))
    shape = shapes.few_shape(call.problem, call.limits, backward=True)
    cut = shape and shapes.few_backward_cut(call.problem, call.limits, shape)
    if cut is not None:
        _backward_few(call, shape, cut, saved, gradients)
    else:
        _backward_many(call, saved, gradients)
    return gradients


def _backward_few(
    call: Call,
    shape: dict[str, int],
    cut: shapes.Cut,
    saved: tuple[Tensor, ...],
    gradients: tuple[Tensor | None, ...],
) -> None:
    """Everything in one pass over the stored keys."""
    a, lse = call.attention, saved[1]
    d_query, d_key, d_value, d_bias = gradients
    n_keys, heads, width = call.key.shape
    part = None
    if d_query is not None:
        part = lse.new_empty((cut.count, heads, a.query_max, width))
    head_bias = _head_bias(call, d_bias)
    cross_attention_few_bwd_kernel[(-(-n_keys // cut.rows) * heads,)](
        *call.inputs,
        *saved,
        part,
        d_key,
        d_value,
        d_bias if head_bias is None else head_bias,
        *call.sizes,
        a.query_max,
        cut.rows,
        call.threshold,
        a.scale,
        call.keep_scale,
        *call.strides,
        **call.constants,
        **shape,
    )
    parts, sums = (part, None, None, head_bias), (d_query, None, d_bias)
    _sum(call, parts, sums, cut.rows, of_keys=False, stored=True)


def _backward_many(
    call: Call, saved: tuple[Tensor, ...], gradients: tuple[Tensor | None, ...]
) -> None:
    """d_query by tiles of queries, then the others by tiles of keys; the shorter side is cut."""
    a, problem, limits = call.attention, call.problem, call.limits
    d_query, d_key, d_value, d_bias = gradients
    n_queries, heads, width = call.query.shape
    out, lse, d_out, d_lse = saved
    # per result: the mean gradient of its weights, and what makes these sum to 1
    rows = lse.new_empty((2, *lse.shape))

    shape = shapes.query_shape(problem, limits)
    cut = None if d_query is None else shapes.key_slots(problem, limits, shape, width)
    part = None if cut is None else lse.new_empty((cut.count, heads, a.query_max, width))
    tiles = -(-n_queries // shape["BLOCK_Q"])
    if cut is not None:
        tiles = cut.count * -(-a.query_max // shape["BLOCK_Q"])
    cross_attention_bwd_query_kernel[(tiles * heads,)](
        *call.inputs,
        *(out, lse, d_out, d_lse, rows),
        d_query if part is None else part,
        *call.sizes,
        a.query_total,
        a.query_max,
        0 if cut is None else cut.rows,
        call.threshold,
        a.scale,
        call.keep_scale,
        *call.strides,
        **call.constants,
        **shape,
        SPLIT=cut is not None,
    )
    head_bias = None
    if d_key is not None or d_value is not None or d_bias is not None:
        head_bias = _backward_keys(call, (lse, d_out, d_lse, rows), gradients[1:])
    parts, sums = (part, None, None, head_bias), (d_query, None, d_bias)
    _sum(call, parts, sums, 0 if cut is None else cut.rows, of_keys=False)


def _backward_keys(
    call: Call, saved: tuple[Tensor, ...], gradients: tuple[Tensor | None, ...]
) -> Tensor | None:
    """d_key, d_value and d_bias by tiles of keys; returns d_bias by heads where still to sum."""
    a, problem, lse = call.attention, call.problem, saved[0]
    heads, width = call.key.shape[1:]
    shape = shapes.key_shape(problem, call.limits)
    cut = shapes.query_slots(problem, call.limits, shape)
    targets, head_bias = list(gradients), None
    if cut is not None:
        tiles = cut.count * -(-a.key_max // shape["BLOCK_N"])
        per_key = (cut.count, heads, a.key_max)
        sizes = ((*per_key, width), (*per_key, call.value.shape[2]), per_key)
        targets = [g if g is None else lse.new_empty(s) for g, s in zip(gradients, sizes)]
    else:
        tiles = -(-call.key.shape[0] // shape["BLOCK_N"])
        head_bias = _head_bias(call, gradients[2])
        targets[2] = gradients[2] if head_bias is None else head_bias
    cross_attention_bwd_key_kernel[(tiles * heads,)](
        *call.inputs,
        *saved,
        *targets,
        *call.sizes,
        a.query_total,
        a.key_max,
        0 if cut is None else cut.rows,
        call.threshold,
        a.scale,
        call.keep_scale,
        *call.strides,
        **call.constants,
        **shape,
        SPLIT=cut is not None,
    )
    if cut is not None:
        _sum(call, (*targets, None), gradients, cut.rows, of_keys=True)
    return head_bias


def _head_bias(call: Call, d_bias: Tensor | None) -> Tensor | None:
    """[H, Tk] for what each head gives d_bias; None where there is one head, or it is not wanted.

    Programs of different heads would add to the same numbers. Apart, they cost 8 bytes per key and
    head, a fraction 1 / d of what is moved anyway, and no program has to hold every head.
    """
    n_keys, heads = call.key.shape[:2]
    if d_bias is None or heads == 1:
        return None
    return d_bias.new_empty((heads, n_keys))


def _sum(
    call: Call,
    parts: tuple[Tensor | None, ...],
    sums: tuple[Tensor | None, ...],
    rows: int,
    *,
    of_keys: bool,
    stored: bool = False,
) -> None:
    """Add up `parts`, pieces of `rows` rows of the other side, and d_bias by heads, the last."""
    if all(part is None for part in parts):
        return
    a, heads = call.attention, call.key.shape[1]
    n_bags, n_queries, n_keys = call.sizes
    ranges = call.inputs[5:]
    n_stored, n_cut, longest = n_queries, n_keys, a.query_max
    if of_keys:
        ranges = (*ranges[2:], *ranges[:2])
        n_stored, n_cut, longest = n_keys, n_queries, a.key_max
    widths = call.key.shape[2], call.value.shape[2]
    strips = sum(
        -(-width // shapes.SUM["BLOCK_C"])
        for part, width in zip(parts, (*widths, 1))
        if part is not None
    )
    programs = n_stored * heads * strips
    if parts[3] is not None:
        programs += -(-n_keys // shapes.BLOCK_T)
    cross_attention_sum_kernel[(programs,)](
        *parts,
        *ranges,
        *sums,
        n_bags,
        n_stored,
        n_cut,
        n_keys,
        longest,
        rows,
        HEADS=heads,
        D=widths[0],
        DV=widths[1],
        STORED=stored,
        BLOCK_T=shapes.BLOCK_T,
        **shapes.SUM,
    )
