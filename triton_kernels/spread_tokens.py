"""Spread a few keys over a ragged bag in Triton: the launchers.

Contract: survfuse/ops/spread_tokens.py.  Oracle: survfuse/reference/spread_tokens.py.  Math:
docs/math.md, "Spreading tokens over a bag".  Layout, traffic and registers: docs/kernels.md.
spread_tokens_forward.py reads the bag and writes out; spread_tokens_backward.py sums over patches,
with the product of pool_bag_wide.py for d_keys; spread_tokens_trained.py gives d_bag.

No autograd, no validation and no host synchronisation. Every reduction has a fixed order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from survfuse.attention import Attended
from survfuse.pooling import Pooling, SpreadNeeds

from . import pool_bag_shapes
from . import spread_tokens_shapes as shapes
from .pool_bag_call import Call, make_call
from .pool_bag_passes import planes, prepare, sum_slots
from .pool_bag_wide import pool_bag_product_kernel
from .spread_tokens_backward import (
    spread_tokens_bwd_kernel,
    spread_tokens_rows_kernel,
    spread_tokens_sum_kernel,
)
from .spread_tokens_forward import spread_tokens_fwd_kernel
from .spread_tokens_trained import spread_tokens_bag_kernel

_SUM = {"BLOCK_S": 64, "BLOCK_C": 32, "num_warps": 4, "num_stages": 2}


def spread_tokens_forward(
    keys: Tensor, values: Tensor, bag: Tensor, key_bias: Tensor | None, pooling: Pooling
) -> Attended:
    """o_ih = sum_j softmax_j(scale * x_i . k_hj + bias_hj) v_hj.

    Args:
        keys: [B, H, Lk, D] fp32, or the type of the bag.
        values: [B, H, Lk, dv], of the type of the keys or of the bag.
        bag: [T, D] fp32, bf16 or fp16, any row stride. Rows in no bag are never read.
        key_bias: [B, H, Lk], or None.
        pooling: the rest; ranges are clamped to the stored rows, statistics are fp32.

    Returns:
        out [total, H, dv] of the type of the values, lse [total, H] fp32.

    Cost: each row is read once from memory, by cdiv(H, BLOCK_H) neighbouring programs that share
    L2, times cdiv(Lk, BLOCK_L); up to 64 keys over all heads (32 in fp32) are one program. Two
    launches.
    """
    heads, n_keys, value_dim = *keys.shape[1:3], values.shape[3]
    out = torch.empty((pooling.total, heads, value_dim), dtype=values.dtype, device=bag.device)
    lse = torch.empty((pooling.total, heads), dtype=torch.float32, device=bag.device)
    if min(pooling.total, heads, n_keys, value_dim) == 0:
        # without values there is still a logsumexp, of no use to anybody
        return Attended(out.zero_(), lse.fill_(-torch.inf))
    call, inputs, constants = _prepare(keys, values, bag, key_bias, pooling)
    blocks = _blocks(call, keys, values, backward=False)
    tiles = _tiles(pooling, keys.shape[0], blocks["BLOCK_N"])
    h_blocks, v_blocks = -(-heads // blocks["BLOCK_H"]), -(-value_dim // blocks["BLOCK_V"])
    spread_tokens_fwd_kernel[(tiles * h_blocks * v_blocks,)](
        *inputs,
        out,
        lse,
        keys.shape[0],
        bag.shape[0],
        n_keys,
        call.threshold,
        call.scale,
        call.eps,
        call.keep_scale,
        call.row_stride,
        **constants,
        **blocks,
    )
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
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `spread_tokens_forward`, with the weights recomputed from `lse`.

    Returns:
        d_keys and d_values fp32, d_bag [T, D] of the type of the bag, d_key_bias fp32; None where
        not needed. Rows in no bag have gradient 0; those of overlapping bags are summed in
        ascending order and rounded once.

    Cost: d_keys, d_values and d_key_bias read the bag as the forward does and, for the product with
    the kept d_logits, cdiv(H * Lk, 128) times more, out of L2 where a chunk fits it. d_bag reads it
    cdiv(D, 256) times (128 in fp32) per block of keys, out of L2 but for the first. More keys than
    a block holds are scored once more, for what needs all of them.
    """
    n_bags, heads, n_keys, width = keys.shape
    value_dim = values.shape[3]
    fp32 = {"dtype": torch.float32, "device": bag.device}
    d_keys = torch.empty(keys.shape, **fp32) if needs.keys else None
    d_values = torch.empty(values.shape, **fp32) if needs.values else None
    d_bag = torch.empty(bag.shape, dtype=bag.dtype, device=bag.device) if needs.bag else None
    d_bias = torch.empty(keys.shape[:3], **fp32) if needs.key_bias else None
    gradients = (d_keys, d_values, d_bag, d_bias)
    if min(pooling.total, heads, n_keys, value_dim) == 0:
        return tuple(None if g is None else g.zero_() for g in gradients)
    call, inputs, constants = _prepare(keys, values, bag, key_bias, pooling)
    blocks = _blocks(call, keys, values, backward=True)
    saved = [lse, *(t.contiguous() for t in d_results)]
    whole = n_keys <= blocks["BLOCK_L"]
    sizes = (n_bags, bag.shape[0], n_keys, pooling.total)
    numbers = (call.threshold, call.scale, call.eps, call.keep_scale, call.row_stride)
    rows = None
    if not whole:
        rows = torch.empty((2, *lse.shape), **fp32)
        tiles = _tiles(pooling, n_bags, blocks["BLOCK_N"])
        shape = blocks if call.problem.half else {**blocks, "num_warps": 4}
        spread_tokens_rows_kernel[(tiles * -(-heads // blocks["BLOCK_H"]),)](
            *inputs, *saved[:2], rows, *sizes, *numbers, **constants, **shape
        )
    saved.append(rows)
    if needs.keys or needs.values or needs.key_bias:
        _sum_over_patches(
            call, blocks, (*inputs, *saved), constants, sizes, whole, (d_keys, d_values, d_bias)
        )
    if d_bag is not None:
        shape = shapes.trained_blocks(call.problem, blocks, crowded=_crowded(call, keys))
        grid = -(-bag.shape[0] // shape["BLOCK_N"]) * -(-width // shape["BLOCK_D"])
        spread_tokens_bag_kernel[(grid,)](
            *inputs, *saved, d_bag, *sizes, *numbers, **constants, **shape, WHOLE=whole
        )
    return gradients


def _sum_over_patches(
    call: Call,
    blocks: dict[str, int],
    inputs: tuple[Tensor | None, ...],
    constants: dict[str, object],
    sizes: tuple[int, ...],
    whole: bool,
    gradients: tuple[Tensor | None, ...],
) -> None:
    """Fill d_keys, d_values and d_key_bias, chunk of slots by chunk."""
    bag, (n_bags, n_rows, width) = call.bag, call.shape
    d_keys, d_values, d_bias = gradients
    heads, value_dim, n_keys = constants["HEADS"], constants["DV"], sizes[2]
    tile, piece = blocks["BLOCK_N"], blocks["BLOCK_N"] * shapes.TILES
    product = pool_bag_shapes.product_shape(call.problem, call.limits)
    stride = -(-n_rows // 16) * 16
    programs = -(-n_rows // product["BLOCK_R"]) * -(-width // product["BLOCK_D"])
    row_bytes = stride * bag.element_size() + 4 + 12 * n_rows // tile
    row_bytes += 4 * n_rows * value_dim // piece
    slots = call.plan(piece, programs=programs, row_bytes=row_bytes)
    n_scratch = slots.chunk * slots.rows
    part = torch.empty((slots.chunk, n_rows, width), dtype=torch.float32, device=bag.device)
    part_max, part_sum, part_weight = planes(part, 3, slots.chunk * n_rows)
    tiles = planes(part, 3, n_scratch // tile * n_rows)
    coef = torch.empty((n_scratch, stride), dtype=bag.dtype, device=bag.device)
    row_mean = part.new_empty((n_scratch if call.normalize else 1,))
    part_values = part.new_empty((n_scratch // piece, n_rows, value_dim))
    with_product = d_keys is not None or d_bias is not None
    # sums of what nobody asked for go where nobody looks
    d_values = part.new_empty((n_bags, n_rows, value_dim)) if d_values is None else d_values
    d_bias = part.new_empty((n_bags, n_rows)) if d_bias is None else d_bias
    grid = -(-heads // blocks["BLOCK_H"]) * -(-n_keys // blocks["BLOCK_L"])
    grid *= -(-value_dim // blocks["BLOCK_V"])
    for first in range(0, slots.count, slots.chunk):
        chunk = min(slots.chunk, slots.count - first)
        spread_tokens_bwd_kernel[(chunk * (slots.rows // piece) * grid,)](
            *inputs,
            *(coef, row_mean, *tiles, part_values),
            *sizes,
            first,
            slots.rows,
            *(call.threshold, call.scale, call.eps, call.keep_scale),
            *(call.row_stride, stride),
            **constants,
            **blocks,
            TILES=shapes.TILES,
            WHOLE=whole,
        )
        if with_product:
            pool_bag_product_kernel[(chunk * programs,)](
                *(bag, None, call.starts, call.lengths, coef, row_mean, *tiles, None),
                *(part, part_max, part_sum, part_weight),
                *(n_bags, bag.shape[0], n_rows, first, slots.rows),
                *(call.scale, call.row_stride, stride),
                **call.constants,
                BLOCK_T=tile,
                **product,
            )
        if d_keys is not None:
            sum_slots(call, part, None, part, part_sum, d_keys, first, chunk, slots.rows)
        strips = -(-value_dim // _SUM["BLOCK_C"])
        spread_tokens_sum_kernel[(n_bags * n_rows * strips,)](
            *(part_values, part_sum, call.starts, call.lengths, d_values, d_bias),
            *(n_bags, bag.shape[0], n_rows, first, chunk, slots.rows, piece),
            DV=value_dim,
            FIRST=first == 0,
            **_SUM,
        )


def _prepare(
    keys: Tensor, values: Tensor, bag: Tensor, key_bias: Tensor | None, pooling: Pooling
) -> tuple[Call, tuple[Tensor | None, ...], dict[str, object]]:
    """The call as that of `pool_bag` with rows [B, H * Lk, D], inputs and constants."""
    heads = keys.shape[1]
    rows = keys.flatten(1, 2)
    rows = rows if rows.stride(2) == 1 else rows.contiguous()
    call = make_call(rows, bag, None, pooling)
    a, _, per_key = prepare(call, rows)
    key_bias = None if key_bias is None else key_bias.contiguous()
    inputs = (a, per_key, values.contiguous(), key_bias, bag, *call.inputs[2:])
    return call, inputs, {**call.constants, "HEADS": heads, "DV": values.shape[3]}


def _crowded(call: Call, keys: Tensor) -> bool:
    return call.seed is not None or keys.dtype != call.bag.dtype


def _blocks(call: Call, keys: Tensor, values: Tensor, *, backward: bool) -> dict[str, int]:
    return shapes.blocks(
        call.problem,
        call.limits,
        heads=keys.shape[1],
        keys=keys.shape[2],
        value_dim=values.shape[3],
        crowded=_crowded(call, keys),
        backward=backward,
    )


def _tiles(pooling: Pooling, n_bags: int, rows: int) -> int:
    """At most so many slots of `rows` rows."""
    return min(pooling.total // rows + n_bags, n_bags * -(-pooling.max_length // rows))
