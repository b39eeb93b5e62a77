"""The launches that make up gated attention pooling, chunk by chunk."""

from __future__ import annotations

import torch
from torch import Tensor

from survfuse.pooling import Gate, GatedBag, GatedNeeds

from . import gated_attention_pool_shapes as shapes
from . import pool_bag_passes as passes
from . import pool_bag_shapes
from .gated_attention_pool_backward import (
    gated_bag_kernel,
    gated_hidden_kernel,
    gated_weights_kernel,
)
from .gated_attention_pool_hidden import gated_scores_kernel
from .pool_bag_call import Call


def as_multiplied(gate: Gate, bag: Tensor) -> Gate:
    """Weights in the type of the bag, biases in fp32; small copies."""

    def cast(tensor: Tensor | None, kind: torch.dtype) -> Tensor | None:
        return None if tensor is None else tensor.to(kind).contiguous()

    kinds = (bag.dtype, torch.float32) * 3
    return Gate(*(cast(tensor, kind) for tensor, kind in zip(gate, kinds, strict=True)))


def row_inputs(call: Call) -> tuple[Tensor | None, ...]:
    """The bag and what belongs to it, as the kernels that score it take them."""
    return call.bag, call.bias, call.seed, call.starts, call.lengths


def constants(call: Call, n_hidden: int) -> dict[str, object]:
    """What those kernels are compiled for, beside their blocks."""
    shared = {key: call.constants[key] for key in ("STRIDE_UNIT", "D", "PRECISION")}
    return {**shared, "L": n_hidden}


