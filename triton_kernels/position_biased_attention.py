"""Attention biased by an MLP of positions in Triton: the launchers.

Contract: survfuse/ops/position_biased_attention.py.
Oracle: survfuse/reference/position_biased_attention.py.
Math: docs/math.md, "Attention biased by position".  Layout, traffic and registers: docs/kernels.md.
position_biased_attention_queries.py has the forward and the gradients of queries,
position_biased_attention_keys.py those of keys and of the bias.

No autograd, no validation and no host synchronisation. Every sum has a fixed order but that of the
gradient of a table, unless torch is told to be deterministic.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from survfuse.attention import Attended
from survfuse.position_bias import PositionBias, PositionedAttention, PositionedNeeds

from . import pool_bag_shapes
from . import position_biased_attention_shapes as shapes
from .pool_bag_call import products_precision
from .position_biased_attention_keys import position_biased_key_kernel
from .position_biased_attention_queries import (
    position_biased_fwd_kernel,
    position_biased_query_kernel,
)
from .position_biased_attention_sums import (
    position_biased_rows_kernel,
    position_biased_slots_kernel,
)

_ROWS = {"BLOCK_R": 16, "BLOCK_C": 64, "num_warps": 4, "num_stages": 1}
_SLOTS = {"BLOCK_C": 256, "num_warps": 4, "num_stages": 1}


def position_biased_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_pos: Tensor,
    key_pos: Tensor,
    bias: PositionBias,
    attention: PositionedAttention,
) -> Attended:
    """o_ih = sum_j softmax_j(scale * q_ih . k_jh + bias_h(p_i - p_j)) v_jh.

    Args:
        query: [T, H, d] bf16, fp16 or fp32; any strides with a unit last one, as key and value.
        key: [B, M, H, d], value [B, M, H, dv].
        query_pos: [T, 2] fp32, contiguous, as key_pos [B, G, M, 2].
        bias: the MLP, of 1 to 3 hidden layers of up to 64 units, or a table.
        attention: the rest; ranges are clamped to the stored rows.

    Returns:
        out [total, H, dv] of the type of the query, lse [total, H] fp32.

    Cost: the MLP once per pair and head; keys and values once per tile of queries, out of L2. One
    launch.
    """
    total, heads = attention.total, query.shape[1]
    out = query.new_empty((total, heads, value.shape[3]))
    lse = torch.empty((total, heads), dtype=torch.float32, device=key.device)
    if min(total, key.shape[1], value.shape[3]) == 0:
        # without values there is still a logsumexp, of no use to anybody
        return Attended(out.zero_(), lse.fill_(-torch.inf))
    call = _Call(query, key, value, query_pos, key_pos, bias, attention)
    blocks = shapes.forward_blocks(call.problem)
    programs = call.tiles(blocks) * query.shape[1]
    position_biased_fwd_kernel[(programs,)](
        *call.inputs,
        out,
        lse,
        *call.sizes,
        *call.numbers,
        **call.constants,
        **blocks,
    )
    return Attended(out, lse)


def position_biased_attention_backward(
    d_results: Attended,
    results: Attended,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_pos: Tensor,
    key_pos: Tensor,
    bias: PositionBias,
    attention: PositionedAttention,
    needs: PositionedNeeds,
) -> tuple[Tensor | None, ...]:
    """Gradients of `position_biased_attention_forward`, with the weights recomputed from `lse`.

    Returns:
        In the order of `needs`, None where not needed: d_query, d_key and d_value of the types of
        their inputs, d_query_pos, d_key_pos and that of the bias' parameters fp32. Rows in no bag
        have gradient 0; those of overlapping bags are summed in ascending order.

    Cost: the MLP is evaluated twice per pair, by queries and by keys, and differentiated where the
    places of either or its parameters want it; more often where one launch cannot hold all sums
    (position_biased_attention_shapes.py). Workspace: one fp32 d_query; partials of the keys'
    gradients, and those of the MLP's parameters, each under max(16 MB, one set).
    """
    likes = (query, key, value, query_pos, key_pos, bias.parameters)
    gradients = PositionedNeeds(
        *(
            torch.zeros(like.shape, dtype=like.dtype, device=like.device) if need else None
            for like, need in zip(likes, needs, strict=True)
        )
    )
    if min(attention.total, key.shape[1], value.shape[3]) == 0:
        return tuple(gradients)
    call = _Call(query, key, value, query_pos, key_pos, bias, attention)
    out, d_out, d_lse = (t.contiguous() for t in (results.out, *d_results))
    lse = results.lse.contiguous()
    # per result: the mean gradient of its weights, and what makes these sum to 1
    rows = lse.new_empty((2, *lse.shape))
    packed = lse.new_empty((attention.total, *query.shape[1:])) if needs.query else None
    moved = lse.new_empty((attention.total, query.shape[1], 2)) if needs.query_pos else None
    launches = shapes.query_launches(call.problem, moves=needs.query_pos)
    for launch in call.needed(launches, packed, moved, None):
        programs = call.tiles(launch.blocks) * query.shape[1]
        position_biased_query_kernel[(programs,)](
            *call.inputs,
            *(out, lse, d_out, d_lse, rows),
            packed if launch.features else None,
            moved if launch.moves else None,
            *call.sizes,
            attention.total,
            *call.numbers,
            **call.constants,
            **launch.blocks,
        )
    call.unpack(packed, gradients.query, 1)
    call.unpack(moved, gradients.query_pos, query.shape[1])
    if needs.key or needs.value or needs.key_pos or needs.bias:
        return tuple(_backward_keys(call, (lse, d_out, d_lse, rows), gradients))
    return tuple(gradients)


def _backward_keys(
    call: _Call, saved: tuple[Tensor, ...], gradients: PositionedNeeds
) -> PositionedNeeds:
    """Fill d_key, d_value and d_key_pos; the gradients with that of the bias."""
    a, lse = call.attention, saved[0]
    n_bags, n_keys, heads, width = call.key.shape
    value_dim = call.value.shape[3]
    launches = shapes.key_launches(call.problem)
    block_q, block_n = (launches[0].blocks[name] for name in ("BLOCK_Q", "BLOCK_N"))
    n_tiles = -(-n_keys // block_n)
    rows = shapes.rows_per_slot(
        a.total,
        n_bags,
        block_q,
        programs=n_tiles * heads,
        slot_bytes=4 * n_keys * heads * (width + value_dim + 2),
        limits=pool_bag_shapes.device_limits(call.key.device),
    )
    n_slots = shapes.slots(a.total, a.max_length, n_bags, rows)
    d_bias, per_unit, run = gradients.bias, None, 1
    if d_bias is not None and call.bias.reach is None:
        run = shapes.tiles_per_program(n_slots * heads, n_tiles, 4 * d_bias.numel())
    programs = n_slots * -(-n_tiles // run) * heads
    if d_bias is not None and call.bias.reach is None:
        d_bias = lse.new_zeros((programs, d_bias.numel()))
    elif d_bias is not None and torch.are_deterministic_algorithms_enabled():
        d_bias, per_unit = d_bias.to(torch.int64), call.units(saved)
    sizes = (
        (n_slots, n_keys, heads, width),
        (n_slots, n_keys, heads, value_dim),
        (n_slots, heads, n_keys, 2),
    )
    targets = (gradients.key, gradients.value, gradients.key_pos)
    parts = [
        None if target is None else lse.new_empty(size)
        for target, size in zip(targets, sizes, strict=True)
    ]
    features = parts[0] if parts[0] is not None else parts[1]
    for launch in call.needed(launches, features, parts[2], d_bias):
        adds = launch.adds if d_bias is not None else 0
        position_biased_key_kernel[(programs,)](
            *call.inputs,
            *saved,
            per_unit,
            *(part if launch.features else None for part in parts[:2]),
            parts[2] if launch.moves else None,
            d_bias if adds else None,
            *call.sizes,
            rows,
            run,
            a.total,
            *call.numbers,
            **call.constants,
            **launch.blocks,
            N_WARPS=launch.blocks["num_warps"],
            ADDS=adds,
        )
    split = (1, 1, heads // call.key_pos.shape[1])
    for part, target, n_parts in zip(parts, targets, split, strict=True):
        call.add_slots(part, target, rows, n_parts)
    if d_bias is not None and call.bias.reach is None:
        d_bias = d_bias.sum(0)
        # what is added to all logits of a row moves its lse alone
        by_head = saved[2].view(a.total, -1, heads // call.key_pos.shape[1])
        d_bias[-by_head.shape[2] :] = by_head.sum((0, 1))
    elif per_unit is not None:
        d_bias = (d_bias / per_unit).to(torch.float32)
    return gradients._replace(bias=d_bias)


class _Call(NamedTuple):
    """What every kernel of one call shares."""

    query: Tensor
    key: Tensor
    value: Tensor
    query_pos: Tensor
    key_pos: Tensor
    bias: PositionBias
    attention: PositionedAttention

    @property
    def problem(self) -> shapes.Problem:
        """What blocks depend on."""
        return shapes.Problem(
            dtype=self.key.dtype,
            head_dim=self.key.shape[3],
            value_dim=self.value.shape[3],
            width=self.bias.width,
            depth=self.bias.depth,
            dropout=self.attention.dropout_p > 0,
            shared_bytes=pool_bag_shapes.device_limits(self.key.device).shared_bytes,
        )

    def tiles(self, blocks: dict[str, int]) -> int:
        """At most so many tiles of queries."""
        a = self.attention
        return shapes.slots(a.total, a.max_length, self.key.shape[0], blocks["BLOCK_Q"])

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        """What every kernel reads, in its order."""
        a = self.attention
        seed = a.seed if a.dropout_p > 0 else None
        return (*self[:5], self.bias.parameters, self.bias.reach, seed, a.starts, a.lengths)

    @staticmethod
    def needed(
        launches: list[shapes.Launch],
        features: Tensor | None,
        places: Tensor | None,
        bias: Tensor | None,
    ) -> list[shapes.Launch]:
        """Those of `launches` that write what there is; the first, if none does."""
        found = [
            launch
            for launch in launches
            if (launch.features and features is not None)
            or (launch.moves and places is not None)
            or (launch.adds and bias is not None)
        ]
        return found or launches[:1]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bags, stored queries, keys of a bag, nodes along a table's axis."""
        nodes = 0 if self.bias.reach is None else self.bias.parameters.shape[1]
        return self.key.shape[0], self.query.shape[0], self.key.shape[1], nodes

    @property
    def _strides(self) -> tuple[tuple[int, ...], ...]:
        # where there is one row or head, its stride is never used and may be anything
        return tuple(
            tuple(t.stride(axis) if t.shape[axis] > 1 else 0 for axis in range(t.dim() - 1))
            for t in (self.query, self.key, self.value)
        )

    @property
    def _units(self) -> tuple[int, ...]:
        # Triton by itself tells only multiples of 16, and heads of 24 would lose their wide loads
        return tuple(math.gcd(*strides, 16) for strides in self._strides)

    @property
    def numbers(self) -> tuple[float, ...]:
        """Of dropout and scale, and the strides in their units."""
        p = self.attention.dropout_p
        # as survfuse/reference/dropout.py; p = 1 drops all: no weight is left to scale
        threshold = min(round(p * 2**32), 2**32 - 1)
        keep_scale = 1.0 / (1.0 - p) if p < 1 else 0.0
        pairs = zip(self._strides, self._units, strict=True)
        strides = (stride // unit for strides, unit in pairs for stride in strides)
        return threshold, self.attention.scale, keep_scale, *strides

    @property
    def constants(self) -> dict[str, object]:
        """What the kernels are compiled for, beside their blocks."""
        names = ("QUERY_UNIT", "KEY_UNIT", "VALUE_UNIT")
        return dict(zip(names, self._units, strict=True)) | {
            "HEADS": self.key.shape[2],
            "GROUPS": self.key_pos.shape[1],
            "D": self.key.shape[3],
            "DV": self.value.shape[3],
            "WIDTH": self.bias.width,
            "DEPTH": self.bias.depth,
            "PRECISION": products_precision(),
            "MLP_PRECISION": shapes.mlp_precision(products_precision()),
        }

    def unpack(self, packed: Tensor | None, stored: Tensor | None, n_parts: int) -> None:
        """Fill the gradient of stored rows from that of packed ones."""
        if packed is None:
            return
        n_rows, columns = stored.shape[0], math.prod(stored.shape[1:])
        block_c = min(_ROWS["BLOCK_C"], 1 << (columns - 1).bit_length())
        grid = -(-n_rows // _ROWS["BLOCK_R"]) * -(-columns // block_c)
        position_biased_rows_kernel[(grid,)](
            *(packed, self.attention.starts, self.attention.lengths, stored),
            *(self.key.shape[0], n_rows, n_parts),
            C=columns,
            **(_ROWS | {"BLOCK_C": block_c}),
        )

    def add_slots(self, part: Tensor | None, target: Tensor | None, rows: int, n_parts: int):
        """Fill a gradient [B, ...] of the keys from its slots."""
        if part is None:
            return
        n_bags = target.shape[0]
        size, inner = target[0].numel(), 2 * self.key.shape[1]
        position_biased_slots_kernel[(n_bags * -(-size // _SLOTS["BLOCK_C"]),)](
            *(part, self.attention.starts, self.attention.lengths, target),
            *(n_bags, self.query.shape[0], rows, size),
            *(size if n_parts == 1 else inner, n_parts),
            **_SLOTS,
        )

    def units(self, saved: tuple[Tensor, ...]) -> Tensor:
        """[1] fp64, a power of two: units of the fixed point in 1, so that no sum can overflow.

        A gradient of a logit is at most its weight, 1, times twice the largest gradient of a
        weight, and that of lse.
        """
        _, d_out, d_lse, _ = saved
        largest = [t.abs().amax().double() for t in (d_out, self.value, d_lse)]
        p = self.attention.dropout_p
        factor = 2.0 * self.value.shape[3] / (1.0 - p) if p < 1 else 0.0
        largest = factor * largest[0] * largest[1] + largest[2]
        _, exponent = torch.frexp(largest)
        n_terms = self.attention.total * self.key.shape[1] * self.key_pos.shape[1]
        # a bit for the sign, and two for rounding
        bits = 61 - math.ceil(math.log2(n_terms))
        unit = torch.exp2((bits - exponent).to(torch.float64))
        return torch.where(largest.isfinite(), unit, torch.nan).reshape(1)