def pool(call: Call, gate: Gate, pooled: Tensor) -> GatedBag:
    """Fill pooled, and lse: scores of ours, then the product and merge of pool_bag's wide route."""
    n_bags, n_pools, width = call.shape
    n_hidden = gate.w_tanh.shape[0]
    scores = shapes.hidden_shape(call.problem, call.limits, n_hidden)
    product = pool_bag_shapes.product_shape(call.problem, call.limits)
    tile, stride = scores["BLOCK_T"], -(-n_pools // 16) * 16
    programs = -(-n_pools // product["BLOCK_R"]) * -(-width // product["BLOCK_D"])
    row_bytes = stride * call.bag.element_size() + 4 + 16 * n_pools // tile
    slots = call.plan(tile, programs=programs, row_bytes=row_bytes)
    part, statistics = passes._partials(call, slots)
    n_scratch = slots.chunk * slots.rows
    coef = call.bag.new_empty((n_scratch, stride))
    # per tile: the exponent its weights stand over, their sum, and that of the kept ones
    sums = passes.planes(part, 3, n_scratch // tile * n_pools)
    state = passes.State(pooled, call)
    for first in range(0, slots.count, slots.chunk):
        chunk = min(slots.chunk, slots.count - first)
        sizes = (n_bags, call.bag.shape[0], n_pools, first, slots.rows)
        gated_scores_kernel[(chunk * (slots.rows // tile),)](
            *gate,
            *row_inputs(call),
            coef,
            *sums,
            *sizes,
            call.threshold,
            call.row_stride,
            stride,
            **constants(call, n_hidden),
            **scores,
        )
        passes.pool_bag_product_kernel[(chunk * programs,)](
            call.bag,
            call.bias,
            call.starts,
            call.lengths,
            coef,
            part,  # in place of the rows' means: not normalised, never read
            sums[0],
            sums[0],  # the same
            *sums[1:],
            part,
            *statistics,
            *sizes,
            call.scale,
            call.row_stride,
            stride,
            **call.constants,
            BLOCK_T=tile,
            **product,
        )
        state.merge(part, statistics, first, chunk, slots.rows)
    return GatedBag(*state.results[:2])


class Gradients:
    """Gradients of parameters and stored rows, summed over chunks in order."""

    def __init__(self, bag: Tensor, gate: Gate, needs: GatedNeeds) -> None:
        self.bag, self.needs = bag, needs
        self.gate = as_multiplied(gate, bag)
        self.n_hidden, width = gate.w_tanh.shape
        n_pools, self.padded = gate.w_score.shape[0], -(-self.n_hidden // 16) * 16
        # tanh, then gate, each padded
        self.d_weights = bag.new_zeros((2, self.padded, width), dtype=torch.float32)
        self.d_biases = bag.new_zeros((2, self.padded), dtype=torch.float32)
        self.d_score = bag.new_zeros((n_pools, self.n_hidden), dtype=torch.float32)
        shape, device = bag.shape, bag.device
        self.d_bag = torch.zeros(shape, dtype=bag.dtype, device=device) if needs.bag else None
        self.d_bias = bag.new_zeros(bag.shape[:1], dtype=torch.float32) if needs.bias else None

    def run(self, call: Call, dz: Tensor, per_row: Tensor) -> None:
        """All chunks."""
        n_bags, n_pools, width = call.shape
        # gradients of stored rows follow the stored rows, others the bags: docs/kernels.md
        stored = self.needs.bag or self.needs.bias
        rows = shapes.SLOT_ROWS
        n_slots = -(-self.bag.shape[0] // rows)
        if not stored:
            n_slots = min(call.total // rows + n_bags, n_bags * -(-call.max_length // rows))
        if n_slots == 0:
            return
        hidden = shapes.hidden_shape(call.problem, call.limits, self.n_hidden)
        plan = shapes.plan_backward(
            call.problem,
            call.limits,
            n_slots=n_slots,
            n_hidden=self.n_hidden,
            block_t=hidden["BLOCK_T"],
            batch_bytes=call.total * width * self.bag.element_size(),
        )
        n_rows, n_tiles = plan.slots.chunk * rows, plan.slots.chunk * rows // hidden["BLOCK_T"]
        new = self.d_biases.new_empty
        self.hidden = self.bag.new_empty((n_rows, 2 * self.padded))
        self.units, self.part_bias = new(n_rows), new((n_tiles, 2, self.padded))
        self.part_score = new((n_tiles, n_pools, self.n_hidden))
        self.logits = new((n_rows, n_pools)) if self.needs.bag else None
        self.part = new((plan.splits, 2, self.padded, width))
        for first in range(0, n_slots, plan.slots.chunk):
            chunk = min(plan.slots.chunk, n_slots - first)
            self._hidden(call, dz, per_row, first, chunk, hidden, stored)
            self._weights(call, first, chunk, plan.splits, stored)
            if self.d_bag is not None:
                self._stored_rows(call, dz, per_row, first, chunk)
        if self.needs.w_tanh or self.needs.w_gate:
            torch.sum(self.part, 0, out=self.d_weights)

    def _hidden(
        self,
        call: Call,
        dz: Tensor,
        per_row: Tensor,
        first: int,
        chunk: int,
        shape: dict[str, int],
        stored: bool,
    ) -> None:
        """The gradient of the hidden layer of a chunk, and the sums that need no product."""
        n_tiles = chunk * (shapes.SLOT_ROWS // shape["BLOCK_T"])
        gated_hidden_kernel[(n_tiles,)](
            *self.gate,
            dz,
            per_row,
            *row_inputs(call),
            self.hidden,
            self.units,
            self.logits,
            self.d_bias,
            self.part_bias,
            self.part_score,
            call.shape[0],
            self.bag.shape[0],
            call.shape[1],
            first,
            shapes.SLOT_ROWS,
            call.threshold,
            call.keep_scale,
            call.row_stride,
            STORED=stored,
            **constants(call, self.n_hidden),
            **shape,
        )
        self.d_biases += self.part_bias[:n_tiles].sum(0)
        self.d_score += self.part_score[:n_tiles].sum(0)

    def _weights(self, call: Call, first: int, chunk: int, splits: int, stored: bool) -> None:
        """What the chunk adds to the gradients of both weights."""
        if not (self.needs.w_tanh or self.needs.w_gate):
            return
        shape = shapes.weights_shape(call.problem, call.limits, self.n_hidden)
        blocks = -(-2 * self.padded // shape["BLOCK_L"]) * -(-call.shape[2] // shape["BLOCK_D"])
        gated_weights_kernel[(splits * blocks,)](
            self.bag,
            call.starts,
            call.lengths,
            self.hidden,
            self.units,
            self.part,
            call.shape[0],
            self.bag.shape[0],
            first,
            shapes.SLOT_ROWS,
            chunk,
            splits,
            call.row_stride,
            STORED=stored,
            FIRST=first == 0,
            **constants(call, self.n_hidden),
            **shape,
        )

    def _stored_rows(self, call: Call, dz: Tensor, per_row: Tensor, first: int, chunk: int) -> None:
        """d_bag of a chunk of stored rows."""
        shape = shapes.bag_shape(call.problem, self.n_hidden)
        n_tiles = chunk * (shapes.SLOT_ROWS // shape["BLOCK_N"])
        gated_bag_kernel[(n_tiles * -(-call.shape[2] // shape["BLOCK_D"]),)](
            self.gate.w_tanh,
            self.gate.w_gate,
            dz,
            per_row,
            call.seed,
            call.starts,
            call.lengths,
            self.hidden,
            self.units,
            self.logits,
            self.d_bag,
            call.shape[0],
            self.bag.shape[0],
            call.shape[1],
            first,
            shapes.SLOT_ROWS,
            call.threshold,
            call.keep_scale,
            D=call.shape[2],
            L=self.n_hidden,
            PRECISION=call.constants["PRECISION"],
            **shape,
        )

    def results(self) -> tuple[Tensor | None, ...]:
        """d_bag, d_w_tanh, d_b_tanh, d_w_gate, d_b_gate, d_w_score and d_bias."""
        needs, n = self.needs, self.n_hidden
        # an operation's results may not share memory
        weights = [half.clone() for half in self.d_weights[:, :n]]
        biases = [half.clone() for half in self.d_biases[:, :n]]
        return (
            self.d_bag,
            weights[0] if needs.w_tanh else None,
            biases[0] if needs.b_tanh else None,
            weights[1] if needs.w_gate else None,
            biases[1] if needs.b_gate else None,
            self.d_score if needs.w_score else None,
            self.d_bias,
        )
